"""Reading tables, of a folder or of the hub, through the datasets library."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training_utils.base.console import warn
from training_utils.base.errors import UserError, reason_of
from training_utils.base.formats import cut, shortened
from training_utils.data.wildcards import without_wildcards

if TYPE_CHECKING:
    import datasets


LONGEST_REASON = 1000  # characters of what the datasets library says, which may hold cells


def read_tables(
    title: str, name: str, data_dir: str | Path | None, config_name: str | None, cache_dir: str | None
) -> "datasets.Dataset":
    """The Dataset that the datasets library makes of a name and the data_dir that belongs to it, or of a folder that
    its save_to_disk wrote.

    `title` is what to call it in a message. Raises UserError.
    """
    import datasets

    path, data_dir = without_wildcards(name, data_dir, cache_dir)
    saved = Path(path, data_dir or "")
    try:
        if is_saved_dataset(saved):
            splits = datasets.load_from_disk(str(saved))
        else:
            splits = datasets.load_dataset(path, config_name, cache_dir=cache_dir, data_dir=data_dir)
    # The library raises its own errors, the hub client's, pyarrow's and the system's; no line of ours runs in it.
    except Exception as error:
        reason = reason_of(error.__cause__ or error).replace(path, name)
        if reason.startswith("Config name is missing"):
            reason = f"{' '.join(str(error).split()).replace(path, name)}; --dataset_config_name picks one"
        raise UserError(f"{title} cannot be loaded: {cut(reason, LONGEST_REASON)}") from error
    if isinstance(splits, datasets.Dataset):
        return splits.with_format(None)  # the format in which it was saved, such as torch's tensors
    return train_split(title, splits)


def is_saved_dataset(folder: str | Path) -> bool:
    """Whether a folder is one that save_to_disk of the datasets library wrote, of a dataset or of its splits."""
    names = set(os.listdir(folder)) if os.path.isdir(folder) else set()
    return {"dataset_info.json", "state.json"} <= names or "dataset_dict.json" in names


def warn_of_other_tables(
    title: str, files: Iterable[Path], folder: str, config_name: str | None, cache_dir: str | None
) -> None:
    """Name the tables of a folder that the datasets library does not take for the split `train`."""
    import datasets

    path, _ = without_wildcards(folder, None, cache_dir)
    builder = datasets.load_dataset_builder(path, config_name, cache_dir=cache_dir)
    # There is none where the downloads, which are there by now, lie in the folder itself.
    read = {os.path.realpath(path) for path in builder.config.data_files.get("train", [])}
    other = [path for path in files if os.path.realpath(path) not in read]
    if read and other:
        warn(f"{title} holds tables that are not of its split 'train', and are not read: {shortened(other)}")


def train_split(title: str, splits: Mapping[str, Any]) -> Any:
    """What a dataset has under the name `train`. Raises UserError where it has no such split."""
    if "train" not in splits:
        raise UserError(f"{title} has no split 'train', only {shortened(list(splits)) or 'none'}")
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
        raise UserError(f"{flag} {name}: there is no such column, only {shown_columns(columns)}")
    warn(f"there is no column '{name}'; {flag} is taken to be '{columns[position]}'")
    return columns[position]


def shown_columns(columns: Sequence[str]) -> str:
    """The names of columns as a message shows them."""
    return shortened([cut(name) for name in columns])
