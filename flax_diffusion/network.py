"""What the three networks share.

A submodule is named by its parameters' path in the safetensors file ("down_blocks.0.resnets.1"; a linen name may hold
dots), so a parameter tree flattened with dots has the very keys of the file except for the last word: linen says
kernel, scale and embedding where the file says weight. `tensor_names.py` converts, without a table of names.

Inputs and outputs are NCHW, as in torch; inside it is NHWC, which convolutions in JAX prefer. `dtype` is the type of
the computation; softmax, the statistics of norms and the timestep embedding are float32 in any case, and parameters
may have any type (they are read as float32). Products of float32 matrices are as exact as
`jax_default_matmul_precision` says, which on TPUs and GPUs is less than float32 unless one asks for it. No network
needs a random key: dropout is not supported.
"""

import functools
from collections.abc import Mapping
from typing import Any, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from .config import Config


class Network(nn.Module):
    """A network of Stable Diffusion. `config` holds the settings of config.json over the defaults.

    A subclass sets `part`, the name of its folder, and defines `check` and `example`.
    """

    config: Config
    dtype: Any = jnp.float32
    part = ""

    @staticmethod
    def check(settings: Mapping[str, Any]) -> Config:
        """The settings of config.json over the defaults. Raises ModelError for one that is not supported."""
        raise NotImplementedError

    def example(self) -> list[tuple[tuple[int, ...], Any]]:
        """(shape, type) of each input to trace the network with."""
        raise NotImplementedError

    @classmethod
    def from_config(cls, config: Mapping[str, Any], dtype: DTypeLike = jnp.float32) -> Self:
        """The module of a config.json's dict. Raises ModelError that names a setting which is not supported."""
        return cls(config=cls.check(config), dtype=dtype)

    def shapes(self) -> dict[str, Any]:
        """The parameter tree with shapes in place of arrays; computes nothing."""
        return _parameter_shapes(self)


# Cached, because tracing a large network takes seconds and each checkpoint asks again.
@functools.cache
def _parameter_shapes(network: Network) -> dict[str, Any]:
    inputs = [jnp.zeros(shape, dtype) for shape, dtype in network.example()]
    return jax.eval_shape(lambda: network.init(jax.random.key(0), *inputs))["params"]
