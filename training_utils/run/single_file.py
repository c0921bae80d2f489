"""A base model in one .safetensors file, as WebUI and ComfyUI keep it, made into the folder that the scripts read."""

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from training_utils.base.console import say
from training_utils.base.errors import UserError, reason_of
from training_utils.cli import folders

FORMAT = 1  # part of a folder's name; raise it when the conversion changes


def converted_folder(
    path: str | Path, pipeline_class: type, config: str | Path | None = None, cache_dir: str | Path | None = None
) -> Path:
    """The folder, in diffusers' layout, of a model in one file. Converted once and kept beside the downloads, under a
    name that comes from the file's content; complete or not at all.

    `config` is a folder in that layout whose settings are those of the model; without it diffusers fetches the
    settings of the model's kind from the hub, or finds them among the downloads. Raises UserError.
    """
    from filelock import FileLock

    if Path(path).suffix != ".safetensors":
        raise UserError(
            f"base model {path} is a file, but no .safetensors; others are pickles, which could run code: where you "
            "trust it, load it with diffusers' from_single_file and save it as a folder"
        )
    root = Path(folders.downloads(cache_dir)) / "text-to-image-models"
    folder = root / f"{pipeline_class.__name__}-{_digest(path, config)}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        # One of several processes converts, and the others find the folder.
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                # What a killed conversion has left.
                for unfinished in root.glob(f"unfinished-{folder.name}-*"):
                    shutil.rmtree(unfinished, ignore_errors=True)
                say(f"converting {path}, once, into {folder}")
                _convert(path, pipeline_class, config, cache_dir, folder)
    except OSError as error:
        raise UserError(
            f"base model {path} cannot be kept as {folder} ({reason_of(error)}); --cache_dir names another place"
        ) from error
    return folder


def _digest(path: str | Path, config: str | Path | None) -> str:
    """What tells one conversion from another: the file's content and the settings'."""
    try:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256")
    except OSError as error:
        raise UserError(f"base model {path} cannot be read: {error.strerror}") from error
    digest.update(str(FORMAT).encode())
    for setting in _setting_files(config) if config else []:
        digest.update(str(setting.relative_to(config)).encode() + b"\0" + setting.read_bytes())
    return digest.hexdigest()[:32]


def _setting_files(config: str | Path) -> list[Path]:
    """The files of a model's folder that hold no weights."""
    return sorted(file for ending in ("json", "txt") for file in Path(config).rglob(f"*.{ending}"))


def _convert(
    path: str | Path, pipeline_class: type, config: str | Path | None, cache_dir: str | Path | None, folder: Path
) -> None:
    """Convert a model in one file into `folder`. Raises UserError where the file is no model of this pipeline."""
    from safetensors import SafetensorError, safe_open

    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"unfinished-{folder.name}-") as place:
        copy = None
        if config:
            # A copy without weights: where a part is missing in the file, diffusers would take it from there.
            copy = os.path.join(place, "settings")
            for file in _setting_files(config):
                target = Path(copy) / file.relative_to(config)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)
        try:
            with safe_open(path, framework="pt") as file:
                types = {file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118 (safe_open is no dict)
            widest = max((kind for kind in types if kind.is_floating_point), key=lambda kind: kind.itemsize)
            pipeline = pipeline_class.from_single_file(path, config=copy, cache_dir=cache_dir, dtype=widest)
        except SafetensorError as error:
            raise UserError(f"base model {path} cannot be read: {reason_of(error)}") from error
        except Exception as error:
            # Diffusers' own kinds, the hub client's, torch's for shapes that do not fit.
            advice = f"its parts do not fit the settings in {config}"
            if not config:
                advice = "--single_file_config can name a folder of such a model, to take its settings from"
            raise UserError(f"base model {path} cannot be converted ({reason_of(error)}); {advice}") from error
        for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
            part = getattr(pipeline, name, None)
            if not hasattr(pipeline, name):
                continue
            if part is None or any(parameter.is_meta for parameter in part.parameters()):
                raise UserError(f"base model {path} has no {name}")
        converted = os.path.join(place, "model")
        pipeline.save_pretrained(converted)
        os.replace(converted, folder)
