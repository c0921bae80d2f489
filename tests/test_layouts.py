"""The same files are the same samples in every layout: in a folder, in a shard, and in a shard that is streamed."""

import json
import tarfile
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_formats import captions_of, complaint, png_bytes, rows_of, write_tar
from test_streaming import png

from training_utils.base.errors import UserError
from training_utils.cli.options import DataOptions
from training_utils.data import checking, opening
from training_utils.data.streaming import chunks
from training_utils.data.streaming.opening import LISTING_FORMATS

CHUNK_BYTES = 4000  # of a stream in these tests, a few of the images


def unpacked(shard, folder):
    """The folder that `tar -x` makes of a shard."""
    with tarfile.open(shard) as tar:
        tar.extractall(folder, filter="data")
    return folder


def samples(rows):
    """The images and captions of a dataset, sorted."""
    found = []
    for index in range(len(rows)):
        found.append((rows.captions(index), rows.image(index).tobytes()))
    return sorted(found)


def in_every_layout(shard, folder, column="text"):
    """The samples of a shard: unpacked into a folder, as it is, and streamed. Where one is refused, its sentence."""
    layouts = {
        "folder": DataOptions(folder=str(unpacked(shard, folder / "unpacked")), caption_column=column),
        "shard": DataOptions(folder=str(shard.parent), caption_column=column),
        "stream": DataOptions(
            folder=str(shard.parent), cache_dir=str(folder / "cache"), caption_column=column, shuffle_buffer=4
        ),
    }
    found = {}
    for name, options in layouts.items():
        try:
            rows = opening.load_dataset(options)
            checking.check_dataset(rows)
            found[name] = samples(rows)
        except UserError as error:
            found[name] = str(error)
    return found


def all_alike(found):
    return found["folder"] == found["shard"] == found["stream"]


def small(index):
    """An image so small that a chunk holds a few."""
    return png(index, (10, 8 + index % 3))


NAMES = ["a", "b", "sub/a", "b.c", "é", unicodedata.normalize("NFD", "ü")]
MEMBERS = {
    ".png": lambda number: small(number),
    ".txt": lambda number: f" text {number}\n".encode(),
    ".caption": lambda number: f"caption {number}".encode(),
    ".json": lambda number: json.dumps({"text": [f"json {number}", "ä"]} if number % 3 else {"text": None}).encode(),
}


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    members=st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from([*MEMBERS, ".png", ".txt"])), min_size=1),
    chunk_bytes=st.sampled_from([1, 2000, 10_000, 2**26]),
)
def test_members_in_any_order_and_written_again(tmp_path_factory, members, chunk_bytes):
    """Whatever lies where in a shard, and how often: as when it is unpacked."""
    folder = tmp_path_factory.mktemp("any")
    members = [*members, ("sure", ".png"), ("sure", ".txt")]
    contents = [(f"{name}{ending}", MEMBERS[ending](number)) for number, (name, ending) in enumerate(members)]
    shard = write_tar(folder / "set" / "0.tar", contents)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "CHUNK_BYTES", chunk_bytes)
        found = in_every_layout(shard, folder)
    # A stream is checked when a sample's turn comes: a null in a `.json` is its caption's fault, not the dataset's.
    refusals = [sentence for sentence in found.values() if isinstance(sentence, str)]
    if refusals:
        assert len(refusals) == 3 and all("no usable caption" in each or "nothing" in each for each in refusals), found
    else:
        assert all_alike(found), found


@pytest.mark.parametrize("endings", [(".txt", ".caption"), (".txt", ".json"), (".caption", ".json"), (".caption",)])
def test_one_of_several_captions_is_taken_everywhere(tmp_path, endings):
    contents = {".txt": b"tags", ".caption": b"a sentence", ".json": b'{"text": "from json"}'}
    shard = write_tar(tmp_path / "set" / "0.tar", [("0.png", small(0)), *((f"0{e}", contents[e]) for e in endings)])
    found = in_every_layout(shard, tmp_path)
    assert all_alike(found)
    expected = "from json" if ".json" in endings else "tags" if ".txt" in endings else "a sentence"
    assert found["folder"][0][0] == [expected]


@pytest.mark.parametrize("again", [["0.png"], ["0.txt"], ["0.png", "0.txt"], ["./0.txt"], [".//0.png"]])
def test_a_shard_that_was_updated(tmp_path, again, monkeypatch):
    """`tar -rf`: the later member counts. Others lie in between, in chunks of a stream of their own."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", CHUNK_BYTES)
    members = [(f"{i}{e}", MEMBERS[e](i)) for i in range(12) for e in (".png", ".txt")]
    shard = write_tar(tmp_path / "set" / "0.tar", members)
    write_tar(shard, [(name, MEMBERS[name[-4:]](77)) for name in again], mode="a")
    found = in_every_layout(shard, tmp_path)
    assert all_alike(found) and len(found["shard"]) == 12
    caption_is_new = any(name.endswith(".txt") for name in again)
    expected = "text 77" if caption_is_new else "text 0"
    assert [expected] in [captions for captions, _ in found["shard"]]
    rows = rows_of(tmp_path / "set")
    image_is_new = any(name.endswith(".png") for name in again)
    assert (rows.name(11) == f"{shard}/{again[0]}") == image_is_new


@pytest.mark.parametrize("first", [".png", ".txt"])
@pytest.mark.parametrize("ending", [".txt", ".caption", ".json"])
def test_captions_apart_from_their_images(tmp_path, monkeypatch, capsys, first, ending):
    """`tar cf 0.tar *.png *.txt`: other chunks of a stream hold the captions than the images."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", CHUNK_BYTES)
    images = [(f"{i}.png", small(i)) for i in range(15)]
    captions = [(f"{i}{ending}", json.dumps({"text": f"é {i}"}).encode()) for i in range(15)]
    members = [*images, *captions] if first == ".png" else [*captions, *images]
    shard = write_tar(tmp_path / "set" / "0.tar", members)
    found = in_every_layout(shard, tmp_path)
    assert all_alike(found) and len(found["stream"]) == 15
    said = capsys.readouterr().err
    assert "left out" not in said and "streaming 15 images" in said
    # What is remembered of the shard has the captions too.
    assert in_every_layout(shard, tmp_path)["stream"] == found["stream"]


def test_a_listing_of_an_earlier_release_is_not_used():
    """It left out images whose captions lie apart; listings of tables stay."""
    assert LISTING_FORMATS == {"tables": 1, "shards": 2}


BAD_CAPTION_FILES = {
    "another column": ("0.json", b'{"title": "x"}', "0.json has no caption column 'text' (--caption_column); it has"),
    "not JSON": ("0.json", b"{", "0.json is not JSON"),
    "not UTF-8": ("0.txt", "é".encode("latin-1"), "0.txt is not UTF-8 text (byte 0)"),
    "null": ("0.json", b'{"text": null}', "nothing"),
}


@pytest.mark.parametrize("what", BAD_CAPTION_FILES)
def test_a_bad_caption_file_is_one_everywhere(tmp_path, what):
    name, content, expected = BAD_CAPTION_FILES[what]
    members = [("0.png", small(0)), (name, content), ("1.png", small(1)), ("1.txt", b"x")]
    found = in_every_layout(write_tar(tmp_path / "set" / "0.tar", members), tmp_path)
    for sentence in found.values():
        assert isinstance(sentence, str) and expected in sentence


def test_no_caption_file_behind_the_one_that_counts_is_read(tmp_path):
    members = [("0.png", small(0)), ("0.txt", b"good"), ("0.caption", b"\xe9"), ("alone.json", b"{")]
    found = in_every_layout(write_tar(tmp_path / "set" / "0.tar", members), tmp_path)
    assert all_alike(found) and found["shard"][0][0] == ["good"]


def test_a_json_without_the_column_gives_way_to_text_and_to_the_words_of_a_folder(tmp_path):
    folder = unpacked(
        write_tar(tmp_path / "0.tar", [("2_dog/0.png", small(0)), ("2_dog/0.json", b'{"url": "x"}')]),
        tmp_path / "set",
    )
    assert captions_of(rows_of(folder, repeats_from_folders=True)) == [["dog"]]
    assert "has no caption column 'text'" in complaint(folder)
    (folder / "2_dog" / "0.txt").write_text("a dog")
    assert captions_of(rows_of(folder)) == [["a dog"]]


def test_many_keys_of_a_json_are_not_all_listed(tmp_path):
    entry = json.dumps({f"key {number} {'x' * 500}": 1 for number in range(2000)}).encode()
    sentence = complaint(write_tar(tmp_path / "0.tar", [("0.png", png_bytes(0)), ("0.json", entry)]).parent)
    assert "and 1990 more" in sentence and len(sentence) < 1900
