#!/usr/bin/env python
"""Fine-tune every weight of a Kandinsky 2.2 prior, which turns a caption into CLIP's embedding of an image.

accelerate launch train_text_to_image_prior.py --train_data_dir IMAGES
"""

from training_utils.cli import flags


def parse_args(argv=None):
    groups = [
        flags.KANDINSKY,
        (
            flags.DATA[0],
            [
                *flags.without(flags.DATA, "resolution", "center_crop", "image_interpolation_mode"),
                flags.KANDINSKY_RESOLUTION,
            ],
        ),
        flags.TRAINING,
        flags.OPTIMIZATION,
        (flags.OBJECTIVE[0], [flags.SNR_GAMMA]),
        flags.EMA,
        (flags.VALIDATION[0], [flags.VALIDATION_PROMPTS, *flags.VALIDATION[1]]),
        flags.CHECKPOINTS,
        (flags.CACHES[0], flags.without(flags.CACHES, "cached_crops")),
        (flags.HARDWARE[0], flags.HARDWARE[1] + flags.LESS_MEMORY),
        flags.REPORTING,
    ]
    defaults = {"output_dir": "kandi_2_2-model-finetuned", **flags.KANDINSKY_DEFAULTS}
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
from diffusers import DDPMScheduler, KandinskyV22PriorPipeline, PriorTransformer, UnCLIPScheduler  # noqa: E402
from diffusers.optimization import get_scheduler  # noqa: E402
from PIL import ImageOps  # noqa: E402
from transformers import (  # noqa: E402
    CLIPImageProcessorPil,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from training_utils.base import draws, losses  # noqa: E402
from training_utils.base.console import warn  # noqa: E402
from training_utils.base.errors import UserError  # noqa: E402
from training_utils.data import checking, inspection, opening, selection  # noqa: E402
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
    kandinsky,
    loader,
    models,
    optimizers,
    processes,
    validation,
)
from training_utils.torch_backend.ema import EMAWeights, averaged  # noqa: E402
from training_utils.torch_backend.gradient import FiniteGuard, FusedBackward  # noqa: E402
from training_utils.torch_backend.state import TrainingState, gather_full_weights, load_model, save_model  # noqa: E402

PARTS = ["image_encoder", "image_processor", "prior", "scheduler", "text_encoder", "tokenizer"]
UPLOADED = ["README.md", "model_index.json", "validation/*.png", *(f"{part}/*" for part in PARTS)]
USAGE = """
from diffusers import KandinskyV22Pipeline, KandinskyV22PriorPipeline

prior = KandinskyV22PriorPipeline.from_pretrained("{model}", use_safetensors=True)
decoder = KandinskyV22Pipeline.{decoder}
decoder(**prior("what to draw")).images[0].save("image.png")
"""


class SampleTransform:
    """Makes a sample: the image as CLIP sees it, its caption's tokens, and all that is drawn for it.

    Runs in the data workers.
    """

    def __init__(self, args, tokenizer, image_processor, width, timesteps, val_samples=0):
        self.args, self.tokenizer, self.image_processor = args, tokenizer, image_processor
        self.width, self.timesteps = width, timesteps
        self.val_samples = val_samples  # their number; a validation sample is the same at every evaluation
        self.mirrors, self.cropped = args.random_flip and not val_samples, False
        self.images = self.captions = None  # the caches, where there are any

    def show(self, rows, index, mirrored, corner=None):
        """One view of an image, whose middle CLIP's processor takes."""
        image = rows.image(index)
        seen = ImageOps.mirror(image) if mirrored else image
        return {"clip_pixels": self.image_processor(seen, return_tensors="np").pixel_values[0]}

    def tokenize(self, caption):
        length = self.tokenizer.model_max_length
        tokens = self.tokenizer(caption, max_length=length, padding="max_length", truncation=True)
        return {
            "tokens": np.array(tokens.input_ids, dtype=np.int64),
            "token_mask": np.array(tokens.attention_mask, dtype=bool),
        }

    def __call__(self, rows, index, draw):
        args, train = self.args, not self.val_samples
        mirrored = self.mirrors and draw("flip").random() < 0.5
        caption = choose_caption(rows.captions(index), draw, args.caption_dropout if train else 0.0)
        if args.shuffle_tags and caption and train:
            caption = shuffle_tags(caption, draw, args.keep_tokens)
        image = self.images.read if self.images else partial(self.show, rows)
        text = self.tokenize(caption or "")
        if train:
            timestep = int(draw("timestep").integers(0, self.timesteps))
        else:  # spread over the whole schedule, so that few images make a steady loss
            timestep = int((index + 0.5) / self.val_samples * self.timesteps)
        return {
            **image(index, mirrored, None),
            **text,
            **(self.captions.read(text) if self.captions else {}),
            "timestep": np.int64(timestep),
            "noise": draw("noise").standard_normal((self.width,), dtype=np.float32),
        }


@frozen.encoder
def encode_images(image_encoder, batch):
    """CLIP's embeddings of a batch's images, (B, D)."""
    return {"image": image_encoder(frozen.cast_for(image_encoder, batch["clip_pixels"])).image_embeds}


@frozen.encoder
def encode_captions(text_encoder, batch):
    """CLIP's embeddings of a batch's captions, (B, D), and their last hidden states, (B, tokens, D)."""
    text = text_encoder(batch["tokens"])
    return {"pooled": text.text_embeds, "text_states": text.last_hidden_state}


def training_loss(prior, schedule, batch, statistics, snr_gamma=None):
    """The diffusion loss of each sample of a batch, which holds what `encode_images` and `encode_captions` make of
    it; shape (B,).

    x0 is CLIP's embedding of the image, shifted and scaled by `statistics`, the embeddings' mean and standard
    deviation (Ramesh et al. 2022, arXiv 2204.06125, section 2.2, and the released priors). Noise is mixed into it in
    float32 (Ho et al. 2020, arXiv 2006.11239, eq. 4), and the prior predicts x0 itself (arXiv 2204.06125, eq. 2), told
    the caption; padding tokens are masked out. `snr_gamma` weights by min-SNR.
    """
    timesteps, (mean, std) = batch["timestep"], statistics
    x0 = (batch["image"].float() - mean) / std
    pooled, states = batch["pooled"].float(), batch["text_states"].float()
    noisy = schedule.add_noise(x0, batch["noise"], timesteps)
    prediction = prior(noisy, timesteps, pooled, states, batch["token_mask"]).predicted_image_embedding
    loss = F.mse_loss(prediction.float(), x0, reduction="none").mean(dim=1)
    if snr_gamma is not None:
        snr = losses.signal_to_noise(schedule.alphas_cumprod[timesteps])
        loss = loss * losses.min_snr_weight(snr, snr_gamma, "sample")
    return loss


def load_models(args, accelerator):
    """The prior's folder and its parts, in host memory: (folder, tokenizer, image_processor, text_encoder,
    image_encoder, prior, statistics, schedule, sampler).

    `schedule` is the noise schedule of the training, `sampler` the model's own scheduler, `statistics` the mean and
    standard deviation of CLIP's embeddings, float32, which the prior's file holds.
    """
    name, variant = args.pretrained_prior_model_name_or_path, args.variant
    base = models.model_folder(name, KandinskyV22PriorPipeline, args.prior_revision, variant, args.cache_dir)
    sampler = models.load_part(UnCLIPScheduler, base, "scheduler")
    check_prediction_type(sampler.config)
    schedule = DDPMScheduler(
        num_train_timesteps=sampler.config.num_train_timesteps,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="sample",
    )
    tokenizer = models.load_part(CLIPTokenizer, base, "tokenizer")
    image_processor = models.load_part(CLIPImageProcessorPil, base, "image_processor")
    half = processes.frozen_dtype(accelerator)
    text_encoder = models.load_part(CLIPTextModelWithProjection, base, "text_encoder", variant, dtype=half)
    image_encoder = models.load_part(CLIPVisionModelWithProjection, base, "image_encoder", variant, dtype=half)
    prior = models.load_part(PriorTransformer, base, "prior", variant, dtype=torch.float32)

    schedule.alphas_cumprod = schedule.alphas_cumprod.to(accelerator.device)
    for network in (text_encoder, image_encoder):
        network.requires_grad_(False).eval()
    prior.train()
    statistics = embedding_statistics(prior)
    if args.full_bf16:
        optimizers.to_bfloat16(prior)  # but for the statistics, which are not trained
    if args.gradient_checkpointing:
        models.checkpoint_blocks(prior.transformer_blocks)
    if args.enable_xformers_memory_efficient_attention:
        models.enable_xformers(prior)
    return base, tokenizer, image_processor, text_encoder, image_encoder, prior, statistics, schedule, sampler


def embedding_statistics(prior):
    """The mean and standard deviation (1, D) of CLIP's image embeddings that a prior was trained with. They are no
    weights, though they lie among them: no forward pass uses them, so they get no gradient and never change."""
    for statistic in (prior.clip_mean, prior.clip_std):
        statistic.requires_grad_(False)
    if not (prior.clip_std > 0).all():
        raise UserError("the prior's clip_std, the standard deviation of CLIP's embeddings, is not above 0 everywhere")
    return prior.clip_mean.detach(), prior.clip_std.detach()


def check_prediction_type(config):
    """Refuse a prior whose sampler takes its output for something else than x0."""
    if config.prediction_type != "sample":
        raise UserError(
            f"the prior predicts '{config.prediction_type}'; this script trains priors that predict 'sample'"
        )


def save_result(args, base, prior):
    """Write the pipeline into --output_dir; frozen parts are read again, to be saved in the precision they have."""
    precision = models.stored_dtypes(base, args.variant)
    pipeline = KandinskyV22PriorPipeline.from_pretrained(base, prior=prior, variant=args.variant, dtype=precision)
    models.save_pipeline(pipeline, args.output_dir)


def usage(args, model, public=False):
    """The lines that draw with the result in the folder or repository `model`."""
    decoder = card.loading_call(
        args.pretrained_decoder_model_name_or_path, args.decoder_revision, args.variant, public=public
    )
    return USAGE.format(decoder=decoder, model=model)


def main(argv=None):
    args = parse_args(argv)
    command = flags.without_secrets(argv)
    if args.check_data:
        return inspection.check_data(flags.data_source(args), None)

    # --- processes, seed and where to begin --------------------------------------------------------------------------
    accelerator = processes.make_accelerator(**flags.machine(args))
    from_main = partial(processes.from_main, accelerator)  # what a function returns in the main process
    args.mixed_precision = accelerator.mixed_precision
    for notice in args.notices:
        warn(notice)
    resume_from, state = from_main(
        lambda: resume.begin_run(args.output_dir, args.resume_from_checkpoint, args.seed, writes=not args.dry_run),
    )
    from_main(lambda: output_folder.refuse_another_result(args.output_dir, pipeline="KandinskyV22PriorPipeline"))
    repository, uploads = upload.open_uploads(from_main, accelerator.is_main_process, **flags.hub(args))

    # --- data and models ---------------------------------------------------------------------------------------------
    rows = opening.load_dataset(**flags.data_source(args))
    rows = selection.take_subset(rows, args.max_train_samples, state.seed)
    unusable = from_main(lambda: checking.check_dataset(rows, args.on_bad_sample))
    rows = rows.without(unusable)
    rows, val_dataset = selection.split_validation(rows, args.validation_split, state.seed)
    base, tokenizer, image_processor, text_encoder, image_encoder, prior, statistics, schedule, sampler = load_models(
        args, accelerator
    )
    prompts, decoder = args.validation_prompts or [], None
    if prompts:
        decoder = kandinsky.load_decoder(
            args.pretrained_decoder_model_name_or_path,
            args.decoder_revision,
            args.variant,
            args.cache_dir,
            processes.frozen_dtype(accelerator),
        )
    drawing = (args.validation_num_inference_steps, args.validation_guidance_scale)
    if accelerator.is_main_process:
        warn_of_long_captions(rows, tokenizer)
    facts = (tokenizer, image_processor, prior.config.embedding_dim)
    prepare = SampleTransform(args, *facts, schedule.config.num_train_timesteps)
    samples = Samples(rows, prepare, state.seed, args.on_bad_sample)
    if val_dataset is not None:
        prepare = SampleTransform(args, *facts, schedule.config.num_train_timesteps, len(val_dataset))
        val_samples = Samples(val_dataset, prepare, state.seed, on_bad_sample="skip")

    # --- what is frozen runs once ------------------------------------------------------------------------------------
    sets = [samples, val_samples] if val_dataset is not None else [samples]
    keeping = (accelerator, flags.encoding_folder(args), sets, args.train_batch_size)
    if args.cache_latents:
        settings = [repr(image_processor)]
        frozen.cache_images(*keeping, [image_encoder], partial(encode_images, image_encoder), settings)
    if args.cache_text_embeddings:
        empty = bool(args.caption_dropout)
        frozen.cache_captions(*keeping, [text_encoder], partial(encode_captions, text_encoder), empty)
    image_encoder = frozen.place_frozen(image_encoder, accelerator.device, args.cache_latents, prompts)
    text_encoder = frozen.place_frozen(text_encoder, accelerator.device, args.cache_text_embeddings, prompts)
    frozen.release_memory([image_encoder, text_encoder])
    prior.to(accelerator.device)
    statistics = [statistic.to(accelerator.device) for statistic in statistics]

    def encode(batch):
        """A batch with what the frozen networks make of it; caches have put it there already."""
        images = {} if args.cache_latents else encode_images(image_encoder, batch)
        captions = {} if args.cache_text_embeddings else encode_captions(text_encoder, batch)
        return batch | images | captions

    # --- optimizer and learning rate, in steps ---------------------------------------------------------------------
    updates = BatchPlan.of(
        rows, state.seed, args.train_batch_size, args.gradient_accumulation_steps, accelerator.num_processes
    )
    if args.max_train_steps is None:
        args.max_train_steps = args.num_train_epochs * updates.per_epoch
    parameters = list(prior.parameters())  # with the two statistics, as in the original's optimizer state
    optimizer = optimizers.make_optimizer(
        parameters,
        **flags.optimizer(args, updates.window),
        loss_scaling=accelerator.scaler is not None,
        rounding_seed=(lambda index: draws.rounding_seed(state.seed, state.step, index)) if args.full_bf16 else None,
    )
    lr_scheduler = get_scheduler(optimizer=optimizer, **flags.learning_rate_curve(args))
    # The loop calls `network`; `prior` stays the bare model.
    network, optimizer, parameters = gradient.prepare_network(accelerator, prior, optimizer)
    ema = EMAWeights([prior], args.ema_decay, args.offload_ema) if args.use_ema else None

    # --- resume ------------------------------------------------------------------------------------------------------
    saved = TrainingState(
        accelerator,
        optimizer,
        lr_scheduler,
        lambda folder: save_model(folder, "prior", prior, ema),
        lambda folder: load_model(folder, "prior", prior, ema),
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
        base_model=args.pretrained_prior_model_name_or_path,
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
    fused = FusedBackward(optimizer, guard) if args.fused_backward_pass else None
    progress = processes.start_progress(accelerator, guard, updates, state, args.max_train_steps, args.logging_steps)
    grids = standing_grids(args.output_dir, state.step) if prompts else []  # the last ones drawn

    def loss_of(batch):
        """The loss of each sample of a held-out batch, shape (B,)."""
        return training_loss(prior, schedule, encode(batch), statistics)

    def validate():
        """Validation loss and images with the weights that would be saved now."""
        progress.flush()
        prior.eval()
        with averaged(ema), frozen.temporarily_on([image_encoder, text_encoder], accelerator.device):
            if val_dataset is not None:
                validation.log_validation_loss(accelerator, val_samples, args.train_batch_size, loss_of, state.step)
            if prompts:
                pipeline = KandinskyV22PriorPipeline(
                    prior, image_encoder, text_encoder, tokenizer, sampler, image_processor
                )
                with frozen.temporarily_on(kandinsky.networks(decoder), accelerator.device):

                    def draw(at, noise):
                        return kandinsky.prompt_image(pipeline, decoder, prompts[at], noise, args.resolution, *drawing)

                    grids[:] = [validation.show_images(accelerator, draw, prompts, state, args.output_dir)]
        prior.train()
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
                sample_losses = training_loss(network, schedule, batch, statistics, args.snr_gamma)
                loss = (sample_losses * batch["weight"]).sum()
                if fused:
                    fused.begin(loss)
                accelerator.backward(loss)
                step_loss += loss.detach() / args.gradient_accumulation_steps
                if accelerator.sync_gradients:
                    grad_norm = (
                        fused.gradient_norm()
                        if fused
                        else gradient.clip_gradient(accelerator, parameters, args.max_grad_norm)
                    )
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
        dry_run.report_dry_run(
            accelerator, plan, {"prior": prior}, [image_encoder, text_encoder], optimizer, ema, fused
        )
        return stopped_by and 128 + stopped_by
    if stopped_by:
        processes.end_training(accelerator)
        return commands.say_stopped(stopped_by, state.step, newest, command)
    processes.say_skipped(rows.findings.skipped)

    # --- the result --------------------------------------------------------------------------------------------------
    prior, ema = gather_full_weights(prior, ema)
    if accelerator.is_main_process:
        with output_folder.rescue_weights(args.output_dir, state, provenance, saved.save_weights):
            with averaged(ema):
                save_result(args, base, prior)
            card.write_card(
                args.output_dir,
                repository,
                base_model=args.pretrained_prior_model_name_or_path,
                data=args.dataset_name,
                tags=["kandinsky"],
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
