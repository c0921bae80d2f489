"""What is known about a run before its first step, for everything that speaks about it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sized
from dataclasses import dataclass
from typing import Any

from training_utils.base import environment
from training_utils.data.plan import BatchPlan
from training_utils.run import commands
from training_utils.run.provenance import Provenance
from training_utils.run.state import RunState

PRECISIONS = {"no": "float32", None: "float32", "bf16": "bf16 mixed with float32", "fp16": "fp16 mixed with float32"}

# The fields that metrics.jsonl holds, and their keys there, which are a file format.
RECORDED = {
    "script": "script",
    "base_model": "base",
    "device": "device",
    "world_size": "processes",
    "precision": "precision",
    "parameters": "parameters",
    "images": "pictures",
    "validation_images": "held_out",
    "images_per_step": "pictures_per_update",
    "steps": "updates",
    "epochs": "epochs",
    "seed": "seed",
    "launcher": "launcher",
    "settings": "flags",
    "libraries": "libraries",
}


@dataclass(frozen=True)
class StepSize:
    """How many images a step takes: at most `largest`, of the batch_size * accumulation * world size that it asks for;
    fewer where there are fewer images, or where buckets end."""

    batch_size: int
    accumulation: int
    largest: int
    steps_per_epoch: int


@dataclass(frozen=True)
class RecordedFacts:
    """What a run trains, on what and for how long, as metrics.jsonl holds it and the report page shows it.

    `images` are those that an epoch takes, `parameters` the number of those that are trained, `images_per_step` an
    average, `settings` the flags that shape the result, `launcher` the words that start the script as it was started.
    """

    script: str
    base_model: str
    device: str
    world_size: int
    precision: str | None
    parameters: int
    images: int
    validation_images: int
    images_per_step: float
    steps: int
    epochs: float
    seed: int
    launcher: list[str]
    settings: dict[str, Any]
    libraries: dict[str, str]

    def to_record(self) -> dict[str, Any]:
        """The facts as metrics.jsonl holds them, a dict that JSON can hold."""
        return {key: getattr(self, field) for field, key in RECORDED.items()}

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> RecordedFacts | None:
        """The facts of what `to_record` made; None where some are missing, as in the file of another version."""
        if not record.keys() >= set(RECORDED.values()):
            return None
        return cls(**{field: record[key] for field, key in RECORDED.items()})


@dataclass(frozen=True)
class RunFacts(RecordedFacts):
    """The facts of the run at hand, from which its start summary, the dry run's report, metrics.jsonl and the model
    card take them.

    `dataset_images` are all that an epoch chooses from; `first_step` steps were made before the run was resumed.
    """

    dataset_images: int
    step_size: StepSize
    first_step: int


def collect_facts(
    *,
    provenance: Provenance,
    base_model: str,
    device: str,
    parameters: Iterable[Any],
    plan: BatchPlan,
    val_dataset: Sized | None,
    steps: int,
    state: RunState,
) -> RunFacts:
    """The facts of a run that goes on from a RunState to `steps` steps in all.

    `parameters` are the arrays that are trained, `device` is what a person calls it, `val_dataset` the dataset of the
    validation images.
    """
    settings = provenance.settings
    full_bf16 = settings.get("full_bf16")
    return RunFacts(
        script=provenance.script,
        base_model=str(base_model),
        device=device,
        world_size=provenance.world_size,
        precision="bf16 throughout" if full_bf16 else PRECISIONS.get(settings["mixed_precision"]),
        parameters=sum(math.prod(parameter.shape) for parameter in parameters),
        images=plan.size,
        validation_images=0 if val_dataset is None else len(val_dataset),
        images_per_step=plan.mean_samples_per_step,
        steps=steps,
        epochs=steps / plan.steps_per_epoch,
        seed=state.seed,
        launcher=commands.launcher_words(),
        settings=settings,
        libraries=environment.library_versions(),
        dataset_images=provenance.samples,
        step_size=StepSize(
            batch_size=plan.batch_size,
            accumulation=plan.accumulation,
            largest=plan.most_samples_per_step,
            steps_per_epoch=plan.steps_per_epoch,
        ),
        first_step=state.step,
    )
