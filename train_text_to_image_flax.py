#!/usr/bin/env python
"""Fine-tune every UNet weight of a Stable Diffusion 1.x or 2.x model on captioned images, in JAX.

python train_text_to_image_flax.py --pretrained_model_name_or_path MODEL --train_data_dir IMAGES
"""

from training_utils import cli


def parse_args(argv=None):
    return cli.parse(argv, script="train_text_to_image_flax", description=__doc__)


if __name__ == "__main__":
    # --help and a wrong flag are answered before the imports below, which take seconds.
    cli.hide_secrets(parse_args())

from training_utils.base import startup  # noqa: E402

startup.begin()

from dataclasses import asdict, dataclass  # noqa: E402
from functools import partial  # noqa: E402
from typing import Any  # noqa: E402

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from flax_diffusion import FlaxDDPMScheduler, FlaxStableDiffusionPipeline  # noqa: E402
from training_utils.base import losses  # noqa: E402
from training_utils.cli.options import PLAIN  # noqa: E402
from training_utils.data import image_ops, inspection  # noqa: E402
from training_utils.data.captions import choose_caption, shuffle_tags  # noqa: E402
from training_utils.jax_backend import models, processes, validation  # noqa: E402
from training_utils.jax_backend.ema import update_average  # noqa: E402
from training_utils.jax_backend.gradient import (  # noqa: E402
    accumulate_gradient,
    clip_gradient,
    select_tree,
    update_loss_scale,
)
from training_utils.jax_backend.processes import AXIS  # noqa: E402
from training_utils.jax_backend.run import Run  # noqa: E402
from training_utils.jax_backend.state import TrainingState, new_arrays  # noqa: E402
from training_utils.run import exit  # noqa: E402
from training_utils.run.base_model import check_prediction_type  # noqa: E402

PARTS = ["feature_extractor", "safety_checker", "scheduler", "text_encoder", "tokenizer", "unet", "vae"]
UPLOADED = ["README.md", "model_index.json", "validation/*.png", *(f"{part}/*" for part in PARTS)]
USAGE = """
import jax
from flax_diffusion import FlaxStableDiffusionPipeline

pipeline, params = FlaxStableDiffusionPipeline.from_pretrained("{model}")
ids = pipeline.prepare_inputs("what to draw")
images = pipeline(ids, params, jax.random.key(0)).images
pipeline.numpy_to_pil(images)[0].save("image.png")
"""
USAGE_IN_TORCH = """
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


def encode_images(vae, batch):
    """Mean and standard deviation of what the VAE makes of a batch's images, each (B, C, h, w)."""
    mean, std = vae(batch["pixels"], method="encode")
    return {"latent_mean": mean, "latent_std": std}


def encode_captions(text_encoder, batch):
    """The text encoder's last hidden states of a batch's captions, (B, tokens, D)."""
    return {"text_states": text_encoder(batch["tokens"])}


@dataclass
class Parts:
    """The parts of the base model.

    `pipeline` holds the networks, without parameters, and the model's own sampler with the changes that the flags ask
    for; `parameters` are those of the networks, by name, in host memory; `noise_schedule` is the one of the training.
    """

    pipeline: FlaxStableDiffusionPipeline
    parameters: dict[str, Any]
    noise_schedule: FlaxDDPMScheduler


def load_models(args: cli.Arguments) -> Parts:
    """Load the base model. Raises UserError for one that this script cannot train."""
    base = models.model_folder(
        args.pretrained_model_name_or_path, args.revision, args.variant, args.cache_dir, args.single_file_config
    )
    changes = args.schedule_changes
    config = models.load_scheduler_config(base)
    noise_schedule = FlaxDDPMScheduler.from_config(config | changes)
    check_prediction_type(noise_schedule.config, zero_snr_asked=args.rescale_betas_zero_snr)
    drawing_steps = args.validation_num_inference_steps if args.validation_prompts else None
    components = {
        "scheduler": models.sampling_scheduler(config, changes, drawing_steps),
        "tokenizer": models.load_tokenizer(base),
    }
    parameters = {}
    compute_type = models.TYPES[args.mixed_precision]
    for part in ("unet", "vae", "text_encoder"):
        components[part], parameters[part] = models.load_part(base, part, compute_type, args.variant)
    if args.gradient_checkpointing:
        components["unet"] = components["unet"].clone(gradient_checkpointing=True)
    return Parts(
        pipeline=models.make_pipeline(base, args.variant, components),
        parameters=parameters,
        noise_schedule=noise_schedule,
    )


def latent_shape_of(vae):
    """The channels of the VAE's latents, and how many pixels the side of one covers."""
    return vae.config.latent_channels, 2 ** (len(vae.config.block_out_channels) - 1)


def training_loss(unet, noise_schedule, batch, scaling_factor, objective=PLAIN):
    """The diffusion loss of each sample of a batch, which holds what `encode_images` and `encode_captions` make of
    it; shape (B,). The UNet is a function of its inputs.

    Latents are a sample of VAE(x) times the scaling factor (Rombach et al. 2022, arXiv 2112.10752); noise is mixed in
    float32 (Ho et al. 2020, arXiv 2006.11239, eq. 4), since half precision has too few levels of it. `objective`
    may weight the loss by min-SNR.
    """
    timesteps, noise, text_states = batch["timestep"], batch["noise"], batch["text_states"]
    latents = (
        batch["latent_mean"].astype(jnp.float32) + batch["latent_std"].astype(jnp.float32) * batch["latent_noise"]
    )
    latents = latents * scaling_factor
    noisy = noise_schedule.add_noise(latents, batch.get("input_noise", noise), timesteps)
    kind = noise_schedule.config.prediction_type
    target = noise if kind == "epsilon" else noise_schedule.get_velocity(latents, noise, timesteps)
    prediction = unet(noisy, timesteps, text_states)
    loss = jnp.square(prediction.astype(jnp.float32) - target).mean(axis=(1, 2, 3))
    if objective.snr_gamma is not None:
        snr = losses.signal_to_noise(jnp.asarray(noise_schedule.alphas_cumprod)[timesteps])
        loss = loss * losses.min_snr_weight(snr, objective.snr_gamma, kind)
    return loss


def sample_losses(params, batch, unet, noise_schedule, scaling_factor, objective=PLAIN):
    """`training_loss` with the UNet's parameters put in."""
    return training_loss(partial(unet.apply, {"params": params}), noise_schedule, batch, scaling_factor, objective)


def train_step(
    arrays,
    batch,
    learning_rate,
    *,
    unet,
    noise_schedule,
    scaling_factor,
    optimizer,
    objective,
    max_grad_norm,
    ema_decay,
):
    """One step on one device, of the devices that `processes.AXIS` joins. A pure function.

    Args: arrays, what is trained, see state.new_arrays; batch, arrays (micro-steps, B, ...), with what the frozen
    networks make of it; learning_rate, a scalar. The keywords are bound once. Returns (arrays, {"loss", "grad_norm",
    "applied"}), alike on every device.

    A gradient that is not finite changes nothing. Where the arrays have `halted`, neither does any that comes after
    it: the weights stay in the last good state until the host, which fetches the losses now and then, notices.
    """
    params = arrays["params"]
    scale = arrays["loss_scale"]["scale"] if "loss_scale" in arrays else 1.0

    def scaled_loss(params, micro_batch):
        losses = sample_losses(params, micro_batch, unet, noise_schedule, scaling_factor, objective)
        return scale * (losses * micro_batch["weight"]).sum()

    loss, gradients = accumulate_gradient(jax.value_and_grad(scaled_loss), params, batch)
    loss, gradients = jax.lax.pmean((loss, gradients), AXIS)
    loss, gradients = jax.tree.map(lambda value: value / scale, (loss, gradients))
    gradients, grad_norm = clip_gradient(gradients, max_grad_norm)
    changes, optimizer_state = optimizer.update(gradients, arrays["optimizer"], params)
    params = jax.tree.map(lambda value, change: value - learning_rate * change, params, changes)
    after = {"params": params, "optimizer": optimizer_state}
    if "average" in arrays:
        after["average"] = update_average(arrays["average"], params, ema_decay)
    applied = jnp.isfinite(grad_norm)
    if "halted" in arrays:
        applied &= ~arrays["halted"]
    after = select_tree(applied, after, {key: arrays[key] for key in after})
    if "halted" in arrays:
        after["halted"] = ~applied
    if "loss_scale" in arrays:
        after["loss_scale"] = update_loss_scale(arrays["loss_scale"], applied)
    return after, {"loss": loss, "grad_norm": grad_norm, "applied": applied}


def validation_step(params, batch, *, unet, noise_schedule, scaling_factor):
    """The sum of a validation batch's losses over the devices; arrays (1, B, ...)."""
    batch = jax.tree.map(lambda array: array[0], batch)
    losses = sample_losses(params, batch, unet, noise_schedule, scaling_factor)
    return jax.lax.psum((losses * batch["weight"]).sum(), AXIS)


def main(argv=None):
    args = parse_args(argv)
    if args.check_data:
        return inspection.check_data(args.data, args.resolution)
    run = Run(args, __file__, argv, base_model=args.pretrained_model_name_or_path, pipeline="StableDiffusionPipeline")

    # --- data and models ---------------------------------------------------------------------------------------------
    run.open_data()
    parts = load_models(args)
    pipeline = parts.pipeline
    unet = pipeline.unet
    run.warn_of_long_captions(pipeline.tokenizer)
    timesteps = parts.noise_schedule.config.num_train_timesteps
    channels, pixels_of_latent = latent_shape_of(pipeline.vae)
    transform = partial(SampleTransform, args, pipeline.tokenizer, (channels, pixels_of_latent), timesteps)
    train_set, val_set = run.samples(transform)

    # --- frozen networks: cached on disk, or run at each step --------------------------------------------------------
    encode = run.frozen_encoders()
    half = pipeline.vae.dtype
    image_key = ["stable diffusion", args.resolution, args.image_interpolation_mode]
    encode.images(encode_images, pipeline.vae, processes.cast(parts.parameters["vae"], half), cache_key=image_key)
    encode.captions(
        encode_captions,
        pipeline.text_encoder,
        processes.cast(parts.parameters["text_encoder"], half),
        with_empty=bool(args.caption_dropout),
    )

    # --- optimizer, schedule, EMA, resume ----------------------------------------------------------------------------
    run.plan_batches()
    optimizer = run.make_optimizer()
    fp16 = args.mixed_precision == "fp16"
    training = TrainingState(
        unet,
        new_arrays(
            parts.parameters.pop("unet"),
            optimizer,
            average=args.use_ema,
            loss_scaling=fp16,
            stop_on_nan=args.on_nan == "stop" and not fp16,  # an fp16 overflow is no fault: it lowers the loss scale
        ),
    )
    run.begin(training)

    fixed = {
        "unet": unet,
        "noise_schedule": parts.noise_schedule,
        "scaling_factor": pipeline.vae.config.scaling_factor,
    }
    bound_step = partial(
        train_step,
        **fixed,
        optimizer=optimizer,
        objective=args.objective,
        max_grad_norm=args.max_grad_norm,
        ema_decay=args.ema_decay,
    )
    step = processes.map_over_devices(bound_step, in_axes=(None, 0, None), donate=(0,))
    evaluate = processes.map_over_devices(partial(validation_step, **fixed), in_axes=(None, 0))

    def validate():
        """Validation loss and images with the weights that would be saved now."""
        with run.validating():
            if val_set is not None:
                run.log_val_loss(val_set, lambda batch: evaluate(training.result, encode(batch)))
            if run.prompts and processes.is_main():
                side = args.resolution // pixels_of_latent
                images = validation.draw_images(
                    pipeline,
                    encode.parameters | {"unet": training.result},
                    run.prompts,
                    seed=run.state.seed,
                    latent_shape=(channels, side, side),
                    **asdict(args.validation),
                )
                run.log_images(images)

    # --- the loop ----------------------------------------------------------------------------------------------------
    batches = run.batches()
    with run:  # SIGTERM and Ctrl-C end it after a step
        if run.validates_first():
            validate()
        while run.continues():
            batch = encode(next(batches))
            training.arrays, result = step(training.arrays, batch, run.learning_rate())
            # As in the torch scripts: the end of a step.
            stepped = not fp16 or bool(result["applied"])  # False: an fp16 overflow, only the data moved on
            run.end_step(result["loss"], result["grad_norm"], stepped)
            if run.checkpoint_due(stepped):
                run.save_checkpoint()
            if run.validation_due(stepped):
                validate()
    if run.ended_early:  # a dry run, or a signal: says how to continue
        return run.exit_code("unet", encode.parameters)

    # --- the result --------------------------------------------------------------------------------------------------
    def save_result():
        parameters = parts.parameters | {"unet": jax.device_get(training.result)}
        models.save_pipeline(args.output_dir, pipeline, parameters)

    return run.publish(
        save_result,
        training.write,
        tags=["stable-diffusion", "stable-diffusion-diffusers"],
        usage=USAGE.format(model=args.output_dir),
        public_usage=USAGE_IN_TORCH.format(model=run.repository or args.output_dir),
        uploaded=UPLOADED,
    )


if __name__ == "__main__":
    exit.run_main(main)
