"""The networks that are not trained: how they encode, and that they do it only once."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from training_utils.cache import captions, images
from training_utils.cache.processes import Processes, find_processes
from training_utils.cache.store import Store, network_digest
from training_utils.cli.options import CacheOptions
from training_utils.data.samples import Samples
from training_utils.jax_backend import loader, processes, state
from training_utils.jax_backend.processes import ArrayTree

# encode(network, batch): the network is a function with its parameters bound, the batch a dict of arrays (B, ...).
Encode = Callable[..., dict[str, jax.Array]]


def encode_one_by_one(
    params: ArrayTree,
    inputs: dict[str, jax.Array],
    count: jax.Array | int,
    *,
    encode: Encode,
    network: Any,
) -> dict[str, jax.Array]:
    """What a frozen network makes of `inputs`, arrays (micro-batches, B, ...), on one device: a dict of such arrays.

    `encode(network, batch)` gives it for arrays (B, ...), the network being a function with its parameters bound. It
    runs micro-batch by micro-batch, but on a CPU sample by sample: that is no slower, and a sample's bits then do not
    depend on its neighbours, as they would in a batch. What a cache holds is therefore exactly what a run without it
    computes. `count`, the number of samples, is an argument for that: XLA inlines a loop that it knows to run once,
    and rounds otherwise there. (Elsewhere the host would have to wait for a loop of unknown length.)
    """
    apply = partial(network.apply, {"params": params})
    if jax.default_backend() != "cpu":
        return jax.lax.map(partial(encode, apply), inputs)
    lead = next(iter(inputs.values())).shape[:2]
    samples = jax.tree.map(lambda array: array.reshape(-1, 1, *array.shape[2:]), inputs)

    def encode_sample(number: jax.Array | int) -> dict[str, jax.Array]:
        return encode(apply, jax.tree.map(lambda array: array[number], samples))

    def put(number: jax.Array, made: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return jax.tree.map(lambda all_of, one: all_of.at[number].set(one[0]), made, encode_sample(number))

    like = jax.eval_shape(encode_sample, 0)
    made = jax.tree.map(lambda array: jnp.zeros((lead[0] * lead[1], *array.shape[1:]), array.dtype), like)
    made = jax.lax.fori_loop(0, count, put, made)
    return jax.tree.map(lambda array: array.reshape(*lead, *array.shape[1:]), made)


class Encoder:
    """What a frozen network makes of batches, whose arrays are (devices, micro-batches, B, ...).

    `encode` is as in `encode_one_by_one`, `name` the array that the network takes. A call with its parameters and a
    batch, both on the devices, returns the batch with the outputs in that array's place.
    """

    def __init__(self, encode: Encode, network: Any, name: str) -> None:
        self.network = network
        self.name = name
        self.run = processes.map_over_devices(
            partial(encode_one_by_one, encode=encode, network=network), (None, 0, None), independent=True
        )

    def __call__(self, params: ArrayTree, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        others = dict(batch)
        inputs = others.pop(self.name)
        count = np.int32(inputs.shape[1] * inputs.shape[2])
        return others | self.run(params, {self.name: inputs}, count)

    def digest(self, params: ArrayTree) -> str:
        """SHA-256 of the network's configuration, type and parameters, NumPy arrays."""
        words = [type(self.network).__name__, str(jnp.dtype(self.network.dtype))]
        arrays = ((name, np.ascontiguousarray(array)) for name, array in state.flat_names(params).items())
        parameters = ((name, array.dtype, array.shape, array.reshape(-1).view(np.uint8)) for name, array in arrays)
        return network_digest(words, self.network.config, parameters)

    def host_encoder(self, params: ArrayTree, size: int, mesh: Mesh) -> Callable[[dict[str, np.ndarray]], dict]:
        """A function that does the same from and to host memory for at most `size` samples a device, as `fill`
        takes it. It holds the parameters on the devices."""
        params = processes.replicate(params, mesh)

        def encode(batch: dict[str, np.ndarray]) -> dict[str, tuple[str, np.ndarray]]:
            inputs = batch[self.name]
            filled = np.resize(inputs, (mesh.size, 1, size, *inputs.shape[1:]))  # it repeats the samples
            on_devices = processes.split_over_devices(loader.to_32_bits({self.name: filled}), mesh)
            made = jax.device_get(self(params, on_devices))
            outputs = {}
            for name, array in made.items():
                flat = array.reshape(-1, *array.shape[3:])
                outputs[name] = (str(array.dtype), flat[: len(inputs)].astype(np.float32))
            return outputs

        return encode


class FrozenEncoders:
    """The frozen networks of a run. Their outputs come from a cache on disk, or the networks run at each step.

    `parameters` has those of each network by its part ("vae"): on the devices where each step runs it, else, as NumPy
    arrays, in host memory. A call with a batch returns it with what the networks make of it; caches have put it there
    already. In a dry run, which keeps nothing, networks whose outputs would be cached run when a sample is made.
    """

    def __init__(
        self,
        mesh: Mesh,
        sets: Sequence[Samples],
        batch_size: int,
        caches: CacheOptions,
    ) -> None:
        self.mesh = mesh
        self.sets = sets
        # On a CPU each sample is encoded by itself, see `encode_one_by_one`.
        self.batch_size = 1 if jax.default_backend() == "cpu" else batch_size
        self.caches = caches
        self.parameters: dict[str, ArrayTree] = {}
        self.each_step: list[Encoder] = []

    def images(self, encode: Encode, network: Any, params: ArrayTree, *, cache_key: list[Any]) -> None:
        """Run the network that sees images, once for every image, or from now on at each step.

        `params` are its parameters, NumPy arrays; `cache_key` tells apart in the cache how images are shown to it. A
        collective call. Raises UserError.
        """
        encoder = Encoder(encode, network, "pixels")
        if not self.caches.images:
            self._run_at_each_step(encoder, params)
            return
        self.parameters[network.part] = params
        store = self._store("pictures", encoder, params, cache_key)
        host_encode = encoder.host_encoder(params, self.batch_size, self.mesh)
        total_size = self.batch_size * self.mesh.size
        images.cache_images(store, self.sets, host_encode, self._processes(), total_size, self.caches.crops or 1)

    def captions(self, encode: Encode, network: Any, params: ArrayTree, *, with_empty: bool) -> None:
        """Run the text encoder, once for every caption, and for the empty one where that is trained as well
        (`with_empty`); or from now on at each step. A collective call. Raises UserError."""
        encoder = Encoder(encode, network, "tokens")
        if not self.caches.captions:
            self._run_at_each_step(encoder, params)
            return
        self.parameters[network.part] = params
        store = self._store("captions", encoder, params, None)
        host_encode = encoder.host_encoder(params, self.batch_size, self.mesh)
        total_size = self.batch_size * self.mesh.size
        captions.cache_captions(store, self.sets, host_encode, self._processes(), total_size, with_empty)

    def __call__(self, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        for encoder in self.each_step:
            batch = encoder(self.parameters[encoder.network.part], batch)
        return batch

    def _run_at_each_step(self, encoder: Encoder, params: ArrayTree) -> None:
        self.parameters[encoder.network.part] = processes.replicate(params, self.mesh)
        self.each_step.append(encoder)

    def _store(self, kind: str, encoder: Encoder, params: ArrayTree, settings: list[Any] | None) -> Store | None:
        if self.caches.folder is None:
            return None
        identity = {"networks": ["jax", encoder.digest(params)], "settings": settings}
        return Store(self.caches.folder, kind, identity)

    def _processes(self) -> Processes:
        on_cpu = jax.default_backend() == "cpu"
        return find_processes(rank=jax.process_index(), gather=processes.gather, on_cpu=on_cpu)
