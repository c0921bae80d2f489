"""Batches of arrays, split over the devices."""

import itertools
import math

import jax
import numpy as np

from training_utils.base import errors
from training_utils.base.errors import UserError
from training_utils.data import parallel, plan
from training_utils.data.samples import collate, note_skipped
from training_utils.jax_backend import devices


def _read_ahead(read, items, workers):
    """`read(item)` of each item, in order; with `workers` threads that stay two items each in front."""
    return parallel.read_ahead(read, items, workers) if workers else map(read, items)


def narrow(batch):
    """A batch's integers in 32 bits, with which JAX computes."""
    return {name: value.astype(np.int32) if value.dtype == np.int64 else value for name, value in batch.items()}


def _reader(samples, batch_size):
    """A function from a list of at most `batch_size` keys to a batch of just that size, filled up with weight 0."""

    def read(keys):
        batch = collate([samples[key] for key in keys])
        if isinstance(batch, UserError):
            return batch
        skipped = batch.pop("skipped", [])
        lacking = batch_size - len(keys)
        batch = {name: np.concatenate([value, *[value[:1]] * lacking]) for name, value in batch.items()}
        batch["weight"][len(keys) :] = 0
        return narrow(batch) | {"skipped": skipped}

    return read


def _stacked(batches, lead, rows):
    """Batches as one dict of arrays with the leading axes `lead`. Raises the UserError of an image that failed, and
    says which of the rows were skipped."""
    for batch in batches:
        if isinstance(batch, UserError):
            batch.everywhere = False  # the other processes have other images
            raise batch
        note_skipped(rows, batch.pop("skipped"))
    return {
        name: np.stack([batch[name] for batch in batches]).reshape(*lead, *value.shape)
        for name, value in batches[0].items()
    }


def training_batches(samples, updates, state, mesh, workers, keep=None):
    """The endless steps of this host from a RunState's position on: arrays (devices, accumulation, batch_size, ...).

    Each device is a process of data.BatchPlan. Every batch has the same shape, so a step compiles once; where an
    epoch's last step has fewer samples, it is filled up with samples of weight 0. Before an image that cannot be used
    ends a run of one process, `keep()` writes a checkpoint.
    """
    begun = state.step
    first = jax.process_index() * mesh.size
    ranks = [updates.batches(state.position, rank) for rank in range(first, first + mesh.size)]
    keys = (next(rank) for _ in itertools.count() for rank in ranks for _ in range(updates.accumulation))
    batches = _read_ahead(_reader(samples, updates.batch_size), keys, workers)
    while True:
        update = list(itertools.islice(batches, mesh.size * updates.accumulation))
        try:
            arrays = _stacked(update, (mesh.size, updates.accumulation), samples.dataset)
        except UserError as error:
            if keep is None or jax.process_count() > 1 or state.step == begun:
                raise
            raise errors.with_saved_state(error, keep) from error
        yield devices.split_over_devices(arrays, mesh)


def validation_batches(samples, batch_size, mesh):
    """All validation samples once, as arrays (devices, 1, batch_size, ...), the same number of them on every host."""
    first, world = jax.process_index() * mesh.size, jax.process_count() * mesh.size
    read, none = _reader(samples, batch_size), [(0, 0, 0.0)]
    shares = [
        plan.validation_batches(len(samples), batch_size, rank, world) for rank in range(first, first + mesh.size)
    ]
    for at in range(math.ceil(math.ceil(len(samples) / world) / batch_size)):
        batches = [read(share[at] if at < len(share) else none) for share in shares]
        yield devices.split_over_devices(_stacked(batches, (mesh.size, 1), samples.dataset), mesh)
