"""Stable Diffusion 1.x and 2.x in JAX: networks, noise schedules and a pipeline. Needs no torch."""

from .autoencoder import FlaxAutoencoderKL
from .config import ModelError
from .pipeline import FlaxStableDiffusionPipeline
from .schedulers import FlaxDDIMScheduler, FlaxDDPMScheduler, FlaxPNDMScheduler
from .text_encoder import FlaxCLIPTextModel
from .unet import FlaxUNet2DConditionModel

__all__ = [
    "FlaxAutoencoderKL",
    "FlaxCLIPTextModel",
    "FlaxDDIMScheduler",
    "FlaxDDPMScheduler",
    "FlaxPNDMScheduler",
    "FlaxStableDiffusionPipeline",
    "FlaxUNet2DConditionModel",
    "ModelError",
]
