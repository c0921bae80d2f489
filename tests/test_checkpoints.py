"""A checkpoint is whole or absent, `latest` is the newest that checks out, and nothing is deleted that should stay."""

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, result_bytes

from training_utils.base.errors import UserError
from training_utils.data.plan import Position
from training_utils.run import checkpoints, output_folder, resume
from training_utils.run.provenance import Provenance
from training_utils.run.state import RunState
from training_utils.torch_backend.state import TrainingState

PROVENANCE = Provenance("s.py", world_size=1, settings={"optimizer": "adamw"}, samples=3, dataset_sha256="x")


def write_two_files(folder):
    (folder / "unet").mkdir()
    (folder / "unet" / "weights.safetensors").write_bytes(b"w" * 1000)
    (folder / "optimizer.bin").write_bytes(b"o" * 500)


def state(step):
    return RunState(seed=1, step=step, micro_step=2 * step, position=Position(1, 3))


def save(root, step, limit=None, write=write_two_files):
    return checkpoints.save_checkpoint(root, state(step), write, PROVENANCE, limit=limit)


def names(root):
    return sorted(path.name for path in root.iterdir())


def test_round_trip(tmp_path):
    folder = save(tmp_path, 5)
    assert checkpoints.damage_of(folder) is None
    assert resume.begin_run(tmp_path, "latest", None) == (folder, state(5))


def test_a_clock_that_goes_back_makes_no_old_one_of_the_newest(tmp_path, monkeypatch):
    save(tmp_path, 5, limit=1)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now - 600)
    for step in (6, 7):
        save(tmp_path, step, limit=1)
        assert (
            names(tmp_path) == [f"checkpoint-{step}"]
            and resume.find_checkpoint(tmp_path, "latest").name == names(tmp_path)[0]
        )


def test_a_folder_that_is_gone_costs_the_checkpoint_alone(tmp_path, capsys):
    (tmp_path / "out").symlink_to(tmp_path / "unmounted" / "out")
    assert save(tmp_path / "out", 5) is None
    assert "could not be written" in capsys.readouterr().err


def test_latest_passes_over_a_checkpoint_that_cannot_be_read(tmp_path, monkeypatch, capsys):
    older = save(tmp_path, 5)
    newer = save(tmp_path, 6)
    real = checkpoints.file_digests

    def refuse(paths):
        if paths[0].is_relative_to(newer):
            raise OSError(5, "Input/output error")
        return real(paths)

    monkeypatch.setattr(checkpoints, "file_digests", refuse)
    assert resume.find_checkpoint(tmp_path, "latest") == older
    assert "it cannot be read ([Errno 5] Input/output error)" in capsys.readouterr().err


def test_two_runs_do_not_write_into_one_folder(tmp_path):
    words = f"import sys; sys.path[:0] = [{str(ROOT)!r}]; from training_utils.run import output_folder\n"
    words += f"output_folder.claim({str(tmp_path)!r}); print('mine', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", words], stdin=-1, stdout=-1) as other:
        assert other.stdout.readline() == b"mine\n"
        with pytest.raises(UserError, match="another run is writing into --output_dir"):
            resume.begin_run(tmp_path, None, 1)
        other.kill()
    resume.begin_run(tmp_path, None, 1)  # at once, after a SIGKILL
    output_folder.release()


def test_oldest_go_once_the_new_one_stands(tmp_path):
    for step in (1, 2, 3, 10):
        save(tmp_path, step, limit=2)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-3"]


def test_an_old_one_that_cannot_be_removed_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    save(tmp_path, 1), save(tmp_path, 2)
    rename = os.rename

    def busy(source, target):
        if Path(source).name == "checkpoint-2":
            raise OSError(16, "Device or resource busy")
        rename(source, target)

    monkeypatch.setattr(os, "rename", busy)
    assert save(tmp_path, 3, limit=1).name == "checkpoint-3"
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-3"]
    assert "checkpoint-2 is beyond --checkpoints_total_limit, but could not be removed" in capsys.readouterr().err


def test_the_one_just_written_stays_and_is_the_latest(tmp_path):
    """A run that went back, or started over in the folder of one that got further, is the one that goes on."""
    for step in (2, 3, 4, 5):
        save(tmp_path, step)
    assert save(tmp_path, 3, limit=2).name == "checkpoint-3"
    assert names(tmp_path) == ["checkpoint-3", "checkpoint-5"]
    assert resume.find_checkpoint(tmp_path, "latest").name == "checkpoint-3"


def test_folders_that_only_look_alike_are_left_alone(tmp_path):
    for name in ("checkpoint_backup", "checkpoint-best", "checkpoint-", "checkpoints"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-7").write_text("a file")
    for step in (1, 2, 3):
        save(tmp_path, step, limit=1)
    expected = ["checkpoint-", "checkpoint-3", "checkpoint-7", "checkpoint-best", "checkpoint_backup", "checkpoints"]
    assert names(tmp_path) == expected


def test_a_failed_write_leaves_the_old_ones_and_the_run(tmp_path, capsys):
    save(tmp_path, 1, limit=1)

    def full_disk(folder):
        write_two_files(folder)
        raise OSError(28, "No space left on device")

    assert save(tmp_path, 2, limit=1, write=full_disk) is None
    assert names(tmp_path) == ["checkpoint-1"]
    assert "No space left on device" in capsys.readouterr().err
    assert save(tmp_path, 3, limit=1) is not None
    assert names(tmp_path) == ["checkpoint-3"]


KILLED = """
import os, sys
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
import test_checkpoints as t
root = Path({folder!r})
{refuse}
t.save(root, 1, limit=1)
calls = 0
def counted(name, real):
    def call(*args, **kw):
        global calls
        calls += 1
        if calls > {at}:
            os.kill(os.getpid(), 9)
        return real(*args, **kw)
    return call
for name in ("rename", "replace", "fsync", "open", "mkdir", "rmdir", "unlink"):
    setattr(os, name, counted(name, getattr(os, name)))
t.save(root, {step}, limit=1)
print("done", calls)
"""


def killed_before_each_operation(tmp_path, step, refuse=""):
    """Folders with a checkpoint after step 1, each with what a kill left of the save after `step`: before its first
    operation in the file system, before its second, ..., and after all of them. `refuse` is code that runs first."""
    at, finished = 0, False
    while not finished:
        folder = tmp_path / str(at)
        folder.mkdir()
        paths = {"root": str(ROOT), "tests": str(ROOT / "tests"), "folder": str(folder)}
        code = KILLED.format(**paths, at=at, step=step, refuse=refuse)
        # In a fork, since a fresh interpreter would import torch each time.
        child = os.fork()
        if child == 0:
            try:
                for standard in (1, 2):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), standard)
                exec(code, {})
                os._exit(0)
            except BaseException:
                os._exit(1)
        status = os.waitpid(child, 0)[1]
        finished = status == 0
        assert finished or os.waitstatus_to_exitcode(status) == -9
        yield at, folder
        at += 1


def test_killed_before_any_single_operation(tmp_path):
    """SIGKILL before each file-system operation of a save with rotation, one after the other."""
    for at, folder in killed_before_each_operation(tmp_path, 2):
        complete = [path for path in checkpoints.list_checkpoints(folder) if checkpoints.damage_of(path) is None]
        assert complete == checkpoints.list_checkpoints(folder), f"operation {at}: one that is not whole"
        assert complete, f"operation {at}: none left"
        latest = resume.find_checkpoint(folder, "latest")
        assert save(folder, 3, limit=1), f"operation {at}: the next save"
        assert latest is not None and names(folder) == ["checkpoint-3"], f"operation {at}: left-overs"
    assert at > 15


def test_a_checkpoint_that_was_moved_aside_and_not_replaced_comes_back(tmp_path, monkeypatch):
    """A save over a checkpoint of the same step renames twice; the kill, or the disk's failure, comes in between."""
    folder = save(tmp_path, 3)
    os.rename(folder, tmp_path / ".checkpoint-3.old")
    assert resume.begin_run(tmp_path, "latest", None)[0] == folder
    half = tmp_path / ".checkpoint-1.old"  # what a kill leaves half-way through rotation
    shutil.copytree(folder, half)
    (half / "manifest.json").unlink()
    assert resume.begin_run(tmp_path, "latest", None)[0] == folder and not half.exists()
    output_folder.release()
    real, calls = os.rename, []

    def failing(source, target):
        calls.append(source)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        real(source, target)

    monkeypatch.setattr(os, "rename", failing)
    assert save(tmp_path, 3) is None
    monkeypatch.undo()
    assert checkpoints.damage_of(folder) is None and names(tmp_path) == ["checkpoint-3"]


def flip(path):
    content = bytearray(path.read_bytes())
    content[90] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "flipped": flip,
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
}


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("file", ["unet/weights.safetensors", "optimizer.bin", "manifest.json"])
def test_a_damaged_one_is_named_skipped_and_kept(tmp_path, how, file, capsys):
    save(tmp_path, 1)
    damaged = save(tmp_path, 2)
    if (how, file) == ("missing", "manifest.json"):
        (damaged / "unet/weights.safetensors").unlink()  # without either it is nobody's checkpoint
    DAMAGE[how](damaged / file)
    assert resume.find_checkpoint(tmp_path, "latest").name == "checkpoint-1"
    assert "checkpoint-2 is damaged and is skipped" in capsys.readouterr().err
    assert damaged.is_dir()
    with pytest.raises(UserError, match="is damaged"):
        resume.find_checkpoint(tmp_path, "checkpoint-2")
    save(tmp_path, 3, limit=1)
    assert damaged.is_dir() or how == "flipped"  # rotation looks at sizes, not at contents


def test_every_way_to_name_one(tmp_path, monkeypatch, capsys):
    folder = save(tmp_path / "out", 5)
    monkeypatch.chdir(tmp_path)
    for wanted in ("latest", "checkpoint-5", "checkpoint-5/", "out/checkpoint-5", str(folder), f"{folder}/"):
        assert resume.find_checkpoint(Path("out"), wanted).resolve() == folder.resolve(), wanted
    assert resume.find_checkpoint(tmp_path / "elsewhere", str(folder)) == folder
    assert capsys.readouterr().err == ""
    assert resume.find_checkpoint(Path("out"), "elsewhere/checkpoint-5") == Path("out/checkpoint-5")
    assert "elsewhere/checkpoint-5 is not a checkpoint; using out/checkpoint-5" in capsys.readouterr().err


def test_one_that_is_not_there(tmp_path):
    save(tmp_path, 5)
    with pytest.raises(UserError, match=r"no such checkpoint; .* holds checkpoint-5"):
        resume.find_checkpoint(tmp_path, "checkpoint-6")


def test_a_new_run_over_an_old_one_says_so(run, tmp_path, capsys):
    run(tmp_path, "--checkpointing_steps", "3")
    run(tmp_path, "--checkpointing_steps", "3", "--seed", "8")
    assert "holds checkpoint-6 of an earlier run" in capsys.readouterr().err
    assert json.loads((tmp_path / "checkpoint-3" / "manifest.json").read_text())["state"]["seed"] == 8


def test_what_differs_is_named(run, tmp_path, capsys):
    run(tmp_path, "--checkpointing_steps", "3")
    run(tmp_path, "--resume_from_checkpoint", "checkpoint-3", "--snr_gamma", "5", "--train_batch_size", "2")
    said = capsys.readouterr().err
    assert "train_batch_size 4 -> 2" in said and "snr_gamma None -> 5.0" in said


def test_fewer_images_than_were_seen_in_the_epoch(run, tmp_path):
    """After two steps the run stood at image eight; with six it goes on with the next epoch."""
    run(tmp_path, "--checkpointing_steps", "2")
    assert run(tmp_path, "--resume_from_checkpoint", "checkpoint-2", "--max_train_samples", "6") == 0


def test_nothing_left_to_train_is_said(run, tmp_path, capsys):
    run(tmp_path, "--checkpointing_steps", "6")
    run(tmp_path, "--resume_from_checkpoint", "latest", "--max_train_steps", "4")
    assert "step 6 was the last one already: nothing was trained" in capsys.readouterr().err


def test_an_unfused_optimizer_state_continues_fused(run, tmp_path):
    """As the original script, or an fp16 run, leaves it: `step` belongs where the kernel of this run wants it."""
    run(tmp_path, "--checkpointing_steps", "3")
    folder = tmp_path / "checkpoint-3"
    state = torch.load(folder / "optimizer.bin", weights_only=True)
    state["param_groups"][0]["fused"] = None
    torch.save(state, folder / "optimizer.bin")
    (folder / "manifest.json").unlink()
    assert run(tmp_path, "--resume_from_checkpoint", "checkpoint-3") == 0


def test_an_output_folder_that_cannot_be_written(run):
    sentence, code = run.fails("/proc/no/such/place")
    assert "--output_dir /proc/no/such/place cannot be written to" in sentence and code == 2


def test_another_optimizer_cannot_continue(run, tmp_path):
    run(tmp_path, "--checkpointing_steps", "3")
    sentence, code = run.fails(tmp_path, "--resume_from_checkpoint", "latest", "--optimizer", "adafactor")
    assert "holds the state of --optimizer adamw" in sentence and code == 2


def test_changed_data_are_named(run, tmp_path, capsys):
    run(tmp_path, "--checkpointing_steps", "3")
    run(tmp_path, "--resume_from_checkpoint", "checkpoint-3", "--max_train_samples", "8")
    assert "the dataset has changed" in capsys.readouterr().err


def test_layout_is_the_familiar_one(run, tmp_path):
    run(tmp_path, "--checkpointing_steps", "6", "--use_ema")
    folder = tmp_path / "checkpoint-6"
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    assert files == [
        "manifest.json",
        "optimizer.bin",
        "scheduler.bin",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "unet_ema/config.json",
        "unet_ema/diffusion_pytorch_model.safetensors",
    ]
    for name in ("optimizer.bin", "scheduler.bin"):
        torch.load(folder / name, weights_only=True)  # loads without running any code


def foreign(run, tmp_path):
    """A checkpoint as the original script leaves it: accelerate's save_state and diffusers' folders, no manifest."""
    run(tmp_path, "--checkpointing_steps", "3", "--use_ema", "--max_train_steps", "3")
    folder = tmp_path / "checkpoint-3"
    (folder / "manifest.json").unlink()
    torch.save({"step": 2}, folder / "random_states_0.pkl")
    return folder


def test_a_checkpoint_of_the_original_script_continues(run, tmp_path, capsys):
    foreign(run, tmp_path)
    flags = ["--use_ema", "--gradient_accumulation_steps", "3", "--resume_from_checkpoint", "latest"]
    assert run(tmp_path, *flags, "--checkpointing_steps", "1") == 0
    said = capsys.readouterr().err
    assert "was not made by this suite" in said and "position of its run in the data is unknown" in said
    assert (tmp_path / "checkpoint-6" / "manifest.json").exists()


@pytest.mark.parametrize("name", ["unet/diffusion_pytorch_model.safetensors", "optimizer.bin"])
def test_a_half_written_checkpoint_of_the_original_script_is_skipped(run, tmp_path, name):
    folder = foreign(run, tmp_path)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    assert resume.find_checkpoint(tmp_path, "latest") is None


class Bomb:
    """Makes a file where it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


def test_a_checkpoint_cannot_run_code(run, tmp_path):
    folder, mark = foreign(run, tmp_path), tmp_path / "code-ran"
    for name in ("optimizer.bin", "scheduler.bin", "random_states_0.pkl"):
        torch.save(Bomb(mark), folder / name)
    sentence, _ = run.fails(tmp_path, "--resume_from_checkpoint", "latest")
    assert "cannot be read" in sentence and not mark.exists()
    torch.load(folder / "optimizer.bin", weights_only=False)
    assert mark.exists(), "the file would have run code"


def test_left_overs_of_a_killed_run_go(run, tmp_path):
    for name in (".checkpoint-3.partial", ".checkpoint-1.old"):
        (tmp_path / name / "unet").mkdir(parents=True)
    (tmp_path / ".checkpoint-notes").mkdir()
    run(tmp_path, "--checkpointing_steps", "6")
    assert [name for name in names(tmp_path) if name.startswith(".")] == [".checkpoint-notes"]


def test_a_full_disk_does_not_end_the_run(run, tmp_path, monkeypatch, capfd):
    """A real full disk: files may not grow beyond 200 kB while a checkpoint is written."""

    write, (soft, hard) = TrainingState.write, resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(self, folder):
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
        try:
            write(self, folder)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    with monkeypatch.context() as patch:
        patch.setattr(TrainingState, "write", limited)
        assert run(tmp_path / "full", "--checkpointing_steps", "3") == 0
    said = capfd.readouterr().err
    assert said.count("could not be written") == 2 and "there is no earlier checkpoint" in said
    assert checkpoints.list_checkpoints(tmp_path / "full") == []
    run(tmp_path / "complete")
    assert result_bytes(tmp_path / "full") == result_bytes(tmp_path / "complete")
