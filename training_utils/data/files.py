"""Which files of a folder, or members of a shard, are images, captions, shards and tables, and which are none."""

import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from training_utils.base.console import warn
from training_utils.base.errors import UserError
from training_utils.base.formats import shortened
from training_utils.data.caption_files import is_caption_ending
from training_utils.data.left_out import LeftOut
from training_utils.data.metadata import METADATA_FILES
from training_utils.data.plug_ins import MISSING, PLUG_INS, missing_for_ending
from training_utils.data.spelling import normal_form

IMAGE_ENDINGS = {
    *(".png", ".apng"),
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".mpo"),
    *(".webp", ".avif", ".avifs", ".gif", ".qoi"),
    *(".bmp", ".dib", ".tif", ".tiff"),
    *(".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    *(".tga", ".icb", ".vda", ".vst", ".pcx", ".dds", ".sgi"),
    *(ending for plug_in in PLUG_INS if plug_in not in MISSING for ending in plug_in.endings),
}

# Of images that Pillow does not read, or not well: drawings, layers, raw files of cameras, textures, icons.
OTHER_IMAGE_ENDINGS = {
    *(".psd", ".psb", ".xcf", ".kra", ".clip", ".svg", ".svgz", ".eps", ".ai"),
    *(".exr", ".hdr", ".ktx", ".ico", ".cur", ".icns"),
    *(".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2", ".pef", ".jxr", ".wdp", ".jls"),
}

STATISTICS = "_stats.json"  # what img2dataset puts behind the name of a shard, beside it

COMPRESSED = re.compile(r"\.(tgz|tbz2?|txz|tar\.(gz|bz2|xz|zst|lz4))$")

HIDDEN_FOLDER_PREFIXES = (".", "__")  # the datasets library skips these too

# Folders that NAS systems (Synology, QNAP), Windows and others keep beside one's files, in small letters. In them are
# thumbnails, copies and what was deleted.
FOLDERS_OF_OTHER_PROGRAMS = {
    *("@eadir", "@tmp", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "~snapshot"),
    *("$recycle.bin", "recycler", "system volume information", "lost+found"),
}

FILES_OF_OTHER_PROGRAMS = {"thumbs.db", "desktop.ini", "icon\r"}  # which file managers do not show either

# What OneTrainer adds to an image's name for its mask and for the image that conditions it.
MASK_SUFFIXES = ("-masklabel", "-condlabel")


class FolderFiles(NamedTuple):
    """The sorted paths of the files in a folder and in those inside it, the errors of folders that cannot be read,
    and the folders that are skipped."""

    paths: list[Path]
    failed: list[OSError]
    skipped: list[Path]


def ending_of(name: str) -> str:
    """What follows the last dot of a file's name, with it, in small letters."""
    return os.path.splitext(name)[1].lower()


def is_image(name: str) -> bool:
    """Whether a file or member of this name is an image to train on."""
    return ending_of(name) in IMAGE_ENDINGS and not _is_mask(name)


def _is_mask(name: str) -> bool:
    return os.path.splitext(name)[0].lower().endswith(MASK_SUFFIXES)


def is_hidden_folder(name: str) -> bool:
    """Whether a folder of this name is one that nobody sees, or that another program keeps."""
    return name.startswith(HIDDEN_FOLDER_PREFIXES) or name.lower() in FOLDERS_OF_OTHER_PROGRAMS


def hidden_folder_in(name: str) -> str | None:
    """The outermost folder in the name of a shard's member that is skipped, from the shard's root."""
    *folders, _ = name.split("/")
    for depth, folder in enumerate(folders, start=1):
        if folder not in (".", "..") and is_hidden_folder(folder):
            return "/".join(folders[:depth])
    return None


def reason_left_out(name: str) -> str | None:
    """Why a file of this name, which is no image, caption or metadata, is not trained: a key of left_out.REASONS, or
    None for what is not worth a word."""
    ending = ending_of(name)
    if name.startswith("."):
        # macOS puts a ._000.jpg, which is no image, beside every 000.jpg.
        is_image_of_someone = ending in IMAGE_ENDINGS and not name.startswith("._")
        return "hidden" if is_image_of_someone else None
    if name.lower() in FILES_OF_OTHER_PROGRAMS:
        return None
    if ending in IMAGE_ENDINGS and _is_mask(name):
        return "mask"
    plug_in = missing_for_ending(ending)
    if plug_in is not None:
        return plug_in.title
    return "kind" if ending in OTHER_IMAGE_ENDINGS else "other"


def files_of(folder: Path, left_out: LeftOut) -> tuple[list[Path], str]:
    """What a folder holds: (sorted paths, "images", "shards" or "tables"). All else is added to `left_out`. Raises
    UserError for none of them."""
    kinds: dict[str, list[Path]] = {name: [] for name in ("images", "shards", "tables", "compressed", "captions")}
    found = files_in(folder)
    for error in found.failed:
        left_out.add("unreadable folder", f"{error.filename} ({error.strerror})")
    for path in found.skipped:
        left_out.add("folder", str(path))
    for path in found.paths:
        kind = _kind_of(path.name)
        if kind is not None and not os.path.isfile(path):
            left_out.add("broken link", str(path))
        elif kind in kinds:
            kinds[kind].append(path)
        elif kind is None:
            reason = reason_left_out(path.name)
            if reason is not None:
                left_out.add(reason, str(path))
    stems = {normal_form(str(path.with_suffix(""))) for path in kinds["images"]}
    for path in kinds.pop("captions"):
        if normal_form(str(path.with_suffix(""))) not in stems and not path.name.endswith(STATISTICS):
            left_out.add("other" if ending_of(path.name) == ".json" else "caption", str(path))
    shards = set(kinds["shards"])
    kinds["tables"] = [path for path in kinds["tables"] if not _describes_shard(path, shards)]
    compressed = kinds.pop("compressed")
    present = [kind for kind, paths in kinds.items() if paths]
    if compressed and present in ([], ["shards"]):
        raise UserError(
            f"{compressed[0]} is compressed, so that no image in it can be reached without all before it; unpack it "
            "to a plain .tar (gunzip)"
        )
    for path in compressed:
        left_out.add("other", str(path))
    if not present:
        raise _no_images(folder, left_out, found.paths)
    if present == ["shards", "tables"]:
        raise UserError(
            f"--train_data_dir {folder} holds .tar shards and .parquet tables; keep them in two folders, which "
            "--train_data_config can name both"
        )
    if len(present) > 1:
        others = [path for kind in present[1:] for path in kinds[kind]]
        warn(
            f"--train_data_dir {folder} holds images, and {shortened(others, 1)}, which is not read; "
            "--train_data_config names several datasets"
        )
    return kinds[present[0]], present[0]


def _kind_of(name: str) -> str | None:
    """What a file of this name is among the files of a folder; None for what is not read."""
    if name.startswith("."):
        return None
    if name in METADATA_FILES:
        return "metadata"
    if COMPRESSED.search(name.lower()):
        return "compressed"
    if is_image(name):
        return "images"
    ending = ending_of(name)
    if is_caption_ending(ending):
        return "captions"
    return {".tar": "shards", ".parquet": "tables"}.get(ending)


def _describes_shard(table: Path, shards: Collection[Path]) -> bool:
    """Whether a table among shards is what img2dataset writes beside each: what it downloaded, without the images."""
    stem = table.with_suffix("")
    beside_shard = stem.with_suffix(".tar") in shards or os.path.isfile(f"{stem}{STATISTICS}")
    return bool(shards) and beside_shard and not _may_hold_images(table)


def _may_hold_images(table: Path) -> bool:
    """Whether a parquet table has a column of bytes, or cannot be read."""
    import pyarrow.parquet

    try:
        columns = pyarrow.parquet.ParquetFile(table).schema
    except (pyarrow.ArrowException, OSError):
        return True
    kinds = [columns.column(number) for number in range(len(columns))]
    return any(kind.physical_type == "BYTE_ARRAY" and kind.logical_type.type == "NONE" for kind in kinds)


def _no_images(folder: Path, left_out: LeftOut, paths: Sequence[Path]) -> UserError:
    """The error of a folder without an image; it names what the folder holds instead."""
    sentence = f"--train_data_dir {folder} holds no images (.png, .jpg, …), nor .tar shards or .parquet tables"
    if any(path.suffix == ".arrow" for path in paths):
        sentence += (
            "; it holds .arrow files: give the folder that save_to_disk wrote, with its state.json or "
            "dataset_dict.json, or read the files with --dataset_name"
        )
    return UserError(left_out.added_to(sentence))


def files_in(folder: Path) -> FolderFiles:
    """The files in a folder and in those inside it. Links to folders are followed, into each folder once."""
    seen: set[str] = set()
    paths: list[Path] = []
    failed: list[OSError] = []
    skipped: list[Path] = []
    for parent, folders, names in os.walk(folder, onerror=failed.append, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        skipped += [Path(parent, name) for name in folders if is_hidden_folder(name)]
        folders[:] = sorted(name for name in folders if not is_hidden_folder(name))
        paths += [Path(parent, name) for name in names]
    return FolderFiles(sorted(paths), failed, sorted(skipped))
