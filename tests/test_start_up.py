"""What is imported before a run begins: nothing that only POSIX systems have."""

import subprocess
import sys

import pytest
from conftest import ROOT

SCRIPTS = sorted(path.stem for path in ROOT.glob("train_text_to_image*.py"))

# The modules are hidden from this suite's own files: psutil, which accelerate imports, has need of them on Linux, and
# of others elsewhere.
HIDDEN = """
import builtins, importlib, sys
real = builtins.__import__

def without_posix(name, globals=None, locals=None, fromlist=(), level=0):
    file = (globals or {}).get("__file__") or ""
    if name in ("fcntl", "resource") and file.startswith(sys.argv[1]) and "/.venv/" not in file:
        raise ImportError(f"{file} imports {name}")
    return real(name, globals, locals, fromlist, level)

sys.path.insert(0, sys.argv[1])
builtins.__import__ = without_posix
for script in sys.argv[2:]:
    importlib.import_module(script)
"""


def import_without(scripts):
    """Import scripts in a process where this suite's files cannot have these modules."""
    command = [sys.executable, "-c", HIDDEN, str(ROOT), *scripts]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr.splitlines()[-1]


def test_no_script_imports_what_only_posix_has():
    assert len(SCRIPTS) == 9
    import_without([name for name in SCRIPTS if not name.endswith("flax")])


def test_nor_does_the_one_for_jax():
    pytest.importorskip("jax")
    import_without(["train_text_to_image_flax"])


def test_the_rooms_below_the_backends_work_without(tmp_path):
    """Nor do the lock on the output folder and the memory that is logged need them."""
    code = """
import psutil, sys
sys.modules |= dict.fromkeys(["fcntl", "resource"])
sys.path.insert(0, sys.argv[1])
from training_utils.base import environment
from training_utils.run import checkpoints, dry_run, exit, grids, metrics, output_folder, progress, resume, signals
from training_utils.run import single_file, summary, trackers
from training_utils.run.hub import card, upload
assert 2**20 < environment.resident_memory() <= environment.peak_memory()
output_folder.claim(sys.argv[2])
output_folder.release()
"""
    subprocess.run([sys.executable, "-c", code, str(ROOT), str(tmp_path)], cwd=ROOT, check=True)
