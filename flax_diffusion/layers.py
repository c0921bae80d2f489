"""The layers that the three networks are built of: norms, convolutions, the change of layout, the residual block."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def to_nhwc(x: jax.Array) -> jax.Array:
    """(B, C, H, W) to (B, H, W, C)."""
    return x.transpose(0, 2, 3, 1)


def to_nchw(x: jax.Array) -> jax.Array:
    """(B, H, W, C) to (B, C, H, W)."""
    return x.transpose(0, 3, 1, 2)


def group_norm(groups: int, epsilon: float, dtype: DTypeLike, name: str) -> nn.GroupNorm:
    """Group normalization, with the variance computed in two passes as torch does."""
    return nn.GroupNorm(num_groups=groups, epsilon=epsilon, dtype=dtype, use_fast_variance=False, name=name)


def layer_norm(dtype: DTypeLike, name: str, epsilon: float = 1e-5) -> nn.LayerNorm:
    """Layer normalization, with the variance computed in two passes as torch does."""
    return nn.LayerNorm(epsilon=epsilon, dtype=dtype, use_fast_variance=False, name=name)


def convolve(x: jax.Array, kernel: jax.Array, strides: Any, padding: Any, **options: Any) -> jax.Array:
    """jax.lax.conv_general_dilated of x (B, H, W, C) with a square kernel (size, size, C, out).

    Where the feature map is smaller than the kernel it is computed as a product of matrices: XLA on a CPU takes ten
    times as long for a 3x3 kernel over 2x2 pixels as for the same number of products elsewhere.
    """
    size = kernel.shape[0]
    height, width = x.shape[1:3]
    if min(height, width) >= size or tuple(strides) != (1, 1):
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    shifted = [x[:, i : i + height, j : j + width] for i in range(size) for j in range(size)]
    return jnp.concatenate(shifted, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])


def conv(channels: int, dtype: DTypeLike, name: str, *, size: int = 3, stride: int = 1, padding: Any = 1) -> nn.Conv:
    """A convolution with a square kernel, to `channels` channels."""
    return nn.Conv(
        channels,
        (size, size),
        strides=stride,
        padding=padding,
        dtype=dtype,
        conv_general_dilated=convolve,
        name=name,
    )


def upsample(x: jax.Array, height: int, width: int) -> jax.Array:
    """Nearest-neighbour enlargement to (B, height, width, C): twice as large, or one row or column less than that."""
    return x.repeat(2, axis=1).repeat(2, axis=2)[:, :height, :width]


class ResnetBlock(nn.Module):
    """Two convolutions with a shortcut: (B, H, W, C) to (B, H, W, channels).

    `time` is the embedded timestep, (B, E); the autoencoder's blocks have none.
    """

    channels: int
    groups: int
    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, time: jax.Array | None = None) -> jax.Array:
        y = nn.silu(group_norm(self.groups, self.epsilon, self.dtype, "norm1")(x))
        y = conv(self.channels, self.dtype, "conv1")(y)
        if time is not None:
            y += nn.Dense(self.channels, dtype=self.dtype, name="time_emb_proj")(nn.silu(time))[:, None, None]
        y = nn.silu(group_norm(self.groups, self.epsilon, self.dtype, "norm2")(y))
        y = conv(self.channels, self.dtype, "conv2")(y)
        if x.shape[-1] != self.channels:
            x = conv(self.channels, self.dtype, "conv_shortcut", size=1, padding=0)(x)
        return x + y
