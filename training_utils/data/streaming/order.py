"""The order in which an epoch visits the samples of a stream."""

import heapq

import numpy as np

from training_utils.base import draws

LANES = 16  # places in the dataset that an epoch reads at the same time; another number changes the order of old runs


def epoch_order(*, seed: int, epoch: int, sizes: np.ndarray, buffer: int) -> np.ndarray:
    """The order in which an epoch visits the samples of chunks: their indices, int64.

    `sizes` says how many samples each chunk has, int64; the samples are numbered from chunk to chunk. `buffer` is how
    many samples are shuffled together.

    The chunks are permuted and dealt onto lanes, each onto the lane that is shortest so far. The samples of a lane are
    cut into blocks of buffer / lanes samples, which are shuffled. The lanes then take turns, sample by sample, each
    until it ends. So `buffer` consecutive samples lie in few chunks. And where the number of processes divides the
    number of lanes, processes that take turns too read different lanes, except for the last samples of an epoch.
    """
    lane_count = min(LANES, len(sizes))
    block = max(1, buffer // lane_count)
    lanes = _deal(seed, epoch, sizes, lane_count)
    turns: list[np.ndarray] = []
    for lane, samples in enumerate(lanes):
        generator = draws.generator(seed, "blocks", epoch, lane)
        for begin in range(0, len(samples), block):
            generator.shuffle(samples[begin : begin + block])
        turns.append(np.arange(len(samples)) * lane_count + lane)
    return np.concatenate(lanes)[np.argsort(np.concatenate(turns))]


def _deal(seed: int, epoch: int, sizes: np.ndarray, lane_count: int) -> list[np.ndarray]:
    """The samples of each lane: chunks in a drawn order, each put onto the lane that is shortest so far."""
    starts = np.cumsum(sizes) - sizes
    lanes: list[list[np.ndarray]] = [[] for _ in range(lane_count)]
    lengths = [(0, lane) for lane in range(lane_count)]
    for chunk in draws.generator(seed, "chunks", epoch).permutation(len(sizes)):
        length, lane = lengths[0]
        lanes[lane].append(np.arange(starts[chunk], starts[chunk] + sizes[chunk]))
        heapq.heapreplace(lengths, (length + int(sizes[chunk]), lane))
    return [np.concatenate(parts) for parts in lanes]
