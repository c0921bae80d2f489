"""Images inside tar files, in WebDataset's layout: read where they lie, without anything being unpacked.

Where an image lies is a string, so that it can stand where the path of a file does: shard, member, offset and size,
separated by zero bytes, which no path can hold. It is called a member path here.
"""

import io
import os
import posixpath
import tarfile
from collections.abc import Iterator
from typing import IO, Any

from training_utils.base.errors import reason_of
from training_utils.data.caption_files import (
    CaptionFiles,
    FoundCaption,
    first_caption,
    is_caption_ending,
    read_caption,
)
from training_utils.data.files import HIDDEN_PREFIXES, IMAGE_ENDINGS

BLOCK = 512  # bytes; headers and contents fill complete blocks, and a block of zeros ends the file


def is_member_path(path: Any) -> bool:
    """Whether a string is the path of a shard's member."""
    parts = path.split("\0") if isinstance(path, str) else []
    return len(parts) == 4 and all(number.isascii() and number.isdigit() for number in parts[2:])


def display_name(path: str) -> str:
    """A path as it is shown: of a member, the shard's path and then the member's name."""
    return "/".join(path.split("\0")[:2]) if is_member_path(path) else path


def size(path: str) -> int:
    """The size of a member in bytes."""
    return int(path.split("\0")[3])


def read(path: str) -> bytes:
    """The bytes of a member. Raises OSError."""
    with open_member(path) as file:
        return file.read()


def open_member(path: str) -> io.BufferedReader:
    """A member as a file for reading; no more of it is read than is asked for. Raises OSError."""
    return io.BufferedReader(_Member(path))


class _Member(io.RawIOBase):
    def __init__(self, path: str) -> None:
        shard, _, offset, length = path.split("\0")
        self.start = int(offset)
        self.length = int(length)
        self.at = 0
        self.file = open(shard, "rb", buffering=0)  # noqa: SIM115 (`close` comes when this is let go)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        begin = (0, self.at, self.length)[whence]
        self.at = max(0, begin + offset)
        return self.at

    def readinto(self, buffer: Any) -> int:
        self.file.seek(self.start + self.at)
        count = self.file.readinto(memoryview(buffer)[: max(0, self.length - self.at)])
        self.at += count
        return count

    def close(self) -> None:
        if hasattr(self, "file"):  # there is none where the shard could not be opened
            self.file.close()
        super().close()


def index_shard(shard: str, caption_column: str | None, malformed: list[str]) -> list[tuple[str, FoundCaption | None]]:
    """(member path, what its caption files hold) of each image of a shard, in its order; None where an image has no
    caption file, and "" for all with `caption_column` None. What is wrong with the shard is added to `malformed`.

    A later member replaces an earlier one of the same name, as when the shard is unpacked; tar's -r and -u add such.
    """
    images: dict[str, str] = {}
    captions: CaptionFiles[FoundCaption] = CaptionFiles()
    for member, content in members(shard, malformed, with_texts=caption_column is not None):
        name = unpacked_name(member.name)
        stem, ending = os.path.splitext(name)
        if ending.lower() in IMAGE_ENDINGS:
            images.pop(name, None)  # it has the place of the later one
            images[name] = f"{shard}\0{member.name}\0{member.offset_data}\0{member.size}"
        elif content is not None and caption_column is not None:
            captions.add(stem, ending, read_caption(f"{shard}/{member.name}", ending, content, caption_column))
    if caption_column is None:
        return [(path, FoundCaption("")) for path in images.values()]
    return [(path, first_caption(captions.of(os.path.splitext(name)[0]))) for name, path in images.items()]


def unpacked_name(name: str) -> str:
    """The path, inside the folder into which a shard is unpacked, of the member with this name."""
    return posixpath.normpath(name).lstrip("/")


def members(
    shard: str, malformed: list[str], with_texts: bool = True, file: IO[bytes] | io.RawIOBase | None = None
) -> Iterator[tuple[tarfile.TarInfo, bytes | None]]:
    """(tarfile.TarInfo, content) of each file in a shard that is not hidden, in its order; the content of texts
    alone, else None.

    `file` is the shard's content, opened, where it does not lie on this disk. What is wrong with the shard is added
    to `malformed`.
    """
    last = "its beginning"
    try:
        with tarfile.open(shard, "r:", file) as tar:
            for member in tar:
                last = f"member {member.name}"
                if not _is_hidden(member.name) and member.isfile() and member.sparse is None:
                    is_text = with_texts and is_caption_ending(os.path.splitext(member.name)[1])
                    text = tar.extractfile(member) if is_text else None
                    yield member, None if text is None else text.read()
            tar.fileobj.seek(tar.offset)
            end = tar.fileobj.read(BLOCK)
            if end != bytes(BLOCK):  # tarfile itself takes whatever it finds there for the end
                what = "is damaged" if len(end) == BLOCK else "is cut off"
                malformed.append(f"{shard} {what} after {last}; fetch it or write it again")
    except (tarfile.TarError, OSError, ValueError) as error:
        malformed.append(f"{shard} cannot be read as a tar file after {last}: {reason_of(error)}")


def _is_hidden(name: str) -> bool:
    """As for files in a folder; macOS puts a ._000.jpg beside every 000.jpg."""
    return any(part.startswith(HIDDEN_PREFIXES) and part != "." for part in name.split("/"))
