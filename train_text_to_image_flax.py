#!/usr/bin/env python
"""Fine-tune every UNet weight of a Stable Diffusion 1.x or 2.x model on captioned images, in JAX.

python train_text_to_image_flax.py --pretrained_model_name_or_path MODEL --train_data_dir IMAGES
"""

from training_utils.cli import flags

OWN_MODEL_FLAGS = [
    flags.Flag("from_pt", bool, False, "accepted for old command lines: safetensors are read in any case")
]
OWN_HARDWARE_FLAGS = [
    flags.Flag("compilation_cache_dir", help="folder that keeps the compiled step for the next start"),
]
TRACKERS = ("tensorboard", "wandb", "all", "none")
NOT_IN_JAX = {
    *("optimizer", "use_8bit_adam", "offload_ema", "foreach_ema", "dream_training", "dream_detail_preservation"),
    *("allow_tf32", "enable_xformers_memory_efficient_attention", "process_group_timeout"),
}
HELP = {
    "dataloader_num_workers": "threads that read images ahead; 0 reads between the steps",
    "train_batch_size": "images per device and micro-step; lower it when memory runs out",
    "seed": "every draw of the run comes from it; left out, the checkpoint's that is continued, else the default",
    "scale_lr": "multiply the learning rate by accumulation steps x batch size x devices",
    "mixed_precision": "precision of the computation; the weights stay float32. bf16 is the one for TPUs",
}


def parse_args(argv=None):
    groups = [
        (flags.MODEL[0], [*flags.MODEL[1], flags.SINGLE_FILE_CONFIG, *OWN_MODEL_FLAGS]),
        flags.DATA,
        flags.TRAINING,
        flags.OPTIMIZATION,
        (flags.OBJECTIVE[0], flags.OBJECTIVE[1] + flags.RECTIFICATION),
        flags.EMA,
        (flags.VALIDATION[0], [flags.VALIDATION_PROMPTS, *flags.VALIDATION[1]]),
        flags.CHECKPOINTS,
        flags.CACHES,
        (flags.HARDWARE[0], flags.HARDWARE[1] + OWN_HARDWARE_FLAGS),
        flags.REPORTING,
    ]
    groups = [(title, [in_jax(flag) for flag in group if flag.name not in NOT_IN_JAX]) for title, group in groups]
    defaults = {"output_dir": "sd-model-finetuned", "seed": 0, "mixed_precision": "no"}
    return flags.parse(argv, __doc__.splitlines()[0], groups, defaults)


def in_jax(flag):
    """A flag of the torch scripts as it is here."""
    flag = flag._replace(help=HELP.get(flag.name, flag.help))
    return flag._replace(choices=TRACKERS) if flag.name == "report_to" else flag


if __name__ == "__main__":
    # --help and a wrong flag are answered before the imports below, which take seconds.
    flags.hide_secrets(parse_args())

from training_utils.base import startup  # noqa: E402

startup.begin()

from functools import partial  # noqa: E402
from pathlib import Path  # noqa: E402

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from flax_diffusion import FlaxDDPMScheduler  # noqa: E402
from training_utils.base import losses  # noqa: E402
from training_utils.base.console import say, warn  # noqa: E402
from training_utils.base.errors import UserError  # noqa: E402
from training_utils.data import captions, checking, image_ops, inspection, opening, selection  # noqa: E402
from training_utils.data.plan import BatchPlan  # noqa: E402
from training_utils.data.samples import Samples  # noqa: E402
from training_utils.jax_backend import dry_run, loader, models, optimizers, validation  # noqa: E402
from training_utils.jax_backend.devices import (  # noqa: E402
    AXIS,
    Pace,
    any_process,
    cast,
    check_precision,
    connect_hosts,
    device_name,
    from_main,
    gather,
    is_main,
    keep_compiled,
    largest_of_processes,
    local_mesh,
    map_over_devices,
    memory_metrics,
    replicate,
)
from training_utils.jax_backend.frozen import Encoder, cache_captions, cache_images  # noqa: E402
from training_utils.jax_backend.state import load_state, save_state  # noqa: E402
from training_utils.jax_backend.trackers import end_training, log_metrics, make_trackers, say_skipped  # noqa: E402
from training_utils.run import checkpoints, commands, exit, output_folder, resume, summary  # noqa: E402
from training_utils.run.cadence import checkpoint_due, validation_due  # noqa: E402
from training_utils.run.dry_run import STEPS  # noqa: E402
from training_utils.run.facts import collect_facts  # noqa: E402
from training_utils.run.grids import grid_name, publish_images, standing_grids  # noqa: E402
from training_utils.run.hub import card, upload  # noqa: E402
from training_utils.run.metrics import Metrics  # noqa: E402
from training_utils.run.progress import Progress, report_not_finite  # noqa: E402
from training_utils.run.provenance import Provenance  # noqa: E402
from training_utils.run.signals import Interruption  # noqa: E402
from training_utils.run.trackers import tracker_config  # noqa: E402

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
        self.args, self.tokenizer, self.timesteps = args, tokenizer, timesteps
        self.channels, self.factor = latents  # of the VAE: the latents' channels, and pixels a side of one
        self.val_samples = val_samples  # their number; a validation sample is the same at every evaluation
        self.mirrors, self.cropped = args.random_flip and not val_samples, not (args.center_crop or val_samples)
        self.images = self.captions = None  # the caches, where there are any

    def show(self, rows, index, mirrored, corner, size):
        """One view of an image, (width, height) pixels large; `corner` draws its crop, None takes the middle."""
        image = image_ops.resize(rows.image(index), size, self.args.image_interpolation_mode)
        image, _ = image_ops.crop(image, size, corner)
        pixels = image_ops.to_array(image)
        return {"pixels": np.ascontiguousarray(pixels[:, :, ::-1] if mirrored else pixels)}

    def tokenize(self, caption):
        length = self.tokenizer.model_max_length
        tokens = self.tokenizer(caption, max_length=length, padding="max_length", truncation=True)
        return {"tokens": np.array(tokens.input_ids, dtype=np.int64)}

    def __call__(self, rows, index, draw):
        args, train = self.args, not self.val_samples
        width, height = size = rows.size(draw.index)  # of the place, whichever row is shown in it
        latent_shape = (self.channels, height // self.factor, width // self.factor)
        mirrored = self.mirrors and draw("flip").random() < 0.5
        corner = draw("crop") if self.cropped else None
        caption = captions.choose_caption(rows.captions(index), draw, args.caption_dropout if train else 0.0)
        if args.shuffle_tags and caption and train:
            caption = captions.shuffle_tags(caption, draw, args.keep_tokens)
        image = self.images.read if self.images else partial(self.show, rows)
        text = self.tokenize(caption or "")
        if train:
            timestep = int(draw("timestep").integers(0, self.timesteps))
        else:  # spread over the whole schedule, so that few images make a steady loss
            timestep = int((index + 0.5) / self.val_samples * self.timesteps)
        sample = {
            **image(index, mirrored, corner, size),
            **(self.captions.read(text) if self.captions else text),
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


def training_loss(unet, schedule, batch, scaling_factor, snr_gamma=None):
    """The diffusion loss of each sample of a batch, which holds what `encode_images` and `encode_captions` make of
    it; shape (B,). The UNet is a function of its inputs.

    Latents are a sample of VAE(x) times the scaling factor (Rombach et al. 2022, arXiv 2112.10752); noise is mixed in
    float32 (Ho et al. 2020, arXiv 2006.11239, eq. 4), since half precision has too few levels of it. `snr_gamma`
    weights by min-SNR.
    """
    timesteps, noise, text_states = batch["timestep"], batch["noise"], batch["text_states"]
    latents = (
        batch["latent_mean"].astype(jnp.float32) + batch["latent_std"].astype(jnp.float32) * batch["latent_noise"]
    )
    latents = latents * scaling_factor
    noisy = schedule.add_noise(latents, batch.get("input_noise", noise), timesteps)
    kind = schedule.config.prediction_type
    target = noise if kind == "epsilon" else schedule.get_velocity(latents, noise, timesteps)
    prediction = unet(noisy, timesteps, text_states)
    loss = jnp.square(prediction.astype(jnp.float32) - target).mean(axis=(1, 2, 3))
    if snr_gamma is not None:
        snr = losses.signal_to_noise(jnp.asarray(schedule.alphas_cumprod)[timesteps])
        loss = loss * losses.min_snr_weight(snr, snr_gamma, kind)
    return loss


def sample_losses(params, batch, unet, schedule, scaling_factor, snr_gamma=None):
    """`training_loss` with the UNet's parameters put in."""
    return training_loss(partial(unet.apply, {"params": params}), schedule, batch, scaling_factor, snr_gamma)


def train_step(
    trained, batch, learning_rate, *, unet, schedule, scaling_factor, optimizer, snr_gamma, max_grad_norm, ema_decay
):
    """One step on one device, of the devices that `engine.AXIS` joins. A pure function.

    Args: trained, the training state: a dict of params, optimizer and, where they are used, average and loss_scale;
    batch, arrays (micro-steps, B, ...), with what the frozen networks make of it; learning_rate, a scalar. The
    keywords are bound once. Returns (trained, {"loss", "grad_norm", "applied"}), alike on every device.

    A gradient that is not finite changes nothing. Where the state has `held`, neither does any that comes after it:
    the weights stay in the last good state until the host, which looks at the losses now and then, notices.
    """
    params, scale = trained["params"], trained["loss_scale"]["scale"] if "loss_scale" in trained else 1.0

    def scaled_loss(params, micro_batch):
        weight = micro_batch["weight"]
        return scale * (sample_losses(params, micro_batch, unet, schedule, scaling_factor, snr_gamma) * weight).sum()

    loss, gradients = optimizers.accumulated(jax.value_and_grad(scaled_loss), params, batch)
    loss, gradients = jax.lax.pmean((loss, gradients), AXIS)
    loss, gradients = jax.tree.map(lambda value: value / scale, (loss, gradients))
    gradients, norm = optimizers.clip_gradient(gradients, max_grad_norm)
    steps, optimizer_state = optimizer.update(gradients, trained["optimizer"], params)
    params = jax.tree.map(lambda value, step: value - learning_rate * step, params, steps)
    after = {"params": params, "optimizer": optimizer_state}
    if "average" in trained:
        after["average"] = optimizers.move_average(trained["average"], params, ema_decay)
    applied = jnp.isfinite(norm)
    if "held" in trained:
        applied &= ~trained["held"]
    after = optimizers.where(applied, after, {key: trained[key] for key in after})
    if "held" in trained:
        after["held"] = ~applied
    if "loss_scale" in trained:
        after["loss_scale"] = optimizers.move_loss_scale(trained["loss_scale"], applied)
    return after, {"loss": loss, "grad_norm": norm, "applied": applied}


def validation_step(params, batch, *, unet, schedule, scaling_factor):
    """The sum of a held-out batch's losses over the devices; arrays (1, B, ...)."""
    batch = jax.tree.map(lambda array: array[0], batch)
    loss = sample_losses(params, batch, unet, schedule, scaling_factor) * batch["weight"]
    return jax.lax.psum(loss.sum(), AXIS)


def load_models(args):
    """The base model: (pipeline, parameters, schedule).

    `pipeline` holds the networks and the model's own sampler, `parameters` is a dict by part, `schedule` the noise
    schedule of the training.
    """
    base = models.model_folder(
        args.pretrained_model_name_or_path, args.revision, args.variant, args.cache_dir, args.single_file_config
    )
    changes = flags.schedule_changes(args)
    config = models.load_scheduler_config(base)
    schedule = FlaxDDPMScheduler.from_config(config | changes)
    check_prediction_type(args, schedule.config)
    steps = args.validation_num_inference_steps if args.validation_prompts else None
    parts = {"scheduler": models.sampling_scheduler(config, changes, steps), "tokenizer": models.load_tokenizer(base)}
    parameters, half = {}, models.TYPES[args.mixed_precision]
    for part in ("unet", "vae", "text_encoder"):
        parts[part], parameters[part] = models.load_part(base, part, half, args.variant)
    if args.gradient_checkpointing:
        parts["unet"] = parts["unet"].clone(gradient_checkpointing=True)
    return models.make_pipeline(base, args.variant, parts), parameters, schedule


def check_prediction_type(args, config):
    """Objections that need the model's own scheduler, beyond those that the flags alone raise."""
    if config.prediction_type not in ("epsilon", "v_prediction"):
        raise UserError(f"the model predicts '{config.prediction_type}'; this script trains epsilon and v_prediction")
    if config.rescale_betas_zero_snr and config.prediction_type == "epsilon":
        problem = "with zero terminal SNR the last timestep is pure noise, from which epsilon cannot be predicted"
        if args.rescale_betas_zero_snr:
            raise UserError(f"{problem}; add --prediction_type v_prediction")
        warn(f"{problem}, and this base model has such a schedule; --prediction_type v_prediction goes with it")


def main(argv=None):
    args = parse_args(argv)
    command = flags.without_secrets(argv)
    if args.check_data:
        return inspection.check_data(flags.data_source(args), args.resolution)

    # --- processes, seed and where to begin --------------------------------------------------------------------------
    if args.compilation_cache_dir:
        keep_compiled(args.compilation_cache_dir)
    connect_hosts()
    check_precision(args.mixed_precision)
    mesh = local_mesh()
    devices = mesh.size * jax.process_count()
    for notice in args.notices:
        warn(notice)
    seed = args.seed if "seed" in args.given else None
    resume_from, state = from_main(
        lambda: resume.begin_run(
            args.output_dir, args.resume_from_checkpoint, seed, otherwise=args.seed, writes=not args.dry_run
        )
    )
    from_main(lambda: output_folder.refuse_another_result(args.output_dir, pipeline="StableDiffusionPipeline"))
    repository, uploads = upload.open_uploads(from_main, is_main(), **flags.hub(args))

    # --- data and models ---------------------------------------------------------------------------------------------
    rows = opening.load_dataset(**flags.data_source(args))
    rows = selection.take_subset(rows, args.max_train_samples, state.seed)
    unusable = from_main(lambda: checking.check_dataset(rows, args.on_bad_sample))
    rows = rows.without(unusable)
    rows.sizes = np.full((len(rows), 2), args.resolution)
    rows, val_dataset = selection.split_validation(rows, args.validation_split, state.seed)
    pipeline, parameters, schedule = load_models(args)
    tokenizer, text_encoder, vae, unet = pipeline.tokenizer, pipeline.text_encoder, pipeline.vae, pipeline.unet
    if is_main():
        captions.warn_of_long_captions(rows, tokenizer)
    latents = (vae.config.latent_channels, 2 ** (len(vae.config.block_out_channels) - 1))
    prepare = SampleTransform(args, tokenizer, latents, schedule.config.num_train_timesteps)
    samples = Samples(rows, prepare, state.seed, args.on_bad_sample)
    if val_dataset is not None:
        prepare = SampleTransform(args, tokenizer, latents, schedule.config.num_train_timesteps, len(val_dataset))
        val_samples = Samples(val_dataset, prepare, state.seed, on_bad_sample="skip")

    # --- what is frozen runs once ------------------------------------------------------------------------------------
    sets = [samples, val_samples] if val_dataset is not None else [samples]
    keeping = (flags.encoding_folder(args), sets, args.train_batch_size, mesh)
    frozen = {part: cast(parameters[part], vae.dtype) for part in ("vae", "text_encoder")}
    see, read = Encoder(encode_images, vae, "pixels"), Encoder(encode_captions, text_encoder, "tokens")
    if args.cache_latents:
        settings = ["stable diffusion", args.resolution, args.image_interpolation_mode]
        cache_images(*keeping, see, frozen["vae"], settings, args.cached_crops)
    else:
        frozen["vae"] = replicate(frozen["vae"], mesh)
    if args.cache_text_embeddings:
        cache_captions(*keeping, read, frozen["text_encoder"], bool(args.caption_dropout))
    else:
        frozen["text_encoder"] = replicate(frozen["text_encoder"], mesh)

    def encode(batch):
        """A batch with what the frozen networks make of it; caches have put it there already."""
        batch = batch if args.cache_latents else see(frozen["vae"], batch)
        return batch if args.cache_text_embeddings else read(frozen["text_encoder"], batch)

    # --- optimizer and learning rate, in steps ---------------------------------------------------------------------
    updates = BatchPlan.of(rows, state.seed, args.train_batch_size, args.gradient_accumulation_steps, devices)
    if args.max_train_steps is None:
        args.max_train_steps = args.num_train_epochs * updates.per_epoch
    optimizer = optimizers.make_optimizer(
        (args.adam_beta1, args.adam_beta2), args.adam_weight_decay, args.adam_epsilon
    )
    learning_rate = optimizers.learning_rate_curve(
        args.lr_scheduler,
        args.learning_rate * (updates.window if args.scale_lr else 1),
        args.lr_warmup_steps,
        args.max_train_steps,
        args.lr_num_cycles,
        args.lr_power,
    )
    fp16 = args.mixed_precision == "fp16"  # whose overflows are no fault: they lower the scale of the loss
    hold = args.on_nan == "stop" and not fp16
    trained = optimizers.new_state(parameters.pop("unet"), optimizer, args.use_ema, fp16, hold)

    # --- resume ------------------------------------------------------------------------------------------------------
    provenance = Provenance(
        script=Path(__file__).name,
        world_size=devices,
        settings=flags.mathematics(args),
        samples=len(rows),
        dataset_sha256=from_main(rows.fingerprint),
    )
    if resume_from:
        from_main(lambda: resume.warn_of_differences(resume_from, provenance))
        resume.require_everywhere(resume_from, gather)
        trained = load_state(resume_from, trained, unet)
    trained = replicate(trained, mesh)
    trackers = make_trackers(
        args.report_to,
        Path(args.output_dir) / args.logging_dir,
        args.tracker_project_name,
        tracker_config(flags.public(args)),
    )

    facts = collect_facts(
        provenance=provenance,
        base_model=args.pretrained_model_name_or_path,
        device=device_name(),
        parameters=jax.tree.leaves(trained["params"]),
        plan=updates,
        val_dataset=val_dataset,
        steps=args.max_train_steps,
        state=state,
    )
    summary.print_start_summary(facts, args.output_dir)
    if is_main() and not args.dry_run:
        output_folder.write_run_file(args.output_dir, flags.as_file(args, provenance.script, state.seed))
        trackers.append(Metrics(args.output_dir, state.step, facts.to_record()))

    def save(state):
        """Write a checkpoint of a RunState. Returns its folder, or None where it could not be written."""
        folder = checkpoints.save_checkpoint(
            args.output_dir,
            state,
            lambda folder: save_state(folder, trained, unet),
            provenance,
            limit=args.checkpoints_total_limit,
            is_main=is_main(),
            any_process=any_process,
        )
        return uploads.add(folder)

    def not_finite(step, loss, before):
        def keep():
            folder = save(before)
            uploads.finish(from_main)
            end_training(trackers)
            return folder

        names = updates.names(rows, before.position)
        report_not_finite(step, loss, names, args.on_nan == "stop", keep)

    progress = Progress(
        state,
        args.max_train_steps,
        args.logging_steps,
        updates.samples,
        lambda scalars: [float(scalar) for scalar in jax.device_get(scalars)],
        lambda values, step: log_metrics(trackers, values, step),
        not_finite,
        memory_metrics,
    )

    prompts = args.validation_prompts or []
    grids = standing_grids(args.output_dir, state.step) if prompts else []  # the last ones drawn
    objective = dict(unet=unet, schedule=schedule, scaling_factor=vae.config.scaling_factor)
    evaluate = map_over_devices(partial(validation_step, **objective), in_axes=(None, 0))

    def result_weights():
        """The weights that would be saved now."""
        return trained["average"]["weights"] if args.use_ema else trained["params"]

    def validate():
        """Validation loss and images with the weights that would be saved now."""
        progress.flush()
        if val_dataset is not None:
            loss = validation.validation_loss(
                lambda batch: evaluate(result_weights(), encode(batch)), val_samples, args.train_batch_size, mesh
            )
            log_metrics(trackers, {"val_loss": loss}, state.step)
            say(f"step {state.step}: val_loss {loss:.4f}")
        if prompts:
            if is_main():
                images = validation.draw_images(
                    pipeline,
                    frozen | {"unet": result_weights()},
                    prompts,
                    state.seed,
                    (latents[0], args.resolution // latents[1], args.resolution // latents[1]),
                    **flags.drawing(args),
                )
                publish_images(trackers, images, prompts, state.step, args.output_dir)
            grids[:] = [grid_name(state.step)]
        progress.pause()

    def checkpoint():
        progress.flush()
        folder = save(state)
        progress.pause()
        return folder

    # --- the loop ----------------------------------------------------------------------------------------------------
    step = map_over_devices(
        partial(
            train_step,
            **objective,
            optimizer=optimizer,
            snr_gamma=args.snr_gamma,
            max_grad_norm=args.max_grad_norm,
            ema_decay=args.ema_decay,
        ),
        in_axes=(None, 0, None),
        donate=(0,),
    )
    keep = None if args.dry_run else checkpoint
    batches = loader.training_batches(samples, updates, state, mesh, args.dataloader_num_workers, keep)
    looks = prompts or val_dataset is not None
    cadence = (args.validation_steps, args.validation_epochs) if looks else (0, 0)
    pace, stopped_by, planned = Pace(), 0, args.max_train_steps
    if args.dry_run:
        batches = dry_run.begin_dry_run(batches, samples)
        args.max_train_steps, args.output_dir = min(planned, state.step + STEPS), None
    with Interruption(largest_of_processes(mesh)) as interruption:
        if args.validation_at_start and looks and state.step == 0:
            validate()
        while state.step < args.max_train_steps and not stopped_by:
            rate = np.float32(learning_rate(state.step))
            trained, seen = step(trained, encode(next(batches)), rate)
            pace(seen["loss"])
            state.micro_step += args.gradient_accumulation_steps
            # As in the torch scripts: the end of a step.
            state.position = updates.after(state.position)
            updated = not fp16 or bool(seen["applied"])  # False: an overflow, only data moved on
            if updated:
                state.step += 1
                progress.update(state, seen["loss"], seen["grad_norm"], learning_rate(state.step))
            else:
                progress.count_overflow(checkpoint)
            stopped_by = interruption.signal()
            if stopped_by or (updated and checkpoint_due(state, args.checkpointing_steps, args.max_train_steps)):
                newest = checkpoint()
            if updated and not stopped_by and validation_due(state, *cadence, args.max_train_steps):
                validate()
        if stopped_by:
            uploads.finish(from_main)
    progress.close()
    if args.dry_run:
        plan = (facts, rows, progress)
        dry_run.report_dry_run(plan, "unet", trained, frozen)
        return stopped_by and 128 + stopped_by
    if stopped_by:
        end_training(trackers)
        return commands.say_stopped(stopped_by, state.step, newest, command)
    say_skipped(rows.findings.skipped)

    # --- the result --------------------------------------------------------------------------------------------------
    if is_main():
        with output_folder.rescue_weights(
            args.output_dir, state, provenance, lambda folder: save_state(folder, trained, unet)
        ):
            models.save_pipeline(args.output_dir, pipeline, parameters | {"unet": jax.device_get(result_weights())})
            card.write_card(
                args.output_dir,
                repository,
                base_model=args.pretrained_model_name_or_path,
                data=args.dataset_name,
                tags=["stable-diffusion", "stable-diffusion-diffusers"],
                facts=facts,
                step=state.step,
                usage=USAGE_IN_TORCH.format(model=repository or args.output_dir),
                images=[card.CardImage(grid, prompts) for grid in grids],
                token=args.hub_token,
            )
        summary.print_end_summary(args.output_dir, progress, USAGE.format(model=args.output_dir))
        if repository:
            uploads.finish()
            upload.upload_result(args.output_dir, repository, args.hub_token, UPLOADED)
    end_training(trackers)
    return 0


if __name__ == "__main__":
    exit.run_main(main)
