"""The packages that every script needs, and those that only a flag or an optimizer needs."""

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

from training_utils.base.formats import shortened
from training_utils.cli.scripts import Script

# By the names that they are imported by. tests/test_start_up.py holds them against the files of requirements;
# tensorboard, which --report_to asks for, is not among them.
OF_EVERY_SCRIPT = (
    "numpy datasets filelock huggingface_hub PIL psutil pyarrow safetensors tqdm transformers yaml".split()
)
REQUIRED = {
    "torch": ["torch", "accelerate", "diffusers", "peft", *OF_EVERY_SCRIPT],
    "jax": ["jax", "flax", "optax", *OF_EVERY_SCRIPT],
}
REQUIREMENTS = {"torch": "requirements.txt", "jax": "requirements_flax.txt"}


@dataclass(frozen=True)
class Package:
    """A package by the name it is imported by; `pip` is what `pip install` takes, `title` what a person calls it."""

    name: str
    pip: str
    title: str


def is_missing(name: str) -> bool:
    """Whether a package, by the name it is imported by, is not installed."""
    return importlib.util.find_spec(name) is None


def installation_problem(script: Script) -> str | None:
    """What to say where packages that a script cannot do without are missing, as without its environment; or None."""
    missing = [name for name in REQUIRED[script.backend] if is_missing(name)]
    if not missing:
        return None
    what = f"{missing[0]} is not installed" if len(missing) == 1 else f"{shortened(missing, 3)} are not installed"
    root = Path(__file__).parents[2]
    is_here = Path.cwd() == root
    make = "make setup" if is_here else f"make -C {root} setup"
    folder = "" if is_here else f"{root}/"
    return (
        f"{what} for {sys.executable}: "
        f"run `{make}` once and then `source {folder}.venv/bin/activate`, or start the script with "
        f"{folder}.venv/bin/python; `pip install -r {folder}{REQUIREMENTS[script.backend]}` is for an environment of "
        "your own"
    )
