"""BatchPlan that take less memory: of weights that lie in bfloat16, and during the backward pass."""

from contextlib import contextmanager

import torch

# What torch's optimizers keep as large as a weight, or as one of its sides; bitsandbytes' state is in 8 bits already.
HALVED = frozenset(["exp_avg", "exp_avg_sq", "row_var", "col_var", "variance"])


@contextmanager
def alone(optimizer, parameter):
    """Within this context a step of an optimizer with one group of parameters updates this parameter alone."""
    (group,) = optimizer.param_groups
    every, group["params"] = group["params"], [parameter]
    try:
        yield
    finally:
        group["params"] = every


# ---------------------------------------------------------------------------------------------------------------------
# Weights in bfloat16
# ---------------------------------------------------------------------------------------------------------------------


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
        with alone(self, exact):
            super().step()
        generator = self.generator.manual_seed(self.rounding_seed(self.index[parameter]))
        round_stochastically(exact.data, parameter, generator)
        state = self.state[parameter] = self.state.pop(exact)
        for name in sorted(state.keys() & HALVED):
            half = torch.empty_like(state[name], dtype=torch.bfloat16)
            round_stochastically(state[name], half, generator)
            state[name] = half


# ---------------------------------------------------------------------------------------------------------------------
# BatchPlan during the backward pass
# ---------------------------------------------------------------------------------------------------------------------


class FusedBackward:
    """BatchPlan each weight as soon as the backward pass has its gradient, and frees the gradient at once.

    So the gradients, as large as the weights, are never all in memory (Lv et al. 2023, "Full parameter fine-tuning for
    large language models with limited resources", arXiv 2306.09782). The step of a weight is the optimizer's own, on
    that weight alone: with AdamW the same to the bit as after the backward pass. Nothing can be clipped, since weights
    have moved before the whole norm is known. Of a network that torch.compile made one graph of, the gradients come
    all at once, and nothing is saved.

    `guard`, an engine.FiniteGuard, is shown the loss before the backward pass and then each gradient. From the first
    one on that is not finite no weight moves; those that moved before it in the same backward pass, with finite
    gradients, cannot be taken back. A loss that is not finite moves none.
    """

    def __init__(self, optimizer, guard):
        self.optimizer = optimizer.optimizer  # the one inside accelerate's wrapper
        self.guard, self.norms = guard, []
        for parameter in self.optimizer.param_groups[0]["params"]:
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._update)

    def begin(self, loss):
        """To be called with the loss before its backward pass."""
        self.norms = [loss.detach() * 0]  # not finite where the loss is not
        self.guard.look_at(self.norms[0])

    def _update(self, parameter):
        self.norms.append(torch.linalg.vector_norm(parameter.grad, dtype=torch.float32))
        with alone(self.optimizer, parameter):
            self.guard.look_at(self.norms[-1], more=True)
            self.optimizer.step()
        parameter.grad = None

    def gradient_norm(self):
        """The norm of the whole gradient of the last backward pass, a scalar tensor."""
        return torch.linalg.vector_norm(torch.stack(self.norms))
