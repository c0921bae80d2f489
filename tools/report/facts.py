"""What a run told about itself when it started, as metrics.jsonl holds it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class StartFacts:
    """What is trained, on what, and for how long. `launcher` is the words before the script's name, `flags` those that
    shape the result, `libraries` their versions by name."""

    script: str
    base: str
    device: str
    processes: int
    precision: str
    parameters: int
    images: int
    val_images: int
    images_per_step: float
    steps: int
    epochs: float
    seed: int
    launcher: list[str]
    flags: dict[str, Any]
    libraries: dict[str, str]


# Where the key in metrics.jsonl differs from the name here; the keys are a file format.
KEYS = {
    "images": "pictures",
    "val_images": "held_out",
    "images_per_step": "pictures_per_update",
    "steps": "updates",
}


def start_facts_from(values: Mapping[str, Any]) -> StartFacts | None:
    """The facts in a line of metrics.jsonl, or None for a line of another version, which has other keys."""
    keys = {name: KEYS.get(name, name) for name in StartFacts.__dataclass_fields__}
    if not values.keys() >= set(keys.values()):
        return None
    return StartFacts(**{name: values[key] for name, key in keys.items()})
