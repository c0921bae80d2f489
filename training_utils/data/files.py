"""Which files of a folder are images, shards and tables."""

import os
import re
from pathlib import Path

import numpy as np

from training_utils.base.console import warn
from training_utils.base.errors import UserError
from training_utils.base.formats import shortened
from training_utils.data.dataset import Source

IMAGE_ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff"}

OTHER_ENDINGS = {".heic", ".heif", ".jxl", ".psd", ".svg"}  # of images that Pillow does not read, or not well

COMPRESSED = re.compile(r"\.(tgz|tbz2?|txz|tar\.(gz|bz2|xz|zst|lz4))$")

HIDDEN = (".", "__")  # how names begin that nobody sees: thumbnails, copies, what was deleted

REPEATED = re.compile(r"([1-9]\d{0,2})_(.+)")  # 2024_photos is none


def files_of(folder):
    """What a folder holds: (sorted paths, "images", "shards" or "tables"). Raises UserError for none of them."""
    kinds = {"images": [], "shards": [], "tables": [], "compressed": [], "others": [], "broken": []}
    others = dict.fromkeys(OTHER_ENDINGS, "others") | {".tar": "shards", ".parquet": "tables"}
    paths, failed = files_in(folder)
    for path in paths:
        ending = path.suffix.lower()
        kind = "images" if ending in IMAGE_ENDINGS else others.get(ending)
        if COMPRESSED.search(path.name.lower()):
            kind = "compressed"
        if kind and path.name != "metadata.parquet":
            kinds[kind if os.path.isfile(path) else "broken"].append(path)
    compressed, unread, broken = (kinds.pop(kind) for kind in ("compressed", "others", "broken"))
    for error in failed:
        warn(f"{error.filename} cannot be read ({error.strerror}) and is skipped")
    if broken:
        warn(f"links that lead nowhere are skipped: {shortened(broken)}")
    if unread:
        endings = ", ".join(sorted({path.suffix.lower() for path in unread}))
        warn(f"images of a kind that is not read ({endings}) are skipped: {shortened(unread)}; make them PNG")
    present = [kind for kind, paths in kinds.items() if paths]
    if compressed and present in ([], ["shards"]):
        raise UserError(
            f"{compressed[0]} is compressed, so that no image in it can be reached without all before it; unpack it "
            "to a plain .tar (gunzip)"
        )
    if not present:
        endings = ", ".join(sorted(IMAGE_ENDINGS))
        raise UserError(f"--train_data_dir {folder} holds no images ({endings}), nor .tar shards or .parquet tables")
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


def files_in(folder):
    """The files in a folder and in those inside it, sorted, but for hidden ones; links to folders are followed, into
    each folder once. Returns (paths, errors of folders that cannot be read)."""
    seen, found, failed = set(), [], []
    for place, inside, names in os.walk(folder, onerror=failed.append, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            inside.clear()
            continue
        seen.add(real)
        inside[:] = sorted(name for name in inside if not name.startswith(HIDDEN))
        found += [Path(place, name) for name in names if not name.startswith(HIDDEN)]
    return sorted(found), failed


class FolderRepeats:
    """The folders inside a folder that are named like `10_sks dog`, as kohya's trainers have it: those words, ten
    times. `found` are the files; places are asked for."""

    def __init__(self, folder, found):
        self.folders = {}
        for path in found:
            names = [name for name in path.relative_to(folder).parts[:-1] if REPEATED.fullmatch(name)]
            if names:
                self.folders[os.path.realpath(path)] = names[-1]

    def _folder(self, place):
        return self.folders.get(place.split("\0")[0])

    def words(self, place):
        """What a place's folder is called, without the number; None where it has none."""
        folder = self._folder(place)
        return None if folder is None else REPEATED.fullmatch(folder)[2].strip()

    def sources(self, places):
        """A list of Source, and for each place the index of its own, int64."""
        names = [self._folder(place) for place in places]
        known = sorted({name for name in names if name}) + [None]
        sources = [Source(name or "", int(REPEATED.fullmatch(name)[1]) if name else 1) for name in known]
        return sources, np.array([known.index(name) for name in names], dtype=np.int64)
