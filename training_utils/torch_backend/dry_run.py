"""What a dry run measures."""

import torch
import torch.utils.checkpoint

from training_utils.base import environment
from training_utils.run import dry_run
from training_utils.run.dry_run import ParameterCount
from training_utils.torch_backend import sharding
from training_utils.torch_backend.deepspeed import Optimizer


def begin_dry_run(accelerator, batches, samples, updates):
    """The batches for a dry run, whose use of memory is measured from here on.

    Those of data.Samples that caches stand in for are made now: a run finds them on the disk.
    """
    prepare = samples.prepare
    if prepare.images or getattr(prepare, "captions", None):
        batches = dry_run.make_ahead(batches, dry_run.STEPS * updates.accumulation)
    if accelerator.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(accelerator.device)
    return batches


def report_dry_run(accelerator, plan, networks, others, optimizer, ema, fused=None):
    """Print what a dry run has found. `plan` is (RunFacts, ImageDataset, Progress); `networks` are those that are
    trained, {name: module}; of the `others` one may be None. `fused` is a FusedBackward or None."""
    device = accelerator.device
    models = [*networks.values(), *(network for network in others if network is not None)]
    trained = sharding.trained(optimizer)
    ids = {id(parameter) for parameter in trained}
    still = [tensor for model in models for tensor in (*model.parameters(), *model.buffers()) if id(tensor) not in ids]
    state = [value for values in optimizer.state.values() for value in values.values() if torch.is_tensor(value)]
    gradients = [parameter for parameter in trained if parameter.requires_grad]
    if fused:
        gradients = [max(gradients, key=_bytes)]
    if isinstance(optimizer, Optimizer):
        state.append(optimizer.slice)
        gradients = [optimizer.slice] if optimizer.stage == 2 else gradients
    memory = {
        "weights that are trained": trained,
        "their gradients": gradients,
        "state of the optimizer": state,
        "moving average": ema.shadow_params if ema is not None else [],
        "weights that are frozen": still,
    }
    memory = {what: _bytes_on(device, tensors) for what, tensors in memory.items()}
    name, peak = "this machine", environment.peak_memory()
    if device.type == "cuda":
        name, peak = torch.cuda.get_device_name(device), torch.cuda.max_memory_allocated(device)
    facts, dataset, progress = plan
    dry_run.print_report(
        facts=facts,
        dataset=dataset,
        progress=progress,
        networks={name: _modules(network) for name, network in networks.items()},
        memory=dry_run.MemoryUse(device=name, parts=memory, peak=peak),
    )


def _bytes(tensor):
    tensor = sharding.local(tensor)
    return tensor.numel() * tensor.element_size()


def _bytes_on(device, tensors):
    """What tensors take on a device, in bytes; one that is there twice counts once."""
    return sum(_bytes(tensor) for tensor in {id(t): t for t in tensors if t.device.type == device.type}.values())


def _modules(network):
    """The ParameterCount of each top-level module, {name: count}."""
    counts = {}
    for name, parameter in network.named_parameters():
        module, size = name.split(".")[0], parameter.numel()
        count = ParameterCount(trained=size) if parameter.requires_grad else ParameterCount(frozen=size)
        counts[module] = counts.get(module, ParameterCount()) + count
    return counts
