"""What accelerate was told of FSDP, DeepSpeed and torch.compile: its variables and DeepSpeed's own file, read without
any library."""

import json
import os

ZERO_STAGE = "ACCELERATE_DEEPSPEED_ZERO_STAGE"
# accelerate's variables, and what DeepSpeed's file calls the same.
NAMES = {
    ZERO_STAGE: "zero_optimization.stage",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "zero_optimization.offload_optimizer.device",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "zero_optimization.offload_param.device",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "gradient_accumulation_steps",
    "ACCELERATE_GRADIENT_CLIPPING": "gradient_clipping",
}
STAGE = "zero_optimization.stage"


def uses_fsdp():
    """Whether this run was launched with --use_fsdp, or with a configuration that says so."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def uses_deepspeed():
    """Whether this run was launched with --use_deepspeed, or with a configuration that says so."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def dynamo_backend():
    """What compiles the network, in --dynamo_backend's words; "no" where nothing does."""
    return os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()


def compiles_by_regions():
    """Whether the network's repeated blocks are compiled one by one."""
    return dynamo_backend() != "no" and _dynamo_switch("regional_compilation")


def dynamo_words():
    """The words that say again how the network is compiled."""
    if dynamo_backend() == "no":
        return []
    words = ["--dynamo_backend", dynamo_backend()]
    mode = os.environ.get("ACCELERATE_DYNAMO_MODE", "default")
    words += ["--dynamo_mode", mode] if mode != "default" else []
    switches = ("fullgraph", "dynamic", "regional_compilation")
    return words + [f"--dynamo_use_{switch}" for switch in switches if _dynamo_switch(switch)]


def _dynamo_switch(name):
    return os.environ.get(f"ACCELERATE_DYNAMO_USE_{name.upper()}", "false").lower() in ("1", "true")


def deepspeed_file():
    """The path of DeepSpeed's own configuration file, or None."""
    return os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")


def deepspeed_settings():
    """The settings of a run with DeepSpeed in the words of its file, {"zero_optimization.stage": 2, …}, without those
    that are "auto" or "none". Raises OSError or ValueError where the file cannot be read."""
    settings = {STAGE: 2}  # accelerate's default
    if deepspeed_file() is not None:
        with open(deepspeed_file()) as file:
            content = json.load(file)
        if not isinstance(content, dict):
            raise ValueError("it is not a JSON object")
        settings |= _flat(content)
    for variable, name in NAMES.items():
        value = os.environ.get(variable, "none").lower()
        if value not in ("", "auto", "none"):
            settings[name] = json.loads(value) if value[0].isdigit() else value
    return settings


def deepspeed_words():
    """The words behind --use_deepspeed that say the same again."""
    told = {"--deepspeed_config_file": deepspeed_file(), "--zero_stage": os.environ.get(ZERO_STAGE)}
    return [word for flag, value in told.items() if value is not None for word in (flag, value)]


def _flat(tree, path=""):
    found = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{path}{name}.")
        elif value not in (None, "auto", "none"):
            found[path + name] = value
    return found
