"""A message about data names the row or the file, shows no more than the beginning of a cell, and fits on a screen."""

import base64
import json
import unicodedata

import pyarrow
import pytest
from test_formats import captions_of, complaint, png_bytes, rows_of, write_parquet, write_tar
from tiny import image, write_images

from training_utils.base.errors import UserError
from training_utils.cli.options import DataOptions
from training_utils.data import checking, inspection, opening

SCREEN = 80 * 24  # characters
MANY = 3000
PNG = png_bytes(0)
BASE64 = base64.b64encode(PNG * 50).decode()


def said_of(folder, **columns):
    """The sentence about a table, when it is opened or when its images are read."""
    write_parquet(folder / "a.parquet", **columns)
    with pytest.raises(UserError) as caught:
        rows = opening.load_dataset(DataOptions(folder=str(folder), cache_dir=str(folder.parent / "cache")))
        checking.check_dataset(rows)
        for index in range(len(rows)):
            rows.image(index)
    sentence = str(caught.value)
    assert len(sentence) < SCREEN and BASE64[:200] not in sentence and "\n" not in sentence
    return sentence


def struct(content, path):
    return {"bytes": content, "path": path}


BAD_TABLES = {
    "all rows have one name": (
        {"image": [struct(PNG, "image.png"), struct(b"bad", "image.png")], "text": ["a", "b"]},
        "row 1: image.png cannot be read as an image (not an image)",
    ),
    "no captions": (
        {"image": [struct(PNG, "image.png")] * MANY, "text": ["a"] + [None] * (MANY - 1)},
        "row 1: image.png (nothing), row 2: image.png (nothing)",
    ),
    "base64": ({"image": [BASE64] * 3, "text": ["a"] * 3}, "row 0: --image_column image holds 'iVBORw0KGgo"),
    "short base64": (
        {"image": [base64.b64encode(PNG).decode()], "text": ["a"]},
        "which is no path of a file; if it is base64, decode it and store the bytes",
    ),
    "a data URI": ({"image": ["data:image/png;base64,xx"], "text": ["a"]}, "if it is base64, decode it"),
    "URLs": ({"image": ["https://x/y.png"] * 2, "text": ["a"] * 2}, "URLs are not downloaded; img2dataset makes"),
    "some base64": ({"image": ["x.png", *[BASE64] * 99], "text": ["a"] * 100}, "row 0: x.png (No such file"),
    "paths in base64": ({"image": [struct(None, BASE64)] * 99, "text": ["a"] * 99}, "99 files cannot be read"),
    "bytes in base64": ({"image": [BASE64.encode()] * 2, "text": ["a"] * 2}, "row 0 cannot be read as an image"),
    "paths that lead nowhere": ({"image": ["no/0.png"] * MANY, "text": ["a"] * MANY}, "row 0: no/0.png (No such"),
    "a path with a zero byte": ({"image": ["no\0.png"], "text": ["a"]}, "row 0: no\\x00.png"),
    "long captions that are none": (
        {"image": [struct(PNG, None)] * MANY, "text": [{"x": "y" * 10_000}] * MANY},
        "row 0 ({'x': 'yyy",
    ),
    "many columns": ({f"{'x' * 300}{at}": [1] for at in range(400)}, "and 390 more"),
}


@pytest.mark.parametrize("what", BAD_TABLES)
def test_a_table(tmp_path, what):
    columns, expected = BAD_TABLES[what]
    assert expected in said_of(tmp_path / "set", **columns)


BAD_METADATA = {
    "base64 as a name": {"file_name": BASE64[:30_000], "text": "a"},
    "a long caption that is none": {"file_name": "0.png", "text": {"x": "y" * 10_000}},
    "long keys": {"file_name": "0.png"} | {f"{'k' * 1000}{at}": 1 for at in range(50)},
    "a list": ["x" * 10_000],
}


@pytest.mark.parametrize("what", BAD_METADATA)
def test_metadata(tmp_path, what):
    image(0).save(tmp_path / "0.png")
    (tmp_path / "metadata.jsonl").write_text((json.dumps(BAD_METADATA[what]) + "\n") * 300)
    assert len(complaint(tmp_path)) < SCREEN


def test_a_header_of_many_columns(tmp_path):
    image(0).save(tmp_path / "0.png")
    (tmp_path / "metadata.csv").write_text(",".join(f"{'x' * 300}{at}" for at in range(300)) + "\n")
    assert len(complaint(tmp_path)) < SCREEN


def test_a_report_is_cut_too(tmp_path, capsys):
    write_parquet(tmp_path / "set" / "a.parquet", image=["x.png", BASE64], text=["a", "b"])
    options = DataOptions(folder=str(tmp_path / "set"), cache_dir=str(tmp_path / "cache"))
    assert inspection.check_data(options, 16) == 2
    said = capsys.readouterr().out
    assert "row 1: iVBOR" in said and len(said) < SCREEN


def test_a_row_of_a_source_is_named(tmp_path):
    cells = [struct(b"bad", "image.png")]
    write_parquet(tmp_path / "tables" / "a.parquet", image=cells, text=["x"])
    write_images(tmp_path / "images", 2)
    sources = [{"path": "images"}, {"path": "tables"}]
    (tmp_path / "sources.yaml").write_text(json.dumps(sources))
    rows = rows_of(None, config=str(tmp_path / "sources.yaml"), cache_dir=str(tmp_path / "cache"))
    names = [rows.name(index) for index in range(3)]
    assert names == [f"{tmp_path}/images/0.png", f"{tmp_path}/images/1.png", "row 0 of tables: image.png"]


# --- paths in tables -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["data", "."])
def test_paths_lead_from_the_folder_of_the_table(tmp_path, place, monkeypatch):
    """Or from the dataset's folder, or from the working directory, as before."""
    write_images(tmp_path / "images", 2)
    paths = pyarrow.array(["../images/0.png", "../images/1.png", None, str(tmp_path / "images" / "0.png")])
    table = tmp_path / "set" / place / "train-0.parquet"
    write_parquet(table, image=paths, text=list("abcd"))
    options = {"cache_dir": str(tmp_path / "cache")}
    for where in ({"folder": str(tmp_path / "set")}, {"dataset_name": str(tmp_path / "set")}):
        rows = opening.load_dataset(DataOptions(**where, **options))
        assert [rows.image(index).size for index in (0, 1, 3)] == 3 * [(20, 16)]
        assert rows.name(0) == f"row 0: {tmp_path}/images/0.png" and rows.indices_without_image().tolist() == [2]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    rows = opening.load_dataset(DataOptions(folder=str(tmp_path / "set"), **options))
    assert rows.name(0) == "row 0: ../images/0.png" and rows.image(0).size == (20, 16)


# --- names that Unicode can spell in two ways ------------------------------------------------------------------------


def nfc(name):
    return unicodedata.normalize("NFC", name)


def nfd(name):
    return unicodedata.normalize("NFD", name)


NAMES = ["Ö/café", "naïve", "plain"]


def write_metadata(folder, kind, names):
    if kind == "jsonl":
        lines = [json.dumps({"file_name": f"{name}.png", "text": plain}) for name, plain in zip(names, NAMES)]
        (folder / "metadata.jsonl").write_text("\n".join(lines))
    elif kind == "csv":
        lines = [f"{name}.png,{plain}" for name, plain in zip(names, NAMES)]
        (folder / "metadata.csv").write_text("\n".join(["file_name,text", *lines]))
    elif kind == "parquet":
        write_parquet(folder / "metadata.parquet", file_name=[f"{name}.png" for name in names], text=NAMES)
    else:
        for name, plain in zip(names, NAMES):
            text = json.dumps({"text": plain}) if kind == "json" else plain
            (folder / name).parent.mkdir(exist_ok=True)
            # The folder is there, in the other spelling.
            (folder / f"{name}.{kind}").write_text(text)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize(("of_file", "of_metadata"), [(nfc, nfd), (nfd, nfc)])
def test_metadata_in_another_spelling(tmp_path, kind, of_file, of_metadata):
    for index, name in enumerate(NAMES):
        path = tmp_path / f"{of_file(name)}.png"
        path.parent.mkdir(exist_ok=True)
        image(index).save(path)
    write_metadata(tmp_path, kind, [of_metadata(name) for name in NAMES])
    rows = rows_of(tmp_path)
    assert captions_of(rows) == [[name] for name in NAMES]
    assert [rows.name(index) for index in range(3)] == [f"{tmp_path}/{of_file(name)}.png" for name in NAMES]
    assert rows.findings.unnamed == []


@pytest.mark.parametrize("kind", ["txt", "caption", "json"])
@pytest.mark.parametrize(("of_file", "of_caption"), [(nfc, nfd), (nfd, nfc)])
def test_caption_files_in_another_spelling(tmp_path, kind, of_file, of_caption):
    members = []
    for index, name in enumerate(NAMES):
        content = json.dumps({"text": name}) if kind == "json" else name
        members += [(f"{of_file(name)}.png", png_bytes(index)), (f"{of_caption(name)}.{kind}", content.encode())]
    write_tar(tmp_path / "shards" / "0.tar", members)
    for name, content in members:
        path = tmp_path / "folder" / name.replace("O\u0308", "Ö")
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(content)
    expected = [[name] for name in NAMES]
    options = {"cache_dir": str(tmp_path / "cache"), "shuffle_buffer": 2}
    assert captions_of(rows_of(tmp_path / "shards")) == expected
    assert captions_of(rows_of(str(tmp_path / "shards"), **options)) == expected
    assert sorted(captions_of(rows_of(tmp_path / "folder"))) == sorted(expected)


def test_the_same_spelling_comes_first(tmp_path):
    """Where both are there, each has its own."""
    members = []
    for spelling in (nfc, nfd):
        name = spelling("é")
        members += [(f"{name}.png", PNG), (f"{name}.txt", spelling.__name__.encode())]
    write_tar(tmp_path / "shards" / "0.tar", members)
    assert captions_of(rows_of(tmp_path / "shards")) == [["nfc"], ["nfd"]]
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, content in members:
        (folder / name).write_bytes(content)
    assert sorted(captions_of(rows_of(folder))) == [["nfc"], ["nfd"]]
    entries = [{"file_name": f"{spelling('é')}.png", "text": spelling.__name__} for spelling in (nfc, nfd)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, entries)))
    rows = rows_of(folder)
    assert [rows.name(0), rows.name(1)] == [f"{folder}/{nfc('é')}.png", f"{folder}/{nfd('é')}.png"]


def test_an_image_that_is_there_in_no_spelling(tmp_path):
    image(0).save(tmp_path / "0.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "é/ü.png", "text": "x"}))
    assert f"1 images named in the metadata do not exist: {tmp_path}/é/ü.png" in complaint(tmp_path)
