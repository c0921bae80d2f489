"""Writing files so that they are complete or absent, flushed, and readable as the umask says; and what a disk cannot
do of that."""

import errno
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from training_utils.base.console import warn

# By these a file system says that it never does a thing; other errors say that it failed this time. Folders are not
# flushed by old CIFS, AFS and vboxsf, and not renamed by gcsfuse (EMFILE) and by overlayfs from a lower layer (EXDEV).
CANNOT_FLUSH = {
    errno.EINVAL,
    errno.ENOSYS,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.EBADF,
    errno.EACCES,
    errno.EPERM,
    errno.EISDIR,
}
CANNOT_RENAME = {
    errno.EINVAL,
    errno.ENOSYS,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.EXDEV,
    errno.EMFILE,
    errno.EACCES,
    errno.EPERM,
}
LITTLE_SPACE = 2**30  # bytes left on a disk, below which a failure without a reason is put down to that

_said: set[tuple[str, int]] = set()  # what a disk, by its number, cannot do


def say_once(what: str, folder: Path, consequence: str) -> None:
    """Warn, once for a disk, that the one of `folder` cannot do `what`, and of the `consequence`."""
    key = (what, os.stat(folder).st_dev)
    if key not in _said:
        _said.add(key)
        warn(f"{folder} is on a disk that cannot {what}: {consequence}")


def flush(path: Path) -> None:
    """Have what was written to a file, or the names in a folder, reach the disk. Raises OSError where that fails; a
    disk that cannot do it at all is named once."""
    is_folder = path.is_dir()
    try:
        # Some network file systems flush a file only for who may write to it.
        descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in CANNOT_FLUSH:
            raise
        what = f"flush {'folders' if is_folder else 'files'} ({error.strerror})"
        consequence = "after a power cut, what was written last may be missing or damaged there"
        say_once(what, path if is_folder else path.parent, consequence)


def rename_folder(source: Path, target: Path) -> bool:
    """Rename a folder; returns whether the disk can do that, which is said once where it cannot. Raises OSError where
    it fails."""
    try:
        os.rename(source, target)
    except OSError as error:
        if error.errno not in CANNOT_RENAME:
            raise
        what = f"rename folders ({error.strerror})"
        say_once(what, source.parent, "their files are moved one by one, which takes longer")
        return False
    return True


def write_file(path: Path, content: bytes) -> None:
    """Write a file, complete or not at all, and flush it. Raises OSError."""
    unfinished = path.with_suffix(f".{uuid.uuid4().hex}.unfinished")
    try:
        unfinished.write_bytes(content)
        flush(unfinished)
        os.replace(unfinished, path)
    except OSError:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise


def follow_umask(paths: Iterable[Path]) -> None:
    """Give files the permissions of new ones in their folders: safetensors writes files that only their owner may
    read. Where the disk refuses, they stay as they are."""
    modes: dict[Path, int] = {}
    for path in paths:
        with suppress(OSError):
            if path.parent not in modes:
                modes[path.parent] = _mode_of_new_file(path.parent)
            path.chmod(modes[path.parent])


def _mode_of_new_file(folder: Path) -> int:
    """The permissions that a new file gets in a folder: by the umask or, where there is one, the folder's default
    ACL. Raises OSError."""
    path = folder / f".{uuid.uuid4().hex}.unfinished"
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        return stat.S_IMODE(os.fstat(descriptor).st_mode)
    finally:
        os.close(descriptor)
        path.unlink()


ADVICE = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room within your quota",
    errno.EACCES: "give this user the permission to write there",
    errno.EPERM: "give this user the permission to write there",
    errno.EROFS: "have that disk mounted for writing",
    errno.ENAMETOOLONG: "give a shorter path",
    errno.EFBIG: "see that files may be that large there (`ulimit -f`, or a limit of that disk)",
    errno.EMFILE: "raise the limit of open files (`ulimit -n`)",
    errno.ENFILE: "raise the limit of open files (`ulimit -n`)",
    errno.ENOENT: "see that the folder is still there",
    errno.ENOTDIR: "see that the folder is still there",
    errno.ENOMEM: "free host memory",
    **dict.fromkeys(
        (errno.EIO, errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN),
        "see that the disk works and is still connected",
    ),
}


def advice_for(error: BaseException, folder: str | Path) -> str:
    """What to do about an `error` by which something could not be written into `folder`, as an imperative."""
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, MemoryError):
        number = errno.ENOMEM
    # As Python's exceptions have it in their text, and safetensors' do.
    found = re.search(r"\[Errno (\d+)\]|\(os error (\d+)\)", str(error))
    if number is None and found:
        number = int(found[1] or found[2])
    if number is None and isinstance(error, RuntimeError):
        # torch.save gives no reason.
        with suppress(OSError):
            number = errno.ENOSPC if shutil.disk_usage(folder).free < LITTLE_SPACE else None
    return "fix that" if number is None else ADVICE.get(number, "fix that")
