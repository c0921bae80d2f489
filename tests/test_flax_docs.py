"""Every line of docs/jax.md runs, with a tiny model and few updates in place of a real one and many."""

import importlib.metadata
import re

import pytest
from conftest import ROOT
from flax_runs import COMPILED, compiled_once
from packaging.requirements import Requirement
from test_readme import README, SMALLER, bash_commands, on_tiny_models, python_snippets

import train_text_to_image_flax
from flax_diffusion import FlaxStableDiffusionPipeline

PAGE = (ROOT / "docs" / "jax.md").read_text()
COMMANDS = bash_commands(PAGE, "python ")


@pytest.mark.parametrize("line", bash_commands(PAGE, "pip install"))
def test_install(line):
    """The files and extras that are named exist, and no torch is among what they ask for."""
    assert line[:4] == ["pip", "install", "-r", "requirements_flax.txt"]
    for wanted in map(Requirement, line[4:]):
        assert wanted.extras <= set(importlib.metadata.metadata(wanted.name).get_all("Provides-Extra"))
        assert importlib.metadata.version(wanted.name) in wanted.specifier
    assert "torch" not in re.sub(r"#.*", "", (ROOT / "requirements_flax.txt").read_text())


def test_there_are_commands():
    assert len(COMMANDS) == 3 and len(bash_commands(PAGE, "pip install")) == 3


@pytest.fixture(scope="module")
def my_model(sd, pictures, tmp_path_factory):
    """What the page's first command leaves, in a folder that its snippets run in."""
    folder = tmp_path_factory.mktemp("docs")
    words = on_tiny_models(COMMANDS[0], sd, None, None, pictures, folder / "my_model")
    words[words.index("--compilation_cache_dir") + 1] = COMPILED
    with compiled_once():
        assert train_text_to_image_flax.main([*words, *SMALLER]) == 0
    return folder


def test_train(my_model):
    assert (my_model / "my_model" / "validation" / "step-000002.png").exists()


def test_caches(sd, pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = on_tiny_models(COMMANDS[1], sd, None, None, pictures, tmp_path / "out")
    with compiled_once():
        assert train_text_to_image_flax.main([*words, *SMALLER]) == 0
    assert len(list((tmp_path / "encodings").iterdir())) == 2


def test_continue(my_model, sd, pictures):
    words = on_tiny_models(COMMANDS[2], sd, None, None, pictures, my_model / "my_model")
    with compiled_once():
        assert train_text_to_image_flax.main([*words, *SMALLER]) == 0


def test_the_command_of_the_readme(sd, pictures, tmp_path):
    (command,) = bash_commands(README, "python train_text_to_image_flax.py")
    words = on_tiny_models(command, sd, None, None, pictures, tmp_path / "out")
    with compiled_once():
        assert train_text_to_image_flax.main([*words, *SMALLER]) == 0


@pytest.mark.parametrize("snippet", python_snippets(PAGE))
def test_draw(snippet, my_model, monkeypatch):
    monkeypatch.chdir(my_model)
    real = FlaxStableDiffusionPipeline.__call__
    monkeypatch.setattr(
        FlaxStableDiffusionPipeline,
        "__call__",
        lambda self, *inputs, num_inference_steps, **options: real(self, *inputs, num_inference_steps=2, **options),
    )
    exec(snippet, {})
    name = "bicycle-0.png" if "replicate" in snippet else "bicycle.png"
    assert (my_model / name).stat().st_size > 100


def test_flags_that_the_page_names_exist(capsys):
    with pytest.raises(SystemExit):
        train_text_to_image_flax.parse_args(["--help"])
    known = capsys.readouterr().out
    assert all(flag in known for flag in re.findall(r"--[a-z_]+", PAGE))
    assert "quickstart-flax:" in (ROOT / "Makefile").read_text()
