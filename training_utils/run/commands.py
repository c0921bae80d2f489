"""The command lines that continue a run."""

import os
import shlex
import sys

from training_utils.base import launch
from training_utils.base.console import say
from training_utils.base.errors import UserError


def resume_command(argv):
    """The command line that continues this run, ready to paste; `argv` without the script, without secrets."""
    kept, skip = [], False
    for word in argv:
        if not skip and not word.startswith("--resume_from_checkpoint"):
            kept.append(word)
        skip = word == "--resume_from_checkpoint"
    return shlex.join([*launcher_words(), sys.argv[0], *kept, "--resume_from_checkpoint", "latest"])


def say_stopped(number, step, checkpoint, argv):
    """Say how to continue a run that a signal, by its `number`, stopped after a step; `argv` as `resume_command`
    takes it. Returns the exit code. Raises UserError where the step has no `checkpoint`."""
    if checkpoint is None:
        raise UserError(f"stopped after step {step}, which could not be saved", exit_code=1)
    say(f"stopped after step {step}; continue with:\n  {resume_command(argv)}")
    return 128 + number


def launcher_words():
    """The words that start this script the way it was started, as far as the environment tells."""
    processes, precision = os.environ.get("WORLD_SIZE", "1"), os.environ.get("ACCELERATE_MIXED_PRECISION")
    machines = os.environ.get("GROUP_WORLD_SIZE", "1")
    if precision is None and "TORCHELASTIC_RUN_ID" not in os.environ:
        return ["python"]
    if precision is None:
        names = {"node_rank": "GROUP_RANK", "master_addr": "MASTER_ADDR", "master_port": "MASTER_PORT"}
        here = ["torchrun", "--nproc_per_node", os.environ.get("LOCAL_WORLD_SIZE", processes)]
        return [*here, "--nnodes", machines, *_told(names)] if machines != "1" else here
    kind = ["--multi_gpu"]
    if launch.uses_fsdp():
        kind = ["--use_fsdp", "--fsdp_version", os.environ.get("FSDP_VERSION", "1")]
    if launch.uses_deepspeed():
        kind = ["--use_deepspeed", *launch.deepspeed_words()]
    several = [*(kind if processes != "1" else []), "--num_processes", processes]  # else it would take every GPU
    if machines != "1":  # as on the first one, which prints it
        names = {"machine_rank": "GROUP_RANK", "main_process_ip": "MASTER_ADDR", "main_process_port": "MASTER_PORT"}
        several += ["--num_machines", machines]
        several += ["--deepspeed_multinode_launcher", "standard"] if launch.uses_deepspeed() else []
        several += _told(names)
    return ["accelerate", "launch", *several, "--mixed_precision", precision, *launch.dynamo_words()]


def _told(names):
    """The words of flags whose values the environment has, {flag: variable}."""
    return [word for flag, name in names.items() for word in (f"--{flag}", os.environ.get(name, "0"))]
