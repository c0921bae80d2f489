#!/usr/bin/env python
"""Fine-tune every UNet weight of a Stable Diffusion 1.x or 2.x model on captioned images.

accelerate launch train_text_to_image.py --pretrained_model_name_or_path MODEL --train_data_dir IMAGES
"""

from training_utils import cli


def parse_args(argv=None):
    return cli.parse(argv, script="train_text_to_image", description=__doc__)


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
from diffusers import AutoencoderKL, DDPMScheduler, SchedulerMixin, StableDiffusionPipeline, UNet2DConditionModel  # noqa: E402
from diffusers.training_utils import compute_dream_and_update_latents  # noqa: E402
from transformers import CLIPTextModel, CLIPTokenizer  # noqa: E402

from training_utils.base import losses  # noqa: E402
from training_utils.cli.options import PLAIN  # noqa: E402
from training_utils.data import image_ops, inspection  # noqa: E402
from training_utils.data.captions import choose_caption, shuffle_tags  # noqa: E402
from training_utils.run import exit  # noqa: E402
from training_utils.run.base_model import check_prediction_type  # noqa: E402
from training_utils.torch_backend import frozen, models, optimizers, processes  # noqa: E402
from training_utils.torch_backend.ema import EMAWeights  # noqa: E402
from training_utils.torch_backend.gradient import prepare_network  # noqa: E402
from training_utils.torch_backend.models import latent_shape  # noqa: E402
from training_utils.torch_backend.run import Run  # noqa: E402
from training_utils.torch_backend.state import FullWeights  # noqa: E402
from training_utils.torch_backend.validation import stable_diffusion_image  # noqa: E402

PARTS = ["feature_extractor", "safety_checker", "scheduler", "text_encoder", "tokenizer", "unet", "vae"]
UPLOADED = ["README.md", "model_index.json", "validation/*.png", *(f"{part}/*" for part in PARTS)]
USAGE = """
from diffusers import StableDiffusionPipeline

pipeline = StableDiffusionPipeline.from_pretrained("{model}", use_safetensors=True)
pipeline("what to draw").images[0].save("image.png")
"""


class SampleTransform:
    """Makes a sample: the image, its caption's tokens, and all that is drawn for it. Runs in the data workers."""

    def __init__(self, args, tokenizer, latents, timesteps, val_samples=0):
        self.args = args
        self.tokenizer = tokenizer
        self.timesteps = timesteps
        # Of the VAE: the latents' channels, and how many pixels the side of one covers.
        self.channels, self.factor = latents
        # Their number, 0 in training. A validation sample is the same at every evaluation.
        self.val_samples = val_samples
        self.random_flip = args.random_flip and not val_samples
        self.random_crop = not args.center_crop and not val_samples
        # Set where there are caches.
        self.image_cache = None
        self.caption_cache = None

    def view(self, dataset, index, mirrored, crop_draw, size):
        """One view of an image, (width, height) pixels large; `crop_draw` draws its crop, None takes the middle."""
        image = image_ops.resize(dataset.image(index), size, self.args.image_interpolation_mode)
        image, _ = image_ops.crop(image, size, crop_draw)
        pixels = image_ops.to_array(image)
        return {"pixels": np.ascontiguousarray(pixels[:, :, ::-1] if mirrored else pixels)}

    def tokenize(self, caption):
        length = self.tokenizer.model_max_length
        tokens = self.tokenizer(caption, max_length=length, padding="max_length", truncation=True)
        return {"tokens": np.array(tokens.input_ids, dtype=np.int64)}

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
        if train:
            timestep = int(draw("timestep").integers(0, self.timesteps))
        else:
            # Spread over the full schedule, so that few images make a steady loss.
            timestep = int((index + 0.5) / self.val_samples * self.timesteps)
        sample = {
            **image,
            **text,
            "timestep": np.int64(timestep),
            "latent_noise": draw("latent").standard_normal(latent_shape, dtype=np.float32),
            "noise": draw("noise").standard_normal(latent_shape, dtype=np.float32),
        }
        if train and args.noise_offset:
            shape = (self.channels, 1, 1)
            sample["noise"] += args.noise_offset * draw("noise_offset").standard_normal(shape, dtype=np.float32)
        if train and args.input_perturbation:
            extra = draw("input_perturbation").standard_normal(latent_shape, dtype=np.float32)
            sample["input_noise"] = sample["noise"] + np.float32(args.input_perturbation) * extra
        return sample


@frozen.encoder
def encode_images(vae, batch):
    """Mean and standard deviation of what the VAE makes of a batch's images, each (B, C, h, w)."""
    moments = vae.encode(frozen.cast_for(vae, batch["pixels"])).latent_dist
    return {"latent_mean": moments.mean, "latent_std": moments.std}


@frozen.encoder
def encode_captions(text_encoder, batch):
    """The text encoder's last hidden states of a batch's captions, (B, tokens, D)."""
    return {"text_states": text_encoder(batch["tokens"]).last_hidden_state}


def training_loss(unet, noise_schedule, batch, scaling_factor, objective=PLAIN):
    """The diffusion loss of each sample of a batch, which holds what `encode_images` and `encode_captions` make of
    it; shape (B,).

    Latents are a sample of VAE(x) times the scaling factor (Rombach et al. 2022, arXiv 2112.10752); noise is mixed in
    float32 (Ho et al. 2020, arXiv 2006.11239, eq. 4), since half precision has too few levels of it. `objective`
    says whether min-SNR weights the loss and whether DREAM corrects input and target.
    """
    timesteps, noise, text_states = batch["timestep"], batch["noise"], batch["text_states"]
    latents = batch["latent_mean"].float() + batch["latent_std"].float() * batch["latent_noise"]
    latents = latents * scaling_factor
    noisy = noise_schedule.add_noise(latents, batch.get("input_noise", noise), timesteps)
    kind = noise_schedule.config.prediction_type
    target = noise if kind == "epsilon" else noise_schedule.get_velocity(latents, noise, timesteps)
    if objective.dream_p is not None:
        noisy, target = compute_dream_and_update_latents(
            unet, noise_schedule, timesteps, noise, noisy, target, text_states, objective.dream_p
        )
    prediction = unet(noisy, timesteps, text_states).sample
    loss = F.mse_loss(prediction.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))
    if objective.snr_gamma is not None:
        snr = losses.signal_to_noise(noise_schedule.alphas_cumprod[timesteps])
        loss = loss * losses.min_snr_weight(snr, objective.snr_gamma, kind)
    return loss


@dataclass
class Parts:
    """The parts of the base model, in host memory until they are placed; None where a cache stands in for one.

    `noise_schedule` is the one of the training, `sampler` the model's own scheduler with the same changes.
    """

    base: Path
    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel | None
    vae: AutoencoderKL | None
    scaling_factor: float
    unet: UNet2DConditionModel
    noise_schedule: DDPMScheduler
    sampler: SchedulerMixin


def load_models(args: cli.Arguments, accelerator: Accelerator) -> Parts:
    """Load, freeze, cast. Raises UserError for a base model that this script cannot train."""
    name, variant = args.pretrained_model_name_or_path, args.variant
    source = (args.revision, variant, args.cache_dir)
    base = models.model_folder(name, StableDiffusionPipeline, *source, saved=True, config=args.single_file_config)
    unet_base = base
    if args.non_ema_revision is not None:
        unet_base = models.model_folder(name, StableDiffusionPipeline, args.non_ema_revision, variant, args.cache_dir)
    changes = args.schedule_changes
    noise_schedule = models.load_part(DDPMScheduler, base, "scheduler", **changes)
    check_prediction_type(noise_schedule.config, zero_snr_asked=args.rescale_betas_zero_snr, dream=args.dream_training)
    sampler = models.sampling_scheduler(base, changes)
    tokenizer = models.load_part(CLIPTokenizer, base, "tokenizer")
    half = processes.frozen_dtype(accelerator)
    text_encoder = models.load_part(CLIPTextModel, base, "text_encoder", variant=variant, dtype=half)
    vae = models.load_part(AutoencoderKL, base, "vae", variant=variant, dtype=half)
    unet = models.load_part(UNet2DConditionModel, unet_base, "unet", variant=variant, dtype=torch.float32)

    noise_schedule.alphas_cumprod = noise_schedule.alphas_cumprod.to(accelerator.device)
    for network in (vae, text_encoder):
        network.requires_grad_(False).eval()
    models.check_channels(unet, vae)
    unet.train()
    if args.full_bf16:
        optimizers.to_bfloat16(unet)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if args.enable_xformers_memory_efficient_attention:
        models.enable_xformers(unet)
    return Parts(
        base=base,
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=vae,
        scaling_factor=vae.config.scaling_factor,
        unet=unet,
        noise_schedule=noise_schedule,
        sampler=sampler,
    )


def save_result(args, base, unet, sampler):
    """Write the pipeline into --output_dir; frozen parts are read again, to be saved in the precision they have."""
    models.save_trained(StableDiffusionPipeline, base, args.output_dir, args.variant, unet=unet, scheduler=sampler)


def main(argv=None):
    args = parse_args(argv)
    if args.check_data:
        return inspection.check_data(args.data, args.resolution, args.buckets)
    run = Run(args, __file__, argv, base_model=args.pretrained_model_name_or_path, pipeline="StableDiffusionPipeline")
    accelerator = run.accelerator

    # --- data and models ---------------------------------------------------------------------------------------------
    run.open_data()
    parts = load_models(args, accelerator)
    unet = parts.unet
    noise_schedule = parts.noise_schedule
    run.warn_of_long_captions(parts.tokenizer)
    timesteps = noise_schedule.config.num_train_timesteps
    transform = partial(SampleTransform, args, parts.tokenizer, latent_shape(parts.vae), timesteps)
    train_set, val_set = run.samples(transform)

    # --- frozen networks: cached on disk, or run at each step --------------------------------------------------------
    encode = run.frozen_encoders()
    draws_images = bool(run.prompts)
    image_key = ["stable diffusion", args.resolution, args.image_interpolation_mode]
    parts.vae = encode.images(encode_images, parts.vae, cache_key=image_key, needed_again=draws_images)
    parts.text_encoder = encode.captions(
        encode_captions, parts.text_encoder, needed_again=draws_images, with_empty=bool(args.caption_dropout)
    )
    frozen.release_memory([parts.vae, parts.text_encoder])
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
        return training_loss(unet, noise_schedule, encode(batch), parts.scaling_factor)

    def validate():
        """Validation loss and images with the weights that would be saved now."""
        with run.validating([unet], ema, [parts.vae, parts.text_encoder]):
            if val_set is not None:
                run.log_val_loss(val_set, val_loss)
            if run.prompts:
                pipeline = StableDiffusionPipeline(
                    parts.vae,
                    parts.text_encoder,
                    parts.tokenizer,
                    unet,
                    parts.sampler,
                    safety_checker=None,
                    feature_extractor=None,
                    requires_safety_checker=False,
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
                sample_losses = training_loss(network, noise_schedule, batch, parts.scaling_factor, args.objective)
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
        return run.exit_code({"unet": unet}, [parts.vae, parts.text_encoder], optimizer, ema)

    # --- the result --------------------------------------------------------------------------------------------------
    weights = weights.gather_full()
    return run.publish_weights(
        partial(save_result, args, parts.base, weights.model, parts.sampler),
        weights,
        tags=["stable-diffusion", "stable-diffusion-diffusers"],
        usage=USAGE.format(model=args.output_dir),
        public_usage=USAGE.format(model=run.repository or args.output_dir),
        uploaded=UPLOADED,
    )


if __name__ == "__main__":
    exit.run_main(main)
