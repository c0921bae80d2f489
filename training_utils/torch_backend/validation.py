"""Validation during a run: images for the same prompts from the same noise, and the loss on validation images."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from PIL.Image import Image

from training_utils.base.console import say
from training_utils.data import plan
from training_utils.run import grids
from training_utils.run.state import RunState
from training_utils.torch_backend import loader, processes


@torch.no_grad()
def draw_images(
    accelerator: Accelerator, draw: Callable[[Any, torch.Generator], Image], inputs: Sequence[Any], seed: int
) -> list[Image]:
    """The PIL image of each input, shared out over the processes; every process gets all of them, in order.

    `draw(input, noise)` makes one from a torch.Generator. The noise depends on the seed and on the number alone and is
    drawn on the CPU, so that images of two steps, or of two machines, differ by the weights alone. All processes
    draw equally many, since where they share the weights out each forward needs all of them; what is too many is
    dropped.
    """
    drawn = []
    count = len(inputs)
    for first in range(0, count, accelerator.num_processes):
        number = min(first + accelerator.process_index, count - 1)
        drawn.append(draw(inputs[number], torch.Generator("cpu").manual_seed(seed + number)))
    return processes.gather_in_order(accelerator, drawn)[:count]


def stable_diffusion_image(pipeline: Any, prompt: str, noise: torch.Generator, **options: Any) -> Image:
    """What a Stable Diffusion or SDXL pipeline draws for a prompt, a PIL image. `options` go to the pipeline's call.

    Each network runs in the precision that it trains in: the VAE is therefore called here, since a VAE that is kept in
    float32 overflows where an autocast around the pipeline would put it in half precision.
    """
    pipeline.set_progress_bar_config(disable=True)
    latents = pipeline(prompt, generator=noise, output_type="latent", **options).images
    pixels = pipeline.vae.decode(latents.to(pipeline.vae.dtype) / pipeline.vae.config.scaling_factor).sample
    return pipeline.image_processor.postprocess(pixels.float())[0]


@torch.no_grad()
def validation_loss(
    accelerator: Accelerator, samples: Any, batch_size: int, loss_of: Callable[[dict], torch.Tensor]
) -> float:
    """Mean of `loss_of(batch)`, losses of shape (B,), over all validation samples of all processes.

    All of them compute equally many batches, for the reason in `draw_images`; what is too many counts nothing.
    """
    world_size = accelerator.num_processes
    batches_by_rank = [
        plan.validation_batches(len(samples), batch_size, rank, world_size, samples.dataset.sizes)
        for rank in range(world_size)
    ]
    own = batches_by_rank[accelerator.process_index]
    longest = max(batches_by_rank, key=len)
    padded = own + longest[len(own) :]
    total = torch.zeros((), device=accelerator.device)
    for number, batch in enumerate(loader.load_batches(samples, padded, accelerator.device)):
        total += loss_of(batch).sum() * (number < len(own))
    return accelerator.reduce(total, "sum").item() / len(samples)


def log_validation_loss(
    accelerator: Accelerator, samples: Any, batch_size: int, loss_of: Callable[[dict], torch.Tensor], step: int
) -> None:
    """Compute the validation loss, print it and hand it to the trackers as val_loss."""
    loss = validation_loss(accelerator, samples, batch_size, loss_of)
    processes.log_metrics(accelerator, {"val_loss": loss}, step)
    say(f"step {step}: val_loss {loss:.4f}")


def show_images(
    accelerator: Accelerator,
    draw: Callable[[Any, torch.Generator], Image],
    inputs: Sequence[Any],
    prompts: list[str],
    state: RunState,
    output_dir: str,
) -> str:
    """Draw an image for each input with `draw`, as in `draw_images`, write them as one grid captioned by the prompts
    under `output_dir`/validation, hand them to the trackers. Returns the grid's path inside `output_dir`, which
    carries the step."""
    images = draw_images(accelerator, draw, inputs, state.seed)
    if accelerator.is_main_process:
        grids.publish_images(accelerator.trackers, images, prompts, state.step, output_dir)
    return grids.grid_name(state.step)
