"""Base models: finding their folders, loading their parts, saving pipelines."""

import json
import logging
import os
import shutil
import warnings
from importlib.util import find_spec
from pathlib import Path

import jax.numpy as jnp

from flax_diffusion import FlaxStableDiffusionPipeline, ModelError, schedulers, weights
from flax_diffusion.pipeline import LATENTS, fetch
from training_utils.base import hub_errors, startup
from training_utils.base.console import warn
from training_utils.base.errors import UserError, reason_of
from training_utils.jax_backend import state
from training_utils.run import base_model, single_file

TYPES = {"no": jnp.float32, "bf16": jnp.bfloat16, "fp16": jnp.float16}

INDEX, state.STATE = "model_index.json", "optimizer.safetensors"


def model_folder(name, revision=None, variant=None, cache_dir=None, config=None):
    """The local folder of a base model, fetched from the hub where `name` is an id. Raises UserError.

    A model in one file is converted by diffusers, with torch, as single_file.converted_folder says, which takes
    `config`.
    """
    try:
        folder = (
            _converted(name, config, cache_dir) if os.path.isfile(name) else fetch(name, revision, variant, cache_dir)
        )
    except ModelError as error:
        reason = hub_errors.not_found(name, error.__context__)
        raise UserError(f"base model {name} is neither a folder nor found on the hub: {reason}") from None
    base_model.refuse_another_family(name, folder, "StableDiffusionPipeline")
    if variant is not None and not any(folder.glob(f"*/*.{variant}*")):
        raise UserError(f"base model {name} has no weights of --variant {variant}")
    return folder


def _converted(path, config, cache_dir):
    lacking = [name for name in ("torch", "diffusers") if find_spec(name) is None]
    if lacking:
        raise UserError(
            f"base model {path} is one file, which is converted by torch and diffusers: pip install -r "
            "requirements.txt, or name a folder in diffusers' layout"
        )

    startup.prepare()
    from diffusers import StableDiffusionPipeline

    return single_file.convert_single_file(path, StableDiffusionPipeline, config, cache_dir)


def load_part(folder, part, dtype=jnp.float32, variant=None):
    """(module, parameters) of one part of a base model. Raises UserError that names the part when it cannot.

    A part that is not stored in this variant (`non_ema` exists for UNets alone) is read without it.
    """
    return _loaded(folder, part, lambda: weights.load_part(folder, part, dtype, variant))


def load_tokenizer(folder):
    """The tokenizer of a base model. Raises UserError."""
    logging.getLogger("transformers").addFilter(lambda record: "PyTorch was not found" not in record.getMessage())
    from transformers import CLIPTokenizer

    return _loaded(folder, "tokenizer", lambda: CLIPTokenizer.from_pretrained(Path(folder) / "tokenizer"))


def load_scheduler_config(folder):
    """The configuration of a base model's sampler, a dict; its `_class_name` is without Flax. Raises UserError."""
    config = _loaded(folder, "scheduler", lambda: schedulers.read_config(folder))
    return config | {"_class_name": config.get("_class_name", "DDPMScheduler").removeprefix("Flax")}


def _loaded(folder, part, load):
    if not (Path(folder) / part).is_dir():
        raise UserError(f"base model {folder} has no part '{part}'; there must be a folder of that name")
    try:
        return load()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"part '{part}' of base model {folder} cannot be loaded: {reason_of(error)}") from None


# Of diffusers' samplers these can begin at pure noise, where the signal-to-noise ratio is 0.
PURE_NOISE = {
    *("DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"),
    *("DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "LCMScheduler", "TCDScheduler"),
}


def sampling_scheduler(config, changes, steps=None):
    """The base model's own sampler with `changes` to its configuration, so that it samples what was trained.

    A sampler that cannot begin at pure noise (zero terminal SNR) is replaced by DDIM. Raises UserError where it cannot
    draw images in `steps` steps.
    """
    if changes.get("rescale_betas_zero_snr"):
        if config["_class_name"] not in PURE_NOISE:
            config = {key: value for key, value in config.items() if key != "skip_prk_steps"}
            # DDIM's default is for pixels: it would cut latents at 1
            changes = changes | {"_class_name": "DDIMScheduler", "clip_sample": False}
        changes = changes | {"timestep_spacing": "trailing"}  # sampling must begin at the noisy end (2305.08891, 3.3)
    try:
        with warnings.catch_warnings(record=True) as notices:
            warnings.simplefilter("always")
            sampler = schedulers.for_sampling(config | changes)
            if steps is not None:
                sampler.changed(**LATENTS).plan(steps)
    except ModelError as error:
        raise UserError(str(error)) from None
    for notice in notices if steps is not None else []:
        warn(str(notice.message))
    return sampler


def make_pipeline(base, variant, parts):
    """The pipeline of a base model's parts, a dict. Raises UserError where they do not fit together."""
    try:
        return FlaxStableDiffusionPipeline(**parts, source=base, variant=variant)
    except ModelError as error:
        raise UserError(f"base model {base} cannot be trained: {error}") from None


def save_pipeline(folder, pipeline, params):
    """Write a whole pipeline: frozen parts byte for byte as in the base model, what was trained anew.

    What the pipeline does not run, a safety checker and its image processor, is copied too where the base has it.
    """
    pipeline.save_pretrained(folder, params)
    index, base = json.loads((Path(folder) / INDEX).read_text()), pipeline.source
    for name, entry in json.loads((base / INDEX).read_text()).items():
        if index.get(name) == [None, None] and (base / name).is_dir() and not any((base / name).glob("*.msgpack")):
            shutil.copytree(base / name, Path(folder) / name, dirs_exist_ok=True)
            index[name] = entry
    index["requires_safety_checker"] = index["safety_checker"] != [None, None]
    (Path(folder) / INDEX).write_text(json.dumps(index, indent=2) + "\n")
