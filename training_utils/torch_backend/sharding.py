"""Weights that the processes share out among themselves (FSDP2), and how they become whole again.

Each parameter is then a DTensor: every process holds a slice of its first axis, and gathers the whole only while the
block that it belongs to computes. What a parameter's slice is, and how a moving average, an optimizer's moment or a
file follows it, stands here alone; elsewhere tensors are plain. Without FSDP the functions return what they are given,
except `whole` and `gather_full_model`, which only processes that share weights out may call. What DeepSpeed shares out
is in deepspeed.py, to which four functions here hand on.
"""

import os

import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor, distribute_tensor

from training_utils.base import launch
from training_utils.torch_backend import deepspeed
from training_utils.torch_backend.deepspeed import Optimizer


def begin(accelerator, precision):
    """Let an Accelerator share weights out, where it was launched to. `precision` is what the network computes in; the
    weights that are updated, and sums of gradients, stay in float32."""
    # accelerate shares out on GPUs alone.
    if launch.uses_fsdp() and accelerator.distributed_type == DistributedType.MULTI_CPU:
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        accelerator.state.distributed_type = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    if not accelerator.is_fsdp2:
        return
    plugin = accelerator.state.fsdp_plugin
    # With it, and it is accelerate's default, transformers gives every process but the first empty text encoders.
    plugin.cpu_ram_efficient_loading, os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = False, "false"
    plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=precision, reduce_dtype=torch.float32)


def prepare(accelerator, model, optimizer):
    """`accelerator.prepare` of a model and its optimizer, whose parameters change where they are shared out."""
    if launch.uses_deepspeed() and accelerator.num_processes > 1:
        return deepspeed.prepare(accelerator, model, optimizer)
    if not accelerator.is_fsdp2:
        return accelerator.prepare(model, optimizer)
    plugin = accelerator.state.fsdp_plugin
    names = {type(module).__name__ for module in model.modules()}
    blocks = {"BasicTransformerBlock" if "BasicTransformerBlock" in names else "Attention", "ResnetBlock2D"} & names
    plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap = transformer_auto_wrap_policy, sorted(blocks)
    # What is not trained is read outside of a forward too, as the prior's statistics are, and must be whole there.
    plugin.ignored_modules = [torch.nn.ParameterList(p for p in model.parameters() if not p.requires_grad)]
    model, optimizer = accelerator.prepare(model, optimizer)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # A forward without a backward would leave the outermost parameters whole, and so blind to an average that
            # takes the place of their slices.
            module.set_reshard_after_forward(True, recurse=False)
            if accelerator.device.type == "cpu":
                module.set_force_sum_reduction_for_comms(True)  # gloo has no mean
    return model, optimizer


def trained(optimizer):
    """The parameters that an optimizer steps, each as it lies in its model."""
    return optimizer.parameters if isinstance(optimizer, Optimizer) else optimizer.param_groups[0]["params"]


def is_sharded(model):
    """Whether the processes share a model's parameters out."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def model_class(model):
    """A model's class without what FSDP2 has put in front of it."""
    return next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))


def local(tensor):
    """This process' slice of a tensor, a plain one in the same memory."""
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor


def like(part, parameter):
    """A plain slice as the whole that it is a part of, shared out as the parameter is."""
    if not isinstance(parameter, DTensor):
        return part
    form = {"shape": parameter.shape, "stride": parameter.stride()}
    return DTensor.from_local(part, parameter.device_mesh, parameter.placements, run_check=False, **form)


def slice_for(whole, parameter):
    """The slice of a whole tensor that belongs to this process' slice of a parameter; no collective call."""
    if not isinstance(parameter, DTensor):
        return whole
    whole = whole.to(parameter.device)
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local()


def full(tensor):
    """A tensor put together on every process' device. A collective call."""
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor


def whole(tensor):
    """A tensor put together in the first process' host memory; None in the others. A collective call."""
    together = full(tensor)
    return together.detach().cpu() if torch.distributed.get_rank() == 0 else None


def gather_full_model(model):
    """A shared model as one with plain weights, in the first process' host memory; None in the others. A collective
    call."""
    weights = {name: whole(tensor) for name, tensor in model.state_dict().items()}
    if torch.distributed.get_rank() != 0:
        return None
    with torch.device("meta"):  # no random initialisation of a model whose weights are at hand
        plain = model_class(model).from_config(model.config)
    plain.load_state_dict(weights, assign=True)
    return plain


def load_model(model, weights):
    """Put whole weights, {name: tensor}, into a model; no collective call."""
    if not is_sharded(model):
        model.load_state_dict(weights)
        return
    for name, tensor in model.state_dict().items():
        local(tensor).copy_(slice_for(weights[name], tensor))


def whole_state(optimizer):
    """An optimizer's state_dict with whole tensors, as a single process would have it; None in every process but the
    first. A collective call where there is anything to put together."""
    if isinstance(optimizer, Optimizer):
        return optimizer.whole_state()
    saved = optimizer.state_dict()
    if not takes_slices(optimizer):
        return saved
    state = {
        index: {key: whole(value) if torch.is_tensor(value) else value for key, value in sorted(moments.items())}
        for index, moments in sorted(saved["state"].items())
    }
    return saved | {"state": state} if torch.distributed.get_rank() == 0 else None


def takes_slices(optimizer):
    """Whether `load_state` reads no more than a slice of each tensor."""
    return isinstance(optimizer, Optimizer) or any(isinstance(p, DTensor) for p in trained(optimizer))


def load_state(optimizer, saved):
    """Put what `whole_state` returned into an optimizer; no collective call."""
    if isinstance(optimizer, Optimizer):
        return optimizer.load_state(saved)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def share(value, parameter):
        fits = torch.is_tensor(value) and isinstance(parameter, DTensor) and value.shape == parameter.shape
        return like(slice_for(value, parameter), parameter) if fits else value

    state = {
        index: {key: share(value, parameters[index]) for key, value in moments.items()}
        for index, moments in saved["state"].items()
    }
    optimizer.load_state_dict(saved | {"state": state})
