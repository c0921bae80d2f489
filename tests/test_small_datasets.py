"""Fewer images than a batch: each number counts the images that there are, and a warning says so."""

import json
from itertools import islice

import numpy as np
import pytest
from conftest import result_bytes
from tiny import write_images

from training_utils.data.plan import BatchPlan, Position
from training_utils.run import summary


@pytest.fixture(scope="module")
def two_images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("two") / "train", 2)


def lines_of(out, name):
    """The values of a name in metrics.jsonl."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def check_a_run(run, out, images, batch, capsys):
    """A run on two images counts two in each step."""
    run(out, "--train_data_dir", images, "--train_batch_size", batch, "--max_train_steps", "3")
    said = capsys.readouterr().err
    warning = f"warning: a step's batch of {batch} (batch {batch}) is larger than the dataset of 2 images; lower"
    assert said.count(warning) == 1
    assert f"a step        2 images, all that there are: batch {batch}\n" in said and f" {batch} images" not in said
    assert "3 in 3.0 epochs" in said
    (facts,) = lines_of(out, "run")
    assert facts["pictures_per_update"] == 2 and facts["pictures"] == 2


def test_a_run_counts_the_images_that_there_are(run, tmp_path, two_images, capsys):
    check_a_run(run, tmp_path / "out", two_images, 16, capsys)
    # What is trained does not depend on how large the batch could be.
    run(tmp_path / "fitting", "--train_data_dir", two_images, "--train_batch_size", "2", "--max_train_steps", "3")
    assert "is larger than the dataset" not in capsys.readouterr().err
    assert result_bytes(tmp_path / "out") == result_bytes(tmp_path / "fitting")


def test_a_dry_run_counts_them_too(run_lora, tmp_path, two_images, capsys):
    run_lora(tmp_path, "--train_data_dir", two_images, "--train_batch_size", "16", "--dry_run")
    printed = capsys.readouterr()
    assert "is larger than the dataset of 2 images" in printed.err
    assert "steps       6 of 2 images\nepochs      6.0, of 1 steps each" in printed.out


@pytest.mark.parametrize("batch, count, logging_steps", [(4, 10, 1), (4, 10, 3), (16, 2, 2), (3, 7, 10)])
def test_the_throughput_counts_each_image_once(run, tmp_path, monkeypatch, batch, count, logging_steps):
    """Images/s times the seconds of training are the images, also where the run ends inside an epoch."""
    folder = write_images(tmp_path / "images", count)
    seen = []
    real = summary.Progress.update

    def update(self, state, samples, *values):
        seen.append(samples)
        real(self, state, samples, *values)

    monkeypatch.setattr(summary.Progress, "update", update)
    steps = 6
    flags = ["--train_data_dir", folder, "--train_batch_size", batch, "--logging_steps", logging_steps]
    ended = []
    monkeypatch.setattr(summary, "print_end_summary", lambda out, progress, usage: ended.append(progress))
    run(tmp_path / "out", *flags, "--max_train_steps", steps)
    plan = BatchPlan(count, 7, batch)
    sizes = [sum(weight > 0 for *_, weight in one) for one in islice(plan.batches(Position()), steps)]
    assert seen == sizes
    (progress,) = ended
    assert progress.speed() * progress._training_seconds == pytest.approx(sum(sizes))


@pytest.mark.parametrize(
    "size, batch, accumulation, world_size, most",
    [(2, 16, 1, 1, 2), (5, 2, 2, 2, 5), (16, 16, 1, 1, 16), (17, 16, 1, 1, 16), (1, 1, 1, 8, 1), (100, 4, 2, 2, 16)],
)
def test_the_plan_knows_how_many_there_are(size, batch, accumulation, world_size, most):
    plan = BatchPlan(size, 3, batch, accumulation, world_size)
    assert plan.most_samples_per_step == plan.mean_samples_per_step == most
    assert plan.samples_per_step == batch * accumulation * world_size  # by which --scale_lr multiplies
    taken, position = [], Position()
    for _ in range(plan.steps_per_epoch):
        taken.append(plan.sample_count(position))
        position = plan.position_after(position)
    assert sum(taken) == size and max(taken) == most and position == Position(1)


def test_buckets_know_it_too():
    shapes = np.array([[16, 16], [16, 24], [24, 16]])
    plan = BatchPlan(3, 3, batch_size=8, accumulation=2, shapes=shapes)
    assert (plan.steps_per_epoch, plan.most_samples_per_step, plan.mean_samples_per_step) == (2, 2, 1.5)
    assert [plan.sample_count(Position(0, at)) for at in (0, 2)] == [2, 1]


WARNED = {
    (2, 16, 1, 1): "a step's batch of 16 (batch 16) is larger than the dataset of 2 images; lower --train_batch_size",
    (1, 16, 1, 1): "is larger than the dataset of 1 image; lower --train_batch_size",
    (5, 2, 2, 2): "a step's batch of 8 (batch 2 x 2 accumulated x 2 devices) is larger than the dataset of 5 images",
    (3, 1, 4, 1): "is larger than the dataset of 3 images; lower --gradient_accumulation_steps",
    (16, 16, 1, 1): None,
    (17, 16, 1, 1): None,
}


@pytest.mark.parametrize("numbers", WARNED)
def test_only_a_batch_that_is_too_large_is_warned_of(numbers, capsys):
    size, *others = numbers
    summary.warn_of_large_batch(BatchPlan(size, 3, *others), scale_lr=False)
    said = capsys.readouterr().err
    assert WARNED[numbers] in said if WARNED[numbers] else said == ""


def test_scale_lr_multiplies_by_the_flags_and_says_so(run, tmp_path, two_images, capsys):
    flags = ["--train_data_dir", two_images, "--train_batch_size", "16", "--max_train_steps", "1", "--scale_lr"]
    run(tmp_path, *flags, "--learning_rate", "1e-5")
    assert "--scale_lr multiplies the learning rate by 16 all the same" in capsys.readouterr().err
    assert lines_of(tmp_path, "lr") == [pytest.approx(16e-5)]
