"""What a command line was parsed to: the flags, and groups of them as typed options."""

import argparse
from typing import Any

from training_utils.cli import folders, table
from training_utils.cli.options import (
    BucketLimits,
    CacheOptions,
    DataOptions,
    HubOptions,
    LearningRateOptions,
    MachineOptions,
    ObjectiveOptions,
    OptimizerOptions,
    TimestepOptions,
    ValidationOptions,
)
from training_utils.cli.scripts import Script


class Arguments(argparse.Namespace):
    """The flags of a run, each an attribute, and what was found out about them; `vars` holds the flags alone.

    `script` is the Script that was called, `given` the names of the flags that the user wrote, on the command line or
    in the file of --config, `notices` sentences that the user should see. The options follow from the flags as they
    are when they are asked for.
    """

    __slots__ = ("script", "given", "notices")

    script: Script
    given: frozenset[str]
    notices: list[str]

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a flag, or `default` where this script does not have it."""
        return vars(self).get(name, default)

    @property
    def public(self) -> dict[str, Any]:
        """All flags without the secrets: what trackers, manifests and model cards may see."""
        secrets = table.names(lambda flag: flag.secret)
        return {name: value for name, value in vars(self).items() if name not in secrets}

    @property
    def shapes_result(self) -> dict[str, Any]:
        """The flags that decide what the weights become, as a dict that JSON can hold."""
        shaping = table.names(lambda flag: flag.shapes_result)
        return {name: value for name, value in vars(self).items() if name in shaping}

    @property
    def prompts(self) -> list[str]:
        """The prompts of the validation images: --validation_prompts, or --validation_prompt for each image of it."""
        if self.get("validation_prompt"):
            return [self.validation_prompt] * self.num_validation_images
        return self.get("validation_prompts") or []

    @property
    def data(self) -> DataOptions:
        """Where the data are; the Kandinsky decoders read no captions."""
        return DataOptions(
            dataset_name=self.dataset_name,
            config_name=self.dataset_config_name,
            folder=self.train_data_dir,
            cache_dir=self.cache_dir,
            image_column=self.image_column,
            caption_column=self.get("caption_column"),
            repeats_from_folders=self.repeats_from_folders,
            config=self.train_data_config,
            ignore_color_profiles=self.ignore_color_profiles,
            shuffle_buffer=self.shuffle_buffer if self.streaming else None,
        )

    @property
    def buckets(self) -> BucketLimits | None:
        """The aspect-ratio buckets; None without --aspect_ratio_bucketing."""
        if not self.get("aspect_ratio_bucketing"):
            return None
        smallest, largest = self.min_bucket_reso, self.max_bucket_reso
        return BucketLimits(
            resolution=self.resolution,
            smallest=self.resolution // 2 if smallest is None else smallest,
            largest=self.resolution * 2 if largest is None else largest,
            step=self.bucket_reso_steps,
        )

    @property
    def hub(self) -> HubOptions:
        """What is uploaded to the hub."""
        return HubOptions(
            push=self.push_to_hub,
            model_id=self.hub_model_id,
            token=self.hub_token,
            private=self.hub_private_repo,
            push_checkpoints=self.push_checkpoints,
        )

    @property
    def machine(self) -> MachineOptions:
        """How the run uses its machine; of the torch scripts."""
        return MachineOptions(
            output_dir=self.output_dir,
            logging_dir=self.logging_dir,
            accumulation=self.gradient_accumulation_steps,
            mixed_precision=self.mixed_precision,
            report_to=self.report_to,
            process_group_timeout=self.process_group_timeout,
            allow_tf32=self.allow_tf32,
            fused_backward=self.get("fused_backward_pass", False),
        )

    @property
    def optimization(self) -> OptimizerOptions:
        """The optimizer; JAX has AdamW alone."""
        return OptimizerOptions(
            name=self.get("optimizer", "adamw"),
            learning_rate=self.learning_rate,
            scale_lr=self.scale_lr,
            betas=(self.adam_beta1, self.adam_beta2),
            weight_decay=self.adam_weight_decay,
            epsilon=self.adam_epsilon,
            max_grad_norm=self.max_grad_norm,
        )

    @property
    def lr_schedule(self) -> LearningRateOptions:
        """The learning rate over the steps."""
        return LearningRateOptions(
            name=self.lr_scheduler,
            warmup_steps=self.lr_warmup_steps,
            cycles=self.lr_num_cycles,
            power=self.lr_power,
        )

    @property
    def objective(self) -> ObjectiveOptions:
        """How the loss is computed."""
        dream_p = self.dream_detail_preservation if self.get("dream_training") else None
        return ObjectiveOptions(snr_gamma=self.snr_gamma, dream_p=dream_p)

    @property
    def timestep_bias(self) -> TimestepOptions:
        """Which timesteps are drawn more often."""
        names = ("strategy", "multiplier", "portion", "begin", "end")
        return TimestepOptions(**{name: getattr(self, f"timestep_bias_{name}") for name in names})

    @property
    def validation(self) -> ValidationOptions:
        """How validation images are drawn."""
        return ValidationOptions(
            height=self.resolution,
            width=self.resolution,
            num_inference_steps=self.validation_num_inference_steps,
            guidance_scale=self.validation_guidance_scale,
        )

    @property
    def caches(self) -> CacheOptions:
        """What is kept of the outputs of frozen networks."""
        return CacheOptions(
            images=self.cache_latents,
            captions=self.get("cache_text_embeddings", False),
            crops=self.get("cached_crops"),
            folder=None if self.dry_run else folders.encodings(self.encoding_cache_dir, self.cache_dir),
        )

    @property
    def schedule_changes(self) -> dict[str, Any]:
        """What the flags change in the configuration of the base model's scheduler."""
        changes = {}
        if self.get("prediction_type"):
            changes["prediction_type"] = self.prediction_type
        if self.get("rescale_betas_zero_snr"):
            changes["rescale_betas_zero_snr"] = True
        return changes
