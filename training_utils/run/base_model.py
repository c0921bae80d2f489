"""A base model before its weights are loaded: whether its parts are there and are what a script can train.

The same for torch and JAX; settings and headers are read, no weights.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from training_utils.base import losses
from training_utils.base.console import warn
from training_utils.base.errors import UserError
from training_utils.cli.options import TimestepOptions
from training_utils.run import model_files

# Words in the name of a pipeline's class that tell apart what the scripts train, and the scripts that train it.
SCRIPTS = {
    "XL": "train_text_to_image_sdxl.py",
    "Prior": "train_text_to_image_prior.py",
    "Kandinsky": "train_text_to_image_decoder.py",
    "StableDiffusion": "train_text_to_image.py",
}
DISTINGUISHING = ("XL", "Kandinsky", "V22", "Prior")
# The parts that each pipeline class runs, and the class that each is loaded as.
PARTS = {
    "StableDiffusionPipeline": {
        "tokenizer": "CLIPTokenizer",
        "text_encoder": "CLIPTextModel",
        "vae": "AutoencoderKL",
        "unet": "UNet2DConditionModel",
        "scheduler": "scheduler",
    },
    "StableDiffusionXLPipeline": {
        "tokenizer": "CLIPTokenizer",
        "tokenizer_2": "CLIPTokenizer",
        "text_encoder": "CLIPTextModel",
        "text_encoder_2": "CLIPTextModelWithProjection",
        "vae": "AutoencoderKL",
        "unet": "UNet2DConditionModel",
        "scheduler": "scheduler",
    },
    "KandinskyV22PriorPipeline": {
        "tokenizer": "CLIPTokenizer",
        "image_processor": "CLIPImageProcessor",
        "text_encoder": "CLIPTextModelWithProjection",
        "image_encoder": "CLIPVisionModelWithProjection",
        "prior": "PriorTransformer",
        "scheduler": "scheduler",
    },
    "KandinskyV22Pipeline": {"movq": "VQModel", "unet": "UNet2DConditionModel", "scheduler": "scheduler"},
}
# What a UNet may be told beside the noisy latents, the timestep and the text, by the pipeline that tells it.
CONDITIONS: dict[str, dict[str, str | None]] = {
    "StableDiffusionPipeline": {"addition_embed_type": None, "encoder_hid_dim_type": None},
    "StableDiffusionXLPipeline": {"addition_embed_type": "text_time", "encoder_hid_dim_type": None},
    "KandinskyV22Pipeline": {"addition_embed_type": "image", "encoder_hid_dim_type": "image_proj"},
}
NO_CLASSES: dict[str, str | None] = {"class_embed_type": None, "num_class_embeds": None}


def check_base_model(
    name: str, folder: str | Path, pipeline: str, variant: str | None = None, left_out: Iterable[str] = ()
) -> None:
    """Raise UserError where the base model in a folder is not one that the pipeline class named `pipeline` runs, or
    where a part of it, except those `left_out`, is missing, incomplete, or of another kind.

    `name` is what the user calls the model.
    """
    folder = Path(folder)
    refuse_another_family(name, folder, pipeline)
    configs = {}
    for part, class_name in PARTS[pipeline].items():
        if part in left_out:
            continue
        title = f"part '{part}' of base model {folder}"
        if not (folder / part).is_dir():
            raise UserError(f"base model {folder} has no part '{part}'; there must be a folder of that name")
        model_files.check_part(folder / part, title, class_name, variant)
        config = folder / part / "config.json"
        configs[part] = model_files.read_json(config) if config.is_file() else {}
    _check_conditions(folder, pipeline, configs)
    _check_widths(folder, configs)


def refuse_another_family(name: str, folder: str | Path, wanted: str) -> None:
    """Raise UserError where the base model in a folder is not one that the pipeline class `wanted` loads."""
    pipeline = str(read_index(folder).get("_class_name", ""))
    if all((word in pipeline) == (word in wanted) for word in DISTINGUISHING):
        return
    advice = ""
    for word, script in SCRIPTS.items():
        if word in pipeline:
            advice = f"; {script}, or its twin for LoRA, trains those"
            break
    raise UserError(f"base model {name} is for {pipeline}; this script trains {wanted} models{advice}")


def read_index(folder: str | Path) -> dict[str, Any]:
    """The model_index.json of a pipeline's folder. Raises UserError where there is none that can be read."""
    path = Path(folder) / "model_index.json"
    if not path.is_file():
        raise UserError(f"base model {folder} has no model_index.json; it must be a folder in diffusers' layout")
    return model_files.read_json(path)


def check_saved_parts(
    folder: Path,
    pipeline: str,
    variant: str | None,
    *,
    readable: Mapping[str, bool] | None = None,
    may_be_absent: bool = False,
) -> None:
    """Raise UserError where a part that is saved with the result, and not needed before, could not be read then.

    `readable` says of each part that model_index.json names whether this diffusers has its class; None where parts
    are copied as they are. A part that is named and not there is no fault where parts `may_be_absent`.
    """
    index = read_index(folder)
    for part in PARTS[pipeline]:
        if not _is_named(index, part) and not may_be_absent:
            raise UserError(f"base model {folder} has a model_index.json that does not name its part '{part}'")
    advice = f"or write [null, null] for it in {folder / 'model_index.json'}, to leave it out"
    for part in filter(lambda name: _is_named(index, name), index):
        title = f"part '{part}' of base model {folder}, which is saved with the result,"
        class_name = model_files.plain_class(index[part][1])
        if readable is not None and not readable.get(part, True):
            raise UserError(f"{title} is a {class_name}, which this diffusers does not have; replace it, {advice}")
        if part in PARTS[pipeline]:
            continue
        if not (folder / part).is_dir():
            if may_be_absent:
                continue
            raise UserError(f"{title} is missing: add the folder, {advice}")
        _check_saved_files(folder / part, title, variant, advice)


def _is_named(index: Mapping[str, Any], part: str) -> bool:
    """Whether an index has a part: an entry of a library and a class."""
    entry = index.get(part)
    return not part.startswith("_") and isinstance(entry, list) and len(entry) == 2 and entry[1] is not None


def _check_saved_files(folder: Path, title: str, variant: str | None, advice: str) -> None:
    """Raise UserError unless a part that is no part of training holds what it is read from."""
    if (folder / "preprocessor_config.json").is_file():
        model_files.read_json(folder / "preprocessor_config.json")
        return
    if not (folder / "config.json").is_file():
        raise UserError(f"{title} has no settings: add {folder / 'config.json'}, {advice}")
    config = model_files.read_json(folder / "config.json")
    stem = model_files.DIFFUSERS if "_class_name" in config else model_files.TRANSFORMERS
    try:
        model_files.check_weights(folder, title, stem, variant)
    except UserError as error:
        raise UserError(f"{error}; {advice}") from error


def _check_conditions(folder: Path, pipeline: str, configs: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise UserError for a UNet that is told more, or less, than the scripts tell it."""
    if "unet" not in configs or pipeline not in CONDITIONS:
        return
    for setting, told in (CONDITIONS[pipeline] | NO_CLASSES).items():
        value = configs["unet"].get(setting)
        if value != told:
            raise UserError(
                f"part 'unet' of base model {folder} has {setting} {value!r}, and this script trains UNets with "
                f"{told!r}: it is one for another task, such as image variations or upscaling; name a text-to-image "
                "model"
            )
    if configs["unet"].get("time_cond_proj_dim") is not None:
        warn(
            f"part 'unet' of base model {folder} is distilled for few steps (time_cond_proj_dim): it is told a "
            "guidance scale, which training does not tell it, and may lose what it was distilled for"
        )


def _check_widths(folder: Path, configs: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise UserError where what one part gives is not as wide as what another takes, so that they do not belong
    together. Settings that are not there are not compared."""
    text = {part: text_settings(config) for part, config in configs.items() if part.startswith("text_encoder")}
    unet, prior = configs.get("unet", {}), configs.get("prior", {})
    embedding = prior.get("embedding_dim")
    pairs = [("its UNet", unet.get("cross_attention_dim"), _sum(each.get("hidden_size") for each in text.values()))]
    if "projection_class_embeddings_input_dim" in unet and "text_encoder_2" in text:
        # Pooled text beside six numbers for sizes and the crop (Podell et al. 2023, arXiv 2307.01952, section 2.2).
        numbers = 6 * (unet.get("addition_time_embed_dim") or 0)
        pooled = _sum([numbers, text["text_encoder_2"].get("projection_dim")])
        pairs.append(("its UNet's added embedding", unet["projection_class_embeddings_input_dim"], pooled))
    for part in ("text_encoder", "image_encoder"):
        if prior and part in configs:
            pairs.append((f"its prior from '{part}'", embedding, configs[part].get("projection_dim")))
    for taker, wanted, given in pairs:
        if isinstance(wanted, int) and given is not None and wanted != given:
            raise UserError(
                f"the parts of base model {folder} do not belong together: {taker} takes {wanted} numbers, and is "
                f"given {given}"
            )


def _sum(widths: Iterable[int | None]) -> int | None:
    """The sum, None where there is nothing to add or one is not known."""
    known = list(widths)
    return sum(width or 0 for width in known) if known and None not in known else None


def text_settings(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings of the text encoder in those of a CLIP model, which may hold an image encoder as well."""
    return config.get("text_config") or config


def check_tokenizer(tokenizer: Any, folder: str | Path, part: str = "tokenizer") -> None:
    """Raise UserError where a tokenizer that has been loaded does not belong to its text encoder, by the latter's
    settings; `part` is its folder in the base model `folder`."""
    title = f"part '{part}' of base model {folder}"
    encoder = Path(folder) / part.replace("tokenizer", "text_encoder")
    if not (encoder / "config.json").is_file():
        return
    settings = text_settings(model_files.read_json(encoder / "config.json"))
    # As transformers has them where the settings name none.
    positions = settings.get("max_position_embeddings", 77)
    rows = settings.get("vocab_size", 49408)
    if tokenizer.model_max_length > positions:
        raise UserError(
            f'{title} has no model_max_length that its text encoder can take; write "model_max_length": {positions} '
            f"into {Path(folder) / part / 'tokenizer_config.json'}"
        )
    vocabulary = tokenizer.get_vocab()
    word, last = max(vocabulary.items(), key=lambda item: item[1])
    if last >= rows:
        raise UserError(
            f"{title} does not belong to its text encoder: the word {word!r} has the number {last:,}, and "
            f"'{encoder.name}' has {rows:,} words; remove the words that were added, or resize its embeddings"
        )
    if len(vocabulary) < rows // 2:
        raise UserError(
            f"{title} is incomplete: it knows {len(vocabulary):,} of the {rows:,} words of '{encoder.name}'"
        )


def check_prediction_type(config: Any, *, zero_snr_asked: bool, dream: bool = False) -> None:
    """Objections to a noise schedule's configuration, beyond those that the flags alone raise. Raises UserError.

    `zero_snr_asked` says that --rescale_betas_zero_snr is given, `dream` that --dream_training is.
    """
    if config.prediction_type not in ("epsilon", "v_prediction"):
        raise UserError(f"the model predicts '{config.prediction_type}'; this script trains epsilon and v_prediction")
    if dream and config.prediction_type != "epsilon":
        raise UserError("--dream_training is defined for epsilon prediction only, and this model predicts v")
    if config.rescale_betas_zero_snr and config.prediction_type == "epsilon":
        problem = "with zero terminal SNR the last timestep is pure noise, from which epsilon cannot be predicted"
        if zero_snr_asked:
            raise UserError(f"{problem}; add --prediction_type v_prediction")
        warn(f"{problem}, and this base model has such a schedule; --prediction_type v_prediction goes with it")


def timestep_probabilities(bias: TimestepOptions, timesteps: int) -> np.ndarray | None:
    """How likely each timestep of a noise schedule is to be drawn, float64, shape (timesteps,); None where all are
    equally likely. Raises UserError for a range beyond the schedule."""
    try:
        return losses.timestep_probabilities(timesteps, **asdict(bias))
    except ValueError as error:
        raise UserError(f"--timestep_bias_strategy {bias.strategy}: {error}") from error
