"""The curves: which charts a page has, and what stands in them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from tools.charts.drawing import draw_chart
from tools.charts.series import COLOURS, Line, LineStyle, Point, smoothed, thinned
from tools.report.folder import RunFolder
from training_utils.base import formats


@dataclass(frozen=True)
class Curve:
    """A curve of metrics.jsonl. A `noisy` one is smoothed once it has some length."""

    name: str
    label: str
    style: LineStyle = "line"
    noisy: bool = False
    mark_lowest: bool = False


@dataclass(frozen=True)
class Plot:
    """A chart and its curves. With several runs it shows only the first curve, of each run."""

    title: str
    curves: list[Curve]
    from_zero: bool = True


PLOTS = [
    Plot("Loss", [Curve("train_loss", "loss", noisy=True)], from_zero=False),
    Plot("Validation loss", [Curve("val_loss", "validation loss", "dotted", mark_lowest=True)], from_zero=False),
    Plot("Learning rate", [Curve("lr", "learning rate")]),
    Plot("Gradient norm", [Curve("grad_norm", "norm", noisy=True)]),
    Plot("Images per second", [Curve("samples_per_second", "images/s")]),
    Plot("Device memory, GiB", [Curve("memory_peak_gib", "peak"), Curve("memory_reserved_gib", "reserved", "dashed")]),
    Plot("Host memory, GiB", [Curve("memory_resident_gib", "resident")]),
]

# Points that a noisy curve needs to be smoothed.
FEWEST_TO_SMOOTH = 20


@dataclass(frozen=True)
class Ends:
    """Where a line begins and ends, in words; `css_class` is its colour."""

    name: str
    values: str
    css_class: str


@dataclass(frozen=True)
class Figure:
    """A chart of the page. `ends` and `remarks` are what its readout says until a pointer asks for a step; `data` is
    what the script needs to answer, as JSON holds it."""

    element_id: str
    title: str
    svg: Markup
    ends: list[Ends]
    several_colours: bool
    remarks: list[str]
    data: dict[str, Any]


def smoothing_window(points: Sequence[Point]) -> int:
    """Over how many points a loss is smoothed: a twentieth of them, within bounds."""
    return max(5, min(round(len(points) / 20), 500))


def figures_of(runs: list[RunFolder]) -> list[Figure]:
    """The charts that have anything to show, all with the same horizontal axis."""
    steps = [step for run in runs if run.log for curve in run.log.curves.values() for step in curve]
    step_range = (min(steps, default=0), max(steps, default=1))
    figures: list[Figure] = []
    for plot in PLOTS:
        figure = _figure(plot, runs, element_id=f"chart{len(figures)}", step_range=step_range)
        if figure:
            figures.append(figure)
    return figures


def _figure(plot: Plot, runs: list[RunFolder], *, element_id: str, step_range: tuple[int, int]) -> Figure | None:
    several = len(runs) > 1
    lines: list[Line] = []
    remarks: list[str] = []
    mark = None
    for run_index, run in enumerate(runs):
        for curve_index, curve in enumerate(plot.curves[:1] if several else plot.curves):
            points = run.curve(curve.name)
            lost = [step for step, value in points if value is None]
            if len(lost) == len(points):
                continue
            if lost:
                where = f" in {run.name}" if several else ""
                remarks.append(f"not finite{where} at step {_steps(lost)}")
            if several:
                lines += _lines(curve, points, run.name, run_index, raw_too=False)
            else:
                lines += _lines(curve, points, curve.label, curve_index, raw_too=True)
                mark = run.log.lowest(curve.name) if run.log and curve.mark_lowest else None
    if not lines:
        return None
    return Figure(
        element_id=element_id,
        title=plot.title,
        svg=draw_chart(
            lines,
            plot.title,
            x_values=step_range,
            from_zero=plot.from_zero,
            mark=mark,
            element_id=element_id,
        ),
        ends=[_ends(line) for line in lines if line.style != "faint"],
        several_colours=len({line.colour for line in lines}) > 1,
        remarks=remarks,
        data={"id": element_id, "lines": [_data(line) for line in lines]},
    )


def _lines(curve: Curve, points: list[Point], label: str, colour: int, *, raw_too: bool) -> list[Line]:
    """A curve as it is drawn: as it is or, where it is noisy, smoothed, with the values themselves faint behind."""
    if not curve.noisy or len(points) < FEWEST_TO_SMOOTH:
        return [Line(label, points, colour, curve.style)]
    smooth = smoothed(points, smoothing_window(points))
    if raw_too:
        return [Line(label, points, colour, "faint"), Line("smoothed", smooth, colour)]
    return [Line(label, smooth, colour)]


def _steps(steps: list[float]) -> str:
    shown = ", ".join(f"{step:,}" for step in steps[:5])
    return f"{shown} …" if len(steps) > 5 else shown


def _ends(line: Line) -> Ends:
    values = [value for _, value in line.points if value is not None]
    words = formats.number(values[0])
    if len(values) > 1:
        words += f" to {formats.number(values[-1])}"
    return Ends(line.name, words, line.css_class)


def _data(line: Line) -> dict[str, Any]:
    return {"name": line.name, "colour": line.colour % COLOURS, "points": thinned(line.points)}
