"""Adding to a store what is missing of it, shared out over the processes."""

import os
import platform
import shutil
import time
import uuid
from dataclasses import dataclass
from itertools import chain, groupby
from typing import Any

import numpy as np

from training_utils.base.console import bar, say
from training_utils.base.errors import UserError
from training_utils.cache.images import ImageView
from training_utils.cache.store import SHARD_BYTES, SHARD_SECONDS
from training_utils.data import parallel
from training_utils.data.problems import BadSample

ROUND = 500  # entries of a process between two meetings of all, which wait for each other only so long


@dataclass
class Team:
    """The processes that fill a store together. `gather(items)` is the lists of all of them, one after the other; a
    collective call. A machine has `local_world` of them. The networks run `on_cpu` or beside it."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    gather: Any
    on_cpu: bool = False

    @property
    def threads(self):
        """How many threads of this process read images, which lets go of the interpreter."""
        return max(1, min(8, (os.cpu_count() or 1) // self.local_world))

    def read(self, function, items, batch_size):
        """`function(item)` of each item, in order, for networks that take `batch_size` at once. They are read while a
        device works on the last ones; on a CPU, where a network's threads wait for each other and a core that reads
        meanwhile keeps all of them waiting, in between."""
        many = max(batch_size, 2 * self.threads)
        return (parallel.read_between if self.on_cpu else parallel.read_ahead)(function, items, self.threads, many)


def open_store(store, wanted, team):
    """Look what a store holds, on all processes. Shards with an entry that is `wanted` are read through, each by one
    process, and taken away where they are damaged. Raises UserError."""
    store.make_folder()
    if team.rank == 0:
        store.clear_left_overs()
    store.look()
    paths = sorted({store.places[key][0] for key in wanted if key in store})
    mine = paths[team.rank :: team.world]
    checks = parallel.read_ahead(store.is_damaged, mine, team.threads)
    for path, damaged in zip(mine, bar(checks, f"checking {store.folder.name}", len(mine))):
        if damaged:
            store.drop(path)
    team.gather([])  # until here some process may still be checking
    store.look()


def team_of(rank, gather, on_cpu):
    """The Team of the process `rank` and of all others that call this."""
    machine = f"{platform.node()} {uuid.getnode()}"  # containers on two machines may have the same name
    machines = gather([machine])
    return Team(rank, len(machines), machines[:rank].count(machine), machines.count(machine), gather, on_cpu)


def fill(store, wanted, make, encode, team, batch_size, what):
    """Open a store and add what is missing of `wanted`, a dict from key to anything `make(item)` makes a sample of.

    Samples are dicts of arrays; `encode(batch)` is what the networks make of several, {name: (type's name, float32
    array)}. The work is shared out over the processes, in order; a machine that does not see what another one wrote
    does it all itself. A BadSample that `make` returns is no entry: returns those, {key: sentence}. Raises another
    UserError that it returns.
    """
    open_store(store, wanted, team)
    unusable = {}
    for rank, world in ((team.rank, team.world), (team.local_rank, team.local_world)):
        missing = [key for key in wanted if key not in store and key not in unusable]
        if not any(team.gather([len(missing)])):
            break
        mine = missing[rank::world]
        if mine and rank == 0:
            say(f"running the frozen networks once: {len(missing):,} {what}, kept in {store.folder}")
        with bar(None, what, len(mine)) as shown:
            for at in range(0, max(team.gather([len(mine)])), ROUND):
                some = mine[at : at + ROUND]
                failed = _encode(store, some, len(missing), wanted, make, encode, batch_size, team, shown)
                unusable |= dict(team.gather(list(failed.items())))
        store.look()
    unseen = sum(key not in store and key not in unusable for key in wanted)
    if unseen:
        raise UserError(f"{unseen:,} entries that were written to {store.folder} cannot be seen there", exit_code=1)
    return unusable


def _encode(store, keys, total, wanted, make, encode, batch_size, team, shown):
    """Make and write the entries of some keys, of the `total` that all processes write. Returns what could not be
    made, {key: sentence}."""
    failed, kept, began = {}, [], time.monotonic()

    def good():
        for key, sample in zip(keys, team.read(lambda key: make(wanted[key]), keys, batch_size)):
            shown.update()
            if isinstance(sample, BadSample):
                failed[key] = str(sample)
            elif isinstance(sample, Exception):
                raise sample
            else:
                yield key, sample

    def batches():  # of one shape each
        for _, alike in groupby(good(), lambda pair: [array.shape for array in pair[1].values()]):
            batch = []
            for pair in alike:
                batch.append(pair)
                if len(batch) == batch_size:
                    yield batch
                    batch = []
            if batch:
                yield batch

    def write():
        for _, alike in groupby(kept, lambda pair: [array.shape[1:] for kind, array in pair[1].values()]):
            names, parts = zip(*alike)
            kinds = {name: kind for name, (kind, _) in parts[0].items()}
            arrays = {name: (kind, np.concatenate([part[name][1] for part in parts])) for name, kind in kinds.items()}
            store.write(list(chain(*names)), arrays)
        kept.clear()

    size = done = 0
    try:
        for batch in batches():
            names = [key for key, _ in batch]
            arrays = encode({name: np.stack([sample[name] for _, sample in batch]) for name in batch[0][1]})
            finite = np.all([[np.isfinite(one).all() for one in array] for _, array in arrays.values()], axis=0)
            for at in np.flatnonzero(~finite):
                failed[names[at]] = _not_finite(wanted[names[at]])
            names = [name for name, good in zip(names, finite) if good]
            if names:
                arrays = {name: (kind, array[finite]) for name, (kind, array) in arrays.items()}
                kept.append((names, arrays))
            size += sum(array.nbytes // (1 if kind == "float32" else 2) for kind, array in arrays.values())
            if not done and names:
                _refuse_a_full_disk(store.folder, size // len(names) * total)
            done += len(names)
            if size > SHARD_BYTES or time.monotonic() - began > SHARD_SECONDS:
                write()
                size, began = 0, time.monotonic()
    finally:  # what was computed is not lost with what cannot be
        write()
    return failed


def _not_finite(item):
    """What to say of an item of which the networks make numbers that are not finite. Raises it as a UserError, unless
    such samples are to be skipped."""
    sentence = f"what the frozen networks make of {item} is not finite: they overflow in half precision"
    if isinstance(item, ImageView) and item.samples.on_bad_sample == "skip":
        return sentence
    raise UserError(f"{sentence}; use --mixed_precision no, or a model that does not", exit_code=1, everywhere=False)


def _refuse_a_full_disk(folder, size):
    free = shutil.disk_usage(folder).free
    if size > free:
        raise UserError(
            f"the cache needs {size / 1e9:.3g} GB in {folder}, where {free / 1e9:.3g} GB are free; make room there, "
            "name another folder with --encoding_cache_dir, or leave the cache out",
            everywhere=False,
        )


def first_entry(encode, sample):
    """What the networks make of one sample: an entry, as a store would have it."""
    made = encode({name: np.asarray(array)[None] for name, array in sample.items()})
    return {name: array[0] for name, (_, array) in made.items()}
