"""A shard of a store: a safetensors file whose metadata says what it holds, with a checksum."""

import hashlib
import json
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from training_utils.base import files
from training_utils.base.errors import UserError, reason_of

# What networks make of several samples: {name: (name of the type it was computed in, float32 array (samples, ...))}.
Encoded = dict[str, tuple[str, np.ndarray]]


@dataclass(frozen=True)
class ShardHeader:
    """What a shard holds: the `keys` of its entries in order, for each array the type in which it was computed
    (`kinds`), and the CRC-32 of the arrays as they are stored."""

    keys: list[str]
    kinds: dict[str, str]
    crc32: int


def write_shard(folder: Path, keys: list[str], arrays: Encoded) -> Path:
    """Write a shard into a folder, complete or not at all. Its name is the hash of its header. Raises OSError."""
    packed = {name: np.ascontiguousarray(_pack(array, kind)) for name, (kind, array) in arrays.items()}
    kinds = {name: kind for name, (kind, _) in arrays.items()}
    header = ShardHeader(keys=keys, kinds=kinds, crc32=_crc32(packed))
    words = json.dumps(asdict(header), sort_keys=True)
    path = folder / f"{_name_of(words)}.safetensors"
    files.write_file(path, save(packed, {"about": words}))
    return path


def read_header(path: Path) -> ShardHeader | None:
    """What a shard's header says it holds, or None where the header is damaged. Raises UserError."""
    refuse_unreadable(path)
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError):
        return None
    words = metadata.get("about")
    if words is None or _name_of(words) != path.stem:
        return None
    return ShardHeader(**json.loads(words))


def is_content_damaged(path: Path, header: ShardHeader) -> bool:
    """Whether a shard's content is not what was written. Raises UserError."""
    refuse_unreadable(path)
    try:
        with safe_open(path, framework="np") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return True
    return _crc32(arrays) != header.crc32


def refuse_unreadable(path: Path) -> None:
    """Raises UserError for a file that exists and cannot be opened; safetensors would say that it does not exist."""
    try:
        open(path, "rb").close()
    except FileNotFoundError:
        pass
    except OSError as error:
        raise cannot_be_read(path, error) from error


def cannot_be_read(path: Path, error: Exception) -> UserError:
    """The error of a shard that cannot be read."""
    return UserError(f"{path} cannot be read ({reason_of(error)})", exit_code=1, everywhere=False)


def unpack(array: np.ndarray, kind: str) -> np.ndarray:
    """The float32 array that was stored as `array`; the inverse of `_pack`."""
    if kind == "bfloat16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32, copy=False)


def _pack(array: np.ndarray, kind: str) -> np.ndarray:
    """A float32 array in the type in which its values were computed, which loses nothing; bfloat16 as its bits."""
    if kind == "bfloat16":
        return (array.view(np.uint32) >> 16).astype(np.uint16)
    return array.astype(kind)


def stored_bytes(arrays: Encoded) -> int:
    """How many bytes arrays take in a shard; types other than float32 have two bytes."""
    return sum(array.nbytes // (1 if kind == "float32" else 2) for kind, array in arrays.values())


def _name_of(words: str) -> str:
    return hashlib.sha256(words.encode()).hexdigest()[:32]


def _crc32(arrays: dict[str, np.ndarray]) -> int:
    crc = 0
    for name in sorted(arrays):
        array = arrays[name]
        crc = zlib.crc32(f"{name} {array.dtype} {array.shape}".encode(), crc)
        crc = zlib.crc32(array.reshape(-1).view(np.uint8).data, crc)
    return crc
