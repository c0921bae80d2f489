"""Entries by key in memory-mapped shards on disk, complete or absent."""

import contextlib
import hashlib
import json
import os
import time
import uuid
import zlib
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from training_utils.base.console import warn
from training_utils.base.errors import UserError, reason_of

FORMAT = 1  # part of every store's identity; raise it when an entry's meaning changes

SHARD_BYTES, SHARD_SECONDS = 2**27, 60  # a shard is written when either is reached: what a kill can cost

ABANDONED = 3600  # seconds after which a shard that was never finished is taken away


def _pack(array, kind):
    """A float32 array in the type that its values came from, which loses nothing; bfloat16 as its bits."""
    if kind == "bfloat16":
        return (array.view(np.uint32) >> 16).astype(np.uint16)
    return array.astype(kind)


def _unpack(array, kind):
    if kind == "bfloat16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32, copy=False)


def network_digest(words, config, parameters):
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
