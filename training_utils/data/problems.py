"""What can be wrong with a sample: how it is found, what it is called, how it is said.

The fault of a caption or of an image's header shows before training, that of an image's content when it is decoded.
"""

import io
import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from training_utils.base.errors import UserError
from training_utils.base.formats import shortened
from training_utils.data import tar

LONGEST = 50  # times the shorter side: a longer image, resized to the resolution, would take gigabytes

# Pillow refuses an image above twice its limit and only speaks of one above it; those are large scans.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

# What can be wrong with a sample, and what to say of several such.
UNREADABLE = "files cannot be read as images"
KINDS = {
    "absent": "images named in the metadata do not exist",
    "no usable caption": "captions are neither a string nor a list of strings",
    "no image": "rows hold no image",
    "zero bytes": UNREADABLE,
    "not an image": UNREADABLE,
    "damaged": UNREADABLE,
    "too large": UNREADABLE,
    "not readable": UNREADABLE,
    "too narrow": f"images are more than {LONGEST} times as long as they are wide",
    "name not UTF-8": "files have a name that is not UTF-8",
}


@dataclass(frozen=True)
class Problem:
    """Why a sample cannot be used: a kind of KINDS, the sample's name, and what was found where that says more."""

    kind: str
    name: str
    found: str = ""

    def __str__(self):
        return f"{self.name} ({self.found})" if self.found else self.name

    def sentence(self):
        """What to say of this sample alone."""
        what = "read as an image" if KINDS[self.kind] == UNREADABLE else "used"
        return f"{self.name} cannot be {what} ({self.found or self.kind})"


class BadSample(UserError):
    """A sample that cannot be used, at this time or any other: the fault lies in the data and not in the machine."""


@dataclass
class Findings:
    """What is known about a dataset beyond its rows: `malformed`, sentences about its metadata; `problems` of samples
    that are therefore not among the rows; `images`, how many the folder holds; `unnamed`, the paths of those without
    a caption; `repeats`, how many lines name an image again; `skipped`, what `note_skipped` was told."""

    malformed: list = field(default_factory=list)
    problems: list = field(default_factory=list)
    images: int = 0
    unnamed: list = field(default_factory=list)
    repeats: int = 0
    skipped: set = field(default_factory=set)


class _Refused(Exception):
    """An image that Pillow would read and training cannot use: (kind, what was found)."""


def open_image(cell):
    """The PIL image, its header read, of a row's cell: a dict that holds "bytes" or else "path", which may be a
    place in a shard. Raises what Pillow and the system raise, or _Refused: `problem_of` tells what they mean."""
    content, path = (None, None) if cell is None else (cell.get("bytes"), cell.get("path"))
    if content is None and path is None:
        raise _Refused("no image", "")
    if content is not None:
        size, file = len(content), io.BytesIO(content)
    elif tar.is_place(path):
        size, file = tar.size(path), tar.open_at(path)
    else:
        size, file = os.path.getsize(path), path
    if not size:
        raise _Refused("zero bytes", "zero bytes")
    image = Image.open(file)
    width, height = image.size
    if max(image.size) > LONGEST * min(image.size):
        image.close()
        raise _Refused("too narrow", f"{width} x {height} pixels, more than {LONGEST} to 1")
    return image


def content_of(cell):
    """The bytes of the image in a row's cell, as it is stored."""
    path = cell["path"]
    return cell.get("bytes") or (tar.read(path) if tar.is_place(path) else Path(path).read_bytes())


def problem_of(error, name):
    """The Problem that an exception from `open_image`, or from decoding what it returned, stands for."""
    if isinstance(error, _Refused):
        return Problem(error.args[0], name, error.args[1])
    if isinstance(error, Image.DecompressionBombError):
        return Problem("too large", name, str(error).split(",")[0])
    if isinstance(error, UnidentifiedImageError):
        return Problem("not an image", name, "not an image")
    if isinstance(error, FileNotFoundError):
        return Problem("absent", name, error.strerror)
    if isinstance(error, OSError) and error.errno is not None:  # decoders give none, the system does
        return Problem("not readable", name, error.strerror)
    if isinstance(error, MemoryError):
        return Problem("not readable", name, "out of memory")
    return Problem("damaged", name, (str(error).strip() or type(error).__name__).splitlines()[0])


def is_unicode(text):
    """Whether a string can be stored: half a surrogate pair, from JSON or from a file's name, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def caption_fault(value):
    """What was found in place of a caption, as a phrase; None for one that can be used."""
    texts = [value] if isinstance(value, str) else value
    if isinstance(texts, list) and texts and all(isinstance(text, str) and is_unicode(text) for text in texts):
        return None
    return "an empty list" if value == [] else "nothing" if value is None else repr(value)[:80]


def listing(problems):
    """Problems as one clause: how many of each sort, and up to ten of each by name."""
    groups = {}
    for problem in problems:
        groups.setdefault(KINDS[problem.kind], []).append(problem)
    return "; ".join(f"{len(group)} {what}: {shortened(group)}" for what, group in groups.items())
