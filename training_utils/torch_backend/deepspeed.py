"""DeepSpeed's ZeRO, stages 1 and 2: every process has all weights, and steps its share of them alone.

This file has never run on GPUs: its tests are on CPU processes.

The share is a slice of the trained weights laid in a row; a process keeps AdamW's moments of that slice and, in stage
2, its gradient. accelerate's own way to DeepSpeed steps the weights inside the backward pass, before a gradient can be
clipped or found not finite, so accelerate is not told of it, and DeepSpeed's engine is driven here.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator

from training_utils.base import launch

# The settings in the zero_optimization section of DeepSpeed's file that decide how much is sent at once.
BUCKET_SETTINGS = ["reduce_bucket_size", "allgather_bucket_size", "overlap_comm"]

MOMENTS = ("exp_avg", "exp_avg_sq")


@contextmanager
def hidden_from_accelerate() -> Iterator[None]:
    """Within this context accelerate does not see that it was launched with DeepSpeed, nor an accumulation that may be
    "auto"; the flags say how many micro-steps a step has."""
    names = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS")
    removed = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ |= removed


def prepare_model(
    accelerator: Accelerator, model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> tuple["EngineModule", "PartitionedOptimizer"]:
    """What `accelerator.prepare` returns of a model and its torch AdamW, for processes that share the steps out."""
    import deepspeed

    # Else it compiles for minutes, for processes that meet on a CPU.
    deepspeed.ops.__compatible_ops__ = {}
    settings = launch.deepspeed_settings()
    buckets = {}
    for name in BUCKET_SETTINGS:
        if f"zero_optimization.{name}" in settings:
            buckets[name] = settings[f"zero_optimization.{name}"]
    stage = int(settings[launch.STAGE])
    config = {
        "zero_optimization": {"stage": stage, "compute_grad_norm": False, **buckets},
        # PartitionedOptimizer.clip_gradient clips; without this line the engine would clip to a norm of 1.
        "gradient_clipping": 0.0,
        # DeepSpeed wants to know it, to count samples.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_allow_untested_optimizer": True,
        # Else each forward waits for the device.
        "timers": {"throughput": {"enabled": False, "synchronized": False}},
        "steps_per_print": None,
    }
    parameters = optimizer.param_groups[0]["params"]
    # With `evaluation_mode` accelerate prepares the mixed precision alone.
    model = accelerator.prepare_model(model, evaluation_mode=True)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    engine.set_gradient_accumulation_boundary(True)
    return EngineModule(engine), PartitionedOptimizer(accelerator, engine, optimizer, parameters, stage)


class EngineModule(torch.nn.Module):
    """What the loop calls in place of the model."""

    def __init__(self, engine: Any) -> None:
        super().__init__()
        self.engine = engine

    def forward(self, *inputs: Any, **options: Any) -> Any:
        return self.engine(*inputs, **options)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """What accelerate enters for the micro-steps of a step before the last, as with DistributedDataParallel."""
        self.engine.set_gradient_accumulation_boundary(False)
        try:
            yield
        finally:
            self.engine.set_gradient_accumulation_boundary(True)


class PartitionedParameters(list):
    """The parameters of a model whose steps are shared out, and `optimizer`, which has their gradient."""

    def __init__(self, parameters: list[torch.nn.Parameter], optimizer: "PartitionedOptimizer") -> None:
        super().__init__(parameters)
        self.optimizer = optimizer


class PartitionedOptimizer:
    """What the scripts call of an optimizer. `optimizer` is torch's, whose one parameter is this process' slice."""

    def __init__(
        self,
        accelerator: Accelerator,
        engine: Any,
        optimizer: torch.optim.Optimizer,
        parameters: list[torch.nn.Parameter],
        stage: int,
    ) -> None:
        self.accelerator = accelerator
        self.engine = engine
        self.optimizer = optimizer
        self.stage = stage
        self.parameters = PartitionedParameters(parameters, self)
        (self.slice,) = optimizer.param_groups[0]["params"]

    @property
    def param_groups(self) -> list[dict]:
        return self.optimizer.param_groups

    @property
    def state(self) -> dict:
        return self.optimizer.state

    def clip_gradient(self, max_norm: float) -> torch.Tensor:
        """The norm of the full gradient, a scalar tensor, which is then clipped to `max_norm`; 0 means no clipping. A
        collective call, between the last backward pass of a step and `step`."""
        parts = self.engine.optimizer.averaged_gradients[0]
        square = torch.nn.utils.get_total_norm(parts).square()
        dist.all_reduce(square)
        norm = square.sqrt()
        if max_norm:
            # The factor of torch.nn.utils.clip_grad_norm_.
            torch._foreach_mul_(parts, (max_norm / (norm + 1e-6)).clamp(max=1))
        return norm

    def step(self) -> None:
        """Step the slice, and gather all of them; after the other micro-steps of a step nothing."""
        if self.accelerator.sync_gradients:
            self.engine.step()

    def zero_grad(self) -> None:
        """Nothing: the engine has freed the gradients that it has used."""

    def _pieces(self, rank: int) -> Iterator[tuple[int, slice, slice]]:
        """Where the slice of a process lies, as (number of a parameter, range in it, range in the slice)."""
        begin = rank * self.slice.numel()
        end = begin + self.slice.numel()
        start = 0
        for number, parameter in enumerate(self.parameters):
            size = parameter.numel() if parameter.requires_grad else 0
            first = max(start, begin)
            last = min(start + size, end)
            if first < last:
                yield number, slice(first - start, last - start), slice(first - begin, last - begin)
            start += size

    def gather_full_state(self) -> dict | None:
        """The state_dict that one process would have; None in every process except the main one. A collective call."""
        own = self.state[self.slice]
        is_main = dist.get_rank() == 0
        trained = [number for number, parameter in enumerate(self.parameters) if parameter.requires_grad]
        state = {number: {"step": own["step"].to("cpu", copy=True)} for number in trained}
        for name in MOMENTS:
            if is_main:
                for number in trained:
                    full = torch.empty_like(self.parameters[number], device="cpu")
                    state[number][name] = full.requires_grad_(False)
            # One slice after the other, for a device that has no more room.
            for rank in range(dist.get_world_size()):
                part = own[name] if rank == dist.get_rank() else torch.empty_like(own[name])
                dist.broadcast(part, rank)
                if not is_main:
                    continue
                for number, in_parameter, in_slice in self._pieces(rank):
                    state[number][name].view(-1)[in_parameter] = part[in_slice].cpu()
        if not is_main:
            return None
        (group,) = self.param_groups
        return {"state": state, "param_groups": [group | {"params": [*range(len(self.parameters))]}]}

    def load_full_state(self, saved: dict) -> None:
        """Put what `gather_full_state` returned, in whatever run, into this process' slice; no collective call. The
        weights must be the model's already."""
        self.engine.optimizer.refresh_fp32_params()
        first = saved["state"][min(saved["state"])]
        own = {name: torch.zeros_like(self.slice) for name in MOMENTS}
        for number, in_parameter, in_slice in self._pieces(dist.get_rank()):
            if number not in saved["state"]:
                continue
            for name, part in own.items():
                part[in_slice] = saved["state"][number][name].flatten()[in_parameter].to(part.device)
        self.state[self.slice] = {"step": first["step"].clone(), **own}
