"""Opening a dataset, whatever it consists of."""

from pathlib import Path

from training_utils.base.console import warn
from training_utils.base.errors import UserError
from training_utils.data import mixture, tables
from training_utils.data.dataset import ImageDataset
from training_utils.data.files import FolderRepeats, files_of
from training_utils.data.folder import make_table, read_folder, read_shards, usable_samples
from training_utils.data.problems import Findings
from training_utils.data.streaming.opening import open_stream


def load_dataset(
    dataset_name=None,
    config_name=None,
    folder=None,
    cache_dir=None,
    image_column="image",
    caption_column="text",
    repeats_from_folders=False,
    config=None,
    shuffle_buffer=None,
):
    """Open a dataset. Returns Rows.

    `config` is a file that names several, as `sources` says; or else `dataset_name` (a hub id or local path, through
    the datasets library, `folder` passed on as data_dir); or else `folder`, a folder of images, of tar shards or of
    parquet tables. `repeats_from_folders` makes the folders in it that are named like `10_sks dog` sources that are
    repeated so often, and these words the caption of an image there that has no other. With `caption_column` None no
    captions are read, and none are needed. With a `shuffle_buffer`, a number of samples, shards and tables are read
    where they lie, as `streams` says. A column of the default name that is missing is taken to be the first (image)
    or second (caption) one, with a notice. Raises UserError for a dataset that cannot be opened. What is
    wrong with its samples is for `check` to say, which must follow: of a folder the samples whose caption or file is
    missing are left out already, and noted in the findings.
    """
    import datasets

    datasets.disable_progress_bars()
    if config is not None:
        return mixture.load_rows(config, cache_dir, image_column, caption_column)
    if shuffle_buffer is not None:
        return open_stream(
            dataset_name=dataset_name,
            config_name=config_name,
            folder=folder,
            cache_dir=cache_dir,
            image_column=image_column,
            caption_column=caption_column,
            buffer=shuffle_buffer,
        )
    findings, kind, parts, origins = Findings(), "tables", None, None
    if dataset_name is None:
        files, kind = files_of(Path(folder))
    title = f"--train_data_dir {folder}" if dataset_name is None else f"--dataset_name {dataset_name}"
    if kind == "tables":
        if repeats_from_folders:
            raise UserError(f"{title} holds tables; --repeats_from_folders is for folders of images or shards")
        place = (str(folder), None) if dataset_name is None else (dataset_name, folder)
        dataset = tables.read_tables(title, *place, config_name, cache_dir)
        if dataset_name is None:
            tables.warn_of_other_tables(title, files, str(folder), config_name, cache_dir)
    else:
        folder = Path(folder)
        repeats = FolderRepeats(folder, files)
        read = read_shards if kind == "shards" else read_folder
        words_of = repeats.words if repeats_from_folders else None
        named, caption_column = read(folder, files, caption_column, findings, words_of)
        usable = usable_samples(named, findings)
        dataset = make_table(usable, image_column, caption_column)
        if repeats_from_folders and not repeats.folders:
            raise UserError(f"{title} holds no folder named like '10_sks dog', which --repeats_from_folders is about")
        if repeats_from_folders:
            parts, origins = repeats.sources([place for place, _ in usable])
        elif repeats.folders:
            name = next(iter(repeats.folders.values()))
            warn(f"folders named like '{name}' are not repeated; with --repeats_from_folders they are")
    columns = dataset.column_names
    image_column, caption_column = tables.columns_of(columns, image_column, caption_column)
    try:
        dataset = dataset.cast_column(image_column, datasets.Image(decode=False))
    except Exception:
        kind = dataset.features[image_column]
        raise UserError(f"--image_column {image_column} holds {kind}, not images; there are {columns}") from None
    if kind != "tables":
        folder = folder.resolve()
        return ImageDataset(dataset, image_column, caption_column, folder, findings, sources=parts, origins=origins)
    if not len(dataset):
        raise UserError(f"{title} holds no images")
    return ImageDataset(dataset, image_column, caption_column, None, findings)
