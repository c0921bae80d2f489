"""Optimizer, learning rate, accumulation, moving average and loss scale."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax


def learning_rate_curve(name, peak, warmup, total, cycles=1, power=1.0):
    """A function from the number of steps made to the learning rate of the next one; floats on the host.

    The curves are those of `--lr_scheduler` in the torch scripts. The rate is handed to the step, which therefore
    need not be compiled again for another rate, warm-up or length.
    """
    lowest = 1e-7  # where the polynomial ends

    def curve(step):
        if name == "constant":
            return peak
        if step < warmup:
            return peak * step / warmup
        if name == "constant_with_warmup":
            return peak
        progress = min(1.0, (step - warmup) / max(1, total - warmup))
        if name == "linear":
            return peak * (1 - progress)
        if name == "cosine":
            return peak * 0.5 * (1 + math.cos(math.pi * progress))
        if name == "cosine_with_restarts":
            return 0.0 if progress == 1 else peak * 0.5 * (1 + math.cos(math.pi * ((cycles * progress) % 1)))
        return (peak - lowest) * (1 - progress) ** power + lowest

    return curve


def make_optimizer(betas, weight_decay, epsilon):
    """AdamW without its learning rate, by which the step multiplies: an optax.GradientTransformation."""
    return optax.chain(optax.scale_by_adam(*betas, eps=epsilon), optax.add_decayed_weights(weight_decay))


def new_state(params, optimizer, average=False, loss_scaling=False, hold=False):
    """The training state that a run begins with, numpy arrays: a dict of params, optimizer and, where they are asked
    for, average, loss_scale and held (whether a step was not finite)."""
    moments = jax.eval_shape(optimizer.init, params)  # Adam's are zero at first
    state = {"params": params, "optimizer": jax.tree.map(lambda like: np.zeros(like.shape, like.dtype), moments)}
    if average:
        state["average"] = new_average(params)
    if loss_scaling:
        state["loss_scale"] = new_loss_scale()
    if hold:
        state["held"] = np.bool_(False)
    return state


def accumulated(gradient_of, params, batch):
    """(loss, gradient), the mean of `gradient_of(params, micro_batch)` over the leading axis of `batch`."""
    count = batch["weight"].shape[0]
    if count == 1:
        return gradient_of(params, jax.tree.map(lambda array: array[0], batch))

    def add(so_far, micro_batch):
        return jax.tree.map(jnp.add, so_far, gradient_of(params, micro_batch)), None

    nothing = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
    total, _ = jax.lax.scan(add, nothing, batch)
    return jax.tree.map(lambda value: value / count, total)


def clip_gradient(gradients, most):
    """(gradients scaled down to norm `most` where theirs is larger, their norm); with the 1e-6 of torch's formula.

    0 means that they stay as they are.
    """
    norm = optax.tree.norm(gradients)
    scale = jnp.minimum(1.0, most / (norm + 1e-6)) if most else 1.0
    return jax.tree.map(lambda gradient: gradient * scale, gradients), norm


def new_average(params):
    """The start of an average of the weights."""
    return {"weights": params, "updates": np.int32(0)}


def move_average(average, params, decay):
    """An average of the weights after one more step; the decay is that of ema.EMAWeights."""
    earlier = average["updates"].astype(jnp.float32)  # diffusers counts the first step as 0
    # 1 - the decay, without cancellation
    weight = jnp.where(earlier == 0, 1.0, jnp.maximum(1 - decay, 9 / (10 + earlier)))

    def moved(shadow, value):  # from the nearer end, as torch's lerp: a weight of 1 gives the value itself
        way = value - shadow
        return jnp.where(weight < 0.5, shadow + weight * way, value - (1 - weight) * way)

    return {"weights": jax.tree.map(moved, average["weights"], params), "updates": average["updates"] + 1}


GROW_AFTER = 2000  # steps without an overflow, after which the loss scale is doubled; torch's GradScaler's number


def new_loss_scale():
    """The state of dynamic loss scaling: fp16 gradients are computed of the loss times `scale`."""
    return {"scale": np.float32(65536), "good": np.int32(0)}


def move_loss_scale(loss_scale, finite):
    """Halve the scale after an overflow, double it after many steps without one."""
    good = jnp.where(finite, loss_scale["good"] + 1, 0)
    grown = jnp.where(good == GROW_AFTER, 2.0, 1.0)
    scale = loss_scale["scale"] * jnp.where(finite, grown, 0.5)
    return {"scale": scale, "good": jnp.where(good == GROW_AFTER, 0, good)}


def where(condition, yes, no):
    """Tree `yes` where the scalar `condition` is true, else `no`."""
    return jax.tree.map(lambda one, other: jnp.where(condition, one, other), yes, no)
