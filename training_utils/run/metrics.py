"""metrics.jsonl: a line for each step with its loss, learning rate and what else was measured."""

from __future__ import annotations

import json
import math
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from training_utils.base.console import warn
from training_utils.base.errors import reason_of
from training_utils.run.facts import RecordedFacts

NAME = "metrics.jsonl"


class Metrics:
    """Adds lines to metrics.jsonl; the interface is that of a tracker. The main process alone has one.

    Where the file cannot be written, for example on a full disk, that is said once, and the lines are added when it
    can be written again.
    """

    name = NAME

    def __init__(self, folder: str | Path, first_step: int, record: dict[str, Any]) -> None:
        """`record` says what is known about the run, as RunFacts.to_record does; its first line follows
        `first_step`."""
        self.path = Path(folder) / NAME
        self._unwritten = b""
        self._has_warned = False
        # A kill may have cut the last line off; then this one begins on a new line.
        with suppress(OSError), open(self.path, "rb") as file:
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":
                self._unwritten = b"\n"
        self._add(first_step, {"run": record})

    def _add(self, step: int, values: dict[str, Any]) -> None:
        line = {"step": step, "time": round(time.time(), 3)} | values
        self._unwritten += json.dumps(line, allow_nan=False).encode() + b"\n"
        try:
            with open(self.path, "ab", buffering=0) as file:
                while self._unwritten:
                    count = file.write(self._unwritten)
                    self._unwritten = self._unwritten[count:]
        except OSError as error:
            if not self._has_warned:
                warn(f"{self.path} could not be written ({reason_of(error)}); its lines are added when it can be")
            self._has_warned = True

    def log(self, values: dict[str, float], step: int) -> None:
        """Add the numbers of a step, {name: value}; one that is not finite becomes null."""
        self._add(step, {name: value if math.isfinite(value) else None for name, value in values.items()})

    def finish(self) -> None:
        """Nothing is open."""


class Log:
    """What metrics.jsonl in a folder holds. Raises OSError where there is none.

    `curves` is {name: {step: value}} with the steps in order, None for a value that was not a finite number; `runs`
    has what is known about each time the run was started, {"step", "time", ...}; `step` is the step that the run has
    reached; `time` that of the last line; `seconds` were spent from each start to its last line. What a run had
    written beyond the step that a later one resumed from does not count, nor does a line that a kill cut off.
    """

    def __init__(self, folder: str | Path) -> None:
        self.curves: dict[str, dict[int, float | None]] = {}
        self.runs: list[dict[str, Any]] = []
        self.step = 0
        self.time: float | None = None
        self.seconds = 0.0
        for line in (Path(folder) / NAME).read_bytes().splitlines():
            try:
                values = json.loads(line)
                step = int(values.pop("step"))
                when = float(values.pop("time"))
            except (ValueError, TypeError, AttributeError, KeyError):
                continue
            if isinstance(values.get("run"), dict):
                self._begin_run(step, when, values["run"])
            else:
                self._add_values(step, when, values)
        self.curves = {name: dict(sorted(curve.items())) for name, curve in self.curves.items() if curve}

    def _begin_run(self, step: int, when: float, record: dict[str, Any]) -> None:
        """Take in the first line of a run that begins after a step, which replaces what lies beyond it."""
        self.runs.append({"step": step, "time": when} | record)
        for curve in self.curves.values():
            for beyond in [at for at in curve if at > step]:
                del curve[beyond]
        self.step = step
        self.time = when

    def _add_values(self, step: int, when: float, values: dict[str, Any]) -> None:
        """Take in the numbers of a step."""
        for name, value in values.items():
            if value is None or isinstance(value, (int, float)):
                is_finite = value is not None and math.isfinite(value)
                self.curves.setdefault(name, {})[step] = value if is_finite else None
        if self.time:
            self.seconds += max(0.0, when - self.time)
        self.step = max(self.step, step)
        self.time = when

    @property
    def facts(self) -> RecordedFacts | None:
        """What is known about the run when it was last started; None where another version wrote the file."""
        return RecordedFacts.from_record(self.runs[-1]) if self.runs else None

    def finite(self, name: str) -> dict[int, float]:
        """A curve without what is not finite, {step: value}; empty where there is none."""
        return {step: value for step, value in self.curves.get(name, {}).items() if value is not None}

    def lowest(self, name: str) -> tuple[int, float] | None:
        """(step, value) where a curve is lowest, the first of several; None where it has no value."""
        return min(self.finite(name).items(), key=lambda pair: pair[1], default=None)
