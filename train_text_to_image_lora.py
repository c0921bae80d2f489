#!/usr/bin/env python
"""Fine-tune a Stable Diffusion 1.x or 2.x model on captioned images through low-rank adapters (LoRA).

accelerate launch train_text_to_image_lora.py --pretrained_model_name_or_path MODEL --train_data_dir IMAGES
"""

from training_utils.cli import flags


def parse_args(argv=None):
    groups = [
        (flags.MODEL[0], [*flags.MODEL[1], flags.SINGLE_FILE_CONFIG]),
        flags.DATA,
        flags.BUCKETS,
        flags.TRAINING,
        flags.OPTIMIZATION,
        (flags.OBJECTIVE[0], flags.OBJECTIVE[1] + flags.RECTIFICATION),
        flags.LORA,
        (flags.EMA[0], flags.without(flags.EMA, "offload_ema", "foreach_ema")),
        (flags.VALIDATION[0], [*flags.VALIDATION_PROMPT, *flags.VALIDATION[1]]),
        flags.CHECKPOINTS,
        flags.CACHES,
        flags.HARDWARE,
        flags.REPORTING,
    ]
    return flags.parse(
        argv,
        __doc__.splitlines()[0],
        groups,
        defaults={"output_dir": "sd-model-finetuned-lora", "validation_epochs": 1},
    )


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
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel  # noqa: E402
from diffusers.optimization import get_scheduler  # noqa: E402
from diffusers.training_utils import compute_dream_and_update_latents  # noqa: E402
from transformers import CLIPTextModel, CLIPTokenizer  # noqa: E402

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

pipeline = StableDiffusionPipeline.{base}
{sampler}pipeline.load_lora_weights("{model}")
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
        caption = choose_caption(rows.captions(index), draw, args.caption_dropout if train else 0.0)
        if args.shuffle_tags and caption and train:
            caption = shuffle_tags(caption, draw, args.keep_tokens)
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


@frozen.encoder
def encode_images(vae, batch):
    """Mean and standard deviation of what the VAE makes of a batch's images, each (B, C, h, w)."""
    moments = vae.encode(frozen.cast_for(vae, batch["pixels"])).latent_dist
    return {"latent_mean": moments.mean, "latent_std": moments.std}


@frozen.encoder
def encode_captions(text_encoder, batch):
    """The text encoder's last hidden states of a batch's captions, (B, tokens, D)."""
    return {"text_states": text_encoder(batch["tokens"]).last_hidden_state}


def training_loss(unet, schedule, batch, scaling_factor, snr_gamma=None, dream_p=None):
    """The diffusion loss of each sample of a batch, which holds what `encode_images` and `encode_captions` make of
    it; shape (B,).

    Latents are a sample of VAE(x) times the scaling factor (Rombach et al. 2022, arXiv 2112.10752); noise is mixed in
    float32 (Ho et al. 2020, arXiv 2006.11239, eq. 4), since half precision has too few levels of it. `snr_gamma`
    weights by min-SNR; `dream_p` is DREAM's exponent, None for plain training.
    """
    timesteps, noise, text_states = batch["timestep"], batch["noise"], batch["text_states"]
    latents = batch["latent_mean"].float() + batch["latent_std"].float() * batch["latent_noise"]
    latents = latents * scaling_factor
    noisy = schedule.add_noise(latents, batch.get("input_noise", noise), timesteps)
    kind = schedule.config.prediction_type
    target = noise if kind == "epsilon" else schedule.get_velocity(latents, noise, timesteps)
    if dream_p is not None:
        noisy, target = compute_dream_and_update_latents(
            unet, schedule, timesteps, noise, noisy, target, text_states, dream_p
        )
    prediction = unet(noisy, timesteps, text_states).sample
    loss = F.mse_loss(prediction.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))
    if snr_gamma is not None:
        snr = losses.signal_to_noise(schedule.alphas_cumprod[timesteps])
        loss = loss * losses.min_snr_weight(snr, snr_gamma, kind)
    return loss


def load_models(args, accelerator, seed):
    """The parts of the base model, in host memory, adapted: (tokenizer, text_encoder, vae, unet, schedule, sampler).

    `schedule` is the noise schedule of the training, `sampler` the model's own scheduler with the same changes.
    """
    name, variant = args.pretrained_model_name_or_path, args.variant
    base = models.model_folder(
        name, StableDiffusionPipeline, args.revision, variant, args.cache_dir, config=args.single_file_config
    )
    changes = flags.schedule_changes(args)
    schedule = models.load_part(DDPMScheduler, base, "scheduler", **changes)
    check_prediction_type(args, schedule.config)
    sampler = models.sampling_scheduler(base, changes)
    tokenizer = models.load_part(CLIPTokenizer, base, "tokenizer")
    half = processes.frozen_dtype(accelerator)
    text_encoder = models.load_part(CLIPTextModel, base, "text_encoder", variant=variant, dtype=half)
    vae = models.load_part(AutoencoderKL, base, "vae", variant=variant, dtype=half)
    unet = models.load_part(UNet2DConditionModel, base, "unet", variant=variant, dtype=half)

    schedule.alphas_cumprod = schedule.alphas_cumprod.to(accelerator.device)
    for network in (vae, text_encoder):
        network.requires_grad_(False).eval()
    models.check_channels(unet, vae)
    unet.train()
    options = (args.rank, args.lora_alpha, args.lora_dropout, args.use_dora, seed)
    lora.add_adapter(unet, lora.UNET_LAYERS, *options)
    if args.train_text_encoder:
        lora.add_adapter(text_encoder.train(), lora.TEXT_LAYERS, *options)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
        if args.train_text_encoder:
            text_encoder.gradient_checkpointing_enable()
    if args.enable_xformers_memory_efficient_attention:
        models.enable_xformers(unet)
    return tokenizer, text_encoder, vae, unet, schedule, sampler


def check_prediction_type(args, config):
    """Objections that need the model's own scheduler, beyond those that the flags alone raise."""
    if config.prediction_type not in ("epsilon", "v_prediction"):
        raise UserError(f"the model predicts '{config.prediction_type}'; this script trains epsilon and v_prediction")
    if args.dream_training and config.prediction_type != "epsilon":
        raise UserError("--dream_training is defined for epsilon prediction only, and this model predicts v")
    if config.rescale_betas_zero_snr and config.prediction_type == "epsilon":
        problem = "with zero terminal SNR the last timestep is pure noise, from which epsilon cannot be predicted"
        if args.rescale_betas_zero_snr:
            raise UserError(f"{problem}; add --prediction_type v_prediction")
        warn(f"{problem}, and this base model has such a schedule; --prediction_type v_prediction goes with it")


def save_result(args, adapted, sampler):
    """Write the adapters into --output_dir, and the sampler unless it is None."""
    lora.save_result(args.output_dir, adapted, args.save_kohya_format, sampler)


def usage(args, sampler, model, public=False):
    """The lines that draw with the adapters in the folder or repository `model`."""
    base = card.loading_call(
        args.pretrained_model_name_or_path, args.revision, args.variant, args.single_file_config, public
    )
    return USAGE.format(base=base, model=model, **lora.words_of_sampler("StableDiffusionPipeline", sampler, model))


def main(argv=None):
    args = parse_args(argv)
    command = flags.without_secrets(argv)
    if args.check_data:
        return inspection.check_data(flags.data_source(args), args.resolution, flags.bucket_limits(args))

    # --- processes, seed and where to begin --------------------------------------------------------------------------
    accelerator = processes.make_accelerator(**flags.machine(args))
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
    tokenizer, text_encoder, vae, unet, schedule, sampler = load_models(args, accelerator, state.seed)
    other_sampler = sampler if flags.schedule_changes(args) else None  # than the base model's own
    adapted = {"unet": unet} | ({"text_encoder": text_encoder} if args.train_text_encoder else {})
    if accelerator.is_main_process:
        warn_of_long_captions(rows, tokenizer)
    latents = (vae.config.latent_channels, 2 ** (len(vae.config.block_out_channels) - 1))
    prepare = SampleTransform(args, tokenizer, latents, schedule.config.num_train_timesteps)
    samples = Samples(rows, prepare, state.seed, args.on_bad_sample)
    if val_dataset is not None:
        prepare = SampleTransform(args, tokenizer, latents, schedule.config.num_train_timesteps, len(val_dataset))
        val_samples = Samples(val_dataset, prepare, state.seed, on_bad_sample="skip")

    # --- what is frozen runs once ------------------------------------------------------------------------------------
    prompts = [args.validation_prompt] * args.num_validation_images if args.validation_prompt else []
    sets = [samples, val_samples] if val_dataset is not None else [samples]
    keeping = (accelerator, flags.encoding_folder(args), sets, args.train_batch_size)
    if args.cache_latents:
        settings = ["stable diffusion", args.resolution, args.image_interpolation_mode]
        frozen.cache_images(*keeping, [vae], partial(encode_images, vae), settings, args.cached_crops)
    if args.cache_text_embeddings:
        empty = bool(args.caption_dropout)
        frozen.cache_captions(*keeping, [text_encoder], partial(encode_captions, text_encoder), empty)
    scaling_factor = vae.config.scaling_factor
    vae = frozen.place_frozen(vae, accelerator.device, args.cache_latents, prompts)
    text_encoder = frozen.place_frozen(text_encoder, accelerator.device, args.cache_text_embeddings, prompts)
    frozen.release_memory([vae, text_encoder])
    unet.to(accelerator.device)

    def encode(batch, text_encoder):
        """A batch with what the frozen networks make of it; caches have put it there already."""
        images = {} if args.cache_latents else encode_images(vae, batch)
        captions = {} if args.cache_text_embeddings else encode_captions(text_encoder, batch)
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
    text_network = accelerator.prepare(text_encoder) if args.train_text_encoder else text_encoder

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
        return training_loss(unet, schedule, encode(batch, text_encoder), scaling_factor)

    def validate():
        """Validation loss and images with the weights that would be saved now."""
        progress.flush()
        for model in adapted.values():
            model.eval()
        with averaged(ema), frozen.temporarily_on([vae, text_encoder], accelerator.device):
            if val_dataset is not None:
                validation.log_validation_loss(accelerator, val_samples, args.train_batch_size, loss_of, state.step)
            if prompts:
                parts = (vae, text_encoder, tokenizer, unet, sampler, None, None)
                pipeline = StableDiffusionPipeline(*parts, requires_safety_checker=False)

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
    dream_p = args.dream_detail_preservation if args.dream_training else None
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
            with accelerator.accumulate(network, text_network):
                batch = encode(batch, text_network)
                sample_losses = training_loss(network, schedule, batch, scaling_factor, args.snr_gamma, dream_p)
                loss = (sample_losses * batch["weight"]).sum()
                accelerator.backward(loss)
                step_loss += loss.detach() / args.gradient_accumulation_steps
                if accelerator.sync_gradients:
                    grad_norm = gradient.clip_gradient(accelerator, parameters, args.max_grad_norm)
                    guard.look_at(grad_norm)
                optimizer.step()
                optimizer.zero_grad()
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
        dry_run.report_dry_run(accelerator, plan, adapted, [vae, text_encoder], optimizer, ema)
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
                tags=["stable-diffusion", "stable-diffusion-diffusers", "lora"],
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
