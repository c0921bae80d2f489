#!/usr/bin/env python
"""Fine-tune every UNet weight of a Stable Diffusion XL model on captioned images.

accelerate launch train_text_to_image_sdxl.py --pretrained_model_name_or_path MODEL --train_data_dir IMAGES
"""

from training_utils import cli


def parse_args(argv=None):
    return cli.parse(argv, script="train_text_to_image_sdxl", description=__doc__)


if __name__ == "__main__":
    # --help and a wrong flag are answered before the imports below, which take ten seconds.
    cli.hide_secrets(parse_args())

from training_utils.base import startup  # noqa: E402

startup.begin()
startup.prepare()

from dataclasses import asdict, dataclass  # noqa: E402
from functools import partial  # noqa: E402
from pathlib import Path  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from diffusers import AutoencoderKL, DDPMScheduler, SchedulerMixin, StableDiffusionXLPipeline, UNet2DConditionModel  # noqa: E402
from PIL import ImageOps  # noqa: E402
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, PreTrainedModel  # noqa: E402

from training_utils.base import draws, losses  # noqa: E402
from training_utils.cli.options import PLAIN  # noqa: E402
from training_utils.data import image_ops, inspection  # noqa: E402
from training_utils.data.captions import choose_caption, shuffle_tags  # noqa: E402
from training_utils.run import exit  # noqa: E402
from training_utils.run.base_model import check_prediction_type, timestep_probabilities  # noqa: E402
from training_utils.torch_backend import frozen, models, optimizers, processes  # noqa: E402
from training_utils.torch_backend.ema import EMAWeights  # noqa: E402
from training_utils.torch_backend.gradient import prepare_network  # noqa: E402
from training_utils.torch_backend.models import latent_shape  # noqa: E402
from training_utils.torch_backend.run import Run  # noqa: E402
from training_utils.torch_backend.state import FullWeights  # noqa: E402
from training_utils.torch_backend.validation import stable_diffusion_image  # noqa: E402

PARTS = ["scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "vae"]
UPLOADED = ["README.md", "model_index.json", "validation/*.png", *(f"{part}/*" for part in PARTS)]
USAGE = """
from diffusers import StableDiffusionXLPipeline

pipeline = StableDiffusionXLPipeline.from_pretrained("{model}", use_safetensors=True)
pipeline("what to draw").images[0].save("image.png")
"""


class SampleTransform:
    """Makes a sample: the image, its caption's tokens, and all that is drawn for it. Runs in the data workers."""

    def __init__(self, args, tokenizers, latents, probabilities, timesteps, val_samples=0):
        self.args = args
        self.tokenizers = tokenizers
        # Of the VAE: the latents' channels, and how many pixels the side of one covers.
        self.channels, self.factor = latents
        self.probabilities = probabilities
        self.timesteps = timesteps
        # Their number, 0 in training. A validation sample is the same at every evaluation.
        self.val_samples = val_samples
        self.random_flip = args.random_flip and not val_samples
        self.random_crop = not args.center_crop and not val_samples
        # Set where there are caches.
        self.image_cache = None
        self.caption_cache = None

    def view(self, dataset, index, mirrored, crop_draw, size):
        """One view of an image, (width, height) pixels large, and what the UNet is told of it; `crop_draw` draws its
        crop, None takes the middle."""
        image = dataset.image(index)
        original_size = (image.height, image.width)
        image = image_ops.resize(image, size, self.args.image_interpolation_mode)
        if mirrored:
            image = ImageOps.mirror(image)  # before the crop, whose corner the network is told
        image, corner = image_ops.crop(image, size, crop_draw)
        time_ids = np.array([*original_size, *corner, image.height, image.width], dtype=np.float32)
        return {"pixels": image_ops.to_array(image), "time_ids": time_ids}

    def tokenize(self, caption):
        tokens = {}
        for name, tokenizer in zip(("tokens", "tokens_2"), self.tokenizers, strict=True):
            ids = tokenizer(caption, max_length=tokenizer.model_max_length, padding="max_length", truncation=True)
            tokens[name] = np.array(ids.input_ids, dtype=np.int64)
        return tokens

    def __call__(self, dataset, index, draw):
        args = self.args
        train = not self.val_samples
        # Another row may stand in for the one at `draw.index`; it then takes that one's size.
        size = dataset.size(draw.index)
        width, height = size
        latent_shape = (self.channels, height // self.factor, width // self.factor)
        mirrored = self.random_flip and draw("flip").random() < 0.5
        crop_draw = draw("crop") if self.random_crop else None
        caption = choose_caption(dataset.captions(index), draw, args.caption_dropout if train else 0.0)
        if args.shuffle_tags and caption and train:
            caption = shuffle_tags(caption, draw, args.keep_tokens)
        if self.image_cache:
            image = self.image_cache.read(index, mirrored, crop_draw, size)
        else:
            image = self.view(dataset, index, mirrored, crop_draw, size)
        tokens = self.tokenize(caption or "")
        text = self.caption_cache.read(tokens) if self.caption_cache else tokens
        sample = {
            **image,
            **text,
            "caption_given": np.float32(caption is not None),
            "latent_noise": draw("latent").standard_normal(latent_shape, dtype=np.float32),
            "noise": draw("noise").standard_normal(latent_shape, dtype=np.float32),
        }
        if train:
            sample["timestep"] = np.int64(draws.choose_timestep(draw, self.timesteps, self.probabilities))
        else:
            # Spread over the full schedule, so that few images make a steady loss.
            sample["timestep"] = np.int64((index + 0.5) / self.val_samples * self.timesteps)
        if train and args.noise_offset:
            shape = (self.channels, 1, 1)
            sample["noise"] += args.noise_offset * draw("noise_offset").standard_normal(shape, dtype=np.float32)
        return sample


@frozen.encoder
def encode_images(vae, batch):
    """Mean and standard deviation of what the VAE makes of a batch's images, each (B, C, h, w)."""
    moments = vae.encode(frozen.cast_for(vae, batch["pixels"])).latent_dist
    mean, std = models.standardize_latents(vae, moments.mean, moments.std)
    return {"latent_mean": mean, "latent_std": std}


@frozen.encoder
def encode_captions(text_encoders, batch):
    """Text states (B, tokens, width of both encoders) and pooled text (B, projection) of a batch.

    The states are the penultimate layers of both encoders, side by side; pooled is the second one's projection (Podell
    et al. 2023, arXiv 2307.01952, section 2.1).
    """
    outputs = [
        encoder(tokens, output_hidden_states=True)
        for encoder, tokens in zip(text_encoders, (batch["tokens"], batch["tokens_2"]), strict=True)
    ]
    states = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    return {"text_states": states, "pooled": outputs[1].text_embeds}


def text_of(batch, zero_dropped):
    """The text states and the pooled text of an encoded batch, in float32. `zero_dropped` sets them to zero where the
    caption was dropped, which is what the pipeline feeds for an empty prompt, rather than the encoding of ""."""
    states, pooled = batch["text_states"].float(), batch["pooled"].float()
    if zero_dropped:
        states, pooled = states * batch["caption_given"][:, None, None], pooled * batch["caption_given"][:, None]
    return states, pooled


def training_loss(unet, noise_schedule, batch, scaling_factor, zero_dropped=True, objective=PLAIN):
    """The diffusion loss of each sample of a batch, which holds what `encode_images` and `encode_captions` make of
    it; shape (B,).

    As in train_text_to_image.py, but that the UNet is also told the pooled text, the image's first size, the corner
    of the crop that was cut and the target size (`time_ids`, pixels, float32: bfloat16 is exact only up to 256).
    """
    timesteps, noise = batch["timestep"], batch["noise"]
    text_states, pooled = text_of(batch, zero_dropped)
    latents = batch["latent_mean"].float() + batch["latent_std"].float() * batch["latent_noise"]
    latents = latents * scaling_factor
    noisy = noise_schedule.add_noise(latents, noise, timesteps)
    kind = noise_schedule.config.prediction_type
    target = noise if kind == "epsilon" else noise_schedule.get_velocity(latents, noise, timesteps)
    conditions = {"text_embeds": pooled, "time_ids": batch["time_ids"]}
    prediction = unet(noisy, timesteps, text_states, added_cond_kwargs=conditions).sample
    loss = F.mse_loss(prediction.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))
    if objective.snr_gamma is not None:
        snr = losses.signal_to_noise(noise_schedule.alphas_cumprod[timesteps])
        loss = loss * losses.min_snr_weight(snr, objective.snr_gamma, kind)
    return loss


@dataclass
class Parts:
    """The parts of the base model, in host memory until they are placed; None where a cache stands in for one.

    `noise_schedule` is the one of the training, `sampler` the model's own scheduler with the same changes;
    `zero_dropped` as in `text_of`.
    """

    base: Path
    tokenizers: list[CLIPTokenizer]
    text_encoders: list[PreTrainedModel | None]
    vae: AutoencoderKL | None
    scaling_factor: float
    unet: UNet2DConditionModel
    noise_schedule: DDPMScheduler
    sampler: SchedulerMixin
    zero_dropped: bool


def load_models(args: cli.Arguments, accelerator: Accelerator) -> Parts:
    """Load, freeze, cast. Raises UserError for a base model that this script cannot train."""
    name, variant, other_vae = args.pretrained_model_name_or_path, args.variant, args.pretrained_vae_model_name_or_path
    source = (args.revision, variant, args.cache_dir)
    base = models.model_folder(
        name, StableDiffusionXLPipeline, *source, saved=True, config=args.single_file_config, other_vae=other_vae
    )
    changes = args.schedule_changes
    noise_schedule = models.load_part(DDPMScheduler, base, "scheduler", **changes)
    check_prediction_type(noise_schedule.config, zero_snr_asked=args.rescale_betas_zero_snr)
    timestep_probabilities(args.timestep_bias, noise_schedule.config.num_train_timesteps)
    sampler = models.sampling_scheduler(base, changes)
    half = processes.frozen_dtype(accelerator)
    tokenizers = [models.load_part(CLIPTokenizer, base, part) for part in ("tokenizer", "tokenizer_2")]
    text_encoders = [
        models.load_part(CLIPTextModel, base, "text_encoder", variant, dtype=half),
        models.load_part(CLIPTextModelWithProjection, base, "text_encoder_2", variant, dtype=half),
    ]
    vae = models.load_sdxl_vae(base, variant, half, other_vae, args.cache_dir)
    unet = models.load_part(UNet2DConditionModel, base, "unet", variant, dtype=torch.float32)

    noise_schedule.alphas_cumprod = noise_schedule.alphas_cumprod.to(accelerator.device)
    for network in (vae, *text_encoders):
        network.requires_grad_(False).eval()
    models.check_channels(unet, vae)
    unet.train()
    if args.full_bf16:
        optimizers.to_bfloat16(unet)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if args.enable_xformers_memory_efficient_attention:
        models.enable_xformers(unet)
    if args.enable_npu_flash_attention:
        unet.enable_npu_flash_attention()
    config = StableDiffusionXLPipeline.load_config(base)
    return Parts(
        base=base,
        tokenizers=tokenizers,
        text_encoders=text_encoders,
        vae=vae,
        scaling_factor=vae.config.scaling_factor,
        unet=unet,
        noise_schedule=noise_schedule,
        sampler=sampler,
        zero_dropped=config.get("force_zeros_for_empty_prompt", True),
    )


def save_result(args, base, unet, sampler):
    """Write the pipeline into --output_dir; frozen parts are read again, to be saved in the precision they have."""
    vae = {}
    if args.pretrained_vae_model_name_or_path is not None:
        other = args.pretrained_vae_model_name_or_path
        vae["vae"] = models.load_replacement(AutoencoderKL, other, base, "vae", args.cache_dir)
    models.save_trained(
        StableDiffusionXLPipeline, base, args.output_dir, args.variant, unet=unet, scheduler=sampler, **vae
    )


def main(argv=None):
    args = parse_args(argv)
    if args.check_data:
        return inspection.check_data(args.data, args.resolution, args.buckets)
    run = Run(
        args,
        __file__,
        argv,
        base_model=args.pretrained_model_name_or_path,
        pipeline="StableDiffusionXLPipeline",
    )
    accelerator = run.accelerator

    # --- data and models ---------------------------------------------------------------------------------------------
    run.open_data()
    parts = load_models(args, accelerator)
    unet = parts.unet
    noise_schedule = parts.noise_schedule
    run.warn_of_long_captions(parts.tokenizers[0])
    timesteps = noise_schedule.config.num_train_timesteps
    probabilities = timestep_probabilities(args.timestep_bias, timesteps)
    transform = partial(SampleTransform, args, parts.tokenizers, latent_shape(parts.vae), probabilities, timesteps)
    train_set, val_set = run.samples(transform)

    # --- frozen networks: cached on disk, or run at each step --------------------------------------------------------
    encode = run.frozen_encoders()
    draws_images = bool(run.prompts)
    image_key = ["sdxl", args.resolution, args.image_interpolation_mode, *models.latent_statistics(parts.vae)]
    parts.vae = encode.images(encode_images, parts.vae, cache_key=image_key, needed_again=draws_images)
    parts.text_encoders = encode.captions(
        encode_captions, parts.text_encoders, needed_again=draws_images, with_empty=bool(args.caption_dropout)
    )
    frozen.release_memory([parts.vae, *parts.text_encoders])
    unet.to(accelerator.device)

    # --- optimizer, schedule, EMA, resume ----------------------------------------------------------------------------
    run.plan_batches()
    optimizer, lr_scheduler = run.make_optimizer(list(unet.parameters()))
    # The loop calls `network`, which DDP or FSDP may wrap; `unet` stays the bare model.
    network, optimizer, parameters = prepare_network(accelerator, unet, optimizer)
    ema = EMAWeights([unet], args.ema_decay, args.offload_ema) if args.use_ema else None
    weights = FullWeights("unet", unet, ema)
    run.begin(optimizer, lr_scheduler, weights, parameters)

    def val_loss(batch):
        """The loss of each sample of a validation batch, shape (B,)."""
        return training_loss(unet, noise_schedule, encode(batch), parts.scaling_factor, parts.zero_dropped)

    def validate():
        """Validation loss and images with the weights that would be saved now."""
        with run.validating([unet], ema, [parts.vae, *parts.text_encoders]):
            if val_set is not None:
                run.log_val_loss(val_set, val_loss)
            if run.prompts:
                pipeline = StableDiffusionXLPipeline(
                    parts.vae,
                    *parts.text_encoders,
                    *parts.tokenizers,
                    unet,
                    parts.sampler,
                    force_zeros_for_empty_prompt=parts.zero_dropped,
                    add_watermarker=False,
                )
                run.log_images(partial(stable_diffusion_image, pipeline, **asdict(args.validation)))

    # --- the loop ----------------------------------------------------------------------------------------------------
    batches = run.batches()
    step_loss = 0.0
    with run:  # SIGTERM and Ctrl-C end it after a step
        if run.validates_first():
            validate()
        while run.continues():
            batch = next(batches)
            run.seed_dropout()
            with accelerator.accumulate(network):
                batch = encode(batch)
                sample_losses = training_loss(
                    network, noise_schedule, batch, parts.scaling_factor, parts.zero_dropped, args.objective
                )
                loss = (sample_losses * batch["weight"]).sum()
                run.gradient.begin(loss)
                accelerator.backward(loss)
                step_loss += loss.detach() / args.gradient_accumulation_steps
                if accelerator.sync_gradients:
                    grad_norm = run.gradient.clip_and_check()
                optimizer.step()
                optimizer.zero_grad()
            if not accelerator.sync_gradients:
                continue
            # Same in every script: the end of a step.
            stepped = not accelerator.optimizer_step_was_skipped  # False: an fp16 overflow, only the data moved on
            if stepped:
                lr_scheduler.step()
                if ema is not None:
                    ema.step(run.gradient.skipped)
            run.end_step(step_loss, grad_norm, stepped)
            step_loss = 0.0
            if run.checkpoint_due(stepped):
                run.save_checkpoint()
            if run.validation_due(stepped):
                validate()
    if run.ended_early:  # a dry run, or a signal: says how to continue
        return run.exit_code({"unet": unet}, [parts.vae, *parts.text_encoders], optimizer, ema)

    # --- the result --------------------------------------------------------------------------------------------------
    weights = weights.gather_full()
    return run.publish_weights(
        partial(save_result, args, parts.base, weights.model, parts.sampler),
        weights,
        tags=["stable-diffusion-xl", "stable-diffusion-xl-diffusers"],
        usage=USAGE.format(model=args.output_dir),
        public_usage=USAGE.format(model=run.repository or args.output_dir),
        uploaded=UPLOADED,
    )


if __name__ == "__main__":
    exit.run_main(main)
