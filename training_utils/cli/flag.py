"""One row of the flag table."""

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from training_utils.cli.packages import Package
from training_utils.cli.scripts import EVERY
from training_utils.cli.values import ValueType


@dataclass(frozen=True)
class Needs:
    """What a flag has no effect without: one of `flags`, set, and where `values` are given, to one of them.

    A flag without it is told in a notice or, with `refused`, is an error. A value that is the default is let through,
    as run.yaml writes it, unless `even_default`; such a flag stands in run.yaml as a comment. `words` replaces the
    words that name what is needed.
    """

    flags: tuple[str, ...]
    values: tuple[str, ...] = ()
    refused: bool = False
    even_default: bool = False
    words: str | None = None

    def are_met(self, settings: Mapping[str, Any]) -> bool:
        """Whether it is there, among all settings of a run, {flag: value}."""
        if self.values:
            return any(settings.get(name) in self.values for name in self.flags)
        return any(settings.get(name) for name in self.flags)

    @property
    def sentence(self) -> str:
        """The words for what is needed, such as "--use_ema"."""
        if self.words is not None:
            return self.words
        names = " or ".join(f"--{name}" for name in self.flags)
        *more, last = self.values or ("",)
        return f"{names} {', '.join(more)}{' or ' if more else ''}{last}".rstrip()


def needs(*flags: str, values: tuple[str, ...] = (), **how: Any) -> Needs:
    """A `Needs` of any of these flags."""
    return Needs(flags, values, **how)


@dataclass(frozen=True)
class Variant:
    """What is different about a flag in some scripts: {field of Flag: value}."""

    scripts: frozenset[str]
    changes: Mapping[str, Any]


def differs(scripts: frozenset[str], **changes: Any) -> Variant:
    """A `Variant`; `changes` are fields of Flag."""
    return Variant(scripts, changes)


@dataclass(frozen=True)
class Flag:
    """Everything about one flag."""

    name: str
    type: ValueType = str  # turns the text into the value, and raises ArgumentTypeError with a sentence
    default: Any = None
    help: str = ""
    choices: Collection[str] | None = None
    nargs: str | None = None
    required: bool = False
    # The scripts that have it, and what is different about it in some of them; the last variant that fits wins.
    scripts: frozenset[str] = EVERY
    variants: tuple[Variant, ...] = ()
    # Whether it decides what the weights become. A checkpoint remembers it, and a resumed run compares.
    shapes_result: bool = False
    needs: Needs | None = None
    package: Package | None = None  # that it needs
    # Of other trainers' flags for the same; what follows a space is the value, or whatever else it takes here.
    other_names: tuple[str, ...] = field(default=(), kw_only=True)
    otherwise: str | None = None  # what holds in the scripts that do not have it, where one may expect it there
    secret: bool = False  # never shown or written
    once: bool = False  # for one run alone, so that it does not stand in run.yaml
    not_in_file: str | None = None  # why it may not stand in a file for --config
    not_streamed: str | None = None  # why it does not go with --streaming
    replaces: tuple[str, ...] = ()  # flags of a file for --config that it puts out of effect on the command line

    def called_elsewhere(self, name: str) -> str | None:
        """The words here for another trainer's flag of this name, such as "--prediction_type v_prediction", or None
        where it is another flag."""
        for entry in self.other_names:
            other, space, rest = entry.partition(" ")
            if other == name:
                return f"--{self.name}{space}{rest}"
        return None

    def in_script(self, script: str) -> "Flag":
        """The flag as a script has it."""
        changes: dict[str, Any] = {}
        for variant in self.variants:
            if script in variant.scripts:
                changes |= variant.changes
        return dataclasses.replace(self, variants=(), **changes)


@dataclass(frozen=True)
class Group:
    """The flags that stand under one heading of --help."""

    title: str
    flags: tuple[Flag, ...]
