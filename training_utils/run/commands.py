"""The command lines that continue a run."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from training_utils.base import launch
from training_utils.base.console import say
from training_utils.base.errors import UserError

RESUME = "--resume_from_checkpoint"


def resume_command(argv: Sequence[str]) -> str:
    """The command line that continues this run, ready to paste; `argv` without the script, without secrets."""
    words = []
    is_value = False  # of the flag that is replaced
    for word in argv:
        if not is_value and not word.startswith(RESUME):
            words.append(word)
        is_value = word == RESUME
    return shlex.join([*launcher_words(), sys.argv[0], *words, RESUME, "latest"])


def say_stopped(number: int, step: int, checkpoint: Path | None, argv: Sequence[str]) -> int:
    """Say how to continue a run that a signal, by its `number`, stopped after a step; `argv` as `resume_command`
    takes it. Returns the exit code. Raises UserError where the step has no `checkpoint`."""
    if checkpoint is None:
        raise UserError(f"stopped after step {step}, which could not be saved", exit_code=1)
    say(f"stopped after step {step}; continue with:\n  {resume_command(argv)}")
    return 128 + number


def launcher_words() -> list[str]:
    """The words that start this script the way it was started, as far as the environment tells."""
    if "ACCELERATE_MIXED_PRECISION" in os.environ:
        return _accelerate_words()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return _torchrun_words()
    return ["python"]


def _torchrun_words() -> list[str]:
    processes = os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1"))
    words = ["torchrun", "--nproc_per_node", processes]
    machines = os.environ.get("GROUP_WORLD_SIZE", "1")
    if machines != "1":
        words += ["--nnodes", machines]
        words += _flag_words(node_rank="GROUP_RANK", master_addr="MASTER_ADDR", master_port="MASTER_PORT")
    return words


def _accelerate_words() -> list[str]:
    processes = os.environ.get("WORLD_SIZE", "1")
    machines = os.environ.get("GROUP_WORLD_SIZE", "1")
    words = ["accelerate", "launch"]
    if processes != "1":
        words += _kind_words()
    # Without a number accelerate would take every GPU.
    words += ["--num_processes", processes]
    if machines != "1":
        # As on the first machine, which prints it.
        words += ["--num_machines", machines]
        if launch.uses_deepspeed():
            words += ["--deepspeed_multinode_launcher", "standard"]
        words += _flag_words(machine_rank="GROUP_RANK", main_process_ip="MASTER_ADDR", main_process_port="MASTER_PORT")
    return [*words, "--mixed_precision", os.environ["ACCELERATE_MIXED_PRECISION"], *launch.dynamo_words()]


def _kind_words() -> list[str]:
    """The words that say how accelerate's processes share the work."""
    if launch.uses_deepspeed():
        return ["--use_deepspeed", *launch.deepspeed_words()]
    if launch.uses_fsdp():
        return ["--use_fsdp", "--fsdp_version", os.environ.get("FSDP_VERSION", "1")]
    return ["--multi_gpu"]


def _flag_words(**variables: str) -> list[str]:
    """The words of flags whose values are in the environment, flag=variable."""
    words = []
    for flag, variable in variables.items():
        words += [f"--{flag}", os.environ.get(variable, "0")]
    return words
