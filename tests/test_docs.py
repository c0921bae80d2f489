"""Every command and snippet of the README and of docs/ runs, with tiny models in place of real ones and few steps;
and what the pages say of flags, files, tests and sentences is so. What is JAX's is in tests/test_flax_docs.py."""

import ast
import importlib
import importlib.metadata
import re
import shutil
import tarfile
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, reset_accelerate
from diffusers import (
    KandinskyV22Pipeline,
    KandinskyV22PriorPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from packaging.requirements import Requirement
from pages import (
    PAGES,
    SCRIPTS,
    SD,
    SDXL,
    SMALLER,
    blocks,
    commands,
    different,
    name_of,
    on_tiny_models,
    prose,
    run_files,
)
from PIL import Image
from tiny import image

from training_utils.base.errors import UserError
from training_utils.cli import table
from training_utils.cli.options import DataOptions
from training_utils.data import checking, opening, selection

COMMANDS = commands()
TORCH = [command for command in different(COMMANDS) if command.script and "flax" not in command.script]


# --- commands of the scripts -----------------------------------------------------------------------------------------


def test_blocks_are_found():
    """None is hidden, say in a list; and of each kind there are some."""
    for page in PAGES:
        fences = len(re.findall(r"```", page.read_text()))
        assert fences == 2 * sum(block.page == name_of(page) for block in blocks()), page
    assert {block.language for block in blocks()} <= {"bash", "python", "yaml", "json", "csv", "text"}
    assert {command.script for command in COMMANDS} >= set(SCRIPTS)


@pytest.mark.parametrize("command", TORCH, ids=lambda command: f"{command.page}-{command.flags[-1]}")
def test_command(command, sd, sdxl, kandinsky, images, tmp_path, monkeypatch):
    """In process: the launcher's own flags are tested with real processes elsewhere."""
    main = importlib.import_module(command.script.removesuffix(".py")).main
    words = on_tiny_models(command, sd, sdxl, kandinsky, images, tmp_path / "out")
    if "--check_data" in words:
        assert main(words) == 0
        return
    if "--push_to_hub" in words:
        import huggingface_hub

        monkeypatch.setattr(huggingface_hub, "create_repo", lambda name, **_: type("", (), {"repo_id": name}))
        monkeypatch.setattr(huggingface_hub, "upload_folder", lambda **_: None)
    reset_accelerate()
    if "--enable_xformers_memory_efficient_attention" in words:
        with pytest.raises((SystemExit, UserError)):  # not on a CPU, which it says in one sentence
            main([*words, *SMALLER])
        return
    assert main([*words, *SMALLER]) == 0
    assert (tmp_path / "out").exists() is ("--dry_run" not in words)


def launched():
    return sorted({command.words for command in COMMANDS if command.words[:2] == ("accelerate", "launch")})


@pytest.mark.parametrize("words", launched(), ids=lambda words: words[-1])
def test_the_launcher_takes_its_flags(words):
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    args = launch_command_parser().parse_args(words[2:])
    assert args.training_script in SCRIPTS
    if args.config_file:
        assert load_config_from_file(str(ROOT / args.config_file))


# --- other commands --------------------------------------------------------------------------------------------------

PROGRAMS = ("make", "pip", "hf", "tensorboard", "pytest")  # that the pages also name within a sentence
TARGETS = set(re.search(r"\.PHONY: (.*)", (ROOT / "Makefile").read_text())[1].split())


VARIABLES = set(re.findall(r"(?m)^(\w+) [?:]?=", (ROOT / "Makefile").read_text()))


def makes(*words):
    targets = {word for word in words if "=" not in word}
    assert targets and targets <= TARGETS
    assert {word.split("=")[0] for word in words if "=" in word} <= VARIABLES


def installs(command, *words):
    """The files that are named exist, and the packages in the versions that are tested."""
    assert command == "install"
    names = iter(words)
    for name in names:
        if name == "-r":
            assert (ROOT / next(names)).is_file()
            continue
        wanted = Requirement(name)
        try:
            distribution = importlib.metadata.metadata(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            continue
        assert wanted.extras <= set(distribution.get_all("Provides-Extra") or [])
        assert importlib.metadata.version(wanted.name) in wanted.specifier


def talks_to_the_hub(*words):
    from huggingface_hub.cli.hf import app

    command, name, rest, context = app, "hf", list(words), None
    while True:
        context = command.make_context(name, rest, parent=context)
        rest = [*context._protected_args, *context.args]
        if not hasattr(command, "resolve_command"):
            return
        name, command, rest = command.resolve_command(context, rest)


def is_parsed(monkeypatch, *words):
    """A program of ours (a file, or -m and a module) takes its words; it is stopped when it has parsed them."""
    import argparse

    class Parsed(Exception):
        pass

    def parse(self, argv=None, namespace=None, _real=argparse.ArgumentParser.parse_args):
        _real(self, argv, namespace)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    if words[0] == "-m":
        name, *words = words[1:]
    else:
        monkeypatch.syspath_prepend(str((ROOT / words[0]).parent))
        name, words = Path(words[0]).stem, words[1:]
    program = importlib.import_module(name)
    if hasattr(program, "__path__"):  # a package, whose command is a module of it
        program = importlib.import_module(f"{name}.command")
    with pytest.raises(Parsed):
        program.main(list(words))


def inline(start):
    """What the pages have in backticks that begins with a word, each as its words; not in quoted error sentences,
    which are held against the source."""
    texts = [re.sub(r"(?m)^>.*", "", prose(page)) for page in PAGES]
    spans = {span for text in texts for span in re.findall(r"`([^`\n]+)`", text)}
    return sorted(tuple(span.split()) for span in spans if span.startswith(f"{start} ") and "…" not in span)


@pytest.mark.parametrize(
    "words",
    sorted({command.words for command in COMMANDS if not command.script}.union(*map(inline, PROGRAMS))),
    ids=" ".join,
)
def test_other_command(words, monkeypatch):
    program, *rest = words
    if program == "make":
        makes(*rest)
    elif program == "pip":
        installs(*rest)
    elif program == "hf":
        talks_to_the_hub(*rest)
    elif program == "tensorboard":
        from tensorboard.program import TensorBoard

        TensorBoard().configure(("", *rest))
    elif program == "pytest":
        assert all((ROOT / word).exists() for word in rest if "/" in word)
    elif program == "python" and (rest[0] == "-m" or (ROOT / rest[0]).is_file()):
        is_parsed(monkeypatch, *rest)
    else:
        pytest.fail(f"no test knows how to run {' '.join(words)}")


@pytest.mark.parametrize("words", inline("python"), ids=" ".join)
def test_program_that_is_named(words, monkeypatch):
    if words[1] == "-c":
        exec(" ".join(words[2:]).strip('"'), {})
    elif words[1] in SCRIPTS:
        assert words[2:] == ("--help",)
    else:
        is_parsed(monkeypatch, *words[1:])


# --- snippets --------------------------------------------------------------------------------------------------------

SNIPPETS = sorted({block.text for block in blocks("python") if "flax_diffusion" not in block.text})


@pytest.fixture(scope="module")
def results(run, run_lora, run_sdxl, run_lora_sdxl, tmp_path_factory):
    """A folder in which the results lie that the commands of the pages leave."""
    folder = tmp_path_factory.mktemp("results")
    runs = {"my_model": run, "my_lora": run_lora, "my_sdxl": run_sdxl, "my_sdxl_lora": run_lora_sdxl}
    for name, each in runs.items():
        each(folder / name, "--max_train_steps", "1", "--validation_split", "0.1")
    return folder


@pytest.mark.parametrize("snippet", [snippet for snippet in SNIPPETS if "kandinsky" not in snippet.lower()])
def test_python_snippet(snippet, results, sd, sdxl, monkeypatch):
    monkeypatch.chdir(results)
    Path("bicycle.png").unlink(missing_ok=True)
    for cls in (StableDiffusionPipeline, StableDiffusionXLPipeline):

        def call(self, text, _real=cls.__call__):
            return _real(self, text, num_inference_steps=2)

        monkeypatch.setattr(cls, "__call__", call)
    exec(snippet.replace(SD, sd).replace(SDXL, sdxl), {})
    assert "bicycle.png" not in snippet or Path("bicycle.png").stat().st_size > 100


@pytest.fixture(scope="module")
def kandinsky_results(run_prior, run_decoder, run_lora_prior, run_lora_decoder, tmp_path_factory):
    """A folder that holds what the page's commands leave, trained hard enough to show in an image."""
    folder = tmp_path_factory.mktemp("results")
    shutil.copytree(run_prior.base[1], folder / "stock_decoder")
    card = f"---\nprior:\n- {run_prior.base[0]}\n---\n"  # by which, on the hub, a decoder's card names its prior
    (folder / "stock_decoder" / "README.md").write_text(card)
    runs = {"my_prior": run_prior, "my_decoder": run_decoder}
    runs |= {"my_prior_lora": run_lora_prior, "my_decoder_lora": run_lora_decoder}
    for name, run in runs.items():
        run(folder / name, "--learning_rate", "5e-2")
    return folder


@pytest.mark.parametrize("snippet", [snippet for snippet in SNIPPETS if "kandinsky" in snippet.lower()])
def test_kandinsky_snippet(snippet, kandinsky, kandinsky_results, monkeypatch):
    """The very lines, small images and fixed noise aside, draw another image than the stock networks do."""
    import torch

    for cls, small in (
        (KandinskyV22PriorPipeline, dict(num_inference_steps=2)),
        (KandinskyV22Pipeline, dict(num_inference_steps=2, height=16, width=16)),
    ):

        def call(self, *args, _real=cls.__call__, _small=small, **options):
            return _real(self, *args, **(options | _small | {"generator": torch.Generator().manual_seed(0)}))

        monkeypatch.setattr(cls, "__call__", call)
    monkeypatch.chdir(kandinsky_results)
    prior, decoder = (f'"kandinsky-community/kandinsky-2-2-{name}"' for name in ("prior", "decoder"))
    images = []
    for trained in (True, False):
        lines = snippet
        if not trained:
            lines = re.sub(r".*load_lora_adapter.*\n", "", lines)
            lines = lines.replace('"my_prior"', prior).replace('"my_decoder"', decoder)
        exec(lines.replace(prior, repr(kandinsky[0])).replace(decoder, "'stock_decoder'"), {})
        images.append(Image.open("bicycle.png").convert("RGB").tobytes())
    assert images[0] != images[1]


# --- files -----------------------------------------------------------------------------------------------------------


def make_file(path):
    """A file as a page's listing of a folder has it: an image, a caption, a shard or a table of two, metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix in (".png", ".jpg"):
        image(1).save(path)
    elif path.suffix in (".txt", ".caption"):
        path.write_text("a red bicycle")
    elif path.suffix == ".tar":
        for name in ("001.png", "001.txt"):
            make_file(path.parent / "members" / name)
        with tarfile.open(path, "w") as shard:
            shard.add(path.parent / "members", "")
        shutil.rmtree(path.parent / "members")
    elif path.suffix == ".parquet":
        import datasets

        columns = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
        rows = {"image": [image(1)], "text": ["a red bicycle"]}
        datasets.Dataset.from_dict(rows, features=columns).to_parquet(path)
    else:
        assert path.name == "metadata.jsonl"


def listing(text):
    """A text block that lists a folder: (the folder's name, [paths in it])."""
    folder, *lines = text.splitlines()
    paths, parents = [], {}
    for line in lines:
        depth = (len(line) - len(line.lstrip())) // 2
        parents[depth] = f"{parents.get(depth - 1, '')}{line.strip()}"
        paths.append(parents[depth])
    return folder.rstrip("/"), paths


LISTINGS = [block.text for block in blocks("text") if block.text.splitlines()[0].endswith("/")]


@pytest.mark.parametrize("text", LISTINGS)
def test_listing_of_a_folder(text, run, tmp_path):
    folder, paths = listing(text)
    if folder == "my_model":
        run(tmp_path / folder, "--checkpointing_steps", "3", "--validation_prompts", "a", "--report_to", "tensorboard")
        for path in paths:
            path = path.replace("checkpoint-500", "checkpoint-6").replace("000500", "000006")
            assert (tmp_path / folder / path).exists(), path
        return
    assert folder == "my_images", f"no test knows what {folder} is"
    for path in paths:
        make_file(tmp_path / folder / path)
    images = [path for path in paths if path.endswith((".png", ".jpg"))]
    if "metadata.jsonl" in paths:
        lines = [f'{{"file_name": "{path}", "text": "a"}}\n' for path in images]
        (tmp_path / folder / "metadata.jsonl").write_text("".join(lines))
    repeated = any(path.startswith("10_") for path in paths)
    rows = opening.load_dataset(
        DataOptions(folder=tmp_path / folder, cache_dir=tmp_path / "cache", repeats_from_folders=repeated)
    )
    assert not checking.check_dataset(rows) and not rows.findings.unnamed
    assert len(rows) == (len(images) or len(paths))  # each shard or table holds one
    if repeated:
        assert len(selection.repeat_sources(rows)) == 21 and ["sks dog"] in [rows.captions(at) for at in range(3)]


@pytest.mark.parametrize("block", blocks("json", "csv"), ids=lambda block: block.language)
def test_metadata(block, tmp_path):
    for name in re.findall(r"[\w/]+\.(?:png|jpg)", block.text):
        make_file(tmp_path / name)
    (tmp_path / f"metadata.{'jsonl' if block.language == 'json' else 'csv'}").write_text(block.text)
    rows = opening.load_dataset(DataOptions(folder=tmp_path))
    assert not checking.check_dataset(rows) and len(rows) == 2 and not rows.findings.unnamed


@pytest.mark.parametrize("block", blocks("yaml"), ids=lambda block: block.text.splitlines()[0])
def test_yaml(block, images, tmp_path):
    """A list is a --train_data_config, which is opened; what else there is, a command of the page names, and runs."""
    name, content = block.text.splitlines()[0].removeprefix("# "), yaml.safe_load(block.text)
    if not isinstance(content, list):
        users = [command for command in commands() if command.page == block.page and name in command.words]
        assert users and name in run_files()
        return
    for source in content:
        if "path" in source:
            shutil.copytree(images, tmp_path / source["path"])
    (tmp_path / name).write_text(re.sub(r"dataset_name: \S+", f"dataset_name: {images}", block.text))
    rows = opening.load_dataset(DataOptions(config=tmp_path / name, cache_dir=tmp_path / "cache"))
    assert not checking.check_dataset(rows) and len(rows) == 20


# --- links, flags, tests, sentences ----------------------------------------------------------------------------------


def anchors(page):
    """The names by which GitHub links to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links(page):
    for target in re.findall(r"\]\(([^)]+)\)", prose(page)):
        if "://" not in target:
            path, _, anchor = target.partition("#")
            other = (page.parent / path).resolve() if path else page
            assert other.is_file() and (not anchor or anchor in anchors(other)), target


def test_every_page_is_linked_from_the_readme():
    linked = set(re.findall(r"\]\((docs/\w+\.md)", PAGES[0].read_text()))
    assert linked == {name_of(page) for page in PAGES[1:]}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_flags_that_a_page_names_exist(page):
    from accelerate.commands.launch import launch_command_parser

    scripts = ["train_text_to_image_flax.py"] if page.stem == "jax" else SCRIPTS
    ours = {name for script in scripts for name in table.flags_of(script.removesuffix(".py"))}
    known = {f"--{no}{name}" for name in ours for no in ("", "no_")} | {"--help", "--logdir"}
    known |= set(launch_command_parser()._option_string_actions)
    for folder in ("benchmarks", "quickstart", "tools"):
        for program in (ROOT / folder).rglob("*.py"):
            known |= set(re.findall(r'add_argument\(\s*"(--\w+)"', program.read_text()))
    text = re.sub(r"\| kohya's flag.*", lambda table: re.sub(r"(?m)^\|[^|]*", "", table[0]), prose(page), flags=re.S)
    text = re.sub(r"(?m)^>.*", "", text)  # the sentences of troubleshooting are held against the source
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z0-9_]*", text)) - {"--no_"} <= known


SHORT = {
    "train_text_to_image.py": "SD",
    "train_text_to_image_lora.py": "SD LoRA",
    "train_text_to_image_sdxl.py": "SDXL",
    "train_text_to_image_lora_sdxl.py": "SDXL LoRA",
    "train_text_to_image_prior.py": "prior",
    "train_text_to_image_lora_prior.py": "prior LoRA",
    "train_text_to_image_decoder.py": "decoder",
    "train_text_to_image_lora_decoder.py": "decoder LoRA",
    "train_text_to_image_flax.py": "JAX",
}


def among(scripts):
    """Scripts as the last column of docs/options.md has them."""
    others = [short for short in SHORT.values() if short not in scripts]
    if not others:
        return "all"
    return f"all but {', '.join(others)}" if len(others) < 4 else ", ".join(s for s in SHORT.values() if s in scripts)


def row(name, text, choices, defaults):
    """A flag's line in docs/options.md; `defaults` is {script: default}."""
    text = re.sub(r"(?<!`)(--\w+)", r"`\1`", text)
    text += ": " + ", ".join(f"`{choice}`" for choice in choices) if choices else ""
    told = {}
    for script, default in defaults.items():
        told.setdefault("" if default is None or default is False else f"`{default}`", []).append(script)
    usual, *others = sorted(told, key=lambda default: -len(told[default]))
    shown = "; ".join([usual, *(f"{', '.join(told[other])}: {other}" for other in others)]).removeprefix("; ")
    return f"| `--{name}` | {text} | {shown} | {among(defaults)} |"


def test_options():
    """Each flag of each script stands in its group, with the help, the choices and the default that it has there."""
    rows = {}
    for script, short in SHORT.items():
        for group in table.groups_of(script.removesuffix(".py")):
            for flag in group.flags:
                fact = (flag.name, flag.help, flag.choices and tuple(flag.choices))
                rows.setdefault(group.title, {}).setdefault(fact, {})[short] = flag.default
    wanted = {title: [row(*fact, defaults) for fact, defaults in facts.items()] for title, facts in rows.items()}
    sections = re.split(r"^## ", (ROOT / "docs/options.md").read_text(), flags=re.M)[1:]
    have = {section.split("\n")[0]: re.findall(r"^\| `--.*$", section, re.M) for section in sections}
    assert set(have) == set(wanted)
    for title, lines in wanted.items():
        lacking, wrong = set(lines) - set(have[title]), set(have[title]) - set(lines)
        assert not lacking and not wrong, "\n".join([f"{title} should have", *lacking, "and not", *wrong])
        assert len(have[title]) == len(lines), title


def test_tests_that_are_named_exist():
    defined = {
        path.name: set(re.findall(r"^def (test_\w+)", path.read_text(), re.M)) for path in ROOT.glob("tests/*.py")
    }
    for page in PAGES:
        for name in re.findall(r"`(?:tests/)?(test_[\w*]+(?:\.py)?)`", prose(page)):
            known = (
                list((ROOT / "tests").glob(name)) if name.endswith(".py") else any(name in d for d in defined.values())
            )
            assert known, name


def sentences():
    """The strings in the source, each as its literal parts, with None for a value between them: a set of tuples."""
    found = set()
    for path in [*ROOT.glob("*.py"), *ROOT.glob("training_utils/**/*.py"), *ROOT.glob("tools/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            parts = (
                node.values if isinstance(node, ast.JoinedStr) else [node] if isinstance(node, ast.Constant) else []
            )
            found.add(tuple(part.value if isinstance(part, ast.Constant) else None for part in parts))
    said = [parts for parts in found if all(isinstance(part, str | None) for part in parts)]
    return [parts for parts in said if len("".join(filter(None, parts))) > 12]


def unsaid(quote, known):
    """A quote with blanks for what the `known` sentences have word for word."""
    rest = list(quote)
    for parts in known:
        if all(part in quote for part in parts if part):
            sentence = "".join("(.*?)" if part is None else re.escape(part) for part in parts)
            for found in re.finditer(sentence + ("$" if parts[-1] is None else ""), quote):
                free = {at for group in range(1, found.re.groups + 1) for at in range(*found.span(group))}
                for at in set(range(*found.span())) - free:
                    rest[at] = " "
    return "".join(rest)


def test_sentences_of_troubleshooting_are_in_the_source():
    """Word for word; capitals stand for what differs, and so does what is said in a string's values."""
    quotes = re.findall(r"^> (.*)$", (ROOT / "docs/troubleshooting.md").read_text(), re.M)
    assert len(quotes) > 30
    known = sentences()
    for quote in quotes:
        left = unsaid(quote, known)
        assert not re.search(r"[a-z]", left), f"{quote}\nis not said in the source: {left.strip()}"


def test_what_a_program_is_shown_to_print_is_in_the_source():
    """Of most lines a half, that is: there are paths, numbers and progress bars between."""
    known = sentences()
    for block in blocks("text"):
        lines = [line for line in block.text.splitlines() if line.strip()]
        if block.text not in LISTINGS:
            said = sum(len(unsaid(line, known).replace(" ", "")) < len(line.replace(" ", "")) / 2 for line in lines)
            assert said > len(lines) / 2, block
