"""Kandinsky 2.2's two stages at work together, for validation images: text to embedding, embedding to image."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import (
    DiffusionPipeline,
    KandinskyV22Pipeline,
    KandinskyV22PriorPipeline,
    PriorTransformer,
    UnCLIPScheduler,
    UNet2DConditionModel,
    VQModel,
)
from PIL.Image import Image
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from training_utils.base.errors import UserError
from training_utils.cli.options import ValidationOptions
from training_utils.torch_backend import frozen, models


class PromptEmbedding(NamedTuple):
    """What a prior makes of a prompt: the embeddings of its image and of no image, each of shape (1, width).

    In the order in which a KandinskyV22Pipeline takes them.
    """

    image: torch.Tensor
    no_image: torch.Tensor


@torch.no_grad()
def embed_prompt(
    prior: KandinskyV22PriorPipeline, prompt: str, noise: torch.Generator, steps: int, guidance_scale: float
) -> PromptEmbedding:
    """Embed a prompt with the prior's pipeline."""
    prior.set_progress_bar_config(disable=True)
    # The prior's scheduler divides by steps - 1.
    steps = max(2, steps)
    output = prior(prompt, generator=noise, num_inference_steps=steps, guidance_scale=guidance_scale)
    return PromptEmbedding(output.image_embeds, output.negative_image_embeds)


@torch.no_grad()
def draw_embedding(
    decoder: KandinskyV22Pipeline,
    embedding: PromptEmbedding,
    noise: torch.Generator,
    side: int,
    steps: int,
    guidance_scale: float,
) -> Image:
    """Draw the image of an embedded prompt with the decoder's pipeline: a PIL image of `side` pixels.

    MOVQ is called here, in its own precision, whatever the UNet's is.
    """
    decoder.set_progress_bar_config(disable=True)
    latents = decoder(
        *embedding,
        height=side,
        width=side,
        generator=noise,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        output_type="latent",
    ).images
    pixels = decoder.movq.decode(latents.to(decoder.movq.dtype), force_not_quantize=True).sample
    array = (pixels.float() / 2 + 0.5).clip(0, 1).permute(0, 2, 3, 1).cpu().numpy()
    return decoder.numpy_to_pil(array)[0]


def draw_prompt(
    prior: KandinskyV22PriorPipeline,
    decoder: KandinskyV22Pipeline,
    prompt: str,
    noise: torch.Generator,
    side: int,
    steps: int,
    guidance_scale: float,
) -> Image:
    """Draw the image of a prompt with the pipelines of both stages: a PIL image of `side` pixels."""
    embedding = embed_prompt(prior, prompt, noise, steps, guidance_scale)
    return draw_embedding(decoder, embedding, noise, side, steps, guidance_scale)


def pipeline_networks(pipeline: DiffusionPipeline) -> list[torch.nn.Module]:
    """The networks among a pipeline's parts."""
    return [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]


@contextmanager
def _explained_by_validation_images() -> Iterator[None]:
    """Within this context a UserError also says that the part is for validation images alone."""
    try:
        yield
    except UserError as error:
        # Each process loads by itself, so one alone may fail.
        raise UserError(
            f"the validation images need both networks, and {error}; name one that is there, or leave the "
            "validation prompt out",
            everywhere=False,
        ) from error


def load_decoder(
    name: str, revision: str | None, variant: str | None, cache_dir: str | None, dtype: torch.dtype
) -> KandinskyV22Pipeline:
    """Load a decoder that shows what a prior has learned, in host memory. Raises UserError where it cannot be had."""
    with _explained_by_validation_images():
        folder = models.model_folder(name, KandinskyV22Pipeline, revision, variant, cache_dir, trained=False)
        unet = models.load_part(UNet2DConditionModel, folder, "unet", variant, dtype=dtype)
        movq = models.load_part(VQModel, folder, "movq", variant, dtype=dtype)
        models.check_channels(unet, movq)
        return KandinskyV22Pipeline(unet, models.sampling_scheduler(folder, {}), movq)


# What of a prior only the drawing of validation images takes, where a decoder is trained.
TEXT_PARTS = ("prior", "scheduler", "text_encoder", "tokenizer")


def prior_folder(
    name: str, revision: str | None, variant: str | None, cache_dir: str | None, *, draws_images: bool
) -> Path:
    """The local folder of the prior whose image encoder a decoder is trained with, fetched where `name` is an id of
    the hub; complete where it also `draws_images`. Raises UserError."""
    source = (name, KandinskyV22PriorPipeline, revision, variant, cache_dir)
    folder = models.model_folder(*source, left_out=TEXT_PARTS, trained=False)
    if draws_images:
        with _explained_by_validation_images():
            folder = models.model_folder(*source, trained=False)
    return folder


def embed_prompts(
    folder: Path,
    variant: str | None,
    image_encoder: torch.nn.Module,
    device: torch.device,
    prompts: list[str],
    seed: int,
    steps: int,
    guidance_scale: float,
) -> list[PromptEmbedding]:
    """Embed some prompts with the prior in a folder, which is loaded, used and let go: in the training of a decoder
    the embeddings never change. Raises UserError where a part of the prior is missing."""
    options = {"variant": variant, "dtype": torch.float32}
    with _explained_by_validation_images():
        prior = KandinskyV22PriorPipeline(
            prior=models.load_part(PriorTransformer, folder, "prior", **options),
            text_encoder=models.load_part(CLIPTextModelWithProjection, folder, "text_encoder", **options),
            tokenizer=models.load_part(CLIPTokenizer, folder, "tokenizer"),
            scheduler=models.load_part(UnCLIPScheduler, folder, "scheduler"),
            image_encoder=image_encoder,
            image_processor=None,
        )
    embeddings = []
    with frozen.temporarily_on(pipeline_networks(prior), device):
        for number, prompt in enumerate(prompts):
            noise = torch.Generator("cpu").manual_seed(seed + number)
            embeddings.append(embed_prompt(prior, prompt, noise, steps, guidance_scale))
    return embeddings


def drawing(options: ValidationOptions) -> dict[str, float]:
    """How validation images are drawn, as `draw_embedding` and `draw_prompt` take it."""
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
