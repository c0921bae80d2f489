"""Errors tell the truth: a bug in our image code is raised as what it is, and a damaged file is named as damaged."""

import contextlib
import io
import pickle
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageFile
from tiny import image, png, write_images

from training_utils.base.draws import SampleDraws
from training_utils.base.errors import UserError
from training_utils.cli.options import DataOptions
from training_utils.data import buckets, checking, image_ops, inspection, opening, tar
from training_utils.data.problems import BadSample
from training_utils.data.samples import Samples, collate

BUGS = [TypeError("planted"), ValueError("planted"), ZeroDivisionError("planted"), AttributeError("planted")]
LIMITS = {"resolution": 16, "smallest": 8, "largest": 32, "step": 8}


@pytest.fixture
def folder(tmp_path):
    write_images(tmp_path / "train", 3)
    return tmp_path / "train"


@pytest.fixture(params=BUGS, ids=lambda bug: type(bug).__name__)
def plant(request, monkeypatch):
    """A function that makes a function of a module raise, and returns what it raises."""

    def planted(module, name):
        def broken(*_, **__):
            raise request.param

        monkeypatch.setattr(module, name, broken)
        return type(request.param)

    return planted


def transform(dataset, index, draw):
    shown = image_ops.resize(dataset.image(index), (8, 8), "lanczos")
    shown, _ = image_ops.crop(shown, (8, 8), draw("crop"))
    return {"pixels": image_ops.to_array(shown)}


def samples_of(folder, on_bad_sample):
    return Samples(opening.load_dataset(DataOptions(folder=folder)), transform, 7, on_bad_sample)


def report_on(folder, limits=None):
    return inspection.check_data(DataOptions(folder=folder), 16, limits)


# --- bugs of ours ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_bad_sample", ["error", "skip"])
@pytest.mark.parametrize("name", ["to_rgb", "resize", "crop", "upright_rgb", "to_array", "_orientation"])
def test_a_bug_in_a_training_sample_is_raised(folder, plant, name, on_bad_sample):
    bug = plant(image_ops, name)
    with pytest.raises(bug, match="^planted$"):
        samples_of(folder, on_bad_sample)[0, 1, 1.0]


@pytest.mark.parametrize("on_bad_sample", ["error", "skip"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_bug_in_a_data_worker_has_its_own_trace(folder, monkeypatch, on_bad_sample, workers):
    import torch

    from training_utils.torch_backend import loader

    def broken(image, ignore_profile):
        raise TypeError("planted")

    monkeypatch.setattr(image_ops, "to_rgb", broken)
    samples = samples_of(folder, on_bad_sample)
    with pytest.raises(TypeError, match="planted") as caught:
        next(loader.load_batches(samples, [[(0, 1, 1.0)]], torch.device("cpu"), workers))
    if workers:  # the trace of the worker is part of what it sends
        assert "in broken" in str(caught.value) and "cannot be read" not in str(caught.value)
    else:
        assert caught.traceback[-1].name == "broken"


def test_a_bug_in_what_checks_headers_is_raised(folder, plant):
    dataset = opening.load_dataset(DataOptions(folder=folder))
    bug = plant(checking, "open_image")
    for on_bad_sample in ("error", "skip"):
        with pytest.raises(bug, match="^planted$"):
            checking.check_dataset(dataset, on_bad_sample)


def test_a_bug_in_the_size_of_an_image_is_raised(folder, plant):
    """In sorting images into buckets, in the hashes of the cache, and in the report."""
    dataset = opening.load_dataset(DataOptions(folder=folder))
    bug = plant(image_ops, "upright_size")
    with pytest.raises(bug, match="^planted$"):
        buckets.training_sizes(dataset, 16, LIMITS)
    with pytest.raises(bug, match="^planted$"):
        dataset.digest_and_size(0)
    with pytest.raises(bug, match="^planted$"):
        report_on(folder, LIMITS)


@pytest.mark.parametrize("name", ["to_rgb", "upright_rgb", "is_transparent", "is_turned"])
def test_a_bug_in_a_report_is_raised(folder, plant, name):
    bug = plant(image_ops, name)
    with pytest.raises(bug, match="^planted$"):
        report_on(folder)


def test_a_bug_in_a_reader_that_pillow_calls_is_raised(folder, tmp_path, monkeypatch):
    import tarfile

    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards" / "a.tar", "w") as shard:
        for path in sorted(folder.iterdir()):
            shard.add(path, path.name)
    dataset = opening.load_dataset(DataOptions(folder=tmp_path / "shards", caption_column=None))
    monkeypatch.setattr(tar, "memoryview", None, raising=False)  # so that `readinto` itself raises a TypeError
    for read in (dataset.image, dataset.digest_and_size, lambda _: checking.check_dataset(dataset, "skip")):
        with pytest.raises(TypeError, match="not callable"):
            read(0)


def test_a_bug_on_a_line_that_calls_pillow_is_raised():
    with pytest.raises(AttributeError, match="load"):
        image_ops.upright_rgb(SimpleNamespace(format="PNG"))


# --- damaged files ---------------------------------------------------------------------------------------------------

pytestmark = pytest.mark.filterwarnings("ignore:::PIL")

FORMATS = ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"]


def encoded(format, size=(40, 30)):
    noise = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    Image.fromarray(noise).save(file, format, **({} if format in ("GIF", "BMP") else {"exif": exif}))
    return file.getvalue()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("damage", ["cut off", "garbage", "empty"])
def test_a_damaged_file_gets_its_sentence(folder, format, damage, capsys):
    content = encoded(format)
    contents = {"cut off": content[: len(content) // 2], "garbage": b"no image at all", "empty": b""}
    (folder / "1.png").write_bytes(contents[damage])
    dataset = opening.load_dataset(DataOptions(folder=folder))
    with pytest.raises(BadSample, match=r"1\.png cannot be read as an image \(.+\)$") as caught:
        dataset.image(1)
    assert caught.value.__cause__ is not None
    error = samples_of(folder, "error")[0, 1, 1.0]
    assert isinstance(error, UserError) and "1.png cannot be read as an image" in str(error)
    sample = samples_of(folder, "skip")[0, 1, 1.0]
    assert len(sample["skipped"]) == 1 and "1.png cannot be read as an image" in sample["skipped"][0]
    assert report_on(folder) == 2 and "1.png" in capsys.readouterr().out


def test_palettes_and_exif_can_be_damaged_too(folder):
    """What Pillow meets only after it has decoded the pixels."""

    def chunk(kind, body):
        return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")

    pixels = zlib.compress(bytes(5 * 4))
    content = png(4, 4, 8, 3, chunk(b"PLTE", bytes(9)) + chunk(b"tRNS", bytes(300)) + chunk(b"IDAT", pixels))
    (folder / "1.png").write_bytes(content + chunk(b"IEND", b""))
    with contextlib.suppress(BadSample):
        opening.load_dataset(DataOptions(folder=folder)).image(1)
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12" + bytes(range(40))
    image(0).convert("RGB").save(folder / "2.jpg", exif=exif)
    (folder / "1.png").write_bytes((folder / "2.jpg").read_bytes())
    (folder / "2.jpg").unlink()
    dataset = opening.load_dataset(DataOptions(folder=folder))
    checking.image_sizes(dataset)
    with contextlib.suppress(BadSample):
        dataset.image(1)


@pytest.mark.parametrize("format", FORMATS)
def test_random_damage_never_ends_in_a_trace(folder, format):
    content = encoded(format)
    dataset = opening.load_dataset(DataOptions(folder=folder))
    path = folder / "1.png"
    random = np.random.default_rng(1)
    for _ in range(150):
        harmed = bytearray(content)
        for at in random.integers(0, min(len(content), random.choice([64, 256, len(content)])), random.integers(1, 8)):
            harmed[at] = random.integers(0, 256)
        if random.random() < 0.2:
            del harmed[random.integers(0, len(content)) :]
        path.write_bytes(harmed)
        with contextlib.suppress(BadSample):
            dataset.image(1)
        digest, size = dataset.digest_and_size(1)
        assert len(digest) == 64 and len(size) == 2
        checking.image_sizes(dataset)
        inspection.decode_images(dataset)


def test_out_of_memory_is_no_fault_of_the_data(folder, monkeypatch):
    def full(*_):
        raise MemoryError

    dataset = opening.load_dataset(DataOptions(folder=folder))
    for module, name in ((image_ops, "to_rgb"), (ImageFile.ImageFile, "load")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, full)
            with pytest.raises(UserError, match=r"out of memory") as caught:
                dataset.image(1)
            assert not isinstance(caught.value, BadSample)


# --- chains ----------------------------------------------------------------------------------------------------------


def test_an_error_keeps_its_cause_where_it_is_pickled(folder):
    (folder / "1.png").write_bytes(b"no image")
    error = collate([samples_of(folder, "error")[0, 1, 1.0]])
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) and again.everywhere is False and again.exit_code == error.exit_code
    assert isinstance(again.__cause__, BadSample)
    assert type(again.__cause__.__cause__) is type(error.__cause__.__cause__)


def test_a_cause_that_cannot_be_pickled_is_dropped():
    class Local(Exception):
        pass

    error = UserError("a sentence", exit_code=1)
    error.__cause__ = Local()
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.exit_code, again.__cause__) == ("a sentence", 1, None)


def test_draws_of_a_bad_sample_are_those_of_its_row(folder):
    (folder / "1.png").write_bytes(b"no image")
    sample = samples_of(folder, "skip")[3, 1, 1.0]
    dataset = opening.load_dataset(DataOptions(folder=folder))
    assert np.array_equal(sample["pixels"], transform(dataset, 2, SampleDraws(7, 3, 1))["pixels"])
