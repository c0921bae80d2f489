"""Every private name of a library that is used stands in one table, and the installed release has it."""

import ast
import importlib

import pytest
from conftest import ROOT

from training_utils.base.private_interfaces import PRIVATE_INTERFACES

OURS = ("training_utils", "flax_diffusion")
# Fields of named tuples and ways to leave a process, which are public in spite of their names.
PUBLIC = {"_replace", "_asdict", "_fields", "_exit"}


def found(name):
    """Whether a dotted name exists; `()` behind a class stands for an object of it."""
    parts = name.replace("()", ".()").split(".")
    value, at = None, 0
    for count in range(len(parts), 0, -1):
        try:
            value, at = importlib.import_module(".".join(parts[:count])), count
            break
        except ImportError:
            continue
    for part in parts[at:]:
        if part == "()":
            value = an_object(value)
        elif hasattr(value, part):
            value = getattr(value, part)
        else:
            return False
    return True


def an_object(kind):
    """Any object of a class whose objects are in the table."""
    import datasets
    import torch

    if kind is datasets.Dataset:
        return kind.from_dict({})
    return kind(torch.optim.SGD([torch.zeros(1)], lr=1.0), lr_lambda=float)


@pytest.mark.parametrize("interface", PRIVATE_INTERFACES, ids=lambda interface: interface.name)
def test_it_exists_and_is_used(interface):
    assert found(interface.name)
    assert interface.name.split(".")[-1] in (ROOT / interface.used_in).read_text()


def test_one_that_is_gone_is_noticed():
    assert not found("torch._no_such_function") and not found("torch.optim.lr_scheduler.LambdaLR()._no")


def private_names(path):
    """The private attributes that a file uses of anything but its own objects and modules, and the private modules
    that it imports."""
    tree = ast.parse(path.read_text())
    own = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    own |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and is_self(node.value)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and not is_self(node.value) and node.attr not in own:
            yield node.attr
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield from alias.name.split(".")
        elif isinstance(node, ast.ImportFrom):
            yield from (node.module or "").split(".")
            yield from (alias.name for alias in node.names)


def is_self(node):
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def test_nothing_else_of_the_kind_is_used():
    listed = {part for interface in PRIVATE_INTERFACES for part in interface.name.replace("()", "").split(".")}
    files = [path for folder in OURS for path in (ROOT / folder).rglob("*.py")]
    for path in [*files, *ROOT.glob("train_*.py")]:
        for name in private_names(path):
            is_private = name.startswith("_") and not name.startswith("__")
            assert not is_private or name in PUBLIC | listed, f"{path} uses {name}, which is not in the table"
