"""run.yaml: the flags of a run in one file. `--config` reads it, and every run writes its own.

A value is the text that one would write on the command line, and goes through the same parser. So `1e-4` is a number
and `no` a word, whatever YAML makes of them, and nothing that a file holds can run.
"""

import re
from pathlib import Path

from training_utils.cli import flags

WIDTH = 44  # of a flag and its value, before the comment


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def read(path, known, refused, convert):
    """The flags that a file gives, {name: value}; one that is null or false is not given.

    `known` is {name: flags.Flag}, `refused` {name: why it may not stand in a file}; `convert(name, text)` makes a
    value of a text. Raises ValueError with a sentence that names the file and the line.
    """
    import yaml

    file = f"--config {path}"
    try:
        root = yaml.compose(Path(path).read_bytes().decode("utf-8-sig"), Loader=yaml.BaseLoader)
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{file} is not UTF-8") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{file} is not YAML: {_reason(error)}") from None
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"{file} must hold a flag and its value on each line, such as learning_rate: 1e-4")
    values, lines = {}, {}
    for key, node in root.value:
        name, line = _words(key).lstrip("-").replace("-", "_"), key.start_mark.line + 1
        if name in lines:
            raise ValueError(f"{file}, line {line}: {name} stands in line {lines[name]} already")
        lines[name] = line
        if name not in known:
            writer = re.match(r"# The flags of a run of (\S+)\. ", Path(path).read_text(encoding="utf-8-sig"))
            advice = flags.suggestion(name, known, cutoff=0.8 if writer else 0.6)
            advice += f"; the file was written by {writer[1]}" if writer else ""
            raise ValueError(f"{file}, line {line}: there is no flag {name}{advice}")
        if name in refused:
            raise ValueError(f"{file}, line {line}: {name} {refused[name]}")
        try:
            value = _value(node, known[name], convert)
        except ValueError as error:
            raise ValueError(f"{file}, line {line}, {name}: {error}") from None
        if value is not None:
            values[name] = value
    return values


def _reason(error):
    mark = getattr(error, "problem_mark", None)
    return f"line {mark.line + 1}: {error.problem}" if mark else str(error).splitlines()[0]


def _words(node):
    return node.value if node.id == "scalar" else f"of {node.id} kind"


def _value(node, flag, convert):
    """What a YAML node gives a flag, or None."""
    if node.id == "scalar" and node.style is None and node.value.lower() in ("", "~", "null"):
        return None
    items = node.value if node.id == "sequence" and flag.nargs else [node]
    if not all(item.id == "scalar" for item in items):
        raise ValueError("takes a value, or a list of values" if flag.nargs else "takes one value")
    if flag.kind is bool:
        if node.value.lower() not in ("true", "false"):
            raise ValueError(f"must be true or false, not {node.value}")
        return True if node.value.lower() == "true" else None
    values = [convert(flag.name, item.value) for item in items]
    return (values or None) if flag.nargs else values[0]


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


def text(about, groups, values, silent):
    """What `read` reads: `about`, lines of comment, then the `values` in `groups`, [(title, {name: help})].

    Those that are `silent` stand there as comments: they follow from others, or have no effect beside them.
    """
    lines = [f"# {line}" for line in about]
    for title, helps in groups:
        lines += ["", f"# {title}"]
        for name, explained in helps.items():
            if name in values:
                first, *more = _lines(name, values[name])
                shown = f"# {first}" if name in silent else first
                lines += [f"{shown:<{WIDTH}}  # {explained.split(';')[0]}", *more]
    return "\n".join(lines) + "\n"


def _lines(name, value):
    if isinstance(value, list):
        return [f"{name}:", *(f"  - {_scalar(item)}" for item in value)]
    return [f"{name}: {_scalar(value)}"]


def _scalar(value):
    """A value as YAML, on one line, that any reader of YAML takes for what it is."""
    import yaml

    if value == float("inf"):
        return "inf"  # YAML's own word, .inf, is no number on a command line
    style = '"' if isinstance(value, str) and not value.isprintable() else None
    dumped = yaml.safe_dump(value, default_style=style, width=float("inf"), allow_unicode=True)
    return dumped.removesuffix("\n").removesuffix("\n...")
