"""Packages that teach Pillow formats which it does not read itself: HEIC, as phones write it, and JPEG XL."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class PlugIn:
    """A format and the package that reads it.

    `signatures` are what its files hold from byte `offset` on. `register` tells Pillow; it raises ImportError where
    the package is not installed.
    """

    title: str
    pip: str  # what `pip install` takes
    endings: frozenset[str]
    offset: int
    signatures: tuple[bytes, ...]
    register: Callable[[], None]

    @property
    def advice(self) -> str:
        """What to do so that such files are read, as a clause."""
        return f"pip install {self.pip} to read them, or convert them to PNG"


def _register_heif() -> None:
    import pillow_heif

    pillow_heif.register_heif_opener()


def _register_jxl() -> None:
    import pillow_jxl  # noqa: F401 (the import registers it)


PLUG_INS = (
    PlugIn(
        "HEIC",
        "pillow-heif",
        frozenset([".heic", ".heif", ".hif", ".heics", ".heifs"]),
        4,
        tuple(b"ftyp" + brand for brand in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")),
        _register_heif,
    ),
    PlugIn(
        "JPEG XL",
        "pillow-jxl-plugin",
        frozenset([".jxl"]),
        0,
        (b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n"),
        _register_jxl,
    ),
)


def _missing() -> tuple[PlugIn, ...]:
    """Register the plug-ins that are installed. Returns the others."""
    missing = []
    for plug_in in PLUG_INS:
        try:
            plug_in.register()
        except ImportError:
            missing.append(plug_in)
    return tuple(missing)


MISSING = _missing()


def missing_for_ending(ending: str) -> PlugIn | None:
    """The plug-in that reads files with this ending, in small letters, where it is not installed."""
    return next((plug_in for plug_in in MISSING if ending in plug_in.endings), None)


def missing_for_content(beginning: bytes) -> PlugIn | None:
    """The plug-in that reads a file that begins with these bytes, where it is not installed."""
    for plug_in in MISSING:
        if beginning[plug_in.offset :].startswith(plug_in.signatures):
            return plug_in
    return None
