"""Tar shards of a stream: walked along for their listing, and fetched by chunks."""

import io
import json
import os
from dataclasses import dataclass, field

import pyarrow

from training_utils.base.errors import UserError
from training_utils.data import files, tar
from training_utils.data.left_out import LeftOut
from training_utils.data.streaming import chunks, remote
from training_utils.data.streaming.chunks import Chunk, ChunkContent, File, Listing


def list_shard(file: File, *, captioned: bool) -> Listing:
    """Walk along the headers of a shard. With `captioned`, images without a caption are left out. Raises UserError."""
    walk = _Walk(file, captioned)
    malformed: list[str] = []
    remote_file = remote.RemoteFile(file, walked=True)
    for member in tar.members(file.shown, malformed, walk.listing.left_out, False, remote_file):
        walk.add(member)
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

    def add(self, member: tar.Member) -> None:
        """Take the next member."""
        stem = member.stem
        if stem != self.sample and member.begin - self.begin >= chunks.CHUNK_BYTES:
            self.end_chunk()
            self.begin = member.begin
        self.sample = stem
        self.end = member.end
        if member.offset < self.begin:  # a link out of the chunk, which is all that is fetched
            self.listing.left_out.add("shard link", f"{self.file.shown}/{member.name}")
        elif files.is_image(member.name):
            self.images.append((member.name, stem))
        else:
            self.captions.add(stem)

    def end_chunk(self) -> None:
        """Put the chunk into the listing, if it has a sample."""
        uncaptioned = []
        if self.captioned:
            uncaptioned = [name for name, stem in self.images if stem not in self.captions]
            for stem in sorted(self.captions - {stem for _, stem in self.images}):
                self.listing.left_out.add("caption", f"{self.file.shown}/{stem}")
        rows = len(self.images) - len(uncaptioned)
        if rows:
            self.listing.chunks.append([self.begin, self.end, rows, self.end - self.begin])
        self.listing.images += len(self.images)
        self.listing.uncaptioned += [f"{self.file.shown}/{name}" for name in uncaptioned]
        self.images.clear()
        self.captions.clear()


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
    for member in tar.members(file.shown, malformed, LeftOut(), captions is not None, shard):
        if files.is_image(member.name):
            image = content[member.offset : member.offset + member.size]
            images.append((member.name, member.stem, image))
        elif member.text is not None and captions is not None:
            where = os.path.basename(member.name)
            captions.add(where, member.stem, files.ending_of(member.name), member.text)
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
