"""A table of the page."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Cell:
    """A value, and a remark in small print below it."""

    value: str
    remark: str = ""


@dataclass(frozen=True)
class Row:
    """Cells after their heading."""

    heading: str
    cells: list[Cell]
