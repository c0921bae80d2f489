"""Where a run begins: the checkpoint that it continues, and what differs from the run that wrote it."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training_utils.base import files
from training_utils.base.console import say, warn
from training_utils.base.errors import UserError, reason_of
from training_utils.data.plan import Position
from training_utils.run import checkpoints, output_folder
from training_utils.run.provenance import Provenance
from training_utils.run.state import RunState


def find_checkpoint(root: str | Path, wanted: str | None) -> Path | None:
    """The checkpoint to resume from, or None to start from the beginning.

    `wanted` is None, "latest" (the newest complete one under `root`; a damaged one is named and skipped), a
    checkpoint's name under `root`, or a path. Raises UserError where a named one is missing or damaged.
    """
    root = Path(root)
    if wanted is None:
        _warn_of_earlier_run(root)
        return None
    if wanted == "latest":
        return _find_latest(root)
    return _find_named(root, wanted)


def _warn_of_earlier_run(root: Path) -> None:
    found = checkpoints.list_checkpoints(root)
    if found:
        warn(
            f"{root} holds {found[0].name} of an earlier run; this one starts from the beginning, replaces what "
            "it reaches and, with --checkpoints_total_limit, removes what is older. "
            "To continue the earlier one, stop and add --resume_from_checkpoint latest"
        )


def _find_latest(root: Path) -> Path | None:
    for folder in checkpoints.list_checkpoints(root):
        problem = checkpoints.damage_of(folder)
        if problem is None:
            return folder
        warn(f"{folder} is damaged and is skipped: {problem}")
    say(f"{root} holds no complete checkpoint; this run starts from the beginning")
    return None


def _find_named(root: Path, wanted: str) -> Path:
    is_path = os.sep in wanted.rstrip(os.sep)
    expected = Path(wanted) if is_path else root / wanted
    otherwise = root / Path(wanted).name if is_path else Path(wanted)
    for folder in (expected, otherwise):
        if folder.is_dir() and checkpoints.has_checkpoint_name(folder.resolve()):
            problem = checkpoints.damage_of(folder)
            if problem:
                raise UserError(f"--resume_from_checkpoint {wanted} is damaged: {problem}")
            if folder != expected:
                warn(f"--resume_from_checkpoint: {expected} is not a checkpoint; using {folder}")
            return folder
    found = ", ".join(folder.name for folder in checkpoints.list_checkpoints(root)) or "none"
    raise UserError(f"--resume_from_checkpoint {wanted}: no such checkpoint; {root} holds {found}")


def begin_run(
    root: str | Path, wanted: str | None, seed: int | None, otherwise: int | None = None, writes: bool = True
) -> tuple[Path | None, RunState]:
    """Where a run begins: the checkpoint that it resumes from, or None, and its RunState.

    `wanted` is as in `find_checkpoint`. `seed` None takes the checkpoint's; without one it is `otherwise` or, where
    that is None too, drawn and printed. A run that never `writes` leaves `root` as it is. Raises UserError where
    `root` cannot be written, or another run is at work there.
    """
    if writes:
        _open_output_folder(root)
    folder = find_checkpoint(root, wanted)
    manifest = checkpoints.read_manifest(folder) if folder else None
    if manifest is not None:
        state = _saved_state(manifest)
        if seed is not None and seed != state.seed:
            warn(f"{folder} was made with --seed {state.seed}; from here on the draws are those of --seed {seed}")
            state.seed = seed
        say(f"resuming from {folder}, after step {state.step}")
        return folder, state
    if seed is None:
        seed = otherwise
    if seed is None:
        seed = int.from_bytes(os.urandom(4), "little")
        say(f"no --seed was given; drew --seed {seed}")
    state = RunState(seed)
    if folder:
        state.step = checkpoints.step_of(folder.resolve())
        warn(
            f"{folder} was not made by this suite: the position of its run in the data is unknown, so after step "
            f"{state.step} the data start over in a new order"
        )
    return folder, state


def _open_output_folder(root: str | Path) -> None:
    """Make the output folder, keep other runs out, do there what the run will do, and remove what a killed run
    left."""
    try:
        Path(root).mkdir(parents=True, exist_ok=True)
        lock = output_folder.claim(root)
        output_folder.try_out(root)
        checkpoints.remove_unfinished(root)
    except OSError as error:
        raise UserError(
            f"--output_dir {root} cannot be written to: {error.strerror or reason_of(error)}; "
            f"{files.advice_for(error, root)}, or give another --output_dir"
        ) from error
    if lock.problem is not None:
        what = f"lock files ({lock.problem})"
        files.say_once(what, Path(root), "a second run into it would not be refused, and would damage this one")


def _saved_state(manifest: dict[str, Any]) -> RunState:
    """The RunState in a checkpoint's manifest."""
    saved = manifest["state"]
    return RunState(**saved | {"position": Position(**saved["position"])})


@dataclass(frozen=True, order=True)
class FoundCheckpoint:
    """Which checkpoint a machine has in a folder: whether there is one, and its manifest's digest."""

    exists: bool
    digest: str | None


def require_everywhere(folder: str | Path, gather: Callable[[list[Any]], list[Any]]) -> None:
    """Raise UserError, in every process, that names the machines where a checkpoint is missing, or is not the one that
    the first process has. `gather(items)` returns the lists of all processes, one after the other."""
    manifest = checkpoints.read_manifest(folder)
    found = FoundCheckpoint(Path(folder).is_dir(), None if manifest is None else manifest.get("sha256"))
    everywhere = gather([(socket.gethostname(), found)])
    _, expected = everywhere[0]
    different = sorted({host for host, found in everywhere if found != expected})
    if different:
        raise UserError(
            f"{folder} is missing, or another one, on {', '.join(different)}; every machine reads the checkpoint that "
            "the run resumes from: put --output_dir on a disk that all of them share, or copy it there",
            everywhere=True,
        )


def warn_of_differences(folder: str | Path, provenance: Provenance) -> None:
    """Name every setting in which this run differs from the one that wrote the checkpoint.

    `provenance` is this run's. Raises UserError where it cannot be resumed.
    """
    manifest = checkpoints.read_manifest(folder)
    if manifest is None:
        return
    saved = Provenance.from_manifest(manifest)
    if saved.script != provenance.script:
        raise UserError(f"{folder} was made by {saved.script}, not by {provenance.script}")
    optimizer = saved.settings.get("optimizer")
    if optimizer != provenance.settings.get("optimizer"):
        raise UserError(f"{folder} holds the state of --optimizer {optimizer}; give the same")
    before = saved.settings | {"number of processes": saved.world_size}
    now = provenance.settings | {"number of processes": provenance.world_size}
    changed = []
    for name, value in now.items():
        # A flag that did not exist yet was not set.
        if (before.get(name) or None) != (value or None):
            changed.append(f"{name} {before.get(name)} -> {value}")
    if changed:
        warn(f"this run differs from the one that wrote {folder}: {'; '.join(changed)}")
    if (saved.samples, saved.dataset_sha256) != (provenance.samples, provenance.dataset_sha256):
        warn(
            f"the dataset has changed since {folder} was written ({saved.samples} images then, "
            f"{provenance.samples} now); the run continues at the same place in another order"
        )
