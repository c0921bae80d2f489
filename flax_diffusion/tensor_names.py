"""Names and layouts of parameters: linen's tree on one side, torch's files on the other.

See network.py for how the names in the tree follow from those in the file.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from .config import ModelError
from .network import Network

# linen's last word of a parameter, and the file's.
LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
# The first names of the autoencoder's attention, and those of today.
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
# Parts of a complete CLIP, which files of a text encoder may hold.
NOT_TEXT = ("vision_model.", "visual_projection.", "text_projection.", "logit_scale")


def tensor_name(path: Sequence[str]) -> str:
    """The name in the file of a parameter whose path in the tree is `path`."""
    return ".".join([*path[:-1], LEAVES.get(path[-1], path[-1])])


def to_torch_layout(leaf: str, array: np.ndarray) -> np.ndarray:
    """A parameter as torch stores it: convolutions (H, W, in, out) become (out, in, H, W), matrices are transposed."""
    if leaf != "kernel":
        return array
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T


def from_torch_layout(leaf: str, array: np.ndarray) -> np.ndarray:
    """The inverse of `to_torch_layout`."""
    if leaf != "kernel":
        return array
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


def _torch_shape(leaf: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that `to_torch_layout` gives a parameter of this shape."""
    if leaf != "kernel":
        return shape
    return (shape[3], shape[2], *shape[:2]) if len(shape) == 4 else shape[::-1]


def current_name(part: str, name: str) -> str | None:
    """The name that today's libraries give a tensor, None for one that the network does not need."""
    if part == "text_encoder":
        name = name.removeprefix("text_model.")
        if name.startswith(NOT_TEXT) or name.endswith("position_ids"):
            return None
        return name
    if part == "vae" and ".attentions." in name:
        module, _, leaf = name.rpartition(".")
        head, _, last = module.rpartition(".")
        return f"{head}.{OLD_ATTENTION.get(last, last)}.{leaf}"
    return name


def from_old_flax(tree: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The tensors of an old Flax model's tree under today's names and in torch's layout.

    Those modules were named `down_blocks_0`, where the safetensors file says `down_blocks.0`.
    """
    tensors = {}
    for path, array in flatten_dict(tree).items():
        modules = [name if name.startswith("linear_") else re.sub(r"_(\d+)$", r".\1", name) for name in path[:-1]]
        tensors[tensor_name([*modules, path[-1]])] = to_torch_layout(path[-1], np.asarray(array))
    return tensors


def tensor_shapes(module: Network) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a module's tensors in a file; a text encoder's without `text_model.`"""
    shapes = {}
    for path, parameter in flatten_dict(module.shapes()).items():
        shapes[tensor_name(path)] = _torch_shape(path[-1], parameter.shape)
    return shapes


def to_params(module: Network, tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The parameter tree of a module, float32 numpy arrays, from a file's tensors {name: array of any float type}.

    Raises ModelError when a tensor is missing, has another shape, or is one that the module does not have.
    """
    part = module.part
    arrays = {current_name(part, name): array for name, array in tensors.items()}
    arrays.pop(None, None)
    params = {}
    for path, (name, shape) in zip(flatten_dict(module.shapes()), tensor_shapes(module).items(), strict=True):
        if name not in arrays:
            raise ModelError(f"{part}: the weights hold no {name}, which a network of this configuration has")
        array = arrays.pop(name)
        if part == "vae" and array.shape == (*shape, 1, 1):
            # The first autoencoders stored the matrices of their attention as 1x1 convolutions.
            array = array[:, :, 0, 0]
        if array.shape != shape:
            raise ModelError(f"{part}: {name} has shape {array.shape}, where the configuration asks for {shape}")
        params[path] = np.ascontiguousarray(from_torch_layout(path[-1], array), dtype=np.float32)
    if arrays:
        extra = min(str(name) for name in arrays)
        raise ModelError(f"{part}: the weights hold {extra}, which a network of this configuration does not have")
    return unflatten_dict(params)


def to_tensors(module: Network, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """A parameter tree as a file's tensors, {name: numpy array in torch's layout}. Raises ModelError like to_params.

    The text encoder's names get the `text_model.` level: transformers 4 needs it and 5 reads both.
    """
    part = module.part
    level = "text_model." if part == "text_encoder" else ""
    shapes = flatten_dict(module.shapes())
    arrays = flatten_dict(params)
    if different := set(shapes) ^ set(arrays):
        name = tensor_name(min(different))
        raise ModelError(f"{part}: {name} is either missing or not a parameter of this configuration")
    tensors = {}
    for path, expected in shapes.items():
        array = arrays[path]
        if array.shape != expected.shape:
            hint = ""
            if array.shape[1:] == expected.shape:
                hint = "; params that are replicated must go through flax.jax_utils.unreplicate first"
            raise ModelError(f"{part}: {tensor_name(path)} has shape {array.shape}, not {expected.shape}{hint}")
        tensors[level + tensor_name(path)] = np.ascontiguousarray(to_torch_layout(path[-1], np.asarray(array)))
    return tensors
