"""SIGTERM and SIGINT end a run in good order: the step is finished, a checkpoint written, the exit code 128 + n."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)
ORPHANED = getattr(signal, "SIGUSR1", None)  # what this process is sent when its launcher dies; Windows has none
SAME_REQUEST = 2.0  # seconds; a queue signals the launcher and its processes, and the launcher passes its signal on
PR_SET_PDEATHSIG = 1  # of Linux' prctl


def follow_launcher() -> None:
    """Let this process be sent ORPHANED when the launcher that started it dies (Linux).

    `accelerate launch` of a single process ends at once on SIGTERM and leaves the process that trains running.
    """
    if sys.platform == "linux" and "ACCELERATE_MIXED_PRECISION" in os.environ:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, ORPHANED)


class Interruption:
    """A context in which the first SIGTERM or SIGINT is only noted; a later one ends the process at once.

    `largest(number)` returns the largest of all processes' numbers: a signal may reach them at different steps, and
    all must stop at the same one. Since a checkpoint is complete or absent, the second signal is harmless.
    """

    def __init__(self, largest: Callable[[int], int]) -> None:
        self._largest = largest
        self._noted = 0  # the first signal's number
        self._noted_at = 0.0
        self._handlers_before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        self._handlers_before = {number: signal.signal(number, self._note) for number in SIGNALS}
        if ORPHANED is not None:
            self._handlers_before[ORPHANED] = signal.signal(ORPHANED, self._note_orphaned)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if not self._noted:
            self._noted = number
            self._noted_at = time.monotonic()
        elif time.monotonic() - self._noted_at > SAME_REQUEST:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def _note_orphaned(self, _number: int, frame: FrameType | None) -> None:
        # Ctrl-C kills the launcher too, which is not a second request, however late it is heard of: Python runs a
        # handler only when a call into C, such as the writing of a checkpoint, has returned.
        if not self._noted:
            self._note(signal.SIGTERM, frame)

    def signal(self) -> int:
        """The signal that any process got so far, or 0. A collective call."""
        return self._largest(self._noted)
