"""Folders named like `10_sks dog`, as kohya's trainers have it: those words as the caption, ten times an epoch."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from training_utils.data.dataset import Source

REPEATED_FOLDER = re.compile(r"([1-9]\d{0,2})_(.+)")  # 2024_photos is no such name


class FolderRepeats:
    """The repeated folders inside a folder; `files` are the files in it. Their paths, resolved, are asked for."""

    def __init__(self, folder: Path, files: Sequence[Path]) -> None:
        self.folders: dict[str, str] = {}
        for path in files:
            names = repeated_folders(path, folder)
            if names:
                self.folders[os.path.realpath(path)] = names[-1]

    def _folder_of(self, path: str) -> str | None:
        shard = path.split("\0")[0]  # of a member path; another path has no zero byte
        return self.folders.get(shard)

    def words(self, path: str) -> str | None:
        """What a path's folder is called, without the number; None where it has no such folder."""
        folder = self._folder_of(path)
        return None if folder is None else folder.partition("_")[2].strip()

    def sources(self, paths: Sequence[str]) -> tuple[list[Source], np.ndarray]:
        """A list of Source, and for each path the index of its own, int64."""
        names = [self._folder_of(path) for path in paths]
        known = [*sorted({name for name in names if name}), None]
        sources = []
        for name in known:
            repeats = int(name.partition("_")[0]) if name else 1
            sources.append(Source(name or "", repeats))
        return sources, np.array([known.index(name) for name in names], dtype=np.int64)


def repeated_folders(path: Path, folder: Path) -> list[str]:
    """The names between a folder and a file in it that are those of repeated folders."""
    return [name for name in path.relative_to(folder).parts[:-1] if REPEATED_FOLDER.fullmatch(name)]
