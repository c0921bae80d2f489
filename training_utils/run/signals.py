"""SIGTERM, SIGINT and SIGHUP end a run in good order: step finished, checkpoint written, exit code 128 + n."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

from training_utils.base.console import say_at_once

HANGUP = getattr(signal, "SIGHUP", None)  # a closed terminal or ssh connection; Windows has none
SIGNALS = tuple(filter(None, (signal.SIGTERM, signal.SIGINT, HANGUP)))
ORPHANED = getattr(signal, "SIGUSR1", None)  # what this process is sent when its launcher dies; Windows has none
SAME_REQUEST = 2.0  # seconds; a queue signals the launcher and its processes, and the launcher passes its signal on
END = b"\0"  # what ends the thread of an Interruption; no signal has this number
PR_SET_PDEATHSIG = 1  # of Linux' prctl


def follow_launcher() -> None:
    """Let this process be sent ORPHANED when the launcher that started it dies (Linux).

    `accelerate launch` of a single process ends at once on SIGTERM and leaves the process that trains running.
    """
    if sys.platform == "linux" and "ACCELERATE_MIXED_PRECISION" in os.environ:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, ORPHANED)


def _heeded() -> list[int]:
    """Those of SIGNALS that end this run: not SIGHUP where it is ignored, as nohup has it."""
    return [number for number in SIGNALS if number != HANGUP or signal.getsignal(number) != signal.SIG_IGN]


class Interruption:
    """A context in which the first SIGTERM, SIGINT or SIGHUP is only noted; a later one ends the process at once.

    `largest(number)` returns the largest of all processes' numbers: a signal may reach them at different steps, and
    all must stop at the same one. Since a checkpoint is complete or absent, the second signal damages nothing.
    `first_words(name)` and `last_words(name)` are what is said at these two, given what a person calls the signal.

    Python runs a handler only when a call into C has returned, such as a backward pass or the writing of a
    checkpoint. So that words and end come at once, a thread hears the signals too.
    """

    def __init__(
        self,
        largest: Callable[[int], int],
        first_words: Callable[[str], str] = "{}: finishing this step".format,
        last_words: Callable[[str], str] = "{} again: ended at once".format,
    ) -> None:
        self._largest = largest
        self._first_words = first_words
        self._last_words = last_words
        self._noted = 0  # the first signal's number
        self._lock = threading.Lock()
        self._said_at: float | None = None  # when the first words were said
        self._signals = _heeded()

    def __enter__(self) -> Interruption:
        global _open_end
        self._receiving, self._sending = socket.socketpair()  # Windows takes no pipe here
        self._sending.setblocking(False)
        _open_end = self._sending.fileno()
        self._wakeup_before = signal.set_wakeup_fd(_open_end, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        handled = self._signals if ORPHANED is None else [*self._signals, ORPHANED]
        self._handlers_before = {number: signal.signal(number, self._note) for number in handled}
        return self

    def __exit__(self, *_: object) -> None:
        global _open_end
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        _open_end = None
        self._sending.send(END)
        self._thread.join(timeout=1)  # longer where the terminal takes no more text
        self._sending.close()

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if not self._noted:
            self._noted = _request(number)

    def _listen(self) -> None:
        """Hear every signal as it comes, by its number, which Python sends to itself."""
        while (heard := self._receiving.recv(1)) != END:
            self._hear(heard[0])
        self._receiving.close()

    def _hear(self, number: int) -> None:
        if number not in (*self._signals, ORPHANED):
            return
        is_first = self._say_first_words(_request(number))
        # Ctrl-C kills the launcher too, which is not a second request.
        if is_first or number == ORPHANED or self._said_at is None:
            return
        if time.monotonic() - self._said_at > SAME_REQUEST:
            say_at_once(self._last_words(_name(number)))
            os._exit(128 + number)

    def _say_first_words(self, number: int) -> bool:
        """Say what a first signal does, unless it was said. Returns whether it was not."""
        with self._lock:
            if self._said_at is not None:
                return False
            self._said_at = time.monotonic()
        say_at_once(self._first_words(_name(number)))
        return True

    def signal(self) -> int:
        """The signal that any process got so far, or 0. A collective call."""
        number = self._largest(self._noted)
        if number:
            self._say_first_words(number)  # where another process got it
        return number


def _request(number: int) -> int:
    """The signal that one stands for."""
    return signal.SIGTERM if number == ORPHANED else number


def _name(number: int) -> str:
    """What a person calls a signal."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


_open_end: int | None = None  # of the connection of the Interruption that is in force


def _hear_nothing() -> None:
    """In a fork, such as a data worker: its signals are not those of the run."""
    if _open_end is not None:
        signal.set_wakeup_fd(-1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_hear_nothing)
