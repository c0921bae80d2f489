"""--streaming trains on what lies elsewhere, a few chunks at a time, and else it is a run like any other."""

import functools
import gc
import io
import json
import os
import pickle
import re
import shutil
import signal
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import relative_difference, result_bytes
from hub_server import Hub
from hypothesis import given, settings
from hypothesis import strategies as st
from test_formats import write_tar
from tiny import WORDS, image

from training_utils.base import draws
from training_utils.base.errors import UserError
from training_utils.cli.options import DataOptions
from training_utils.data import checking, inspection, opening, selection, streaming
from training_utils.data.plan import BatchPlan, Position

FEW = ["--streaming", "--shuffle_buffer", "8", "--max_train_steps", "4", "--random_flip", "--caption_dropout", "0.3"]


@functools.cache
def png(index, size=(20, 16)):
    content = io.BytesIO()
    image(index, size).save(content, "png")
    return content.getvalue()


def caption(index):
    return f"a handwritten {WORDS[index % 10]}"


def tables(folder, files=6, rows=5, size=(20, 16), change=None, **options):
    """Tables of images and captions, and of a column that nobody asked for; `change(index, row)` alters one."""
    folder.mkdir(parents=True)
    for at in range(files):
        lines = [
            {"id": "x" * 100, "image": {"bytes": png(i, size), "path": None}, "text": caption(i)}
            for i in range(at * rows, (at + 1) * rows)
        ]
        for index, line in enumerate(lines):
            if change:
                change(at * rows + index, line)
        path = folder / f"train-{at:05}-of-{files:05}.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(lines), path, **options)
    return folder


def tars(folder, files=6, rows=5, change=None, ending="txt"):
    for at in range(files):
        members = []
        for index in range(at * rows, (at + 1) * rows):
            sample = {f"{index:04}.png": png(index), f"{index:04}.{ending}": caption(index).encode()}
            if change:
                change(index, sample)
            members += sample.items()
        write_tar(folder / f"{at:03}.tar", members)
    return folder


def rows_of(folder, cache, **options):
    """The rows of a folder, streamed."""
    rows = opening.load_dataset(DataOptions(folder=folder, cache_dir=str(cache), **({"shuffle_buffer": 8} | options)))
    checking.check_dataset(rows)
    return rows


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return tars(tmp_path_factory.mktemp("data") / "shards")


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    return tables(tmp_path_factory.mktemp("data") / "tables")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """The words that name a folder for downloads, of this module's runs."""
    return ["--cache_dir", str(tmp_path_factory.mktemp("cache"))]


def spools(cache):
    """The folders of chunks that are there now."""
    gc.collect()
    return list(Path(cache).glob("text-to-image-streams/spool-*"))


# --- order -----------------------------------------------------------------------------------------------------------


def epoch_order(seed, epoch, sizes, buffer):
    return streaming.order.epoch_order(seed=seed, epoch=epoch, sizes=sizes, buffer=buffer)


SIZES = st.lists(st.integers(1, 30), min_size=1, max_size=60)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(SIZES, st.integers(1, 400))
def test_an_epoch_visits_every_row_once(sizes, buffer):
    orders = [epoch_order(3, epoch, np.array(sizes), buffer) for epoch in (0, 0, 1)]
    assert all(sorted(order) == list(range(sum(sizes))) for order in orders)
    assert np.array_equal(orders[0], orders[1])
    if sum(sizes) > 9 and buffer > 99:
        assert not np.array_equal(orders[0], orders[2])


@pytest.mark.parametrize(("count", "rows", "buffer"), [(200, 50, 640), (200, 50, 3200), (40, 7, 16), (9, 30, 100)])
def test_rows_that_are_near_in_the_order_lie_in_few_chunks(count, rows, buffer):
    """As many as `Source.peak_bytes` reckons with, and each is needed once an epoch."""
    order, lanes = epoch_order(1, 2, np.full(count, rows), buffer), min(streaming.order.LANES, count)
    chunks = order // rows
    most = max(len(set(chunks[at : at + buffer])) for at in range(0, len(order), 7))
    assert most <= 2 * buffer / rows + 2 * lanes
    spans = [np.flatnonzero(chunks == chunk) for chunk in range(count)]
    longest = max(span[-1] - span[0] for span in spans)
    assert longest < 2 * max(lanes, buffer) + lanes * rows
    blocks = [set(order[at : at + buffer]) for at in range(0, len(order), buffer)]
    assert buffer < 600 or max(len({i // rows for i in block}) for block in blocks) >= lanes  # it mixes them too


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_processes_have_chunks_of_their_own(world):
    """Until the first lanes end; however they are shared out, a step has the same samples."""

    class Stream:
        ahead = 100

        def order(self, seed, epoch):
            return epoch_order(seed, epoch, np.full(80, 12), 160)

        def expect(self, coming, rank, count):
            pass

    batch_plan = BatchPlan(960, 5, 4, 2, world, stream=Stream())
    one = BatchPlan(960, 5, 4 * world, 2, 1, stream=Stream())
    seen, position = [set() for _ in range(world)], Position()
    while position.epoch == 0:
        micro_batches = batch_plan.step_samples(position)
        taken = np.concatenate(one.step_samples(position))
        assert (
            sorted(np.concatenate(micro_batches)) == sorted(taken)
            and max(map(len, micro_batches)) - min(map(len, micro_batches)) <= 1
        )
        if position.sample < 960 - 16 * 12:
            for part, share in enumerate(micro_batches):
                seen[part % world] |= set(share // 12)
        position = batch_plan.position_after(position)
    assert sum(map(len, seen)) == len(set().union(*seen)) > 60


def test_processes_fetch_what_they_read(tmp_path):
    """Two of them, each with a disk of its own: they fetch other chunks, and each of theirs once."""
    folder, fetched = tables(tmp_path / "tables", 48, 4), {}
    rows = [rows_of(folder, tmp_path / str(rank), shuffle_buffer=32) for rank in (0, 1)]
    for rank, part in enumerate(rows):
        fetched[rank] = []
        real = part.source.fetch
        part.source.fetch = lambda file, chunk, real=real, to=fetched[rank]: to.append(chunk.file) or real(file, chunk)
        batches = BatchPlan(len(part), 5, 4, 1, 2, stream=part).batches(Position(), rank)
        for _ in range(16):  # two thirds of an epoch
            for _, index, _ in next(batches):
                assert part.captions(index) == [caption(index)]
    for chunks in fetched.values():
        assert len(chunks) == len(set(chunks)) >= 16
    assert not set(fetched[0]) & set(fetched[1])


# --- what is read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["shards", "parquet"])
def test_a_row_is_the_row_of_the_data_set_that_is_not_streamed(kind, request, tmp_path, monkeypatch):
    """Image, caption and, where it has one, its name; in whatever chunks."""
    folder = request.getfixturevalue(kind)
    plain = opening.load_dataset(DataOptions(folder=folder, cache_dir=str(tmp_path)))
    for size in (1, 5000, 2**26):
        monkeypatch.setattr(streaming.chunks, "CHUNK_BYTES", size)
        rows = rows_of(folder, tmp_path)
        assert len(rows.lengths) == ({1: 30, 5000: 18, 2**26: 6}[size] if kind == "shards" else 6)
        assert len(rows) == len(plain) == 30
        for index in (29, 0, 7, 16):
            assert rows.captions(index) == plain.captions(index)
            assert rows.image(index).tobytes() == plain.image(index).tobytes()
            if kind == "shards":
                assert rows.name(index) == plain.name(index)
    assert rows.name(7).endswith(
        "0007.png" if kind == "shards" else "row 2 of " + f"{folder}/train-00001-of-00006.parquet"
    )
    assert len(rows_of(folder, tmp_path, caption_column=None)) == 30


def test_columns_and_captions_of_every_kind(tmp_path):
    """Bytes without a path, lists of captions, JSON beside images; images without a caption are left out."""

    def change(index, line):
        line["photo"], line["legend"] = line.pop("image")["bytes"], [line.pop("text"), "x"]

    folder = tables(tmp_path / "tables", 2, 3, change=change)
    rows = rows_of(folder, tmp_path, image_column="photo", caption_column="legend")
    assert rows.captions(4) == [caption(4), "x"] and rows.image(4).tobytes() == image(4).tobytes()

    def beside(index, sample):
        text = sample.pop(f"{index:04}.txt").decode()
        if index != 2:
            sample[f"{index:04}.json"] = json.dumps({"title": [text, "y"]}).encode()

    rows = rows_of(tars(tmp_path / "shards", 2, 3, beside), tmp_path, caption_column="title")
    assert [rows.captions(index) for index in range(5)] == [[caption(i), "y"] for i in (0, 1, 3, 4, 5)]
    assert rows.findings.unnamed == [f"{tmp_path}/shards/000.tar/0002.png"]


def test_what_is_known_of_a_file_is_looked_up_once(shards, parquet, tmp_path, monkeypatch):
    folder, listed = tars(tmp_path / "shards", 3), []
    real, real_table = streaming.shards.list_shard, streaming.parquet.list_table
    monkeypatch.setattr(
        streaming.shards, "list_shard", lambda file, **more: listed.append(file.url) or real(file, **more)
    )
    assert len(rows_of(folder, tmp_path)) == len(rows_of(folder, tmp_path)) == 15 and len(listed) == 3
    shutil.copy(shards / "003.tar", folder / "001.tar")
    rows = rows_of(folder, tmp_path)
    assert listed[3:] == [str(folder / "001.tar")] and rows.captions(5) == [caption(15)]
    monkeypatch.setattr(
        streaming.parquet,
        "list_table",
        lambda file, **more: listed.append("a table") or real_table(file, **more),
    )
    rows_of(parquet, tmp_path), rows_of(parquet, tmp_path)
    assert listed[4:] == ["a table"] * 6


@pytest.mark.parametrize(("size", "count"), [(2_000_000, 8), (40_000, 100)])
def test_large_images_are_passed_over_and_small_ones_read_in_few_requests(tmp_path, monkeypatch, size, count):
    members = [(f"{i}.{ending}", bytes(n)) for i in range(count) for ending, n in (("png", size), ("txt", 9))]
    path, asked = write_tar(tmp_path / "shards" / "a.tar", members), []
    real = streaming.remote.read_bytes

    def read_bytes(file, begin, end):
        asked.append(end - begin)
        return real(file, begin, end)

    monkeypatch.setattr(streaming.remote, "read_bytes", read_bytes)
    assert len(rows_of(tmp_path / "shards", tmp_path)) == count
    assert len(asked) <= count + 1 and sum(asked) < 1.01 * path.stat().st_size
    assert len(asked) < 6 if size < 10**6 else sum(asked) < path.stat().st_size / 5


def test_subsets_lie_in_few_chunks(tmp_path):
    rows = rows_of(tables(tmp_path / "tables", 12, 5), tmp_path)
    few = selection.take_subset(rows, 11, 3)
    assert len(few) == 11 and len(few.lengths) == 3 and sorted(few.lengths) == [1, 5, 5]
    assert not np.array_equal(few.row_numbers, selection.take_subset(rows, 11, 4).row_numbers)
    train, val_samples = selection.split_validation(rows, 0.2, 3)
    assert len(train) == 48 and len(val_samples) == 12 and len(val_samples.lengths) == 3
    assert sorted(np.concatenate([train.row_numbers, val_samples.row_numbers])) == list(range(60))
    assert val_samples.captions(11) == [caption(val_samples.row_numbers[11])]
    assert len({rows.fingerprint(), few.fingerprint(), train.fingerprint(), val_samples.fingerprint()}) == 4


def test_a_spool_holds_what_is_needed_and_goes_with_the_last_who_uses_it(tmp_path, monkeypatch):
    """... and one that was left by a killed run goes when the next begins."""
    left = tmp_path / "text-to-image-streams" / f"spool-{os.uname().nodename}-1-0"
    left.mkdir(parents=True)
    rows = rows_of(tables(tmp_path / "tables", 60, 4), tmp_path)
    twin = rows_of(tmp_path / "tables", tmp_path)
    (spool,) = spools(tmp_path)
    assert rows.source.spool.folder == twin.source.spool.folder == spool
    batch_plan = BatchPlan(len(rows), 1, 4, stream=rows)
    monkeypatch.setattr(streaming.source, "IDLE_STEPS", 2)
    most, batches = 0, batch_plan.batches(Position())
    for _ in range(100):  # of 60 in an epoch
        for _, index, _ in next(batches):
            assert rows.captions(index) == [caption(index)]
        most = max(most, len(rows.source.spool.chunks()))
    assert 16 < most <= 2 * 16 + 2 * 4
    for index in range(0, 40, 4):
        assert pickle.loads(pickle.dumps(twin)).captions(index) == [caption(index)]  # in a data worker that is no fork
    del rows, batch_plan, batches
    assert spools(tmp_path) == [spool]
    del twin
    assert spools(tmp_path) == []


# --- training --------------------------------------------------------------------------------------------------------


def test_a_streamed_run_is_the_same_run_in_its_own_order(run, shards, parquet, cache, tmp_path, monkeypatch):
    """To the bit, with the library that reads tables whole, once that is put into this order."""
    monkeypatch.setattr(streaming.chunks, "CHUNK_BYTES", 1)
    run(tmp_path / "streamed", *FEW, *cache, "--train_data_dir", parquet)
    plain = [word for word in FEW if word not in ("--streaming", "--shuffle_buffer", "8")]
    run(tmp_path / "plain", *plain, *cache, "--train_data_dir", parquet)
    assert result_bytes(tmp_path / "streamed") != result_bytes(tmp_path / "plain")
    monkeypatch.setattr(draws, "order", lambda seed, epoch, size: epoch_order(seed, epoch, np.full(6, 5), 8))
    run(tmp_path / "ordered", *plain, *cache, "--train_data_dir", parquet)
    assert result_bytes(tmp_path / "streamed") == result_bytes(tmp_path / "ordered")
    monkeypatch.setattr(streaming.chunks, "CHUNK_BYTES", 2**20)  # a chunk is a file, as it is for the tables
    run(tmp_path / "shards", *FEW, *cache, "--train_data_dir", shards, "--dataloader_num_workers", "2")
    assert result_bytes(tmp_path / "shards") == result_bytes(tmp_path / "streamed")
    assert spools(cache[1]) == []


def test_a_stream_is_resumed(each, parquet, cache, tmp_path):
    """Inside an epoch, to the same weights to the bit."""
    flags = [*FEW, *cache, "--train_data_dir", parquet, "--max_train_steps", "3"]
    each(tmp_path / "complete", *flags)
    each(tmp_path / "cut", *flags, "--max_train_steps", "2", "--checkpointing_steps", "2")
    each(tmp_path / "cut", *flags, "--resume_from_checkpoint", "latest")
    assert result_bytes(tmp_path / "cut") == result_bytes(tmp_path / "complete")


def test_another_epoch_a_subset_and_validation_images(run, shards, cache, tmp_path, capsys):
    more = ["--max_train_samples", "14", "--validation_split", "0.3", "--validation_steps", "3"]
    flags = [*FEW, *cache, "--train_data_dir", shards, *more, "--max_train_steps", "7"]
    run(tmp_path / "complete", *flags)
    said = capsys.readouterr().err
    assert "streaming 30 images in chunks, 6 of " in said and re.search(r"images +10\b", said)
    assert len(re.findall(r"val_loss \d", said)) == 3
    run(tmp_path / "cut", *flags, "--checkpointing_steps", "4")
    run(tmp_path / "cut", *flags, "--resume_from_checkpoint", "checkpoint-4", "--dataloader_num_workers", "1")
    assert result_bytes(tmp_path / "cut") == result_bytes(tmp_path / "complete")
    capsys.readouterr()
    run(tmp_path / "cut", *flags, "--resume_from_checkpoint", "checkpoint-4", "--shuffle_buffer", "9")
    assert "shuffle_buffer 8 -> 9" in capsys.readouterr().err


def test_two_processes_are_one(run, parquet, cache, tmp_path):
    flags = [*FEW, *cache, "--train_data_dir", parquet, "--max_train_steps", "9", "--adam_epsilon", "1e-5"]
    run(tmp_path / "one", *flags)
    two = [*flags, "--train_batch_size", "2", "--dataloader_num_workers", "1"]
    run.on_two_processes(tmp_path / "two", *two)
    assert relative_difference(tmp_path / "two", tmp_path / "one") < 1e-6
    assert spools(cache[1]) == []


def test_a_member_whose_name_is_not_utf8_is_read(tmp_path):
    members = [("caf\xe9.png", png(0)), ("caf\xe9.txt", b"x"), ("1.png", png(1)), ("1.txt", b"y")]
    write_tar(tmp_path / "set" / "a.tar", members, encoding="latin-1", format=tarfile.GNU_FORMAT)
    rows = rows_of(tmp_path / "set", tmp_path / "cache")
    assert sorted(rows.captions(index) for index in range(len(rows))) == [["x"], ["y"]]


def spoilt(index, sample):
    if index % 7 == 3:
        sample[f"{index:04}.png"] = png(index)[:200]
    if index % 7 == 5:
        sample[f"{index:04}.txt"] = b"\xe9"


def test_bad_samples_are_met_when_their_turn_comes(run, cache, tmp_path, capsys):
    folder = tars(tmp_path / "shards", change=spoilt)
    flags = [*FEW, *cache, "--train_data_dir", folder, "--max_train_steps", "8"]
    sentence, code = run.fails(tmp_path / "error", *flags)
    assert re.search(r"000?\d.tar/00\d\d.(png cannot be (read as an image|used) \(.+\)); fix or remove it", sentence)
    assert code == 2 and "--on_bad_sample skip" in sentence
    assert run(tmp_path / "skip", *flags, "--on_bad_sample", "skip") == 0
    said = capsys.readouterr().err
    assert "8 images could not be used in training" in said and "0005.txt is not UTF-8 text" in said
    assert run(tmp_path / "check", "--check_data", "--streaming", *cache, "--train_data_dir", folder) == 2
    report = capsys.readouterr().out
    assert "samples    30, 8 cannot be used" in report and "no usable caption: 4" in report
    assert "000.tar/0003.png" in report


def test_a_report_reads_a_stream_once(parquet, tmp_path, capsys, monkeypatch):
    seen = []
    real = streaming.parquet.fetch_from_table

    def fetch(file, chunk, **columns):
        seen.append(chunk.file)
        return real(file, chunk, **columns)

    monkeypatch.setattr(streaming.parquet, "fetch_from_table", fetch)
    source = {"dataset_name": None, "folder": parquet, "cache_dir": str(tmp_path), "shuffle_buffer": 8}
    assert inspection.check_data(DataOptions(**source), 16) == 0
    said = capsys.readouterr()
    assert "captions   30\nimages     30 decoded" in said.out and sorted(seen) == list(range(6))


def test_a_dry_run_tells_of_chunks(run, parquet, tmp_path, capsys):
    run(tmp_path / "out", "--dry_run", *FEW, "--cache_dir", tmp_path / "cache", "--train_data_dir", parquet)
    out = capsys.readouterr().out
    assert out.startswith("images      30 to train on, 0 for validation\nchunks      6 of 0.00")
    assert not (tmp_path / "out").exists() and spools(tmp_path / "cache") == []


# --- refusals --------------------------------------------------------------------------------------------------------


def refused(folder, **options):
    with pytest.raises(UserError) as caught:
        rows_of(folder, folder.parent / "cache", **options)
    assert "\n" not in str(caught.value)
    return str(caught.value), caught.value.exit_code


def test_what_cannot_be_streamed(images, parquet, tmp_path):
    sentence, code = refused(Path(images))
    assert "holds single images, which are read in place as it is; leave --streaming out" in sentence and code == 2
    options = {"cache_dir": str(tmp_path), "shuffle_buffer": 8}
    with pytest.raises(UserError, match="holds .jsonl, .png files, and --streaming reads .parquet tables or plain"):
        opening.load_dataset(DataOptions(dataset_name=images, **options))
    with pytest.raises(UserError, match="--dataset_name nowhere/at_all cannot be loaded"):
        opening.load_dataset(DataOptions(dataset_name="nowhere/at_all", **options))
    assert "--image_column text holds string, not images" in refused(parquet, image_column="text")[0]
    assert "--caption_column title: there is no such column" in refused(parquet, caption_column="title")[0]
    (tables(tmp_path / "test", 1) / "train-00000-of-00001.parquet").rename(tmp_path / "test" / "test.parquet")
    assert "has no split 'train', only test" in refused(tmp_path / "test")[0]
    write_tar(tmp_path / "bare" / "a.tar", [("0.png", png(0))])
    assert "holds no captions beside its images" in refused(tmp_path / "bare")[0]
    write_tar(tmp_path / "none" / "a.tar", [("0.txt", b"x")])
    assert "holds no images" in refused(tmp_path / "none")[0]


def test_damage(parquet, tmp_path, monkeypatch):
    """A file that shows when it is looked through ends a run before it begins, one that shows later ends it then."""
    monkeypatch.setattr(streaming.remote, "RETRY_SECONDS", ())
    folder = tars(tmp_path / "shards", 2, 3)
    content = (folder / "001.tar").read_bytes()
    (folder / "001.tar").write_bytes(content[:1500])
    assert re.search("001.tar cannot be read as a tar file after|001.tar is cut off after", refused(folder)[0])
    folder = tables(tmp_path / "tables", 2, 3)
    (folder / "train-00001-of-00002.parquet").write_bytes(b"PAR1")
    assert "train-00001-of-00002.parquet cannot be read as parquet" in refused(folder)[0]
    folder = tables(tmp_path / "later", 2, 3, compression="none")
    rows = rows_of(folder, tmp_path)
    path = folder / "train-00001-of-00002.parquet"
    at = pyarrow.parquet.read_metadata(path).row_group(0).column(1).data_page_offset  # of the images
    content = path.read_bytes()
    path.write_bytes(content[:at] + bytes(50) + content[at + 50 :])
    with pytest.raises(
        UserError, match="train-00001-of-00002.parquet cannot be read as parquet from row 0 on"
    ) as caught:
        rows.captions(5)
    assert caught.value.exit_code == 1 and rows.captions(0) == [caption(0)]
    path.unlink()
    with pytest.raises(UserError, match="train-00001-of-00002.parquet cannot be read: .*No such file"):
        rows.captions(4)


def planted(*arguments, **options):
    raise TypeError("a planted bug")


def test_a_bug_while_a_dataset_is_opened_is_no_damaged_file(shards, parquet, tmp_path, monkeypatch, capsys):
    for folder, place, name in (
        (shards, streaming.remote, "File"),
        (shards, streaming.shards._Walk, "add"),
        (parquet, streaming.remote.RemoteFile, "_between"),
        (parquet, streaming.parquet, "_column_ranges"),
        (parquet, streaming.chunks.Listing, "as_json"),
    ):
        streaming.parquet.read_footer.cache_clear()
        with monkeypatch.context() as patch, pytest.raises(TypeError, match="a planted bug"):
            patch.setattr(place, name, planted)
            opening.load_dataset(DataOptions(folder=folder, cache_dir=str(tmp_path), shuffle_buffer=8))
    assert "trying again" not in capsys.readouterr().err


def test_a_bug_while_a_chunk_is_fetched_is_no_damaged_file_nor_full_disk(shards, parquet, tmp_path, monkeypatch):
    for folder, place, name in (
        (shards, streaming.shards, "first_caption"),
        (shards, streaming.chunks.ChunkContent, "record_batch"),
        (parquet, streaming.remote.RemoteFile, "_between"),
        (parquet, streaming.parquet, "_merged_ranges"),
    ):
        rows = rows_of(folder, tmp_path / name)
        with monkeypatch.context() as patch, pytest.raises(TypeError, match="a planted bug"):
            patch.setattr(place, name, planted)
            rows.captions(0)
        assert rows.captions(0) == [caption(0)]


def test_errors_show_what_they_come_from(parquet, tmp_path, monkeypatch):
    """As TRAINING_TRACEBACK=1 prints it."""
    rows = rows_of(parquet, tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(streaming.spool.os, "replace", full)
    with pytest.raises(UserError) as caught:
        rows.captions(0)
    assert isinstance(caught.value.__cause__, OSError)


def test_a_spool_in_use_stays_until_its_processes_end_however_they_end(tmp_path):
    """A killed process leaves the spool to the next run; a data worker that outlives it does not hold it."""
    rows = rows_of(tars(tmp_path / "set", 2, 3), tmp_path)
    root = tmp_path / "text-to-image-streams"
    other = root / f"spool-{os.uname().nodename}-1-0"
    ready, said = os.pipe()
    child = os.fork()
    if not child:
        spool = streaming.spool.Spool(root, "0" * 8)
        spool.folder.rename(other)  # as if another launch had made it
        worker = os.fork()
        if worker:
            os.write(said, str(worker).encode())
        time.sleep(60)
        os._exit(0)
    worker = int(os.read(ready, 20))
    twin = rows_of(tmp_path / "set", tmp_path)
    assert other in spools(tmp_path)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    again = rows_of(tmp_path / "set", tmp_path)
    os.kill(worker, signal.SIGKILL)
    assert spools(tmp_path) == [rows.source.spool.folder]
    del rows, twin, again
    assert spools(tmp_path) == []


def test_a_chunk_is_fetched_by_one_thread_while_others_wait(tmp_path):
    rows = rows_of(tables(tmp_path / "tables", 1, 4), tmp_path)
    real, fetched = rows.source.fetch, []

    def fetch(file, chunk):
        fetched.append(chunk)
        time.sleep(0.2)
        return real(file, chunk)

    rows.source.fetch = fetch
    threads = [threading.Thread(target=rows.captions, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fetched) == 1


def test_a_disk_that_is_too_small(parquet, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming.opening.shutil, "disk_usage", lambda folder: type("", (), {"free": 1000}))
    sentence, code = refused(parquet)
    assert "the chunks that a stream needs at the same time take about 0.0" in sentence and code == 2
    assert "name another folder with --cache_dir, or lower --shuffle_buffer" in sentence
    monkeypatch.undo()
    rows = rows_of(parquet, tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(streaming.spool.os, "replace", full)
    with pytest.raises(UserError, match="cannot be kept in .*No space left on device") as caught:
        rows.captions(0)
    assert caught.value.exit_code == 1


# --- over HTTP -------------------------------------------------------------------------------------------------------

LARGER = (200, 160)  # pixels; a PNG of them takes 96 kB: what is read beside images, footers alone, is little then


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with Hub(tmp_path_factory.mktemp("hub")) as hub:
        folder = tmp_path_factory.mktemp("published")
        hub.add("me/tables", tables(folder / "tables", 24, 4, LARGER), kind="datasets", private=True)
        hub.add("some/shards", tars(folder / "shards", 24, 4), kind="datasets")
        yield hub
        hub.assert_that_no_token_went_astray()


RUN = """
import os, runpy, sys
from pathlib import Path
from training_utils.data.streaming import source

source.IDLE_STEPS = 0  # a chunk goes as soon as no sample to come needs it
Path(words[0]).write_text(str(os.getpid()))
sys.argv = words[1:]
runpy.run_path(words[1], run_name="__main__")
"""


def command(run, tmp_path, name, out, *more):
    """The words of a run on a dataset of the hub."""
    words = run.argv(tmp_path / out, "--dataset_name", name, "--cache_dir", tmp_path / "cache", *FEW, *more)
    return ["-c", RUN, tmp_path / "process", f"{run.script}.py", *words]


def once_there_is(path, action):
    """Call a function, in a thread, as soon as there is such a path."""

    def wait():
        while not path.exists():
            time.sleep(0.01)
        action()

    threading.Thread(target=wait, daemon=True).start()


def stored(folder):
    """How many bytes lie in a folder."""
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def test_a_run_downloads_what_it_trains_on(run, hub, machine, tmp_path):
    """And a little ahead of it; the disk never holds the dataset."""
    hub.faults.clear(), hub.sent.clear()
    total = sum(map(len, hub.repositories["datasets", "me/tables"].files().values()))
    few = ["--max_train_samples", "12", "--max_train_steps", "5"]
    said = machine.runs(*command(run, tmp_path, "me/tables", "out", *few), token="hf_mine")
    assert "streaming 96 images in chunks, 24 of 0.38" in said
    fetched = sum(size for path, size in hub.sent if path.startswith("/lfs/"))
    assert 0.98 * 3 / 24 < (fetched - 24 * 2**16) / total < 3 / 24  # of all a footer, and two columns of three tables
    assert stored(machine.folder / "home") + stored(tmp_path / "cache") < total / 50
    assert spools(tmp_path / "cache") == []
    hub.sent.clear()
    machine.runs(*command(run, tmp_path, "me/tables", "again", *few), token="hf_mine")
    sentence = machine.fails(*command(run, tmp_path, "me/tables", "again", *few), code=2)
    assert sentence.startswith("--dataset_name me/tables cannot be loaded: ")
    assert sum(size for path, size in hub.sent if path.startswith("/lfs/")) == fetched - 20 * 2**16


@pytest.mark.parametrize("name", [pytest.param("me/tables", marks=pytest.mark.slow), "some/shards"])
def test_a_run_that_is_killed_while_it_fetches(run, hub, machine, tmp_path, name):
    """... leaves nothing that is taken for a whole chunk, and goes on to the same weights to the bit, over a line that
    breaks now and then."""
    hub.faults.clear()
    words = ["--max_train_steps", "20"]
    machine.runs(*command(run, tmp_path, name, "complete", *words), token="hf_mine")

    def kill():
        os.kill(int((tmp_path / "process").read_text()), signal.SIGKILL)

    once_there_is(tmp_path / "cut" / "checkpoint-4", lambda: hub.fails("GET", "/lfs/", kill))
    code, said = machine(*command(run, tmp_path, name, "cut", *words, "--checkpointing_steps", "2"), token="hf_mine")
    assert code == -signal.SIGKILL, said
    assert not (tmp_path / "cut" / "model_index.json").exists() and not (tmp_path / "cut" / "checkpoint-20").exists()
    (spool,) = spools(tmp_path / "cache")
    for path in spool.glob("*.arrow"):
        with pyarrow.memory_map(str(path)) as file:
            assert pyarrow.ipc.open_file(file).get_batch(0).num_rows == 4

    hub.fails("GET", "/lfs/", "cut", times=2)
    hub.fails("GET", "/resolve/", 503, times=2)
    words += ["--resume_from_checkpoint", "latest"]
    said = machine.runs(*command(run, tmp_path, name, "cut", *words), token="hf_mine")
    assert "warning" not in said and not any(times for *_, times in hub.faults)
    assert result_bytes(tmp_path / "cut") == result_bytes(tmp_path / "complete")
    assert spools(tmp_path / "cache") == []


def test_a_line_that_breaks_for_good(run, hub, machine, tmp_path):
    hub.faults.clear()
    once_there_is(tmp_path / "out" / "checkpoint-4", lambda: hub.fails("GET", "/lfs/", "cut", times=9999))
    words = ["--max_train_steps", "30", "--checkpointing_steps", "2"]
    sentence = machine.fails(*command(run, tmp_path, "some/shards", "out", *words), code=1)
    assert re.match(r"some/shards/0\d\d.tar cannot be read: ", sentence) and "\n" not in sentence
    assert (tmp_path / "out" / "checkpoint-4").is_dir() and spools(tmp_path / "cache") == []
