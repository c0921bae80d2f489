"""Hosts and devices of a JAX run, and what they tell each other."""

import os
import pickle
from collections import deque
from contextlib import suppress
from importlib.util import find_spec

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from training_utils.base import environment as base_environment
from training_utils.base.errors import UserError, reason_of

AXIS = "batch"


def connect_hosts():
    """Join the other processes of this run, where its environment says that there are any.

    That is JAX_COORDINATOR_ADDRESS with JAX_NUM_PROCESSES and JAX_PROCESS_ID, a Slurm job of several tasks, or a TPU
    pod. It must come before anything else asks JAX for a device. Raises UserError.
    """
    environment, options = os.environ, {"shutdown_timeout_seconds": 3600}  # the first process may upload for long
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM, which `Interruption` handles
    pod = "," in environment.get("TPU_WORKER_HOSTNAMES", "")
    try:
        if "JAX_COORDINATOR_ADDRESS" in environment and "JAX_PROCESS_ID" in environment:
            options |= {key: int(environment[f"JAX_{key.upper()}"]) for key in ("num_processes", "process_id")}
            jax.distributed.initialize(cluster_detection_method="deactivate", **options)
        elif int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1 or pod:
            jax.distributed.initialize(**options)
        elif find_spec("libtpu") is not None:  # a TPU machine, which asks its cloud for the other hosts
            with suppress(ValueError):  # none, or not in a cloud
                jax.distributed.initialize(**options)
    except (KeyError, ValueError, RuntimeError) as error:
        raise UserError(f"the processes of this run do not find each other: {reason_of(error)}") from None
    if jax.process_count() > 1:  # what `reporting` goes by
        environment["RANK"], environment["WORLD_SIZE"] = str(jax.process_index()), str(jax.process_count())


def is_main():
    """Whether this is the process that writes files."""
    return jax.process_index() == 0


def local_mesh():
    """The devices of this host."""
    return Mesh(np.array(jax.local_devices()), (AXIS,))


def keep_compiled(folder):
    """Keep what is compiled in `folder`, for the next start."""
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def check_precision(name):
    """Raise UserError where the devices do not compute in the `--mixed_precision` of this name."""
    if name == "fp16" and jax.default_backend() == "cpu":
        raise UserError("--mixed_precision fp16 does not run on this device, a CPU; bf16 and no do")


def memory_metrics():
    """The memory in use, as values to log, in GiB: of the first device the peak since the start; on a CPU what this
    process has. Does not wait for the device."""
    seen = jax.local_devices()[0].memory_stats() or {}  # a CPU has none
    if "peak_bytes_in_use" not in seen:
        return base_environment.memory_metrics()
    return {"memory_peak_gib": seen["peak_bytes_in_use"] / 2**30}


def device_name():
    """What a person calls this host's devices."""
    devices = jax.local_devices()
    name = devices[0].device_kind.upper() if devices[0].platform == "cpu" else devices[0].device_kind
    return name if len(devices) == 1 else f"{len(devices)} x {name}"


def map_over_devices(function, in_axes, donate=(), alone=False):
    """`function` on every device of every host: arguments of in_axes 0 are split over the devices, those of None and
    the result are alike on all. This is the one place that knows how; `jax.lax.pmean(x, AXIS)` joins the devices.

    Where each device computes `alone`, the result is split as well, and this host need not wait for any other.
    """
    if alone:
        return jax.pmap(function, AXIS, in_axes=in_axes, devices=jax.local_devices())
    return jax.pmap(function, AXIS, in_axes=in_axes, out_axes=None, donate_argnums=donate)


def replicate(tree, mesh):
    """The arrays of `tree` whole on each device. Named like pmap's axis, else a step would compile twice."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def cast(tree, dtype):
    """The numpy arrays of `tree` in another type; those that have it already are not copied."""
    return jax.tree.map(lambda array: array.astype(dtype, copy=False), tree)


def split_over_devices(tree, mesh):
    """The arrays of `tree`, whose first axis has the length of the mesh, one piece on each device."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec(AXIS)))


def on_one_device(tree):
    """Arrays on the first device: those that lie on every one are not copied, those in host memory are."""
    device = jax.local_devices()[0]
    return jax.tree.map(
        lambda array: array.addressable_data(0) if isinstance(array, jax.Array) else jax.device_put(array, device),
        tree,
    )


def from_main(make):
    """`make()` as the main process evaluates it, on every process. A UserError in it is raised on all of them."""
    result = None
    if is_main():
        try:
            result = make()
        except UserError as error:
            result = error
    if jax.process_count() > 1:
        packed = np.frombuffer(pickle.dumps(result), dtype=np.uint8)
        length = int(multihost_utils.broadcast_one_to_all(np.int32(len(packed))))
        packed = packed if is_main() else np.zeros(length, dtype=np.uint8)
        result = pickle.loads(np.asarray(multihost_utils.broadcast_one_to_all(packed), dtype=np.uint8).tobytes())
    if isinstance(result, UserError):
        result.everywhere = True
        raise result
    return result


def gather(items):
    """The lists of all processes, one after the other; a collective call. Items are what pickle can hold."""
    if jax.process_count() == 1:
        return items
    mine = np.frombuffer(pickle.dumps(items), dtype=np.uint8)
    longest = int(multihost_utils.process_allgather(np.int32(len(mine))).max())
    shares = multihost_utils.process_allgather(np.pad(mine, (0, longest - len(mine)))).reshape(-1, longest)
    return [item for share in shares for item in pickle.loads(share.astype(np.uint8).tobytes())]


def any_process(failed):
    """Whether `failed` is true on any process; waits for all of them."""
    if jax.process_count() == 1:
        return failed
    return bool(np.any(multihost_utils.process_allgather(np.array(failed))))


def largest_of_processes(mesh, lag=2):
    """A function from an int to the largest that any process passed `lag` calls ago (0 until then).

    The number travels over the devices behind the steps that are under way. Looking at one that has long arrived
    costs no waiting, and every process learns of it at the same step. One process alone gets its own at once.
    """
    if jax.process_count() == 1:
        return lambda number: number
    largest = map_over_devices(lambda number: jax.lax.pmax(number, AXIS), in_axes=(0,))
    under_way = deque()

    def ask(number):
        under_way.append(largest(split_over_devices(np.full(mesh.size, number, dtype=np.int32), mesh)))
        return int(under_way.popleft()) if len(under_way) > lag else 0

    return ask


class Pace:
    """Lets the host run at most `ahead` steps in front of the devices.

    They always have work queued, so they never wait for the host; without a bound the batches of all queued steps
    would lie in their memory.
    """

    def __init__(self, ahead=2):
        self.ahead, self.under_way = ahead, deque()

    def __call__(self, result):
        self.under_way.append(result)
        if len(self.under_way) > self.ahead:
            jax.block_until_ready(self.under_way.popleft())
