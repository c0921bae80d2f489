#!/usr/bin/env python
"""Fine-tune a Kandinsky 2.2 decoder, image embedding to image, through low-rank adapters (LoRA).

accelerate launch train_text_to_image_lora_decoder.py --train_data_dir IMAGES
"""

from training_utils import cli


def parse_args(argv=None):
    return cli.parse(argv, script="train_text_to_image_lora_decoder", description=__doc__)


if __name__ == "__main__":
    # --help and a wrong flag are answered before the imports below, which take ten seconds.
    cli.hide_secrets(parse_args())

from training_utils.base import startup  # noqa: E402

startup.begin()
startup.prepare()

from dataclasses import dataclass  # noqa: E402
from functools import partial  # noqa: E402

import numpy as np  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from diffusers import (  # noqa: E402
    DDPMScheduler,
    KandinskyV22Pipeline,
    SchedulerMixin,
    UNet2DConditionModel,
    VQModel,
)
from PIL import Image, ImageOps  # noqa: E402
from transformers import CLIPImageProcessorPil, CLIPVisionModelWithProjection  # noqa: E402

from training_utils.base import losses  # noqa: E402
from training_utils.base.errors import UserError  # noqa: E402
from training_utils.cli.options import PLAIN  # noqa: E402
from training_utils.data import image_ops, inspection  # noqa: E402
from training_utils.run import exit  # noqa: E402
from training_utils.run.hub import card  # noqa: E402
from training_utils.torch_backend import frozen, kandinsky, lora, models, processes  # noqa: E402
from training_utils.torch_backend.ema import EMAWeights  # noqa: E402
from training_utils.torch_backend.gradient import prepare_network  # noqa: E402
from training_utils.torch_backend.lora import AdapterWeights  # noqa: E402
from training_utils.torch_backend.models import LatentShape  # noqa: E402
from training_utils.torch_backend.run import Run  # noqa: E402

UPLOADED = ["README.md", "pytorch_lora_weights.safetensors", "validation/*.png"]
USAGE = """
from diffusers import KandinskyV22Pipeline, KandinskyV22PriorPipeline

prior = KandinskyV22PriorPipeline.{prior}
decoder = KandinskyV22Pipeline.{decoder}
decoder.unet.load_lora_adapter("{model}", prefix="unet", use_safetensors=True)
decoder(**prior("what to draw")).images[0].save("image.png")
"""


class SampleTransform:
    """Makes a sample: the image, once more as CLIP sees it, and all that is drawn for it.

    Runs in the data workers.
    """

    def __init__(self, args, image_processor, latents, timesteps, val_samples=0):
        self.args = args
        self.image_processor = image_processor
        self.timesteps = timesteps
        # Of MOVQ: the latents' channels, and how many pixels the side of one covers.
        self.channels, self.factor = latents
        # Their number, 0 in training. A validation sample is the same at every evaluation.
        self.val_samples = val_samples
        self.random_flip = args.random_flip and not val_samples
        self.random_crop = args.random_crop and not val_samples
        # Set where there is a cache.
        self.image_cache = None

    def view(self, dataset, index, mirrored, crop_draw, size):
        """One view of an image, (width, height) pixels large; `crop_draw` draws its crop, None takes the middle."""
        args = self.args
        image = dataset.image(index)
        if mirrored:
            image = ImageOps.mirror(image)
        cut, _ = image_ops.crop(image, image_ops.largest_within(image.size, size), crop_draw)
        pixels = cut.resize(size, image_ops.FILTERS[args.image_interpolation_mode], reducing_gap=args.reducing_gap)
        seen = image if crop_draw is None else cut  # CLIP's processor takes the middle of the image by itself
        clip_pixels = self.image_processor(seen, return_tensors="np").pixel_values[0]
        return {"pixels": image_ops.to_array(pixels), "clip_pixels": clip_pixels}

    def blank(self):
        """What a cache holds for no image: CLIP sees zeros, the pipeline's condition for that; MOVQ sees black."""
        black = Image.new("RGB", (self.args.resolution, self.args.resolution))
        clip_pixels = self.image_processor(black, return_tensors="np").pixel_values[0]
        return {"pixels": image_ops.to_array(black), "clip_pixels": np.zeros_like(clip_pixels)}

    def __call__(self, dataset, index, draw):
        args = self.args
        train = not self.val_samples
        # Another row may stand in for the one at `draw.index`; it then takes that one's size.
        size = dataset.size(draw.index)
        width, height = size
        latent_shape = (self.channels, height // self.factor, width // self.factor)
        mirrored = self.random_flip and draw("flip").random() < 0.5
        crop_draw = draw("crop") if self.random_crop else None
        if self.image_cache:
            image = self.image_cache.read(index, mirrored, crop_draw, size)
        else:
            image = self.view(dataset, index, mirrored, crop_draw, size)
        dropped = train and args.caption_dropout and draw("caption_dropout").random() < args.caption_dropout
        if train:
            timestep = int(draw("timestep").integers(0, self.timesteps))
        else:
            # Spread over the full schedule, so that few images make a steady loss.
            timestep = int((index + 0.5) / self.val_samples * self.timesteps)
        sample = {
            **image,
            "timestep": np.int64(timestep),
            "noise": draw("noise").standard_normal(latent_shape, dtype=np.float32),
        }
        if dropped and self.image_cache:
            sample["image"] = self.image_cache.read_blank()["image"]
        elif dropped:
            sample["clip_pixels"] = np.zeros_like(sample["clip_pixels"])
        if train and args.noise_offset:
            shape = (self.channels, 1, 1)
            sample["noise"] += args.noise_offset * draw("noise_offset").standard_normal(shape, dtype=np.float32)
        return sample


@frozen.encoder
def encode_images(networks, batch):
    """What MOVQ and CLIP make of a batch's images: latents (B, C, h, w), which are x0 as they are, and embeddings
    (B, D)."""
    movq, image_encoder = networks
    latents = movq.encode(frozen.cast_for(movq, batch["pixels"])).latents
    return {
        "latents": latents,
        "image": image_encoder(frozen.cast_for(image_encoder, batch["clip_pixels"])).image_embeds,
    }


def training_loss(unet, noise_schedule, batch, objective=PLAIN):
    """The diffusion loss of each sample of a batch, which holds what `encode_images` makes of it; shape (B,).

    Noise is mixed into MOVQ's latents in float32 (Ho et al. 2020, arXiv 2006.11239, eq. 4); the UNet is told CLIP's
    embedding of the image. Of its output only the first C channels get a loss. The other C, the variance that the
    released decoders predict (Nichol & Dhariwal 2021, arXiv 2102.09672, section 3.1), get none, as in the original
    script, so that they follow what the layers before them learn. `objective` may weight the loss by min-SNR.
    """
    timesteps, noise = batch["timestep"], batch["noise"]
    latents, image = batch["latents"].float(), batch["image"].float()
    noisy = noise_schedule.add_noise(latents, noise, timesteps)
    kind = noise_schedule.config.prediction_type
    target = noise if kind == "epsilon" else noise_schedule.get_velocity(latents, noise, timesteps)
    prediction = unet(noisy, timesteps, None, added_cond_kwargs={"image_embeds": image}).sample
    prediction = prediction[:, : latents.shape[1]]
    loss = F.mse_loss(prediction.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))
    if objective.snr_gamma is not None:
        snr = losses.signal_to_noise(noise_schedule.alphas_cumprod[timesteps])
        loss = loss * losses.min_snr_weight(snr, objective.snr_gamma, kind)
    return loss


@dataclass
class Parts:
    """The parts of the decoder, and what sees images of the prior, in host memory until they are placed; None where a
    cache stands in for one.

    `noise_schedule` is the one of the training, `sampler` the decoder's own scheduler;
    `embeddings` are the prior's for the validation prompts.
    """

    image_processor: CLIPImageProcessorPil
    image_encoder: CLIPVisionModelWithProjection | None
    movq: VQModel | None
    unet: UNet2DConditionModel
    noise_schedule: DDPMScheduler
    sampler: SchedulerMixin
    latents: LatentShape
    embeddings: list[kandinsky.PromptEmbedding]


def load_models(args: cli.Arguments, accelerator: Accelerator, prompts: list[str], seed: int) -> Parts:
    """Load, freeze, cast. Raises UserError for a base model that this script cannot train."""
    variant, options = args.variant, (args.variant, args.cache_dir)
    prior_base = kandinsky.prior_folder(
        args.pretrained_prior_model_name_or_path, args.prior_revision, *options, draws_images=bool(prompts)
    )
    base = models.model_folder(
        args.pretrained_decoder_model_name_or_path, KandinskyV22Pipeline, args.decoder_revision, *options
    )
    noise_schedule = models.load_part(DDPMScheduler, base, "scheduler")
    if noise_schedule.config.prediction_type not in ("epsilon", "v_prediction"):
        raise UserError(
            f"the decoder predicts '{noise_schedule.config.prediction_type}'; this script trains epsilon and v"
        )
    image_processor = models.load_part(CLIPImageProcessorPil, prior_base, "image_processor")
    half = processes.frozen_dtype(accelerator)
    image_encoder = models.load_part(CLIPVisionModelWithProjection, prior_base, "image_encoder", variant, dtype=half)
    movq = models.load_part(VQModel, base, "movq", variant, dtype=half)
    unet = models.load_part(UNet2DConditionModel, base, "unet", variant, dtype=half)

    noise_schedule.alphas_cumprod = noise_schedule.alphas_cumprod.to(accelerator.device)
    for network in (image_encoder, movq):
        network.requires_grad_(False).eval()
    models.check_channels(unet, movq)
    unet.train()
    layers = [*lora.UNET_LAYERS, *lora.ADDED_KV_LAYERS]
    lora.add_adapter(unet, layers, args.rank, args.lora_alpha, args.lora_dropout, args.use_dora, seed)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if args.enable_xformers_memory_efficient_attention:
        models.enable_xformers(unet)
    latents = kandinsky.latent_shape(movq, unet, resolution=args.resolution)
    if args.aspect_ratio_bucketing:
        kandinsky.latent_shape(movq, unet, bucket_reso_steps=args.bucket_reso_steps)
    embeddings = []
    if prompts:
        embeddings = kandinsky.embed_prompts(
            prior_base,
            args.variant,
            image_encoder,
            accelerator.device,
            prompts,
            seed,
            args.validation_num_inference_steps,
            args.validation_guidance_scale,
        )
    return Parts(
        image_processor=image_processor,
        image_encoder=image_encoder,
        movq=movq,
        unet=unet,
        noise_schedule=noise_schedule,
        sampler=models.sampling_scheduler(base, {}),
        latents=latents,
        embeddings=embeddings,
    )


def usage(args, model, public=False):
    """The lines that draw with the result in the folder or repository `model`."""
    prior = card.loading_call(
        args.pretrained_prior_model_name_or_path, args.prior_revision, args.variant, public=public
    )
    decoder = card.loading_call(
        args.pretrained_decoder_model_name_or_path, args.decoder_revision, args.variant, public=public
    )
    return USAGE.format(prior=prior, decoder=decoder, model=model)


def main(argv=None):
    args = parse_args(argv)
    if args.check_data:
        return inspection.check_data(args.data, args.resolution, args.buckets)
    run = Run(args, __file__, argv, base_model=args.pretrained_decoder_model_name_or_path, adapted=["unet"])
    accelerator = run.accelerator

    # --- data and models ---------------------------------------------------------------------------------------------
    run.open_data()
    parts = load_models(args, accelerator, run.prompts, run.state.seed)
    unet = parts.unet
    noise_schedule = parts.noise_schedule
    adapted = {"unet": unet}
    timesteps = noise_schedule.config.num_train_timesteps
    transform = partial(SampleTransform, args, parts.image_processor, parts.latents, timesteps)
    train_set, val_set = run.samples(transform)

    # --- frozen networks: cached on disk, or run at each step --------------------------------------------------------
    encode = run.frozen_encoders()
    draws_images = bool(run.prompts)
    image_key = [
        "decoder",
        args.resolution,
        args.image_interpolation_mode,
        args.reducing_gap,
        repr(parts.image_processor),
    ]
    parts.movq, parts.image_encoder = encode.images(
        encode_images,
        [parts.movq, parts.image_encoder],
        cache_key=image_key,
        needed_again=[draws_images, False],
        blank=train_set.transform.blank() if args.caption_dropout else None,
    )
    frozen.release_memory([parts.movq, parts.image_encoder])
    unet.to(accelerator.device)

    # --- optimizer, schedule, EMA, resume ----------------------------------------------------------------------------
    run.plan_batches()
    optimizer, lr_scheduler = run.make_optimizer(lora.trainable_parameters(adapted.values()))
    # The loop calls `network`, which DDP may wrap; `unet` stays the bare model.
    network, optimizer, parameters = prepare_network(accelerator, unet, optimizer)
    ema = EMAWeights(adapted.values(), args.ema_decay) if args.use_ema else None
    weights = AdapterWeights(adapted, ema)
    run.begin(optimizer, lr_scheduler, weights, parameters)

    def val_loss(batch):
        """The loss of each sample of a validation batch, shape (B,)."""
        return training_loss(unet, noise_schedule, encode(batch))

    def validate():
        """Validation loss and images with the weights that would be saved now."""
        with run.validating([unet], ema, [parts.movq]):
            if val_set is not None:
                run.log_val_loss(val_set, val_loss)
            if run.prompts:
                pipeline = KandinskyV22Pipeline(unet, parts.sampler, parts.movq)
                run.log_images(
                    partial(kandinsky.draw_embedding, pipeline, **kandinsky.drawing(args.validation)), parts.embeddings
                )

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
                sample_losses = training_loss(network, noise_schedule, batch, args.objective)
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
        return run.exit_code(adapted, [parts.movq, parts.image_encoder], optimizer, ema)

    # --- the result --------------------------------------------------------------------------------------------------
    weights = weights.gather_full()
    return run.publish_weights(
        partial(lora.save_adapters, args.output_dir, adapted),
        weights,
        tags=["kandinsky", "lora"],
        usage=usage(args, args.output_dir),
        public_usage=usage(args, run.repository or args.output_dir, public=True),
        uploaded=UPLOADED,
    )


if __name__ == "__main__":
    exit.run_main(main)
