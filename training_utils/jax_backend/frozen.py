"""The networks that are not trained: how they encode, and that they do it only once."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from training_utils.cache import captions, images
from training_utils.cache.processes import find_processes
from training_utils.cache.store import Store, network_digest
from training_utils.jax_backend import devices, loader, state


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
        self.run = devices.map_over_devices(
            partial(in_turn, encode=encode, network=network), (None, 0, None), alone=True
        )

    def __call__(self, params, batch):
        rest = dict(batch)
        inputs = rest.pop(self.name)
        return rest | self.run(params, {self.name: inputs}, np.int32(inputs.shape[1] * inputs.shape[2]))

    def digest(self, params):
        """SHA-256 of the network's configuration, type and parameters, numpy arrays."""
        words = [type(self.network).__name__, str(jnp.dtype(self.network.dtype))]
        arrays = ((name, np.ascontiguousarray(array)) for name, array in state.flat_names(params).items())
        parameters = ((name, array.dtype, array.shape, array.reshape(-1).view(np.uint8)) for name, array in arrays)
        return network_digest(words, self.network.config, parameters)

    def over_arrays(self, params, size, mesh):
        """The same from and to host memory for at most `size` samples a device, as `cache.fill` takes it."""
        params = devices.replicate(params, mesh)

        def encoded(batch):
            inputs = batch[self.name]
            filled = np.resize(inputs, (mesh.size, 1, size, *inputs.shape[1:]))  # with samples that stand there again
            made = jax.device_get(self(params, devices.split_over_devices(loader.narrow({self.name: filled}), mesh)))
            return {
                name: (str(array.dtype), array.reshape(-1, *array.shape[3:])[: len(inputs)].astype(np.float32))
                for name, array in made.items()
            }

        return encoded


def _together(batch_size):
    """How many samples a device encodes at once while a cache is filled."""
    return 1 if jax.default_backend() == "cpu" else batch_size


def _processes():
    on_cpu = jax.default_backend() == "cpu"
    return find_processes(rank=jax.process_index(), gather=devices.gather, on_cpu=on_cpu)


def _store(root, kind, encoder, params, settings=None):
    if root is None:  # a dry run
        return None
    return Store(root, kind, {"networks": ["jax", encoder.digest(params)], "settings": settings})


def cache_images(root, sets, batch_size, mesh, encoder, params, settings, crops=None):
    """Run a network that sees images once for every image of some data.Samples; `prepare.images` of each has the
    outputs then. A collective call.

    `params` are its parameters, numpy arrays, which lie on the devices only meanwhile; `settings` tell apart how
    images are shown to it; `crops` is how many are kept of each that is cropped at random, None where none is.
    Raises UserError.
    """
    size = _together(batch_size)
    store, encode = _store(root, "pictures", encoder, params, settings), encoder.over_arrays(params, size, mesh)
    images.cache_images(store, sets, encode, _processes(), size * mesh.size, crops or 1)


def cache_captions(root, sets, batch_size, mesh, encoder, params, empty):
    """Run the text encoder once for every caption of some data.Samples, and for the empty one where it is `empty` that
    is trained as well; `prepare.captions` of each has the outputs then. A collective call. Raises UserError."""
    size = _together(batch_size)
    store, encode = _store(root, "captions", encoder, params), encoder.over_arrays(params, size, mesh)
    captions.cache_captions(store, sets, encode, _processes(), size * mesh.size, empty)
