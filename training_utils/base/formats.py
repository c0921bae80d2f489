"""Numbers, sizes, durations and lists as text for people."""

import math
import os
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import TextIO

WIDEST = 119  # columns of a line, and of all lines in a file or a pipe
NARROWEST = 50


def shortened(names: Sequence[object], most: int = 10) -> str:
    """At most `most` names, separated by commas, and how many more there are."""
    listed = ", ".join(map(str, names[:most]))
    return f"{listed} and {len(names) - most} more" if len(names) > most else listed


def cut(text: object, most: int = 80) -> str:
    """What a cell of a table holds, or another text from the data, as a message shows it: on one line, and cut off
    after `most` characters."""
    shown = str(text)[: most + 1]
    if len(shown) > most:
        shown = f"{shown[:most]}..."
    return shown if shown.isprintable() else repr(shown)[1:-1]


def number(value: float | None, digits: int = 4) -> str:
    """A number with this many significant digits and no zeros at its end; None is a value that was not finite."""
    if value is None:
        return "not finite"
    size = abs(value)
    if value and (size < 1e-3 or size >= 1e6):
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    magnitude = math.floor(math.log10(size)) if value else 0
    text = f"{value:,.{max(0, digits - 1 - magnitude)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def large_count(count: int) -> str:
    """A number of parameters: 64,796 in full, from 100,000 on in millions, with three digits or more."""
    if count < 1e5:
        return f"{count:,}"
    millions = count / 1e6
    decimals = max(0, 2 - math.floor(math.log10(millions)))
    return f"{millions:,.{decimals}f} M"


def mebibytes(size: float, decimals: int = 0) -> str:
    """A number of bytes in MiB."""
    return f"{size / 2**20:,.{decimals}f} MiB"


def byte_size(size: float) -> str:
    """A number of bytes with three digits and the unit that suits it; 1 KB is 1000 bytes, as for files on a disk."""
    for unit in ("bytes", "KB", "MB"):
        if size < 1000:
            return f"{number(size, 3)} {unit}"
        size /= 1000
    return f"{number(size, 3)} GB"


def duration(seconds: float) -> str:
    """Seconds in words, rounded down: `5 s`, `2 min 6 s`, `1 h 30 min`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def estimated_duration(seconds: float) -> str:
    """Seconds in words, as exactly as an estimate is worth: `5.2 s`, `2 min`, `1 h 30 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return duration(60 * minutes).removesuffix(" 0 s")


def line_width(stream: TextIO) -> int:
    """How many columns a line on this stream may have, from 50 to 119: what COLUMNS says, or else the terminal; 119
    where there is neither."""
    columns = os.environ.get("COLUMNS", "")
    if columns.isdecimal() and int(columns):
        width = int(columns)
    else:
        try:
            # A terminal that does not know its width says 0.
            width = os.get_terminal_size(stream.fileno()).columns or WIDEST
        except (OSError, ValueError):  # it is a file or a pipe
            width = WIDEST
    return min(max(width, NARROWEST), WIDEST)


def table_lines(rows: dict[str, str]) -> Iterator[str]:
    """Lines for {label: text}, the texts below each other and wrapped to the terminal's width."""
    margin = 6 + max(map(len, rows), default=0)
    width = max(line_width(sys.stderr), margin + 30)
    wrapper = textwrap.TextWrapper(width, break_long_words=False, break_on_hyphens=False)
    wrapper.subsequent_indent = " " * margin
    for label, text in rows.items():
        wrapper.initial_indent = f"  {label}".ljust(margin)
        yield wrapper.fill(text)


def heading(text: str) -> str:
    """A heading, bold on a terminal."""
    plain = not sys.stderr.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return text if plain else f"\033[1m{text}\033[0m"
