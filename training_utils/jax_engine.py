"""What the JAX script sets up: hosts and devices, models' folders, batches, optimizer, saved state, trackers.

Imports no torch. The mesh has one axis, "batch", over the devices of this host; an array is either whole on each of
them or split along its first axis. `jax.pmap` joins the hosts.
"""

import io
import itertools
import json
import logging
import math
import os
import pickle
import shutil
import time
import warnings
from collections import deque
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from flax_diffusion import FlaxStableDiffusionPipeline, ModelError, schedulers, weights
from flax_diffusion.pipeline import LATENTS, fetch

from . import cache, checkpoints, data, dry_run, hub, metrics
from .reporting import UserError, cut_short, reason_of, tell_trackers, warn

AXIS = "batch"
TYPES = {"no": jnp.float32, "bf16": jnp.bfloat16, "fp16": jnp.float16}
INDEX, STATE = "model_index.json", "optimizer.safetensors"


# ---------------------------------------------------------------------------------------------------------------------
# Hosts and devices
# ---------------------------------------------------------------------------------------------------------------------


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


def memory():
    """The memory in use, as values to log, in GiB: of the first device the peak since the start; on a CPU what this
    process has. Does not wait for the device."""
    seen = jax.local_devices()[0].memory_stats() or {}  # a CPU has none
    if "peak_bytes_in_use" not in seen:
        return metrics.resident()
    return {"memory_peak_gib": seen["peak_bytes_in_use"] / 2**30}


def device_name():
    """What a person calls this host's devices."""
    devices = jax.local_devices()
    name = devices[0].device_kind.upper() if devices[0].platform == "cpu" else devices[0].device_kind
    return name if len(devices) == 1 else f"{len(devices)} x {name}"


def over_devices(function, in_axes, donate=(), alone=False):
    """`function` on every device of every host: arguments of in_axes 0 are split over the devices, those of None and
    the result are alike on all. This is the one place that knows how; `jax.lax.pmean(x, AXIS)` joins the devices.

    Where each device computes `alone`, the result is split as well, and this host need not wait for any other.
    """
    if alone:
        return jax.pmap(function, AXIS, in_axes=in_axes, devices=jax.local_devices())
    return jax.pmap(function, AXIS, in_axes=in_axes, out_axes=None, donate_argnums=donate)


def on_every_device(tree, mesh):
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
    largest = over_devices(lambda number: jax.lax.pmax(number, AXIS), in_axes=(0,))
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


# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------


def model_folder(name, revision=None, variant=None, cache_dir=None, config=None):
    """The local folder of a base model, fetched from the hub where `name` is an id. Raises UserError.

    A model in one file is converted, as single_file.folder_of says, which takes `config`; by diffusers, with torch.
    """
    try:
        folder = (
            _converted(name, config, cache_dir) if os.path.isfile(name) else fetch(name, revision, variant, cache_dir)
        )
    except ModelError as error:
        reason = hub.not_found(name, error.__context__)
        raise UserError(f"base model {name} is neither a folder nor found on the hub: {reason}") from None
    hub.refuse_another_family(name, folder, "StableDiffusionPipeline")
    if variant is not None and not any(folder.glob(f"*/*.{variant}*")):
        raise UserError(f"base model {name} has no weights of --variant {variant}")
    return folder


def _converted(path, config, cache_dir):
    lacking = [name for name in ("torch", "diffusers") if find_spec(name) is None]
    if lacking:
        raise UserError(
            f"base model {path} is one file, which is converted by torch and diffusers: pip install -r "
            "requirements.txt, or name a folder in diffusers' layout"
        )
    from . import libraries, single_file

    libraries.prepare()
    from diffusers import StableDiffusionPipeline

    return single_file.folder_of(path, StableDiffusionPipeline, config, cache_dir)


def load_part(folder, part, dtype=jnp.float32, variant=None):
    """(module, parameters) of one part of a base model. Raises UserError that names the part when it cannot.

    A part that is not stored in this variant (`non_ema` exists for UNets alone) is read without it.
    """
    return _loaded(folder, part, lambda: weights.load_part(folder, part, dtype, variant))


def load_tokenizer(folder):
    """The tokenizer of a base model. Raises UserError."""
    logging.getLogger("transformers").addFilter(lambda record: "PyTorch was not found" not in record.getMessage())
    from transformers import CLIPTokenizer

    return _loaded(folder, "tokenizer", lambda: CLIPTokenizer.from_pretrained(Path(folder) / "tokenizer"))


def load_scheduler_config(folder):
    """The configuration of a base model's sampler, a dict; its `_class_name` is without Flax. Raises UserError."""
    config = _loaded(folder, "scheduler", lambda: schedulers.read_config(folder))
    return config | {"_class_name": config.get("_class_name", "DDPMScheduler").removeprefix("Flax")}


def _loaded(folder, part, load):
    if not (Path(folder) / part).is_dir():
        raise UserError(f"base model {folder} has no part '{part}'; there must be a folder of that name")
    try:
        return load()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"part '{part}' of base model {folder} cannot be loaded: {reason_of(error)}") from None


# Of diffusers' samplers these can begin at pure noise, where the signal-to-noise ratio is 0.
PURE_NOISE = {
    *("DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"),
    *("DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "LCMScheduler", "TCDScheduler"),
}


def sampling_scheduler(config, changes, steps=None):
    """The base model's own sampler with `changes` to its configuration, so that it samples what was trained.

    A sampler that cannot begin at pure noise (zero terminal SNR) is replaced by DDIM. Raises UserError where it cannot
    draw images in `steps` steps.
    """
    if changes.get("rescale_betas_zero_snr"):
        if config["_class_name"] not in PURE_NOISE:
            config = {key: value for key, value in config.items() if key != "skip_prk_steps"}
            # DDIM's default is for pixels: it would cut latents at 1
            changes = changes | {"_class_name": "DDIMScheduler", "clip_sample": False}
        changes = changes | {"timestep_spacing": "trailing"}  # sampling must begin at the noisy end (2305.08891, 3.3)
    try:
        with warnings.catch_warnings(record=True) as notices:
            warnings.simplefilter("always")
            sampler = schedulers.for_sampling(config | changes)
            if steps is not None:
                sampler.changed(**LATENTS).plan(steps)
    except ModelError as error:
        raise UserError(str(error)) from None
    for notice in notices if steps is not None else []:
        warn(str(notice.message))
    return sampler


def make_pipeline(base, variant, parts):
    """The pipeline of a base model's parts, a dict. Raises UserError where they do not fit together."""
    try:
        return FlaxStableDiffusionPipeline(**parts, source=base, variant=variant)
    except ModelError as error:
        raise UserError(f"base model {base} cannot be trained: {error}") from None


def save_pipeline(folder, pipeline, params):
    """Write a whole pipeline: frozen parts byte for byte as in the base model, what was trained anew.

    What the pipeline does not run, a safety checker and its image processor, is copied too where the base has it.
    """
    pipeline.save_pretrained(folder, params)
    index, base = json.loads((Path(folder) / INDEX).read_text()), pipeline.source
    for name, entry in json.loads((base / INDEX).read_text()).items():
        if index.get(name) == [None, None] and (base / name).is_dir() and not any((base / name).glob("*.msgpack")):
            shutil.copytree(base / name, Path(folder) / name, dirs_exist_ok=True)
            index[name] = entry
    index["requires_safety_checker"] = index["safety_checker"] != [None, None]
    (Path(folder) / INDEX).write_text(json.dumps(index, indent=2) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------------------------------


def _read_ahead(read, items, workers):
    """`read(item)` of each item, in order; with `workers` threads that stay two items each in front."""
    return data.read_ahead(read, items, workers) if workers else map(read, items)


def _narrow(batch):
    """A batch's integers in 32 bits, with which JAX computes."""
    return {name: value.astype(np.int32) if value.dtype == np.int64 else value for name, value in batch.items()}


def _reader(samples, batch_size):
    """A function from a list of at most `batch_size` keys to a batch of just that size, filled up with weight 0."""

    def read(keys):
        batch = data.collate([samples[key] for key in keys])
        if isinstance(batch, UserError):
            return batch
        skipped = batch.pop("skipped", [])
        lacking = batch_size - len(keys)
        batch = {name: np.concatenate([value, *[value[:1]] * lacking]) for name, value in batch.items()}
        batch["weight"][len(keys) :] = 0
        return _narrow(batch) | {"skipped": skipped}

    return read


def _stacked(batches, lead, rows):
    """Batches as one dict of arrays with the leading axes `lead`. Raises the UserError of an image that failed, and
    says which of the rows were skipped."""
    for batch in batches:
        if isinstance(batch, UserError):
            batch.everywhere = False  # the other processes have other images
            raise batch
        data.note_skipped(rows, batch.pop("skipped"))
    return {
        name: np.stack([batch[name] for batch in batches]).reshape(*lead, *value.shape)
        for name, value in batches[0].items()
    }


def training_batches(samples, updates, state, mesh, workers, keep=None):
    """The endless steps of this host from a RunState's position on: arrays (devices, accumulation, batch_size, ...).

    Each device is a process of data.BatchPlan. Every batch has the same shape, so a step compiles once; where an
    epoch's last step has fewer samples, it is filled up with samples of weight 0. Before an image that cannot be used ends
    a run of one process, `keep()` writes a checkpoint.
    """
    begun = state.step
    first = jax.process_index() * mesh.size
    ranks = [updates.batches(state.position, rank) for rank in range(first, first + mesh.size)]
    keys = (next(rank) for _ in itertools.count() for rank in ranks for _ in range(updates.accumulation))
    batches = _read_ahead(_reader(samples, updates.batch_size), keys, workers)
    while True:
        update = list(itertools.islice(batches, mesh.size * updates.accumulation))
        try:
            arrays = _stacked(update, (mesh.size, updates.accumulation), samples.rows)
        except UserError as error:
            if keep is None or jax.process_count() > 1 or state.step == begun:
                raise
            raise cut_short(error, keep) from None
        yield split_over_devices(arrays, mesh)


def validation_batches(samples, batch_size, mesh):
    """All validation samples once, as arrays (devices, 1, batch_size, ...), the same number of them on every host."""
    first, world = jax.process_index() * mesh.size, jax.process_count() * mesh.size
    read, none = _reader(samples, batch_size), [(0, 0, 0.0)]
    shares = [
        data.validation_batches(len(samples), batch_size, rank, world) for rank in range(first, first + mesh.size)
    ]
    for at in range(math.ceil(math.ceil(len(samples) / world) / batch_size)):
        batches = [read(share[at] if at < len(share) else none) for share in shares]
        yield split_over_devices(_stacked(batches, (mesh.size, 1), samples.rows), mesh)


# ---------------------------------------------------------------------------------------------------------------------
# The networks that are not trained: see frozen.py and cache.py
# ---------------------------------------------------------------------------------------------------------------------


def in_turn(params, inputs, turns, *, encode, network):
    """What a frozen network makes of `inputs`, arrays (micro-batches, B, ...), on one device: a dict of such arrays.

    `encode(network, batch)` gives it for arrays (B, ...), the network being a function with its parameters bound. It
    runs micro-batch by micro-batch, but on a CPU sample by sample: that is no slower, and a sample's bits then do not
    depend on its neighbours, as they would in a batch. What a cache holds is therefore exactly what a run without it
    computes. `turns`, how many samples there are, is an argument for that: XLA inlines a loop that it knows to turn
    once, and rounds otherwise there. (Elsewhere the host would have to wait for a loop of unknown length.)
    """
    apply = partial(network.apply, {"params": params})
    if jax.default_backend() != "cpu":
        return jax.lax.map(partial(encode, apply), inputs)
    lead = next(iter(inputs.values())).shape[:2]
    samples = jax.tree.map(lambda array: array.reshape(-1, 1, *array.shape[2:]), inputs)

    def one(turn):
        return encode(apply, jax.tree.map(lambda array: array[turn], samples))

    def put(turn, made):
        return jax.tree.map(lambda whole, part: whole.at[turn].set(part[0]), made, one(turn))

    like = jax.eval_shape(one, 0)
    made = jax.tree.map(lambda array: jnp.zeros((lead[0] * lead[1], *array.shape[1:]), array.dtype), like)
    made = jax.lax.fori_loop(0, turns, put, made)
    return jax.tree.map(lambda array: array.reshape(*lead, *array.shape[1:]), made)


class Encoder:
    """What a frozen network makes of batches, whose arrays are (devices, micro-batches, B, ...).

    `encode` is as in `in_turn`, `name` the array that the network takes. A call with its parameters and a batch, both
    on the devices, returns the batch with the outputs in that array's place.
    """

    def __init__(self, encode, network, name):
        self.network, self.name = network, name
        self.run = over_devices(partial(in_turn, encode=encode, network=network), (None, 0, None), alone=True)

    def __call__(self, params, batch):
        rest = dict(batch)
        inputs = rest.pop(self.name)
        return rest | self.run(params, {self.name: inputs}, np.int32(inputs.shape[1] * inputs.shape[2]))

    def digest(self, params):
        """SHA-256 of the network's configuration, type and parameters, numpy arrays."""
        words = [type(self.network).__name__, str(jnp.dtype(self.network.dtype))]
        arrays = ((name, np.ascontiguousarray(array)) for name, array in _named(params).items())
        parameters = ((name, array.dtype, array.shape, array.reshape(-1).view(np.uint8)) for name, array in arrays)
        return cache.digest(words, self.network.config, parameters)

    def over_arrays(self, params, size, mesh):
        """The same from and to host memory for at most `size` samples a device, as `cache.fill` takes it."""
        params = on_every_device(params, mesh)

        def encoded(batch):
            inputs = batch[self.name]
            filled = np.resize(inputs, (mesh.size, 1, size, *inputs.shape[1:]))  # with samples that stand there again
            made = jax.device_get(self(params, split_over_devices(_narrow({self.name: filled}), mesh)))
            return {
                name: (str(array.dtype), array.reshape(-1, *array.shape[3:])[: len(inputs)].astype(np.float32))
                for name, array in made.items()
            }

        return encoded


def _together(batch_size):
    """How many samples a device encodes at once while a cache is filled."""
    return 1 if jax.default_backend() == "cpu" else batch_size


def _team():
    return cache.team_of(jax.process_index(), gather, jax.default_backend() == "cpu")


def _store(root, kind, encoder, params, settings=None):
    if root is None:  # a dry run
        return None
    return cache.Store(root, kind, {"networks": ["jax", encoder.digest(params)], "settings": settings})


def cache_images(root, sets, batch_size, mesh, encoder, params, settings, crops=None):
    """Run a network that sees images once for every image of some data.Samples; `prepare.images` of each has the
    outputs then. A collective call.

    `params` are its parameters, numpy arrays, which lie on the devices only meanwhile; `settings` tell apart how
    images are shown to it; `crops` is how many are kept of each that is cropped at random, None where none is.
    Raises UserError.
    """
    size = _together(batch_size)
    store, encode = _store(root, "pictures", encoder, params, settings), encoder.over_arrays(params, size, mesh)
    cache.cache_images(store, sets, encode, _team(), size * mesh.size, crops or 1)


def cache_captions(root, sets, batch_size, mesh, encoder, params, empty):
    """Run the text encoder once for every caption of some data.Samples, and for the empty one where it is `empty` that
    is trained as well; `prepare.captions` of each has the outputs then. A collective call. Raises UserError."""
    size = _together(batch_size)
    store, encode = _store(root, "captions", encoder, params), encoder.over_arrays(params, size, mesh)
    cache.cache_captions(store, sets, encode, _team(), size * mesh.size, empty)


# ---------------------------------------------------------------------------------------------------------------------
# Optimizer: pieces of a step, pure functions
# ---------------------------------------------------------------------------------------------------------------------


def learning_rate_curve(name, peak, warmup, total, cycles=1, power=1.0):
    """A function from the number of steps made to the learning rate of the next one; floats on the host.

    The curves are those of `--lr_scheduler` in the torch scripts. The rate is handed to the step, which therefore
    need not be compiled again for another rate, warm-up or length.
    """
    lowest = 1e-7  # where the polynomial ends

    def curve(step):
        if name == "constant":
            return peak
        if step < warmup:
            return peak * step / warmup
        if name == "constant_with_warmup":
            return peak
        progress = min(1.0, (step - warmup) / max(1, total - warmup))
        if name == "linear":
            return peak * (1 - progress)
        if name == "cosine":
            return peak * 0.5 * (1 + math.cos(math.pi * progress))
        if name == "cosine_with_restarts":
            return 0.0 if progress == 1 else peak * 0.5 * (1 + math.cos(math.pi * ((cycles * progress) % 1)))
        return (peak - lowest) * (1 - progress) ** power + lowest

    return curve


def make_optimizer(betas, weight_decay, epsilon):
    """AdamW without its learning rate, by which the step multiplies: an optax.GradientTransformation."""
    return optax.chain(optax.scale_by_adam(*betas, eps=epsilon), optax.add_decayed_weights(weight_decay))


def new_state(params, optimizer, average=False, loss_scaling=False, hold=False):
    """The training state that a run begins with, numpy arrays: a dict of params, optimizer and, where they are asked
    for, average, loss_scale and held (whether a step was not finite)."""
    moments = jax.eval_shape(optimizer.init, params)  # Adam's are zero at first
    state = {"params": params, "optimizer": jax.tree.map(lambda like: np.zeros(like.shape, like.dtype), moments)}
    if average:
        state["average"] = new_average(params)
    if loss_scaling:
        state["loss_scale"] = new_loss_scale()
    if hold:
        state["held"] = np.bool_(False)
    return state


def accumulated(gradient_of, params, batch):
    """(loss, gradient), the mean of `gradient_of(params, micro_batch)` over the leading axis of `batch`."""
    count = batch["weight"].shape[0]
    if count == 1:
        return gradient_of(params, jax.tree.map(lambda array: array[0], batch))

    def add(so_far, micro_batch):
        return jax.tree.map(jnp.add, so_far, gradient_of(params, micro_batch)), None

    nothing = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
    total, _ = jax.lax.scan(add, nothing, batch)
    return jax.tree.map(lambda value: value / count, total)


def clip(gradients, most):
    """(gradients scaled down to norm `most` where theirs is larger, their norm); with the 1e-6 of torch's formula.

    0 means that they stay as they are.
    """
    norm = optax.tree.norm(gradients)
    scale = jnp.minimum(1.0, most / (norm + 1e-6)) if most else 1.0
    return jax.tree.map(lambda gradient: gradient * scale, gradients), norm


def new_average(params):
    """The start of an average of the weights."""
    return {"weights": params, "updates": np.int32(0)}


def move_average(average, params, decay):
    """An average of the weights after one more step; the decay is that of ema.EMAWeights."""
    earlier = average["updates"].astype(jnp.float32)  # diffusers counts the first step as 0
    # 1 - the decay, without cancellation
    weight = jnp.where(earlier == 0, 1.0, jnp.maximum(1 - decay, 9 / (10 + earlier)))

    def moved(shadow, value):  # from the nearer end, as torch's lerp: a weight of 1 gives the value itself
        way = value - shadow
        return jnp.where(weight < 0.5, shadow + weight * way, value - (1 - weight) * way)

    return {"weights": jax.tree.map(moved, average["weights"], params), "updates": average["updates"] + 1}


GROW_AFTER = 2000  # steps without an overflow, after which the loss scale is doubled; torch's GradScaler's number


def new_loss_scale():
    """The state of dynamic loss scaling: fp16 gradients are computed of the loss times `scale`."""
    return {"scale": np.float32(65536), "good": np.int32(0)}


def move_loss_scale(loss_scale, finite):
    """Halve the scale after an overflow, double it after many steps without one."""
    good = jnp.where(finite, loss_scale["good"] + 1, 0)
    grown = jnp.where(good == GROW_AFTER, 2.0, 1.0)
    scale = loss_scale["scale"] * jnp.where(finite, grown, 0.5)
    return {"scale": scale, "good": jnp.where(good == GROW_AFTER, 0, good)}


def where(condition, yes, no):
    """Tree `yes` where the scalar `condition` is true, else `no`."""
    return jax.tree.map(lambda one, other: jnp.where(condition, one, other), yes, no)


# ---------------------------------------------------------------------------------------------------------------------
# Saved state
# ---------------------------------------------------------------------------------------------------------------------


def _named(tree):
    """The leaves of a tree as {path: array}; the path's parts are joined by slashes."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def save_state(folder, trained, unet):
    """Write the weights, their average and the optimizer's state of a training state; the main process alone does.

    The files are unet/ and unet_ema/, model folders of diffusers, and optimizer.safetensors. `unet` is the module.
    """
    if not is_main():
        return
    config = dict(unet.config)
    if "average" in trained:
        average = jax.device_get(trained["average"])
        facts = {"optimization_step": int(average["updates"])}  # where diffusers' EMAModel keeps it
        weights.save_part(folder, "unet", average["weights"], config | facts, "unet_ema")
    weights.save_part(folder, "unet", jax.device_get(trained["params"]), config)
    rest = {key: value for key, value in trained.items() if key not in ("params", "average", "held")}
    save_file({name: np.array(leaf, order="C") for name, leaf in _named(jax.device_get(rest)).items()}, folder / STATE)


def load_state(folder, trained, unet):
    """What `save_state` wrote, in the shape of `trained`, a fresh training state. Raises UserError.

    Without an average in `folder` it begins at the weights.
    """
    folder = Path(folder)
    try:
        read = {"params": _read_weights(folder / "unet", unet)}
        if "held" in trained:
            read["held"] = trained["held"]
        if "average" in trained and (folder / "unet_ema").is_dir():
            updates = weights.read_config(folder / "unet_ema", "unet_ema")["optimization_step"]
            read["average"] = {"weights": _read_weights(folder / "unet_ema", unet), "updates": np.int32(updates)}
        elif "average" in trained:
            warn(f"{folder} holds no EMA weights; the average starts from its weights")
            read["average"] = new_average(read["params"])
        saved = load_file(folder / STATE)
        if "loss_scale" in trained and "loss_scale/scale" not in saved:
            raise UserError(f"{folder} was not trained with --mixed_precision fp16; resume it with what it had")
        rest = {key: value for key, value in trained.items() if key not in read}
        return read | jax.tree.unflatten(
            jax.tree.structure(rest), [_of(saved, *pair) for pair in _named(rest).items()]
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:  # another model's shapes, or other files
        raise UserError(f"{folder} cannot be read: {reason_of(error)}") from None


def _read_weights(folder, unet):
    files = weights.weight_files(folder, "unet")
    return weights.to_params(unet, weights.read_safetensors(files, folder.name))


def _of(saved, name, like):
    if name not in saved:
        raise ValueError(f"{STATE} holds no {name}")
    if saved[name].shape != like.shape or saved[name].dtype != like.dtype:
        raise ValueError(f"{name} in {STATE} has shape {saved[name].shape} instead of {like.shape}")
    return saved[name]


# ---------------------------------------------------------------------------------------------------------------------
# Trackers
# ---------------------------------------------------------------------------------------------------------------------


class TensorBoard:
    """Writes TensorBoard's files without torch or TensorFlow; the interface is that of accelerate's trackers."""

    name = "tensorboard"

    def __init__(self, folder, project, settings):
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self.folder, self.writer = Path(folder) / project, self
        self.events = EventFileWriter(str(self.folder))
        (self.folder / "settings.json").write_text(json.dumps(settings, indent=1) + "\n")

    def _add(self, step, **value):
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        summary = Summary(value=[Summary.Value(**value)])
        self.events.add_event(Event(wall_time=time.time(), step=step, summary=summary))

    def log(self, values, step):
        """Curves: {name: number} at a step."""
        for name, value in values.items():
            self._add(step, tag=name, simple_value=value)
        self.events.flush()

    def add_images(self, name, images, step, dataformats="NHWC"):
        """Images side by side, uint8 of shape (N, H, W, 3)."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        assert dataformats == "NHWC"
        sheet, file = Image.fromarray(np.concatenate(images, axis=1)), io.BytesIO()
        sheet.save(file, "PNG")
        image = Summary.Image(
            height=sheet.height, width=sheet.width, colorspace=3, encoded_image_string=file.getvalue()
        )
        self._add(step, tag=name, image=image)
        self.events.flush()

    def finish(self):
        self.events.close()


class WandB:
    """Logs to Weights & Biases; the interface is that of accelerate's trackers."""

    name = "wandb"

    def __init__(self, folder, project, settings):
        import wandb

        Path(folder).mkdir(parents=True, exist_ok=True)
        self.run = wandb.init(project=project, config=settings, dir=str(folder))

    def log(self, values, step):
        self.run.log(values, step=step)

    def finish(self):
        self.run.finish()


TRACKERS = {"tensorboard": TensorBoard, "wandb": WandB}


def make_trackers(report_to, folder, project, settings):
    """The trackers that `--report_to` names, of the main process; `all` means those that are installed. Raises
    UserError where one cannot be opened."""
    if not is_main() or report_to == "none":
        return []
    names = [name for name in TRACKERS if find_spec(name)] if report_to == "all" else [report_to]
    try:
        return [TRACKERS[name](folder, project, settings) for name in names]
    except Exception as error:  # no account, no network, another version
        names = ", ".join(names)
        raise UserError(
            f"the tracker cannot be opened ({names}: {reason_of(error)}); or give --report_to none"
        ) from None


def log(trackers, values, step):
    """Hand {name: number} of a step to every tracker."""
    tell_trackers(trackers, lambda tracker: tracker.log(values, step))


def say_skipped(skipped):
    """`data.say_skipped` for all hosts together; `skipped` is this one's set. A collective call."""
    data.say_skipped(set(gather(sorted(skipped))))


def finish(trackers):
    """Close the trackers, let go of the output folder, and part from the other processes, once all have come this far.

    A process that fails does not come here, and `reporting.run` ends it at once: at this point it would wait in vain.
    """
    tell_trackers(trackers, lambda tracker: tracker.finish())
    checkpoints.let_go()
    if jax.process_count() > 1:
        jax.distributed.shutdown()


# ---------------------------------------------------------------------------------------------------------------------
# Validation
# ---------------------------------------------------------------------------------------------------------------------


def validation_loss(evaluate, samples, batch_size, mesh):
    """Mean over all validation samples of the losses whose sum over a batch `evaluate(batch)` gives."""
    sums = [evaluate(batch) for batch in validation_batches(samples, batch_size, mesh)]
    return float(sum(jax.device_get(sums))) / len(samples)


def draw_images(pipeline, params, prompts, seed, latent_shape, **options):
    """One PIL image a prompt, drawn on the first device. `params` lie on the devices or, as numpy arrays, in host
    memory, which they visit the device from. `options` go to the pipeline's call.

    The noise of a prompt depends on the seed and its place alone and is drawn on the CPU, so that images of two
    steps, or of two machines, differ by the weights alone.
    """
    params, images = on_one_device(params), []
    for at, prompt in enumerate(prompts):
        noise = np.random.Generator(np.random.Philox(seed + at)).standard_normal((1, *latent_shape), dtype=np.float32)
        key = jax.random.key((seed + at) % 2**32)  # for samplers that add noise
        drawn = pipeline(pipeline.prepare_inputs(prompt), params, key, latents=noise, **options)
        images += pipeline.numpy_to_pil(drawn.images)
    return images


# ---------------------------------------------------------------------------------------------------------------------
# Dry runs
# ---------------------------------------------------------------------------------------------------------------------


def begin_dry_run(batches, samples):
    """The steps' batches for a dry run. Those of data.Samples that caches stand in for are made now: a run finds
    them on the disk."""
    return dry_run.ahead(batches, dry_run.STEPS) if samples.prepare.images or samples.prepare.captions else batches


def report_dry_run(plan, name, trained, frozen):
    """Print what a dry run has found. `plan` is what `dry_run.report` takes first, `name` the network that is trained,
    `trained` the training state, `frozen` the parameters of the other networks, which may lie in host memory."""
    modules = {}
    for module, tree in trained["params"].items():
        top, size = module.split(".")[0], sum(array.size for array in jax.tree.leaves(tree))
        modules[top] = (modules.get(top, (0, 0))[0] + size, 0)
    memory = {
        "weights that are trained": trained["params"],
        "their gradients": trained["params"],
        "state of the optimizer": trained["optimizer"],
        "moving average": trained.get("average"),
        "weights that are frozen": frozen,
    }
    memory = {
        what: sum(array.nbytes for array in jax.tree.leaves(tree) if isinstance(array, jax.Array))
        for what, tree in memory.items()
    }
    device = jax.local_devices()[0]
    seen = device.memory_stats() or {}  # a CPU has none
    name_of_device = device.device_kind if "peak_bytes_in_use" in seen else "this machine"
    peak = seen.get("peak_bytes_in_use", dry_run.resident_peak())
    dry_run.report(*plan, {name: modules}, name_of_device, memory, peak)
