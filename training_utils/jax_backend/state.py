"""What a checkpoint holds of a training."""

from pathlib import Path

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from flax_diffusion import weights
from training_utils.base.console import warn
from training_utils.base.errors import UserError, reason_of
from training_utils.jax_backend import devices, models, optimizers

models.INDEX, STATE = "model_index.json", "optimizer.safetensors"


def flat_names(tree):
    """The leaves of a tree as {path: array}; the path's parts are joined by slashes."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def save_state(folder, trained, unet):
    """Write the weights, their average and the optimizer's state of a training state; the main process alone does.

    The files are unet/ and unet_ema/, model folders of diffusers, and optimizer.safetensors. `unet` is the module.
    """
    if not devices.is_main():
        return
    config = dict(unet.config)
    if "average" in trained:
        average = jax.device_get(trained["average"])
        facts = {"optimization_step": int(average["updates"])}  # where diffusers' EMAModel keeps it
        weights.save_part(folder, "unet", average["weights"], config | facts, "unet_ema")
    weights.save_part(folder, "unet", jax.device_get(trained["params"]), config)
    rest = {key: value for key, value in trained.items() if key not in ("params", "average", "held")}
    save_file(
        {name: np.array(leaf, order="C") for name, leaf in flat_names(jax.device_get(rest)).items()}, folder / STATE
    )


def load_state(folder, trained, unet):
    """What `save_state` wrote, in the shape of `trained`, a fresh training state. Raises UserError.

    Without an average in `folder` it begins at the weights.
    """
    folder = Path(folder)
    try:
        read = {"params": _read_weights(folder / "unet", unet)}
        if "held" in trained:
            read["held"] = trained["held"]
        if "average" in trained and (folder / "unet_ema").is_dir():
            updates = weights.read_config(folder / "unet_ema", "unet_ema")["optimization_step"]
            read["average"] = {"weights": _read_weights(folder / "unet_ema", unet), "updates": np.int32(updates)}
        elif "average" in trained:
            warn(f"{folder} holds no EMA weights; the average starts from its weights")
            read["average"] = optimizers.new_average(read["params"])
        saved = load_file(folder / STATE)
        if "loss_scale" in trained and "loss_scale/scale" not in saved:
            raise UserError(f"{folder} was not trained with --mixed_precision fp16; resume it with what it had")
        rest = {key: value for key, value in trained.items() if key not in read}
        return read | jax.tree.unflatten(
            jax.tree.structure(rest), [_of(saved, *pair) for pair in flat_names(rest).items()]
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:  # another model's shapes, or other files
        raise UserError(f"{folder} cannot be read: {reason_of(error)}") from None


def _read_weights(folder, unet):
    files = weights.weight_files(folder, "unet")
    return weights.to_params(unet, weights.read_safetensors(files, folder.name))


def _of(saved, name, like):
    if name not in saved:
        raise ValueError(f"{STATE} holds no {name}")
    if saved[name].shape != like.shape or saved[name].dtype != like.dtype:
        raise ValueError(f"{name} in {STATE} has shape {saved[name].shape} instead of {like.shape}")
    return saved[name]
