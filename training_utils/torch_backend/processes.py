"""The Accelerator of a run, and what its processes tell each other."""

import datetime
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
import torch.utils.checkpoint
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import DynamoBackend, ProjectConfiguration, broadcast_object_list, gather_object

from training_utils.base import environment
from training_utils.base.errors import UserError, reason_of
from training_utils.cli.options import MachineOptions
from training_utils.run import output_folder, trackers
from training_utils.run.progress import Progress
from training_utils.run.state import RunState
from training_utils.torch_backend import deepspeed, sharding

PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16}

Result = TypeVar("Result")


def make_accelerator(options: MachineOptions, **ddp: Any) -> Accelerator:
    """The Accelerator of a run. `ddp` are options of DistributedDataParallel.

    Raises UserError where the device cannot do the precision, or the launch does not go with `fused_backward`, steps
    during the backward pass.
    """
    logging_dir = os.path.join(options.output_dir, options.logging_dir)
    project = ProjectConfiguration(project_dir=options.output_dir, logging_dir=logging_dir)
    try:
        with deepspeed.hidden_from_accelerate():
            accelerator = Accelerator(
                gradient_accumulation_steps=options.accumulation,
                mixed_precision=options.mixed_precision,
                cpu=not torch.accelerator.is_available(),  # else two processes without a GPU would not see each other
                log_with=None if options.report_to == "none" else options.report_to,
                project_config=project,
                kwargs_handlers=[
                    InitProcessGroupKwargs(timeout=datetime.timedelta(seconds=options.process_group_timeout)),
                    DistributedDataParallelKwargs(**ddp),
                ],
            )
    except ValueError as error:
        if "mixed precision" in str(error):
            precision = options.mixed_precision
            raise UserError(f"--mixed_precision {precision} does not run on this device: {error}") from error
        raise
    if accelerator.distributed_type == "XLA":
        raise UserError(
            "torch_xla is installed, so accelerate takes this machine for a TPU, on which the scripts for PyTorch do "
            "not train; use train_text_to_image_flax.py there, or uninstall torch_xla"
        )
    sharding.configure_fsdp(accelerator, PRECISIONS.get(accelerator.mixed_precision))
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("--mixed_precision fp16 does not run on this device, a CPU; use bf16 or no")
    if options.fused_backward and accelerator.num_processes > 1:
        raise UserError(
            "--fused_backward_pass updates each weight before processes have exchanged their gradients; leave it out, "
            "or start one process"
        )
    if options.fused_backward and accelerator.scaler is not None:
        raise UserError("--fused_backward_pass frees gradients that fp16 would scale back first; use bf16 or no")
    if accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
        import torch._dynamo as dynamo

        # Each size of a batch is compiled by itself, and buckets have more than the eight that torch would compile.
        dynamo.config.recompile_limit = max(64, dynamo.config.recompile_limit)
    if options.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    return accelerator


def device_name(accelerator: Accelerator) -> str:
    """What a person calls the device of this process: the name of a GPU, else its kind, such as CPU."""
    device = accelerator.device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()


def memory_metrics(accelerator: Accelerator) -> dict[str, float]:
    """The memory that this process has in use, in GiB, as values to log: of a GPU the peak of what tensors took since
    the start, and what is reserved for them now; else the host's. Does not wait for the device."""
    if accelerator.device.type != "cuda":
        return environment.memory_metrics()
    stats = torch.cuda.memory_stats(accelerator.device)
    return {
        "memory_peak_gib": stats["allocated_bytes.all.peak"] / 2**30,
        "memory_reserved_gib": stats["reserved_bytes.all.current"] / 2**30,
    }


def frozen_dtype(accelerator: Accelerator) -> torch.dtype:
    """The type of the networks that are not trained: that of --mixed_precision, float32 without one."""
    return PRECISIONS.get(accelerator.mixed_precision, torch.float32)


def from_main(accelerator: Accelerator, make: Callable[[], Result]) -> Result:
    """What `make()` returns in the main process, on every process: a collective call, of a value that can be pickled.

    A UserError that it raises is raised on all of them.
    """
    result: Any = None
    if accelerator.is_main_process:
        try:
            result = make()
        except UserError as error:
            result = error
    if accelerator.num_processes > 1:
        result = broadcast_object_list([result])[0]
    if isinstance(result, UserError):
        result.everywhere = True
        raise result
    return result


def largest_of_processes(accelerator: Accelerator, timeout: float) -> Callable[[int], int]:
    """A function from a number to the largest that any process gave it. Both are collective calls.

    It has a process group of its own, on the CPU, so that asking never waits for a GPU. A call that not all processes
    have joined after `timeout` seconds raises torch's RuntimeError.
    """
    if accelerator.num_processes == 1:
        return lambda number: number
    import torch.distributed as dist

    group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout))

    def largest(number: int) -> int:
        value = torch.tensor([number])
        dist.all_reduce(value, dist.ReduceOp.MAX, group=group)
        return int(value)

    return largest


class TorchProcesses:
    """The processes of an Accelerator, as run.session.Processes has them. `timeout` in seconds."""

    def __init__(self, accelerator: Accelerator, timeout: float) -> None:
        self.accelerator = accelerator
        self.timeout = timeout
        self.is_main = accelerator.is_main_process
        self.world_size = accelerator.num_processes

    def from_main(self, make: Callable[[], Any]) -> Any:
        """What a function returns in the main process, on every process. A collective call."""
        return from_main(self.accelerator, make)

    def gather(self, items: list[Any]) -> list[Any]:
        """The lists of all processes, one after the other. A collective call."""
        return gather_object(items)

    def ask_for_largest(self) -> Callable[[int], int]:
        """A function from a number to the largest that any process gave it."""
        return largest_of_processes(self.accelerator, self.timeout)

    def end(self) -> None:
        """Close the trackers and let other runs have the output folder."""
        end_training(self.accelerator)


def start_trackers(accelerator: Accelerator, project: str, settings: dict[str, Any]) -> None:
    """Open the trackers of the run, which show the settings. Raises UserError that names them when one cannot be
    opened."""
    try:
        accelerator.init_trackers(project, settings)
    except Exception as error:  # each tracker's own: no account, no network, another version
        names = ", ".join(str(name) for name in accelerator.log_with)
        raise UserError(
            f"the tracker cannot be opened ({names}: {reason_of(error)}); --report_to none trains without one"
        ) from error


def start_progress(
    accelerator: Accelerator,
    report_not_finite: Callable[[int, float, RunState], None],
    state: RunState,
    total: int,
    logging_steps: int,
) -> Progress:
    """The Progress of a run of `total` steps, from a RunState on. `report_not_finite` is as Progress takes it."""
    return Progress(
        state,
        total,
        logging_steps,
        partial(fetch_mean, accelerator),
        partial(log_metrics, accelerator),
        report_not_finite,
        partial(memory_metrics, accelerator),
    )


def log_metrics(accelerator: Accelerator, values: Mapping[str, float], step: int) -> None:
    """Hand {name: number} of a step to the trackers."""
    trackers.log_values(accelerator.trackers, values, step)


def end_training(accelerator: Accelerator) -> None:
    """Close the trackers, let go of the output folder, and leave the process group as it is.

    Destroyed while DDP's reducer still refers to it, gloo's thread and the interpreter's lock can wait for each other
    for ever; `run.exit.run_main` ends the process without either.
    """
    trackers.finish_trackers(accelerator.trackers)
    output_folder.release()


def fetch_mean(accelerator: Accelerator, scalars: Sequence[torch.Tensor]) -> list[float]:
    """Scalar tensors, shape (), as numbers averaged over the processes: one wait for the device for all of them. A
    collective call."""
    return accelerator.reduce(torch.stack([scalar.detach().float() for scalar in scalars]), "mean").tolist()


def gather_in_order(accelerator: Accelerator, mine: Sequence[Any]) -> list[Any]:
    """What the processes made of their shares [rank::world_size] of some items, put together in the order of the
    items, on every process. A collective call."""
    pairs = [(at * accelerator.num_processes + accelerator.process_index, item) for at, item in enumerate(mine)]
    return [item for _, item in sorted(gather_object(pairs), key=lambda pair: pair[0])]
