"""TODO"""

import hashlib
import json
import os
import re
import shutil
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from training_utils.base import environment
from training_utils.base.console import warn
from training_utils.base.errors import reason_of

MANIFEST = "manifest.json"

FORMAT = 1

NAME = re.compile(r"checkpoint-(\d+)")

LEFT_OVER = re.compile(r"\.checkpoint-\d+\.(partial|old)")


def save_checkpoint(root, state, write, about, limit=None, main=True, any_of=lambda failed: failed):
    """Write checkpoint-<step> under `root`; then remove the oldest ones beyond `limit`. Every process must call it.

    `write(folder)` writes weights and optimizer state; `about` is a dict for the manifest (JSON values); `main` says
    whether this process is the one that renames; `any_of(failed)` tells whether any process failed, and waits for all.
    A failure to write is reported and leaves the earlier checkpoints as they are. Returns the new folder, or None, in
    every process alike, where it could not be written or `root` is None.
    """
    if root is None:  # in a dry run
        return None
    root = Path(root)
    final, partial, old = (root / name for name in _names(state.step))

    def attempt(action):
        nonlocal failure
        try:
            if failure is None:
                action()
        except Exception as error:  # a full disk reaches us as OSError, RuntimeError or SafetensorError
            failure = error
        if any_of(failure is not None) and failure is None:
            failure = "another process could not write its part"

    def prepare():
        if main:
            clear_left_overs(root)
            partial.mkdir(parents=True)

    def publish():
        if main:
            _seal(partial, state, about)
            if final.exists():
                os.rename(final, old)
            try:
                os.rename(partial, final)
            except OSError:
                if old.exists():
                    os.rename(old, final)
                raise
            _flush(root)

    failure = None
    for action in (prepare, lambda: write(partial), publish):
        attempt(action)
    if failure is not None:
        full = ""
        with suppress(OSError):  # there is no such folder, on another machine or behind a broken link
            free = shutil.disk_usage(root).free
            full = f"; its disk has {free / 2**20:,.0f} MiB left" if free < 2**30 else ""
        warn(f"{final} could not be written ({failure}{full}); earlier checkpoints stand")
        if main:
            shutil.rmtree(partial, ignore_errors=True)
        return None
    if main:
        shutil.rmtree(old, ignore_errors=True)
        _prune(root, limit)
    return final


def _names(step):
    return f"checkpoint-{step}", f".checkpoint-{step}.partial", f".checkpoint-{step}.old"


def _seal(folder, state, about):
    """Flush every file of `folder` to the disk and write the manifest."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    manifest = {
        "format": FORMAT,
        # After the newest one that stands: a clock may have gone back since.
        "written": max([time.time(), *(_written(newest) + 0.001 for newest in list_checkpoints(folder.parent)[:1])]),
        "state": asdict(state),
        **about,
        "libraries": environment.library_versions(),
        "files": dict(zip((path.relative_to(folder).as_posix() for path in files), file_digests(files), strict=True)),
    }
    manifest["sha256"] = _digest_of(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    for path in [*files, folder / MANIFEST, *(p for p in folder.rglob("*") if p.is_dir()), folder]:
        _flush(path)


def _digest_of(manifest):
    """SHA-256 over a manifest's values, its own digest left out: the manifest too may be damaged."""
    values = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _flush(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_digests(paths):
    def digest(path):
        with open(path, "rb") as file:
            return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}

    with ThreadPoolExecutor(4) as pool:  # hashing lets go of the interpreter
        return list(pool.map(digest, paths))


def _prune(root, limit):
    """Remove the oldest whole checkpoints beyond `limit`. Each is renamed first, so that none is ever half there."""
    whole = [folder for folder in list_checkpoints(root) if damage_of(folder, contents=False) is None]
    for folder in whole[limit:] if limit else []:
        doomed = root / _names(step_of(folder))[2]
        try:
            os.rename(folder, doomed)
        except OSError as error:  # in use, or removed by somebody else meanwhile
            warn(f"{folder} is one checkpoint too many, but could not be removed ({reason_of(error)})")
        shutil.rmtree(doomed, ignore_errors=True)


def clear_left_overs(root):
    """Remove what a killed run left of a checkpoint that it was writing or deleting.

    One that it had moved aside, to put another in its place, and had not replaced yet, goes back.
    """
    for path in Path(root).iterdir() if Path(root).is_dir() else []:
        left = LEFT_OVER.fullmatch(path.name)
        if left is None:
            continue
        final = Path(root) / path.name.strip(".").rsplit(".", 1)[0]
        # Half deleted it may have lost its manifest, and would then look like another program's.
        if left[1] == "old" and not final.exists() and read_manifest(path) is not None and damage_of(path) is None:
            os.rename(path, final)
        else:
            shutil.rmtree(path, ignore_errors=True)


def step_of(folder):
    """The step in a checkpoint's name, or None for a folder that is not named like one."""
    match = NAME.fullmatch(Path(folder).name)
    return int(match[1]) if match else None


def list_checkpoints(root):
    """The checkpoint folders under `root`, the one written last first: it is of the run that went on last, also where
    an earlier run over the same folder got further. Others, such as checkpoint_backup, are not among them."""
    folders = [path for path in Path(root).glob("checkpoint-*") if path.is_dir() and step_of(path) is not None]
    return sorted(folders, key=lambda path: (_written(path), step_of(path)), reverse=True)


def _written(folder):
    written = (read_manifest(folder) or {}).get("written")
    return written if isinstance(written, (int, float)) else folder.stat().st_mtime


def complete_checkpoint_at(root, state, about):
    """The checkpoint of a RunState under `root`, if a whole one stands there, or None.

    One that an earlier run with another seed or other settings has left there is not it.
    """
    folder = Path(root) / _names(state.step)[0]
    manifest = read_manifest(folder) if folder.is_dir() else None
    if not manifest or damage_of(folder) is not None:
        return None
    ours = json.loads(json.dumps({"state": asdict(state), "flags": about["flags"]}))
    return folder if all(manifest.get(key) == value for key, value in ours.items()) else None


def damage_of(folder, contents=True):
    """What is wrong with a checkpoint, as a phrase, or None. `contents=False` compares sizes and not hashes.

    A checkpoint without a manifest, made by another program, is looked at as far as its files describe themselves.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if manifest is None:
        return _damage_of_foreign(folder)
    if manifest.get("format") != FORMAT or manifest.get("sha256") != _digest_of(manifest):
        return f"{MANIFEST} is damaged or of another version"
    try:
        for name, fact in manifest["files"].items():
            if not (folder / name).is_file():
                return f"{name} is missing"
            if (folder / name).stat().st_size != fact["size"]:
                return f"{name} has {(folder / name).stat().st_size} bytes instead of {fact['size']}"
        if contents:
            names = list(manifest["files"])
            for name, found in zip(names, file_digests([folder / name for name in names]), strict=True):
                if found != manifest["files"][name]:
                    return f"{name} does not have the content that was written"
    except OSError as error:
        return f"it cannot be read ({reason_of(error)})"
    return None


def _damage_of_foreign(folder):
    weights = list(folder.rglob("*.safetensors"))
    if not weights:
        return f"it has neither {MANIFEST} nor weights in safetensors"
    for path in weights:
        if not _is_complete(path):
            return f"{path.relative_to(folder)} is incomplete"
    for path in folder.glob("*.bin"):
        if not zipfile.is_zipfile(path):  # torch.save writes a zip, whose directory comes last
            return f"{path.name} is incomplete"
    return None


def _is_complete(path):
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np"):  # which holds the header against the file's size
            return True
    except (OSError, SafetensorError):
        return False


def read_manifest(folder):
    """The manifest of a checkpoint as a dict; None where there is none, {} where it cannot be read."""
    path = Path(folder) / MANIFEST
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def checkpoint_due(state, every, last):
    """Whether a checkpoint is due after this step: each `every` steps (0: never) and at the `last` one."""
    return every and (state.step % every == 0 or state.step == last)
