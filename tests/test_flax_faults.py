"""The promises of test_faults.py, test_security.py, test_fuzz.py and test_bad_samples.py for the JAX script."""

import errno
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest
from conftest import result_bytes, result_weights
from flax_runs import FlaxRunner, compiled_once
from safetensors.numpy import load_file
from test_bad_samples import spoiled, test_every_script_checks_data_without_a_model  # noqa: F401
from test_disks import private, refuse_to_flush, refuse_to_rename, umask  # noqa: F401
from test_faults import (  # noqa: F401
    small_disk,
    test_a_folder_that_is_removed_meanwhile,
    test_a_full_disk_costs_one_checkpoint,
    test_a_result_that_does_not_fit_is_in_the_last_checkpoint,
    test_killed_six_times_and_equal_to_the_bit,
)
from test_fuzz import test_command_lines  # noqa: F401
from test_security import test_nothing_that_is_written_holds_the_token  # noqa: F401

from training_utils.jax_backend import loader
from training_utils.jax_backend.trackers import TensorBoard
from training_utils.run import checkpoints


@pytest.fixture(scope="module", autouse=True)
def compiled():
    with compiled_once():
        yield


@pytest.fixture(scope="module")
def each(sd, images):
    """The one script that the promises are tested for here."""
    return FlaxRunner("train_text_to_image_flax", sd, images)


def test_what_is_written_follows_the_umask_on_a_disk_without_renames(each, sd, tmp_path, monkeypatch, umask):  # noqa: F811
    """The frozen parts are copies of files that only their owner may read."""
    base = Path(shutil.copytree(sd, tmp_path / "base"))
    for path in base.rglob("*"):
        path.chmod(0o700 if path.is_dir() else 0o600)
    refuse_to_rename(monkeypatch, errno.ENOSYS)
    refuse_to_flush(monkeypatch, errno.EINVAL)
    flags = ["--max_train_steps", "2", "--checkpointing_steps", "1", "--checkpoints_total_limit", "1", "--use_ema"]
    each(tmp_path / "out", *flags, "--pretrained_model_name_or_path", base)
    assert private(tmp_path / "out", umask) == []
    folders = [path for path in (tmp_path / "out").rglob("*") if path.is_dir()]
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o777 & ~umask for path in folders)
    (folder,) = checkpoints.list_checkpoints(tmp_path / "out")
    assert folder.name == "checkpoint-2" and checkpoints.damage_of(folder) is None


def poison(monkeypatch, *steps):
    """Let the noise of these steps, counted from 1, be no number."""
    real = loader.training_batches

    def poisoned(*args):
        for number, batch in enumerate(real(*args), start=1):
            yield batch | {"noise": batch["noise"] * np.nan} if number in steps else batch

    monkeypatch.setattr(loader, "training_batches", poisoned)


def test_a_loss_that_is_not_finite_stops_the_run_in_its_last_good_state(each, tmp_path, monkeypatch):
    """It is noticed two steps later, when the losses are fetched; the average has stayed behind as well."""
    flags = ["--checkpointing_steps", "100", "--logging_steps", "6", "--use_ema"]
    each(tmp_path / "complete", "--checkpointing_steps", "3", "--use_ema")
    with monkeypatch.context() as patch:
        poison(patch, 4)
        sentence, code = each.fails(tmp_path / "out", *flags)
    assert code == 1 and "step 4 is not finite" in sentence and sentence.count(".png") == 4
    assert [folder.name for folder in checkpoints.list_checkpoints(tmp_path / "out")] == ["checkpoint-3"]
    for part in ("unet", "unet_ema"):
        name = f"checkpoint-3/{part}/diffusion_pytorch_model.safetensors"
        kept, expected = load_file(tmp_path / "out" / name), load_file(tmp_path / "complete" / name)
        assert all(np.array_equal(kept[key], expected[key]) for key in expected)
    each(tmp_path / "out", *flags, "--resume_from_checkpoint", "latest")
    assert result_bytes(tmp_path / "out") == result_bytes(tmp_path / "complete")


def test_a_step_that_is_not_finite_is_skipped_on_request(each, tmp_path, monkeypatch, capsys):
    poison(monkeypatch, 4)
    each(tmp_path, "--on_nan", "skip", "--checkpointing_steps", "1")
    assert "step 4 is not finite" in capsys.readouterr().err
    assert all(weight.isfinite().all() for weight in result_weights(tmp_path).values())
    name = "unet/diffusion_pytorch_model.safetensors"
    before, after, later = (load_file(tmp_path / f"checkpoint-{step}/{name}") for step in (3, 4, 5))
    assert all(np.array_equal(before[key], after[key]) for key in before)
    assert any(not np.array_equal(after[key], later[key]) for key in before)


def test_a_image_that_shows_its_damage_only_when_decoded_is_stood_in_for(each, images, tmp_path, capsys):
    import shutil

    folder = tmp_path / "images"
    shutil.copytree(images, folder)
    content = (folder / "2.png").read_bytes()
    (folder / "2.png").write_bytes(content[: len(content) // 2])
    each(tmp_path / "one", "--train_data_dir", folder, "--on_bad_sample", "skip")
    said = capsys.readouterr().err
    assert said.count("2.png cannot be read") == 1 and "1 images could not be used in training" in said
    each(tmp_path / "two", "--train_data_dir", folder, "--on_bad_sample", "skip", "--dataloader_num_workers", "2")
    assert result_bytes(tmp_path / "one") == result_bytes(tmp_path / "two")


def test_a_tracker_that_fails_is_left_behind(each, tmp_path, monkeypatch, capsys):
    def refuse(*_, **__):
        raise OSError("503 Service Unavailable")

    monkeypatch.setattr(TensorBoard, "log", refuse)
    each(tmp_path / "log", "--report_to", "tensorboard")
    assert capsys.readouterr().err.count("tensorboard failed (503 Service Unavailable)") == 1
    monkeypatch.setattr(TensorBoard, "__init__", refuse)
    sentence, code = each.fails(tmp_path / "never", "--report_to", "tensorboard")
    assert "tensorboard: 503" in sentence and "--report_to none" in sentence and code == 2
