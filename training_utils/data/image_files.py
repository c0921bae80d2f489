"""Stored images: how they are opened, and what an error of Pillow or of the system says about one."""

import io
import os
import struct
import traceback
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from PIL import Image, PngImagePlugin, UnidentifiedImageError

from training_utils.data import plug_ins, tar
from training_utils.data.problems import Problem

LONGEST = 50  # times the shorter side: a longer image, resized to the resolution, would take gigabytes

BEGINNING = 16  # bytes of a file, which tell its format

# Pillow refuses an image above twice its limit and only warns of one above it; those are large scans.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# Of tags that are damaged, it tells which; what is needed of them is read all the same.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.TiffImagePlugin")

# Pillow refuses an image with more than 1 MB in a text chunk; ComfyUI's workflow may be longer. The limit is there for
# texts that are made to fill the memory.
PngImagePlugin.MAX_TEXT_CHUNK = 2**26
PngImagePlugin.MAX_TEXT_MEMORY = 2**28

# What Pillow's readers raise for a damaged file. Each format has its own kinds, and few of them are checked for.
DECODER_ERRORS = (
    Image.DecompressionBombError,
    OSError,  # UnidentifiedImageError too
    SyntaxError,  # a broken header or EXIF
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    AssertionError,
    EOFError,
    RuntimeError,
    MemoryError,
    struct.error,
    zlib.error,
)

# An image as the datasets library stores it: "bytes", its content, or else "path", which may be a place in a shard;
# None in a row without an image.
StoredImage = Mapping[str, Any] | None


class UnusableImage(Exception):
    """An image that cannot be read, or that training cannot use: a kind of problems.KINDS, and what was found."""

    def __init__(self, kind: str, found: str) -> None:
        super().__init__(kind, found)
        self.kind = kind
        self.found = found

    def problem(self, name: str) -> Problem:
        """The Problem of the sample of this name."""
        return Problem(self.kind, name, self.found)


@contextmanager
def unusable_if(*kinds: type[Exception]) -> Iterator[None]:
    """Turn errors of these kinds, which Pillow or the system raise within this context, into UnusableImage.

    An error that is raised by a line of ours is a bug and passes through, except those that only the machine causes.
    Even so, put nothing into the context but calls of libraries.
    """
    try:
        yield
    except kinds as error:
        if _is_our_bug(error):
            raise
        raise _unusable(error) from error


def decoding() -> Any:
    """The context for calls of Pillow that read a file: whatever it raises for a damaged one becomes UnusableImage."""
    return unusable_if(*DECODER_ERRORS)


def _is_our_bug(error: Exception) -> bool:
    """Whether an error was raised by this package itself, also where Pillow called it, as it does a shard's reader."""
    if isinstance(error, OSError | MemoryError):
        return False
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__", "").startswith("training_utils.")


def _unusable(error: Exception) -> UnusableImage:
    if isinstance(error, Image.DecompressionBombError):
        return UnusableImage("too large", str(error).split(",")[0])
    if isinstance(error, UnidentifiedImageError):
        return UnusableImage("not an image", "not an image")
    if isinstance(error, FileNotFoundError):
        return UnusableImage("absent", error.strerror or str(error))
    # The system's errors have a number, those of decoders have none.
    if isinstance(error, OSError) and error.errno is not None:
        return UnusableImage("not readable", error.strerror or str(error))
    if isinstance(error, MemoryError):
        return UnusableImage("not readable", "out of memory")
    return UnusableImage("damaged", (str(error).strip() or type(error).__name__).splitlines()[0])


def open_image(stored: StoredImage) -> Image.Image:
    """The PIL image of a stored one, its header read and nothing decoded. Raises UnusableImage."""
    if stored is None or (stored.get("bytes") is None and stored.get("path") is None):
        raise UnusableImage("no image", "")
    content = stored.get("bytes")
    file: IO[bytes] | str
    if content is not None:
        size = len(content)
        file = io.BytesIO(content)
    elif tar.is_member_path(stored["path"]):
        size = tar.size(stored["path"])
        with unusable_if(OSError):
            file = tar.open_member(stored["path"])
    else:
        file = stored["path"]
        with unusable_if(OSError, ValueError):
            size = os.path.getsize(stored["path"])
    if not size:
        raise UnusableImage("zero bytes", "zero bytes")
    try:
        with decoding():
            image = Image.open(file)
    except UnusableImage as error:
        raise _advised(error, file) from error.__cause__
    width, height = image.size
    if max(width, height) > LONGEST * min(width, height):
        image.close()
        raise UnusableImage("too narrow", f"{width} x {height} pixels, more than {LONGEST} to 1")
    return image


def _advised(error: UnusableImage, file: IO[bytes] | str) -> UnusableImage:
    """An error of opening a file, with what to install where that is all that is missing."""
    if error.kind != "not an image":
        return error
    with unusable_if(OSError):
        if isinstance(file, str):
            with open(file, "rb") as opened:
                beginning = opened.read(BEGINNING)
        else:
            file.seek(0)
            beginning = file.read(BEGINNING)
    plug_in = plug_ins.missing_for_content(beginning)
    return error if plug_in is None else UnusableImage(error.kind, f"{plug_in.title}; {plug_in.advice}")


def read_content(stored: StoredImage) -> bytes:
    """The bytes of a stored image as they are. Raises UnusableImage."""
    if stored is None or (stored.get("bytes") is None and stored.get("path") is None):
        raise UnusableImage("no image", "")
    if stored.get("bytes") is not None:
        return stored["bytes"]
    path = stored["path"]
    with unusable_if(OSError, ValueError):
        return tar.read(path) if tar.is_member_path(path) else Path(path).read_bytes()
