"""However pictures and captions are stored, training on them is the same to the bit as on a plain folder of them."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import result_bytes
from tiny import WORDS, write_pictures

from training_utils import data
from training_utils.reporting import UserError

FEW = ["--max_train_steps", "3", "--random_flip", "--caption_dropout", "0.3"]
CAPTIONS = [f"a handwritten {word}" for word in WORDS]


def rows_of(folder, **options):
    rows = data.load_rows(folder=folder, **options)
    data.check(rows)
    return rows


def captions_of(rows):
    return [rows.captions(index) for index in range(len(rows))]


def complaint(folder, **options):
    """The sentence with which a data set is refused."""
    with pytest.raises(UserError) as caught:
        rows_of(folder, **options)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def plain(run, tmp_path_factory):
    """The weights after training on the ten pictures as a folder with metadata.jsonl."""
    out = tmp_path_factory.mktemp("plain")
    run(out, *FEW)
    return result_bytes(out)


def copied(pictures, folder):
    """The ten pictures in a folder of their own, without captions."""
    shutil.copytree(pictures, folder)
    (folder / "metadata.jsonl").unlink()
    return folder


def write_parquet(path, **columns):
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


# --- metadata.parquet ------------------------------------------------------------------------------------------------


def test_metadata_parquet(run, pictures, plain, tmp_path):
    folder = copied(pictures, tmp_path / "set")
    write_parquet(folder / "metadata.parquet", file_name=[f"{i}.png" for i in range(10)], text=CAPTIONS)
    run(tmp_path / "out", *FEW, "--train_data_dir", folder)
    assert result_bytes(tmp_path / "out") == plain


def test_metadata_parquet_may_hold_lists(tmp_path):
    write_pictures(tmp_path, 2)
    (tmp_path / "metadata.jsonl").unlink()
    write_parquet(tmp_path / "metadata.parquet", file_name=["0.png", "1.png"], text=[["a", "b"], ["c"]])
    assert captions_of(rows_of(tmp_path)) == [["a", "b"], ["c"]]


BAD_METADATA = {
    "a null": ({"file_name": ["0.png", "1.png"], "text": ["x", None]}, "1.png (None)"),
    "numbers": ({"file_name": ["0.png", "1.png"], "text": [1, 2]}, "0.png (1)"),
    "no file_name": ({"picture": ["0.png"], "text": ["x"]}, 'metadata.parquet row 0 has no "file_name"; each row'),
    "no caption": ({"file_name": ["0.png", "1.png"], "title": ["x", "y"]}, "row 0 has no caption column 'text'"),
    "absent": ({"file_name": ["7.png"], "text": ["x"]}, "7.png"),
    "no row": ({"file_name": [], "text": []}, "metadata.parquet names no picture; each row"),
}


@pytest.mark.parametrize("what", BAD_METADATA)
def test_bad_metadata_parquet(tmp_path, what):
    columns, expected = BAD_METADATA[what]
    write_pictures(tmp_path, 2)
    (tmp_path / "metadata.jsonl").unlink()
    write_parquet(tmp_path / "metadata.parquet", **columns)
    assert expected in complaint(tmp_path)


def test_metadata_parquet_that_is_none(tmp_path):
    write_pictures(tmp_path, 2)
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "metadata.parquet").write_bytes(b"PAR1 and no more")
    assert "metadata.parquet cannot be read as parquet" in complaint(tmp_path)
