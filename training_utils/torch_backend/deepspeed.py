"""DeepSpeed's ZeRO, stages 1 and 2: every process has all weights, and updates its share of them alone.

The share is a slice of the trained weights laid in a row; a process keeps AdamW's moments of that slice and, in stage
2, its gradient. accelerate's own way to DeepSpeed updates weights inside the backward pass, before a gradient can be
clipped or found not finite, so accelerate is not told of it, and DeepSpeed's engine is driven here.
"""

import os
from contextlib import contextmanager

import torch
import torch.distributed as dist

from training_utils.base import launch

# Of the zero_optimization section of DeepSpeed's file: what decides how much is sent at once.
SIZES = ["reduce_bucket_size", "allgather_bucket_size", "overlap_comm"]


@contextmanager
def hidden():
    """Within this context accelerate does not see that it was launched with DeepSpeed, nor an accumulation that may be
    "auto"; the flags say how many passes a step has."""
    names = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS")
    told = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ |= told


def prepare(accelerator, model, optimizer):
    """What `accelerator.prepare` returns of a model and its torch AdamW, for processes that share the steps out."""
    import deepspeed

    deepspeed.ops.__compatible_ops__ = {}  # else it compiles for minutes, for processes that meet on a CPU
    settings = launch.deepspeed_settings()
    sizes = {name: settings[f"zero_optimization.{name}"] for name in SIZES if f"zero_optimization.{name}" in settings}
    stage = int(settings[launch.STAGE])
    config = {
        "zero_optimization": {"stage": stage, "compute_grad_norm": False, **sizes},
        "gradient_clipping": 0.0,  # `Optimizer.clip` does it; left out, the engine would clip to a norm of 1
        "train_micro_batch_size_per_gpu": 1,  # asked for, to count samples
        "gradient_accumulation_steps": 1,
        "zero_allow_untested_optimizer": True,
        "timers": {"throughput": {"enabled": False, "synchronized": False}},  # else each forward waits for the device
        "steps_per_print": None,
    }
    parameters = optimizer.param_groups[0]["params"]
    model = accelerator.prepare_model(model, evaluation_mode=True)  # the mixed precision alone
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    engine.set_gradient_accumulation_boundary(True)
    return Network(engine), Optimizer(accelerator, engine, optimizer, parameters, stage)


class Network(torch.nn.Module):
    """What the loop calls in place of the model."""

    def __init__(self, engine):
        super().__init__()
        self.engine = engine

    def forward(self, *inputs, **options):
        return self.engine(*inputs, **options)

    @contextmanager
    def no_sync(self):
        """What accelerate enters for the passes of a step before the last, as with DistributedDataParallel."""
        self.engine.set_gradient_accumulation_boundary(False)
        try:
            yield
        finally:
            self.engine.set_gradient_accumulation_boundary(True)


class Parameters(list):
    """The parameters of a model whose steps are shared out, and `optimizer`, which has their gradient."""

    def __init__(self, parameters, optimizer):
        super().__init__(parameters)
        self.optimizer = optimizer


class Optimizer:
    """What the scripts call of an optimizer. `optimizer` is torch's, whose one parameter is this process' slice."""

    def __init__(self, accelerator, engine, optimizer, parameters, stage):
        self.accelerator, self.engine, self.optimizer, self.stage = accelerator, engine, optimizer, stage
        self.parameters = Parameters(parameters, self)
        (self.slice,) = optimizer.param_groups[0]["params"]

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    @property
    def state(self):
        return self.optimizer.state

    def clip(self, max_norm):
        """The norm of the whole gradient, a scalar tensor, which is then clipped to `max_norm`; 0 means no clipping. A
        collective call, between the last backward pass of a step and `step`."""
        parts = self.engine.optimizer.averaged_gradients[0]
        square = torch.nn.utils.get_total_norm(parts).square()
        dist.all_reduce(square)
        norm = square.sqrt()
        if max_norm:
            torch._foreach_mul_(parts, (max_norm / (norm + 1e-6)).clamp(max=1))  # as torch.nn.utils.clip_grad_norm_
        return norm

    def step(self):
        """Step the slice, and gather all of them; after the other passes of a step nothing."""
        if self.accelerator.sync_gradients:
            self.engine.step()

    def zero_grad(self):
        """Nothing: the engine has freed the gradients that it has used."""

    def _pieces(self, rank):
        """Where the slice of a process lies, as (number of a parameter, range in it, range in the slice)."""
        begin, end, at = rank * self.slice.numel(), (rank + 1) * self.slice.numel(), 0
        for number, parameter in enumerate(self.parameters):
            size = parameter.numel() if parameter.requires_grad else 0
            first, last = max(at, begin), min(at + size, end)
            if first < last:
                yield number, slice(first - at, last - at), slice(first - begin, last - begin)
            at += size

    def whole_state(self):
        """The state_dict that one process would have; None in every process but the first. A collective call."""
        mine, main = self.state[self.slice], dist.get_rank() == 0
        trained = [number for number, parameter in enumerate(self.parameters) if parameter.requires_grad]
        state = {number: {"step": mine["step"].to("cpu", copy=True)} for number in trained}
        for name in ("exp_avg", "exp_avg_sq"):
            if main:
                for number in trained:
                    state[number][name] = torch.empty_like(self.parameters[number], device="cpu").requires_grad_(False)
            for rank in range(dist.get_world_size()):  # one slice after the other, for a device that has no more room
                part = mine[name] if rank == dist.get_rank() else torch.empty_like(mine[name])
                dist.broadcast(part, rank)
                for number, there, here in self._pieces(rank) if main else ():
                    state[number][name].view(-1)[there] = part[here].cpu()
        (group,) = self.param_groups
        return {"state": state, "param_groups": [group | {"params": [*range(len(self.parameters))]}]} if main else None

    def load_state(self, saved):
        """Put what `whole_state` returned, in whatever run, into this process' slice; no collective call. The weights
        must be the model's already."""
        self.engine.optimizer.refresh_fp32_params()
        found = [moments for _, moments in sorted(saved["state"].items())]
        mine = {name: torch.zeros_like(self.slice) for name in ("exp_avg", "exp_avg_sq")}
        for number, there, here in self._pieces(dist.get_rank()):
            for name, part in mine.items() if number in saved["state"] else ():
                part[here] = saved["state"][number][name].flatten()[there].to(part.device)
        self.state[self.slice] = {"step": found[0]["step"].clone(), **mine}
