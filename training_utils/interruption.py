"""SIGTERM and SIGINT end a run in good order: the step is finished, a checkpoint written, the exit code 128 + n."""

import os
import signal

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interruption:
    """A context in which the first SIGTERM or SIGINT is only noted; a second one ends the process at once.

    `largest(number)` returns the largest of all processes' numbers: a signal may reach them at different updates, and
    all must stop at the same one. Whole-or-absent checkpoints make the second signal harmless.
    """

    def __init__(self, largest=lambda number: number):
        self.largest, self.noted = largest, 0

    def __enter__(self):
        self.before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number, _frame):
        if self.noted:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.noted = number

    def signal(self):
        """The signal that any process got so far, or 0. A collective call."""
        return self.largest(self.noted)
