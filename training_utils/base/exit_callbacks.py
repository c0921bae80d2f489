"""What must be done before a process leaves: one of several leaves without calling atexit's functions."""

from collections.abc import Callable

_callbacks: list[Callable[[], object]] = []


def before_exit(callback: Callable[[], object]) -> None:
    """Have `callback()` called when the script ends, whatever ends it, a kill aside; once, if it is given again."""
    if callback not in _callbacks:
        _callbacks.append(callback)


def call_exit_callbacks() -> None:
    """Call what `before_exit` was given, in that order."""
    while _callbacks:
        _callbacks.pop(0)()
