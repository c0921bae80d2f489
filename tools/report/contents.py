"""What lies in a run's folder, and the commands that go on from it."""

import html
import re
import shlex
from dataclasses import dataclass

from tools.report.folder import RunFolder, read_yaml
from tools.report.table import Cell, Row


@dataclass(frozen=True)
class Code:
    """Lines to copy, under a title."""

    title: str
    text: str


@dataclass(frozen=True)
class ModelCard:
    """What a model card says: "" for what it does not have. `usage` are its first lines of Python."""

    title: str
    license: str
    usage: str


@dataclass(frozen=True)
class Contents:
    """The section about one folder."""

    run_name: str
    rows: list[Row]
    code: list[Code]


def contents_of(run: RunFolder) -> Contents:
    """What lies in the folder of a run, and what can be done with it."""
    card = read_model_card(run.model_card)
    rows = [_row(checkpoint.name, checkpoint.description) for checkpoint in run.checkpoints]
    if not rows:
        rows.append(_row("checkpoints", "there is none"))
    if run.grids:
        rows.append(_row("validation", f"{len(run.grids)} grids of images"))
    if run.model_card:
        licence = f"licence {card.license}" if card.license else "it states no licence"
        rows.append(_row("README.md", f"the model card: {card.title}; {licence}"))
    if run.facts and run.facts.libraries:
        versions = ", ".join(f"{name} {version}" for name, version in run.facts.libraries.items())
        rows.append(_row("libraries", versions))
    code = _commands(run)
    if card.usage:
        code.append(Code("The lines that use it", card.usage))
    return Contents(run.name, rows, code)


def _row(name: str, value: str) -> Row:
    return Row(name, [Cell(value)])


def _commands(run: RunFolder) -> list[Code]:
    if not run.facts or not run.run_file:
        return []
    start = [*run.facts.launcher, run.facts.script, "--config", str(run.run_file_path)]
    commands = [Code("The command that repeats it", shlex.join([*start, "--output_dir", f"{run.path}_again"]))]
    if run.checkpoints and not run.finished:
        resumed = shlex.join([*start, "--resume_from_checkpoint", "latest"])
        commands.append(Code("The command that continues it", resumed))
    return commands


def read_model_card(text: str) -> ModelCard:
    """The facts of a model card, which is Markdown after a head of YAML."""
    parts = re.fullmatch(r"---\n(.*?)\n---\n(.*)", text, re.S)
    head = read_yaml(parts[1]) if parts else {}
    body = parts[2] if parts else text
    title = re.search(r"^# (.*)$", body, re.M)
    usage = re.search(r"^```python\n(.*?)^```", body, re.M | re.S)
    return ModelCard(
        # The card escapes both Markdown and HTML; the page escapes again.
        title=html.unescape(re.sub(r"\\(.)", r"\1", title[1])) if title else "",
        license=str(head.get("license", "")),
        usage=usage[1] if usage else "",
    )
