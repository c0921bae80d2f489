"""A chart as the text of an <svg> element. chart.svg is its template, chart.css its colours, light and dark."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from tools.charts.axis import Axis, step_axis, value_axis, whole_ticks
from tools.charts.series import Line, thinned
from tools.templates import template_environment
from training_utils.base import formats

FOLDER = Path(__file__).parent

# Goes once into a page that holds charts; one that stands alone brings it along. Plain text would be escaped, and its
# quotation marks with it.
CHART_CSS = Markup((FOLDER / "chart.css").read_text(encoding="utf-8"))

_templates = template_environment(FOLDER)
_templates.filters["pixels"] = "{:.1f}".format


@dataclass(frozen=True)
class _Tick:
    position: float
    label: str


@dataclass(frozen=True)
class _Curve:
    """A line in pixels: `path` is what an SVG path's `d` holds, `dots` the points that get a dot."""

    css_class: str
    style: str
    path: str
    dots: list[tuple[float, float]]


@dataclass(frozen=True)
class _LegendEntry:
    line: Line
    x: int
    y: int


@dataclass(frozen=True)
class _Frame:
    """The part of the image that curves are drawn in: its edges in pixels, and the axes along them."""

    left: int
    top: int
    right: int
    bottom: int
    x_axis: Axis
    y_axis: Axis

    def x(self, value: float) -> float:
        return self.left + self.x_axis.fraction(value) * (self.right - self.left)

    def y(self, value: float) -> float:
        return self.bottom - self.y_axis.fraction(value) * (self.bottom - self.top)


def draw_chart(
    lines: Sequence[Line],
    title: str,
    *,
    x_name: str = "step",
    width: int = 460,
    height: int = 240,
    x_values: Sequence[float] = (),
    from_zero: bool = False,
    mark: tuple[float, float] | None = None,
    standalone: bool = False,
    element_id: str = "",
) -> Markup:
    """A chart of lines, `width` and `height` pixels in size, as SVG.

    The horizontal axis covers `x_values`, left out those of the points. `from_zero` begins the vertical axis at 0; it
    is logarithmic where the highest value is far above most. `mark` is a point to draw a ring around, in the colour of
    the last line. A `standalone` chart is a complete file, with the title and a legend drawn. With an `element_id` the
    element can be focused. A script reads values off the element's data-frame (left, top, right, bottom in pixels),
    data-range (x0, x1, y0, y1) and data-log.
    """
    points = [(x, y) for line in lines for x, y in line.points if y is not None] or [(0, 0)]
    x_axis = step_axis(x_values or [x for x, _ in points])
    y_axis = value_axis([y for _, y in points], from_zero=from_zero)
    y_ticks = y_axis.ticks()
    y_labels = _tick_labels(y_ticks, y_axis.logarithmic)
    legend = _legend(lines, width) if standalone else []
    frame = _Frame(
        left=14 + 7 * max(map(len, y_labels)),
        top=_top(legend, standalone),
        right=width - 16,
        bottom=height - 40,
        x_axis=x_axis,
        y_axis=y_axis,
    )
    x_ticks = whole_ticks(x_axis, max(2, (frame.right - frame.left) // 80))
    return Markup(
        _templates.get_template("chart.svg").render(
            title=title,
            width=width,
            height=height,
            standalone=standalone,
            element_id=element_id,
            css=CHART_CSS,
            frame=frame,
            x_name=f"{x_name}; logarithmic upwards" if y_axis.logarithmic else x_name,
            x_ticks=[_Tick(frame.x(value), label) for value, label in zip(x_ticks, _tick_labels(x_ticks, False))],
            y_ticks=[_Tick(frame.y(value), label) for value, label in zip(y_ticks, y_labels)],
            curves=[_curve(line, frame) for line in lines],
            ring=(frame.x(mark[0]), frame.y(mark[1]), lines[-1].css_class) if mark else None,
            legend=legend,
        )
    )


def _tick_labels(values: list[float], logarithmic: bool) -> list[str]:
    """Labels for ticks; on an even axis all have the same number of decimals."""
    largest = max(map(abs, values))
    if logarithmic or (largest and (largest < 1e-3 or largest >= 1e6)):
        return [formats.number(value, 3) for value in values]
    decimals = 0
    while decimals < 12 and any(abs(round(value, decimals) - value) >= 1e-6 * largest for value in values if value):
        decimals += 1
    return [f"{value:,.{decimals}f}" for value in values]


def _curve(line: Line, frame: _Frame) -> _Curve:
    words: list[str] = []
    dots: list[tuple[float, float]] = []
    pen = "M"
    for x, y in thinned(line.points):
        if y is None:
            pen = "M"
            continue
        dot = (frame.x(x), frame.y(y))
        words.append(f"{pen}{dot[0]:.1f} {dot[1]:.1f}")
        dots.append(dot)
        pen = "L"
    # A path with a single point draws nothing.
    dotted = line.style == "dotted" or len(dots) == 1
    return _Curve(line.css_class, line.style, "".join(words), dots if dotted else [])


def _legend(lines: Sequence[Line], width: int) -> list[_LegendEntry]:
    """Where the names of several lines stand, in rows below the title; a single line needs none."""
    by_name = {line.name: line for line in lines if line.style != "faint"}
    if len(by_name) < 2:
        return []
    entries: list[_LegendEntry] = []
    x = 12
    y = 40
    for line in by_name.values():
        entry_width = 30 + 7 * len(line.name)
        if x > 12 and x + entry_width > width:
            x = 12
            y += 18
        entries.append(_LegendEntry(line, x, y))
        x += entry_width
    return entries


def _top(legend: list[_LegendEntry], standalone: bool) -> int:
    """The upper edge of the frame, below title and legend."""
    if legend:
        return legend[-1].y + 14
    return 34 if standalone else 10
