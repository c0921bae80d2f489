"""What a dry run measures."""

from collections.abc import Iterator
from typing import Any

import jax

from training_utils.base import environment
from training_utils.data.samples import Samples
from training_utils.jax_backend import processes
from training_utils.jax_backend.processes import ArrayTree
from training_utils.run import dry_run


def begin_dry_run(batches: Iterator[dict[str, jax.Array]], samples: Samples) -> Iterator[dict[str, jax.Array]]:
    """The batches of a dry run. Where the run would have caches, those of its steps are made now: a run finds what the
    frozen networks made on the disk."""
    cached = samples.prepare.images or samples.prepare.captions
    return dry_run.ahead(batches, dry_run.STEPS) if cached else batches


def report_dry_run(plan: tuple, name: str, arrays: dict[str, ArrayTree], frozen: dict[str, ArrayTree]) -> None:
    """Print what a dry run has found.

    `plan` is what `dry_run.report` takes first, `name` the network that is trained, `arrays` the training state,
    `frozen` the parameters of the other networks, which may lie in host memory.
    """
    memory = {
        "weights that are trained": _device_bytes(arrays["params"]),
        "their gradients": _device_bytes(arrays["params"]),
        "state of the optimizer": _device_bytes(arrays["optimizer"]),
        "moving average": _device_bytes(arrays.get("average")),
        "weights that are frozen": _device_bytes(frozen),
    }
    device = jax.local_devices()[0].device_kind
    peak = processes.peak_device_memory()
    if peak is None:
        device = "this machine"
        peak = environment.peak_memory()
    dry_run.report(*plan, {name: _parameters_of_modules(arrays["params"])}, device, memory, peak)


def _parameters_of_modules(params: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """{module: (number of parameters that are trained, that are not)}, a line for each outermost module."""
    modules: dict[str, tuple[int, int]] = {}
    for path, tree in params.items():
        module = path.split(".")[0]
        count = sum(array.size for array in jax.tree.leaves(tree))
        trained, _ = modules.get(module, (0, 0))
        modules[module] = (trained + count, 0)
    return modules


def _device_bytes(tree: ArrayTree) -> int:
    """The bytes of the arrays that lie on a device."""
    return sum(array.nbytes for array in jax.tree.leaves(tree) if isinstance(array, jax.Array))
