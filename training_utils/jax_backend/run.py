"""What is the same in every JAX run, so that a script's main is left with its models, its loss and its loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from PIL.Image import Image

from training_utils.base.console import say, warn
from training_utils.cli import flags
from training_utils.data import checking, opening, selection
from training_utils.data.captions import warn_of_long_captions
from training_utils.data.dataset import ImageDataset
from training_utils.data.plan import BatchPlan
from training_utils.data.samples import Samples
from training_utils.jax_backend import dry_run, loader, optimizers, processes, trackers, validation
from training_utils.jax_backend.frozen import FrozenEncoders
from training_utils.jax_backend.state import TrainingState
from training_utils.run import checkpoints, commands, output_folder, resume, summary
from training_utils.run import progress as progress_rules
from training_utils.run.dry_run import STEPS
from training_utils.run.grids import grid_name, publish_images, standing_grids
from training_utils.run.hub import card, upload
from training_utils.run.metrics import Metrics
from training_utils.run.signals import Interruption
from training_utils.run.state import RunState
from training_utils.run.trackers import tracker_config


class Run:
    """The hosts and devices of a run, its output folder, its seed, its place in the data, and what it logs and saves.

    A script calls its methods in the order in which they stand here; the loop is the script's. What a run must never
    get is a `train` method, a method to override, or an `if` about a family of models.

    Attributes: mesh, this host's devices; state, the RunState; prompts, of the validation images; repository, the id
    of the hub's repository or None; stopped_by, the number of the signal that ended the run, or 0.
    """

    def __init__(
        self, args: Any, script: str, argv: Sequence[str] | None, *, base_model: str, pipeline: str | None = None
    ) -> None:
        """Join the hosts, claim the output folder and find where the run begins. A collective call.

        `base_model` is the name to show; the result is a `pipeline` of this class. Raises UserError for an output
        folder, a checkpoint or a repository that does not go with it.
        """
        self.args = args
        self.script = Path(script).name
        self.base_model = base_model
        self.command = flags.without_secrets(argv)
        if args.compilation_cache_dir:
            processes.cache_compiled_code(args.compilation_cache_dir)
        processes.connect_hosts()
        processes.check_precision(args.mixed_precision)
        self.mesh = processes.local_mesh()
        self.world_size = self.mesh.size * jax.process_count()
        for notice in args.notices:
            warn(notice)
        self.output_dir = None if args.dry_run else args.output_dir
        # The default seed gives way to that of a checkpoint; one that was given does not.
        given_seed = args.seed if "seed" in args.given else None
        self.resume_from, self.state = processes.from_main(
            lambda: resume.begin_run(
                args.output_dir,
                args.resume_from_checkpoint,
                given_seed,
                otherwise=args.seed,
                writes=not args.dry_run,
            )
        )
        processes.from_main(lambda: output_folder.refuse_another_result(args.output_dir, pipeline=pipeline))
        self.repository, self.uploads = upload.open_uploads(
            processes.from_main, processes.is_main(), **flags.hub(args)
        )
        self.prompts: list[str] = args.validation_prompts or []
        self.trackers: list[trackers.Tracker] = []
        self.stopped_by = 0
        self.newest_checkpoint: Path | None = None

    # --- data --------------------------------------------------------------------------------------------------------

    def open_data(self) -> tuple[ImageDataset, ImageDataset | None]:
        """The images to train on and those held out for validation, or None: checked, and the same in every process.

        Each is trained at --resolution.
        """
        args = self.args
        seed = self.state.seed
        opened = opening.load_dataset(**flags.data_source(args))
        dataset = selection.take_subset(opened, args.max_train_samples, seed)
        unusable = processes.from_main(lambda: checking.check_dataset(dataset, args.on_bad_sample))
        usable = dataset.without(unusable)
        usable.sizes = np.full((len(usable), 2), args.resolution)
        self.dataset, self.val_dataset = selection.split_validation(usable, args.validation_split, seed)
        return self.dataset, self.val_dataset

    def warn_of_long_captions(self, tokenizer: Any) -> None:
        """Name the captions that the tokenizer will cut."""
        if processes.is_main():
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
        return FrozenEncoders(
            self.mesh,
            [samples for samples in (self.train_set, self.val_set) if samples is not None],
            batch_size=args.train_batch_size,
            cache_folder=flags.encoding_folder(args),
            cache_images=args.cache_latents,
            cache_captions=args.cache_text_embeddings,
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
            self.world_size,
        )
        if args.max_train_steps is None:
            args.max_train_steps = args.num_train_epochs * self.plan.per_epoch
        self.last_step = args.max_train_steps
        if args.dry_run:
            self.last_step = min(args.max_train_steps, self.state.step + STEPS)
        return self.plan

    def make_optimizer(self) -> optax.GradientTransformation:
        """The optimizer without its learning rate, which `learning_rate` gives for each step."""
        args = self.args
        self.learning_rate_curve = optimizers.learning_rate_curve(
            peak=args.learning_rate * (self.plan.window if args.scale_lr else 1), **flags.learning_rate_curve(args)
        )
        betas = (args.adam_beta1, args.adam_beta2)
        return optimizers.make_optimizer(betas, args.adam_weight_decay, args.adam_epsilon)

    def begin(self, training: TrainingState) -> None:
        """Resume, open the trackers, and say what is about to be trained. A collective call.

        `training` writes and reads what is trained; it is copied to the devices here.
        """
        args = self.args
        self.training = training
        self.about = {
            "script": self.script,
            "world_size": self.world_size,
            "flags": flags.mathematics(args),
            "data": {"samples": len(self.dataset), "sha256": processes.from_main(self.dataset.fingerprint)},
        }
        if self.resume_from:
            processes.from_main(lambda: resume.warn_of_differences(self.resume_from, self.about))
            resume.require_everywhere(self.resume_from, processes.gather)
            training.read(self.resume_from)
        training.place(self.mesh)
        log_folder = Path(args.output_dir) / args.logging_dir
        settings = tracker_config(flags.public(args))
        self.trackers = trackers.start_trackers(args.report_to, log_folder, args.tracker_project_name, settings)
        facts = summary.announce(
            self.about,
            self.base_model,
            processes.device_name(),
            args.output_dir,
            jax.tree.leaves(training.arrays["params"]),
            self.plan,
            self.val_dataset,
            args.max_train_steps,
            self.state,
        )
        if processes.is_main() and not args.dry_run:
            output_folder.write_run_file(args.output_dir, flags.as_file(args, self.script, self.state.seed))
            self.trackers.append(Metrics(args.output_dir, self.state.step, facts))
        self.progress = progress_rules.Progress(
            self.state,
            args.max_train_steps,
            args.logging_steps,
            self.plan.samples,
            lambda scalars: [float(scalar) for scalar in jax.device_get(scalars)],
            self._log,
            self._report_not_finite,
            processes.memory_metrics,
        )
        self.grids = standing_grids(args.output_dir, self.state.step) if self.prompts else []

    def _log(self, values: dict[str, float], step: int) -> None:
        trackers.log_metrics(self.trackers, values, step)

    def _save(self, state: RunState) -> Path | None:
        """Write a checkpoint of this place, and have it uploaded. A collective call."""
        folder = checkpoints.save_checkpoint(
            self.output_dir,
            state,
            self.training.write,
            self.about,
            self.args.checkpoints_total_limit,
            processes.is_main(),
            processes.any_process,
        )
        return self.uploads.add(folder)

    def _report_not_finite(self, step: int, loss: float, before: RunState) -> None:
        """What Progress calls for a step whose gradient was not finite; `before` is the RunState before it, whose
        weights are still there in a run that is to stop."""

        def save_before() -> Path | None:
            folder = self._save(before)
            self.uploads.finish(processes.from_main)
            processes.end_training(self.trackers)
            return folder

        images = self.plan.names(self.dataset, before.position)
        progress_rules.report_not_finite(step, loss, images, self.args.on_nan == "stop", save_before)

    # --- the loop ----------------------------------------------------------------------------------------------------

    def batches(self) -> Iterator[dict[str, jax.Array]]:
        """The endless steps of this host, from its place in the data on: arrays (devices, micro-steps, B, ...)."""
        args = self.args
        save = None if args.dry_run else self.save_checkpoint
        batches = loader.training_batches(
            self.train_set, self.plan, self.state, self.mesh, args.dataloader_num_workers, save
        )
        return dry_run.begin_dry_run(batches, self.train_set) if args.dry_run else batches

    def __enter__(self) -> Run:
        """From here on SIGTERM and Ctrl-C end the run after a step, in all processes after the same one."""
        self.queue = processes.StepQueue()
        self.interruption = Interruption(processes.largest_of_processes(self.mesh))
        self.interruption.__enter__()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            if kind is None and self.stopped_by:
                self.uploads.finish(processes.from_main)
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

    def learning_rate(self) -> np.float32:
        """The learning rate of the coming step."""
        return np.float32(self.learning_rate_curve(self.state.step))

    def end_step(self, loss: jax.Array, grad_norm: jax.Array, stepped: bool) -> None:
        """Count a step; one that an fp16 overflow left out (not `stepped`) only moves on in the data."""
        self.queue.add(loss)
        state = self.state
        state.micro_step += self.args.gradient_accumulation_steps
        state.position = self.plan.after(state.position)
        if stepped:
            state.step += 1
            self.progress.update(state, loss, grad_norm, self.learning_rate_curve(state.step))
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
        self.newest_checkpoint = self._save(self.state)
        self.progress.pause()
        return self.newest_checkpoint

    def validation_due(self, stepped: bool) -> bool:
        """Whether to validate now."""
        if not stepped or self.stopped_by or not self._validates():
            return False
        args = self.args
        return progress_rules.validation_due(self.state, args.validation_steps, args.validation_epochs, self.last_step)

    @contextmanager
    def validating(self) -> Iterator[None]:
        """The context of a validation, whose time is no part of the steps'."""
        self.progress.flush()
        yield
        self.progress.pause()

    def log_val_loss(self, val_set: Samples, sum_of_losses: Callable[[dict[str, jax.Array]], jax.Array]) -> None:
        """Log the mean loss of the validation samples; `sum_of_losses(batch)` is of a batch. A collective call."""
        loss = validation.validation_loss(sum_of_losses, val_set, self.args.train_batch_size, self.mesh)
        self._log({"val_loss": loss}, self.state.step)
        say(f"step {self.state.step}: val_loss {loss:.4f}")

    def log_images(self, images: list[Image]) -> None:
        """Save and log the validation images, one for each prompt, as one grid. The main process alone calls it."""
        publish_images(self.trackers, images, self.prompts, self.state.step, self.args.output_dir)
        self.grids = [grid_name(self.state.step)]

    # --- the end -----------------------------------------------------------------------------------------------------

    @property
    def ended_early(self) -> bool:
        """Whether there is no result to write: a dry run, or one that a signal ended."""
        return self.args.dry_run or bool(self.stopped_by)

    def exit_code(self, name: str, frozen: dict[str, Any]) -> int:
        """Say what a dry run has found, or how to continue. Returns the exit code.

        `name` is the network that is trained, `frozen` the parameters of the others.
        """
        if self.args.dry_run:
            plan = (self.dataset, self.val_dataset, self.plan, self.args.max_train_steps, self.progress)
            dry_run.report_dry_run(plan, name, self.training.arrays, frozen)
            return self.stopped_by and 128 + self.stopped_by
        processes.end_training(self.trackers)
        return commands.say_stopped(self.stopped_by, self.state.step, self.newest_checkpoint, self.command)

    def publish(
        self,
        save_result: Callable[[], None],
        *,
        tags: Sequence[str],
        usage: str,
        public_usage: str,
        uploaded: Sequence[str],
    ) -> int:
        """Write the result and its model card, say what there is, and upload it. Returns the exit code.

        `save_result()` writes into the output folder; `usage` and `public_usage` are the Python lines that use the
        result, here and on the hub; `uploaded` the patterns of the files that are uploaded. Raises UserError that says
        where the weights are when the result cannot be written.
        """
        args = self.args
        state = self.state
        processes.say_skipped(self.dataset.findings.skipped)
        if processes.is_main():
            with output_folder.rescue_weights(args.output_dir, state, self.about, self.training.write):
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
                )
            summary.conclude(args.output_dir, self.progress, usage)
            if self.repository:
                self.uploads.finish()
                upload.upload_result(args.output_dir, self.repository, args.hub_token, uploaded)
        processes.end_training(self.trackers)
        return 0
