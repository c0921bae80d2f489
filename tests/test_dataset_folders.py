"""Folders as other programs leave them, and folders of any name: each is read, or a sentence says what to do."""

import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import yaml
from conftest import result_bytes
from test_formats import FEW, captions_of, complaint, png_bytes, rows_of, write_parquet, write_tar
from tiny import WORDS, write_images

from training_utils.data import wildcards

STREAM = {"shuffle_buffer": 4}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder of downloads."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("HF_HOME", str(folder))
    return {"cache_dir": str(folder)}


def tables(folder, count, word):
    cells = [{"bytes": png_bytes(index), "path": "image.png"} for index in range(count)]
    write_parquet(folder / "train-0.parquet", image=cells, text=[f"{word} {index}" for index in range(count)])
    return folder


# --- names that are patterns -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["data[1]", "data?", "data*", "da[t]a [x]", "data::1", "[[]", "data]", "data%201"])
def test_a_folder_of_tables_is_no_pattern(tmp_path, cache, name):
    """And not the URL of a file inside another."""
    folder = tables(tmp_path / name, 2, "mine")
    if name != "data]":
        tables(tmp_path / "data1", 3, "another's")
    expected = [["mine 0"], ["mine 1"]]
    for options in (cache, cache | STREAM):
        assert captions_of(rows_of(str(folder), **options)) == expected
        assert captions_of(rows_of(None, dataset_name=str(folder), **options)) == expected
    assert captions_of(rows_of(f"{name}", dataset_name=str(tmp_path), **cache)) == expected
    assert captions_of(rows_of(str(folder), dataset_name="parquet", **cache)) == expected


@pytest.mark.parametrize("name", ["set[1]", "set*", "set::1"])
def test_a_folder_of_images_or_shards_is_no_pattern(tmp_path, cache, name):
    write_images(tmp_path / name / "images", 2)
    write_tar(tmp_path / name / "shards" / "a[0]*.tar", [("0[x].png", png_bytes(0)), ("0[x].txt", b"in a shard")])
    assert len(rows_of(tmp_path / name / "images")) == 2
    for options in (cache, cache | STREAM):
        assert captions_of(rows_of(str(tmp_path / name / "shards"), **options)) == [["in a shard"]]


def test_what_changes_in_such_a_folder_is_seen(tmp_path, cache, capsys):
    folder = tmp_path / "set[1]"
    tables(folder / "data", 2, "not trained")
    (folder / "data" / "train-0.parquet").rename(folder / "data" / "test-0.parquet")
    tables(folder / "data" / "sub[2]", 1, "sub")
    tables(folder / "data", 2, "first")
    assert captions_of(rows_of(folder, **cache)) == [["sub 0"], ["first 0"], ["first 1"]]
    assert f"not of its split 'train', and are not read: {folder}/data/test-0.parquet" in capsys.readouterr().err
    (folder / "data" / "sub[2]" / "train-0.parquet").unlink()
    tables(folder / "data", 1, "second")
    assert captions_of(rows_of(folder, **cache)) == [["second 0"]]


def test_ordinary_folders_are_read_as_they_are(tmp_path, cache):
    """What the datasets library keeps of them is found again."""
    folder = tables(tmp_path / "set]", 1, "x")
    assert wildcards.without_wildcards(str(folder), None, cache["cache_dir"]) == (str(folder), None)
    assert wildcards.without_wildcards("some/dataset", "data", None) == ("some/dataset", "data")


def test_a_folder_of_downloads_that_is_a_pattern_too(tmp_path):
    folder = tables(tmp_path / "set[1]", 1, "x")
    sentence = complaint(folder, cache_dir=str(tmp_path / "cache[1]"))
    assert (
        f"{folder} and the folder of downloads {tmp_path}/cache[1] both have *, ?, [ or :: in their path" in sentence
    )
    (tmp_path / "file").touch()
    sentence = complaint(folder, cache_dir=str(tmp_path / "file"))
    assert "links to its files cannot be made in" in sentence and "rename the folder" in sentence


# --- save_to_disk ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dataset(images):
    paths = [f"{images}/{index}.png" for index in range(10)]
    captions = [f"a handwritten {word}" for word in WORDS]
    features = datasets.Features(image=datasets.Image(), text=datasets.Value("string"))
    return datasets.Dataset.from_dict({"image": paths, "text": captions}, features=features)


def test_a_saved_dataset_is_trained_on_as_the_folder_of_its_images(run, images, dataset, tmp_path):
    dataset.save_to_disk(tmp_path / "set", num_shards=3)
    run(tmp_path / "folder", *FEW)
    run(tmp_path / "saved", *FEW, "--train_data_dir", tmp_path / "set")
    run(tmp_path / "named", *FEW, "--dataset_name", tmp_path / "set")
    assert result_bytes(tmp_path / "folder") == result_bytes(tmp_path / "saved") == result_bytes(tmp_path / "named")


def test_saved_datasets_of_every_kind(dataset, tmp_path, cache):
    last = [["a handwritten nine"], ["a handwritten seven"]]
    picked = dataset.select([9, 7])
    picked.save_to_disk(tmp_path / "picked")
    picked.with_format("torch").save_to_disk(tmp_path / "tensors")
    datasets.DatasetDict(train=picked, test=dataset).save_to_disk(tmp_path / "splits")
    picked.save_to_disk(tmp_path / "set[1]")
    (tmp_path / "set[1]").rename(tmp_path / "set[1]::")
    for name in ("picked", "tensors", "splits", "set[1]::"):
        assert captions_of(rows_of(str(tmp_path / name), **cache)) == last
        assert captions_of(rows_of(None, dataset_name=str(tmp_path / name), **cache)) == last
    assert len(rows_of("test", dataset_name=str(tmp_path / "splits"), **cache)) == 10
    sources = [{"path": "picked", "repeats": 2}, {"dataset_name": str(tmp_path / "splits")}]
    (tmp_path / "sources.yaml").write_text(yaml.dump(sources))
    assert captions_of(rows_of(None, config=str(tmp_path / "sources.yaml"), **cache)) == 2 * last


def test_saved_datasets_that_cannot_be_used(dataset, tmp_path, cache):
    dataset.save_to_disk(tmp_path / "outer" / "set")
    sentence = complaint(tmp_path / "outer")
    assert "give the folder that save_to_disk wrote, with its state.json or dataset_dict.json" in sentence
    saved = tmp_path / "outer" / "set"
    for options in ({"folder": str(saved)}, {"folder": None, "dataset_name": str(saved)}):
        assert "was written by save_to_disk and is read in place" in complaint(**options, **STREAM, **cache)
    datasets.DatasetDict(test=dataset).save_to_disk(tmp_path / "splits")
    assert "has no split 'train', only test" in complaint(tmp_path / "splits")
    (saved / "state.json").write_text("{")
    assert f"--train_data_dir {saved} cannot be loaded: " in complaint(saved)


# --- img2dataset -----------------------------------------------------------------------------------------------------


def img2dataset(folder, shards=2):
    """The folder that img2dataset writes: for each shard a table of what it downloaded, and its statistics."""
    for number in range(shards):
        members, facts = [], []
        for key in (f"{number:05}{at:04}" for at in range(3)):
            fact = {"key": key, "caption": f"caption {key}", "url": f"http://x/{key}", "status": "success"}
            facts.append(fact)
            contents = {"jpg": png_bytes(int(key)), "json": json.dumps(fact).encode(), "txt": fact["caption"].encode()}
            members += [(f"{key}.{ending}", content) for ending, content in contents.items()]
        write_tar(folder / f"{number:05}.tar", members)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(facts), folder / f"{number:05}.parquet")
        (folder / f"{number:05}_stats.json").write_text("{}")
    return folder


def test_the_folder_of_img2dataset(tmp_path, cache, capsys):
    folder = img2dataset(tmp_path / "set")
    expected = [[f"caption {number:05}{at:04}"] for number in range(2) for at in range(3)]
    for options in (cache, cache | STREAM, cache | {"caption_column": "caption"}):
        assert captions_of(rows_of(folder, **options)) == expected
    assert "warning" not in capsys.readouterr().err
    # A shard without a single image is often removed, and its table stays.
    (folder / "00001.tar").unlink()
    assert captions_of(rows_of(folder)) == expected[:3]


def test_tables_that_do_not_belong_to_shards_are_still_refused(tmp_path):
    folder = img2dataset(tmp_path / "set")
    tables(folder, 2, "mine")
    assert "holds .tar shards and .parquet tables; keep them in two folders" in complaint(folder)
