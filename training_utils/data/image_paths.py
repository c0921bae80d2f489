"""Tables whose images are paths of files."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from training_utils.base.errors import UserError
from training_utils.base.formats import cut
from training_utils.data.arrow_column import ArrowColumn
from training_utils.data.spelling import FoundNames

if TYPE_CHECKING:
    import datasets

# How the content of a PNG, JPEG, WebP or GIF begins in base64.
BASE64_BEGINNINGS = ("data:", "iVBORw0KGgo", "/9j/", "UklGR", "R0lGOD")
LONGEST_PATH = 4096  # characters


def with_reachable_paths(
    title: str, table: "datasets.Dataset", image_column: str, folders: Sequence[str]
) -> "datasets.Dataset":
    """A table whose paths of images can be opened, where the image column holds paths.

    A relative path that leads nowhere from the working directory is one from the first of `folders` in which there is
    such a file. Raises UserError for text that is no path.
    """
    import datasets

    if table.features[image_column] not in (datasets.Value("string"), datasets.Value("large_string")):
        return table
    paths = list(ArrowColumn(table, image_column))
    _refuse_other_text(title, paths, image_column)
    found = FoundNames()
    reachable = [None if path is None else _reachable(path, folders, found) for path in paths]
    if reachable == paths:
        return table
    without = table.remove_columns(image_column)
    return without.add_column(image_column, reachable, feature=datasets.Value("string"))


def _refuse_other_text(title: str, paths: list[str | None], image_column: str) -> None:
    """Raises UserError where the first text is a URL, or longer than a path or content in base64."""
    row = next((at for at, path in enumerate(paths) if path), None)
    if row is None:
        return
    text = paths[row] or ""
    where = f"{title} row {row}: --image_column {image_column} holds '{cut(text)}'"
    if text.startswith(("http://", "https://")):
        raise UserError(f"{where}, and URLs are not downloaded; img2dataset makes shards of them")
    if len(text) > LONGEST_PATH or (text.startswith(BASE64_BEGINNINGS) and not os.path.exists(text)):
        raise UserError(f"{where}, which is no path of a file; if it is base64, decode it and store the bytes")


def _reachable(path: str, folders: Sequence[str], found: FoundNames) -> str:
    """A path, from the folder in which it leads to a file."""
    try:
        if os.path.isabs(path):
            return found.existing(path)
        if os.path.exists(path):
            return path
        for folder in folders:
            there = found.existing(os.path.join(folder, path))
            if os.path.exists(there):
                return os.path.realpath(there)
    except ValueError:  # a zero byte or half a character, which no file's name can hold
        pass
    return path
