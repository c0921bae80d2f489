"""The base model is looked through before training in JAX as in torch, with the same sentences."""

import re
import shutil
from pathlib import Path

import pytest
from broken_models import BROKEN, INCOMPLETE, add_safety_checker, pickle_safety_checker
from flax_runs import FlaxRunner

from training_utils.jax_backend import models


@pytest.fixture
def run_flax(sd, images):
    return FlaxRunner("train_text_to_image_flax", sd, images)


@pytest.mark.parametrize("what", BROKEN)
def test_a_part_that_is_not_what_it_must_be(run_flax, sd, tmp_path, what):
    change, words = BROKEN[what]
    base = Path(shutil.copytree(sd, tmp_path / "base"))
    change(base)
    sentence, code = run_flax.fails(tmp_path / "out", "--pretrained_model_name_or_path", base)
    assert re.search(words, sentence) and code == 2


@pytest.mark.parametrize("what", INCOMPLETE)
def test_a_network_that_is_not_complete(run_flax, sd, tmp_path, what):
    change, words = INCOMPLETE[what]
    base = Path(shutil.copytree(sd, tmp_path / "base"))
    change(base)
    sentence, code = run_flax.fails(tmp_path / "out", "--pretrained_model_name_or_path", base)
    part = re.search(r"'(\w+)'", words)
    assert "part '" in sentence and "cannot be loaded" in sentence and code == 2
    assert part is None or f"part {part[0]}" in sentence


def test_a_safety_checker_in_a_pickle_is_not_passed_on(run_flax, sd, tmp_path):
    """One that is not there, as from the hub, is left out of the result."""
    base = Path(shutil.copytree(sd, tmp_path / "base"))
    add_safety_checker(base)
    pickle_safety_checker(base)
    sentence, code = run_flax.fails(tmp_path / "out", "--pretrained_model_name_or_path", base)
    assert "part 'safety_checker'" in sentence and "as a pickle only" in sentence and code == 2
    shutil.rmtree(base / "safety_checker")
    models.model_folder(str(base))
