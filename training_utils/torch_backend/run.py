"""What is the same in every torch run, so that a script's main is left with its models, its loss and its loop."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from training_utils.base import draws
from training_utils.cli import Arguments
from training_utils.data.samples import Samples
from training_utils.run import dry_run as dry_run_report
from training_utils.run import trackers
from training_utils.run.session import Session
from training_utils.run.state import RunState
from training_utils.torch_backend import dry_run, frozen, loader, optimizers, processes, validation
from training_utils.torch_backend.ema import EMAWeights, averaged
from training_utils.torch_backend.frozen import Batch, FrozenEncoders
from training_utils.torch_backend.gradient import Gradient
from training_utils.torch_backend.state import TrainingState, Weights


class Run(Session):
    """The processes of a run, its output folder, its seed, its place in the data, and what it logs and saves.

    A script calls its methods in the order in which they stand here, and in Session; the loop is the script's. What a
    run must never get is a `train` method, a method to override, or an `if` about a family of models.

    Attributes beside those of Session: accelerator; gradient, what stands between backward pass and step.
    """

    def __init__(
        self,
        args: Arguments,
        script: str,
        argv: Sequence[str] | None,
        *,
        base_model: str,
        pipeline: str | None = None,
        adapted: Sequence[str] = (),
        find_unused_parameters: bool = False,
    ) -> None:
        """Start the processes; beside that as Session. `find_unused_parameters` is DistributedDataParallel's."""
        self.accelerator = processes.make_accelerator(args.machine, find_unused_parameters=find_unused_parameters)
        args.mixed_precision = self.accelerator.mixed_precision
        super().__init__(
            args,
            script,
            argv,
            processes=processes.TorchProcesses(self.accelerator, args.process_group_timeout),
            base_model=base_model,
            pipeline=pipeline,
            adapted=adapted,
        )

    def frozen_encoders(self) -> FrozenEncoders:
        """What runs the frozen networks on the samples: once into the cache, or at each step."""
        return FrozenEncoders(self.accelerator, self.sets, self.args.train_batch_size, self.args.caches)

    def make_optimizer(self, parameters: list[torch.nn.Parameter]) -> tuple[Any, Any]:
        """The optimizer of these parameters, and the schedule of its learning rate in steps."""
        args = self.args
        optimizer = optimizers.make_optimizer(
            parameters,
            args.optimization,
            learning_rate=args.optimization.peak_learning_rate(self.plan.samples_per_step),
            loss_scaling=self.accelerator.scaler is not None,
            rounding_seed=self._rounding_seed if args.get("full_bf16") else None,
        )
        return optimizer, optimizers.make_schedule(optimizer, args.lr_schedule, args.max_train_steps)

    def _rounding_seed(self, index: int) -> int:
        """The seed with which the weight of this index is rounded in the coming step."""
        return draws.rounding_seed(self.state.seed, self.state.step, index)

    def begin(self, optimizer: Any, lr_scheduler: Any, weights: Weights, parameters: Any) -> None:
        """Resume, open the trackers, and say what is about to be trained. A collective call.

        `weights` writes and reads what is trained; `parameters` are those that the optimizer steps.
        """
        args = self.args
        accelerator = self.accelerator
        self.lr_scheduler = lr_scheduler
        self.training = TrainingState(
            accelerator=accelerator, optimizer=optimizer, lr_scheduler=lr_scheduler, weights=weights
        )
        self.identify()
        if self.resume_from:
            self.training.read(self.resume_from, self.state.step)
        settings = trackers.tracker_config(args.public)
        processes.start_trackers(accelerator, args.tracker_project_name, settings)
        self.announce(parameters, processes.device_name(accelerator), accelerator.trackers)
        self.gradient = Gradient(
            accelerator,
            optimizer,
            parameters,
            max_norm=args.max_grad_norm,
            stop_on_nan=args.on_nan == "stop",
            during_backward=args.get("fused_backward_pass", False),
        )
        self.progress = processes.start_progress(
            accelerator, self._stop_or_skip, self.state, args.max_train_steps, args.logging_steps
        )

    def _stop_or_skip(self, step: int, loss: float, before: RunState) -> None:
        """What Progress calls for a step whose gradient was not finite; `before` is the RunState before it."""

        def save_before() -> Path | None:
            steps_back = self.state.step - before.step
            limit = self.args.checkpoints_total_limit
            return self.training.save_earlier_checkpoint(
                self.output_dir, before, self.provenance, limit, steps_back=steps_back
            )

        self.report_not_finite(step, loss, before, save_before)

    # --- the loop ----------------------------------------------------------------------------------------------------

    def batches(self) -> Iterator[Batch]:
        """The endless batches of this process, from its place in the data on."""
        args = self.args
        save = None if args.dry_run else self.save_checkpoint
        batches = loader.training_batches(
            self.train_set, self.plan, self.state, self.accelerator, args.dataloader_num_workers, save
        )
        if args.dry_run:
            batches = dry_run.begin_dry_run(self.accelerator, batches, self.train_set, self.plan)
        return batches

    def seed_dropout(self) -> None:
        """Begin a micro-step: what is drawn inside the networks comes from seed, micro-step and rank."""
        state = self.state
        torch.manual_seed(draws.network_seed(state.seed, state.micro_step, self.accelerator.process_index))
        state.micro_step += 1

    def end_step(self, loss: torch.Tensor, grad_norm: torch.Tensor, stepped: bool) -> None:
        """Count a step; one that an fp16 overflow left out (not `stepped`) only moves on in the data."""
        if stepped:
            self.count_step(loss, grad_norm, self.lr_scheduler.get_last_lr()[0])
        else:
            self.count_overflow(self.save_checkpoint)

    def save_checkpoint(self) -> Path | None:
        """Write a checkpoint and have it uploaded; None where it could not be written. A collective call."""
        self.progress.flush()
        limit = self.args.checkpoints_total_limit
        with self.standing.during(f"checkpoint-{self.state.step}"):
            folder = self.training.save_checkpoint(self.output_dir, self.state, self.provenance, limit)
        self.progress.pause()
        return self.checkpoint_written(folder)

    @contextmanager
    def validating(
        self,
        networks: Collection[torch.nn.Module],
        ema: EMAWeights | None,
        encoders: Sequence[torch.nn.Module | None],
    ) -> Iterator[None]:
        """Within this context the trained networks have the weights that would be saved now, in evaluation mode, and
        the frozen encoders are on the device."""
        self.progress.flush()
        for network in networks:
            network.eval()
        under_way = self.standing.during("this validation and a step")
        with under_way, averaged(ema), frozen.temporarily_on(encoders, self.accelerator.device):
            yield
        for network in networks:
            network.train()
        self.progress.pause()

    def log_val_loss(self, val_set: Samples, loss_of: Callable[[Batch], torch.Tensor]) -> None:
        """Log the mean of `loss_of(batch)`, losses of shape (B,), over the validation samples. A collective call."""
        batch_size = self.args.train_batch_size
        validation.log_validation_loss(self.accelerator, val_set, batch_size, loss_of, self.state.step)

    def log_sample_losses(self, indices: Sequence[int], sample_losses: Sequence[float]) -> None:
        """Log the loss of each sample, under the name of its image, with the metrics of the next step."""
        names = [f"loss_for_{self.dataset.name(index)}" for index in indices]
        self.progress.log_with_next_step(dict(zip(names, sample_losses, strict=True)))

    def log_images(self, draw: Callable[[Any, torch.Generator], Any], inputs: Sequence[Any] | None = None) -> None:
        """Save and log the image that `draw(prompt, noise)` makes for each prompt, as one grid. A collective call.

        `inputs` stand in for the prompts, as what was made of them before the training.
        """
        prompts = self.prompts
        inputs = prompts if inputs is None else inputs
        grid = validation.show_images(self.accelerator, draw, inputs, prompts, self.state, self.args.output_dir)
        self.grids = [grid]

    # --- the end -----------------------------------------------------------------------------------------------------

    def exit_code(
        self,
        networks: dict[str, torch.nn.Module],
        encoders: Sequence[torch.nn.Module | None],
        optimizer: Any,
        ema: EMAWeights | None,
    ) -> int:
        """Say what a dry run has found, or how to continue. Returns the exit code."""
        if not self.args.dry_run:
            return self.say_stopped()
        memory = dry_run.measure_memory(
            self.accelerator.device,
            models=[*networks.values(), *(encoder for encoder in encoders if encoder is not None)],
            optimizer=optimizer,
            ema=ema,
            frees_gradients=self.gradient.fused is not None,
        )
        dry_run_report.print_report(
            facts=self.facts,
            dataset=self.dataset,
            progress=self.progress,
            networks={name: dry_run.parameters_by_module(network) for name, network in networks.items()},
            memory=memory,
        )
        return self.stopped_by and 128 + self.stopped_by

    def publish_weights(self, save_result: Callable[[], None], weights: Weights, **card: Any) -> int:
        """`publish` of weights that are complete in the main process, with their average where there is one."""

        def save_averaged() -> None:
            with averaged(weights.ema):
                save_result()

        return self.publish(save_averaged, weights.save, **card)
