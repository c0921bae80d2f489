"""What a dry run measures."""

from collections.abc import Iterator
from typing import Any

import jax

from training_utils.base import environment
from training_utils.data.samples import Samples
from training_utils.jax_backend import processes
from training_utils.jax_backend.processes import ArrayTree
from training_utils.run import dry_run
from training_utils.run.dry_run import MemoryUse, ParameterCount


def begin_dry_run(batches: Iterator[dict[str, jax.Array]], samples: Samples) -> Iterator[dict[str, jax.Array]]:
    """The batches of a dry run. Where the run would have caches, those of its steps are made now: a run finds what the
    frozen networks made on the disk."""
    cached = samples.transform.image_cache or samples.transform.caption_cache
    return dry_run.make_ahead(batches, dry_run.STEPS) if cached else batches


def measure_memory(arrays: dict[str, ArrayTree], frozen: dict[str, ArrayTree]) -> MemoryUse:
    """What each part of a training takes on a device, and the peak.

    `arrays` is the training state, `frozen` the parameters of the other networks, which may lie in host memory.
    """
    parts = {
        "weights that are trained": _device_bytes(arrays["params"]),
        "their gradients": _device_bytes(arrays["params"]),
        "state of the optimizer": _device_bytes(arrays["optimizer"]),
        "moving average": _device_bytes(arrays.get("average")),
        "weights that are frozen": _device_bytes(frozen),
    }
    peak = processes.peak_device_memory()
    if peak is None:
        return MemoryUse(device="this machine", parts=parts, peak=environment.peak_memory())
    return MemoryUse(device=jax.local_devices()[0].device_kind, parts=parts, peak=peak)


def parameters_by_module(params: dict[str, Any]) -> dict[str, ParameterCount]:
    """How many parameters each outermost module has; all are trained."""
    modules: dict[str, ParameterCount] = {}
    for path, tree in params.items():
        module = path.split(".")[0]
        count = sum(array.size for array in jax.tree.leaves(tree))
        modules[module] = modules.get(module, ParameterCount()) + ParameterCount(trained=count)
    return modules


def _device_bytes(tree: ArrayTree) -> int:
    """The bytes of the arrays that lie on a device."""
    return sum(array.nbytes for array in jax.tree.leaves(tree) if isinstance(array, jax.Array))
