"""The networks that are not trained: how they encode, where they lie meanwhile, and that they do it only once.

The cache room says what is kept on disk and how it is found again.
"""

import ctypes
import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial, wraps
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from training_utils.cache import captions, images
from training_utils.cache.processes import Processes, find_processes
from training_utils.cache.store import Store, network_digest
from training_utils.cli.options import CacheOptions
from training_utils.data.samples import Samples

Batch = dict[str, torch.Tensor]
Networks = torch.nn.Module | Sequence[torch.nn.Module]

# What `SampleTransform.view` tells of a view beside its pixels: a cache keeps it with what the networks make of them.
KEPT_AS_IT_IS = ("time_ids",)


def encoder(encode: Callable[[Any, Batch], Batch]) -> Callable[[Any, Batch], Batch]:
    """Decorator of an `encode(networks, batch)` that returns a dict of tensors with a leading batch axis.

    There is no gradient, unless a network is in training mode. On a CPU each sample is encoded by itself: that is no
    slower for images of the usual sizes, and a sample's bits then do not depend on its neighbours, as they would in
    a batch. What a cache holds is therefore exactly what a run without it computes.
    """

    @wraps(encode)
    def encoded(networks: Any, batch: Batch) -> Batch:
        training = torch.is_grad_enabled() and any(network.training for network in _listed(networks))
        first = next(iter(batch.values()))
        one_by_one = first.device.type == "cpu" and not training and len(first) > 1
        with torch.set_grad_enabled(training):
            parts = [batch]
            if one_by_one:
                # In memory of their own, since some kernels' rounding goes by its alignment.
                parts = [{name: a[at : at + 1].clone() for name, a in batch.items()} for at in range(len(first))]
            outputs = [encode(networks, part) for part in parts]
            return {name: torch.cat([output[name] for output in outputs]).contiguous() for name in outputs[0]}

    return encoded


def _listed(networks: Any) -> list[torch.nn.Module]:
    return list(networks) if isinstance(networks, (list, tuple)) else [networks]


def cast_for(network: torch.nn.Module, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in the type of a network's weights. diffusers' `dtype` goes through all modules: milliseconds."""
    return tensor.to(next(network.parameters()).dtype)


@contextmanager
def temporarily_on(networks: Sequence[torch.nn.Module | None], device: Any) -> Iterator[None]:
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


def place_frozen(network: Any, device: Any, cached: bool, needed_again: bool) -> Any:
    """A frozen network in the place where it spends the training: on the device, where each step runs it; in host
    memory, where its outputs are `cached` and only validation images need it again; else nowhere, as None."""
    if not cached:
        return network.to(device)
    return network.cpu() if needed_again else None


def release_memory(networks: Sequence[Any]) -> None:
    """Let other programs, and later allocations of other sizes, have the memory of the networks that are None now."""
    if None not in networks:
        return
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        with suppress(AttributeError):  # another C library than glibc
            ctypes.CDLL(None).malloc_trim(0)


def digest(network: Any) -> str:
    """SHA-256 of a network's weights and configuration."""
    config = network.config if isinstance(network.config, dict) else network.config.to_dict()
    parameters = (
        (name, tensor.dtype, tensor.shape, tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        for name, tensor in network.state_dict().items()
    )
    return network_digest([type(network).__name__], config, parameters)


class FrozenEncoders:
    """Runs frozen networks on the samples: once for all of them into the cache, or at each step.

    `images` and `captions` are told the networks; called with a batch, it returns the batch with what the networks
    make of it, where no cache has put it there already.

    `sets` are the Samples that a cache is made for. In a dry run, which keeps nothing, the networks whose outputs
    would be cached run when a sample is made.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        sets: Sequence[Samples],
        batch_size: int,
        caches: CacheOptions,
    ) -> None:
        self.accelerator = accelerator
        self.sets = sets
        self.batch_size = batch_size
        self.caches = caches
        self.encode_images: Callable[[Batch], Batch] | None = None
        self.encode_captions: Callable[[Any, Batch], Batch] | None = None
        self.text_networks: Any = None

    def images(
        self,
        encode: Callable[[Any, Batch], Batch],
        networks: Any,
        *,
        cache_key: Sequence[Any],
        needed_again: bool | Sequence[bool],
        blank: dict[str, np.ndarray] | None = None,
    ) -> Any:
        """Have `encode(networks, batch)` run on the images. Returns the networks as `place_frozen` does.

        `cache_key` tells apart how images are shown to the networks; `blank` is a sample that stands for no image. A
        collective call. Raises UserError.
        """
        listed = _listed(networks)
        if self.caches.images:
            store = self._store("pictures", listed, cache_key)
            run = _over_arrays(listed, partial(encode, networks), self.accelerator.device, KEPT_AS_IT_IS)
            with temporarily_on(listed, self.accelerator.device):
                crops = self.caches.crops or 1
                images.cache_images(store, self.sets, run, self._processes(), self.batch_size, crops, blank)
        else:
            self.encode_images = partial(encode, networks)
        return self._placed(networks, self.caches.images, needed_again)

    def captions(
        self,
        encode: Callable[[Any, Batch], Batch],
        networks: Any,
        *,
        needed_again: bool,
        with_empty: bool,
    ) -> Any:
        """Have `encode(networks, batch)` run on the captions, and `with_empty` on the empty one. Returns the networks
        as `place_frozen` does. A collective call. Raises UserError."""
        listed = _listed(networks)
        if self.caches.captions:
            store = self._store("captions", listed)
            run = _over_arrays(listed, partial(encode, networks), self.accelerator.device)
            with temporarily_on(listed, self.accelerator.device):
                captions.cache_captions(store, self.sets, run, self._processes(), self.batch_size, with_empty)
        else:
            self.encode_captions = encode
            self.text_networks = networks
        return self._placed(networks, self.caches.captions, needed_again)

    def __call__(self, batch: Batch, text_networks: Any = None) -> Batch:
        """A batch with what the networks make of it. `text_networks` stand in for those of the captions: the same, as
        a training of them calls them."""
        encoded = dict(batch)
        if self.encode_images is not None:
            encoded |= self.encode_images(batch)
        if self.encode_captions is not None:
            encoded |= self.encode_captions(self.text_networks if text_networks is None else text_networks, batch)
        return encoded

    def _placed(self, networks: Any, cached: bool, needed_again: bool | Sequence[bool]) -> Any:
        device = self.accelerator.device
        if not isinstance(networks, (list, tuple)):
            return place_frozen(networks, device, cached, bool(needed_again))
        each = [needed_again] * len(networks) if isinstance(needed_again, bool) else needed_again
        return [place_frozen(network, device, cached, again) for network, again in zip(networks, each, strict=True)]

    def _processes(self) -> Processes:
        on_cpu = self.accelerator.device.type == "cpu"
        return find_processes(rank=self.accelerator.process_index, gather=gather_object, on_cpu=on_cpu)

    def _store(self, kind: str, networks: Sequence[Any], settings: Sequence[Any] | None = None) -> Store | None:
        if self.caches.folder is None:
            return None
        exactness = [self.accelerator.device.type, torch.backends.cuda.matmul.allow_tf32]
        digests = [digest(network) for network in networks]
        identity = {"networks": digests, "settings": settings, "exactness": exactness}
        return Store(self.caches.folder, kind, identity)


def _over_arrays(
    networks: Sequence[Any], encode: Callable[[Batch], Batch], device: Any, unchanged: Sequence[str] = ()
) -> Callable[[dict[str, np.ndarray]], dict[str, tuple[str, np.ndarray]]]:
    """`encode` from and to arrays, as the cache takes it, during which the networks are on the device; what stands in
    the batch under the names `unchanged` is kept with its output."""

    @torch.no_grad()
    def encode_arrays(batch: dict[str, np.ndarray]) -> dict[str, tuple[str, np.ndarray]]:
        tensors = {name: torch.from_numpy(array).to(device) for name, array in batch.items()}
        with temporarily_on(networks, device):
            kept = encode(tensors) | {name: tensors[name] for name in unchanged if name in tensors}
        return {
            name: (str(tensor.dtype).removeprefix("torch."), tensor.float().cpu().numpy())
            for name, tensor in kept.items()
        }

    return encode_arrays
