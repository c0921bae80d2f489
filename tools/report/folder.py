"""The folder of a run, read for the page."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from tools.charts.series import Point
from tools.report.words import date
from training_utils.base import formats
from training_utils.base.errors import UserError
from training_utils.run import metrics, output_folder
from training_utils.run.checkpoints import damage_of, list_checkpoints, read_manifest, step_of
from training_utils.run.facts import RecordedFacts
from training_utils.run.metrics import Log


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's folder, and what it is in words."""

    name: str
    description: str


@dataclass(frozen=True)
class RunFolder:
    """What the folder of a run holds.

    `name` tells it from the other runs of the page. `log` is None without metrics.jsonl, `facts` where that is of
    another version. `settings` are run.yaml's flags as text, `run_file` and `model_card` the text of run.yaml and
    README.md, "" where there is none; `grids` the files of the validation images by step.
    """

    path: Path
    name: str
    log: Log | None
    facts: RecordedFacts | None
    settings: dict[str, Any]
    run_file: str
    model_card: str
    checkpoints: list[Checkpoint]
    grids: dict[int, Path]

    @property
    def total_steps(self) -> int | None:
        """The steps that were planned."""
        return self.facts.steps if self.facts else None

    @property
    def finished(self) -> bool:
        """Whether the run has made all of its steps."""
        return self.log is not None and self.total_steps is not None and self.log.step >= self.total_steps

    @property
    def run_file_path(self) -> Path:
        """Where run.yaml lies."""
        return self.path / output_folder.RUN_FILE

    def curve(self, name: str) -> list[Point]:
        """A curve of metrics.jsonl as (step, value); None stands for a value that was not finite."""
        return list(self.log.curves.get(name, {}).items()) if self.log else []

    def shaping_settings(self) -> dict[str, Any]:
        """The settings that shaped the result and are not off."""
        settings = (self.facts.settings if self.facts else {}) or self.settings
        return {name: value for name, value in settings.items() if value not in (None, False, "", "none")}

    def prompts(self) -> list[str]:
        """The prompts of the validation images."""
        prompts = self.settings.get("validation_prompts") or self.settings.get("validation_prompt") or []
        return [str(prompt) for prompt in (prompts if isinstance(prompts, list) else [prompts])]


def read_run_folders(folders: Iterable[str | Path]) -> list[RunFolder]:
    """The runs in these folders. Raises UserError where one is not the folder of a run.

    Runs whose folders are called the same are named by their whole paths.
    """
    runs = [read_run_folder(folder) for folder in folders]
    count = Counter(run.name for run in runs)
    return [replace(run, name=str(run.path)) if count[run.name] > 1 else run for run in runs]


def read_run_folder(folder: str | Path) -> RunFolder:
    """The run in a folder. Raises UserError where there is none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder")
    try:
        log = Log(folder)
    except OSError:
        log = None
    saved = list_checkpoints(folder)
    if log is None and not saved and not (folder / output_folder.RUN_FILE).exists():
        raise UserError(
            f"{folder} is not the output folder of a run: it holds no {metrics.NAME}, run.yaml or checkpoint"
        )
    run_file = _text_of(folder / output_folder.RUN_FILE)
    return RunFolder(
        path=folder,
        name=folder.resolve().name,
        log=log,
        facts=log.facts if log else None,
        settings=read_yaml(run_file),
        run_file=run_file,
        model_card=_text_of(folder / "README.md"),
        checkpoints=[_checkpoint(path) for path in sorted(saved, key=step_of, reverse=True)],
        grids=_grids(folder, log),
    )


def read_yaml(text: str) -> dict[str, Any]:
    """A mapping in YAML, each value as the text that stands there; {} for anything else."""
    try:
        values = yaml.load(text, Loader=yaml.BaseLoader)
    except (yaml.YAMLError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _grids(folder: Path, log: Log | None) -> dict[int, Path]:
    grids: dict[int, Path] = {}
    for path in folder.glob("validation/step-*.png"):
        step = path.stem.removeprefix("step-")
        if step.isdecimal():
            grids[int(step)] = path
    if log and log.runs:
        # Images of later steps are what an earlier run left in the folder.
        grids = {step: path for step, path in grids.items() if step <= log.step}
    return grids


def _checkpoint(folder: Path) -> Checkpoint:
    problem = damage_of(folder, contents=False)
    manifest = read_manifest(folder)
    if problem:
        description = f"damaged: {problem}"
    elif not manifest:
        description = "made by another program"
    else:
        size = sum(fact["size"] for fact in manifest["files"].values())
        description = f"{formats.byte_size(size)}, written {date(manifest['written'])}"
    return Checkpoint(folder.name, description)
