"""Batches of arrays, split over the devices."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from training_utils.base import errors
from training_utils.base.errors import UserError
from training_utils.data import parallel, plan
from training_utils.data.dataset import ImageDataset
from training_utils.data.plan import BatchPlan
from training_utils.data.samples import Samples, collate, note_skipped
from training_utils.jax_backend import processes
from training_utils.run.state import RunState

Batch = dict[str, Any]  # {name: array}, and on the host "skipped", sentences about images that were skipped
DeviceBatch = dict[str, jax.Array]
Key = tuple[int, int, float]  # (epoch, index, weight) of a sample


def to_32_bits(batch: Batch) -> Batch:
    """A batch with its integers in 32 bits, with which JAX computes."""
    return {name: value.astype(np.int32) if value.dtype == np.int64 else value for name, value in batch.items()}


def _batch_reader(samples: Samples, batch_size: int) -> Callable[[list[Key]], Batch | UserError]:
    """A function from a list of at most `batch_size` keys to a batch of just that size, filled up with weight 0."""

    def read(keys: list[Key]) -> Batch | UserError:
        batch = collate([samples[key] for key in keys])
        if isinstance(batch, UserError):
            return batch
        skipped = batch.pop("skipped", [])
        missing = batch_size - len(keys)
        filled = {name: np.concatenate([value, *[value[:1]] * missing]) for name, value in batch.items()}
        filled["weight"][len(keys) :] = 0
        return to_32_bits(filled) | {"skipped": skipped}

    return read


def _read_batches(
    read: Callable[[list[Key]], Batch | UserError], keys: Iterable[list[Key]], workers: int
) -> Iterator[Batch | UserError]:
    """`read(batch_of_keys)` of each, in order; with `workers` threads that stay two batches each in front."""
    return parallel.read_ahead(read, keys, workers) if workers else map(read, keys)


def _stack(batches: list[Batch | UserError], lead: tuple[int, int], dataset: ImageDataset) -> Batch:
    """Batches as one dict of arrays with the leading axes `lead`.

    Raises the UserError of an image that failed, and says which images of the dataset were skipped.
    """
    usable: list[Batch] = []
    for batch in batches:
        if isinstance(batch, UserError):
            batch.everywhere = False  # the other processes have other images
            raise batch
        note_skipped(dataset, batch.pop("skipped"))
        usable.append(batch)
    stacked = {}
    for name, value in usable[0].items():
        stacked[name] = np.stack([batch[name] for batch in usable]).reshape(*lead, *value.shape)
    return stacked


def training_batches(
    samples: Samples,
    batch_plan: BatchPlan,
    state: RunState,
    mesh: Mesh,
    workers: int,
    save_checkpoint: Callable[[], Path | None] | None = None,
) -> Iterator[DeviceBatch]:
    """The endless steps of this host from a RunState's position on: arrays (devices, micro-steps, batch_size, ...).

    Each device is a process of the BatchPlan. Every batch has the same shape, so a step compiles once; where an
    epoch's last step has fewer samples, it is filled up with samples of weight 0. Before an image that cannot be used
    ends a run of one process, `save_checkpoint()` writes what was trained until then.
    """
    first_step = state.step
    accumulation = batch_plan.accumulation
    first_device = jax.process_index() * mesh.size
    of_devices = [batch_plan.batches(state.position, first_device + device) for device in range(mesh.size)]
    keys = (next(batches) for _ in itertools.count() for batches in of_devices for _ in range(accumulation))
    batches = _read_batches(_batch_reader(samples, batch_plan.batch_size), keys, workers)
    while True:
        batches_of_step = list(itertools.islice(batches, mesh.size * accumulation))
        try:
            arrays = _stack(batches_of_step, (mesh.size, accumulation), samples.dataset)
        except UserError as error:
            if save_checkpoint is None or jax.process_count() > 1 or state.step == first_step:
                raise
            raise errors.with_saved_state(error, save_checkpoint) from error
        yield processes.split_over_devices(arrays, mesh)


def validation_batches(samples: Samples, batch_size: int, mesh: Mesh) -> Iterator[DeviceBatch]:
    """All validation samples once, as arrays (devices, 1, batch_size, ...), the same number of them on every host."""
    first_device = jax.process_index() * mesh.size
    world_size = jax.process_count() * mesh.size
    of_devices = [
        plan.validation_batches(len(samples), batch_size, first_device + device, world_size)
        for device in range(mesh.size)
    ]
    read = _batch_reader(samples, batch_size)
    filler = [(0, 0, 0.0)]  # for a device that has no samples left
    most_samples = math.ceil(len(samples) / world_size)
    for number in range(math.ceil(most_samples / batch_size)):
        keys = [batches[number] if number < len(batches) else filler for batches in of_devices]
        arrays = _stack([read(batch_of_keys) for batch_of_keys in keys], (mesh.size, 1), samples.dataset)
        yield processes.split_over_devices(arrays, mesh)
