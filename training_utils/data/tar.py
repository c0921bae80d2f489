"""Images inside tar files, in WebDataset's layout: read at their place, without anything being unpacked.

The place of an image is a string, so that it can stand where the path of a file does: shard, member, offset and size,
separated by zero bytes, which no path can hold.
"""

import io
import json
import os
import tarfile

from training_utils.base.errors import reason_of

BLOCK = 512  # bytes; headers and contents fill whole blocks, and a block of zeros ends the file
TEXTS = (".txt", ".caption", ".json")


def is_place(path):
    """Whether a string is the place of an image in a shard."""
    return isinstance(path, str) and path.count("\0") == 3


def shown(path):
    """A path, or a place as one: the shard's, then the member's name."""
    return "/".join(path.split("\0")[:2]) if is_place(path) else path


def size(place):
    """The size of what lies at a place, in bytes."""
    return int(place.split("\0")[3])


def read(place):
    """The bytes that lie at a place."""
    with open_at(place) as file:
        return file.read()


def open_at(place):
    """What lies at a place as a file for reading, of which no more is read than is asked for."""
    return io.BufferedReader(_Member(place))


class _Member(io.RawIOBase):
    def __init__(self, place):
        shard, _, offset, length = place.split("\0")
        self.start, self.length, self.at = int(offset), int(length), 0
        self.file = open(shard, "rb", buffering=0)  # noqa: SIM115 (`close` comes when this is let go)

    def readable(self):
        return True

    def seekable(self):
        return True

    def seek(self, offset, whence=os.SEEK_SET):
        self.at = max(0, offset + (0, self.at, self.length)[whence])
        return self.at

    def readinto(self, buffer):
        self.file.seek(self.start + self.at)
        count = self.file.readinto(memoryview(buffer)[: max(0, self.length - self.at)])
        self.at += count
        return count

    def close(self):
        if hasattr(self, "file"):  # there is none where the shard could not be opened
            self.file.close()
        super().close()


def index(shard, endings, caption_column, malformed):
    """[(place, caption)] of the images of a shard, in its order; None where an image has no caption, and "" for all
    with `caption_column` None. `endings` are those of images. What is wrong with the shard is added to `malformed`.

    An image and its caption have the same name up to the last dot. The caption is what a `.json` has in that column,
    or else the content of a `.txt` or `.caption`.
    """
    images, texts, lacking = [], {}, {}
    for member, content in members(shard, malformed, with_texts=caption_column is not None):
        stem, ending = os.path.splitext(member.name)
        if ending.lower() in endings:
            images.append((stem, f"{shard}\0{member.name}\0{member.offset_data}\0{member.size}"))
        elif content is not None:
            keep(f"{shard}/{member.name}", stem, ending, content, caption_column, texts, lacking, malformed)
    if caption_column is None:
        return [(place, "") for _, place in images]
    malformed += [sentence for stem, sentence in lacking.items() if stem not in texts]
    return [(place, texts.get(stem)) for stem, place in images]


def members(shard, malformed, with_texts=True, file=None):
    """(tarfile.TarInfo, content) of each file in a shard that is not hidden, in its order; the content of texts alone,
    else None. `file` is the shard's content, opened, where it does not lie on this disk. What is wrong with the shard
    is added to `malformed`."""
    last = "its beginning"
    try:
        with tarfile.open(shard, "r:", file) as tar:
            for member in tar:
                last = f"member {member.name}"
                # Like those in a folder; macOS puts a ._000.jpg beside every 000.jpg.
                hidden = any(part.startswith((".", "__")) and part != "." for part in member.name.split("/"))
                if not hidden and member.isfile() and member.sparse is None:
                    is_text = with_texts and os.path.splitext(member.name)[1] in TEXTS
                    yield member, tar.extractfile(member).read() if is_text else None
            tar.fileobj.seek(tar.offset)
            end = tar.fileobj.read(BLOCK)
            if end != bytes(BLOCK):  # tarfile itself takes whatever it finds there for the end
                what = "is damaged" if len(end) == BLOCK else "is cut off"
                malformed.append(f"{shard} {what} after {last}; fetch it or write it again")
    except (tarfile.TarError, OSError, ValueError) as error:
        malformed.append(f"{shard} cannot be read as a tar file after {last}: {reason_of(error)}")


def keep(where, stem, ending, content, caption_column, texts, lacking, malformed):
    """Put the caption that a member holds among `texts`, or the reason why there is none among the others."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        malformed.append(f"{where} is not UTF-8 text (byte {error.start}); save it as UTF-8")
        return
    if ending != ".json":
        texts.setdefault(stem, text.strip())
        return
    try:
        entry = json.loads(text)
    except (RecursionError, ValueError) as error:
        malformed.append(f"{where} is not JSON: {reason_of(error)}")
        return
    if isinstance(entry, dict) and caption_column in entry:
        texts[stem] = entry[caption_column]
    else:
        have = ", ".join(entry) if isinstance(entry, dict) and entry else "nothing"
        lacking[stem] = f"{where} has no caption column '{caption_column}' (--caption_column); it has {have}"
