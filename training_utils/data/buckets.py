"""Aspect-ratio buckets: sizes of about the same area, so that an image need not be cut to a square.

A size is (width, height) in pixels. Each image belongs to one bucket, a size whose ratio is near its own; it is
scaled until it covers the bucket, and what stands over is cropped.
"""

from dataclasses import dataclass

import numpy as np

from training_utils.base.console import say, warn
from training_utils.base.formats import shortened
from training_utils.cli.options import BucketLimits
from training_utils.data import checking
from training_utils.data.dataset import ImageDataset

MUCH_CROPPED = 0.25  # a larger cropped share of an image is remarked on
MUCH_ENLARGED = 2.0  # a larger factor is remarked on


def make(limits: BucketLimits) -> np.ndarray:
    """All buckets, int64, shape (B, 2), from the tallest to the widest.

    Their sides are multiples of `step` from `smallest` to `largest`. To each side belongs the longest other one with
    which the area is at most resolution^2, as the width and as the height. No two buckets have the same ratio: the
    larger one's would fit the smaller one's side.
    """
    step = limits.step
    sides = range(-(-limits.smallest // step) * step, limits.largest + 1, step)
    found = set()
    for side in sides:
        other = min(limits.resolution**2 // side, limits.largest) // step * step
        if other >= limits.smallest:
            found |= {(side, other), (other, side)}
    return np.array(sorted(found, key=lambda size: size[0] / size[1]), dtype=np.int64).reshape(-1, 2)


def nearest(sizes: np.ndarray, buckets: np.ndarray) -> np.ndarray:
    """The number of each image's bucket: the one whose width / height is the nearest, in the logarithm. int64, (N,).

    `sizes` has shape (N, 2); one of zeros, an image whose size is not known, counts as a square.
    """
    middles = np.log(buckets[:, 0] / buckets[:, 1])
    middles = (middles[:-1] + middles[1:]) / 2
    width, height = np.maximum(sizes, 1).T
    return np.searchsorted(middles, np.log(width / height))


def cropped_share(sizes: np.ndarray, buckets: np.ndarray) -> np.ndarray:
    """The share of each image that is cropped when it covers its bucket; both of shape (N, 2). Float64, (N,)."""
    return 1 - buckets.prod(axis=1) / (sizes.prod(axis=1) * scale(sizes, buckets) ** 2)


def scale(sizes: np.ndarray, buckets: np.ndarray) -> np.ndarray:
    """The factor by which each image is scaled to cover its bucket; both of shape (N, 2). Float64, (N,)."""
    return (buckets / sizes).max(axis=1)


@dataclass(frozen=True)
class Assignment:
    """The buckets of a dataset.

    `sizes` are those at which the rows are trained, int64, shape (N, 2); `table` is lines to show; `remarks` are
    about images that the buckets do not suit, each a clause and the names of the images.
    """

    sizes: np.ndarray
    table: list[str]
    remarks: list[tuple[str, list[str]]]


def assign(dataset: ImageDataset, limits: BucketLimits) -> Assignment:
    """Read the header of every image and find its bucket among those that `make` makes.

    Images that cannot be opened are put with the squares and not counted.
    """
    image_sizes = checking.image_sizes(dataset)
    buckets = make(limits)
    chosen = buckets[nearest(image_sizes, buckets)]
    known = np.flatnonzero(image_sizes.all(axis=1))
    sizes = image_sizes[known]
    targets = chosen[known]
    lost = cropped_share(sizes, targets)
    table = _table(limits.resolution, sizes, targets, lost, len(buckets))
    clauses = {
        f"lose more than {100 * MUCH_CROPPED:g} %, since no bucket is near their shape": lost > MUCH_CROPPED,
        f"are enlarged more than {MUCH_ENLARGED:g} times to fill their bucket": scale(sizes, targets) > MUCH_ENLARGED,
    }
    remarks = []
    for clause, which in clauses.items():
        indices = known[which]
        if len(indices):
            # Only the first ten are shown, so only those names are read.
            names = [dataset.name(int(index)) for index in indices[:10]] + [""] * (len(indices) - 10)
            remarks.append((f"{len(names):,} images {clause}", names))
    return Assignment(chosen, table, remarks)


def _table(resolution, sizes, targets, lost, available):
    """The lines of a table of the buckets that are used; `available` is how many there are."""
    used, number, counts = np.unique(targets, axis=0, return_inverse=True, return_counts=True)
    number = number.reshape(-1)
    table = [("bucket", "images", "cropped")]
    for at in sorted(range(len(used)), key=lambda at: used[at, 0] / used[at, 1]):
        table.append((f"{used[at, 0]} x {used[at, 1]}", f"{counts[at]:,}", _percent(lost[number == at])))
    table.append(("in all", f"{len(sizes):,}", _percent(lost)))
    size_width = max(len(size) for size, _, _ in table)
    count_width = max(len(count) for _, count, _ in table)
    squares = _percent(cropped_share(sizes, np.array([[resolution, resolution]])))
    return [
        "aspect-ratio buckets, width x height in pixels",
        *(f"{size:>{size_width}}  {count:>{count_width}}  {share:>7}" for size, count, share in table),
        f"{len(used)} of {available} buckets are used; cut to squares, the images would lose {squares}",
    ]


def training_sizes(dataset: ImageDataset, resolution: int, limits: BucketLimits | None = None) -> np.ndarray:
    """The size at which each image is trained, int64, shape (N, 2): squares of the resolution, or with `limits` the
    buckets that `assign` finds, about which it prints a table."""
    if limits is None:
        return np.full((len(dataset), 2), resolution)
    assignment = assign(dataset, limits)
    say("\n  ".join(assignment.table))
    for remark, names in assignment.remarks:
        warn(f"{remark}: {shortened(names)}")
    return assignment.sizes


def _percent(shares):
    return f"{100 * shares.mean() if len(shares) else 0:.1f} %"
