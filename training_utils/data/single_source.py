"""Opening one dataset that is not streamed: tables of the hub or of a folder, or a folder of images or shards."""

import os
from pathlib import Path

from training_utils.base.console import warn
from training_utils.base.errors import UserError
from training_utils.base.formats import cut
from training_utils.cli.options import DataOptions
from training_utils.data import image_paths, tables
from training_utils.data.dataset import ImageDataset
from training_utils.data.files import files_of
from training_utils.data.folder import make_table, read_folder, read_shards, usable_images
from training_utils.data.folder_repeats import FolderRepeats
from training_utils.data.problems import Findings


def load_source(options: DataOptions) -> ImageDataset:
    """Open one dataset, as opening.load_dataset says. Raises UserError."""
    image_column = options.image_column
    caption_column = options.caption_column
    files: list[Path] = []
    findings = Findings()
    if options.dataset_name is not None:
        title = f"--dataset_name {options.dataset_name}"
    else:
        assert options.folder is not None
        title = f"--train_data_dir {options.folder}"
        if not tables.is_saved_dataset(options.folder):
            files, kind = files_of(Path(options.folder), findings.left_out)
            if kind != "tables":
                return _load_folder(title, Path(options.folder), files, kind, options, findings)
    if options.repeats_from_folders:
        raise UserError(f"{title} holds tables; --repeats_from_folders is for folders of images or shards")
    config_name = options.config_name
    if options.dataset_name is not None:
        table = tables.read_tables(title, options.dataset_name, options.folder, config_name, options.cache_dir)
    else:
        table = tables.read_tables(title, str(options.folder), None, config_name, options.cache_dir)
        if files:
            tables.warn_of_other_tables(title, files, str(options.folder), config_name, options.cache_dir)
    image_column, caption_column = tables.columns_of(table.column_names, image_column, caption_column)
    table = image_paths.with_reachable_paths(title, table, image_column, _folders_of_tables(options, files))
    table = _with_undecoded_images(table, image_column)
    if not len(table):
        raise UserError(f"{title} holds no images")
    return ImageDataset(table, image_column, caption_column, findings=findings)


def _folders_of_tables(options: DataOptions, files: list[Path]) -> list[str]:
    """The folders from which paths in the tables may lead: those of the tables, if it is one, and the dataset's."""
    if options.dataset_name is not None:
        folder = os.path.join(options.dataset_name, options.folder or "")
    else:
        folder = str(options.folder)
    parents = {str(path.parent) for path in files}
    found = [*(parents if len(parents) == 1 else []), folder]
    return [os.path.realpath(path) for path in found if os.path.isdir(path)]


def _load_folder(
    title: str, folder: Path, files: list[Path], kind: str, options: DataOptions, findings: Findings
) -> ImageDataset:
    """The dataset of a folder of images or shards. Adds to the findings."""
    repeats_from_folders = options.repeats_from_folders
    repeats = FolderRepeats(folder, files)
    words_of = repeats.words if repeats_from_folders else None
    read = read_shards if kind == "shards" else read_folder
    captioned, caption_column = read(folder, files, options.caption_column, findings, words_of)
    usable = usable_images(captioned, findings)
    table = make_table(usable, options.image_column, caption_column)
    sources = origins = None
    if repeats_from_folders:
        if not repeats.folders:
            raise UserError(f"{title} holds no folder named like '10_sks dog', which --repeats_from_folders needs")
        sources, origins = repeats.sources([path for path, _ in usable])
    elif repeats.folders:
        name = next(iter(repeats.folders.values()))
        warn(f"folders named like '{name}' are not repeated; with --repeats_from_folders they are")
    image_column, caption_column = tables.columns_of(table.column_names, options.image_column, caption_column)
    table = _with_undecoded_images(table, image_column)
    return ImageDataset(
        table, image_column, caption_column, folder.resolve(), findings, sources=sources, origins=origins
    )


def _with_undecoded_images(table, image_column):
    """A datasets.Dataset whose image column gives what is stored. Raises UserError where it holds no images."""
    import datasets
    import pyarrow

    try:
        return table.cast_column(image_column, datasets.Image(decode=False))
    except (pyarrow.ArrowException, TypeError, ValueError, NotImplementedError) as error:
        kind = cut(table.features[image_column])
        columns = tables.shown_columns(table.column_names)
        raise UserError(f"--image_column {image_column} holds {kind}, not images; there are {columns}") from error
