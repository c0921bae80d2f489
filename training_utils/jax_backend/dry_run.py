"""What a dry run measures."""

import jax

from training_utils.base import environment
from training_utils.run import dry_run


def begin_dry_run(batches, samples):
    """The steps' batches for a dry run. Those of data.Samples that caches stand in for are made now: a run finds
    them on the disk."""
    if samples.prepare.images or samples.prepare.captions:
        return dry_run.make_ahead(batches, dry_run.STEPS)
    return batches


def report_dry_run(plan, name, trained, frozen):
    """Print what a dry run has found. `plan` is (RunFacts, ImageDataset, Progress), `name` the network that is
    trained, `trained` the training state, `frozen` the parameters of the other networks, which may lie in host
    memory."""
    modules = {}
    for module, tree in trained["params"].items():
        top, size = module.split(".")[0], sum(array.size for array in jax.tree.leaves(tree))
        modules[top] = modules.get(top, dry_run.ParameterCount()) + dry_run.ParameterCount(trained=size)
    memory = {
        "weights that are trained": trained["params"],
        "their gradients": trained["params"],
        "state of the optimizer": trained["optimizer"],
        "moving average": trained.get("average"),
        "weights that are frozen": frozen,
    }
    memory = {
        what: sum(array.nbytes for array in jax.tree.leaves(tree) if isinstance(array, jax.Array))
        for what, tree in memory.items()
    }
    device = jax.local_devices()[0]
    seen = device.memory_stats() or {}  # a CPU has none
    name_of_device = device.device_kind if "peak_bytes_in_use" in seen else "this machine"
    peak = seen.get("peak_bytes_in_use", environment.peak_memory())
    facts, dataset, progress = plan
    dry_run.print_report(
        facts=facts,
        dataset=dataset,
        progress=progress,
        networks={name: modules},
        memory=dry_run.MemoryUse(device=name_of_device, parts=memory, peak=peak),
    )
