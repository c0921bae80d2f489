"""A number as a person reads it."""

import math


def short_number(value: float | None, digits: int = 4) -> str:
    """A number with `digits` significant digits and without trailing zeros; None is a value that was not finite."""
    if value is None:
        return "not finite"
    size = abs(value)
    if value and (size < 1e-3 or size >= 1e6):
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    magnitude = math.floor(math.log10(size)) if value else 0
    text = f"{value:,.{max(0, digits - 1 - magnitude)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
