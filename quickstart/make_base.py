"""Build a tiny Stable Diffusion 1.x or XL folder to fine-tune: every part of the real thing, a few megabytes in all.

    python quickstart/make_base.py --output_dir quickstart-output/base

Only the VAE has been trained (`train_vae.py`; its weights lie in `quickstart/vae`). The text encoder is random and
stays so: all that the UNet needs is that different captions come out different. The UNet is random too, and learning
to draw is left to `train_text_to_image.py`. The same seed gives the same folder.

With `--sdxl` it is a folder in the layout of Stable Diffusion XL for `train_text_to_image_sdxl.py`: two text encoders
side by side, and a UNet that is also told the pooled text, the image's first size and the crop.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent))

from training_utils.base import startup

startup.prepare()

import torch  # noqa: E402
from diffusers import (  # noqa: E402
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from make_data import WORDS, caption  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers, trainers  # noqa: E402
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer  # noqa: E402

MAX_TOKENS = 16
WORD_END = "</w>"
TEXT_WIDTH = 64  # of a text encoder
TIME_ID_WIDTH = 16  # SDXL: sinusoids for each of six sizes
START, END = "<|startoftext|>", "<|endoftext|>"


def build_tokenizer() -> CLIPTokenizer:
    """CLIP's byte-pair tokenizer with merges learned from our ten captions; any other text falls apart into bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = Tokenizer(models.BPE(end_of_word_suffix=WORD_END))
    pairs.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(initial_alphabet=alphabet, end_of_word_suffix=WORD_END, show_progress=False)
    pairs.train_from_iterator((caption(digit) for digit in range(len(WORDS))), trainer)
    merges = [tuple(pair) for pair in json.loads(pairs.to_str())["model"]["merges"]]

    tokens = alphabet + [byte + WORD_END for byte in alphabet] + ["".join(pair) for pair in merges] + [START, END]
    vocab = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)


def build_text_encoder(tokenizer: CLIPTokenizer, kind=CLIPTextModel) -> CLIPTextModel:
    text_encoder = kind(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=MAX_TOKENS,
            hidden_size=TEXT_WIDTH,
            intermediate_size=128,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    # CLIP starts its word vectors so small that random layers drown them: captions would differ by a quarter only.
    torch.nn.init.normal_(text_encoder.get_input_embeddings().weight, std=0.4)
    return text_encoder


def build_unet(cross_attention_dim: int = TEXT_WIDTH, **options) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=4,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(64, 128),
        layers_per_block=1,
        cross_attention_dim=cross_attention_dim,
        attention_head_dim=4,
        norm_num_groups=16,
        **options,
    )


def build_sdxl_unet() -> UNet2DConditionModel:
    """The same network with what SDXL adds: pooled text and six sizes join the timestep."""
    return build_unet(
        cross_attention_dim=2 * TEXT_WIDTH,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_ID_WIDTH,
        projection_class_embeddings_input_dim=TEXT_WIDTH + 6 * TIME_ID_WIDTH,
    )


def build_scheduler() -> DDIMScheduler:
    """The noise of Stable Diffusion 1.x and XL."""
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        num_train_timesteps=1000,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def build_sd(vae_dir: Path) -> StableDiffusionPipeline:
    tokenizer = build_tokenizer()
    return StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(vae_dir),
        text_encoder=build_text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=build_unet(),
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def build_sdxl(vae_dir: Path) -> StableDiffusionXLPipeline:
    tokenizer = build_tokenizer()
    return StableDiffusionXLPipeline(
        vae=AutoencoderKL.from_pretrained(vae_dir),
        text_encoder=build_text_encoder(tokenizer),
        text_encoder_2=build_text_encoder(tokenizer, CLIPTextModelWithProjection),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=build_sdxl_unet(),
        scheduler=build_scheduler(),
        add_watermarker=False,
    )


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Build a tiny Stable Diffusion folder with an untrained UNet.")
    parser.add_argument("--output_dir", type=Path, default=Path("quickstart-output/base"), help="folder to write to")
    parser.add_argument("--sdxl", action="store_true", help="in the layout of SDXL instead of 1.x")
    parser.add_argument(
        "--vae_dir", type=Path, default=Path(__file__).parent / "vae", help="the VAE that train_vae.py wrote"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random text encoders and UNet")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    torch.manual_seed(args.seed)
    pipeline = build_sdxl(args.vae_dir) if args.sdxl else build_sd(args.vae_dir)
    pipeline.save_pretrained(args.output_dir)
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            print(f"{name}: {part.num_parameters():,} parameters")
    print(f"the base model is in {args.output_dir}")


if __name__ == "__main__":
    main()
