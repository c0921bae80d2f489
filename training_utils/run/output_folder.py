"""The folder that a run writes into: claimed by one run, never holding the result of another kind."""

import fcntl
import json
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path

from training_utils.base.console import warn
from training_utils.base.errors import UserError, reason_of
from training_utils.run import checkpoints

RUN_FILE = "run.yaml"


@contextmanager
def rescue_weights(root, state, about, save_weights):
    """The context in which the result of a run that stands at a RunState is written into `root`.

    Where that fails, on a full disk for one, raises UserError that says where the weights are: in the run's checkpoint
    of this state or, without one, in a temporary folder that `save_weights(folder)` writes into. `about` as in `save`.
    """
    try:
        yield
    except Exception as error:  # as in `save`
        what = f"the result could not be written into {root} ({reason_of(error)})"
        standing = checkpoints.complete_checkpoint_at(root, state, about)
        if standing:
            raise UserError(
                f"{what}, but its weights are in {standing}: make room, and run the same command once more with "
                "--resume_from_checkpoint latest",
                exit_code=1,
            ) from error
        try:
            refuge = Path(tempfile.mkdtemp(prefix="weights-"))
            save_weights(refuge)
        except Exception as second:
            where = tempfile.gettempdir()
            raise UserError(f"{what}, nor its weights into {where} ({reason_of(second)})", exit_code=1) from error
        raise UserError(f"{what}; its weights, alone, are in {refuge}", exit_code=1) from error


def write_run_file(root, content):
    """Write run.yaml, the text of a run's flags, into `root`, whole or not at all; a failure is reported."""
    final, partial = Path(root) / RUN_FILE, Path(root) / f".{RUN_FILE}.partial"
    try:
        partial.write_text(content, encoding="utf-8")
        os.replace(partial, final)
    except (OSError, UnicodeEncodeError) as error:  # the latter for a path whose bytes are no text
        warn(f"{final} could not be written ({reason_of(error)})")


_claimed = []  # the descriptor of the output folder, whose lock keeps other runs out


def claim(root):
    """Keep other runs out of an output folder until `let_go`, or the end of this process. Raises UserError where one
    is at work there."""
    release()
    _claimed.append(os.open(root, os.O_RDONLY))
    try:
        fcntl.flock(_claimed[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another run is writing into --output_dir {root}; give this one another folder") from None
    except OSError:  # a file system without locks
        pass


def release():
    """Let other runs have the output folder. A forked process calls it too, else the lock would last as long as it."""
    while _claimed:
        os.close(_claimed.pop())


def refuse_another_result(root, pipeline=None, adapted=()):
    """Raise UserError where `root` holds the result of another kind of run, which this run's would damage.

    `pipeline` is the class that the result will load as, `adapted` the names of the networks that get adapters.
    """
    index, adapters = Path(root) / "model_index.json", Path(root) / "pytorch_lora_weights.safetensors"
    have = None
    try:
        if pipeline and index.is_file():
            # The JAX script of old wrote Flax before the name.
            name = json.loads(index.read_text())["_class_name"].removeprefix("Flax")
            have = name if name != pipeline else None
        elif adapted and adapters.is_file():
            from safetensors import safe_open

            with safe_open(adapters, "np") as file:
                parts = {name.split(".")[0] for name in file.keys()}  # noqa: SIM118 (safe_open is no dict)
            have = f"adapters of {', '.join(sorted(parts))}" if not parts & set(adapted) else None
    except Exception:  # half of a result, which a full disk or a kill has left: there is nothing to lose
        return
    if have:
        raise UserError(
            f"--output_dir {root} holds the result of another run, {have}; give this one a folder of its own"
        )
