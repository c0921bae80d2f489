"""With aspect-ratio buckets pictures are trained at shapes near their own: a batch has one, an epoch all pictures."""

import io
import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import picture

from training_utils import buckets, data, draws
from training_utils.data import Position, Updates

quick = settings(max_examples=150, deadline=None, derandomize=True, database=None)

# --- which updates take which samples --------------------------------------------------------------------------------

SHAPES = st.lists(st.integers(0, 4), min_size=1, max_size=40).map(np.array)
SPLITS = st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 3))  # batch size, accumulation, processes


def epoch_of(updates, position):
    """The shares of each update from a position to the end of its epoch, and the positions before them."""
    shares, positions, epoch = [], [], position.epoch
    while position.epoch == epoch:
        shares.append(updates.shares(position))
        positions.append(position)
        position = updates.after(position)
    assert position == Position(epoch + 1)
    return shares, positions


@quick
@given(SHAPES, SPLITS, st.integers(0, 3))
def test_an_epoch_visits_each_sample_once_in_batches_of_one_shape(shapes, split, epoch):
    updates = Updates(len(shapes), 5, *split, shapes=shapes)
    batch_size, accumulation, world = split
    shares, _ = epoch_of(updates, Position(epoch))
    assert len(shares) == updates.per_epoch
    visited = np.concatenate([share for update in shares for share in update])
    assert sorted(visited) == list(range(len(shapes)))
    for update in shares:
        assert len(update) == accumulation * world and len(update[0])
        for share in update:
            assert len(share) <= batch_size and len(set(shapes[share])) <= 1
    streams = [updates.batches(Position(epoch), rank) for rank in range(world)]
    for update in shares:
        count = sum(map(len, update))
        for at, share in enumerate(update):
            batch = next(streams[at % world])  # every process makes the same number of micro-steps
            if len(share):
                assert batch == [(epoch, index, len(update) / count) for index in share]
            else:
                assert batch == [(epoch, update[0][0], 0.0)]


@quick
@given(SHAPES, SPLITS, SPLITS)
def test_a_run_continues_at_every_position(shapes, split, other):
    """With the same split it does the same; with more processes or accumulation, the same micro-batches."""
    updates = Updates(len(shapes), 5, *split, shapes=shapes)
    shares, positions = epoch_of(updates, Position(1))
    on_others = Updates(len(shapes), 5, split[0], *other[1:], shapes=shapes)
    for at, position in enumerate(positions):
        again, _ = epoch_of(updates, position)
        assert flat(again) == flat(shares[at:])
        rest, _ = epoch_of(on_others, position)
        if updates.shape is not None:
            assert flat(rest) == flat(shares[at:])


def flat(updates):
    return [share.tolist() for update in updates for share in update if len(share)]


@quick
@given(SHAPES, SPLITS, SPLITS, st.integers(0, 39))
def test_another_batch_size_visits_the_rest_of_its_own_order(shapes, split, other, sample):
    updates = Updates(len(shapes), 5, *other, shapes=shapes)
    start = Position(0, sample).within(len(shapes))
    shares, _ = epoch_of(updates, start)
    visited = np.concatenate([share for update in shares for share in update])
    assert len(set(visited)) == len(visited) == len(shapes) - start.sample
    assert all(len(set(shapes[share])) <= 1 for update in shares for share in update)


@quick
@given(st.integers(1, 30), SPLITS, st.integers(0, 30))
def test_one_shape_is_as_none(size, split, sample):
    plain, shaped = Updates(size, 5, *split), Updates(size, 5, *split, shapes=np.full((size, 2), 512))
    position = Position(2, sample)
    for _ in range(5):
        assert flat([plain.shares(position)]) == flat([shaped.shares(position)])
        assert plain.after(position) == shaped.after(position)
        position = plain.after(position)
    assert plain.per_epoch == shaped.per_epoch


def test_the_plan_with_shapes_is_frozen():
    """Like the draws: a change would alter runs that are resumed."""
    shares, _ = epoch_of(Updates(9, 5, 2, 2, shapes=np.array([0, 1, 1, 0, 1, 2, 0, 0, 1])), Position())
    assert flat(shares) == [[7, 3], [8, 4], [5], [2, 1], [6, 0]]


def test_micro_batches_are_others_in_every_epoch():
    updates = Updates(40, 5, 4, shapes=np.arange(40) % 2)
    first, second = (sorted(map(sorted, flat(epoch_of(updates, Position(epoch))[0]))) for epoch in (0, 1))
    assert first != second


@quick
@given(SHAPES, st.integers(1, 5), st.integers(1, 3))
def test_held_out_samples_come_once_in_batches_of_one_shape(shapes, batch_size, world):
    batches = [
        batch for rank in range(world) for batch in data.held_out_samples(len(shapes), batch_size, rank, world, shapes)
    ]
    assert sorted(key for batch in batches for key in batch) == [(draws.HELD_OUT, i, 1.0) for i in range(len(shapes))]
    assert all(len({shapes[index] for _, index, _ in batch}) == 1 and len(batch) <= batch_size for batch in batches)


# --- which bucket a picture belongs to -------------------------------------------------------------------------------


def test_the_usual_buckets():
    """Those of sd-scripts for 512 pixels, from 256 to 1024 in steps of 64."""
    tall = [*((256, height) for height in (1024, 960, 896, 832)), (320, 768), (320, 704), (384, 640), (448, 576)]
    wide = [(height, width) for width, height in reversed(tall)]
    assert buckets.make(512, 256, 1024, 64).tolist() == [list(size) for size in [*tall, (512, 512), *wide]]


@quick
@given(st.integers(1, 40), st.integers(1, 12), st.floats(0.3, 1), st.floats(1, 4))
def test_buckets_are_as_large_as_the_area_allows(eights, steps, low, high):
    resolution, step = 8 * eights, 8 * steps
    smallest, largest = math.ceil(low * resolution), int(high * resolution)
    sizes = [tuple(size) for size in buckets.make(resolution, smallest, largest, step).tolist()]
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
        assert sizes, "a picture would have no bucket"


@quick
@given(st.lists(st.tuples(st.integers(1, 4000), st.integers(1, 4000)), min_size=1, max_size=20))
def test_a_picture_goes_to_the_nearest_ratio(sizes):
    choice = buckets.make(512, 256, 1024, 64)
    for (width, height), number in zip(sizes, buckets.nearest(np.array(sizes), choice)):
        distances = np.abs(np.log(choice[:, 0] / choice[:, 1]) - np.log(width / height))
        assert distances[number] <= distances.min() + 1e-12


def test_sizes_are_those_of_the_upright_picture(tmp_path):
    """From the header; of a PNG also where its EXIF tags stand there, and nothing is decoded."""
    paths = []
    for kind in ("jpg", "png", "webp", "tiff"):
        for turn in (1, 3, 6, 8):
            tags = Image.Exif()
            tags[0x0112] = turn
            paths.append(tmp_path / f"{turn}.{kind}")
            picture(0, (30, 20)).save(paths[-1], exif=tags)
    for path in paths:
        with Image.open(path) as opened:
            expected = data.upright_rgb(opened).size
            assert expected == ((20, 30) if path.stem in "68" else (30, 20))
        with Image.open(path) as opened:
            assert data.upright_size(opened) == expected, path.name


def rows_of(folder, sizes, **broken):
    """The Rows of a table of pictures of these sizes; `broken` are bytes in place of a picture: p3=b"..."."""
    import datasets

    cells = []
    for index, size in enumerate(sizes):
        content = io.BytesIO()
        picture(index, size).save(content, "png")
        cells.append({"bytes": broken.get(f"p{index}", content.getvalue()), "path": f"{index}.png"})
    table = datasets.Dataset.from_dict({"image": cells, "text": [str(at) for at in range(len(cells))]})
    table.to_parquet(folder / "train.parquet")
    return data.load_rows(dataset_name=str(folder), cache_dir=str(folder / "cache"))


LIMITS = {"resolution": 64, "smallest": 32, "largest": 128, "step": 16}


def test_the_report_tells_of_pictures_that_no_bucket_suits(tmp_path, capsys):
    sizes = [(64, 64), (128, 32), (600, 60), (20, 20), (96, 54), (90, 90)]
    rows = rows_of(tmp_path, sizes, p5=b"no picture")
    assert data.picture_sizes(rows).tolist() == [*map(list, sizes[:5]), [0, 0]]
    chosen, lines, remarks = buckets.assign(rows, **LIMITS)
    assert chosen.tolist() == [[64, 64], [128, 32], [128, 32], [64, 64], [80, 48], [64, 64]]
    table = [line.split() for line in lines[1:]]
    assert table[1:3] == [["64", "x", "64", "2", "0.0", "%"], ["80", "x", "48", "1", "6.2", "%"]]
    assert table[4][:3] == ["in", "all", "5"]  # what cannot be opened is not counted
    assert "lose more than 25 %" in remarks[0][0] and remarks[0][1] == ["2.png"]
    assert "enlarged more than 2 times" in remarks[1][0] and remarks[1][1] == ["3.png"]
    rows.sizes = buckets.training_sizes(rows, 64, LIMITS)
    said = capsys.readouterr().err
    assert "warning: 1 pictures lose more than 25 %, since no bucket is near their shape: 2.png" in said
    assert (
        rows.select([4, 0]).sizes.tolist() == rows.without([1, 2, 3, 5]).sizes.tolist()[::-1] == [[80, 48], [64, 64]]
    )
