"""Runs of the JAX script in the tests: as a process of its own, or in this one with every step compiled once."""

import functools
from contextlib import contextmanager

import flax
import jax
from conftest import Runner
from flax_tiny import COMPILED

from training_utils.jax_backend import optimizers, processes


class FlaxRunner(Runner):
    """As Runner. What is compiled is kept from one test session to the next."""

    def argv(self, out, *more):
        return super().argv(out, "--compilation_cache_dir", COMPILED, *more)

    def __call__(self, out, *more):
        import train_text_to_image_flax

        return train_text_to_image_flax.main(self.argv(out, *more))


class CompiledOnce:
    """Stands in for `processes.map_over_devices`: what was mapped with the same settings before is used again, since
    tracing takes longer than these runs. `traced` counts how often each was traced."""

    def __init__(self):
        self.real, self.mapped, self.traced = processes.map_over_devices, {}, {}

    def __call__(self, function, in_axes, **options):
        if not isinstance(function, functools.partial):
            return self.real(function, in_axes, **options)
        key = (
            function.func.__qualname__,
            *(f"{name}={_setting_text(value)}" for name, value in function.keywords.items()),
        )

        def counted(*arguments):
            at = (key, str(jax.tree.structure(arguments[0])), str(arguments[1]))  # the state's parts, the batch
            self.traced[at] = self.traced.get(at, 0) + 1
            return function(*arguments)

        if key not in self.mapped:
            self.mapped[key] = self.real(counted, in_axes, **options)
        return self.mapped[key]


def _setting_text(value):
    """A setting as text that is the same whenever it means the same; a noise schedule by its configuration."""
    return repr(value if isinstance(value, flax.linen.Module) else getattr(value, "config", value))


_compiled, _make_optimizer = CompiledOnce(), optimizers.make_optimizer
_one_optimizer = functools.cache(_make_optimizer)


@contextmanager
def compiled_once():
    """Within this context all runs of this process share what they compile; yields the CompiledOnce."""
    processes.map_over_devices, optimizers.make_optimizer = _compiled, _one_optimizer
    try:
        yield _compiled
    finally:
        processes.map_over_devices, optimizers.make_optimizer = _compiled.real, _make_optimizer
