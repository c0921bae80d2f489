"""Packages that a flag or an optimizer needs and that are not always installed."""

import importlib.util
from dataclasses import dataclass


@dataclass(frozen=True)
class Package:
    """A package by the name it is imported by; `pip` is what `pip install` takes, `title` what a person calls it."""

    name: str
    pip: str
    title: str


def is_missing(name: str) -> bool:
    """Whether a package, by the name it is imported by, is not installed."""
    return importlib.util.find_spec(name) is None
