"""The moving average of the weights (EMA)."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from training_utils.jax_backend.processes import ArrayTree


def new_average(params: ArrayTree) -> dict[str, Any]:
    """The start of an average of the weights: {"weights", "steps"}, which are those that it has seen."""
    return {"weights": params, "steps": np.int32(0)}


def update_average(average: dict[str, Any], params: ArrayTree, decay: float) -> dict[str, Any]:
    """An average of the weights after one more step; the decay is that of the torch scripts' EMAWeights."""
    earlier = average["steps"].astype(jnp.float32)  # diffusers counts the first step as 0
    # 1 - the decay, without cancellation.
    weight = jnp.where(earlier == 0, 1.0, jnp.maximum(1 - decay, 9 / (10 + earlier)))

    def lerp(shadow: jax.Array, value: jax.Array) -> jax.Array:
        # From the nearer end, as torch's lerp: a weight of 1 gives the value itself.
        difference = value - shadow
        return jnp.where(weight < 0.5, shadow + weight * difference, value - (1 - weight) * difference)

    return {"weights": jax.tree.map(lerp, average["weights"], params), "steps": average["steps"] + 1}
