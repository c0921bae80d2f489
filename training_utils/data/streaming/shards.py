"""Tar shards of a stream: walked along for their listing, and fetched by chunks."""

import io
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import pyarrow

from training_utils.base.errors import UserError
from training_utils.data import files, tar
from training_utils.data.caption_files import (
    CaptionFiles,
    FoundCaption,
    first_caption,
    read_caption,
)
from training_utils.data.left_out import LeftOut
from training_utils.data.streaming import chunks, remote
from training_utils.data.streaming.chunks import Apart, Chunk, ChunkContent, File, Listing


def list_shard(file: File, *, captioned: bool) -> Listing:
    """Walk along the headers of a shard. With `captioned`, images without a caption are left out, and captions that
    do not lie beside their image are read. Raises UserError."""
    walk = _Walk(file, captioned)
    malformed: list[str] = []
    remote_file = remote.RemoteFile(file, walked=True)
    for member in tar.members(file.shown, malformed, walk.left_out, captioned, remote_file):
        walk.add(member)
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
    left_out: LeftOut = field(default_factory=LeftOut)
    ranges: list[tuple[int, int]] = field(default_factory=list)  # of the chunks that ended
    images: dict[str, _Image] = field(default_factory=dict)  # by name; a later one replaces an earlier one
    captions: CaptionFiles[_CaptionFile] = field(default_factory=CaptionFiles)
    replaced: list[_Image] = field(default_factory=list)
    names: list[str] = field(default_factory=list)  # of the images of this chunk
    sample: str | None = None
    begin: int = 0
    end: int = 0

    def add(self, member: tar.Member) -> None:
        """Take the next member."""
        name = tar.unpacked_name(member.name)
        stem, ending = os.path.splitext(name)
        if stem != self.sample and member.begin - self.begin >= chunks.CHUNK_BYTES:
            self.end_chunk()
            self.begin = member.begin
        self.sample = stem
        self.end = member.end
        chunk = len(self.ranges)
        if member.offset < self.begin:  # a link out of the chunk, which is all that is fetched
            self.left_out.add("shard link", f"{self.file.shown}/{member.name}")
        elif files.is_image(name):
            if name in self.images:
                self.replaced.append(self.images.pop(name))
            self.images[name] = _Image(chunk, member.name, member.begin)
            self.names.append(name)
        elif member.text is not None:
            beside = _CaptionFile(chunk, member.name, member.offset, member.size, member.text)
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
        listing = Listing(images=len(self.images), left_out=self.left_out)
        for stem in self.captions.without_image(self.images):
            self.left_out.add("caption", f"{self.file.shown}/{stem}")
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

    for member in tar.members(file.shown, malformed, LeftOut(), caption_column is not None, shard):
        name = tar.unpacked_name(member.name)
        if files.is_image(name):
            if member.begin not in replaced:
                images.pop(name, None)
                images[name] = (member.name, content[member.offset : member.offset + member.size])
        elif member.text is not None and caption_column is not None:
            add_caption(member.name, member.text, caption_column)
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
