"""Adding to a store what is missing of it, divided among the processes."""

import contextlib
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any

import numpy as np

from training_utils.base.console import bar, say
from training_utils.base.errors import UserError
from training_utils.cache.processes import Processes
from training_utils.cache.shard import Encoded, stored_bytes
from training_utils.cache.store import Store
from training_utils.data import parallel
from training_utils.data.problems import BadSample

# A shard is written when either is reached: it is what a kill can cost.
SHARD_BYTES = 2**27
SHARD_SECONDS = 60

# How many entries a process makes between two collective calls: a process waits for the others only so long.
ENTRIES_BETWEEN_GATHERS = 500

Sample = dict[str, np.ndarray]


def open_store(store: Store, wanted: Iterable[str], processes: Processes) -> None:
    """Find out what a store holds. A collective call.

    Shards with an entry that is `wanted` are read through, each by one process, and removed where they are damaged.
    Raises UserError.
    """
    store.make_folder()
    if processes.rank == 0:
        store.remove_abandoned()
    store.refresh()
    paths = sorted({store.locations[key].path for key in wanted if key in store})
    mine = paths[processes.rank :: processes.world_size]
    checks = parallel.read_ahead(store.is_damaged, mine, processes.threads)
    for path, damaged in zip(mine, bar(checks, f"checking {store.folder.name}", len(mine))):
        if damaged:
            store.remove_damaged(path)
    # Until here some process may still be checking.
    processes.gather([])
    store.refresh()


def fill(
    store: Store,
    wanted: dict[str, Any],
    *,
    prepare: Callable[[Any], Sample | UserError],
    encode: Callable[[Sample], Encoded],
    processes: Processes,
    batch_size: int,
    noun: str,
    skip_overflow: Callable[[Any], bool] = lambda item: False,
) -> dict[str, str]:
    """Open a store and add what is missing of `wanted`. A collective call.

    `wanted` maps keys to items. `prepare(item)` turns one into a sample, a dict of arrays, or returns a UserError.
    `encode(batch)` runs the networks on several samples, stacked. `noun` is what to call the items in messages.

    The work is divided among the processes, in order; a machine that does not see what another one wrote does it all
    itself. An item gets no entry where `prepare` returns a BadSample, or where the outputs of the networks are not
    finite and `skip_overflow(item)` allows it. Returns those items, {key: sentence}. Raises UserError, among them any
    other that `prepare` returns.
    """
    open_store(store, wanted, processes)
    unusable: dict[str, str] = {}
    among_all = (processes.rank, processes.world_size)
    among_this_machine = (processes.local_rank, processes.local_world_size)
    for rank, count in (among_all, among_this_machine):
        missing = [key for key in wanted if key not in store and key not in unusable]
        if not any(processes.gather([len(missing)])):
            break
        mine = missing[rank::count]
        if mine and rank == 0:
            say(f"running the frozen networks once: {len(missing):,} {noun}, kept in {store.folder}")
        most = max(processes.gather([len(mine)]))
        with bar(None, noun, len(mine)) as progress:
            for begin in range(0, most, ENTRIES_BETWEEN_GATHERS):
                some = {key: wanted[key] for key in mine[begin : begin + ENTRIES_BETWEEN_GATHERS]}
                writer = ShardWriter(store, expected=len(missing) - begin * count)
                failed = _encode_some(
                    some,
                    writer,
                    samples=processes.prepare_in_threads(prepare, list(some.values()), batch_size),
                    encode=encode,
                    batch_size=batch_size,
                    skip_overflow=skip_overflow,
                    progress=progress,
                )
                unusable |= dict(processes.gather(list(failed.items())))
        store.refresh()
    unseen = sum(key not in store and key not in unusable for key in wanted)
    if unseen:
        raise UserError(f"{unseen:,} entries that were written to {store.folder} cannot be seen there", exit_code=1)
    return unusable


def _encode_some(
    items: dict[str, Any],
    writer: "ShardWriter",
    *,
    samples: Iterable[Sample | UserError],
    encode: Callable[[Sample], Encoded],
    batch_size: int,
    skip_overflow: Callable[[Any], bool],
    progress: Any,
) -> dict[str, str]:
    """Make the entries of some items, whose `samples` come in their order, and write them. Returns the items without
    an entry, {key: sentence}. Raises UserError."""
    failed: dict[str, str] = {}
    usable = _usable_samples(items, samples, failed, progress)
    try:
        for batch in _batches_of_one_shape(usable, batch_size):
            keys = [key for key, _ in batch]
            names = batch[0][1].keys()
            arrays = encode({name: np.stack([sample[name] for _, sample in batch]) for name in names})
            finite = _finite(arrays)
            for at in np.flatnonzero(~finite):
                failed[keys[at]] = _overflow(items[keys[at]], skip_overflow)
            keys = [key for key, is_finite in zip(keys, finite) if is_finite]
            if keys:
                writer.add(keys, {name: (kind, array[finite]) for name, (kind, array) in arrays.items()})
    except BaseException:
        # What was computed is not lost with what failed; and that is what is reported, not a disk that is full too.
        with contextlib.suppress(UserError):
            writer.flush()
        raise
    writer.flush()
    return failed


def _usable_samples(
    keys: Iterable[str], samples: Iterable[Sample | UserError], failed: dict[str, str], progress: Any
) -> Iterator[tuple[str, Sample]]:
    """(key, sample) of those that can be used; why others cannot is added to `failed`. Raises other UserErrors."""
    for key, sample in zip(keys, samples):
        progress.update()
        if isinstance(sample, BadSample):
            failed[key] = str(sample)
        elif isinstance(sample, UserError):
            raise sample
        else:
            yield key, sample


def _batches_of_one_shape(
    samples: Iterable[tuple[str, Sample]], batch_size: int
) -> Iterator[list[tuple[str, Sample]]]:
    """Batches of consecutive samples whose arrays have the same shapes, of at most `batch_size`."""
    for _, alike in groupby(samples, _sample_shapes):
        while batch := list(islice(alike, batch_size)):
            yield batch


def _sample_shapes(pair: tuple[str, Sample]) -> list[tuple[int, ...]]:
    return [array.shape for array in pair[1].values()]


def _entry_shapes(batch: tuple[list[str], Encoded]) -> list[tuple[int, ...]]:
    return [array.shape[1:] for _, array in batch[1].values()]


class ShardWriter:
    """Collects encoded batches and writes them to a store as shards. `expected` is how many entries all processes
    are to write; the first batch shows whether the disk has room for them."""

    def __init__(self, store: Store, expected: int) -> None:
        self.store = store
        self.expected = expected
        self.batches: list[tuple[list[str], Encoded]] = []
        self.size = 0
        self.began = time.monotonic()
        self.is_first = True

    def add(self, keys: list[str], arrays: Encoded) -> None:
        """Take the entries of some keys. Raises UserError."""
        size = stored_bytes(arrays)
        if self.is_first:
            _refuse_full_disk(self.store.folder, size // len(keys) * self.expected)
            self.is_first = False
        self.batches.append((keys, arrays))
        self.size += size
        if self.size > SHARD_BYTES or time.monotonic() - self.began > SHARD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what was collected: a shard for each run of batches whose entries have the same shapes. Raises
        UserError."""
        batches = self.batches
        self.batches = []
        self.size = 0
        self.began = time.monotonic()
        for _, alike in groupby(batches, _entry_shapes):
            keys, parts = zip(*alike)
            kinds = {name: kind for name, (kind, _) in parts[0].items()}
            arrays = {name: (kind, np.concatenate([part[name][1] for part in parts])) for name, kind in kinds.items()}
            self.store.write(list(chain(*keys)), arrays)


def _finite(arrays: Encoded) -> np.ndarray:
    """Which entries of a batch have finite numbers alone: bool, (samples,)."""
    return np.all([[np.isfinite(entry).all() for entry in array] for _, array in arrays.values()], axis=0)


def _overflow(item: Any, skip_overflow: Callable[[Any], bool]) -> str:
    """What to say of an item whose outputs are not finite. Raises it as a UserError, unless the item may be
    skipped."""
    sentence = f"the frozen networks' output for {item} is not finite: they overflow in half precision"
    if skip_overflow(item):
        return sentence
    raise UserError(f"{sentence}; use --mixed_precision no, or a model that does not", exit_code=1, everywhere=False)


def _refuse_full_disk(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if size > free:
        raise UserError(
            f"the cache needs {size / 1e9:.3g} GB in {folder}, where {free / 1e9:.3g} GB are free; make room there, "
            "name another folder with --encoding_cache_dir, or leave the cache out",
            everywhere=False,
        )


def encode_one(encode: Callable[[Sample], Encoded], sample: Sample) -> dict[str, np.ndarray]:
    """What the networks make of one sample: an entry, as a store would have it."""
    made = encode({name: np.asarray(array)[None] for name, array in sample.items()})
    return {name: array[0] for name, (_, array) in made.items()}
