"""The source of a stream: all its chunks, those that are needed fetched ahead into the spool."""

import contextlib
import hashlib
import json
import os
import queue
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from training_utils.base import exit_callbacks
from training_utils.data.streaming.chunks import Chunk, ChunkContent, File, changed_file, shown_bytes
from training_utils.data.streaming.order import LANES
from training_utils.data.streaming.spool import Spool

FETCHING_THREADS = 4  # of a process, that fetch chunks ahead; each of them holds one in memory meanwhile
IDLE_STEPS = 64  # steps for which a chunk stays when it is no longer needed, because data workers may lag behind
UNPLANNED_CHUNKS = 4  # chunks that stay for a while though no coming step needs them: those of validation samples


class Source:
    """The chunks of a dataset. Those that are needed lie in a spool in the folder `root`.

    `fetch(file, chunk)` reads one and raises UserError; `buffer` is how many samples are shuffled together. Samples
    are numbered from chunk to chunk, `starts` are the numbers of each chunk's first one, int64.
    """

    def __init__(
        self,
        *,
        files: list[File],
        chunks: list[Chunk],
        fetch: Callable[[File, Chunk], ChunkContent],
        root: Path,
        buffer: int,
    ) -> None:
        self.files = files
        self.chunks = chunks
        self.fetch = fetch
        self.buffer = buffer
        self.starts = np.cumsum([0, *(chunk.rows for chunk in chunks)])
        self.spool = Spool(root, self.digest())
        self.step = 0  # how many times `expect` was called
        self.last_needed: dict[int, int] = {}  # chunk -> the step that needed it last
        self.unplanned: deque[int] = deque()
        self.requests: queue.SimpleQueue = queue.SimpleQueue()
        self.requested: set[int] = set()
        self.threads: list[threading.Thread] = []
        exit_callbacks.before_exit(weakref.finalize(self, _close, self.spool, self.requests))

    def __getstate__(self) -> dict[str, Any]:
        # A data worker that is not a fork fetches what it reads by itself.
        return self.__dict__ | {"threads": [], "requests": None}

    # --- what it has -------------------------------------------------------------------------------------------------

    def digest(self) -> str:
        """SHA-256 over the names and sizes of the files and over their chunks. A local folder has no part in it."""
        names = [file.shown if "://" in file.url else os.path.basename(file.url) for file in self.files]
        facts = [names, [file.size for file in self.files], self.chunks]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def total_bytes(self) -> int:
        """About how many bytes all chunks have."""
        return sum(chunk.bytes for chunk in self.chunks)

    def peak_bytes(self) -> int:
        """About how many bytes of chunks are needed at the same time.

        Those of the buffer, which is shuffled, of the next one, which is fetched meanwhile, and the chunks in which
        each lane's parts of them begin and end.
        """
        size = self.total_bytes()
        rows = int(self.starts[-1])
        count = len(self.chunks)
        return min(size, 2 * size * self.buffer // rows + 2 * min(LANES, count) * size // count)

    def describe_chunks(self) -> str:
        """How many chunks there are, and how large."""
        size = self.total_bytes()
        count = len(self.chunks)
        return f"{count:,} of {shown_bytes(size / count)} on average, {shown_bytes(size)} in all"

    def chunk_of(self, numbers: np.ndarray) -> np.ndarray:
        """The chunks in which samples lie: int64."""
        return np.searchsorted(self.starts, numbers, side="right") - 1

    def _locate(self, number: int) -> tuple[int, int]:
        """The chunk in which a sample lies, and its row there."""
        at = int(np.searchsorted(self.starts, number, side="right")) - 1
        return at, int(number - self.starts[at])

    # --- reading a sample --------------------------------------------------------------------------------------------

    def name(self, number: int) -> str:
        """What to call a sample: its member of a shard where its chunk is in the spool, else its number in the
        file."""
        at, row = self._locate(number)
        chunk = self.chunks[at]
        name = None
        with contextlib.suppress(FileNotFoundError):
            name = self.spool.read(at, row, "name")
        shown = self.files[chunk.file].shown
        return f"{shown}/{name}" if name else f"row {chunk.first + row} of {shown}"

    def read(self, number: int, column: str) -> Any:
        """What a sample has in a column; waits for its chunk. Raises UserError where that cannot be had."""
        at, row = self._locate(number)
        while True:
            try:
                return self.spool.read(at, row, column)
            except FileNotFoundError:
                self.fetch_chunk(at)
            if self.spool.is_mine() and at not in self.last_needed:
                self.unplanned.append(at)
                if len(self.unplanned) > UNPLANNED_CHUNKS:
                    self.spool.remove(self.unplanned.popleft())

    def fetch_chunk(self, at: int) -> None:
        """Fetch a chunk, unless it is there, or wait for the process or thread that fetches it. Raises UserError."""
        chunk = self.chunks[at]
        file = self.files[chunk.file]
        with self.spool.fetching(at):
            if self.spool.holds(at):
                return
            content = self.fetch(file, chunk)
            if len(content.images) != chunk.rows:
                raise changed_file(file, len(content.images), chunk.rows)
            self.spool.write(at, content.record_batch())

    # --- fetching ahead ----------------------------------------------------------------------------------------------

    def expect(
        self, coming: Sequence[np.ndarray], rank: int = 0, world_size: int = 1, idle_steps: int | None = None
    ) -> None:
        """Be told which samples come next; called once a step. Does not wait.

        `coming` are arrays of samples' numbers, and this process reads every world_size-th of each, from the rank-th
        on: their chunks are fetched ahead. Chunks that were last needed more than `idle_steps` steps ago, by default
        IDLE_STEPS, are removed.
        """
        self.step += 1
        if idle_steps is None:
            idle_steps = IDLE_STEPS
        needed = np.unique(self.chunk_of(np.concatenate(coming)))
        self.last_needed |= dict.fromkeys(needed.tolist(), self.step)
        self._request(np.concatenate([part[rank::world_size] for part in coming]))
        for at in self.spool.chunks():
            if self.last_needed.get(at, 0) + idle_steps < self.step:
                self.last_needed.pop(at, None)
                self.spool.remove(at)

    def _request(self, numbers: np.ndarray) -> None:
        """Have the chunks of samples fetched by threads, in the order in which they are needed."""
        chunks, first = np.unique(self.chunk_of(numbers), return_index=True)
        for at in chunks[np.argsort(first)].tolist():
            if at not in self.requested and not self.spool.holds(at):
                self.requested.add(at)
                self.requests.put(at)
        while len(self.threads) < FETCHING_THREADS:
            thread = threading.Thread(target=_fetch_ahead, args=(weakref.ref(self), self.requests), daemon=True)
            self.threads.append(thread)
            thread.start()


def _fetch_ahead(reference: weakref.ref, requests: queue.SimpleQueue) -> None:
    """The work of a thread: fetch the chunks that are put into a queue, until that is None."""
    while (at := requests.get()) is not None:
        source = reference()
        if source is None:
            return
        # Whatever goes wrong here, bugs included, whoever needs the chunk meets too: it fetches it again.
        with contextlib.suppress(Exception):
            source.fetch_chunk(at)
        source.requested.discard(at)
        # A thread that waits for the next request must not keep the source alive.
        del source


def _close(spool: Spool, requests: queue.SimpleQueue) -> None:
    """End the threads and leave the spool."""
    if spool.is_mine():
        for _ in range(FETCHING_THREADS):
            requests.put(None)
    spool.close()
