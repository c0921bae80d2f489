"""What a run says before its first step and after its last."""

import math
import shlex
import textwrap
import time
from contextlib import suppress
from pathlib import Path

from training_utils.base import environment, formats
from training_utils.base.console import say
from training_utils.run import checkpoints, commands
from training_utils.run.metrics import Log


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
        "pictures_per_update": updates.mean_samples_per_step,
        "updates": total,
        "epochs": total / updates.steps_per_epoch,
        "seed": state.seed,
        "launcher": commands.launcher_words(),
        "flags": flags,
        "libraries": environment.library_versions(),
    }
    many = f"{updates.samples_per_step:,} images"
    if updates.mean_samples_per_step < updates.samples_per_step:
        many = f"up to {many}, {updates.mean_samples_per_step:.3g} on average"
    shares = [f"batch {updates.batch_size}"]
    shares += [f"{updates.accumulation} accumulated"] if updates.accumulation > 1 else []
    shares += [f"{processes} devices"] if processes > 1 else []
    made = f", of which {state.step:,} are made" if state.step else ""
    val_samples = f", and {facts['held_out']:,} held out" if val_dataset else ""
    rows = {
        "base model": facts["base"],
        "trained": f"{formats.millions(facts['parameters'])} parameters, {facts['precision']}, on {device}",
        "images": f"{updates.size:,}{val_samples}",
        "a step": f"{many}: {' x '.join(shares)}" if len(shares) > 1 else many,
        "steps": f"{total:,} in {facts['epochs']:,.1f} epochs{made}",
        "seed": str(state.seed),
        "output": str(output_dir),
    }
    say("\n".join([formats.heading(facts["script"]), *formats.table_lines(rows)]))
    return facts


PRECISIONS = {"no": "float32", None: "float32", "bf16": "bf16 mixed with float32", "fp16": "fp16 mixed with float32"}


def conclude(output_dir, progress, usage):
    """The lines after it: how long it took, how well it went, what the output folder holds, the lines that use it."""

    folder, rows = Path(output_dir), {}
    if progress.step == progress.first:
        heading = f"step {progress.step:,} was the last one already: nothing was trained"
    else:
        took = formats.duration(time.perf_counter() - progress.began)
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
    say("\n".join(["", formats.heading(heading), *formats.table_lines(rows)]))
    say("\n".join(["", formats.heading(f"{folder} holds"), *formats.table_lines(_contents(folder))]))
    say("\n".join(["", formats.heading("look at it"), f"    {_report_command()} {shlex.quote(str(folder))}"]))
    say("\n".join(["", formats.heading("use it"), textwrap.indent(usage.strip(), "    ")]))


def _report_command():
    """The words that start report.py from the current folder."""
    root, words = Path(__file__).parents[2], "python -m tools.report"
    return words if Path.cwd() == root else f"PYTHONPATH={shlex.quote(str(root))} {words}"


def _contents(folder):
    """What a finished run's output folder holds, {name: what it is}."""

    steps = sorted(step for path in folder.glob("checkpoint-*") if (step := checkpoints.step_of(path)) is not None)
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
