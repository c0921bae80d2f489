"""The two axes of a chart: from where to where they go, and their ticks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class Axis:
    """A scale from `low` to `high`."""

    low: float
    high: float
    logarithmic: bool = False

    def fraction(self, value: float) -> float:
        """Where a value lies: 0 at `low`, 1 at `high`."""
        if self.logarithmic:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Round numbers on the axis."""
        return _log_ticks(self.low, self.high) if self.logarithmic else round_ticks(self.low, self.high)


def step_axis(values: Sequence[float]) -> Axis:
    """The horizontal axis for these values; it begins at 0 where that is near."""
    low = min(values)
    high = max(values)
    if 0 < low < high / 10:
        return Axis(0, high)
    if high > low:
        return Axis(low, high)
    return Axis(low - 1, high + 1)


def value_axis(values: Sequence[float], *, from_zero: bool) -> Axis:
    """The vertical axis for these values; it is logarithmic where the highest is far above most of them."""
    low = min(values)
    high = max(values)
    if low > 0 and high > 15 * median(values):
        return Axis(low * 0.9, high * 1.1, logarithmic=True)
    if from_zero and low >= 0:
        return Axis(0, high * 1.08 or 1)
    margin = (high - low) * 0.06 or abs(high) * 0.05 or 1
    # The margin does not carry an axis of positive values below 0.
    bottom = 0 if low >= 0 > low - margin else low - margin
    return Axis(bottom, high + margin)


def round_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, about `count` of them, apart by 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    # The bounds are the geometric means of neighbouring factors, squared.
    bounds = ((1, 2), (2, 10), (5, 50), (10, 100))
    distance = power * next(factor for factor, most in bounds if (rough / power) ** 2 <= most)
    first = math.ceil(low / distance - 1e-9)
    last = math.floor(high / distance + 1e-9)
    return [index * distance for index in range(first, last + 1)]


def whole_ticks(axis: Axis, count: int) -> list[float]:
    """The ticks of an axis of steps, about `count`: whole numbers."""
    integers = [tick for tick in round_ticks(axis.low, axis.high, count) if tick == int(tick)]
    return integers or [axis.low]


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    powers_of_ten = [10.0**power for power in powers if low <= 10.0**power <= high]
    if len(powers_of_ten) >= 3:
        return powers_of_ten[:: -(-len(powers_of_ten) // 6)]
    candidates = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
    return [value for value in candidates if low <= value <= high]
