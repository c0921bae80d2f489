"""Batches of tensors on the device."""

import signal
from dataclasses import replace

import torch
import torch.utils.checkpoint

from training_utils.base import errors
from training_utils.base.errors import UserError
from training_utils.data.samples import collate, note_skipped
from training_utils.run import output_folder, signals


def _as_worker(_):
    # A signal to the process group reaches the workers too, which must go on reading until the run has stopped.
    for number in signals.SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    output_folder.release()


def _collate(samples):
    batch = collate(samples)
    if isinstance(batch, UserError):
        return batch
    return {key: value if key == "skipped" else torch.from_numpy(value) for key, value in batch.items()}


def load_batches(samples, batch_sampler, device, workers=0):
    """Batches on the device, as dicts of tensors. Raises UserError for an image that cannot be read, unless the
    samples skip it."""
    loader = torch.utils.data.DataLoader(
        samples,
        batch_sampler=batch_sampler,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=device.type == "cuda",
        worker_init_fn=_as_worker,
        persistent_workers=False,  # the steps have no end, so its workers live as long as the run
    )
    for batch in loader:
        if isinstance(batch, UserError):
            batch.everywhere = False  # the other processes have other images
            raise batch
        note_skipped(samples.rows, batch.pop("skipped", []))
        yield {key: value.to(device, non_blocking=True) for key, value in batch.items()}


def training_batches(samples, updates, state, accelerator, workers, keep=None):
    """The endless batches of this process, as data.BatchPlan has them from a RunState's position on.

    Before an image that cannot be used ends a run of one process, `keep()` writes the state after the last step;
    several would wait for each other in it.
    """
    sampler = updates.batches(state.position, accelerator.process_index)
    begun, whole = state.step, replace(state)
    try:
        for batch in load_batches(samples, sampler, accelerator.device, workers):
            yield batch
            if state.position != whole.position:
                whole = replace(state)
    except UserError as error:
        if keep is None or accelerator.num_processes > 1 or state.step == begun:
            raise
        state.micro_step = whole.micro_step
        raise errors.with_saved_state(error, keep) from error
