"""Entries by key in memory-mapped shards on disk, complete or absent."""

import contextlib
import hashlib
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from training_utils.base import files
from training_utils.base.console import warn
from training_utils.base.errors import UserError, reason_of
from training_utils.cache import shard
from training_utils.cache.shard import Encoded, ShardHeader

FORMAT = 1  # part of every store's identity; raise it when an entry's meaning changes

ABANDONED_SECONDS = 3600  # the age at which a shard that was never finished is removed


class Location(NamedTuple):
    """Where an entry lies: a shard, and the row in its arrays."""

    path: Path
    row: int


def network_digest(
    words: list[str], config: dict[str, Any], parameters: Iterable[tuple[str, Any, Iterable[int], Any]]
) -> str:
    """SHA-256 of a network: `words` that tell its kind, its configuration, and for each parameter (name, type, shape,
    content as bytes)."""
    facts = {name: value for name, value in config.items() if not name.startswith("_")}
    facts.pop("transformers_version", None)
    result = hashlib.sha256(json.dumps([*words, facts], sort_keys=True, default=str).encode())
    for name, kind, shape, content in sorted(parameters, key=lambda parameter: parameter[0]):
        result.update(f"{name} {kind} {tuple(shape)}".encode())
        result.update(content)
    return result.hexdigest()


class Store:
    """Entries by key in a folder. An entry is a dict of float32 arrays, each stored in the type it was computed in.

    `identity` is whatever JSON can hold that tells the networks and settings apart; it chooses the folder in `root`.
    """

    def __init__(self, root: str | Path, kind: str, identity: Any) -> None:
        words = json.dumps([FORMAT, identity], sort_keys=True)
        self.folder = Path(root) / f"{kind}-{hashlib.sha256(words.encode()).hexdigest()[:16]}"
        self.forget()

    def __getstate__(self) -> dict[str, Any]:
        # Another process maps the files itself.
        return self.__dict__ | {"_mapped": {}}

    def __contains__(self, key: str) -> bool:
        return key in self.locations

    def forget(self) -> None:
        """Know of no entry, as before the first `refresh`."""
        self.locations: dict[str, Location] = {}
        self.headers: dict[Path, ShardHeader] = {}
        self._mapped: dict[Path, Any] = {}

    def make_folder(self) -> None:
        """Raises UserError where the folder cannot be made."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._cannot_be_written(error, exit_code=2) from error

    def refresh(self) -> None:
        """Find the shards that are there now; each header is read once, and damaged shards are removed. Raises
        UserError."""
        headers = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            header = self.headers.get(path) or shard.read_header(path)
            if header is None:
                self.remove_damaged(path)
            else:
                headers[path] = header
        self.headers = headers
        self.locations = {}
        for path, header in headers.items():
            for row, key in enumerate(header.keys):
                self.locations[key] = Location(path, row)

    def read(self, key: str) -> dict[str, np.ndarray]:
        """The entry of a key, float32 arrays. Raises UserError where its shard is no longer there."""
        path, row = self.locations[key]
        if path not in self._mapped:
            try:
                self._mapped[path] = safe_open(path, framework="np")
            except (OSError, SafetensorError) as error:  # removed or overwritten since the run began
                raise shard.cannot_be_read(path, error) from error
        mapped = self._mapped[path]
        kinds = self.headers[path].kinds
        return {name: shard.unpack(mapped.get_slice(name)[row], kind) for name, kind in kinds.items()}

    def write(self, keys: list[str], arrays: Encoded) -> None:
        """Add a shard with the entries of some keys, one row of the arrays each. Raises UserError."""
        try:
            shard.write_shard(self.folder, keys, arrays)
        except OSError as error:
            raise self._cannot_be_written(error, exit_code=1) from error

    def is_damaged(self, path: Path) -> bool:
        """Whether a shard's content is not what was written. Raises UserError where it cannot be opened."""
        return shard.is_content_damaged(path, self.headers[path])

    def remove_damaged(self, path: Path) -> None:
        """Remove a damaged shard; its entries are made again. Raises UserError."""
        warn(f"{path} is damaged; its entries are computed again", everywhere=True)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise self._cannot_be_written(error, exit_code=2) from error

    def remove_abandoned(self) -> None:
        """Remove what killed runs had begun to write."""
        for path in self.folder.glob("*.unfinished"):
            with contextlib.suppress(OSError):  # another run has just finished it
                if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
                    path.unlink(missing_ok=True)

    def _cannot_be_written(self, error: OSError, exit_code: int) -> UserError:
        return UserError(
            f"the cache in {self.folder} cannot be written ({reason_of(error)}); "
            f"{files.advice_for(error, self.folder)}, or name another folder with --encoding_cache_dir",
            exit_code,
            everywhere=False,
        )
