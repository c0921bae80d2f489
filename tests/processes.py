"""How tests start several processes, machines and engines, and what they ask of each of them."""

import json
import re
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from importlib import metadata

import pytest
from conftest import IMAGES, ROOT, free_port, logged, relative_difference

LONG = ["--max_train_steps", "9000", "--checkpointing_steps", "20", "--checkpoints_total_limit", "2"]

DEEPSPEED, NEEDS_DEEPSPEED = None, "deepspeed is not installed: pip install deepspeed==0.19.8"
with suppress(metadata.PackageNotFoundError):  # not by importing it, which libraries.prepare keeps from happening
    DEEPSPEED = metadata.version("deepspeed")

BYTES = """
import json, runpy, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, {root!r})
from training_utils.run import dry_run
dry_run.print_report = lambda memory, **_: print("memory", json.dumps(memory.parts))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def launcher(processes, *kind, port=None):
    """The words that start so many processes on this machine's CPU."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", *kind, "--quiet", "--mixed_precision", "no"]
    return [*launch, "--num_processes", str(processes), "--main_process_port", str(port or free_port())]


def machines(run, out, *flags, kind=("--multi_gpu",), folders=(None, None), **options):
    """Start a run on two machines with two processes each, as far as one machine can play two: each has a launcher of
    its own, and they meet over TCP. `folders` are where they are started."""
    port = free_port()
    both = [*kind, "--num_machines", "2", "--main_process_ip", "127.0.0.1"]
    return [
        subprocess.Popen(
            [
                *launcher(4, *both, "--machine_rank", str(number), port=port),
                str(ROOT / f"{run.script}.py"),
                *run.argv(out, "--train_batch_size", "1", *flags),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=folder or ROOT,
            **options,
        )
        for number, folder in enumerate(folders)
    ]


def ended(processes, code=0, timeout=300):
    """What each of some processes said before it ended with this exit code."""
    said = [process.communicate(timeout=timeout)[0] for process in processes]
    assert {process.returncode for process in processes} == {code}, "\n".join(said)
    return said


def continued(run, out, checkpoint, *flags, launch=None):
    """Continue a copy of a checkpoint in a folder of its own; in this process, without a launcher."""
    shutil.copytree(checkpoint, out / checkpoint.name)
    flags = [*flags, "--resume_from_checkpoint", "latest"]
    if launch is None:
        run(out, *flags)
    else:
        ended([run.start(out, *flags, launcher=launch)])


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def wait_for(processes, path):
    """Wait until there is a file or folder of this name, which may have stars, while the processes run."""
    for _ in range(12000):
        if any(path.parent.glob(path.name)):
            return
        for process in processes:
            assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    for process in processes:
        process.kill()
    raise AssertionError(f"no {path}")


def trains_as_one_process(run, tmp_path, own, launch):
    """Two processes with accumulation end in the weights of one, which continues what they have written."""
    flags = [*own, "--validation_split", "0.3", "--validation_steps", "3", *IMAGES, "--report_to", "tensorboard"]
    run(tmp_path / "one", *flags)
    two = [*flags, "--train_batch_size", "1", "--gradient_accumulation_steps", "2"]
    ended([run.start(tmp_path / "two", *two, "--checkpointing_steps", "3", launcher=launch)])
    assert relative_difference(tmp_path / "two", tmp_path / "one") < 1e-5
    assert logged(tmp_path / "two", "val_loss") == pytest.approx(logged(tmp_path / "one", "val_loss"), rel=1e-5)
    continued(run, tmp_path / "continued", tmp_path / "two" / "checkpoint-3", *flags)
    assert relative_difference(tmp_path / "continued", tmp_path / "one") < 1e-5


def bytes_held(run, tmp_path, launch):
    """The bytes that the first process of a launch holds of each kind, as a dry run counts them."""
    wrapper = tmp_path / "bytes.py"
    wrapper.write_text(BYTES.format(root=str(ROOT)))
    flags = ["--dry_run", "--use_ema", "--train_batch_size", "2"]
    (said,) = ended([run.start(tmp_path / "out", *flags, launcher=[*launch, str(wrapper)])])
    return json.loads(re.search(r"memory (\{.*\})", said)[1])
