"""The networks that are not trained: how they encode, where they are meanwhile, and that they do it only once.

See cache.py for what is kept and how it is found again.
"""

import ctypes
import gc
import sys
from contextlib import contextmanager, suppress
from functools import wraps

import torch
from accelerate.utils import gather_object

from training_utils.cache import captions, images
from training_utils.cache.processes import find_processes
from training_utils.cache.store import Store, network_digest

BESIDE = ("time_ids",)  # what `Prepare.show` tells of a view beside its pixels


def encoder(encode):
    """Decorator of an `encode(networks, batch)` that returns a dict of tensors with a leading batch axis.

    There is no gradient, unless a network is in training mode. On a CPU each sample is encoded by itself: that is no
    slower for images of the usual sizes, and a sample's bits then do not depend on its neighbours, as they would in
    a batch. What a cache holds is therefore exactly what a run without it computes.
    """

    @wraps(encode)
    def encoded(networks, batch):
        several = networks if isinstance(networks, (list, tuple)) else [networks]
        training = torch.is_grad_enabled() and any(network.training for network in several)
        first = next(iter(batch.values()))
        size = 1 if training or first.device.type != "cpu" else len(first)
        with torch.set_grad_enabled(training):
            parts = [batch]
            if size > 1:  # in memory of their own, whose alignment some kernels' rounding goes by
                parts = [{name: a[at : at + 1].clone() for name, a in batch.items()} for at in range(size)]
            parts = [encode(networks, part) for part in parts]
            return {name: torch.cat([part[name] for part in parts]).contiguous() for name in parts[0]}

    return encoded


def cast_for(network, tensor):
    """A tensor in the type of a network's weights. diffusers' `dtype` goes through all modules: milliseconds."""
    return tensor.to(next(network.parameters()).dtype)


@contextmanager
def temporarily_on(networks, device):
    """Within this context the networks are on the device, and after it where they were. None is skipped."""
    places = [(network, next(network.parameters()).device) for network in networks if network is not None]
    # To move a network that is there already takes milliseconds, and a cache asks for it with every batch.
    away = [(network, place) for network, place in places if place != torch.device(device)]
    for network, _ in away:
        network.to(device)
    try:
        yield
    finally:
        for network, place in away:
            network.to(place)


def place_frozen(network, device, cached, wanted_again):
    """A frozen network in the place where it spends the training: on the device, where each step runs it; in host
    memory, where its outputs are `cached` and only validation images want it again; else nowhere, as None."""
    if not cached:
        return network.to(device)
    return network.cpu() if wanted_again else None


def release_memory(networks):
    """Let other programs, and later allocations of other sizes, have the memory of those that were let go: None."""
    if None not in networks:
        return
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        with suppress(AttributeError):  # another C library than glibc
            ctypes.CDLL(None).malloc_trim(0)


def digest(network):
    """SHA-256 of a network's weights and configuration."""
    config = network.config if isinstance(network.config, dict) else network.config.to_dict()
    parameters = (
        (name, tensor.dtype, tensor.shape, tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        for name, tensor in network.state_dict().items()
    )
    return network_digest([type(network).__name__], config, parameters)


def _processes(accelerator):
    on_cpu = accelerator.device.type == "cpu"
    return find_processes(rank=accelerator.process_index, gather=gather_object, on_cpu=on_cpu)


def _identity(networks, device, settings=None):
    exactness = [device.type, torch.backends.cuda.matmul.allow_tf32]
    return {"networks": [digest(network) for network in networks], "settings": settings, "exactness": exactness}


def _over_arrays(networks, encode, device, beside=()):
    """`encode` from and to arrays, as `cache.fill` takes it, for which the networks visit the device; what stands
    `beside` their input goes with it."""

    @torch.no_grad()
    def encoded(batch):
        tensors = {name: torch.from_numpy(array).to(device) for name, array in batch.items()}
        with temporarily_on(networks, device):
            kept = encode(tensors) | {name: tensors[name] for name in beside if name in tensors}
        return {
            name: (str(tensor.dtype).removeprefix("torch."), tensor.float().cpu().numpy())
            for name, tensor in kept.items()
        }

    return encoded


def _store(root, kind, networks, device, settings=None):
    return None if root is None else Store(root, kind, _identity(networks, device, settings))


def cache_images(accelerator, root, sets, batch_size, networks, encode, settings, crops=None, blank=None):
    """Run the networks that see images once for every image of some data.Samples; `prepare.images` of each has
    the outputs then. A collective call.

    `encode(batch)` is what the networks make of a batch; `settings` tell apart how images are shown to them; `crops`
    is how many are kept of each that is cropped at random, None where none is; `blank` is a sample that stands for no
    image. Where `root` is None nothing is kept, and the networks run when they are asked. Raises UserError.
    """
    device = accelerator.device
    store = _store(root, "pictures", networks, device, settings)
    encode = _over_arrays(networks, encode, device, BESIDE)
    with temporarily_on(networks, device):
        images.cache_images(store, sets, encode, _processes(accelerator), batch_size, crops or 1, blank)


def cache_captions(accelerator, root, sets, batch_size, networks, encode, empty):
    """Run the text encoders once for every caption of some data.Samples, and for the empty one where it is `empty`
    that is trained as well; `prepare.captions` of each has the outputs then. A collective call. Where `root` is None
    nothing is kept, and the networks run when they are asked. Raises UserError."""
    device = accelerator.device
    store, encode = _store(root, "captions", networks, device), _over_arrays(networks, encode, device)
    with temporarily_on(networks, device):
        captions.cache_captions(store, sets, encode, _processes(accelerator), batch_size, empty)
