"""The progress bar of a run and the log of its losses."""

import math
import sys
import time
from collections import deque
from dataclasses import replace

from training_utils.base import console
from training_utils.base.console import is_main_process, warn
from training_utils.base.errors import UserError
from training_utils.base.formats import shortened


class Progress:
    """The progress bar over steps and the log of their losses.

    Losses stay where they were computed until `logging_steps` of them are there, or until `flush`: fetching one is a
    wait for the device. `fetch(scalars)` turns a list of scalars into numbers averaged over the processes; it is a
    collective call, so every process must flush at the same steps. `log(values, step)` hands one step's values to
    the trackers. `not_finite(step, loss, before)` is called for a step whose loss or gradient turns out not to be
    finite; `before` is the RunState before it. (A loss that is not finite has a gradient that is not.) `memory()` says
    what memory is in use, {name: number}, which is logged with them.
    """

    def __init__(self, state, total, logging_steps, samples_per_step, fetch, log, not_finite, memory=dict):
        from tqdm import tqdm

        self.before, self.step, self.first, self.skipped = replace(state), state.step, state.step, 0
        self.logging_steps, self.samples = logging_steps, samples_per_step
        self.fetch, self.log, self.not_finite, self.memory = fetch, log, not_finite, memory
        self.waiting, self.beside, self.last_loss = [], {}, None
        self.clock = self.began = time.perf_counter()
        self.busy = 0.0  # seconds, without validation and checkpoints
        self.seconds = deque(maxlen=8)  # that a step took, at each of the last looks
        self.live = sys.stderr.isatty()
        self.bar = tqdm(
            total=total,
            initial=state.step,
            desc="steps",
            bar_format="{desc} {n_fmt}/{total_fmt} |{bar}| {elapsed}<{remaining}{postfix}",  # fits 80 columns
            smoothing=0.05,
            disable=not is_main_process(),
            **console.bar_options(),
        )

    def update(self, state, loss, grad_norm, learning_rate):
        """Count the step that led to a RunState; `loss` and `grad_norm` may be tensors on a device."""
        self.waiting.append((replace(state), loss, grad_norm, learning_rate, self.beside))
        self.beside = {}
        self.bar.update(state.step - self.step)
        self.step, self.skipped = state.step, 0
        if len(self.waiting) >= self.logging_steps:
            self.flush()

    def note(self, values):
        """Have numbers by name logged together with the coming step."""
        self.beside |= values

    def skip(self, checkpoint):
        """Count a step that was not made because the fp16 gradients overflowed; the loss scale goes down by it.

        Raises UserError when it happened 50 times in a row, since then it is not the scale. The weights, which have
        not changed meanwhile, are kept by `checkpoint()`, which returns its folder or None.
        """
        self.skipped += 1
        if self.skipped == 50:
            folder = checkpoint()
            kept = f"the state before them is in {folder}" if folder else "the state before them could not be written"
            raise UserError(
                f"the fp16 gradients overflowed 50 times in a row after step {self.step}: the loss is not finite "
                f"any more; {kept}. Use --mixed_precision bf16, or continue with a lower --learning_rate",
                exit_code=1,
                everywhere=True,
            )

    def pause(self):
        """Leave the time since the last flush out of the throughput: a validation or a checkpoint comes between."""
        self.clock = time.perf_counter()

    def flush(self):
        """Fetch and log what is waiting."""
        if not self.waiting:
            return
        waiting, self.waiting = self.waiting, []
        losses = self.fetch([loss for _, loss, _, _, _ in waiting])
        norms = self.fetch([norm for _, _, norm, _, _ in waiting])
        took, memory = time.perf_counter() - self.clock, self.memory()
        self.busy += took
        self.seconds.append(took / len(waiting))
        speed = self.samples / self.seconds[-1]
        self.last_loss = losses[-1]
        words = f"loss {losses[-1]:.4f}, lr {waiting[-1][3]:.2e}, {speed:.3g} images/s"
        self.bar.set_postfix_str(words, refresh=self.live)
        for (state, _, _, rate, beside), loss, norm in zip(waiting, losses, norms, strict=True):
            values = {"train_loss": loss, "lr": rate, "samples_per_second": speed, "grad_norm": norm}
            self.log(values | memory | beside, state.step)
            if not math.isfinite(norm):
                self.not_finite(state.step, loss, self.before)
            self.before = state
        self.clock = time.perf_counter()

    def speed(self):
        """Images a second over the whole run, validation and checkpoints aside."""
        return self.samples * (self.step - self.first) / self.busy

    def close(self):
        self.flush()
        self.bar.close()


def validation_due(state, steps, epochs, last):
    """Whether to validate after this step: each `steps` steps, or without it each `epochs` epochs; and at the end.

    0 means never.
    """
    if not (epochs if steps is None else steps):
        return False
    if state.step == last:
        return True
    if steps is not None:
        return state.step % steps == 0
    return state.position.sample == 0 and state.position.epoch % epochs == 0


def report_not_finite(step, loss, names, stop, keep):
    """Say what becomes of a step whose loss or gradient is not finite; `names` are what to call its images.

    When to `stop`, `keep()` writes the state before it and returns its folder, or None; then raises UserError.
    """
    images = shortened(names, 8)
    what = f"the loss or the gradient of step {step} is not finite (loss {loss:.6g}; its images: {images})"
    if not stop:
        warn(f"{what}; this step was left out")
        return
    folder = keep()
    kept = f"the state before it is in {folder}" if folder else "the state before it could not be written"
    raise UserError(
        f"{what}; {kept}. Look at these images; continue with a lower --learning_rate or --mixed_precision no, or "
        "with --on_nan skip, which leaves such steps out",
        exit_code=1,
        everywhere=True,
    )
