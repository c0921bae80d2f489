"""What a dry run prints: what the run would be, and what its first steps took."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from training_utils.base.console import is_main_process
from training_utils.base.formats import estimated_duration, mebibytes
from training_utils.data.dataset import ImageDataset
from training_utils.run.facts import RunFacts
from training_utils.run.progress import Progress
from training_utils.run.summary import image_count

STEPS = 3  # that are made; the first one also compiles, allocates and warms up, and is not counted

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class ParameterCount:
    """How many parameters of a module are trained, and how many are frozen."""

    trained: int = 0
    frozen: int = 0

    def __add__(self, other: ParameterCount) -> ParameterCount:
        return ParameterCount(self.trained + other.trained, self.frozen + other.frozen)


@dataclass(frozen=True)
class MemoryUse:
    """What one process takes on a device, in bytes: `parts` is {what takes it: bytes}, `peak` was measured."""

    device: str
    parts: dict[str, int]
    peak: int


def make_ahead(batches: Iterator[Batch], count: int) -> Iterator[Batch]:
    """The same batches, the first `count` of which are made now: what makes them is then not part of a step."""
    return itertools.chain([next(batches) for _ in range(count)], batches)


def print_report(
    *,
    facts: RunFacts,
    dataset: ImageDataset,
    progress: Progress,
    networks: dict[str, dict[str, ParameterCount]],
    memory: MemoryUse,
) -> None:
    """Print it all, once, whatever the number of processes.

    `dataset` holds the images to train on, `progress` has counted the steps that were made, and `networks` is
    {network: {module: parameters}} of those that are trained.
    """
    if not is_main_process():
        return
    blocks = [
        _data_lines(facts, dataset),
        *(_parameter_lines(name, modules) for name, modules in networks.items()),
        _memory_lines(memory),
        _time_lines(list(progress.step_seconds), facts.steps - facts.first_step),
    ]
    print("\n\n".join("\n".join(lines) for lines in blocks), flush=True)


def _data_lines(facts: RunFacts, dataset: ImageDataset) -> list[str]:
    lines = [f"images      {facts.dataset_images:,} to train on, {facts.validation_images:,} for validation"]
    if dataset.stream is not None:
        lines.append(f"chunks      {dataset.source.describe_chunks()}")
    if dataset.sizes is not None:
        sizes, counts = np.unique(dataset.sizes, axis=0, return_counts=True)
        for (width, height), count in zip(sizes, counts):
            lines.append(f"  {f'{width} x {height}':<12}{count:>14,}")
    steps = f"steps       {facts.steps:,} of {image_count(facts)}"
    if facts.first_step:
        steps += f"; {facts.first_step:,} of them are made"
    epochs = f"epochs      {facts.epochs:,.1f}, of {facts.step_size.steps_per_epoch:,} steps each"
    return [*lines, steps, epochs]


def _parameter_lines(name: str, modules: dict[str, ParameterCount]) -> list[str]:
    rows = modules | {"in all": sum(modules.values(), ParameterCount())}
    width = max(map(len, rows))
    title = f"{f'parameters of {name}':<{width + 2}}"
    lines = [f"{title}{'trained':>16}{'frozen':>16}"]
    for module, count in rows.items():
        lines.append(f"  {module:<{len(title) - 2}}{count.trained:>16,}{count.frozen:>16,}")
    return lines


def _memory_lines(memory: MemoryUse) -> list[str]:
    rows = memory.parts | {
        "activations and all the rest": memory.peak - sum(memory.parts.values()),
        "peak, as measured": memory.peak,
    }
    lines = [f"memory of {memory.device} for one process"]
    return lines + [f"  {what:<30}{mebibytes(size, decimals=1):>18}" for what, size in rows.items()]


def _time_lines(seconds: list[float], steps_left: int) -> list[str]:
    if not seconds:
        return ["time        no step is left to be made"]
    timed = seconds[1:] or seconds
    step_seconds = float(np.mean(timed))
    counted = f"{len(timed)} timed, after the first one" if seconds[1:] else "the first and only one"
    left = estimated_duration(step_seconds * steps_left)
    return [
        f"time        {step_seconds:.3g} s a step ({counted})",
        f"            {left} for {steps_left:,} steps, without caches, checkpoints and validation",
    ]
