"""Attention, and the transformer blocks of the UNet that attend to the text."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from .layers import conv, group_norm, layer_norm


class Attention(nn.Module):
    """Multi-head attention of x (B, S, C) over `context` (B, T, D), by default over x itself; returns (B, S, C).

    bias: whether query, key and value have one; the output projection always has. names: of the four projections, in
    the order query, key, value, output.
    """

    heads: int
    dtype: Any
    bias: bool = False
    causal: bool = False
    names: tuple[str, str, str, str] = ("to_q", "to_k", "to_v", "to_out.0")

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array | None = None) -> jax.Array:
        if context is None:
            context = x
        channels = x.shape[-1]

        def project(name, inputs):
            """(B, L, D) to (B, L, heads, channels / heads)."""
            projected = nn.Dense(channels, use_bias=self.bias, dtype=self.dtype, name=name)(inputs)
            return projected.reshape(*projected.shape[:2], self.heads, channels // self.heads)

        query = project(self.names[0], x)
        key = project(self.names[1], context)
        value = project(self.names[2], context)
        # Scores and softmax are float32 in this function whatever the inputs are, which is what the setting
        # upcast_attention asks for.
        mixed = jax.nn.dot_product_attention(query, key, value, is_causal=self.causal)
        return nn.Dense(channels, dtype=self.dtype, name=self.names[3])(mixed.reshape(x.shape))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of x (B, H, W, C), each with attention to the text states (B, T, D).

    linear: whether matrices project in and out, as in SD 2.x, or 1x1 convolutions, as in 1.x.
    """

    heads: int
    layers: int
    groups: int
    linear: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, text: jax.Array) -> jax.Array:
        channels = x.shape[-1]

        def projection(name):
            if self.linear:
                return nn.Dense(channels, dtype=self.dtype, name=name)
            return conv(channels, self.dtype, name, size=1, padding=0)

        y = projection("proj_in")(group_norm(self.groups, 1e-6, self.dtype, "norm")(x))
        y = y.reshape(x.shape[0], -1, channels)
        for layer in range(self.layers):
            block = f"transformer_blocks.{layer}"

            normed = layer_norm(self.dtype, f"{block}.norm1")(y)
            y += Attention(self.heads, self.dtype, name=f"{block}.attn1")(normed)

            normed = layer_norm(self.dtype, f"{block}.norm2")(y)
            y += Attention(self.heads, self.dtype, name=f"{block}.attn2")(normed, text)

            # GEGLU: Shazeer 2020, arXiv 2002.05202.
            normed = layer_norm(self.dtype, f"{block}.norm3")(y)
            projected = nn.Dense(8 * channels, dtype=self.dtype, name=f"{block}.ff.net.0.proj")(normed)
            features, gate = jnp.split(projected, 2, axis=-1)
            features *= nn.gelu(gate, approximate=False)
            y += nn.Dense(channels, dtype=self.dtype, name=f"{block}.ff.net.2")(features)
        return x + projection("proj_out")(y.reshape(x.shape))
