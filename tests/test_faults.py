"""What goes wrong in the middle of a run costs at most the updates since the last checkpoint, and is said."""

import importlib
import re
import shutil

import pytest
import torch
from conftest import result_bytes, result_weights
from safetensors.torch import load_file

from training_utils import checkpoints

# --- a loss that is not finite ---------------------------------------------------------------------------------------


def poison(monkeypatch, run, *micro_steps, value=float("nan")):
    """Let the loss of these forward passes, counted from 1, be `value`."""
    script = importlib.import_module(run.script)
    real, count = script.training_loss, [0]

    def poisoned(*args, **options):
        count[0] += 1
        loss = real(*args, **options)
        return loss * value if count[0] in micro_steps else loss

    monkeypatch.setattr(script, "training_loss", poisoned)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run_in_its_last_good_state(each, tmp_path, monkeypatch, value):
    """Update 4 takes the first four pictures of the second epoch; the losses are fetched after update 6."""
    run, flags = each, ["--checkpointing_steps", "100", "--logging_steps", "6"]
    run(tmp_path / "whole", "--checkpointing_steps", "3")
    with monkeypatch.context() as patch:
        poison(patch, run, 4, value=value)
        sentence, code = run.fails(tmp_path / "out", *flags)
    assert code == 1 and "update 4 is not finite" in sentence
    assert len(re.findall(r"\d\.png", sentence)) == 4 and "checkpoint-3" in sentence
    assert [folder.name for folder in checkpoints.listed(tmp_path / "out")] == ["checkpoint-3"]
    run(tmp_path / "out", *flags, "--resume_from_checkpoint", "latest")
    assert result_bytes(tmp_path / "out") == result_bytes(tmp_path / "whole")


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_an_update_that_is_not_finite_is_skipped_on_request(run, tmp_path, monkeypatch, capsys, optimizer):
    flags = ["--on_nan", "skip", "--checkpointing_steps", "1", "--optimizer", optimizer]
    flags += ["--gradient_accumulation_steps", "2", "--train_batch_size", "2"]
    poison(monkeypatch, run, 7)  # the first half of update 4
    run(tmp_path, *flags)
    assert "update 4 is not finite" in capsys.readouterr().err
    assert all(weight.isfinite().all() for weight in result_weights(tmp_path).values())
    name = "unet/diffusion_pytorch_model.safetensors"
    before, after, next_one = (load_file(tmp_path / f"checkpoint-{step}/{name}") for step in (3, 4, 5))
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert any(not torch.equal(after[key], next_one[key]) for key in before)
    cut = tmp_path / "cut"
    shutil.copytree(tmp_path / "checkpoint-5", cut / "checkpoint-5")
    monkeypatch.undo()
    run(cut, *flags, "--resume_from_checkpoint", "latest")
    assert result_bytes(cut) == result_bytes(tmp_path)


def test_no_checkpoint_is_written_of_a_state_that_is_not_finite(run, tmp_path, monkeypatch):
    """Also where a checkpoint is due before the losses would be fetched, and with a limit of one."""
    poison(monkeypatch, run, 4)
    flags = ["--checkpointing_steps", "2", "--checkpoints_total_limit", "1", "--logging_steps", "100"]
    sentence, code = run.fails(tmp_path, *flags)
    assert code == 1 and "checkpoint-3" in sentence
    (kept,) = checkpoints.listed(tmp_path)
    assert kept.name == "checkpoint-3" and checkpoints.damage(kept) is None
    weights = load_file(kept / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(weight.isfinite().all() for weight in weights.values())
