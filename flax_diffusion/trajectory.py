"""A sampler's way from noise to an image, as a table with a row for each step.

A sampler's `plan` works out on the host, in float64, all that a trajectory needs; `step` then applies a row with plain
arithmetic, so that one compiled loop serves every sampler.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .config import ModelError


class Plan(NamedTuple):
    """The rows of a trajectory of N steps; `lax.scan` hands them to `step` one at a time.

    A step takes the network's output at the current sample, combines it with earlier outputs, computes x0 and epsilon
    from the result and mixes those at the next noise level. All arrays are float64 except where a type is given:

    timestep: (N,) int32, the network's input.
    weights: (N, K), the share of each of the last K outputs in the combined one, the newest first.
    remember: (N,) bool, whether to remember this step's sample.
    use_remembered: (N,) bool, whether to continue from the remembered sample instead of the current one.
    x0: (N, 2), the coefficients of that sample and of the combined output in x0.
    epsilon: (N, 2), the same in epsilon.
    next_sample: (N, 3), the coefficients of x0, epsilon and that sample in the next sample.
    clip: (N,), the bound of x0.
    sigma: (N,), the standard deviation of added noise, for samplers that add some.
    """

    timestep: np.ndarray
    weights: np.ndarray
    remember: np.ndarray
    use_remembered: np.ndarray
    x0: np.ndarray
    epsilon: np.ndarray
    next_sample: np.ndarray
    clip: np.ndarray
    sigma: np.ndarray | None = None

    @property
    def memory(self) -> int:
        """K, how many outputs are remembered."""
        return self.weights.shape[-1]


class State(NamedTuple):
    """Where a trajectory stands: its sample and the remembered one, (B, C, h, w), and the last K outputs."""

    sample: jax.Array
    remembered: jax.Array
    outputs: jax.Array


def begin(plan: Plan, sample: jax.Array) -> State:
    """The state of a trajectory that starts at `sample` (B, C, h, w), pure noise of unit variance."""
    return State(sample, sample, jnp.zeros((plan.memory, *sample.shape), sample.dtype))


def step(row: Plan, state: State, output: jax.Array, noise: jax.Array | None = None) -> State:
    """The state after one step.

    row: of a Plan. output: of the network at the state's sample, (B, C, h, w). noise: for a sampler that adds some,
    standard normal noise of the same shape.
    """
    sample = state.sample
    remembered = jnp.where(row.remember, sample, state.remembered)
    outputs = jnp.concatenate([output[None].astype(state.outputs.dtype), state.outputs[:-1]])
    # No matrix product, which TPUs and GPUs compute with fewer bits.
    combined = (row.weights.reshape(-1, *[1] * sample.ndim) * outputs).sum(0)
    base = jnp.where(row.use_remembered, remembered, sample)
    x0 = (row.x0[0] * base + row.x0[1] * combined).clip(-row.clip, row.clip)
    epsilon = row.epsilon[0] * base + row.epsilon[1] * combined
    sample = row.next_sample[0] * x0 + row.next_sample[1] * epsilon + row.next_sample[2] * base
    if noise is not None:
        sample += row.sigma * noise
    return State(sample, remembered, outputs)


def prediction_coefficients(prediction_type: str, a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The coefficients (N, 2) of a sample and of a prediction of this type in x0, and those in epsilon.

    a: cumulative products (N,). Raises ModelError where a prediction of noise cannot give x0.
    """
    signal = np.sqrt(a)
    noise = np.sqrt(1 - a)
    zero = np.zeros_like(a)
    one = np.ones_like(a)
    if prediction_type == "epsilon":
        if not signal.all():
            raise ModelError("scheduler: a schedule that ends in pure noise needs prediction_type = 'v_prediction'")
        x0, epsilon = (one / signal, -noise / signal), (zero, one)
    elif prediction_type == "v_prediction":
        # Salimans & Ho 2022, arXiv 2202.00512, appendix D.
        x0, epsilon = (signal, -noise), (noise, signal)
    else:
        x0, epsilon = (zero, one), (one / noise, -signal / noise)
    return np.stack(x0, axis=1), np.stack(epsilon, axis=1)
