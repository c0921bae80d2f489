"""What a JAX run trains, and how a checkpoint holds it."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from flax_diffusion import ModelError, weights
from training_utils.base.console import warn
from training_utils.base.errors import UserError, reason_of
from training_utils.jax_backend import ema, gradient, processes
from training_utils.jax_backend.processes import ArrayTree

STATE = "optimizer.safetensors"


def flat_names(tree: ArrayTree) -> dict[str, Any]:
    """The leaves of a tree as {path: array}; the path's parts are joined by slashes."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def new_arrays(
    params: ArrayTree,
    optimizer: optax.GradientTransformation,
    *,
    average: bool = False,
    loss_scaling: bool = False,
    stop_on_nan: bool = False,
) -> dict[str, Any]:
    """What a run trains, before its first step: a dict of NumPy arrays.

    It has params, optimizer and, where they are asked for, average, loss_scale and halted (whether a gradient was not
    finite, after which a run that is to stop changes nothing any more).
    """
    moments = jax.eval_shape(optimizer.init, params)
    arrays = {
        "params": params,
        "optimizer": jax.tree.map(lambda like: np.zeros(like.shape, like.dtype), moments),  # Adam's are zero at first
    }
    if average:
        arrays["average"] = ema.new_average(params)
    if loss_scaling:
        arrays["loss_scale"] = gradient.new_loss_scale()
    if stop_on_nan:
        arrays["halted"] = np.bool_(False)
    return arrays


class TrainingState:
    """What a run trains, and how a checkpoint holds it.

    `arrays` is what a step takes and returns, see `new_arrays`: NumPy arrays at first, which `place` copies to the
    devices. In a checkpoint it is unet/ and unet_ema/, model folders of diffusers, and optimizer.safetensors. `unet`
    is the module.
    """

    def __init__(self, unet: Any, arrays: dict[str, Any]) -> None:
        self.unet = unet
        self.arrays = arrays

    def place(self, mesh: Mesh) -> None:
        """Copy the arrays to every device."""
        self.arrays = processes.replicate(self.arrays, mesh)

    @property
    def result(self) -> ArrayTree:
        """The weights that would be saved as the result now: their average, where there is one."""
        return self.arrays["average"]["weights"] if "average" in self.arrays else self.arrays["params"]

    def write(self, folder: Path) -> None:
        """Write a checkpoint's files; the main process alone does."""
        if not processes.is_main():
            return
        config = dict(self.unet.config)
        if "average" in self.arrays:
            average = jax.device_get(self.arrays["average"])
            averaged_config = config | {"optimization_step": int(average["steps"])}  # where diffusers' EMAModel has it
            weights.save_part(folder, "unet", average["weights"], averaged_config, "unet_ema")
        weights.save_part(folder, "unet", jax.device_get(self.arrays["params"]), config)
        rest = {key: value for key, value in self.arrays.items() if key not in ("params", "average", "halted")}
        leaves = flat_names(jax.device_get(rest))
        save_file({name: np.array(leaf, order="C") for name, leaf in leaves.items()}, folder / STATE)

    def read(self, folder: str | Path) -> None:
        """Read what `write` wrote; it must come before `place`. Without an average in `folder` it starts from the
        weights. Raises UserError."""
        folder = Path(folder)
        try:
            self.arrays = self._read(folder)
        except (OSError, ModelError, SafetensorError) as error:  # another model's shapes, or other files
            raise UserError(f"{folder} cannot be read: {reason_of(error)}") from error

    def _read(self, folder: Path) -> dict[str, Any]:
        read: dict[str, Any] = {"params": self._read_weights(folder / "unet")}
        if "halted" in self.arrays:
            read["halted"] = self.arrays["halted"]
        if "average" in self.arrays and (folder / "unet_ema").is_dir():
            read["average"] = self._read_average(folder / "unet_ema")
        elif "average" in self.arrays:
            warn(f"{folder} holds no EMA weights; the average starts from its weights")
            read["average"] = ema.new_average(read["params"])
        saved = load_file(folder / STATE)
        if "loss_scale" in self.arrays and "loss_scale/scale" not in saved:
            raise UserError(
                f"{folder} was not trained with --mixed_precision fp16; resume it with the precision that it had"
            )
        rest = {key: value for key, value in self.arrays.items() if key not in read}
        leaves = [_leaf(folder, saved, name, like) for name, like in flat_names(rest).items()]
        return read | jax.tree.unflatten(jax.tree.structure(rest), leaves)

    def _read_weights(self, folder: Path) -> ArrayTree:
        files = weights.weight_files(folder, "unet")
        return weights.to_params(self.unet, weights.read_safetensors(files, folder.name))

    def _read_average(self, folder: Path) -> dict[str, Any]:
        steps = weights.read_config(folder, "unet_ema").get("optimization_step")
        if not isinstance(steps, int):
            raise UserError(f"{folder.parent} cannot be read: {folder.name}/config.json has no optimization_step")
        return {"weights": self._read_weights(folder), "steps": np.int32(steps)}


def _leaf(folder: Path, saved: dict[str, np.ndarray], name: str, like: np.ndarray) -> np.ndarray:
    """The array of this name in the optimizer's file. Raises UserError where it is not one that can stand in for
    `like`."""
    if name not in saved:
        raise UserError(f"{folder} cannot be read: {STATE} holds no {name}")
    found = saved[name]
    if found.shape != like.shape or found.dtype != like.dtype:
        raise UserError(
            f"{folder} cannot be read: {name} in {STATE} has shape {found.shape} and type {found.dtype} instead of "
            f"{like.shape} and {like.dtype}"
        )
    return found
