"""Optimizers, bfloat16 weights with stochastic rounding, and the learning rate after a resume."""

import importlib
from collections.abc import Callable, Iterable, Iterator, Set
from contextlib import contextmanager, redirect_stdout
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch.optim.lr_scheduler import LambdaLR

from training_utils.cli.optimizers import OPTIMIZERS
from training_utils.cli.options import LearningRateOptions, OptimizerOptions


@contextmanager
def only_parameter(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter) -> Iterator[None]:
    """Within this context a step of an optimizer with one group of parameters updates this parameter alone."""
    (group,) = optimizer.param_groups
    every, group["params"] = group["params"], [parameter]
    try:
        yield
    finally:
        group["params"] = every


def to_bfloat16(model: torch.nn.Module) -> None:
    """Put the weights of a model that are trained into bfloat16; what is not trained keeps its precision."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()


def round_stochastically(values: torch.Tensor, into: torch.Tensor, generator: torch.Generator) -> None:
    """Round a float32 tensor to the bfloat16 tensor `into`, of the same shape; `values` is spent.

    Each value goes to one of its two neighbours, with probabilities that keep its expectation, so that steps smaller
    than half a step of bfloat16 (2^-9 of the weight) add up instead of being lost (Zamirai et al. 2020, "Revisiting
    BFloat16 training", arXiv 2010.06192, section 4). A bfloat16 is the upper half of a float32: noise below it, added
    to the bits, carries into it as often as the lower half says.
    """
    noise = torch.randint(2**16, values.shape, dtype=torch.int32, device=values.device, generator=generator)
    values.view(torch.int32).add_(noise).bitwise_and_(-(2**16))
    into.copy_(values)


class StochasticRounding(torch.optim.Optimizer):
    """Mixed into an optimizer class: bfloat16 weights, each updated in float32 and rounded stochastically.

    So are the moments that it keeps: rounded to nearest, a mean of squares with beta2 = 0.999 could never fall, since
    a thousandth is less than half a step. Only one weight at a time has float32 copies. `rounding_seed(index)` seeds
    the rounding of the weight of this index in the coming step; it must not depend on the process.
    """

    rounding_seed: Callable[[int], int]
    bfloat16_state: Set[str]  # what of an optimizer's state is kept in bfloat16 too, by its names there

    def add_param_group(self, group: dict[str, Any]) -> None:
        """Take in the one group of parameters; called by the constructor."""
        super().add_param_group(group)
        self.index = {parameter: at for at, parameter in enumerate(group["params"])}
        self.generator = torch.Generator(group["params"][0].device)

    def step(self, closure: None = None) -> None:
        """Update each weight that has a gradient."""
        assert closure is None
        (group,) = self.param_groups
        for parameter in group["params"]:
            if parameter.grad is not None:
                self._step_in_float32(parameter)

    @torch.no_grad()
    def _step_in_float32(self, parameter: torch.nn.Parameter) -> None:
        # A stand-in: a weight that changed its type for a moment would lose the hooks of DistributedDataParallel.
        exact = torch.nn.Parameter(parameter.float())
        exact.grad = parameter.grad.float()
        state = self.state.pop(parameter, {})
        for name in state.keys() & self.bfloat16_state:
            state[name] = state[name].float()
        self.state[exact] = state
        with only_parameter(self, exact):
            super().step()
        generator = self.generator.manual_seed(self.rounding_seed(self.index[parameter]))
        round_stochastically(exact.data, parameter, generator)
        state = self.state[parameter] = self.state.pop(exact)
        for name in sorted(state.keys() & self.bfloat16_state):
            half = torch.empty_like(state[name], dtype=torch.bfloat16)
            round_stochastically(state[name], half, generator)
            state[name] = half


def make_optimizer(
    parameters: Iterable[torch.nn.Parameter],
    options: OptimizerOptions,
    *,
    learning_rate: float,
    loss_scaling: bool = False,
    rounding_seed: Callable[[int], int] | None = None,
) -> torch.optim.Optimizer:
    """The optimizer of `options`, built as its row in the optimizer table says.

    `learning_rate` is the peak, as it is after --scale_lr. `loss_scaling` says that fp16 gradients will be scaled.
    With `rounding_seed` the weights may be bfloat16, as StochasticRounding says.
    """
    row = OPTIMIZERS[options.name]
    settings = {"betas": options.betas, "eps": options.epsilon, "weight_decay": options.weight_decay}
    arguments = {"lr": learning_rate, **{name: settings[name] for name in row.takes}, **row.fixed}
    if row.has_fused_kernel:
        # Under loss scaling it skips an overflow in itself, and accelerate could not tell that it did.
        arguments["fused"] = not loss_scaling
    module, name = row.built_by.split(":")
    cls = getattr(importlib.import_module(module), name)
    if rounding_seed is not None:
        members = {"rounding_seed": staticmethod(rounding_seed), "bfloat16_state": row.bfloat16_state}
        cls = type(cls.__name__, (StochasticRounding, cls), members)
    with redirect_stdout(None):  # Prodigy prints that it decays weights
        return cls(parameters, **arguments)


def make_schedule(optimizer: torch.optim.Optimizer, options: LearningRateOptions, steps: int) -> LambdaLR:
    """The learning rate over a run of so many steps."""
    return get_scheduler(
        options.name,
        optimizer=optimizer,
        num_warmup_steps=options.warmup_steps,
        num_training_steps=steps,
        num_cycles=options.cycles,
        power=options.power,
    )


def restart_schedule(optimizer: torch.optim.Optimizer, lr_scheduler: LambdaLR, step: int) -> None:
    """Put a LambdaLR at `step` steps: the rate is a function of the step and of this run's flags alone."""
    lr_scheduler.last_epoch, lr_scheduler._step_count = step, step + 1
    rates = [base * curve(step) for base, curve in zip(lr_scheduler.base_lrs, lr_scheduler.lr_lambdas, strict=True)]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    lr_scheduler._last_lr = rates
