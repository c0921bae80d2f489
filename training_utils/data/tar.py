"""Images inside tar files, in WebDataset's layout: read where they lie, without anything being unpacked.

Where an image lies is a string, so that it can stand where the path of a file does: shard, member, offset and size,
separated by zero bytes, which no path can hold. It is called a member path here.
"""

import io
import os
import posixpath
import tarfile
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

from training_utils.base.errors import reason_of
from training_utils.data import files
from training_utils.data.caption_files import (
    CaptionFiles,
    FoundCaption,
    first_caption,
    is_caption_ending,
    read_caption,
)
from training_utils.data.left_out import LeftOut

BLOCK = 512  # bytes; headers and contents fill complete blocks, and a block of zeros ends the file


class Member(NamedTuple):
    """A file in a shard: where the member begins and ends, where its content lies, which for a link is that of an
    earlier member, and its text where that is asked for."""

    name: str
    begin: int
    end: int
    offset: int
    size: int
    text: bytes | None

    @property
    def stem(self) -> str:
        """The name up to the last dot: that of the sample."""
        return os.path.splitext(self.name)[0]


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


def index_shard(
    shard: str, caption_column: str | None, malformed: list[str], left_out: LeftOut
) -> list[tuple[str, FoundCaption | None]]:
    """(member path, what its caption files hold) of each image of a shard, in its order; None where an image has no
    caption file, and "" for all with `caption_column` None. What is wrong with the shard is added to `malformed`, and
    what is not trained to `left_out`.

    A later member replaces an earlier one of the same name, as when the shard is unpacked; tar's -r and -u add such.
    """
    images: dict[str, str] = {}
    captions: CaptionFiles[FoundCaption] = CaptionFiles()
    for member in members(shard, malformed, left_out, with_texts=caption_column is not None):
        name = unpacked_name(member.name)
        stem, ending = os.path.splitext(name)
        if files.is_image(name):
            images.pop(name, None)  # it has the place of the later one
            images[name] = f"{shard}\0{member.name}\0{member.offset}\0{member.size}"
        elif member.text is not None and caption_column is not None:
            captions.add(stem, ending, read_caption(f"{shard}/{member.name}", ending, member.text, caption_column))
    if caption_column is None:
        return [(path, FoundCaption("")) for path in images.values()]
    for stem in captions.without_image(images):
        left_out.add("caption", f"{shard}/{stem}")
    return [(path, first_caption(captions.of(os.path.splitext(name)[0]))) for name, path in images.items()]


def unpacked_name(name: str) -> str:
    """The path, inside the folder into which a shard is unpacked, of the member with this name."""
    return posixpath.normpath(name).lstrip("/")


def members(
    shard: str,
    malformed: list[str],
    left_out: LeftOut,
    with_texts: bool = True,
    file: IO[bytes] | io.RawIOBase | None = None,
) -> Iterator[Member]:
    """The images and captions in a shard, in its order, the latter with their text if `with_texts`.

    `file` is the shard's content, opened, where it does not lie on this disk. What is wrong with the shard is added
    to `malformed`, and all else that it holds to `left_out`.
    """
    last = "its beginning"
    earlier: dict[str, tarfile.TarInfo | None] = {}  # files by name, to which links may lead
    skipped_folders: set[str] = set()
    try:
        with tarfile.open(shard, "r:", file) as tar:
            for info in tar:
                last = f"member {info.name}"
                content = _content_of(info, earlier)
                folder = files.hidden_folder_in(info.name)
                if folder is not None:
                    if folder not in skipped_folders:
                        left_out.add("folder", f"{shard}/{folder}")
                        skipped_folders.add(folder)
                elif content is None or not _is_read(info.name):
                    reason = _reason_left_out(info, content)
                    if reason is not None:
                        left_out.add(reason, f"{shard}/{info.name}")
                else:
                    is_text = with_texts and is_caption_ending(files.ending_of(info.name))
                    text = tar.extractfile(content) if is_text else None
                    yield Member(
                        name=info.name,
                        begin=info.offset,
                        end=tar.offset,
                        offset=content.offset_data,
                        size=content.size,
                        text=None if text is None else text.read(),
                    )
            tar.fileobj.seek(tar.offset)
            end = tar.fileobj.read(BLOCK)
            if end != bytes(BLOCK):  # tarfile itself takes whatever it finds there for the end
                what = "is damaged" if len(end) == BLOCK else "is cut off"
                malformed.append(f"{shard} {what} after {last}; fetch it or write it again")
    except (tarfile.TarError, OSError, ValueError) as error:
        malformed.append(f"{shard} cannot be read as a tar file after {last}: {reason_of(error)}")


def _content_of(info: tarfile.TarInfo, earlier: dict[str, tarfile.TarInfo | None]) -> tarfile.TarInfo | None:
    """The member that has the content of a member: itself or, of a link, the one that it leads to among the
    `earlier` ones, to which it is added. None for what has no content."""
    name = posixpath.normpath(info.name)
    if info.isfile() and info.sparse is None:
        earlier[name] = info
    elif info.islnk():
        earlier[name] = earlier.get(posixpath.normpath(info.linkname))
    elif info.issym():
        target = posixpath.join(posixpath.dirname(info.name), info.linkname)
        earlier[name] = earlier.get(posixpath.normpath(target))
    else:
        return None
    return earlier[name]


def _is_read(name: str) -> bool:
    """Whether a member of this name is an image or a caption."""
    if os.path.basename(name).startswith("."):
        return False
    return files.is_image(name) or is_caption_ending(files.ending_of(name))


def _reason_left_out(info: tarfile.TarInfo, content: tarfile.TarInfo | None) -> str | None:
    """Why a member that is not read is not, as files.reason_left_out says it; `content` is as of `_content_of`."""
    if info.isdir():
        return None
    if content is not None:
        return files.reason_left_out(os.path.basename(info.name))
    if info.issym() or info.islnk():
        return "shard link"
    return "other" if info.sparse is None else "sparse"
