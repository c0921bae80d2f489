"""Curves as SVG text: for the page that `training_utils.report` writes, and for files of their own.

Imports the standard library alone. Colours follow the reader's light or dark mode; all text is escaped.
"""

import math
from html import escape
from statistics import median
from typing import NamedTuple

COLOURS = [  # (on white, on black)
    *(("#2f6fde", "#6ea8fe"), ("#c4560b", "#f0883e"), ("#1a7f4b", "#56d364"), ("#8250df", "#bc8cff")),
    *(("#c9314d", "#ff7b86"), ("#0a7d8c", "#39c5cf"), ("#8a6116", "#d4a72c"), ("#bf3989", "#f778ba")),
]
FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif'


def _mode(at, text, rule):
    colours = "".join(f"--c{number}:{pair[at]};" for number, pair in enumerate(COLOURS))
    return f":root{{--quiet:{text};--rule:{rule};{colours}}}"


# Goes once into a page that holds charts; one that stands alone brings it along.
STYLE = (
    _mode(0, "#59636e", "#dfe4ea")
    + f"@media (prefers-color-scheme: dark){{{_mode(1, '#9da7b3', '#343b44')}}}"
    + "".join(f".c{number}{{color:var(--c{number})}}" for number in range(len(COLOURS)))
    + f".chart text{{font:12px {FONT};fill:var(--quiet)}}.chart .title{{font-size:14px;font-weight:600}}"
    + ".chart .rule{stroke:var(--rule);stroke-width:1}.chart .axis{stroke:var(--quiet);stroke-width:1}"
    + ".chart path{fill:none;stroke:currentColor;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}"
    + ".chart .faint{stroke-width:1;opacity:.35}.chart .dashed{stroke-dasharray:5 4}"
    + ".chart .dot{fill:currentColor}.chart .ring{fill:none;stroke:currentColor;stroke-width:1.5}"
)
MOST = 1000  # points of a line that are drawn; a chart has half as many pixels


class Line(NamedTuple):
    """A series: `points` are [(x, y)] with x rising; a y that is None leaves a gap.

    `look` is "line", "faint", "dashed" or "dotted", a line with a dot at each point; `colour` a number, taken modulo
    the number of COLOURS.
    """

    name: str
    points: list
    colour: int = 0
    look: str = "line"


# ---------------------------------------------------------------------------------------------------------------------
# Numbers
# ---------------------------------------------------------------------------------------------------------------------


def number(value, digits=4):
    """A number as a person reads it: so many significant digits, without a tail of zeros."""
    if value is None:
        return "not finite"
    size = abs(value)
    if value and (size < 1e-3 or size >= 1e6):
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    decimals = max(0, digits - 1 - (math.floor(math.log10(size)) if value else 0))
    text = f"{value:,.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def ticks(low, high, count=5):
    """Round numbers from `low` to `high`, about `count` of them, apart by 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(
        factor for factor, most in ((1, 2), (2, 10), (5, 50), (10, 100)) if (rough / power) ** 2 <= most
    )
    first = math.ceil(low / step - 1e-9)
    return [at * step for at in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low, high):
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    few = [10.0**power for power in powers if low <= 10.0**power <= high]
    if len(few) >= 3:
        return few[:: -(-len(few) // 6)]
    return [factor * 10.0**power for power in powers for factor in (1, 2, 5) if low <= factor * 10.0**power <= high]


def _tick_labels(values, log=False):
    """Labels for ticks; on an even axis all have the same number of decimals."""
    largest = max(map(abs, values))
    if log or (largest and (largest < 1e-3 or largest >= 1e6)):
        return [number(value, 3) for value in values]
    fits = (all(abs(round(value, many) - value) < 1e-6 * largest for value in values) for many in range(12))
    decimals = next((many for many, fit in enumerate(fits) if fit), 0)
    return [f"{value:,.{decimals}f}" for value in values]


def smoothed(points, window):
    """The exponential mean of [(x, y)] over about `window` points, fewer of the first ones, where curves are steep."""
    mean, smooth = 0.0, []
    for x, y in points:
        if y is not None:
            mean += (y - mean) / min(window, 1 + len(smooth) / 5)
            smooth.append((x, mean))
    return smooth


def thinned(points, most=MOST):
    """At most about `most` of [(x, y)]: of each of as many stretches the lowest and the highest point."""
    if len(points) <= most:
        return list(points)
    kept, stretch = [], -(-2 * len(points) // most)
    for at in range(0, len(points), stretch):
        part = points[at : at + stretch]
        there = [pair for pair in part if pair[1] is not None]
        ends = {min(there, key=lambda pair: pair[1]), max(there, key=lambda pair: pair[1])} if there else {part[0]}
        kept += sorted(ends, key=lambda pair: pair[0])
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]


# ---------------------------------------------------------------------------------------------------------------------
# Drawing
# ---------------------------------------------------------------------------------------------------------------------


def draw(lines, title, x_name="step", size=(460, 240), span=None, zero=False, mark=None, alone=False):
    """A chart of Lines as the text of an <svg> element, `size` wide and high.

    `span` is the (first, last) x of the axis, left out that of the points, or from 0 where it is near; `zero` begins
    the vertical axis at 0; it is logarithmic where the highest value is far above most. `mark` is a point (x, y) to
    draw a ring around, in the colour of the last line. With `alone` the title and a legend are drawn too, and the text
    is a whole file. What a script needs to read values off it is in the element's data-frame (left, top, right, bottom
    in pixels), data-range (x0, x1, y0, y1) and data-log.
    """
    points = [(x, y) for line in lines for x, y in line.points if y is not None] or [(0, 0)]
    x0, x1 = _span(span or [x for x, _ in points])
    (y0, y1), log = _vertical([y for _, y in points], zero)
    y_ticks = _log_ticks(y0, y1) if log else ticks(y0, y1)
    y_labels = _tick_labels(y_ticks, log)
    legend, head = _legend(lines, title, size[0]) if alone else ("", 10)
    left, right = 14 + 7 * max(map(len, y_labels)), size[0] - 16
    top, bottom = head, size[1] - 40

    def across(x):
        return left + (x - x0) / (x1 - x0) * (right - left)

    def up(y):
        share = math.log(y / y0) / math.log(y1 / y0) if log else (y - y0) / (y1 - y0)
        return bottom - share * (bottom - top)

    parts = []
    for value, label in zip(y_ticks, y_labels):
        y = up(value)
        parts.append(f'<line class="rule" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    x_ticks = [tick for tick in ticks(x0, x1, max(2, (right - left) // 80)) if tick == int(tick)] or [x0]
    parts.append(f'<line class="axis" x1="{left}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    for value, label in zip(x_ticks, _tick_labels(x_ticks)):
        x = across(value)
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">{label}</text>')
    name = f"{x_name}; logarithmic upwards" if log else x_name
    parts.append(f'<text x="{(left + right) / 2:.1f}" y="{bottom + 34}" text-anchor="middle">{escape(name)}</text>')
    parts += [_curve(line, across, up) for line in lines]
    if mark:
        parts.append(
            f'<circle class="ring {_colour(lines[-1])}" cx="{across(mark[0]):.1f}" cy="{up(mark[1]):.1f}" r="6"/>'
        )
    facts = f'data-frame="{left} {top} {right} {bottom}" data-range="{x0} {x1} {y0!r} {y1!r}" data-log="{int(log)}"'
    outside = f'xmlns="http://www.w3.org/2000/svg" width="{size[0]}" height="{size[1]}" ' if alone else ""
    style = f"<style>{STYLE}</style>{legend}" if alone else ""
    return (
        f'<svg {outside}class="chart" viewBox="0 0 {size[0]} {size[1]}" role="img" aria-label="{escape(title)}" '
        f"{facts}>{style}{''.join(parts)}</svg>"
    )


def _span(values):
    low, high = min(values), max(values)
    if 0 < low < high / 10:
        return 0, high
    return (low, high) if high > low else (low - 1, high + 1)


def _vertical(values, zero):
    """((low, high) of the vertical axis, whether it is logarithmic)."""
    low, high = min(values), max(values)
    if low > 0 and high > 15 * median(values):
        return (low * 0.9, high * 1.1), True
    if zero and low >= 0:
        return (0, high * 1.08 or 1), False
    margin = (high - low) * 0.06 or abs(high) * 0.05 or 1
    return (0 if low >= 0 > low - margin else low - margin, high + margin), False


def _colour(line):
    return f"c{line.colour % len(COLOURS)}"


def _curve(line, across, up):
    words, pen, dots = [], "M", []
    for x, y in thinned(line.points):
        if y is None:
            pen = "M"
            continue
        words.append(f"{pen}{across(x):.1f} {up(y):.1f}")
        pen = "L"
        dots.append((x, y))
    look = f' class="{line.look}"' if line.look in ("faint", "dashed") else ""
    drawn = f'<path{look} d="{"".join(words)}"/>'
    if line.look == "dotted" or len(dots) == 1:
        drawn += "".join(f'<circle class="dot" cx="{across(x):.1f}" cy="{up(y):.1f}" r="3"/>' for x, y in dots)
    return f'<g class="{_colour(line)}">{drawn}</g>'


def _legend(lines, title, width):
    """(the title and, where there are several lines, their names; the height that they take)."""
    parts, x, y = [f'<text class="title" x="12" y="20">{escape(title)}</text>'], 12, 40
    names = {line.name: line for line in lines if line.look != "faint"}
    for name, line in names.items() if len(names) > 1 else ():
        wide = 30 + 7 * len(name)
        if x > 12 and x + wide > width:
            x, y = 12, y + 18
        look = ' class="dashed"' if line.look == "dashed" else ""
        parts.append(f'<g class="{_colour(line)}"><path{look} d="M{x} {y - 4}h16"/></g>')
        parts.append(f'<text x="{x + 22}" y="{y}">{escape(name)}</text>')
        x += wide
    return "".join(parts), y + 14 if len(names) > 1 else 34
