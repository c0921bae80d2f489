"""Validation loss and validation images."""

import jax
import numpy as np

from training_utils.jax_backend import devices, loader


def validation_loss(evaluate, samples, batch_size, mesh):
    """Mean over all validation samples of the losses whose sum over a batch `evaluate(batch)` gives."""
    sums = [evaluate(batch) for batch in loader.validation_batches(samples, batch_size, mesh)]
    return float(sum(jax.device_get(sums))) / len(samples)


def draw_images(pipeline, params, prompts, seed, latent_shape, **options):
    """One PIL image a prompt, drawn on the first device. `params` lie on the devices or, as numpy arrays, in host
    memory, which they visit the device from. `options` go to the pipeline's call.

    The noise of a prompt depends on the seed and its place alone and is drawn on the CPU, so that images of two
    steps, or of two machines, differ by the weights alone.
    """
    params, images = devices.on_one_device(params), []
    for at, prompt in enumerate(prompts):
        noise = np.random.Generator(np.random.Philox(seed + at)).standard_normal((1, *latent_shape), dtype=np.float32)
        key = jax.random.key((seed + at) % 2**32)  # for samplers that add noise
        drawn = pipeline(pipeline.prepare_inputs(prompt), params, key, latents=noise, **options)
        images += pipeline.numpy_to_pil(drawn.images)
    return images
