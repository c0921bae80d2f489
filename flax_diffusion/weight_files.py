"""The files of a part's folder: config.json, and the weights in one safetensors file, in several or in msgpack.

Pickles are never read, because they could run code.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .config import ModelError
from .tensor_names import from_old_flax

STEMS = {"text_encoder": "model", "unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
# The files that Flax models were once published in.
MSGPACK = {"text_encoder": "flax_model", "unet": "diffusion_flax_model", "vae": "diffusion_flax_model"}


def read_config(folder: Path, part: str) -> dict[str, Any]:
    """config.json of a part's folder, a dict. Raises ModelError."""
    try:
        return json.loads((folder / "config.json").read_text())
    except FileNotFoundError as error:
        raise ModelError(f"{part}: {folder} has no config.json; it must be a folder in diffusers' layout") from error
    except ValueError as error:
        raise ModelError(f"{part}: {folder / 'config.json'} is not valid JSON: {error}") from error


@dataclass(frozen=True)
class WeightPatterns:
    """Names of files that may hold a part's weights: one file with all, or an index and the files that it lists."""

    single: str
    index: str | None = None
    indexed: str | None = None

    def all(self) -> list[str]:
        """Every pattern, for a download."""
        return [pattern for pattern in (self.single, self.index, self.indexed) if pattern is not None]


def file_patterns(part: str, variant: str | None = None) -> Iterator[WeightPatterns]:
    """Where a part's weights may be, most wanted first: in files of the variant, in plain ones, in Flax's msgpack."""
    stem = STEMS[part]
    for tag in [f".{variant}", ""] if variant else [""]:
        yield WeightPatterns(
            single=f"{stem}{tag}.safetensors",
            index=f"{stem}.safetensors.index{tag}.json",
            indexed=f"{stem}-?????-of-?????{tag}.safetensors",
        )
    yield WeightPatterns(single=f"{MSGPACK[part]}.msgpack")


def has_weights(folder: Path, part: str, variant: str | None = None) -> bool:
    """Whether a part's folder holds weights that `weight_files` finds."""
    try:
        return bool(weight_files(folder, part, variant))
    except ModelError:
        return False


def weight_files(folder: Path, part: str, variant: str | None = None) -> list[Path]:
    """The files that hold the weights of a part: those of the variant, else the plain ones, else Flax's msgpack.

    Raises ModelError where there are none, or only pickles.
    """
    for patterns in file_patterns(part, variant):
        if (folder / patterns.single).is_file():
            return [folder / patterns.single]
        if patterns.index is not None and (folder / patterns.index).is_file():
            return _indexed_files(folder, part, patterns.index)
    if variants := sorted(folder.glob(f"{STEMS[part]}.*.safetensors")):
        raise ModelError(f"{part}: {folder} holds only the variant {variants[0].name}; ask for that variant")
    pickled = any(folder.glob("*.bin")) or any(folder.glob("*.ckpt"))
    found = "only pickled weights" if pickled else f"no {STEMS[part]}.safetensors"
    raise ModelError(
        f"{part}: {folder} holds {found}; pickled weights could run code and are not read: convert them once where "
        'torch is installed, StableDiffusionPipeline.from_pretrained("MODEL").save_pretrained("FOLDER")'
    )


def _indexed_files(folder: Path, part: str, index: str) -> list[Path]:
    """The files that an index names. Raises ModelError when one is missing."""
    try:
        names = sorted(set(json.loads((folder / index).read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"{part}: {folder / index} is not an index of weights") from error
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise ModelError(f"{part}: {index} names {name}, which is not in {folder}")
    return [folder / name for name in names]


def read_tensors(files: Sequence[Path], part: str) -> dict[str, np.ndarray]:
    """The tensors in files that `weight_files` found, {name: numpy array}, as they are stored. Raises ModelError."""
    if files[0].suffix == ".msgpack":
        return read_msgpack(files[0], part)
    return read_safetensors(files, part)


def read_safetensors(files: Sequence[Path], part: str) -> dict[str, np.ndarray]:
    """The tensors of safetensors files, {name: numpy array}, with the type in the file. Raises ModelError."""
    from safetensors import SafetensorError, safe_open

    tensors = {}
    for path in files:
        try:
            with safe_open(path, framework="np") as file:
                # It is not a dict: it cannot be iterated over.
                for name in file.keys():  # noqa: SIM118
                    tensors[name] = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{part}: {path} cannot be read: {error}") from error
    return tensors


def read_msgpack(path: Path, part: str) -> dict[str, np.ndarray]:
    """The tensors of an old Flax file under today's names and in torch's layout. Raises ModelError."""
    from flax import serialization
    from msgpack.exceptions import UnpackException

    try:
        tree = serialization.msgpack_restore(path.read_bytes())
    except (OSError, ValueError, TypeError, UnpackException) as error:
        # Flax decodes arrays with numpy, which raises ValueError or TypeError for bytes that are no array.
        raise ModelError(f"{part}: {path} cannot be read: {str(error) or type(error).__name__}") from error
    if not isinstance(tree, dict):
        raise ModelError(f"{part}: {path} cannot be read: it holds no tree of parameters")
    return from_old_flax(tree)
