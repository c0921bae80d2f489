"""What frozen networks made of images and captions, kept on disk, so that they run once and not at every step.

A `Store` holds entries by key, in shards that are memory-mapped, written whole or not at all, and never changed. A key
names the content that an entry was made of, and the store's folder the networks and settings that made it: what has
changed is not found, and is made anew. Nothing here needs torch.
"""

import contextlib
import hashlib
import json
import os
import platform
import shutil
import time
import uuid
import zlib
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from . import draws
from .data import read_ahead, read_between
from .problems import BadSample
from .reporting import UserError, bar, reason_of, say, warn

FORMAT = 1  # part of every store's identity; raise it when an entry's meaning changes
ROUND = 500  # entries of a process between two meetings of all, which wait for each other only so long
SHARD_BYTES, SHARD_SECONDS = 2**27, 60  # a shard is written when either is reached: what a kill can cost
BLANK = "no picture"
ABANDONED = 3600  # seconds after which a shard that was never finished is taken away


# ---------------------------------------------------------------------------------------------------------------------
# Entries on disk
# ---------------------------------------------------------------------------------------------------------------------


def _pack(array, kind):
    """A float32 array in the type that its values came from, which loses nothing; bfloat16 as its bits."""
    if kind == "bfloat16":
        return (array.view(np.uint32) >> 16).astype(np.uint16)
    return array.astype(kind)


def _unpack(array, kind):
    if kind == "bfloat16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32, copy=False)


def digest(words, config, parameters):
    """SHA-256 of a network: `words` that tell its kind, its configuration, a dict, and for each parameter (name, type,
    shape, the array as bytes)."""
    facts = {name: value for name, value in config.items() if not name.startswith("_")}
    facts.pop("transformers_version", None)
    result = hashlib.sha256(json.dumps([*words, facts], sort_keys=True, default=str).encode())
    for name, kind, shape, content in sorted(parameters, key=lambda parameter: parameter[0]):
        result.update(f"{name} {kind} {tuple(shape)}".encode())
        result.update(content)
    return result.hexdigest()


class Store:
    """Entries by key in a folder. An entry is a dict of float32 arrays, each kept in the type it was computed in.

    `identity` is whatever JSON can hold that tells the networks and settings apart; it chooses the folder in `root`.
    """

    def __init__(self, root, kind, identity):
        words = json.dumps([FORMAT, identity], sort_keys=True)
        self.folder = Path(root) / f"{kind}-{hashlib.sha256(words.encode()).hexdigest()[:16]}"
        self.places, self.shards, self._open = {}, {}, {}

    def __getstate__(self):
        return self.__dict__ | {"_open": {}}  # another process maps the files itself

    def __contains__(self, key):
        return key in self.places

    def make_folder(self):
        """Raises UserError where there can be none."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._not_written(error, exit_code=2) from None

    def _not_written(self, error, exit_code):
        return UserError(
            f"the cache in {self.folder} cannot be written ({reason_of(error)}); make room there or name another "
            "folder with --encoding_cache_dir",
            exit_code,
            everywhere=False,
        )

    def look(self):
        """See what shards there are now; a header is read once."""
        paths = sorted(self.folder.glob("*.safetensors"))
        for path in paths:
            if path not in self.shards:
                self.shards[path] = _header(path)
                if self.shards[path] is None:
                    self.drop(path)
        self.shards = {path: self.shards[path] for path in paths if self.shards[path] is not None}
        self.places = {key: (path, row) for path in self.shards for row, key in enumerate(self.shards[path]["keys"])}

    def read(self, key):
        """The entry of a key, a dict of float32 arrays."""
        path, row = self.places[key]
        if path not in self._open:
            try:
                self._open[path] = safe_open(path, framework="np")
            except (OSError, SafetensorError) as error:  # taken away or overwritten since the run began
                raise UserError(f"{path} cannot be read ({reason_of(error)})", exit_code=1, everywhere=False) from None
        kinds = self.shards[path]["kinds"]
        return {name: _unpack(self._open[path].get_slice(name)[row], kind) for name, kind in kinds.items()}

    def write(self, keys, arrays):
        """Add a shard: `arrays` is {name: (type's name, float32 array of shape (keys, ...))}. Raises UserError."""
        packed = {name: np.ascontiguousarray(_pack(array, kind)) for name, (kind, array) in arrays.items()}
        about = {"keys": keys, "kinds": {name: kind for name, (kind, _) in arrays.items()}, "crc32": _crc(packed)}
        words = json.dumps(about, sort_keys=True)
        path = self.folder / f"{hashlib.sha256(words.encode()).hexdigest()[:32]}.safetensors"
        unfinished = path.with_suffix(f".{uuid.uuid4().hex}.unfinished")
        try:
            with open(unfinished, "wb") as file:
                file.write(save(packed, {"about": words}))
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
        except OSError as error:
            unfinished.unlink(missing_ok=True)
            raise self._not_written(error, exit_code=1) from None

    def is_damaged(self, path):
        """Whether a shard's content is not what was written."""
        _open(path)
        try:
            with safe_open(path, framework="np") as file:
                return _crc({name: file.get_tensor(name) for name in file.keys()}) != self.shards[path]["crc32"]  # noqa: SIM118
        except (OSError, SafetensorError):
            return True

    def drop(self, path):
        """Take a damaged shard away; its entries are made again. Raises UserError."""
        warn(f"{path} is damaged; what it held is computed again", everywhere=True)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise self._not_written(error, exit_code=2) from None

    def clear_left_overs(self):
        """Take away what killed runs had begun to write."""
        for path in self.folder.glob("*.unfinished"):
            with contextlib.suppress(OSError):  # another run has just finished it
                if time.time() - path.stat().st_mtime > ABANDONED:
                    path.unlink(missing_ok=True)


def _open(path):
    """Raises UserError for a file that is there and cannot be opened, which safetensors says is not there."""
    try:
        open(path, "rb").close()
    except FileNotFoundError:
        pass
    except OSError as error:
        raise UserError(f"{path} cannot be read ({reason_of(error)})", exit_code=1, everywhere=False) from None


def _header(path):
    """What a shard's header says about it, or None where it is not as it was written."""
    _open(path)
    try:
        with safe_open(path, framework="np") as file:
            words = file.metadata()["about"]
    except (OSError, SafetensorError, TypeError, KeyError):
        return None
    return json.loads(words) if hashlib.sha256(words.encode()).hexdigest()[:32] == path.stem else None


def _crc(arrays):
    crc = 0
    for name, array in sorted(arrays.items()):
        crc = zlib.crc32(f"{name} {array.dtype} {array.shape}".encode(), crc)
        crc = zlib.crc32(array.reshape(-1).view(np.uint8), crc)
    return crc


# ---------------------------------------------------------------------------------------------------------------------
# Filling a store
# ---------------------------------------------------------------------------------------------------------------------


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
        return (read_between if self.on_cpu else read_ahead)(function, items, self.threads, many)


def open_store(store, wanted, team):
    """Look what a store holds, on all processes. Shards with an entry that is `wanted` are read through, each by one
    process, and taken away where they are damaged. Raises UserError."""
    store.make_folder()
    if team.rank == 0:
        store.clear_left_overs()
    store.look()
    paths = sorted({store.places[key][0] for key in wanted if key in store})
    mine = paths[team.rank :: team.world]
    checks = read_ahead(store.is_damaged, mine, team.threads)
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
    if isinstance(item, _View) and item.samples.on_bad_sample == "skip":
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


def _one(encode, sample):
    """What the networks make of one sample: an entry, as a store would have it."""
    made = encode({name: np.asarray(array)[None] for name, array in sample.items()})
    return {name: array[0] for name, (_, array) in made.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------------------------------


class Images:
    """What the networks made of a dataset's images: `read` stands in for `Prepare.show` and the networks.

    Of an image that is cropped at random `crops` crops are kept. They are drawn from its content, so that every run
    finds the same ones. `digests` are those of the images' content, `sizes` their own (width, height), `unusable`
    maps indices to sentences. The `size` of a view is the one at which it is shown, None where there is no choice.
    """

    def __init__(self, store, digests, sizes, crops):
        self.store, self.digests, self.sizes, self.crops, self.unusable = store, digests, sizes, crops, {}

    def key(self, index, mirrored, crop, size):
        """The key of one view; `crop` is None for the middle of the image, else a number."""
        words = [self.digests[index], *(["mirrored"] if mirrored else []), *([] if crop is None else [f"crop {crop}"])]
        return " ".join(words if size is None else [*words, f"{size[0]} x {size[1]}"])

    def corner(self, index, crop):
        """The generator of one crop."""
        return None if crop is None else draws.generator(int(self.digests[index][:15], 16), "cached_crop", crop)

    def views(self, index, mirrors, cropped, size):
        """All that `read` may be asked for: a list of (mirrored, crop)."""
        crops = range(self._crops(index, size)) if cropped else [None]
        return [(mirrored, crop) for mirrored in ((False, True) if mirrors else (False,)) for crop in crops]

    def has_room(self, index, size):
        """Whether crops of an image for this size can differ."""
        (width, height), (shown_width, shown_height) = self.sizes[index], size or (1, 1)
        return width * shown_height != height * shown_width

    def _crops(self, index, size):
        return self.crops if self.has_room(index, size) else 1

    def read(self, index, mirrored, generator, size=None):
        """The entry of an image, mirrored or not; `generator` draws which crop, None takes the middle. Raises
        BadSample for an image that could not be used when the cache was made."""
        if index in self.unusable:
            raise BadSample(self.unusable[index])
        crop = None if generator is None else int(generator.integers(self._crops(index, size)))
        return self.store.read(self.key(index, mirrored, crop, size))

    def read_blank(self):
        """The entry of what stands in the place of no image."""
        return self.store.read(BLANK)


@dataclass(frozen=True)
class _View:
    """One view of one row's image, to be shown to the networks."""

    samples: Any
    index: int
    mirrored: bool
    crop: Any
    size: Any

    def __str__(self):
        return self.samples.rows.name(self.index)


def _show(view):
    if isinstance(view, dict):
        return view
    samples, prepare = view.samples, view.samples.prepare
    try:
        corner = prepare.images.corner(view.index, view.crop)
        size = () if view.size is None else (view.size,)
        return prepare.show(samples.rows, view.index, view.mirrored, corner, *size)
    except BadSample as error:
        return error if samples.on_bad_sample == "skip" else samples.refusal(error)
    except UserError as error:
        return error


def _look_at(rows, indices, threads):
    """`Rows.content` of some images, in order."""
    return list(bar(read_ahead(rows.content, indices, threads), "reading images", len(indices)))


def cache_images(store, sets, encode, team=None, batch_size=None, crops=1, blank=None):
    """Let the networks see every image of some data.Samples once, as their `prepare` shows them, and put what they
    made of it in `prepare.images`; `blank` is a sample to show them too, `crops` as in Images. For the rest see
    `fill`. Raises UserError.

    Where the store is None nothing is kept, and the networks run whenever an image is asked for.
    """
    if store is None:
        for samples in sets:
            samples.prepare.images = SimpleNamespace(
                read=lambda *view, samples=samples: _one(encode, samples.prepare.show(samples.rows, *view)),
                read_blank=lambda: _one(encode, blank),
            )
        return
    for samples in sets:
        _, firsts, same = np.unique(samples.rows.numbers, return_index=True, return_inverse=True)  # some are repeated
        mine = range(team.rank, len(firsts), team.world)
        looks = _look_at(samples.rows, [int(firsts[at]) for at in mine], team.threads)
        seen = [look for _, look in sorted(team.gather(list(zip(mine, looks))))]
        digests, sizes = [seen[at][0] for at in same], [seen[at][1] for at in same]
        samples.prepare.images = Images(store, digests, sizes, crops)
    wanted, narrowed = {}, 0
    for samples in sets:
        for index in range(len(samples)):
            size = samples.rows.size(index)
            wanted |= _views(samples, index, size)
            narrowed += samples.prepare.cropped and samples.prepare.images.has_room(index, size)
    if narrowed and crops == 1 and team.rank == 0:
        warn(
            f"one random crop of each of {narrowed:,} images is kept, the same in every epoch; --cached_crops 4 "
            "keeps four, in four times the room"
        )
    # Views of one size lie together, so that they can be encoded together.
    wanted = dict(sorted(wanted.items(), key=lambda pair: pair[1].size or ()))
    failed = fill(
        store, ({BLANK: blank} if blank else {}) | wanted, _show, encode, team, batch_size, "views of images"
    )
    if failed:
        stand_ins = {}
        for samples in sets:
            images, sized = samples.prepare.images, samples.rows.size
            for index in range(len(samples)):
                for key in failed.keys() & _views(samples, index, sized(index)).keys():
                    images.unusable[index] = failed[key]
            usable = np.setdiff1d(np.arange(len(samples)), list(images.unusable))
            for place in images.unusable if len(usable) else ():
                index = int(usable[np.searchsorted(usable, place) % len(usable)])  # as data.Samples goes on from there
                stand_ins |= _views(samples, index, sized(place))
        failed = fill(store, stand_ins, _show, encode, team, batch_size, "views of images that stand in for others")
        if failed:
            reason = next(iter(failed.values()))
            raise UserError(f"an image that stands in for another cannot be used either: {reason}", everywhere=True)


def _views(samples, index, size):
    """All views of an image that are shown at a size, {key: _View}."""
    images, prepare = samples.prepare.images, samples.prepare
    return {
        images.key(index, *view, size): _View(samples, index, *view, size)
        for view in images.views(index, prepare.mirrors, prepare.cropped, size)
    }


# ---------------------------------------------------------------------------------------------------------------------
# Captions
# ---------------------------------------------------------------------------------------------------------------------


class Captions:
    """What the text encoders made of captions: `read(tokens)` is the entry of what `Prepare.tokenize` made."""

    def __init__(self, store):
        self.store = store

    @staticmethod
    def key(tokens):
        """The same for the same tokens."""
        return hashlib.sha256(b"".join(array.tobytes() for array in tokens.values())).hexdigest()

    def read(self, tokens):
        return self.store.read(self.key(tokens))


def cache_captions(store, sets, encode, team=None, batch_size=None, empty=False):
    """Let the text encoders read every caption of some data.Samples once, the empty one too where it is `empty` that
    may be asked for, and put what they made of it in `prepare.captions`. For the other arguments see `fill`. Raises
    UserError.

    Where the store is None nothing is kept, and the networks run whenever a caption is asked for.
    """
    if store is None:
        for samples in sets:
            samples.prepare.captions = SimpleNamespace(read=lambda tokens: _one(encode, tokens))
        return
    texts = dict.fromkeys([""] if empty else [])
    for samples in sets:
        for index in range(len(samples)):
            texts |= dict.fromkeys(samples.rows.captions(index))
    tokenize, wanted = sets[0].prepare.tokenize, {}
    for text in texts:
        wanted.setdefault(Captions.key(tokenize(text)), text)
    fill(store, wanted, tokenize, encode, team, batch_size, "captions")
    for samples in sets:
        samples.prepare.captions = Captions(store)
