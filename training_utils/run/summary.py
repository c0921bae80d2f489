"""What a run says before its first step and after its last."""

import shlex
import textwrap
import time
from contextlib import suppress
from pathlib import Path

from training_utils.base import formats
from training_utils.base.console import say
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
    """How many images a step takes, and what they multiply from: `16 images: batch 4 x 2 accumulated x 2 devices`."""
    size = facts.step_size
    factors = [f"batch {size.batch_size}"]
    if size.accumulation > 1:
        factors.append(f"{size.accumulation} accumulated")
    if facts.world_size > 1:
        factors.append(f"{facts.world_size} devices")
    count = image_count(facts)
    return f"{count}: {' x '.join(factors)}" if len(factors) > 1 else count


def image_count(facts: RunFacts) -> str:
    """How many images a step takes: `16 images`, or `up to 16 images, 13.5 on average`."""
    count = f"{facts.step_size.largest:,} images"
    if facts.images_per_step < facts.step_size.largest:
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
