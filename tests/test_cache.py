"""What frozen networks make is kept: a run trains on exactly the same, and what has changed is never served stale."""

import gc
import hashlib
import importlib
import json
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import logged, relative_difference, result_bytes
from diffusers import AutoencoderKL, VQModel
from PIL import Image
from safetensors.numpy import load_file
from tiny import image, write_images
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPVisionModelWithProjection

import train_text_to_image
import train_text_to_image_sdxl
from training_utils.base import draws
from training_utils.base.errors import UserError
from training_utils.cache import fill, shard
from training_utils.cache.captions import cache_captions
from training_utils.cache.images import CachedImages, cache_images
from training_utils.cache.processes import Processes
from training_utils.cache.store import Store
from training_utils.torch_backend import frozen

BOTH = ["--cache_latents", "--cache_text_embeddings"]
DRAWS = ["--random_flip", "--caption_dropout", "0.3", "--validation_split", "0.2", "--validation_steps", "3"]


def switches(run, folder):
    """Every cache that a script has, kept in a folder."""
    return [*(BOTH[:1] if "decoder" in run.script else BOTH), "--encoding_cache_dir", folder]


def middle(run):
    """The flags for crops that are not drawn; the Kandinsky scripts do not crop at random unless told to."""
    return [] if "prior" in run.script or "decoder" in run.script else ["--center_crop"]


def entries(folder):
    """How many entries all stores in a folder hold."""
    return sum(len(next(iter(load_file(path).values()))) for path in folder.rglob("*.safetensors"))


def same(one, other, curves=("train_loss",)):
    """Whether two runs logged the same and have the same weights."""
    assert all(logged(one, name) and logged(one, name) == logged(other, name) for name in curves)
    return result_bytes(one) == result_bytes(other)


@pytest.fixture
def never_encodes(monkeypatch):
    """From when it is called on, a network that encodes is an error."""

    def begin():
        def refuse(*_, **__):
            raise AssertionError("a frozen network ran")

        monkeypatch.setattr(frozen, "_over_arrays", lambda *_: refuse)
        monkeypatch.setattr(AutoencoderKL, "encode", refuse)
        monkeypatch.setattr(CLIPTextModel, "forward", refuse)

    return begin


# --- the same run ----------------------------------------------------------------------------------------------------


def test_a_cached_run_is_the_same_to_the_bit(each, tmp_path):
    common = [*middle(each), *DRAWS, "--report_to", "tensorboard"]
    each(tmp_path / "plain", *common)
    each(tmp_path / "cached", *common, *switches(each, tmp_path / "kept"))
    assert same(tmp_path / "plain", tmp_path / "cached", ["train_loss", "val_loss"])


@pytest.mark.parametrize("flags", [["--mixed_precision", "bf16"], ["--gradient_accumulation_steps", "3", "--use_ema"]])
def test_so_are_other_settings(run, tmp_path, flags):
    common = ["--center_crop", "--report_to", "tensorboard", "--dataloader_num_workers", "2", *flags]
    run(tmp_path / "plain", *common)
    run(tmp_path / "cached", *common, *switches(run, tmp_path / "kept"))
    if "bf16" in flags:  # whose samples are encoded in the same way on a CPU
        assert {load_file(path).popitem()[1].dtype for path in (tmp_path / "kept").rglob("*.safetensors")} == {
            np.dtype(np.uint16)
        }
    assert same(tmp_path / "plain", tmp_path / "cached")


def test_a_cached_run_that_is_cut_ends_in_the_same_weights(run_sdxl, tmp_path):
    common = [*DRAWS, *switches(run_sdxl, tmp_path / "kept"), "--cached_crops", "2"]
    run_sdxl(tmp_path / "complete", *common)
    for last in (1, 4, 6):
        cut = [*common, "--max_train_steps", last, "--checkpointing_steps", "1"]
        run_sdxl(tmp_path / "cut", *cut, *(["--resume_from_checkpoint", "latest"] if last > 1 else []))
    assert result_bytes(tmp_path / "cut") == result_bytes(tmp_path / "complete")


def test_two_processes_share_the_work_and_equal_one(run, tmp_path):
    common = [*DRAWS, "--center_crop", "--max_train_steps", "3"]
    run(tmp_path / "one", *common, *switches(run, tmp_path / "alone"))
    run.on_two_processes(tmp_path / "two", *common, "--train_batch_size", "2", *switches(run, tmp_path / "kept"))
    assert entries(tmp_path / "kept") == entries(tmp_path / "alone")  # nothing was done twice
    assert relative_difference(tmp_path / "one", tmp_path / "two") < 1e-6


def test_images_that_are_skipped(run, images, tmp_path, capsys):
    folder = tmp_path / "damaged"
    shutil.copytree(images, folder)
    (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:300])
    common = ["--train_data_dir", folder, "--center_crop", "--report_to", "tensorboard", "--on_bad_sample", "skip"]
    run(tmp_path / "plain", *common)
    capsys.readouterr()
    run(tmp_path / "cached", *common, *switches(run, tmp_path / "kept"))
    assert "1 images could not be used in training" in capsys.readouterr().err
    assert same(tmp_path / "plain", tmp_path / "cached")
    sentence, code = run.fails(tmp_path / "no", *common[:-1], "error", *switches(run, tmp_path / "other"))
    assert "3.png cannot be read as an image" in sentence and "--on_bad_sample skip" in sentence and code == 2


# --- random crops ----------------------------------------------------------------------------------------------------


def test_crops_are_kept_with_their_coordinates(run_sdxl, tmp_path, monkeypatch):
    """Each entry is the VAE's view of just the crop that the UNet is told, mirrored or not."""
    seen = []
    real = train_text_to_image_sdxl.training_loss

    def spy(unet, schedule, batch, *rest):
        seen.extend(
            {name: batch[name][at] for name in ("latent_mean", "time_ids")} for at in range(len(batch["noise"]))
        )
        return real(unet, schedule, batch, *rest)

    monkeypatch.setattr(train_text_to_image_sdxl, "training_loss", spy)
    flags = ["--random_flip", "--cached_crops", "3", "--max_train_steps", "20"]
    run_sdxl(tmp_path / "out", *flags, *switches(run_sdxl, tmp_path / "kept"))
    vae = AutoencoderKL.from_pretrained(run_sdxl.base, subfolder="vae")
    possible = {}
    for index in range(10):
        for mirrored in (False, True):
            complete = image(index)
            complete = complete.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else complete
            for left in range(5):  # of 20 x 16
                pixels = (
                    np.asarray(complete.crop((left, 0, left + 16, 16)), dtype=np.float32).transpose(2, 0, 1) / 127.5
                    - 1
                )
                with torch.no_grad():
                    mean = vae.encode(torch.from_numpy(pixels)[None].contiguous()).latent_dist.mean[0]
                possible[index, mirrored, left] = mean
    shown = set()
    for sample in seen:
        height, width, top, left, *target = sample["time_ids"].tolist()
        assert (height, width, top, target) == (16, 20, 0, [16, 16])
        near = [key for key, mean in possible.items() if (mean - sample["latent_mean"]).abs().max() < 1e-4]
        assert len(near) == 1 and near[0][2] == left
        shown.add(near[0])
    crops = [{left for at, _, left in shown if at == index} for index in range(10)]
    assert max(map(len, crops)) == 3 and all(len(some) <= 3 for some in crops)
    assert {mirrored for _, mirrored, _ in shown} == {False, True}


def test_another_seed_finds_the_same_crops(run, tmp_path, never_encodes):
    flags = ["--cached_crops", "2", *switches(run, tmp_path / "kept")]
    run(tmp_path / "one", *flags)
    never_encodes()
    run(tmp_path / "two", *flags, "--seed", "8")
    assert result_bytes(tmp_path / "one") != result_bytes(tmp_path / "two")


def test_a_square_image_is_kept_once(run, tmp_path):
    folder = tmp_path / "images"
    write_images(folder)
    for index in range(10):
        image(index, (24, 24)).save(folder / f"{index}.png")
    run(tmp_path / "out", "--train_data_dir", folder, "--cached_crops", "4", *switches(run, tmp_path / "kept")[:1],
        *switches(run, tmp_path / "kept")[2:])  # fmt: skip
    assert entries(tmp_path / "kept") == 10


# --- what is kept ----------------------------------------------------------------------------------------------------


def test_a_later_run_encodes_nothing(each, tmp_path, never_encodes):
    flags = [*DRAWS, *switches(each, tmp_path / "kept")]
    each(tmp_path / "one", *flags)
    never_encodes()
    each(tmp_path / "two", *flags, "--learning_rate", "1e-4", "--train_batch_size", "3")  # the seed chooses the split


def test_adapters_find_what_full_fine_tuning_kept(run, run_lora, tmp_path, never_encodes):
    run(tmp_path / "one", *switches(run, tmp_path / "kept"))
    never_encodes()
    run_lora(tmp_path / "two", *switches(run, tmp_path / "kept"))


def encoded_by(run, out, *flags):
    """How many images and how many captions a run puts into its stores."""
    written, real = [], Store.write

    def write(store, keys, arrays):
        written.extend([store.folder.name.split("-")[0]] * len(keys))
        real(store, keys, arrays)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "write", write)
        run(out, *flags)
    return written.count("pictures"), written.count("captions")


def test_only_what_has_changed_is_encoded_again(run, sd, tmp_path):
    folder, base = tmp_path / "images", tmp_path / "model"
    write_images(folder)
    shutil.copytree(sd, base)
    flags = ["--train_data_dir", folder, "--pretrained_model_name_or_path", base, "--center_crop"]
    flags += ["--max_train_steps", "1", *switches(run, tmp_path / "kept")]
    count = lambda *more: encoded_by(run, tmp_path / "out", *flags, *more)  # noqa: E731
    assert count() == (10, 10)
    assert count() == (0, 0)
    image(100).save(folder / "4.png")
    assert count() == (1, 0)
    lines = (folder / "metadata.jsonl").read_text().replace("a handwritten six", "something else")
    (folder / "metadata.jsonl").write_text(lines)
    assert count() == (0, 1)
    assert count("--random_flip") == (10, 0)  # the mirrored views
    assert count("--caption_dropout", "0.1") == (0, 1)  # the empty caption
    assert count("--resolution", "8") == (10, 0)
    assert count("--image_interpolation_mode", "nearest") == (10, 0)
    assert count("--mixed_precision", "bf16") == (10, 10)
    vae = AutoencoderKL.from_pretrained(base / "vae")
    vae.encoder.conv_in.bias.data[0] += 1
    vae.save_pretrained(base / "vae")
    assert count() == (10, 0)


def test_a_caption_of_several_rows_is_read_once(run, tmp_path):
    folder = tmp_path / "images"
    write_images(folder)
    lines = [{"file_name": f"{index}.png", "text": ["zero", "one"]} for index in range(10)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert encoded_by(run, tmp_path / "out", "--train_data_dir", folder, *switches(run, tmp_path / "kept"))[1] == 2


def test_a_killed_run_goes_on_where_it_was(run, tmp_path, monkeypatch):
    flags = ["--center_crop", *switches(run, tmp_path / "kept"), "--train_batch_size", "2"]
    monkeypatch.setattr(fill, "SHARD_BYTES", 1)  # a shard a batch
    real, count = train_text_to_image.encode_images, [0]

    def dies(*arguments):
        count[0] += 1
        if count[0] == 4:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_text_to_image, "encode_images", dies)
        run(tmp_path / "out", *flags)
    assert entries(tmp_path / "kept") == 6
    assert encoded_by(run, tmp_path / "out", *flags) == (4, 10)


DAMAGES = {
    "a bit of the content": lambda content: content[:-5] + bytes([content[-5] ^ 1]) + content[-4:],
    "a bit of the keys": lambda content: content[:60] + bytes([content[60] ^ 1]) + content[61:],
    "the end": lambda content: content[:-100],
    "everything": lambda content: b"",
    "another file": lambda content: b"not what it was" * 100,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_is_made_again(run, tmp_path, damage, capsys):
    flags = ["--center_crop", "--max_train_steps", "2", *switches(run, tmp_path / "kept")]
    run(tmp_path / "one", *flags)
    shard = next((tmp_path / "kept").glob("pictures-*/*.safetensors"))
    shard.write_bytes(DAMAGES[damage](shard.read_bytes()))
    assert encoded_by(run, tmp_path / "two", *flags) == (10, 0)
    assert f"{shard} is damaged" in capsys.readouterr().err
    assert result_bytes(tmp_path / "one") == result_bytes(tmp_path / "two")


def test_a_shard_that_cannot_be_opened_is_no_damaged_one(tmp_path, monkeypatch):
    """safetensors says of it that there is no such file; to drop it would cost what it holds."""
    store = Store(tmp_path, "images", {"a": 1})
    store.make_folder()
    store.write(["key"], {"x": ("float32", np.ones((1, 4), np.float32))})
    (shard,) = store.folder.glob("*.safetensors")

    def refuse(path, *rest):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(UserError, match="cannot be read .*Permission denied"):
        fill.open_store(Store(tmp_path, "images", {"a": 1}), ["key"], one_process())
    monkeypatch.undo()
    assert shard.exists()


class FewRows:
    """Three images, of two sizes, the first one there twice; they are their indices' pixels."""

    row_numbers = np.array([0, 1, 2, 0])

    def __len__(self):
        return len(self.row_numbers)

    def pixels(self, index):
        number = int(self.row_numbers[index])
        return np.arange(24, dtype=np.float32).reshape((4, 6) if number else (6, 4)) / 7 + number

    def digest_and_size(self, index):
        pixels = self.pixels(index)
        return hashlib.sha256(pixels.tobytes()).hexdigest(), pixels.shape

    def size(self, index):
        return (4, 4)

    def name(self, index):
        return f"image {index}"

    def captions(self, index):
        return [f"caption {self.row_numbers[index]}", "shared"]


class FewSamples:
    """FewRows as Samples, mirrored and cropped at random."""

    def __init__(self):
        self.dataset = FewRows()
        self.on_bad_sample = "error"
        self.transform = SimpleNamespace(view=self.view, tokenize=self.tokenize, random_flip=True, random_crop=True)

    def __len__(self):
        return len(self.dataset)

    @staticmethod
    def view(rows, index, mirrored, generator, size):
        pixels = rows.pixels(index)
        at = int(generator.integers(3))
        if len(pixels) == 4:
            pixels = pixels.T
        pixels = pixels[at : at + 4]
        return {"pixels": pixels[:, ::-1] if mirrored else pixels}

    @staticmethod
    def tokenize(text):
        return {"ids": np.frombuffer(text.ljust(12).encode(), dtype=np.uint8)}


def encode_few(batch):
    """In each of the types that a network computes in; the values of two bytes have no more bits than they hold."""
    values = next(iter(batch.values())).astype(np.float32)
    rounded = np.round(values * 4) / 4
    return {"mean": ("float32", values), "half": ("float16", rounded), "brain": ("bfloat16", rounded)}


OLD_CACHE = Path(__file__).parent / "fixtures" / "old_cache"


def test_a_cache_of_an_earlier_release_is_taken_up(tmp_path):
    """`fixtures/old_cache` was written by the code before `training_utils/cache/` was a folder. All of it is found,
    and what is written now has the same names and the same bytes."""

    def refuse(batch):
        raise AssertionError("a frozen network ran")

    def cached(root, encode):
        samples, blank = FewSamples(), {"pixels": np.zeros((4, 4), dtype=np.float32)}
        store = Store(root, "pictures", {"networks": ["few"], "settings": None})
        cache_images(store, [samples], encode, one_process(), 2, 2, blank)
        assert len(store.locations) == 13  # two crops of three images, mirrored or not, and no image
        cache_captions(Store(root, "captions", {"networks": ["few"]}), [samples], encode, one_process(), 3, True)
        return samples

    shutil.copytree(OLD_CACHE, tmp_path / "old")
    samples = cached(tmp_path / "old", refuse)
    for index in range(4):
        for mirrored in (False, True):
            made = [
                samples.transform.image_cache.read(index, mirrored, np.random.default_rng(3), (4, 4)) for _ in "ab"
            ]
            crops = [samples.transform.image_cache.crop_generator(index, crop) for crop in (0, 1)]
            possible = [encode_few(samples.view(samples.dataset, index, mirrored, crop, None)) for crop in crops]
            assert any(all(np.array_equal(made[0][name], one[name][1]) for name in one) for one in possible)
    blank = samples.transform.image_cache.read_blank()
    assert all(blank[name].tolist() == np.zeros((4, 4)).tolist() for name in ("mean", "half", "brain"))
    for text in ("", "shared", "caption 0", "caption 1", "caption 2"):
        tokens = FewSamples.tokenize(text)
        assert np.array_equal(samples.transform.caption_cache.read(tokens)["brain"], tokens["ids"].astype(np.float32))

    cached(tmp_path / "new", encode_few)
    old, new = ({path.relative_to(root): path.read_bytes() for path in root.rglob("*.safetensors")}
                for root in (OLD_CACHE, tmp_path / "new"))  # fmt: skip
    assert old == new and len(old) == 2


def test_only_shards_that_are_wanted_are_read_through(tmp_path, monkeypatch):
    """Other datasets may be kept in the same store."""
    store = Store(tmp_path, "images", ["test"])
    fill.open_store(store, [], one_process())
    for key in "abc":
        store.write([key], {"mean": ("float32", np.ones((1, 3), dtype=np.float32))})
    checked, real = [], Store.is_damaged
    monkeypatch.setattr(Store, "is_damaged", lambda store, path: checked.append(path) or real(store, path))
    again = Store(tmp_path, "images", ["test"])
    fill.open_store(again, ["b", "d"], one_process())
    assert checked == [again.locations["b"].path] and "d" not in again


def test_no_bit_of_a_shard_can_change_unseen(tmp_path):
    store = Store(tmp_path, "images", ["test"])
    fill.open_store(store, [], one_process())
    store.write(["one", "two"], {"mean": ("float32", np.arange(6, dtype=np.float32).reshape(2, 3))})
    path = next(store.folder.glob("*.safetensors"))
    complete = path.read_bytes()
    generator, unseen = np.random.default_rng(0), 0
    for at in generator.choice(8 * len(complete), 200, replace=False):
        changed = bytearray(complete)
        changed[at // 8] ^= 1 << (at % 8)
        path.write_bytes(changed)
        again = Store(tmp_path, "images", ["test"])
        fill.open_store(again, ["two"], one_process())
        if "two" in again:  # a bit that has no effect, such as of a space in the header
            unseen += 1
            assert again.read("two")["mean"].tolist() == [3, 4, 5]
    assert unseen < 100


def one_process(on_cpu=False):
    return Processes(0, 1, 0, 1, lambda items: items, on_cpu)


def fill_with(store, wanted, prepare, encode, processes, batch_size):
    options = {"prepare": prepare, "encode": encode, "processes": processes, "batch_size": batch_size}
    return fill.fill(store, wanted, noun="numbers", **options)


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16"])
def test_an_entry_comes_back_as_it_was_computed(tmp_path, kind):
    values = torch.randn(3, 4, 5).to(getattr(torch, kind)).float().numpy()
    store = Store(tmp_path, "images", [kind])
    fill.open_store(store, [], one_process())
    store.write(["a", "b", "c"], {"mean": (kind, values)})
    store.refresh()
    for at, key in enumerate("abc"):
        assert np.array_equal(store.read(key)["mean"], values[at])


def test_a_machine_that_does_not_see_the_others_encodes_all(tmp_path):
    """Two processes on two machines with a folder each, as one of them sees it."""
    made = []

    def encode(batch):
        made.extend(batch["x"].tolist())
        return {"y": ("float32", batch["x"].astype(np.float32)[:, None])}

    store = Store(tmp_path, "images", ["two"])
    processes = Processes(1, 2, 0, 1, lambda items: items * 2)
    wanted = {str(number): number for number in range(7)}
    fill_with(store, wanted, lambda number: {"x": np.int64(number)}, encode, processes, 4)
    assert sorted(made) == list(range(7)) and made[:3] == [1, 3, 5]
    assert all(store.read(key)["y"] == number for key, number in wanted.items())


@pytest.mark.parametrize("on_cpu", [True, False])
def test_a_cpu_reads_no_image_while_its_networks_run(tmp_path, on_cpu):
    """A core that reads keeps all threads of a network waiting; beside a GPU the next batch is read meanwhile."""
    reading, seen = [], []

    def make(number):
        reading.append(number)
        return {"x": np.int64(number)}

    def encode(batch):
        before = len(reading)
        time.sleep(0.05)
        seen.append((before, len(reading)))
        return {"y": ("float32", batch["x"].astype(np.float32)[:, None])}

    store = Store(tmp_path, "images", [on_cpu])
    wanted = {str(number): number for number in range(100)}
    fill_with(store, wanted, make, encode, one_process(on_cpu), 20)
    assert sorted(reading) == list(range(100)) and all(store.read(key)["y"] == wanted[key] for key in wanted)
    if on_cpu:
        assert seen == [(read, read) for read in (20, 40, 60, 80, 100)]
    else:
        assert seen[0][1] == 40  # the next batch is read


# --- bugs ------------------------------------------------------------------------------------------------------------


def planted(*arguments, **options):
    raise TypeError("a planted bug")


@pytest.mark.parametrize("place", ["_pack", "_crc32", "save"])
def test_a_bug_in_writing_is_no_full_disk(tmp_path, monkeypatch, place):
    monkeypatch.setattr(shard, place, planted)
    store = Store(tmp_path, "images", ["bug"])
    encode = lambda batch: {"y": ("float32", batch["x"])}  # noqa: E731
    with pytest.raises(TypeError, match="a planted bug"):
        fill_with(store, {"a": 0}, lambda _: {"x": np.zeros(1, np.float32)}, encode, one_process(), 1)
    assert list(store.folder.iterdir()) == []


@pytest.mark.parametrize("place", ["_crc32", "_name_of"])
def test_a_bug_in_reading_is_no_damaged_shard(tmp_path, monkeypatch, place, capsys):
    store = Store(tmp_path, "images", ["bug"])
    fill.open_store(store, [], one_process())
    store.write(["a"], {"y": ("float32", np.ones((1, 3), dtype=np.float32))})
    monkeypatch.setattr(shard, place, planted)
    with pytest.raises(TypeError, match="a planted bug"):
        fill.open_store(Store(tmp_path, "images", ["bug"]), ["a"], one_process())
    assert len(list(store.folder.glob("*.safetensors"))) == 1
    assert "damaged" not in capsys.readouterr().err


@pytest.mark.parametrize("skip", ["skip", "error"])
@pytest.mark.parametrize("place", ["encode", "view"])
def test_a_bug_in_an_encoder_or_a_transform_is_no_bad_image(tmp_path, skip, place):
    samples = FewSamples()
    samples.on_bad_sample = skip
    if place == "view":
        samples.transform.view = planted
    encode = planted if place == "encode" else encode_few
    with pytest.raises(TypeError, match="a planted bug"):
        cache_images(Store(tmp_path, "pictures", ["bug"]), [samples], encode, one_process(), 2, 2)


def test_a_bug_is_reported_and_not_the_full_disk_behind_it(tmp_path, monkeypatch):
    """What was computed before is written when an encoder fails; that may fail as well."""
    seen = []

    def encode(batch):
        seen.append(batch)
        return planted() if len(seen) > 1 else {"y": ("float32", batch["x"])}

    def full(path, *_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    store = Store(tmp_path, "images", ["bug"])
    with pytest.raises(TypeError, match="a planted bug"):
        fill_with(store, {"a": 0, "b": 1}, lambda _: {"x": np.zeros(1, np.float32)}, encode, one_process(), 1)
    assert list(store.folder.iterdir()) == []


def test_rounds_of_work_need_room_for_what_is_left_alone(tmp_path, monkeypatch):
    """A cache that takes more than half of what is free is filled to its end."""
    monkeypatch.setattr(fill, "ENTRIES_BETWEEN_GATHERS", 3)
    written = []
    free = lambda folder: SimpleNamespace(free=4 * (10 - len(written)))  # noqa: E731
    monkeypatch.setattr(fill.shutil, "disk_usage", free)
    real = Store.write
    monkeypatch.setattr(Store, "write", lambda store, keys, arrays: written.extend(keys) or real(store, keys, arrays))
    store, wanted = Store(tmp_path, "images", ["room"]), {str(number): number for number in range(10)}
    encode = lambda batch: {"y": ("float32", batch["x"][:, None])}  # noqa: E731
    fill_with(store, wanted, lambda number: {"x": np.float32(number)}, encode, one_process(), 2)
    assert len(written) == 10


# --- memory and room -------------------------------------------------------------------------------------------------


FROZEN = [AutoencoderKL, VQModel, CLIPTextModel, CLIPTextModelWithProjection, CLIPVisionModelWithProjection]


def test_networks_are_let_go_once_the_cache_stands(each, tmp_path, monkeypatch):
    alive, script = [], importlib.import_module(each.script)
    real = script.training_loss

    def networks():
        gc.collect()
        return [thing for thing in gc.get_objects() if type(thing) in FROZEN]

    def spy(*arguments):
        alive.append({type(thing) for thing in networks() if id(thing) not in others})
        return real(*arguments)

    of_other_tests = networks()  # held here, so that no new one gets the place of one in memory
    others = set(map(id, of_other_tests))
    monkeypatch.setattr(script, "training_loss", spy)
    each(tmp_path / "out", "--max_train_steps", "1", *switches(each, tmp_path / "kept"))
    assert alive == [set()]
    if each.script == "train_text_to_image":  # unless images are to be drawn
        flags = ["--validation_prompts", "zero"]
        each(tmp_path / "out", "--max_train_steps", "1", *flags, *switches(each, tmp_path / "kept"))
        assert alive[1] == {AutoencoderKL, CLIPTextModel}


def test_networks_visit_the_device():
    moves = []

    class Network(torch.nn.Linear):
        def to(self, device):
            moves.append(str(device))
            return self

    with frozen.temporarily_on([Network(2, 2), None], "meta"):
        assert moves == ["meta"]
    assert moves == ["meta", "cpu"]
    with frozen.temporarily_on([Network(2, 2)], "cpu"):
        pass
    assert moves == ["meta", "cpu"], "one that is there already was moved"


def test_a_full_disk_and_a_folder_that_cannot_be_written(run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(fill.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(100, 99, 1))
        sentence, code = run.fails(tmp_path / "out", *switches(run, tmp_path / "kept"))
    assert "0 GB are free" in sentence.replace("1e-09", "0") and "--encoding_cache_dir" in sentence and code == 2
    (tmp_path / "file").write_text("")
    sentence, code = run.fails(tmp_path / "out", *switches(run, tmp_path / "file"))
    assert "--encoding_cache_dir" in sentence and code == 2

    real = os.fsync

    def full(descriptor):
        if str(tmp_path / "kept") in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(28, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        sentence, code = run.fails(tmp_path / "out", *switches(run, tmp_path / "kept"))
    assert "No space left on device); make room, or name another folder" in sentence and code == 1
    assert not list((tmp_path / "kept").rglob("*.unfinished"))


def test_a_network_that_overflows_is_said_with_the_image(run, tmp_path, monkeypatch):
    real = train_text_to_image.encode_images

    def overflows(vae, batch):
        made = real(vae, batch)
        made["latent_mean"][0, 0, 0, 0] = torch.inf
        return made

    monkeypatch.setattr(train_text_to_image, "encode_images", overflows)
    sentence, code = run.fails(tmp_path / "out", *switches(run, tmp_path / "kept"))
    assert "0.png is not finite" in sentence and "--mixed_precision no" in sentence and code == 1


def test_a_image_that_overflows_can_be_skipped(run, tmp_path, monkeypatch):
    real = train_text_to_image.encode_images

    def overflows(vae, batch):
        made = real(vae, batch)
        made["latent_mean"][batch["pixels"][:, 0, 0, 0] == first] = torch.inf
        return made

    first = float(np.asarray(image(0).crop((2, 0, 18, 16)))[0, 0, 0] / 127.5 - 1)
    first = torch.tensor(first, dtype=torch.float32)
    monkeypatch.setattr(train_text_to_image, "encode_images", overflows)
    flags = ["--center_crop", "--on_bad_sample", "skip", *switches(run, tmp_path / "kept")]
    run(tmp_path / "out", *flags)
    assert entries(tmp_path / "kept") == 19  # ten captions, and the images but one


def test_rounds_of_work_leave_nothing_out(tmp_path, monkeypatch):
    monkeypatch.setattr(fill, "ENTRIES_BETWEEN_GATHERS", 3)
    store, wanted = Store(tmp_path, "images", ["rounds"]), {str(number): number for number in range(10)}
    encode = lambda batch: {"y": ("float32", batch["x"].astype(np.float32)[:, None])}  # noqa: E731
    fill_with(store, wanted, lambda number: {"x": np.int64(number)}, encode, one_process(), 2)
    assert all(store.read(key)["y"] == number for key, number in wanted.items())


def test_contradictions(run, run_lora, tmp_path, capsys):
    for runner, flags, words in (
        (run, ["--cached_crops", "2"], "--cached_crops has no effect without --cache_latents"),
        (run, ["--cached_crops", "2", "--cache_latents", "--center_crop"], "--cached_crops is for --cache_latents"),
        (run_lora, ["--train_text_encoder", "--cache_text_embeddings"], "--train_text_encoder changes"),
    ):
        with pytest.raises(SystemExit) as stopped:
            runner(tmp_path / "out", *flags)
        assert stopped.value.code == 2 and words in capsys.readouterr().err


def test_that_one_crop_is_kept_is_said(run, tmp_path, capsys):
    run(tmp_path / "out", "--max_train_steps", "1", *switches(run, tmp_path / "kept"))
    assert "one random crop of each of 10 images is kept" in capsys.readouterr().err
    for more in (["--cached_crops", "2"], ["--center_crop"]):
        run(tmp_path / "out", "--max_train_steps", "1", *more, *switches(run, tmp_path / "kept"))
        assert "random crop" not in capsys.readouterr().err


def test_crops_come_from_the_content(tmp_path):
    cached = CachedImages(None, ["a" * 64, "b" * 64], [False, False], 3)
    drawn = [cached.crop_generator(index, crop).integers(1000) for index in (0, 1) for crop in range(3)]
    assert len(set(drawn)) > 3
    assert drawn[0] == draws.generator(int("a" * 15, 16), "cached_crop", 0).integers(1000)
    assert cached.crop_generator(0, None) is None


def test_bad_data_raise_what_they_are(tmp_path):
    store = Store(tmp_path, "images", ["bad"])
    with pytest.raises(UserError, match="gone"):
        fill_with(store, {"a": 0}, lambda _: UserError("gone"), None, one_process(), 1)
