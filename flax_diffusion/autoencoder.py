"""The autoencoder: images to latents and back."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from .attention import Attention
from .config import Config, ModelError, check_block_lists, checked_config
from .layers import ResnetBlock, conv, group_norm, to_nchw, to_nhwc, upsample
from .network import Network

DEFAULTS = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",),
    "up_block_types": ("UpDecoderBlock2D",),
    "block_out_channels": (64,),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "scaling_factor": 0.18215,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}
SUPPORTED = {
    "act_fn": ("silu", "swish"),
    "shift_factor": (None,),
    "latents_mean": (None,),
    "latents_std": (None,),
}
BLOCK_TYPES = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
NORM_EPSILON = 1e-6


class _Half(nn.Module):
    """What encoder and decoder share. All of it takes and returns (B, H, W, C)."""

    config: Config
    dtype: Any

    def resnet(self, x: jax.Array, channels: int, name: str) -> jax.Array:
        return ResnetBlock(channels, self.config.norm_num_groups, NORM_EPSILON, self.dtype, name=name)(x)

    def norm(self, x: jax.Array, name: str) -> jax.Array:
        return group_norm(self.config.norm_num_groups, NORM_EPSILON, self.dtype, name)(x)

    def middle(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        x = self.resnet(x, channels, "mid_block.resnets.0")
        if self.config.mid_block_add_attention:
            name = "mid_block.attentions.0"
            pixels = self.norm(x, f"{name}.group_norm").reshape(x.shape[0], -1, channels)
            x += Attention(1, self.dtype, bias=True, name=name)(pixels).reshape(x.shape)
        return self.resnet(x, channels, "mid_block.resnets.1")


class Encoder(_Half):
    """Pixels (B, H, W, 3) to the features of the moments, (B, h, w, 2 x latent channels)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config = self.config
        last = len(config.block_out_channels) - 1
        x = conv(config.block_out_channels[0], self.dtype, "conv_in")(x)
        for block, channels in enumerate(config.block_out_channels):
            for layer in range(config.layers_per_block):
                x = self.resnet(x, channels, f"down_blocks.{block}.resnets.{layer}")
            if block < last:
                # Padded below and to the right only.
                name = f"down_blocks.{block}.downsamplers.0.conv"
                x = conv(channels, self.dtype, name, stride=2, padding=((0, 1), (0, 1)))(x)
        x = nn.silu(self.norm(self.middle(x), "conv_norm_out"))
        return conv(2 * config.latent_channels, self.dtype, "conv_out")(x)


class Decoder(_Half):
    """Latents (B, h, w, latent channels) to pixels (B, H, W, 3)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config = self.config
        widths = config.block_out_channels[::-1]
        last = len(widths) - 1
        x = self.middle(conv(widths[0], self.dtype, "conv_in")(x))
        for block, channels in enumerate(widths):
            for layer in range(config.layers_per_block + 1):
                x = self.resnet(x, channels, f"up_blocks.{block}.resnets.{layer}")
            if block < last:
                x = upsample(x, 2 * x.shape[1], 2 * x.shape[2])
                x = conv(channels, self.dtype, f"up_blocks.{block}.upsamplers.0.conv")(x)
        x = nn.silu(self.norm(x, "conv_norm_out"))
        return conv(config.out_channels, self.dtype, "conv_out")(x)


class FlaxAutoencoderKL(Network):
    """The autoencoder of images (B, 3, H, W) in [-1, 1] and latents (B, C, h, w), h = H / 2^(blocks - 1).

    Latents are not scaled here: a UNet's are `config.scaling_factor` times as large.
    """

    part = "vae"

    @staticmethod
    def check(settings: Mapping[str, Any]) -> Config:
        config = checked_config("vae", settings, defaults=DEFAULTS, supported=SUPPORTED, strict=True)
        check_block_lists("vae", config, BLOCK_TYPES)
        if not isinstance(config.layers_per_block, int):
            raise ModelError(f"vae: the setting layers_per_block = {config.layers_per_block!r} is not an integer")
        return config

    def example(self) -> list[tuple[tuple[int, ...], Any]]:
        side = 2 ** (len(self.config.block_out_channels) - 1)
        return [((1, self.config.in_channels, side, side), jnp.float32)]

    def setup(self) -> None:
        config = self.config
        self.encoder = Encoder(config, self.dtype)
        self.decoder = Decoder(config, self.dtype)
        if config.use_quant_conv:
            self.quant_conv = nn.Conv(2 * config.latent_channels, (1, 1), dtype=self.dtype)
        if config.use_post_quant_conv:
            self.post_quant_conv = nn.Conv(config.latent_channels, (1, 1), dtype=self.dtype)

    def encode(self, pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Pixels (B, 3, H, W) to the mean and the standard deviation of their latents, each (B, C, h, w), float32."""
        moments = self.encoder(to_nhwc(pixels))
        if self.config.use_quant_conv:
            moments = self.quant_conv(moments)
        mean, log_variance = jnp.split(to_nchw(moments).astype(jnp.float32), 2, axis=1)
        return mean, jnp.exp(0.5 * log_variance.clip(-30, 20))

    def decode(self, latents: jax.Array) -> jax.Array:
        """Latents (B, C, h, w), not scaled, to pixels (B, 3, H, W)."""
        latents = to_nhwc(latents)
        if self.config.use_post_quant_conv:
            latents = self.post_quant_conv(latents)
        return to_nchw(self.decoder(latents))

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Encode pixels (B, 3, H, W) and decode the mean."""
        mean, _ = self.encode(pixels)
        return self.decode(mean)
