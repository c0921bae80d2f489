"""Optimizers, bfloat16 weights with stochastic rounding, and the learning rate after a resume."""

from contextlib import contextmanager, redirect_stdout

import torch

# What torch's optimizers keep as large as a weight, or as one of its sides; bitsandbytes' state is in 8 bits already.
HALVED = frozenset(["exp_avg", "exp_avg_sq", "row_var", "col_var", "variance"])


@contextmanager
def only_parameter(optimizer, parameter):
    """Within this context a step of an optimizer with one group of parameters updates this parameter alone."""
    (group,) = optimizer.param_groups
    every, group["params"] = group["params"], [parameter]
    try:
        yield
    finally:
        group["params"] = every


def to_bfloat16(model):
    """Put the weights of a model that are trained into bfloat16; what is not trained keeps its precision."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()


def round_stochastically(values, into, generator):
    """Round a float32 tensor to the bfloat16 tensor `into`, of the same shape; `values` is spent.

    Each value goes to one of its two neighbours, with probabilities that keep its expectation, so that steps smaller
    than half a step of bfloat16 (2^-9 of the weight) add up instead of being lost (Zamirai et al. 2020, "Revisiting
    BFloat16 training", arXiv 2010.06192, section 4). A bfloat16 is the upper half of a float32: noise below it, added
    to the bits, carries into it as often as the lower half says.
    """
    noise = torch.randint(2**16, values.shape, dtype=torch.int32, device=values.device, generator=generator)
    values.view(torch.int32).add_(noise).bitwise_and_(-(2**16))
    into.copy_(values)


class StochasticRounding:
    """Mixed into an optimizer class: bfloat16 weights, each updated in float32 and rounded stochastically.

    So are the moments that it keeps: rounded to nearest, a mean of squares with beta2 = 0.999 could never fall, since
    a thousandth is less than half a step. Only one weight at a time has float32 copies. `rounding_seed(index)` seeds
    the rounding of the weight of this index in the coming step; it must not depend on the process.
    """

    rounding_seed = None

    def add_param_group(self, group):  # called once, by the constructor
        super().add_param_group(group)
        self.index = {parameter: at for at, parameter in enumerate(group["params"])}
        self.generator = torch.Generator(group["params"][0].device)

    def step(self, closure=None):
        assert closure is None
        (group,) = self.param_groups
        for parameter in group["params"]:
            if parameter.grad is not None:
                self._step_in_float32(parameter)

    @torch.no_grad()
    def _step_in_float32(self, parameter):
        # A stand-in: a weight that changed its type for a moment would lose the hooks of DistributedDataParallel.
        exact = torch.nn.Parameter(parameter.float())
        exact.grad = parameter.grad.float()
        state = self.state.pop(parameter, {})
        self.state[exact] = {name: value.float() if name in HALVED else value for name, value in state.items()}
        with only_parameter(self, exact):
            super().step()
        generator = self.generator.manual_seed(self.rounding_seed(self.index[parameter]))
        round_stochastically(exact.data, parameter, generator)
        state = self.state[parameter] = self.state.pop(exact)
        for name in sorted(state.keys() & HALVED):
            half = torch.empty_like(state[name], dtype=torch.bfloat16)
            round_stochastically(state[name], half, generator)
            state[name] = half


def make_optimizer(
    parameters, name, learning_rate, betas, weight_decay, epsilon, loss_scaling=False, rounding_seed=None
):
    """An optimizer by its name in `--optimizer`; `loss_scaling` says that fp16 gradients will be scaled.

    With `rounding_seed` the weights may be bfloat16, as optimizers.StochasticRounding says.
    """
    options = {"lr": learning_rate, "weight_decay": weight_decay}
    if name == "adafactor":
        cls = torch.optim.Adafactor
        options["foreach"] = False  # torch's choice on a GPU, which holds several times the weights for a moment
        # The rate as it is: by default torch takes it in proportion to a weight's RMS, which for adapters,
        # zero at first, is a thousandth of it.
        options["eps"] = (None, 1.0)
    else:
        options |= {"betas": betas, "eps": epsilon}
    if name == "adamw":
        cls = torch.optim.AdamW
        # Under loss scaling the fused kernel skips an overflow in itself, and accelerate could not tell that it did.
        options["fused"] = not loss_scaling
    if name in ("adamw8bit", "paged_adamw8bit"):
        from bitsandbytes import optim

        cls = optim.AdamW8bit if name == "adamw8bit" else optim.PagedAdamW8bit
    if name == "prodigy":
        from prodigyopt import Prodigy as cls

        # What diffusers' own scripts set; without the second a warm-up would distort the step size that it finds.
        options |= {"use_bias_correction": True, "safeguard_warmup": True}
    if rounding_seed is not None:
        cls = type(cls.__name__, (StochasticRounding, cls), {"rounding_seed": staticmethod(rounding_seed)})
    with redirect_stdout(None):  # Prodigy prints that it decays weights
        return cls(parameters, **options)


def restart_schedule(optimizer, lr_scheduler, step):
    """Put a LambdaLR at `step` steps: the rate is a function of the step and of this run's flags alone."""
    lr_scheduler.last_epoch, lr_scheduler._step_count = step, step + 1
    rates = [base * curve(step) for base, curve in zip(lr_scheduler.base_lrs, lr_scheduler.lr_lambdas, strict=True)]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    lr_scheduler._last_lr = rates
