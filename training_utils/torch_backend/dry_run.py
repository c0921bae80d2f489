"""What a dry run measures."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from accelerate import Accelerator

from training_utils.base import environment
from training_utils.run import dry_run
from training_utils.run.dry_run import MemoryUse, ParameterCount
from training_utils.torch_backend import sharding
from training_utils.torch_backend.deepspeed import PartitionedOptimizer
from training_utils.torch_backend.ema import EMAWeights


def begin_dry_run(accelerator: Accelerator, batches: Iterator, samples: Any, batch_plan: Any) -> Iterator:
    """The batches for a dry run, whose use of memory is measured from here on.

    Samples that caches stand in for are made now: a run finds them on the disk.
    """
    transform = samples.transform
    if transform.image_cache or getattr(transform, "caption_cache", None):
        batches = dry_run.make_ahead(batches, dry_run.STEPS * batch_plan.accumulation)
    if accelerator.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(accelerator.device)
    return batches


def measure_memory(
    device: torch.device,
    *,
    models: list[torch.nn.Module],
    optimizer: Any,
    ema: EMAWeights | None,
    frees_gradients: bool,
) -> MemoryUse:
    """What each part of a training takes on the device, and the peak.

    `frees_gradients` says that a weight's gradient is freed before the next one's is there.
    """
    trained = sharding.trained_parameters(optimizer)
    trained_ids = {id(parameter) for parameter in trained}
    frozen = []
    for model in models:
        for tensor in (*model.parameters(), *model.buffers()):
            if id(tensor) not in trained_ids:
                frozen.append(tensor)
    gradients = [parameter for parameter in trained if parameter.requires_grad]
    if frees_gradients:
        gradients = [max(gradients, key=_bytes)]
    optimizer_state = []
    for values in optimizer.state.values():
        optimizer_state += [value for value in values.values() if torch.is_tensor(value)]
    if isinstance(optimizer, PartitionedOptimizer):
        optimizer_state.append(optimizer.slice)
        if optimizer.stage == 2:
            gradients = [optimizer.slice]
    parts = {
        "weights that are trained": trained,
        "their gradients": gradients,
        "state of the optimizer": optimizer_state,
        "moving average": ema.shadow_params if ema is not None else [],
        "weights that are frozen": frozen,
    }
    name, peak = "this machine", environment.peak_memory()
    if device.type == "cuda":
        name, peak = torch.cuda.get_device_name(device), torch.cuda.max_memory_allocated(device)
    sizes = {part: _bytes_on(device, tensors) for part, tensors in parts.items()}
    return MemoryUse(device=name, parts=sizes, peak=peak)


def _bytes(tensor: torch.Tensor) -> int:
    part = sharding.local_slice(tensor)
    return part.numel() * part.element_size()


def _bytes_on(device: torch.device, tensors: Iterable[torch.Tensor]) -> int:
    """What tensors take on a device, in bytes; one that is there twice counts once."""
    distinct = {id(tensor): tensor for tensor in tensors if tensor.device.type == device.type}
    return sum(_bytes(tensor) for tensor in distinct.values())


def parameters_by_module(network: torch.nn.Module) -> dict[str, ParameterCount]:
    """How many parameters each top-level module has."""
    counts: dict[str, ParameterCount] = {}
    for name, parameter in network.named_parameters():
        module = name.split(".")[0]
        size = parameter.numel()
        count = ParameterCount(trained=size) if parameter.requires_grad else ParameterCount(frozen=size)
        counts[module] = counts.get(module, ParameterCount()) + count
    return counts
