#!/usr/bin/env python
"""Fine-tune a Kandinsky 2.2 decoder, image embedding to image, through low-rank adapters (LoRA).

accelerate launch train_text_to_image_lora_decoder.py --train_data_dir IMAGES
"""

from training_utils.cli import flags


def parse_args(argv=None):
    groups = [
        flags.KANDINSKY,
        (
            flags.DATA[0],
            [
                *flags.without(flags.DATA, "train_data_dir", *flags.OF_CAPTIONS, "center_crop"),
                *flags.KANDINSKY_DECODER,
            ],
        ),
        flags.BUCKETS,
        flags.TRAINING,
        flags.OPTIMIZATION,
        (flags.OBJECTIVE[0], [flags.SNR_GAMMA, flags.NOISE_OFFSET]),
        (flags.LORA[0], flags.without(flags.LORA, "train_text_encoder", "save_kohya_format")),
        (flags.EMA[0], flags.without(flags.EMA, "offload_ema", "foreach_ema")),
        (flags.VALIDATION[0], [*flags.VALIDATION_PROMPT, *flags.VALIDATION[1]]),
        flags.CHECKPOINTS,
        (flags.CACHES[0], flags.without(flags.CACHES, "cache_text_embeddings")),
        flags.HARDWARE,
        flags.REPORTING,
    ]
    defaults = {
        "output_dir": "kandi_2_2-model-finetuned-lora",
        "validation_epochs": 1,
        "image_interpolation_mode": "bicubic",
        **flags.KANDINSKY_DEFAULTS,
    }
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
from diffusers import (  # noqa: E402
    DDPMScheduler,
    KandinskyV22Pipeline,
    KandinskyV22PriorPipeline,
    UNet2DConditionModel,
    VQModel,
)
from diffusers.optimization import get_scheduler  # noqa: E402
from PIL import Image, ImageOps  # noqa: E402
from transformers import CLIPImageProcessorPil, CLIPVisionModelWithProjection  # noqa: E402

from training_utils.base import draws, losses  # noqa: E402
from training_utils.base.console import warn  # noqa: E402
from training_utils.base.errors import UserError  # noqa: E402
from training_utils.data import buckets, checking, image_ops, inspection, opening, selection  # noqa: E402
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
    kandinsky,
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
        self.args, self.image_processor, self.timesteps = args, image_processor, timesteps
        self.channels, self.factor = latents  # of MOVQ: the latents' channels, and pixels a side of one
        self.val_samples = val_samples  # their number; a validation sample is the same at every evaluation
        self.mirrors, self.cropped = args.random_flip and not val_samples, args.random_crop and not val_samples
        self.images = None  # the cache, where there is one

    def show(self, rows, index, mirrored, corner, size):
        """One view of an image, (width, height) pixels large; `corner` draws its crop, None takes the middle."""
        args, image = self.args, rows.image(index)
        if mirrored:
            image = ImageOps.mirror(image)
        cut, _ = image_ops.crop(image, image_ops.largest_within(image.size, size), corner)
        pixels = cut.resize(size, image_ops.FILTERS[args.image_interpolation_mode], reducing_gap=args.reducing_gap)
        seen = image if corner is None else cut  # CLIP's processor takes the middle of the image by itself
        clip_pixels = self.image_processor(seen, return_tensors="np").pixel_values[0]
        return {"pixels": image_ops.to_array(pixels), "clip_pixels": clip_pixels}

    def blank(self):
        """What a cache holds for no image: CLIP sees zeros, the pipeline's condition for that; MOVQ sees black."""
        black = Image.new("RGB", (self.args.resolution, self.args.resolution))
        clip_pixels = self.image_processor(black, return_tensors="np").pixel_values[0]
        return {"pixels": image_ops.to_array(black), "clip_pixels": np.zeros_like(clip_pixels)}

    def __call__(self, rows, index, draw):
        args, train = self.args, not self.val_samples
        width, height = size = rows.size(draw.index)  # of the place, whichever row is shown in it
        latent_shape = (self.channels, height // self.factor, width // self.factor)
        mirrored = self.mirrors and draw("flip").random() < 0.5
        corner = draw("crop") if self.cropped else None
        image = self.images.read if self.images else partial(self.show, rows)
        dropped = train and args.caption_dropout and draw("caption_dropout").random() < args.caption_dropout
        if train:
            timestep = int(draw("timestep").integers(0, self.timesteps))
        else:  # spread over the whole schedule, so that few images make a steady loss
            timestep = int((index + 0.5) / self.val_samples * self.timesteps)
        sample = {
            **image(index, mirrored, corner, size),
            "timestep": np.int64(timestep),
            "noise": draw("noise").standard_normal(latent_shape, dtype=np.float32),
        }
        if dropped and self.images:
            sample["image"] = self.images.read_blank()["image"]
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


def training_loss(unet, schedule, batch, snr_gamma=None):
    """The diffusion loss of each sample of a batch, which holds what `encode_images` makes of it; shape (B,).

    Noise is mixed into MOVQ's latents in float32 (Ho et al. 2020, arXiv 2006.11239, eq. 4); the UNet is told CLIP's
    embedding of the image. Of its output only the first C channels get a loss. The other C, the variance that the
    released decoders predict (Nichol & Dhariwal 2021, arXiv 2102.09672, section 3.1), get none, as in the original
    script, so that they follow what the layers before them learn. `snr_gamma` weights by min-SNR.
    """
    timesteps, noise = batch["timestep"], batch["noise"]
    latents, image = batch["latents"].float(), batch["image"].float()
    noisy = schedule.add_noise(latents, noise, timesteps)
    kind = schedule.config.prediction_type
    target = noise if kind == "epsilon" else schedule.get_velocity(latents, noise, timesteps)
    prediction = unet(noisy, timesteps, None, added_cond_kwargs={"image_embeds": image}).sample
    prediction = prediction[:, : latents.shape[1]]
    loss = F.mse_loss(prediction.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))
    if snr_gamma is not None:
        snr = losses.signal_to_noise(schedule.alphas_cumprod[timesteps])
        loss = loss * losses.min_snr_weight(snr, snr_gamma, kind)
    return loss


def load_models(args, accelerator, draws_images, seed):
    """The prior's folder and the parts, in host memory, adapted: (folder, image_processor, image_encoder, movq, unet,
    schedule, sampler).

    `schedule` is the noise schedule of the training, `sampler` the decoder's own scheduler. Of the prior, only what
    sees images is fetched, unless it `draws_images`.
    """
    variant, options = args.variant, (args.variant, args.cache_dir)
    prior_base = models.model_folder(
        args.pretrained_prior_model_name_or_path,
        KandinskyV22PriorPipeline,
        args.prior_revision,
        *options,
        left_out=[] if draws_images else ["prior", "scheduler", "text_encoder", "tokenizer"],
        trained=False,
    )
    base = models.model_folder(
        args.pretrained_decoder_model_name_or_path, KandinskyV22Pipeline, args.decoder_revision, *options
    )
    schedule = models.load_part(DDPMScheduler, base, "scheduler")
    if schedule.config.prediction_type not in ("epsilon", "v_prediction"):
        raise UserError(f"the decoder predicts '{schedule.config.prediction_type}'; this script trains epsilon and v")
    image_processor = models.load_part(CLIPImageProcessorPil, prior_base, "image_processor")
    half = processes.frozen_dtype(accelerator)
    image_encoder = models.load_part(CLIPVisionModelWithProjection, prior_base, "image_encoder", variant, dtype=half)
    movq = models.load_part(VQModel, base, "movq", variant, dtype=half)
    unet = models.load_part(UNet2DConditionModel, base, "unet", variant, dtype=half)

    schedule.alphas_cumprod = schedule.alphas_cumprod.to(accelerator.device)
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
    return prior_base, image_processor, image_encoder, movq, unet, schedule, models.sampling_scheduler(base, {})


def latents_of(movq, unet, **sides):
    """The channels of MOVQ's latents, and how many pixels a side of one has. Raises UserError for one of `sides`, in
    pixels and by the name of its flag, that does not come out even in every layer of the UNet."""
    factor = 2 ** (len(movq.config.block_out_channels) - 1)
    multiple = factor * 2 ** (len(unet.config.block_out_channels) - 1)
    for name, side in sides.items():
        if side % multiple:
            nearest = max(1, round(side / multiple)) * multiple
            raise UserError(f"--{name} {side} is not a multiple of {multiple}, the decoder's; try {nearest}")
    return movq.config.latent_channels, factor


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
    prompts = [args.validation_prompt] * args.num_validation_images if args.validation_prompt else []
    prior_base, image_processor, image_encoder, movq, unet, schedule, sampler = load_models(
        args, accelerator, bool(prompts), state.seed
    )
    adapted = {"unet": unet}
    drawing = (args.validation_num_inference_steps, args.validation_guidance_scale)
    pairs = prompts and kandinsky.embed_prompts(
        prior_base, args.variant, image_encoder, accelerator.device, prompts, state.seed, *drawing
    )
    latents = latents_of(movq, unet, resolution=args.resolution)
    if args.aspect_ratio_bucketing:
        latents_of(movq, unet, bucket_reso_steps=args.bucket_reso_steps)
    prepare = SampleTransform(args, image_processor, latents, schedule.config.num_train_timesteps)
    samples = Samples(rows, prepare, state.seed, args.on_bad_sample)
    if val_dataset is not None:
        prepare = SampleTransform(
            args, image_processor, latents, schedule.config.num_train_timesteps, len(val_dataset)
        )
        val_samples = Samples(val_dataset, prepare, state.seed, on_bad_sample="skip")

    # --- what is frozen runs once ------------------------------------------------------------------------------------
    sets = [samples, val_samples] if val_dataset is not None else [samples]
    keeping = (accelerator, flags.encoding_folder(args), sets, args.train_batch_size)
    if args.cache_latents:
        settings = [
            "decoder",
            args.resolution,
            args.image_interpolation_mode,
            args.reducing_gap,
            repr(image_processor),
        ]
        blank, seen_by = prepare.blank() if args.caption_dropout else None, [movq, image_encoder]
        frozen.cache_images(*keeping, seen_by, partial(encode_images, seen_by), settings, args.cached_crops, blank)
        del seen_by  # else the networks would stay in memory
    movq = frozen.place_frozen(movq, accelerator.device, args.cache_latents, prompts)
    image_encoder = frozen.place_frozen(image_encoder, accelerator.device, args.cache_latents, wanted_again=False)
    frozen.release_memory([movq, image_encoder])
    unet.to(accelerator.device)

    def encode(batch):
        """A batch with what the frozen networks make of it; a cache has put it there already."""
        return batch if args.cache_latents else batch | encode_images((movq, image_encoder), batch)

    # --- optimizer and learning rate, in steps ---------------------------------------------------------------------
    updates = BatchPlan.of(
        rows, state.seed, args.train_batch_size, args.gradient_accumulation_steps, accelerator.num_processes
    )
    if args.max_train_steps is None:
        args.max_train_steps = args.num_train_epochs * updates.per_epoch
    parameters = lora.parameters([unet])
    optimizer = optimizers.make_optimizer(
        parameters,
        **flags.optimizer(args, updates.window),
        loss_scaling=accelerator.scaler is not None,
    )
    lr_scheduler = get_scheduler(optimizer=optimizer, **flags.learning_rate_curve(args))
    ema = EMAWeights(adapted.values(), args.ema_decay) if args.use_ema else None
    # The loop calls `network`; `unet` stays the bare model.
    network, optimizer, parameters = gradient.prepare_network(accelerator, unet, optimizer)

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
        base_model=args.pretrained_decoder_model_name_or_path,
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
        return training_loss(unet, schedule, encode(batch))

    def validate():
        """Validation loss and images with the weights that would be saved now."""
        progress.flush()
        unet.eval()
        with averaged(ema), frozen.temporarily_on([movq], accelerator.device):
            if val_dataset is not None:
                validation.log_validation_loss(accelerator, val_samples, args.train_batch_size, loss_of, state.step)
            if prompts:
                pipeline = KandinskyV22Pipeline(unet, sampler, movq)

                def draw(at, noise):
                    return kandinsky.image(pipeline, pairs[at], noise, args.resolution, *drawing)

                grids[:] = [validation.show_images(accelerator, draw, prompts, state, args.output_dir)]
        unet.train()
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
            with accelerator.accumulate(network):
                batch = encode(batch)
                sample_losses = training_loss(network, schedule, batch, args.snr_gamma)
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
        dry_run.report_dry_run(accelerator, plan, adapted, [movq, image_encoder], optimizer, ema)
        return stopped_by and 128 + stopped_by
    if stopped_by:
        processes.end_training(accelerator)
        return commands.say_stopped(stopped_by, state.step, newest, command)
    processes.say_skipped(rows.findings.skipped)

    # --- the result --------------------------------------------------------------------------------------------------
    if accelerator.is_main_process:
        with output_folder.rescue_weights(args.output_dir, state, provenance, saved.save_weights):
            with averaged(ema):
                lora.save(args.output_dir, adapted)
            card.write_card(
                args.output_dir,
                repository,
                base_model=args.pretrained_decoder_model_name_or_path,
                data=args.dataset_name,
                tags=["kandinsky", "lora"],
                facts=facts,
                step=state.step,
                usage=usage(args, repository or args.output_dir, public=True),
                images=[card.CardImage(grid, prompts) for grid in grids],
                token=args.hub_token,
            )
        summary.print_end_summary(args.output_dir, progress, usage(args, args.output_dir))
        if repository:
            uploads.finish()
            upload.upload_result(args.output_dir, repository, args.hub_token, UPLOADED)
    processes.end_training(accelerator)
    return 0


if __name__ == "__main__":
    exit.run_main(main)
