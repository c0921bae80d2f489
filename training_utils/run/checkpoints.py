"""Checkpoint folders: written complete or not at all, listed, checked and rotated."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from training_utils.base import environment, files
from training_utils.base.console import warn
from training_utils.base.errors import reason_of
from training_utils.base.files import LITTLE_SPACE, flush
from training_utils.base.formats import mebibytes
from training_utils.run.provenance import Provenance
from training_utils.run.state import RunState
from training_utils.run.weight_files import is_complete_safetensors, is_complete_torch_file, write_errors

MANIFEST = "manifest.json"
FORMAT = 1  # of the manifest
NAME = re.compile(r"checkpoint-(\d+)")
UNFINISHED = re.compile(r"\.checkpoint-(\d+)\.(partial|old)")
REMOVED = {"removed": True}  # the manifest of a checkpoint that is being removed where it stands


@dataclass(frozen=True)
class CheckpointPaths:
    """Where the checkpoint of a step stands, where it is written, and where an earlier one of that step waits for its
    removal."""

    final: Path
    partial: Path
    old: Path

    @classmethod
    def of(cls, root: Path, step: int) -> CheckpointPaths:
        """Those under an output folder."""
        return cls(
            final=root / f"checkpoint-{step}",
            partial=root / f".checkpoint-{step}.partial",
            old=root / f".checkpoint-{step}.old",
        )


def save_checkpoint(
    root: str | Path | None,
    state: RunState,
    write: Callable[[Path], None],
    provenance: Provenance,
    *,
    limit: int | None = None,
    is_main: bool = True,
    any_process: Callable[[bool], bool] = bool,
) -> Path | None:
    """Write checkpoint-<step> under `root`; then remove the oldest ones beyond `limit`. Every process must call it.

    `write(folder)` writes weights and optimizer state; `is_main` says whether this process is the one that renames;
    `any_process(failed)` tells whether any process failed, and waits for all. A failure to write is reported and
    leaves the earlier checkpoints as they are. Returns the new folder, or None, in every process alike, where it could
    not be written or `root` is None, as in a dry run.
    """
    if root is None:
        return None
    root = Path(root)
    paths = CheckpointPaths.of(root, state.step)

    def prepare() -> None:
        if is_main:
            remove_unfinished(root)
            paths.partial.mkdir(parents=True)

    def publish() -> None:
        if is_main:
            files.follow_umask(paths.partial.rglob("*.safetensors"))
            _write_manifest(paths.partial, state, provenance)
            _move_into_place(paths)

    failure = advice = None
    for action in (prepare, lambda: write(paths.partial), publish):
        if failure is None:
            try:
                action()
            except write_errors() as error:
                failure = reason_of(error)
                advice = files.advice_for(error, root)
        if any_process(failure is not None) and failure is None:
            failure = "another process could not write its part"
    if failure is not None:
        advised = "" if advice is None else f"; {advice}"
        remains = _what_remains(root)
        if _is_being_moved(paths):
            remains = "what is left of it is moved before the next one is written"
        elif is_main:
            shutil.rmtree(paths.partial, ignore_errors=True)
        warn(f"{paths.final} could not be written ({failure}{_space_left(root)}); {remains}{advised}")
        return None
    if is_main:
        shutil.rmtree(paths.old, ignore_errors=True)
        _remove_oldest(root, limit)
    return paths.final


def _move_into_place(paths: CheckpointPaths) -> None:
    """Rename what was written to what it is called; an earlier checkpoint of that name goes only after it.

    On a disk that does not rename folders the files are moved one by one.
    """
    can_rename = not _is_being_moved(paths)
    if can_rename and paths.final.exists():
        shutil.rmtree(paths.old, ignore_errors=True)
        can_rename = files.rename_folder(paths.final, paths.old)
    try:
        can_rename = can_rename and files.rename_folder(paths.partial, paths.final)
    except OSError:
        if paths.old.exists():
            files.rename_folder(paths.old, paths.final)
        raise
    if not can_rename:
        _move_files(paths.partial, paths.final)
    flush(paths.final.parent)


def _move_files(source: Path, target: Path) -> None:
    """Move a checkpoint file by file, also one whose move a kill has cut off.

    The manifest comes first, as a copy: until the last file has followed, it names files that are missing or others,
    and `target` counts as damaged. That of `source` goes last: as long as it is there, the move can be completed.
    """
    names = (read_manifest(source) or {})["files"]
    target.mkdir(exist_ok=True)
    files.write_file(target / MANIFEST, (source / MANIFEST).read_bytes())
    for path in sorted(target.rglob("*"), reverse=True):  # of the checkpoint that is replaced
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
        elif path.is_file() and path.relative_to(target).as_posix() not in {*names, MANIFEST}:
            path.unlink()
    for name in names:
        if (source / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(source / name, target / name)
    for folder in (*_folders_in(target), target):
        flush(folder)
    shutil.rmtree(source, ignore_errors=True)


def _is_being_moved(paths: CheckpointPaths) -> bool:
    """Whether the files of a checkpoint are being moved one by one, or were when a kill came."""
    manifest = read_manifest(paths.partial)
    return _is_intact(manifest) and manifest == read_manifest(paths.final)


def _remove_in_place(folder: Path) -> None:
    """Remove a checkpoint so that what a kill leaves of it counts as damaged, and `remove_unfinished` knows it by its
    manifest. Raises OSError."""
    files.write_file(folder / MANIFEST, json.dumps(REMOVED).encode())
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir():
            path.rmdir()
        elif path != folder / MANIFEST:
            path.unlink()
    shutil.rmtree(folder)


def _what_remains(root: Path) -> str:
    """Words on the newest complete checkpoint of an output folder, whose disk may be gone."""
    with suppress(OSError):
        for folder in _complete_checkpoints(root):
            return f"{folder.name} remains the newest checkpoint"
    return "there is no earlier checkpoint"


def _space_left(root: Path) -> str:
    """Words on how much space a full disk has left; none where it has enough, or there is no such folder."""
    with suppress(OSError):
        free = shutil.disk_usage(root).free
        if free < LITTLE_SPACE:
            return f"; its disk has {mebibytes(free)} left"
    return ""


def _write_manifest(folder: Path, state: RunState, provenance: Provenance) -> None:
    """Flush every file of a checkpoint to the disk, and then write its manifest: where that is, everything is."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [path.relative_to(folder).as_posix() for path in paths]
    manifest = {
        "format": FORMAT,
        "written": _time_after_newest(folder.parent),
        "state": asdict(state),
        **provenance.manifest_entries(),
        "libraries": environment.library_versions(),
        "files": dict(zip(names, file_digests(paths), strict=True)),
    }
    manifest["sha256"] = _digest_of(manifest)
    for path in (*paths, *_folders_in(folder)):
        flush(path)
    files.write_file(folder / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
    flush(folder)


def _folders_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_dir()]


def _time_after_newest(root: Path) -> float:
    """The time, or one just after that of the newest checkpoint: a clock may have gone back since."""
    latest = list_checkpoints(root)[:1]
    return max([time.time(), *(_time_written(folder) + 0.001 for folder in latest)])


def _digest_of(manifest: dict[str, Any]) -> str:
    """SHA-256 over a manifest's values, its own digest left out: the manifest too may be damaged."""
    values = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def file_digests(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """The size and the SHA-256 of each file, as a manifest has them."""

    def digest(path: Path) -> dict[str, Any]:
        with open(path, "rb") as file:
            return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}

    with ThreadPoolExecutor(4) as pool:  # hashing releases the interpreter's lock
        return list(pool.map(digest, paths))


def _remove_oldest(root: Path, limit: int | None) -> None:
    """Remove the oldest complete checkpoints beyond `limit`; None keeps all.

    Each is renamed first where the disk can do that, so that none ever stands there half removed.
    """
    if not limit:
        return
    for folder in _complete_checkpoints(root)[limit:]:
        doomed = CheckpointPaths.of(root, step_of(folder)).old
        try:
            if not files.rename_folder(folder, doomed):
                _remove_in_place(folder)
        except OSError as error:  # it is in use, or somebody else has removed it meanwhile
            warn(f"{folder} is beyond --checkpoints_total_limit, but could not be removed ({reason_of(error)})")
        shutil.rmtree(doomed, ignore_errors=True)


def remove_unfinished(root: str | Path) -> None:
    """Remove what a killed run left of a checkpoint that it was writing or deleting.

    One that it had written, and not given its name yet, gets it. One that it had moved aside, to put another in its
    place, and had not replaced yet, goes back.
    """
    root = Path(root)
    if not root.is_dir():
        return
    for path in sorted(root.iterdir(), reverse=True):  # .partial before .old
        match = UNFINISHED.fullmatch(path.name)
        if match is None:
            if has_checkpoint_name(path) and path.is_dir():
                with suppress(OSError):
                    if read_manifest(path) == REMOVED or not any(path.iterdir()):
                        _remove_in_place(path)
            continue
        paths = CheckpointPaths.of(root, int(match[1]))
        # One that is half deleted may have lost its manifest, and would then look like another program's.
        is_ours = _is_intact(read_manifest(path))
        is_written = path == paths.partial and is_ours and damage_of(path, contents=False) is None
        if is_written or _is_being_moved(paths):
            _move_into_place(paths)
            shutil.rmtree(paths.old, ignore_errors=True)
        elif path == paths.old and not paths.final.exists() and is_ours and damage_of(path) is None:
            os.rename(path, paths.final)
        else:
            shutil.rmtree(path, ignore_errors=True)


def has_checkpoint_name(folder: Path) -> bool:
    """Whether a folder is named like a checkpoint."""
    return NAME.fullmatch(folder.name) is not None


def step_of(folder: Path) -> int:
    """The step in a checkpoint's name."""
    return int(folder.name.rpartition("-")[2])


def list_checkpoints(root: str | Path) -> list[Path]:
    """The checkpoint folders under `root`, the one written last first: it is of the run that went on last, also where
    an earlier run over the same folder got further. Others, such as checkpoint_backup, are not among them."""
    folders = [path for path in Path(root).glob("checkpoint-*") if path.is_dir() and has_checkpoint_name(path)]
    return sorted(folders, key=lambda path: (_time_written(path), step_of(path)), reverse=True)


def _complete_checkpoints(root: Path) -> list[Path]:
    """Those of `list_checkpoints` whose files are there in their sizes."""
    return [folder for folder in list_checkpoints(root) if damage_of(folder, contents=False) is None]


def _time_written(folder: Path) -> float:
    """When a checkpoint was written, in seconds since 1970."""
    manifest = read_manifest(folder) or {}
    written = manifest.get("written")
    return written if isinstance(written, (int, float)) else folder.stat().st_mtime


def complete_checkpoint_at(root: str | Path, state: RunState, provenance: Provenance) -> Path | None:
    """The checkpoint of a RunState under `root`, if a complete one stands there, or None.

    One that an earlier run with another seed or other settings has left there is not it.
    """
    folder = CheckpointPaths.of(Path(root), state.step).final
    manifest = read_manifest(folder) if folder.is_dir() else None
    if not manifest or damage_of(folder) is not None:
        return None
    # Through JSON, which makes lists of tuples.
    expected = json.loads(json.dumps({"state": asdict(state), "flags": provenance.settings}))
    is_ours = all(manifest.get(key) == value for key, value in expected.items())
    return folder if is_ours else None


def damage_of(folder: str | Path, contents: bool = True) -> str | None:
    """What is wrong with a checkpoint, as a phrase, or None. `contents=False` compares sizes and not hashes.

    A checkpoint without a manifest, made by another program, is checked as far as its files describe themselves.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if manifest is None:
        return _damage_of_foreign(folder)
    if not _is_intact(manifest):
        return f"{MANIFEST} is damaged or of another version"
    try:
        return _damaged_file(folder, manifest["files"], contents)
    except OSError as error:
        return f"it cannot be read ({reason_of(error)})"


def _is_intact(manifest: dict[str, Any] | None) -> bool:
    """Whether a manifest is complete, and one of this version."""
    if manifest is None:
        return False
    return manifest.get("format") == FORMAT and manifest.get("sha256") == _digest_of(manifest)


def _damaged_file(folder: Path, listed: dict[str, dict[str, Any]], contents: bool) -> str | None:
    """What is wrong with the first file that is not as a manifest says. Raises OSError where one cannot be read."""
    for name, expected in listed.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        size = path.stat().st_size
        if size != expected["size"]:
            return f"{name} has {size} bytes instead of {expected['size']}"
    if contents:
        found = file_digests([folder / name for name in listed])
        for (name, expected), digest in zip(listed.items(), found, strict=True):
            if digest != expected:
                return f"{name} does not have the content that was written"
    return None


def _damage_of_foreign(folder: Path) -> str | None:
    """What is wrong with a checkpoint of another program, as a phrase, or None."""
    weights = list(folder.rglob("*.safetensors"))
    if not weights:
        return f"it has neither {MANIFEST} nor weights in safetensors"
    for path in weights:
        if not is_complete_safetensors(path):
            return f"{path.relative_to(folder)} is incomplete"
    for path in folder.glob("*.bin"):
        if not is_complete_torch_file(path):
            return f"{path.name} is incomplete"
    return None


def read_manifest(folder: str | Path) -> dict[str, Any] | None:
    """The manifest of a checkpoint; None where there is none, {} where it cannot be read."""
    path = Path(folder) / MANIFEST
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) else {}
