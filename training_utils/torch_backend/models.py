"""Base models: finding their folders, loading their parts, saving pipelines."""

import inspect
import json
import os
from functools import cache, partial
from pathlib import Path

import torch
import torch.utils.checkpoint
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from training_utils.base import hub_errors
from training_utils.base.console import warn
from training_utils.base.errors import UserError, reason_of
from training_utils.run import base_model, single_file


def model_folder(
    name, pipeline_class, revision=None, variant=None, cache_dir=None, left_out=(), trained=True, config=None
):
    """The local folder of a base model, fetched from the hub where `name` is an id. Raises UserError.

    A model in one file is converted by `convert_single_file`, which takes `config`. Parts `left_out` are not
    fetched; of a model that is not `trained`, `variant` is read where there is one.
    """
    if os.path.isdir(name):
        folder = Path(name)
    elif os.path.isfile(name):
        folder = single_file.convert_single_file(name, pipeline_class, config, cache_dir)
    else:
        try:
            folder = Path(
                pipeline_class.download(
                    name, revision=revision, variant=variant, cache_dir=cache_dir, **dict.fromkeys(left_out)
                )
            )
        except Exception as error:  # the hub client raises a dozen kinds, its transport more
            if variant is not None and "`variant=" in str(error):
                raise UserError(f"base model {name} has no weights of --variant {variant}") from None
            reason = hub_errors.not_found(name, error)
            raise UserError(f"base model {name} is neither a folder nor found on the hub: {reason}") from None
    base_model.refuse_another_family(name, folder, pipeline_class.__name__)
    if trained and variant is not None and not any(folder.glob(f"*/*.{variant}*")):
        raise UserError(f"base model {name} has no weights of --variant {variant}")
    return folder


def load_part(cls, folder, subfolder="", variant=None, **options):
    """`cls.from_pretrained` of one part of a base model. Raises UserError that names the part when it cannot.

    A part that is not stored in this variant (`non_ema` exists for UNets alone) is read without it, as pipelines do.
    """
    part = Path(folder) / subfolder
    if not part.is_dir():
        raise UserError(f"base model {folder} has no part '{subfolder}'; there must be a folder of that name")
    what = f"part '{subfolder}' of base model {folder}" if subfolder else f"model {folder}"
    pickles, weights = sorted(part.glob("*.bin")), sorted(part.glob("*.safetensors"))
    if pickles and not weights:
        raise UserError(
            f"{what} has its weights as a pickle only ({pickles[0].name}), which could run code; where you trust it, "
            "load the model with diffusers and save it again, as safetensors"
        )
    if issubclass(cls, torch.nn.Module):
        for kind, there in (("settings, config.json", (part / "config.json").is_file()), ("weights", weights)):
            if not there:
                raise UserError(f"{what} has no {kind}; {part} must hold config.json and .safetensors files")
    if variant is not None and any(part.glob(f"*.{variant}*")):
        options["variant"] = variant
    try:
        return cls.from_pretrained(folder, subfolder=subfolder, **options)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        reason = next(filter(None, map(_damage, weights)), reason_of(error))
        raise UserError(f"{what} cannot be loaded: {reason}") from None


def _damage(path):
    """What is wrong with a .safetensors file as far as its header tells, as a clause, or None."""
    try:
        with safe_open(path, framework="pt"):
            return None
    except SafetensorError as error:
        return f"{path.name} is damaged or cut off at {path.stat().st_size:,} bytes ({reason_of(error)})"


def load_replacement(cls, name, base, subfolder, cache_dir=None, dtype=None):
    """A network in place of a part of a base model. Raises UserError.

    `name` is the network's folder or hub id, that of a whole model with such a part, or a .safetensors file, which is
    read with the settings of the base model's. `dtype` None means that of its weights.
    """
    if os.path.isfile(name):
        options = dict(config=str(base), subfolder=subfolder, local_files_only=True)
        try:
            with safe_open(name, framework="pt") as file:
                stored = file.get_tensor(next(iter(file.keys()))).dtype
            return cls.from_single_file(name, dtype=dtype or stored, **options)
        except Exception as error:  # no .safetensors, or weights of something else: diffusers' own kinds
            raise UserError(f"{name} cannot be loaded as a '{subfolder}': {reason_of(error)}") from None
    folder = other_model_folder(name, cache_dir)
    inner = subfolder if (folder / subfolder).is_dir() and not (folder / "config.json").is_file() else ""
    return load_part(cls, folder, inner, dtype=dtype or stored_dtype(folder / inner))


def load_sdxl_vae(base, variant, half, other=None, cache_dir=None):
    """SDXL's VAE in float32, since its activations overflow in half precision; the `other` one, which `load_instead`
    finds, in the torch.dtype `half`, unless its configuration says the same of it."""
    from diffusers import AutoencoderKL

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
def other_model_folder(name, cache_dir=None):
    """The local folder of a model that is no part of a pipeline, fetched from the hub where `name` is an id; the same
    one for a whole run, whatever is uploaded there meanwhile."""
    if os.path.isdir(name):
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, cache_dir=cache_dir, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:
        reason = hub_errors.not_found(name, error)
        raise UserError(f"model {name} is neither a folder nor found on the hub: {reason}") from None


def stored_dtype(folder, variant=None):
    """The torch.dtype of the weights in a model folder; float32 where they are not safetensors.

    Of several stored copies it is the one that is read: `variant` where the folder has it, else the plain one, whose
    file names hold one dot.
    """
    files = sorted(Path(folder).glob("*.safetensors"))
    chosen = [path for path in files if variant is not None and f".{variant}" in path.name]
    for path in chosen or [path for path in files if path.name.count(".") == 1]:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (safe_open is no dict)
                dtype = file.get_tensor(name).dtype
                if dtype.is_floating_point:
                    return dtype
    return torch.float32


def stored_dtypes(folder, variant=None):
    """The torch.dtype of each part of a model folder, {part: dtype}, as pipelines take it."""
    parts = [path for path in Path(folder).iterdir() if path.is_dir() and not path.name.startswith(".")]
    return {part.name: stored_dtype(part, variant) for part in parts} | {"default": torch.float32}


def sampling_scheduler(folder, changes):
    """The base model's own sampler with `changes` to its configuration, so that it samples what was trained.

    A sampler that cannot end in pure noise (zero terminal SNR) is replaced by DDIM. Raises UserError where the
    folder has none.
    """
    import diffusers

    try:
        config = dict(diffusers.DDPMScheduler.load_config(folder, subfolder="scheduler"))
    except OSError as error:
        raise UserError(f"part 'scheduler' of base model {folder} cannot be loaded: {reason_of(error)}") from None
    name = config.get("_class_name", "DDPMScheduler")
    cls = getattr(diffusers, name, None)
    if cls is None:
        raise UserError(f"part 'scheduler' of base model {folder} is a {name}, which this diffusers does not have")
    takes = inspect.signature(cls.__init__).parameters
    if name != "UnCLIPScheduler" and "beta_schedule" not in takes:
        raise UserError(
            f"part 'scheduler' of base model {folder} is a {name}, which has no schedule of betas: the model is of a "
            "kind that this script does not train"
        )
    if changes.get("rescale_betas_zero_snr"):
        if "rescale_betas_zero_snr" not in takes:
            cls = diffusers.DDIMScheduler
            changes = changes | {"clip_sample": False}  # DDIM's default is for pixels: it would cut latents at 1
        changes = changes | {"timestep_spacing": "trailing"}  # sampling must begin at the noisy end (2305.08891, 3.3)
    return cls.from_config(config, **changes)


def save_pipeline(pipeline, folder):
    """Write a pipeline as a folder that older libraries read too, without the paths of this machine.

    transformers 5 writes a tokenizer as tokenizer.json alone, a text encoder that it has built itself without the
    level text_model, and, without torchvision, CLIPImageProcessorPil for CLIPImageProcessor; earlier releases read
    none of that.
    """
    folder = Path(folder)
    pipeline.save_pretrained(folder)
    for name, part in pipeline.components.items():
        if name.startswith("tokenizer"):
            part.backend_tokenizer.model.save(str(folder / name))  # as vocab.json and merges.txt
    for weights in folder.glob("text_encoder/model.safetensors"):
        with safe_open(weights, framework="pt") as file:
            flat = "final_layer_norm.weight" in file.keys()  # noqa: SIM118 (safe_open is no dict)
        if flat:
            tensors = {f"text_model.{name}": tensor for name, tensor in load_file(weights).items()}
            save_file(tensors, weights, metadata={"format": "pt"})
    for path in (folder / "model_index.json", *folder.glob("*/config.json")):
        facts = json.loads(path.read_text().replace("CLIPImageProcessorPil", "CLIPImageProcessor"))
        facts.pop("_name_or_path", None)
        path.write_text(json.dumps(facts, indent=2) + "\n")


def check_channels(unet, autoencoder):
    """Refuse the UNets of other tasks, which are told more than noisy latents. Raises UserError."""
    takes, gives = unet.config.in_channels, autoencoder.config.latent_channels
    if takes != gives:
        raise UserError(
            f"the base model's UNet takes {takes} channels, and its latents have {gives}: it is one for another task, "
            "such as inpainting; name a text-to-image model"
        )


def checkpoint_blocks(blocks):
    """Gradient checkpointing for a network whose library has none: what is computed inside each of these modules is
    computed again in the backward pass instead of kept."""
    for block in blocks:
        block.forward = partial(torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=False)


def enable_xformers(model):
    """Switch a diffusers model to xFormers attention. Raises UserError where the device cannot run it."""
    if not torch.cuda.is_available():
        raise UserError("--enable_xformers_memory_efficient_attention needs a CUDA GPU; leave it out on this device")
    try:
        model.enable_xformers_memory_efficient_attention()
    except Exception as error:
        raise UserError(f"xFormers does not work here ({reason_of(error)}); leave its flag out") from None
