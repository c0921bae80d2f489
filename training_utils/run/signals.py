"""SIGTERM and SIGINT end a run in good order: the step is finished, a checkpoint written, the exit code 128 + n."""

import ctypes
import os
import signal
import sys
import time

SIGNALS = (signal.SIGTERM, signal.SIGINT)
ORPHANED = signal.SIGUSR1  # what this process is sent when its launcher dies
SAME_REQUEST = 2.0  # seconds; a queue signals the launcher and its processes, and the launcher passes its signal on
PR_SET_PDEATHSIG = 1


def follow_launcher():
    """Let this process be sent ORPHANED when the launcher that started it dies (Linux).

    `accelerate launch` of a single process ends at once on SIGTERM and leaves the process that trains running.
    """
    if sys.platform == "linux" and "ACCELERATE_MIXED_PRECISION" in os.environ:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, ORPHANED)


class Interruption:
    """A context in which the first SIGTERM or SIGINT is only noted; a later one ends the process at once.

    `largest(number)` returns the largest of all processes' numbers: a signal may reach them at different steps, and
    all must stop at the same one. Whole-or-absent checkpoints make the second signal harmless.
    """

    def __init__(self, largest):
        self.largest, self.noted, self.since = largest, 0, 0.0

    def __enter__(self):
        self.before = {number: signal.signal(number, self._note) for number in SIGNALS}
        # Ctrl-C kills the launcher too, which is no second request, however late it is heard of: Python runs a handler
        # only when a call into C, such as the writing of a checkpoint, has returned.
        self.before[ORPHANED] = signal.signal(ORPHANED, lambda *_: self.noted or self._note(signal.SIGTERM, None))
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number, _frame):
        if not self.noted:
            self.noted, self.since = number, time.monotonic()
        elif time.monotonic() - self.since > SAME_REQUEST:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def signal(self):
        """The signal that any process got so far, or 0. A collective call."""
        return self.largest(self.noted)
