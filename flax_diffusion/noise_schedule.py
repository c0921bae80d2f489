"""How much noise training mixes into a sample at each timestep.

Here a is the cumulative product of a timestep: a noisy sample is sqrt(a) x0 + sqrt(1 - a) epsilon.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .config import Config, ModelError

DEFAULTS = {
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
PREDICTIONS = ("epsilon", "v_prediction", "sample")


def betas(config: Config) -> np.ndarray:
    """The noise variance that each training timestep adds, float64, shape (T,). Raises ModelError."""
    if config.trained_betas is not None:
        return np.array(config.trained_betas, dtype=np.float64)
    count = config.num_train_timesteps
    if config.beta_schedule == "linear":
        return np.linspace(config.beta_start, config.beta_end, count)
    if config.beta_schedule == "scaled_linear":
        # Of latent diffusion: linear in the square root.
        return np.linspace(config.beta_start**0.5, config.beta_end**0.5, count) ** 2
    if config.beta_schedule == "squaredcos_cap_v2":
        # Nichol & Dhariwal 2021, arXiv 2102.09672, eq. 17.
        products = np.cos((np.arange(count + 1) / count + 0.008) / 1.008 * np.pi / 2) ** 2
        return np.minimum(1 - products[1:] / products[:-1], 0.999)
    raise ModelError(f"scheduler: the setting beta_schedule = {config.beta_schedule!r} is not supported")


def zero_terminal_snr(alphas_cumprod: np.ndarray) -> np.ndarray:
    """The schedule (T,) shifted and scaled to end in pure noise, with its first value unchanged.

    Lin et al. 2023, arXiv 2305.08891, algorithm 1.
    """
    roots = np.sqrt(alphas_cumprod)
    return ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])) ** 2


class NoiseSchedule:
    """The noise of each timestep, and what training computes from it. It holds no state.

    `config` holds the settings over `defaults`, those of the sampler, and DEFAULTS; `alphas_cumprod` is the float32
    numpy array (T,) of a at each timestep. Raises ModelError for a setting that is not supported.
    """

    defaults: dict[str, Any] = {}

    def __init__(self, **settings: Any) -> None:
        self.given = settings
        self.config = Config(DEFAULTS | self.defaults | settings)
        if self.config.prediction_type not in PREDICTIONS:
            kind = self.config.prediction_type
            raise ModelError(f"scheduler: the setting prediction_type = {kind!r} is not supported")
        products = np.cumprod(1 - betas(self.config))
        if self.config.rescale_betas_zero_snr:
            products = zero_terminal_snr(products)
        self.alphas_cumprod = products.astype(np.float32)

    def add_noise(self, x0: jax.Array, noise: jax.Array, timesteps: jax.Array) -> jax.Array:
        """The noisy samples of x0 (B, ...) at timesteps (B,), float32 (Ho et al. 2020, arXiv 2006.11239, eq. 4)."""
        signal, scaled_noise = self._scaled(x0, noise, timesteps)
        return signal + scaled_noise

    def get_velocity(self, x0: jax.Array, noise: jax.Array, timesteps: jax.Array) -> jax.Array:
        """v = sqrt(a) noise - sqrt(1 - a) x0, float32 (Salimans & Ho 2022, arXiv 2202.00512, section 4)."""
        scaled_noise, signal = self._scaled(noise, x0, timesteps)
        return scaled_noise - signal

    def _scaled(self, first: jax.Array, second: jax.Array, timesteps: jax.Array) -> tuple[jax.Array, jax.Array]:
        """sqrt(a) * first and sqrt(1 - a) * second, float32, with each sample's a."""
        a = jnp.asarray(self.alphas_cumprod)[timesteps]
        a = a.reshape(a.shape + (1,) * (first.ndim - a.ndim))
        return jnp.sqrt(a) * first.astype(jnp.float32), jnp.sqrt(1 - a) * second.astype(jnp.float32)
