"""Sizes and times as the page puts them."""

import time

from training_utils.base import formats


def date(seconds: float) -> str:
    """A time since 1970 as day and minute."""
    return time.strftime("%d %b %Y, %H:%M", time.localtime(seconds))


def rough_duration(seconds: float) -> str:
    """Seconds in words, to the minute where there is one."""
    if seconds < 60:
        return formats.duration(seconds)
    return formats.duration(seconds // 60 * 60).removesuffix(" 0 s")


def ago(seconds: float) -> str:
    """How long something is past."""
    return "just now" if seconds < 60 else f"{rough_duration(seconds)} ago"
