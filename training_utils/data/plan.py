"""Which sample goes where: the order of an epoch, cut into steps, micro-steps and processes."""

import functools
from dataclasses import dataclass

import numpy as np

from training_utils.base import draws


@dataclass(frozen=True)
class Position:
    """Where a run stands in its data: `sample` samples into `epoch`."""

    epoch: int = 0
    sample: int = 0

    def within(self, size):
        """This position in a set of `size`: the next epoch, where the set has become smaller."""
        return Position(self.epoch + 1, 0) if self.sample >= size else self


class BatchPlan:
    """Which of `size` samples each step of a run takes, and how they are shared out.

    A step takes the next `window` = batch_size * accumulation * world_size samples of the epoch's order, or what is
    left of it, and shares them out as evenly as can be over its micro-steps and processes, so every process makes the
    same number of micro-steps. The weights of a step's samples are accumulation * world_size / their number: a
    micro-batch's loss is the sum of weight x loss, and averaging over micro-steps and processes gives the mean over
    the samples, however they were shared out. An epoch has `per_epoch` steps, usually of `samples` samples.

    Where the samples are of several `shapes`, an array with an entry for each, a micro-batch holds samples of one.
    They are put into micro-batches of `batch_size` in the epoch's order, of which the last of each shape may have
    fewer; these are shuffled, and a step takes the next accumulation * world_size of them. So it may have fewer
    samples than the window, and the order depends on the batch size: a run that goes on with another one inside an
    epoch visits some of its samples twice and others not.

    `partly` is a list of (indices, count): of these samples an epoch visits only so many, drawn anew each time. With
    shapes too, epochs differ a little in the number of their steps, and `per_epoch` is that of the first.

    `stream` is the streams.Rows that the samples are of, or None. An epoch then has that stream's order, a process
    takes every world_size-th sample of it, and the stream is told which samples are coming.
    """

    def __init__(self, size, seed, batch_size, accumulation=1, world_size=1, shapes=None, partly=(), stream=None):
        self.partly, self.all, self.stream = partly, size, stream
        size -= sum(len(indices) - count for indices, count in partly)
        self.size, self.seed, self.batch_size = size, seed, batch_size
        self.accumulation, self.world_size = accumulation, world_size
        self.window = batch_size * accumulation * world_size
        self.per_epoch, self.samples, self.shape = -(-size // self.window), self.window, None
        if shapes is not None and (shapes != shapes[0]).any():
            _, shape, counts = np.unique(shapes, axis=0, return_inverse=True, return_counts=True)
            self.shape = shape.reshape(-1)
            batches = len(self._order(0)[1]) if partly else int((-(-counts // batch_size)).sum())
            self.per_epoch = -(-batches // (accumulation * world_size))
            self.samples = size / self.per_epoch
        self._order = functools.lru_cache(maxsize=3)(self._order)  # batches are read ahead of the loop's position

    @classmethod
    def of(cls, rows, seed, batch_size, accumulation, world_size):
        """The steps that take the samples of data.Rows."""
        return cls(len(rows), seed, batch_size, accumulation, world_size, rows.sizes, rows.partly, rows.stream)

    def _order(self, epoch):
        """The samples in the order in which an epoch visits them, and where in it each micro-batch ends; None without
        shapes."""
        if self.stream is not None:
            return self.stream.order(self.seed, epoch), None
        order = draws.order(self.seed, epoch, self.all)
        for at, (indices, count) in enumerate(self.partly):
            left_out = draws.generator(self.seed, "partly", epoch, at).permutation(indices)[count:]
            order = order[~np.isin(order, left_out)]
        if self.shape is None:
            return order, None
        groups = [order[self.shape[order] == shape] for shape in range(self.shape.max() + 1)]
        batches = [
            group[at : at + self.batch_size] for group in groups for at in range(0, len(group), self.batch_size)
        ]
        shuffled = [batches[at] for at in draws.generator(self.seed, "batches", epoch).permutation(len(batches))]
        return np.concatenate(shuffled), np.cumsum([len(batch) for batch in shuffled])

    def shares(self, position):
        """The samples of the step at a position: for each micro-step the indices, an array, of each process."""
        position, parts = position.within(self.size), self.accumulation * self.world_size
        order, ends = self._order(position.epoch)
        order = order[position.sample :]
        if self.stream is not None:
            return [order[: self.window][part::parts] for part in range(parts)]
        if ends is None:
            return np.array_split(order[: self.window], parts)
        ends = ends[ends > position.sample][:parts] - position.sample
        shares = np.split(order[: ends[-1]], ends[:-1])
        return shares + [order[:0]] * (parts - len(shares))

    def _coming(self, position):
        """The samples that a stream is told of: the next in the order of this epoch, and of the one after it."""
        many = max(self.stream.ahead, 4 * self.window)
        coming = [self._order(position.epoch)[0][position.sample :][:many]]
        if len(coming[0]) < many:
            coming.append(self._order(position.epoch + 1)[0][: many - len(coming[0])])
        return coming

    def after(self, position):
        """The position after the step at a position."""
        position = position.within(self.size)
        taken = sum(map(len, self.shares(position)))
        return Position(position.epoch, position.sample + taken).within(self.size)

    def names(self, rows, position):
        """What to call the images of the step at a position: a list."""
        return [rows.name(int(index)) for index in np.concatenate(self.shares(position))]

    def batches(self, position, rank=0):
        """Batches of (epoch, index, weight) for one process, without end, beginning at a position.

        A process left without a sample gets one of weight 0.
        """
        position = position.within(self.size)
        while True:
            if self.stream is not None:
                self.stream.expect(self._coming(position), rank, self.world_size)
            shares, epoch = self.shares(position), position.epoch
            weight = len(shares) / sum(map(len, shares))
            for share in shares[rank :: self.world_size]:
                yield [(epoch, int(i), weight) for i in share] or [(epoch, int(shares[0][0]), 0.0)]
            position = self.after(position)


def validation_batches(size, batch_size, rank=0, world_size=1, shapes=None):
    """The batches of (epoch, index, weight) in which this process evaluates `size` validation samples.

    With `shapes`, an array with an entry for each sample, a batch holds samples of one.
    """
    mine = np.arange(rank, size, world_size)
    groups = [mine]
    if shapes is not None:
        shape = np.unique(shapes, axis=0, return_inverse=True)[1].reshape(-1)[mine]
        groups = [mine[shape == number] for number in np.unique(shape)]
    return [
        [(draws.VALIDATION_EPOCH, int(i), 1.0) for i in group[at : at + batch_size]]
        for group in groups
        for at in range(0, len(group), batch_size)
    ]
