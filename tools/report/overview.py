"""The page's first section: where each run stands, its numbers, and what is trained."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from tools.charts.series import smoothed
from tools.report.curves import smoothing_window
from tools.report.folder import RunFolder
from tools.report.table import Cell, Row
from tools.report.words import ago, date, rough_duration
from training_utils.base import formats
from training_utils.run import metrics

# The first of these that a run has is shown.
MEMORY_CURVES = {
    "memory_peak_gib": "device memory, peak",
    "memory_resident_gib": "host memory, peak",
}


@dataclass(frozen=True)
class Fact:
    """A value under its label, and a remark in small print."""

    label: str
    value: str
    remark: str = ""


def state_of(run: RunFolder, now: float) -> str:
    """Where a run stands, in words."""
    if run.log is None:
        return f"there is no {metrics.NAME} in its folder, so its curves are not known"
    steps = f"{run.log.step:,}"
    if run.total_steps is not None:
        steps += f" of {run.total_steps:,}"
    if run.finished:
        return f"finished: {steps} steps, the last one on {date(run.log.time)}"
    return f"step {steps}; the last line of {metrics.NAME} was written {ago(now - (run.log.time or now))}"


def numbers_of(run: RunFolder) -> list[Fact]:
    """The numbers that one asks for first."""
    if run.log is None:
        return []
    total = f"of {run.total_steps:,}" if run.total_steps is not None else ""
    found = [Fact("steps", f"{run.log.step:,}", total)]
    found += _loss(run)
    found += _validation_loss(run)
    found += _speed(run)
    found += _memory(run)
    found.append(Fact("time", formats.duration(run.log.seconds), "with validation and checkpoints"))
    return found


def _loss(run: RunFolder) -> list[Fact]:
    losses = list(run.log.finite("train_loss").items())
    if not losses:
        return []
    window = smoothing_window(losses)
    mean = smoothed(losses, window)[-1][1]
    return [Fact("loss", formats.number(mean), f"mean of about {window} steps")]


def _validation_loss(run: RunFolder) -> list[Fact]:
    lowest = run.log.lowest("val_loss")
    if not lowest:
        return []
    losses = run.log.finite("val_loss")
    step, loss = lowest
    last = max(losses)
    others = "the last one" if last == step else f"the last one {formats.number(losses[last])}"
    separator = ", " if last == step else "; "
    return [Fact("lowest validation loss", formats.number(loss), f"step {step:,}{separator}{others}")]


def _speed(run: RunFolder) -> list[Fact]:
    speeds = [speed for speed in run.log.finite("samples_per_second").values() if speed > 0]
    if not speeds:
        return []
    speed = statistics.harmonic_mean(speeds)
    images_per_step = run.facts.images_per_step if run.facts else 0
    seconds_per_step = images_per_step / speed
    remark = f"{formats.number(seconds_per_step, 3)} s per step" if seconds_per_step else ""
    steps_left = (run.total_steps or 0) - run.log.step
    if steps_left > 0 and seconds_per_step:
        remark += f"; about {rough_duration(seconds_per_step * steps_left)} left"
    return [Fact("images per second", formats.number(speed, 3), remark)]


def _memory(run: RunFolder) -> list[Fact]:
    for name, label in MEMORY_CURVES.items():
        values = run.log.finite(name).values()
        if values:
            remark = "of rank 0" if run.facts and run.facts.world_size > 1 else ""
            return [Fact(label, f"{formats.number(max(values), 3)} GiB", remark)]
    return []


def description_of(run: RunFolder) -> list[Fact]:
    """What is trained, from what, and how long."""
    facts = run.facts
    if not facts:
        return []
    device = f"{facts.device}, {facts.world_size} of them" if facts.world_size > 1 else facts.device
    val_images = f", and {facts.validation_images:,} for validation" if facts.validation_images else ""
    steps = f"{facts.steps:,} steps of {formats.number(facts.images_per_step, 3)} images"
    starts = len(run.log.runs)
    started = date(run.log.runs[0]["time"])
    if starts > 1:
        started += f"; started {starts} times"
    return [
        Fact("script", facts.script),
        Fact("base model", facts.base_model),
        Fact("trained", f"{formats.large_count(facts.parameters)} parameters, {facts.precision}"),
        Fact("device", device),
        Fact("images", f"{facts.images:,}{val_images}"),
        Fact("planned", f"{steps}, {formats.number(facts.epochs, 3)} epochs"),
        Fact("seed", str(facts.seed)),
        Fact("started", started),
        Fact("folder", str(run.path)),
    ]


def comparison(runs: list[RunFolder], now: float) -> list[Row]:
    """The same of several runs, a column each."""
    rows = [Row("state", [Cell(state_of(run, now)) for run in runs])]
    for facts_of in (numbers_of, description_of):
        rows += _rows(runs, facts_of)
    return rows


def _rows(runs: list[RunFolder], facts_of: Callable[[RunFolder], list[Fact]]) -> list[Row]:
    columns = [{fact.label: Cell(fact.value, fact.remark) for fact in facts_of(run)} for run in runs]
    labels = dict.fromkeys(label for column in columns for label in column)
    return [Row(label, [column.get(label, Cell("")) for column in columns]) for label in labels]
