"""CLIP's text encoder."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from .attention import Attention
from .config import Config, ModelError, checked_config
from .layers import layer_norm
from .network import Network

DEFAULTS = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
SUPPORTED = {"use_attention_mask": (False, None)}


def quick_gelu(x: jax.Array) -> jax.Array:
    """The approximation of GELU by a sigmoid (Hendrycks & Gimpel 2016, arXiv 1606.08415, section 2)."""
    return x * nn.sigmoid(1.702 * x)


def gelu(x: jax.Array) -> jax.Array:
    """GELU by the error function."""
    return nn.gelu(x, approximate=False)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": gelu}


class CLIPLayer(nn.Module):
    """One layer of the text encoder, (B, T, D) to (B, T, D)."""

    config: Config
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        config = self.config
        attention = Attention(
            config.num_attention_heads,
            self.dtype,
            bias=True,
            causal=True,
            names=("q_proj", "k_proj", "v_proj", "out_proj"),
            name="self_attn",
        )
        x += attention(layer_norm(self.dtype, "layer_norm1", config.layer_norm_eps)(x))
        normed = layer_norm(self.dtype, "layer_norm2", config.layer_norm_eps)(x)
        features = nn.Dense(config.intermediate_size, dtype=self.dtype, name="mlp.fc1")(normed)
        activated = ACTIVATIONS[config.hidden_act](features)
        return x + nn.Dense(config.hidden_size, dtype=self.dtype, name="mlp.fc2")(activated)


class FlaxCLIPTextModel(Network):
    """CLIP's text encoder: token ids (B, T) to the last layer's normed states (B, T, D)."""

    part = "text_encoder"

    @staticmethod
    def check(settings: Mapping[str, Any]) -> Config:
        config = checked_config("text_encoder", settings, defaults=DEFAULTS, supported=SUPPORTED, strict=False)
        if config.get("model_type", "clip_text_model") != "clip_text_model":
            raise ModelError(f"text_encoder: the model type {config.model_type!r} is not supported, only CLIP's is")
        if config.hidden_act not in ACTIVATIONS:
            raise ModelError(f"text_encoder: the setting hidden_act = {config.hidden_act!r} is not supported")
        if config.hidden_size % config.num_attention_heads:
            raise ModelError("text_encoder: num_attention_heads does not divide hidden_size")
        return config

    def example(self) -> list[tuple[tuple[int, ...], Any]]:
        return [((1, 2), jnp.int32)]

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        config = self.config

        def embedding(kind, size):
            return nn.Embed(size, config.hidden_size, dtype=self.dtype, name=f"embeddings.{kind}_embedding")

        token = embedding("token", config.vocab_size)
        position = embedding("position", config.max_position_embeddings)
        x = token(ids) + position(jnp.arange(ids.shape[1]))
        for layer in range(config.num_hidden_layers):
            x = CLIPLayer(config, self.dtype, name=f"encoder.layers.{layer}")(x)
        return layer_norm(self.dtype, "final_layer_norm", config.layer_norm_eps)(x)
