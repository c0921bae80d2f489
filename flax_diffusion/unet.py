"""The UNet, which predicts the noise in latents."""

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from .attention import SpatialTransformer
from .config import Config, ModelError, check_block_lists, checked_config, for_each_block
from .layers import ResnetBlock, conv, group_norm, to_nchw, to_nhwc, upsample
from .network import Network

DEFAULTS = {
    "in_channels": 4,
    "out_channels": 4,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "cross_attention_dim": 1280,
    "transformer_layers_per_block": 1,
    # The number of heads: diffusers' setting bears the wrong name.
    "attention_head_dim": 8,
    "use_linear_projection": False,
}
SUPPORTED = {
    "act_fn": ("silu", "swish"),
    "center_input_sample": (False,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "only_cross_attention": (False, None),
    "downsample_padding": (1,),
    "mid_block_scale_factor": (1,),
    "dropout": (0,),
    "num_attention_heads": (None,),
    "resnet_time_scale_shift": ("default",),
    "resnet_out_scale_factor": (1,),
    "time_embedding_type": ("positional",),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "attention_type": ("default",),
}
BLOCK_TYPES = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
# Settings given once for all blocks or for each of them.
PER_BLOCK = ("attention_head_dim", "layers_per_block", "transformer_layers_per_block", "cross_attention_dim")


def timestep_sinusoids(
    timesteps: jax.Array, width: int, flip_sin_to_cos: bool = True, freq_shift: int = 0
) -> jax.Array:
    """Timesteps (B,) as float32 sinusoids (B, width), width even (Ho et al. 2020, arXiv 2006.11239, appendix B).

    Sines and then cosines, or with flip_sin_to_cos the other way round, of frequencies from 1 to nearly 1 / 10000.
    """
    half = width // 2
    frequencies = jnp.exp(-math.log(10000) / (half - freq_shift) * jnp.arange(half, dtype=jnp.float32))
    angles = timesteps.astype(jnp.float32)[:, None] * frequencies
    sines = jnp.sin(angles)
    cosines = jnp.cos(angles)
    return jnp.concatenate([cosines, sines] if flip_sin_to_cos else [sines, cosines], axis=-1)


class FlaxUNet2DConditionModel(Network):
    """The UNet: noisy latents (B, C, h, w), timesteps (B,) and text states (B, T, D) to a prediction (B, C, h, w).

    With gradient_checkpointing, activations inside a residual or transformer block are computed again in the backward
    pass instead of being stored (Chen et al. 2016, arXiv 1604.06174).
    """

    gradient_checkpointing: bool = False
    part = "unet"

    @staticmethod
    def check(settings: Mapping[str, Any]) -> Config:
        config = checked_config("unet", settings, defaults=DEFAULTS, supported=SUPPORTED, strict=True)
        check_block_lists("unet", config, BLOCK_TYPES)
        count = len(config.block_out_channels)
        for name in PER_BLOCK:
            value = config[name]
            if not all(isinstance(number, int) for number in for_each_block(value, 1)):
                raise ModelError(f"unet: the setting {name} = {value!r} is not supported, only integers are")
            if len(for_each_block(value, count)) != count:
                raise ModelError(f"unet: {name} has another length than block_out_channels")
        for channels, heads in zip(config.block_out_channels, for_each_block(config.attention_head_dim, count)):
            if channels % heads:
                raise ModelError(f"unet: {channels} channels cannot be split into attention_head_dim = {heads} heads")
        return config

    def example(self) -> list[tuple[tuple[int, ...], Any]]:
        config = self.config
        side = 2 ** (len(config.block_out_channels) - 1)
        text_width = max(for_each_block(config.cross_attention_dim, 1))
        return [
            ((1, config.in_channels, side, side), jnp.float32),
            ((1,), jnp.float32),
            ((1, 1, text_width), jnp.float32),
        ]

    @nn.compact
    def __call__(self, sample: jax.Array, timesteps: jax.Array, text: jax.Array) -> jax.Array:
        config, dtype = self.config, self.dtype
        widths = config.block_out_channels
        last = len(widths) - 1
        heads = for_each_block(config.attention_head_dim, len(widths))
        layers = for_each_block(config.layers_per_block, len(widths))
        depths = for_each_block(config.transformer_layers_per_block, len(widths))
        make_resnet, make_transformer = ResnetBlock, SpatialTransformer
        if self.gradient_checkpointing:
            make_resnet, make_transformer = nn.remat(ResnetBlock), nn.remat(SpatialTransformer)

        time = timestep_sinusoids(timesteps, widths[0], config.flip_sin_to_cos, config.freq_shift)
        time = nn.silu(nn.Dense(4 * widths[0], dtype=jnp.float32, name="time_embedding.linear_1")(time))
        time = nn.Dense(4 * widths[0], dtype=jnp.float32, name="time_embedding.linear_2")(time)
        text = text.astype(dtype)

        def resnet(x, channels, name):
            return make_resnet(channels, config.norm_num_groups, config.norm_eps, dtype, name=name)(x, time)

        def transformer(x, block, name):
            linear = config.use_linear_projection
            module = make_transformer(heads[block], depths[block], config.norm_num_groups, linear, dtype, name=name)
            return module(x, text)

        # Down, with what the way up takes beside its own features.
        x = conv(widths[0], dtype, "conv_in")(to_nhwc(sample))
        skips = [x]
        for block, block_type in enumerate(config.down_block_types):
            name = f"down_blocks.{block}"
            for layer in range(layers[block]):
                x = resnet(x, widths[block], f"{name}.resnets.{layer}")
                if block_type == "CrossAttnDownBlock2D":
                    x = transformer(x, block, f"{name}.attentions.{layer}")
                skips.append(x)
            if block < last:
                x = conv(widths[block], dtype, f"{name}.downsamplers.0.conv", stride=2)(x)
                skips.append(x)

        x = resnet(x, widths[-1], "mid_block.resnets.0")
        x = transformer(x, last, "mid_block.attentions.0")
        x = resnet(x, widths[-1], "mid_block.resnets.1")

        # Up. The settings list blocks on the way down, so this way they are read from the end.
        for step_up, block_type in enumerate(config.up_block_types):
            name = f"up_blocks.{step_up}"
            block = last - step_up
            for layer in range(layers[block] + 1):
                x = jnp.concatenate([x, skips.pop()], axis=-1)
                x = resnet(x, widths[block], f"{name}.resnets.{layer}")
                if block_type == "CrossAttnUpBlock2D":
                    x = transformer(x, block, f"{name}.attentions.{layer}")
            if step_up < last:
                height, width = skips[-1].shape[1:3]
                x = conv(widths[block], dtype, f"{name}.upsamplers.0.conv")(upsample(x, height, width))

        x = nn.silu(group_norm(config.norm_num_groups, config.norm_eps, dtype, "conv_norm_out")(x))
        return to_nchw(conv(config.out_channels, dtype, "conv_out")(x))
