"""Noise schedules of Stable Diffusion: what training mixes, and the steps of DDIM, PNDM and DDPM sampling.

A schedule holds no state. For training it offers `add_noise` and `get_velocity`, pure functions to be used inside jit.
For sampling, `plan` works out on the host, in float64, all that a trajectory needs as a table with one row a step;
`step` then applies a row with plain arithmetic, so that one loop in one compilation does for every sampler.
"""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from .networks import Config, ModelError

BETA_DEFAULTS = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 0,
}


def betas(config):
    """The noise variance that each training timestep adds, float64, shape (T,). Raises ModelError."""
    count, first, last = config["num_train_timesteps"], config["beta_start"], config["beta_end"]
    if config["trained_betas"] is not None:
        return np.array(config["trained_betas"], dtype=np.float64)
    if config["beta_schedule"] == "linear":
        return np.linspace(first, last, count)
    if config["beta_schedule"] == "scaled_linear":  # of latent diffusion: linear in the square root
        return np.linspace(first**0.5, last**0.5, count) ** 2
    if config["beta_schedule"] == "squaredcos_cap_v2":  # Nichol & Dhariwal 2021, arXiv 2102.09672, eq. 17
        products = np.cos((np.arange(count + 1) / count + 0.008) / 1.008 * np.pi / 2) ** 2
        return np.minimum(1 - products[1:] / products[:-1], 0.999)
    raise ModelError(f"scheduler: the setting beta_schedule = {config['beta_schedule']!r} is not supported")


def zero_terminal_snr(alphas_cumprod):
    """The schedule shifted and scaled to end in pure noise, its first value kept (arXiv 2305.08891, algorithm 1)."""
    roots = np.sqrt(alphas_cumprod)
    return ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2


class _Scheduler:
    """What the schedules share. `config` holds the settings over the defaults; `alphas_cumprod`, float32 of shape
    (T,), the share of the picture's variance that is left at each timestep."""

    defaults = {}

    def __init__(self, **settings):
        self.config = Config(BETA_DEFAULTS | self.defaults | settings)
        products = np.cumprod(1 - betas(self.config))
        if self.config.rescale_betas_zero_snr:
            products = zero_terminal_snr(products)
        self.alphas_cumprod = products.astype(np.float32)

    @classmethod
    def from_config(cls, config, **changes):
        """The schedule of a scheduler_config.json's dict, of whatever class that is, with `changes` to it."""
        return cls(**(dict(config) | changes))

    @classmethod
    def from_pretrained(cls, folder, subfolder="scheduler", **changes):
        """The schedule of a pipeline's folder and its state, which is empty: (schedule, {})."""
        return cls.from_config(
            json.loads((Path(folder) / subfolder / "scheduler_config.json").read_text()), **changes
        ), {}

    def _mix(self, one, other, timesteps):
        """sqrt(a) * one, sqrt(1 - a) * other for each sample's a; float32."""
        a = jnp.asarray(self.alphas_cumprod)[timesteps]
        a = a.reshape(a.shape + (1,) * (one.ndim - a.ndim))
        return jnp.sqrt(a) * one.astype(jnp.float32), jnp.sqrt(1 - a) * other.astype(jnp.float32)

    def add_noise(self, x0, noise, timesteps):
        """The noisy samples of x0 (B, ...) at timesteps (B,), float32 (Ho et al. 2020, arXiv 2006.11239, eq. 4)."""
        signal, noise = self._mix(x0, noise, timesteps)
        return signal + noise

    def get_velocity(self, x0, noise, timesteps):
        """v = sqrt(a) noise - sqrt(1 - a) x0, float32 (Salimans & Ho 2022, arXiv 2202.00512, section 4)."""
        noise, signal = self._mix(noise, x0, timesteps)
        return noise - signal


class FlaxDDPMScheduler(_Scheduler):
    pass


class FlaxDDIMScheduler(_Scheduler):
    pass


class FlaxPNDMScheduler(_Scheduler):
    pass
