"""TODO"""

import json
import math
import os
import time
from contextlib import suppress
from pathlib import Path

from training_utils.base.console import warn
from training_utils.base.errors import reason_of

NAME = "metrics.jsonl"


class Metrics:
    """Adds to metrics.jsonl; the interface is that of a tracker. The main process alone has one.

    `facts` is a dict that JSON can hold, about a run that begins after step `step`. Where the file cannot be
    written, on a full disk for one, that is said once, and the lines are added when it can be again.
    """

    name = NAME

    def __init__(self, folder, step, facts):
        self.path, self.waiting, self.said = Path(folder) / NAME, b"", False
        with suppress(OSError), open(self.path, "rb") as file:  # there is none, or it is empty
            file.seek(-1, os.SEEK_END)
            self.waiting = b"" if file.read() == b"\n" else b"\n"  # a kill has cut its last line off
        self._add(step, {"run": facts})

    def _add(self, step, values):
        line = {"step": step, "time": round(time.time(), 3)} | values
        self.waiting += json.dumps(line, allow_nan=False).encode() + b"\n"
        try:
            with open(self.path, "ab", buffering=0) as file:
                while self.waiting:
                    self.waiting = self.waiting[file.write(self.waiting) :]
        except OSError as error:
            if not self.said:
                warn(f"{self.path} could not be written ({reason_of(error)}); its lines are added when it can be")
            self.said = True

    def log(self, values, step):
        """Numbers by name, of a step."""
        self._add(step, {name: value if math.isfinite(value) else None for name, value in values.items()})

    def finish(self):
        """Nothing is open."""


class Log:
    """What metrics.jsonl in a folder holds. Raises OSError where there is none.

    `curves` is {name: {step: value}} with the steps in order, None for a value that was no finite number; `runs`
    the facts of each time the run was started, {"step", "time", ...}; `step` the step that it has reached; `time`
    that of the last line; `seconds` were spent from each start to its last line. What a run had written beyond the
    step that a later one went on from does not count, nor does a line that a kill cut off.
    """

    def __init__(self, folder):
        curves, self.runs, self.step, self.time, self.seconds = {}, [], 0, None, 0.0
        for line in (Path(folder) / NAME).read_bytes().splitlines():
            try:
                values = json.loads(line)
                step, when = int(values.pop("step")), float(values.pop("time"))
            except (ValueError, TypeError, AttributeError, KeyError):
                continue
            if isinstance(values.get("run"), dict):
                self.runs.append({"step": step, "time": when} | values["run"])
                for curve in curves.values():
                    for beyond in [at for at in curve if at > step]:
                        del curve[beyond]
                self.step, self.time = step, when
                continue
            for name, value in values.items():
                if value is None or isinstance(value, (int, float)):
                    finite = value is not None and math.isfinite(value)
                    curves.setdefault(name, {})[step] = value if finite else None
            self.seconds += max(0.0, when - self.time) if self.time else 0.0
            self.step, self.time = max(self.step, step), when
        self.curves = {name: dict(sorted(curve.items())) for name, curve in curves.items() if curve}

    def finite(self, name):
        """A curve without what is not finite, {step: value}; empty where there is none."""
        return {step: value for step, value in self.curves.get(name, {}).items() if value is not None}

    def lowest(self, name):
        """(step, value) where a curve is lowest, the first of several; None where it has no value."""
        return min(self.finite(name).items(), key=lambda pair: pair[1], default=None)
