"""Opening a dataset, whatever it consists of."""

from pathlib import Path

from training_utils.data import mixture, single_source
from training_utils.data.dataset import ImageDataset
from training_utils.data.streaming import stream


def load_dataset(
    dataset_name: str | None = None,
    config_name: str | None = None,
    folder: str | Path | None = None,
    cache_dir: str | None = None,
    image_column: str = "image",
    caption_column: str | None = "text",
    repeats_from_folders: bool = False,
    config: str | Path | None = None,
    shuffle_buffer: int | None = None,
) -> ImageDataset:
    """Open a dataset.

    `config` is a file that names several, as `mixture` says; or else `dataset_name` (a hub id or local path, through
    the datasets library, `folder` passed on as data_dir); or else `folder`, a folder of images, of tar shards or of
    parquet tables. `repeats_from_folders` makes the folders in it that are named like `10_sks dog` sources that are
    repeated so often, and these words the caption of an image there that has no other. With `caption_column` None no
    captions are read, and none are needed. With a `shuffle_buffer`, a number of samples, shards and tables are read
    where they lie, as `streaming` says. A column of the default name that is missing is taken to be the first (image)
    or second (caption) one, with a notice.

    Raises UserError for a dataset that cannot be opened. What is wrong with its samples is for `check_dataset` to
    say, which must follow: of a folder the samples whose caption or file is missing are left out already, and noted
    in the findings.
    """
    import datasets

    datasets.disable_progress_bars()
    if config is not None:
        return mixture.load_mixture(config, cache_dir, image_column, caption_column)
    if shuffle_buffer is not None:
        return stream.load_rows(
            dataset_name, config_name, folder, cache_dir, image_column, caption_column, shuffle_buffer
        )
    return single_source.load_source(
        dataset_name=dataset_name,
        config_name=config_name,
        folder=folder,
        cache_dir=cache_dir,
        image_column=image_column,
        caption_column=caption_column,
        repeats_from_folders=repeats_from_folders,
    )
