"""Files of a stream and the chunks in which they are fetched."""

import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pyarrow

from training_utils.base.errors import UserError
from training_utils.data.left_out import LeftOut

# Neighbours that are smaller together are fetched together, in bytes. Only a row group or one sample may be larger.
CHUNK_BYTES = 2**26


class File(NamedTuple):
    """A shard or a table: its address, its size in bytes, and what changes with its content.

    A tuple, because its JSON is part of the names under which listings are remembered.
    """

    url: str
    size: int
    version: str

    @property
    def shown(self) -> str:
        """What to call it in a message."""
        return shown_url(self.url)


class Chunk(NamedTuple):
    """Samples of a file that are fetched in one go.

    `file` is the number of the file; `begin` to `end` are bytes of a shard or row groups of a table; `rows` is how
    many samples that is; `first` is the number of the first one in the file; `bytes` is about how large it is.

    A tuple, because its JSON is part of a dataset's fingerprint.
    """

    file: int
    begin: int
    end: int
    rows: int
    first: int
    bytes: int


@dataclass
class ChunkContent:
    """What was fetched of a chunk, one entry for each sample.

    `images` is an Arrow array of bytes. `captions` are JSON, a list that holds the value alone, or a string that says
    why there is none; None where captions are not read. `names` are those of members of a shard; None for a table.
    """

    images: pyarrow.Array
    captions: list[str] | None
    names: list[str] | None

    def record_batch(self) -> pyarrow.RecordBatch:
        """The columns `image`, `caption` and `name`."""
        captions = self._strings(self.captions)
        names = self._strings(self.names)
        return pyarrow.record_batch([self.images, captions, names], names=["image", "caption", "name"])

    def _strings(self, values: list[str] | None) -> pyarrow.Array:
        kind = pyarrow.string()
        return pyarrow.array(values, kind) if values else pyarrow.nulls(len(self.images), kind)


@dataclass
class Apart:
    """What of a chunk's samples lies in other chunks of a shard.

    `captions` are the contents of their caption files there, a byte a character, by the name of the member; `replaced`
    are the bytes of the shard at which images begin that a later member replaces.
    """

    captions: dict[str, str] = field(default_factory=dict)
    replaced: list[int] = field(default_factory=list)


@dataclass
class Listing:
    """What is known of a file before the run.

    `chunks` are lists [begin, end, rows, bytes], `images` is how many images the file has, `uncaptioned` are the names
    of those without a caption, `left_out` is what else it holds. `apart` has, by the `begin` of a chunk, what of its
    samples lies elsewhere.
    """

    chunks: list[list[int]] = field(default_factory=list)
    images: int = 0
    uncaptioned: list[str] = field(default_factory=list)
    left_out: LeftOut = field(default_factory=LeftOut)
    apart: dict[int, Apart] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """What is remembered for later runs. The keys are a file format."""
        return {
            "chunks": self.chunks,
            "pictures": self.images,
            "unnamed": self.uncaptioned,
            "left_out": self.left_out.as_json(),
            "apart": {str(begin): [elsewhere.captions, elsewhere.replaced] for begin, elsewhere in self.apart.items()},
        }

    @classmethod
    def from_json(cls, facts: dict[str, Any]) -> "Listing":
        """Raises KeyError, TypeError or ValueError for something else than `as_json` makes."""
        return cls(
            chunks=facts["chunks"],
            images=facts["pictures"],
            uncaptioned=facts["unnamed"],
            # Neither is in those of earlier releases.
            left_out=LeftOut.from_json(facts.get("left_out", [{}, {}])),
            apart={int(begin): Apart(*elsewhere) for begin, elsewhere in facts.get("apart", {}).items()},
        )


def shown_url(url: str) -> str:
    """An address as messages show it: without the commit of a repository of the hub."""
    return re.sub(r"^hf://datasets/([^@]+)@[^/]+/", r"\1/", url)


def shown_bytes(size: float) -> str:
    """A number of bytes as text."""
    return f"{size / 1e9:.3g} GB" if size >= 1e9 else f"{size / 1e6:.3g} MB"


def changed_file(file: File, found: int, expected: int) -> UserError:
    """The error of a file in whose chunk other samples are found than were listed."""
    return UserError(
        f"{file.shown} has changed since the run began: {found} samples where {expected} were; start again with "
        "--resume_from_checkpoint latest",
        exit_code=1,
    )
