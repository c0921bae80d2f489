"""A run that is cut anywhere and continued ends in the same weights, to the bit."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import EACH, ROOT, RUNNERS, logged, relative_difference, result_bytes
from processes import launcher, wait_for

from training_utils.run import signals
from training_utils.run.signals import Interruption
from training_utils.run.standing import Standing
from training_utils.run.state import RunState
from training_utils.torch_backend.state import TrainingState

SETTINGS = {
    "plain": [],
    "average": ["--use_ema"],
    "offloaded average": ["--use_ema", "--offload_ema", "--ema_decay", "0.9"],
    "accumulation": ["--train_batch_size", "2", "--gradient_accumulation_steps", "3"],
    "workers": ["--dataloader_num_workers", "2"],
    "every draw": [
        *("--random_flip", "--caption_dropout", "0.5", "--noise_offset", "0.1", "--input_perturbation", "0.1"),
        *("--snr_gamma", "5", "--lr_scheduler", "cosine", "--lr_warmup_steps", "2", "--validation_split", "0.2"),
    ],
    "adafactor": ["--optimizer", "adafactor"],
    "adamw8bit": ["--optimizer", "adamw8bit", "--lr_scheduler", "cosine"],
    "paged_adamw8bit": ["--optimizer", "paged_adamw8bit"],
    "prodigy": ["--optimizer", "prodigy", "--learning_rate", "1", "--lr_scheduler", "cosine"],
    "updates during the backward pass": ["--fused_backward_pass", "--max_grad_norm", "0", "--use_ema"],
    "full bf16": ["--full_bf16", "--use_ema", "--train_batch_size", "2", "--gradient_accumulation_steps", "3"],
    "full bf16, 8 bits": ["--full_bf16", "--optimizer", "adamw8bit", "--fused_backward_pass", "--max_grad_norm", "0"],
    "checkpointed activations": ["--gradient_checkpointing"],
    "bf16": ["--mixed_precision", "bf16"],
}


SIBLINGS = {
    ("run_lora", "plain"): [],
    ("run_lora", "average"): ["--use_ema", "--ema_decay", "0.9"],
    ("run_lora", "dropout in the network"): ["--lora_dropout", "0.5", "--gradient_accumulation_steps", "2"],
    ("run_lora", "text encoder, DoRA"): ["--train_text_encoder", "--use_dora", "--rank", "2", "--use_ema"],
    ("run_lora", "bf16"): ["--mixed_precision", "bf16", "--train_text_encoder"],
    ("run_lora", "checkpointed activations"): ["--gradient_checkpointing", "--train_text_encoder"],
    ("run_sdxl", "plain"): [],
    ("run_sdxl", "every draw"): [
        *("--random_flip", "--proportion_empty_prompts", "0.5", "--noise_offset", "0.1", "--snr_gamma", "5"),
        *("--timestep_bias_strategy", "later", "--timestep_bias_multiplier", "3", "--use_ema"),
    ],
    ("run_sdxl", "bf16, workers"): ["--mixed_precision", "bf16", "--dataloader_num_workers", "2"],
    ("run_sdxl", "full bf16, adafactor"): ["--full_bf16", "--optimizer", "adafactor", "--use_ema", "--offload_ema"],
    ("run_lora_sdxl", "plain"): [],
    ("run_lora_sdxl", "prodigy"): ["--optimizer", "prodigy", "--learning_rate", "1", "--train_text_encoder"],
    ("run_lora_sdxl", "text encoders"): ["--train_text_encoder", "--use_ema", "--lora_dropout", "0.2"],
    ("run_prior", "every draw"): [
        *("--random_flip", "--caption_dropout", "0.5", "--snr_gamma", "5", "--use_ema", "--ema_decay", "0.9"),
        *("--lr_scheduler", "cosine", "--lr_warmup_steps", "2"),
    ],
    ("run_prior", "bf16, checkpointed activations"): ["--mixed_precision", "bf16", "--gradient_checkpointing"],
    ("run_prior", "full bf16"): ["--full_bf16", "--use_ema", "--fused_backward_pass", "--max_grad_norm", "0"],
    ("run_lora_prior", "average"): ["--use_ema", "--lora_dropout", "0.2", "--gradient_accumulation_steps", "2"],
    ("run_lora_prior", "bf16"): ["--mixed_precision", "bf16", "--use_dora"],
    ("run_decoder", "every draw"): [
        *("--random_flip", "--random_crop", "--caption_dropout", "0.5", "--noise_offset", "0.1", "--snr_gamma", "5"),
        *("--use_ema", "--dataloader_num_workers", "2"),
    ],
    ("run_decoder", "bf16, checkpointed activations"): ["--mixed_precision", "bf16", "--gradient_checkpointing"],
    ("run_decoder", "full bf16"): ["--full_bf16", "--gradient_checkpointing", "--optimizer", "adamw8bit"],
    ("run_lora_decoder", "average"): ["--use_ema", "--lora_dropout", "0.2", "--gradient_accumulation_steps", "2"],
    ("run_lora_decoder", "bf16"): ["--mixed_precision", "bf16", "--use_dora"],
    ("run_lora_sdxl", "bf16"): ["--mixed_precision", "bf16", "--train_text_encoder", "--gradient_checkpointing"],
}
CASES = {("run", name): flags for name, flags in SETTINGS.items()} | SIBLINGS


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(case))
def test_resumed_equals_uninterrupted(request, tmp_path, case):
    """Ten images and batches of four make steps of 4, 4, 2: the cuts after 2 and 5 lie inside an epoch."""
    run = request.getfixturevalue(case[0])
    for package in {"8bit": "bitsandbytes", "prodigy": "prodigyopt"}.items():
        if package[0] in " ".join(CASES[case]):
            pytest.importorskip(package[1])
    flags = [*CASES[case], "--checkpointing_steps", "1"]
    complete = tmp_path / "complete"
    run(complete, *flags)
    for cut in (2, 3, 5):
        cut_run = tmp_path / f"cut{cut}"
        shutil.copytree(complete / f"checkpoint-{cut}", cut_run / f"checkpoint-{cut}")
        run(cut_run, *flags, "--resume_from_checkpoint", "latest")
        assert result_bytes(cut_run) == result_bytes(complete), f"cut after step {cut}"


def test_number_of_workers_changes_nothing(run, tmp_path):
    for workers in (0, 1, 3):
        run(tmp_path / str(workers), "--random_flip", "--dataloader_num_workers", workers)
    assert result_bytes(tmp_path / "0") == result_bytes(tmp_path / "1") == result_bytes(tmp_path / "3")


def test_validation_in_between_changes_nothing(run, tmp_path):
    run(tmp_path / "without", "--validation_split", "0.2")
    validation = ["--validation_prompts", "a handwritten one", "--validation_steps", "2"]
    run(tmp_path / "with", "--validation_split", "0.2", *validation, "--validation_num_inference_steps", "2")
    assert result_bytes(tmp_path / "with") == result_bytes(tmp_path / "without")


def test_seed_is_drawn_once_and_kept(run, tmp_path):
    argv = run.argv(tmp_path / "complete", "--checkpointing_steps", "3")
    at = argv.index("--seed")
    no_seed = argv[:at] + argv[at + 2 :]
    from conftest import reset_accelerate

    import train_text_to_image

    reset_accelerate()
    train_text_to_image.main(no_seed)
    (tmp_path / "cut").mkdir()
    shutil.copytree(tmp_path / "complete" / "checkpoint-3", tmp_path / "cut" / "checkpoint-3")
    no_seed[no_seed.index("--output_dir") + 1] = str(tmp_path / "cut")
    reset_accelerate()
    train_text_to_image.main([*no_seed, "--resume_from_checkpoint", "latest"])
    assert result_bytes(tmp_path / "cut") == result_bytes(tmp_path / "complete")


def test_resuming_a_finished_run_changes_nothing(run, tmp_path):
    run(tmp_path, "--checkpointing_steps", "4")
    before = result_bytes(tmp_path)
    run(tmp_path, "--checkpointing_steps", "4", "--resume_from_checkpoint", "latest")
    assert result_bytes(tmp_path) == before
    assert sorted(path.name for path in tmp_path.glob("checkpoint*")) == ["checkpoint-4", "checkpoint-6"]


def test_losses_of_a_resumed_run_continue_the_curve(run, tmp_path):
    flags = ["--report_to", "tensorboard", "--checkpointing_steps", "2", "--validation_split", "0.2"]
    flags += ["--validation_steps", "2"]
    run(tmp_path / "complete", *flags)
    shutil.copytree(tmp_path / "complete" / "checkpoint-2", tmp_path / "cut" / "checkpoint-2")
    run(tmp_path / "cut", *flags, "--resume_from_checkpoint", "latest")
    for name in ("train_loss", "val_loss", "lr"):
        complete = logged(tmp_path / "complete", name)
        assert logged(tmp_path / "cut", name) == {step: value for step, value in complete.items() if step > 2}
    assert list(logged(tmp_path / "complete")) == [1, 2, 3, 4, 5, 6]


def test_ema_can_be_turned_on_later(run, tmp_path, capsys):
    run(tmp_path, "--checkpointing_steps", "3", "--max_train_steps", "3")
    run(tmp_path, "--checkpointing_steps", "3", "--use_ema", "--resume_from_checkpoint", "checkpoint-3")
    said = capsys.readouterr().err
    assert "holds no EMA weights" in said
    assert "use_ema False -> True" in said


def test_a_new_learning_rate_takes_effect_on_resume(run, tmp_path):
    flags = ["--checkpointing_steps", "3", "--report_to", "tensorboard"]
    run(tmp_path, *flags)
    run(tmp_path, *flags, "--resume_from_checkpoint", "checkpoint-3", "--learning_rate", "5e-4")
    assert logged(tmp_path, "lr")[6] == pytest.approx(5e-4)


def kill_when(process, folder, pattern, number):
    """Send a signal to a process as soon as something matching `pattern` exists in `folder`."""
    wait_for([process], folder / pattern)
    process.send_signal(number)
    return process.wait(120), process.stdout.read()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in ("run", "run_prior") else pytest.mark.slow) for name in RUNNERS]
)
def test_sigkill_then_resume(request, name, tmp_path, capsys):
    run = request.getfixturevalue(name)
    flags = ["--checkpointing_steps", "5", "--max_train_steps", "90", "--checkpoints_total_limit", "2"]
    run(tmp_path / "complete", *flags)
    out = tmp_path / "killed"
    code, _ = kill_when(run.fork(out, *flags), out, "checkpoint-1*", signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert not (out / "README.md").exists(), "it was killed too late to show anything"
    capsys.readouterr()
    run(out, *flags, "--resume_from_checkpoint", "latest")
    assert "resuming from" in capsys.readouterr().err
    assert result_bytes(out) == result_bytes(tmp_path / "complete")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_leaves_a_checkpoint_and_the_command_that_continues(run, tmp_path, number):
    flags = ["--max_train_steps", "900", "--dataloader_num_workers", "1", "--report_to", "tensorboard"]
    flags += ["--checkpointing_steps", "20", "--hub_token", "hf_secret"]
    out = tmp_path / "stopped"
    code, said = kill_when(run.fork(out, *flags), out, "checkpoint-20", number)
    assert code == 128 + number, said
    stopped_after = int(re.search(r"stopped after step (\d+)", said)[1])
    assert 20 <= stopped_after < 900
    name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
    assert said.count(f"{name}: finishing ") == 1 and f"a second {name} ends the run at once and loses " in said
    assert (out / f"checkpoint-{stopped_after}").is_dir()
    command = said.strip().splitlines()[-1].strip()
    assert command.startswith("python ") and command.endswith("--resume_from_checkpoint latest")
    assert "hf_secret" not in said


def test_a_stop_that_cannot_be_saved_is_a_failure(run, tmp_path, monkeypatch):
    """Then there is nothing to continue from, and the exit code is not that of a good stop."""

    monkeypatch.setattr(Interruption, "signal", lambda self: signal.SIGTERM)

    def full_disk(self, folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TrainingState, "write", full_disk)
    sentence, code = run.fails(tmp_path)
    assert "stopped after step 1, which could not be saved" in sentence and code == 1


def test_fp16_overflows_end_and_obey_signals(run, tmp_path, monkeypatch):
    """A step that overflowed counts neither as a step nor for the schedule; fifty in a row end the run."""
    from accelerate import Accelerator

    seen = []

    def skipped(self):
        seen.append(len(seen))
        return len(seen) % 2 == 1

    monkeypatch.setattr(Accelerator, "optimizer_step_was_skipped", property(skipped))
    run(tmp_path / "every second", "--report_to", "tensorboard", "--lr_scheduler", "linear", "--lr_warmup_steps", "0")
    assert len(seen) == 12 and list(logged(tmp_path / "every second")) == [1, 2, 3, 4, 5, 6]
    assert logged(tmp_path / "every second", "lr")[6] == 0

    monkeypatch.setattr(Accelerator, "optimizer_step_was_skipped", property(lambda self: True))
    sentence, code = run.fails(tmp_path / "always")
    assert "overflowed 50 times in a row" in sentence and "the last good state is in" in sentence and code == 1
    assert (tmp_path / "always" / "checkpoint-0").is_dir()
    monkeypatch.setattr(Interruption, "signal", lambda self: signal.SIGTERM)
    assert run(tmp_path / "stopped") == 128 + signal.SIGTERM


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_to_every_process_stops_two_processes_in_order(run, tmp_path, number):
    """As a job queue sends it: to the launcher, which passes it on, to both processes and to their data workers."""
    flags = ["--max_train_steps", "3000", "--checkpointing_steps", "20", "--dataloader_num_workers", "1"]
    flags += ["--train_batch_size", "2", "--checkpoints_total_limit", "2"]
    out = tmp_path / "stopped"
    process = run.start(out, *flags, launcher=launcher(2, "--multi_gpu"), start_new_session=True)
    wait_for([process], out / "checkpoint-20")
    os.killpg(process.pid, number)
    said, _ = process.communicate(timeout=60)
    stopped_after = int(re.search(r"stopped after step (\d+)", said)[1])
    assert (out / f"checkpoint-{stopped_after}").is_dir(), said
    assert "accelerate launch --multi_gpu --num_processes 2" in said

    last = stopped_after + 3
    flags[1] = str(last)
    run.on_two_processes(out, *flags, "--resume_from_checkpoint", "latest")
    run.on_two_processes(tmp_path / "complete", *flags)
    assert result_bytes(out) == result_bytes(tmp_path / "complete")


def test_a_single_process_follows_its_launcher(run, tmp_path):
    """`accelerate launch` of one process dies of SIGTERM by itself; the run then stops in order too."""
    out = tmp_path / "stopped"
    process = run.start(out, "--max_train_steps", "3000", "--checkpointing_steps", "20", launcher=launcher(1))
    wait_for([process], out / "checkpoint-20")
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)  # until the last process that holds its output has ended
    assert "stopped after step" in said, said


def test_a_hangup_that_is_ignored_stays_ignored(run, tmp_path):
    """As nohup has it."""
    wrapper, out = tmp_path / "nohup.py", tmp_path / "out"
    wrapper.write_text(
        "import runpy, signal, sys\nsys.argv = sys.argv[1:]\n"
        f"sys.path.insert(0, {str(ROOT)!r})\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    process = run.fork(out, "--max_train_steps", "60", "--checkpointing_steps", "20", through=[wrapper])
    code, said = kill_when(process, out, "checkpoint-20", signal.SIGHUP)
    assert code == 0 and "SIGHUP" not in said and (out / "checkpoint-60").is_dir()


def test_two_processes_speak_once(run, tmp_path):
    """Of a signal that reaches both, and of one that reaches the one that is silent."""
    flags = ["--max_train_steps", "3000", "--checkpointing_steps", "20", "--train_batch_size", "2"]
    flags += ["--dataloader_num_workers", "1"]
    for whom in (slice(0, 2), slice(1, 2)):
        out = tmp_path / str(whom.start)
        process = run.fork(out, *flags, processes=2)
        wait_for([process], out / "checkpoint-20")
        for one in process.processes[whom]:
            os.kill(one.pid, signal.SIGHUP)
        said, _ = process.communicate(timeout=60)
        assert process.returncode == 129 and said.count("SIGHUP: finishing ") == 1, said


SIGNALLED = """
import ctypes, os, sys, threading, time
sys.path.insert(0, {root!r})
from training_utils.run import signals
from training_utils.run.signals import Interruption
signals.SAME_REQUEST = 0.2
def send():
    for number in {numbers}:
        time.sleep(0.5)
        os.kill(os.getpid(), number)
threading.Thread(target=send, daemon=True).start()
with Interruption(lambda number: number, "{{}} first".format, "{{}} last".format) as interruption:
    began = time.monotonic()
    libc = ctypes.CDLL(None)
    while time.monotonic() - began < 1.9:
        libc.usleep(100000)
    print("noted", interruption.signal(), flush=True)
"""


@pytest.mark.parametrize(
    ("numbers", "code", "said"),
    [
        ([2], 0, ["Ctrl-C first", "noted 2"]),
        ([1], 0, ["SIGHUP first", "noted 1"]),
        ([15, 15], 143, ["SIGTERM first", "SIGTERM last"]),
        ([2, 1], 129, ["Ctrl-C first", "SIGHUP last"]),
        ([10, 10], 0, ["SIGTERM first", "noted 15"]),
        ([2, 10, 10], 0, ["Ctrl-C first", "noted 2"]),
        ([10, 2], 130, ["SIGTERM first", "Ctrl-C last"]),
    ],
)
def test_words_and_end_come_at_once(numbers, code, said):
    """SIGUSR1, 10, is what the end of the launcher sends."""
    words = SIGNALLED.format(root=str(ROOT), numbers=numbers)
    ended = subprocess.run([sys.executable, "-c", words], stdout=-1, stderr=subprocess.STDOUT, text=True, timeout=20)
    assert (ended.returncode, ended.stdout.splitlines()) == (code, said)


def test_words_come_while_no_handler_runs(capfd):
    """A backward pass is one call into C; the words do not wait for its end."""
    import ctypes
    import threading

    at = []

    def first_words(name):
        at.append(time.monotonic())
        return name

    def send():
        time.sleep(0.2)
        signal.pthread_kill(sender.ident, signal.SIGTERM)  # so that the long call is not interrupted

    sender = threading.Thread(target=send)
    with Interruption(lambda number: number, first_words) as interruption:
        sender.start()
        ctypes.CDLL(None).usleep(900_000)
        returned = time.monotonic()
        assert interruption.signal() == signal.SIGTERM
        sender.join()
    assert len(at) == 1 and at[0] < returned - 0.3
    assert "SIGTERM" in capfd.readouterr().err


def test_signals_of_a_fork_are_its_own():
    """A data worker that is ended does not end the run."""
    with Interruption(lambda number: number, lambda name: pytest.fail(name)) as interruption:
        child = os.fork()
        if child == 0:
            signal.raise_signal(signal.SIGTERM)
            time.sleep(0.3)
            os._exit(0)
        os.waitpid(child, 0)
        time.sleep(0.1)
        assert interruption.signal() == 0 and interruption._said_at is None


@pytest.mark.parametrize("saved", [None, 500])
@pytest.mark.parametrize("step", [500, 501, 523])
def test_what_a_second_signal_costs(saved, step, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    standing = Standing(RunState(1, step=step), ["--seed", "1"], writes=True, saved_step=saved)
    first, last = standing.first_words("Ctrl-C"), standing.last_words("Ctrl-C")
    cost = {500: "no finished step", 501: "the 1 step since checkpoint-500", 523: "the 23 steps since checkpoint-500"}
    cost = cost[step] if saved else f"the {step} steps so far, as there is no checkpoint yet"
    begin = "Ctrl-C: finishing this step, then writing a checkpoint"
    assert first == f"{begin}; a second Ctrl-C ends the run at once and loses {cost}"
    command = "; continue with:\n  python train.py --seed 1 --resume_from_checkpoint latest" if saved else ""
    assert last == f"Ctrl-C again: ended at once, and lost {cost}{command}"
    with standing.during(f"checkpoint-{step}"):
        assert standing.first_words("SIGHUP").startswith(f"SIGHUP: finishing checkpoint-{step}; a second SIGHUP")
    dry = Standing(RunState(1), [], writes=False)
    assert dry.first_words("SIGTERM") == "SIGTERM: finishing this step; a second SIGTERM ends this dry run at once"


def test_the_end_of_the_launcher_is_no_second_request(monkeypatch):
    """Ctrl-C kills it too, and Python may hear of that only after a long call into C."""
    monkeypatch.setattr(signals, "SAME_REQUEST", 0.0)
    for first in (signal.SIGINT, signals.ORPHANED):
        with Interruption(lambda number: number) as noted:
            signal.raise_signal(first)
            time.sleep(0.01)
            signal.raise_signal(signals.ORPHANED)
            assert noted.signal() == (signal.SIGINT if first == signal.SIGINT else signal.SIGTERM)


@pytest.mark.parametrize("how", ["stopped", "left alone"])
def test_a_reader_of_its_messages_that_goes_away_ends_no_run(run, tmp_path, how):
    """`2>&1 | tee log` and Ctrl-C, which ends tee first."""
    out = tmp_path / "out"
    words = ["--max_train_steps", "3000" if how == "stopped" else "100", "--checkpointing_steps", "20"]
    process = run.start(out, *words)
    wait_for([process], out / "checkpoint-20")
    process.stdout.close()
    if how == "stopped":
        process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) == (130 if how == "stopped" else 0)
    assert len(list(out.glob("checkpoint-*"))) >= (1 if how == "stopped" else 3)


def test_one_process_two_and_accumulation_agree(run, tmp_path):
    """Also where the last window of an epoch has an odd number of samples: eleven images in windows of four."""
    from tiny import write_images

    eleven = ["--train_data_dir", write_images(tmp_path / "eleven", 11), "--random_flip", "--caption_dropout", "0.3"]
    run(tmp_path / "one", *eleven)
    run(tmp_path / "accumulated", *eleven, "--train_batch_size", "2", "--gradient_accumulation_steps", "2")
    assert relative_difference(tmp_path / "accumulated", tmp_path / "one") < 1e-6

    two = [*eleven, "--train_batch_size", "2", "--checkpointing_steps", "4"]
    run.on_two_processes(tmp_path / "two", *two, "--validation_split", "0")
    assert relative_difference(tmp_path / "two", tmp_path / "one") < 1e-6

    shutil.copytree(tmp_path / "two" / "checkpoint-4", tmp_path / "continued" / "checkpoint-4")
    run(tmp_path / "continued", *eleven, "--resume_from_checkpoint", "latest")
    assert relative_difference(tmp_path / "continued", tmp_path / "one") < 1e-6


@pytest.mark.parametrize("sibling", EACH[1:])
def test_siblings_on_two_processes(request, tmp_path, sibling):
    run = request.getfixturevalue(sibling)
    flags = ["--max_train_steps", "4", *(["--train_text_encoder"] if sibling == "run_lora_sdxl" else [])]
    # the prior's key biases have no gradient but rounding, which Adam would scale up
    flags += ["--adam_epsilon", "1e-5"]
    run(tmp_path / "one", *flags)
    two = [*flags, "--train_batch_size", "1", "--gradient_accumulation_steps", "2"]
    run.on_two_processes(tmp_path / "two", *two)
    assert relative_difference(tmp_path / "two", tmp_path / "one") < 1e-5
