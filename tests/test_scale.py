"""Several processes, machines and engines train the same weights, and leave the same files behind."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from conftest import IMAGES, ROOT, VALIDATION, free_port, logged, relative_difference, result_bytes
from processes import (
    DEEPSPEED,
    LONG,
    NEEDS_DEEPSPEED,
    bytes_held,
    continued,
    ended,
    files,
    launcher,
    machines,
    trains_as_one_process,
    wait_for,
)

from training_utils.base.errors import UserError
from training_utils.run import checkpoints, commands, resume
from training_utils.run.resume import FoundCheckpoint

FSDP = ["--use_fsdp", "--fsdp_version", "2"]


# ---------------------------------------------------------------------------------------------------------------------
# Weights that are shared out
# ---------------------------------------------------------------------------------------------------------------------


def test_shared_weights_equal_full_ones_and_their_checkpoint_is_the_same(run, one_process, tmp_path):
    """Two processes share three validation images and three prompts unequally, and neither waits for ever."""
    shared = tmp_path / "shared"
    flags = [*VALIDATION, "--train_batch_size", "2", "--checkpointing_steps", "3"]
    prompts = [*IMAGES, "--validation_prompts", "one", "two", "three"]
    ended([run.start(shared, *flags, *prompts, launcher=launcher(2, *FSDP))])
    assert relative_difference(shared, one_process) < 1e-6
    for name in ("train_loss", "val_loss", "grad_norm"):
        assert logged(shared, name) == pytest.approx(logged(one_process, name), rel=1e-5)
    assert {name for name in files(shared) if "logs" not in name} == {
        name for name in files(one_process) if "logs" not in name
    }
    for name in ("unet", "unet_ema", "../unet"):
        config = f"checkpoint-3/{name}/config.json"
        assert (shared / config).read_bytes() == (one_process / config).read_bytes()
    continued(run, tmp_path / "one", shared / "checkpoint-3", *VALIDATION)
    assert relative_difference(tmp_path / "one", one_process) < 1e-6


@pytest.mark.slow
def test_shared_weights_are_continued_by_any_number_of_processes(run, one_process, tmp_path):
    """To the bit by as many; and what one process wrote is continued shared out."""
    two = [*VALIDATION, "--train_batch_size", "2"]
    ended([run.start(tmp_path / "two", *two, "--checkpointing_steps", "3", launcher=launcher(2, *FSDP))])
    checkpoint = tmp_path / "two" / "checkpoint-3"
    continued(run, tmp_path / "again", checkpoint, *two, launch=launcher(2, *FSDP))
    assert result_bytes(tmp_path / "again") == result_bytes(tmp_path / "two")
    four = [*VALIDATION, "--train_batch_size", "1"]
    continued(run, tmp_path / "four", checkpoint, *four, launch=launcher(4, *FSDP))
    continued(run, tmp_path / "complete", checkpoint, *two, launch=launcher(2, "--multi_gpu"))
    continued(run, tmp_path / "from one", one_process / "checkpoint-3", *two, launch=launcher(2, *FSDP))
    for name in ("four", "complete", "from one"):
        assert relative_difference(tmp_path / name, one_process) < 1e-6, name


ENGINES = {
    "run": ["--gradient_checkpointing", "--dream_training", "--max_grad_norm", "0", "--use_ema", "--offload_ema"],
    "run_sdxl": ["--gradient_checkpointing", "--use_ema", "--validation_prompt", "one", "--train_batch_size", "4"],
    "run_prior": ["--gradient_checkpointing", "--use_ema", "--validation_prompts", "one", "--adam_epsilon", "1e-5"],
    "run_decoder": ["--gradient_checkpointing", "--use_ema", "--validation_prompts", "one", "--snr_gamma", "5"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ENGINES)
def test_every_full_fine_tune_shares_its_weights_out(request, tmp_path, name):
    run = request.getfixturevalue(name)
    trains_as_one_process(run, tmp_path, ENGINES[name], launcher(2, *FSDP))


@pytest.mark.slow
def test_each_process_holds_its_share_alone(run, tmp_path):
    """Of weights, gradients, the optimizer's state and the average, as a dry run counts them."""
    full, shared = (bytes_held(run, tmp_path, launch) for launch in ([sys.executable], launcher(2, *FSDP)))
    for name in full.keys() - {"weights that are frozen"}:
        assert 0.5 * full[name] <= shared[name] <= 0.6 * full[name], name
    assert full["weights that are frozen"] == shared["weights that are frozen"]


REFUSED = {
    "adapters": "too few weights",
    "FSDP_VERSION": "--fsdp_version 2",
    "FSDP_OFFLOAD_PARAMS": "fsdp_offload_params",
    "FSDP_RESHARD_AFTER_FORWARD": "fsdp_reshard_after_forward",
    "FSDP_ACTIVATION_CHECKPOINTING": "--gradient_checkpointing",
    "ACCELERATE_DYNAMO_BACKEND": "without --dynamo_backend",
    "ACCELERATE_MIXED_PRECISION": "not in fp16",
    "--mixed_precision fp16": "not in fp16",
    "--optimizer adafactor": "--optimizer adamw alone",
    "--use_8bit_adam": "--optimizer adamw alone",
    "--full_bf16": "--full_bf16 updates weights one by one",
    "--fused_backward_pass --max_grad_norm 0": "--fused_backward_pass updates weights one by one",
}
VALUES = {
    "FSDP_VERSION": "1",
    "FSDP_RESHARD_AFTER_FORWARD": "false",
    "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR",
    "ACCELERATE_MIXED_PRECISION": "fp16",
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_go_with_shared_weights_is_refused(run, run_lora, tmp_path, capsys, monkeypatch, what):
    for name, value in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}.items():
        monkeypatch.setenv(name, value)
    if what.isupper():
        monkeypatch.setenv(what, VALUES.get(what, "true"))
    if "8bit" in what:
        pytest.importorskip("bitsandbytes")
    runner = run_lora if what == "adapters" else run
    with pytest.raises(SystemExit) as left:
        runner(tmp_path / "out", *(what.split() if "--" in what else []))
    assert left.value.code == 2 and REFUSED[what] in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


FULL_DISK = """
import os, runpy, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, {root!r})
from diffusers import UNet2DConditionModel
def full(*_, **options):
    raise OSError(28, "No space left on device")
UNet2DConditionModel.save_pretrained = full
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_a_full_disk_leaves_no_process_waiting(run, tmp_path):
    wrapper = tmp_path / "full.py"
    wrapper.write_text(FULL_DISK.format(root=str(ROOT)))
    flags = ["--train_batch_size", "2", "--checkpointing_steps", "3", "--use_ema"]
    process = run.start(tmp_path / "out", *flags, launcher=[*launcher(2, *FSDP), str(wrapper)])
    (said,) = ended([process], code=1, timeout=120)
    assert "checkpoint-3 could not be written" in said and "the result could not be written" in said, said
    assert checkpoints.list_checkpoints(tmp_path / "out") == []


@pytest.mark.slow
def test_a_step_that_is_not_finite_reaches_no_share(run, tmp_path):
    """One process' loss is poisoned; the run stops in the state before, or leaves this step out, as without FSDP."""
    from test_faults import POISONED

    wrapper = tmp_path / "poisoned.py"
    wrapper.write_text(POISONED.format(root=str(ROOT)))
    flags = ["--train_batch_size", "2", "--use_ema"]
    (said,) = ended([run.start(tmp_path / "stopped", *flags, launcher=[*launcher(2, *FSDP), str(wrapper)])], code=1)
    assert said.count("step 4 is not finite") == 1, said
    assert [folder.name for folder in checkpoints.list_checkpoints(tmp_path / "stopped")] == ["checkpoint-3"]
    for name, kind in {"shared": FSDP, "complete": ["--multi_gpu"]}.items():
        launch = [*launcher(2, *kind), str(wrapper)]
        (said,) = ended([run.start(tmp_path / name, *flags, "--on_nan", "skip", launcher=launch)])
        assert "step 4 is not finite" in said and "left out" in said
    assert relative_difference(tmp_path / "shared", tmp_path / "complete") < 1e-6
    run(tmp_path / "stopped", "--use_ema", "--resume_from_checkpoint", "latest")
    run(tmp_path / "healthy", "--use_ema")
    assert relative_difference(tmp_path / "stopped", tmp_path / "healthy") < 1e-6


# ---------------------------------------------------------------------------------------------------------------------
# Several machines
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", [("--multi_gpu",), tuple(FSDP)], ids=["complete", "shared"])
def test_two_machines_equal_one_process(run, one_process, tmp_path, kind):
    out, flags = tmp_path / "out", [*VALIDATION, "--checkpointing_steps", "3"]
    prompts = [*IMAGES, "--validation_prompts", "one", "two", "three"]
    first, second = ended(machines(run, out, *flags, *prompts, kind=kind))
    assert "trained to step 6" in first and "trained to step 6" not in second
    assert relative_difference(out, one_process) < 1e-6
    assert logged(out) == pytest.approx(logged(one_process), rel=1e-5)
    continued(run, tmp_path / "one", out / "checkpoint-3", *VALIDATION)
    two = [*VALIDATION, "--train_batch_size", "2"]
    continued(run, tmp_path / "two", out / "checkpoint-3", *two, launch=launcher(2, "--multi_gpu"))
    shutil.copytree(one_process / "checkpoint-3", tmp_path / "four" / "checkpoint-3")
    ended(machines(run, tmp_path / "four", *VALIDATION, "--resume_from_checkpoint", "latest", kind=kind))
    for name in ("one", "two", "four"):
        assert relative_difference(tmp_path / name, one_process) < 1e-6, name


@pytest.mark.slow
def test_machines_that_share_no_disk(run, one_process, tmp_path):
    """The first one writes everything; what a run resumes from must lie on both."""
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    shutil.copytree(one_process / "checkpoint-3", folders[0] / "out" / "checkpoint-3")
    flags = [*VALIDATION, "--resume_from_checkpoint", "latest"]
    said = ended(machines(run, "out", *flags, folders=folders), code=1, timeout=120)
    assert "".join(said).count("out/checkpoint-3 is missing, or another one, on") == 1, said
    assert list(folders[1].iterdir()) == []
    shutil.copytree(folders[0] / "out", folders[1] / "out")
    ended(machines(run, "out", *flags, "--checkpointing_steps", "6", folders=folders))
    assert relative_difference(folders[0] / "out", one_process) < 1e-6
    assert (folders[0] / "out" / "checkpoint-6").is_dir()
    assert os.listdir(folders[1] / "out") == ["checkpoint-3"]


def test_machines_without_the_checkpoint_are_named(one_process, tmp_path):
    other = tmp_path / "checkpoint-3"
    shutil.copytree(one_process / "checkpoint-6", other)
    one = (True, checkpoints.read_manifest(one_process / "checkpoint-3")["sha256"])
    found = {
        "one": one,
        "two": one,
        "three": (False, None),
        "four": (True, checkpoints.read_manifest(other)["sha256"]),
    }

    with pytest.raises(UserError, match="is missing, or another one, on four, three;") as caught:
        resume.require_everywhere(
            one_process / "checkpoint-3", lambda _: [(host, FoundCheckpoint(*what)) for host, what in found.items()]
        )
    assert caught.value.everywhere and caught.value.exit_code == 2
    resume.require_everywhere(one_process / "checkpoint-3", lambda mine: 2 * mine)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [("--multi_gpu",), tuple(FSDP)], ids=["complete", "shared"])
def test_a_machine_that_dies_leaves_no_other_waiting(run, tmp_path, kind):
    processes = machines(run, tmp_path, *LONG, kind=kind, start_new_session=True)
    wait_for(processes, tmp_path / "checkpoint-20")
    for folder in Path("/proc").glob("[0-9]*"):  # the launcher last, which would say what it sees
        with_machine = (b"GROUP_RANK=1", str(tmp_path).encode())
        try:
            told = (folder / "environ").read_bytes().split(b"\0"), (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if with_machine[0] in told[0] and with_machine[1] in told[1]:
            os.kill(int(folder.name), signal.SIGKILL)
    os.killpg(processes[1].pid, signal.SIGKILL)
    began = time.monotonic()
    said = processes[0].communicate(timeout=90)[0]
    processes[1].communicate(timeout=90)
    assert processes[0].returncode not in (0, None) and time.monotonic() - began < 60, said
    assert "lost another process of this run" in said or "stopped after step" in said, said
    assert resume.find_checkpoint(tmp_path, "latest") is not None


@pytest.mark.slow
@pytest.mark.parametrize("kind", [("--multi_gpu",), tuple(FSDP)], ids=["complete", "shared"])
def test_a_signal_to_one_machine_stops_both_in_order(run, tmp_path, kind):
    processes = machines(run, tmp_path, *LONG, kind=kind)
    wait_for(processes, tmp_path / "checkpoint-20")
    processes[1].send_signal(signal.SIGTERM)
    said = [process.communicate(timeout=90)[0] for process in processes]
    stopped_after = int(re.search(r"stopped after step (\d+)", said[0])[1])
    assert checkpoints.damage_of(tmp_path / f"checkpoint-{stopped_after}") is None
    command = next(line.strip() for line in said[0].splitlines() if line.strip().startswith("accelerate launch"))
    words = f"{' '.join(kind)} --num_processes 4 --num_machines 2 --machine_rank 0 --main_process_ip 127.0.0.1"
    assert words in command, command
    last = str(stopped_after + 3)
    resumed = ["--max_train_steps", last, "--checkpointing_steps", "0", "--resume_from_checkpoint", "latest"]
    ended(machines(run, tmp_path, *resumed, kind=kind))


def test_a_command_names_its_engine_and_machines(monkeypatch):
    environment = {
        **{"ACCELERATE_MIXED_PRECISION": "bf16", "WORLD_SIZE": "8", "GROUP_WORLD_SIZE": "2", "GROUP_RANK": "0"},
        **{"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["train_text_to_image.py"])
    command = commands.resume_command(["--seed", "1"])
    assert command == (
        "accelerate launch --use_fsdp --fsdp_version 2 --num_processes 8 --num_machines 2 --machine_rank 0 "
        "--main_process_ip 10.0.0.1 --main_process_port 29500 --mixed_precision bf16 train_text_to_image.py --seed 1 "
        "--resume_from_checkpoint latest"
    )
    for name in ("GROUP_WORLD_SIZE", "ACCELERATE_USE_FSDP"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("WORLD_SIZE", "1")  # without a number accelerate would start one process for each GPU
    assert commands.resume_command([]).startswith("accelerate launch --num_processes 1 --mixed_precision bf16 train")


def test_a_command_of_torchrun_names_each_machines_processes(monkeypatch):
    environment = {
        **{"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8", "GROUP_WORLD_SIZE": "2", "GROUP_RANK": "0"},
        **{"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "none"},
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["train_text_to_image.py"])
    assert commands.resume_command([]) == (
        "torchrun --nproc_per_node 8 --nnodes 2 --node_rank 0 --master_addr 10.0.0.1 --master_port 29500 "
        "train_text_to_image.py --resume_from_checkpoint latest"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Examples
# ---------------------------------------------------------------------------------------------------------------------

CONFIGS = sorted((ROOT / "examples").glob("*.yaml"))
PROCESSES = {"one_gpu": 1, "several_gpus": 4, "two_machines": 8, "fsdp2": 4, "zero2": 4}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_examples_are_what_accelerate_reads(path):
    config = load_config_from_file(str(path))
    assert isinstance(config, ClusterConfig) and config.num_processes == PROCESSES[path.stem]
    assert config.num_machines == (2 if path.stem == "two_machines" else 1)
    assert config.fsdp_config.get("fsdp_version") == (2 if path.stem == "fsdp2" else None)
    assert config.deepspeed_config.get("zero_stage") == (2 if path.stem == "zero2" else None)


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_examples_launch(run, one_process, tmp_path, path):
    """Two processes in place of theirs, and the address of this machine."""
    if path.stem == "zero2" and not DEEPSPEED:
        pytest.skip(NEEDS_DEEPSPEED)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(path), "--quiet"]
    launch += ["--mixed_precision", "no"]
    count = 1 if path.stem == "one_gpu" else 2
    launch += ["--num_processes", str(count), "--main_process_port", str(free_port())]
    flags = [*VALIDATION, "--train_batch_size", str(4 // count)]
    if path.stem == "two_machines":
        launch += ["--main_process_ip", "127.0.0.1"]
        ended([run.start(tmp_path, *flags, launcher=[*launch, "--machine_rank", str(rank)]) for rank in range(2)])
    else:
        ended([run.start(tmp_path, *flags, launcher=launch)])
    assert relative_difference(tmp_path, one_process) < 1e-6


SRUN = """#!{python}
import os, signal, subprocess, sys
words = [word for word in sys.argv[1:]]
assert words.pop(0) == "--kill-on-bad-exit=1"
nodes = int(os.environ["SLURM_JOB_NUM_NODES"])
tasks = [
    subprocess.Popen(words, env=os.environ | {{"SLURM_NODEID": str(node)}}, start_new_session=True)
    for node in range(nodes)
]
with open(os.environ["TASKS"], "w") as file:
    file.write(" ".join(str(task.pid) for task in tasks))
codes = [task.wait() for task in tasks]
sys.exit(max(128 - code if code < 0 else code for code in codes))
"""
SCANCEL = """#!/bin/bash
[[ "$*" == "--signal=TERM 4711" ]] || exit 1
for task in $(cat "$TASKS"); do kill -TERM -- -"$task"; done
"""
SCONTROL = """#!/bin/bash
case "$1" in
show) echo 127.0.0.1 ;;
requeue) echo "$2" >> "$REQUEUED" ;;
esac
"""


@pytest.mark.slow
@pytest.mark.parametrize("what", ["two machines", "shared weights", "one process", "jax"])
def test_a_slurm_job_that_is_preempted_goes_on(request, tmp_path, what):
    """On two machines with two processes each, with stand-ins for Slurm's programs; continued as the queue does, by
    the same script once more."""
    run = request.getfixturevalue("run")
    if what == "jax":
        from flax_runs import FlaxRunner

        run = FlaxRunner("train_text_to_image_flax", run.base, run.images)
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in {"srun": SRUN.format(python=sys.executable), "scancel": SCANCEL, "scontrol": SCONTROL}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    one = what == "one process"
    environment = os.environ | {
        **{"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "1" if one else "2"},
        **{"SLURM_GPUS_ON_NODE": "1" if one else "2", "PRECISION": "no", "TASKS": str(tmp_path / "tasks")},
        **{"REQUEUED": str(tmp_path / "requeued"), "PATH": f"{programs}:{Path(sys.executable).parent}:/usr/bin:/bin"},
    }
    if what == "shared weights":
        text = (ROOT / "examples/fsdp2.yaml").read_text().replace("bf16", "'no'")
        (tmp_path / "fsdp2.yaml").write_text(text)
        environment["ACCELERATE_CONFIG"] = str(tmp_path / "fsdp2.yaml")
    size = {"one process": "4", "jax": "2"}.get(what, "1")
    flags = [*LONG[2:], "--train_batch_size", size, "--checkpointing_steps", "20", "--max_train_steps", "60"]
    script = str(ROOT / f"{run.script}.py")

    def job(out, *more):
        return subprocess.Popen(
            ["bash", str(ROOT / "examples/slurm.sh"), script, *run.argv(out, *flags, *more)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env=environment,
        )

    ended([job(tmp_path / "complete")])
    assert not (tmp_path / "requeued").exists()
    out = tmp_path / "out"
    first = job(out)
    wait_for([first], out / "checkpoint-20")
    first.send_signal(signal.SIGTERM)
    said = first.communicate(timeout=120)[0]
    assert first.returncode != 0 and (tmp_path / "requeued").read_text() == "4711\n", said
    stopped_after = int(re.search(r"stopped after step (\d+)", said)[1])
    assert 20 <= stopped_after < 60 and checkpoints.damage_of(out / f"checkpoint-{stopped_after}") is None
    (said,) = ended([job(out)])
    assert f"resuming from {out}/checkpoint-{stopped_after}" in said
    if what == "two machines":
        # After its first step DDP sorts gradients into other buckets, in which four are added in another order.
        assert relative_difference(out, tmp_path / "complete") < 1e-5
    else:
        assert result_bytes(out) == result_bytes(tmp_path / "complete")


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_the_slurm_script_is_clean():
    subprocess.run(["shellcheck", str(ROOT / "examples/slurm.sh")], check=True)
