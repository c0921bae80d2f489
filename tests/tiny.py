"""Base models of a few hundred kilobytes and a handful of images, for tests."""

import json
import struct
import zlib

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    EulerDiscreteScheduler,
    KandinskyV22Pipeline,
    KandinskyV22PriorPipeline,
    PNDMScheduler,
    PriorTransformer,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UnCLIPScheduler,
    UNet2DConditionModel,
    VQModel,
)
from make_base import MAX_TOKENS, build_tokenizer
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

WORDS = "zero one two three four five six seven eight nine".split()


def _text_config(tokenizer, **changes):
    settings = dict(
        vocab_size=len(tokenizer),
        max_position_embeddings=MAX_TOKENS,
        hidden_size=16,
        intermediate_size=32,
        projection_dim=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextConfig(**(settings | changes))


def _vae():
    return AutoencoderKL(
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
    )


UNET = dict(
    sample_size=8,
    block_out_channels=(8, 16),
    layers_per_block=1,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    cross_attention_dim=16,
    attention_head_dim=2,
    norm_num_groups=4,
)
BETAS = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1)


def build_sd(folder, prediction_type="epsilon", **changes):
    """Write a tiny Stable Diffusion folder with random weights and return its path as a string; `changes` are to the
    UNet's shape."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    StableDiffusionPipeline(
        unet=UNet2DConditionModel(**UNET | changes),
        vae=_vae(),
        text_encoder=CLIPTextModel(_text_config(tokenizer)),
        tokenizer=tokenizer,
        scheduler=PNDMScheduler(skip_prk_steps=True, prediction_type=prediction_type, **BETAS),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return str(folder)


def build_sdxl(folder, zero_empty_prompt=True):
    """Write a tiny Stable Diffusion XL folder with random weights and return its path as a string."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    config = _text_config(tokenizer, hidden_act="gelu")
    StableDiffusionXLPipeline(
        unet=UNet2DConditionModel(
            **UNET
            | dict(
                cross_attention_dim=32,
                use_linear_projection=True,
                transformer_layers_per_block=(1, 2),
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=6 * 8 + 16,
            )
        ),
        vae=_vae(),
        text_encoder=CLIPTextModel(config),
        text_encoder_2=CLIPTextModelWithProjection(config),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        scheduler=EulerDiscreteScheduler(timestep_spacing="leading", **BETAS),
        force_zeros_for_empty_prompt=zero_empty_prompt,
    ).save_pretrained(folder)
    return str(folder)


def build_kandinsky_prior(folder):
    """Write a tiny Kandinsky 2.2 prior with random weights and return its path as a string."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    prior = PriorTransformer(
        num_attention_heads=2, attention_head_dim=8, num_layers=2, embedding_dim=16, num_embeddings=MAX_TOKENS
    )
    for parameter in (prior.positional_embedding, prior.prd_embedding, prior.clip_mean):  # else all of them are zero
        torch.nn.init.normal_(parameter, std=0.1)
    torch.nn.init.uniform_(prior.clip_std, 0.5, 1.5)
    vision = CLIPVisionConfig(
        image_size=16,
        patch_size=8,
        hidden_size=16,
        projection_dim=16,
        intermediate_size=32,
        num_attention_heads=2,
        num_hidden_layers=2,
    )
    KandinskyV22PriorPipeline(
        prior=prior,
        image_encoder=CLIPVisionModelWithProjection(vision),
        text_encoder=CLIPTextModelWithProjection(_text_config(tokenizer)),
        tokenizer=tokenizer,
        scheduler=UnCLIPScheduler(prediction_type="sample", clip_sample_range=10.0),
        image_processor=CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
    ).save_pretrained(folder)
    return str(folder)


def build_kandinsky_decoder(folder):
    """Write a tiny Kandinsky 2.2 decoder with random weights and return its path as a string."""
    torch.manual_seed(0)
    KandinskyV22Pipeline(
        unet=UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=8,  # the noise and the learned variance
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            addition_embed_type="image",
            encoder_hid_dim_type="image_proj",
            encoder_hid_dim=16,
            cross_attention_dim=16,
            attention_head_dim=4,
            resnet_time_scale_shift="scale_shift",
            norm_num_groups=4,
        ),
        scheduler=DDPMScheduler(
            beta_schedule="linear",
            beta_start=0.00085,
            beta_end=0.012,
            clip_sample=False,
            variance_type="learned_range",
        ),
        movq=VQModel(
            block_out_channels=(32, 32),
            down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
            up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
            latent_channels=4,
            norm_num_groups=8,
            norm_type="spatial",
            num_vq_embeddings=12,
            vq_embed_dim=4,
        ),
    ).save_pretrained(folder)
    return str(folder)


def image(index, size=(20, 16)):
    """An image that differs from every other index in each pixel."""
    values = np.random.default_rng(index).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values)


def png(width, height, depth, kind, lines):
    """The bytes of a PNG whose header claims what it is told: `depth` bits a channel, `kind` the colour type; `lines`
    are the pixels' bytes, each line behind a zero. Pillow writes neither 16-bit colour nor what is not true."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(lines)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def write_images(folder, count=10):
    """An image folder of `count` images, larger than the tests' resolution so that crops differ."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for index in range(count):
        image(index).save(folder / f"{index}.png")
        lines.append({"file_name": f"{index}.png", "text": f"a handwritten {WORDS[index % 10]}"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)
