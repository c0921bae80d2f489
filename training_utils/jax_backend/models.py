"""Base models: finding their folders, loading their parts, saving pipelines."""

import json
import logging
import os
import warnings
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import jax.numpy as jnp

from flax_diffusion import FlaxStableDiffusionPipeline, ModelError, schedulers, weights
from flax_diffusion.model_folder import copy_folder
from flax_diffusion.pipeline import LATENTS, fetch
from training_utils.base import hub_errors, startup
from training_utils.base.console import warn
from training_utils.base.errors import UserError, reason_of
from training_utils.jax_backend.processes import ArrayTree
from training_utils.run import base_model, single_file

TYPES = {"no": jnp.float32, "bf16": jnp.bfloat16, "fp16": jnp.float16}
INDEX = "model_index.json"
Part = TypeVar("Part")


def model_folder(
    name: str,
    revision: str | None = None,
    variant: str | None = None,
    cache_dir: str | None = None,
    config: str | None = None,
) -> Path:
    """The local folder of a base model, fetched from the hub where `name` is an id. Raises UserError.

    A model in one file is converted by diffusers, with torch, as single_file.converted_folder says, which takes
    `config`.
    """
    try:
        if os.path.isfile(name):
            folder = _convert_single_file(name, config, cache_dir)
        else:
            folder = fetch(name, revision, variant, cache_dir)
    except ModelError as error:
        reason = hub_errors.not_found(name, error.__context__ or error)
        raise UserError(f"base model {name} is neither a folder nor found on the hub: {reason}") from error
    if variant is not None and not any(folder.glob(f"*/*.{variant}*")):
        raise UserError(f"base model {name} has no weights of --variant {variant}")
    base_model.check_base_model(name, folder, "StableDiffusionPipeline", variant)
    # A safety checker is copied; from the hub it is not fetched.
    base_model.check_saved_parts(folder, "StableDiffusionPipeline", variant, may_be_absent=True)
    return folder


def _convert_single_file(path: str, config: str | None, cache_dir: str | None) -> Path:
    if any(find_spec(name) is None for name in ("torch", "diffusers")):
        raise UserError(
            f"base model {path} is one file, which is converted by torch and diffusers: pip install -r "
            "requirements.txt, or name a folder in diffusers' layout"
        )

    startup.prepare()
    from diffusers import StableDiffusionPipeline

    return single_file.convert_single_file(path, StableDiffusionPipeline, config, cache_dir)


def load_part(
    folder: str | Path, part: str, dtype: Any = jnp.float32, variant: str | None = None
) -> tuple[Any, ArrayTree]:
    """(module, parameters) of one part of a base model. Raises UserError that names the part when it cannot.

    A part that is not stored in this variant (`non_ema` exists for UNets alone) is read without it.
    """
    return _load(folder, part, lambda: weights.load_part(folder, part, dtype, variant))


def load_tokenizer(folder: str | Path) -> Any:
    """The tokenizer of a base model. Raises UserError."""
    logging.getLogger("transformers").addFilter(lambda record: "PyTorch was not found" not in record.getMessage())
    from transformers import CLIPTokenizer

    tokenizer = _load(folder, "tokenizer", lambda: CLIPTokenizer.from_pretrained(Path(folder) / "tokenizer"))
    base_model.check_tokenizer(tokenizer, folder)
    return tokenizer


def load_scheduler_config(folder: str | Path) -> dict[str, Any]:
    """The configuration of a base model's sampler; its `_class_name` is without Flax. Raises UserError."""
    config = _load(folder, "scheduler", lambda: schedulers.read_config(folder))
    return config | {"_class_name": config.get("_class_name", "DDPMScheduler").removeprefix("Flax")}


def _load(folder: str | Path, part: str, load: Callable[[], Part]) -> Part:
    """What `load()` returns. A part that is missing or damaged becomes a UserError."""
    if not (Path(folder) / part).is_dir():
        raise UserError(f"base model {folder} has no part '{part}'; there must be a folder of that name")
    try:
        return load()
    except (OSError, ValueError, KeyError, TypeError) as error:
        # Transformers raises any of these for files of a tokenizer that are not what they should be.
        raise UserError(f"part '{part}' of base model {folder} cannot be loaded: {reason_of(error)}") from error


# Of diffusers' samplers these can start from pure noise, where the signal-to-noise ratio is 0.
START_FROM_PURE_NOISE = {
    *("DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"),
    *("DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "LCMScheduler", "TCDScheduler"),
}


def sampling_scheduler(config: dict[str, Any], changes: Mapping[str, Any], steps: int | None = None) -> Any:
    """The base model's own sampler with `changes` to its configuration, so that it samples what was trained.

    A sampler that cannot start from pure noise (zero terminal SNR) is replaced by DDIM. Raises UserError where it
    cannot draw images in `steps` steps, which are None where no images are drawn.
    """
    changes = dict(changes)
    if changes.get("rescale_betas_zero_snr"):
        if config["_class_name"] not in START_FROM_PURE_NOISE:
            config = {key: value for key, value in config.items() if key != "skip_prk_steps"}
            changes["_class_name"] = "DDIMScheduler"
            changes["clip_sample"] = False  # its default is for pixels: it would cut latents at 1
        changes["timestep_spacing"] = "trailing"  # sampling must start at the noisy end (arXiv 2305.08891, 3.3)
    try:
        with warnings.catch_warnings(record=True) as notices:
            warnings.simplefilter("always")
            sampler = schedulers.for_sampling(config | changes)
            if steps is not None:
                sampler.changed(**LATENTS).plan(steps)
    except ModelError as error:
        raise UserError(str(error)) from error
    if steps is not None:
        for notice in notices:
            warn(str(notice.message))
    return sampler


def make_pipeline(base: str | Path, variant: str | None, parts: Mapping[str, Any]) -> FlaxStableDiffusionPipeline:
    """The pipeline of a base model's parts, a dict. Raises UserError where they do not fit together."""
    try:
        return FlaxStableDiffusionPipeline(**parts, source=base, variant=variant)
    except ModelError as error:
        raise UserError(f"base model {base} cannot be trained: {error}") from error


def save_pipeline(folder: str | Path, pipeline: FlaxStableDiffusionPipeline, params: Mapping[str, ArrayTree]) -> None:
    """Write a complete pipeline: frozen parts byte for byte as in the base model, and what was trained.

    What the pipeline does not run, a safety checker and its image processor, is copied too where the base has it.
    """
    folder = Path(folder)
    base = pipeline.source
    assert base is not None
    pipeline.save_pretrained(folder, params)
    index = json.loads((folder / INDEX).read_text())
    for name, entry in json.loads((base / INDEX).read_text()).items():
        not_run = index.get(name) == [None, None] and (base / name).is_dir()
        if not_run and not any((base / name).glob("*.msgpack")):
            copy_folder(base / name, folder / name)
            index[name] = entry
    index["requires_safety_checker"] = index["safety_checker"] != [None, None]
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
