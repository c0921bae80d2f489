"""Validation loss and validation images."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from PIL.Image import Image

from training_utils.data.samples import Samples
from training_utils.jax_backend import loader, processes
from training_utils.jax_backend.processes import ArrayTree


def validation_loss(
    sum_of_losses: Callable[[dict[str, jax.Array]], jax.Array], samples: Samples, batch_size: int, mesh: Mesh
) -> float:
    """The mean loss over all validation samples; `sum_of_losses(batch)` is that of a batch. A collective call."""
    sums = [sum_of_losses(batch) for batch in loader.validation_batches(samples, batch_size, mesh)]
    return float(sum(jax.device_get(sums))) / len(samples)


def draw_images(
    pipeline: Any,
    params: dict[str, ArrayTree],
    prompts: Sequence[str],
    *,
    seed: int,
    latent_shape: tuple[int, int, int],
    **options: Any,
) -> list[Image]:
    """One image for each prompt, drawn on the first device.

    `params` lie on the devices or, as NumPy arrays, in host memory, from which they are copied for this. `options` go
    to the pipeline's call. The noise of a prompt depends on the seed and its number alone and is drawn on the CPU, so
    that images of two steps, or of two machines, differ by the weights alone.
    """
    params = processes.on_first_device(params)
    images = []
    for number, prompt in enumerate(prompts):
        generator = np.random.Generator(np.random.Philox(seed + number))
        noise = generator.standard_normal((1, *latent_shape), dtype=np.float32)
        key = jax.random.key((seed + number) % 2**32)  # for samplers that add noise
        drawn = pipeline(pipeline.prepare_inputs(prompt), params, key, latents=noise, **options)
        images += pipeline.numpy_to_pil(drawn.images)
    return images
