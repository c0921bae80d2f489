"""Accounts of a computation on fake tensors: the bytes of all storages that are alive, and their peak."""

import weakref
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only


class Ledger(TorchDispatchMode):
    """The bytes of all storages that are alive, `now`, and the most that ever were since `restart`, `peak`.

    A storage counts as CUDA's allocator counts it, in blocks of 512 bytes, and once for however many views it has.
    `phase` is set from outside; `peak_phase` is what it was at the peak.
    """

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.phase = {}, 0, ""
        self.restart()

    def restart(self):
        self.peak, self.peak_phase = self.now, self.phase

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return 1.0  # `item` of what has no contents
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor) and value.untyped_storage()._cdata not in self.sizes:
                self._enter(value.untyped_storage())
        return result

    def _enter(self, storage):
        key = storage._cdata
        self.sizes[key] = -(-storage.nbytes() // 512) * 512
        self.now += self.sizes[key]
        weakref.finalize(storage, self._strike, key).atexit = False
        if self.now > self.peak:
            self.restart()

    def _strike(self, key):
        self.now -= self.sizes.pop(key)


def cuda_autocast():
    """A context in which autocast on a CPU computes in float32 what it does on CUDA, and so keeps that in float32: of
    what the trained networks call, these three (torch's ATen/autocast_mode.h)."""

    def in_float32(function):
        def called(*args, **options):
            if torch.is_autocast_enabled("cpu"):
                args, options = tree_map_only(torch.Tensor, torch.Tensor.float, (args, options))
            return function(*args, **options)

        return called

    return patch.multiple(
        F, **{name: in_float32(getattr(F, name)) for name in ("layer_norm", "group_norm", "interpolate")}
    )


def faking():
    def apply(network, function, recurse=True):  # as Module's own, which cannot replace a fake parameter
        for parameter in network.parameters():
            parameter.data = function(parameter.data)
        return network

    return FakeTensorMode(), patch.object(torch.nn.Module, "_apply", apply)
