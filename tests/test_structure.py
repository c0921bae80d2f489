"""How the code is laid out and which words it uses: who imports whom, how long things are, what is banned.

Each checker takes {path from the root: text} and returns a list of sentences, one for each violation, so that the last
part of this file can plant violations.
"""

import ast
import re
import subprocess
import sys

import pytest
from conftest import ROOT

# ---------------------------------------------------------------------------------------------------------------------
# What is allowed
# ---------------------------------------------------------------------------------------------------------------------

# A room imports from itself and from rooms of a lower number.
RANKS = {
    "training_utils.base": 0,
    "training_utils.cli": 1,
    "training_utils.data": 2,
    "training_utils.cache": 3,
    "training_utils.run": 4,
    "training_utils.torch_backend": 5,
    "training_utils.jax_backend": 5,
    "tools": 5,
    "scripts": 6,
}
# Beside those, the rooms that may import flax_diffusion, which imports nothing of ours.
USES_FLAX_DIFFUSION = {"training_utils.jax_backend", "scripts"}

FILE_LINES = 400
MAIN_LINES_TORCH = 125
MAIN_LINES_JAX = 140
LOOP_LINES = 40

# In any text. A word is bounded by anything but a letter, so that parts of snake_case names count.
BANNED_PHRASES = [
    "pictures?",
    "data sets?",
    "held[- _]out",
    "says? nothing",
    "mend(s|ed|ing)?",
    "(take|takes|taken|taking) away",
    "(pass|passes|passed|passing) over",
    "but for",
    "(begin|begins|begun|began) anew",
    "settled?|settles",
    "such as begin",
    "between two meetings",
    "lacks",
    "for one(?=;|, (?!other in|two in))",
    "of which",
    "safe_open is no dict",
    "stands there already",
]
# Names that functions, classes, parameters, attributes and variables of ours do not have, in tests either.
BANNED_NAMES = set(
    """
    keeping named settle visiting give_back look look_at looks planned newest partly mirrors cropped whole keep within
    Team Updates updates _cell _told HALVED FOUND ONCE BESIDE LATE GUESTS WAITS ROUND BLANK LOOKS at_the_end
    _Heard MATHEMATICS about alone hidden mended Prepare
    """.split()
)
# Words that names of tests do not have either.
BANNED_IN_TEST_NAMES = {"updates", "whole", "looks", "lacks", "mended", "anew"}
# Strings that hold a banned word because they are in files that earlier releases wrote or read.
FILE_FORMAT = {
    '"pictures"': "key of the run facts in metrics.jsonl, and of a stream's list of files",
    '"pictures-': "the folder of cached images in the encoding cache",
    '"/pictures-"': "the same, in the path of a mapped file",
    '"pictures_per_update"': "key of the run facts in metrics.jsonl",
    '"no picture"': "key of the caption-only entry in the cache",
    '"held_out"': "key of the run facts in metrics.jsonl",
}
# ---------------------------------------------------------------------------------------------------------------------
# Checkers
# ---------------------------------------------------------------------------------------------------------------------


def module_of(path):
    """The dotted name of a Python file's module."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def room_of(module):
    """The room of a module: a key of RANKS, "flax_diffusion", another top-level name, or "" for a package itself."""
    if module.startswith("train_text_to_image"):
        return "scripts"
    if module.startswith("training_utils"):
        return ".".join(module.split(".")[:2])
    return module.split(".")[0]


def imports_in(path, text, modules):
    """(module of ours, line, whether inside a function) of each import of one of `modules`."""
    found = []

    def resolve(node):
        if isinstance(node, ast.Import):
            return [alias.name for alias in node.names]
        base = node.module or ""
        if node.level:
            package = module_of(path).split(".")
            if not path.endswith("/__init__.py"):
                package = package[:-1]
            package = package[: len(package) - node.level + 1]
            base = ".".join([*package, *filter(None, [node.module])])
        names = [f"{base}.{alias.name}" for alias in node.names]
        return [name if name in modules else base for name in names]

    def visit(node, inside):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import | ast.ImportFrom):
                found.extend((name, child.lineno, inside) for name in resolve(child) if name in modules)
            visit(child, inside or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))

    visit(ast.parse(text), False)
    return found


def import_violations(files):
    """Imports from right to left, between the backends, or inside functions."""
    modules = {module_of(path) for path in files}
    sentences = []
    for path, text in files.items():
        room = room_of(module_of(path))
        for imported, line, inside in imports_in(path, text, modules):
            other = room_of(imported)
            if inside and room != "flax_diffusion":
                sentences.append(f"{path}:{line} imports {imported} inside a function")
            if other == room or imported == "training_utils":
                continue
            if other == "flax_diffusion":
                allowed = room in USES_FLAX_DIFFUSION
            else:
                allowed = room in RANKS and other in RANKS and RANKS[other] < RANKS[room] and other != "tools"
            if not allowed:
                sentences.append(f"{path}:{line} imports {imported}: {room} may not import {other}")
    return sentences


def import_circles(files):
    """Circles of imports among modules, each as one sentence."""
    modules = {module_of(path) for path in files}
    graph = {}
    for path, text in files.items():
        imported = {name for name, _, _ in imports_in(path, text, modules)}
        graph[module_of(path)] = sorted(imported - {module_of(path)})
    sentences, done = [], set()

    def walk(module, trail):
        if module in trail:
            sentences.append("circle: " + " -> ".join([*trail[trail.index(module) :], module]))
        elif module not in done:
            for other in graph.get(module, []):
                walk(other, [*trail, module])
            done.add(module)

    for module in graph:
        walk(module, [])
    return sentences


def long_files(files):
    """Files with more lines than they may have."""
    sentences = []
    for path, text in files.items():
        lines = len(text.splitlines())
        if lines > FILE_LINES:
            sentences.append(f"{path} has {lines} lines, at most {FILE_LINES}")
    return sentences


def long_mains(files):
    """Scripts whose `main`, or the loop in it, is too long, or that have none."""
    sentences = []
    for path, text in files.items():
        most = MAIN_LINES_JAX if path.endswith("_flax.py") else MAIN_LINES_TORCH
        mains = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef) and node.name == "main"]
        loops = [node for main in mains for node in ast.walk(main) if isinstance(node, ast.While)]
        if len(mains) != 1 or len(loops) != 1:
            sentences.append(f"{path} has {len(mains)} functions `main` with {len(loops)} `while` loops, not one each")
        for kind, nodes, limit in (("main", mains, most), ("the loop", loops, LOOP_LINES)):
            for node in nodes:
                lines = node.end_lineno - node.lineno + 1
                if lines > limit:
                    sentences.append(f"{path}: {kind} has {lines} lines, at most {limit}")
    return sentences


def banned_phrases(files):
    """Lines of code or prose with a banned phrase."""
    pattern = re.compile("(?<![a-z])(" + "|".join(BANNED_PHRASES) + ")(?![a-z])", re.IGNORECASE)
    sentences = []
    for path, text in files.items():
        for literal in FILE_FORMAT:
            text = text.replace(literal, '"')
        # A phrase may be broken over two lines of prose.
        for found in pattern.finditer(re.sub(r"\n[ #>*]*", lambda gap: "\n" + " " * (len(gap[0]) - 1), text)):
            line = text.count("\n", 0, found.start()) + 1
            sentences.append(f"{path}:{line} says {found[0]!r}")
        for found in re.finditer(r"(?<![a-z])data\s*\n[\s#]*sets?(?![a-z])", text):
            sentences.append(f"{path}:{text.count(chr(10), 0, found.start()) + 1} says 'data set'")
    return sentences


def banned_names(files):
    """Definitions in code with a banned name: functions, classes, parameters, attributes, variables."""
    sentences = []
    for path, text in files.items():
        for node in ast.walk(ast.parse(text)):
            name = None
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                name = node.name
            elif isinstance(node, ast.arg):
                name = node.arg
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                name = node.id
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                name = node.attr
            is_test = name is not None and name.startswith("test_")
            if name in BANNED_NAMES or (is_test and BANNED_IN_TEST_NAMES & set(name.split("_"))):
                sentences.append(f"{path}:{node.lineno} defines {name!r}")
    return sentences


# ---------------------------------------------------------------------------------------------------------------------
# The code as it is
# ---------------------------------------------------------------------------------------------------------------------


def files_under(*patterns):
    """{path: text} of the files that these globs find."""
    paths = sorted(path for pattern in patterns for path in ROOT.glob(pattern))
    return {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in paths}


LAYERED = ("training_utils/**/*.py", "flax_diffusion/*.py", "tools/**/*.py", "train_*.py")
CODE = (*LAYERED, "benchmarks/*.py", "quickstart/*.py")
PROSE = (*CODE, "tests/*.py", "docs/*.md", "README.md", "Makefile", "pyproject.toml", "examples/*")


def test_imports_go_from_right_to_left_only():
    assert import_violations(files_under(*LAYERED)) == []


def test_there_is_no_circle_of_imports():
    assert import_circles(files_under(*LAYERED)) == []


def test_files_are_short():
    assert long_files(files_under(*CODE)) == []


def test_main_and_its_loop_are_short():
    scripts = files_under("train_*.py")
    assert len(scripts) == 9
    assert long_mains(scripts) == []


def test_words_are_the_fields():
    files = files_under(*PROSE)
    del files["tests/test_structure.py"]
    assert banned_phrases(files) == []
    assert banned_names({path: text for path, text in files.items() if path.endswith(".py")}) == []


# ---------------------------------------------------------------------------------------------------------------------
# Planted violations
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "line", "words"),
    [
        ("training_utils/base/a.py", "from training_utils.run import b", "base may not import training_utils.run"),
        ("training_utils/data/a.py", "import training_utils.run.b", "data may not import training_utils.run"),
        ("training_utils/data/a.py", "from ..run.b import thing", "data may not import training_utils.run"),
        ("training_utils/jax_backend/a.py", "from training_utils.torch_backend import c", "may not import"),
        ("training_utils/torch_backend/a.py", "from flax_diffusion import d", "may not import flax_diffusion"),
        ("training_utils/run/a.py", "from tools import e", "may not import tools"),
        ("tools/a.py", "from training_utils.torch_backend import c", "may not import"),
        ("training_utils/run/a.py", "import train_text_to_image", "may not import scripts"),
        ("flax_diffusion/a.py", "from training_utils.run import b", "may not import training_utils.run"),
        ("train_text_to_image.py", "def f():\n    from training_utils.run import b", "inside a function"),
    ],
)
def test_a_wrong_import_is_found(path, line, words):
    places = ("training_utils/run/b.py", "training_utils/torch_backend/c.py", "flax_diffusion/d.py", "tools/e.py")
    files = dict.fromkeys((*places, "train_text_to_image.py"), "")
    (sentence,) = import_violations(files | {path: line})
    assert sentence.startswith(path) and words in sentence


def test_right_imports_are_left_alone():
    files = {
        "training_utils/base/a.py": "import torch\nfrom pathlib import Path\ndef f():\n    import datasets",
        "training_utils/run/b.py": "from training_utils.base import a\nfrom training_utils.base.a import f",
        "training_utils/jax_backend/c.py": "from flax_diffusion import d\nfrom training_utils.run import b",
        "flax_diffusion/d.py": "",
        "tools/e.py": "from training_utils.run.b import f",
        "train_text_to_image_flax.py": "from training_utils.jax_backend import c\nimport flax_diffusion.d",
    }
    assert import_violations(files) == [] == import_circles(files)


def test_a_circle_is_found():
    files = {
        "training_utils/run/a.py": "from training_utils.run import b",
        "training_utils/run/b.py": "from training_utils.run.c import f",
        "training_utils/run/c.py": "from . import a",
    }
    (sentence,) = import_circles(files)
    assert sentence.count("->") == 3


def test_lengths_are_counted():
    assert long_files({"tools/a.py": "x = 1\n" * FILE_LINES}) == []
    assert long_files({"tools/a.py": "x = 1\n" * (FILE_LINES + 1)}) == ["tools/a.py has 401 lines, at most 400"]
    loop = "    while True:\n" + "        x = 1\n" * (LOOP_LINES - 1)
    assert long_mains({"train_a.py": f"def main():\n{loop}"}) == []
    (sentence,) = long_mains({"train_a.py": f"def main():\n{loop}        x = 1\n"})
    assert "the loop has" in sentence
    (sentence,) = long_mains({"train_a.py": f"def main():\n{loop}" + "    x = 1\n" * MAIN_LINES_TORCH})
    assert "main has" in sentence
    assert len(long_mains({"train_a.py": "def main():\n    pass\n"})) == 1


@pytest.mark.parametrize(
    "text",
    [
        "a picture",
        "Pictures of it",
        "picture_count = 1",
        "the data set",
        "the data\n# set",
        "held-out loss",
        "held_out",
        "all but for one",
        "it mends",
        '"other pictures"',
    ],
)
def test_a_banned_phrase_is_found(text):
    assert len(banned_phrases({"tools/a.py": text})) == 1


def test_other_words_are_left_alone():
    text = 'facts["pictures"], facts["held_out"], depicturesque, recommend, the dataset, a path of "/pictures-" + name'
    assert banned_phrases({"tools/a.py": text}) == []


@pytest.mark.parametrize(
    "code",
    [
        "def f(keep): pass",
        "def settle(): pass",
        "class Team: pass",
        "LATE = 1",
        "self.looks = 1",
        "def test_the_whole_run(): pass",
    ],
)
def test_a_banned_name_is_found(code):
    assert len(banned_names({"tools/a.py": code})) == 1


def test_names_of_libraries_are_left_alone():
    assert banned_names({"tools/a.py": "x = library.keep(hidden=True)\ny = a.within"}) == []


UNTYPED = ["def f(x):\n    return x\n", "class A:\n    def f(self, x):\n        return x\n"]


@pytest.mark.parametrize("code", UNTYPED)
def test_lint_refuses_a_public_function_without_types(code):
    command = [sys.executable, "-m", "ruff", "check", "--stdin-filename", str(ROOT / "flax_diffusion/planted.py"), "-"]
    ended = subprocess.run(command, input=code, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 1 and "ANN201" in ended.stdout
    private = code.replace("def f", "def _f")
    assert subprocess.run(command, input=private, cwd=ROOT, capture_output=True, text=True).returncode == 0


def test_lint_refuses_a_parameter_without_a_type(tmp_path):
    planted = tmp_path / "planted.py"
    planted.write_text("def f(x) -> int:\n    return 1\n")
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", "/dev/null"]
    ended = subprocess.run([*command, str(planted)], cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 1 and "missing a type annotation" in ended.stdout
