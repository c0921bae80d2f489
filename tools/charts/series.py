"""Series of points, smoothed and thinned."""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Literal

# As many as chart.css has, .c0 to .c7.
COLOURS = 8

# Points of a line that are drawn; a chart has half as many pixels.
MOST_POINTS = 1000

Point = tuple[float, float | None]
LineStyle = Literal["line", "faint", "dashed", "dotted"]


@dataclass(frozen=True)
class Line:
    """A series: `points` are (x, y) with x rising; a y that is None leaves a gap.

    `style` "dotted" is a line with a dot at each point; `colour` is taken modulo COLOURS.
    """

    name: str
    points: Sequence[Point]
    colour: int = 0
    style: LineStyle = "line"

    @property
    def css_class(self) -> str:
        """The class that gives the line its colour."""
        return colour_class(self.colour)


def colour_class(colour: int) -> str:
    """The class in chart.css for the colour of this number, which may be larger than there are colours."""
    return f"c{colour % COLOURS}"


def smoothed(points: Sequence[Point], window: int) -> list[Point]:
    """The exponential mean over about `window` points, over fewer at the beginning, where curves are steep."""
    mean = 0.0
    smooth: list[Point] = []
    for x, y in points:
        if y is not None:
            mean += (y - mean) / min(window, 1 + len(smooth) / 5)
            smooth.append((x, mean))
    return smooth


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most about `most` points: the lowest and the highest one of each stretch, so that no spike is lost."""
    if len(points) <= most:
        return list(points)
    length = -(-2 * len(points) // most)
    chosen: list[Point] = []
    for start in range(0, len(points), length):
        stretch = points[start : start + length]
        finite = [(x, y) for x, y in stretch if y is not None]
        if finite:
            ends = {min(finite, key=itemgetter(1)), max(finite, key=itemgetter(1))}
            chosen += sorted(ends, key=itemgetter(0))
        else:
            chosen.append(stretch[0])
    if chosen[-1] != points[-1]:
        chosen.append(points[-1])
    return chosen
