"""Which sample goes where: the order of an epoch, cut into steps, micro-steps and processes."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from training_utils.base import draws
from training_utils.data.dataset import ImageDataset, PartialSource

Batch = list[tuple[int, int, float]]  # (epoch, index, weight) of each sample, which `Samples` takes


@dataclass(frozen=True)
class Position:
    """Where a run stands in its data: `sample` samples into `epoch`."""

    epoch: int = 0
    sample: int = 0

    def wrapped(self, size: int) -> "Position":
        """This position in an epoch of `size` samples: the beginning of the next epoch, where it lies behind them."""
        return Position(self.epoch + 1, 0) if self.sample >= size else self


class BatchPlan:
    """Which of `size` samples each step of a run takes, and how they are divided among processes and micro-steps.

    A step takes the next `samples_per_step` = batch_size * accumulation * world_size samples of the epoch's order, or
    what is left of it, and divides them as evenly as can be among its micro-steps and processes, so every process
    makes the same number of micro-steps. The weights of a step's samples are accumulation * world_size / their
    number: a micro-batch's loss is the sum of weight x loss, and averaging over micro-steps and processes gives the
    mean over the samples, however they were divided. An epoch has `steps_per_epoch` steps, usually of
    `mean_samples_per_step` samples and never of more than `most_samples_per_step`, which are fewer than
    `samples_per_step` where there are fewer samples.

    Where the samples are of several `shapes`, an array with an entry for each, a micro-batch holds samples of one.
    They are put into micro-batches of `batch_size` in the epoch's order, and the last of each shape may have fewer;
    these are shuffled, and a step takes the next accumulation * world_size of them. So it may have fewer samples than
    `samples_per_step`, and the order depends on the batch size: a run that is resumed with another one inside an
    epoch visits some of its samples twice and others not.

    Of each of the `partial_sources` an epoch visits only so many samples, drawn again each time. With shapes too,
    epochs differ a little in the number of their steps, and `steps_per_epoch` is that of the first.

    `stream` is the StreamedDataset that the samples are of, or None. An epoch then has that stream's order, a process
    takes every world_size-th sample of it, and the stream is told which samples are coming.
    """

    def __init__(
        self,
        size: int,
        seed: int,
        batch_size: int,
        accumulation: int = 1,
        world_size: int = 1,
        shapes: np.ndarray | None = None,
        partial_sources: Sequence[PartialSource] = (),
        stream: Any = None,
    ) -> None:
        self.dataset_size = size
        self.size = size - sum(len(part.indices) - part.count for part in partial_sources)  # samples of an epoch
        self.seed = seed
        self.batch_size = batch_size
        self.accumulation = accumulation
        self.world_size = world_size
        self.partial_sources = partial_sources
        self.stream = stream
        self.samples_per_step = batch_size * accumulation * world_size
        self.steps_per_epoch = -(-self.size // self.samples_per_step)
        self.most_samples_per_step = min(self.samples_per_step, self.size)
        self.mean_samples_per_step: float = self.most_samples_per_step
        self.shape: np.ndarray | None = None  # the number of each sample's shape, where there are several
        # Batches are read ahead of the loop's position.
        self._order = functools.lru_cache(maxsize=3)(self._make_order)
        if shapes is not None and (shapes != shapes[0]).any():
            _, shape, counts = np.unique(shapes, axis=0, return_inverse=True, return_counts=True)
            self.shape = shape.reshape(-1)
            ends = self._order(0)[1] if partial_sources else None
            batches = int((-(-counts // batch_size)).sum()) if ends is None else len(ends)
            self.steps_per_epoch = -(-batches // (accumulation * world_size))
            in_a_batch = min(batch_size, int(counts.max()))
            self.most_samples_per_step = min(in_a_batch * accumulation * world_size, self.size)
            self.mean_samples_per_step = self.size / self.steps_per_epoch

    @classmethod
    def for_dataset(
        cls, dataset: ImageDataset, seed: int, batch_size: int, accumulation: int, world_size: int
    ) -> "BatchPlan":
        """The steps that take the samples of a dataset."""
        return cls(
            len(dataset),
            seed,
            batch_size,
            accumulation,
            world_size,
            shapes=dataset.sizes,
            partial_sources=dataset.partial_sources,
            stream=dataset.stream,
        )

    def _make_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray | None]:
        """The samples in the order in which an epoch visits them, and where in it each micro-batch ends; None without
        shapes."""
        if self.stream is not None:
            return self.stream.order(self.seed, epoch), None
        order = draws.order(self.seed, epoch, self.dataset_size)
        for at, part in enumerate(self.partial_sources):
            left_out = draws.generator(self.seed, "partly", epoch, at).permutation(part.indices)[part.count :]
            order = order[~np.isin(order, left_out)]
        if self.shape is None:
            return order, None
        batches = []
        for shape in range(self.shape.max() + 1):
            group = order[self.shape[order] == shape]
            batches += [group[at : at + self.batch_size] for at in range(0, len(group), self.batch_size)]
        shuffled = [batches[at] for at in draws.generator(self.seed, "batches", epoch).permutation(len(batches))]
        return np.concatenate(shuffled), np.cumsum([len(batch) for batch in shuffled])

    def step_samples(self, position: Position) -> list[np.ndarray]:
        """The samples of the step at a position: for each micro-step the indices, an array, of each process."""
        position = position.wrapped(self.size)
        parts = self.accumulation * self.world_size
        order, ends = self._order(position.epoch)
        order = order[position.sample :]
        if self.stream is not None:
            return [order[: self.samples_per_step][part::parts] for part in range(parts)]
        if ends is None:
            return np.array_split(order[: self.samples_per_step], parts)
        ends = ends[ends > position.sample][:parts] - position.sample
        micro_batches = np.split(order[: ends[-1]], ends[:-1])
        return micro_batches + [order[:0]] * (parts - len(micro_batches))

    def _coming(self, position: Position) -> list[np.ndarray]:
        """The samples that a stream is told of: the next in the order of this epoch, and of the one after it."""
        many = max(self.stream.ahead, 4 * self.samples_per_step)
        coming = [self._order(position.epoch)[0][position.sample :][:many]]
        if len(coming[0]) < many:
            coming.append(self._order(position.epoch + 1)[0][: many - len(coming[0])])
        return coming

    def sample_count(self, position: Position) -> int:
        """How many samples the step at a position takes."""
        return sum(map(len, self.step_samples(position)))

    def position_after(self, position: Position) -> Position:
        """The position after the step at a position."""
        position = position.wrapped(self.size)
        return Position(position.epoch, position.sample + self.sample_count(position)).wrapped(self.size)

    def image_names(self, dataset: ImageDataset, position: Position) -> list[str]:
        """What to call the images of the step at a position."""
        return [dataset.name(int(index)) for index in np.concatenate(self.step_samples(position))]

    def batches(self, position: Position, rank: int = 0) -> Iterator[Batch]:
        """The batches of one process, without end, beginning at a position.

        A process left without a sample gets one of weight 0.
        """
        position = position.wrapped(self.size)
        while True:
            if self.stream is not None:
                self.stream.expect(self._coming(position), rank, self.world_size)
            epoch = position.epoch
            micro_batches = self.step_samples(position)
            weight = len(micro_batches) / sum(map(len, micro_batches))
            for micro_batch in micro_batches[rank :: self.world_size]:
                batch = [(epoch, int(index), weight) for index in micro_batch]
                yield batch or [(epoch, int(micro_batches[0][0]), 0.0)]
            position = self.position_after(position)


def validation_batches(
    size: int, batch_size: int, rank: int = 0, world_size: int = 1, shapes: np.ndarray | None = None
) -> list[Batch]:
    """The batches in which this process evaluates `size` validation samples.

    With `shapes`, an array with an entry for each sample, a batch holds samples of one.
    """
    mine = np.arange(rank, size, world_size)
    groups = [mine]
    if shapes is not None:
        shape = np.unique(shapes, axis=0, return_inverse=True)[1].reshape(-1)[mine]
        groups = [mine[shape == number] for number in np.unique(shape)]
    batches = []
    for group in groups:
        for at in range(0, len(group), batch_size):
            indices = group[at : at + batch_size]
            batches.append([(draws.VALIDATION_EPOCH, int(i), 1.0) for i in indices])
    return batches
