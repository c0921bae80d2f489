"""Datasets that do not fit the disk: shards and tables that stay where they lie, on the hub or on a network disk.

What is fetched in one go is a chunk: row groups of a parquet table, or members of a tar shard, that follow each other.
How many rows each chunk has is known before the run, from the tables' footers and from one walk along the headers of
each shard, which is kept. Nothing else is: a caption or an image that cannot be used shows when its turn comes.

The order of an epoch is a function of (seed, epoch) as for all other data, so a stream is cut, resumed and shared out
like them. It is one that needs few chunks at any time, which lie in a folder on this disk, the spool.
"""

import contextlib
import fcntl
import hashlib
import heapq
import io
import json
import os
import platform
import queue
import re
import shutil
import threading
import time
import uuid
import weakref
from collections import deque
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow
import pyarrow.ipc

from training_utils.base import draws, exit_callbacks, hub_errors
from training_utils.base.console import bar, say, warn
from training_utils.base.errors import UserError, reason_of
from training_utils.cli import flags
from training_utils.data import parallel, problems, tables, tar
from training_utils.data.captions import texts_of
from training_utils.data.dataset import ImageDataset
from training_utils.data.files import IMAGE_ENDINGS, files_of
from training_utils.data.problems import BadSample, Findings, Problem

CHUNK = 2**26  # bytes: what is smaller is fetched together; only a row group or one sample may be larger
LANES = 16  # places in the dataset that an epoch reads at the same time; part of the order of every old run
WINDOW = 2**18  # bytes: what lies nearer together than that is read at once, since a request takes its time too
WIDEST = 2**23  # bytes that are read at once of a shard whose images are so small that none is worth a request
WAITS = (1, 2, 4, 8, 16)  # seconds between attempts to read, beside those of the hub's client
AHEAD = 4  # chunks that a process fetches ahead at the same time, each of which lies in its memory meanwhile
THREADS = 16  # that ask for files before the run, each of which waits for an answer
LATE = 64  # steps for which a chunk stays when it is not needed any more: data workers may lag behind
GUESTS = 4  # chunks that stay for a while though no step to come needs them: those of validation samples
FORMAT = 1  # of what is kept about a file


class File(NamedTuple):
    """A shard or a table: its address, its size in bytes, and what changes with its content."""

    url: str
    size: int
    version: str

    @property
    def shown(self):
        """What to call it in a message."""
        return _shown(self.url)


def _shown(url):
    """An address as it is told: without the commit of a repository of the hub."""
    return re.sub(r"^hf://datasets/([^@]+)@[^/]+/", r"\1/", url)


class Chunk(NamedTuple):
    """Rows of a file that are fetched in one go: `begin` to `end`, bytes of a shard or row groups of a table; how many
    `rows` that is; the number of the `first` one in the file; about how many bytes."""

    file: int
    begin: int
    end: int
    rows: int
    first: int
    bytes: int


# ---------------------------------------------------------------------------------------------------------------------
# Order
# ---------------------------------------------------------------------------------------------------------------------


def order(seed, epoch, sizes, buffer):
    """The order in which an epoch visits the rows of chunks of these `sizes`, an array of int64, which are numbered
    from chunk to chunk.

    The chunks, in a drawn order, are dealt onto lanes, each onto the shortest one. The rows of a lane are cut into
    blocks of buffer / lanes rows, which are shuffled. The lanes then take turns, row by row, each until it ends. So
    `buffer` rows that follow each other lie in few chunks; and where the number of processes divides that of lanes,
    processes that take turns too have lanes of their own, but for the last rows of an epoch.
    """
    starts, lanes = np.cumsum(sizes) - sizes, min(LANES, len(sizes))
    block, dealt = max(1, buffer // lanes), [[] for _ in range(lanes)]
    lengths = [(0, lane) for lane in range(lanes)]
    for chunk in draws.generator(seed, "chunks", epoch).permutation(len(sizes)):
        length, lane = lengths[0]
        dealt[lane].append(np.arange(starts[chunk], starts[chunk] + sizes[chunk]))
        heapq.heapreplace(lengths, (length + int(sizes[chunk]), lane))
    turns = []
    for lane, parts in enumerate(dealt):
        dealt[lane] = rows = np.concatenate(parts)
        generator = draws.generator(seed, "blocks", epoch, lane)
        for at in range(0, len(rows), block):
            generator.shuffle(rows[at : at + block])
        turns.append(np.arange(len(rows)) * lanes + lane)
    return np.concatenate(dealt)[np.argsort(np.concatenate(turns))]


class StreamedDataset(ImageDataset):
    """Rows of a Source, as data.Rows; `numbers` are their places in it."""

    def __init__(self, source, caption_column, findings, numbers=None, sizes=None):
        self.source, self.caption_column, self.findings, self.sizes = source, caption_column, findings, sizes
        self.numbers = np.arange(source.starts[-1]) if numbers is None else numbers
        self.root, self.sources, self.origins, self.partly = None, None, None, ()
        self.looked_at = []

    def __len__(self):
        return len(self.numbers)

    def select(self, indices):
        indices = np.asarray(indices, dtype=np.int64)
        sizes = None if self.sizes is None else self.sizes[indices]
        return StreamedDataset(self.source, self.caption_column, self.findings, self.numbers[indices], sizes)

    # --- what a row holds --------------------------------------------------------------------------------------------

    def name(self, index):
        """What to call a row in a message: its member of a shard where its chunk is here, else its number in the
        file."""
        return self.source.name(self.numbers[index])

    def _name(self, index, cell):
        return self.name(index)

    def _cell(self, index):
        return _cell(self.source.read(self.numbers[index], "image"))

    def captions(self, index):
        """The captions of a row, a list of at least one string. Raises BadSample."""
        value = _value(self.source.read(self.numbers[index], "caption"))
        fault = problems.caption_fault(value)
        if fault:
            raise BadSample(Problem("no usable caption", self.name(index), fault).sentence())
        return texts_of(value)

    def cells(self):
        """(name, cell) of every row, whose chunks are fetched one after the other; then `values` are known as well."""
        self.looked_at = []
        ends = np.cumsum(self.lengths)
        for begin, end in zip(ends - self.lengths, ends):
            self.source.expect([self.numbers[begin : begin + 1], self.numbers[end : end + 1]], late=0)
            for number in self.numbers[begin:end]:
                cell = _cell(self.source.read(number, "image"))
                if self.caption_column is not None:
                    self.looked_at.append(_value(self.source.read(number, "caption")))
                yield self.source.name(number), cell

    def values(self):
        """What `cells` has met in the caption column."""
        return self.looked_at

    def files(self):
        return np.zeros(0, dtype=np.int64)

    def without_image(self):
        """None is known of before its turn comes."""
        return np.zeros(0, dtype=np.int64)

    def fingerprint(self):
        """SHA-256 over the files' names and sizes, the rows of each chunk, and which of them these are."""
        digest = hashlib.sha256(self.source.digest().encode())
        digest.update(np.ascontiguousarray(self.numbers).tobytes())
        return digest.hexdigest()

    # --- which rows, and when ----------------------------------------------------------------------------------------

    @property
    def stream(self):
        return self

    @property
    def ahead(self):
        """How many samples ahead chunks are fetched."""
        return self.source.buffer

    @cached_property
    def lengths(self):
        """How many of these rows lie in each chunk in which there are any: int64."""
        chunks = self.source.of(self.numbers)
        return np.diff(np.append(np.flatnonzero(np.diff(chunks)) + 1, len(chunks)), prepend=0)

    def drawn(self, count, generator):
        """The indices of `count` rows: those of chunks that a generator draws, of the last of these only the first."""
        ends, indices, found = np.cumsum(self.lengths), [], 0
        for chunk in generator.permutation(len(ends)):
            if found < count:
                indices.append(np.arange(ends[chunk] - self.lengths[chunk], ends[chunk])[: count - found])
                found += len(indices[-1])
        return np.concatenate(indices)

    def order(self, seed, epoch):
        """The order in which an epoch visits these rows: int64 indices."""
        return order(seed, epoch, self.lengths, self.source.buffer)

    def expect(self, coming, rank, world):
        """Be told which rows come next, a list of arrays of indices, of which this process reads every world-th, from
        the rank-th on: their chunks are fetched ahead. Does not wait."""
        self.source.expect([self.numbers[indices] for indices in coming], rank, world)


def _cell(content):
    return None if content is None else {"bytes": content, "path": None}


class _Unusable:
    """Stands in the place of a caption that could not be read."""

    def __init__(self, why):
        self.why = why

    def __repr__(self):
        return self.why


def _value(text):
    """What a chunk holds for a caption, as JSON: a list of it alone, or a string that says why there is none."""
    value = json.loads(text)
    return value[0] if isinstance(value, list) else _Unusable(value)


# ---------------------------------------------------------------------------------------------------------------------
# Chunks on this disk
# ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _locked(path):
    """Within this context no other process or thread is within one for the same path."""
    with open(path, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # closing it is not enough where a process was forked meanwhile


def _remove_unused(folder):
    """Remove a spool that no process uses any more: a lock ends with the process that holds it, however that ends."""
    with contextlib.suppress(OSError), open(folder / "in-use", "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        aside = folder.with_name(f"{folder.name}-{uuid.uuid4().hex}")
        folder.rename(aside)  # a thread that still fetches ahead finds no folder then
        shutil.rmtree(aside, ignore_errors=True)


class Spool:
    """A folder of chunks, which the processes of one launch on this machine share. The last of them takes it away, or,
    where all were killed, the next run does."""

    def __init__(self, root, identity):
        launched = os.environ.get("WORLD_SIZE", "1") != "1"
        machine, run = platform.node(), os.getppid() if launched else os.getpid()
        self.root, self.owner, self.wanted = Path(root), os.getpid(), queue.SimpleQueue()
        self.folder = self.root / f"spool-{machine}-{run}-{identity[:8]}"
        try:
            with _locked(self.root / "lock"):
                for folder in self.root.glob(f"spool-{machine}-*"):
                    _remove_unused(folder)
                self.folder.mkdir(exist_ok=True)
                self.in_use = open(self.folder / "in-use", "ab")  # noqa: SIM115 (it is locked until `close`)
                fcntl.flock(self.in_use, fcntl.LOCK_SH)
        except OSError as error:
            raise _not_kept(self.root, error, exit_code=2) from None

    def __getstate__(self):  # for a data worker that is no fork
        return {"folder": self.folder, "owner": None}

    def is_mine(self):
        """Whether this is the process that made it, and not one of its data workers."""
        return os.getpid() == self.owner

    def place(self, chunk):
        return self.folder / f"{chunk}.arrow"

    def chunks(self):
        """The numbers of the chunks that are there."""
        return [int(path.stem) for path in self.folder.glob("*.arrow")]

    def remove(self, chunk):
        self.place(chunk).unlink(missing_ok=True)

    def close(self):
        """Leave the folder. What waits in `wanted` ends."""
        if not self.is_mine() or self.in_use.closed:
            return
        for _ in range(AHEAD):
            self.wanted.put(None)
        with contextlib.suppress(OSError), _locked(self.root / "lock"):
            fcntl.flock(self.in_use, fcntl.LOCK_UN)  # for data workers as well, who have inherited it
            _remove_unused(self.folder)
        self.in_use.close()


def _not_kept(folder, error, exit_code=1):
    return UserError(
        f"the chunks of a stream cannot be kept in {folder} ({reason_of(error)}); make room there or name another "
        "folder with --cache_dir",
        exit_code,
    )


class Source:
    """The chunks of a dataset, of which those that are needed lie in a spool in the folder `root`. `fetch(file,
    chunk)` reads one: (images, an Arrow array of bytes; captions, JSON as `_value` reads it, or None; names, or
    None)."""

    def __init__(self, files, chunks, fetch, root, buffer):
        self.files, self.chunks, self.fetch, self.buffer = files, chunks, fetch, buffer
        self.starts = np.cumsum([0, *(chunk.rows for chunk in chunks)])
        self.spool = Spool(root, self.digest())
        self.turn, self.needed, self.asked, self.guests, self.threads = 0, {}, set(), deque(), []
        exit_callbacks.before_exit(weakref.finalize(self, self.spool.close))

    def __getstate__(self):  # as Spool's
        return self.__dict__ | {"threads": []}

    def digest(self):
        """SHA-256 over the names and sizes of the files and over their chunks; their folder on a disk is no part."""
        names = [file.shown if "://" in file.url else os.path.basename(file.url) for file in self.files]
        facts = [names, [file.size for file in self.files], self.chunks]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def told(self):
        """How many chunks there are, and how large."""
        size = sum(chunk.bytes for chunk in self.chunks)
        return f"{len(self.chunks):,} of {_told(size / len(self.chunks))} on average, {_told(size)} in all"

    def most(self):
        """About how many bytes of chunks are needed at the same time: those of the buffer, which is shuffled, of the
        next one, which is fetched meanwhile, and the chunks in which each lane's parts of them begin and end."""
        size, rows, count = sum(chunk.bytes for chunk in self.chunks), int(self.starts[-1]), len(self.chunks)
        return min(size, 2 * size * self.buffer // rows + 2 * min(LANES, count) * size // count)

    def of(self, numbers):
        """The chunks in which rows lie: int64."""
        return np.searchsorted(self.starts, numbers, side="right") - 1

    def name(self, number):
        """What to call a row: see Rows."""
        at = int(self.of(number))
        chunk, name = self.chunks[at], None
        with contextlib.suppress(FileNotFoundError):
            name = self._stored(at, number, "name")
        shown = self.files[chunk.file].shown
        return f"{shown}/{name}" if name else f"row {chunk.first + number - self.starts[at]} of {shown}"

    def read(self, number, column):
        """What a row has in a column; waits for its chunk. Raises UserError where that cannot be had."""
        at = int(self.of(number))
        while True:
            try:
                return self._stored(at, number, column)
            except FileNotFoundError:
                self.bring(at)
            if self.spool.is_mine() and at not in self.needed:
                self.guests.append(at)
                if len(self.guests) > GUESTS:
                    self.spool.remove(self.guests.popleft())

    def _stored(self, at, number, column):
        # Mapped for each row anew: a chunk that is mapped would take room on the disk after it was removed.
        with pyarrow.memory_map(str(self.spool.place(at))) as file:
            return pyarrow.ipc.open_file(file).get_batch(0)[column][int(number - self.starts[at])].as_py()

    def bring(self, at):
        """Fetch a chunk, unless it is there, or wait for the process or thread that fetches it. Raises UserError."""
        place, chunk = self.spool.place(at), self.chunks[at]
        unfinished = place.with_suffix(f".{uuid.uuid4().hex}.unfinished")
        try:
            with _locked(place.with_suffix(".lock")):
                if place.exists():
                    return
                images, captions, names = self.fetch(self.files[chunk.file], chunk)
                if len(images) != chunk.rows:
                    raise UserError(
                        f"{self.files[chunk.file].shown} has changed since the run began: {len(images)} rows where "
                        f"{chunk.rows} were; start again with --resume_from_checkpoint latest",
                        exit_code=1,
                    )
                texts = [
                    pyarrow.array(values or [None] * chunk.rows, pyarrow.string()) for values in (captions, names)
                ]
                batch = pyarrow.record_batch([images, *texts], names=["image", "caption", "name"])
                with pyarrow.OSFile(str(unfinished), "wb") as file, pyarrow.ipc.new_file(file, batch.schema) as writer:
                    writer.write_batch(batch)
                os.replace(unfinished, place)
        except OSError as error:
            with contextlib.suppress(OSError):
                unfinished.unlink(missing_ok=True)
            raise _not_kept(self.spool.folder, error) from None

    def expect(self, coming, rank=0, world=1, late=None):
        """Have the chunks of rows that come next fetched, and remove those that were last needed more than `late`
        turns ago, else LATE; see Rows."""
        self.turn += 1
        late = LATE if late is None else late
        self.needed |= dict.fromkeys(np.unique(self.of(np.concatenate(coming))).tolist(), self.turn)
        mine, first = np.unique(self.of(np.concatenate([part[rank::world] for part in coming])), return_index=True)
        for at in mine[np.argsort(first)].tolist():
            if at not in self.asked and not self.spool.place(at).exists():
                self.asked.add(at)
                self.spool.wanted.put(at)
        while len(self.threads) < AHEAD:
            arguments = (weakref.ref(self), self.spool.wanted)
            self.threads.append(threading.Thread(target=_bring_ahead, args=arguments, daemon=True))
            self.threads[-1].start()
        for at in self.spool.chunks():
            if self.needed.get(at, 0) + late < self.turn:
                self.needed.pop(at, None)
                self.spool.remove(at)


def _bring_ahead(reference, wanted):
    """The work of a thread: bring what is put into a queue, until that is None."""
    while (at := wanted.get()) is not None:
        source = reference()
        if source is None:
            return
        with contextlib.suppress(Exception):  # whoever needs the chunk meets it too
            source.bring(at)
        source.asked.discard(at)
        del source


def _told(size):
    return f"{size / 1e9:.3g} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"


# ---------------------------------------------------------------------------------------------------------------------
# Reading from elsewhere
# ---------------------------------------------------------------------------------------------------------------------


def _patiently(shown, read):
    """`read()`, tried again when it fails for a reason that may pass. Raises UserError, with what to call the file."""
    for wait in (*WAITS, None):
        try:
            return read()
        except Exception as error:  # the hub's client raises a dozen kinds, its transport and the system more
            status = getattr(getattr(error, "response", None), "status_code", None) or 0
            final = isinstance(error, (FileNotFoundError, PermissionError)) or status in (401, 403, 404, 410, 416)
            if final or wait is None:
                raise UserError(f"{shown} cannot be read: {hub_errors.hub_reason(error)}", exit_code=1) from None
            warn(f"{shown} cannot be read ({hub_errors.hub_reason(error)}); trying again in {wait} s")
        time.sleep(wait)


def _file(url):
    """The File at an address."""
    import fsspec

    def look():
        files, path = fsspec.core.url_to_fs(url)
        about = files.info(path)
        version = about.get("blob_id") or about.get("ETag") or about.get("mtime")
        return File(url, about["size"], str(version))

    return _patiently(_shown(url), look)


def _bytes(file, begin, end):
    """The bytes of a File from `begin` to before `end`, by one request."""
    import fsspec

    def read():
        files, path = fsspec.core.url_to_fs(file.url)
        content = files.cat_file(path, begin, end, cache_type="none")
        if len(content) != end - begin:
            raise OSError(f"{len(content)} bytes came, and {end - begin} were asked for")
        return content

    return _patiently(file.shown, read)


class _Remote(io.RawIOBase):
    """A File, opened for reading. `parts` are what is here already of it, (begin, bytes); what is not is fetched. For
    one that is `walked` along, at least WINDOW bytes are fetched at once, and more while little is skipped."""

    def __init__(self, file, parts=(), walked=False):
        self.file, self.parts, self.window, self.at = file, parts, WINDOW if walked else 0, 0

    def readable(self):
        return True

    def seekable(self):
        return True

    def seek(self, offset, whence=io.SEEK_SET):
        self.at = max(0, offset + (0, self.at, self.file.size)[whence])
        return self.at

    def readinto(self, buffer):
        end = min(self.at + len(buffer), self.file.size)
        if end <= self.at:
            return 0
        content = self._between(self.at, end)
        buffer[: len(content)] = content
        self.at = end
        return len(content)

    def _between(self, begin, end):
        for start, content in self.parts:
            if start <= begin and end <= start + len(content):
                return memoryview(content)[begin - start : end - start]
        if self.parts and self.window:
            passed_over = begin - self.parts[0][0] - len(self.parts[0][1])
            self.window = min(2 * self.window, WIDEST) if 0 <= passed_over < self.window else WINDOW
        content = _bytes(self.file, begin, min(max(end, begin + self.window), self.file.size))
        if self.window:
            self.parts = [(begin, content)]
        return content[: end - begin]


# --- tar shards ------------------------------------------------------------------------------------------------------


def _look_through_shard(captioned, file):
    """What is known of a shard after a walk along its headers: a dict of its chunks, [begin, end, rows, bytes], how
    many images it has, and the names of those without a caption, where they are `captioned`."""
    found = {"chunks": [], "pictures": 0, "unnamed": []}
    images, texts, begin, end, sample, malformed = [], set(), 0, 0, None, []

    def close():
        missing = [name for name, stem in images if captioned and stem not in texts]
        if len(missing) < len(images):
            found["chunks"].append([begin, end, len(images) - len(missing), end - begin])
        found["pictures"] += len(images)
        found["unnamed"] += [f"{file.shown}/{name}" for name in missing]
        images.clear()
        texts.clear()

    for member, _ in tar.members(file.shown, malformed, False, _Remote(file, walked=True)):
        stem, ending = os.path.splitext(member.name)
        if stem != sample and member.offset - begin >= CHUNK:
            close()
            begin = member.offset
        sample, end = stem, member.offset_data + -(-member.size // tar.BLOCK) * tar.BLOCK
        if ending.lower() in IMAGE_ENDINGS:
            images.append((member.name, stem))
        elif ending in tar.TEXTS:
            texts.add(stem)
    close()
    if malformed:
        raise UserError(malformed[0])
    return found


def _fetch_of_shard(caption_column, file, chunk):
    """What Source's `fetch` returns, of a shard. Members of a sample lie side by side, as WebDataset has it."""
    content = _bytes(file, chunk.begin, chunk.end)
    whole, images, texts, lacking, malformed = io.BytesIO(content), [], {}, {}, []
    whole.seek(0, io.SEEK_END)
    whole.write(bytes(2 * tar.BLOCK))  # a shard's end
    whole.seek(0)
    for member, text in tar.members(file.shown, malformed, caption_column is not None, whole):
        (stem, ending), wrong = os.path.splitext(member.name), []
        if ending.lower() in IMAGE_ENDINGS:
            images.append((member.name, stem, content[member.offset_data : member.offset_data + member.size]))
        elif text is not None:
            where = os.path.basename(member.name)
            tar.keep(where, stem, ending, text, caption_column, texts, lacking, wrong)
            if wrong:
                lacking[stem] = wrong[0]
    if malformed:
        raise UserError(malformed[0], exit_code=1)
    captions = None
    if caption_column is not None:
        images = [image for image in images if image[1] in texts or image[1] in lacking]
        captions = [json.dumps([texts[stem]] if stem in texts else lacking[stem]) for _, stem, _ in images]
    contents = pyarrow.array([image for _, _, image in images], pyarrow.large_binary())
    return contents, captions, [name.encode(errors="backslashreplace").decode() for name, _, _ in images]


# --- parquet tables --------------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def _footer(file):
    """The metadata of a table. Raises UserError."""
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_metadata(_Remote(file))
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file.shown} cannot be read as parquet: {reason_of(error)}") from None


def _ranges(group, columns):
    """The bytes of columns in a row group's metadata, [begin, end) each."""
    for column in map(group.column, range(group.num_columns)):
        if column.path_in_schema.split(".")[0] in columns:
            begin = column.data_page_offset
            if column.has_dictionary_page and column.dictionary_page_offset:
                begin = min(begin, column.dictionary_page_offset)
            yield begin, begin + column.total_compressed_size


def _look_through_table(columns, file):
    """What the footer of a table says: a dict of its chunks, as of a shard's, but of row groups."""
    metadata, chunks = _footer(file), []
    missing = set(columns) - set(metadata.schema.to_arrow_schema().names)
    if missing:
        raise UserError(f"{file.shown} has no column '{min(missing)}', as other tables of this dataset have")
    for at in range(metadata.num_row_groups):
        group = metadata.row_group(at)
        size = sum(end - begin for begin, end in _ranges(group, columns))
        if not chunks or chunks[-1][3] + size > CHUNK:
            chunks.append([at, at, 0, 0])
        chunks[-1] = [chunks[-1][0], at + 1, chunks[-1][2] + group.num_rows, chunks[-1][3] + size]
    return {"chunks": [chunk for chunk in chunks if chunk[2]], "pictures": metadata.num_rows, "unnamed": []}


def _fetch_of_table(image_column, caption_column, file, chunk):
    """What Source's `fetch` returns, of a table."""
    import pyarrow.compute
    import pyarrow.parquet

    metadata, groups = _footer(file), list(range(chunk.begin, chunk.end))
    columns, ranges = [name for name in (image_column, caption_column) if name], []
    for begin, end in sorted(pair for at in groups for pair in _ranges(metadata.row_group(at), columns)):
        if ranges and begin - ranges[-1][1] <= WINDOW:
            begin = ranges.pop()[0]
        ranges.append((begin, end))
    parts = [(begin, _bytes(file, begin, end)) for begin, end in ranges]
    try:
        with pyarrow.parquet.ParquetFile(_Remote(file, parts), metadata=metadata, pre_buffer=False) as parquet:
            table = parquet.read_row_groups(groups, columns=columns, use_threads=False)
        images = table[image_column]
        if pyarrow.types.is_struct(images.type):
            images = pyarrow.compute.struct_field(images, "bytes")
        images = pyarrow.concat_arrays(images.cast(pyarrow.large_binary()).chunks)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"{file.shown} cannot be read as parquet from row {chunk.first} on: {reason_of(error)}", exit_code=1
        ) from None
    captions = None
    if caption_column is not None:
        captions = [json.dumps([value], default=repr) for value in table[caption_column].to_pylist()]
    return images, captions, None


# ---------------------------------------------------------------------------------------------------------------------
# Opening a dataset
# ---------------------------------------------------------------------------------------------------------------------


def load_rows(dataset_name, config_name, folder, cache_dir, image_column, caption_column, buffer):
    """Open a dataset as data.load_rows does, without fetching it. Returns Rows, of which `buffer` are shuffled
    together. What is found out about its files is kept in the folder of downloads. Raises UserError."""
    title = f"--train_data_dir {folder}" if dataset_name is None else f"--dataset_name {dataset_name}"
    urls, kind = _urls(title, dataset_name, config_name, folder, cache_dir)
    files = list(parallel.read_ahead(_file, urls, THREADS))
    if kind == "shards":
        wanted = caption_column is not None
        look, fetch = partial(_look_through_shard, wanted), partial(_fetch_of_shard, caption_column)
    else:
        image_column, caption_column = _columns(files[0], image_column, caption_column)
        wanted = [column for column in (image_column, caption_column) if column is not None]
        look, fetch = partial(_look_through_table, wanted), partial(_fetch_of_table, image_column, caption_column)
    root = Path(flags.downloads(cache_dir)) / "text-to-image-streams"
    try:
        (root / "files").mkdir(parents=True, exist_ok=True)
        with _locked(root / "files.lock"):  # else each process of a machine would look through all of them
            known = parallel.read_ahead(partial(_known, root / "files", [kind, wanted], look), files, THREADS)
            known = list(bar(known, kind, len(files)))
    except OSError as error:
        raise _not_kept(root, error, exit_code=2) from None
    findings, chunks = Findings(), []
    for at, facts in enumerate(known):
        first = 0
        for begin, end, rows, size in facts["chunks"]:
            chunks.append(Chunk(at, begin, end, rows, first, size))
            first += rows
        findings.images += facts["pictures"]
        findings.unnamed += facts["unnamed"]
    if not chunks:
        lack = "captions beside its images, in a .txt, .caption or .json" if findings.images else "images"
        raise UserError(f"{title} holds no {lack}")
    source = Source(files, chunks, fetch, root, buffer)
    free = shutil.disk_usage(root).free
    if source.most() > free:
        raise UserError(
            f"the chunks that a stream needs at the same time take about {_told(source.most())} in {root}, where "
            f"{_told(free)} are free; make room there, name another folder with --cache_dir, or lower --shuffle_buffer"
        )
    rows = StreamedDataset(source, caption_column, findings)
    say(
        f"streaming {len(rows):,} images in chunks, {source.told()}; about {_told(source.most())} at most are "
        f"in {root} at a time; captions and images are looked at when their turn comes"
    )
    return rows


def _urls(title, dataset_name, config_name, folder, cache_dir):
    """The addresses of the files of a dataset, a list of paths or URLs, and "shards" or "tables"."""
    import datasets

    datasets.disable_progress_bars()
    name, place = dataset_name, folder
    if dataset_name is None:
        found, kind = files_of(Path(folder))
        if kind == "images":
            raise UserError(f"{title} holds single images, which are read in place as it is; leave --streaming out")
        if kind == "shards":
            return [os.path.realpath(path) for path in found], kind
        name, place = str(folder), None
    try:
        builder = datasets.load_dataset_builder(name, config_name, cache_dir=cache_dir, data_dir=place)
        splits = builder.config.data_files or {}
    except Exception as error:  # as of datasets.load_dataset
        raise UserError(f"{title} cannot be loaded: {reason_of(error)}") from None
    urls = [str(url) for url in tables.train_split(title, splits)]
    endings = {os.path.splitext(url)[1].lower() for url in urls}
    if endings not in ({".parquet"}, {".tar"}):
        raise UserError(
            f"{title} holds {', '.join(sorted(endings))} files, and --streaming reads .parquet tables or plain .tar "
            "shards; leave it out, or write the dataset again as one of them"
        )
    return urls, "tables" if endings == {".parquet"} else "shards"


def _columns(file, image_column, caption_column):
    """The columns of images and of captions in a table, as data.load_rows finds them."""
    schema = _footer(file).schema.to_arrow_schema()
    image_column, caption_column = tables.columns_of(schema.names, image_column, caption_column)
    kind = schema.field(image_column).type
    if pyarrow.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    if not (pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)):
        raise UserError(f"--image_column {image_column} holds {kind}, not images; there are {schema.names}")
    return image_column, caption_column


def _known(folder, purpose, look, file):
    """`look(file)`, which JSON can hold; it is kept in a folder for the next run."""
    words = json.dumps([FORMAT, CHUNK, purpose, file])
    path = folder / f"{hashlib.sha256(words.encode()).hexdigest()[:32]}.json"
    with contextlib.suppress(OSError, ValueError):
        return json.loads(path.read_text())
    facts = look(file)
    unfinished = path.with_suffix(f".{uuid.uuid4().hex}.unfinished")
    unfinished.write_text(json.dumps(facts))
    os.replace(unfinished, path)
    return facts
