"""Errors tell the truth: a bug is shown as one, and TRAINING_TRACEBACK=1 shows what led to a sentence."""

import sys

import pytest

from training_utils.base.errors import UserError
from training_utils.run import exit, output_folder, trackers
from training_utils.run.checkpoints import save_checkpoint
from training_utils.run.hub import upload
from training_utils.run.metrics import Metrics
from training_utils.run.provenance import Provenance
from training_utils.run.state import RunState

PROVENANCE = Provenance("s.py", world_size=1, settings={}, samples=3, dataset_sha256="x")


def bug(*_, **__):
    raise AttributeError("a bug of ours")


def wrong_file(_):
    try:
        int("no number")
    except ValueError as error:
        raise UserError("the file is wrong") from error


@pytest.fixture
def said_by(monkeypatch, capsys):
    """A function from a main to (its exit code, what it said)."""
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setattr(sys, "stderr", sys.stderr)

    def call(main):
        with pytest.raises(SystemExit) as left:
            exit.run_main(main)
        return left.value.code, capsys.readouterr().err

    return call


def test_a_user_error_is_one_sentence(said_by, monkeypatch):
    monkeypatch.delenv("TRAINING_TRACEBACK", raising=False)
    assert said_by(wrong_file) == (2, "train.py: error: the file is wrong\n")


def test_its_chain_is_shown_where_it_is_asked_for(said_by, monkeypatch):
    monkeypatch.setenv("TRAINING_TRACEBACK", "1")
    code, said = said_by(wrong_file)
    assert code == 2 and said.endswith("\ntrain.py: error: the file is wrong\n")
    assert "ValueError: invalid literal for int()" in said and "The above exception was the direct cause" in said
    assert 'int("no number")' in said


def test_a_bug_is_shown_as_one(said_by, monkeypatch):
    monkeypatch.delenv("TRAINING_TRACEBACK", raising=False)
    code, said = said_by(bug)
    assert code == 1 and said.startswith("Traceback") and said.endswith("AttributeError: a bug of ours\n")


def test_a_bug_is_not_a_disk_that_is_full(tmp_path):
    with pytest.raises(AttributeError, match="a bug of ours"):
        save_checkpoint(tmp_path, RunState(seed=1), bug, PROVENANCE)


def test_the_weights_are_rescued_from_a_bug_which_is_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with (
        pytest.raises(AttributeError, match="a bug of ours"),
        output_folder.rescue_weights(
            tmp_path, RunState(seed=1), PROVENANCE, lambda folder: (folder / "weights").write_text("rescued")
        ),
    ):
        bug()
    assert "only its weights are in" in capsys.readouterr().err
    (weights,) = tmp_path.glob("weights-*/weights")
    assert weights.read_text() == "rescued"


def test_a_full_disk_is_a_sentence_with_its_cause(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with (
        pytest.raises(UserError, match="only its weights are in") as caught,
        output_folder.rescue_weights(tmp_path, RunState(seed=1), PROVENANCE, lambda folder: None),
    ):
        raise OSError(28, "No space left on device")
    assert isinstance(caught.value.__cause__, OSError) and caught.value.exit_code == 1


def test_a_tracker_that_fails_is_left_out_and_a_bug_in_ours_is_not(tmp_path, monkeypatch, capsys):
    class Foreign:
        name, log = "foreign", bug

    listening = [Foreign(), Metrics(tmp_path, 0, {})]
    trackers.log_values(listening, {"loss": 1.0}, step=1)
    assert len(listening) == 1 and "foreign failed (a bug of ours)" in capsys.readouterr().err
    monkeypatch.setattr(Metrics, "log", bug)
    with pytest.raises(AttributeError):
        trackers.log_values(listening, {"loss": 1.0}, step=2)


def test_a_bug_in_an_upload_is_not_a_failure_of_the_hub(tmp_path, monkeypatch):
    (tmp_path / "checkpoint-1").mkdir()
    uploads = upload.Uploads("me/model", None, tmp_path)
    monkeypatch.setattr(uploads, "_folder_to_upload", bug)
    uploads.add(tmp_path / "checkpoint-1")
    with pytest.raises(AttributeError):
        uploads.finish()
    assert uploads.finish() is None  # it is said once
