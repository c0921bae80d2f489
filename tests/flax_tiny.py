"""Networks of a few thousand weights in torch and in JAX, alike, for the tests of `flax_diffusion`."""

from pathlib import Path

import jax
import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from flax_diffusion.weights import load_part

# What is compiled is kept, for the next process and the next run.
COMPILED = str(Path(__file__).parent.parent / ".pytest_cache" / "jax")
jax.config.update("jax_compilation_cache_dir", COMPILED)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

UNETS = {
    "1.x": dict(  # heads in one number, convolutional projections
        block_out_channels=(8, 16),
        layers_per_block=(1, 2),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2,
        cross_attention_dim=12,
        norm_num_groups=4,
    ),
    "2.x": dict(  # heads of each block, linear projections
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        cross_attention_dim=12,
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        upcast_attention=True,
        norm_num_groups=4,
    ),
}
TEXT_ENCODERS = {
    "1.x": dict(hidden_act="quick_gelu", num_hidden_layers=2, num_attention_heads=2),
    "2.x": dict(hidden_act="gelu", num_hidden_layers=3, num_attention_heads=4),
}
VAES = {
    "1.x": dict(block_out_channels=(8, 8, 16), layers_per_block=2),
    "plain": dict(
        block_out_channels=(8, 16),
        layers_per_block=1,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ),
}


def _shaken(network, seed=0):
    """`network` with every weight moved, also those that start as one or zero, so that none can be mistaken."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return network.eval()


def torch_unet(kind, **changes):
    torch.manual_seed(0)
    return _shaken(UNet2DConditionModel(**(dict(sample_size=8) | UNETS[kind] | changes)))


def torch_vae(kind):
    torch.manual_seed(0)
    blocks = len(VAES[kind]["block_out_channels"])
    return _shaken(
        AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * blocks,
            up_block_types=("UpDecoderBlock2D",) * blocks,
            norm_num_groups=4,
            **VAES[kind],
        )
    )


def torch_text_encoder(kind, vocab_size=100):
    torch.manual_seed(0)
    sizes = dict(max_position_embeddings=16, hidden_size=16, intermediate_size=32, projection_dim=16)
    return _shaken(CLIPTextModel(CLIPTextConfig(vocab_size=vocab_size, **sizes, **TEXT_ENCODERS[kind])))


def in_jax(network, part, folder, **options):
    """The module and parameters that are read from where the torch network is saved."""
    network.save_pretrained(Path(folder) / part)
    return load_part(folder, part, **options)


def compiled(function, **options):
    """jit that compiles fast rather than for speed: a network is run once or twice here."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0}, **options)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def relative_error(got, expected):
    """The largest difference over the largest number."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape
    return np.abs(got - expected).max() / np.abs(expected).max()
