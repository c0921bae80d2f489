"""Tar shards of a stream: walked along for their listing, and fetched by chunks."""

import io
import json
import os
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import pyarrow

from training_utils.base.errors import UserError
from training_utils.data import tar
from training_utils.data.caption_files import (
    CaptionFiles,
    FoundCaption,
    first_caption,
    read_caption,
)
from training_utils.data.files import IMAGE_ENDINGS
from training_utils.data.streaming import chunks, remote
from training_utils.data.streaming.chunks import Apart, Chunk, ChunkContent, File, Listing


def list_shard(file: File, *, captioned: bool) -> Listing:
    """Walk along the headers of a shard. With `captioned`, images without a caption are left out, and captions that
    do not lie beside their image are read. Raises UserError."""
    walk = _Walk(file, captioned)
    malformed: list[str] = []
    for member, content in tar.members(file.shown, malformed, captioned, remote.RemoteFile(file, walked=True)):
        walk.add(member, content)
    walk.end_chunk()
    if malformed:
        raise UserError(malformed[0])
    return walk.listing()


class _Image(NamedTuple):
    """An image of a shard: its chunk, the name of its member, and the byte at which that begins."""

    chunk: int
    name: str
    begin: int


@dataclass
class _CaptionFile:
    """A caption file of a shard: its chunk, the name of its member, where its content lies, and the content, as long
    as it may be needed."""

    chunk: int
    name: str
    begin: int
    size: int
    content: bytes | None


@dataclass
class _Walk:
    """Divides the members of a shard into chunks. A chunk begins at the byte `begin` and ends, until now, at `end`."""

    file: File
    captioned: bool
    ranges: list[tuple[int, int]] = field(default_factory=list)  # of the chunks that ended
    images: dict[str, _Image] = field(default_factory=dict)  # by name; a later one replaces an earlier one
    captions: CaptionFiles[_CaptionFile] = field(default_factory=CaptionFiles)
    replaced: list[_Image] = field(default_factory=list)
    names: list[str] = field(default_factory=list)  # of the images of this chunk
    sample: str | None = None
    begin: int = 0
    end: int = 0

    def add(self, member: tarfile.TarInfo, content: bytes | None) -> None:
        """Take the next member, with its content where that is a caption."""
        name = tar.unpacked_name(member.name)
        stem, ending = os.path.splitext(name)
        if stem != self.sample and member.offset - self.begin >= chunks.CHUNK_BYTES:
            self.end_chunk()
            self.begin = member.offset
        self.sample = stem
        self.end = member.offset_data + _padded(member.size)
        chunk = len(self.ranges)
        if ending.lower() in IMAGE_ENDINGS:
            if name in self.images:
                self.replaced.append(self.images.pop(name))
            self.images[name] = _Image(chunk, member.name, member.offset)
            self.names.append(name)
        elif content is not None:
            beside = _CaptionFile(chunk, member.name, member.offset_data, member.size, content)
            self.captions.add(stem, ending, beside)

    def end_chunk(self) -> None:
        """End the chunk. The contents of captions that lie in the chunk of their image are let go."""
        for name in self.names:
            for caption in self.captions.of(os.path.splitext(name)[0]):
                if caption.chunk == len(self.ranges):
                    caption.content = None
        self.names.clear()
        self.ranges.append((self.begin, self.end))

    def listing(self) -> Listing:
        """What the shard holds."""
        listing = Listing(images=len(self.images))
        rows = [0] * len(self.ranges)
        apart = [Apart() for _ in self.ranges]
        for image in self.replaced:
            apart[image.chunk].replaced.append(image.begin)
        for name, image in self.images.items():
            beside = self.captions.of(os.path.splitext(name)[0])
            if self.captioned and not beside:
                listing.uncaptioned.append(f"{self.file.shown}/{image.name}")
                continue
            rows[image.chunk] += 1
            for caption in beside:
                if caption.chunk != image.chunk:
                    apart[image.chunk].captions[caption.name] = self._content(caption)
        for (begin, end), count, elsewhere in zip(self.ranges, rows, apart):
            if count:
                listing.chunks.append([begin, end, count, end - begin])
                if elsewhere.captions or elsewhere.replaced:
                    listing.apart[begin] = elsewhere
        return listing

    def _content(self, caption: _CaptionFile) -> str:
        """The content of a caption file, a byte a character."""
        content = caption.content
        if content is None:  # that of an image that was replaced in a later chunk
            content = remote.read_bytes(self.file, caption.begin, caption.begin + caption.size)
        return content.decode("latin-1")


def _padded(size: int) -> int:
    """The bytes that a content takes in a tar file, which has complete blocks."""
    return -(-size // tar.BLOCK) * tar.BLOCK


def fetch_from_shard(
    file: File, chunk: Chunk, *, caption_column: str | None, apart: Mapping[tuple[str, int], Apart]
) -> ChunkContent:
    """Fetch a chunk of a shard. `apart` has, by the file's address and the byte at which a chunk begins, what of its
    samples lies elsewhere. Raises UserError."""
    content = remote.read_bytes(file, chunk.begin, chunk.end)
    elsewhere = apart.get((file.url, chunk.begin), Apart())
    replaced = {begin - chunk.begin for begin in elsewhere.replaced}
    end_of_shard = bytes(2 * tar.BLOCK)
    shard = io.BytesIO(content + end_of_shard)
    images: dict[str, tuple[str, bytes]] = {}
    captions: CaptionFiles[FoundCaption] = CaptionFiles()
    malformed: list[str] = []

    def add_caption(member: str, text: bytes, column: str) -> None:
        stem, ending = os.path.splitext(tar.unpacked_name(member))
        captions.add(stem, ending, read_caption(os.path.basename(member), ending, text, column))

    for member, text in tar.members(file.shown, malformed, caption_column is not None, shard):
        name = tar.unpacked_name(member.name)
        if os.path.splitext(name)[1].lower() in IMAGE_ENDINGS:
            if member.offset not in replaced:
                images.pop(name, None)
                images[name] = (member.name, content[member.offset_data : member.offset_data + member.size])
        elif text is not None and caption_column is not None:
            add_caption(member.name, text, caption_column)
    if malformed:
        raise UserError(malformed[0], exit_code=1)
    if caption_column is not None:
        for member_name, characters in elsewhere.captions.items():
            add_caption(member_name, characters.encode("latin-1"), caption_column)
    found = {name: first_caption(captions.of(os.path.splitext(name)[0])) for name in images}
    usable = [name for name in images if caption_column is None or found[name] is not None]
    return ChunkContent(
        images=pyarrow.array([images[name][1] for name in usable], pyarrow.large_binary()),
        captions=None if caption_column is None else [_as_json(found[name]) for name in usable],
        names=[images[name][0].encode(errors="backslashreplace").decode() for name in usable],
    )


def _as_json(found: FoundCaption | None) -> str:
    """A caption as ChunkContent has it."""
    assert found is not None
    return json.dumps(found.sentence() or [found.value])
