#!/usr/bin/env python
"""Fine-tune a Stable Diffusion XL model on captioned images through low-rank adapters (LoRA).

accelerate launch train_text_to_image_lora_sdxl.py --pretrained_model_name_or_path MODEL --train_data_dir IMAGES
"""

from training_utils.cli import flags

OWN_REPORTING_FLAGS = [
    flags.Flag("debug_loss", bool, False, "log the loss of each image under its file name; waits for the device"),
]


def parse_args(argv=None):
    groups = [
        (flags.MODEL[0], [*flags.MODEL[1], flags.SINGLE_FILE_CONFIG, *flags.SDXL]),
        flags.DATA,
        flags.BUCKETS,
        flags.TRAINING,
        flags.OPTIMIZATION,
        (flags.OBJECTIVE[0], flags.OBJECTIVE[1] + flags.TIMESTEP_BIAS),
        flags.LORA,
        (flags.EMA[0], flags.without(flags.EMA, "offload_ema", "foreach_ema")),
        (flags.VALIDATION[0], [*flags.VALIDATION_PROMPT, *flags.VALIDATION[1]]),
        flags.CHECKPOINTS,
        flags.CACHES,
        flags.HARDWARE,
        (flags.REPORTING[0], flags.REPORTING[1] + OWN_REPORTING_FLAGS),
    ]
    defaults = {"output_dir": "sd-model-finetuned-lora", "resolution": 1024, "validation_epochs": 1}
    return flags.parse(argv, __doc__.splitlines()[0], groups, defaults)


if __name__ == "__main__":
    # --help and a wrong flag are answered before the imports below, which take ten seconds.
    flags.hide_secrets(parse_args())

from training_utils.base import startup  # noqa: E402

startup.begin()
startup.prepare()

from functools import partial  # noqa: E402
from pathlib import Path  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from diffusers import DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel  # noqa: E402
from diffusers.optimization import get_scheduler  # noqa: E402
from PIL import ImageOps  # noqa: E402
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer  # noqa: E402

from training_utils.base import draws, losses  # noqa: E402
from training_utils.base.console import warn  # noqa: E402
from training_utils.base.errors import UserError  # noqa: E402
from training_utils.data import buckets, checking, image_ops, inspection, opening, selection  # noqa: E402
from training_utils.data.captions import choose_caption, shuffle_tags, warn_of_long_captions  # noqa: E402
from training_utils.data.plan import BatchPlan  # noqa: E402
from training_utils.data.samples import Samples  # noqa: E402
from training_utils.run import commands, exit, output_folder, resume, summary, trackers  # noqa: E402
from training_utils.run.cadence import checkpoint_due, validation_due  # noqa: E402
from training_utils.run.dry_run import STEPS  # noqa: E402
from training_utils.run.facts import collect_facts  # noqa: E402
from training_utils.run.grids import standing_grids  # noqa: E402
from training_utils.run.hub import card, upload  # noqa: E402
from training_utils.run.metrics import Metrics  # noqa: E402
from training_utils.run.provenance import Provenance  # noqa: E402
from training_utils.run.signals import Interruption  # noqa: E402
from training_utils.torch_backend import (  # noqa: E402
    dry_run,
    frozen,
    gradient,
    loader,
    lora,
    models,
    optimizers,
    processes,
    validation,
)
from training_utils.torch_backend.ema import EMAWeights, averaged  # noqa: E402
from training_utils.torch_backend.gradient import FiniteGuard  # noqa: E402
from training_utils.torch_backend.state import TrainingState  # noqa: E402

UPLOADED = ["README.md", "pytorch_lora_weights*.safetensors", "scheduler/*.json", "validation/*.png"]
USAGE = """
from diffusers import {classes}

pipeline = StableDiffusionXLPipeline.{base}
{sampler}pipeline.load_lora_weights("{model}")
pipeline("what to draw").images[0].save("image.png")
"""


class SampleTransform:
    """Makes a sample: the image, its caption's tokens, and all that is drawn for it. Runs in the data workers."""

    def __init__(self, args, tokenizers, latents, probabilities, timesteps, val_samples=0):
        self.args, self.tokenizers = args, tokenizers
        self.channels, self.factor = latents  # of the VAE: the latents' channels, and pixels a side of one
        self.probabilities, self.timesteps = probabilities, timesteps
        self.val_samples = val_samples  # their number; a validation sample is the same at every evaluation
        self.mirrors, self.cropped = args.random_flip and not val_samples, not (args.center_crop or val_samples)
        self.images = self.captions = None  # the caches, where there are any

    def show(self, rows, index, mirrored, corner, size):
        """One view of an image, (width, height) pixels large, and what the UNet is told of it; `corner` draws its
        crop, None takes the middle."""
        image = rows.image(index)
        original_size = (image.height, image.width)
        image = image_ops.resize(image, size, self.args.image_interpolation_mode)
        if mirrored:
            image = ImageOps.mirror(image)  # before the crop, whose corner the network is told
        image, corner = image_ops.crop(image, size, corner)
        time_ids = np.array([*original_size, *corner, image.height, image.width], dtype=np.float32)
        return {"pixels": image_ops.to_array(image), "time_ids": time_ids}

    def tokenize(self, caption):
        tokens = {}
        for name, tokenizer in zip(("tokens", "tokens_2"), self.tokenizers, strict=True):
            ids = tokenizer(caption, max_length=tokenizer.model_max_length, padding="max_length", truncation=True)
            tokens[name] = np.array(ids.input_ids, dtype=np.int64)
        return tokens

    def __call__(self, rows, index, draw):
        args, train = self.args, not self.val_samples
        width, height = size = rows.size(draw.index)  # of the place, whichever row is shown in it
        latent_shape = (self.channels, height // self.factor, width // self.factor)
        mirrored = self.mirrors and draw("flip").random() < 0.5
        corner = draw("crop") if self.cropped else None
        caption = choose_caption(rows.captions(index), draw, args.caption_dropout if train else 0.0)
        if args.shuffle_tags and caption and train:
            caption = shuffle_tags(caption, draw, args.keep_tokens)
        image = self.images.read if self.images else partial(self.show, rows)
        text = self.tokenize(caption or "")
        sample = {
            "index": np.int64(index),
            **image(index, mirrored, corner, size),
            **(self.captions.read(text) if self.captions else text),
            "caption_given": np.float32(caption is not None),
            "latent_noise": draw("latent").standard_normal(latent_shape, dtype=np.float32),
            "noise": draw("noise").standard_normal(latent_shape, dtype=np.float32),
        }
        if train:
            sample["timestep"] = np.int64(draws.choose_timestep(draw, self.timesteps, self.probabilities))
        else:  # spread over the whole schedule, so that few images make a steady loss
            sample["timestep"] = np.int64((index + 0.5) / self.val_samples * self.timesteps)
        if train and args.noise_offset:
            shape = (self.channels, 1, 1)
            sample["noise"] += args.noise_offset * draw("noise_offset").standard_normal(shape, dtype=np.float32)
        return sample


@frozen.encoder
def encode_images(vae, batch):
    """Mean and standard deviation of what the VAE makes of a batch's images, each (B, C, h, w)."""
    moments = vae.encode(frozen.cast_for(vae, batch["pixels"])).latent_dist
    return {"latent_mean": moments.mean, "latent_std": moments.std}


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


def training_loss(unet, schedule, batch, scaling_factor, zero_dropped=True, snr_gamma=None):
    """The diffusion loss of each sample of a batch, which holds what `encode_images` and `encode_captions` make of
    it; shape (B,).

    As in train_text_to_image.py, but that the UNet is also told the pooled text, the image's first size, the corner
    of the crop that was cut and the target size (`time_ids`, pixels, float32: bfloat16 is exact only up to 256).
    """
    timesteps, noise = batch["timestep"], batch["noise"]
    text_states, pooled = text_of(batch, zero_dropped)
    latents = batch["latent_mean"].float() + batch["latent_std"].float() * batch["latent_noise"]
    latents = latents * scaling_factor
    noisy = schedule.add_noise(latents, noise, timesteps)
    kind = schedule.config.prediction_type
    target = noise if kind == "epsilon" else schedule.get_velocity(latents, noise, timesteps)
    conditions = {"text_embeds": pooled, "time_ids": batch["time_ids"]}
    prediction = unet(noisy, timesteps, text_states, added_cond_kwargs=conditions).sample
    loss = F.mse_loss(prediction.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))
    if snr_gamma is not None:
        snr = losses.signal_to_noise(schedule.alphas_cumprod[timesteps])
        loss = loss * losses.min_snr_weight(snr, snr_gamma, kind)
    return loss


def load_models(args, accelerator, seed):
    """The parts, in host memory, adapted: (folder, tokenizers, text_encoders, vae, unet, schedule, sampler).

    `schedule` is the noise schedule of the training, `sampler` the model's own scheduler with the same changes.
    """
    name, variant = args.pretrained_model_name_or_path, args.variant
    base = models.model_folder(
        name, StableDiffusionXLPipeline, args.revision, variant, args.cache_dir, config=args.single_file_config
    )
    changes = flags.schedule_changes(args)
    schedule = models.load_part(DDPMScheduler, base, "scheduler", **changes)
    check_prediction_type(args, schedule.config)
    timestep_probabilities(args, schedule.config.num_train_timesteps)  # what it refuses is refused before weights load
    sampler = models.sampling_scheduler(base, changes)
    half = processes.frozen_dtype(accelerator)
    tokenizers = [models.load_part(CLIPTokenizer, base, part) for part in ("tokenizer", "tokenizer_2")]
    text_encoders = [
        models.load_part(CLIPTextModel, base, "text_encoder", variant, dtype=half),
        models.load_part(CLIPTextModelWithProjection, base, "text_encoder_2", variant, dtype=half),
    ]
    vae = models.load_sdxl_vae(base, variant, half, args.pretrained_vae_model_name_or_path, args.cache_dir)
    unet = models.load_part(UNet2DConditionModel, base, "unet", variant, dtype=half)

    schedule.alphas_cumprod = schedule.alphas_cumprod.to(accelerator.device)
    for network in (vae, *text_encoders):
        network.requires_grad_(False).eval()
    models.check_channels(unet, vae)
    unet.train()
    options = (args.rank, args.lora_alpha, args.lora_dropout, args.use_dora, seed)
    lora.add_adapter(unet, lora.UNET_LAYERS, *options)
    if args.train_text_encoder:
        for text_encoder in text_encoders:
            lora.add_adapter(text_encoder.train(), lora.TEXT_LAYERS, *options)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
        if args.train_text_encoder:
            for text_encoder in text_encoders:
                text_encoder.gradient_checkpointing_enable()
    if args.enable_xformers_memory_efficient_attention:
        models.enable_xformers(unet)
    if args.enable_npu_flash_attention:
        unet.enable_npu_flash_attention()
    return base, tokenizers, text_encoders, vae, unet, schedule, sampler


def check_prediction_type(args, config):
    """Objections that need the model's own scheduler, beyond those that the flags alone raise."""
    if config.prediction_type not in ("epsilon", "v_prediction"):
        raise UserError(f"the model predicts '{config.prediction_type}'; this script trains epsilon and v_prediction")
    if config.rescale_betas_zero_snr and config.prediction_type == "epsilon":
        problem = "with zero terminal SNR the last timestep is pure noise, from which epsilon cannot be predicted"
        if args.rescale_betas_zero_snr:
            raise UserError(f"{problem}; add --prediction_type v_prediction")
        warn(f"{problem}, and this base model has such a schedule; --prediction_type v_prediction goes with it")


def timestep_probabilities(args, timesteps):
    """What --timestep_bias_* ask for. Raises UserError for a range beyond the schedule."""
    try:
        return losses.timestep_probabilities(
            timesteps,
            args.timestep_bias_strategy,
            args.timestep_bias_multiplier,
            args.timestep_bias_portion,
            args.timestep_bias_begin,
            args.timestep_bias_end,
        )
    except ValueError as error:
        raise UserError(f"--timestep_bias_strategy {args.timestep_bias_strategy}: {error}") from None


def save_result(args, adapted, sampler):
    """Write the adapters into --output_dir, and the sampler unless it is None."""
    lora.save_result(args.output_dir, adapted, args.save_kohya_format, sampler)


def usage(args, sampler, model, public=False):
    """The lines that draw with the adapters in the folder or repository `model`."""
    base = card.loading_call(
        args.pretrained_model_name_or_path, args.revision, args.variant, args.single_file_config, public
    )
    return USAGE.format(base=base, model=model, **lora.words_of_sampler("StableDiffusionXLPipeline", sampler, model))


def main(argv=None):
    args = parse_args(argv)
    command = flags.without_secrets(argv)
    if args.check_data:
        return inspection.check_data(flags.data_source(args), args.resolution, flags.bucket_limits(args))

    # --- processes, seed and where to begin --------------------------------------------------------------------------
    unread = args.train_text_encoder  # of the first encoder the last layer is not read
    accelerator = processes.make_accelerator(**flags.machine(args), find_unused_parameters=unread)
    from_main = partial(processes.from_main, accelerator)  # what a function returns in the main process
    args.mixed_precision = accelerator.mixed_precision
    for notice in args.notices:
        warn(notice)
    resume_from, state = from_main(
        lambda: resume.begin_run(args.output_dir, args.resume_from_checkpoint, args.seed, writes=not args.dry_run),
    )
    from_main(lambda: output_folder.refuse_another_result(args.output_dir, adapted=["unet"]))
    repository, uploads = upload.open_uploads(from_main, accelerator.is_main_process, **flags.hub(args))

    # --- data and models ---------------------------------------------------------------------------------------------
    rows = opening.load_dataset(**flags.data_source(args))
    rows = selection.take_subset(rows, args.max_train_samples, state.seed)
    unusable = from_main(lambda: checking.check_dataset(rows, args.on_bad_sample))
    rows = rows.without(unusable)
    rows.sizes = from_main(lambda: buckets.training_sizes(rows, args.resolution, flags.bucket_limits(args)))
    rows, val_dataset = selection.split_validation(rows, args.validation_split, state.seed)
    base, tokenizers, text_encoders, vae, unet, schedule, sampler = load_models(args, accelerator, state.seed)
    other_sampler = sampler if flags.schedule_changes(args) else None  # than the base model's own
    adapted = {"unet": unet}
    if args.train_text_encoder:
        adapted |= {"text_encoder": text_encoders[0], "text_encoder_2": text_encoders[1]}
    zero_dropped = StableDiffusionXLPipeline.load_config(base).get("force_zeros_for_empty_prompt", True)
    if accelerator.is_main_process:
        warn_of_long_captions(rows, tokenizers[0])
    latents = (vae.config.latent_channels, 2 ** (len(vae.config.block_out_channels) - 1))
    timesteps = schedule.config.num_train_timesteps
    probabilities = timestep_probabilities(args, timesteps)
    prepare = SampleTransform(args, tokenizers, latents, probabilities, timesteps)
    samples = Samples(rows, prepare, state.seed, args.on_bad_sample)
    if val_dataset is not None:
        prepare = SampleTransform(args, tokenizers, latents, None, timesteps, len(val_dataset))
        val_samples = Samples(val_dataset, prepare, state.seed, on_bad_sample="skip")

    # --- what is frozen runs once ------------------------------------------------------------------------------------
    prompts = [args.validation_prompt] * args.num_validation_images if args.validation_prompt else []
    sets = [samples, val_samples] if val_dataset is not None else [samples]
    keeping = (accelerator, flags.encoding_folder(args), sets, args.train_batch_size)
    if args.cache_latents:
        settings = ["sdxl", args.resolution, args.image_interpolation_mode]
        frozen.cache_images(*keeping, [vae], partial(encode_images, vae), settings, args.cached_crops)
    if args.cache_text_embeddings:
        empty = bool(args.caption_dropout)
        frozen.cache_captions(*keeping, text_encoders, partial(encode_captions, text_encoders), empty)
    scaling_factor = vae.config.scaling_factor
    vae = frozen.place_frozen(vae, accelerator.device, args.cache_latents, prompts)
    text_encoders = [
        frozen.place_frozen(encoder, accelerator.device, args.cache_text_embeddings, prompts)
        for encoder in text_encoders
    ]
    frozen.release_memory([vae, *text_encoders])
    unet.to(accelerator.device)

    def encode(batch, text_encoders):
        """A batch with what the frozen networks make of it; caches have put it there already."""
        images = {} if args.cache_latents else encode_images(vae, batch)
        captions = {} if args.cache_text_embeddings else encode_captions(text_encoders, batch)
        return batch | images | captions

    # --- optimizer and learning rate, in steps ---------------------------------------------------------------------
    updates = BatchPlan.of(
        rows, state.seed, args.train_batch_size, args.gradient_accumulation_steps, accelerator.num_processes
    )
    if args.max_train_steps is None:
        args.max_train_steps = args.num_train_epochs * updates.per_epoch
    parameters = lora.parameters(adapted.values())
    optimizer = optimizers.make_optimizer(
        parameters,
        **flags.optimizer(args, updates.window),
        loss_scaling=accelerator.scaler is not None,
    )
    lr_scheduler = get_scheduler(optimizer=optimizer, **flags.learning_rate_curve(args))
    ema = EMAWeights(adapted.values(), args.ema_decay) if args.use_ema else None
    # The loop calls `network`; `unet` stays the bare model.
    network, optimizer, parameters = gradient.prepare_network(accelerator, unet, optimizer)
    text_networks = text_encoders
    if args.train_text_encoder:
        text_networks = [accelerator.prepare(text_encoder) for text_encoder in text_encoders]

    # --- resume ------------------------------------------------------------------------------------------------------
    saved = TrainingState(
        accelerator,
        optimizer,
        lr_scheduler,
        lambda folder: lora.save_with_average(folder, adapted, ema),
        lambda folder: lora.load_with_average(folder, adapted, ema),
    )
    provenance = Provenance(
        script=Path(__file__).name,
        world_size=accelerator.num_processes,
        settings=flags.mathematics(args),
        samples=len(rows),
        dataset_sha256=from_main(rows.fingerprint),
    )
    if resume_from:
        from_main(lambda: resume.warn_of_differences(resume_from, provenance))
        saved.read(resume_from, state.step)
    processes.start_trackers(accelerator, args.tracker_project_name, trackers.tracker_config(flags.public(args)))
    facts = collect_facts(
        provenance=provenance,
        base_model=args.pretrained_model_name_or_path,
        device=processes.device_name(accelerator),
        parameters=parameters,
        plan=updates,
        val_dataset=val_dataset,
        steps=args.max_train_steps,
        state=state,
    )
    summary.print_start_summary(facts, args.output_dir)
    if accelerator.is_main_process and not args.dry_run:
        output_folder.write_run_file(args.output_dir, flags.as_file(args, provenance.script, state.seed))
        accelerator.trackers.append(Metrics(args.output_dir, state.step, facts.to_record()))
    guard = FiniteGuard(
        accelerator,
        optimizer,
        args.on_nan == "stop",
        lambda good: uploads.add_last(
            saved.keep(args.output_dir, good, provenance, args.checkpoints_total_limit, ema, state.step - good.step),
            from_main,
        ),
        lambda before: updates.names(rows, before.position),
    )
    progress = processes.start_progress(accelerator, guard, updates, state, args.max_train_steps, args.logging_steps)
    grids = standing_grids(args.output_dir, state.step) if prompts else []  # the last ones drawn

    def loss_of(batch):
        """The loss of each sample of a held-out batch, shape (B,)."""
        return training_loss(unet, schedule, encode(batch, text_encoders), scaling_factor, zero_dropped)

    def validate():
        """Validation loss and images with the weights that would be saved now."""
        progress.flush()
        for model in adapted.values():
            model.eval()
        with averaged(ema), frozen.temporarily_on([vae, *text_encoders], accelerator.device):
            if val_dataset is not None:
                validation.log_validation_loss(accelerator, val_samples, args.train_batch_size, loss_of, state.step)
            if prompts:
                parts = (vae, *text_encoders, *tokenizers, unet, sampler)
                pipeline = StableDiffusionXLPipeline(
                    *parts, force_zeros_for_empty_prompt=zero_dropped, add_watermarker=False
                )

                def draw(at, noise):
                    return validation.stable_diffusion_image(pipeline, prompts[at], noise, **flags.drawing(args))

                grids[:] = [validation.show_images(accelerator, draw, prompts, state, args.output_dir)]
        for model in adapted.values():
            model.train()
        progress.pause()

    def checkpoint():
        progress.flush()
        folder = saved.save_checkpoint(args.output_dir, state, provenance, args.checkpoints_total_limit)
        progress.pause()
        return uploads.add(folder)

    # --- the loop ----------------------------------------------------------------------------------------------------
    keep = None if args.dry_run else checkpoint
    batches = loader.training_batches(samples, updates, state, accelerator, args.dataloader_num_workers, keep)
    looks = prompts or val_dataset is not None
    cadence = (args.validation_steps, args.validation_epochs) if looks else (0, 0)
    step_loss, stopped_by, planned = 0.0, 0, args.max_train_steps
    if args.dry_run:
        batches = dry_run.begin_dry_run(accelerator, batches, samples, updates)
        args.max_train_steps, args.output_dir = min(planned, state.step + STEPS), None
    with Interruption(processes.largest_of_processes(accelerator, args.process_group_timeout)) as interruption:
        if args.validation_at_start and looks and state.step == 0:
            validate()
        while state.step < args.max_train_steps and not stopped_by:
            batch = next(batches)
            torch.manual_seed(draws.network_seed(state.seed, state.micro_step, accelerator.process_index))
            state.micro_step += 1
            with accelerator.accumulate(network, *text_networks):
                batch = encode(batch, text_networks)
                sample_losses = training_loss(network, schedule, batch, scaling_factor, zero_dropped, args.snr_gamma)
                loss = (sample_losses * batch["weight"]).sum()
                accelerator.backward(loss)
                step_loss += loss.detach() / args.gradient_accumulation_steps
                if accelerator.sync_gradients:
                    grad_norm = gradient.clip_gradient(accelerator, parameters, args.max_grad_norm)
                    guard.look_at(grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            if args.debug_loss:
                names = {
                    f"loss_for_{rows.name(i)}": v for i, v in zip(batch["index"].tolist(), sample_losses.tolist())
                }
                progress.log_with_next_step(names)
            if not accelerator.sync_gradients:
                continue
            # Same in every script: the end of a step.
            state.position = updates.after(state.position)
            finished_loss, step_loss = step_loss, 0.0
            updated = not accelerator.optimizer_step_was_skipped  # False: an fp16 overflow, only the data moved on
            if updated:
                lr_scheduler.step()
                if ema is not None:
                    ema.step(guard.held)
                state.step += 1
                progress.update(state, finished_loss, grad_norm, lr_scheduler.get_last_lr()[0])
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
        dry_run.report_dry_run(accelerator, plan, adapted, [vae, *text_encoders], optimizer, ema)
        return stopped_by and 128 + stopped_by
    if stopped_by:
        processes.end_training(accelerator)
        return commands.say_stopped(stopped_by, state.step, newest, command)
    processes.say_skipped(rows.findings.skipped)

    # --- the result --------------------------------------------------------------------------------------------------
    if accelerator.is_main_process:
        with output_folder.rescue_weights(args.output_dir, state, provenance, saved.save_weights):
            with averaged(ema):
                save_result(args, adapted, other_sampler)
            card.write_card(
                args.output_dir,
                repository,
                base_model=args.pretrained_model_name_or_path,
                data=args.dataset_name,
                tags=["stable-diffusion-xl", "stable-diffusion-xl-diffusers", "lora"],
                facts=facts,
                step=state.step,
                usage=usage(args, other_sampler, repository or args.output_dir, public=True),
                images=[card.CardImage(grid, prompts) for grid in grids],
                token=args.hub_token,
            )
        summary.print_end_summary(args.output_dir, progress, usage(args, other_sampler, args.output_dir))
        if repository:
            uploads.finish()
            upload.upload_result(args.output_dir, repository, args.hub_token, UPLOADED)
    processes.end_training(accelerator)
    return 0


if __name__ == "__main__":
    exit.run_main(main)
