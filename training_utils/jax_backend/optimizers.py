"""The optimizer, and the learning rate over the steps of a run."""

import math
from collections.abc import Callable

import optax

LOWEST_RATE = 1e-7  # where the polynomial curve ends


def make_optimizer(betas: tuple[float, float], weight_decay: float, epsilon: float) -> optax.GradientTransformation:
    """AdamW without its learning rate, by which the step multiplies."""
    return optax.chain(optax.scale_by_adam(*betas, eps=epsilon), optax.add_decayed_weights(weight_decay))


def learning_rate_curve(
    *,
    name: str,
    peak: float,
    num_warmup_steps: int,
    num_training_steps: int,
    num_cycles: float = 1,
    power: float = 1.0,
) -> Callable[[int], float]:
    """A function from the number of steps made to the learning rate of the next one; floats on the host.

    The curves are those of `--lr_scheduler` in the torch scripts (diffusers' get_scheduler). The rate is handed to
    the step, which therefore need not be compiled again for another rate, warm-up or length.
    """

    def curve(step: int) -> float:
        if name == "constant":
            return peak
        if step < num_warmup_steps:
            return peak * step / num_warmup_steps
        if name == "constant_with_warmup":
            return peak
        progress = min(1.0, (step - num_warmup_steps) / max(1, num_training_steps - num_warmup_steps))
        if name == "linear":
            return peak * (1 - progress)
        if name == "cosine":
            return peak * 0.5 * (1 + math.cos(math.pi * progress))
        if name == "cosine_with_restarts":
            if progress == 1:
                return 0.0
            return peak * 0.5 * (1 + math.cos(math.pi * ((num_cycles * progress) % 1)))
        return (peak - LOWEST_RATE) * (1 - progress) ** power + LOWEST_RATE

    return curve
