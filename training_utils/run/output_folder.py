"""The folder that a run writes into: claimed by one run, never holding the result of another kind."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from training_utils.base import files
from training_utils.base.console import warn
from training_utils.base.errors import UserError, reason_of
from training_utils.base.exit_callbacks import before_exit
from training_utils.run import checkpoints
from training_utils.run.provenance import Provenance
from training_utils.run.state import RunState
from training_utils.run.weight_files import write_errors

RUN_FILE = "run.yaml"
LOCK_FILE = ".run.lock"


@contextmanager
def rescue_weights(
    root: str | Path, state: RunState, provenance: Provenance, save_weights: Callable[[Path], None]
) -> Iterator[None]:
    """The context in which the result of a run that stands at a RunState is written into `root`.

    Where that fails, for example on a full disk, the weights are in the run's checkpoint of this state or, without
    one, in a temporary folder that `save_weights(folder)` writes into. Raises UserError that says where; what a bug
    has raised goes on as it is, after a warning that says it.
    """
    try:
        yield
    except Exception as error:  # whatever it is, the weights must not be lost
        is_bug = not isinstance(error, (UserError, *write_errors()))
        what = f"the result could not be written into {root} ({reason_of(error)})"
        advice = "fix that" if is_bug else files.advice_for(error, root)
        message = f"{what}{_where_weights_are(root, state, provenance, save_weights, advice)}"
        if is_bug:
            warn(message)
            raise
        raise UserError(message, exit_code=1) from error


def _where_weights_are(
    root: str | Path, state: RunState, provenance: Provenance, save_weights: Callable[[Path], None], advice: str
) -> str:
    """Words on where the weights of a run are whose result could not be written; they are written where needed.
    `advice` is what to do before the result is written again."""
    checkpoint = checkpoints.complete_checkpoint_at(root, state, provenance)
    if checkpoint is not None:
        return (
            f", but its weights are in {checkpoint}: {advice}, and run the same command once more with "
            "--resume_from_checkpoint latest"
        )
    try:
        refuge = Path(tempfile.gettempdir()) / f"weights-{uuid.uuid4().hex[:12]}"
        refuge.mkdir()
        save_weights(refuge)
        files.follow_umask(refuge.rglob("*.safetensors"))
    except write_errors() as error:
        return f", nor its weights into {tempfile.gettempdir()} ({reason_of(error)})"
    return f"; only its weights are in {refuge} ({advice} before the next run)"


def write_run_file(root: str | Path, content: str) -> None:
    """Write run.yaml, the text of a run's flags, into `root`, complete or not at all; a failure is reported."""
    final = Path(root) / RUN_FILE
    partial = Path(root) / f".{RUN_FILE}.partial"
    try:
        partial.write_text(content, encoding="utf-8")
        os.replace(partial, final)
    except (OSError, UnicodeEncodeError) as error:  # the latter for a path whose bytes are not text
        warn(f"{final} could not be written ({reason_of(error)})")


TRIAL = ".trial-"


def try_out(root: str | Path) -> None:
    """Write a small file into an output folder, flush it, and rename it and its folder, as a run will do with its
    checkpoints. What the disk cannot do, and a run does without, is said. Raises OSError for the rest."""
    root = Path(root)
    for left in root.glob(f"{TRIAL}*"):  # by a killed run
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=TRIAL, dir=root, ignore_cleanup_errors=True) as place:
        written = Path(place) / "written"
        written.mkdir()
        files.write_file(written / "file.txt", b"written to see what this disk can do\n")
        files.flush(written)
        files.rename_folder(written, Path(place) / "renamed")


class FolderLock:
    """Keeps other runs out of an output folder, by a lock on a file in it.

    The system lets go of the lock when the process ends, however it ends, and filelock when it is forked, so that a
    data worker never holds it. The file itself is removed with the lock; a killed run leaves it, which matters not.
    """

    def __init__(self, root: str | Path) -> None:
        """Take the lock. Raises UserError where another run has it; goes without it where it cannot be taken, and
        `problem` says why."""
        from filelock import FileLock, Timeout

        self.path = Path(root) / LOCK_FILE
        self.problem: str | None = None
        # Without the library's own substitute for locks: it would outlive a process that was killed.
        self._lock = FileLock(self.path, timeout=0, fallback_to_soft=False)
        try:
            self._lock.acquire()
        except Timeout as error:
            raise UserError(
                f"another run is writing into --output_dir {root}; give this one another folder"
            ) from error
        except OSError as error:
            self.problem = error.strerror or reason_of(error)
            with suppress(OSError):
                self.path.unlink()

    def release(self) -> None:
        """Let other runs have the folder. Does nothing in a process that was forked from the one that has it."""
        if self._lock.is_locked:
            # Before the lock goes: afterwards the file may be another run's.
            with suppress(OSError):
                self.path.unlink()
            self._lock.release()


_claimed: list[FolderLock] = []  # the lock of this process' run


def claim(root: str | Path) -> FolderLock:
    """Keep other runs out of an output folder until `release`, or the end of this process. Raises UserError where one
    is at work there."""
    release()
    lock = FolderLock(root)
    _claimed.append(lock)
    before_exit(release)
    return lock


def release() -> None:
    """Let other runs have the output folder."""
    while _claimed:
        _claimed.pop().release()


def refuse_another_result(root: str | Path, pipeline: str | None = None, adapted: Collection[str] = ()) -> None:
    """Raise UserError where `root` holds the result of another kind of run, which this run's would damage.

    `pipeline` is the class that the result will load as, `adapted` the names of the networks that get adapters.
    """
    found = None
    if pipeline:
        found = _pipeline_in(Path(root) / "model_index.json", other_than=pipeline)
    if found is None and adapted:
        found = _adapters_in(Path(root) / "pytorch_lora_weights.safetensors", other_than=adapted)
    if found:
        raise UserError(
            f"--output_dir {root} holds the result of another run, {found}; give this one a folder of its own"
        )


def _pipeline_in(index: Path, other_than: str) -> str | None:
    """The class that a pipeline's folder loads as, if it is another one. Half of a folder, which a full disk or a kill
    has left, is none: there is nothing to lose."""
    try:
        content = json.loads(index.read_text())
    except (OSError, ValueError):
        return None
    name = content.get("_class_name") if isinstance(content, dict) else None
    if not isinstance(name, str):
        return None
    # An earlier JAX script wrote Flax before the name.
    name = name.removeprefix("Flax")
    return name if name != other_than else None


def _adapters_in(path: Path, other_than: Collection[str]) -> str | None:
    """What a file of adapters is for, if it is for none of these networks; half of a file is for nothing."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            networks = {name.split(".")[0] for name in file.keys()}  # noqa: SIM118 (safe_open is not a dict)
    except (OSError, SafetensorError):
        return None
    if networks & set(other_than):
        return None
    return f"adapters of {', '.join(sorted(networks))}"
