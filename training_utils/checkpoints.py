"""Checkpoints that are whole or absent.

A checkpoint is written beside its place, flushed to the disk, described by a manifest and then renamed, which the file
system does in one step; old ones go only after the new one stands. So a run that is killed at any instant leaves
nothing that could be taken for a checkpoint and is not. The manifest (manifest.json) holds the state of the run, the
settings that shape the result, library versions, and the size and SHA-256 of every file.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .data import Position
from .reporting import UserError, reason_of, say, versions, warn

MANIFEST = "manifest.json"
RUN_FILE = "run.yaml"
FORMAT = 1
NAME = re.compile(r"checkpoint-(\d+)")
LEFT_OVER = re.compile(r"\.checkpoint-\d+\.(partial|old)")


@dataclass
class RunState:
    """Where a run stands: all that a checkpoint must hold beside weights and optimizer state.

    `step` counts optimizer steps, `micro_step` forward passes, `position` the place in the data.
    """

    seed: int
    step: int = 0
    micro_step: int = 0
    position: Position = field(default_factory=Position)


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


def save(root, state, write, about, limit=None, main=True, any_of=lambda failed: failed):
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


@contextmanager
def rescue(root, state, about, save_weights):
    """The context in which the result of a run that stands at a RunState is written into `root`.

    Where that fails, on a full disk for one, raises UserError that says where the weights are: in the run's checkpoint
    of this state or, without one, in a temporary folder that `save_weights(folder)` writes into. `about` as in `save`.
    """
    try:
        yield
    except Exception as error:  # as in `save`
        what = f"the result could not be written into {root} ({reason_of(error)})"
        standing = whole_at(root, state, about)
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


def keep_flags(root, content):
    """Write run.yaml, the text of a run's flags, into `root`, whole or not at all; a failure is reported."""
    final, partial = Path(root) / RUN_FILE, Path(root) / f".{RUN_FILE}.partial"
    try:
        partial.write_text(content, encoding="utf-8")
        os.replace(partial, final)
    except (OSError, UnicodeEncodeError) as error:  # the latter for a path whose bytes are no text
        warn(f"{final} could not be written ({reason_of(error)})")


def _names(step):
    return f"checkpoint-{step}", f".checkpoint-{step}.partial", f".checkpoint-{step}.old"


def _seal(folder, state, about):
    """Flush every file of `folder` to the disk and write the manifest."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    manifest = {
        "format": FORMAT,
        # After the newest one that stands: a clock may have gone back since.
        "written": max([time.time(), *(_written(newest) + 0.001 for newest in listed(folder.parent)[:1])]),
        "state": asdict(state),
        **about,
        "libraries": versions(),
        "files": dict(zip((path.relative_to(folder).as_posix() for path in files), _digests(files), strict=True)),
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


def _digests(paths):
    def digest(path):
        with open(path, "rb") as file:
            return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}

    with ThreadPoolExecutor(4) as pool:  # hashing lets go of the interpreter
        return list(pool.map(digest, paths))


def _prune(root, limit):
    """Remove the oldest whole checkpoints beyond `limit`. Each is renamed first, so that none is ever half there."""
    whole = [folder for folder in listed(root) if damage(folder, contents=False) is None]
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
        if left[1] == "old" and not final.exists() and read_manifest(path) is not None and damage(path) is None:
            os.rename(path, final)
        else:
            shutil.rmtree(path, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------------------------
# Finding and reading
# ---------------------------------------------------------------------------------------------------------------------


def step_of(folder):
    """The step in a checkpoint's name, or None for a folder that is not named like one."""
    match = NAME.fullmatch(Path(folder).name)
    return int(match[1]) if match else None


def listed(root):
    """The checkpoint folders under `root`, the one written last first: it is of the run that went on last, also where
    an earlier run over the same folder got further. Others, such as checkpoint_backup, are not among them."""
    folders = [path for path in Path(root).glob("checkpoint-*") if path.is_dir() and step_of(path) is not None]
    return sorted(folders, key=lambda path: (_written(path), step_of(path)), reverse=True)


def _written(folder):
    written = (read_manifest(folder) or {}).get("written")
    return written if isinstance(written, (int, float)) else folder.stat().st_mtime


def whole_at(root, state, about):
    """The checkpoint of a RunState under `root`, if a whole one stands there, or None.

    One that an earlier run with another seed or other settings has left there is not it.
    """
    folder = Path(root) / _names(state.step)[0]
    manifest = read_manifest(folder) if folder.is_dir() else None
    if not manifest or damage(folder) is not None:
        return None
    ours = json.loads(json.dumps({"state": asdict(state), "flags": about["flags"]}))
    return folder if all(manifest.get(key) == value for key, value in ours.items()) else None


def damage(folder, contents=True):
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
            for name, found in zip(names, _digests([folder / name for name in names]), strict=True):
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
        if not _safetensors_whole(path):
            return f"{path.relative_to(folder)} is incomplete"
    for path in folder.glob("*.bin"):
        if not zipfile.is_zipfile(path):  # torch.save writes a zip, whose directory comes last
            return f"{path.name} is incomplete"
    return None


def _safetensors_whole(path):
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


def find(root, wanted):
    """The checkpoint to resume from: a Path, or None to start anew.

    `wanted` is None, "latest" (the newest under `root` that checks out; a damaged one is named and skipped), a
    checkpoint's name under `root`, or a path. Raises UserError where a named one is missing or damaged.
    """
    root = Path(root)
    if wanted is None:
        stand = listed(root)
        if stand:
            warn(
                f"{root} holds {stand[0].name} of an earlier run; this one starts anew, replaces what it reaches and, "
                "with --checkpoints_total_limit, removes what is older. "
                "To continue the earlier one, stop and add --resume_from_checkpoint latest"
            )
        return None
    if wanted == "latest":
        for folder in listed(root):
            problem = damage(folder)
            if problem is None:
                return folder
            warn(f"{folder} is damaged and is skipped: {problem}")
        say(f"{root} holds no whole checkpoint; this run starts from the beginning")
        return None
    places = [root / wanted, Path(wanted)]
    if os.sep in wanted.rstrip(os.sep):
        places = [Path(wanted), root / Path(wanted).name]
    for folder in places:
        if folder.is_dir() and step_of(folder.resolve()) is not None:
            problem = damage(folder)
            if problem:
                raise UserError(f"--resume_from_checkpoint {wanted} is damaged: {problem}")
            if folder != places[0]:
                warn(f"--resume_from_checkpoint: {places[0]} is no checkpoint; {folder} is taken")
            return folder
    have = ", ".join(folder.name for folder in listed(root)) or "none"
    raise UserError(f"--resume_from_checkpoint {wanted}: no such checkpoint; {root} holds {have}")


_claimed = []  # the descriptor of the output folder, whose lock keeps other runs out


def claim(root):
    """Keep other runs out of an output folder until `let_go`, or the end of this process. Raises UserError where one
    is at work there."""
    let_go()
    _claimed.append(os.open(root, os.O_RDONLY))
    try:
        fcntl.flock(_claimed[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another run is writing into --output_dir {root}; give this one another folder") from None
    except OSError:  # a file system without locks
        pass


def let_go():
    """Let other runs have the output folder. A forked process calls it too, else the lock would last as long as it."""
    while _claimed:
        os.close(_claimed.pop())


def start(root, wanted, seed, otherwise=None, writes=True):
    """Where a run begins: (checkpoint folder or None, RunState). `wanted` as in `find`; `seed` None takes the
    checkpoint's; without one it is `otherwise`, or, where that is None too, drawn and printed. A run that never
    `writes` leaves `root` as it is."""
    if writes:
        try:
            Path(root).mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=root).close()
        except OSError as error:
            raise UserError(f"--output_dir {root} cannot be written to: {error.strerror}") from None
        claim(root)
        clear_left_overs(root)
    folder = find(root, wanted)
    manifest = read_manifest(folder) if folder else None
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
        state.step = step_of(folder.resolve())
        warn(
            f"{folder} was not made by this suite: the position of its run in the data is unknown, so after step "
            f"{state.step} the data start over in a new order"
        )
    return folder, state


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


def require_everywhere(folder, gather):
    """Raise UserError, in every process, that names the machines where a checkpoint is not the one that the first
    process has, or is not at all. `gather(items)` returns the lists of all processes, one after the other."""
    manifest = read_manifest(folder)
    found = gather([(socket.gethostname(), Path(folder).is_dir(), manifest and manifest.get("sha256"))])
    lacking = sorted({host for host, *what in found if what != list(found[0][1:])})
    if lacking:
        raise UserError(
            f"{folder} is missing, or another one, on {', '.join(lacking)}; every machine reads the checkpoint that "
            "the run resumes from: put --output_dir on a disk that all of them share, or copy it there",
            everywhere=True,
        )


def due(state, every, last):
    """Whether a checkpoint is due after this step: each `every` steps (0: never) and at the `last` one."""
    return every and (state.step % every == 0 or state.step == last)


def warn_of_differences(folder, about):
    """Name every setting in which this run differs from the one that wrote the checkpoint.

    `about` is what this run would write: script, flags and data. Raises UserError where it cannot be resumed.
    """
    manifest = read_manifest(folder)
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
