"""The files of one part of a base model: its settings and the headers of its weights. No weight is read."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from training_utils.base.errors import UserError, reason_of

LFS_POINTER = b"version https://git-lfs.github.com/spec/"


@dataclass(frozen=True)
class PartClass:
    """What a part of some class may be stored as.

    `weights` is how the files of its weights begin, None for a part without any; `classes` are the classes, as
    config.json or model_index.json name them, that it can be loaded from, and `model_types` transformers' word for
    them.
    """

    weights: str | None
    classes: tuple[str, ...]
    model_types: tuple[str, ...] = ()


DIFFUSERS = "diffusion_pytorch_model"
TRANSFORMERS = "model"
TEXT = ("CLIPTextModel", "CLIPTextModelWithProjection", "CLIPModel")
VISION = ("CLIPVisionModelWithProjection", "CLIPVisionModel", "CLIPModel")
# Classes of files that transformers reads a CLIPTokenizer from.
TOKENIZERS = ("CLIPTokenizer", "PreTrainedTokenizer", "TokenizersBackend")
CLASSES = {
    "UNet2DConditionModel": PartClass(DIFFUSERS, ("UNet2DConditionModel",)),
    "AutoencoderKL": PartClass(DIFFUSERS, ("AutoencoderKL",)),
    "VQModel": PartClass(DIFFUSERS, ("VQModel",)),
    "PriorTransformer": PartClass(DIFFUSERS, ("PriorTransformer",)),
    "CLIPTextModel": PartClass(TRANSFORMERS, TEXT, ("clip_text_model", "clip")),
    "CLIPTextModelWithProjection": PartClass(TRANSFORMERS, TEXT, ("clip_text_model", "clip")),
    "CLIPVisionModelWithProjection": PartClass(TRANSFORMERS, VISION, ("clip_vision_model", "clip")),
    "CLIPTokenizer": PartClass(None, TOKENIZERS),
}


def plain_class(name: str) -> str:
    """The name of a class without what tells apart its implementations: Flax's, the fast tokenizers'."""
    return name.removeprefix("Flax").removesuffix("Fast")


def check_part(folder: Path, title: str, class_name: str, variant: str | None) -> None:
    """Raise UserError unless a part's folder holds what the class named needs, complete as far as headers tell.

    `title` names the part in the sentence. Classes that are not in CLASSES are not looked into.
    """
    wanted = CLASSES.get(class_name)
    if wanted is None:
        return
    if class_name == "CLIPTokenizer":
        _check_tokenizer_files(folder, title)
        return
    if wanted.weights is not None:
        check_weights(folder, title, wanted.weights, variant)
    config = read_json(folder / "config.json")
    stored = stored_class(config)
    types = wanted.model_types
    right_class = stored is None or stored in wanted.classes
    if not right_class or (types and config.get("model_type", types[0]) not in types):
        raise UserError(f"{title} is a {stored or config['model_type']}; this script needs a {class_name} there")


def stored_class(config: Mapping[str, Any]) -> str | None:
    """The class that a part's settings name, without Flax's prefix; None where they name none."""
    architectures = config.get("architectures") or [None]
    name = config.get("_class_name") or architectures[0]
    return plain_class(name) if isinstance(name, str) else None


def check_weights(folder: Path, title: str, stem: str, variant: str | None) -> None:
    """Raise UserError unless a folder holds a network: config.json, and safetensors whose headers fit their sizes.

    Flax's msgpack is left to its reader.
    """
    if any(folder.glob("*.msgpack")) and not any(folder.glob("*.safetensors")):
        return
    files = weight_files(folder, title, stem, variant)
    if not (folder / "config.json").is_file():
        raise UserError(f"{title} has no settings, config.json; {_needed(folder)}")
    for path in files:
        damage = damage_of(path)
        if damage is not None:
            raise UserError(f"{title} cannot be loaded: {damage}")


def weight_files(folder: Path, title: str, stem: str, variant: str | None) -> list[Path]:
    """The files that hold a network's weights: those of the variant where the folder has it, else the plain ones.

    `stem` is how their names begin. Raises UserError, in a sentence that begins with `title`, where some are missing,
    where others are there, or where they are pickles only.
    """
    for tag in (f".{variant}", "") if variant else ("",):
        single = folder / f"{stem}{tag}.safetensors"
        if single.is_file():
            return [single]
        index = folder / f"{stem}.safetensors.index{tag}.json"
        if index.is_file():
            return _indexed_files(index, title)
    raise UserError(_why_no_weights(folder, title, stem))


def _indexed_files(index: Path, title: str) -> list[Path]:
    """The files that an index names. Raises UserError where one is not there."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise UserError(f"{title} cannot be loaded: {index} lists no files of weights")
    files = [index.parent / name for name in sorted(set(names.values()))]
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise UserError(
            f"{title} is missing {', '.join(missing)}, which its {index.name} lists: the download is incomplete"
        )
    return files


def _why_no_weights(folder: Path, title: str, stem: str) -> str:
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    variants = sorted({name.split(".")[1] for name in found if name.startswith(f"{stem}.") and name.count(".") == 2})
    if variants:
        flag = " or ".join(f"--variant {name}" for name in variants)
        return f"{title} has weights of a variant only; add {flag}"
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    if found:
        return f"{title} has no {stem}.safetensors, only {', '.join(found[:3])}"
    if pickles:
        return (
            f"{title} has its weights as a pickle only ({pickles[0]}), which could run code; where you trust it, "
            "load the model with diffusers and save it again, as safetensors"
        )
    return f"{title} has no weights; {_needed(folder)}"


def _needed(folder: Path) -> str:
    return f"{folder} must hold config.json and .safetensors files"


def damage_of(path: Path) -> str | None:
    """What is wrong with a .safetensors file as far as its header tells, as a clause, or None."""
    try:
        with safe_open(path, framework="np"):
            return None
    except (SafetensorError, OSError) as error:
        if is_lfs_pointer(path):
            return f"{path.name} is a pointer of git-lfs, not the file; `git lfs pull` fetches it"
        return f"{path.name} is damaged or cut off at {path.stat().st_size:,} bytes ({reason_of(error)})"


def is_lfs_pointer(path: Path) -> bool:
    """Whether git has left a few lines in place of a large file."""
    with open(path, "rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError."""
    try:
        if is_lfs_pointer(path):
            raise UserError(f"{path} is a pointer of git-lfs, not the file; `git lfs pull` fetches it")
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} cannot be read: {reason_of(error)}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} cannot be read: it holds no JSON object")
    return value


def _check_tokenizer_files(folder: Path, title: str) -> None:
    """Raise UserError unless a folder holds a CLIP tokenizer: its kind, its vocabulary and its merges."""
    config_path = folder / "tokenizer_config.json"
    config = read_json(config_path) if config_path.is_file() else {}
    stored = plain_class(str(config.get("tokenizer_class") or "CLIPTokenizer"))
    if stored not in TOKENIZERS:
        raise UserError(f"{title} is a {stored}; this script needs a CLIPTokenizer there")
    fast, vocabulary, merges = (folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt"))
    if fast.is_file():
        model = read_json(fast).get("model")
        if not isinstance(model, dict) or not model.get("vocab"):
            raise UserError(f"{title} has no vocabulary: {fast} holds none")
        return
    missing = [path.name for path in (vocabulary, merges) if not path.is_file()]
    if missing:
        raise UserError(
            f"{title} is missing {' and '.join(missing)}: {folder} must hold tokenizer.json, or both of them"
        )
    if is_lfs_pointer(merges):
        raise UserError(f"{merges} is a pointer of git-lfs, not the file; `git lfs pull` fetches it")
    if not read_json(vocabulary):
        raise UserError(f"{title} has no vocabulary: {vocabulary} is empty")
    if not any(line.strip() and not line.startswith("#version") for line in merges.read_text("utf-8").splitlines()):
        raise UserError(f"{title} is incomplete: {merges} is empty")
