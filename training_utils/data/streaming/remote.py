"""Files read from elsewhere: over the network, by ranges of bytes, tried again when that fails."""

import io
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from training_utils.base.console import warn
from training_utils.base.errors import UserError, reason_of
from training_utils.base.hub_errors import hub_reason
from training_utils.data.streaming.chunks import File, shown_url

RETRY_SECONDS = (1, 2, 4, 8, 16)  # between attempts to read; the hub's client has its own attempts within each
MIN_READ_BYTES = 2**18  # what lies nearer together is read by one request, since a request takes its time too
MAX_READ_BYTES = 2**23  # read at once of a shard whose images are so small that skipping one is not worth a request

FINAL_STATUS = (401, 403, 404, 410, 416)  # HTTP: trying again would change nothing

# What the libraries with which fsspec reads other servers than the hub raise beside OSError: (module, class).
OTHER_NETWORK_ERRORS = (
    ("aiohttp", "ClientError"),
    ("botocore.exceptions", "BotoCoreError"),
    ("gcsfs.retry", "HttpError"),
)

Result = TypeVar("Result")


def find_file(url: str) -> File:
    """The File at an address. Raises UserError."""
    files, path = _file_system(url)

    def describe() -> File:
        facts = files.info(path)
        version = facts.get("blob_id") or facts.get("ETag") or facts.get("mtime")
        return File(url, facts["size"], str(version))

    return with_retries(describe, shown_url(url))


def read_bytes(file: File, begin: int, end: int) -> bytes:
    """The bytes of a File from `begin` to before `end`, by one request. Raises UserError."""
    files, path = _file_system(file.url)

    def read() -> bytes:
        content = files.cat_file(path, begin, end, cache_type="none")
        if len(content) != end - begin:
            raise OSError(f"received {len(content)} bytes instead of {end - begin}")
        return content

    return with_retries(read, file.shown)


def _file_system(url: str) -> tuple:
    """fsspec's file system for an address, and the path in it. Raises UserError."""
    import fsspec

    if os.path.isabs(url):
        # Its name may hold what would be part of a URL.
        return fsspec.filesystem("file"), url
    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError, OSError) as error:
        # A protocol that fsspec does not know, or whose library is not installed.
        raise UserError(f"{shown_url(url)} cannot be read: {reason_of(error)}", exit_code=1) from error


def with_retries(read: Callable[[], Result], shown: str) -> Result:
    """`read()`, tried again when it fails for a reason that may pass. Raises UserError, which names `shown`."""
    for wait in (*RETRY_SECONDS, None):
        try:
            return read()
        except network_errors() as error:
            reason = hub_reason(error)
            if wait is None or _is_final(error):
                raise UserError(f"{shown} cannot be read: {reason}", exit_code=1) from error
        warn(f"{shown} cannot be read ({reason}); trying again in {wait} s")
        time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def network_errors() -> tuple[type[Exception], ...]:
    """What reading a file raises when the disk, the network or a server fails."""
    from huggingface_hub import errors

    # HfHubHTTPError derives from the base class of the transport's errors, whichever library that is.
    kinds = [OSError, *errors.HfHubHTTPError.__bases__, errors.HFValidationError]
    for module, name in OTHER_NETWORK_ERRORS:
        # A library that raised an error has been imported.
        if module in sys.modules:
            kinds.append(getattr(sys.modules[module], name))
    return tuple(kinds)


def _is_final(error: Exception) -> bool:
    """Whether trying again would change nothing."""
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    return isinstance(error, (FileNotFoundError, PermissionError)) or status in FINAL_STATUS


class RemoteFile(io.RawIOBase):
    """A File, opened for reading.

    `parts` are what is here already of it, (begin, bytes); what is not is fetched. For a file that is `walked` along,
    at least MIN_READ_BYTES are fetched at once, and more while little is skipped.
    """

    def __init__(self, file: File, parts: Sequence[tuple[int, bytes]] = (), walked: bool = False) -> None:
        self.file = file
        self.parts = parts
        self.read_ahead = MIN_READ_BYTES if walked else 0
        self.at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = max(0, offset + (0, self.at, self.file.size)[whence])
        return self.at

    def readinto(self, buffer: Any) -> int:
        end = min(self.at + len(buffer), self.file.size)
        if end <= self.at:
            return 0
        content = self._between(self.at, end)
        buffer[: len(content)] = content
        self.at = end
        return len(content)

    def _between(self, begin: int, end: int) -> memoryview | bytes:
        for start, content in self.parts:
            if start <= begin and end <= start + len(content):
                return memoryview(content)[begin - start : end - start]
        if not self.read_ahead:
            return read_bytes(self.file, begin, end)
        if self.parts:
            self._adapt_read_ahead(begin)
        content = read_bytes(self.file, begin, min(max(end, begin + self.read_ahead), self.file.size))
        self.parts = [(begin, content)]
        return content[: end - begin]

    def _adapt_read_ahead(self, begin: int) -> None:
        """Read more at once while little is skipped between one read and the next, which starts at `begin`."""
        start, content = self.parts[0]
        skipped = begin - start - len(content)
        if 0 <= skipped < self.read_ahead:
            self.read_ahead = min(2 * self.read_ahead, MAX_READ_BYTES)
        else:
            self.read_ahead = MIN_READ_BYTES
