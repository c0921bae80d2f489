"""What a launcher has told this process: its number, and of accelerate's, FSDP, DeepSpeed and torch.compile.

It is read from the environment and from DeepSpeed's own file, without any library.
"""

import json
import os
from typing import Any

# What launchers, MPI, JAX and Slurm call the number of a process, on its machine where there is such a number.
FIRST_HERE = ("LOCAL_RANK", "RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "JAX_PROCESS_ID", "SLURM_LOCALID")
ZERO_STAGE = "ACCELERATE_DEEPSPEED_ZERO_STAGE"
STAGE = "zero_optimization.stage"
# accelerate's variables, and what DeepSpeed's file calls the same.
NAMES = {
    ZERO_STAGE: STAGE,
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "zero_optimization.offload_optimizer.device",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "zero_optimization.offload_param.device",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "gradient_accumulation_steps",
    "ACCELERATE_GRADIENT_CLIPPING": "gradient_clipping",
}


def uses_fsdp() -> bool:
    """Whether this run was launched with --use_fsdp, or with a configuration that says so."""
    return is_on("ACCELERATE_USE_FSDP")


def uses_deepspeed() -> bool:
    """Whether this run was launched with --use_deepspeed, or with a configuration that says so."""
    return is_on("ACCELERATE_USE_DEEPSPEED")


def uses_sagemaker() -> bool:
    """Whether SageMaker's own library is to join the processes of this run."""
    return is_on("ACCELERATE_USE_SAGEMAKER") and os.environ.get("ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE") != "NO"


def is_first_here() -> bool:
    """Whether this is the first process of its machine, or the only one, as far as the launcher's variables say.

    For what is said before the processes have met.
    """
    for variable in FIRST_HERE:
        value = os.environ.get(variable, "")
        if value.isdecimal():
            return int(value) == 0
    return True


def is_on(variable: str) -> bool:
    """Whether a variable of the environment is true."""
    return os.environ.get(variable, "false").lower() == "true"


def dynamo_backend() -> str:
    """What compiles the network, in the words of --dynamo_backend; "no" where nothing does."""
    return os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()


def dynamo_mode() -> str:
    """How it is compiled, in the words of --dynamo_mode."""
    return os.environ.get("ACCELERATE_DYNAMO_MODE", "default")


def compiles_by_regions() -> bool:
    """Whether the network's repeated blocks are compiled one by one."""
    return dynamo_backend() != "no" and _dynamo_switch("regional_compilation")


def dynamo_words() -> list[str]:
    """The launcher's words that compile the network in the same way."""
    if dynamo_backend() == "no":
        return []
    words = ["--dynamo_backend", dynamo_backend()]
    if dynamo_mode() != "default":
        words += ["--dynamo_mode", dynamo_mode()]
    for switch in ("fullgraph", "dynamic", "regional_compilation"):
        if _dynamo_switch(switch):
            words.append(f"--dynamo_use_{switch}")
    return words


def _dynamo_switch(name: str) -> bool:
    return os.environ.get(f"ACCELERATE_DYNAMO_USE_{name.upper()}", "false").lower() in ("1", "true")


def deepspeed_file() -> str | None:
    """The path of DeepSpeed's own configuration file, or None."""
    return os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")


def deepspeed_settings() -> dict[str, Any]:
    """The settings of a run with DeepSpeed in the words of its file, {"zero_optimization.stage": 2, …}.

    Those that are "auto" or "none" are left out. Raises OSError or ValueError where the file cannot be read.
    """
    settings: dict[str, Any] = {STAGE: 2}  # accelerate's default
    path = deepspeed_file()
    if path is not None:
        with open(path) as file:
            content = json.load(file)
        if not isinstance(content, dict):
            raise ValueError("it is not a JSON object")
        settings |= _flat(content)
    for variable, name in NAMES.items():
        value = os.environ.get(variable, "none").lower()
        if value not in ("", "auto", "none"):
            settings[name] = json.loads(value) if value[0].isdigit() else value
    return settings


def deepspeed_words() -> list[str]:
    """The launcher's words, behind --use_deepspeed, that configure DeepSpeed in the same way."""
    words = []
    path = deepspeed_file()
    if path is not None:
        words += ["--deepspeed_config_file", path]
    if ZERO_STAGE in os.environ:
        words += ["--zero_stage", os.environ[ZERO_STAGE]]
    return words


def _flat(tree: dict[str, Any], path: str = "") -> dict[str, Any]:
    """A nested dict as {"outer.inner": value}, without what is left to accelerate."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{path}{name}.")
        elif value not in (None, "auto", "none"):
            found[path + name] = value
    return found
