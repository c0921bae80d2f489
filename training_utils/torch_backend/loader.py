"""Batches of tensors on the device."""

import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from training_utils.base import errors
from training_utils.base.errors import UserError
from training_utils.data.plan import BatchPlan
from training_utils.data.samples import Samples, collate, note_skipped
from training_utils.run import output_folder, signals
from training_utils.run.state import RunState

SECONDS_TO_LEARN_OF_A_WORKER = 2


def _start_worker(_: int) -> None:
    # A signal to the process group reaches the workers too, which must go on reading until the run has stopped.
    for number in signals.SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    output_folder.release()


def _collate(samples: list[Any]) -> Any:
    batch = collate(samples)
    if isinstance(batch, UserError):
        return batch
    return {key: value if key == "skipped" else torch.from_numpy(value) for key, value in batch.items()}


def load_batches(
    samples: Samples, batch_sampler: Iterable[Any], device: torch.device, workers: int = 0
) -> Iterator[dict[str, torch.Tensor]]:
    """Batches on the device, as dicts of tensors. Raises UserError for an image that cannot be read, unless the
    samples skip it."""
    loader = torch.utils.data.DataLoader(
        samples,
        batch_sampler=batch_sampler,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=device.type == "cuda",
        worker_init_fn=_start_worker,
        persistent_workers=False,  # the steps have no end, so its workers live as long as the run
    )
    for batch in _fetched(loader):
        if isinstance(batch, UserError):
            batch.everywhere = False  # the other processes have other images
            raise batch
        note_skipped(samples.dataset, batch.pop("skipped", []))
        yield {key: value.to(device, non_blocking=True) for key, value in batch.items()}


def _fetched(loader: Iterable[Any]) -> Iterator[Any]:
    """What a DataLoader yields. Raises its RuntimeError about a worker that was killed, also where that shows first by
    a connection that breaks off."""
    try:
        yield from loader
    except (ConnectionError, EOFError) as error:
        # torch's handler of SIGCHLD raises its own error here as soon as the worker's end is known.
        time.sleep(SECONDS_TO_LEARN_OF_A_WORKER)
        raise RuntimeError(f"a DataLoader worker broke off its connection ({errors.reason_of(error)})") from error


def training_batches(
    samples: Samples,
    plan: BatchPlan,
    state: RunState,
    accelerator: Accelerator,
    workers: int,
    save_checkpoint: Callable[[], Path | None] | None = None,
) -> Iterator[dict[str, torch.Tensor]]:
    """The endless batches of this process, as a BatchPlan has them from a RunState's position on.

    Before an image that cannot be used ends a run of one process, `save_checkpoint()` writes the state after the last
    step; several would wait for each other in it.
    """
    sampler = plan.batches(state.position, accelerator.process_index)
    first_step = state.step
    after_last_step = replace(state)
    try:
        for batch in load_batches(samples, sampler, accelerator.device, workers):
            yield batch
            if state.position != after_last_step.position:
                after_last_step = replace(state)
    except UserError as error:
        if save_checkpoint is None or accelerator.num_processes > 1 or state.step == first_step:
            raise
        state.micro_step = after_last_step.micro_step
        raise errors.with_saved_state(error, save_checkpoint) from error
