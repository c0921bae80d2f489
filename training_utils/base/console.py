"""What a run says on the terminal: lines, warnings and progress bars that do not break each other."""

import os
import sys


def is_main_process():
    """Whether this is the process that speaks: the first of several, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def say(message, everywhere=False):
    """Print a line without breaking a progress bar: once, whatever the number of processes, or `everywhere`."""
    if everywhere or is_main_process():
        from tqdm import tqdm

        tqdm.write(str(message), file=sys.stderr)
        sys.stderr.flush()


def warn(message, everywhere=False):
    """Print a warning once, whatever the number of processes, or `everywhere`: what only one of them may know."""
    say(f"warning: {message}", everywhere)


def bar(items, what, total, delay=1):
    """A progress bar over `items`, or with None one that is moved by hand; the first process alone shows it, and only
    for what takes longer than `delay` seconds. Into a file it writes a line now and then."""
    from tqdm import tqdm

    return tqdm(items, what, total, delay=delay, disable=not is_main_process(), **bar_options())


def bar_options():
    """Where a bar is shown and how often, as tqdm takes it."""
    live = sys.stderr.isatty()
    return dict(file=sys.stderr if live else _Lines(), mininterval=0.1 if live else 10, dynamic_ncols=True)  # seconds


class _Lines:
    """Takes what a bar writes to standard error where that is no terminal: each of its states on a line of its own,
    instead of all of them on one, behind carriage returns."""

    last = None

    def write(self, text):
        for state in filter(None, map(str.rstrip, text.split("\r"))):
            if state != self.last:
                sys.stderr.write(f"{state}\n")
            self.last = state

    def __getattr__(self, name):
        return getattr(sys.stderr, name)


class TolerantStream:
    """Standard error whose reader may go away, as `tee` does at Ctrl-C: what is written then is lost, and no more."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        return self._attempt(self.stream.write, text)

    def flush(self):
        self._attempt(self.stream.flush)

    def _attempt(self, action, *words):
        try:
            return action(*words)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name):
        return getattr(self.stream, name)
