"""Tar shards of a stream: walked along for their listing, and fetched by chunks."""

import io
import json
import os
from dataclasses import dataclass, field

import pyarrow

from training_utils.base.errors import UserError
from training_utils.data import tar
from training_utils.data.files import IMAGE_ENDINGS
from training_utils.data.streaming import chunks, remote
from training_utils.data.streaming.chunks import Chunk, ChunkContent, File, Listing


def list_shard(file: File, *, captioned: bool) -> Listing:
    """Walk along the headers of a shard. With `captioned`, images without a caption are left out. Raises UserError."""
    walk = _Walk(file, captioned)
    malformed: list[str] = []
    for member, _ in tar.members(file.shown, malformed, False, remote.RemoteFile(file, walked=True)):
        walk.add(member.name, begin=member.offset, end=member.offset_data + _padded(member.size))
    walk.end_chunk()
    if malformed:
        raise UserError(malformed[0])
    return walk.listing


@dataclass
class _Walk:
    """Divides the members of a shard into chunks. A chunk begins at the byte `begin` and ends, until now, at `end`."""

    file: File
    captioned: bool
    listing: Listing = field(default_factory=Listing)
    images: list[tuple[str, str]] = field(default_factory=list)  # (name, name without ending) of this chunk's images
    captions: set[str] = field(default_factory=set)  # names without ending of this chunk's captions
    sample: str | None = None
    begin: int = 0
    end: int = 0

    def add(self, name: str, begin: int, end: int) -> None:
        """Take the next member, whose header begins at a byte and whose content ends before another one."""
        stem, ending = os.path.splitext(name)
        if stem != self.sample and begin - self.begin >= chunks.CHUNK_BYTES:
            self.end_chunk()
            self.begin = begin
        self.sample = stem
        self.end = end
        if ending.lower() in IMAGE_ENDINGS:
            self.images.append((name, stem))
        elif ending in tar.CAPTION_ENDINGS:
            self.captions.add(stem)

    def end_chunk(self) -> None:
        """Put the chunk into the listing, if it has a sample."""
        uncaptioned = []
        if self.captioned:
            uncaptioned = [name for name, stem in self.images if stem not in self.captions]
        rows = len(self.images) - len(uncaptioned)
        if rows:
            self.listing.chunks.append([self.begin, self.end, rows, self.end - self.begin])
        self.listing.images += len(self.images)
        self.listing.uncaptioned += [f"{self.file.shown}/{name}" for name in uncaptioned]
        self.images.clear()
        self.captions.clear()


def _padded(size: int) -> int:
    """The bytes that a content takes in a tar file, which has complete blocks."""
    return -(-size // tar.BLOCK) * tar.BLOCK


def fetch_from_shard(file: File, chunk: Chunk, *, caption_column: str | None) -> ChunkContent:
    """Fetch a chunk of a shard. Raises UserError.

    Members of a sample lie side by side, as in WebDataset's layout.
    """
    content = remote.read_bytes(file, chunk.begin, chunk.end)
    end_of_shard = bytes(2 * tar.BLOCK)
    shard = io.BytesIO(content + end_of_shard)
    images = []
    captions = None if caption_column is None else _Captions(caption_column)
    malformed: list[str] = []
    for member, text in tar.members(file.shown, malformed, captions is not None, shard):
        stem, ending = os.path.splitext(member.name)
        if ending.lower() in IMAGE_ENDINGS:
            image = content[member.offset_data : member.offset_data + member.size]
            images.append((member.name, stem, image))
        elif text is not None and captions is not None:
            captions.add(os.path.basename(member.name), stem, ending, text)
    if malformed:
        raise UserError(malformed[0], exit_code=1)
    if captions is not None:
        images = [image for image in images if image[1] in captions]
    names = [name.encode(errors="backslashreplace").decode() for name, _, _ in images]
    return ChunkContent(
        images=pyarrow.array([image for _, _, image in images], pyarrow.large_binary()),
        captions=None if captions is None else [captions.as_json(stem) for _, stem, _ in images],
        names=names,
    )


class _Captions:
    """The captions of a chunk's samples: `texts` by the sample's name, or in `faults` a sentence why there is none."""

    def __init__(self, column: str) -> None:
        self.column = column
        self.texts: dict[str, object] = {}
        self.faults: dict[str, str] = {}

    def add(self, where: str, stem: str, ending: str, content: bytes) -> None:
        """Take a member that holds a caption; `where` is what to call it."""
        fault = tar.read_caption(where, stem, ending, content, self.column, self.texts, self.faults)
        if fault is not None:
            self.faults[stem] = fault

    def __contains__(self, stem: str) -> bool:
        return stem in self.texts or stem in self.faults

    def as_json(self, stem: str) -> str:
        """As ChunkContent has it."""
        return json.dumps([self.texts[stem]] if stem in self.texts else self.faults[stem])
