"""What the pages have of JAX runs, with a tiny model and few steps in place of a real one and many."""

import importlib.metadata
import re

import pytest
from conftest import ROOT
from flax_runs import COMPILED, compiled_once
from packaging.requirements import Requirement
from pages import SMALLER, blocks, commands, different, on_tiny_models

import train_text_to_image_flax
from flax_diffusion import FlaxStableDiffusionPipeline

IN_JAX = [command for command in different(commands()) if command.script and "flax" in command.script]
COMMANDS = [command for command in IN_JAX if command.page == "docs/jax.md"]
INSTALL = [c.words for c in commands() if c.page == "docs/jax.md" and c.words[0] == "pip"]


@pytest.mark.parametrize("line", INSTALL)
def test_install(line):
    """The files and extras that are named exist, and no torch is among what they ask for."""
    assert line[:4] == ("pip", "install", "-r", "requirements_flax.txt")
    for wanted in map(Requirement, line[4:]):
        assert wanted.extras <= set(importlib.metadata.metadata(wanted.name).get_all("Provides-Extra"))
        assert importlib.metadata.version(wanted.name) in wanted.specifier
    assert "torch" not in re.sub(r"#.*", "", (ROOT / "requirements_flax.txt").read_text())


def test_there_are_commands():
    assert len(COMMANDS) == 3 and len(INSTALL) == 3


@pytest.fixture(scope="module")
def my_model(sd, images, tmp_path_factory):
    """What the page's first command leaves, in a folder that its snippets run in."""
    folder = tmp_path_factory.mktemp("docs")
    words = on_tiny_models(COMMANDS[0], sd, None, None, images, folder / "my_model")
    words[words.index("--compilation_cache_dir") + 1] = COMPILED
    with compiled_once():
        assert train_text_to_image_flax.main([*words, *SMALLER]) == 0
    return folder


def test_train(my_model):
    assert (my_model / "my_model" / "validation" / "step-000002.png").exists()


def test_caches(sd, images, tmp_path):
    words = on_tiny_models(COMMANDS[1], sd, None, None, images, tmp_path / "out")
    with compiled_once():
        assert train_text_to_image_flax.main([*words, *SMALLER]) == 0
    assert len(list((tmp_path / "out" / "encodings").iterdir())) == 2


def test_continue(my_model, sd, images):
    words = on_tiny_models(COMMANDS[2], sd, None, None, images, my_model / "my_model")
    with compiled_once():
        assert train_text_to_image_flax.main([*words, *SMALLER]) == 0


@pytest.mark.parametrize("command", [command for command in IN_JAX if command not in COMMANDS], ids=lambda c: c.page)
def test_the_commands_of_other_pages(command, sd, images, tmp_path):
    words = on_tiny_models(command, sd, None, None, images, tmp_path / "out")
    with compiled_once():
        assert train_text_to_image_flax.main([*words, *SMALLER]) == 0


@pytest.mark.parametrize("snippet", [block.text for block in blocks("python") if "flax_diffusion" in block.text])
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
