"""Numbers, durations and lists as text for people."""

import math
import os
import sys
import textwrap


def shortened(names, most=10):
    """At most `most` names, separated by commas, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more


def millions(count):
    """A number of parameters in words, with three digits or more."""
    if count < 1e5:
        return f"{count:,}"
    return f"{count / 1e6:,.{max(0, 2 - math.floor(math.log10(count / 1e6)))}f} M"


def duration(seconds):
    """Seconds in words."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def table_lines(rows):
    """Lines for {label: text}, the texts below each other and wrapped to the terminal's width."""
    margin = 6 + max(map(len, rows), default=0)
    try:
        columns = os.get_terminal_size(sys.stderr.fileno()).columns
    except (OSError, ValueError):  # a file
        columns = 119
    width = max(min(columns, 119), margin + 30)
    wrapper = textwrap.TextWrapper(width, break_long_words=False, break_on_hyphens=False)
    wrapper.subsequent_indent = " " * margin
    for label, text in rows.items():
        wrapper.initial_indent = f"  {label}".ljust(margin)
        yield wrapper.fill(text)


def heading(text):
    """A heading, bold on a terminal."""
    plain = not sys.stderr.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return text if plain else f"\033[1m{text}\033[0m"
