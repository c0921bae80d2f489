"""What a checkpoint holds of a training: weights, optimizer, schedule, loss scale."""

from pathlib import Path

import torch
import torch.utils.checkpoint
from accelerate.utils import gather_object

from training_utils.base.console import warn
from training_utils.base.errors import UserError, reason_of
from training_utils.run import checkpoints, resume
from training_utils.torch_backend import optimizers, sharding


def save_model(folder, name, model, ema=None):
    """Write a model as the diffusers folder `name`, and its average, where there is one, beside it as <name>_ema.

    Where the processes share its weights out, every one must call it; the first one writes.
    """
    model, ema = gather_full_weights(model, ema)
    if model is not None:
        model.save_pretrained(folder / name)
    if ema is not None:
        ema.save(folder / f"{name}_ema", model)


def gather_full_weights(model, ema=None):
    """A model and its average with whole weights: both as they are or, where the processes share them out, plain ones
    in the first process' host memory and (None, None) in the others. A collective call."""
    if not sharding.is_shared(model):
        return model, ema
    plain = sharding.whole_model(model)
    return plain, None if ema is None else ema.whole(plain)


def load_model(folder, name, model, ema=None):
    """Read what `save_model`, or an original script, wrote. Without an average it begins at the model's weights."""
    sharding.load_model(model, sharding.class_of(model).from_pretrained(folder, subfolder=name).state_dict())
    if ema is not None and (folder / f"{name}_ema").is_dir():
        ema.load(folder / f"{name}_ema", model)
    elif ema is not None:
        warn(f"{folder} holds no EMA weights; the average starts from its weights")
        ema.reset()


# What Prodigy finds out during a run and keeps beside its settings.
FOUND = ("d", "d_max", "d_hat", "d_numerator", "d_denom", "k")


class TrainingState:
    """Writes and reads a checkpoint's weights, optimizer, schedule and loss scale: the same files, however many
    processes there are and whether they share weights out.

    `save_weights(folder)` and `load_weights(folder)` see to the models. The first is called in the main process alone
    or, where weights are shared out, in every one; the second in every one.
    """

    def __init__(self, accelerator, optimizer, lr_scheduler, save_weights, load_weights):
        self.accelerator, self.optimizer, self.lr_scheduler = accelerator, optimizer, lr_scheduler
        self.save_weights, self.load_weights = save_weights, load_weights
        self.options = [
            {k: v for k, v in group.items() if k not in ("params", "lr", *FOUND)} for group in optimizer.param_groups
        ]

    def write(self, folder):
        """Write into `folder`; every process must call it."""
        folder, main = Path(folder), self.accelerator.is_main_process
        try:
            if main or self.accelerator.is_fsdp2:
                self.save_weights(folder)
        finally:  # the other processes are waiting in it, whatever has kept this one from writing
            state = sharding.whole_state(self.optimizer)
        if main:
            torch.save(state, folder / "optimizer.bin")
            torch.save(self.lr_scheduler.state_dict(), folder / "scheduler.bin")
            if self.accelerator.scaler is not None:
                torch.save(self.accelerator.scaler.state_dict(), folder / "scaler.pt")

    def read(self, folder, step):
        """Read what `write`, or an original script, wrote; learning rate and Adam's settings stay this run's."""
        folder, scaler = Path(folder), self.accelerator.scaler
        resume.require_everywhere(folder, gather_object)
        if scaler is not None and not (folder / "scaler.pt").exists():
            raise UserError(f"{folder} was not trained with --mixed_precision fp16; resume it with what it had")
        try:
            self.load_weights(folder)
            options = {"map_location": "cpu", "weights_only": True, "mmap": sharding.takes_slices(self.optimizer)}
            sharding.load_state(self.optimizer, torch.load(folder / "optimizer.bin", **options))
            if scaler is not None:
                scaler.load_state_dict(torch.load(folder / "scaler.pt", weights_only=True))
        except UserError:
            raise
        except Exception as error:  # another model's shapes, or files that are not what they should be
            reason = reason_of(error)
            raise UserError(f"{folder} cannot be read: {reason}") from None
        self.accelerator.step = 0  # accelerate counts micro-steps; a checkpoint always stands after a whole step
        for group, options in zip(self.optimizer.param_groups, self.options, strict=True):
            group.update(options)
            for parameter in group["params"]:
                moments = self.optimizer.state.get(parameter, {})
                if torch.is_tensor(moments.get("step")):  # the fused kernel wants it on the device, the others do not
                    moments["step"] = moments["step"].to(parameter.device if group.get("fused") else "cpu")
        optimizers.restart_schedule(self.optimizer, self.lr_scheduler, step)

    def keep(self, root, state, provenance, limit, ema, held_back):
        """`save_checkpoint` for a run that goes back to an earlier RunState, whose weights it still has.

        `held_back` is the number of steps since.
        """
        if ema is not None:
            ema.optimization_step -= held_back
        optimizers.restart_schedule(self.optimizer, self.lr_scheduler, state.step)
        return self.save_checkpoint(root, state, provenance, limit)

    def save_checkpoint(self, root, state, provenance, limit):
        """One whole checkpoint of a RunState under `root`; None, and a warning, if it failed. As in checkpoints."""

        def any_process(failed):
            return bool(self.accelerator.reduce(torch.tensor(int(failed), device=self.accelerator.device)).item())

        return checkpoints.save_checkpoint(
            root,
            state,
            self.write,
            provenance,
            limit=limit,
            is_main=self.accelerator.is_main_process,
            any_process=any_process,
        )
