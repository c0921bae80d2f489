"""Weights of the diffusion loss and of its timesteps. Plain arithmetic, so that torch and JAX arrays both do."""

from typing import Any

import numpy as np

Array = Any  # of NumPy, torch or JAX


def signal_to_noise(alphas_cumprod: Array) -> Array:
    """SNR = a / (1 - a) for the cumulative products a of a noise schedule; any shape."""
    return alphas_cumprod / (1 - alphas_cumprod)


def min_snr_weight(snr: Array, gamma: float, prediction_type: str) -> Array:
    """Min-SNR weight of a sample's mean squared error (Hang et al. 2023, arXiv 2303.09556, section 3.4).

    The paper weights the error in x0 by min(SNR, gamma). An error in epsilon is SNR times one in x0, and an error in v
    is SNR + 1 times one in x0, hence the divisions. Written so that SNR = 0 (zero terminal SNR) gives a finite weight.

    Args: snr, the samples' signal-to-noise ratio, shape (B,); gamma > 0, 5 is recommended; prediction_type, "epsilon",
    "v_prediction" or "sample". Returns weights, shape (B,). Raises ValueError for another prediction type.
    """
    if prediction_type == "epsilon":
        return (gamma / snr).clip(max=1)
    if prediction_type == "v_prediction":
        return snr.clip(max=gamma) / (snr + 1)
    if prediction_type == "sample":
        return snr.clip(max=gamma)
    raise ValueError(f"min-SNR is not defined for prediction type {prediction_type!r}")


def timestep_probabilities(
    timesteps: int,
    strategy: str,
    multiplier: float = 1.0,
    portion: float = 0.25,
    begin: int = 0,
    end: int = 1000,
) -> np.ndarray | None:
    """How likely each timestep is to be drawn, float64, shape (timesteps,); None where all are equally likely.

    `earlier` and `later` make the first or last `portion` of them `multiplier` times as likely as the others, `range`
    those from `begin` to `end` - 1. Raises ValueError for a range that is not within the schedule.
    """
    if strategy == "none":
        return None
    count = int(portion * timesteps)
    if strategy == "range" and not 0 <= begin < end <= timesteps:
        raise ValueError(f"the timesteps {begin} to {end} are not within a schedule of {timesteps}")
    ranges = {"earlier": (0, count), "later": (timesteps - count, timesteps), "range": (begin, end)}
    first, last = ranges[strategy]
    weights = np.ones(timesteps)
    weights[first:last] *= multiplier
    return weights / weights.sum()
