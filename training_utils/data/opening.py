"""Opening a dataset, whatever it consists of."""

from training_utils.cli.options import DataOptions
from training_utils.data import mixture, single_source
from training_utils.data.dataset import ImageDataset
from training_utils.data.streaming.opening import open_stream


def load_dataset(options: DataOptions) -> ImageDataset:
    """Open a dataset.

    Of the options, `config` is a file that names several, as `mixture` says; or else `dataset_name` (a hub id or local
    path, through the datasets library, `folder` passed on as data_dir); or else `folder`, a folder of images, of tar
    shards or of parquet tables. `repeats_from_folders` makes the folders in it that are named like `10_sks dog`
    sources that are repeated so often, and these words the caption of an image there that has no other. With
    `caption_column` None no captions are read, and none are needed. With a `shuffle_buffer`, a number of samples,
    shards and tables are read where they lie, as `streaming` says. A column of the default name that is missing is
    taken to be the first (image) or second (caption) one, with a notice.

    Raises UserError for a dataset that cannot be opened. What is wrong with its samples is for `check_dataset` to
    say, which must follow: of a folder the samples whose caption or file is missing are left out already, and noted
    in the findings.
    """
    import datasets

    datasets.disable_progress_bars()
    dataset = _open(options)
    dataset.ignore_color_profiles = options.ignore_color_profiles
    return dataset


def _open(options: DataOptions) -> ImageDataset:
    if options.config is not None:
        return mixture.load_mixture(options)
    if options.shuffle_buffer is not None:
        return open_stream(options)
    return single_source.load_source(options)
