"""One page about a run, or about several side by side: curves, images, settings, what lies in its folder.

python -m training_utils.report OUTPUT_DIR [OUTPUT_DIR ...] [--output FILE]

The page needs nothing but itself: no network, no other file; what its few lines of script show is there without them
too. It is written from what the folder holds, at any time: while a run is under way, after it, or after a kill.
Imports no torch. Captions, paths and settings are foreign text, and everything that is written is escaped.
"""

import base64
import hashlib
import html
import io
import json
import re
import shlex
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from PIL import Image

from tools import charts
from tools.charts import Line
from training_utils.base import formats
from training_utils.base.console import warn
from training_utils.base.errors import UserError, reason_of
from training_utils.cli import flags
from training_utils.run import exit, metrics, output_folder
from training_utils.run.checkpoints import damage_of, list_checkpoints, read_manifest, step_of
from training_utils.run.metrics import Log

FACTS = frozenset(
    """
    script base device processes precision parameters pictures held_out pictures_per_update updates epochs seed
    launcher flags libraries
    """.split()
)
GRIDS = 24  # that a page shows at most, over all runs
WIDTH = 900  # pixels of a grid
ROOM = 4_000_000  # characters for all of them


# ---------------------------------------------------------------------------------------------------------------------
# Reading a run's folder
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """What the folder of a run holds. `facts` are those of reporting.announce, {} where metrics.jsonl has none."""

    folder: Path
    name: str
    log: Log | None
    facts: dict
    settings: dict  # run.yaml's flags, as text
    run_file: str
    card: str
    checkpoints: list = field(default_factory=list)  # (folder, what it is)
    grids: dict = field(default_factory=dict)  # {step: path}

    @property
    def total(self):
        return self.facts.get("updates")

    @property
    def finished(self):
        return self.log is not None and self.total is not None and self.log.step >= self.total

    def given(self):
        """The settings that shaped the result and are not off, {name: value}."""
        shaped = self.facts.get("flags") or self.settings
        return {name: value for name, value in shaped.items() if value not in (None, False, "", "none")}

    def prompts(self):
        prompts = self.settings.get("validation_prompts") or self.settings.get("validation_prompt") or []
        return list(map(str, prompts if isinstance(prompts, list) else [prompts]))


def read(folder):
    """The Run in a folder. Raises UserError where there is none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder")
    try:
        log = Log(folder)
    except OSError:
        log = None
    saved = list_checkpoints(folder)
    if log is None and not saved and not (folder / output_folder.RUN_FILE).exists():
        raise UserError(f"{folder} is no output folder of a run: it holds no {metrics.NAME}, run.yaml or checkpoint")
    facts = dict(log.runs[-1]) if log and log.runs and log.runs[-1].keys() >= FACTS else {}
    run_file = _text(folder / output_folder.RUN_FILE)
    try:
        settings = yaml.load(run_file, Loader=yaml.BaseLoader)  # text, whatever YAML makes of it
    except (yaml.YAMLError, RecursionError):
        settings = None
    grids = {int(path.stem[5:]): path for path in folder.glob("validation/step-*.png") if path.stem[5:].isdecimal()}
    if log and log.runs:  # what an earlier run has left beyond this one is not of it
        grids = {step: path for step, path in grids.items() if step <= log.step}
    return Run(
        *(folder, folder.resolve().name, log, facts, settings if isinstance(settings, dict) else {}, run_file),
        card=_text(folder / "README.md"),
        checkpoints=[(path, _checkpoint(path)) for path in sorted(saved, key=step_of, reverse=True)],
        grids=grids,
    )


def _text(path):
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _checkpoint(folder):
    """What to say of a checkpoint."""
    problem = damage_of(folder, contents=False)
    manifest = read_manifest(folder)
    if problem or not manifest:
        return f"damaged: {problem}" if problem else "made by another program"
    size = sum(fact["size"] for fact in manifest["files"].values())
    return f"{formats.byte_size(size)}, written {_when(manifest['written'])}"


def _when(seconds):
    return time.strftime("%d %b %Y, %H:%M", time.localtime(seconds))


def _roughly(seconds):
    return formats.duration(seconds) if seconds < 60 else formats.duration(seconds // 60 * 60).removesuffix(" 0 s")


def _ago(seconds):
    return "just now" if seconds < 60 else f"{_roughly(seconds)} ago"


# ---------------------------------------------------------------------------------------------------------------------
# Parts of the page
# ---------------------------------------------------------------------------------------------------------------------


def text(value):
    """A value as HTML that shows it."""
    return html.escape(str(value))


def swatch(colour):
    return f'<i class="swatch c{colour % len(charts.COLOURS)}"></i>'


def heads(runs):
    """What stands above the columns of a table with one for each run."""
    return ["", *(f"{swatch(at)}{text(a_run.name)}" for at, a_run in enumerate(runs))]


def state_of(a_run, now):
    """Where a run stands, in words."""
    if a_run.log is None:
        return f"there is no {metrics.NAME} in its folder, so its curves are not known"
    made = f"{a_run.log.step:,} of {a_run.total:,}" if a_run.total is not None else f"{a_run.log.step:,}"
    if a_run.finished:
        return f"finished: {made} steps, the last one on {_when(a_run.log.time)}"
    return f"step {made}; the last line of {metrics.NAME} was written {_ago(now - (a_run.log.time or now))}"


def summary(a_run):
    """The numbers that one asks for first, [(label, value, remark)]."""
    log, facts = a_run.log, a_run.facts
    if log is None:
        return []
    cells = [("steps", f"{log.step:,}", f"of {a_run.total:,}" if a_run.total is not None else "")]
    losses = list(log.finite("train_loss").items())
    if losses:
        window = smoothing(losses)
        cells.append(("loss", charts.number(charts.smoothed(losses, window)[-1][1]), f"mean of about {window} steps"))
    best, looks = log.lowest("val_loss"), log.finite("val_loss")
    if best:
        last = max(looks)
        remark = (
            f"step {last:,}, the last one"
            if last == best[0]
            else f"step {best[0]:,}; the last one {charts.number(looks[last])}"
        )
        cells.append(("lowest validation loss", charts.number(best[1]), remark))
    paces = [pace for pace in log.finite("samples_per_second").values() if pace > 0]
    if paces:
        pace = statistics.harmonic_mean(paces)
        left = (a_run.total or 0) - log.step
        seconds = facts.get("pictures_per_update", 0) / pace
        remark = f"{charts.number(seconds, 3)} s a step"
        if left > 0 and seconds:
            remark += f"; about {_roughly(seconds * left)} left"
        cells.append(("images a second", charts.number(pace, 3), remark))
    for name, label in MEMORY:
        values = log.finite(name).values()
        if values:
            remark = "of the first process" if facts.get("processes", 1) > 1 else ""
            cells.append((label, f"{charts.number(max(values), 3)} GiB", remark))
            break
    cells.append(("time", formats.duration(log.seconds), "with validation and checkpoints"))
    return cells


MEMORY = (
    ("memory_peak_gib", "device memory, peak"),
    ("memory_resident_gib", "host memory, most"),
)


def smoothing(points):
    """Over how many points a loss is smoothed: a twentieth of them, within bounds."""
    return max(5, min(round(len(points) / 20), 500))


def about(a_run):
    """What is trained, [(label, text)]."""
    facts = a_run.facts
    if not facts:
        return []
    epochs = f"{facts['updates']:,} steps of {charts.number(facts['pictures_per_update'], 3)} images"
    val_samples = f", and {facts['held_out']:,} held out" if facts["held_out"] else ""
    return [
        ("script", facts["script"]),
        ("base model", facts["base"]),
        ("trained", f"{formats.large_count(facts['parameters'])} parameters, {facts['precision']}"),
        ("device", facts["device"] + (f", {facts['processes']} of them" if facts["processes"] > 1 else "")),
        ("images", f"{facts['pictures']:,}{val_samples}"),
        ("planned", f"{epochs}, {charts.number(facts['epochs'], 3)} epochs"),
        ("seed", facts["seed"]),
        ("begun", _when(a_run.log.runs[0]["time"]) + _starts(len(a_run.log.runs))),
        ("folder", a_run.folder),
    ]


def _starts(count):
    return f"; started {count} times" if count > 1 else ""


def table(rows, head=(), kind=""):
    """Rows of cells that are HTML already; the first of each is its heading."""
    top = f"<thead><tr>{''.join(f'<th>{cell}</th>' for cell in head)}</tr></thead>" if head else ""
    body = "".join(f"<tr><th>{row[0]}</th>{''.join(f'<td>{cell}</td>' for cell in row[1:])}</tr>" for row in rows)
    return f'<div class="wide"><table class="{kind}">{top}<tbody>{body}</tbody></table></div>'


def pairs(items):
    """[(name, value)] in as many columns as there is room for."""
    rows = "".join(f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in items)
    return f'<dl class="pairs">{rows}</dl>' if rows else ""


def overview(runs, now):
    """Where each run stands and its first numbers: tiles for one, a table for several."""
    if len(runs) == 1:
        tiles = "".join(
            f"<div><dt>{text(label)}</dt><dd>{text(value)}</dd><small>{text(remark)}</small></div>"
            for label, value, remark in summary(runs[0])
        )
        facts = pairs(about(runs[0]))
        return f'<p class="state">{text(state_of(runs[0], now))}</p><dl class="tiles">{tiles}</dl>{facts}'
    rows = [["state", *(text(state_of(a_run, now)) for a_run in runs)]]
    for source in (summary, about):
        found = [{cell[0]: cell[1:] for cell in source(a_run)} for a_run in runs]
        for label in dict.fromkeys(label for cells in found for label in cells):
            cells = [cells.get(label, ("",)) for cells in found]
            shown = [f"{text(cell[0])}{f'<small>{text(cell[1])}</small>' if cell[1:] else ''}" for cell in cells]
            rows.append([text(label), *shown])
    return table(rows, heads(runs), "compared")


def curves(runs):
    """(title, Lines, options of charts.draw, remarks) of each chart that has anything to show."""
    several, found = len(runs) > 1, []
    for title, names, options in CURVES:
        lines, remarks, options = [], [], dict(options)
        for at, a_run in enumerate(runs):
            for name in names[:1] if several else names:
                points = list(a_run.log.curves.get(name, {}).items()) if a_run.log else []
                lost = [step for step, y in points if y is None]
                if len(lost) == len(points):
                    continue
                if lost:
                    where = f"{', '.join(f'{step:,}' for step in lost[:5])}{' …' if len(lost) > 5 else ''}"
                    remarks.append(f"not finite{f' in {a_run.name}' if several else ''} at step {where}")
                called, colour = (a_run.name, at) if several else (CALLED[name], names.index(name))
                if name in ("train_loss", "grad_norm") and len(points) >= 20:
                    lines += [] if several else [Line(called, points, colour, "faint")]
                    smooth = charts.smoothed(points, smoothing(points))
                    lines.append(Line(called if several else "smoothed", smooth, colour))
                    continue
                look = "dotted" if name == "val_loss" else "dashed" if name == "memory_reserved_gib" else "line"
                lines.append(Line(called, points, colour, look))
                if name == "val_loss" and not several:
                    options["mark"] = a_run.log.lowest(name)
        if lines:
            found.append((title, lines, options, remarks))
    return found


CALLED = {
    "train_loss": "loss",
    "val_loss": "validation loss",
    "lr": "learning rate",
    "grad_norm": "norm",
    "samples_per_second": "images/s",
    "memory_peak_gib": "peak",
    "memory_reserved_gib": "reserved",
    "memory_resident_gib": "resident",
}
CURVES = [
    ("Loss", ["train_loss"], {}),
    ("Validation loss", ["val_loss"], {}),
    ("Learning rate", ["lr"], {"zero": True}),
    ("Norm of the gradient", ["grad_norm"], {"zero": True}),
    ("Images a second", ["samples_per_second"], {"zero": True}),
    ("Device memory, GiB", ["memory_peak_gib", "memory_reserved_gib"], {"zero": True}),
    ("Host memory, GiB", ["memory_resident_gib"], {"zero": True}),
]


def in_words(lines, remarks):
    """What a chart's readout says before a script changes it, HTML: from where to where the curves go."""
    coloured, ends = len({line.colour for line in lines}) > 1, []
    for line in lines:
        values = [y for _, y in line.points if y is not None]
        if line.look != "faint":
            said = (
                f"{charts.number(values[0])} to {charts.number(values[-1])}"
                if len(values) > 1
                else charts.number(values[0])
            )
            mark = swatch(line.colour) if coloured else ""
            ends.append(f"<span>{mark}{text(line.name)} {said}</span>")
    return "; ".join([*ends, *map(text, remarks)])


def curve_section(runs):
    """(HTML of all charts, what their readouts need: a list for JSON)."""
    figures, data = [], []
    steps = [step for a_run in runs if a_run.log for curve in a_run.log.curves.values() for step in curve]
    span = (min(steps, default=0), max(steps, default=1))  # the same of every chart
    for title, lines, options, remarks in curves(runs):
        name = f"chart{len(data)}"
        svg = charts.draw(lines, title, span=span, **options).replace("<svg ", f'<svg id="{name}" tabindex="0" ', 1)
        figures.append(
            f'<figure class="curve"><figcaption><b>{text(title)}</b><span class="read" id="{name}-read">'
            f"{in_words(lines, remarks)}</span></figcaption>{svg}</figure>"
        )
        shown = [
            {"name": line.name, "colour": line.colour % len(charts.COLOURS), "points": charts.thinned(line.points)}
            for line in lines
        ]
        data.append({"id": name, "lines": shown})
    if not figures:
        return "", []
    missing = ""
    if not any(a_run.facts.get("held_out", 1) for a_run in runs):
        missing = '<p class="state">There is no validation loss: --validation_split was not given.</p>'
    return f'<section><h2>Curves</h2><div class="curves">{"".join(figures)}</div>{missing}</section>', data


def image(path):
    """(a data URI, width, height) of a grid, made smaller where it is large. Raises OSError where it is damaged."""
    try:
        with Image.open(path) as opened:
            shown = opened.convert("RGB")
    except (ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise OSError(str(error)) from None
    shown.thumbnail((WIDTH, 2 * WIDTH))
    file = io.BytesIO()
    shown.save(file, "JPEG", quality=85, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}", *shown.size


def spread(items, most):
    """At most so many of `items`, evenly spread, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(at * (len(items) - 1) / (most - 1))] for at in range(most)]


def image_section(runs):
    """The grids by step, newest first; those of several runs side by side."""
    steps = sorted({step for a_run in runs for step in a_run.grids}, reverse=True)
    if not steps:
        return ""
    room, blocks, shapes = ROOM, [], []
    for step in spread(steps, max(2, GRIDS // len(runs))):
        figures = []
        for at, a_run in enumerate(runs):
            if step in a_run.grids:
                try:
                    uri, width, height = image(a_run.grids[step])
                except OSError as error:
                    figures.append(f"<p>{text(a_run.grids[step])} cannot be read ({text(reason_of(error))})</p>")
                    continue
                room -= len(uri)
                shapes.append(width / height)
                words = f"images after {step:,} steps: {'; '.join(map(str, a_run.prompts()))}"
                name = f"{swatch(at)}{text(a_run.name)}, " if len(runs) > 1 else ""
                figures.append(
                    f'<figure class="grid"><label><input type="checkbox"><img src="{uri}" width="{width}" '
                    f'height="{height}" alt="{text(words)}"></label>'
                    f"<figcaption>{name}step {step:,}</figcaption></figure>"
                )
        if room < 0 and blocks:
            break
        blocks.append("".join(figures))
    kind = "grids broad" if shapes and statistics.median(shapes) > 2 else "grids"
    blocks_of = blocks if len(runs) > 1 else ["".join(blocks)]
    grids = "".join(f'<div class="{kind}">{block}</div>' for block in blocks_of)
    prompts = "".join(f"<li>{text(prompt)}</li>" for prompt in dict.fromkeys(p for r in runs for p in r.prompts()))
    prompts = f"<details><summary>the prompts</summary><ol>{prompts}</ol></details>" if prompts else ""
    more = f" Of {len(steps)} steps with images {len(blocks)} are shown." if len(blocks) < len(steps) else ""
    return (
        f"<section><h2>Images</h2><p>Drawn from the same noise each time, the newest first. A click shows a grid "
        f"larger.{more}</p>{grids}{prompts}</section>"
    )


def settings_section(runs):
    """The settings that shape the result: all of one run, those that differ of several; run.yaml itself."""
    parts = []
    if len(runs) > 1:
        found = [a_run.given() for a_run in runs]
        names = dict.fromkeys(name for given in found for name in given)
        rows = [
            [text(name), *(text(given.get(name, "–")) for given in found)]
            for name in names
            if len({str(given.get(name)) for given in found}) > 1
        ]
        parts.append(table(rows, heads(runs), "compared") if rows else "<p>They agree in every setting.</p>")
    elif runs[0].given():
        parts.append(pairs(runs[0].given().items()))
    for a_run in runs:
        if a_run.run_file:
            where = f"{a_run.name}/{output_folder.RUN_FILE}"
            parts.append(
                f"<details><summary>every setting: {text(where)}</summary><pre>{text(a_run.run_file)}</pre></details>"
            )
    title = "Settings" if len(runs) == 1 else "Settings that differ"
    return f"<section><h2>{title}</h2>{''.join(parts)}</section>" if parts else ""


def card_facts(card):
    """(title, licence, the Python lines) of a model card, each "" where it has none."""
    parts = re.fullmatch(r"---\n(.*?)\n---\n(.*)", card, re.S)
    try:
        front = yaml.load(parts[1], Loader=yaml.BaseLoader) if parts else {}
    except (yaml.YAMLError, RecursionError):
        front = {}
    body = parts[2] if parts else card
    title = re.search(r"^# (.*)$", body, re.M)
    usage = re.search(r"^```python\n(.*?)^```", body, re.M | re.S)
    licence = str(front.get("license", "")) if isinstance(front, dict) else ""
    shown = html.unescape(re.sub(r"\\(.)", r"\1", title[1])) if title else ""
    return shown, licence, usage[1] if usage else ""


def folder_section(a_run, several):
    """What lies in a run's folder, and the commands that go on from it."""
    rows = [(text(path.name), text(what)) for path, what in a_run.checkpoints]
    if a_run.grids:
        rows.append(("validation", f"{len(a_run.grids)} grids of images"))
    title, licence, usage = card_facts(a_run.card)
    if a_run.card:
        words = title + (f"; licence {licence}" if licence else "; it states no licence")
        rows.append(("README.md", f"the model card: {text(words)}"))
    libraries = a_run.facts.get("libraries", {})
    if libraries:
        rows.append(("libraries", text(", ".join(f"{name} {version}" for name, version in libraries.items()))))
    if not a_run.checkpoints:
        rows.insert(0, ("checkpoints", "there is none"))
    parts = [table(rows, kind="facts")]
    if a_run.facts and a_run.run_file:
        start = [
            *a_run.facts["launcher"],
            a_run.facts["script"],
            "--config",
            str(a_run.folder / output_folder.RUN_FILE),
        ]
        again = shlex.join([*start, "--output_dir", f"{a_run.folder}_again"])
        parts.append(f"<h3>The command that repeats it</h3><pre>{text(again)}</pre>")
        if not a_run.finished and a_run.checkpoints:
            on = shlex.join([*start, "--resume_from_checkpoint", "latest"])
            parts.append(f"<h3>The command that continues it</h3><pre>{text(on)}</pre>")
    if usage:
        parts.append(f"<h3>The lines that use it</h3><pre>{text(usage)}</pre>")
    where = f"The folder {a_run.name}" if several else "The folder"
    return f"<section><h2>{text(where)}</h2>{''.join(parts)}</section>"


# ---------------------------------------------------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------------------------------------------------

CSS = """
:root{color-scheme:light dark;--paper:#fff;--panel:#f6f8fa;--ink:#1f2328}
@media (prefers-color-scheme:dark){:root{--paper:#0f1318;--panel:#171c23;--ink:#e6ebf1}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1360px;padding:24px 24px 48px;background:var(--paper);color:var(--ink);
  font:15px/1.5 FONT}
h1{font-size:26px;line-height:1.25;margin:0 0 8px;overflow-wrap:anywhere}
h2{font-size:19px;margin:40px 0 12px}
h3{font-size:15px;margin:20px 0 6px}
p{margin:6px 0 12px}
small,.state,footer,figcaption{color:var(--quiet)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin:20px 0}
.tiles div{background:var(--panel);border-radius:8px;padding:12px 14px}
.tiles dt,.pairs dt{color:var(--quiet);font-size:13px}
.tiles dd{margin:2px 0;font-size:23px;font-weight:600;font-variant-numeric:tabular-nums;line-height:1.3}
.tiles small,.compared small{display:block;font-size:12.5px;line-height:1.35}
.curves{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,340px),1fr));gap:16px}
figure{margin:0;min-width:0}
.curve{background:var(--panel);border-radius:8px;padding:12px 12px 8px;display:flex;flex-direction:column;
  justify-content:space-between}
.curve svg{display:block;width:100%;max-width:620px;touch-action:pan-y;outline-offset:2px}
.curve figcaption{display:flex;flex-direction:column;margin:0 2px 8px;font-size:13px}
.curve b{color:var(--ink);font-size:15px}
.read{font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
.read span{display:inline-block}
.swatch{display:inline-block;width:11px;height:11px;border-radius:3px;background:currentColor;margin-right:6px}
.grids{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,340px),1fr));gap:16px;margin:0 0 16px}
.broad{grid-template-columns:repeat(auto-fill,minmax(min(100%,560px),1fr))}
.grid img{display:block;width:100%;height:auto;border-radius:6px;cursor:zoom-in}
.grid input{position:absolute;opacity:0;pointer-events:none}
.grid:has(:checked){grid-column:1/-1}
.grid :checked+img{cursor:zoom-out;width:auto;max-width:100%}
.grid :focus-visible+img{outline:2px solid var(--c0);outline-offset:2px}
.grid figcaption{font-size:13px;margin-top:4px}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:14px}
th,td{text-align:left;vertical-align:top;padding:5px 18px 5px 0;border-bottom:1px solid var(--rule);font-weight:400}
tbody th{color:var(--quiet);white-space:nowrap}
thead th{font-weight:600}
.facts td{overflow-wrap:anywhere}
.compared td,.compared thead th{min-width:150px;overflow-wrap:anywhere}
.pairs{display:grid;grid-template-columns:repeat(auto-fill,minmax(230px,1fr));gap:8px 18px;margin:0 0 16px;
  font-size:14px}
.pairs dd{margin:0;overflow-wrap:anywhere}
pre{background:var(--panel);border-radius:8px;padding:12px 14px;overflow-x:auto;font-size:13px;line-height:1.45;
  margin:0 0 12px}
details{margin:0 0 10px}
summary{cursor:pointer}
details pre{margin-top:8px}
footer{margin-top:44px;font-size:13px;overflow-wrap:anywhere}
.cursor{stroke:var(--quiet);stroke-width:1;stroke-dasharray:3 3}
.point{fill:currentColor;stroke:var(--panel);stroke-width:1.5}
@media (max-width:520px){body{padding:16px 14px 32px}.tiles,.pairs{grid-template-columns:1fr 1fr}
  .curve{padding:10px 6px 6px}.tiles dd{font-size:20px}}
@media print{.curve,.grid,.tiles div{break-inside:avoid}}
"""

# Under the pointer, or at the arrow keys, every chart shows its values at the same step.
SCRIPT = """
const space = "http://www.w3.org/2000/svg";
const charts = JSON.parse(document.getElementById("data").textContent).map(chart => {
  const svg = document.getElementById(chart.id), read = document.getElementById(chart.id + "-read");
  const [left, top, right, bottom] = svg.dataset.frame.split(" ").map(Number);
  const [x0, x1, y0, y1] = svg.dataset.range.split(" ").map(Number);
  const marks = document.createElementNS(space, "g");
  svg.append(marks);
  const up = y => svg.dataset.log === "1" ? Math.log(y / y0) / Math.log(y1 / y0) : (y - y0) / (y1 - y0);
  return {...chart, svg, read, said: [...read.childNodes], marks, x0, x1, left, right, top, bottom,
    across: x => left + (x - x0) / (x1 - x0) * (right - left), up: y => bottom - up(y) * (bottom - top)};
});
const number = value => {
  if (value === null) return "not finite";
  const size = Math.abs(value);
  if (size && (size < 1e-3 || size >= 1e6)) return value.toExponential(3).replace(/\\.?0+e/, "e").replace("e+", "e");
  return value.toLocaleString("en", {maximumSignificantDigits: size >= 1000 ? 6 : 4});
};
const nearest = (points, x) => {
  let low = 0, high = points.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (points[middle][0] < x) low = middle + 1; else high = middle;
  }
  return low && x - points[low - 1][0] <= points[low][0] - x ? points[low - 1] : points[low];
};
const element = (name, attributes, parent) => {
  const made = document.createElementNS(space, name);
  for (const key in attributes) made.setAttribute(key, attributes[key]);
  parent.append(made);
};
let at = null;
function show(x) {
  at = x;
  for (const chart of charts) {
    chart.marks.replaceChildren();
    chart.read.replaceChildren();
    if (x === null || x < chart.x0 || x > chart.x1) {
      chart.read.replaceChildren(...chart.said);
      continue;
    }
    const across = chart.across(x);
    element("line", {class: "cursor", x1: across, x2: across, y1: chart.top, y2: chart.bottom}, chart.marks);
    const several = new Set(chart.lines.map(line => line.colour)).size > 1;
    chart.lines.forEach((line, index) => {
      const point = nearest(line.points, x);
      if (index) chart.read.append(" \\u00a0 ");
      else chart.read.append(`update ${point[0].toLocaleString("en")} \\u00a0 `);
      if (several) {
        const swatch = document.createElement("i");
        swatch.className = `swatch c${line.colour}`;
        chart.read.append(swatch);
      }
      chart.read.append(`${line.name}\\u00a0${number(point[1])}`);
      if (point[1] !== null) element("circle", {class: `point c${line.colour}`, cx: chart.across(point[0]),
        cy: chart.up(point[1]), r: 4}, chart.marks);
    });
  }
}
for (const chart of charts) {
  const {svg, x0, x1, left, right} = chart;
  const follow = event => {
    const box = svg.getBoundingClientRect();
    const share = ((event.clientX - box.left) / box.width * svg.viewBox.baseVal.width - left) / (right - left);
    show(Math.round(x0 + Math.min(1, Math.max(0, share)) * (x1 - x0)));
  };
  svg.addEventListener("pointermove", follow);
  svg.addEventListener("pointerdown", follow);
  svg.addEventListener("pointerleave", () => show(null));
  svg.addEventListener("blur", () => show(null));
  svg.addEventListener("keydown", event => {
    const way = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (!way) return;
    event.preventDefault();
    const stride = Math.max(1, Math.round((x1 - x0) / 100));
    show(at === null ? (way > 0 ? x0 : x1) : Math.min(x1, Math.max(x0, at + way * stride)));
  });
}
"""


def page(runs):
    """The page about a list of Runs, as HTML text."""
    now = time.time()
    figures, data = curve_section(runs)
    title = ", ".join(a_run.name for a_run in runs)
    css = CSS.replace("FONT", charts.FONT)
    # No part of the page may be fetched, and no script run but the one below, whatever stands in a caption.
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    numbers = json.dumps(data).replace("<", "\\u003c")
    script = f'<script type="application/json" id="data">{numbers}</script><script>{SCRIPT}</script>' if data else ""
    command = shlex.join(["python", "-m", "training_utils.report", *(str(a_run.folder) for a_run in runs)])
    sections = [overview(runs, now), figures, image_section(runs), settings_section(runs)]
    sections += [folder_section(a_run, len(runs) > 1) for a_run in runs]
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{text(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{charts.STYLE}{css}</style></head><body><header><h1>{text(title)}</h1></header>"
        f"{''.join(sections)}<footer>Written on {_when(now)} by <code>{text(command)}</code>; the same command brings "
        f"it up to date.</footer>{script}</body></html>\n"
    )


def main(argv=None):
    args = flags.parse_report(argv)
    runs = [read(folder) for folder in args.folders]
    names = [a_run.name for a_run in runs]
    for a_run in runs:
        if names.count(a_run.name) > 1:
            a_run.name = str(a_run.folder)
    output = Path(args.output or Path(args.folders[0]) / "report.html")
    for a_run in runs:
        if a_run.log is None:
            warn(f"{a_run.folder} holds no {metrics.NAME}; its curves are not known")
    try:
        output.write_text(page(runs), encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error.strerror}") from None
    print(output)
    return 0


if __name__ == "__main__":
    exit.run_main(main)
