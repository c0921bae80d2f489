#!/usr/bin/env python
"""Fine-tune every weight of a Kandinsky 2.2 prior, which turns a caption into CLIP's embedding of an image.

accelerate launch train_text_to_image_prior.py --train_data_dir IMAGES
"""

from training_utils import cli


def parse_args(argv=None):
    return cli.parse(argv, script="train_text_to_image_prior", description=__doc__)


if __name__ == "__main__":
    # --help and a wrong flag are answered before the imports below, which take ten seconds.
    cli.hide_secrets(parse_args())

from training_utils.base import startup  # noqa: E402

startup.begin()
startup.prepare()

from dataclasses import dataclass  # noqa: E402
from functools import partial  # noqa: E402
from pathlib import Path  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from diffusers import DDPMScheduler, KandinskyV22Pipeline, KandinskyV22PriorPipeline, PriorTransformer, UnCLIPScheduler  # noqa: E402
from PIL import ImageOps  # noqa: E402
from transformers import (  # noqa: E402
    CLIPImageProcessorPil,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from training_utils.base import losses  # noqa: E402
from training_utils.cli.options import PLAIN  # noqa: E402
from training_utils.data import inspection  # noqa: E402
from training_utils.data.captions import choose_caption, shuffle_tags  # noqa: E402
from training_utils.run import exit  # noqa: E402
from training_utils.run.hub import card  # noqa: E402
from training_utils.torch_backend import frozen, kandinsky, models, optimizers, processes  # noqa: E402
from training_utils.torch_backend.ema import EMAWeights  # noqa: E402
from training_utils.torch_backend.gradient import prepare_network  # noqa: E402
from training_utils.torch_backend.run import Run  # noqa: E402
from training_utils.torch_backend.state import FullWeights  # noqa: E402

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
        self.args = args
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.width = width
        self.timesteps = timesteps
        # Their number, 0 in training. A validation sample is the same at every evaluation.
        self.val_samples = val_samples
        self.random_flip = args.random_flip and not val_samples
        self.random_crop = False
        # Set where there are caches.
        self.image_cache = None
        self.caption_cache = None

    def view(self, dataset, index, mirrored, crop_draw=None):
        """One view of an image, whose middle CLIP's processor takes."""
        image = dataset.image(index)
        seen = ImageOps.mirror(image) if mirrored else image
        return {"clip_pixels": self.image_processor(seen, return_tensors="np").pixel_values[0]}

    def tokenize(self, caption):
        length = self.tokenizer.model_max_length
        tokens = self.tokenizer(caption, max_length=length, padding="max_length", truncation=True)
        return {
            "tokens": np.array(tokens.input_ids, dtype=np.int64),
            "token_mask": np.array(tokens.attention_mask, dtype=bool),
        }

    def __call__(self, dataset, index, draw):
        args = self.args
        train = not self.val_samples
        mirrored = self.random_flip and draw("flip").random() < 0.5
        caption = choose_caption(dataset.captions(index), draw, args.caption_dropout if train else 0.0)
        if args.shuffle_tags and caption and train:
            caption = shuffle_tags(caption, draw, args.keep_tokens)
        if self.image_cache:
            image = self.image_cache.read(index, mirrored, None)
        else:
            image = self.view(dataset, index, mirrored)
        text = self.tokenize(caption or "")
        if self.caption_cache:
            text |= self.caption_cache.read(text)
        if train:
            timestep = int(draw("timestep").integers(0, self.timesteps))
        else:
            # Spread over the full schedule, so that few images make a steady loss.
            timestep = int((index + 0.5) / self.val_samples * self.timesteps)
        return {
            **image,
            **text,
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


def training_loss(prior, noise_schedule, batch, statistics, objective=PLAIN):
    """The diffusion loss of each sample of a batch, which holds what `encode_images` and `encode_captions` make of
    it; shape (B,).

    x0 is CLIP's embedding of the image, shifted and scaled by `statistics`, the embeddings' mean and standard
    deviation (Ramesh et al. 2022, arXiv 2204.06125, section 2.2, and the released priors). Noise is mixed into it in
    float32 (Ho et al. 2020, arXiv 2006.11239, eq. 4), and the prior predicts x0 itself (arXiv 2204.06125, eq. 2), told
    the caption; padding tokens are masked out. `objective` may weight the loss by min-SNR.
    """
    timesteps, (mean, std) = batch["timestep"], statistics
    x0 = (batch["image"].float() - mean) / std
    pooled, states = batch["pooled"].float(), batch["text_states"].float()
    noisy = noise_schedule.add_noise(x0, batch["noise"], timesteps)
    prediction = prior(noisy, timesteps, pooled, states, batch["token_mask"]).predicted_image_embedding
    loss = F.mse_loss(prediction.float(), x0, reduction="none").mean(dim=1)
    if objective.snr_gamma is not None:
        snr = losses.signal_to_noise(noise_schedule.alphas_cumprod[timesteps])
        loss = loss * losses.min_snr_weight(snr, objective.snr_gamma, "sample")
    return loss


@dataclass
class Parts:
    """The parts of the prior, in host memory until they are placed; None where a cache stands in for one.

    `noise_schedule` is the one of the training, `sampler` the model's own scheduler; `statistics` are the mean and
    standard deviation of CLIP's embeddings, float32, which the prior's file holds; `decoder` draws the validation
    images.
    """

    base: Path
    tokenizer: CLIPTokenizer
    image_processor: CLIPImageProcessorPil
    text_encoder: CLIPTextModelWithProjection | None
    image_encoder: CLIPVisionModelWithProjection | None
    prior: PriorTransformer
    statistics: tuple[torch.Tensor, torch.Tensor]
    noise_schedule: DDPMScheduler
    sampler: UnCLIPScheduler
    decoder: KandinskyV22Pipeline | None


def load_models(args: cli.Arguments, accelerator: Accelerator, draws_images: bool) -> Parts:
    """Load, freeze, cast. Raises UserError for a base model that this script cannot train."""
    name, variant = args.pretrained_prior_model_name_or_path, args.variant
    source = (args.prior_revision, variant, args.cache_dir)
    base = models.model_folder(name, KandinskyV22PriorPipeline, *source, saved=True)
    sampler = models.load_part(UnCLIPScheduler, base, "scheduler")
    kandinsky.check_prediction_type(sampler.config)
    noise_schedule = DDPMScheduler(
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

    noise_schedule.alphas_cumprod = noise_schedule.alphas_cumprod.to(accelerator.device)
    for network in (text_encoder, image_encoder):
        network.requires_grad_(False).eval()
    prior.train()
    statistics = kandinsky.embedding_statistics(prior)
    if args.full_bf16:
        # Except the statistics, which are not trained.
        optimizers.to_bfloat16(prior)
    if args.gradient_checkpointing:
        models.checkpoint_blocks(prior.transformer_blocks)
    if args.enable_xformers_memory_efficient_attention:
        models.enable_xformers(prior)
    decoder = None
    if draws_images:
        decoder = kandinsky.load_decoder(
            args.pretrained_decoder_model_name_or_path, args.decoder_revision, args.variant, args.cache_dir, half
        )
    return Parts(
        base=base,
        tokenizer=tokenizer,
        image_processor=image_processor,
        text_encoder=text_encoder,
        image_encoder=image_encoder,
        prior=prior,
        statistics=statistics,
        noise_schedule=noise_schedule,
        sampler=sampler,
        decoder=decoder,
    )


def save_result(args, base, prior):
    """Write the pipeline into --output_dir; frozen parts are read again, to be saved in the precision they have."""
    models.save_trained(KandinskyV22PriorPipeline, base, args.output_dir, args.variant, prior=prior)


def usage(args, model, public=False):
    """The lines that draw with the result in the folder or repository `model`."""
    decoder = card.loading_call(
        args.pretrained_decoder_model_name_or_path, args.decoder_revision, args.variant, public=public
    )
    return USAGE.format(decoder=decoder, model=model)


def main(argv=None):
    args = parse_args(argv)
    if args.check_data:
        return inspection.check_data(args.data, None)
    run = Run(
        args,
        __file__,
        argv,
        base_model=args.pretrained_prior_model_name_or_path,
        pipeline="KandinskyV22PriorPipeline",
    )
    accelerator = run.accelerator

    # --- data and models ---------------------------------------------------------------------------------------------
    run.open_data(sized=False)
    parts = load_models(args, accelerator, bool(run.prompts))
    prior = parts.prior
    noise_schedule = parts.noise_schedule
    run.warn_of_long_captions(parts.tokenizer)
    transform = partial(
        SampleTransform,
        args,
        parts.tokenizer,
        parts.image_processor,
        prior.config.embedding_dim,
        noise_schedule.config.num_train_timesteps,
    )
    train_set, val_set = run.samples(transform)

    # --- frozen networks: cached on disk, or run at each step --------------------------------------------------------
    encode = run.frozen_encoders()
    draws_images = bool(run.prompts)
    parts.image_encoder = encode.images(
        encode_images, parts.image_encoder, cache_key=[repr(parts.image_processor)], needed_again=draws_images
    )
    parts.text_encoder = encode.captions(
        encode_captions, parts.text_encoder, needed_again=draws_images, with_empty=bool(args.caption_dropout)
    )
    frozen.release_memory([parts.image_encoder, parts.text_encoder])
    prior.to(accelerator.device)
    statistics = [statistic.to(accelerator.device) for statistic in parts.statistics]

    # --- optimizer, schedule, EMA, resume ----------------------------------------------------------------------------
    run.plan_batches()
    optimizer, lr_scheduler = run.make_optimizer(list(prior.parameters()))  # with the two statistics, as the original
    # The loop calls `network`, which DDP or FSDP may wrap; `prior` stays the bare model.
    network, optimizer, parameters = prepare_network(accelerator, prior, optimizer)
    ema = EMAWeights([prior], args.ema_decay, args.offload_ema) if args.use_ema else None
    weights = FullWeights("prior", prior, ema)
    run.begin(optimizer, lr_scheduler, weights, parameters)

    def val_loss(batch):
        """The loss of each sample of a validation batch, shape (B,)."""
        return training_loss(prior, noise_schedule, encode(batch), statistics)

    def validate():
        """Validation loss and images with the weights that would be saved now."""
        with run.validating([prior], ema, [parts.image_encoder, parts.text_encoder]):
            if val_set is not None:
                run.log_val_loss(val_set, val_loss)
            if run.prompts:
                pipeline = KandinskyV22PriorPipeline(
                    prior,
                    parts.image_encoder,
                    parts.text_encoder,
                    parts.tokenizer,
                    parts.sampler,
                    parts.image_processor,
                )
                draw = partial(kandinsky.draw_prompt, pipeline, parts.decoder, **kandinsky.drawing(args.validation))
                with frozen.temporarily_on(kandinsky.pipeline_networks(parts.decoder), accelerator.device):
                    run.log_images(draw)

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
                sample_losses = training_loss(network, noise_schedule, batch, statistics, args.objective)
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
        return run.exit_code({"prior": prior}, [parts.image_encoder, parts.text_encoder], optimizer, ema)

    # --- the result --------------------------------------------------------------------------------------------------
    weights = weights.gather_full()
    return run.publish_weights(
        partial(save_result, args, parts.base, weights.model),
        weights,
        tags=["kandinsky"],
        usage=usage(args, args.output_dir),
        public_usage=usage(args, run.repository or args.output_dir, public=True),
        uploaded=UPLOADED,
    )


if __name__ == "__main__":
    exit.run_main(main)
