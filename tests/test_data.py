"""Every dataset that can be read is read right; every one that cannot gets a sentence that names what to fix."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from conftest import result_bytes
from PIL import Image
from tiny import image, png, write_images

from training_utils.base.draws import SampleDraws
from training_utils.base.errors import UserError
from training_utils.cli.options import DataOptions
from training_utils.data import checking, image_ops, opening, selection
from training_utils.data.captions import choose_caption, warn_of_long_captions


def folder_with(tmp_path, lines, count=3):
    """Images 0.png, 1.png, ... and a metadata.jsonl of these lines (dicts or raw text)."""
    write_images(tmp_path, count)
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    (tmp_path / "metadata.jsonl").write_text(text)
    return tmp_path


def rows_of(folder, **options):
    rows = opening.load_dataset(DataOptions(folder=folder, **options))
    checking.check_dataset(rows)
    return rows


def entry(index, text="a caption"):
    return {"file_name": f"{index}.png", "text": text}


BAD_METADATA = {
    "null caption": ([entry(0), entry(1, None), entry(2)], ["1.png (nothing)", "give each image a caption"]),
    "number": ([entry(0, 3)], ["0.png (3)"]),
    "empty list": ([entry(0, [])], ["0.png (an empty list)"]),
    "list with null": ([entry(0, ["a", None])], ["0.png (['a', None])"]),
    "not JSON": ([entry(0), '{"file_name": '], ["metadata.jsonl line 2 is not JSON"]),
    "no file_name": ([entry(0), {"text": "x"}], ['metadata.jsonl line 2 has no "file_name"']),
    "no caption": ([{"file_name": "0.png", "title": "x"}], ["line 1 has no caption column 'text'", "it has title"]),
    "absent images": ([entry(0), entry(7), entry(8)], ["2 images named", "7.png", "8.png"]),
    "no line": ([], ["metadata.jsonl names no image"]),
    "half a character": ([r'{"file_name": "0.png", "text": "\ud800"}'], ["0.png ('\\ud800')"]),
    "name with a zero byte": ([r'{"file_name": "0\u0000.png", "text": "x"}'], ["1 images named"]),
    "brackets without end": (["[" * 100_000], ["metadata.jsonl line 1"]),
}


@pytest.mark.parametrize("what", BAD_METADATA)
def test_bad_metadata(tmp_path, what):
    lines, expected = BAD_METADATA[what]
    with pytest.raises(UserError) as caught:
        rows_of(folder_with(tmp_path, lines))
    assert caught.value.exit_code == 2
    for part in expected:
        assert part in str(caught.value)


def test_no_images(tmp_path):
    with pytest.raises(UserError, match="holds no images"):
        rows_of(tmp_path)


def test_no_metadata(tmp_path):
    image(0).save(tmp_path / "0.png")
    with pytest.raises(UserError, match="has no captions: write a metadata.jsonl with lines like"):
        rows_of(tmp_path)


def test_metadata_that_is_not_utf8(tmp_path):
    write_images(tmp_path, 1)
    (tmp_path / "metadata.jsonl").write_bytes('{"file_name": "0.png", "text": "é"}'.encode("latin-1"))
    with pytest.raises(UserError, match="metadata.jsonl is not UTF-8 text"):
        rows_of(tmp_path)


@pytest.mark.parametrize("name", ["metadata.csv", "0.txt"])
def test_other_captions_that_are_not_utf8(tmp_path, name):
    write_images(tmp_path, 1)
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / name).write_bytes("file_name,text\n0.png,é".encode("latin-1"))
    with pytest.raises(UserError, match=f"{name} is not UTF-8 text"):
        rows_of(tmp_path)


BAD_CSV = {
    "file_name,title\n0.png,x\n": "metadata.csv line 2 has no caption column 'text' (--caption_column); it has title",
    "file,text\n0.png,x\n": 'metadata.csv has no column "file_name", which names the images, only file, text',
    "file_name,text\n0.png\n": "0.png (nothing)",  # the line ends early
    "file_name;text\n0.png;x\n": "only file_name;text; columns are to be separated by commas",
    'file_name,text\n0.png,"x\n1.png,y\n': "metadata.csv is not CSV after line 1: unexpected end of data",
    f'file_name,text\n0.png,"{"x" * 200_000}"\n': "is not CSV after line 1: field larger than field limit",
}


@pytest.mark.parametrize("text", BAD_CSV, ids=range(len(BAD_CSV)))
def test_a_csv_where_something_is_missing(tmp_path, text):
    write_images(tmp_path, 1)
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "metadata.csv").write_text(text)
    with pytest.raises(UserError) as caught:
        rows_of(tmp_path)
    assert BAD_CSV[text] in str(caught.value)


def test_paths_as_windows_writes_them(tmp_path):
    (tmp_path / "more").mkdir()
    folder_with(tmp_path, [{"file_name": ".\\0.png", "text": "x"}, {"file_name": "more\\1.png", "text": "y"}])
    os.rename(tmp_path / "1.png", tmp_path / "more" / "1.png")
    rows = rows_of(tmp_path)
    assert [rows.name(index) for index in range(2)] == [str(tmp_path / "0.png"), str(tmp_path / "more" / "1.png")]


def test_what_is_passed_over_or_read_twice_is_said(tmp_path, capsys):
    folder_with(tmp_path, [entry(0), entry(1)], count=2)
    (tmp_path / "photo.PSD").touch()
    (tmp_path / "metadata.csv").write_text("file_name,text\n0.png,again\n")
    (tmp_path / ".Trash").mkdir()
    shutil.copy(tmp_path / "metadata.jsonl", tmp_path / ".Trash")
    assert len(rows_of(tmp_path)) == 3
    said = capsys.readouterr().err
    assert f"1 images of an unsupported kind are skipped: {tmp_path}/photo.PSD; convert them to PNG" in said
    assert f"1 folders that are hidden or belong to another program are skipped: {tmp_path}/.Trash" in said
    assert f"{tmp_path} holds metadata.jsonl and metadata.csv, and both are read" in said


def test_links_are_followed_and_what_cannot_be_reached_is_said(tmp_path, capsys, monkeypatch):
    write_images(tmp_path / "elsewhere", 3)
    (tmp_path / "elsewhere" / "metadata.jsonl").unlink()
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "gone.png").symlink_to(tmp_path / "unmounted.png")
    (tmp_path / "set" / "closed").mkdir()
    real = os.scandir

    def scandir(place):
        if str(place).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(place))
        return real(place)

    monkeypatch.setattr(os, "scandir", scandir)
    rows = rows_of(tmp_path / "set", caption_column=None)
    assert sorted(rows.name(at) for at in range(3)) == [f"{tmp_path}/elsewhere/{at}.png" for at in range(3)]
    said = capsys.readouterr().err
    assert f"1 links to what does not exist are skipped: {tmp_path}/set/gone.png" in said
    assert f"1 folders that cannot be read are skipped: {tmp_path}/set/closed (Permission denied)" in said


def test_a_name_as_long_as_names_can_be(tmp_path):
    name = f"{'x' * 251}.png"
    folder_with(tmp_path, [{"file_name": name, "text": "x"}], count=1)
    os.rename(tmp_path / "0.png", tmp_path / name)
    assert len(rows_of(tmp_path)) == 1
    (tmp_path / "metadata.jsonl").unlink()
    with pytest.raises(UserError, match="has no captions"):
        rows_of(tmp_path)


@pytest.mark.parametrize(
    ("image", "caption", "advice"),
    [
        ("0.png", "0.png.txt", "belongs in 0.txt, and there is a 0.png.txt"),
        (
            "10_sks dog/0.png",
            None,
            "with --repeats_from_folders the words in the names of its folders are the captions",
        ),
        ("0.png", None, "write a metadata.jsonl with lines like"),
    ],
)
def test_where_captions_might_be(tmp_path, image, caption, advice):
    write_images(tmp_path, 1)
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / image).parent.mkdir(exist_ok=True)
    os.rename(tmp_path / "0.png", tmp_path / image)
    if caption:
        (tmp_path / caption).write_text("x")
    with pytest.raises(UserError) as caught:
        rows_of(tmp_path)
    assert advice in str(caught.value)


def test_an_empty_caption_is_one(tmp_path, capsys):
    rows = rows_of(folder_with(tmp_path, [entry(0, ""), entry(1, ["a", " "]), entry(2)]))
    assert [rows.captions(index) for index in range(3)] == [[""], ["a", " "], ["a caption"]]
    assert "2 captions are empty and are trained as such: " in capsys.readouterr().err


def test_a_name_may_lead_out_of_the_folder(tmp_path):
    write_images(tmp_path / "elsewhere", 1)
    folder = folder_with(tmp_path / "here", [{"file_name": "../elsewhere/0.png", "text": "x"}], count=1)
    rows = rows_of(folder)
    assert rows.name(0) == str(tmp_path / "elsewhere" / "0.png") and rows.image(0).size == (20, 16)


def test_links_that_lead_in_circles(tmp_path):
    folder = folder_with(tmp_path, [entry(0), {"file_name": "round.png", "text": "x"}], count=1)
    (folder / "again").symlink_to(folder)
    (folder / "round.png").symlink_to(folder / "round.png")
    with pytest.raises(UserError, match="1 images named in the metadata do not exist: .*round.png"):
        rows_of(folder)
    assert len(rows_of(folder_with(tmp_path, [entry(0)], count=1))) == 1
    assert len(rows_of(folder, caption_column=None)) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", ["0.png", "metadata.jsonl", "."])
def test_what_may_not_be_read(tmp_path, name):
    folder = folder_with(tmp_path / "train", [entry(0)], count=1)
    (folder / name).chmod(0)
    try:
        with pytest.raises(UserError):
            rows_of(folder)
    finally:
        (folder / name).chmod(0o700)


def test_what_may_not_be_read_is_a_sentence(tmp_path, monkeypatch):
    """The same as far as it can be seen by root."""

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    folder = folder_with(tmp_path, [entry(0)], count=1)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="0.png .Permission denied"):
        patch.setattr(Image, "open", refuse)
        rows_of(folder)
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: refuse())
    with pytest.raises(UserError, match="metadata.jsonl cannot be read: Permission denied"):
        rows_of(folder)


def test_a_file_whose_name_is_no_text(tmp_path):
    write_images(tmp_path, 1)
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "0.png").rename(tmp_path / "caf\udce9.png")  # a Latin-1 é, as old archives have it
    with pytest.raises(UserError, match="1 files have a name that is not UTF-8"):
        rows_of(tmp_path, caption_column=None)


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n"])
def test_files_that_are_no_images_are_all_named_before_training(tmp_path, content):
    write_images(tmp_path, 4)
    for index in (1, 3):
        (tmp_path / f"{index}.png").write_bytes(content)
    with pytest.raises(UserError) as caught:
        rows_of(tmp_path)
    assert "2 files cannot be read as images" in str(caught.value)
    assert "1.png" in str(caught.value) and "3.png" in str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_truncated_image_is_named_without_a_stack_trace(run, tmp_path, workers):
    folder = tmp_path / "images"
    write_images(folder, 6)
    content = (folder / "2.png").read_bytes()
    (folder / "2.png").write_bytes(content[: len(content) // 2])
    sentence, code = run.fails(tmp_path / "out", "--train_data_dir", folder, "--dataloader_num_workers", workers)
    assert "2.png cannot be read as an image" in sentence and "Traceback" not in sentence and code == 2


def test_images_without_a_caption_are_counted(tmp_path, capsys):
    rows = rows_of(folder_with(tmp_path, [entry(0)], count=3))
    assert len(rows) == 1
    assert "2 of 3 images" in capsys.readouterr().err


def test_line_separators_inside_captions(tmp_path):
    text = json.dumps(entry(0, "one\u2028line"), ensure_ascii=False)
    assert rows_of(folder_with(tmp_path, [text])).captions(0) == ["one\u2028line"]


def test_a_comma_without_quotes_in_a_csv(tmp_path):
    write_images(tmp_path, 1)
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "metadata.csv").write_text("file_name,text\n0.png,a red, blue bike\n")
    with pytest.raises(UserError, match="line 2 has more fields than the header; quote commas"):
        rows_of(tmp_path)


def test_a_truncated_image_in_another_process_is_named_too(run, tmp_path):
    folder = tmp_path / "images"
    write_images(folder, 2)
    for index in range(2):
        content = (folder / f"{index}.png").read_bytes()
        (folder / f"{index}.png").write_bytes(content[: len(content) // 2])
    flags = ["--train_data_dir", folder, "--train_batch_size", "1"]
    said, _ = run.fork(tmp_path / "out", *flags, processes=2).communicate(timeout=200)
    assert "0.png cannot be read as an image" in said and "1.png cannot be read as an image" in said


def test_a_fingerprint_is_of_the_data_and_not_of_their_place(tmp_path, monkeypatch):
    folder = folder_with(tmp_path / "here", [entry(0), entry(1)], count=2)
    same = folder_with(tmp_path / "there", [entry(0), entry(1)], count=2)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(folder)
    prints = {rows_of(place).fingerprint() for place in (folder, same, "here", "here/", "link", f"{folder}/../here")}
    assert len(prints) == 1
    assert rows_of(folder_with(tmp_path / "other", [entry(0), entry(1, "else")], count=2)).fingerprint() not in prints


def test_a_image_named_twice_is_two_samples(tmp_path, capsys):
    rows = rows_of(folder_with(tmp_path, [entry(0, "one"), entry(0, "two")], count=1))
    assert [rows.captions(index) for index in range(2)] == [["one"], ["two"]]
    assert "1 lines of the metadata name an image again" in capsys.readouterr().err


def test_csv_and_text_files_and_nested_folders(tmp_path):
    write_images(tmp_path / "jsonl" / "train", 2)
    write_images(tmp_path / "csv", 2)
    (tmp_path / "csv" / "metadata.jsonl").unlink()
    (tmp_path / "csv" / "metadata.csv").write_text('file_name,text\n0.png,"one, two"\n1.png,three\n')
    write_images(tmp_path / "txt", 2)
    (tmp_path / "txt" / "metadata.jsonl").unlink()
    for index in range(2):
        (tmp_path / "txt" / f"{index}.txt").write_text(f"text {index}\n")
    captions = lambda rows: [rows.captions(index) for index in range(len(rows))]  # noqa: E731
    assert captions(rows_of(tmp_path / "jsonl")) == [["a handwritten zero"], ["a handwritten one"]]
    assert captions(rows_of(tmp_path / "csv")) == [["one, two"], ["three"]]
    assert captions(rows_of(tmp_path / "txt")) == [["text 0"], ["text 1"]]


def test_caption_lists_are_drawn_from(tmp_path):
    rows = rows_of(folder_with(tmp_path, [entry(0, ["a", "b"]), entry(1, "c")]))
    drawn = [choose_caption(rows.captions(0), SampleDraws(0, epoch, 0)) for epoch in range(40)]
    assert set(drawn) == {"a", "b"}
    assert rows.captions(1) == ["c"]


def test_caption_dropout_is_drawn_again_each_epoch():
    dropped = np.array(
        [[choose_caption(["x"], SampleDraws(0, e, i), 0.3) is None for i in range(300)] for e in (0, 1)]
    )
    assert abs(dropped.mean() - 0.3) < 0.05
    assert (dropped[0] != dropped[1]).any()


@pytest.fixture
def table(tmp_path):
    """A parquet dataset with images inside, and columns of unusual names."""
    import datasets

    features = datasets.Features(
        {"photo": datasets.Image(), "legend": datasets.Value("string"), "score": datasets.Value("float32")}
    )
    rows = {
        "photo": [image(i) for i in range(6)],
        "legend": [f"a handwritten {w}" for w in "abcdef"],
        "score": [1.0] * 6,
    }
    (tmp_path / "table").mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "table" / "train.parquet")
    return str(tmp_path / "table")


def test_parquet_with_custom_and_extra_columns(run, tmp_path, table, capsys):
    flags = ["--dataset_name", table, "--max_train_steps", "2", "--cache_dir", tmp_path / "cache"]
    run(tmp_path / "named", *flags, "--image_column", "photo", "--caption_column", "legend")
    run(tmp_path / "guessed", *flags)
    assert "--image_column is taken to be 'photo'" in capsys.readouterr().err
    assert result_bytes(tmp_path / "named") == result_bytes(tmp_path / "guessed")
    sentence, _ = run.fails(tmp_path / "wrong", *flags, "--caption_column", "title")
    assert "--caption_column title: there is no such column, only photo, legend, score" in sentence
    sentence, _ = run.fails(tmp_path / "wrong", *flags, "--image_column", "score")
    assert "not images" in sentence


def test_a_table_with_columns_named_like_ours(run_sdxl, tmp_path):
    """... and its own two named unlike ours: SDXL's original removed columns by their default names."""
    import datasets

    ours = ["pixels", "weight", "index", "tokens", "skipped", "timestep", "file_name", "noise"]
    rows = {name: ["x"] * 4 for name in ours} | {"photo": [image(i) for i in range(4)], "legend": list("abcd")}
    features = {name: datasets.Value("string") for name in rows} | {"photo": datasets.Image()}
    (tmp_path / "table").mkdir()
    table = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    table.to_parquet(tmp_path / "table" / "train.parquet")
    flags = ["--image_column", "photo", "--caption_column", "legend", "--cache_dir", tmp_path / "cache"]
    assert run_sdxl(tmp_path / "out", "--dataset_name", tmp_path / "table", *flags, "--max_train_steps", "1") == 0


def test_no_train_split(run, tmp_path, table):
    Path(table, "train.parquet").rename(Path(table, "test.parquet"))
    sentence, code = run.fails(tmp_path / "out", "--dataset_name", table)
    assert "has no split 'train', only test" in sentence and code == 2


def test_a_data_set_that_is_nowhere(run, tmp_path):
    sentence, code = run.fails(tmp_path / "out", "--dataset_name", "nobody/nothing")
    assert "--dataset_name nobody/nothing cannot be loaded" in sentence and code == 2


def test_max_train_samples(images, capsys):
    rows = rows_of(images)
    assert len(selection.take_subset(rows, 4, seed=1)) == 4
    names = lambda seed: [rows.name(i) for i in range(4) for rows in [selection.take_subset(rows_of(images), 4, seed)]]  # noqa: E731
    assert names(1) == names(1) != names(2)
    assert len(selection.take_subset(rows, 50, seed=1)) == 10
    assert "more than the 10 images" in capsys.readouterr().err


@pytest.mark.parametrize("most", [1, 2, 9])
def test_a_few_rows_of_many_are_checked_as_themselves(images, most):
    """The datasets library cuts a run of rows out of its table, and keeps a list of indices for other selections."""
    for seed in range(4):
        rows = selection.take_subset(opening.load_dataset(DataOptions(folder=images)), most, seed)
        assert checking.check_dataset(rows) == [] and len(rows) == most
        assert [int(Path(rows.name(index)).stem) for index in range(most)] == list(rows.row_numbers)


def test_long_captions_are_counted(tmp_path, sd, capsys):
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(sd, subfolder="tokenizer")
    warn_of_long_captions(rows_of(folder_with(tmp_path, [entry(0, "a word " * 30), entry(1)])), tokenizer)
    assert "1 of 2 captions are longer than 16 tokens" in capsys.readouterr().err


def test_hold_out(images):
    rows = rows_of(images)
    train, held = selection.split_validation(rows, 0.3, seed=1)
    names = [{part.name(index) for index in range(len(part))} for part in (train, held)]
    assert (len(train), len(held)) == (7, 3) and not names[0] & names[1]
    with pytest.raises(UserError, match="leaves none to train on"):
        selection.split_validation(rows.select([0]), 0.5, seed=1)


def test_all_captions_of_an_image_are_validated_with_it(tmp_path):
    lines = [{"file_name": f"{at % 20}.png", "text": f"caption {at}"} for at in range(100)]
    folder_with(tmp_path, lines, count=20)
    parts = selection.split_validation(rows_of(tmp_path), 0.1, seed=1)
    names = [{part.name(index) for index in range(len(part))} for part in parts]
    assert [len(part) for part in parts] == [90, 10] and len(names[1]) == 2 and not names[0] & names[1]
    with pytest.raises(UserError, match="0.5 of 1 images leaves none"):
        selection.split_validation(rows_of(tmp_path).select([0, 20]), 0.5, seed=1)


def test_so_they_are_where_other_rows_are_no_files(tmp_path):
    """A folder and a table in one set: files are grouped, and their headers looked at, all the same."""
    folder_with(tmp_path / "folder", [entry(at % 4, f"caption {at}") for at in range(20)], count=4)
    (tmp_path / "table").mkdir()
    content = (tmp_path / "folder" / "0.png").read_bytes()
    table = pyarrow.table({"image": [{"bytes": content, "path": None}] * 4, "text": ["x"] * 4})
    pyarrow.parquet.write_table(table, tmp_path / "table" / "a.parquet")
    (tmp_path / "sets.yaml").write_text(f"- path: {tmp_path}/folder\n- path: {tmp_path}/table\n")
    rows = rows_of(None, config=tmp_path / "sets.yaml")
    assert len(np.unique(rows.image_numbers())) == 8 and len(np.unique(rows.image_numbers()[:20])) == 4
    parts = selection.split_validation(rows, 0.4, seed=1)
    names = [{part.name(at) for at in range(len(part)) if ".png" in part.name(at)} for part in parts]
    assert names[0] and names[1] and not names[0] & names[1]
    (tmp_path / "folder" / "1.png").write_bytes(b"")
    with pytest.raises(UserError, match="1.png .zero bytes"):
        rows_of(None, config=tmp_path / "sets.yaml")


# --- images ---------------------------------------------------------------------------------------------------


def read(tmp_path, image, name="0.png", **options):
    """What a sample sees of an image saved with these options: RGB values, shape (H, W, 3)."""
    folder_with(tmp_path, [{"file_name": name, "text": "x"}], count=1)
    image.save(tmp_path / name, **options)
    return np.asarray(rows_of(tmp_path).image(0))


def test_transparency_lies_on_white(tmp_path):
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    image.putpixel((1, 1), (0, 0, 200, 255))
    got = read(tmp_path, image)
    assert got[0, 0].tolist() == [255, 255, 255] and got[1, 1].tolist() == [0, 0, 200]


def test_palette_with_transparency(tmp_path):
    image = Image.new("P", (4, 4), 0)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 1), 1)
    got = read(tmp_path, image, transparency=0)
    assert got[0, 0].tolist() == [255, 255, 255] and got[1, 1].tolist() == [200, 100, 50]


def test_sixteen_bit_grey_is_scaled(tmp_path):
    values = np.linspace(0, 65535, 16).astype(np.uint16).reshape(4, 4)
    got = read(tmp_path, Image.fromarray(values))
    assert got[..., 0].tolist() == (values >> 8).tolist()


@pytest.mark.parametrize(("kind", "channels"), [(2, 3), (4, 2), (6, 4)])
def test_sixteen_bit_colour_and_grey_with_alpha(tmp_path, kind, channels):
    samples = np.linspace(0, 65535, 4 * 4 * channels).astype(np.uint16).reshape(4, 4, channels)
    if channels != 3:
        samples[..., -1] = 65535  # opaque
    folder_with(tmp_path, [entry(0)], count=1)
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in samples)
    (tmp_path / "0.png").write_bytes(png(4, 4, 16, kind, lines))
    got = np.asarray(rows_of(tmp_path).image(0)).astype(int)
    want = samples[..., :3] if channels > 2 else samples[..., :1].repeat(3, axis=-1)
    assert np.abs(got - want / 257).max() <= 1


def test_sixteen_bit_grey_in_a_tiff(tmp_path):
    values = np.linspace(0, 65535, 16).astype(np.uint16).reshape(4, 4)
    got = read(tmp_path, Image.fromarray(values), "0.tiff")
    assert got[..., 0].tolist() == (values >> 8).tolist()


@pytest.mark.parametrize("ending", ["gif", "webp", "png", "tiff"])
def test_of_an_animation_the_first_frame_is_seen(tmp_path, ending):
    first, second = Image.new("RGB", (20, 16), (200, 0, 0)), Image.new("RGB", (20, 16), (0, 0, 200))
    lossless = {"lossless": True} if ending == "webp" else {}
    got = read(tmp_path, first, f"0.{ending}", save_all=True, append_images=[second], **lossless)
    assert got.tolist() == np.asarray(first).tolist()


def test_a_dot_is_a_image(tmp_path):
    got = read(tmp_path, Image.new("RGB", (1, 1), (7, 8, 9)))
    assert got.tolist() == [[[7, 8, 9]]]
    assert image_ops.resize(Image.fromarray(got), (16, 16), "lanczos").size == (16, 16)


def test_cmyk_grey_and_one_bit(tmp_path):
    assert read(tmp_path, Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "0.jpg", quality=100)[0, 0, 0] > 200
    assert read(tmp_path, Image.new("L", (4, 4), 77))[0, 0].tolist() == [77] * 3
    assert read(tmp_path, Image.new("1", (4, 4), 1))[0, 0].tolist() == [255] * 3


def test_exif_orientation_is_honoured(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    upright = np.asarray(image(3).rotate(-90, expand=True))
    assert read(tmp_path, image(3), exif=exif).tolist() == upright.tolist()


@pytest.mark.parametrize("size", [(20, 16), (16, 20), (64, 30), (17, 100), (8, 8)])
def test_shorter_side_then_crop(size):
    resized = image_ops.resize(image(0, size), (16, 16), "lanczos")
    assert min(resized.size) == 16
    assert max(resized.size) == int(16 * max(size) / min(size))
    for draw in (None, SampleDraws(0, 0, 0)):
        cut, (top, left) = image_ops.crop(resized, (16, 16), draw and draw("crop"))
        assert cut.size == (16, 16)
        assert np.array_equal(np.asarray(cut), np.asarray(resized)[top : top + 16, left : left + 16])


def test_random_crops_reach_every_place():
    places = {image_ops.crop(image(0, (20, 16)), (16, 16), SampleDraws(0, epoch, 0)("crop"))[1] for epoch in range(60)}
    assert places == {(0, left) for left in range(5)}


def test_values_run_from_minus_one_to_one():
    array = image_ops.to_array(Image.fromarray(np.array([[[0, 127, 255]]], dtype=np.uint8)))
    assert array.shape == (3, 1, 1) and array.dtype == np.float32
    np.testing.assert_allclose(array.flatten(), [-1, 127 / 127.5 - 1, 1], atol=1e-7)


@pytest.mark.parametrize("mode", image_ops.FILTERS)
def test_every_interpolation_trains(run, tmp_path, mode):
    assert run(tmp_path, "--image_interpolation_mode", mode, "--max_train_steps", "1") == 0
