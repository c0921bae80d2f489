"""The folder of a base model before anything of it is loaded: which pipeline it is for."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from training_utils.base import losses
from training_utils.base.console import warn
from training_utils.base.errors import UserError, reason_of
from training_utils.cli.options import TimestepOptions

# Words in the name of a pipeline's class that tell apart what the scripts train, and the scripts that train it.
SCRIPTS = {
    "XL": "train_text_to_image_sdxl.py",
    "Prior": "train_text_to_image_prior.py",
    "Kandinsky": "train_text_to_image_decoder.py",
    "StableDiffusion": "train_text_to_image.py",
}
DISTINGUISHING = ("XL", "Kandinsky", "V22", "Prior")


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
    try:
        index = json.loads(path.read_text())
    except OSError as error:
        raise UserError(
            f"base model {folder} has no model_index.json; it must be a folder in diffusers' layout"
        ) from error
    except ValueError as error:
        raise UserError(f"{path} cannot be read: {reason_of(error)}") from error
    if not isinstance(index, dict):
        raise UserError(f"{path} cannot be read: it holds no JSON object")
    return index


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
