"""What a run is doing and what of it is saved, and the words on it when a signal comes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from training_utils.run import commands
from training_utils.run.state import RunState


@dataclass
class Standing:
    """What a run is doing, and what of it is saved.

    `state` is where it stands, `saved_step` the step of the last checkpoint, or None, `command` its command line
    without the script. A run that never `writes` has no checkpoints.
    """

    state: RunState
    command: Sequence[str]
    writes: bool
    saved_step: int | None = None
    under_way: str = "this step"

    @contextmanager
    def during(self, what: str) -> Iterator[None]:
        """The context in which something other than a step is under way."""
        before = self.under_way
        self.under_way = what
        yield
        self.under_way = before

    def first_words(self, name: str) -> str:
        """What a first signal, called `name`, does, and what a second one would cost."""
        does = f"{name}: finishing {self.under_way}"
        if not self.writes:
            return f"{does}; a second {name} ends this dry run at once"
        saving = f"checkpoint-{self.state.step}"
        then = "" if self.under_way == saving else ", then writing a checkpoint"
        return f"{does}{then}; a second {name} ends the run at once and loses {self._unsaved()}"

    def last_words(self, name: str) -> str:
        """What a second signal has done, and how to continue."""
        ended = f"{name} again: ended at once"
        if not self.writes:
            return ended
        lost = f"{ended}, and lost {self._unsaved()}"
        if self.saved_step is None:
            return lost
        return f"{lost}; continue with:\n  {commands.resume_command(self.command)}"

    def _unsaved(self) -> str:
        count = self.state.step - (self.saved_step or 0)
        if count == 0:
            return "no finished step"
        steps = f"the {count} {'step' if count == 1 else 'steps'}"
        if self.saved_step is None:
            return f"{steps} so far, as there is no checkpoint yet"
        return f"{steps} since checkpoint-{self.saved_step}"
