"""Which files of a folder are images, shards and tables."""

import os
import re
from collections.abc import Collection
from pathlib import Path

from training_utils.base.console import warn
from training_utils.base.errors import UserError
from training_utils.base.formats import shortened

IMAGE_ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff"}

OTHER_ENDINGS = {".heic", ".heif", ".jxl", ".psd", ".svg"}  # of images that Pillow does not read, or not well

COMPRESSED = re.compile(r"\.(tgz|tbz2?|txz|tar\.(gz|bz2|xz|zst|lz4))$")

HIDDEN_PREFIXES = (".", "__")  # how names begin that nobody sees: thumbnails, copies, what was deleted


def files_of(folder: Path) -> tuple[list[Path], str]:
    """What a folder holds: (sorted paths, "images", "shards" or "tables"). Raises UserError for none of them."""
    names = ("images", "shards", "tables", "compressed", "others", "broken")
    kinds: dict[str, list[Path]] = {name: [] for name in names}
    kind_of_ending = {
        **dict.fromkeys(IMAGE_ENDINGS, "images"),
        **dict.fromkeys(OTHER_ENDINGS, "others"),
        ".tar": "shards",
        ".parquet": "tables",
    }
    paths, failed = files_in(folder)
    for path in paths:
        ending = path.suffix.lower()
        kind = kind_of_ending.get(ending)
        if COMPRESSED.search(path.name.lower()):
            kind = "compressed"
        if kind and path.name != "metadata.parquet":
            kinds[kind if os.path.isfile(path) else "broken"].append(path)
    shards = set(kinds["shards"])
    kinds["tables"] = [path for path in kinds["tables"] if not _describes_shard(path, shards)]
    compressed = kinds.pop("compressed")
    unread = kinds.pop("others")
    broken = kinds.pop("broken")
    for error in failed:
        warn(f"{error.filename} cannot be read ({error.strerror}) and is skipped")
    if broken:
        warn(f"broken links are skipped: {shortened(broken)}")
    if unread:
        endings = ", ".join(sorted({path.suffix.lower() for path in unread}))
        warn(f"images of an unsupported kind ({endings}) are skipped: {shortened(unread)}; make them PNG")
    present = [kind for kind, paths in kinds.items() if paths]
    if compressed and present in ([], ["shards"]):
        raise UserError(
            f"{compressed[0]} is compressed, so that no image in it can be reached without all before it; unpack it "
            "to a plain .tar (gunzip)"
        )
    if not present:
        endings = ", ".join(sorted(IMAGE_ENDINGS))
        advice = ""
        if any(path.suffix == ".arrow" for path in paths):
            advice = (
                "; it holds .arrow files: give the folder that save_to_disk wrote, with its state.json or "
                "dataset_dict.json, or read the files with --dataset_name"
            )
        raise UserError(
            f"--train_data_dir {folder} holds no images ({endings}), nor .tar shards or .parquet tables{advice}"
        )
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


def _describes_shard(table: Path, shards: Collection[Path]) -> bool:
    """Whether a table among shards is what img2dataset writes beside each: what it downloaded, without the images."""
    stem = table.with_suffix("")
    return bool(shards) and (stem.with_suffix(".tar") in shards or os.path.isfile(f"{stem}_stats.json"))


def files_in(folder: Path) -> tuple[list[Path], list[OSError]]:
    """The files in a folder and in those inside it, sorted, without hidden ones. Links to folders are followed, into
    each folder once. Returns (paths, errors of folders that cannot be read)."""
    seen: set[str] = set()
    found: list[Path] = []
    failed: list[OSError] = []
    for parent, folders, names in os.walk(folder, onerror=failed.append, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith(HIDDEN_PREFIXES))
        found += [Path(parent, name) for name in names if not name.startswith(HIDDEN_PREFIXES)]
    return sorted(found), failed
