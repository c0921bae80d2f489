"""A base model in one .safetensors file, as WebUI and ComfyUI keep it, made into the folder that the scripts read."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from training_utils.base import files
from training_utils.base.console import say
from training_utils.base.errors import UserError, reason_of
from training_utils.cli import folders

FORMAT = 1  # part of a folder's name; raise it when the conversion changes
INDEX = "model_index.json"
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
# Keys without weights, by which WebUI and ComfyUI know what a model predicts and that its schedule ends in pure noise.
V_PREDICTION, ZERO_SNR = "v_pred", "ztsnr"
# Keys of models in another formulation (Karras et al. 2022, arXiv 2206.00364), which no script here trains.
EDM = ("edm_mean", "edm_std", "edm_vpred.sigma_max")
# Samplers of single files that can start from pure noise; another is replaced by DDIM.
START_FROM_PURE_NOISE = ("EulerDiscreteScheduler", "DDIMScheduler", "EulerAncestralDiscreteScheduler")


def convert_single_file(
    path: str, pipeline_class: type[Any], config: str | None = None, cache_dir: str | None = None
) -> Path:
    """The folder, in diffusers' layout, of a model in one file. Converted once and kept beside the downloads, under a
    name that comes from the file's content; complete or not at all.

    `config` is a folder in that layout whose settings are those of the model; without it diffusers fetches the
    settings of the model's kind from the hub, or finds them among the downloads. Raises UserError.
    """
    from filelock import FileLock

    if Path(path).suffix != ".safetensors":
        raise UserError(
            f"base model {path} is a file, but not a .safetensors file; others are pickles, which could run code: "
            "where you trust it, load it with diffusers' from_single_file and save it as a folder"
        )
    root = Path(folders.downloads(cache_dir)) / "text-to-image-models"
    schedule = _schedule_told(path)
    folder = root / f"{pipeline_class.__name__}-{_digest(path, config, schedule)}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        # Of several processes one converts, and the others find what it has made.
        with FileLock(f"{folder}.lock"):
            if not (folder / INDEX).exists():
                for unfinished in root.glob(f"unfinished-{folder.name}-*"):  # what a killed process left
                    shutil.rmtree(unfinished, ignore_errors=True)
                say(f"converting {path}, once, into {folder}")
                _convert(path, pipeline_class, config, cache_dir, folder, schedule)
    except OSError as error:
        raise UserError(
            f"base model {path} cannot be kept as {folder} ({reason_of(error)}); --cache_dir names another place"
        ) from error
    return folder


def _digest(path: str, config: str | None, schedule: dict[str, Any]) -> str:
    """What tells one conversion from another: the file's content and the settings'."""
    try:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256")
    except OSError as error:
        raise UserError(f"base model {path} cannot be read: {error.strerror}") from error
    digest.update(str(FORMAT).encode())
    if schedule:
        digest.update(json.dumps(schedule, sort_keys=True).encode())
    if config:
        for setting in _settings(config):
            digest.update(str(setting.relative_to(config)).encode() + b"\0" + setting.read_bytes())
    return digest.hexdigest()[:32]


def _settings(config: str) -> list[Path]:
    """The files of a model's folder that hold no weights."""
    return sorted(file for ending in ("json", "txt") for file in Path(config).rglob(f"*.{ending}"))


def _convert(
    path: str,
    pipeline_class: type[Any],
    config: str | None,
    cache_dir: str | None,
    folder: Path,
    schedule: dict[str, Any],
) -> None:
    """Write the model in a file as a folder, by way of one beside it. Raises UserError or OSError."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"unfinished-{folder.name}-") as place:
        settings = None
        if config:
            settings = os.path.join(place, "settings")
            _copy_settings(config, settings)
        dtype = _widest_type(path)
        try:
            pipeline = pipeline_class.from_single_file(path, config=settings, cache_dir=cache_dir, dtype=dtype)
        except Exception as error:  # diffusers' own, the hub client's, torch's for shapes that do not fit
            advice = "--single_file_config can name a folder of such a model, to take its settings from"
            if config:
                advice = f"its parts do not fit the settings in {config}"
            raise UserError(f"base model {path} cannot be converted ({reason_of(error)}); {advice}") from error
        _check_parts(path, pipeline)
        complete = Path(place) / "model"
        pipeline.save_pretrained(complete)
        _change_schedule(complete / "scheduler" / "scheduler_config.json", schedule)
        files.follow_umask(complete.rglob("*.safetensors"))
        if folder.exists() or not files.rename_folder(complete, folder):
            _move_files(complete, folder)


def _move_files(source: Path, target: Path) -> None:
    """Move a model's folder file by file, the index last: where that is, all of them are. Raises OSError."""
    paths = [path for path in source.rglob("*") if path.is_file()]
    for path in sorted(paths, key=lambda path: path == source / INDEX):
        moved = target / path.relative_to(source)
        moved.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, moved)


def _copy_settings(config: str, target: str) -> None:
    """Copy a model's folder without its weights: a part that is missing in the file would be taken from there."""
    for file in _settings(config):
        copy = Path(target) / file.relative_to(config)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)


@contextmanager
def _opened(path: str) -> Iterator[Any]:
    """A safetensors file, open. Raises UserError where it cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise UserError(f"base model {path} cannot be read: {reason_of(error)}") from error


def _schedule_told(path: str) -> dict[str, Any]:
    """What a file tells about its noise schedule, as changes to a scheduler's settings: by keys of WebUI and ComfyUI,
    or by the metadata of the ModelSpec standard. Raises UserError for a schedule that no script trains."""
    with _opened(path) as file:
        names = set(file.keys())
        metadata = file.metadata() or {}
    edm = [name for name in EDM if name in names]
    if edm:
        raise UserError(
            f"base model {path} has the key {edm[0]}: its noise is that of EDM, which this script does not train"
        )
    if V_PREDICTION not in names and metadata.get("modelspec.prediction_type") not in ("v", "v_prediction"):
        return {}
    changes: dict[str, Any] = {"prediction_type": "v_prediction"}
    if ZERO_SNR in names:
        # Sampling must begin at the noisy end (Lin et al. 2023, arXiv 2305.08891, section 3.3).
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return changes


def _change_schedule(path: Path, changes: dict[str, Any]) -> None:
    """Change settings in a scheduler_config.json."""
    if not changes:
        return
    config = json.loads(path.read_text()) | changes
    if "rescale_betas_zero_snr" in changes and config["_class_name"] not in START_FROM_PURE_NOISE:
        config = {name: value for name, value in config.items() if name != "skip_prk_steps"}
        # DDIM's default is for pixels: it would cut latents at 1.
        config |= {"_class_name": "DDIMScheduler", "clip_sample": False}
    path.write_text(json.dumps(config, indent=2) + "\n")


def _widest_type(path: str) -> Any:
    """The torch.dtype of the most exact weights in a safetensors file; keys without weights do not count. Raises
    UserError where it cannot be read."""
    with _opened(path) as file:
        names = [name for name in file.keys() if 0 not in file.get_slice(name).get_shape()]  # noqa: SIM118
        types = {file.get_tensor(name).dtype for name in names}
    floating = [dtype for dtype in types if dtype.is_floating_point]
    if not floating:
        raise UserError(f"base model {path} cannot be converted: it holds no weights")
    return max(floating, key=lambda dtype: dtype.itemsize)


def _check_parts(path: str, pipeline: Any) -> None:
    """Raise UserError where a network that the pipeline has is not in the file."""
    for name in PARTS:
        if not hasattr(pipeline, name):
            continue
        part = getattr(pipeline, name)
        if part is None or any(parameter.is_meta for parameter in part.parameters()):
            raise UserError(f"base model {path} has no {name}")
