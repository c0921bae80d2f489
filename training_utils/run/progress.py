"""The progress bar of a run and the log of its losses."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from training_utils.base import console
from training_utils.base.console import is_main_process, warn
from training_utils.base.errors import UserError
from training_utils.base.formats import shortened
from training_utils.run.state import RunState

MOST_OVERFLOWS = 50  # in a row, after which it is not the loss scale


@dataclass(frozen=True)
class FinishedStep:
    """A step whose loss is not logged yet; `state` is the RunState after it, `samples` the number of those that it
    took, `extra` what else to log, by name.

    `loss` and `grad_norm` are numbers or scalars on a device.
    """

    state: RunState
    samples: int
    loss: Any
    grad_norm: Any
    learning_rate: float
    extra: dict[str, float]


class Progress:
    """The progress bar over steps and the log of their losses.

    Losses stay where they were computed until `logging_steps` of them are there, or until `flush`: fetching one is a
    wait for the device.
    """

    def __init__(
        self,
        state: RunState,
        total: int,
        logging_steps: int,
        fetch: Callable[[list[Any]], list[float]],
        log: Callable[[dict[str, float], int], None],
        not_finite: Callable[[int, float, RunState], None],
        memory: Callable[[], dict[str, float]] = dict,
    ) -> None:
        """Show a run of `total` steps that begins at a RunState.

        `fetch(scalars)` turns scalars into numbers averaged over the processes; it is a collective call, so every
        process must flush at the same steps. `log(values, step)` hands one step's values to the trackers.
        `not_finite(step, loss, before)` is called for a step whose gradient turns out not to be finite, which it is
        where the loss is not; `before` is the RunState before it. `memory()` says what memory is in use, {name: GiB},
        which is logged with the losses.
        """
        from tqdm import tqdm

        self.step = self.first_step = state.step
        self.logging_steps = logging_steps
        self.last_loss: float | None = None
        self.started = time.perf_counter()
        # What a step took, in seconds, on the average of each of the last logs.
        self.step_seconds: deque[float] = deque(maxlen=8)

        self._fetch = fetch
        self._log = log
        self._not_finite = not_finite
        self._memory = memory
        self._state_before = replace(state)  # the first step that is not logged yet
        self._unlogged: list[FinishedStep] = []
        self._extra: dict[str, float] = {}
        self._overflows = 0
        self._timed_since = self.started
        # Of the steps that are logged, without validation and checkpoints.
        self._training_seconds = 0.0
        self._samples = 0
        self._is_terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=total,
            initial=state.step,
            desc="steps",
            bar_format="{desc} {n_fmt}/{total_fmt} |{bar}| {elapsed}<{remaining}{postfix}",  # fits 80 columns
            smoothing=0.05,
            disable=not is_main_process(),
            **console.bar_options(),
        )

    def update(self, state: RunState, samples: int, loss: Any, grad_norm: Any, learning_rate: float) -> None:
        """Count the step that led to a RunState and took so many samples in all processes; `loss` and `grad_norm` may
        be scalars on a device."""
        self._unlogged.append(FinishedStep(replace(state), samples, loss, grad_norm, learning_rate, self._extra))
        self._extra = {}
        self._bar.update(state.step - self.step)
        self.step = state.step
        self._overflows = 0
        if len(self._unlogged) >= self.logging_steps:
            self.flush()

    def log_with_next_step(self, values: dict[str, float]) -> None:
        """Have these numbers, {name: value}, logged together with the coming step."""
        self._extra |= values

    def count_overflow(self, save: Callable[[], Path | None]) -> None:
        """Count a step that was skipped because the fp16 gradients overflowed; the loss scale goes down by it.

        Raises UserError when it happened 50 times in a row, since then it is not the scale. `save()` writes the
        weights, which have not changed meanwhile, and returns their folder, or None where that failed.
        """
        self._overflows += 1
        if self._overflows == MOST_OVERFLOWS:
            raise UserError(
                f"the fp16 gradients overflowed {MOST_OVERFLOWS} times in a row after step {self.step}: the loss is "
                f"not finite any more; {_where_saved(save())}. Use --mixed_precision bf16, "
                "or continue with a lower --learning_rate",
                exit_code=1,
                everywhere=True,
            )

    def pause(self) -> None:
        """Leave the time since the last flush out of the throughput: a validation or a checkpoint comes between."""
        self._timed_since = time.perf_counter()

    def flush(self) -> None:
        """Fetch and log the losses of all steps that are not logged yet."""
        if not self._unlogged:
            return
        steps, self._unlogged = self._unlogged, []
        losses = self._fetch([step.loss for step in steps])
        norms = self._fetch([step.grad_norm for step in steps])
        seconds = time.perf_counter() - self._timed_since
        self._training_seconds += seconds
        self.step_seconds.append(seconds / len(steps))
        samples = sum(step.samples for step in steps)
        self._samples += samples
        speed = samples / seconds
        self.last_loss = losses[-1]
        words = f"loss {losses[-1]:.4f}, lr {steps[-1].learning_rate:.2e}, {speed:.3g} images/s"
        self._bar.set_postfix_str(words, refresh=self._is_terminal)
        memory = self._memory()
        for step, loss, norm in zip(steps, losses, norms, strict=True):
            values = {"train_loss": loss, "lr": step.learning_rate, "samples_per_second": speed, "grad_norm": norm}
            self._log(values | memory | step.extra, step.state.step)
            if not math.isfinite(norm):
                self._not_finite(step.state.step, loss, self._state_before)
            self._state_before = step.state
        self._timed_since = time.perf_counter()

    def speed(self) -> float:
        """Images a second over the whole run, without validation and checkpoints."""
        return self._samples / self._training_seconds

    def close(self) -> None:
        """Log what is left and leave the bar as it stands."""
        self.flush()
        self._bar.close()


def report_not_finite(
    step: int, loss: float, names: Sequence[str], stop: bool, save: Callable[[], Path | None]
) -> None:
    """Say what becomes of a step whose loss or gradient is not finite; `names` are what to call its images.

    When to `stop`, `save()` writes the state before it and returns its folder, or None where that failed; then raises
    UserError.
    """
    images = shortened(names, 8)
    what = f"the loss or the gradient of step {step} is not finite (loss {loss:.6g}; its images: {images})"
    if not stop:
        warn(f"{what}; this step was skipped")
        return
    raise UserError(
        f"{what}; {_where_saved(save())}. Look at these images; continue with a lower "
        "--learning_rate or --mixed_precision no, or with --on_nan skip, which skips such steps",
        exit_code=1,
        everywhere=True,
    )


def _where_saved(folder: Path | None) -> str:
    return f"the last good state is in {folder}" if folder else "the last good state could not be written"
