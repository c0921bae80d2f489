"""What is wrong with the variables by which a launcher tells the processes of a run about each other.

Without all of them, processes would wait for each other for ever, or each would train by itself.
"""

import os

from training_utils.cli.scripts import Script

TORCH = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
JAX = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
# The variables from which JAX learns the rest by itself, under Slurm and on TPU pods.
CLUSTERS = ("SLURM_STEP_NUM_TASKS", "TPU_WORKER_HOSTNAMES")
START_AGAIN = "start the script with accelerate launch or torchrun"


def variables_problem(script: Script) -> str | None:
    """The first thing that is wrong with the launcher's variables, as a sentence, or None."""
    problem = _no_number("RANK", "LOCAL_RANK", "WORLD_SIZE")
    if problem is not None:
        return problem
    return _jax_problem() if script.backend == "jax" else _torch_problem()


def _value(name: str) -> str | None:
    """The value of a variable. A LOCAL_RANK of -1 says that there is none."""
    value = os.environ.get(name)
    return None if name == "LOCAL_RANK" and value == "-1" else value


def _number(name: str, default: int) -> int:
    return int(_value(name) or default)


def _no_number(*names: str) -> str | None:
    for name in names:
        value = _value(name)
        if value is not None and not value.isdecimal():
            return f"{name} is {value!r} in the environment, not a whole number; unset it, or use accelerate launch"
    return None


def _torch_problem() -> str | None:
    world_size = _number("WORLD_SIZE", 1)
    if world_size == 0:
        return "WORLD_SIZE is 0 in the environment, and a run has one process or more; unset it"
    if world_size == 1 and _value("LOCAL_RANK") is None:
        # A single process needs none of the others.
        if _value("RANK") is not None and _value("WORLD_SIZE") is None:
            return _incomplete("RANK", ["WORLD_SIZE"])
        return _no_number("LOCAL_WORLD_SIZE") or _contradiction(world_size)
    missing = [name for name in TORCH if _value(name) is None]
    if missing:
        told = f"WORLD_SIZE {world_size}" if _value("LOCAL_RANK") is None else "LOCAL_RANK"
        return _incomplete(told, missing)
    return _no_number("LOCAL_WORLD_SIZE", "MASTER_PORT") or _contradiction(world_size) or _no_port()


def _incomplete(told: str, missing: list[str]) -> str:
    return (
        f"{told} is set in the environment, as for one of several processes, but not {_listed(missing)}; start the "
        "script with accelerate launch or torchrun, which set them all, or unset them"
    )


def _contradiction(world_size: int) -> str | None:
    """A rank that its world does not have."""
    local_size = _number("LOCAL_WORLD_SIZE", world_size)
    bounds = {
        "RANK": ("WORLD_SIZE", world_size),
        "LOCAL_RANK": ("LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in os.environ else "WORLD_SIZE", local_size),
    }
    for name, (size_name, size) in bounds.items():
        if _number(name, 0) >= size:
            return (
                f"{name} {_number(name, 0)} in the environment does not go with {size_name} {size}, since ranks "
                f"count from 0; {START_AGAIN}"
            )
    if local_size > world_size:
        return f"LOCAL_WORLD_SIZE {local_size} in the environment is above WORLD_SIZE {world_size}; {START_AGAIN}"
    return None


def _no_port() -> str | None:
    port = _number("MASTER_PORT", 0)
    return None if 0 < port < 2**16 else f"MASTER_PORT {port} in the environment is not from 1 to 65535"


def _jax_problem() -> str | None:
    told = [name for name in JAX if name in os.environ]
    missing = [name for name in JAX if name not in os.environ]
    if not missing or any(name in os.environ for name in CLUSTERS):
        return None
    if told:
        are = "is" if len(told) == 1 else "are"
        return f"{_listed(told)} {are} set in the environment, but not {_listed(missing)}; set all three, or none"
    if _number("WORLD_SIZE", 1) > 1 or _number("RANK", 0) > 0:
        return (
            "RANK and WORLD_SIZE in the environment are for PyTorch; the JAX script uses all devices of a machine "
            "from one process: start it with python, and on several machines with JAX_COORDINATOR_ADDRESS"
        )
    return None


def _listed(names: list[str]) -> str:
    *more, last = names
    return f"{', '.join(more)} and {last}" if more else last
