"""What a run says before its first step and after its last."""

import shlex
import textwrap
import time
from contextlib import suppress
from pathlib import Path

from training_utils.base import formats
from training_utils.base.console import say, warn
from training_utils.data.plan import BatchPlan
from training_utils.run import checkpoints
from training_utils.run.facts import RunFacts
from training_utils.run.metrics import Log
from training_utils.run.progress import Progress


def print_start_summary(facts: RunFacts, output_dir: str | Path) -> None:
    """Print the lines before the progress bar: what is about to be trained."""
    images = f"{facts.images:,}"
    if facts.validation_images:
        images += f", and {facts.validation_images:,} for validation"
    steps = f"{facts.steps:,} in {facts.epochs:,.1f} epochs"
    if facts.first_step:
        steps += f", {facts.first_step:,} already made"
    rows = {
        "base model": facts.base_model,
        "trained": f"{formats.large_count(facts.parameters)} parameters, {facts.precision}, on {facts.device}",
        "images": images,
        "a step": images_of_a_step(facts),
        "steps": steps,
        "seed": str(facts.seed),
        "output": str(output_dir),
    }
    say("\n".join([formats.heading(facts.script), *formats.table_lines(rows)]))


def images_of_a_step(facts: RunFacts) -> str:
    """How many images a step takes, and what they multiply from: `16 images: batch 4 x 2 accumulated x 2 devices`, or
    `2 images, all that there are: batch 16`."""
    size = facts.step_size
    factors = _factors(size.batch_size, size.accumulation, facts.world_size)
    count = image_count(facts)
    if size.steps_per_epoch == 1 and size.largest < size.batch_size * size.accumulation * facts.world_size:
        return f"{count}, all that there are: {factors}"
    return f"{count}: {factors}" if " x " in factors else count


def _factors(batch_size: int, accumulation: int, world_size: int) -> str:
    factors = [f"batch {batch_size}"]
    if accumulation > 1:
        factors.append(f"{accumulation} accumulated")
    if world_size > 1:
        factors.append(f"{world_size} devices")
    return " x ".join(factors)


def warn_of_large_batch(plan: BatchPlan, scale_lr: bool) -> None:
    """Warn where a step asks for more images than there are."""
    if plan.size >= plan.samples_per_step:
        return
    factors = _factors(plan.batch_size, plan.accumulation, plan.world_size)
    images = "1 image" if plan.size == 1 else f"{plan.size:,} images"
    flag = "--train_batch_size" if plan.batch_size > 1 else "--gradient_accumulation_steps"
    count = f"{plan.samples_per_step:,}"
    sentence = f"a step's batch of {count} ({factors}) is larger than the dataset of {images}; lower {flag}"
    if scale_lr:
        sentence += f": --scale_lr multiplies the learning rate by {count} all the same"
    warn(sentence)


def image_count(facts: RunFacts) -> str:
    """How many images a step takes: `16 images`, or `up to 16 images, 13.5 on average`."""
    largest = facts.step_size.largest
    count = "1 image" if largest == 1 else f"{largest:,} images"
    if facts.images_per_step < largest:
        return f"up to {count}, {facts.images_per_step:.3g} on average"
    return count


def print_end_summary(output_dir: str | Path, progress: Progress, usage: str) -> None:
    """Print the lines after the last step: how long it took, how well it went, what the output folder holds, and
    `usage`, the lines of Python that use the result."""
    folder = Path(output_dir)
    rows = {}
    if progress.step == progress.first_step:
        heading = f"step {progress.step:,} was the last one already: nothing was trained"
    else:
        took = formats.duration(time.perf_counter() - progress.started)
        heading = f"trained to step {progress.step:,} in {took}, at {progress.speed():.3g} images/s"
        rows["loss"] = f"{progress.last_loss:.4f} in the last step"
    with suppress(OSError):  # there is no metrics.jsonl: the disk was full
        validation = _validation_summary(Log(folder))
        if validation:
            rows["validation loss"] = validation
    sections = {
        heading: list(formats.table_lines(rows)),
        f"{folder} holds": list(formats.table_lines(_contents(folder))),
        "look at it": [f"    {_report_command()} {shlex.quote(str(folder))}"],
        "use it": [textwrap.indent(usage.strip(), "    ")],
    }
    for title, lines in sections.items():
        say("\n".join(["", formats.heading(title), *lines]))


def _validation_summary(log: Log) -> str | None:
    """Where the validation loss was lowest, and what it was last; None where there is none."""
    losses = log.finite("val_loss")
    best = log.lowest("val_loss")
    if best is None:
        return None
    step, loss = best
    last = max(losses)
    if step == last:
        return f"{loss:.4f} after step {step:,}: the last one is the lowest"
    return f"{loss:.4f} after step {step:,} is the lowest, {losses[last]:.4f} after step {last:,} the last"


def _report_command() -> str:
    """The words that start the report from the current folder."""
    root = Path(__file__).parents[2]
    words = "python -m tools.report"
    return words if Path.cwd() == root else f"PYTHONPATH={shlex.quote(str(root))} {words}"


def _contents(folder: Path) -> dict[str, str]:
    """What a finished run's output folder holds, {name: what it is}."""
    rows = {}
    for path in folder.glob("pytorch_lora_weights.safetensors"):
        rows[path.name] = "the adapters"
    for path in folder.glob("pytorch_lora_weights_*.safetensors"):
        rows[path.name] = "the same for WebUI and ComfyUI"
    if (folder / "model_index.json").exists() and not rows:
        rows["model_index.json"] = "and the folders beside it: the pipeline"

    steps = sorted(checkpoints.step_of(path) for path in checkpoints.list_checkpoints(folder))
    resumable = "to continue from with --resume_from_checkpoint"
    if len(steps) == 1:
        rows[f"checkpoint-{steps[0]}"] = f"a checkpoint, {resumable}"
    elif steps:
        rows[f"checkpoint-{steps[0]} … {steps[-1]}"] = f"{len(steps)} checkpoints, {resumable}"

    grids = len(list(folder.glob("validation/step-*.png")))
    if grids:
        rows["validation"] = f"{grids} grids of images" if grids > 1 else "a grid of images"
    files = {
        "metrics.jsonl": "the curves, a line for each step",
        "logs": "what the trackers keep",
        "run.yaml": "every setting; --config with this file repeats the run",
        "README.md": "the model card",
    }
    return rows | {name: what for name, what in files.items() if (folder / name).exists()}
