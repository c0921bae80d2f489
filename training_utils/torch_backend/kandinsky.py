"""Kandinsky 2.2's two stages at work together, for validation images: text to embedding, embedding to image."""

from contextlib import contextmanager
from typing import Any

import torch
from diffusers import (
    KandinskyV22Pipeline,
    KandinskyV22PriorPipeline,
    PriorTransformer,
    UnCLIPScheduler,
    UNet2DConditionModel,
    VQModel,
)
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from training_utils.base.errors import UserError
from training_utils.cli.options import ValidationOptions
from training_utils.torch_backend import frozen, models


@torch.no_grad()
def embeddings(pipeline, prompt, noise, steps, guidance_scale):
    """What a KandinskyV22PriorPipeline makes of a prompt: the embeddings of its image and of no image, each of
    shape (1, width). `noise` is a torch.Generator."""
    pipeline.set_progress_bar_config(disable=True)
    steps = max(2, steps)  # its scheduler divides by steps - 1
    output = pipeline(prompt, generator=noise, num_inference_steps=steps, guidance_scale=guidance_scale)
    return output.image_embeds, output.negative_image_embeds


@torch.no_grad()
def image(pipeline, pair, noise, side, steps, guidance_scale):
    """What a KandinskyV22Pipeline draws for a pair that `embeddings` made: a PIL image of `side` pixels.

    MOVQ is called here, in its own precision, whatever the UNet's is.
    """
    pipeline.set_progress_bar_config(disable=True)
    latents = pipeline(
        *pair,
        height=side,
        width=side,
        generator=noise,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        output_type="latent",
    ).images
    pixels = pipeline.movq.decode(latents.to(pipeline.movq.dtype), force_not_quantize=True).sample
    array = (pixels.float() / 2 + 0.5).clip(0, 1).permute(0, 2, 3, 1).cpu().numpy()
    return pipeline.numpy_to_pil(array)[0]


def prompt_image(prior, decoder, prompt, noise, side, steps, guidance_scale):
    """What the pipelines of both stages draw for a prompt: `image` for the pair that `embeddings` makes."""
    pair = embeddings(prior, prompt, noise, steps, guidance_scale)
    return image(decoder, pair, noise, side, steps, guidance_scale)


def load_decoder(name, revision, variant, cache_dir, dtype):
    """A decoder that shows what a prior has learned, in host memory. Raises UserError where it is not at hand."""
    with _for_images():
        folder = models.model_folder(name, KandinskyV22Pipeline, revision, variant, cache_dir, trained=False)
        unet = models.load_part(UNet2DConditionModel, folder, "unet", variant, dtype=dtype)
        movq = models.load_part(VQModel, folder, "movq", variant, dtype=dtype)
        models.check_channels(unet, movq)
        return KandinskyV22Pipeline(unet, models.sampling_scheduler(folder, {}), movq)


@contextmanager
def _for_images():
    try:
        yield
    except UserError as error:  # on each process by itself: one alone may fail
        raise UserError(
            f"the validation images need both networks, and {error}; name one that is there, or leave the "
            "validation prompt out",
            everywhere=False,
        ) from None


def networks(pipeline):
    """The networks among a pipeline's parts, a list."""
    return [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]


def embed_prompts(folder, variant, image_encoder, device, prompts, seed, steps, guidance_scale):
    """The pairs of `embeddings` for some prompts, by the prior in a folder, which is loaded, used and let go: in the
    training of a decoder they never change. Raises UserError where the folder lacks a part of the prior."""
    with _for_images():
        parts = dict(
            prior=models.load_part(PriorTransformer, folder, "prior", variant, dtype=torch.float32),
            text_encoder=models.load_part(
                CLIPTextModelWithProjection, folder, "text_encoder", variant, dtype=torch.float32
            ),
            tokenizer=models.load_part(CLIPTokenizer, folder, "tokenizer"),
            scheduler=models.load_part(UnCLIPScheduler, folder, "scheduler"),
        )
    pipeline = KandinskyV22PriorPipeline(**parts, image_encoder=image_encoder, image_processor=None)
    with frozen.temporarily_on(networks(pipeline), device):
        return [
            embeddings(pipeline, prompt, torch.Generator("cpu").manual_seed(seed + at), steps, guidance_scale)
            for at, prompt in enumerate(prompts)
        ]


# What a prior makes of a prompt: the embeddings of its image and of no image, each of shape (1, D).
Embeddings = tuple[torch.Tensor, torch.Tensor]


def drawing(options: ValidationOptions) -> dict[str, float]:
    """How validation images are drawn, as `image` and `prompt_image` take it."""
    return {
        "side": options.height,
        "steps": options.num_inference_steps,
        "guidance_scale": options.guidance_scale,
    }


def embedding_statistics(prior: PriorTransformer) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean and standard deviation (1, D) of CLIP's image embeddings that a prior was trained with.

    They are no weights, though they lie among them: no forward pass uses them, so they get no gradient and never
    change. Raises UserError for a deviation that is not above 0.
    """
    for statistic in (prior.clip_mean, prior.clip_std):
        statistic.requires_grad_(False)
    if not (prior.clip_std > 0).all():
        raise UserError("the prior's clip_std, the standard deviation of CLIP's embeddings, is not above 0 everywhere")
    return prior.clip_mean.detach(), prior.clip_std.detach()


def check_prediction_type(config: Any) -> None:
    """Refuse a prior whose sampler takes its output for something else than x0. Raises UserError."""
    if config.prediction_type != "sample":
        raise UserError(
            f"the prior predicts '{config.prediction_type}'; this script trains priors that predict 'sample'"
        )


def latent_shape(movq: VQModel, unet: UNet2DConditionModel, **sides: int) -> models.LatentShape:
    """The shape of MOVQ's latents. Raises UserError for one of `sides`, in pixels and by the name of its flag, that
    does not come out even in every layer of the UNet."""
    shape = models.latent_shape(movq)
    multiple = shape.factor * 2 ** (len(unet.config.block_out_channels) - 1)
    for name, side in sides.items():
        if side % multiple:
            nearest = max(1, round(side / multiple)) * multiple
            raise UserError(f"--{name} {side} is not a multiple of {multiple}, the decoder's; try {nearest}")
    return shape
