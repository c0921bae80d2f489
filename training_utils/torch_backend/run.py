"""What is the same in every torch run, so that a script's main is left with its models, its loss and its loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.optimization import get_scheduler

from training_utils.base import draws
from training_utils.base.console import warn
from training_utils.cli import flags
from training_utils.data import buckets, checking, opening, selection
from training_utils.data.captions import warn_of_long_captions
from training_utils.data.dataset import ImageDataset
from training_utils.data.plan import BatchPlan
from training_utils.data.samples import Samples
from training_utils.run import checkpoints, commands, output_folder, resume, summary, trackers
from training_utils.run import progress as progress_rules
from training_utils.run.dry_run import STEPS
from training_utils.run.grids import standing_grids
from training_utils.run.hub import card, upload
from training_utils.run.metrics import Metrics
from training_utils.run.signals import Interruption
from training_utils.torch_backend import dry_run, frozen, loader, optimizers, processes, validation
from training_utils.torch_backend.ema import EMAWeights, averaged
from training_utils.torch_backend.frozen import FrozenEncoders
from training_utils.torch_backend.gradient import Gradient
from training_utils.torch_backend.state import TrainingState, Weights


class Run:
    """The processes of a run, its output folder, its seed, its place in the data, and what it logs and saves.

    A script calls its methods in the order in which they stand here; the loop is the script's. What a run must never
    get is a `train` method, a method to override, or an `if` about a family of models.

    Attributes: accelerator; state, the RunState; prompts, of the validation images; repository, the id of the hub's
    repository or None; gradient, what stands between backward pass and step; stopped_by, the number of the signal that
    ended the run, or 0.
    """

    def __init__(
        self,
        args: Any,
        script: str,
        argv: Sequence[str] | None,
        *,
        base_model: str,
        pipeline: str | None = None,
        adapted: Sequence[str] = (),
        find_unused_parameters: bool = False,
    ):
        """Start the processes, claim the output folder and find where the run begins. A collective call.

        `base_model` is the name to show; the result is a `pipeline` of this class, or adapters for the networks named
        in `adapted`. Raises UserError for an output folder, a checkpoint or a repository that does not go with it.
        """
        self.args, self.script, self.base_model = args, Path(script).name, base_model
        self.command = flags.without_secrets(argv)
        self.accelerator = processes.make_accelerator(
            **flags.machine(args), find_unused_parameters=find_unused_parameters
        )
        args.mixed_precision = self.accelerator.mixed_precision
        for notice in args.notices:
            warn(notice)
        self.output_dir = None if args.dry_run else args.output_dir
        self.resume_from, self.state = self._from_main(
            lambda: resume.begin_run(args.output_dir, args.resume_from_checkpoint, args.seed, writes=not args.dry_run)
        )
        self._from_main(lambda: output_folder.refuse_another_result(args.output_dir, pipeline, adapted))
        self.repository, self.uploads = upload.open_uploads(
            self._from_main, self.accelerator.is_main_process, **flags.hub(args)
        )
        self.prompts = flags.prompts(args)
        self.stopped_by = 0
        self.newest_checkpoint: Path | None = None

    def _from_main(self, make: Callable[[], Any]) -> Any:
        """What a function returns in the main process, on every process."""
        return processes.from_main(self.accelerator, make)

    # --- data --------------------------------------------------------------------------------------------------------

    def open_data(self, sized: bool = True) -> tuple[ImageDataset, ImageDataset | None]:
        """The images to train on and those held out for validation, or None: checked, and the same on every rank.

        Where they are `sized`, each image is trained at --resolution, or in its bucket.
        """
        args, seed = self.args, self.state.seed
        opened = opening.load_dataset(**flags.data_source(args))
        dataset = selection.take_subset(opened, args.max_train_samples, seed)
        unusable = self._from_main(lambda: checking.check_dataset(dataset, args.on_bad_sample))
        usable = dataset.without(unusable)
        if sized:
            limits = flags.bucket_limits(args)
            usable.sizes = self._from_main(lambda: buckets.training_sizes(usable, args.resolution, limits))
        self.dataset, self.val_dataset = selection.split_validation(usable, args.validation_split, seed)
        return self.dataset, self.val_dataset

    def warn_of_long_captions(self, tokenizer: Any) -> None:
        """Name the captions that the tokenizer will cut."""
        if self.accelerator.is_main_process:
            warn_of_long_captions(self.dataset, tokenizer)

    def samples(self, transform: Callable[..., Any]) -> tuple[Samples, Samples | None]:
        """The datasets as samples: what `transform(val_samples=N)` makes of them, N is 0 for training."""
        seed = self.state.seed
        self.train_set = Samples(self.dataset, transform(), seed, self.args.on_bad_sample)
        self.val_set = None
        if self.val_dataset is not None:
            val_transform = transform(val_samples=len(self.val_dataset))
            self.val_set = Samples(self.val_dataset, val_transform, seed, on_bad_sample="skip")
        return self.train_set, self.val_set

    def frozen_encoders(self) -> FrozenEncoders:
        """What runs the frozen networks on the samples: once into the cache, or at each step."""
        args = self.args
        sets = [samples for samples in (self.train_set, self.val_set) if samples is not None]
        return FrozenEncoders(
            self.accelerator,
            sets,
            batch_size=args.train_batch_size,
            cache_folder=flags.encoding_folder(args),
            cache_images=args.cache_latents,
            cache_captions=getattr(args, "cache_text_embeddings", False),
            crops=args.cached_crops,
        )

    # --- optimizer and resume ----------------------------------------------------------------------------------------

    def plan_batches(self) -> BatchPlan:
        """Which samples each step takes. From here on the number of steps is known."""
        args = self.args
        self.plan = BatchPlan.of(
            self.dataset,
            self.state.seed,
            args.train_batch_size,
            args.gradient_accumulation_steps,
            self.accelerator.num_processes,
        )
        if args.max_train_steps is None:
            args.max_train_steps = args.num_train_epochs * self.plan.per_epoch
        self.last_step = args.max_train_steps
        if args.dry_run:
            self.last_step = min(args.max_train_steps, self.state.step + STEPS)
        return self.plan

    def make_optimizer(self, parameters: list[torch.nn.Parameter]) -> tuple[Any, Any]:
        """The optimizer of these parameters, and the schedule of its learning rate in steps."""
        args = self.args
        rounding_seed = self._rounding_seed if getattr(args, "full_bf16", False) else None
        optimizer = optimizers.make_optimizer(
            parameters,
            **flags.optimizer(args, self.plan.window),
            loss_scaling=self.accelerator.scaler is not None,
            rounding_seed=rounding_seed,
        )
        return optimizer, get_scheduler(optimizer=optimizer, **flags.learning_rate_curve(args))

    def _rounding_seed(self, index: int) -> int:
        """The seed with which the weight of this index is rounded in the coming step."""
        return draws.rounding_seed(self.state.seed, self.state.step, index)

    def begin(
        self,
        optimizer: Any,
        lr_scheduler: Any,
        weights: Weights,
        parameters: Any,
    ) -> None:
        """Resume, open the trackers, and say what is about to be trained. A collective call.

        `weights` writes and reads what is trained; `parameters` are those that the optimizer steps.
        """
        args, accelerator, state = self.args, self.accelerator, self.state
        self.lr_scheduler = lr_scheduler
        self.saved = TrainingState(
            accelerator=accelerator, optimizer=optimizer, lr_scheduler=lr_scheduler, weights=weights
        )
        self.about = {
            "script": self.script,
            "world_size": accelerator.num_processes,
            "flags": flags.mathematics(args),
            "data": {"samples": len(self.dataset), "sha256": self._from_main(self.dataset.fingerprint)},
        }
        if self.resume_from:
            self._from_main(lambda: resume.warn_of_differences(self.resume_from, self.about))
            self.saved.read(self.resume_from, state.step)
        processes.start_trackers(accelerator, args.tracker_project_name, trackers.tracker_config(flags.public(args)))
        facts = summary.announce(
            self.about,
            self.base_model,
            processes.device_name(accelerator),
            args.output_dir,
            parameters,
            self.plan,
            self.val_dataset,
            args.max_train_steps,
            state,
        )
        if accelerator.is_main_process and not args.dry_run:
            output_folder.write_run_file(args.output_dir, flags.as_file(args, self.script, state.seed))
            accelerator.trackers.append(Metrics(args.output_dir, state.step, facts))
        self.gradient = Gradient(
            accelerator,
            optimizer,
            parameters,
            max_norm=args.max_grad_norm,
            stop_on_nan=args.on_nan == "stop",
            during_backward=getattr(args, "fused_backward_pass", False),
        )
        self.progress = processes.start_progress(
            accelerator, self._report_not_finite, self.plan, state, args.max_train_steps, args.logging_steps
        )
        self.grids = standing_grids(args.output_dir, state.step) if self.prompts else []

    def _report_not_finite(self, step: int, loss: float, before: Any) -> None:
        """What Progress calls for a step whose gradient was not finite; `before` is the RunState before it."""

        def save_before() -> Path | None:
            folder = self.saved.save_earlier_checkpoint(
                self.output_dir,
                before,
                self.about,
                self.args.checkpoints_total_limit,
                steps_back=self.state.step - before.step,
            )
            self.uploads.add_last(folder, self._from_main)
            processes.end_training(self.accelerator)
            return folder

        images = self.plan.names(self.dataset, before.position)
        progress_rules.report_not_finite(step, loss, images, self.args.on_nan == "stop", save_before)

    # --- the loop ----------------------------------------------------------------------------------------------------

    def batches(self) -> Iterator[dict[str, torch.Tensor]]:
        """The endless batches of this process, from its place in the data on."""
        args = self.args
        save = None if args.dry_run else self.save_checkpoint
        batches = loader.training_batches(
            self.train_set, self.plan, self.state, self.accelerator, args.dataloader_num_workers, save
        )
        if args.dry_run:
            batches = dry_run.begin_dry_run(self.accelerator, batches, self.train_set, self.plan)
        return batches

    def __enter__(self) -> Run:
        """From here on SIGTERM and Ctrl-C end the run after a step, on all processes after the same one."""
        largest = processes.largest_of_processes(self.accelerator, self.args.process_group_timeout)
        self.interruption = Interruption(largest)
        self.interruption.__enter__()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            if kind is None and self.stopped_by:
                self.uploads.finish(self._from_main)
        finally:
            self.interruption.__exit__(kind, error, trace)
        if kind is None:
            self.progress.close()

    def validates_first(self) -> bool:
        """Whether to validate before the first step."""
        return self.args.validation_at_start and self._validates() and self.state.step == 0

    def _validates(self) -> bool:
        return bool(self.prompts) or self.val_dataset is not None

    def continues(self) -> bool:
        """Whether another step is to be made."""
        return self.state.step < self.last_step and not self.stopped_by

    def seed_dropout(self) -> None:
        """Begin a micro-step: what is drawn inside the networks comes from seed, micro-step and rank."""
        state = self.state
        torch.manual_seed(draws.network_seed(state.seed, state.micro_step, self.accelerator.process_index))
        state.micro_step += 1

    def end_step(self, loss: torch.Tensor, grad_norm: torch.Tensor, stepped: bool) -> None:
        """Count a step; one that an fp16 overflow left out (not `stepped`) only moves on in the data."""
        self.state.position = self.plan.after(self.state.position)
        if stepped:
            self.state.step += 1
            self.progress.update(self.state, loss, grad_norm, self.lr_scheduler.get_last_lr()[0])
        else:
            self.progress.skip(self.save_checkpoint)
        self.stopped_by = self.interruption.signal()

    def checkpoint_due(self, stepped: bool) -> bool:
        """Whether to write a checkpoint now."""
        if self.stopped_by:
            return True
        return stepped and checkpoints.checkpoint_due(self.state, self.args.checkpointing_steps, self.last_step)

    def save_checkpoint(self) -> Path | None:
        """Write a checkpoint and have it uploaded; None where it could not be written. A collective call."""
        self.progress.flush()
        folder = self.saved.save_checkpoint(self.output_dir, self.state, self.about, self.args.checkpoints_total_limit)
        self.progress.pause()
        self.newest_checkpoint = self.uploads.add(folder)
        return folder

    def validation_due(self, stepped: bool) -> bool:
        """Whether to validate now."""
        if not stepped or self.stopped_by or not self._validates():
            return False
        args = self.args
        return progress_rules.validation_due(self.state, args.validation_steps, args.validation_epochs, self.last_step)

    @contextmanager
    def validating(
        self,
        networks: Sequence[torch.nn.Module],
        ema: EMAWeights | None,
        encoders: Sequence[torch.nn.Module | None],
    ) -> Iterator[None]:
        """Within this context the trained networks have the weights that would be saved now, in evaluation mode, and
        the frozen encoders are on the device."""
        self.progress.flush()
        for network in networks:
            network.eval()
        with averaged(ema), frozen.temporarily_on(encoders, self.accelerator.device):
            yield
        for network in networks:
            network.train()
        self.progress.pause()

    def log_val_loss(self, val_set: Samples, loss_of: Callable[[dict[str, torch.Tensor]], torch.Tensor]) -> None:
        """Log the mean of `loss_of(batch)`, losses of shape (B,), over the validation samples. A collective call."""
        validation.log_validation_loss(self.accelerator, val_set, self.args.train_batch_size, loss_of, self.state.step)

    def log_images(self, draw: Callable[[Any, torch.Generator], Any], inputs: Sequence[Any] | None = None) -> None:
        """Save and log the image that `draw(prompt, noise)` makes for each prompt, as one grid. A collective call.

        `inputs` stand in for the prompts, as what was made of them before the training.
        """
        prompts = self.prompts
        inputs = prompts if inputs is None else inputs
        grid = validation.show_images(self.accelerator, draw, inputs, prompts, self.state, self.args.output_dir)
        self.grids = [grid]

    # --- the end -----------------------------------------------------------------------------------------------------

    @property
    def ended_early(self) -> bool:
        """Whether there is no result to write: a dry run, or one that a signal ended."""
        return self.args.dry_run or bool(self.stopped_by)

    def exit_code(
        self,
        networks: dict[str, torch.nn.Module],
        encoders: Sequence[torch.nn.Module | None],
        optimizer: Any,
        ema: EMAWeights | None,
    ) -> int:
        """Say what a dry run has found, or how to continue. Returns the exit code."""
        if self.args.dry_run:
            plan = (self.dataset, self.val_dataset, self.plan, self.args.max_train_steps, self.progress)
            dry_run.report_dry_run(self.accelerator, plan, networks, encoders, optimizer, ema, self.gradient.fused)
            return self.stopped_by and 128 + self.stopped_by
        processes.end_training(self.accelerator)
        return commands.say_stopped(self.stopped_by, self.state.step, self.newest_checkpoint, self.command)

    def publish(
        self,
        save_result: Callable[[], None],
        weights: Weights,
        *,
        tags: Sequence[str],
        usage: str,
        public_usage: str,
        uploaded: Sequence[str],
        **more_of_card: Any,
    ) -> int:
        """Write the result and its model card, say what there is, and upload it. Returns the exit code.

        `save_result()` writes into the output folder, with the average where there is one; `weights` are complete in
        the main process; `usage` and `public_usage` are the Python lines that use the result, here and on the hub;
        `uploaded` the patterns of the files that are uploaded. Raises UserError that says where the weights are when
        the result cannot be written.
        """
        args, state = self.args, self.state
        processes.say_skipped(self.dataset.findings.skipped)
        if self.accelerator.is_main_process:
            with output_folder.rescue_weights(args.output_dir, state, self.about, weights.save):
                with averaged(weights.ema):
                    save_result()
                card.write_card(
                    args.output_dir,
                    self.repository,
                    base_model=self.base_model,
                    data=args.dataset_name,
                    tags=tags,
                    facts=flags.mathematics(args)
                    | {"seed": state.seed, "steps": state.step, "images": len(self.dataset)},
                    usage=public_usage,
                    images=[(grid, self.prompts) for grid in self.grids],
                    token=args.hub_token,
                    **more_of_card,
                )
            summary.conclude(args.output_dir, self.progress, usage)
            if self.repository:
                self.uploads.finish()
                upload.upload_result(args.output_dir, self.repository, args.hub_token, uploaded)
        processes.end_training(self.accelerator)
        return 0
