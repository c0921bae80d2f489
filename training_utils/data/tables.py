"""Reading tables, of a folder or of the hub, through the datasets library."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training_utils.base.console import warn
from training_utils.base.errors import UserError, reason_of
from training_utils.base.formats import shortened

if TYPE_CHECKING:
    import datasets


def read_tables(
    title: str, name: str, data_dir: str | Path | None, config_name: str | None, cache_dir: str | None
) -> "datasets.Dataset":
    """The Dataset that the datasets library makes of a name and the data_dir that belongs to it.

    `title` is what to call it in a message. Raises UserError.
    """
    import datasets

    try:
        splits = datasets.load_dataset(name, config_name, cache_dir=cache_dir, data_dir=data_dir)
    # The library raises its own errors, the hub client's, pyarrow's and the system's; no line of ours runs in it.
    except Exception as error:
        reason = reason_of(error.__cause__ or error)
        if reason.startswith("Config name is missing"):
            reason = f"{' '.join(str(error).split())}; --dataset_config_name picks one"
        raise UserError(f"{title} cannot be loaded: {reason}") from error
    return train_split(title, splits)


def warn_of_other_tables(
    title: str, files: Iterable[Path], folder: str, config_name: str | None, cache_dir: str | None
) -> None:
    """Name the tables of a folder that the datasets library does not take for the split `train`."""
    import datasets

    builder = datasets.load_dataset_builder(folder, config_name, cache_dir=cache_dir)
    read = {os.path.realpath(path) for path in builder.config.data_files["train"]}
    other = [path for path in files if os.path.realpath(path) not in read]
    if other:
        warn(f"{title} holds tables that are not of its split 'train', and are not read: {shortened(other)}")


def train_split(title: str, splits: Mapping[str, Any]) -> Any:
    """What a dataset has under the name `train`. Raises UserError where it has no such split."""
    if "train" not in splits:
        raise UserError(f"{title} has no split 'train', only {', '.join(map(str, splits)) or 'none'}")
    return splits["train"]


def columns_of(columns: Sequence[str], image_column: str, caption_column: str | None) -> tuple[str, str | None]:
    """The columns of the images and of the captions among those of a table, as `column_of` finds them; the second is
    None where `caption_column` is. Raises UserError."""
    image_column = column_of(columns, image_column, "image", 0, "--image_column")
    if caption_column is not None:
        columns = [image_column, *(name for name in columns if name != image_column)]
        caption_column = column_of(columns, caption_column, "text", 1, "--caption_column")
    return image_column, caption_column


def column_of(columns: Sequence[str], name: str, default: str, position: int, flag: str) -> str:
    """The column of this name or, where it is the `default` and missing, the one at this `position`, with a warning.
    Raises UserError where there is none."""
    if name in columns:
        return name
    if name != default or position >= len(columns):
        raise UserError(f"{flag} {name}: there is no such column, only {', '.join(columns)}")
    warn(f"there is no column '{name}'; {flag} is taken to be '{columns[position]}'")
    return columns[position]
