"""Reads and writes the folder of a part: config.json beside safetensors in diffusers' and transformers' layout.

Parameters are a nested dict of arrays as linen takes it. Older layouts are read too: the `text_model.` level and the
`position_ids` of older CLIP files, the first names of the autoencoder's attention, and Flax's msgpack.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.typing import DTypeLike

from .config import FLAX_ONLY, ModelError
from .network import Network
from .networks import PARTS
from .tensor_names import to_params, to_tensors
from .weight_files import STEMS, read_config, read_safetensors, read_tensors, weight_files


def load_part(
    folder: str | Path, part: str, dtype: DTypeLike = jnp.float32, variant: str | None = None
) -> tuple[Network, dict[str, Any]]:
    """The module and the parameters of one part of a pipeline's folder.

    Args: folder, a local folder; part, "unet", "vae" or "text_encoder"; dtype, what the module computes in; variant,
    read the files of this variant ("fp16") where the part has them. Parameters are float32 numpy arrays whatever the
    type they are stored in. Raises ModelError, in a sentence that names the part.
    """
    folder = Path(folder) / part
    module = PARTS[part].from_config(read_config(folder, part), dtype)
    tensors = read_tensors(weight_files(folder, part, variant), part)
    return module, to_params(module, tensors)


def save_part(
    folder: str | Path, part: str, params: Mapping[str, Any], config: Mapping[str, Any], name: str | None = None
) -> None:
    """Write config.json and safetensors of one part into folder/name, by default folder/part, as diffusers or
    transformers write them.

    Args: params, nested dict of arrays, stored in the type that they have; config, a mapping. Raises ModelError when
    the parameters are not those of a network of this configuration.
    """
    from safetensors.numpy import save_file

    folder = Path(folder) / (name or part)
    module = PARTS[part].from_config(config)
    tensors = to_tensors(module, params)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {name: value for name, value in config.items() if name not in FLAX_ONLY}
    if "_class_name" in settings:
        settings["_class_name"] = settings["_class_name"].removeprefix("Flax")
    (folder / "config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    weights = folder / f"{STEMS[part]}.safetensors"
    save_file(tensors, weights, metadata={"format": "pt"})
    # safetensors writes for the owner alone; the file beside it has the permissions of the umask.
    shutil.copymode(folder / "config.json", weights)


def copy_part(
    source: str | Path, folder: str | Path, part: str, params: Mapping[str, Any], variant: str | None = None
) -> bool:
    """Copy a part from one pipeline's folder into another's if its weights are `params`; returns whether it did.

    The file is copied byte for byte, so its precision stays. A variant loses its tag. Weights in several files or in
    msgpack are not copied.
    """
    source = Path(source) / part
    folder = Path(folder) / part
    try:
        files = weight_files(source, part, variant)
    except ModelError:
        # The weights have been removed since they were read.
        return False
    if len(files) != 1 or files[0].suffix != ".safetensors":
        return False
    module = PARTS[part].from_config(read_config(source, part))
    stored = to_params(module, read_safetensors(files, part))
    if not _equal(flatten_dict(params), flatten_dict(stored)):
        return False
    folder.mkdir(parents=True, exist_ok=True)
    _copy_file(source / "config.json", folder / "config.json")
    _copy_file(files[0], folder / f"{STEMS[part]}.safetensors")
    return True


def _equal(params: Mapping[tuple, Any], others: Mapping[tuple, Any]) -> bool:
    """Whether two flat trees have the same paths and the same values."""
    return params.keys() == others.keys() and all(np.array_equal(params[path], others[path]) for path in others)


def _copy_file(source: Path, target: Path) -> None:
    """Copy a file, unless it is the same one: a pipeline may be saved where it came from."""
    if source.resolve() != target.resolve():
        shutil.copyfile(source, target)
