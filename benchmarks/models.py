"""What the benchmark trains on: base models with random weights, photograph-like images, and the arithmetic of both.

`real` models have the released ones' shapes. `mid` ones have a quarter of the width, the same blocks and attention,
and images so much smaller that frozen and trained networks do their arithmetic in the released models' proportion.
"""

import json
import sys
from functools import partial
from pathlib import Path

from training_utils.base import startup
from training_utils.torch_backend import lora

startup.prepare()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from diffusers import (  # noqa: E402
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
from PIL import Image  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402
from transformers import (  # noqa: E402
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

sys.path.append(str(Path(__file__).parent.parent / "quickstart"))
from make_base import build_scheduler, build_tokenizer  # noqa: E402

TOKENS = 77
VOCABULARY = {"real": 49408}  # elsewhere what the tokenizer has

# Widths of the levels; (width, layers, heads) of the encoders; of the UNets the number of heads, or their width. The
# mid-size models have fewer heads and not narrower ones: the softmax, whose cost goes by the number of heads, would
# else shrink less than the rest.
SD = {
    "real": dict(
        resolution=512, unet=(320, 640, 1280, 1280), heads=8, vae=(128, 256, 512, 512), text=(768, 12, 12), groups=32
    ),
    "mid": dict(
        resolution=256, unet=(80, 160, 320, 320), heads=2, vae=(32, 64, 128, 128), text=(96, 12, 2), groups=16
    ),
    "tiny": dict(resolution=64, unet=(16, 16, 32, 32), heads=2, vae=(8, 8, 16, 16), text=(16, 2, 2), groups=8),
}
SDXL = {
    "real": dict(resolution=1024, unet=(320, 640, 1280), heads=(5, 10, 20), depth=(1, 2, 10), text_2=(1280, 32, 20)),
    "mid": dict(unet=(80, 160, 320), heads=(1, 2, 5), depth=(1, 2, 10), text_2=(96, 32, 2)),
    "tiny": dict(unet=(16, 16, 32), heads=(2, 2, 2), depth=(1, 1, 1), text_2=(16, 2, 2)),
}
SDXL = {size: SD[size] | changes for size, changes in SDXL.items()}
SIZE_WIDTH = {"real": 256, "mid": 32, "tiny": 8}  # of the sinusoids that tell SDXL a size
DECODER = {
    "real": dict(
        resolution=768,
        unet=(384, 768, 1152, 1536),
        head=64,
        cross=768,
        movq=(128, 256, 256, 512),
        image=(1664, 48, 16),
    ),
    "mid": dict(
        resolution=256, unet=(96, 192, 320, 384), head=64, cross=192, movq=(32, 64, 64, 128), image=(148, 48, 1)
    ),
    "tiny": dict(resolution=128, unet=(32, 32, 32, 32), head=16, cross=16, movq=(32, 32, 32, 32), image=(16, 2, 2)),
}
PRIOR = {
    "real": dict(heads=32, layers=20, embedding=1280, text=(1280, 32, 20), image=(1664, 48, 16), resolution=512),
    "mid": dict(heads=8, layers=20, embedding=320, text=(320, 32, 5), image=(408, 48, 4), resolution=256),
    "tiny": dict(heads=1, layers=2, embedding=16, text=(16, 2, 2), image=(16, 2, 2), resolution=64),
}
SHAPES = {"sd": SD, "sdxl": SDXL, "decoder": DECODER, "prior": PRIOR, "flax": SD}
BETAS = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1)


# ---------------------------------------------------------------------------------------------------------------------
# Networks
# ---------------------------------------------------------------------------------------------------------------------


def _text_encoder(shape, tokenizer, vocabulary, kind=CLIPTextModel, projection=None):
    width, layers, heads = shape
    return kind(
        CLIPTextConfig(
            vocab_size=vocabulary or len(tokenizer),
            max_position_embeddings=TOKENS,
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=projection or width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _image_encoder(shape, projection):
    width, layers, heads = shape
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            image_size=224,
            patch_size=14,
            hidden_size=width,
            intermediate_size=width * 64 // 13,  # 8192 of 1664
            projection_dim=projection,
            num_hidden_layers=layers,
            num_attention_heads=heads,
        )
    )


def _vae(widths, groups):
    return AutoencoderKL(
        block_out_channels=widths,
        norm_num_groups=groups,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
    )


def networks(family, size, tokenizer=None):
    """The networks of a base model, {part: function that makes it}; "trained" is the one that is trained."""
    shape, vocabulary, tokenizer = SHAPES[family][size], VOCABULARY.get(size), tokenizer or _tokenizer()
    if family in ("sd", "sdxl", "flax"):
        parts = {"vae": partial(_vae, shape["vae"], shape["groups"])}
        parts["text_encoder"] = partial(_text_encoder, shape["text"], tokenizer, vocabulary)
    if family in ("sd", "flax"):
        unet = dict(cross_attention_dim=shape["text"][0], attention_head_dim=shape["heads"])  # their number, in fact
    elif family == "sdxl":
        second = partial(_text_encoder, kind=CLIPTextModelWithProjection)
        parts["text_encoder_2"] = partial(second, shape["text_2"], tokenizer, vocabulary)
        unet = dict(
            cross_attention_dim=shape["text"][0] + shape["text_2"][0],
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=shape["heads"],
            transformer_layers_per_block=shape["depth"],
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=SIZE_WIDTH[size],
            projection_class_embeddings_input_dim=6 * SIZE_WIDTH[size] + shape["text_2"][0],
        )
    elif family == "decoder":
        projection = 1280 if size == "real" else shape["image"][0]
        parts = {
            "image_encoder": partial(_image_encoder, shape["image"], projection),
            "movq": partial(
                VQModel,
                block_out_channels=shape["movq"],
                down_block_types=("DownEncoderBlock2D",) * 3 + ("AttnDownEncoderBlock2D",),
                up_block_types=("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 3,
                layers_per_block=2,
                latent_channels=4,
                norm_type="spatial",
                num_vq_embeddings=16384 if size == "real" else 64,
                vq_embed_dim=4,
            ),
        }
        unet = dict(
            out_channels=8,  # the noise and the learned variance
            layers_per_block=3,
            down_block_types=("ResnetDownsampleBlock2D",) + ("SimpleCrossAttnDownBlock2D",) * 3,
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=("SimpleCrossAttnUpBlock2D",) * 3 + ("ResnetUpsampleBlock2D",),
            addition_embed_type="image",
            encoder_hid_dim_type="image_proj",
            encoder_hid_dim=projection,
            cross_attention_dim=shape["cross"],
            attention_head_dim=shape["head"],
            resnet_time_scale_shift="scale_shift",
        )
    if family == "prior":
        projection = shape["embedding"]
        text = partial(_text_encoder, kind=CLIPTextModelWithProjection, projection=projection)
        return {
            "image_encoder": partial(_image_encoder, shape["image"], projection),
            "text_encoder": partial(text, shape["text"], tokenizer, vocabulary),
            "trained": partial(
                PriorTransformer,
                num_attention_heads=shape["heads"],
                num_layers=shape["layers"],
                embedding_dim=projection,
                num_embeddings=TOKENS,
            ),
        }
    groups = shape.get("groups", 32)
    unet |= dict(sample_size=shape["resolution"] // 8, block_out_channels=shape["unet"], norm_num_groups=groups)
    return parts | {"trained": partial(UNet2DConditionModel, **unet)}


def _tokenizer():
    tokenizer = build_tokenizer()
    tokenizer.model_max_length = TOKENS
    return tokenizer


def write(folder, family, size):
    """Write a base model with random weights, the real ones in bfloat16. Returns the flags that name it."""
    torch.manual_seed(0)
    tokenizer, folder = _tokenizer(), Path(folder)
    # A GPU draws billions of weights in a moment.
    with torch.device("cuda" if size == "real" and torch.cuda.is_available() else "cpu"):
        parts = {part: make() for part, make in networks(family, size, tokenizer).items()}
    if family == "prior":
        torch.nn.init.ones_(parts["trained"].clip_std)  # the deviation of CLIP's embeddings: zero would be refused
    if size == "real":
        parts = {part: network.to(torch.bfloat16) for part, network in parts.items()}
    trained = parts.pop("trained")
    if family in ("sd", "flax"):
        StableDiffusionPipeline(
            **parts,
            unet=trained,
            tokenizer=tokenizer,
            scheduler=build_scheduler() if family == "flax" else PNDMScheduler(skip_prk_steps=True, **BETAS),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(folder)
    elif family == "sdxl":
        StableDiffusionXLPipeline(
            **parts,
            unet=trained,
            tokenizer=tokenizer,
            tokenizer_2=tokenizer,
            scheduler=EulerDiscreteScheduler(timestep_spacing="leading", **BETAS),
        ).save_pretrained(folder)
    elif family == "prior":
        KandinskyV22PriorPipeline(
            **parts,
            prior=trained,
            tokenizer=tokenizer,
            scheduler=UnCLIPScheduler(prediction_type="sample", clip_sample_range=10.0),
            image_processor=_image_processor(),
        ).save_pretrained(folder)
        return ["--pretrained_prior_model_name_or_path", str(folder)]
    else:
        # Of the prior's folder the decoder's script reads what sees images and nothing else.
        prior = folder / "prior"
        parts["image_encoder"].save_pretrained(prior / "image_encoder")
        _image_processor().save_pretrained(prior / "image_processor")
        (prior / "model_index.json").write_text(json.dumps({"_class_name": "KandinskyV22PriorPipeline"}))
        noise = dict(beta_schedule="linear", beta_start=0.00085, beta_end=0.012, variance_type="learned_range")
        KandinskyV22Pipeline(
            unet=trained, movq=parts["movq"], scheduler=DDPMScheduler(clip_sample=False, **noise)
        ).save_pretrained(folder / "decoder")
        return [
            *("--pretrained_prior_model_name_or_path", str(prior)),
            *("--pretrained_decoder_model_name_or_path", str(folder / "decoder")),
        ]
    return ["--pretrained_model_name_or_path", str(folder)]


def _image_processor():
    return CLIPImageProcessor(size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224})


# ---------------------------------------------------------------------------------------------------------------------
# Arithmetic
# ---------------------------------------------------------------------------------------------------------------------


def count(family, size):
    """What an image costs in FLOP, a multiplication with its addition counted as two, and the size of the networks:
    {"training", "lora", "frozen"}, and {"trained parameters", "frozen parameters"}. Nothing is computed for it."""
    tokenizer, shape = _tokenizer(), SHAPES[family][size]
    with torch.device("meta"):
        parts = {part: make() for part, make in networks(family, size, tokenizer).items()}
    trained = parts.pop("trained")
    found = {
        "trained parameters": _parameters(trained),
        "frozen parameters": sum(_parameters(network) for network in parts.values()),
        "training": _flop(lambda: _forward(family, trained, shape).sum().backward()),
        "frozen": sum(_flop(lambda network=network: _encode(network, shape)) for network in parts.values()),
    }
    with torch.device("meta"):
        layers = lora.UNET_LAYERS + (lora.ADDED_KV_LAYERS if family == "decoder" else [])
        lora.add_adapter(trained, layers, rank=4)
    return found | {"lora": _flop(lambda: _forward(family, trained, shape).sum().backward())}


def _parameters(network):
    return sum(parameter.numel() for parameter in network.parameters())


def _flop(work):
    counter = FlopCounterMode(display=False)
    with torch.device("meta"), counter:
        work()
    return counter.get_total_flops()


def _forward(family, network, shape):
    timestep, config = torch.zeros(1, dtype=torch.long), network.config
    if family == "prior":
        vector = torch.zeros(1, config.embedding_dim)
        return network(vector, timestep, vector, torch.zeros(1, TOKENS, config.embedding_dim))[0]
    latents = torch.zeros(1, config.in_channels, shape["resolution"] // 8, shape["resolution"] // 8)
    if family == "decoder":
        image = torch.zeros(1, config.encoder_hid_dim)
        return network(latents, timestep, None, added_cond_kwargs={"image_embeds": image})[0]
    told = None
    if family == "sdxl":
        told = {"text_embeds": torch.zeros(1, shape["text_2"][0]), "time_ids": torch.zeros(1, 6)}
    text = torch.zeros(1, TOKENS, config.cross_attention_dim)
    return network(latents, timestep, text, added_cond_kwargs=told)[0]


@torch.no_grad()
def _encode(network, shape):
    if isinstance(network, AutoencoderKL | VQModel):
        return network.encode(torch.zeros(1, 3, shape["resolution"], shape["resolution"]))
    if isinstance(network, CLIPVisionModelWithProjection):
        return network(torch.zeros(1, 3, 224, 224))
    return network(torch.zeros(1, TOKENS, dtype=torch.long))


# ---------------------------------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------------------------------

SUBJECTS = ["a red bicycle", "an old lighthouse", "a bowl of oranges", "two children on a swing", "a sleeping cat"]
PLACES = ["in front of a brick wall", "by the sea at dawn", "on a wooden table", "in heavy rain", "seen from above"]


def write_images(folder, resolution, number):
    """Write `number` captioned JPEGs of 4:3 whose shorter side is a quarter longer than `resolution` pixels.

    Their spectrum falls as 1/f, as that of photographs does (Field 1987), so that decoding one costs what a photograph
    of its size costs.
    """
    folder.mkdir(parents=True)
    height, lines = resolution * 5 // 4, []
    width = height * 4 // 3
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1
    for index in range(number):
        draw = np.random.default_rng(index)
        spectrum = np.fft.rfft2(draw.standard_normal((3, height, width))) / frequency
        values = np.fft.irfft2(spectrum, s=(height, width)).transpose(1, 2, 0)
        values = 128 + 50 * (values - values.mean()) / values.std()
        Image.fromarray(values.clip(0, 255).astype(np.uint8)).save(folder / f"{index:04}.jpg", quality=92)
        caption = f"{SUBJECTS[index % 5]} {PLACES[index // 5 % 5]}, photograph number {index}"
        lines.append(json.dumps({"file_name": f"{index:04}.jpg", "text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
