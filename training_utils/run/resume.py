"""Where a run begins: the checkpoint that it continues, and what differs from the run that wrote it."""

import os
import socket
import tempfile
from pathlib import Path

from training_utils.base.console import say, warn
from training_utils.base.errors import UserError
from training_utils.data.plan import Position
from training_utils.run import checkpoints, output_folder
from training_utils.run.state import RunState


def find_checkpoint(root, wanted):
    """The checkpoint to resume from: a Path, or None to start anew.

    `wanted` is None, "latest" (the newest under `root` that checks out; a damaged one is named and skipped), a
    checkpoint's name under `root`, or a path. Raises UserError where a named one is missing or damaged.
    """
    root = Path(root)
    if wanted is None:
        stand = checkpoints.list_checkpoints(root)
        if stand:
            warn(
                f"{root} holds {stand[0].name} of an earlier run; this one starts anew, replaces what it reaches and, "
                "with --checkpoints_total_limit, removes what is older. "
                "To continue the earlier one, stop and add --resume_from_checkpoint latest"
            )
        return None
    if wanted == "latest":
        for folder in checkpoints.list_checkpoints(root):
            problem = checkpoints.damage_of(folder)
            if problem is None:
                return folder
            warn(f"{folder} is damaged and is skipped: {problem}")
        say(f"{root} holds no whole checkpoint; this run starts from the beginning")
        return None
    places = [root / wanted, Path(wanted)]
    if os.sep in wanted.rstrip(os.sep):
        places = [Path(wanted), root / Path(wanted).name]
    for folder in places:
        if folder.is_dir() and checkpoints.step_of(folder.resolve()) is not None:
            problem = checkpoints.damage_of(folder)
            if problem:
                raise UserError(f"--resume_from_checkpoint {wanted} is damaged: {problem}")
            if folder != places[0]:
                warn(f"--resume_from_checkpoint: {places[0]} is no checkpoint; {folder} is taken")
            return folder
    have = ", ".join(folder.name for folder in checkpoints.list_checkpoints(root)) or "none"
    raise UserError(f"--resume_from_checkpoint {wanted}: no such checkpoint; {root} holds {have}")


def begin_run(root, wanted, seed, otherwise=None, writes=True):
    """Where a run begins: (checkpoint folder or None, RunState). `wanted` as in `find`; `seed` None takes the
    checkpoint's; without one it is `otherwise`, or, where that is None too, drawn and printed. A run that never
    `writes` leaves `root` as it is."""
    if writes:
        try:
            Path(root).mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=root).close()
        except OSError as error:
            raise UserError(f"--output_dir {root} cannot be written to: {error.strerror}") from None
        output_folder.claim(root)
        checkpoints.clear_left_overs(root)
    folder = find_checkpoint(root, wanted)
    manifest = checkpoints.read_manifest(folder) if folder else None
    if manifest is not None:
        saved = manifest["state"]
        if seed is not None and seed != saved["seed"]:
            warn(f"{folder} was made with --seed {saved['seed']}; from here on the draws are those of --seed {seed}")
        state = RunState(**saved | {"position": Position(**saved["position"])})
        state.seed = saved["seed"] if seed is None else seed
        say(f"resuming from {folder}, after step {state.step}")
        return folder, state
    seed = otherwise if seed is None else seed
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


def require_everywhere(folder, gather):
    """Raise UserError, in every process, that names the machines where a checkpoint is not the one that the first
    process has, or is not at all. `gather(items)` returns the lists of all processes, one after the other."""
    manifest = checkpoints.read_manifest(folder)
    found = gather([(socket.gethostname(), Path(folder).is_dir(), manifest and manifest.get("sha256"))])
    lacking = sorted({host for host, *what in found if what != list(found[0][1:])})
    if lacking:
        raise UserError(
            f"{folder} is missing, or another one, on {', '.join(lacking)}; every machine reads the checkpoint that "
            "the run resumes from: put --output_dir on a disk that all of them share, or copy it there",
            everywhere=True,
        )


def warn_of_differences(folder, about):
    """Name every setting in which this run differs from the one that wrote the checkpoint.

    `about` is what this run would write: script, flags and data. Raises UserError where it cannot be resumed.
    """
    manifest = checkpoints.read_manifest(folder)
    if manifest is None:
        return
    if manifest["script"] != about["script"]:
        raise UserError(f"{folder} was made by {manifest['script']}, not by {about['script']}")
    if manifest["flags"].get("optimizer") != about["flags"].get("optimizer"):
        raise UserError(f"{folder} holds the state of --optimizer {manifest['flags'].get('optimizer')}; give the same")
    saved = manifest["flags"] | {"number of processes": manifest["world_size"]}
    now = about["flags"] | {"number of processes": about["world_size"]}
    changed = [  # a flag that did not exist yet was not set
        f"{name} {saved.get(name)} -> {now[name]}" for name in now if (saved.get(name) or None) != (now[name] or None)
    ]
    if changed:
        warn(f"this run differs from the one that wrote {folder}: {'; '.join(changed)}")
    if manifest["data"] != about["data"]:
        warn(
            f"the dataset has changed since {folder} was written ({manifest['data']['samples']} images then, "
            f"{about['data']['samples']} now); the run continues at the same place in another order"
        )
