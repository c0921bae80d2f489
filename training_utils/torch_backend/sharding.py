"""Weights that the processes share out among themselves (FSDP2), and how files hold them complete.

Each parameter is then a DTensor: every process holds a slice of its first axis, and gathers all of it only while the
block that it belongs to computes. What a parameter's slice is, and how a moving average, an optimizer's moment or a
file follows it, stands here alone; elsewhere tensors are plain. Without FSDP the functions return what they are given,
except `gather_full_on_main` and `gather_full_model`, which only processes that share weights out may call. What
DeepSpeed shares out is in deepspeed.py, to which five functions here hand on.
"""

import os
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor, distribute_tensor

from training_utils.base import launch
from training_utils.torch_backend import deepspeed
from training_utils.torch_backend.deepspeed import PartitionedOptimizer


def configure_fsdp(accelerator: Accelerator, compute_dtype: torch.dtype | None) -> None:
    """Let an Accelerator share weights out, where it was launched to.

    The network computes in `compute_dtype`, None meaning float32; the weights that are trained, and sums of gradients,
    stay in float32.
    """
    # accelerate shares out on GPUs alone.
    if launch.uses_fsdp() and accelerator.distributed_type == DistributedType.MULTI_CPU:
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        accelerator.state.distributed_type = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    if not accelerator.is_fsdp2:
        return
    plugin = accelerator.state.fsdp_plugin
    # With it, and it is accelerate's default, transformers gives every process except rank 0 empty text encoders.
    plugin.cpu_ram_efficient_loading = False
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)


def prepare_model(
    accelerator: Accelerator, model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[torch.nn.Module, Any]:
    """`accelerator.prepare` of a model and its optimizer, whose parameters are others where they are shared out."""
    if launch.uses_deepspeed() and accelerator.num_processes > 1:
        return deepspeed.prepare_model(accelerator, model, optimizer)
    if not accelerator.is_fsdp2:
        return accelerator.prepare(model, optimizer)
    plugin = accelerator.state.fsdp_plugin
    class_names = {type(module).__name__ for module in model.modules()}
    attention = "BasicTransformerBlock" if "BasicTransformerBlock" in class_names else "Attention"
    plugin.auto_wrap_policy = transformer_auto_wrap_policy
    plugin.transformer_cls_names_to_wrap = sorted({attention, "ResnetBlock2D"} & class_names)
    # What is not trained is read outside of a forward too, as the prior's statistics are, and must be complete there.
    plugin.ignored_modules = [torch.nn.ParameterList(p for p in model.parameters() if not p.requires_grad)]
    model, optimizer = accelerator.prepare(model, optimizer)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # A forward without a backward would leave the outermost parameters gathered, and so blind to an average
            # that takes the place of their slices.
            module.set_reshard_after_forward(True, recurse=False)
            if accelerator.device.type == "cpu":
                # gloo has no mean.
                module.set_force_sum_reduction_for_comms(True)
    return model, optimizer


def trained_parameters(optimizer: Any) -> list[torch.nn.Parameter]:
    """The parameters that an optimizer steps, each as it lies in its model."""
    if isinstance(optimizer, PartitionedOptimizer):
        return optimizer.parameters
    return optimizer.param_groups[0]["params"]


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether the processes share a model's parameters out."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def model_class(model: torch.nn.Module) -> type[Any]:
    """A model's class without the one that FSDP2 has put in front of it."""
    return next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))


# ---------------------------------------------------------------------------------------------------------------------
# Tensors
# ---------------------------------------------------------------------------------------------------------------------


def local_slice(tensor: torch.Tensor) -> torch.Tensor:
    """This process' slice of a tensor, a plain one in the same memory."""
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor


def slice_for(full: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """The part of a full tensor that belongs to this process' slice of a parameter; no collective call."""
    if not isinstance(parameter, DTensor):
        return full
    full = full.to(parameter.device)
    return distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local()


def as_sharded(part: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """The tensor whose plain `part` each process holds, sharded as the parameter is."""
    if not isinstance(parameter, DTensor):
        return part
    return DTensor.from_local(
        part,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def gather_full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor put together on every process' device. A collective call."""
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor


def gather_full_on_main(tensor: torch.Tensor) -> torch.Tensor | None:
    """A tensor put together in the main process' host memory; None in the others. A collective call."""
    full = gather_full_tensor(tensor)
    return full.detach().cpu() if dist.get_rank() == 0 else None


# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------


def gather_full_model(model: torch.nn.Module) -> torch.nn.Module | None:
    """A sharded model as one with plain weights, in the main process' host memory; None in the others. A collective
    call."""
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() != 0:
        return None
    # On the meta device, since a random initialisation would be lost anyway.
    with torch.device("meta"):
        plain = model_class(model).from_config(model.config)
    plain.load_state_dict(weights, assign=True)
    return plain


def load_model(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Put full weights, {name: tensor}, into a model. A collective call where the model is sharded, which takes the
    main process' weights."""
    if not is_sharded(model):
        model.load_state_dict(weights)
        return
    # By broadcast each slice is copied where it lies. Without, torch would make a second copy of all slices first.
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, weights, options=options)


# ---------------------------------------------------------------------------------------------------------------------
# Optimizers
#
# torch's get_optimizer_state_dict and set_optimizer_state_dict are not used here. Where an optimizer has no state yet
# (a checkpoint before the first step, and each resume) they create one by a step of their own with gradients of zero:
# a step count of 1 instead of none and, with an epsilon of 0, weights of NaN. And they name parameters, where
# optimizer.bin numbers them, as a run of one process and the original scripts do.
# ---------------------------------------------------------------------------------------------------------------------


def gather_full_optimizer_state(optimizer: Any) -> dict | None:
    """An optimizer's state_dict with full tensors, as a single process would have it; None in every process except the
    main one. A collective call where there is anything to put together."""
    if isinstance(optimizer, PartitionedOptimizer):
        return optimizer.gather_full_state()
    saved = optimizer.state_dict()
    if not has_sharded_state(optimizer):
        return saved
    state = {}
    # Every process must gather in the same order.
    for number, moments in sorted(saved["state"].items()):
        state[number] = {
            name: gather_full_on_main(value) if torch.is_tensor(value) else value
            for name, value in sorted(moments.items())
        }
    return saved | {"state": state} if dist.get_rank() == 0 else None


def has_sharded_state(optimizer: Any) -> bool:
    """Whether this process keeps slices of an optimizer's state, so that `load_optimizer_state` reads no more."""
    if isinstance(optimizer, PartitionedOptimizer):
        return True
    return any(isinstance(parameter, DTensor) for parameter in trained_parameters(optimizer))


def load_optimizer_state(optimizer: Any, saved: dict) -> None:
    """Put what `gather_full_optimizer_state` returned into an optimizer; no collective call."""
    if isinstance(optimizer, PartitionedOptimizer):
        optimizer.load_full_state(saved)
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def shard(value: Any, parameter: torch.Tensor) -> Any:
        if torch.is_tensor(value) and isinstance(parameter, DTensor) and value.shape == parameter.shape:
            return as_sharded(slice_for(value, parameter), parameter)
        return value

    state = {
        number: {name: shard(value, parameters[number]) for name, value in moments.items()}
        for number, moments in saved["state"].items()
    }
    optimizer.load_state_dict(saved | {"state": state})
