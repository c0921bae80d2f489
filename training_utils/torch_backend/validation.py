"""Looking at a run: images for the same prompts from the same noise, and the loss on validation images."""

import torch

from training_utils.base.console import say
from training_utils.data import plan
from training_utils.run import grids
from training_utils.torch_backend import loader, processes


@torch.no_grad()
def draw_images(accelerator, draw, count, seed):
    """`count` PIL images, shared out over the processes; every process gets all of them, in order.

    `draw(at, noise)` makes number `at` from a torch.Generator. The noise depends on the seed and on `at` alone and is
    drawn on the CPU, so that images of two steps, or of two machines, differ by the weights alone. All processes
    draw equally many, since where they share the weights out each forward needs all of them; what is too many is
    dropped.
    """
    mine = []
    for first in range(0, count, accelerator.num_processes):
        at = min(first + accelerator.process_index, count - 1)
        mine.append(draw(at, torch.Generator("cpu").manual_seed(seed + at)))
    return processes.gather_in_order(accelerator, mine)[:count]


def stable_diffusion_image(pipeline, prompt, noise, **options):
    """What a Stable Diffusion or SDXL pipeline draws for a prompt, a PIL image. `options` go to the pipeline's call.

    Each network runs in the precision that it trains in: the VAE is therefore called here, since a VAE that is kept in
    float32 overflows where an autocast around the whole pipeline would put it in half precision.
    """
    pipeline.set_progress_bar_config(disable=True)
    latents = pipeline(prompt, generator=noise, output_type="latent", **options).images
    pixels = pipeline.vae.decode(latents.to(pipeline.vae.dtype) / pipeline.vae.config.scaling_factor).sample
    return pipeline.image_processor.postprocess(pixels.float())[0]


@torch.no_grad()
def validation_loss(accelerator, samples, batch_size, loss_of):
    """Mean of `loss_of(batch)`, losses of shape (B,), over all validation samples of all processes.

    All of them compute equally many batches, for the reason in `draw_images`; what is too many counts nothing.
    """
    world, total = accelerator.num_processes, torch.zeros((), device=accelerator.device)
    shares = [
        plan.validation_batches(len(samples), batch_size, rank, world, samples.dataset.sizes) for rank in range(world)
    ]
    longest, mine = max(shares, key=len), shares[accelerator.process_index]
    counted = len(mine)
    for number, batch in enumerate(loader.load_batches(samples, mine + longest[counted:], accelerator.device)):
        total += loss_of(batch).sum() * (number < counted)
    return accelerator.reduce(total, "sum").item() / len(samples)


def log_validation_loss(accelerator, samples, batch_size, loss_of, step):
    """Compute the validation loss, print it and hand it to the trackers as val_loss."""
    loss = validation_loss(accelerator, samples, batch_size, loss_of)
    processes.log_metrics(accelerator, {"val_loss": loss}, step)
    say(f"step {step}: val_loss {loss:.4f}")


def show_images(accelerator, draw, prompts, state, output_dir):
    """Draw an image a prompt with `draw`, as in `draw_images`, write them as one captioned grid under
    `output_dir`/validation, hand them to the trackers. Returns the grid's path inside `output_dir`, which carries the
    step."""
    images = draw_images(accelerator, draw, len(prompts), state.seed)
    if accelerator.is_main_process:
        grids.publish_images(accelerator.trackers, images, prompts, state.step, output_dir)
    return grids.grid_name(state.step)
