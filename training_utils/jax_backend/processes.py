"""The hosts and devices of a JAX run, and what its processes tell each other."""

import os
import pickle
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from training_utils.base import environment
from training_utils.base.errors import UserError, reason_of
from training_utils.run import output_folder
from training_utils.run.trackers import finish_trackers

AXIS = "batch"  # the name of the axis over all devices of all hosts
ArrayTree = Any  # nested dicts and tuples with arrays as leaves: a pytree

# ---------------------------------------------------------------------------------------------------------------------
# Hosts
# ---------------------------------------------------------------------------------------------------------------------


def connect_hosts() -> None:
    """Join the other processes of this run, where its environment says that there are any.

    That is JAX_COORDINATOR_ADDRESS with JAX_NUM_PROCESSES and JAX_PROCESS_ID, a Slurm job of several tasks, or a TPU
    pod. It must come before anything else asks JAX for a device. Raises UserError.
    """
    # Else JAX would take SIGTERM, which `Interruption` handles.
    jax.config.update("jax_enable_preemption_service", False)
    options: dict[str, Any] = {"shutdown_timeout_seconds": 3600}  # the main process may upload for long
    try:
        if "JAX_COORDINATOR_ADDRESS" in os.environ and "JAX_PROCESS_ID" in os.environ:
            options["num_processes"] = _number_in_environment("JAX_NUM_PROCESSES")
            options["process_id"] = _number_in_environment("JAX_PROCESS_ID")
            jax.distributed.initialize(cluster_detection_method="deactivate", **options)
        elif _is_slurm_job_of_several() or _is_tpu_pod():
            jax.distributed.initialize(**options)
        elif find_spec("libtpu") is not None:
            # A TPU machine, which asks its cloud for the other hosts: JAX raises ValueError where there are none.
            with suppress(ValueError):
                jax.distributed.initialize(**options)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"the processes of this run cannot find each other: {reason_of(error)}") from error
    if jax.process_count() > 1:
        # The console and the exit code go by these variables, as in the torch scripts.
        os.environ["RANK"] = str(jax.process_index())
        os.environ["WORLD_SIZE"] = str(jax.process_count())


def _number_in_environment(name: str) -> int:
    """An environment variable as an int. Raises UserError."""
    value = os.environ.get(name)
    try:
        return int(value or "")
    except ValueError as error:
        found = "is missing" if value is None else f"is '{value}', not a whole number"
        raise UserError(f"the processes of this run cannot find each other: {name} {found}") from error


def _is_slurm_job_of_several() -> bool:
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1


def _is_tpu_pod() -> bool:
    return "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")


def is_main() -> bool:
    """Whether this is the process that writes files."""
    return jax.process_index() == 0


def from_main(make: Callable[[], Any]) -> Any:
    """`make()` as the main process evaluates it, on every process. A UserError in it is raised on all of them.

    The result must be something that pickle can hold.
    """
    result = None
    if is_main():
        try:
            result = make()
        except UserError as error:
            result = error
    if jax.process_count() > 1:
        packed = np.frombuffer(pickle.dumps(result), dtype=np.uint8)
        length = int(multihost_utils.broadcast_one_to_all(np.int32(len(packed))))
        if not is_main():
            packed = np.zeros(length, dtype=np.uint8)
        received = np.asarray(multihost_utils.broadcast_one_to_all(packed), dtype=np.uint8)
        result = pickle.loads(received.tobytes())
    if isinstance(result, UserError):
        result.everywhere = True
        raise result
    return result


def gather(items: list[Any]) -> list[Any]:
    """The lists of all processes, one after the other; a collective call. Items are what pickle can hold."""
    if jax.process_count() == 1:
        return items
    mine = np.frombuffer(pickle.dumps(items), dtype=np.uint8)
    longest = int(multihost_utils.process_allgather(np.int32(len(mine))).max())
    padded = np.pad(mine, (0, longest - len(mine)))
    received = multihost_utils.process_allgather(padded).reshape(-1, longest)
    return [item for packed in received for item in pickle.loads(packed.astype(np.uint8).tobytes())]


def any_process(failed: bool) -> bool:
    """Whether `failed` is true on any process; a collective call."""
    if jax.process_count() == 1:
        return failed
    return bool(np.any(multihost_utils.process_allgather(np.array(failed))))


def largest_of_processes(mesh: Mesh, lag: int = 2) -> Callable[[int], int]:
    """A function from an int to the largest that any process passed `lag` calls ago (0 until then).

    The number travels over the devices behind the steps that are under way. Reading one that has long arrived costs
    no waiting, and every process learns of it at the same step. A single process gets its own number at once.
    """
    if jax.process_count() == 1:
        return lambda number: number
    largest = map_over_devices(lambda number: jax.lax.pmax(number, AXIS), in_axes=(0,))
    under_way: deque[jax.Array] = deque()

    def ask(number: int) -> int:
        copies = np.full(mesh.size, number, dtype=np.int32)
        under_way.append(largest(split_over_devices(copies, mesh)))
        if len(under_way) <= lag:
            return 0
        return int(under_way.popleft())

    return ask


class JaxProcesses:
    """The processes of a run, joined, as run.session.Processes has them.

    Attributes: mesh, the devices of this host; world_size, the number of devices of all hosts, each a
    process of the batch plan; trackers, which the main process opens later.
    """

    def __init__(self) -> None:
        """Join the hosts; see `connect_hosts`."""
        connect_hosts()
        self.mesh = local_mesh()
        self.is_main = is_main()
        self.world_size = self.mesh.size * jax.process_count()
        self.trackers: list[Any] = []

    def from_main(self, make: Callable[[], Any]) -> Any:
        """What a function returns in the main process, on every process. A collective call."""
        return from_main(make)

    def gather(self, items: list[Any]) -> list[Any]:
        """The lists of all processes, one after the other. A collective call."""
        return gather(items)

    def ask_for_largest(self) -> Callable[[int], int]:
        """A function from a number to the largest that any process gave it, some calls later."""
        return largest_of_processes(self.mesh)

    def end(self) -> None:
        """Close the trackers, release the output folder, and leave the other processes, once all have come this far.

        A process that fails does not come here, and `run.exit` ends it at once: at this point it would wait in vain.
        """
        finish_trackers(self.trackers)
        output_folder.release()
        if jax.process_count() > 1:
            jax.distributed.shutdown()


# ---------------------------------------------------------------------------------------------------------------------
# Devices
# ---------------------------------------------------------------------------------------------------------------------


def local_mesh() -> Mesh:
    """The devices of this host."""
    return Mesh(np.array(jax.local_devices()), (AXIS,))


def map_over_devices(
    function: Callable[..., Any], in_axes: tuple, donate: tuple[int, ...] = (), independent: bool = False
) -> Callable[..., Any]:
    """`function` on every device of every host: arguments of in_axes 0 are split over the devices, those of None and
    the result are alike on all. This is the one place that knows how; `jax.lax.pmean(x, AXIS)` joins the devices.

    Where the devices compute `independent` results, these are split as well, and this host need not wait for others.
    The buffers of the arguments whose numbers are in `donate` are used for the result.
    """
    if independent:
        return jax.pmap(function, AXIS, in_axes=in_axes, devices=jax.local_devices())
    return jax.pmap(function, AXIS, in_axes=in_axes, out_axes=None, donate_argnums=donate)


def replicate(tree: ArrayTree, mesh: Mesh) -> ArrayTree:
    """A complete copy of the arrays on each device. The mesh's axis is named like pmap's, else a step would compile
    twice."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def split_over_devices(tree: ArrayTree, mesh: Mesh) -> ArrayTree:
    """Arrays whose first axis has the length of the mesh, one piece on each device."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec(AXIS)))


def on_first_device(tree: ArrayTree) -> ArrayTree:
    """Arrays on the first device: those that lie on every one are not copied, those in host memory are."""
    device = jax.local_devices()[0]

    def place(array: jax.Array | np.ndarray) -> jax.Array:
        if isinstance(array, jax.Array):
            return array.addressable_data(0)
        return jax.device_put(array, device)

    return jax.tree.map(place, tree)


def cast(tree: ArrayTree, dtype: Any) -> ArrayTree:
    """NumPy arrays in another type; those that have it already are not copied."""
    return jax.tree.map(lambda array: array.astype(dtype, copy=False), tree)


def check_precision(name: str) -> None:
    """Raise UserError where the devices do not compute in the `--mixed_precision` of this name."""
    if name == "fp16" and jax.default_backend() == "cpu":
        raise UserError("--mixed_precision fp16 does not run on this device, a CPU; use bf16 or no")


def cache_compiled_code(folder: str | Path) -> None:
    """Keep what is compiled in `folder`, for the next start."""
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def device_name() -> str:
    """What a person calls this host's devices."""
    devices = jax.local_devices()
    name = devices[0].device_kind
    if devices[0].platform == "cpu":
        name = name.upper()
    return name if len(devices) == 1 else f"{len(devices)} x {name}"


def peak_device_memory() -> int | None:
    """The most memory of the first device that was in use since the start, in bytes; None on a CPU, which does not
    count. Does not wait for the device."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    return statistics.get("peak_bytes_in_use")


def memory_metrics() -> dict[str, float]:
    """The memory in use, as values to log, in GiB: the peak of the first device or, on a CPU, what this process has.
    Does not wait for the device."""
    peak = peak_device_memory()
    return environment.memory_metrics() if peak is None else {"memory_peak_gib": peak / 2**30}


class StepQueue:
    """Lets the host run at most `ahead` steps in front of the devices.

    They always have work queued, so they never wait for the host; without a bound the batches of all queued steps
    would lie in their memory.
    """

    def __init__(self, ahead: int = 2) -> None:
        self.ahead = ahead
        self.under_way: deque[jax.Array] = deque()

    def add(self, result: jax.Array) -> None:
        """Add a step by one of its results; wait for the oldest one when the queue is full."""
        self.under_way.append(result)
        if len(self.under_way) > self.ahead:
            jax.block_until_ready(self.under_way.popleft())
