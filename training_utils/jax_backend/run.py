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

from training_utils.base.console import say
from training_utils.cli import Arguments
from training_utils.data.samples import Samples
from training_utils.jax_backend import dry_run, loader, optimizers, processes, trackers, validation
from training_utils.jax_backend.frozen import FrozenEncoders
from training_utils.jax_backend.loader import DeviceBatch
from training_utils.jax_backend.processes import JaxProcesses, StepQueue
from training_utils.jax_backend.state import TrainingState
from training_utils.run import checkpoints
from training_utils.run import dry_run as dry_run_report
from training_utils.run.grids import grid_name, publish_images
from training_utils.run.progress import Progress
from training_utils.run.session import Session
from training_utils.run.state import RunState
from training_utils.run.trackers import tracker_config


class Run(Session):
    """The hosts and devices of a run, its output folder, its seed, its place in the data, and what it logs and saves.

    A script calls its methods in the order in which they stand here, and in Session; the loop is the script's. What a
    run must never get is a `train` method, a method to override, or an `if` about a family of models.

    Attributes beside those of Session: mesh, the devices of this host.
    """

    processes: JaxProcesses

    def __init__(
        self, args: Arguments, script: str, argv: Sequence[str] | None, *, base_model: str, pipeline: str | None = None
    ) -> None:
        """Join the hosts; beside that as Session."""
        if args.compilation_cache_dir:
            processes.cache_compiled_code(args.compilation_cache_dir)
        joined = JaxProcesses()
        processes.check_precision(args.mixed_precision)
        self.mesh = joined.mesh
        self.queue = StepQueue()
        super().__init__(
            args,
            script,
            argv,
            processes=joined,
            base_model=base_model,
            pipeline=pipeline,
            default_seed=args.seed,
        )

    def frozen_encoders(self) -> FrozenEncoders:
        """What runs the frozen networks on the samples: once into the cache, or at each step."""
        return FrozenEncoders(self.mesh, self.sets, self.args.train_batch_size, self.args.caches)

    def make_optimizer(self) -> optax.GradientTransformation:
        """The optimizer without its learning rate, which `learning_rate` gives for each step."""
        args = self.args
        options = args.optimization
        peak = options.peak_learning_rate(self.plan.samples_per_step)
        schedule = args.lr_schedule
        self.learning_rate_curve = optimizers.learning_rate_curve(
            name=schedule.name,
            peak=peak,
            num_warmup_steps=schedule.warmup_steps,
            num_training_steps=args.max_train_steps,
            num_cycles=schedule.cycles,
            power=schedule.power,
        )
        return optimizers.make_optimizer(options.betas, options.weight_decay, options.epsilon)

    def begin(self, training: TrainingState) -> None:
        """Resume, open the trackers, and say what is about to be trained. A collective call.

        `training` writes and reads what is trained, and is copied to the devices here.
        """
        args = self.args
        self.training = training
        self.identify()
        if self.resume_from:
            training.read(self.resume_from)
        training.place(self.mesh)
        log_folder = Path(args.output_dir) / args.logging_dir
        settings = tracker_config(args.public)
        self.trackers = trackers.start_trackers(args.report_to, log_folder, args.tracker_project_name, settings)
        self.processes.trackers = self.trackers
        self.announce(jax.tree.leaves(training.arrays["params"]), processes.device_name(), self.trackers)
        self.progress = Progress(
            self.state,
            args.max_train_steps,
            args.logging_steps,
            lambda scalars: [float(scalar) for scalar in jax.device_get(scalars)],
            self._log,
            self._stop_or_skip,
            processes.memory_metrics,
        )

    def _log(self, values: dict[str, float], step: int) -> None:
        trackers.log_metrics(self.trackers, values, step)

    def _stop_or_skip(self, step: int, loss: float, before: RunState) -> None:
        """What Progress calls for a step whose gradient was not finite; `before` is the RunState before it, whose
        weights a run that is to stop still has."""
        self.report_not_finite(step, loss, before, lambda: self._write_checkpoint(before))

    def _write_checkpoint(self, state: RunState) -> Path | None:
        return checkpoints.save_checkpoint(
            self.output_dir,
            state,
            self.training.write,
            self.provenance,
            limit=self.args.checkpoints_total_limit,
            is_main=self.processes.is_main,
            any_process=processes.any_process,
        )

    # --- the loop ----------------------------------------------------------------------------------------------------

    def batches(self) -> Iterator[DeviceBatch]:
        """The endless steps of this host, from its place in the data on: arrays (devices, micro-steps, B, ...)."""
        args = self.args
        save = None if args.dry_run else self.save_checkpoint
        batches = loader.training_batches(
            self.train_set, self.plan, self.state, self.mesh, args.dataloader_num_workers, save
        )
        if args.dry_run:
            batches = dry_run.begin_dry_run(batches, self.train_set)
        return batches

    def learning_rate(self) -> np.float32:
        """The learning rate of the coming step."""
        return np.float32(self.learning_rate_curve(self.state.step))

    def end_step(self, loss: jax.Array, grad_norm: jax.Array, stepped: bool) -> None:
        """Count a step; one that an fp16 overflow left out (not `stepped`) only moves on in the data."""
        self.queue.add(loss)
        self.state.micro_step += self.args.gradient_accumulation_steps
        if stepped:
            # The rate that is logged is that of the step after it, as in the torch scripts.
            self.count_step(loss, grad_norm, self.learning_rate_curve(self.state.step + 1))
        else:
            self.count_overflow(self.save_checkpoint)

    def save_checkpoint(self) -> Path | None:
        """Write a checkpoint and have it uploaded; None where it could not be written. A collective call."""
        self.progress.flush()
        with self.standing.during(f"checkpoint-{self.state.step}"):
            folder = self._write_checkpoint(self.state)
        self.progress.pause()
        return self.checkpoint_written(folder)

    @contextmanager
    def validating(self) -> Iterator[None]:
        """The context of a validation, whose time is no part of the steps'."""
        self.progress.flush()
        with self.standing.during("this validation and a step"):
            yield
        self.progress.pause()

    def log_val_loss(self, val_set: Samples, sum_of_losses: Callable[[DeviceBatch], jax.Array]) -> None:
        """Log the mean loss of the validation samples; `sum_of_losses(batch)` is of a batch. A collective call."""
        loss = validation.validation_loss(sum_of_losses, val_set, self.args.train_batch_size, self.mesh)
        self._log({"val_loss": loss}, self.state.step)
        say(f"step {self.state.step}: val_loss {loss:.4f}")

    def log_images(self, images: list[Image]) -> None:
        """Save and log the validation images, one for each prompt, as one grid. The main process alone calls it."""
        publish_images(self.trackers, images, self.prompts, self.state.step, self.args.output_dir)
        self.grids = [grid_name(self.state.step)]

    # --- the end -----------------------------------------------------------------------------------------------------

    def exit_code(self, name: str, frozen: dict[str, Any]) -> int:
        """Say what a dry run has found, or how to continue. Returns the exit code.

        `name` is the network that is trained, `frozen` the parameters of the others.
        """
        if not self.args.dry_run:
            return self.say_stopped()
        arrays = self.training.arrays
        dry_run_report.print_report(
            facts=self.facts,
            dataset=self.dataset,
            progress=self.progress,
            networks={name: dry_run.parameters_by_module(arrays["params"])},
            memory=dry_run.measure_memory(arrays, frozen),
        )
        return self.stopped_by and 128 + self.stopped_by
