"""Which samples are trained on: a subset, a validation split, repeated sources."""

import numpy as np

from training_utils.base import draws
from training_utils.base.console import warn
from training_utils.base.errors import UserError


def split_validation(rows, fraction, seed):
    """Split rows into (training, held-out) by a draw from the seed; the second is None when `fraction` is 0.

    No image is in both: the rows that name one file go together, and the first are `repeated` only then.
    """
    if not fraction:
        return repeated(rows), None
    images = rows.images()
    total, generator = len(np.unique(images)), draws.generator(seed, "holdout")
    count = max(1, round(total * fraction))
    if count >= total:
        raise UserError(f"--validation_split {fraction} of {total} images leaves none to train on")
    if total == len(rows):
        val_samples = np.sort(rows.drawn(count, generator))
    else:
        val_samples = np.flatnonzero(np.isin(images, generator.permutation(total)[:count]))
    return repeated(rows.without(val_samples)), rows.select(val_samples)


def samples_per_epoch(rows):
    """How many rows each source has, and how many of its samples an epoch shows: int64, shape (sources,) each.

    With weights an epoch has as many samples as there are rows; each source has its share of them, rounded, and at
    least one.
    """
    counts = np.bincount(rows.origins, minlength=len(rows.sources))
    if rows.sources[0].weight is None:
        return counts, counts * [source.repeats for source in rows.sources]
    weights = np.array([source.weight for source in rows.sources]) * (counts > 0)
    shares = np.round(len(rows) * weights / weights.sum()).astype(np.int64)
    return counts, np.where(counts, np.maximum(1, shares), 0)


def repeated(rows):
    """Rows, each as many times in a row as an epoch can show it, `partly` set.

    What an epoch shows of a source beyond a multiple of its rows is some of their last copies, drawn anew each time.
    """
    if rows.sources is None:
        return rows
    counts, shown = samples_per_epoch(rows)
    repeats = -(-shown // np.maximum(counts, 1))
    copies = repeats[rows.origins]
    result, last = rows.select(np.repeat(np.arange(len(rows)), copies)), np.cumsum(copies) - 1
    rest = shown - counts * np.maximum(repeats - 1, 0)  # of the last copies of each source's rows
    result.partly = [
        (last[rows.origins == at], int(rest[at])) for at in range(len(counts)) if counts[at] and rest[at] < counts[at]
    ]
    return result


def take_subset(rows, most, seed):
    """At most `most` rows (None for all), chosen by a draw from the seed that every process makes alike."""
    if most is None or most >= len(rows):
        if most is not None and most > len(rows):
            warn(f"--max_train_samples {most} is more than the {len(rows)} images there are; all of them are used")
        return rows
    return rows.select(np.sort(rows.drawn(most, draws.generator(seed, "subset"))))
