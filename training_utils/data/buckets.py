"""Aspect-ratio buckets: sizes of about the same area, so that an image need not be cut to a square.

A size is (width, height) in pixels. Each image belongs to one bucket, a size whose ratio is near its own; it is
scaled until it covers the bucket, and what stands over is cropped.
"""

import numpy as np

from training_utils.base.console import say, warn
from training_utils.base.formats import shortened
from training_utils.cli.options import BucketLimits
from training_utils.data import checking

MUCH_CROPPED = 0.25  # the share of an image from which on it is named
MUCH_ENLARGED = 2.0  # times


def make(limits: BucketLimits) -> np.ndarray:
    """All buckets, int64, shape (B, 2), from the tallest to the widest.

    Their sides are multiples of `step` from `smallest` to `largest`. To each side belongs the longest other one with
    which the area is at most resolution^2, as the width and as the height. No two buckets have the same ratio: the
    larger one's would fit the smaller one's side.
    """
    step, smallest, largest = limits.step, limits.smallest, limits.largest
    sides = range(-(-smallest // step) * step, largest + 1, step)
    found = set()
    for side in sides:
        other = min(limits.resolution**2 // side, largest) // step * step
        if other >= smallest:
            found |= {(side, other), (other, side)}
    return np.array(sorted(found, key=lambda size: size[0] / size[1]), dtype=np.int64).reshape(-1, 2)


def nearest(sizes, buckets):
    """The number of each image's bucket: of the one whose width / height is the nearest, in the logarithm.

    `sizes` has shape (N, 2); one of zeros, an image whose size is not known, counts as a square.
    """
    middles = np.log(buckets[:, 0] / buckets[:, 1])
    middles = (middles[:-1] + middles[1:]) / 2
    width, height = np.maximum(sizes, 1).T
    return np.searchsorted(middles, np.log(width / height))


def cropped(sizes, buckets):
    """The share of each image that is cropped when it covers its bucket; both of shape (N, 2). Float64, (N,)."""
    return 1 - buckets.prod(axis=1) / (sizes.prod(axis=1) * scale(sizes, buckets) ** 2)


def scale(sizes, buckets):
    """The factor by which each image is scaled to cover its bucket; both of shape (N, 2). Float64, (N,)."""
    return (buckets / sizes).max(axis=1)


def assign(rows, limits: BucketLimits) -> tuple[np.ndarray, list[str], list[tuple[str, list[str]]]]:
    """Read the header of every image and find its bucket, of those that `make` makes with these limits.

    Returns the size at which each row is trained, int64, shape (N, 2); the lines of a table; and remarks about
    images that the buckets do not suit, each a clause and the names of the images. Images that cannot be opened
    are put with the squares and not counted.
    """
    sizes, choice = checking.image_sizes(rows), make(limits)
    chosen = choice[nearest(sizes, choice)]
    known = np.flatnonzero(sizes.all(axis=1))
    sizes, targets = sizes[known], chosen[known]
    lost, factor = cropped(sizes, targets), scale(sizes, targets)
    used, number, counts = np.unique(targets, axis=0, return_inverse=True, return_counts=True)
    table = [("bucket", "images", "cropped")]
    for at in sorted(range(len(used)), key=lambda at: used[at, 0] / used[at, 1]):
        table.append((f"{used[at, 0]} x {used[at, 1]}", f"{counts[at]:,}", _percent(lost[number.reshape(-1) == at])))
    table.append(("in all", f"{len(known):,}", _percent(lost)))
    width, wide = (max(len(line[column]) for line in table) for column in (0, 1))
    squares = _percent(cropped(sizes, np.array([[limits.resolution, limits.resolution]])))
    lines = [
        "aspect-ratio buckets, width x height in pixels",
        *(f"{size:>{width}}  {images:>{wide}}  {share:>7}" for size, images, share in table),
        f"{len(used)} of {len(choice)} buckets are used; cut to squares, the images would lose {squares}",
    ]
    remarks = []
    for what, which in (
        (f"lose more than {100 * MUCH_CROPPED:g} %, since no bucket is near their shape", lost > MUCH_CROPPED),
        (f"are enlarged more than {MUCH_ENLARGED:g} times to fill their bucket", factor > MUCH_ENLARGED),
    ):
        indices = known[which]  # only the first ten are named, so only those are read
        names = [rows.name(int(index)) for index in indices[:10]] + [""] * (len(indices) - 10)
        remarks += [(f"{len(names):,} images {what}", names)] if names else []
    return chosen, lines, remarks


def training_sizes(rows, resolution: int, limits: BucketLimits | None = None) -> np.ndarray:
    """The size at which each row is trained, int64, shape (N, 2): squares of the resolution, or with `limits` the
    buckets that `assign` finds, about which it prints a table."""
    if limits is None:
        return np.full((len(rows), 2), resolution)
    chosen, lines, remarks = assign(rows, limits)
    say("\n  ".join(lines))
    for remark, names in remarks:
        warn(f"{remark}: {shortened(names)}")
    return chosen


def _percent(shares):
    return f"{100 * shares.mean() if len(shares) else 0:.1f} %"
