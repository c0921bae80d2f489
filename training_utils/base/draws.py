"""Every random number of a run, as a function of (seed, purpose, epoch, sample index) and of nothing else.

A draw does not depend on what was drawn before, on the process, the batch or the worker that makes it, so there is no
random state to save: a run that is split, cut or resumed differently trains on the same numbers. The generator is
NumPy's counter-based Philox 4x64 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): seed and
purpose are its key, epoch and index the high half of its 256-bit counter, which leaves each stream 2^128 numbers.
torch and JAX scripts share it.
"""

import numpy as np

# Each purpose has a stream of its own, so that a new draw changes none of the others. Append only: the number of a
# purpose is part of every old run.
PURPOSES = (
    *("order", "subset", "holdout", "caption", "caption_dropout", "crop", "flip", "latent", "noise", "noise_offset"),
    *("input_perturbation", "timestep", "cached_crop", "batches", "tags", "partly", "chunks", "blocks"),
)
# The epoch in the draws of validation samples, which are the same at every evaluation.
VALIDATION_EPOCH = 2**32


def generator(seed: int, purpose: str, epoch: int = 0, index: int = 0) -> np.random.Generator:
    """The generator for one purpose (a name of PURPOSES) of one sample in one epoch."""
    key = np.array([seed, PURPOSES.index(purpose)], dtype=np.uint64)
    counter = np.array([0, 0, index, epoch], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


class SampleDraws:
    """The draws of one sample: `draw("noise")` is its generator for that purpose."""

    def __init__(self, seed: int, epoch: int, index: int) -> None:
        self.seed = seed
        self.epoch = epoch
        self.index = index

    def __call__(self, purpose: str) -> np.random.Generator:
        return generator(self.seed, purpose, self.epoch, self.index)


def order(seed: int, epoch: int, size: int) -> np.ndarray:
    """The order in which an epoch visits `size` samples: int64 indices, shape (size,)."""
    return generator(seed, "order", epoch).permutation(size)


def network_seed(seed: int, micro_step: int, rank: int) -> int:
    """A seed for what is drawn inside a network (dropout), the only draw that depends on the process."""
    return int(np.random.SeedSequence([seed, micro_step, rank]).generate_state(1, np.uint64)[0] >> 1)


def rounding_seed(seed: int, step: int, index: int) -> int:
    """A seed for the stochastic rounding of the weight of this index after `step` steps, the same in every process."""
    return int(np.random.SeedSequence([seed, step, index, 1]).generate_state(1, np.uint64)[0] >> 1)


def choose_timestep(draw: SampleDraws, timesteps: int, probabilities: np.ndarray | None = None) -> int:
    """A timestep below `timesteps`: all equally likely, or by `probabilities`, shape (timesteps,)."""
    if probabilities is None:
        return int(draw("timestep").integers(0, timesteps))
    drawn = draw("timestep").random()
    timestep = int(np.searchsorted(np.cumsum(probabilities), drawn, side="right"))
    return min(timestep, timesteps - 1)  # the sum of the probabilities may round to less than 1
