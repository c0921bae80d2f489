"""A cell of a table is read where it lies: the same as the datasets library gives it, at a cost that does not grow."""

import pickle
import time

import datasets
import numpy as np
import pyarrow
import pytest
from test_formats import png_bytes
from tiny import image

from training_utils.data.arrow_column import ArrowColumn
from training_utils.data.captions import warn_of_long_captions
from training_utils.data.dataset import ImageDataset

IMAGE = datasets.Image(decode=False)


def table_of(rows, chunk=100):
    """A table of images and captions in chunks of so many rows, as the datasets library keeps images."""
    cell = pyarrow.array([{"bytes": b"x" * 100, "path": None}] * chunk)
    parts = []
    for begin in range(0, rows, chunk):
        captions = pyarrow.array([f"caption {number}" for number in range(begin, begin + chunk)])
        parts.append(pyarrow.table({"image": cell, "text": captions}))
    return datasets.Dataset(pyarrow.concat_tables(parts)).cast_column("image", IMAGE)


def seconds_a_row(dataset, count=300):
    """The shortest time in which a caption and an image are read, of several attempts."""
    indices = np.random.default_rng(0).integers(len(dataset), size=count).tolist()
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        for index in indices:
            dataset.captions(index)
            dataset.stored_image(index)
            dataset.name(index)
        times.append((time.perf_counter() - begin) / count)
    return min(times)


def test_a_row_costs_the_same_in_a_large_table():
    """With a lazy column of the datasets library: 1 ms of 10,000 rows and 20 of a million."""
    small, large = (ImageDataset(table_of(rows), "image", "text") for rows in (2_000, 200_000))
    assert seconds_a_row(large) < 5 * seconds_a_row(small)
    assert seconds_a_row(large) < 0.001
    assert seconds_a_row(large.select(np.arange(len(large))[::-1])) < 0.001


def test_choosing_rows_copies_no_table():
    dataset = ImageDataset(table_of(20_000), "image", "text")
    chosen = dataset.select([7, 19_999, 7]).drop([0])
    assert [chosen.captions(at) for at in range(2)] == [["caption 19999"], ["caption 7"]]
    assert chosen.table is dataset.table and chosen.name(0) == "row 19999"


CAPTIONS = {
    "strings": (["a", None, "b", ""], datasets.Value("string")),
    "long strings": (["a", None, "b", ""], datasets.Value("large_string")),
    "lists": ([["a", "b"], [], None, ["c"]], datasets.List(datasets.Value("string"))),
    "a fixed number": ([["a", "b"], ["c", "d"], ["e", "f"], ["g", "h"]], datasets.List(datasets.Value("string"), 2)),
    "classes": ([0, 1, None, 1], datasets.ClassLabel(names=["a", "b"])),
    "numbers": ([1.5, None, 2.0, 3.0], datasets.Value("float32")),
    "structs": ([{"a": "x"}, None, {"a": None}, {"a": "y"}], {"a": datasets.Value("string")}),
    "JSON": (['"a"', '["b", "c"]', None, '{"d": 1}'], datasets.Json()),
}


@pytest.mark.parametrize("what", CAPTIONS)
@pytest.mark.parametrize("how", ["all", "picked", "joined"])
def test_cells_are_those_of_the_library(what, how):
    values, feature = CAPTIONS[what]
    cells = [{"bytes": png_bytes(at), "path": f"{at}.png"} for at in range(3)] + [None]
    features = datasets.Features(image=IMAGE, text=feature)
    table = datasets.Dataset.from_dict({"image": cells, "text": values}, features=features)
    if how == "picked":
        table = table.select([3, 1, 0])
    if how == "joined":
        table = datasets.concatenate_datasets([table.select([2, 0]), table, table.shuffle(seed=3)])
    for name in ("image", "text"):
        column = ArrowColumn(table, name)
        expected = list(table[name])
        assert list(column) == [column[at] for at in range(len(column))] == expected
        rows = np.arange(len(table))[::-1]
        assert list(ArrowColumn(table, name, rows)) == expected[::-1]
        assert list(pickle.loads(pickle.dumps(ArrowColumn(table, name, rows)))) == expected[::-1]
    images = ArrowColumn(table, "image")
    assert images.is_null().tolist() == [cell is None for cell in table["image"]]


def test_a_table_that_was_shuffled_is_read_in_its_order():
    cells = [
        {"bytes": None, "path": f"{at}.png"} if at % 2 else {"bytes": png_bytes(at), "path": None} for at in (range(6))
    ]
    features = datasets.Features(image=IMAGE, text=datasets.Value("string"))
    table = datasets.Dataset.from_dict({"image": cells, "text": list("abcdef")}, features=features)
    order = [4, 1, 5, 0]
    dataset = ImageDataset(table.select(order), "image", "text").select([1, 0, 2])
    assert [dataset.captions(at) for at in range(3)] == [["b"], ["e"], ["f"]]
    assert dataset.file_indices().tolist() == [0, 2] and list(dataset.raw_captions()) == ["b", "e", "f"]
    assert dataset.image_numbers().tolist() == [1, 0, 2]
    assert np.asarray(dataset.image(1)).tolist() == np.asarray(image(4)).tolist()
    assert [name for name, _ in dataset.stored_images()] == ["row 1: 1.png", "row 0", "row 2: 5.png"]


def test_an_empty_column_and_many_cells_of_one():
    table = table_of(3_000)
    assert list(ArrowColumn(table, "text", np.zeros(0, np.int64))) == []
    assert list(ArrowColumn(table, "text"))[2_999] == "caption 2999"
    rows = np.concatenate([np.arange(1_500), np.arange(5, 2_000, 3)])
    assert list(ArrowColumn(table, "text", rows)) == [f"caption {row}" for row in rows]


def test_a_data_worker_is_not_sent_the_table(tmp_path):
    """A worker that is not a fork gets the path of the table's file, and opens it."""
    path = tmp_path / "table.arrow"
    source = table_of(5_000)
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, source.data.schema) as writer:
        writer.write_table(source.data.table)
    table = datasets.Dataset.from_file(str(path)).cast_column("image", IMAGE)
    dataset = ImageDataset(table, "image", "text").select([4_999, 0])
    sent = pickle.dumps(dataset)
    assert len(sent) < 20_000 < path.stat().st_size / 10
    there = pickle.loads(sent)
    assert [there.captions(at) for at in range(2)] == [["caption 4999"], ["caption 0"]]
    assert there.stored_image(0) == dataset.stored_image(0) and there.name(1) == "row 0"


def test_long_captions_of_a_selected_dataset_are_counted(capsys):
    class Tokenizer:
        model_max_length = 2

        def __call__(self, texts, **_):
            return type("", (), {"input_ids": [text.split() for text in texts]})

    table = datasets.Dataset.from_dict({"image": [None] * 3, "text": ["a b c", "a", "a b c d"]})
    dataset = ImageDataset(table.cast_column("image", IMAGE), "image", "text")
    warn_of_long_captions(dataset.select([1, 2]), Tokenizer())
    assert "1 of 2 captions are longer than 2 tokens" in capsys.readouterr().err
    warn_of_long_captions(dataset, Tokenizer(), most=1)
    assert "1 of the first 1 captions are longer" in capsys.readouterr().err
