"""Base models: finding their folders, loading their parts, saving pipelines."""

import inspect
import json
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
import torch.utils.checkpoint
import transformers
from diffusers import AutoencoderKL, DiffusionPipeline, SchedulerMixin
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from training_utils.base import hub_errors
from training_utils.base.console import warn
from training_utils.base.errors import UserError, reason_of
from training_utils.run import base_model, model_files, single_file


def model_folder(
    name: str,
    pipeline_class: type[DiffusionPipeline],
    revision: str | None = None,
    variant: str | None = None,
    cache_dir: str | None = None,
    left_out: Iterable[str] = (),
    trained: bool = True,
    saved: bool = False,
    other_vae: str | None = None,
    config: str | None = None,
) -> Path:
    """The local folder of a base model, fetched from the hub where `name` is an id, with all that is needed of it.
    Raises UserError, also for one that this script cannot train, or cannot save where it is `saved` as a whole.

    A model in one file is converted, as convert_single_file says, which takes `config`. Parts `left_out` are
    not fetched; of a model that is not `trained`, `variant` is read where there is one. Its own VAE is not needed
    where there is an `other_vae`.
    """
    if os.path.isdir(name):
        folder = Path(name)
    elif os.path.isfile(name):
        folder = single_file.convert_single_file(name, pipeline_class, config, cache_dir)
    else:
        options = {"revision": revision, "variant": variant, "cache_dir": cache_dir, **dict.fromkeys(left_out)}
        try:
            folder = Path(pipeline_class.download(name, **options))
        except Exception as error:
            # The hub client raises a dozen kinds, its transport more.
            if variant is not None and "`variant=" in str(error):
                raise UserError(f"base model {name} has no weights of --variant {variant}") from error
            reason = hub_errors.not_found(name, error)
            raise UserError(f"base model {name} is neither a folder nor found on the hub: {reason}") from error
    if trained and variant is not None and not any(folder.glob(f"*/*.{variant}*")):
        raise UserError(f"base model {name} has no weights of --variant {variant}")
    pipeline = pipeline_class.__name__
    not_needed = [*left_out, "vae"] if other_vae is not None else left_out
    base_model.check_base_model(name, folder, pipeline, variant, not_needed)
    if saved:
        known = _known_classes(base_model.read_index(folder))
        base_model.check_saved_parts(folder, pipeline, variant, readable=known)
    return folder


def _known_classes(index: dict[str, Any]) -> dict[str, bool]:
    """Of each part that a model's index names, whether the installed libraries have its class."""
    known = {}
    for part, entry in index.items():
        if part.startswith("_") or not isinstance(entry, list) or None in entry:
            continue
        library, name = entry
        module = getattr(diffusers.pipelines, library, None) or {"diffusers": diffusers}.get(library, transformers)
        # An old name, which diffusers reads as the new one.
        names = (name, name.replace("FeatureExtractor", "ImageProcessor"))
        known[part] = any(hasattr(module, candidate) for candidate in names)
    return known


def load_part(
    part_class: type[Any], folder: str | Path, subfolder: str = "", variant: str | None = None, **options: Any
) -> Any:
    """Load one part of a base model by `part_class.from_pretrained`. Raises UserError, which names the part.

    A part that is not stored in this variant (`non_ema` exists for UNets alone) is read without it, as pipelines do.
    """
    part = Path(folder) / subfolder
    if not part.is_dir():
        raise UserError(f"base model {folder} has no part '{subfolder}'; there must be a folder of that name")
    title = f"part '{subfolder}' of base model {folder}" if subfolder else f"model {folder}"
    model_files.check_part(part, title, part_class.__name__, variant)
    if variant is not None and any(part.glob(f"*.{variant}*")):
        options["variant"] = variant
    is_network = issubclass(part_class, torch.nn.Module)
    try:
        with _without_reports():
            loaded = part_class.from_pretrained(
                folder, subfolder=subfolder, **options, **({"output_loading_info": True} if is_network else {})
            )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"{title} cannot be loaded: {reason_of(error)}") from error
    if is_network:
        network, info = loaded
        _check_complete(title, network, info)
        return network
    if issubclass(part_class, CLIPTokenizer):
        base_model.check_tokenizer(loaded, folder, subfolder)
    return loaded


@contextmanager
def _without_reports() -> Iterator[None]:
    """Within this context the libraries do not list the weights that they miss: `_check_complete` speaks of them."""
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _check_complete(title: str, network: torch.nn.Module, info: dict[str, Any]) -> None:
    """Raise UserError where weights of a network are not stored, by the `info` that its library gives on loading."""
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    missing += sorted(name for name, weight in network.named_parameters() if weight.is_meta and name not in missing)
    if not missing and not unexpected:
        return
    if not missing and isinstance(network, transformers.PreTrainedModel):
        # Such as layers that its settings leave out on purpose, or the image encoder of a complete CLIP.
        warn(f"{title} has no place for weights of its file, which are left out: {_some(unexpected)}")
        return
    if not missing:
        raise UserError(
            f"{title} has no place for weights of its file, so its config.json is another's: {_some(unexpected)}"
        )
    reason = f"{title} is missing weights: {_some(missing)}"
    if any("lora" in name or ".base_layer." in name for name in unexpected):
        raise UserError(f"{reason}; it was saved with a LoRA loaded in it: unload or fuse that, and save it again")
    if unexpected and all(name.startswith("module.") for name in unexpected):
        raise UserError(
            f"{reason}; they are stored with `module.` before their names, as DistributedDataParallel does"
        )
    if unexpected:
        reason += f"; instead its file holds {_some(unexpected)}"
    raise UserError(f"{reason}; it must hold every weight of the network")


def _some(names: list[str]) -> str:
    """The name of a weight, or how many there are and the name of the first."""
    return names[0] if len(names) == 1 else f"{len(names)}, such as {names[0]}"


def load_replacement(
    part_class: type[Any],
    name: str,
    base: Path,
    subfolder: str,
    cache_dir: str | None = None,
    dtype: torch.dtype | None = None,
) -> torch.nn.Module:
    """A network in place of a part of a base model. Raises UserError.

    `name` is the network's folder or hub id, that of a complete model with such a part, or a .safetensors file, which
    is read with the settings of the base model's. `dtype` None means that of its weights.
    """
    if os.path.isfile(name):
        options = {"config": str(base), "subfolder": subfolder, "local_files_only": True}
        try:
            with safe_open(name, framework="pt") as file:
                stored = file.get_tensor(next(iter(file.keys()))).dtype
            network = part_class.from_single_file(name, dtype=dtype or stored, **options)
        except Exception as error:
            # No .safetensors, or weights of something else, for which diffusers has kinds of its own.
            raise UserError(f"{name} cannot be loaded as a '{subfolder}': {reason_of(error)}") from error
        _check_complete(f"model {name}", network, {"missing_keys": (), "unexpected_keys": ()})
        return network
    folder = other_model_folder(name, cache_dir)
    is_complete_model = (folder / subfolder).is_dir() and not (folder / "config.json").is_file()
    inner = subfolder if is_complete_model else ""
    return load_part(part_class, folder, inner, dtype=dtype or stored_dtype(folder / inner))


def load_sdxl_vae(
    base: Path, variant: str | None, half: torch.dtype, other: str | None = None, cache_dir: str | None = None
) -> torch.nn.Module:
    """SDXL's VAE in float32, since its activations overflow in half precision; the `other` one, which
    `load_replacement` finds, in the torch.dtype `half`, unless its configuration says the same of it."""
    name = "SDXL's own VAE" if other is None else f"the VAE {other}"
    if other is not None:
        vae = load_replacement(AutoencoderKL, other, base, "vae", cache_dir, half)
        if half == torch.float32 or not vae.config.force_upcast:
            return vae
    if half != torch.float32:
        warn(
            f"{name} overflows in half precision and runs in float32; --pretrained_vae_model_name_or_path "
            "madebyollin/sdxl-vae-fp16-fix gives one that does not, and is faster"
        )
    if other is not None:
        return load_replacement(AutoencoderKL, other, base, "vae", cache_dir, torch.float32)
    return load_part(AutoencoderKL, base, "vae", variant, dtype=torch.float32)


@cache
def other_model_folder(name: str, cache_dir: str | None = None) -> Path:
    """The local folder of a model that is no part of a pipeline, fetched from the hub where `name` is an id; the same
    one for a run, whatever is uploaded there meanwhile."""
    if os.path.isdir(name):
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, cache_dir=cache_dir, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:
        # The hub client raises a dozen kinds, its transport more.
        reason = hub_errors.not_found(name, error)
        raise UserError(f"model {name} is neither a folder nor found on the hub: {reason}") from error


def stored_dtype(folder: str | Path, variant: str | None = None) -> torch.dtype:
    """The torch.dtype of the weights in a model folder; float32 where they are not safetensors.

    Of several stored copies it is the one that is read: `variant` where the folder has it, else the plain one, whose
    file names hold one dot.
    """
    files = sorted(Path(folder).glob("*.safetensors"))
    chosen = []
    if variant is not None:
        chosen = [path for path in files if f".{variant}" in path.name]
    if not chosen:
        chosen = [path for path in files if path.name.count(".") == 1]
    for path in chosen:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (safe_open is not a dict)
                dtype = file.get_tensor(name).dtype
                if dtype.is_floating_point:
                    return dtype
    return torch.float32


def stored_dtypes(folder: str | Path, variant: str | None = None) -> dict[str, torch.dtype]:
    """The torch.dtype of each part of a model folder, {part: dtype}, as pipelines take it."""
    parts = [path for path in Path(folder).iterdir() if path.is_dir() and not path.name.startswith(".")]
    return {part.name: stored_dtype(part, variant) for part in parts} | {"default": torch.float32}


def sampling_scheduler(folder: Path, changes: dict[str, Any]) -> SchedulerMixin:
    """The base model's own sampler with `changes` to its configuration, so that it samples what was trained.

    A sampler that cannot end in pure noise (zero terminal SNR) is replaced by DDIM. Raises UserError where the
    folder has none.
    """
    try:
        config = dict(diffusers.DDPMScheduler.load_config(folder, subfolder="scheduler"))
    except OSError as error:
        raise UserError(f"part 'scheduler' of base model {folder} cannot be loaded: {reason_of(error)}") from error
    name = config.get("_class_name", "DDPMScheduler")
    scheduler_class = getattr(diffusers, name, None)
    if scheduler_class is None:
        raise UserError(f"part 'scheduler' of base model {folder} is a {name}, which this diffusers does not have")
    # diffusers has a stand-in for a class whose packages are missing, which names all that it needs.
    missing = [package for package in getattr(scheduler_class, "_backends", ()) if find_spec(package) is None]
    if missing:
        packages = " ".join(missing)
        raise UserError(f"part 'scheduler' of base model {folder} is a {name}, which needs: pip install {packages}")
    settings = inspect.signature(scheduler_class.__init__).parameters
    if name != "UnCLIPScheduler" and "beta_schedule" not in settings:
        raise UserError(
            f"part 'scheduler' of base model {folder} is a {name}, which has no schedule of betas: the model is of a "
            "kind that this script does not train"
        )
    if changes.get("rescale_betas_zero_snr"):
        if "rescale_betas_zero_snr" not in settings:
            scheduler_class = diffusers.DDIMScheduler
            # DDIM's default is for pixels: it would cut latents at 1.
            changes = changes | {"clip_sample": False}
        # Sampling must begin at the noisy end (Lin et al. 2023, arXiv 2305.08891, section 3.3).
        changes = changes | {"timestep_spacing": "trailing"}
    return scheduler_class.from_config(config, **changes)


def save_pipeline(pipeline: DiffusionPipeline, folder: str | Path) -> None:
    """Write a pipeline as a folder that older libraries read too, without the paths of this machine.

    transformers 5 writes a tokenizer as tokenizer.json alone, a text encoder that it has built itself without the
    level text_model, and, without torchvision, CLIPImageProcessorPil for CLIPImageProcessor; earlier releases read
    none of that.
    """
    folder = Path(folder)
    pipeline.save_pretrained(folder)
    for name, part in pipeline.components.items():
        if name.startswith("tokenizer"):
            # As vocab.json and merges.txt.
            part.backend_tokenizer.model.save(str(folder / name))
    for weights in folder.glob("text_encoder/model.safetensors"):
        with safe_open(weights, framework="pt") as file:
            flat = "final_layer_norm.weight" in file.keys()  # noqa: SIM118 (safe_open is not a dict)
        if flat:
            tensors = {f"text_model.{name}": tensor for name, tensor in load_file(weights).items()}
            save_file(tensors, weights, metadata={"format": "pt"})
    for path in (folder / "model_index.json", *folder.glob("*/config.json")):
        settings = json.loads(path.read_text().replace("CLIPImageProcessorPil", "CLIPImageProcessor"))
        settings.pop("_name_or_path", None)
        path.write_text(json.dumps(settings, indent=2) + "\n")


def save_trained(
    pipeline_class: type[Any], base: str | Path, output_dir: str | Path, variant: str | None, **trained: Any
) -> None:
    """Write the base model's pipeline with its `trained` parts into a folder. Frozen parts are read again, to be saved
    in the precision they have. Raises UserError where they cannot be."""
    dtypes = stored_dtypes(base, variant)
    try:
        pipeline = pipeline_class.from_pretrained(base, variant=variant, dtype=dtypes, **trained)
    except (
        OSError,
        ValueError,
        RuntimeError,
        KeyError,
        TypeError,
        ImportError,
        AttributeError,
        SafetensorError,
    ) as error:
        raise UserError(f"base model {base} cannot be loaded as a pipeline: {reason_of(error)}") from error
    save_pipeline(pipeline, output_dir)


class LatentShape(NamedTuple):
    """The number of channels of an autoencoder's latents, and how many pixels a side of one has."""

    channels: int
    factor: int


def latent_shape(autoencoder: torch.nn.Module) -> LatentShape:
    """The shape of the latents of a VAE or MOVQ."""
    config = autoencoder.config
    return LatentShape(config.latent_channels, 2 ** (len(config.block_out_channels) - 1))


def latent_statistics(vae: torch.nn.Module) -> list[list[float]]:
    """The mean and the standard deviation of each channel of a VAE's latents, by which SDXL's pipeline scales them;
    an empty list where its settings do not name both, as most do not."""
    statistics = [vae.config.get(name) for name in ("latents_mean", "latents_std")]
    return [] if None in statistics else [list(values) for values in statistics]


def standardize_latents(
    vae: torch.nn.Module, mean: torch.Tensor, std: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The moments of latents, each (B, C, h, w), once the statistics of `latent_statistics` are taken out, in float32;
    as they are where there are none. The scaling factor comes after it."""
    statistics = latent_statistics(vae)
    if not statistics:
        return mean, std
    centre, spread = (torch.tensor(values, device=mean.device).view(1, -1, 1, 1) for values in statistics)
    return (mean.float() - centre) / spread, std.float() / spread


def check_channels(unet: torch.nn.Module, autoencoder: torch.nn.Module) -> None:
    """Refuse the UNets of other tasks, which are told more than noisy latents. Raises UserError."""
    unet_channels = unet.config.in_channels
    latent_channels = autoencoder.config.latent_channels
    if unet_channels != latent_channels:
        raise UserError(
            f"the base model's UNet takes {unet_channels} channels, and its latents have {latent_channels}: it "
            "is one for another task, such as inpainting; name a text-to-image model"
        )


def checkpoint_blocks(blocks: Iterable[torch.nn.Module]) -> None:
    """Gradient checkpointing for a network whose library has none: what is computed inside each of these modules is
    computed again in the backward pass instead of kept."""
    for block in blocks:
        block.forward = partial(torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=False)


def enable_xformers(model: torch.nn.Module) -> None:
    """Switch a diffusers model to xFormers attention. Raises UserError where the device cannot run it."""
    if not torch.cuda.is_available():
        raise UserError("--enable_xformers_memory_efficient_attention needs a CUDA GPU; leave it out on this device")
    try:
        model.enable_xformers_memory_efficient_attention()
    except Exception as error:
        # xFormers tries itself on this device, which may raise anything.
        raise UserError(f"xFormers does not work here ({reason_of(error)}); leave its flag out") from error
