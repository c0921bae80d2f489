"""Which samples are trained on: a subset, a validation split, repeated sources."""

import numpy as np

from training_utils.base import draws
from training_utils.base.console import warn
from training_utils.base.errors import UserError
from training_utils.data.dataset import ImageDataset, PartialSource


def split_validation(
    dataset: ImageDataset, fraction: float | None, seed: int
) -> tuple[ImageDataset, ImageDataset | None]:
    """Split a dataset into (training, validation) by a draw from the seed; the second is None without a `fraction`.

    No image is in both: the rows that name one file go together, and sources are repeated only after the split.
    Raises UserError where nothing would be left to train on.
    """
    if not fraction:
        return repeat_sources(dataset), None
    images = dataset.image_numbers()
    total = len(np.unique(images))
    count = max(1, round(total * fraction))
    if count >= total:
        raise UserError(f"--validation_split {fraction} of {total} images leaves none to train on")
    generator = draws.generator(seed, "holdout")
    if total == len(dataset):
        validation = np.sort(dataset.draw_subset(count, generator))
    else:
        drawn_images = generator.permutation(total)[:count]
        validation = np.flatnonzero(np.isin(images, drawn_images))
    return repeat_sources(dataset.drop(validation)), dataset.select(validation)


def samples_per_epoch(dataset: ImageDataset) -> tuple[np.ndarray, np.ndarray]:
    """How many rows each source has, and how many of its samples an epoch shows: int64, shape (sources,) each.

    With weights an epoch has as many samples as there are rows; each source has its share of them, rounded, and at
    least one.
    """
    assert dataset.sources is not None and dataset.origins is not None
    counts = np.bincount(dataset.origins, minlength=len(dataset.sources))
    if dataset.sources[0].weight is None:
        return counts, counts * [source.repeats for source in dataset.sources]
    weights = np.array([source.weight for source in dataset.sources]) * (counts > 0)
    shares = np.round(len(dataset) * weights / weights.sum()).astype(np.int64)
    return counts, np.where(counts, np.maximum(1, shares), 0)


def repeat_sources(dataset: ImageDataset) -> ImageDataset:
    """A dataset with each row as many times in succession as an epoch can show it, and `partial_sources` set.

    What an epoch shows of a source beyond a multiple of its rows is some of their last copies, drawn again each time.
    """
    if dataset.sources is None:
        return dataset
    counts, shown = samples_per_epoch(dataset)
    repeats = -(-shown // np.maximum(counts, 1))
    copies = repeats[dataset.origins]
    repeated = dataset.select(np.repeat(np.arange(len(dataset)), copies))
    last_copies = np.cumsum(copies) - 1
    shown_of_last = shown - counts * np.maximum(repeats - 1, 0)
    repeated.partial_sources = [
        PartialSource(last_copies[dataset.origins == at], int(shown_of_last[at]))
        for at in range(len(counts))
        if counts[at] and shown_of_last[at] < counts[at]
    ]
    return repeated


def take_subset(dataset: ImageDataset, most: int | None, seed: int) -> ImageDataset:
    """At most `most` rows (None for all), chosen by a draw from the seed that every process makes alike."""
    if most is not None and most > len(dataset):
        warn(f"--max_train_samples {most} is more than the {len(dataset)} images there are; all of them are used")
    if most is None or most >= len(dataset):
        return dataset
    return dataset.select(np.sort(dataset.draw_subset(most, draws.generator(seed, "subset"))))
