"""What a person sees of a run: messages, the progress bar, the curves, the image grids."""

import functools
import importlib.metadata
import math
import os
import shlex
import signal
import sys
import textwrap
import threading
import time
import traceback
from collections import deque
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from . import launch
from .flags import without_secrets
from .interruption import follow_launcher


class UserError(Exception):
    """Something a user can fix, in one sentence. `exit_code` is 2 for a wrong command or dataset, else 1.

    `everywhere` is True for an error that all processes raise together, and False for one that one of them met by
    itself; None where that is not known.
    """

    def __init__(self, message, exit_code=2, everywhere=None):
        super().__init__(message)
        self.exit_code, self.everywhere = exit_code, everywhere


at_the_end = []  # functions that `run` calls before it leaves: processes of several leave without atexit's


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

    return tqdm(items, what, total, delay=delay, disable=not is_main_process(), **_place_of_a_bar())


def _place_of_a_bar():
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


class _Heard:
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


def reason_of(error):
    """An exception as one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def run(main):
    """Call `main(argv)` and leave with its exit code; a UserError becomes one sentence, never a stack trace.

    Secrets leave sys.argv, which trackers record.
    """
    argv = sys.argv[1:]
    sys.argv[1:] = without_secrets(argv)
    sys.stderr = _Heard(sys.stderr)
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # as libraries.begin has left it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    follow_launcher()
    # A tracker writes its files in the background; when it cannot any more, the run goes on without it.
    threading.excepthook = lambda failed: warn(f"a background thread failed ({reason_of(failed.exc_value)})")
    try:
        code = main(argv)
    except UserError as error:
        if error.everywhere is None and not is_main_process():
            time.sleep(2)  # where all have met it, the first one says so, and the launcher ends this one meanwhile
        if is_main_process() or not error.everywhere:
            print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr, flush=True)
        code = error.exit_code
    except Exception as error:
        sentence = _diagnosis(error)
        if sentence is None:
            traceback.print_exc()
        else:
            print(f"{Path(sys.argv[0]).name}: error: {sentence}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:  # before the loop, where there is nothing to save yet
        code = 130
    for leave in at_the_end:
        leave()
    if os.environ.get("WORLD_SIZE", "1") != "1":
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # without the destructors of process groups, see engine.finish and jax_engine.finish
    sys.exit(code)


def shortened(names, most=10):
    """At most `most` names, separated by commas, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more


def not_finite(step, loss, names, stop, keep):
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


def cut_short(error, keep):
    """The UserError of an image that ends a run of one process. `keep()` writes what was trained until then, and
    returns its folder, or None."""
    folder = keep()
    kept = f"what was trained until then is in {folder}" if folder else "what was trained until then was not written"
    return UserError(f"{error}; {kept}", exit_code=error.exit_code, everywhere=error.everywhere)


def _diagnosis(error):
    """A sentence for an error that is no fault of this code but no UserError either, or None.

    The types are told by name, since torch may not be installed.
    """
    kind, reason = type(error).__name__, reason_of(error)
    if kind == "OutOfMemoryError":
        return (
            f"out of device memory ({reason}); lower --train_batch_size, or try --gradient_checkpointing, "
            "--mixed_precision or --use_8bit_adam"
        )
    if "RESOURCE_EXHAUSTED" in str(error):  # JAX's status
        return (
            f"out of device memory ({reason}); lower --train_batch_size, or try --gradient_checkpointing or "
            "--mixed_precision bf16"
        )
    if "DataLoader worker" in str(error):
        return (
            f"a data worker was killed ({reason}), often for want of memory or, in a container, of /dev/shm (docker "
            "run --ipc=host); lower --dataloader_num_workers, and continue with --resume_from_checkpoint latest"
        )
    if os.environ.get("WORLD_SIZE", "1") != "1" and (kind.startswith("Dist") or "gloo" in str(error).lower()):
        rank = os.environ.get("RANK", "?")
        return (
            f"process {rank} lost another process of this run ({reason}), whose own message stands above if it could "
            "leave one; start all of them again with --resume_from_checkpoint latest"
        )
    return None


def resume_command(argv):
    """The command line that continues this run, ready to paste; `argv` without the script, without secrets."""
    kept, skip = [], False
    for word in argv:
        if not skip and not word.startswith("--resume_from_checkpoint"):
            kept.append(word)
        skip = word == "--resume_from_checkpoint"
    return shlex.join([*_launcher(), sys.argv[0], *kept, "--resume_from_checkpoint", "latest"])


def stopped(number, step, checkpoint, argv):
    """Say how to continue a run that a signal, by its `number`, stopped after a step; `argv` as `resume_command`
    takes it. Returns the exit code. Raises UserError where the step has no `checkpoint`."""
    if checkpoint is None:
        raise UserError(f"stopped after step {step}, which could not be saved", exit_code=1)
    say(f"stopped after step {step}; continue with:\n  {resume_command(argv)}")
    return 128 + number


def _launcher():
    """The words that start this script the way it was started, as far as the environment tells."""
    processes, precision = os.environ.get("WORLD_SIZE", "1"), os.environ.get("ACCELERATE_MIXED_PRECISION")
    machines = os.environ.get("GROUP_WORLD_SIZE", "1")
    if precision is None and "TORCHELASTIC_RUN_ID" not in os.environ:
        return ["python"]
    if precision is None:
        names = {"node_rank": "GROUP_RANK", "master_addr": "MASTER_ADDR", "master_port": "MASTER_PORT"}
        here = ["torchrun", "--nproc_per_node", os.environ.get("LOCAL_WORLD_SIZE", processes)]
        return [*here, "--nnodes", machines, *_told(names)] if machines != "1" else here
    kind = ["--multi_gpu"]
    if launch.uses_fsdp():
        kind = ["--use_fsdp", "--fsdp_version", os.environ.get("FSDP_VERSION", "1")]
    if launch.uses_deepspeed():
        kind = ["--use_deepspeed", *launch.deepspeed_words()]
    several = [*(kind if processes != "1" else []), "--num_processes", processes]  # else it would take every GPU
    if machines != "1":  # as on the first one, which prints it
        names = {"machine_rank": "GROUP_RANK", "main_process_ip": "MASTER_ADDR", "main_process_port": "MASTER_PORT"}
        several += ["--num_machines", machines]
        several += ["--deepspeed_multinode_launcher", "standard"] if launch.uses_deepspeed() else []
        several += _told(names)
    return ["accelerate", "launch", *several, "--mixed_precision", precision, *launch.dynamo_words()]


def _told(names):
    """The words of flags whose values the environment has, {flag: variable}."""
    return [word for flag, name in names.items() for word in (f"--{flag}", os.environ.get(name, "0"))]


def announce(about, base, device, output_dir, parameters, updates, val_dataset, total, state):
    """The lines before the progress bar: what is about to be trained. Returns the same as a dict that JSON can hold.

    Args: about, what a checkpoint's manifest takes; what the base model, the device and the output folder are called;
    the parameters that are trained; data.BatchPlan; the data.Rows held out, or None; the number of steps in `total`;
    the RunState.
    """
    flags, processes = about["flags"], about["world_size"]
    facts = {
        "script": about["script"],
        "base": str(base),
        "device": device,
        "processes": processes,
        "precision": "bf16 throughout" if flags.get("full_bf16") else PRECISIONS.get(flags["mixed_precision"]),
        "parameters": sum(math.prod(parameter.shape) for parameter in parameters),
        "pictures": updates.size,
        "held_out": len(val_dataset or []),
        "pictures_per_update": updates.samples,
        "updates": total,
        "epochs": total / updates.per_epoch,
        "seed": state.seed,
        "launcher": _launcher(),
        "flags": flags,
        "libraries": versions(),
    }
    many = f"{updates.window:,} images"
    if updates.samples < updates.window:
        many = f"up to {many}, {updates.samples:.3g} on average"
    shares = [f"batch {updates.batch_size}"]
    shares += [f"{updates.accumulation} accumulated"] if updates.accumulation > 1 else []
    shares += [f"{processes} devices"] if processes > 1 else []
    made = f", of which {state.step:,} are made" if state.step else ""
    val_samples = f", and {facts['held_out']:,} held out" if val_dataset else ""
    rows = {
        "base model": facts["base"],
        "trained": f"{millions(facts['parameters'])} parameters, {facts['precision']}, on {device}",
        "images": f"{updates.size:,}{val_samples}",
        "a step": f"{many}: {' x '.join(shares)}" if len(shares) > 1 else many,
        "steps": f"{total:,} in {facts['epochs']:,.1f} epochs{made}",
        "seed": str(state.seed),
        "output": str(output_dir),
    }
    say("\n".join([_strong(facts["script"]), *_table(rows)]))
    return facts


PRECISIONS = {"no": "float32", None: "float32", "bf16": "bf16 mixed with float32", "fp16": "fp16 mixed with float32"}


def conclude(output_dir, progress, usage):
    """The lines after it: how long it took, how well it went, what the output folder holds, the lines that use it."""
    from .metrics import Log  # which has its warnings from here

    folder, rows = Path(output_dir), {}
    if progress.step == progress.first:
        heading = f"step {progress.step:,} was the last one already: nothing was trained"
    else:
        took = duration(time.perf_counter() - progress.began)
        heading = f"trained to step {progress.step:,} in {took}, at {progress.speed():.3g} images/s"
        rows["loss"] = f"{progress.last_loss:.4f} in the last step"
    with suppress(OSError):
        log = Log(folder)
        best, looks = log.lowest("val_loss"), log.finite("val_loss")
        if best and best[0] == max(looks):
            rows["validation loss"] = f"{best[1]:.4f} after step {best[0]:,}: the last one is the lowest"
        elif best:
            last = f"{looks[max(looks)]:.4f} after step {max(looks):,} the last"
            rows["validation loss"] = f"{best[1]:.4f} after step {best[0]:,} is the lowest, {last}"
    say("\n".join(["", _strong(heading), *_table(rows)]))
    say("\n".join(["", _strong(f"{folder} holds"), *_table(_contents(folder))]))
    say("\n".join(["", _strong("look at it"), f"    {_report_command()} {shlex.quote(str(folder))}"]))
    say("\n".join(["", _strong("use it"), textwrap.indent(usage.strip(), "    ")]))


def _report_command():
    """The words that start report.py from the current folder."""
    root, words = Path(__file__).parent.parent, "python -m training_utils.report"
    return words if Path.cwd() == root else f"PYTHONPATH={shlex.quote(str(root))} {words}"


def _contents(folder):
    """What a finished run's output folder holds, {name: what it is}."""
    from .checkpoints import step_of  # which has its warnings from here

    steps = sorted(step for path in folder.glob("checkpoint-*") if (step := step_of(path)) is not None)
    grids = len(list(folder.glob("validation/step-*.png")))
    rows = {path.name: "the adapters" for path in folder.glob("pytorch_lora_weights.safetensors")}
    rows |= {path.name: "the same for WebUI and ComfyUI" for path in folder.glob("pytorch_lora_weights_*.safetensors")}
    if (folder / "model_index.json").exists() and not rows:
        rows["model_index.json"] = "and the folders beside it: the pipeline"
    if steps:
        name = f"checkpoint-{steps[0]}" + (f" … {steps[-1]}" if len(steps) > 1 else "")
        count = f"{len(steps)} checkpoints" if len(steps) > 1 else "a checkpoint"
        rows[name] = f"{count}, to continue from with --resume_from_checkpoint"
    if grids:
        rows["validation"] = f"{grids} grids of images" if grids > 1 else "a grid of images"
    known = {
        "metrics.jsonl": "the curves, a line for each step",
        "logs": "what the trackers keep",
        "run.yaml": "every setting; --config with this file repeats the run",
        "README.md": "the model card",
    }
    return rows | {name: what for name, what in known.items() if (folder / name).exists()}


def millions(count):
    """A number of parameters in words, with three digits or more."""
    if count < 1e5:
        return f"{count:,}"
    return f"{count / 1e6:,.{max(0, 2 - math.floor(math.log10(count / 1e6)))}f} M"


def duration(seconds):
    """Seconds in words."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def _table(rows):
    """Lines for {label: text}, the texts below each other and wrapped to the terminal's width."""
    margin = 6 + max(map(len, rows), default=0)
    try:
        columns = os.get_terminal_size(sys.stderr.fileno()).columns
    except (OSError, ValueError):  # a file
        columns = 119
    width = max(min(columns, 119), margin + 30)
    wrapper = textwrap.TextWrapper(width, break_long_words=False, break_on_hyphens=False)
    wrapper.subsequent_indent = " " * margin
    for label, text in rows.items():
        wrapper.initial_indent = f"  {label}".ljust(margin)
        yield wrapper.fill(text)


def _strong(text):
    """A heading, bold on a terminal."""
    plain = not sys.stderr.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return text if plain else f"\033[1m{text}\033[0m"


@functools.cache
def versions():
    """The libraries that shape a result, {name: version}."""
    names = ["torch", "diffusers", "transformers", "accelerate", "peft", "jax", "flax", "optax", "numpy"]
    found = {dist.metadata["Name"].lower(): dist.version for dist in importlib.metadata.distributions()}
    return {name: found[name] for name in names if name in found}


def tracker_config(settings):
    """A dict of settings as trackers take it: numbers, strings and booleans."""
    simple = (bool, int, float, str, type(None))
    return {name: value if isinstance(value, simple) else str(value) for name, value in settings.items()}


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
            **_place_of_a_bar(),
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


def due(state, steps, epochs, last):
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


# ---------------------------------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------------------------------


def _font(size):
    return ImageFont.load_default(size)


def _fit(draw, text, font, width):
    """`text` broken into at most three lines of `width` pixels, the last one shortened if there is more."""
    lines, words = [""], text.split()
    for word in words:
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer, font=font) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    short = lines[:3]
    if len(lines) > 3:
        short[-1] += " …"
    for at, line in enumerate(short):
        while draw.textlength(line, font=font) > width and len(line) > 2:
            line = line[:-2].rstrip() + "…"
        short[at] = line
    return "\n".join(short)


def grid(images, captions, title, columns=4, side=256):
    """One captioned contact sheet of square PIL images: (images, captions, title line) to a PIL image.

    `side` is the size in pixels that each image is shown at; small ones are enlarged without smoothing.
    """
    columns = min(columns, len(images))
    gap, title_height = 12, 40
    rows = -(-len(images) // columns)
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    texts = [_fit(ruler, caption, _font(14), side) for caption in captions]
    caption_height = 8 + 18 * max(text.count("\n") + 1 for text in texts)
    width = columns * (side + gap) + gap
    sheet = Image.new("RGB", (width, title_height + rows * (side + caption_height + gap) + gap), (250, 250, 248))
    draw = ImageDraw.Draw(sheet)
    draw.text((gap, 11), _fit(draw, title, _font(18), width - 2 * gap), fill=(30, 30, 30), font=_font(18))
    for at, (image, text) in enumerate(zip(images, texts, strict=True)):
        left = gap + (at % columns) * (side + gap)
        top = title_height + gap // 2 + (at // columns) * (side + caption_height + gap)
        smooth = Image.Resampling.NEAREST if max(image.size) < side else Image.Resampling.LANCZOS
        sheet.paste(image.resize((side, side), smooth), (left, top))
        draw.multiline_text((left, top + side + 4), text, fill=(70, 70, 70), font=_font(14), spacing=3)
    return sheet


def log_images(tracker, images, captions, step):
    """Hand images (a list of PIL) to a tracker, if it is one that shows images, at this step."""
    if tracker.name == "tensorboard":
        array = np.stack([np.asarray(image) for image in images])
        tracker.writer.add_images("validation", array, step, dataformats="NHWC")
    elif tracker.name == "wandb":
        import wandb

        shown = [wandb.Image(image, caption=caption) for image, caption in zip(images, captions)]
        tracker.log({"validation": shown}, step=step)
    elif tracker.name == "comet_ml":
        for at, image in enumerate(images):
            tracker.writer.log_image(image, name=f"validation {captions[at]}", step=step)


def tell_trackers(trackers, action):
    """Do `action(tracker)` with each of a list of trackers. One that fails is named and leaves the list; the run goes
    on."""
    for tracker in list(trackers):
        try:
            action(tracker)
        except Exception as error:
            warn(f"{tracker.name} failed ({reason_of(error)}); the run goes on without it")
            trackers.remove(tracker)


def grid_name(step):
    """Where the validation images of a step lie inside the output folder."""
    return f"validation/step-{step:06d}.png"


def standing_grids(output_dir, step):
    """The grids of validation images that an earlier run left at this step, as names: one or none."""
    return [name for name in [grid_name(step)] if (Path(output_dir) / name).is_file()]


def publish_images(trackers, images, prompts, step, output_dir):
    """Write images (a list of PIL) as one captioned grid under `output_dir` and hand them to the trackers."""
    path = Path(output_dir) / grid_name(step)
    sheet = grid(images, prompts, f"after {step:,} steps")
    tell_trackers(trackers, lambda tracker: log_images(tracker, images, prompts, step))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(path)
        say(f"step {step}: images in {path}")
    except OSError as error:
        warn(f"{path} could not be written ({reason_of(error)})")
