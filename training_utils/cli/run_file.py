"""run.yaml: the flags of a run in one file. `--config` reads it, and every run writes its own.

A value is the text that one would write on the command line, and goes through the same parser. So `1e-4` is a number
and `no` a word, whatever YAML makes of them, and nothing that a file holds can run. In a path, ~ and variables stand
for what a shell would put there.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from training_utils.cli import table
from training_utils.cli.arguments import Arguments
from training_utils.cli.flag import Flag, Group
from training_utils.cli.paths import expand_variables, without_variables
from training_utils.cli.unknown import advice
from training_utils.cli.values import PathValue

WIDTH = 44  # of a flag and its value, before the comment


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def read(path: str | Path, known: Mapping[str, Flag], convert: Callable[[str, str], Any]) -> dict[str, Any]:
    """The flags that a file gives, {name: value}; one that is null or false is not given.

    `known` is {name: Flag}; `convert(name, text)` makes a value of a text. Raises ValueError with a sentence that
    names the file and the line.
    """
    file = f"--config {path}"
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from error
    return read_text(content, known, convert, file)


def read_text(
    content: bytes, known: Mapping[str, Flag], convert: Callable[[str, str], Any], file: str
) -> dict[str, Any]:
    """What `read` makes of the content of a file; `file` is what a sentence calls it."""
    import yaml

    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8") from error
    try:
        root = yaml.compose(text, Loader=yaml.BaseLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{file} is not YAML: {_reason(error)}") from error
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"{file} must hold a flag and its value on each line, such as learning_rate: 1e-4")
    values = {}
    lines: dict[str, int] = {}
    for key, node in root.value:
        name = _words(key).lstrip("-").replace("-", "_")
        line = key.start_mark.line + 1
        place = f"{file}, line {line}"
        if name in lines:
            raise ValueError(f"{place}: {name} is already in line {lines[name]}")
        lines[name] = line
        if name not in known:
            raise ValueError(f"{place}: there is no flag {name}{_advice(name, known, text)}")
        if known[name].not_in_file is not None:
            raise ValueError(f"{place}: {name} {known[name].not_in_file}")
        try:
            value = _value(node, known[name], convert)
        except ValueError as error:
            raise ValueError(f"{place}, {name}: {error}") from error
        if value is not None:
            values[name] = value
    return values


def _advice(name: str, known: Mapping[str, Flag], text: str) -> str:
    """What to add to the sentence that there is no flag of this name: what helps, and who wrote the file."""
    writer = re.match(r"# The flags of a run of (\S+)\. ", text)
    if writer is None:
        return advice(name, known)
    return advice(name, known) + f"; the file was written by {writer[1]}"


def _reason(error: Exception) -> str:
    import yaml

    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    return str(error).splitlines()[0]


def _words(node: Any) -> str:
    """The text of a YAML node."""
    return node.value if node.id == "scalar" else f"of {node.id} kind"


def _value(node: Any, flag: Flag, convert: Callable[[str, str], Any]) -> Any:
    """What a YAML node gives a flag, or None."""
    if node.id == "scalar" and node.style is None and node.value.lower() in ("", "~", "null"):
        return None
    items = node.value if node.id == "sequence" and flag.nargs else [node]
    if not all(item.id == "scalar" for item in items):
        raise ValueError("takes a value, or a list of values" if flag.nargs else "takes one value")
    if flag.type is bool:
        if node.value.lower() not in ("true", "false"):
            raise ValueError(f"must be true or false, not {node.value}")
        return True if node.value.lower() == "true" else None
    texts = [item.value for item in items]
    if isinstance(flag.type, PathValue):
        texts = [expand_variables(text) for text in texts]
    values = [convert(flag.name, text) for text in texts]
    if flag.nargs:
        return values or None
    return values[0]


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


def as_file(args: Arguments, seed: int) -> str:
    """The text of run.yaml: the flags of a run, without secrets and what is for one run alone; and its seed.

    Those that have no effect stand there as comments.
    """
    header = [
        f"The flags of a run of {args.script.name}.py. --config with this file repeats it; flags beside --config win.",
        "A relative path begins in the folder that the command is called in. A flag that is commented out follows",
        "from the others, or has no effect beside them.",
    ]
    once = table.names(lambda flag: flag.once)
    values = {name: value for name, value in args.public.items() if name not in once} | {"seed": seed}
    commented_out = _without_effect(args) - args.given
    return text_of(header, table.groups_of(args.script.name), values, commented_out)


def _without_effect(args: Arguments) -> set[str]:
    """The flags that follow from others or have no effect beside them, which reading them would tell."""
    found = {"max_train_steps"}
    if args.lr_scheduler == "constant":
        found.add("lr_warmup_steps")
    for name, flag in table.flags_of(args.script.name).items():
        if flag.needs is not None and flag.needs.even_default and not flag.needs.are_met(vars(args)):
            found.add(name)
    return found


def text_of(
    header: Sequence[str], groups: Sequence[Group], values: Mapping[str, Any], commented_out: Collection[str]
) -> str:
    """What `read` reads: `header`, lines of comment, then the `values` by groups, some of them as comments."""
    lines = [f"# {line}" for line in header]
    for group in groups:
        lines += ["", f"# {group.title}"]
        for flag in group.flags:
            if flag.name in values:
                value = values[flag.name]
                if isinstance(flag.type, PathValue) and value is not None:
                    value = without_variables(value)
                first, *more = _lines(flag.name, value)
                shown = f"# {first}" if flag.name in commented_out else first
                lines += [f"{shown:<{WIDTH}}  # {flag.help.split(';')[0]}", *more]
    return "\n".join(lines) + "\n"


def _lines(name: str, value: Any) -> list[str]:
    if isinstance(value, list):
        return [f"{name}:", *(f"  - {_scalar(item)}" for item in value)]
    return [f"{name}: {_scalar(value)}"]


def _scalar(value: Any) -> str:
    """A value as YAML, on one line, that any reader of YAML takes for what it is."""
    import yaml

    if value == float("inf"):
        return "inf"  # YAML's own word, .inf, is no number on a command line
    style = '"' if isinstance(value, str) and not value.isprintable() else None
    dumped = yaml.safe_dump(value, default_style=style, width=float("inf"), allow_unicode=True)
    return dumped.removesuffix("\n").removesuffix("\n...")
