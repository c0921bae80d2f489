"""The flag table: the only list of flags. A row says everything about its flag, and who has it."""

from collections.abc import Callable

from training_utils.cli.flag import Flag, Group
from training_utils.cli.table import model_and_data, running, training

GROUPS: tuple[Group, ...] = (
    *model_and_data.GROUPS,
    *training.GROUPS,
    *running.GROUPS,
)


def rows() -> list[Flag]:
    """All rows. A name stands in two of them where the flag of one script means something else in another."""
    return [flag for group in GROUPS for flag in group.flags]


def groups_of(script: str) -> list[Group]:
    """The groups of flags that a script has, by its name, each flag as it is there."""
    groups = []
    for group in GROUPS:
        flags = tuple(flag.in_script(script) for flag in group.flags if script in flag.scripts)
        if flags:
            groups.append(Group(group.title, flags))
    return groups


def flags_of(script: str) -> dict[str, Flag]:
    """The flags that a script has, {name: Flag}, in the order of --help."""
    return {flag.name: flag for group in groups_of(script) for flag in group.flags}


def names(which: Callable[[Flag], object]) -> frozenset[str]:
    """The names of the rows for which `which` is true."""
    return frozenset(flag.name for flag in rows() if which(flag))
