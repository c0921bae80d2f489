"""The spool: a folder on this disk with the chunks that are needed now.

Locks are files that a process holds through `filelock`. They are released when a process ends, however that happens,
and a forked data worker does not inherit them.
"""

import contextlib
import os
import platform
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
from filelock import FileLock, Timeout

from training_utils.base import files
from training_utils.base.errors import UserError, reason_of

POLL_SECONDS = 0.01  # between two attempts to take a lock that another process or thread holds


def locked(path: Path) -> FileLock:
    """A context within which no other process or thread is in one for the same path. Raises OSError.

    A thread that is in one may enter another: a source that the garbage collector finds may close its spool while
    another spool is made.
    """
    return FileLock(path, poll_interval=POLL_SECONDS, is_singleton=True)


class Spool:
    """A folder of chunks that the processes of one launch on this machine share.

    Each of them holds a lock file of its own in the folder. The last process to leave removes the folder; where all
    of them were killed, the next run does.
    """

    def __init__(self, root: Path, identity: str) -> None:
        """`root` is the folder for all spools, `identity` tells the dataset. Raises UserError."""
        machine = platform.node()
        launched = os.environ.get("WORLD_SIZE", "1") != "1"
        run = os.getppid() if launched else os.getpid()
        self.root = Path(root)
        self.owner = os.getpid()
        self.folder = self.root / f"spool-{machine}-{run}-{identity[:8]}"
        self.in_use = FileLock(self.folder / f"in-use-{uuid.uuid4().hex}", thread_local=False)
        try:
            with locked(self.root / "lock"):
                for folder in self.root.glob(f"spool-{machine}-*"):
                    _remove_unused(folder)
                self.folder.mkdir(exist_ok=True)
                self.in_use.acquire()
        except OSError as error:
            raise cannot_be_kept(self.root, error, exit_code=2) from error

    def __getstate__(self) -> dict[str, Any]:
        # A data worker that is not a fork reads and fetches chunks; the folder is not its own to remove.
        return {"folder": self.folder, "owner": None}

    def is_mine(self) -> bool:
        """Whether this is the process that made it, and not one of its data workers."""
        return os.getpid() == self.owner

    def chunks(self) -> list[int]:
        """The numbers of the chunks that are there."""
        return [int(path.stem) for path in self.folder.glob("*.arrow")]

    def holds(self, chunk: int) -> bool:
        """Whether a chunk is there."""
        return self._path(chunk).exists()

    def read(self, chunk: int, row: int, column: str) -> Any:
        """What a row of a chunk has in a column. Raises FileNotFoundError where the chunk is not there."""
        # Mapped again for each row: a chunk that stayed mapped would take room on the disk after it was removed.
        with pyarrow.memory_map(str(self._path(chunk))) as file:
            return pyarrow.ipc.open_file(file).get_batch(0)[column][row].as_py()

    @contextlib.contextmanager
    def fetching(self, chunk: int) -> Iterator[None]:
        """A context for the process or thread that fetches a chunk; others wait for it. Raises UserError."""
        lock = locked(self._path(chunk).with_suffix(".lock"))
        try:
            # The lock would make the folder again, which may have been removed while a thread still fetched ahead.
            self.folder.stat()
            lock.acquire()
        except OSError as error:
            raise cannot_be_kept(self.folder, error) from error
        try:
            yield
        finally:
            lock.release()

    def write(self, chunk: int, batch: pyarrow.RecordBatch) -> None:
        """Put a chunk into the folder, complete or not at all. Raises UserError."""
        path = self._path(chunk)
        unfinished = path.with_suffix(f".{uuid.uuid4().hex}.unfinished")
        try:
            with pyarrow.OSFile(str(unfinished), "wb") as file, pyarrow.ipc.new_file(file, batch.schema) as writer:
                writer.write_batch(batch)
            os.replace(unfinished, path)
        except OSError as error:
            with contextlib.suppress(OSError):
                unfinished.unlink(missing_ok=True)
            raise cannot_be_kept(self.folder, error) from error

    def remove(self, chunk: int) -> None:
        """Remove a chunk, if it is there."""
        self._path(chunk).unlink(missing_ok=True)

    def close(self) -> None:
        """Leave the folder, and remove it where no other process uses it."""
        if not self.is_mine() or not self.in_use.is_locked:
            return
        with contextlib.suppress(OSError), locked(self.root / "lock"):
            self.in_use.release()
            _remove_unused(self.folder)

    def _path(self, chunk: int) -> Path:
        return self.folder / f"{chunk}.arrow"


def _remove_unused(folder: Path) -> None:
    """Remove a spool that no process uses any more. `root`'s lock must be held."""
    if any(_is_held(path) for path in folder.glob("in-use*")):
        return
    aside = folder.with_name(f"{folder.name}-{uuid.uuid4().hex}")
    # In two steps, so that a thread that still fetches ahead finds no folder.
    with contextlib.suppress(OSError):
        folder.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)


def _is_held(path: Path) -> bool:
    """Whether some process holds the lock of a file, or may hold it."""
    try:
        with FileLock(path, blocking=False):
            return False
    except (Timeout, OSError):
        return True


def cannot_be_kept(folder: Path, error: OSError, exit_code: int = 1) -> UserError:
    """The error of a folder for chunks that cannot be written."""
    return UserError(
        f"the chunks of a stream cannot be kept in {folder} ({reason_of(error)}); "
        f"{files.advice_for(error, folder)}, or name another folder with --cache_dir",
        exit_code,
    )
