"""What goes wrong in the middle of a run costs at most the steps since the last checkpoint, and is said."""

import importlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, RUNNERS, relative_difference, result_bytes, result_weights
from processes import launcher, wait_for
from safetensors.torch import load_file
from tiny import build_sd

from training_utils.cli.secrets import HANDED_ON, hide_secrets
from training_utils.run import checkpoints, output_folder, resume

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
    """Step 4 takes the first four images of the second epoch; the losses are fetched after step 6."""
    average = ["--use_ema", "--ema_decay", "0.9"] if value == float("inf") else []
    run, flags = each, ["--checkpointing_steps", "100", "--logging_steps", "6", *average]
    run(tmp_path / "complete", "--checkpointing_steps", "3", *average)
    with monkeypatch.context() as patch:
        poison(patch, run, 4, value=value)
        sentence, code = run.fails(tmp_path / "out", *flags)
    assert code == 1 and "step 4 is not finite" in sentence
    assert len(re.findall(r"\d\.png", sentence)) == 4 and "checkpoint-3" in sentence
    assert [folder.name for folder in checkpoints.list_checkpoints(tmp_path / "out")] == ["checkpoint-3"]
    run(tmp_path / "out", *flags, "--resume_from_checkpoint", "latest")
    assert result_bytes(tmp_path / "out") == result_bytes(tmp_path / "complete")


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_a_step_that_is_not_finite_is_skipped_on_request(run, tmp_path, monkeypatch, capsys, optimizer):
    flags = ["--on_nan", "skip", "--checkpointing_steps", "1", "--optimizer", optimizer]
    flags += ["--gradient_accumulation_steps", "2", "--train_batch_size", "2", "--use_ema", "--ema_decay", "0.9"]
    poison(monkeypatch, run, 7)  # the first half of step 4
    run(tmp_path, *flags)
    assert "step 4 is not finite" in capsys.readouterr().err
    assert all(weight.isfinite().all() for weight in result_weights(tmp_path).values())
    for part in ("unet", "unet_ema"):
        name = f"{part}/diffusion_pytorch_model.safetensors"
        before, after, next_one = (load_file(tmp_path / f"checkpoint-{step}/{name}") for step in (3, 4, 5))
        assert all(torch.equal(before[key], after[key]) for key in before)
        assert any(not torch.equal(after[key], next_one[key]) for key in before)
    cut = tmp_path / "cut"
    shutil.copytree(tmp_path / "checkpoint-5", cut / "checkpoint-5")
    monkeypatch.undo()
    run(cut, *flags, "--resume_from_checkpoint", "latest")
    assert result_bytes(cut) == result_bytes(tmp_path)


POISONED = """
import os, runpy, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, {root!r})
from training_utils.torch_backend import loader
real = loader.training_batches
def poisoned(*args):
    for number, batch in enumerate(real(*args), start=1):
        if number == 4 and os.environ["RANK"] == "1":
            batch = batch | {{"noise": batch["noise"] * float("nan")}}
        yield batch
loader.training_batches = poisoned
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_loss_of_one_process_that_is_not_finite_stops_both(run, tmp_path):
    wrapper, out = tmp_path / "poisoned.py", tmp_path / "out"
    wrapper.write_text(POISONED.format(root=str(ROOT)))
    process = run.fork(out, "--train_batch_size", "2", processes=2, through=[wrapper])
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 1 and said.count("step 4 is not finite") == 1, said
    assert [folder.name for folder in checkpoints.list_checkpoints(out)] == ["checkpoint-3"]
    run(out, "--resume_from_checkpoint", "latest")
    run(tmp_path / "complete")
    assert relative_difference(out, tmp_path / "complete") < 1e-5


def test_no_checkpoint_is_written_of_a_state_that_is_not_finite(run, tmp_path, monkeypatch):
    """Also where a checkpoint is due before the losses would be fetched, and with a limit of one."""
    poison(monkeypatch, run, 4)
    flags = ["--checkpointing_steps", "2", "--checkpoints_total_limit", "1", "--logging_steps", "100"]
    sentence, code = run.fails(tmp_path, *flags)
    assert code == 1 and "checkpoint-3" in sentence
    (kept,) = checkpoints.list_checkpoints(tmp_path)
    assert kept.name == "checkpoint-3" and checkpoints.damage_of(kept) is None
    weights = load_file(kept / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(weight.isfinite().all() for weight in weights.values())


# --- checkpoints of something else -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(run, tmp_path_factory):
    """A checkpoint of train_text_to_image.py."""
    out = tmp_path_factory.mktemp("checkpoint")
    run(out, "--checkpointing_steps", "2", "--max_train_steps", "2")
    return out / "checkpoint-2"


@pytest.mark.parametrize("runner", RUNNERS[1:])
def test_a_checkpoint_of_another_script(request, checkpoint, tmp_path, runner):
    sentence, code = request.getfixturevalue(runner).fails(tmp_path, "--resume_from_checkpoint", checkpoint)
    assert "was made by train_text_to_image.py, not by train_text_to_image_" in sentence and code == 2


def test_a_checkpoint_of_another_model(run, checkpoint, tmp_path):
    base = build_sd(tmp_path / "base", block_out_channels=(8, 8))
    flags = ["--resume_from_checkpoint", checkpoint, "--pretrained_model_name_or_path", base]
    sentence, code = run.fails(tmp_path / "out", *flags)
    assert f"{checkpoint} cannot be read" in sentence and "\n" not in sentence and code == 2


@pytest.mark.parametrize("runner", [name for name in RUNNERS if "lora" in name])
def test_a_checkpoint_of_another_rank(request, tmp_path, runner):
    run = request.getfixturevalue(runner)
    run(tmp_path, "--checkpointing_steps", "1", "--max_train_steps", "1")
    sentence, code = run.fails(tmp_path, "--resume_from_checkpoint", "latest", "--rank", "2")
    assert "adapters of rank 4, this run has --rank 2" in sentence and code == 2


# --- disks -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MB; `fill` uses up what is left of it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a file system needs root")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def fill(disk):
    with open(disk / "filler", "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass


def around_saves(monkeypatch, before=lambda step: None, after=lambda step: None):
    """Do something before and after each checkpoint of a run, given its step."""
    real = checkpoints.save_checkpoint

    def save(root, state, *rest, **options):
        before(state.step)
        folder = real(root, state, *rest, **options)
        after(state.step)
        return folder

    monkeypatch.setattr(checkpoints, "save_checkpoint", save)


def test_a_full_disk_costs_one_checkpoint(each, tmp_path, small_disk, monkeypatch, capsys):
    """It is full when the second of three checkpoints is due, which the run says; the third one succeeds."""
    run, out, flags = each, small_disk / "out", ["--checkpointing_steps", "2", "--checkpoints_total_limit", "1"]
    standing = []

    def before(step):
        if step == 4:
            fill(small_disk)

    def after(step):
        standing.append(
            [folder.name for folder in checkpoints.list_checkpoints(out) if checkpoints.damage_of(folder) is None]
        )
        (small_disk / "filler").unlink(missing_ok=True)

    around_saves(monkeypatch, before, after)
    run(out, *flags)
    assert "checkpoint-4 could not be written" in capsys.readouterr().err
    assert standing == [["checkpoint-2"], ["checkpoint-2"], ["checkpoint-6"]]
    monkeypatch.undo()
    run(tmp_path / "complete")
    assert result_bytes(out) == result_bytes(tmp_path / "complete")


def test_a_result_that_does_not_fit_is_in_the_last_checkpoint(each, tmp_path, small_disk, monkeypatch):
    run, out = each, small_disk / "out"
    around_saves(monkeypatch, after=lambda step: step == 6 and fill(small_disk))
    sentence, code = run.fails(out, "--checkpointing_steps", "3")
    assert code == 1 and f"its weights are in {out / 'checkpoint-6'}" in sentence
    (small_disk / "filler").unlink()
    monkeypatch.undo()
    run(out, "--checkpointing_steps", "3", "--resume_from_checkpoint", "latest")
    run(tmp_path / "complete")
    assert result_bytes(out) == result_bytes(tmp_path / "complete")


def test_a_result_that_does_not_fit_and_has_no_checkpoint_finds_a_place(
    run, run_lora, tmp_path, small_disk, monkeypatch
):
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for script, file in (
        (run, "unet/diffusion_pytorch_model.safetensors"),
        (run_lora, "pytorch_lora_weights.safetensors"),
    ):
        with monkeypatch.context() as patch:
            name = "save_result"
            module = importlib.import_module(script.script)
            real = getattr(module, name)
            patch.setattr(module, name, lambda *args, real=real: (fill(small_disk), real(*args)))
            sentence, code = script.fails(small_disk / "out")
        (small_disk / "filler").unlink()
        assert code == 1
        refuge = Path(re.search(r"only its weights are in (\S+)", sentence)[1])
        script(tmp_path / script.script)
        expected = result_weights(tmp_path / script.script)
        assert all(torch.equal(value, expected[key]) for key, value in load_file(refuge / file).items())


def test_a_disk_that_becomes_read_only(run, small_disk, monkeypatch, capsys):
    def before(step):
        if step == 4:
            output_folder.release()  # a remount, unlike a disk that fails, is refused while a file is open for writing
            subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)

    around_saves(monkeypatch, before)
    validation = ["--validation_prompts", "a handwritten one", "--validation_num_inference_steps", "2"]
    sentence, code = run.fails(
        small_disk / "out", "--checkpointing_steps", "2", *validation, "--validation_steps", "5"
    )
    said = capsys.readouterr().err
    assert "checkpoint-4 could not be written" in said and "step-000005.png could not be written" in said
    assert code == 1 and "only its weights are in" in sentence
    assert resume.find_checkpoint(small_disk / "out", "latest").name == "checkpoint-2"


def test_a_folder_that_is_removed_meanwhile(each, tmp_path, monkeypatch):
    run = each
    around_saves(monkeypatch, before=lambda step: step == 4 and shutil.rmtree(tmp_path / "out"))
    run(tmp_path / "out", "--checkpointing_steps", "2")
    assert [folder.name for folder in checkpoints.list_checkpoints(tmp_path / "out")] == [
        "checkpoint-6",
        "checkpoint-4",
    ]
    run(tmp_path / "complete")
    assert result_bytes(tmp_path / "out") == result_bytes(tmp_path / "complete")


def test_a_checkpoint_of_an_earlier_run_is_not_taken_for_this_runs(run, tmp_path, small_disk, monkeypatch):
    """It stands at the same step; neither a result that does not fit nor a lost loss may point to it."""
    import tempfile

    out = small_disk / "out"
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    run(out, "--checkpointing_steps", "3", "--learning_rate", "1e-2")
    with monkeypatch.context() as patch:
        module = importlib.import_module(run.script)
        real = module.save_result
        patch.setattr(module, "save_result", lambda *args: (fill(small_disk), real(*args)))
        sentence, _ = run.fails(out)
        assert "only its weights are in" in sentence
    (small_disk / "filler").unlink()
    run(tmp_path / "complete", "--checkpointing_steps", "3")
    poison(monkeypatch, run, 4)
    sentence, _ = run.fails(out, "--checkpointing_steps", "100")
    assert "checkpoint-3" in sentence
    name = "checkpoint-3/unet/diffusion_pytorch_model.safetensors"
    kept, expected = load_file(out / name), load_file(tmp_path / "complete" / name)
    assert all(torch.equal(kept[key], expected[key]) for key in expected)


def test_half_of_a_result_does_not_stand_in_the_way(run, run_lora, tmp_path):
    """A disk that became full just then leaves an empty index; the same command, once there is room, completes it."""
    for script, name in ((run, "model_index.json"), (run_lora, "pytorch_lora_weights.safetensors")):
        for content in (b"", b"[]", b"\x10"):
            out = tmp_path / script.script / content.hex()
            out.mkdir(parents=True)
            (out / name).write_bytes(content)
            assert script(out, "--max_train_steps", "1") == 0


def test_one_partition_that_is_full_for_everything(run, small_disk, monkeypatch):
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(small_disk))
    module = importlib.import_module(run.script)
    real = module.save_result
    monkeypatch.setattr(module, "save_result", lambda *args: (fill(small_disk), real(*args)))
    sentence, code = run.fails(small_disk / "out")
    assert "could not be written" in sentence and "nor its weights" in sentence and code == 1


# --- trackers and the hub --------------------------------------------------------------------------------------------


class Refused(Exception):
    """What a tracker's client raises when its server is gone."""


def test_a_tracker_that_fails_is_left_behind(run, tmp_path, monkeypatch, capsys):
    from accelerate.tracking import TensorBoardTracker

    def refuse(*_, **__):
        raise Refused("503 Service Unavailable")

    for method in ("log", "finish"):
        with monkeypatch.context() as patch:
            patch.setattr(TensorBoardTracker, method, refuse)
            run(tmp_path / method, "--report_to", "tensorboard")
        said = capsys.readouterr().err
        assert said.count("tensorboard failed (503 Service Unavailable); the run continues without it") == 1
    run(tmp_path / "complete")
    assert result_bytes(tmp_path / "log") == result_bytes(tmp_path / "complete")
    monkeypatch.setattr(TensorBoardTracker, "__init__", refuse)
    sentence, code = run.fails(tmp_path / "never", "--report_to", "tensorboard")
    assert "tensorboard: 503" in sentence and "--report_to none" in sentence and code == 2


HUB_FAILURES = {
    "refused": ConnectionRefusedError(111, "Connection refused"),
    "unauthorised": Refused("401 Client Error: Unauthorized for url: https://hub/api"),
    "server": Refused("500 Server Error: Internal Server Error"),
    "timeout": TimeoutError("timed out"),
    "half sent": BrokenPipeError(32, "Broken pipe"),
    "silent": Refused(),
}


@pytest.mark.parametrize(("runner", "failure"), [*zip(RUNNERS, HUB_FAILURES), *zip(RUNNERS[6:], HUB_FAILURES)])
def test_a_hub_that_fails_costs_nothing(request, tmp_path, monkeypatch, runner, failure):
    """After training the result stands and the sentence says how to push it; before it, nothing has begun."""
    each = request.getfixturevalue(runner)
    import huggingface_hub

    def refuse(*_, **__):
        raise HUB_FAILURES[failure]

    flags = ["--push_to_hub", "--hub_model_id", "me/model", "--hub_token", "hf_secret", "--max_train_steps", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub, "create_repo", refuse)
        sentence, code = each.fails(tmp_path / "before", *flags)
        assert code == 2 and "cannot open repository me/model" in sentence and "hf_secret" not in sentence
        assert not list((tmp_path / "before").rglob("*.safetensors"))
    monkeypatch.setattr(huggingface_hub, "create_repo", lambda name, **_: type("", (), {"repo_id": name}))
    monkeypatch.setattr(huggingface_hub, "upload_folder", refuse)
    sentence, code = each.fails(tmp_path / "after", *flags)
    assert code == 1 and f"hf upload me/model {tmp_path / 'after'}" in sentence and "hf_secret" not in sentence
    each(tmp_path / "complete", "--max_train_steps", "1")
    assert result_bytes(tmp_path / "after") == result_bytes(tmp_path / "complete")


# --- signals and lost processes --------------------------------------------------------------------------------------

SLOW_SAVE = """
import runpy, sys, time
sys.argv = sys.argv[1:]
sys.path.insert(0, {root!r})
from training_utils.run import checkpoints
real = checkpoints._write_manifest
def slow(folder, state, provenance):
    if state.step > 20:
        print("saving slowly", flush=True)
        time.sleep(60)
    real(folder, state, provenance)
checkpoints._write_manifest = slow
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    ("number", "processes"),
    [(signal.SIGTERM, 1), pytest.param(signal.SIGINT, 1, marks=pytest.mark.slow), (signal.SIGTERM, 2)],
)
def test_a_second_signal_ends_a_run_at_once_and_damages_nothing(run, tmp_path, number, processes):
    """The first one makes it write a checkpoint, which takes a minute here."""
    wrapper, out = tmp_path / "slow.py", tmp_path / "out"
    wrapper.write_text(SLOW_SAVE.format(root=str(ROOT)))
    flags = ["--max_train_steps", "9000", "--checkpointing_steps", "20"]
    if processes == 1:
        process = run.fork(out, *flags, through=[wrapper])
    else:
        process = run.start(out, *flags, launcher=[*launcher(2, "--multi_gpu"), str(wrapper)])
    wait_for([process], out / "checkpoint-20")
    began = time.monotonic()
    process.send_signal(number)
    wait_for([process], out / ".checkpoint-*.partial")
    time.sleep(3)  # within two seconds it would be taken for the same request
    process.send_signal(number)
    process.communicate(timeout=50)
    assert process.returncode != 0 and time.monotonic() - began < 55
    assert not running(out)
    assert [folder.name for folder in checkpoints.list_checkpoints(out)] == ["checkpoint-20"]
    assert checkpoints.damage_of(out / "checkpoint-20") is None
    run(out, "--max_train_steps", "22", "--resume_from_checkpoint", "latest", "--train_batch_size", 4 * processes)
    run(tmp_path / "complete", "--max_train_steps", "22", "--train_batch_size", 4 * processes)
    if processes == 1:
        assert result_bytes(out) == result_bytes(tmp_path / "complete")
    else:
        assert relative_difference(out, tmp_path / "complete") < 1e-5


def running(out):
    """The processes that have this output folder in their command line."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes()
            if str(out).encode() in words and (folder / "stat").read_text().rsplit(")", 1)[1].split()[0] != "Z":
                found.append(int(folder.name))
        except OSError:  # it has just ended
            pass
    return found


def test_a_process_that_dies_takes_the_others_with_it_in_order(run, tmp_path):
    out = tmp_path / "out"
    flags = ["--max_train_steps", "9000", "--checkpointing_steps", "20", "--train_batch_size", "2"]
    process = run.start(out, *flags, launcher=launcher(2, "--multi_gpu"))
    wait_for([process], out / "checkpoint-20")
    ranks = {}
    for pid in running(out):
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        ranks |= {word: pid for word in environment if word in (b"RANK=0", b"RANK=1")}
    os.kill(ranks[b"RANK=1"], signal.SIGKILL)
    began = time.monotonic()
    said, _ = process.communicate(timeout=90)
    assert process.returncode != 0 and time.monotonic() - began < 60
    assert not running(out)
    assert "process 0 lost another process of this run" in said or "stopped after step" in said, said
    assert resume.find_checkpoint(out, "latest") is not None


ELSEWHERE = """
import os, runpy, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, {root!r})
if os.environ["RANK"] == "1":  # as on a second machine without the folder
    sys.argv[sys.argv.index("--pretrained_model_name_or_path") + 1] = "nowhere/model"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_what_one_process_alone_meets_is_said(run, tmp_path):
    wrapper = tmp_path / "elsewhere.py"
    wrapper.write_text(ELSEWHERE.format(root=str(ROOT)))
    said, _ = run.fork(tmp_path / "out", processes=2, through=[wrapper]).communicate(timeout=120)
    assert said.count("error: base model nowhere/model is neither a folder nor found on the hub") == 1, said


def test_a_token_that_was_handed_on_is_the_flag(monkeypatch):
    """For the upload and nothing else: under the client's own name it would be used for downloads too."""
    import train_text_to_image

    asked = {}
    monkeypatch.setattr(os, "execv", lambda program, words: asked.update(words=words))
    monkeypatch.setattr(sys, "orig_argv", ["python", "script.py", "--hub_token", "hf_secret", "--seed", "1"])
    monkeypatch.setenv(HANDED_ON, "")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    words = ["--pretrained_model_name_or_path", "x", "--train_data_dir", str(ROOT)]
    hide_secrets(train_text_to_image.parse_args([*words, "--hub_token", "hf_secret"]))
    assert asked["words"] == [sys.executable, "script.py", "--seed", "1"] and "HF_TOKEN" not in os.environ
    args = train_text_to_image.parse_args(words)
    assert args.hub_token == "hf_secret" and "hf_secret" not in str(args.public)
    monkeypatch.setattr(os, "execv", lambda *_: pytest.fail("once is enough"))
    hide_secrets(args)


def test_the_token_is_not_in_the_list_of_processes(run, tmp_path):
    """`ps` shows every user of a machine the command lines of all processes."""
    out = tmp_path / "out"
    flags = ["--max_train_steps", "9000", "--checkpointing_steps", "20", "--hub_token", "hf_do_not_leak_me"]
    process = run.start(out, *flags)
    try:
        wait_for([process], out / "checkpoint-20")
        words = Path(f"/proc/{process.pid}/cmdline").read_bytes()
        assert str(out).encode() in words and b"hf_do_not_leak_me" not in words
    finally:
        process.kill()
        process.communicate()


# --- kills -----------------------------------------------------------------------------------------------------------

KILLED_AT = """
import os, runpy, shutil, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, {root!r})
operation, name, count = {moment!r}

def dies(module, attribute, part_of_name):
    real, seen = getattr(module, attribute), [0]
    def call(*args, **options):
        if part_of_name in " ".join(map(str, args)):
            seen[0] += 1
            if seen[0] == count:
                if attribute == "rmtree":  # half-way through
                    next(path for path in args[0].rglob("*") if path.is_file()).unlink()
                os.kill(os.getpid(), 9)
        return real(*args, **options)
    setattr(module, attribute, call)

dies(shutil if operation == "rmtree" else os, operation, name)
runpy.run_path(sys.argv[0], run_name="__main__")
"""
MOMENTS = {  # of the third checkpoint, when rotation has begun; `name` is in what the operation is given
    "while it is flushed": ("fsync", "", 25),
    "before its rename": ("rename", ".partial", 3),
    "after its rename, before rotation": ("rename", ".old", 1),
    "half-way through rotation": ("rmtree", ".old", 3),
    "as it starts": None,
    "in its steps": None,
}


@pytest.mark.slow
def test_killed_six_times_and_equal_to_the_bit(each, tmp_path):
    """SIGKILL of the process itself, at each of MOMENTS, one after the other in one run."""
    run, out, after = each, tmp_path / "out", random.Random(each.script)
    flags = ["--checkpointing_steps", "4", "--max_train_steps", "300", "--checkpoints_total_limit", "2"]
    run(tmp_path / "complete", *flags)
    for number, (name, moment) in enumerate(MOMENTS.items()):
        through = []
        if moment:
            through = [tmp_path / f"{number}.py"]
            through[0].write_text(KILLED_AT.format(root=str(ROOT), moment=moment))
        stood = {folder.name for folder in checkpoints.list_checkpoints(out)}
        process = run.fork(out, *flags, "--resume_from_checkpoint", "latest", through=through)
        if not moment:
            if name == "in its steps":
                while stood == {folder.name for folder in checkpoints.list_checkpoints(out)}:
                    assert process.poll() is None, process.stdout.read()
                    time.sleep(0.01)
            time.sleep(after.uniform(0, 2))
            process.kill()
        said, _ = process.communicate(timeout=100)
        assert process.returncode == -signal.SIGKILL, f"{name}: {said}"
        complete = [folder for folder in checkpoints.list_checkpoints(out) if checkpoints.damage_of(folder) is None]
        assert complete == checkpoints.list_checkpoints(out), f"{name}: a half checkpoint stands"
        assert number == 0 or len(complete) >= 1, f"{name}: fewer than the limit less one"
    process = run.fork(out, *flags, "--resume_from_checkpoint", "latest")
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 0, said
    assert result_bytes(out) == result_bytes(tmp_path / "complete")


def test_a_killed_data_worker_is_a_sentence(run, tmp_path):
    """As the system does it for want of memory."""
    out = tmp_path / "out"
    flags = ["--max_train_steps", "100000", "--dataloader_num_workers", "1", "--checkpointing_steps", "20"]
    process = run.start(out, *flags)
    wait_for([process], out / "checkpoint-20")
    threads = Path(f"/proc/{process.pid}/task").glob("*/children")
    workers = [int(pid) for path in threads for pid in path.read_text().split()]
    names = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in workers}
    (worker,) = [pid for pid, name in names.items() if b"train_text_to_image" in name]
    os.kill(worker, signal.SIGKILL)
    said, _ = process.communicate(timeout=100)
    assert process.returncode == 1 and "a data worker was killed" in said and "Traceback" not in said, said
