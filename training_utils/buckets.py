"""Aspect-ratio buckets: sizes of about the same area, so that a picture need not be cut to a square.

A size is (width, height) in pixels. Each picture belongs to one bucket, a size whose ratio is near its own; it is
scaled until it covers the bucket, and what stands over is cropped.
"""

import numpy as np

from . import data
from .problems import shortened
from .reporting import say, warn

MUCH_CROPPED = 0.25  # the share of a picture from which on it is named
MUCH_ENLARGED = 2.0  # times


def make(resolution, smallest, largest, step):
    """All buckets, int64, shape (B, 2), from the tallest to the widest.

    Their sides are multiples of `step` from `smallest` to `largest`. To each side belongs the longest other one with
    which the area is at most resolution^2, as the width and as the height. No two buckets have the same ratio: the
    larger one's would fit the smaller one's side.
    """
    sides = range(-(-smallest // step) * step, largest + 1, step)
    found = set()
    for side in sides:
        other = min(resolution**2 // side, largest) // step * step
        if other >= smallest:
            found |= {(side, other), (other, side)}
    return np.array(sorted(found, key=lambda size: size[0] / size[1]), dtype=np.int64).reshape(-1, 2)


def nearest(sizes, buckets):
    """The number of each picture's bucket: of the one whose width / height is the nearest, in the logarithm.

    `sizes` has shape (N, 2); one of zeros, a picture whose size is not known, counts as a square.
    """
    middles = np.log(buckets[:, 0] / buckets[:, 1])
    middles = (middles[:-1] + middles[1:]) / 2
    width, height = np.maximum(sizes, 1).T
    return np.searchsorted(middles, np.log(width / height))


def cropped(sizes, buckets):
    """The share of each picture that is cropped when it covers its bucket; both of shape (N, 2). Float64, (N,)."""
    return 1 - buckets.prod(axis=1) / (sizes.prod(axis=1) * scale(sizes, buckets) ** 2)


def scale(sizes, buckets):
    """The factor by which each picture is scaled to cover its bucket; both of shape (N, 2). Float64, (N,)."""
    return (buckets / sizes).max(axis=1)


def assign(rows, resolution, smallest, largest, step):
    """The training size of each row, int64, shape (N, 2): its picture's bucket, as `make` makes them.

    Reads the header of every picture, and says how the pictures lie in the buckets.
    """
    sizes, all_buckets = data.picture_sizes(rows), make(resolution, smallest, largest, step)
    chosen = all_buckets[nearest(sizes, all_buckets)]
    lines, remarks = report(rows, sizes, chosen, len(all_buckets), resolution)
    say("\n".join(lines))
    for remark in remarks:
        warn(remark)
    return chosen


def report(rows, sizes, chosen, count, resolution):
    """How pictures of `sizes` lie in their buckets, `chosen` of `count`; both of shape (N, 2).

    Returns the lines of a table, and a list of sentences about the pictures that the buckets do not suit. Pictures
    whose size is not known are not counted.
    """
    known = np.flatnonzero(sizes.all(axis=1))
    sizes, chosen = sizes[known], chosen[known]
    lost, factor = cropped(sizes, chosen), scale(sizes, chosen)
    used, number = np.unique(chosen, axis=0, return_inverse=True)
    counts = np.bincount(number, minlength=len(used))
    table = [("bucket", "pictures", "cropped")]
    for at in sorted(range(len(used)), key=lambda at: used[at, 0] / used[at, 1]):
        table.append((f"{used[at, 0]} x {used[at, 1]}", f"{counts[at]:,}", _percent(lost[number == at])))
    table.append((f"{len(used)} of {count}", f"{len(known):,}", _percent(lost)))
    width, wide = (max(len(row[column]) for row in table) for column in (0, 1))
    lines = [f"{size:>{width}}  {pictures:>{wide}}  {share:>7}" for size, pictures, share in table]
    square = np.array([resolution, resolution])
    lines.append(f"cut to squares, {_percent(cropped(sizes, square[None]))} of a picture would be cropped on average")
    remarks = []
    for what, which in (
        (f"lose more than {MUCH_CROPPED:.0%} of themselves, since no bucket is near their shape", lost > MUCH_CROPPED),
        (f"are enlarged more than {MUCH_ENLARGED:g} times to fill their bucket", factor > MUCH_ENLARGED),
    ):
        names = [rows.name(int(index)) for index in known[which]]
        remarks += [f"{len(names)} pictures {what}: {shortened(names)}"] if names else []
    return lines, remarks


def _percent(shares):
    return f"{100 * shares.mean() if len(shares) else 0:.1f} %"
