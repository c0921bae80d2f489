"""The three networks of Stable Diffusion 1.x and 2.x as linen modules: CLIP text encoder, autoencoder and UNet.

A submodule is named by its parameters' path in the safetensors file ("down_blocks.0.resnets.1"; a linen name may hold
dots), so a parameter tree flattened with dots has the very keys of the file, but for the last word: linen says kernel,
scale and embedding where the file says weight. `weights.py` converts; no table of names is needed.

Boundaries are NCHW, as in torch; inside it is NHWC, which convolutions in JAX prefer. `dtype` is the type of the
computation; softmax, the statistics of norms and the timestep embedding are float32 in any case, and parameters may
have any type (float32 as they are read). Products of float32 matrices are as exact as `jax_default_matmul_precision`
says, which on TPUs and GPUs is less than float32 unless one asks for it. No network needs a random key: dropout is not
supported.
"""

import functools
import json
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class ModelError(ValueError):
    """A model that cannot be read or computed, in one sentence that names the part and the setting."""


class Config(Mapping):
    """The settings of a part, read by key or as attributes. Hashable, so that jit can tell modules apart."""

    def __init__(self, settings):
        self._settings = dict(settings)

    def __getitem__(self, name):
        return self._settings[name]

    def __getattr__(self, name):
        if name.startswith("_") or name not in self._settings:
            raise AttributeError(name)
        return self._settings[name]

    def __iter__(self):
        return iter(self._settings)

    def __len__(self):
        return len(self._settings)

    def __hash__(self):
        return hash(json.dumps(self._settings, sort_keys=True))

    def __repr__(self):
        return f"Config({self._settings})"


FLAX_ONLY = ("dtype", "use_memory_efficient_attention", "split_head_dim")  # in the config.json of old Flax models
EMA_ONLY = ("decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup", "inv_gamma", "power")
# Change nothing that is computed: softmax is float32 anyway; an added embedding is refused by its own setting.
UNUSED = {*FLAX_ONLY, *EMA_ONLY, "sample_size", "force_upcast", "upcast_attention", "addition_embed_type_num_heads"}


def _settings(part, config, defaults, allowed, strict):
    """`config` over `defaults`, as a Config, once everything in it is known to be computed here.

    allowed: the values supported of each setting that is fixed, the first one its default. strict: refuse settings of
    other names too, unless they are null or false, since a network that needs them is not the one computed here.
    Raises ModelError that names the setting.
    """
    for name, value in config.items():
        if name in allowed and value not in allowed[name]:
            raise ModelError(f"{part}: the setting {name} = {value!r} is not supported, only {allowed[name][0]!r} is")
        known = name in allowed or name in defaults or name in UNUSED or name.startswith("_")
        if strict and not known and value not in (None, False):
            raise ModelError(f"{part}: the setting {name} = {value!r} is not known here, so it cannot be computed")
    return Config(defaults | dict(config))


def _check_blocks(part, config, supported):
    """Objections to lists of blocks; `supported` maps a setting to the types of blocks that it may hold."""
    for name, kinds in supported.items():
        if len(config[name]) != len(config["block_out_channels"]):
            raise ModelError(f"{part}: {name} has another length than block_out_channels")
        for kind in config[name]:
            if kind not in kinds:
                raise ModelError(f"{part}: the block type {kind!r} in {name} is not supported")
    groups = config["norm_num_groups"]
    for channels in config["block_out_channels"]:
        if not isinstance(groups, int) or channels % groups:
            raise ModelError(f"{part}: norm_num_groups = {groups!r} does not divide {channels} channels")


PER_BLOCK = ("attention_head_dim", "layers_per_block", "transformer_layers_per_block", "cross_attention_dim")


def _per_block(value, count):
    """A setting given once or for each block, for each block."""
    return tuple(value) if isinstance(value, list | tuple) else (value,) * count


def _nhwc(x):
    return x.transpose(0, 2, 3, 1)


def _nchw(x):
    return x.transpose(0, 3, 1, 2)


# ---------------------------------------------------------------------------------------------------------------------
# Layers
# ---------------------------------------------------------------------------------------------------------------------


def _group_norm(groups, eps, dtype, name):
    return nn.GroupNorm(num_groups=groups, epsilon=eps, dtype=dtype, use_fast_variance=False, name=name)


def _layer_norm(dtype, name, eps=1e-5):
    return nn.LayerNorm(epsilon=eps, dtype=dtype, use_fast_variance=False, name=name)


def _convolve(x, kernel, strides, padding, **options):
    """lax's convolution, but as a product of matrices where the map is smaller than the kernel: XLA on a CPU takes ten
    times as long for a 3x3 kernel over 2x2 pixels as for the same number of products elsewhere."""
    size, (height, width) = kernel.shape[0], x.shape[1:3]
    if min(height, width) >= size or tuple(strides) != (1, 1):
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    shifted = [x[:, i : i + height, j : j + width] for i in range(size) for j in range(size)]
    return jnp.concatenate(shifted, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])


def _conv(channels, dtype, name, size=3, stride=1, padding=1):
    return nn.Conv(
        channels,
        (size, size),
        strides=stride,
        padding=padding,
        dtype=dtype,
        conv_general_dilated=_convolve,
        name=name,
    )


def _upsample(x, height, width):
    """Nearest-neighbour enlargement to (B, height, width, C): twice as large, or one row or column less than that."""
    return x.repeat(2, axis=1).repeat(2, axis=2)[:, :height, :width]


class Attention(nn.Module):
    """Multi-head attention of x (B, S, C) over `context` (B, T, D), by default over x itself; returns (B, S, C).

    names: of the four projections, in the order query, key, value, output.
    """

    heads: int
    dtype: Any
    bias: bool = False  # of query, key and value; the output projection always has one
    causal: bool = False
    names: tuple = ("to_q", "to_k", "to_v", "to_out.0")

    @nn.compact
    def __call__(self, x, context=None):
        context = x if context is None else context
        channels = x.shape[-1]

        def project(name, inputs):
            projected = nn.Dense(channels, use_bias=self.bias, dtype=self.dtype, name=name)(inputs)
            return projected.reshape(*projected.shape[:2], self.heads, channels // self.heads)

        query, key, value = (project(*pair) for pair in zip(self.names, (x, context, context)))
        # scores and softmax are float32 in it whatever the inputs are, which is what upcast_attention asks for
        mixed = jax.nn.dot_product_attention(query, key, value, is_causal=self.causal)
        return nn.Dense(channels, dtype=self.dtype, name=self.names[3])(mixed.reshape(x.shape))


class ResnetBlock(nn.Module):
    """Two convolutions with a shortcut: (B, H, W, C) to (B, H, W, channels). `time` is the embedded timestep, (B, E);
    the autoencoder's blocks have none."""

    channels: int
    groups: int
    eps: float
    dtype: Any

    @nn.compact
    def __call__(self, x, time=None):
        y = nn.silu(_group_norm(self.groups, self.eps, self.dtype, "norm1")(x))
        y = _conv(self.channels, self.dtype, "conv1")(y)
        if time is not None:
            y += nn.Dense(self.channels, dtype=self.dtype, name="time_emb_proj")(nn.silu(time))[:, None, None]
        y = nn.silu(_group_norm(self.groups, self.eps, self.dtype, "norm2")(y))
        y = _conv(self.channels, self.dtype, "conv2")(y)
        if x.shape[-1] != self.channels:
            x = _conv(self.channels, self.dtype, "conv_shortcut", size=1, padding=0)(x)
        return x + y


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of x (B, H, W, C), each with attention to the text states (B, T, D)."""

    heads: int
    layers: int
    groups: int
    linear: bool  # SD 2.x projects in and out with matrices, 1.x with 1x1 convolutions
    dtype: Any

    @nn.compact
    def __call__(self, x, text):
        channels = x.shape[-1]

        def projection(name):
            if self.linear:
                return nn.Dense(channels, dtype=self.dtype, name=name)
            return _conv(channels, self.dtype, name, size=1, padding=0)

        y = projection("proj_in")(_group_norm(self.groups, 1e-6, self.dtype, "norm")(x))
        y = y.reshape(x.shape[0], -1, channels)
        for layer in range(self.layers):
            at = f"transformer_blocks.{layer}"
            y += Attention(self.heads, self.dtype, name=f"{at}.attn1")(_layer_norm(self.dtype, f"{at}.norm1")(y))
            normed = _layer_norm(self.dtype, f"{at}.norm2")(y)
            y += Attention(self.heads, self.dtype, name=f"{at}.attn2")(normed, text)
            hidden = nn.Dense(8 * channels, dtype=self.dtype, name=f"{at}.ff.net.0.proj")(
                _layer_norm(self.dtype, f"{at}.norm3")(y)
            )
            hidden, gate = jnp.split(hidden, 2, axis=-1)  # GEGLU, Shazeer 2020, arXiv 2002.05202
            hidden *= nn.gelu(gate, approximate=False)
            y += nn.Dense(channels, dtype=self.dtype, name=f"{at}.ff.net.2")(hidden)
        return x + projection("proj_out")(y.reshape(x.shape))


class _Part(nn.Module):
    """What the three networks share: `config` holds the settings of config.json over the defaults.

    Each has `part`, the name of its folder, `check(config)`, which returns that Config or raises ModelError, and
    `example()`, [(shape, type)] of inputs to trace it with.
    """

    config: Config
    dtype: Any = jnp.float32

    @classmethod
    def from_config(cls, config, dtype=jnp.float32):
        """The module of a config.json's dict. Raises ModelError that names a setting which is not supported."""
        return cls(config=cls.check(config), dtype=dtype)

    def shapes(self):
        """The parameter tree with shapes in place of arrays; computes nothing."""
        return _shapes(self)


@functools.cache  # tracing a large network takes seconds, and each checkpoint asks again
def _shapes(module):
    arguments = [jnp.zeros(shape, kind) for shape, kind in module.example()]
    return jax.eval_shape(lambda: module.init(jax.random.key(0), *arguments))["params"]


# ---------------------------------------------------------------------------------------------------------------------
# Text encoder
# ---------------------------------------------------------------------------------------------------------------------

CLIP_DEFAULTS = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
ACTIVATIONS = {
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    "gelu": lambda x: nn.gelu(x, approximate=False),
}


class CLIPLayer(nn.Module):
    """One layer of the text encoder, (B, T, D) to (B, T, D)."""

    config: Config
    dtype: Any

    @nn.compact
    def __call__(self, x):
        config, eps = self.config, self.config.layer_norm_eps
        names = ("q_proj", "k_proj", "v_proj", "out_proj")
        attention = Attention(
            config.num_attention_heads, self.dtype, bias=True, causal=True, names=names, name="self_attn"
        )
        x += attention(_layer_norm(self.dtype, "layer_norm1", eps)(x))
        hidden = nn.Dense(config.intermediate_size, dtype=self.dtype, name="mlp.fc1")(
            _layer_norm(self.dtype, "layer_norm2", eps)(x)
        )
        return x + nn.Dense(config.hidden_size, dtype=self.dtype, name="mlp.fc2")(
            ACTIVATIONS[config.hidden_act](hidden)
        )


class FlaxCLIPTextModel(_Part):
    """CLIP's text encoder: token ids (B, T) to the last layer's normed states (B, T, D)."""

    part = "text_encoder"

    @staticmethod
    def check(config):
        config = _settings("text_encoder", config, CLIP_DEFAULTS, {"use_attention_mask": (False, None)}, False)
        if config.get("model_type", "clip_text_model") != "clip_text_model":
            raise ModelError(f"text_encoder: the model type {config.model_type!r} is not supported, only CLIP's is")
        if config.hidden_act not in ACTIVATIONS:
            raise ModelError(f"text_encoder: the setting hidden_act = {config.hidden_act!r} is not supported")
        if config.hidden_size % config.num_attention_heads:
            raise ModelError("text_encoder: num_attention_heads does not divide hidden_size")
        return config

    def example(self):
        return [((1, 2), jnp.int32)]

    @nn.compact
    def __call__(self, ids):
        config = self.config
        sizes = {"token": config.vocab_size, "position": config.max_position_embeddings}
        token, position = (
            nn.Embed(size, config.hidden_size, dtype=self.dtype, name=f"embeddings.{kind}_embedding")
            for kind, size in sizes.items()
        )
        x = token(ids) + position(jnp.arange(ids.shape[1]))
        for layer in range(config.num_hidden_layers):
            x = CLIPLayer(config, self.dtype, name=f"encoder.layers.{layer}")(x)
        return _layer_norm(self.dtype, "final_layer_norm", config.layer_norm_eps)(x)


# ---------------------------------------------------------------------------------------------------------------------
# Autoencoder
# ---------------------------------------------------------------------------------------------------------------------

VAE_DEFAULTS = {
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
VAE_ALLOWED = {
    "act_fn": ("silu", "swish"),
    "shift_factor": (None,),
    "latents_mean": (None,),
    "latents_std": (None,),
}
VAE_EPS = 1e-6
VAE_BLOCKS = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}


class _VAEHalf(nn.Module):
    """What encoder and decoder share."""

    config: Config
    dtype: Any

    def resnet(self, x, channels, name):
        return ResnetBlock(channels, self.config.norm_num_groups, VAE_EPS, self.dtype, name=name)(x)

    def norm(self, x, name):
        return _group_norm(self.config.norm_num_groups, VAE_EPS, self.dtype, name)(x)

    def middle(self, x):
        at, channels = "mid_block.attentions.0", x.shape[-1]
        x = self.resnet(x, channels, "mid_block.resnets.0")
        if self.config.mid_block_add_attention:
            pixels = self.norm(x, f"{at}.group_norm").reshape(x.shape[0], -1, channels)
            x += Attention(1, self.dtype, bias=True, name=at)(pixels).reshape(x.shape)
        return self.resnet(x, channels, "mid_block.resnets.1")


class Encoder(_VAEHalf):
    """Pixels (B, H, W, 3) to the moments' features (B, h, w, 2 x latent channels)."""

    @nn.compact
    def __call__(self, x):
        config, last = self.config, len(self.config.block_out_channels) - 1
        x = _conv(config.block_out_channels[0], self.dtype, "conv_in")(x)
        for block, channels in enumerate(config.block_out_channels):
            for layer in range(config.layers_per_block):
                x = self.resnet(x, channels, f"down_blocks.{block}.resnets.{layer}")
            if block < last:  # padded below and to the right only
                name, padding = f"down_blocks.{block}.downsamplers.0.conv", ((0, 1), (0, 1))
                x = _conv(channels, self.dtype, name, stride=2, padding=padding)(x)
        x = nn.silu(self.norm(self.middle(x), "conv_norm_out"))
        return _conv(2 * config.latent_channels, self.dtype, "conv_out")(x)


class Decoder(_VAEHalf):
    """Latents (B, h, w, latent channels) to pixels (B, H, W, 3)."""

    @nn.compact
    def __call__(self, x):
        config, widths = self.config, self.config.block_out_channels[::-1]
        x = self.middle(_conv(widths[0], self.dtype, "conv_in")(x))
        for block, channels in enumerate(widths):
            for layer in range(config.layers_per_block + 1):
                x = self.resnet(x, channels, f"up_blocks.{block}.resnets.{layer}")
            if block < len(widths) - 1:
                x = _upsample(x, 2 * x.shape[1], 2 * x.shape[2])
                x = _conv(channels, self.dtype, f"up_blocks.{block}.upsamplers.0.conv")(x)
        x = nn.silu(self.norm(x, "conv_norm_out"))
        return _conv(config.out_channels, self.dtype, "conv_out")(x)


class FlaxAutoencoderKL(_Part):
    """The autoencoder of images (B, 3, H, W) in [-1, 1] and latents (B, C, h, w), h = H / 2^(blocks - 1).

    Latents are not scaled here: a UNet's are `config.scaling_factor` times as large.
    """

    part = "vae"

    @staticmethod
    def check(config):
        config = _settings("vae", config, VAE_DEFAULTS, VAE_ALLOWED, True)
        _check_blocks("vae", config, VAE_BLOCKS)
        if not isinstance(config.layers_per_block, int):
            raise ModelError(f"vae: the setting layers_per_block = {config.layers_per_block!r} is not an integer")
        return config

    def example(self):
        side = 2 ** (len(self.config.block_out_channels) - 1)
        return [((1, self.config.in_channels, side, side), jnp.float32)]

    def setup(self):
        config = self.config
        self.encoder, self.decoder = Encoder(config, self.dtype), Decoder(config, self.dtype)
        if config.use_quant_conv:
            self.quant_conv = nn.Conv(2 * config.latent_channels, (1, 1), dtype=self.dtype)
        if config.use_post_quant_conv:
            self.post_quant_conv = nn.Conv(config.latent_channels, (1, 1), dtype=self.dtype)

    def encode(self, pixels):
        """Pixels (B, 3, H, W) to the mean and the standard deviation of their latents, each (B, C, h, w), float32."""
        moments = self.encoder(_nhwc(pixels))
        if self.config.use_quant_conv:
            moments = self.quant_conv(moments)
        mean, log_variance = jnp.split(_nchw(moments).astype(jnp.float32), 2, axis=1)
        return mean, jnp.exp(0.5 * log_variance.clip(-30, 20))

    def decode(self, latents):
        """Latents (B, C, h, w) as the encoder made them to pixels (B, 3, H, W)."""
        latents = _nhwc(latents)
        if self.config.use_post_quant_conv:
            latents = self.post_quant_conv(latents)
        return _nchw(self.decoder(latents))

    def __call__(self, pixels):
        """Encode and decode the mean."""
        return self.decode(self.encode(pixels)[0])


# ---------------------------------------------------------------------------------------------------------------------
# UNet
# ---------------------------------------------------------------------------------------------------------------------

UNET_DEFAULTS = {
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
    "attention_head_dim": 8,
    "use_linear_projection": False,
}
UNET_ALLOWED = {
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
UNET_BLOCKS = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}


def timestep_sinusoids(timesteps, width, flip_sin_to_cos=True, freq_shift=0):
    """Timesteps (B,) as float32 sinusoids (B, width), width even (Ho et al. 2020, arXiv 2006.11239, appendix B):
    sines and then cosines, or the other way round, of frequencies from 1 down to nearly 1 / 10000."""
    half = width // 2
    frequencies = jnp.exp(-math.log(10000) / (half - freq_shift) * jnp.arange(half, dtype=jnp.float32))
    angles = timesteps.astype(jnp.float32)[:, None] * frequencies
    waves = [jnp.sin(angles), jnp.cos(angles)]
    return jnp.concatenate(waves[::-1] if flip_sin_to_cos else waves, axis=-1)


class FlaxUNet2DConditionModel(_Part):
    """The UNet: noisy latents (B, C, h, w), timesteps (B,) and text states (B, T, D) to a prediction (B, C, h, w).

    With gradient_checkpointing, what lies inside a residual or transformer block is computed again in the backward
    pass instead of being kept (Chen et al. 2016, arXiv 1604.06174).
    """

    gradient_checkpointing: bool = False
    part = "unet"

    @staticmethod
    def check(config):
        config = _settings("unet", config, UNET_DEFAULTS, UNET_ALLOWED, True)
        _check_blocks("unet", config, UNET_BLOCKS)
        count = len(config.block_out_channels)
        for name in PER_BLOCK:
            values = config[name]
            listed = isinstance(values, list | tuple)
            if not all(isinstance(value, int) for value in (values if listed else [values])):
                raise ModelError(f"unet: the setting {name} = {values!r} is not supported, only integers are")
            if listed and len(values) != count:
                raise ModelError(f"unet: {name} has another length than block_out_channels")
        for channels, heads in zip(config.block_out_channels, _per_block(config.attention_head_dim, count)):
            if channels % heads:
                raise ModelError(f"unet: {channels} channels cannot be split into attention_head_dim = {heads} heads")
        return config

    def example(self):
        config, side = self.config, 2 ** (len(self.config.block_out_channels) - 1)
        text = max(_per_block(config.cross_attention_dim, 1))
        shapes = [(1, config.in_channels, side, side), (1,), (1, 1, text)]
        return [(shape, jnp.float32) for shape in shapes]

    @nn.compact
    def __call__(self, sample, timesteps, text):
        config, dtype = self.config, self.dtype
        eps, groups, widths = config.norm_eps, config.norm_num_groups, config.block_out_channels
        last = len(widths) - 1
        heads, layers, depths = (_per_block(config[name], len(widths)) for name in PER_BLOCK[:3])
        wrap = nn.remat if self.gradient_checkpointing else lambda module: module
        make_resnet, make_transformer = wrap(ResnetBlock), wrap(SpatialTransformer)

        waves = timestep_sinusoids(timesteps, widths[0], config.flip_sin_to_cos, config.freq_shift)
        time = nn.silu(nn.Dense(4 * widths[0], dtype=jnp.float32, name="time_embedding.linear_1")(waves))
        time = nn.Dense(4 * widths[0], dtype=jnp.float32, name="time_embedding.linear_2")(time)
        text = text.astype(dtype)

        def resnet(x, channels, name):
            return make_resnet(channels, groups, eps, dtype, name=name)(x, time)

        def transformer(x, block, name):
            module = make_transformer(
                heads[block], depths[block], groups, config.use_linear_projection, dtype, name=name
            )
            return module(x, text)

        x = _conv(widths[0], dtype, "conv_in")(_nhwc(sample))
        skips = [x]
        for block, kind in enumerate(config.down_block_types):
            at = f"down_blocks.{block}"
            for layer in range(layers[block]):
                x = resnet(x, widths[block], f"{at}.resnets.{layer}")
                if kind == "CrossAttnDownBlock2D":
                    x = transformer(x, block, f"{at}.attentions.{layer}")
                skips.append(x)
            if block < last:
                x = _conv(widths[block], dtype, f"{at}.downsamplers.0.conv", stride=2)(x)
                skips.append(x)

        x = resnet(x, widths[-1], "mid_block.resnets.0")
        x = transformer(x, last, "mid_block.attentions.0")
        x = resnet(x, widths[-1], "mid_block.resnets.1")

        for up, kind in enumerate(config.up_block_types):
            at, block = f"up_blocks.{up}", last - up
            for layer in range(layers[block] + 1):
                x = jnp.concatenate([x, skips.pop()], axis=-1)
                x = resnet(x, widths[block], f"{at}.resnets.{layer}")
                if kind == "CrossAttnUpBlock2D":
                    x = transformer(x, block, f"{at}.attentions.{layer}")
            if up < last:
                x = _conv(widths[block], dtype, f"{at}.upsamplers.0.conv")(_upsample(x, *skips[-1].shape[1:3]))

        x = nn.silu(_group_norm(groups, eps, dtype, "conv_norm_out")(x))
        return _nchw(_conv(config.out_channels, dtype, "conv_out")(x))


PARTS = {cls.part: cls for cls in (FlaxCLIPTextModel, FlaxAutoencoderKL, FlaxUNet2DConditionModel)}
