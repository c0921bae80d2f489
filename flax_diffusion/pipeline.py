"""Text to images with Stable Diffusion 1.x and 2.x in JAX, on one device or, with replicated parameters, on several.

The interface is that of the class which diffusers had until 0.39:

    pipeline, params = FlaxStableDiffusionPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")
    ids = shard(pipeline.prepare_inputs(["a watercolour of a fox"] * jax.device_count()))
    keys = jax.random.split(jax.random.key(0), jax.device_count())
    images = pipeline(ids, replicate(params), keys, jit=True).images  # (devices, images a device, H, W, 3)
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike
from PIL import Image

from . import schedulers, trajectory, weights
from .autoencoder import FlaxAutoencoderKL
from .config import ModelError, for_each_block
from .model_folder import fetch, load_tokenizer, save_tokenizer, write_json
from .network import Network
from .text_encoder import FlaxCLIPTextModel
from .unet import FlaxUNet2DConditionModel

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

# What torch's pipeline changes in old scheduler configurations: latents have no bounds, and SD counts from timestep 1.
LATENTS = {"clip_sample": False, "steps_offset": 1}
PARTS = ("text_encoder", "unet", "vae")


class Images(NamedTuple):
    """What a call returns: `images`, float32 in [0, 1], of shape (..., H, W, 3)."""

    images: jax.Array


def _generate(
    networks: tuple[Network, Network, Network],
    params: Mapping[str, Any],
    ids: jax.Array,
    negative_ids: jax.Array,
    latents: jax.Array,
    key: jax.Array,
    guidance: jax.Array,
    plan: trajectory.Plan,
) -> jax.Array:
    """The images (B, H, W, 3) of token ids (B, T), from noise `latents` (B, C, h, w), all in one compilation.

    networks: (text encoder, unet, vae). key: for samplers that add noise. guidance: its scale, (B,); 1 or less means
    none (Ho & Salimans 2022, arXiv 2207.12598). plan: see trajectory.Plan.
    """
    text_encoder, unet, vae = networks
    states = text_encoder.apply({"params": params["text_encoder"]}, jnp.concatenate([negative_ids, ids]))
    guidance = jnp.maximum(guidance, 1)[:, None, None, None]

    def denoise(state, row):
        sample = state.sample
        timesteps = jnp.full(2 * len(sample), row.timestep)
        output = unet.apply({"params": params["unet"]}, jnp.concatenate([sample, sample]), timesteps, states)
        unconditional, conditional = jnp.split(output.astype(jnp.float32), 2)
        output = unconditional + guidance * (conditional - unconditional)
        noise = None
        if row.sigma is not None:
            noise = jax.random.normal(jax.random.fold_in(key, row.timestep), sample.shape)
        return trajectory.step(row, state, output, noise), None

    end, _ = jax.lax.scan(denoise, trajectory.begin(plan, latents), plan)
    pixels = vae.apply({"params": params["vae"]}, end.sample / vae.config.scaling_factor, method="decode")
    return (pixels.astype(jnp.float32) / 2 + 0.5).clip(0, 1).transpose(0, 2, 3, 1)


# At module level, so that two pipelines of equal networks share what was compiled.
_on_one_device = jax.jit(_generate, static_argnums=0)
_on_each_device = jax.pmap(_generate, static_broadcasted_argnums=0, in_axes=(None, 0, 0, 0, 0, 0, 0, None))


class FlaxStableDiffusionPipeline:
    """A text encoder, a UNet, an autoencoder, a tokenizer and a schedule. Parameters are not in it but passed to it: a
    dict with "text_encoder", "unet" and "vae", and an empty "scheduler", since schedules hold no state.

    source, variant: the folder that the parameters were read from and the variant of its files, for save_pretrained.
    Raises ModelError when the parts do not fit together.
    """

    def __init__(
        self,
        vae: FlaxAutoencoderKL,
        text_encoder: FlaxCLIPTextModel,
        tokenizer: "CLIPTokenizer",
        unet: FlaxUNet2DConditionModel,
        scheduler: schedulers.Sampler,
        *,
        source: str | Path | None = None,
        variant: str | None = None,
    ) -> None:
        channels = vae.config.latent_channels
        if not unet.config.in_channels == unet.config.out_channels == channels:
            raise ModelError(
                f"unet: it takes {unet.config.in_channels} channels and gives {unet.config.out_channels} where the "
                f"autoencoder's latents have {channels}; only text-to-image models are supported"
            )
        width = text_encoder.config.hidden_size
        wanted = unet.config.cross_attention_dim
        if any(size != width for size in for_each_block(wanted, 1)):
            raise ModelError(f"unet: it attends to text states of width {wanted}, the text encoder's have {width}")
        self.vae = vae
        self.text_encoder = text_encoder
        self.tokenizer = tokenizer
        self.unet = unet
        self.scheduler = scheduler
        self.source = Path(source) if source else None
        self.variant = variant
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        revision: str | None = None,
        dtype: DTypeLike = jnp.float32,
        variant: str | None = None,
        cache_dir: str | Path | None = None,
        from_pt: bool = False,
        scheduler: schedulers.Sampler | None = None,
        tokenizer: "CLIPTokenizer | None" = None,
        safety_checker: Any = None,
    ) -> tuple["FlaxStableDiffusionPipeline", dict[str, Any]]:
        """The pipeline of a folder or hub id and its parameters, float32 numpy arrays on the host.

        Put the parameters on the devices once, with jax.device_put or flax.jax_utils.replicate, if you call the
        pipeline several times. dtype: what the networks compute in. variant: the variant of the files to read, for
        parts that have it. from_pt: accepted for old commands; torch's safetensors are always read. scheduler,
        tokenizer: in place of the folder's. safety_checker: accepted for old commands; there is none.
        Raises ModelError for a model that cannot be used, in one sentence.
        """
        folder = fetch(name, revision, variant, cache_dir)
        modules: dict[str, Any] = {}
        params: dict[str, Any] = {"scheduler": {}}
        for part in PARTS:
            modules[part], params[part] = weights.load_part(folder, part, dtype, variant)
        if scheduler is None:
            scheduler = schedulers.for_sampling(schedulers.read_config(folder))
        if tokenizer is None:
            tokenizer = load_tokenizer(folder)
        return cls(tokenizer=tokenizer, scheduler=scheduler, source=folder, variant=variant, **modules), params

    def prepare_inputs(self, prompts: str | Sequence[str]) -> np.ndarray:
        """Token ids of a prompt or a list of them, int32 of shape (prompts, tokens); longer prompts are cut."""
        if not isinstance(prompts, str) and not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(f"a prompt must be a string or a list of strings, not {type(prompts).__name__}")
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        length = min(self.tokenizer.model_max_length, self.text_encoder.config.max_position_embeddings)
        tokens = self.tokenizer(prompts, max_length=length, padding="max_length", truncation=True)
        return np.array(tokens.input_ids, dtype=np.int32)

    def __call__(
        self,
        prompt_ids: ArrayLike,
        params: Mapping[str, Any],
        prng_seed: jax.Array,
        num_inference_steps: int = 50,
        height: int | None = None,
        width: int | None = None,
        guidance_scale: ArrayLike = 7.5,
        latents: jax.Array | None = None,
        neg_prompt_ids: ArrayLike | None = None,
        jit: bool = False,
    ) -> Images:
        """Draw an image for each prompt.

        Args: prompt_ids, (B, T); params, the dict of parameters; prng_seed, a jax.random key; height and width in
        pixels, by default those that the UNet was made for; guidance_scale, a number or one for each prompt, where 1
        or less means no guidance; latents, noise (B, C, h, w) to start from in place of the key's; neg_prompt_ids,
        (B, T), what guidance leads away from, by default the empty prompt.

        With jit, everything but the sizes and a single guidance scale has one more axis in front, one entry a device:
        prompt_ids and latents through flax.training.common_utils.shard, params through flax.jax_utils.replicate and
        prng_seed through jax.random.split. Without it the call is compiled too, for one device.

        Compiled once for each shape and number of steps; another guidance scale or prompt does not compile again.
        Returns Images. Raises ValueError for inputs that do not fit.
        """
        ids = prompt_ids if isinstance(prompt_ids, jax.Array) else np.asarray(prompt_ids)
        self._check_axes(ids, params, jit)
        shape = self._latent_shape(height, width)
        lead = ids.shape[:-1]
        if latents is None:
            draw_noise = functools.partial(jax.random.normal, shape=(lead[-1], *shape))
            if jit:
                draw_noise = jax.vmap(draw_noise)
            latents = draw_noise(prng_seed)
        elif latents.shape != (*lead, *shape):
            raise ValueError(f"latents have shape {latents.shape}, not {(*lead, *shape)}")
        if neg_prompt_ids is None:
            neg_prompt_ids = np.broadcast_to(self.prepare_inputs(""), ids.shape)
        guidance = np.asarray(guidance_scale, dtype=np.float32)
        guidance = guidance.reshape(guidance.shape + (1,) * (len(lead) - guidance.ndim))
        guidance = np.broadcast_to(guidance, lead)
        params = {part: params[part] for part in PARTS}
        plan = jax.tree.map(jnp.asarray, self.scheduler.changed(**LATENTS).plan(num_inference_steps))
        networks = (self.text_encoder, self.unet, self.vae)
        run = _on_each_device if jit else _on_one_device
        latents = latents.astype(jnp.float32)
        return Images(run(networks, params, ids, neg_prompt_ids, latents, prng_seed, guidance, plan))

    @staticmethod
    def _check_axes(ids: ArrayLike, params: Mapping[str, Any], jit: bool) -> None:
        """Refuse the two usual mistakes with jit in a sentence, before XLA does it in a hundred lines.

        Raises ValueError.
        """
        if ids.ndim != 2 + jit:
            wanted = "(devices, prompts a device, tokens), as shard makes it" if jit else "(prompts, tokens)"
            raise ValueError(f"with jit={jit} prompt_ids must have the axes {wanted}, not the shape {ids.shape}")
        if params["unet"]["conv_in"]["bias"].ndim != 1 + jit:
            wanted = "must be replicated with flax.jax_utils.replicate" if jit else "must not be replicated"
            raise ValueError(f"with jit={jit} the params {wanted}")

    def _latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        """(C, h, w) of the latents of an image, whose sizes in pixels are by default what the UNet was made for.

        Raises ValueError.
        """
        factor = self.vae_scale_factor
        own_height, own_width = for_each_block(self.unet.config.get("sample_size"), 2)
        height = height or (own_height and own_height * factor)
        width = width or (own_width and own_width * factor)
        if height is None or width is None:
            raise ValueError("the UNet's configuration has no sample_size, so height and width must be given")
        if height % factor or width % factor:
            raise ValueError(f"height and width must be multiples of {factor}, not {height} and {width}")
        return (self.vae.config.latent_channels, height // factor, width // factor)

    @staticmethod
    def numpy_to_pil(images: ArrayLike) -> list[Image.Image]:
        """A list of PIL images from an array of numbers in [0, 1], shape (..., H, W, 3)."""
        values = np.asarray(images)
        pixels = (values.reshape(-1, *values.shape[-3:]) * 255).round().astype(np.uint8)
        return [Image.fromarray(image) for image in pixels]

    def save_pretrained(self, folder: str | Path, params: Mapping[str, Any]) -> None:
        """Write a folder that torch's StableDiffusionPipeline loads, and this one: safetensors only.

        Args: params, not replicated. A part whose parameters are those of the folder it was read from is copied from
        there byte for byte, in the precision it has; others are written in the precision that they have in `params`.
        """
        folder = Path(folder)
        for part, module in zip(PARTS, (self.text_encoder, self.unet, self.vae)):
            if self.source and weights.copy_part(self.source, folder, part, params[part], self.variant):
                continue
            weights.save_part(folder, part, params[part], module.config)
        save_tokenizer(self.tokenizer, self.source, folder)
        scheduler = self.scheduler.torch_config(**LATENTS)
        write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
        index = {
            "_class_name": "StableDiffusionPipeline",
            "feature_extractor": [None, None],
            "requires_safety_checker": False,
            "safety_checker": [None, None],
            "scheduler": ["diffusers", scheduler["_class_name"]],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        }
        write_json(folder / "model_index.json", index)
