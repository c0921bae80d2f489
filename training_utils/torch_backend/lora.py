"""Low-rank adapters through PEFT: adding, saving in the library's layout and in that of WebUI and ComfyUI, loading."""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LoraBaseMixin
from diffusers.utils import convert_all_state_dict_to_peft, convert_state_dict_to_kohya
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from training_utils.base.console import warn
from training_utils.base.errors import UserError
from training_utils.torch_backend.ema import EMAWeights

ADAPTER_FILE = "pytorch_lora_weights.safetensors"
KOHYA_FILE = "pytorch_lora_weights_kohya.safetensors"
AVERAGE_FILE = "ema.bin"
# What kohya's trainers call the base model in a file, by which WebUI sorts it: by the width of the text states.
KOHYA_BASE_VERSIONS = {768: "sd_v1", 1024: "sd_v2", 2048: "sdxl_base_v1-0"}
UNET_LAYERS = ["to_q", "to_k", "to_v", "to_out.0"]
ADDED_KV_LAYERS = ["add_k_proj", "add_v_proj"]  # Kandinsky's UNet: keys and values from the image's embedding
TEXT_LAYERS = ["q_proj", "k_proj", "v_proj", "out_proj"]


def add_adapter(
    model: torch.nn.Module,
    layers: list[str],
    rank: int,
    alpha: float | None = None,
    dropout: float = 0.0,
    use_dora: bool = False,
    seed: int = 0,
) -> None:
    """Freeze a model and give the linear layers of these names trainable low-rank terms (Hu et al. 2021, 2106.09685).

    W x becomes W x + (alpha / rank) B A x, with A (rank, in) gaussian and B (out, rank) zero at the start; `alpha`
    None means alpha = rank. `use_dora` learns the columns' norms too (Liu et al. 2024, 2402.09353). The adapter is
    float32 whatever the model's precision: half precision would round small steps away.
    """
    model.requires_grad_(False)
    torch.manual_seed(seed)
    model.add_adapter(
        LoraConfig(
            r=rank,
            lora_alpha=rank if alpha is None else alpha,
            lora_dropout=dropout,
            use_dora=use_dora,
            init_lora_weights="gaussian",
            target_modules=layers,
        )
    )
    for parameter in trainable_parameters([model]):
        parameter.data = parameter.data.float()
    if not use_dora:
        for module in model.modules():
            if isinstance(module, LoraLayer):
                module.lora_variant["default"] = FewerPasses
                module.cast_input_dtype_enabled = False


class FewerPasses(LoraVariant):
    """PEFT's forward of an adapted layer in fewer passes through memory, which are what a low-rank term costs.

    PEFT scales the term at the width of the layer's output, not at the rank's, writes it and its sum with the output
    to new memory, and makes an input float32 that autocast then makes half precision again. Here the product adds
    itself to the output, (B, tokens, out). It goes sample by sample: as one product over all tokens the gradient of B
    (out, rank) is a matrix too small to keep a CPU's cores busy.
    """

    @staticmethod
    def forward(module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **_: Any) -> torch.Tensor:
        down = module.lora_A[active_adapter]
        up = module.lora_B[active_adapter]
        scaling = module.scaling[active_adapter]
        if x.dtype != down.weight.dtype and not torch.is_autocast_enabled(x.device.type):
            x = x.to(down.weight.dtype)
        term = down(module.lora_dropout[active_adapter](x))
        if scaling != 1:
            term = term * scaling
        # By hand, since autocast leaves in-place calls alone.
        term = term.to(result.dtype)
        return result.baddbmm_(term, up.weight.to(result.dtype).t().expand(result.shape[0], -1, -1))


def trainable_parameters(models: Iterable[torch.nn.Module]) -> list[torch.nn.Parameter]:
    """The trainable parameters of some models."""
    return [parameter for model in models for parameter in model.parameters() if parameter.requires_grad]


def _adapter_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The adapter's weights on the host, under the names that loaders look for.

    A text encoder's begin with text_model, as in every file in the wild: transformers 5 itself has dropped that level,
    and diffusers reads both. DoRA's norms end in .weight for transformers and do not for diffusers.
    """
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    prefix = "text_model." if _is_flat_text_encoder(model) else ""
    suffix = ".weight" if isinstance(model, PreTrainedModel) else ""
    return {
        prefix + name + (suffix if name.endswith("lora_magnitude_vector") else ""): value.detach().float().cpu()
        for name, value in state.items()
    }


def _is_flat_text_encoder(model: torch.nn.Module) -> bool:
    return hasattr(model, "embeddings") and hasattr(model, "encoder")


def _adapter_settings(model: torch.nn.Module) -> dict:
    """The adapter's configuration for a file's metadata: sorted, so that equal runs write equal files, and without the
    path of the base model on this machine."""
    settings = model.peft_config["default"].to_dict() | {"base_model_name_or_path": None}
    return {name: sorted(value) if isinstance(value, set | list) else value for name, value in settings.items()}


def sampler_usage(pipeline: str, sampler: Any, model: str) -> dict[str, str]:
    """What the usage lines of adapters say of their sampler: {"classes": what is imported, "sampler": a line or ""}.

    `pipeline` is the name of a class; `sampler` lies beside the adapters in `model`, a folder or repository, and is
    None where the base model's own one is right.
    """
    if sampler is None:
        return {"classes": pipeline, "sampler": ""}
    name = type(sampler).__name__
    line = f'pipeline.scheduler = {name}.from_pretrained("{model}", subfolder="scheduler")\n'
    return {"classes": ", ".join(sorted([pipeline, name])), "sampler": line}


def save_result(folder: Path, adapted: dict[str, torch.nn.Module], kohya: bool, sampler: Any = None) -> None:
    """Write the adapters as `save_adapters` does, with `kohya` as `save_kohya` too, and beside them a `sampler`, which
    is None where the base model's own one is right. What an earlier run has left of both is removed."""
    folder = Path(folder)
    (folder / KOHYA_FILE).unlink(missing_ok=True)
    # A folder with a model_index.json is the base model's, and so is its sampler.
    if not (folder / "model_index.json").exists():
        shutil.rmtree(folder / "scheduler", ignore_errors=True)
    save_adapters(folder, adapted)
    if kohya:
        save_kohya(folder, adapted)
    if sampler is not None:
        sampler.save_pretrained(folder / "scheduler")


def save_adapters(folder: Path, adapted: dict[str, torch.nn.Module]) -> None:
    """Write the adapters of `adapted` ({"unet": model, ...}) as one file that `load_lora_weights(folder)` takes.

    Where a pipeline has no such method, its networks do: `load_lora_adapter(folder, prefix="unet")`.
    Float32, with rank, alpha and layers in the file's metadata: without them a loader takes alpha to be the rank.
    """
    # What every pipeline's save_lora_weights calls; Kandinsky's pipelines have none.
    LoraBaseMixin._save_lora_weights(
        folder,
        lora_layers={name: _adapter_state(model) for name, model in adapted.items()},
        lora_metadata={name: _adapter_settings(model) for name, model in adapted.items()},
    )


def load_adapters(folder: Path, adapted: dict[str, torch.nn.Module]) -> None:
    """Put the weights that `save_adapters`, or an original script, wrote back into the adapters. Raises UserError."""
    state = load_file(folder / ADAPTER_FILE)
    # The originals write diffusers' older names.
    if not any(".lora_A." in name for name in state):
        state = convert_all_state_dict_to_peft(state)
    stored = {name.split(".")[0] for name in state}
    others = stored - adapted.keys()
    if others and adapted.keys() <= stored:
        names = ", ".join(sorted(others))
        raise UserError(f"{folder} holds adapters of {names} too, which this run does not train; use the same flags")
    for name, model in adapted.items():
        part = {}
        for key, value in state.items():
            if key.startswith(f"{name}."):
                part[_name_in_model(key.removeprefix(f"{name}."), model)] = value
        rank = model.peft_config["default"].r
        for key, value in part.items():
            if ".lora_A." in key and value.shape[0] != rank:
                raise UserError(f"{folder} holds adapters of rank {value.shape[0]}, this run has --rank {rank}")
        result = set_peft_model_state_dict(model, part)
        missing = [key for key in result.missing_keys if "lora_" in key]
        if missing or result.unexpected_keys or not part:
            raise UserError(f"{folder} does not hold the adapters of this run's {name}; train it with the same flags")


def _name_in_model(name: str, model: torch.nn.Module) -> str:
    """The name that PEFT has in a model for a weight that `_adapter_state` has written."""
    if _is_flat_text_encoder(model):
        name = name.removeprefix("text_model.")
    return name.replace("magnitude_vector.weight", "magnitude_vector")


class AdapterWeights:
    """The adapters of `adapted` ({"unet": model, ...}) in a checkpoint, and their average beside them."""

    def __init__(self, adapted: dict[str, torch.nn.Module], ema: EMAWeights | None = None) -> None:
        self.adapted = adapted
        self.ema = ema

    def gather_full(self) -> "AdapterWeights":
        """Themselves: adapters are never shared out among the processes."""
        return self

    def save(self, folder: Path) -> None:
        """Write the adapters, and their average where there is one. The main process calls it."""
        save_adapters(folder, self.adapted)
        if self.ema is not None:
            self.ema.write(folder / AVERAGE_FILE)

    def load(self, folder: Path) -> None:
        """Read what `save`, or an original script, wrote. Where the folder holds no average, it starts from the
        adapters' weights. Raises UserError where the adapters are others."""
        load_adapters(folder, self.adapted)
        if self.ema is None:
            return
        if (folder / AVERAGE_FILE).exists():
            self.ema.read(folder / AVERAGE_FILE)
        else:
            warn(f"{folder} holds no EMA weights; the average starts from its weights")
            self.ema.reset()


def save_kohya(folder: Path, adapted: dict[str, torch.nn.Module]) -> None:
    """Write the adapters once more with the names that WebUI and ComfyUI read, and the facts that they show."""
    state: dict[str, torch.Tensor] = {}
    for name, model in adapted.items():
        state |= {f"{name}.{key}": value for key, value in _adapter_state(model).items()}
    converted = convert_state_dict_to_kohya(state)
    # With one text encoder its prefix has no number.
    if "text_encoder" in adapted and "text_encoder_2" not in adapted:
        converted = {key.replace("lora_te1_", "lora_te_"): value for key, value in converted.items()}
    alphas = {name: float(model.peft_config["default"].lora_alpha) for name, model in adapted.items()}
    assert len(set(alphas.values())) == 1, alphas
    alpha = torch.tensor(next(iter(alphas.values())))
    # The converter takes alpha to be the rank.
    converted = {
        key: alpha.clone() if key.endswith(".alpha") else value.contiguous() for key, value in converted.items()
    }
    unet = adapted["unet"]
    facts = {
        "network_module": "networks.lora",
        "network_dim": unet.peft_config["default"].r,
        "network_alpha": alpha.item(),
    }
    version = KOHYA_BASE_VERSIONS.get(unet.config.cross_attention_dim)
    if version is not None:
        facts["base_model_version"] = version
        # By this alone WebUI tells Stable Diffusion 2 from 1, and lists the file with the models that it is for.
        facts["v2"] = version == "sd_v2"
    metadata = {f"ss_{name}": str(value) for name, value in facts.items()}
    save_file(converted, Path(folder) / KOHYA_FILE, metadata={"format": "pt"} | metadata)
