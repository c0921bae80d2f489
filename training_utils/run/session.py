"""What is the same in every run, in torch and in JAX: output folder, seed, place in the data, cadences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

from training_utils import cli
from training_utils.base import files
from training_utils.base.console import warn
from training_utils.data import buckets, checking, opening, selection
from training_utils.data.captions import warn_of_long_captions
from training_utils.data.plan import BatchPlan
from training_utils.data.samples import Samples, say_skipped
from training_utils.run import cadence, commands, output_folder, progress, resume, summary
from training_utils.run.dry_run import STEPS
from training_utils.run.facts import RunFacts, collect_facts
from training_utils.run.grids import standing_grids
from training_utils.run.hub import card, upload
from training_utils.run.hub.card import CardImage
from training_utils.run.metrics import Metrics
from training_utils.run.provenance import Provenance
from training_utils.run.signals import Interruption
from training_utils.run.standing import Standing
from training_utils.run.state import RunState


class Processes(Protocol):
    """The processes of a run, as a backend knows them."""

    is_main: bool
    world_size: int

    def from_main(self, make: Callable[[], Any]) -> Any:
        """What a function returns in the main process, on every process. A collective call."""

    def gather(self, items: list[Any]) -> list[Any]:
        """The lists of all processes, one after the other. A collective call."""

    def ask_for_largest(self) -> Callable[[int], int]:
        """A function from a number to the largest that any process gave it; collective, and so is its making."""

    def end(self) -> None:
        """Close the trackers and let other runs have the output folder."""


class Session:
    """A run as far as no tensor is concerned; the Run of each backend adds what computes.

    Attributes: state, the RunState; prompts, of the validation images; repository, the id of the hub's repository or
    None; stopped_by, the number of the signal that ended the run, or 0.
    """

    plan: BatchPlan
    provenance: Provenance
    facts: RunFacts
    progress: progress.Progress

    def __init__(
        self,
        args: cli.Arguments,
        script: str,
        argv: Sequence[str] | None,
        *,
        processes: Processes,
        base_model: str,
        pipeline: str | None = None,
        adapted: Sequence[str] = (),
        default_seed: int | None = None,
    ) -> None:
        """Claim the output folder and find where the run begins. A collective call.

        `base_model` is the name to show; the result is a `pipeline` of this class, or adapters for the networks named
        in `adapted`; without a `default_seed` a seed that is not given is drawn. Raises UserError for an output
        folder, a checkpoint or a repository that does not go with the run.
        """
        self.args = args
        self.script = Path(script).name
        self.processes = processes
        self.base_model = base_model
        self.command = cli.without_secrets(argv)
        for notice in args.notices:
            warn(notice)
        self.output_dir = None if args.dry_run else args.output_dir
        # The default seed gives way to that of a checkpoint; one that was given does not.
        given_seed = args.seed if default_seed is None or "seed" in args.given else None
        self.resume_from, self.state = processes.from_main(
            lambda: resume.begin_run(
                args.output_dir,
                args.resume_from_checkpoint,
                given_seed,
                otherwise=default_seed,
                writes=not args.dry_run,
            )
        )
        processes.from_main(lambda: output_folder.refuse_another_result(args.output_dir, pipeline, adapted))
        self.repository, self.uploads = upload.open_uploads(
            processes.from_main, processes.is_main, args.hub, args.output_dir
        )
        self.prompts: list[str] = args.prompts
        self.grids: list[str] = []
        self.stopped_by = 0
        saved_step = self.state.step if self.resume_from else None
        self.standing = Standing(self.state, self.command, not args.dry_run, saved_step)
        self.newest_checkpoint: Path | None = None

    # --- data --------------------------------------------------------------------------------------------------------

    def open_data(self, sized: bool = True) -> None:
        """Open the images to train on, and those for validation: checked, and the same in every process.

        Where they are `sized`, each image is trained at --resolution, or in its bucket.
        """
        args = self.args
        seed = self.state.seed
        opened = opening.load_dataset(args.data)
        dataset = selection.take_subset(opened, args.max_train_samples, seed)
        unusable = self.processes.from_main(lambda: checking.check_dataset(dataset, args.on_bad_sample))
        usable = dataset.drop(unusable)
        if sized:
            usable.sizes = self.processes.from_main(
                lambda: buckets.training_sizes(usable, args.resolution, args.buckets)
            )
        self.dataset, self.val_dataset = selection.split_validation(usable, args.validation_split, seed)

    def warn_of_long_captions(self, tokenizer: Any) -> None:
        """Name the captions that the tokenizer will cut."""
        if self.processes.is_main:
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

    @property
    def sets(self) -> list[Samples]:
        """The samples to train on, and those for validation where there are any."""
        return [self.train_set] if self.val_set is None else [self.train_set, self.val_set]

    def plan_batches(self) -> None:
        """Decide which samples each step takes. From here on the number of steps is known."""
        args = self.args
        self.plan = BatchPlan.for_dataset(
            self.dataset,
            self.state.seed,
            args.train_batch_size,
            args.gradient_accumulation_steps,
            self.processes.world_size,
        )
        summary.warn_of_large_batch(self.plan, args.scale_lr)
        if args.max_train_steps is None:
            args.max_train_steps = args.num_train_epochs * self.plan.steps_per_epoch
        self.last_step = args.max_train_steps
        if args.dry_run:
            self.last_step = min(args.max_train_steps, self.state.step + STEPS)

    # --- the start ---------------------------------------------------------------------------------------------------

    def identify(self) -> None:
        """Note what a checkpoint says of this run; warn where the one that is continued differs. A collective call."""
        self.provenance = Provenance(
            script=self.script,
            world_size=self.processes.world_size,
            settings=self.args.shapes_result,
            samples=len(self.dataset),
            dataset_sha256=self.processes.from_main(self.dataset.fingerprint),
        )
        if self.resume_from:
            self.processes.from_main(lambda: resume.warn_of_differences(self.resume_from, self.provenance))

    def announce(self, parameters: Any, device: str, trackers: list[Any]) -> None:
        """Say what is about to be trained, write run.yaml, and add metrics.jsonl to the trackers."""
        args = self.args
        self.facts = collect_facts(
            provenance=self.provenance,
            base_model=self.base_model,
            device=device,
            parameters=parameters,
            plan=self.plan,
            val_dataset=self.val_dataset,
            steps=args.max_train_steps,
            state=self.state,
        )
        summary.print_start_summary(self.facts, args.output_dir)
        if self.processes.is_main and not args.dry_run:
            output_folder.write_run_file(args.output_dir, cli.as_file(args, self.state.seed))
            trackers.append(Metrics(args.output_dir, self.state.step, self.facts.to_record()))
        if self.prompts:
            self.grids = standing_grids(args.output_dir, self.state.step)

    # --- the loop ----------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        """From here on a signal ends the run after a step, in all processes after the same one."""
        standing = self.standing
        self.interruption = Interruption(self.processes.ask_for_largest(), standing.first_words, standing.last_words)
        self.interruption.__enter__()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            if kind is None and self.stopped_by:
                self.uploads.finish(self.processes.from_main)
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

    def count_step(self, loss: Any, grad_norm: Any, learning_rate: float) -> None:
        """Count a step that was made; the loss and the norm of its gradient may still be on their way."""
        samples = self.plan.sample_count(self.state.position)
        self.state.position = self.plan.position_after(self.state.position)
        self.state.step += 1
        self.progress.update(self.state, samples, loss, grad_norm, learning_rate)
        self.stopped_by = self.interruption.signal()

    def count_overflow(self, save_checkpoint: Callable[[], Path | None]) -> None:
        """Count a step that an fp16 overflow left out: the run only moves on in the data."""
        self.state.position = self.plan.position_after(self.state.position)
        self.progress.count_overflow(save_checkpoint)
        self.stopped_by = self.interruption.signal()

    def checkpoint_due(self, stepped: bool) -> bool:
        """Whether to write a checkpoint now."""
        if self.stopped_by:
            return True
        return stepped and cadence.checkpoint_due(self.state, self.args.checkpointing_steps, self.last_step)

    def checkpoint_written(self, folder: Path | None) -> Path | None:
        """Note a checkpoint of the current step, None where it could not be written, and have it uploaded; a signal
        that came meanwhile ends the run with it. Returns it. A collective call."""
        self.newest_checkpoint = self.uploads.add(folder)
        if folder is not None:
            self.standing.saved_step = self.state.step
        self.stopped_by = self.stopped_by or self.interruption.signal()
        return folder

    def validation_due(self, stepped: bool) -> bool:
        """Whether to validate now."""
        if not stepped or self.stopped_by or not self._validates():
            return False
        args = self.args
        return cadence.validation_due(self.state, args.validation_steps, args.validation_epochs, self.last_step)

    def report_not_finite(
        self, step: int, loss: float, before: RunState, save_before: Callable[[], Path | None]
    ) -> None:
        """Name the images of a step whose gradient was not finite; a run that stops by it saves the state `before` it
        and raises UserError."""
        images = self.plan.image_names(self.dataset, before.position)

        def save_and_end() -> Path | None:
            folder = save_before()
            self.uploads.add_last(folder, self.processes.from_main)
            self.processes.end()
            return folder

        progress.report_not_finite(step, loss, images, self.args.on_nan == "stop", save_and_end)

    # --- the end -----------------------------------------------------------------------------------------------------

    @property
    def ended_early(self) -> bool:
        """Whether there is no result to write: a dry run, or one that a signal ended."""
        return self.args.dry_run or bool(self.stopped_by)

    def say_stopped(self) -> int:
        """Say how to continue a run that a signal has stopped. Returns the exit code."""
        self.processes.end()
        return commands.say_stopped(self.stopped_by, self.state.step, self.newest_checkpoint, self.command)

    def publish(
        self,
        save_result: Callable[[], None],
        save_weights: Callable[[Path], None],
        *,
        tags: Sequence[str],
        usage: str,
        public_usage: str,
        uploaded: Sequence[str],
        prior: str | None = None,
    ) -> int:
        """Write the result and its model card, say what there is, and upload it. Returns the exit code.

        `save_result()` writes into the output folder; should it fail, on a full disk for example,
        `save_weights(folder)` saves the weights elsewhere, and UserError says where. `usage` and `public_usage` are
        the Python lines that use the result, here and on the hub; `uploaded` are the patterns of the files that are
        uploaded; `prior` is the one that a Kandinsky decoder was trained with.
        """
        args = self.args
        say_skipped(set(self.processes.gather(sorted(self.dataset.findings.skipped))))
        if self.processes.is_main:
            with output_folder.rescue_weights(args.output_dir, self.state, self.provenance, save_weights):
                save_result()
                written = [path for pattern in uploaded for path in Path(args.output_dir).glob(pattern)]
                files.follow_umask(path for path in written if path.suffix == ".safetensors")
                card.write_card(
                    args.output_dir,
                    self.repository,
                    base_model=self.base_model,
                    data=args.dataset_name,
                    tags=tags,
                    facts=self.facts,
                    step=self.state.step,
                    usage=public_usage,
                    images=[CardImage(grid, self.prompts) for grid in self.grids],
                    token=args.hub_token,
                    prior=prior,
                )
            summary.print_end_summary(args.output_dir, self.progress, usage)
            if self.repository:
                self.uploads.finish()
                upload.upload_result(args.output_dir, self.repository, args.hub_token, uploaded)
        self.processes.end()
        return 0
