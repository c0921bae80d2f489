"""Every random number of a run, as a function of (seed, purpose, epoch, sample index) and of nothing else.

A draw does not depend on what was drawn before, on the process, the batch or the worker that makes it, so there is no
random state to save: a run that is split, cut or resumed differently trains on the same numbers. The generator is
NumPy's counter-based Philox 4x64 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): seed and
purpose are its key, epoch and index the high half of its 256-bit counter, which leaves each stream 2^128 numbers.
torch and JAX scripts share it.
"""

import numpy as np

# One stream a purpose, so that a new draw changes none of the others. Append only: a number is part of every old run.
PURPOSES = (
    *("order", "subset", "holdout", "caption", "caption_dropout", "crop", "flip", "latent", "noise", "noise_offset"),
    *("input_perturbation", "timestep", "cached_crop", "batches", "tags", "partly", "chunks", "blocks"),
)
VALIDATION_EPOCH = (
    2**32
)  # stands for the epoch in the draws of validation samples, which are the same at every evaluation


def generator(seed, purpose, epoch=0, index=0):
    """A numpy.random.Generator for one purpose (a name of PURPOSES) of one sample in one epoch."""
    key = np.array([seed, PURPOSES.index(purpose)], dtype=np.uint64)
    counter = np.array([0, 0, index, epoch], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


class SampleDraws:
    """The draws of one sample: `draw("noise")` is its generator for that purpose."""

    def __init__(self, seed, epoch, index):
        self.seed, self.epoch, self.index = seed, epoch, index

    def __call__(self, purpose):
        return generator(self.seed, purpose, self.epoch, self.index)


def order(seed, epoch, size):
    """The order in which an epoch visits `size` samples: int64 indices, shape (size,)."""
    return generator(seed, "order", epoch).permutation(size)


def network_seed(seed, micro_step, rank):
    """A seed for what is drawn inside a network (dropout), which is the one draw that depends on the process."""
    return int(np.random.SeedSequence([seed, micro_step, rank]).generate_state(1, np.uint64)[0] >> 1)


def rounding_seed(seed, step, index):
    """A seed for the stochastic rounding of the weight of this index after `step` steps; alike in every process."""
    return int(np.random.SeedSequence([seed, step, index, 1]).generate_state(1, np.uint64)[0] >> 1)


def choose_timestep(draw, timesteps, probabilities=None):
    """A timestep below `timesteps`: each as likely as the other, or by `probabilities`, shape (timesteps,)."""
    if probabilities is None:
        return int(draw("timestep").integers(0, timesteps))
    return min(int(np.searchsorted(np.cumsum(probabilities), draw("timestep").random(), side="right")), timesteps - 1)
