"""Stable Diffusion 1.x and 2.x in JAX: networks, noise schedules and a pipeline. Needs no torch."""

from .networks import FlaxAutoencoderKL, FlaxCLIPTextModel, FlaxUNet2DConditionModel, ModelError
from .pipeline import FlaxStableDiffusionPipeline
from .schedulers import FlaxDDIMScheduler, FlaxDDPMScheduler, FlaxPNDMScheduler

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
