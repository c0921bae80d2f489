"""With aspect-ratio buckets images are trained at shapes near their own: a batch has one, an epoch all images."""

import importlib
import io
import json
import math
import shutil

import numpy as np
import pytest
from conftest import logged, relative_difference, reset_accelerate, result_bytes
from diffusers import UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from test_sdxl import prepared
from tiny import image, write_images

import train_text_to_image_lora_sdxl
import train_text_to_image_sdxl
from training_utils.base import draws
from training_utils.base.draws import SampleDraws
from training_utils.cli.options import BucketLimits, DataOptions
from training_utils.data import buckets, checking, image_ops, opening, plan
from training_utils.data.plan import BatchPlan, Position

quick = settings(max_examples=150, deadline=None, derandomize=True, database=None)

# --- which steps take which samples --------------------------------------------------------------------------------

SHAPES = st.lists(st.integers(0, 4), min_size=1, max_size=40).map(np.array)
SPLITS = st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 3))  # batch size, accumulation, processes


def epoch_of(batch_plan, position):
    """The micro-batches of each step from a position to the end of its epoch, and the positions before them."""
    steps, positions, epoch = [], [], position.epoch
    while position.epoch == epoch:
        steps.append(batch_plan.step_samples(position))
        positions.append(position)
        position = batch_plan.position_after(position)
    assert position == Position(epoch + 1)
    return steps, positions


@quick
@given(SHAPES, SPLITS, st.integers(0, 3))
def test_an_epoch_visits_each_sample_once_in_batches_of_one_shape(shapes, split, epoch):
    batch_plan = BatchPlan(len(shapes), 5, *split, shapes=shapes)
    batch_size, accumulation, world = split
    steps, _ = epoch_of(batch_plan, Position(epoch))
    assert len(steps) == batch_plan.steps_per_epoch
    visited = np.concatenate([micro_batch for step in steps for micro_batch in step])
    assert sorted(visited) == list(range(len(shapes)))
    for step in steps:
        assert len(step) == accumulation * world and len(step[0])
        for micro_batch in step:
            assert len(micro_batch) <= batch_size and len(set(shapes[micro_batch])) <= 1
    streams = [batch_plan.batches(Position(epoch), rank) for rank in range(world)]
    for step in steps:
        count = sum(map(len, step))
        for at, micro_batch in enumerate(step):
            batch = next(streams[at % world])  # every process makes the same number of micro-steps
            if len(micro_batch):
                assert batch == [(epoch, index, len(step) / count) for index in micro_batch]
            else:
                assert batch == [(epoch, step[0][0], 0.0)]


@quick
@given(SHAPES, SPLITS, SPLITS)
def test_a_run_continues_at_every_position(shapes, split, other):
    """With the same split it does the same; with more processes or accumulation, the same micro-batches."""
    batch_plan = BatchPlan(len(shapes), 5, *split, shapes=shapes)
    steps, positions = epoch_of(batch_plan, Position(1))
    on_others = BatchPlan(len(shapes), 5, split[0], *other[1:], shapes=shapes)
    for at, position in enumerate(positions):
        again, _ = epoch_of(batch_plan, position)
        assert flat(again) == flat(steps[at:])
        rest, _ = epoch_of(on_others, position)
        if batch_plan.shape is not None:
            assert flat(rest) == flat(steps[at:])


def flat(steps):
    return [micro_batch.tolist() for step in steps for micro_batch in step if len(micro_batch)]


@quick
@given(SHAPES, SPLITS, SPLITS, st.integers(0, 39))
def test_another_batch_size_visits_the_rest_of_its_own_order(shapes, split, other, sample):
    batch_plan = BatchPlan(len(shapes), 5, *other, shapes=shapes)
    start = Position(0, sample).wrapped(len(shapes))
    steps, _ = epoch_of(batch_plan, start)
    visited = np.concatenate([micro_batch for step in steps for micro_batch in step])
    assert len(set(visited)) == len(visited) == len(shapes) - start.sample
    assert all(len(set(shapes[micro_batch])) <= 1 for step in steps for micro_batch in step)


@quick
@given(st.integers(1, 30), SPLITS, st.integers(0, 30))
def test_one_shape_is_as_none(size, split, sample):
    plain, shaped = BatchPlan(size, 5, *split), BatchPlan(size, 5, *split, shapes=np.full((size, 2), 512))
    position = Position(2, sample)
    for _ in range(5):
        assert flat([plain.step_samples(position)]) == flat([shaped.step_samples(position)])
        assert plain.position_after(position) == shaped.position_after(position)
        position = plain.position_after(position)
    assert plain.steps_per_epoch == shaped.steps_per_epoch


def test_the_plan_with_shapes_is_frozen():
    """Like the draws: a change would alter runs that are resumed."""
    steps, _ = epoch_of(BatchPlan(9, 5, 2, 2, shapes=np.array([0, 1, 1, 0, 1, 2, 0, 0, 1])), Position())
    assert flat(steps) == [[7, 3], [8, 4], [5], [2, 1], [6, 0]]


def test_micro_batches_are_others_in_every_epoch():
    batch_plan = BatchPlan(40, 5, 4, shapes=np.arange(40) % 2)
    first, second = (sorted(map(sorted, flat(epoch_of(batch_plan, Position(epoch))[0]))) for epoch in (0, 1))
    assert first != second


@quick
@given(SHAPES, st.integers(1, 5), st.integers(1, 3))
def test_validation_samples_come_once_in_batches_of_one_shape(shapes, batch_size, world):
    batches = [
        batch
        for rank in range(world)
        for batch in plan.validation_batches(len(shapes), batch_size, rank, world, shapes)
    ]
    assert sorted(key for batch in batches for key in batch) == [
        (draws.VALIDATION_EPOCH, i, 1.0) for i in range(len(shapes))
    ]
    assert all(len({shapes[index] for _, index, _ in batch}) == 1 and len(batch) <= batch_size for batch in batches)


# --- which bucket an image belongs to -------------------------------------------------------------------------------


def test_the_usual_buckets():
    """Those of sd-scripts for 512 pixels, from 256 to 1024 in steps of 64."""
    tall = [*((256, height) for height in (1024, 960, 896, 832)), (320, 768), (320, 704), (384, 640), (448, 576)]
    wide = [(height, width) for width, height in reversed(tall)]
    assert buckets.make(BucketLimits(512, 256, 1024, 64)).tolist() == [
        list(size) for size in [*tall, (512, 512), *wide]
    ]


@quick
@given(st.integers(1, 40), st.integers(1, 12), st.floats(0.3, 1), st.floats(1, 4))
def test_buckets_are_as_large_as_the_area_allows(eights, steps, low, high):
    resolution, step = 8 * eights, 8 * steps
    smallest, largest = math.ceil(low * resolution), int(high * resolution)
    sizes = [tuple(size) for size in buckets.make(BucketLimits(resolution, smallest, largest, step)).tolist()]
    assert len({width / height for width, height in sizes}) == len(sizes)
    assert sizes == sorted(sizes, key=lambda size: size[0] / size[1])
    multiples = [side for side in range(0, largest + 1, step) if side >= smallest]
    for width, height in sizes:
        assert width in multiples and height in multiples and width * height <= resolution**2
        assert (height, width) in sizes
        wider, taller = (
            [(width + step, height), (width, height + step)][at] for at in (0, 1)
        )  # at least one of its sides cannot grow
        fits = [max(size) <= largest and math.prod(size) <= resolution**2 for size in (wider, taller)]
        assert not all(fits)
    if smallest <= resolution // step * step:
        assert sizes, "an image would have no bucket"


@quick
@given(st.lists(st.tuples(st.integers(1, 4000), st.integers(1, 4000)), min_size=1, max_size=20))
def test_a_image_goes_to_the_nearest_ratio(sizes):
    choice = buckets.make(BucketLimits(512, 256, 1024, 64))
    for (width, height), number in zip(sizes, buckets.nearest(np.array(sizes), choice)):
        distances = np.abs(np.log(choice[:, 0] / choice[:, 1]) - np.log(width / height))
        assert distances[number] <= distances.min() + 1e-12


def test_sizes_are_those_of_the_upright_image(tmp_path):
    """From the header; of a PNG also where its EXIF tags stand there, and nothing is decoded."""
    paths = []
    for kind in ("jpg", "png", "webp", "tiff"):
        for turn in (1, 3, 6, 8):
            tags = Image.Exif()
            tags[0x0112] = turn
            paths.append(tmp_path / f"{turn}.{kind}")
            image(0, (30, 20)).save(paths[-1], exif=tags)
    for path in paths:
        with Image.open(path) as opened:
            expected = image_ops.upright_rgb(opened).size
            assert expected == ((20, 30) if path.stem in "68" else (30, 20))
        with Image.open(path) as opened:
            assert image_ops.upright_size(opened) == expected, path.name


def rows_of(folder, sizes, **broken):
    """The dataset of a table of images of these sizes; `broken` are bytes in place of an image: p3=b"..."."""
    import datasets

    cells = []
    for index, size in enumerate(sizes):
        content = io.BytesIO()
        image(index, size).save(content, "png")
        cells.append({"bytes": broken.get(f"p{index}", content.getvalue()), "path": f"{index}.png"})
    table = datasets.Dataset.from_dict({"image": cells, "text": [str(at) for at in range(len(cells))]})
    table.to_parquet(folder / "train.parquet")
    return opening.load_dataset(DataOptions(dataset_name=str(folder), cache_dir=str(folder / "cache")))


LIMITS = BucketLimits(resolution=64, smallest=32, largest=128, step=16)


def test_the_report_tells_of_images_that_no_bucket_suits(tmp_path, capsys):
    sizes = [(64, 64), (128, 32), (600, 60), (20, 20), (96, 54), (90, 90)]
    rows = rows_of(tmp_path, sizes, p5=b"no image")
    assert checking.image_sizes(rows).tolist() == [*map(list, sizes[:5]), [0, 0]]
    assignment = buckets.assign(rows, LIMITS)
    chosen, lines, remarks = assignment.sizes, assignment.table, assignment.remarks
    assert chosen.tolist() == [[64, 64], [128, 32], [128, 32], [64, 64], [80, 48], [64, 64]]
    table = [line.split() for line in lines[1:]]
    assert table[1:3] == [["64", "x", "64", "2", "0.0", "%"], ["80", "x", "48", "1", "6.2", "%"]]
    assert table[4][:3] == ["in", "all", "5"]  # what cannot be opened is not counted
    assert "lose more than 25 %" in remarks[0][0] and remarks[0][1] == ["row 2: 2.png"]
    assert "enlarged more than 2 times" in remarks[1][0] and remarks[1][1] == ["row 3: 3.png"]
    rows.sizes = buckets.training_sizes(rows, 64, LIMITS)
    said = capsys.readouterr().err
    assert "warning: 1 images lose more than 25 %, since no bucket is near their shape: row 2: 2.png" in said
    assert rows.select([4, 0]).sizes.tolist() == rows.drop([1, 2, 3, 5]).sizes.tolist()[::-1] == [[80, 48], [64, 64]]


# --- how an image is cut --------------------------------------------------------------------------------------------

SIDES = st.integers(1, 300)


@quick
@given(st.tuples(SIDES, SIDES), st.tuples(SIDES, SIDES), st.booleans())
def test_a_image_just_covers_its_bucket_unstretched(size, bucket, drawn):
    """To the pixel: the longer side that an unstretched image would have is rounded down to a whole one."""
    if max(size) > 50 * min(size):  # such images are refused
        return
    covering = image_ops.resize(Image.new("L", size), bucket, "nearest")
    exact = [side * max(bucket[0] / size[0], bucket[1] / size[1]) for side in size]
    assert all(side - 1 < got <= side + 1e-9 for side, got in zip(exact, covering.size))
    assert any(got == side for got, side in zip(covering.size, bucket))
    generator = np.random.default_rng(0) if drawn else None
    cut, (top, left) = image_ops.crop(covering, bucket, generator)
    assert cut.size == bucket
    assert 0 <= top <= covering.height - bucket[1] and 0 <= left <= covering.width - bucket[0]
    width, height = image_ops.largest_within(size, bucket)  # as the decoders cut before they resize
    assert (width == size[0] and height <= size[1]) or (height == size[1] and width <= size[0])
    assert (
        abs(width - height * bucket[0] / bucket[1]) <= 0.5
        or abs(height - width * bucket[1] / bucket[0]) <= 0.5
        or (min(width, height) == 1)
    )


# --- the scripts -----------------------------------------------------------------------------------------------------

PIXELS = ["run", "run_lora", "run_sdxl", "run_lora_sdxl", "run_decoder", "run_lora_decoder"]
SMALL = ["--aspect_ratio_bucketing", "--bucket_reso_steps", "8"]
SHOWN = [(40, 14), (14, 40), (20, 20), (40, 16), (16, 42), (21, 20), (30, 30), (44, 14), (36, 20), (20, 20)]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """A folder of wide, tall and square images."""
    folder = tmp_path_factory.mktemp("shapes") / "train"
    write_images(folder)
    for index, size in enumerate(SHOWN):
        image(index, size).save(folder / f"{index}.png")
    return folder


@pytest.mark.parametrize("name", PIXELS)
def test_wide_tall_and_square_images_are_trained(request, name, shapes, tmp_path, monkeypatch, capsys):
    """Each batch in the shape of its bucket, validation images too."""
    run, seen = request.getfixturevalue(name), []
    real = UNet2DConditionModel.forward

    def spy(self, sample, *words, **options):
        seen.append((self.training, tuple(sample.shape)))
        return real(self, sample, *words, **options)

    monkeypatch.setattr(UNet2DConditionModel, "forward", spy)
    flags = [*SMALL, "--train_data_dir", shapes, "--validation_split", "0.3", "--validation_steps", "5"]
    flags += ["--random_flip", "--num_train_epochs", "1", "--report_to", "tensorboard", "--noise_offset", "0.1"]
    argv = run.argv(tmp_path, *flags)
    at = argv.index("--max_train_steps")
    reset_accelerate()
    assert importlib.import_module(run.script).main([*argv[:at], *argv[at + 2 :]]) == 0
    said = capsys.readouterr().err
    assert "aspect-ratio buckets, width x height in pixels" in said and "3 of 5 buckets are used" in said
    trained, val_samples = ([shape for training, shape in seen if training is mode] for mode in (True, False))
    assert {shape[2:] for shape in trained} == {(8, 8), (4, 12), (12, 4)} >= {shape[2:] for shape in val_samples}
    assert sum(shape[0] for shape in trained) == 7, "each image once"
    assert sum(shape[0] for shape in val_samples) == 3
    assert list(logged(tmp_path, "val_loss")) == [len(trained)]


@pytest.mark.parametrize(("name", "cuts"), [("run", (1, 3)), ("run_sdxl", (2,))])
def test_a_run_with_buckets_resumed_equals_one_uninterrupted(request, name, cuts, shapes, tmp_path):
    run = request.getfixturevalue(name)
    flags = [*SMALL, "--train_data_dir", shapes, "--random_flip", "--checkpointing_steps", "1"]
    flags += ["--train_batch_size", "2", "--gradient_accumulation_steps", "2"]
    run(tmp_path / "complete", *flags)
    for cut in cuts:
        out = tmp_path / f"cut{cut}"
        shutil.copytree(tmp_path / "complete" / f"checkpoint-{cut}", out / f"checkpoint-{cut}")
        run(out, *flags, "--resume_from_checkpoint", "latest")
        assert result_bytes(out) == result_bytes(tmp_path / "complete"), f"cut after step {cut}"


def test_two_processes_with_buckets_equal_one(run, shapes, tmp_path):
    flags = [*SMALL, "--train_data_dir", shapes, "--random_flip", "--train_batch_size", "2"]
    run(tmp_path / "one", *flags, "--gradient_accumulation_steps", "2")
    said = run.on_two_processes(tmp_path / "two", *flags)
    assert said.count("aspect-ratio buckets") == 1
    assert relative_difference(tmp_path / "two", tmp_path / "one") < 1e-6


def test_images_of_one_bucket_train_as_without_buckets(run, images, tmp_path):
    """The bucket is the square: 20 x 16 pixels are nearer to it than to 8 x 24."""
    run(tmp_path / "with", *SMALL, "--random_flip")
    run(tmp_path / "without", "--random_flip")
    assert result_bytes(tmp_path / "with") == result_bytes(tmp_path / "without")


def test_the_validation_loss_does_not_depend_on_the_batches(run, shapes, tmp_path):
    flags = [*SMALL, "--train_data_dir", shapes, "--validation_split", "0.6", "--validation_steps", "1"]
    flags += ["--learning_rate", "0", "--max_train_steps", "1", "--report_to", "tensorboard"]
    for size in (1, 4):
        run(tmp_path / str(size), *flags, "--train_batch_size", size)
    one, four = (logged(tmp_path / size, "val_loss")[1] for size in "14")
    assert one == pytest.approx(four, rel=1e-6)


@pytest.mark.parametrize("script", [train_text_to_image_sdxl, train_text_to_image_lora_sdxl])
def test_time_ids_name_the_image_the_corner_and_the_bucket(script, run_sdxl, tmp_path):
    """Each image holds its own coordinates as colours, so that what was cut can be read off and compared."""
    sizes = {(60, 20): [8, 24], (20, 60): [24, 8], (33, 33): [16, 16], (50, 21): [8, 24]}
    for index, (width, height) in enumerate(sizes):
        across, down = np.meshgrid(np.arange(width), np.arange(height))
        image = Image.fromarray(np.stack([across, down, 0 * across], -1).astype(np.uint8))
        image.save(tmp_path / f"{index}.png")
        (tmp_path / f"{index}.txt").write_text("a handwritten one")
    flags = [*SMALL, "--train_data_dir", tmp_path, "--random_flip"]
    rows, sample = prepared(script, run_sdxl, tmp_path / "out", *flags)
    for index, ((width, height), target) in enumerate(sizes.items()):
        for epoch in range(6):
            got = sample(epoch, index)
            first_height, first_width, top, left, *told = map(int, got["time_ids"])
            assert (first_height, first_width) == (height, width) and told == target
            resized = image_ops.resize(rows.image(index), tuple(target[::-1]), "lanczos")
            mirrored = SampleDraws(7, epoch, index)("flip").random() < 0.5
            uncropped = image_ops.to_array(resized)[:, :, :: -1 if mirrored else 1]
            cut = uncropped[:, top : top + target[0], left : left + target[1]]
            assert np.array_equal(got["pixels"], cut)
            assert got["noise"].shape == got["latent_noise"].shape == (4, target[0] // 2, target[1] // 2)


def spoil(path):
    """Cut an image's pixels off, which its header does not show."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])


@pytest.mark.parametrize("name", ["run", "run_sdxl", "run_decoder"])
def test_another_image_stands_in_at_the_size_of_the_place(request, name, shapes, tmp_path, capsys):
    """Also where its own is another one: or the batch could not be stacked. And a cache holds it at that size."""
    run, folder = request.getfixturevalue(name), tmp_path / "spoiled"
    shutil.copytree(shapes, folder)
    for index in (1, 2, 9):  # tall; two squares, after which a wide one and, from the beginning, a wide one come
        spoil(folder / f"{index}.png")
    crops = [] if name == "run_decoder" else ["--center_crop"]
    flags = [*SMALL, *crops, "--train_data_dir", folder, "--on_bad_sample", "skip", "--random_flip"]
    flags += ["--validation_split", "0.2", "--validation_steps", "3"]
    run(tmp_path / "plain", *flags)
    assert "3 images could not be used" in capsys.readouterr().err
    run(tmp_path / "cached", *flags, "--cache_latents", "--encoding_cache_dir", tmp_path / "cache")
    assert result_bytes(tmp_path / "cached") == result_bytes(tmp_path / "plain")


def test_cached_crops_are_of_the_bucket(run, shapes, tmp_path):
    """An image that fits its bucket leaves a crop no room and is kept once, another one as often as is asked."""
    flags = [*SMALL, "--train_data_dir", shapes, "--cache_latents", "--cached_crops", "3"]
    assert run(tmp_path / "out", *flags, "--encoding_cache_dir", tmp_path / "cache") == 0
    store = next((tmp_path / "cache").iterdir())
    keys = [
        key
        for shard in store.glob("*.safetensors")
        for key in json.loads(safe_open(shard, "np").metadata()["about"])["keys"]
    ]
    assert len(keys) == sum(1 if size in [(20, 20), (30, 30)] else 3 for size in SHOWN)
    assert {key.split("crop ")[1][2:] for key in keys} == {"16 x 16", "8 x 24", "24 x 8"}


def test_check_data_prints_the_table_that_a_run_prints(run, shapes, tmp_path, capsys):
    run(tmp_path / "out", *SMALL, "--train_data_dir", shapes, "--max_train_steps", "1")
    said = capsys.readouterr().err
    assert run(tmp_path / "none", *SMALL, "--train_data_dir", shapes, "--check_data") == 0
    report = capsys.readouterr().out
    at = report.index("aspect-ratio buckets")
    table = report[at : report.index(" are used", at)]
    assert table in said and "16 x 16" in table
