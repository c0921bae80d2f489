"""The gradient of a step: accumulated, clipped, and scaled for fp16. Pure functions that run on the devices."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from training_utils.jax_backend.processes import ArrayTree

STEPS_TO_GROW = 2000  # without an overflow, after which the loss scale is doubled; torch's GradScaler's number


def accumulate_gradient(gradient_of: Callable[..., Any], params: ArrayTree, batch: dict[str, jax.Array]) -> Any:
    """(loss, gradient), the mean of `gradient_of(params, micro_batch)` over the leading axis of `batch`."""
    count = batch["weight"].shape[0]
    if count == 1:
        return gradient_of(params, jax.tree.map(lambda array: array[0], batch))

    def add(so_far: Any, micro_batch: dict[str, jax.Array]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, so_far, gradient_of(params, micro_batch)), None

    zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
    total, _ = jax.lax.scan(add, zeros, batch)
    return jax.tree.map(lambda value: value / count, total)


def clip_gradient(gradients: ArrayTree, max_norm: float) -> tuple[ArrayTree, jax.Array]:
    """(gradients scaled down to `max_norm` where their norm is larger, their norm); with the 1e-6 of torch's formula.

    With `max_norm` 0 they stay as they are.
    """
    norm = optax.tree.norm(gradients)
    scale = jnp.minimum(1.0, max_norm / (norm + 1e-6)) if max_norm else 1.0
    return jax.tree.map(lambda gradient: gradient * scale, gradients), norm


def new_loss_scale() -> dict[str, Any]:
    """The state of dynamic loss scaling: fp16 gradients are computed of the loss times `scale`; `good` counts the
    steps since the last overflow."""
    return {"scale": np.float32(65536), "good": np.int32(0)}


def update_loss_scale(loss_scale: dict[str, Any], finite: jax.Array) -> dict[str, Any]:
    """Halve the scale after an overflow, double it after many steps without one."""
    good = jnp.where(finite, loss_scale["good"] + 1, 0)
    grown = jnp.where(good == STEPS_TO_GROW, 2.0, 1.0)
    scale = loss_scale["scale"] * jnp.where(finite, grown, 0.5)
    return {"scale": scale, "good": jnp.where(good == STEPS_TO_GROW, 0, good)}


def select_tree(condition: jax.Array, yes: ArrayTree, no: ArrayTree) -> ArrayTree:
    """The tree `yes` where the scalar `condition` is true, else `no`."""
    return jax.tree.map(lambda one, other: jnp.where(condition, one, other), yes, no)
