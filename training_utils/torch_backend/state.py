"""What a checkpoint holds of a training: weights, optimizer, schedule, loss scale."""

import pickle
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError

from training_utils.base.console import warn
from training_utils.base.errors import UserError, reason_of
from training_utils.cli.optimizers import found_settings
from training_utils.run import checkpoints, resume
from training_utils.run.provenance import Provenance
from training_utils.run.state import RunState
from training_utils.torch_backend import optimizers, sharding
from training_utils.torch_backend.ema import EMAWeights


class Weights(Protocol):
    """The weights that a run trains, as its checkpoints write and read them: FullWeights or lora.AdapterWeights."""

    ema: EMAWeights | None

    def save(self, folder: Path) -> None:
        """Write the weights, and their average where there is one, into a checkpoint's folder.

        The main process writes. Where the processes share the weights out, this is a collective call.
        """

    def load(self, folder: Path) -> None:
        """Read what `save`, or an original script, wrote. Every process calls it."""

    def gather_full(self) -> Self:
        """The same weights, complete in the main process. A collective call where the processes share them out."""


class FullWeights:
    """All weights of a model, in a checkpoint as the diffusers folder `name`, and their average as <name>_ema.

    `model` is None in what `gather_full` returns in other processes than the main one.
    """

    def __init__(self, name: str, model: torch.nn.Module | None, ema: EMAWeights | None = None) -> None:
        self.name = name
        self.model = model
        self.ema = ema

    def gather_full(self) -> "FullWeights":
        """The same weights without sharding: themselves or, where the processes share them out, plain ones in the
        main process' host memory, and None in the others. A collective call."""
        if not sharding.is_sharded(self.model):
            return self
        model = sharding.gather_full_model(self.model)
        ema = None if self.ema is None else self.ema.gather_full(model)
        return FullWeights(self.name, model, ema)

    def save(self, folder: Path) -> None:
        """Write the model and its average. A collective call where the processes share the weights out; the main
        process writes."""
        full = self.gather_full()
        if full.model is None:
            return
        full.model.save_pretrained(folder / self.name)
        if full.ema is not None:
            full.ema.save(folder / f"{self.name}_ema", full.model)

    def load(self, folder: Path) -> None:
        """Read what `save`, or an original script, wrote. Where the folder holds no average, it starts from the
        model's weights. A collective call where the processes share the weights out."""
        model_class = sharding.model_class(self.model)
        sharding.load_model(self.model, model_class.from_pretrained(folder, subfolder=self.name).state_dict())
        if self.ema is None:
            return
        if (folder / f"{self.name}_ema").is_dir():
            self.ema.load(folder / f"{self.name}_ema", self.model)
        else:
            warn(f"{folder} holds no EMA weights; the average starts from its weights")
            self.ema.reset()


# What a damaged file, or one of another model, raises when it is read: torch, safetensors and diffusers have no kind
# of their own for it.
UNREADABLE = (
    OSError,
    ValueError,
    RuntimeError,
    KeyError,
    IndexError,
    EOFError,
    pickle.UnpicklingError,
    SafetensorError,
)


class TrainingState:
    """Writes and reads a checkpoint's weights, optimizer, schedule and loss scale: the same files, however many
    processes there are and whether they share weights out.

    `weights` are written by the main process alone or, where the processes share them out, with all of them.
    """

    def __init__(
        self,
        *,
        accelerator: Accelerator,
        optimizer: Any,
        lr_scheduler: Any,
        weights: Weights,
    ) -> None:
        self.accelerator = accelerator
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.weights = weights
        # This run's settings, which stay in force whatever a checkpoint says. The rate follows the schedule.
        not_settings = {"params", "lr"} | found_settings()
        self.settings = [
            {name: value for name, value in group.items() if name not in not_settings}
            for group in optimizer.param_groups
        ]

    def write(self, folder: Path) -> None:
        """Write into `folder`. A collective call."""
        folder = Path(folder)
        is_main = self.accelerator.is_main_process
        try:
            if is_main or self.accelerator.is_fsdp2:
                self.weights.save(folder)
        finally:
            # Whatever has kept this process from writing, the others are waiting for it in here.
            state = sharding.gather_full_optimizer_state(self.optimizer)
        if not is_main:
            return
        torch.save(state, folder / "optimizer.bin")
        torch.save(self.lr_scheduler.state_dict(), folder / "scheduler.bin")
        if self.accelerator.scaler is not None:
            torch.save(self.accelerator.scaler.state_dict(), folder / "scaler.pt")

    def read(self, folder: Path, step: int) -> None:
        """Read what `write`, or an original script, wrote; learning rate and Adam's settings stay this run's.

        A collective call. Raises UserError where the folder is missing on a machine, or its files cannot be read.
        """
        folder = Path(folder)
        scaler = self.accelerator.scaler
        resume.require_everywhere(folder, gather_object)
        if scaler is not None and not (folder / "scaler.pt").exists():
            raise UserError(
                f"{folder} was not trained with --mixed_precision fp16; resume it with the precision that it had"
            )
        try:
            self.weights.load(folder)
            self._read_optimizer(folder / "optimizer.bin")
            if scaler is not None:
                scaler.load_state_dict(torch.load(folder / "scaler.pt", weights_only=True))
        except UNREADABLE as error:
            raise UserError(f"{folder} cannot be read: {reason_of(error)}") from error
        # accelerate counts micro-steps; a checkpoint always stands after a complete step.
        self.accelerator.step = 0
        optimizers.restart_schedule(self.optimizer, self.lr_scheduler, step)

    def _read_optimizer(self, path: Path) -> None:
        # Where this process keeps slices, the file is mapped to memory, and only they are read.
        mmap = sharding.has_sharded_state(self.optimizer)
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        if not isinstance(saved, dict) or not {"state", "param_groups"} <= saved.keys():
            raise ValueError(f"{path.name} holds no state of an optimizer")
        sharding.load_optimizer_state(self.optimizer, saved)
        for group, settings in zip(self.optimizer.param_groups, self.settings, strict=True):
            group.update(settings)
            for parameter in group["params"]:
                moments = self.optimizer.state.get(parameter, {})
                if torch.is_tensor(moments.get("step")):
                    # The fused kernel wants it on the device, the other implementations do not.
                    moments["step"] = moments["step"].to(parameter.device if group.get("fused") else "cpu")

    def save_earlier_checkpoint(
        self, root: Path | None, state: RunState, provenance: Provenance, limit: int | None, steps_back: int
    ) -> Path | None:
        """`save_checkpoint` of an earlier RunState, `steps_back` steps ago, since which the weights have not moved."""
        if self.weights.ema is not None:
            self.weights.ema.optimization_step -= steps_back
        optimizers.restart_schedule(self.optimizer, self.lr_scheduler, state.step)
        return self.save_checkpoint(root, state, provenance, limit)

    def save_checkpoint(
        self, root: Path | None, state: RunState, provenance: Provenance, limit: int | None
    ) -> Path | None:
        """Write a checkpoint of a RunState under `root`; return its folder, or None, after a warning, if that failed.

        `provenance` is for the manifest. A collective call; see checkpoints.save_checkpoint.
        """

        def any_process(failed: bool) -> bool:
            count = torch.tensor(int(failed), device=self.accelerator.device)
            return bool(self.accelerator.reduce(count).item())

        return checkpoints.save_checkpoint(
            root,
            state,
            self.write,
            provenance,
            limit=limit,
            is_main=self.accelerator.is_main_process,
            any_process=any_process,
        )
