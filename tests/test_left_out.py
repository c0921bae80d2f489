"""Whatever lies in a dataset and is not trained is named with a count, in folders, shards and streams; and what other
programs keep there is not trained."""

import io
import tarfile

import numpy as np
import pytest
from PIL import Image
from tiny import image, write_images

from training_utils.base.errors import UserError
from training_utils.cli.options import DataOptions
from training_utils.data import checking, files, inspection, left_out, opening, plug_ins
from training_utils.data.left_out import LeftOut
from training_utils.data.plug_ins import PLUG_INS

DANBOORU = "__hatsune_miku_vocaloid_drawn_by_someone__0123456789abcdef"


def captioned(folder, *names):
    """Images of these names, each with a caption that is its number."""
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image(number).save(path)
        path.with_suffix(".txt").write_text(str(number))
    return folder


def rows_of(folder, **options):
    rows = opening.load_dataset(DataOptions(folder=str(folder), **options))
    checking.check_dataset(rows)
    return rows


def captions_of(rows):
    return [caption for index in range(len(rows)) for caption in rows.captions(index)]


def png_bytes(number):
    content = io.BytesIO()
    image(number).save(content, "png")
    return content.getvalue()


def add(tar, name, content=b"", **changes):
    """Add a member; `changes` are to its header, for links."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in changes.items():
        setattr(info, key, value)
    tar.addfile(info, io.BytesIO(content))


@pytest.fixture(params=["plain", "streamed"])
def opened(request, tmp_path):
    """Opens a folder of shards, streamed or not."""
    streamed = {"shuffle_buffer": 4} if request.param == "streamed" else {}
    return lambda folder, **options: rows_of(folder, cache_dir=str(tmp_path / "cache"), **streamed, **options)


# --- names -----------------------------------------------------------------------------------------------------------


def test_names_of_danbooru_are_images(tmp_path, opened):
    folder = captioned(tmp_path / "folder", f"{DANBOORU}.png", "b.png")
    rows = rows_of(folder)
    assert captions_of(rows) == ["0", "1"] and not rows.findings.left_out
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards" / "0.tar", "w") as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, path.name)
    rows = opened(tmp_path / "shards")
    assert len(rows) == 2 and not rows.findings.left_out


def test_folders_of_other_programs_are_not_read_and_are_named(tmp_path, capsys):
    """... by the decoders neither, which need no captions."""
    kept = ["@eaDir/0.png", "#recycle", "$RECYCLE.BIN", "System Volume Information", "__MACOSX", ".thumbs", "@Recycle"]
    thumbnails = [f"{name}/SYNOPHOTO_THUMB_M.png" for name in kept]
    captioned(tmp_path, "0.png", "more/@home/1.png", *thumbnails, "more/@eaDir/1.png/SYNOPHOTO_THUMB_S.png")
    for caption_column in ("text", None):
        rows = rows_of(tmp_path, caption_column=caption_column)
        assert len(rows) == 2 and rows.findings.left_out.counts == {"folder": 8}
        said = capsys.readouterr().err
        assert "8 folders that are hidden or belong to another program are skipped: " in said and "#recycle" in said


def test_masks_of_another_trainer_are_not_trained(tmp_path, opened):
    folder = captioned(tmp_path / "folder", "1.png", "2.png")
    for name in ("1-masklabel.png", "1-condlabel.png", "2-MaskLabel.PNG"):
        image(9).save(folder / name)
    rows = rows_of(folder, caption_column=None)
    assert len(rows) == 2 and rows.findings.left_out.counts == {"mask": 3}
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards" / "0.tar", "w") as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, path.name)
    rows = opened(tmp_path / "shards", caption_column=None)
    assert len(rows) == 2 and rows.findings.left_out.counts == {"mask": 3}


@pytest.mark.parametrize("ending", ["TXT", "Txt", "CAPTION"])
def test_endings_of_captions_in_capitals(tmp_path, opened, ending):
    folder = tmp_path / "folder"
    folder.mkdir()
    image(0).save(folder / "IMG_1.JPG")
    (folder / f"IMG_1.{ending}").write_text("a caption")
    rows = rows_of(folder)
    assert captions_of(rows) == ["a caption"] and not rows.findings.left_out
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards" / "0.tar", "w") as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, path.name)
        add(tar, "IMG_2.PNG", png_bytes(2))
        add(tar, "IMG_2.JSON", b'{"text": "another"}')
    rows = opened(tmp_path / "shards")
    if rows.stream is not None:
        rows.source.expect([rows.row_numbers], idle_steps=0)
    assert captions_of(rows) == ["a caption", "another"] and not rows.findings.left_out


# --- what is named ---------------------------------------------------------------------------------------------------


@pytest.fixture
def strewn(tmp_path, monkeypatch):
    """A folder of two images and one of everything else; the plug-ins are not installed."""
    monkeypatch.setattr(plug_ins, "MISSING", PLUG_INS)
    monkeypatch.setattr(files, "MISSING", PLUG_INS)
    folder = captioned(tmp_path / "strewn", "0.png", "1.png", "@eaDir/2.png")
    image(3).save(folder / ".hidden.png")
    image(3).save(folder / "0-masklabel.png")
    for name in ("a.HEIC", "b.jxl", "c.psd", "d.CR2", "e.mp4", "f.npz", "README.md", "no ending", "g.zip", "7.txt"):
        (folder / name).write_bytes(b"x")
    for name in ("._0.png", ".DS_Store", "Thumbs.db", "desktop.ini", ".gitattributes"):
        (folder / name).write_bytes(b"x")
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    return folder


COUNTS = dict.fromkeys(["HEIC", "JPEG XL", "mask", "hidden", "folder", "broken link", "caption"], 1)
COUNTS |= {"kind": 2, "other": 5}
SENTENCES = [
    "1 HEIC images are skipped: STREWN/a.HEIC; pip install pillow-heif to read them, or convert them to PNG",
    "1 JPEG XL images are skipped: STREWN/b.jxl; pip install pillow-jxl-plugin to read them, or convert them to PNG",
    "2 images of an unsupported kind are skipped: STREWN/c.psd, STREWN/d.CR2; convert them to PNG",
    "1 masks and conditioning images of another trainer are skipped: STREWN/0-masklabel.png",
    "1 hidden images (names that begin with a dot) are skipped: STREWN/.hidden.png",
    "1 folders that are hidden or belong to another program are skipped: STREWN/@eaDir",
    "1 links to what does not exist are skipped: STREWN/gone.png",
    "1 text files that belong to no image are skipped: STREWN/7.txt",
    "5 files of other kinds are skipped: STREWN/README.md, STREWN/e.mp4, STREWN/f.npz, STREWN/g.zip, STREWN/no ending",
]


def test_what_is_in_a_folder_and_not_trained_is_named_with_a_count(strewn, capsys):
    rows = rows_of(strewn)
    assert len(rows) == 2 and rows.findings.left_out.counts == COUNTS
    said = capsys.readouterr().err
    for sentence in SENTENCES:
        assert f"warning: {sentence.replace('STREWN', str(strewn))}\n" in said


def test_a_report_names_it_too(strewn, capsys):
    assert inspection.check_data(DataOptions(folder=str(strewn)), 16) == 0
    report = capsys.readouterr().out
    assert "\nnot trained\n  HEIC images: 1\n      a.HEIC\n      pip install pillow-heif to read them" in report
    assert "  files of other kinds: 5\n      README.md, e.mp4, f.npz, g.zip, no ending\n" in report
    assert report.endswith("Every sample can be used. What else lies there is named above (14).\n")


def test_a_folder_of_images_of_phones_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(plug_ins, "MISSING", PLUG_INS)
    monkeypatch.setattr(files, "MISSING", PLUG_INS)
    for number in range(12):
        (tmp_path / f"{number:02}.heic").write_bytes(b"x")
    with pytest.raises(UserError) as caught:
        rows_of(tmp_path)
    assert "holds no images" in str(caught.value)
    assert "12 HEIC images are skipped: " in str(caught.value) and "and 2 more; pip install pillow-heif" in str(
        caught.value
    )


def test_several_sources_are_counted_together(strewn, tmp_path):
    captioned(tmp_path / "more", "0.png")
    (tmp_path / "more" / "x.mp4").touch()
    (tmp_path / "data.yaml").write_text("- path: strewn\n- path: more\n")
    rows = opening.load_dataset(DataOptions(config=str(tmp_path / "data.yaml")))
    assert rows.findings.left_out.counts == COUNTS | {"other": 6}


def test_a_folder_of_tables_is_told_too(tmp_path, capsys):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"image": [png_bytes(0)], "text": ["x"]}), tmp_path / "train.parquet")
    (tmp_path / "notes.md").touch()
    rows_of(tmp_path, cache_dir=str(tmp_path / ".cache"))
    assert "1 files of other kinds are skipped" in capsys.readouterr().err


def test_an_ordinary_folder_gets_no_word(tmp_path, capsys):
    write_images(tmp_path)
    (tmp_path / ".DS_Store").touch()
    assert not rows_of(tmp_path).findings.left_out and capsys.readouterr().err == ""


def test_what_metadata_name_is_trained(tmp_path):
    """... also where the name would not be taken for that of an image to train on."""
    write_images(tmp_path, 1)
    (tmp_path / "0.png").rename(tmp_path / "0-masklabel.png")
    image(1).save(tmp_path / "1.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "0-masklabel.png", "text": "a mask"}')
    assert captions_of(rows_of(tmp_path)) == ["a mask"]


def test_only_the_first_names_are_kept():
    many = LeftOut()
    for number in range(25):
        many.add("other", f"{number}.md")
    other = LeftOut.from_json(many.as_json())
    other.merge(many)
    (group,) = other.groups()
    assert len(other) == 50 and group.listed() == ", ".join(f"{number}.md" for number in range(10)) + " and 40 more"
    assert set(left_out.REASONS) >= set(COUNTS)


# --- shards ----------------------------------------------------------------------------------------------------------


def test_members_that_are_not_trained_are_named(tmp_path, opened, capsys, monkeypatch):
    monkeypatch.setattr(plug_ins, "MISSING", PLUG_INS)
    monkeypatch.setattr(files, "MISSING", PLUG_INS)
    (tmp_path / "set").mkdir()
    with tarfile.open(tmp_path / "set" / "0.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        add(tar, "a", type=tarfile.DIRTYPE)
        add(tar, "a/0.png", png_bytes(0))
        add(tar, "a/0.txt", b"zero")
        for name in ("a/._0.png", "__MACOSX/a/._0.png", "__MACOSX/a/._0.txt", "a/@eaDir/0.png", ".git/HEAD"):
            add(tar, name, b"x")
        for name in ("1.heic", "2.psd", "3.cls", "4.txt", ".5.png", "0-masklabel.png"):
            add(tar, name, b"x")
        add(tar, "6.png", type=tarfile.SYMTYPE, linkname="../elsewhere.png")
        add(tar, "7.png", type=tarfile.LNKTYPE, linkname="8.png")
        add(tar, "8.png", png_bytes(8))
        add(tar, "8.txt", b"eight")
        add(tar, "pipe", type=tarfile.FIFOTYPE)
    rows = opened(tmp_path / "set")
    assert len(rows) == 2
    assert rows.findings.left_out.counts == {
        "folder": 3, "HEIC": 1, "kind": 1, "other": 2, "caption": 1, "hidden": 1, "mask": 1, "shard link": 2,
    }  # fmt: skip
    said = capsys.readouterr().err
    assert "2 links in shards to what does not come before them are skipped: " in said
    assert "0.tar/6.png" in said and "0.tar/7.png; write the shards with the files themselves" in said
    again = opened(tmp_path / "set")  # of a stream from what is remembered
    assert again.findings.left_out == rows.findings.left_out


def test_links_in_shards_are_what_they_lead_to(tmp_path, opened):
    """GNU tar writes a file with several names once, and links for the others."""
    folder = captioned(tmp_path / "folder", "a/0.png", "b/2.png")
    for first, second in (("a/0.png", "b/1.png"), ("a/0.txt", "b/1.txt")):
        (folder / second).hardlink_to(folder / first)
    (folder / "b" / "3.png").symlink_to("../a/0.png")
    (folder / "b" / "3.txt").write_text("three")
    (tmp_path / "set").mkdir()
    with tarfile.open(tmp_path / "set" / "0.tar", "w") as tar:
        tar.add(folder, ".")
        kinds = {info.name: info.type for info in tar.getmembers()}
    assert kinds["./b/1.png"] == kinds["./b/1.txt"] == tarfile.LNKTYPE and kinds["./b/3.png"] == tarfile.SYMTYPE
    rows = opened(tmp_path / "set")
    if rows.stream is not None:
        rows.source.expect([rows.row_numbers], idle_steps=0)
    assert sorted(captions_of(rows)) == ["0", "0", "1", "three"] and not rows.findings.left_out
    shown = [np.asarray(rows.image(index)).tolist() for index in range(4)]
    first = np.asarray(image(0)).tolist()
    assert shown.count(first) == 3 and np.asarray(image(1)).tolist() in shown


def test_a_link_out_of_a_streams_chunk_is_named(tmp_path, monkeypatch):
    """Only the chunk is fetched; without --streaming the link is followed."""
    monkeypatch.setattr("training_utils.data.streaming.chunks.CHUNK_BYTES", 4000)
    (tmp_path / "set").mkdir()
    with tarfile.open(tmp_path / "set" / "0.tar", "w") as tar:
        for number in range(4):
            add(tar, f"{number}.png", png_bytes(number))
            add(tar, f"{number}.txt", str(number).encode())
        add(tar, "9.png", type=tarfile.LNKTYPE, linkname="0.png")
        add(tar, "9.txt", b"nine")
    assert len(rows_of(tmp_path / "set")) == 5
    rows = rows_of(tmp_path / "set", shuffle_buffer=4, cache_dir=str(tmp_path / "cache"))
    assert len(rows) == 4 and rows.findings.left_out.counts == {"shard link": 1, "caption": 1}
    assert [at for at, _ in enumerate(rows.stored_images())] == [0, 1, 2, 3]


def test_shards_without_an_image_say_what_they_hold(tmp_path, opened, monkeypatch):
    monkeypatch.setattr(plug_ins, "MISSING", PLUG_INS)
    monkeypatch.setattr(files, "MISSING", PLUG_INS)
    (tmp_path / "set").mkdir()
    with tarfile.open(tmp_path / "set" / "0.tar", "w") as tar:
        add(tar, "0.heic", b"x")
        add(tar, "0.txt", b"x")
    with pytest.raises(UserError, match="pip install pillow-heif"):
        opened(tmp_path / "set")


def test_a_plug_in_makes_a_stream_list_its_shards_again(tmp_path, monkeypatch):
    """What is remembered of a shard depends on what counts as an image."""
    from training_utils.data.streaming import opening as stream

    (tmp_path / "set").mkdir()
    with tarfile.open(tmp_path / "set" / "0.tar", "w") as tar:
        for number, ending in enumerate(("png", "new")):
            add(tar, f"{number}.{ending}", png_bytes(number))
            add(tar, f"{number}.txt", b"x")
    options = {"shuffle_buffer": 4, "cache_dir": str(tmp_path / "cache")}
    assert len(rows_of(tmp_path / "set", **options)) == 1
    endings = files.IMAGE_ENDINGS | {".new"}
    monkeypatch.setattr(files, "IMAGE_ENDINGS", endings)
    monkeypatch.setattr(stream, "IMAGE_ENDINGS", endings)
    assert len(rows_of(tmp_path / "set", **options)) == 2


def test_pillow_opens_what_counts_as_an_image():
    """Each ending is one that Pillow knows, or another one of JPEG."""
    Image.init()
    assert {ending for ending in files.IMAGE_ENDINGS if ending not in Image.EXTENSION} <= {".jif"}
