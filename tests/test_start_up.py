"""What is imported before a run begins: nothing that only POSIX systems have; and a Python without the packages."""

import contextlib
import os
import re
import struct
import subprocess
import sys

import pytest
from conftest import ROOT

from training_utils.cli import packages, table
from training_utils.cli.scripts import SCRIPTS as SCRIPTS_BY_NAME

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


# --- without the environment -----------------------------------------------------------------------------------------

# What a requirement is imported as, where that is another name.
IMPORTED_AS = {"pillow": "PIL", "pyyaml": "yaml", "Jinja2": None, "tensorboard": None, "tensorboardX": None}
# What others of them bring, and is imported here too.
BROUGHT = {"pyarrow", "tqdm"}


@pytest.mark.parametrize("backend", packages.REQUIRED)
def test_every_package_of_the_requirements_is_looked_for(backend):
    lines = (ROOT / packages.REQUIREMENTS[backend]).read_text().splitlines()
    names = {re.match(r"\w+", line)[0] for line in lines if line and not line.startswith("#")}
    imported = {IMPORTED_AS.get(name, name) for name in names} - {None}
    assert imported | BROUGHT == set(packages.REQUIRED[backend])
    assert len(packages.REQUIRED[backend]) == len(set(packages.REQUIRED[backend]))


def arguments(script):
    """A right command line of a script."""
    kandinsky = script.endswith(("prior", "decoder"))
    model = [] if kandinsky else ["--pretrained_model_name_or_path", "model"]
    return [*model, "--train_data_dir", str(ROOT / "tests")]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_python_without_the_packages_is_told_what_to_do(script, tmp_path):
    """As `python3` in a new terminal; from the folder of the scripts, and from another."""
    for folder in (ROOT, tmp_path):
        command = [sys.executable, "-S", str(ROOT / f"{script}.py"), *arguments(script)]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
        first = "jax, flax, optax" if script.endswith("flax") else "torch, accelerate, diffusers"
        assert f"{first} and " in done.stderr and f" are not installed for {sys.executable}: " in done.stderr
        place = "" if folder == ROOT else f"{ROOT}/"
        assert f"`source {place}.venv/bin/activate`" in done.stderr and ("make -C" in done.stderr) == bool(place)
        requirements = "requirements_flax.txt" if script.endswith("flax") else "requirements.txt"
        assert f"`pip install -r {place}{requirements}`" in done.stderr


@pytest.mark.parametrize("missing", ["numpy", "torch", "accelerate", "diffusers", "PIL", "peft", "yaml"])
def test_each_package_is_missed_by_its_name(missing, monkeypatch):
    monkeypatch.setattr(packages, "is_missing", lambda name: name == missing)
    sentence = packages.installation_problem(SCRIPTS_BY_NAME["train_text_to_image"])
    assert sentence.startswith(f"{missing} is not installed for ")
    of_both = missing in packages.OF_EVERY_SCRIPT
    assert (packages.installation_problem(SCRIPTS_BY_NAME["train_text_to_image_flax"]) is not None) == of_both


def test_help_and_a_wrong_flag_need_no_package():
    for words, code in ((["--help"], 0), (["--lora_rnk"], 2)):
        command = [sys.executable, "-S", "train_text_to_image_sdxl.py", *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == code and "not installed" not in done.stderr


OLD = """
import collections, sys
sys.path.insert(0, sys.argv[1])
sys.version_info = collections.namedtuple("Version", "major minor micro")(3, 9, 18)
import training_utils
"""


def test_an_old_python_is_told_which_one_it_takes():
    done = subprocess.run([sys.executable, "-c", OLD, str(ROOT)], capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert f"needs Python 3.11 or later, and {sys.executable} is Python 3.9.18" in done.stderr


# --- help ------------------------------------------------------------------------------------------------------------


def help_text(script, **environment):
    plain = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    command = [sys.executable, "-S", f"{script}.py", "--help"]
    return subprocess.check_output(command, cwd=ROOT, text=True, env=plain | environment)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_as_wide_as_the_terminal(script):
    widths = {}
    for columns in ("20", "50", "80", "119", "300", "wide", "0", ""):
        text = help_text(script, COLUMNS=columns)
        widths[columns] = max(map(len, text.splitlines()))
        for name in table.flags_of(script):
            assert f"--{name}" in text
    assert widths["20"] <= 50 and widths["50"] <= 50 and widths["80"] <= 80
    assert {widths[columns] for columns in ("119", "300", "wide", "0", "")} == {119}
    assert "lanczos" in help_text(script, COLUMNS="60") or "image_interpolation_mode" not in table.flags_of(script)


def test_help_fits_a_real_terminal():
    """A pseudo-terminal of 70 columns, without COLUMNS."""
    fcntl = pytest.importorskip("fcntl")
    pty = pytest.importorskip("pty")
    termios = pytest.importorskip("termios")
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 70, 0, 0))
    plain = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    command = [sys.executable, "-S", "train_text_to_image.py", "--help"]
    started = subprocess.Popen(command, cwd=ROOT, stdout=theirs, env=plain)
    os.close(theirs)
    text = b""
    with contextlib.suppress(OSError):  # which Linux raises at the end
        while part := os.read(ours, 4096):
            text += part
    assert started.wait() == 0
    assert 60 < max(map(len, text.decode().replace("\r", "").splitlines())) <= 70
