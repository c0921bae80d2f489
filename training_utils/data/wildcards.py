"""Folders whose path the datasets library would take for a pattern, such as `data[1]`.

The library has no way to escape such a path. So it is given a folder of links to the files instead, among the
downloads. It is always the same one for a folder, so that what the library keeps of the files is found again.
"""

import contextlib
import hashlib
import os
import re
import uuid
from pathlib import Path

from training_utils.base.errors import UserError, reason_of
from training_utils.cli import folders
from training_utils.data.files import files_in

WILDCARDS = re.compile(r"[*?\[]|::")  # what fsspec takes for a pattern, or for a file inside another


def has_wildcards(path: str | Path) -> bool:
    """Whether a path holds what the datasets library takes for a pattern."""
    return bool(WILDCARDS.search(os.path.realpath(path)))


def without_wildcards(name: str, data_dir: str | Path | None, cache_dir: str | None) -> tuple[str, str | Path | None]:
    """The arguments (path, data_dir) of datasets.load_dataset for these two, so that neither is taken for a pattern.
    Raises UserError."""
    if not os.path.isdir(name):
        if data_dir and os.path.isdir(data_dir) and has_wildcards(data_dir):
            return name, linked_folder(data_dir, cache_dir)
        return name, data_dir
    folder = Path(name, data_dir or "")
    if folder.is_dir() and has_wildcards(folder):
        return linked_folder(folder, cache_dir), None
    return name, data_dir


def linked_folder(folder: str | Path, cache_dir: str | None) -> str:
    """The path of a folder of links to the files in another one. Raises UserError."""
    source = os.path.realpath(folder)
    digest = hashlib.sha256(os.fsencode(source)).hexdigest()[:16]
    links = Path(folders.downloads(cache_dir), "text-to-image-links", digest)
    if has_wildcards(links):
        raise UserError(
            f"{folder} and the folder of downloads {links.parent.parent} both have *, ?, [ or :: in their path, which "
            "the datasets library takes for a pattern; rename the folder, or name another one with --cache_dir"
        )
    paths = [path.relative_to(source) for path in files_in(Path(source))[0]]
    try:
        links.mkdir(parents=True, exist_ok=True)
        for path in paths:
            _link(links / path, os.path.join(source, path))
        for path in files_in(links)[0]:
            if not os.path.lexists(os.path.join(source, path.relative_to(links))):
                path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder} has *, ?, [ or :: in its path, which the datasets library takes for a pattern, and links to "
            f"its files cannot be made in {links} ({reason_of(error)}); rename the folder"
        ) from error
    return str(links)


def _link(path: Path, target: str) -> None:
    """Make a link, unless another process made it."""
    with contextlib.suppress(OSError):
        if os.readlink(path) == target:
            return
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{uuid.uuid4().hex}")
    unfinished.symlink_to(target)
    os.replace(unfinished, path)
