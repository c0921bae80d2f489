"""What a run says on the terminal: lines, warnings and progress bars that do not break each other."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from tqdm import tqdm


def is_main_process() -> bool:
    """Whether this is the process that speaks: the first of several, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def say(message: object, everywhere: bool = False) -> None:
    """Print a line without breaking a progress bar: once, whatever the number of processes, or `everywhere`."""
    if everywhere or is_main_process():
        from tqdm import tqdm

        tqdm.write(str(message), file=sys.stderr)
        sys.stderr.flush()


def warn(message: object, everywhere: bool = False) -> None:
    """Print a warning once, whatever the number of processes, or `everywhere`: what only one of them may know."""
    say(f"warning: {message}", everywhere)


def say_at_once(message: str) -> None:
    """Print a line from any thread, whatever another one is printing or waiting for; beside a progress bar it begins
    on a new line. Only the main process says it."""
    if is_main_process():
        start = "\n" if sys.stderr.isatty() else ""
        # The terminal may be gone.
        with suppress(OSError):
            os.write(2, f"{start}{message}\n".encode(errors="replace"))


def bar(items: Iterable[Any] | None, what: str, total: int | None, delay: float = 1) -> tqdm:
    """A progress bar over `items`, or with None one that is moved by hand; the first process alone shows it, and only
    for what takes longer than `delay` seconds. Into a file it writes a line now and then."""
    from tqdm import tqdm

    return tqdm(items, what, total, delay=delay, disable=not is_main_process(), **bar_options())


def bar_options() -> dict[str, Any]:
    """Where a bar is shown and how often, as tqdm takes it."""
    if sys.stderr.isatty():
        return dict(file=sys.stderr, mininterval=0.1, dynamic_ncols=True)
    return dict(file=_Lines(), mininterval=10, dynamic_ncols=True)


class _Lines:
    """Takes what a bar writes to standard error where that is not a terminal: each of its states on a line of its
    own, instead of all of them on one, behind carriage returns."""

    last: str | None = None

    def write(self, text: str) -> None:
        for state in filter(None, map(str.rstrip, text.split("\r"))):
            if state != self.last:
                sys.stderr.write(f"{state}\n")
            self.last = state

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)


class TolerantStream:
    """Standard error whose reader may go away, as `tee` does at Ctrl-C: what is written then is lost, and the run goes
    on."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int | None:
        return self._attempt(self.stream.write, text)

    def flush(self) -> None:
        self._attempt(self.stream.flush)

    def _attempt(self, action: Callable[..., Any], *words: str) -> Any:
        try:
            return action(*words)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)
