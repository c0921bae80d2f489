"""Fonts for captions in any script, and what is drawn where no font has a letter.

Pillow's own font has the letters of ASCII. Others come from the system, where there are any.
"""

from __future__ import annotations

import functools
import shutil
import subprocess
import unicodedata

from PIL import ImageFont
from PIL.ImageFont import FreeTypeFont

# Fonts of many scripts, in the order in which they are tried, as systems name their files. Pillow finds them in the
# folders where its platform keeps fonts.
FILES = (
    *("DejaVuSans.ttf", "NotoSans-Regular.ttf", "LiberationSans-Regular.ttf"),
    *("NotoSansCJK-Regular.ttc", "NotoSansCJK.ttc", "wqy-microhei.ttc", "wqy-zenhei.ttc", "DroidSansFallbackFull.ttf"),
    *("Arial Unicode.ttf", "PingFang.ttc", "Hiragino Sans GB.ttc", "AppleSDGothicNeo.ttc"),  # macOS
    *("arial.ttf", "msyh.ttc", "YuGothM.ttc", "malgun.ttf"),  # Windows
)
NO_CHARACTER = "\uffff"
# What is written for letters that Unicode does not take apart.
PLAIN = {
    **{"—": "-", "–": "-", "−": "-", "×": "x", "€": "EUR", "£": "GBP", "¿": "?", "¡": "!"},
    **{
        "Æ": "AE",
        "æ": "ae",
        "Œ": "OE",
        "œ": "oe",
        "Ø": "O",
        "ø": "o",
        "ß": "ss",
        "Ł": "L",
        "ł": "l",
        "Đ": "D",
        "đ": "d",
    },
    **{"ı": "i", "Þ": "Th", "þ": "th", "Ð": "D", "ð": "d"},
}


def drawable(text: str, size: int) -> tuple[str, FreeTypeFont]:
    """A text as it can be drawn, and the font for it at a size in pixels: the first that has all of its letters, or
    else most of them.

    A letter that this font does not have loses its accent or, without it too, becomes an escape such as \\u732b.
    """
    text = unicodedata.normalize("NFC", text)
    own = builtin(size)
    missing = _missing(own, text)
    if not missing:
        return text, own
    fonts = [own, *_system_fonts(size, "".join(sorted(missing)))]
    best = min(fonts, key=lambda font: len(_missing(font, text)))  # the first of several
    missing = _missing(best, text)
    return "".join(_substitute(letter, best) if letter in missing else letter for letter in text), best


@functools.cache
def builtin(size: int) -> FreeTypeFont:
    """Pillow's own font."""
    font = ImageFont.load_default(size)
    assert isinstance(font, FreeTypeFont)  # Pillow's wheels have FreeType
    return font


def _missing(font: FreeTypeFont, text: str) -> set[str]:
    """The letters of a text that a font does not have."""
    return {letter for letter in set(text) if not _is_plain(letter) and not _has(font, letter)}


def _is_plain(letter: str) -> bool:
    """Whether every font has a letter."""
    return letter.isascii() and (letter.isprintable() or letter.isspace())


@functools.lru_cache(maxsize=10_000)
def _has(font: FreeTypeFont, letter: str) -> bool:
    """Whether a font draws a letter, and not what it draws for all that it does not have."""
    if letter.isspace():
        return True
    probe = _without_shaping(font)
    drawn = bytes(probe.getmask(letter))
    return any(drawn) and drawn != bytes(probe.getmask(NO_CHARACTER))


@functools.cache
def _without_shaping(font: FreeTypeFont) -> FreeTypeFont:
    """A font that draws each letter by itself: a mark that joins another letter then stands alone."""
    return font.font_variant(layout_engine=ImageFont.Layout.BASIC)


def _substitute(letter: str, font: FreeTypeFont) -> str:
    """What is drawn for a letter that a font does not have."""
    if unicodedata.category(letter) == "Cf" or "VARIATION SELECTOR" in unicodedata.name(letter, ""):
        return ""  # it joins others or chooses a variant of one, and is invisible by itself
    parts = unicodedata.normalize("NFKD", letter)
    plain = PLAIN.get(letter, "".join(part for part in parts if not unicodedata.combining(part)))
    if plain and not _missing(font, plain):
        return plain
    return letter.encode("unicode_escape").decode()


@functools.lru_cache(maxsize=256)
def _system_fonts(size: int, letters: str) -> list[FreeTypeFont]:
    """The fonts of this system that may have these letters."""
    files = [*_files_with(letters), *FILES]
    fonts = []
    for file in dict.fromkeys(files):
        try:
            fonts.append(ImageFont.truetype(file, size))
        except OSError:  # there is none, or it has bitmaps of other sizes alone, as fonts of emoji do
            continue
    return fonts


def _files_with(letters: str) -> list[str]:
    """The font file that fontconfig, where it is installed, thinks best for these letters."""
    program = shutil.which("fc-match")
    if program is None:
        return []
    charset = " ".join(f"{ord(letter):x}" for letter in letters)
    command = [program, "--format=%{file}", f"sans:scalable=true:charset={charset}"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, ValueError, subprocess.SubprocessError):
        return []
    return [found] if found else []
