"""What turns the text of a flag into a value, and says what is wrong with it."""

import argparse
import math
from dataclasses import dataclass
from typing import ClassVar

from training_utils.cli.paths import expand_home


@dataclass(frozen=True)
class Number:
    """A parser for a number of type `type` from `low` to `high`, themselves allowed unless `above` or `below` says
    that the value must lie strictly above or below them. Raises ArgumentTypeError with a sentence."""

    type: type[int] | type[float]
    low: float = 0
    high: float = math.inf
    above: bool = False
    below: bool = False

    def __call__(self, text: str) -> int | float:
        what = "a whole number" if self.type is int else "a number"
        try:
            value = self.type(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}") from error
        # The comparison also refuses nan.
        if not self.low <= value <= self.high or value == math.inf:
            bounds = f"of at least {self.low}" if self.high == math.inf else f"from {self.low} to {self.high}"
            raise argparse.ArgumentTypeError(f"must be {what} {bounds}, not {text}")
        if self.above and value == self.low:
            raise argparse.ArgumentTypeError(f"must be above {self.low:g}")
        if self.below and value == self.high:
            raise argparse.ArgumentTypeError(f"must be below {self.high:g}")
        return value


@dataclass(frozen=True)
class Pixels:
    """A parser for a number of pixels that is a multiple of `unit`."""

    unit: int
    type: ClassVar = int

    def __call__(self, text: str) -> int:
        value = int(Number(int, self.unit)(text))
        if value % self.unit:
            nearest = round(value / self.unit) * self.unit
            raise argparse.ArgumentTypeError(f"{value} is not a multiple of {self.unit}; the nearest is {nearest}")
        return value


@dataclass(frozen=True)
class PathValue:
    """A parser for a path, or for what may be one, such as a hub id, which never begins with ~."""

    type: ClassVar = str

    def __call__(self, text: str) -> str:
        try:
            return expand_home(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error


ValueType = type | Number | Pixels | PathValue  # `bool` stands for a flag that is on or off and takes no text


def integer(low: int = 0, high: float = math.inf) -> Number:
    """A parser for an integer from `low` to `high`."""
    return Number(int, low, high)


def number(low: float = 0.0, high: float = math.inf) -> Number:
    """A parser for a float from `low` to `high`."""
    return Number(float, low, high)


above_zero = Number(float, 0.0, above=True)
below_one = Number(float, 0, 1, below=True)
path = PathValue()
multiple_of_8 = Pixels(8)  # as the autoencoders need it


def plain_type(kind: ValueType) -> type:
    """The type of the values that a parser makes: bool, int, float or str."""
    return kind if isinstance(kind, type) else kind.type
