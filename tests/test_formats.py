"""However images and captions are stored, training on them is the same to the bit as on a plain folder of them."""

import io
import itertools
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from conftest import result_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import WORDS, image, write_images

from training_utils.base.draws import SampleDraws
from training_utils.base.errors import UserError
from training_utils.cli.options import DataOptions
from training_utils.data import checking, inspection, opening, selection
from training_utils.data.captions import shuffle_tags
from training_utils.data.dataset import Source
from training_utils.data.plan import BatchPlan, Position

FEW = ["--max_train_steps", "3", "--random_flip", "--caption_dropout", "0.3"]
CAPTIONS = [f"a handwritten {word}" for word in WORDS]


def rows_of(folder, **options):
    rows = opening.load_dataset(DataOptions(folder=folder, **options))
    checking.check_dataset(rows)
    return rows


def captions_of(rows):
    return [rows.captions(index) for index in range(len(rows))]


def complaint(folder, **options):
    """The sentence with which a dataset is refused."""
    with pytest.raises(UserError) as caught:
        rows_of(folder, **options)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def plain(run, tmp_path_factory):
    """The weights after training on the ten images as a folder with metadata.jsonl."""
    out = tmp_path_factory.mktemp("plain")
    run(out, *FEW)
    return result_bytes(out)


def copied(images, folder):
    """The ten images in a folder of their own, without captions."""
    shutil.copytree(images, folder)
    (folder / "metadata.jsonl").unlink()
    return folder


def write_parquet(path, **columns):
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


# --- metadata.parquet ------------------------------------------------------------------------------------------------


def test_metadata_parquet(run, images, plain, tmp_path):
    folder = copied(images, tmp_path / "set")
    write_parquet(folder / "metadata.parquet", file_name=[f"{i}.png" for i in range(10)], text=CAPTIONS)
    run(tmp_path / "out", *FEW, "--train_data_dir", folder)
    assert result_bytes(tmp_path / "out") == plain


def test_metadata_parquet_may_hold_lists(tmp_path):
    write_images(tmp_path, 2)
    (tmp_path / "metadata.jsonl").unlink()
    write_parquet(tmp_path / "metadata.parquet", file_name=["0.png", "1.png"], text=[["a", "b"], ["c"]])
    assert captions_of(rows_of(tmp_path)) == [["a", "b"], ["c"]]


BAD_METADATA = {
    "a null": ({"file_name": ["0.png", "1.png"], "text": ["x", None]}, "1.png (nothing)"),
    "numbers": ({"file_name": ["0.png", "1.png"], "text": [1, 2]}, "0.png (1)"),
    "no file_name": ({"image": ["0.png"], "text": ["x"]}, 'metadata.parquet row 0 has no "file_name"; each row'),
    "no caption": ({"file_name": ["0.png", "1.png"], "title": ["x", "y"]}, "row 0 has no caption column 'text'"),
    "absent": ({"file_name": ["7.png"], "text": ["x"]}, "7.png"),
    "no row": ({"file_name": [], "text": []}, "metadata.parquet names no image; each row"),
}


@pytest.mark.parametrize("what", BAD_METADATA)
def test_bad_metadata_parquet(tmp_path, what):
    columns, expected = BAD_METADATA[what]
    write_images(tmp_path, 2)
    (tmp_path / "metadata.jsonl").unlink()
    write_parquet(tmp_path / "metadata.parquet", **columns)
    assert expected in complaint(tmp_path)


def test_metadata_parquet_that_is_none(tmp_path):
    write_images(tmp_path, 2)
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "metadata.parquet").write_bytes(b"PAR1 and no more")
    assert "metadata.parquet cannot be read as parquet" in complaint(tmp_path)


# --- captions and folders as kohya's trainers have them --------------------------------------------------------------


@pytest.mark.parametrize("ending", ["txt", "caption"])
def test_captions_beside_images(run, images, plain, tmp_path, ending):
    folder = copied(images, tmp_path / "set")
    for index, caption in enumerate(CAPTIONS):
        (folder / f"{index}.{ending}").write_text(f"{caption}\n")
    run(tmp_path / "out", *FEW, "--train_data_dir", folder)
    assert result_bytes(tmp_path / "out") == plain


def kohya(folder, **folders):
    """A folder of folders of images: name to how many."""
    for name, count in folders.items():
        write_images(folder / name, count)
        (folder / name / "metadata.jsonl").unlink()
    return folder


def test_repeats_from_folders(run, tmp_path, capsys):
    """The same as a line of metadata for each time; images without a caption are called what their folder is."""
    folder = kohya(tmp_path / "set", **{"2_sks dog": 2, "3_cat": 1, "more": 1})
    (folder / "2_sks dog" / "1.txt").write_text("a dog, running")
    (folder / "more" / "0.txt").write_text("more")
    run(tmp_path / "out", *FEW, "--train_data_dir", folder, "--repeats_from_folders")
    times = [
        ("2_sks dog/0", 2, "sks dog"),
        ("2_sks dog/1", 2, "a dog, running"),
        ("3_cat/0", 3, "cat"),
        ("more/0", 1, "more"),
    ]
    lines = [{"file_name": f"{name}.png", "text": text} for name, count, text in times for _ in range(count)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run(tmp_path / "lines", *FEW, "--train_data_dir", folder)
    assert result_bytes(tmp_path / "out") == result_bytes(tmp_path / "lines")


def test_folders_are_not_repeated_unasked(tmp_path, capsys):
    folder = kohya(tmp_path, **{"2_dog": 2, "2024_photos": 1})
    for text in ("2_dog/0.txt", "2_dog/1.txt", "2024_photos/0.txt"):
        (folder / text).write_text("x")
    rows = selection.repeat_sources(rows_of(folder))
    assert len(rows) == 3
    assert "folders named like '2_dog' are not repeated; with --repeats_from_folders" in capsys.readouterr().err
    assert len(selection.repeat_sources(rows_of(folder, repeats_from_folders=True))) == 5


def test_no_folder_is_named_so(tmp_path):
    write_images(tmp_path, 2)
    assert "holds no folder named like '10_sks dog'" in complaint(tmp_path, repeats_from_folders=True)


def test_no_copy_of_a_validation_image_is_trained(tmp_path):
    rows = rows_of(kohya(tmp_path, **{"4_dog": 6}), repeats_from_folders=True)
    train, held = selection.split_validation(rows, 0.34, seed=3)
    names = [[part.name(index) for index in range(len(part))] for part in (train, held)]
    assert (len(names[0]), len(names[1])) == (16, 2) and not set(names[0]) & set(names[1])


def test_tags_are_shuffled_behind_those_that_are_kept():
    seen = {shuffle_tags("sks, a,b , c,,", SampleDraws(0, epoch, 3), 1) for epoch in range(60)}
    assert seen == {", ".join(["sks", *order]) for order in itertools.permutations("abc")}
    assert shuffle_tags("a, b", SampleDraws(0, 0, 0), 5) == "a, b"
    assert shuffle_tags("", SampleDraws(0, 0, 0)) == ""


def test_shuffled_tags_are_trained(run, images, plain, tmp_path):
    """They are those drawn for seed, epoch and index, and where there is one tag nothing else is drawn otherwise."""
    run(tmp_path / "one", *FEW, "--shuffle_tags")
    assert result_bytes(tmp_path / "one") == plain
    tagged = [f"{word}, a, handwritten, digit" for word in WORDS]
    shuffled = [shuffle_tags(text, SampleDraws(7, 0, at), 1) for at, text in enumerate(tagged)]
    flags = [*FEW, "--max_train_steps", "2"]  # one epoch
    for name, captions, more in (("a", tagged, ["--shuffle_tags", "--keep_tokens", "1"]), ("b", shuffled, [])):
        folder = copied(images, tmp_path / name)
        for index, caption in enumerate(captions):
            (folder / f"{index}.txt").write_text(caption)
        run(tmp_path / f"out-{name}", *flags, "--train_data_dir", folder, *more)
    assert tagged != shuffled and result_bytes(tmp_path / "out-a") == result_bytes(tmp_path / "out-b")


# --- parquet tables --------------------------------------------------------------------------------------------------


def stored(images):
    return [(Path(images) / f"{index}.png").read_bytes() for index in range(10)]


@pytest.mark.parametrize("how", ["struct", "bytes"])
def test_a_folder_of_parquet_tables(run, images, plain, tmp_path, how):
    cells = [{"bytes": b, "path": f"{i}.png"} if how == "struct" else b for i, b in enumerate(stored(images))]
    for part, some in enumerate((slice(0, 6), slice(6, 10))):
        path = tmp_path / "set" / "data" / f"train-{part:05}-of-00002.parquet"
        write_parquet(path, image=cells[some], text=CAPTIONS[some])
    run(tmp_path / "out", *FEW, "--train_data_dir", tmp_path / "set", "--cache_dir", tmp_path / "cache")
    assert result_bytes(tmp_path / "out") == plain


def test_parquet_tables_that_cannot_be_used(tmp_path):
    options = {"cache_dir": str(tmp_path / "cache")}
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "a.parquet").write_bytes(b"PAR1")
    assert f"--train_data_dir {tmp_path / 'none'} cannot be loaded" in complaint(tmp_path / "none", **options)
    write_parquet(tmp_path / "set" / "test.parquet", image=[b"x"], text=["x"])
    assert "has no split 'train', only test" in complaint(tmp_path / "set", **options)
    write_parquet(tmp_path / "null" / "a.parquet", image=[None, b"x"], text=["x", "y"])
    assert "1 rows hold no image: row 0" in complaint(tmp_path / "null", **options)


def test_tables_that_are_not_read_are_said(tmp_path, capsys):
    options = {"cache_dir": str(tmp_path / "cache")}
    write_parquet(tmp_path / "set" / "train-a.parquet", image=[png_bytes(0)], text=["x"])
    write_parquet(tmp_path / "set" / "b.parquet", image=[png_bytes(1)], text=["y"])
    assert len(rows_of(tmp_path / "set", **options)) == 1
    said = capsys.readouterr().err
    assert f"not of its split 'train', and are not read: {tmp_path}/set/b.parquet" in said


def test_a_caption_column_that_is_guessed_is_not_that_of_the_images(tmp_path, capsys):
    write_parquet(tmp_path / "set" / "a.parquet", legend=["x"], image=[png_bytes(0)])
    assert captions_of(rows_of(tmp_path / "set", cache_dir=str(tmp_path / "cache"))) == [["x"]]
    assert "--caption_column is taken to be 'legend'" in capsys.readouterr().err


def test_captions_of_a_source_that_are_lists_of_something_else(tmp_path):
    write_parquet(tmp_path / "set" / "a.parquet", image=[png_bytes(0)], text=[[1, 2]])
    path = config(tmp_path, {"path": str(tmp_path / "set")})
    assert "holds no text" in complaint(None, config=path, cache_dir=str(tmp_path / "cache"))


# --- tar shards ------------------------------------------------------------------------------------------------------


def write_tar(path, members, mode="w", **options):
    """A tar file of (name, bytes)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode, **options) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def png_bytes(index):
    content = io.BytesIO()
    image(index).save(content, "png")
    return content.getvalue()


def shard(path, pairs, ending="txt"):
    """A shard of (index of the image, bytes of its caption)."""
    members = [(f"{i:03}.{kind}", b) for i, text in pairs for kind, b in (("png", png_bytes(i)), (ending, text))]
    return write_tar(path, members)


def as_json(caption):
    return json.dumps({"title": caption, "width": 20}).encode()


@pytest.mark.parametrize("ending", ["txt", "json"])
def test_tar_shards(run, plain, tmp_path, ending):
    texts = [as_json(text) if ending == "json" else text.encode() for text in CAPTIONS]
    shard(tmp_path / "set" / "000.tar", list(enumerate(texts))[:6], ending)
    shard(tmp_path / "set" / "001.tar", list(enumerate(texts))[6:], ending)
    column = ["--caption_column", "title"] if ending == "json" else ["--dataloader_num_workers", "1"]
    run(tmp_path / "out", *FEW, "--train_data_dir", tmp_path / "set", *column)
    assert result_bytes(tmp_path / "out") == plain


def test_shards_with_caches_and_buckets(run, images, tmp_path):
    """What reads an image's bytes, and what reads its header, finds both in a shard."""
    shard(tmp_path / "set" / "a.tar", [(i, text.encode()) for i, text in enumerate(CAPTIONS)])
    flags = [*FEW, "--aspect_ratio_bucketing", "--bucket_reso_steps", "8", "--cache_latents", "--cached_crops", "2"]
    for name, folder in (("tar", tmp_path / "set"), ("folder", images)):
        cache = ["--encoding_cache_dir", tmp_path / "cache"]
        run(tmp_path / name, *flags, *cache, "--train_data_dir", folder)
    assert result_bytes(tmp_path / "tar") == result_bytes(tmp_path / "folder")
    rows = rows_of(tmp_path / "set")
    assert rows.digest_and_size(3) == rows_of(images).digest_and_size(3)
    assert rows.name(3) == str(tmp_path / "set" / "a.tar" / "003.png")


def test_members_that_are_not_meant(tmp_path):
    """Long and hidden names, folders, several captions, and what macOS puts beside each file."""
    deep = f"{'d' * 90}/{'e' * 90}"
    write_tar(
        tmp_path / "a.tar",
        [
            ("./x/._0.png", b"Mac OS X"),
            ("./x/0.png", png_bytes(0)),
            ("./x/0.json", json.dumps({"text": ["a", "b"]}).encode()),
            ("./x/0.txt", b"not this"),
            (f"{deep}.png", png_bytes(1)),
            (f"{deep}.json", b'{"other": 1}'),
            (f"{deep}.caption", "\ufeffé\n".encode()),
            ("alone.png", png_bytes(2)),
            ("0.cls", b"7"),
        ],
    )
    rows = rows_of(tmp_path)
    assert captions_of(rows) == [["a", "b"], ["é"]]
    assert rows.findings.unnamed == [f"{tmp_path}/a.tar/alone.png"]
    assert np.asarray(rows.image(1)).tolist() == np.asarray(image(1)).tolist()
    assert len(rows_of(tmp_path, caption_column=None)) == 3


@pytest.mark.parametrize("ending", ["tiff", "bmp", "webp", "gif", "jpg", "avif"])
def test_every_format_is_read_at_its_place(tmp_path, ending):
    content = io.BytesIO()
    Image.new("RGB", (20, 16), (0, 128, 255)).save(content, {"jpg": "jpeg"}.get(ending, ending))
    write_tar(tmp_path / "a.tar", [("0.txt", b"x"), (f"0.{ending}", content.getvalue()), ("1.txt", b"x" * 2000)])
    with Image.open(content) as opened:
        assert np.asarray(rows_of(tmp_path).image(0)).tolist() == np.asarray(opened.convert("RGB")).tolist()


def complete_shard(tmp_path):
    path = shard(tmp_path / "a.tar", [(0, b"zero"), (1, b"one")])
    return path, path.read_bytes()


def test_a_shard_that_is_cut_off_anywhere(tmp_path):
    """... is never taken for a whole one, and the last member that was found is named."""
    path, content = complete_shard(tmp_path)
    with tarfile.open(path) as tar:
        end = tar.getmembers()[-1].offset_data + 512
    for size in [1, 100, 511, *range(512, end, 512), *range(600, end, 997)]:
        path.write_bytes(content[:size])
        sentence = complaint(tmp_path)
        assert str(path) in sentence and ("after member 0" in sentence or "after its beginning" in sentence), size
    path.write_bytes(content[:end])
    assert "a.tar is cut off after member 001.txt; fetch it" in complaint(tmp_path)


def test_a_shard_with_a_damaged_header(tmp_path):
    path, content = complete_shard(tmp_path)
    with tarfile.open(path) as tar:
        at = tar.getmember("001.png").offset
    path.write_bytes(content[: at + 5] + b"?" + content[at + 6 :])
    assert "a.tar is damaged after member 000.txt" in complaint(tmp_path)
    path.write_bytes(b"no tar at all " * 100)
    assert "a.tar cannot be read as a tar file after its beginning" in complaint(tmp_path)


BAD_SHARDS = {
    "not JSON": ([("0.png", b""), ("0.json", b"{")], "a.tar/0.json is not JSON"),
    "another column": (
        [("0.png", b""), ("0.json", b'{"title": 1}')],
        "has no caption column 'text' (--caption_column)",
    ),
    "not UTF-8": ([("0.png", b""), ("0.txt", b"\xe9")], "a.tar/0.txt is not UTF-8 text (byte 0)"),
    "number": ([("0.png", b"x"), ("0.json", b'{"text": 3}')], "captions are neither a string nor a list"),
    "no captions": ([("0.png", b"x")], "hold no captions: put a .txt, .caption or .json beside each image"),
    "no images": ([("0.txt", b"x")], "hold no images"),
    "empty image": ([("0.png", b""), ("0.txt", b"x")], "a.tar/0.png (zero bytes)"),
    "no image": ([("0.png", b"GIF"), ("0.txt", b"x")], "a.tar/0.png (not an image)"),
}


@pytest.mark.parametrize("what", BAD_SHARDS)
def test_bad_shards(tmp_path, what):
    members, expected = BAD_SHARDS[what]
    write_tar(tmp_path / "a.tar", members)
    assert expected in complaint(tmp_path)


def test_a_damaged_image_in_a_shard_is_named(run, tmp_path):
    members = [("0.png", png_bytes(0)[:300]), ("0.txt", b"x")]
    write_tar(tmp_path / "set" / "a.tar", members)
    sentence, code = run.fails(tmp_path / "out", "--train_data_dir", tmp_path / "set")
    assert "a.tar/0.png cannot be read as an image" in sentence and code == 2


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.TAR.XZ"])
def test_a_compressed_shard(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    assert f"{name} is compressed" in complaint(tmp_path)


def test_folders_of_several_kinds(tmp_path, capsys):
    write_parquet(tmp_path / "a.parquet", image=[b"x"], text=["x"])
    shard(tmp_path / "a.tar", [(0, b"x")])
    assert "holds .tar shards and .parquet tables; keep them in two folders" in complaint(tmp_path)
    write_images(tmp_path, 2)
    assert len(rows_of(tmp_path)) == 2
    assert "a.tar and 1 more, which is not read; --train_data_config" in capsys.readouterr().err


def test_a_report_on_shards(tmp_path, capsys):
    shard(tmp_path / "set" / "a.tar", [(0, b"zero"), (1, b"one")])
    source = {"dataset_name": None, "folder": str(tmp_path / "set"), "image_column": "image", "caption_column": "text"}
    assert inspection.check_data(DataOptions(**source), 16) == 0
    assert "a.tar/000.png" in capsys.readouterr().out
    write_tar(
        tmp_path / "set" / "a.tar",
        [("0.png", png_bytes(0)[:300]), ("0.txt", b"x"), ("1.png", png_bytes(1)), ("1.json", b'{"text": 1}')],
    )
    assert inspection.check_data(DataOptions(**source), 16) == 2
    said = capsys.readouterr().out
    assert "damaged: 1" in said and "a.tar/0.png" in said and "no usable caption: 1" in said and "a.tar/1.png" in said


# --- several sources -------------------------------------------------------------------------------------------------


def config(folder, *sources):
    """A file that names sources, as dicts; JSON is YAML too."""
    path = folder / "data.yaml"
    path.write_text(json.dumps(sources))
    return path


def test_sources_one_after_the_other(run, images, plain, tmp_path):
    """A folder, shards and a table; the words that all captions begin with come from prefixes."""
    (tmp_path / "folder").mkdir()
    for index in range(4):
        shutil.copy(f"{images}/{index}.png", tmp_path / "folder")
        (tmp_path / "folder" / f"{index}.txt").write_text(WORDS[index])
    shard(tmp_path / "shards" / "a.tar", [(i, WORDS[i].encode()) for i in range(4, 7)])
    write_parquet(tmp_path / "table" / "a.parquet", photo=stored(images)[7:], image=[""] * 3, legend=CAPTIONS[7:])
    path = config(
        tmp_path,
        {"path": "folder", "caption_prefix": "a handwritten "},
        {"path": "shards", "caption_prefix": "a handwritten "},
        {"dataset_name": str(tmp_path / "table"), "image_column": "photo", "caption_column": "legend"},
    )
    flags = ["--train_data_config", path, "--cache_dir", tmp_path / "cache"]
    run(tmp_path / "out", *FEW, *flags)
    assert result_bytes(tmp_path / "out") == plain
    assert run(tmp_path / "report", *flags, "--check_data") == 0
    rows = opening.load_dataset(DataOptions(config=path, cache_dir=str(tmp_path / "cache")))
    assert rows.name(8) == f"row 1 of {tmp_path / 'table'}" and rows.name(0) == str(tmp_path / "folder" / "0.png")


def halves(images, folder):
    """Six of the ten images in a folder `a`, four in `b`."""
    for name, some in (("a", range(6)), ("b", range(6, 10))):
        (folder / name).mkdir(parents=True)
        lines = [{"file_name": f"{i}.png", "text": CAPTIONS[i]} for i in some]
        (folder / name / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        for index in some:
            shutil.copy(f"{images}/{index}.png", folder / name)
    return folder


def test_a_report_tells_what_an_epoch_shows_of_each_source(images, tmp_path, capsys):
    path = config(halves(images, tmp_path / "set"), {"path": "a", "weight": 1}, {"path": "b", "weight": 3})
    (tmp_path / "set" / "a" / "0.png").write_bytes(b"")
    assert inspection.check_data(DataOptions(config=path), 16) == 2
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["a", "5", "2"] in lines and ["b", "4", "7"] in lines  # of nine, 2.25 and 6.75


def test_repeats_of_sources(run, images, tmp_path):
    """The same as a line of metadata for each time, cached or not."""
    path = config(halves(images, tmp_path / "set"), {"path": "a", "repeats": 2}, {"path": "b"})
    times = [index for index in range(10) for _ in range(2 if index < 6 else 1)]
    lines = [{"file_name": f"{index}.png", "text": CAPTIONS[index]} for index in times]
    folder = copied(images, tmp_path / "lines")
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    few = [*FEW, "--cache_latents", "--encoding_cache_dir", tmp_path / "cache"]
    run(tmp_path / "out", *few, "--train_data_config", path)
    run(tmp_path / "expected", *few, "--train_data_dir", folder)
    assert result_bytes(tmp_path / "out") == result_bytes(tmp_path / "expected")


def test_weighted_sources_are_resumed(run, images, tmp_path):
    weights = ({"path": "a", "weight": 1}, {"path": "b", "weight": 3.5})
    few = [*FEW, "--max_train_steps", "5", "--train_data_config", config(halves(images, tmp_path / "set"), *weights)]
    run(tmp_path / "complete", *few)
    run(tmp_path / "cut", *few, "--checkpointing_steps", "2")
    shutil.rmtree(tmp_path / "cut" / "checkpoint-4")
    run(tmp_path / "cut", *few, "--resume_from_checkpoint", "checkpoint-2")
    assert result_bytes(tmp_path / "complete") == result_bytes(tmp_path / "cut")


class Sized:
    """A dataset as far as `repeat_sources` reads it."""

    def __init__(self, sources, origins):
        self.sources, self.origins = sources, np.asarray(origins)

    def __len__(self):
        return len(self.origins)

    def select(self, indices):
        part = Sized(self.sources, self.origins[indices])
        part.chosen, part.partial_sources = indices, ()
        return part


WEIGHTED = st.lists(st.tuples(st.integers(1, 12), st.floats(0.05, 20)), min_size=1, max_size=4)
SPLITS = st.tuples(st.integers(1, 4), st.integers(1, 2), st.integers(1, 2))  # batch size, accumulation, processes


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(WEIGHTED, SPLITS, st.booleans())
def test_weights_are_the_shares_of_every_epoch(sources, split, shaped):
    """No image is shown twice oftener than another of its source, and in time each is shown."""
    counts, weights = np.array(sources).T
    origins = np.repeat(np.arange(len(sources)), counts.astype(int))
    rows = selection.repeat_sources(Sized([Source("", 1, weight) for weight in weights], origins))
    shapes = np.arange(len(rows)) % 3 if shaped else None
    batch_plan = BatchPlan(len(rows), 5, *split, shapes, rows.partial_sources)
    wanted = len(origins) * weights / weights.sum()
    seen = np.zeros(len(origins), int)
    position = Position()
    for epoch in range(3):
        visited = []
        while position.epoch == epoch:
            visited += [index for share in batch_plan.step_samples(position) for index in share]
            position = batch_plan.position_after(position)
        assert len(set(visited)) == len(visited) == batch_plan.size
        times = np.bincount(rows.chosen[visited], minlength=len(origins))
        for at in range(len(sources)):
            mine = times[origins == at]
            assert abs(mine.sum() - wanted[at]) <= 0.5 or mine.sum() == 1
            assert mine.max() - mine.min() <= 1
        seen += times
    assert position == Position(3)
    if not shaped:
        assert batch_plan.steps_per_epoch == -(-batch_plan.size // batch_plan.samples_per_step)
    if rows.partial_sources and max(counts) > 3:
        assert seen.max() > 0


def test_what_is_left_out_is_another_part_in_every_epoch():
    rows = selection.repeat_sources(Sized([Source("", 1, 1.0), Source("", 1, 1.0)], [0] * 30 + [1] * 10))
    assert len(rows) == 50 and [(len(part.indices), part.count) for part in rows.partial_sources] == [(30, 20)]
    batch_plan = BatchPlan(len(rows), 1, 40, partial_sources=rows.partial_sources)
    first, second = (set(np.concatenate(batch_plan.step_samples(Position(epoch)))) for epoch in (0, 1))
    assert len(first) == len(second) == 40 and first != second
    assert BatchPlan(len(rows), 1, 40).steps_per_epoch == 2 and batch_plan.steps_per_epoch == 1


BAD_CONFIGS = {
    "[": "cannot be read as YAML at line 1",
    "path: a": "is not a list of sources",
    "[]": "is not a list of sources",
    "[a]": "source 1: 'a' is not a dict",
    "[{path: a, repeat: 3}]": "source 1: there is no key 'repeat'; did you mean 'repeats'?",
    "[{path: a}, {}]": "source 2: give it a path or a dataset_name",
    "[{path: a, dataset_name: x}]": "source 1: give it a path or a dataset_name",
    "[{path: 3}]": "source 1: path is 3, not text",
    "[{path: nowhere}]": "nowhere is not a folder",
    "[{path: a, repeats: 0}]": "repeats is 0, not a whole number of at least 1",
    "[{path: a, repeats: 2.5}]": "repeats is 2.5, not a whole number",
    "[{path: a, weight: .nan}]": "weight is nan, not a number above 0",
    "[{path: a, weight: true}]": "weight is True, not a number above 0",
    "[{path: a, weight: 1, repeats: 2}]": "give one of them",
    "[{path: a, weight: 1}, {path: a}]": "source 2: it has no weight; give all sources one, or none",
    "[{path: a, dataset_config_name: x}]": "dataset_config_name is for a dataset_name",
    "[{path: a}, {path: empty}]": "source 2: --train_data_dir",
    "[{path: a, caption_column: title}]": "has no caption column 'title'",
}


@pytest.mark.parametrize("text", BAD_CONFIGS)
def test_bad_configs(tmp_path, text):
    write_images(tmp_path / "a", 2)
    (tmp_path / "empty").mkdir()
    (tmp_path / "data.yaml").write_text(text)
    sentence = complaint(None, config=tmp_path / "data.yaml")
    assert BAD_CONFIGS[text] in sentence


def test_sources_with_lists_of_captions(tmp_path):
    for name, text in (("a", "x"), ("b", ["y", "z"])):
        write_images(tmp_path / name, 1)
        (tmp_path / name / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png", "text": text}))
    path = config(tmp_path, {"path": "a"}, {"path": "b", "caption_prefix": "p "})
    assert captions_of(rows_of(None, config=path)) == [["x"], ["p y", "p z"]]
    rows = rows_of(None, config=path, caption_column=None)
    assert rows.caption_column is None and len(rows) == 2
