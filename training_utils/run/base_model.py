"""The folder of a base model before anything of it is loaded: which pipeline it is for."""

import json
from pathlib import Path

from training_utils.base.errors import UserError, reason_of

# Words in a pipeline's class name by which the scripts tell apart what they train, and the script for each.
FAMILIES = {
    "XL": "train_text_to_image_sdxl.py",
    "Prior": "train_text_to_image_prior.py",
    "Kandinsky": "train_text_to_image_decoder.py",
    "StableDiffusion": "train_text_to_image.py",
}


def refuse_another_family(name: str, folder: str | Path, wanted: str) -> None:
    """Raise UserError where the base model in a folder is not one that the pipeline class `wanted` loads."""
    family = str(read_index(folder).get("_class_name", ""))
    if any((word in family) != (word in wanted) for word in ("XL", "Kandinsky", "V22", "Prior")):
        script = next((script for word, script in FAMILIES.items() if word in family), None)
        advice = ""
        if script is not None:
            advice = f"; {script}, or its twin for LoRA, trains those"
        raise UserError(f"base model {name} is for {family}; this script trains {wanted} models{advice}")


def read_index(folder: str | Path) -> dict:
    """The model_index.json of a pipeline's folder, a dict. Raises UserError where there is none that can be read."""
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
