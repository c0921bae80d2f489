"""What is drawn for a sample depends on seed, epoch and sample alone; each epoch visits each sample once."""

import itertools

import numpy as np
import pytest

from training_utils.base import draws
from training_utils.base.draws import SampleDraws
from training_utils.data.plan import BatchPlan, Position


def test_draws_are_frozen():
    """These numbers are part of every checkpoint ever written: a change would alter runs that are resumed."""
    assert draws.order(0, 0, 8).tolist() == [5, 0, 6, 1, 7, 2, 4, 3]
    noise = SampleDraws(7, 3, 5)("noise").standard_normal(3, dtype=np.float32)
    np.testing.assert_allclose(noise, [0.7723329067230225, -0.1350177675485611, 0.1773151159286499], rtol=1e-6)
    assert int(SampleDraws(7, 3, 5)("timestep").integers(0, 1000)) == 54
    assert draws.network_seed(1, 2, 3) == 6498626229777268288


def test_each_purpose_epoch_index_and_seed_is_a_stream_of_its_own():
    first = {
        (seed, purpose, epoch, index): float(draws.generator(seed, purpose, epoch, index).random())
        for seed, purpose, epoch, index in itertools.product((0, 1, 2**63 - 1), draws.PURPOSES, (0, 1), (0, 1, 2))
    }
    assert len(set(first.values())) == len(first)


def test_a_draw_does_not_depend_on_what_was_drawn_before():
    draw = SampleDraws(1, 2, 3)
    draw("noise").standard_normal(1000)
    assert draw("crop").random() == SampleDraws(1, 2, 3)("crop").random()


def test_noise_is_standard_normal():
    values = np.concatenate([SampleDraws(0, 0, i)("noise").standard_normal(4096) for i in range(64)])
    assert abs(values.mean()) < 0.01 and abs(values.std() - 1) < 0.01
    neighbours = [SampleDraws(0, 0, i)("noise").standard_normal(4096) for i in range(2)]
    assert abs(np.corrcoef(neighbours)[0, 1]) < 0.05


def first_steps(batch_plan, count, position=None, rank=0):
    """What a process sees of the steps from a position on: a list of [[(epoch, index, weight)] a micro-step]."""
    stream = batch_plan.batches(position or Position(), rank)
    return [[next(stream) for _ in range(batch_plan.accumulation)] for _ in range(count)]


def test_the_plan_is_frozen():
    """Like the draws: eleven samples in steps of four by two processes, the last step of an epoch having three."""
    batch_plan = BatchPlan(11, 5, batch_size=1, accumulation=2, world_size=2)
    assert first_steps(batch_plan, 3, rank=0) == [
        [[(0, 7, 1.0)], [(0, 4, 1.0)]],
        [[(0, 9, 1.0)], [(0, 3, 1.0)]],
        [[(0, 8, 4 / 3)], [(0, 1, 4 / 3)]],
    ]
    assert first_steps(batch_plan, 3, rank=1) == [
        [[(0, 10, 1.0)], [(0, 5, 1.0)]],
        [[(0, 6, 1.0)], [(0, 0, 1.0)]],
        [[(0, 2, 4 / 3)], [(0, 8, 0.0)]],
    ]


@pytest.mark.parametrize("size", [1, 3, 10, 17])
@pytest.mark.parametrize("split", [(4, 1, 1), (2, 2, 1), (1, 4, 1), (2, 1, 2), (1, 2, 2), (1, 1, 4), (5, 3, 2)])
def test_every_split_sees_the_same_samples_with_the_same_weight(size, split):
    """The samples of step k are those of one process with the whole window, each weighted 1 / (their number)."""
    batch, accumulation, world = split
    window = batch * accumulation * world
    count = 3 * -(-size // window)
    one_process = first_steps(BatchPlan(size, 5, window), count)
    batch_plan = BatchPlan(size, 5, batch, accumulation, world)
    ranks = [first_steps(batch_plan, count, rank=rank) for rank in range(world)]
    position = Position()
    for at in range(count):
        expected = {(epoch, index) for epoch, index, _ in one_process[at][0]}
        got = [sample for rank in ranks for micro in rank[at] for sample in micro]
        real = [sample for sample in got if sample[2]]
        assert {sample[:2] for sample in real} == expected and len(real) == len(expected)
        assert sorted(np.concatenate(batch_plan.step_samples(position))) == sorted(index for _, index in expected)
        assert all(micro for rank in ranks for micro in rank[at]), "a process without a batch would hang the others"
        for _, _, weight in real:  # averaged over micro-steps and processes it is the mean over the window
            assert weight / (accumulation * world) == pytest.approx(1 / len(expected))
        position = batch_plan.position_after(position)
    assert position == Position(3) and count == 3 * batch_plan.steps_per_epoch
    visited = [sample[:2] for step in one_process for sample in step[0]]
    assert sorted(visited) == [(epoch, index) for epoch in range(3) for index in range(size)]


@pytest.mark.parametrize("done", range(1, 8))
def test_steps_continue_where_another_run_stopped(done):
    batch_plan, position = BatchPlan(10, 5, 2, 2), Position()
    for _ in range(done):
        position = batch_plan.position_after(position)
    assert first_steps(batch_plan, 5, position) == first_steps(batch_plan, done + 5)[done:]


def test_a_position_inside_an_epoch_continues_with_another_batch_size():
    """Six of ten samples were seen in windows of three; the other four come next, in windows of two."""
    seen = first_steps(BatchPlan(10, 5, 3), 2)
    rest = first_steps(BatchPlan(10, 5, 2), 2, Position(0, 6))
    assert sorted(index for step in seen + rest for _, index, _ in step[0]) == list(range(10))


def test_a_position_beyond_a_smaller_data_set_continues_in_the_next_epoch():
    batch_plan = BatchPlan(6, 5, 4)
    assert first_steps(batch_plan, 2, Position(1, 8)) == first_steps(batch_plan, 2, Position(2))
    assert batch_plan.position_after(Position(1, 8)) == Position(2, 4)
