"""Samples that cannot be used: all of them are named before training, or left out without a change to the rest, and
--check_data tells everything about a dataset without a model."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import relative_difference, result_bytes
from PIL import Image
from tiny import image, png, write_images

from training_utils.base import draws
from training_utils.base.draws import SampleDraws
from training_utils.base.errors import UserError
from training_utils.cli.options import DataOptions
from training_utils.data import checking, image_ops, inspection, opening, selection
from training_utils.data.problems import BadSample
from training_utils.data.samples import Samples, collate, note_skipped


def cut_off(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def add_line(folder, **entry):
    with open(folder / "metadata.jsonl", "a") as file:
        file.write(json.dumps(entry) + "\n")


@pytest.fixture
def spoiled(tmp_path):
    """Fourteen samples; 0, 1, 2 and 3 can be used, 4 shows its fault only when it is decoded."""
    folder = tmp_path / "spoiled"
    write_images(folder, 9)
    cut_off(folder / "4.png")
    (folder / "5.png").write_bytes(b"")
    (folder / "6.png").write_bytes(b"no image")
    (folder / "7.png").write_bytes(png(30_000, 30_000, 8, 2, b""))
    Image.new("RGB", (4, 201)).save(folder / "8.png")
    add_line(folder, file_name="absent.png", text="x")
    for caption in (None, [], ["a", None], 7):
        add_line(folder, file_name="0.png", text=caption)
    return folder


KINDS_IN_A_SENTENCE = [
    "1 images named in the metadata do not exist: ",
    "4 captions are neither a string nor a list of strings: ",
    "0.png (nothing)",
    "3 files cannot be read as images: ",
    "5.png (zero bytes)",
    "6.png (not an image)",
    "7.png (Image size (900000000 pixels) exceeds limit",
    "1 images are more than 50 times as long as they are wide: ",
    "8.png (4 x 201 pixels",
]


def test_an_error_names_every_kind_at_once(run, spoiled, tmp_path):
    sentence, code = run.fails(tmp_path / "out", "--train_data_dir", spoiled)
    assert code == 2 and "--on_bad_sample skip" in sentence and "\n" not in sentence
    for part in KINDS_IN_A_SENTENCE:
        assert part in sentence


def test_what_can_be_found_before_training_is_left_out(spoiled, capsys):
    rows = opening.load_dataset(DataOptions(folder=spoiled))
    rows = rows.drop(checking.check_dataset(rows, "skip"))
    assert [rows.name(at)[-5:] for at in range(len(rows))] == ["0.png", "1.png", "2.png", "3.png", "4.png"]
    said = capsys.readouterr().err
    assert "warning: 9 of 14 samples are left out: " in said
    for part in KINDS_IN_A_SENTENCE:
        assert part in said


def test_only_ten_of_a_kind_are_named_in_a_sentence(tmp_path):
    write_images(tmp_path, 1)
    for at in range(13):
        add_line(tmp_path, file_name=f"absent{at}.png", text="x")
    long = "13 images named.*absent9.png and 3 more; fix or remove them.*--check_data lists all"
    with pytest.raises(UserError, match=long):
        checking.check_dataset(opening.load_dataset(DataOptions(folder=tmp_path)))


def test_nothing_that_can_be_used_is_an_error(tmp_path):
    write_images(tmp_path, 2)
    for index in range(2):
        (tmp_path / f"{index}.png").write_bytes(b"")
    rows = opening.load_dataset(DataOptions(folder=tmp_path))
    with pytest.raises(UserError, match="not one sample can be used: 2 files"):
        checking.check_dataset(rows, "skip")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "0.png", "text": null}\n')
    with pytest.raises(UserError, match="not one sample can be used: 1 captions"):
        checking.check_dataset(opening.load_dataset(DataOptions(folder=tmp_path)), "skip")


def test_malformed_metadata_stay_an_error(tmp_path):
    write_images(tmp_path, 2)
    with open(tmp_path / "metadata.jsonl", "a") as file:
        file.write('{"file_name": \n[]\n')
    with pytest.raises(UserError, match=r"line 3 is not JSON.* \(and 1 more such lines, which --check_data lists\)"):
        checking.check_dataset(opening.load_dataset(DataOptions(folder=tmp_path)), "skip")


# --- what only shows in training ------------------------------------------------------------------------------------


def samples_of(folder, on_bad_sample="skip"):
    def transform(rows, index, draw):
        return {"pixels": image_ops.to_array(rows.image(index)), "noise": draw("noise").standard_normal(3)}

    rows = opening.load_dataset(DataOptions(folder=folder))
    return Samples(rows.drop(checking.check_dataset(rows, "skip")), transform, 7, on_bad_sample)


def test_the_next_image_stands_in_with_the_draws_of_the_place(tmp_path):
    write_images(tmp_path, 6)
    for index in (2, 3, 5):
        cut_off(tmp_path / f"{index}.png")
    samples = samples_of(tmp_path)
    for index, shown in {0: 0, 2: 4, 3: 4, 4: 4, 5: 0}.items():  # after the last comes the first
        sample = samples[3, index, 0.5]
        assert np.array_equal(sample["pixels"], image_ops.to_array(image(shown)))
        assert np.array_equal(sample["noise"], SampleDraws(7, 3, index)("noise").standard_normal(3))
        assert sample["weight"] == 0.5
        assert len(sample.get("skipped", [])) == {2: 2, 3: 1, 5: 1}.get(index, 0)


def test_a_batch_without_skipped_samples_is_unchanged(tmp_path):
    write_images(tmp_path, 4)
    cut_off(tmp_path / "1.png")
    samples = samples_of(tmp_path)
    complete, fixed = (collate([samples[0, index, 1.0] for index in some]) for some in ([0, 2], [0, 1]))
    assert complete.keys() == {"pixels", "noise", "weight"}
    assert fixed.keys() == {*complete, "skipped"} and len(fixed["skipped"]) == 1
    assert all(value.shape == complete[key].shape for key, value in fixed.items() if key != "skipped")


def test_a_data_set_of_damaged_images_is_an_error(tmp_path):
    write_images(tmp_path, 3)
    for index in range(3):
        cut_off(tmp_path / f"{index}.png")
    error = samples_of(tmp_path)[0, 1, 1.0]
    assert isinstance(error, UserError)
    assert "not one of 3 samples can be used; the first: " in str(error) and "1.png" in str(error)


def test_a_file_that_is_gone_is_no_fault_of_the_data(tmp_path):
    """What depends on the moment must not decide what is trained."""
    write_images(tmp_path, 3)
    samples = samples_of(tmp_path)
    (tmp_path / "1.png").unlink()
    error = samples[0, 1, 1.0]
    assert isinstance(error, UserError) and not isinstance(error, BadSample)
    assert "1.png cannot be used (No such file or directory)" in str(error)


@pytest.fixture(scope="module")
def partly_damaged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged") / "train"
    write_images(folder, 8)
    for index in (1, 5, 6):
        cut_off(folder / f"{index}.png")
    return folder


def test_a_run_that_skips_is_exact(run, partly_damaged, tmp_path, capsys):
    flags = ["--train_data_dir", partly_damaged, "--on_bad_sample", "skip"]
    run(tmp_path / "complete", *flags)
    said = capsys.readouterr().err
    for index in (1, 5, 6):
        assert said.count(f"{index}.png cannot be read as an image") == 1  # in three epochs
    assert said.count("the next image stands in for it") == 3
    assert "3 images could not be used in training" in said
    run(tmp_path / "workers", *flags, "--dataloader_num_workers", "2")
    assert said.count("stands in for it") == capsys.readouterr().err.count("stands in for it")
    run(tmp_path / "cut", *flags, "--max_train_steps", "3", "--checkpointing_steps", "3")
    run(tmp_path / "cut", *flags, "--resume_from_checkpoint", "latest")
    complete = result_bytes(tmp_path / "complete")
    assert complete == result_bytes(tmp_path / "workers") == result_bytes(tmp_path / "cut")


@pytest.mark.parametrize("accumulation", ["1", "2"])
def test_what_was_trained_before_a_bad_image_is_kept(run, images, tmp_path, accumulation):
    """The last step before it, from which the run goes on once the image is fixed."""
    folder = tmp_path / "images"
    shutil.copytree(images, folder)
    bad = folder / f"{draws.order(7, 0, 10)[5]}.png"
    complete = bad.read_bytes()
    cut_off(bad)
    flags = ["--train_data_dir", folder, "--train_batch_size", "1", "--gradient_accumulation_steps", accumulation]
    sentence, code = run.fails(tmp_path / "out", *flags)
    last = 5 // int(accumulation)
    assert code == 2 and bad.name in sentence
    assert f"what was trained until then is in {tmp_path / 'out'}/checkpoint-{last}" in sentence
    bad.write_bytes(complete)
    run(tmp_path / "out", *flags, "--resume_from_checkpoint", "latest")
    run(tmp_path / "complete", *flags)
    assert result_bytes(tmp_path / "out") == result_bytes(tmp_path / "complete")


def test_a_validation_image_ends_no_run(run, tmp_path, capsys):
    """It is met at the first validation, when there is training to lose."""
    write_images(tmp_path / "set", 10)
    flags = ["--train_data_dir", tmp_path / "set", "--validation_split", "0.2", "--validation_steps", "2"]
    _, val_samples = selection.split_validation(
        opening.load_dataset(DataOptions(folder=tmp_path / "set")), 0.2, seed=7
    )
    cut_off(Path(val_samples.name(0)))
    assert run(tmp_path / "out", *flags) == 0
    said = capsys.readouterr().err
    assert "val_loss" in said and f"{val_samples.name(0)} cannot be read as an image" in said


def test_validation_images_are_skipped_too(run, partly_damaged, tmp_path, capsys):
    flags = ["--validation_split", "0.5", "--validation_steps", "1", "--max_train_steps", "2"]
    run(tmp_path, "--train_data_dir", partly_damaged, "--on_bad_sample", "skip", *flags)
    said = capsys.readouterr().err
    assert "val_loss" in said and "3 images could not be used" in said


def test_other_processes_name_what_they_skip(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("RANK", "1")
    write_images(tmp_path, 2)
    rows = opening.load_dataset(DataOptions(folder=tmp_path))
    for _ in range(2):
        note_skipped(rows.select([0]), ["1.png cannot be read as an image (cut off)"])
    assert capsys.readouterr().err.count("1.png cannot be read as an image (cut off); the next image") == 1
    assert len(rows.findings.skipped) == 1


def test_two_processes_skip_the_same(run, partly_damaged, tmp_path):
    flags = ["--train_data_dir", partly_damaged, "--on_bad_sample", "skip"]
    run(tmp_path / "one", *flags, "--gradient_accumulation_steps", "2", "--train_batch_size", "2")
    said = run.on_two_processes(tmp_path / "two", *flags, "--train_batch_size", "2")
    assert "3 images could not be used in training" in said
    for index in (1, 5, 6):
        assert f"{index}.png cannot be read as an image" in said
    assert relative_difference(tmp_path / "one", tmp_path / "two") < 1e-4


def odd_images(folder):
    """An image of each unusual sort, all usable, and one that is cut off."""
    write_images(folder, 2)
    cut_off(folder / "1.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    image(2).save(folder / "turned.png", exif=exif)
    Image.new("RGB", (1, 1)).save(folder / "dot.png")
    Image.new("L", (3, 3)).save(folder / "tiny.png")
    Image.fromarray(np.zeros((20, 20), np.uint16)).save(folder / "sixteen.png")
    Image.new("CMYK", (20, 20)).save(folder / "cmyk.jpg")
    Image.new("LA", (20, 18)).save(folder / "seen-through.png")
    Image.new("RGB", (16, 800)).save(folder / "long.png")
    image(3).save(folder / "moving.gif", save_all=True, append_images=[image(4)])
    for name in ("turned.png", "dot.png", "tiny.png", "sixteen.png", "cmyk.jpg", "seen-through.png", "long.png"):
        add_line(folder, file_name=name, text="")
    add_line(folder, file_name="moving.gif", text=["one", "another"])
    return folder


def test_every_script_trains_on_odd_images_and_skips(each, tmp_path, capsys):
    folder = odd_images(tmp_path / "odd")
    flags = ["--train_data_dir", folder, "--on_bad_sample", "skip", "--train_batch_size", "64"]  # more than there are
    assert each(tmp_path / "out", *flags, "--max_train_steps", "1") == 0
    said = capsys.readouterr().err
    assert "1.png cannot be read as an image" in said and "1 images could not be used in training" in said


# --- --check_data ---------------------------------------------------------------------------------------------------


def test_every_script_checks_data_without_a_model(each, spoiled, tmp_path, capsys):
    kinds = ("--pretrained_model_name_or_path", "--pretrained_prior_model_name_or_path")
    models = [word for kind in kinds if kind in each.models for word in (kind, "nowhere")]
    argv = ["--train_data_dir", str(spoiled), "--output_dir", str(tmp_path / "out"), "--check_data", *models]
    main = sys.modules.get(each.script) or __import__(each.script)
    assert main.main(argv) == 2
    report = capsys.readouterr().out
    reads_captions = "decoder" not in each.script
    for part in ("zero bytes: 1\n", "not an image: 1\n", "damaged: 1\n", "too large: 1\n", "too narrow: 1\n"):
        assert f"  {part}" in report
    assert ("no usable caption: 4\n" in report) == reads_captions
    assert "absent: 1\n" in report
    assert not (tmp_path / "out").exists()
    for index in range(4, 9):
        (spoiled / f"{index}.png").unlink()
    write_images(spoiled, 9)
    assert main.main(argv[:-2] if models else argv) == 0  # the model's flag may be left out
    assert "Every sample can be used." in capsys.readouterr().out


def report_on(folder=None, resolution=512, capsys=None, **source):
    """(exit code, the report)."""
    code = inspection.check_data(DataOptions(folder=folder, **source), resolution)
    return code, capsys.readouterr().out


def test_a_report_lists_all_problems_by_kind_and_name(spoiled, capsys):
    for at in range(12):
        add_line(spoiled, file_name=f"absent{at}.png", text="x")
    code, report = report_on(spoiled, capsys=capsys)
    assert code == 2
    assert "samples    26, 22 cannot be used" in report
    assert "absent: 13\n" in report
    for at in range(12):
        assert f"\n      absent{at}.png\n" in report
    assert "4.png  (" in report and "0.png  (['a', None])" in report and "0.png  (an empty list)" in report


def test_a_report_on_metadata_that_are_malformed_goes_on(spoiled, capsys):
    with open(spoiled / "metadata.jsonl", "a") as file:
        file.write('{"file_name": \n{"text": "x"}\n{"file_name": "1.png", "title": "x"}\n')
    code, report = report_on(spoiled, capsys=capsys)
    assert code == 2
    for part in ("line 15 is not JSON", "line 16 has no", "line 17 has no caption column 'text'", "zero bytes: 1"):
        assert part in report
    (spoiled / "metadata.jsonl").unlink()
    code, report = report_on(spoiled, capsys=capsys)
    assert code == 2 and "has no captions: write a metadata.jsonl" in report and "zero bytes: 1" in report


def test_a_column_that_no_line_has_is_told_once(tmp_path, capsys):
    write_images(tmp_path, 5)
    code, report = report_on(tmp_path, caption_column="title", capsys=capsys)
    assert code == 2 and report.count("caption column 'title'") == 1
    assert "line 1 has no caption column 'title' (--caption_column); it has text; nor has any other line" in report


def test_a_report_remarks_on_what_can_be_used(tmp_path, capsys):
    folder = odd_images(tmp_path)
    write_images(tmp_path / "more", 0)
    image(0).save(tmp_path / "more" / "0 again.bmp")
    image(9).save(tmp_path / "unnamed.png")
    add_line(folder, file_name="more/0 again.bmp", text="a handwritten zero")
    add_line(folder, file_name="more/0 again.bmp", text="  ")
    code, report = report_on(folder, 16, capsys)
    assert code == 2
    for part in (
        "captions   13\n",
        "images     10 decoded\n",
        "smallest   1 x 1  dot.png\n",
        "largest    16 x 800  long.png\n",
        "empty captions, trained as such: 8\n",
        "a side below 16 pixels, which are enlarged: 2\n      dot.png, tiny.png\n",
        "more than one frame; the first is used: 1\n      moving.gif\n",
        "laid on white: 1\n      seen-through.png\n",
        "turned upright: 1\n      turned.png\n",
        "without a caption, which are left out: 1\n      unnamed.png\n",
        "equals pixel by pixel: 1\n      0.png = more/0 again.bmp\n",
        "name an image again; each is a sample: 1\n",
        "  below 16",
        "  16 to 63",
    ):
        assert part in report, part


def test_a_report_on_a_table(tmp_path, capsys):
    import datasets

    def cell(content, path=None):
        return {"bytes": content, "path": path}

    write_images(tmp_path, 3)
    content = [(tmp_path / f"{index}.png").read_bytes() for index in range(3)]
    images = [cell(content[0]), None, cell(b""), cell(content[1]), cell(content[1][:100]), cell(content[2])]
    captions = ["a", "b", "c", None, "", "f"]
    features = datasets.Features({"image": datasets.Image(decode=False), "text": datasets.Value("string")})
    (tmp_path / "table").mkdir()
    table = datasets.Dataset.from_dict({"image": images, "text": captions}, features=features)
    table.to_parquet(tmp_path / "table" / "train.parquet")
    source = {"dataset_name": str(tmp_path / "table"), "cache_dir": tmp_path / "cache"}
    code, report = report_on(None, None, capsys, **source)
    assert code == 2 and "samples    6, 4 cannot be used" in report
    for part in (
        "no usable caption: 1\n      row 3  (nothing)",
        "no image: 1\n      row 1\n",
        "zero bytes: 1\n      row 2",
    ):
        assert part in report
    assert "damaged: 1\n      row 4  (" in report and "empty captions, trained as such: 1\n      row 4" in report
    rows = opening.load_dataset(DataOptions(**source))
    unusable = checking.check_dataset(rows, "skip")
    assert unusable == [1, 3]  # the rest shows when an image is read
    rest = rows.drop(unusable)
    assert [rest.name(index) for index in range(len(rest))] == ["row 0", "row 2", "row 4", "row 5"]
    with pytest.raises(UserError, match="1 rows hold no image: row 1; 1 captions are .*: row 3 .nothing."):
        checking.check_dataset(rows)
    assert checking.check_dataset(rows.select([0, 5])) == []


def test_names_cannot_break_a_report(tmp_path, capsys):
    write_images(tmp_path, 1)
    image(1).save(tmp_path / "two\nlines \x1b[31m.png")
    add_line(tmp_path, file_name="two\nlines \x1b[31m.png", text=None)
    code, report = report_on(tmp_path, capsys=capsys)
    assert code == 2 and "\n      two\\nlines \\x1b[31m.png  (nothing)\n" in report and "\x1b" not in report
