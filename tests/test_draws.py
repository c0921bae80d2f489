"""What is drawn for a sample depends on seed, epoch and sample alone; each epoch visits each sample once."""

import itertools

import numpy as np
import pytest

from training_utils import draws
from training_utils.data import Position, UpdateSampler


def test_draws_are_frozen():
    """These numbers are part of every checkpoint ever written: a change would alter runs that are resumed."""
    assert draws.order(0, 0, 8).tolist() == [5, 0, 6, 1, 7, 2, 4, 3]
    noise = draws.SampleDraws(7, 3, 5)("noise").standard_normal(3, dtype=np.float32)
    np.testing.assert_allclose(noise, [0.7723329067230225, -0.1350177675485611, 0.1773151159286499], rtol=1e-6)
    assert int(draws.SampleDraws(7, 3, 5)("timestep").integers(0, 1000)) == 54
    assert draws.network_seed(1, 2, 3) == 6498626229777268288


def test_each_purpose_epoch_index_and_seed_is_a_stream_of_its_own():
    first = {
        (seed, purpose, epoch, index): float(draws.generator(seed, purpose, epoch, index).random())
        for seed, purpose, epoch, index in itertools.product((0, 1, 2**63 - 1), draws.PURPOSES, (0, 1), (0, 1, 2))
    }
    assert len(set(first.values())) == len(first)


def test_a_draw_does_not_depend_on_what_was_drawn_before():
    draw = draws.SampleDraws(1, 2, 3)
    draw("noise").standard_normal(1000)
    assert draw("crop").random() == draws.SampleDraws(1, 2, 3)("crop").random()


def test_noise_is_standard_normal():
    values = np.concatenate([draws.SampleDraws(0, 0, i)("noise").standard_normal(4096) for i in range(64)])
    assert abs(values.mean()) < 0.01 and abs(values.std() - 1) < 0.01
    neighbours = [draws.SampleDraws(0, 0, i)("noise").standard_normal(4096) for i in range(2)]
    assert abs(np.corrcoef(neighbours)[0, 1]) < 0.05


def updates(sampler, count):
    """The first updates of a sampler: a list of [[(epoch, index, weight), ...] per micro-step]."""
    stream = iter(sampler)
    return [[next(stream) for _ in range(sampler.accumulation)] for _ in range(count)]


@pytest.mark.parametrize("size", [1, 3, 10, 17])
@pytest.mark.parametrize("split", [(4, 1, 1), (2, 2, 1), (1, 4, 1), (2, 1, 2), (1, 2, 2), (1, 1, 4), (5, 3, 2)])
def test_every_split_sees_the_same_samples_with_the_same_weight(size, split):
    """The samples of update k are those of one process with the whole window, each weighted 1 / (their number)."""
    batch, accumulation, world = split
    window = batch * accumulation * world
    count = 3 * -(-size // window)
    whole = updates(UpdateSampler(size, 5, Position(), window), count)
    ranks = [
        updates(UpdateSampler(size, 5, Position(), batch, accumulation, rank, world), count) for rank in range(world)
    ]
    for at in range(count):
        expected = {(epoch, index) for epoch, index, _ in whole[at][0]}
        got = [sample for rank in ranks for micro in rank[at] for sample in micro]
        real = [sample for sample in got if sample[2]]
        assert {sample[:2] for sample in real} == expected and len(real) == len(expected)
        assert all(micro for rank in ranks for micro in rank[at]), "a process without a batch would hang the others"
        for _, _, weight in real:  # averaged over micro-steps and processes it is the mean over the window
            assert weight / (accumulation * world) == pytest.approx(1 / len(expected))
    visited = [sample[:2] for update in whole for sample in update[0]]
    assert sorted(visited) == [(epoch, index) for epoch in range(3) for index in range(size)]


@pytest.mark.parametrize("done", range(1, 8))
def test_a_sampler_continues_where_another_stopped(done):
    position = Position()
    for _ in range(done):
        position = position.advance(4, 10)
    rest = updates(UpdateSampler(10, 5, position, 2, 2), 5)
    assert rest == updates(UpdateSampler(10, 5, Position(), 2, 2), done + 5)[done:]


def test_a_position_inside_an_epoch_continues_with_another_batch_size():
    """Six of ten samples were seen in windows of three; the other four come next, in windows of two."""
    seen = updates(UpdateSampler(10, 5, Position(), 3), 2)
    rest = updates(UpdateSampler(10, 5, Position(0, 6), 2), 2)
    assert sorted(index for update in seen + rest for _, index, _ in update[0]) == list(range(10))
