"""Disks that cannot do all that a run does there: what is worked around, what is said, and who may read the files."""

import errno
import os
import stat
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from test_checkpoints import killed_before_each_operation, names, save, write_two_files

from training_utils.base import files
from training_utils.base.errors import UserError
from training_utils.cache import shard
from training_utils.run import checkpoints, output_folder, resume


@pytest.fixture(autouse=True)
def nothing_said_yet(monkeypatch):
    """What a disk cannot do is said once in a process, and in each test here."""
    monkeypatch.setattr(files, "_said", set())


def refuse_to_flush(monkeypatch, number, kind=stat.S_ISDIR):
    real = os.fsync

    def fsync(descriptor):
        if kind(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        return real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


def refuse_to_rename(monkeypatch, number):
    real = os.rename

    def rename(source, target):
        if os.path.isdir(source):
            raise OSError(number, os.strerror(number), str(source), None, str(target))
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)


# --- flushing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [stat.S_ISDIR, stat.S_ISREG])
@pytest.mark.parametrize("number", sorted(files.CANNOT_FLUSH))
def test_a_disk_that_cannot_flush(tmp_path, monkeypatch, capsys, number, kind):
    refuse_to_flush(monkeypatch, number, kind)
    for step in (1, 2):
        assert checkpoints.damage_of(save(tmp_path, step)) is None
    said = capsys.readouterr().err
    what = "folders" if kind is stat.S_ISDIR else "files"
    assert said.count(f"is on a disk that cannot flush {what} ({os.strerror(number)})") == 1, said


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.ESTALE, errno.EDQUOT])
def test_a_flush_that_fails_is_a_checkpoint_that_fails(tmp_path, monkeypatch, capsys, number):
    refuse_to_flush(monkeypatch, number)
    assert save(tmp_path, 1) is None and names(tmp_path) == []
    assert os.strerror(number) in capsys.readouterr().err


# --- renaming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", sorted(files.CANNOT_RENAME))
def test_a_disk_that_cannot_rename_folders(tmp_path, monkeypatch, capsys, number):
    """Checkpoints are written, replaced and rotated."""
    refuse_to_rename(monkeypatch, number)
    for step in (1, 2, 3):
        save(tmp_path, step, limit=2)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-3"]

    def write_more(folder):
        write_two_files(folder)
        (folder / "unet_ema").mkdir()
        (folder / "unet_ema" / "weights.safetensors").write_bytes(b"e" * 10)

    for write in (write_more, write_two_files):
        folder = save(tmp_path, 3, limit=2, write=write)
        assert (folder / "unet_ema").exists() == (write is write_more)
        assert checkpoints.damage_of(folder) is None and names(tmp_path) == ["checkpoint-2", "checkpoint-3"]
    assert resume.begin_run(tmp_path, "latest", None)[0] == folder
    output_folder.release()
    said = capsys.readouterr().err
    assert said.count(f"is on a disk that cannot rename folders ({os.strerror(number)})") == 1, said
    assert "could not" not in said


def test_a_checkpoint_of_a_lower_layer_is_replaced(tmp_path, monkeypatch):
    """An overlay renames what was made in it, and no folder of the image below."""
    folder, real = save(tmp_path, 3), os.rename

    def rename(source, target):
        if Path(source) == folder:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        real(source, target)

    before = checkpoints.read_manifest(folder)
    monkeypatch.setattr(os, "rename", rename)
    assert save(tmp_path, 3) == folder and names(tmp_path) == ["checkpoint-3"]
    assert checkpoints.damage_of(folder) is None and checkpoints.read_manifest(folder) != before


NO_RENAME = """
real_rename = os.rename
def refuse(a, b, **k):
    if os.path.isdir(a):
        raise OSError(38, "Function not implemented")
    return real_rename(a, b, **k)
os.rename = refuse
"""


@pytest.mark.parametrize("step", [1, 2], ids=["it is replaced", "another one is written, and the first removed"])
def test_killed_before_any_single_operation_where_folders_cannot_be_renamed(tmp_path, monkeypatch, step):
    """Before each of them a checkpoint is there to continue from, and none that is not complete counts as one."""
    refuse_to_rename(monkeypatch, errno.ENOSYS)
    for at, folder in killed_before_each_operation(tmp_path, step, NO_RENAME):
        for path in checkpoints.list_checkpoints(folder):
            is_complete = checkpoints.damage_of(path) is None
            assert not is_complete or checkpoints.read_manifest(path), f"operation {at}: taken for another program's"
        checkpoints.remove_unfinished(folder)
        found = checkpoints.list_checkpoints(folder)
        assert found and all(checkpoints.damage_of(path) is None for path in found), f"operation {at}"
        assert not [name for name in names(folder) if name.startswith(".")], f"operation {at}: left-overs"
        assert save(folder, 3, limit=1) and names(folder) == ["checkpoint-3"], f"operation {at}: the next save"
    assert at > 15


@pytest.mark.parametrize("can_rename", [False, True], ids=["no renames", "renames from then on"])
def test_a_move_that_a_failure_cuts_off_is_completed(tmp_path, monkeypatch, capsys, can_rename):
    """The disk fails for a moment while the files of a checkpoint are moved; another run may mount it otherwise."""
    save(tmp_path, 3)
    real, calls = os.replace, []

    def failing(source, target):
        calls.append(source)
        if len(calls) == 4:  # after those of both manifests and of one file
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(source, target)

    with monkeypatch.context() as patch:
        refuse_to_rename(patch, errno.ENOSYS)
        patch.setattr(os, "replace", failing)
        assert save(tmp_path, 3) is None
    assert (
        "what is left of it is moved before the next one is written; see that the disk works"
        in capsys.readouterr().err
    )
    if not can_rename:
        refuse_to_rename(monkeypatch, errno.ENOSYS)
    assert resume.begin_run(tmp_path, "latest", None)[0] == tmp_path / "checkpoint-3"
    output_folder.release()
    assert names(tmp_path) == ["checkpoint-3"]


def test_a_checkpoint_that_was_written_and_not_renamed_is_not_lost(tmp_path):
    folder = save(tmp_path, 3)
    os.rename(folder, tmp_path / ".checkpoint-3.partial")
    assert resume.begin_run(tmp_path, "latest", None)[0] == folder
    output_folder.release()
    os.rename(folder, tmp_path / ".checkpoint-3.partial")
    (tmp_path / ".checkpoint-3.partial" / "optimizer.bin").unlink()  # half removed
    assert resume.begin_run(tmp_path, "latest", 1)[0] is None and names(tmp_path) == [".run.lock"]
    output_folder.release()


# --- the start -------------------------------------------------------------------------------------------------------


def test_the_start_says_what_a_disk_cannot_do(tmp_path, monkeypatch, capsys):
    import fcntl

    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    refuse_to_flush(monkeypatch, errno.EINVAL)
    refuse_to_rename(monkeypatch, errno.ENOSYS)
    monkeypatch.setattr(fcntl, "flock", no_locks)
    resume.begin_run(tmp_path, None, 1)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3 and all(f"warning: {tmp_path}" in line for line in said), said
    for what in ("flush folders (Invalid argument)", "rename folders (Function", "lock files (No locks available)"):
        assert sum(f"is on a disk that cannot {what}" in line for line in said) == 1, said
    assert names(tmp_path) == []
    resume.begin_run(tmp_path, None, 1)
    assert capsys.readouterr().err == ""
    output_folder.release()


def test_an_ordinary_disk_is_not_spoken_of(tmp_path, capsys):
    (tmp_path / ".trial-old").mkdir()  # which a kill left
    resume.begin_run(tmp_path, None, 1)
    assert capsys.readouterr().err == "" and names(tmp_path) == [".run.lock"]
    output_folder.release()


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "make room"),
        (errno.EDQUOT, "make room within your quota"),
        (errno.EROFS, "have that disk mounted for writing"),
        (errno.ENOTSUP, "fix that"),
    ],
)
@pytest.mark.parametrize("operation", ["replace", "mkdir"])
def test_the_start_refuses_a_disk_that_takes_no_files(tmp_path, monkeypatch, number, advice, operation):
    """Files that cannot be renamed cannot be written by safetensors."""

    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, operation, refuse)
    with pytest.raises(UserError, match=f"cannot be written to: {os.strerror(number)}; {advice}, or give another"):
        resume.begin_run(tmp_path, None, 1)
    output_folder.release()


# --- advice ----------------------------------------------------------------------------------------------------------

ADVICE = [
    (OSError(errno.ENOSPC, "x"), "make room"),
    (OSError(errno.EDQUOT, "x"), "quota"),
    (PermissionError(errno.EACCES, "x"), "permission"),
    (PermissionError(errno.EPERM, "x"), "permission"),
    (OSError(errno.EROFS, "x"), "mounted for writing"),
    (OSError(errno.ENAMETOOLONG, "x"), "shorter path"),
    (OSError(errno.EIO, "x"), "still connected"),
    (OSError(errno.ESTALE, "x"), "still connected"),
    (OSError(errno.ENOTCONN, "x"), "still connected"),
    (OSError(errno.EFBIG, "x"), "ulimit -f"),
    (OSError(errno.EMFILE, "x"), "ulimit -n"),
    (FileNotFoundError(errno.ENOENT, "x"), "still there"),
    (MemoryError(), "memory"),
    (RuntimeError("I/O error: No space left on device (os error 28)"), "make room"),
    (RuntimeError("I/O error: Permission denied (os error 13)"), "permission"),
    (RuntimeError("[Errno 5] Input/output error"), "still connected"),
    (RuntimeError("something else"), "fix that"),
    (UserError("base model x cannot be loaded"), "fix that"),
    (OSError("without a number"), "fix that"),
]


@pytest.mark.parametrize(("error", "advice"), ADVICE, ids=lambda value: repr(value)[:40])
def test_advice_goes_by_the_error(tmp_path, monkeypatch, error, advice):
    monkeypatch.setattr(files, "LITTLE_SPACE", 0)
    assert advice in files.advice_for(error, tmp_path)


def test_what_torch_gives_no_reason_for_is_put_down_to_a_full_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LITTLE_SPACE", 2**70)
    assert files.advice_for(RuntimeError("PytorchStreamWriter failed writing file"), tmp_path) == "make room"


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ENAMETOOLONG])
def test_the_rescue_gives_advice_for_its_error(run, tmp_path, monkeypatch, number):
    import train_text_to_image

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(train_text_to_image, "save_result", refuse)
    sentence, code = run.fails(tmp_path, "--checkpointing_steps", "1", "--max_train_steps", "1")
    assert code == 1 and "make room" not in sentence
    assert f"checkpoint-1: {files.ADVICE[number]}, and run the same command once more" in sentence


# --- who may read what is written ------------------------------------------------------------------------------------


@pytest.fixture(params=[0o022, 0o002, 0o077, 0o027], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def private(root, umask):
    """The files under a folder that have other permissions than the umask gives a new one."""
    paths = [path for path in Path(root).rglob("*") if path.is_file() and path.name != output_folder.LOCK_FILE]
    assert paths
    return [str(path) for path in paths if stat.S_IMODE(path.stat().st_mode) != 0o666 & ~umask]


def test_checkpoints_and_cache_follow_the_umask(tmp_path, umask):
    def write(folder):
        (folder / "unet").mkdir()
        save_file({"a": np.zeros(3)}, folder / "unet" / "weights.safetensors")

    save(tmp_path / "out", 1, write=write)
    (tmp_path / "cache").mkdir()
    shard.write_shard(tmp_path / "cache", ["a"], {"x": ("float32", np.zeros((1, 3), np.float32))})
    assert private(tmp_path, umask) == []


def test_a_full_result_follows_the_umask(run, tmp_path, umask):
    run(tmp_path / "out", "--max_train_steps", "1", "--checkpointing_steps", "1", "--use_ema")
    assert private(tmp_path, umask) == []


def test_adapters_follow_the_umask(run_lora_sdxl, tmp_path):
    before = os.umask(0o022)
    try:
        run_lora_sdxl(tmp_path / "out", "--max_train_steps", "1", "--checkpointing_steps", "1", "--save_kohya_format")
    finally:
        os.umask(before)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 3 and private(tmp_path, 0o022) == []


def test_what_others_wrote_beside_the_result_stays_as_it_is(run_lora, tmp_path):
    secret = tmp_path / "mine.safetensors"
    save_file({"a": np.zeros(3)}, secret)
    secret.chmod(0o600)
    run_lora(tmp_path, "--max_train_steps", "1")
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "pytorch_lora_weights.safetensors").stat().st_mode) != 0o600


def test_rescued_weights_follow_the_umask(run, tmp_path, monkeypatch, umask):
    import tempfile

    import train_text_to_image

    def refuse(*_):
        raise OSError(errno.EIO, "Input/output error")

    (tmp_path / "rescued").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "rescued"))
    monkeypatch.setattr(train_text_to_image, "save_result", refuse)
    sentence, _ = run.fails(tmp_path / "out", "--max_train_steps", "1")
    assert "only its weights are in" in sentence and "(see that the disk works" in sentence
    assert private(tmp_path / "rescued", umask) == []
    (refuge,) = (tmp_path / "rescued").iterdir()
    assert stat.S_IMODE(refuge.stat().st_mode) == 0o777 & ~umask
