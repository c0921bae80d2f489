"""train_text_to_image_flax.py: the numbers of the torch script, exact resume, devices and hosts, and what it saves."""

import gc
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from broken_models import add_safety_checker
from conftest import ROOT, logged, relative_difference, result_bytes, result_weights
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from flax_runs import FlaxRunner, compiled_once
from PIL import Image
from safetensors.numpy import load_file
from test_formats import CAPTIONS, config, shard
from test_single_file import as_one_file
from test_small_datasets import check_a_run
from tiny import UNET, write_images

import train_text_to_image_flax as script
from flax_diffusion import FlaxStableDiffusionPipeline
from tools.report.folder import read_run_folder
from tools.report.page import render_page
from training_utils.base import draws, formats
from training_utils.base.errors import UserError
from training_utils.cli import packages
from training_utils.cli.options import ObjectiveOptions
from training_utils.jax_backend import frozen, gradient, models, optimizers, processes, validation
from training_utils.jax_backend.frozen import Encoder
from training_utils.jax_backend.state import TrainingState, new_arrays
from training_utils.run import checkpoints, exit
from training_utils.run.metrics import Log
from training_utils.run.progress import Progress

TRACKED = ["--report_to", "tensorboard"]
EVERY_DRAW = [
    *("--train_batch_size", "2", "--gradient_accumulation_steps", "2", "--use_ema", "--ema_decay", "0.4"),
    *("--random_flip", "--caption_dropout", "0.5", "--noise_offset", "0.1", "--input_perturbation", "0.1"),
    *("--snr_gamma", "5", "--prediction_type", "v_prediction", "--lr_scheduler", "cosine", "--lr_warmup_steps", "2"),
    *("--validation_split", "0.1", "--validation_steps", "2", "--dataloader_num_workers", "2"),
]
BF16 = ["--mixed_precision", "bf16", "--gradient_checkpointing"]
PROMPTS = ["--validation_prompts", "a handwritten one", "two", "--validation_num_inference_steps", "2"]


@pytest.fixture(scope="module", autouse=True)
def compiled():
    with compiled_once() as compiled:
        yield compiled


@pytest.fixture(scope="module")
def run_flax(sd, images):
    return FlaxRunner("train_text_to_image_flax", sd, images)


@pytest.fixture(scope="module")
def plain(run_flax, tmp_path_factory):
    """A run of six steps with a checkpoint after each and every curve."""
    out = tmp_path_factory.mktemp("plain") / "out"
    run_flax(out, *TRACKED, "--checkpointing_steps", "1")
    return out


@pytest.fixture(scope="module")
def every_draw(run_flax, tmp_path_factory):
    """The same with everything drawn that can be, accumulation, an average and a validation loss."""
    out = tmp_path_factory.mktemp("every draw") / "out"
    run_flax(out, *TRACKED, *EVERY_DRAW, "--checkpointing_steps", "1")
    return out


# ---------------------------------------------------------------------------------------------------------------------
# The numbers of the torch script
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "flags"), [("plain", []), ("every_draw", EVERY_DRAW)])
def test_losses_are_those_of_the_torch_script(request, run, tmp_path, name, flags):
    """With the same seed, over six steps of ten images, the last of each epoch with fewer than the others."""
    ours = request.getfixturevalue(name)
    run(tmp_path, *TRACKED, *flags, "--dataloader_num_workers", "0")  # torch's workers are forks, which JAX fears
    for curve in ("train_loss", "grad_norm", "lr", "val_loss"):
        theirs = logged(tmp_path, curve)
        assert logged(ours, curve) == pytest.approx(theirs, rel=1e-4), curve
        assert len(theirs) == (6 if curve != "val_loss" else 3 if flags else 0)
    assert relative_difference(ours, tmp_path) < 1e-5


def test_metrics_and_the_page_of_a_run(every_draw):
    log = Log(every_draw)
    for name in ("train_loss", "lr", "grad_norm", "samples_per_second", "memory_resident_gib", "val_loss"):
        assert log.curves[name] == pytest.approx(logged(every_draw, name), rel=1e-6), name
    html = render_page([read_run_folder(every_draw)])
    assert "finished: 6 of 6 steps" in html and "train_text_to_image_flax.py --config" in html
    assert html.count("<svg") == 6 and formats.number(log.lowest("val_loss")[1]) in html


@pytest.mark.parametrize("shape", ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant_with_warmup"])
def test_learning_rate_curves(shape):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1e-3)
    theirs = get_scheduler(shape, optimizer, num_warmup_steps=3, num_training_steps=10, num_cycles=2, power=2)
    ours = optimizers.learning_rate_curve(
        name=shape, peak=1e-3, num_warmup_steps=3, num_training_steps=10, num_cycles=2, power=2
    )
    for step in range(11):
        assert ours(step) == pytest.approx(theirs.get_last_lr()[0], rel=1e-6, abs=1e-15), step
        optimizer.step()
        theirs.step()


def test_clipping_and_its_absence():
    gradients = {"a": np.array([3.0, 0.0], np.float32), "b": np.array([[4.0]], np.float32)}
    for most in (0.5, 5.0, 100.0):
        tensors = [torch.nn.Parameter(torch.zeros(array.shape)) for array in gradients.values()]
        for tensor, array in zip(tensors, gradients.values()):
            tensor.grad = torch.from_numpy(array.copy())
        norm = torch.nn.utils.clip_grad_norm_(tensors, most)
        ours, our_norm = gradient.clip_gradient(gradients, most)
        assert float(our_norm) == pytest.approx(float(norm))
        for mine, tensor in zip(ours.values(), tensors):
            np.testing.assert_allclose(mine, tensor.grad.numpy(), rtol=1e-6)
    ours, norm = gradient.clip_gradient(gradients, 0)
    assert float(norm) == 5 and all(np.array_equal(ours[name], gradients[name]) for name in gradients)


def test_average_is_what_is_saved(every_draw):
    """Held against the average computed by hand from the weights after each step."""
    average = None
    for step in range(1, 7):
        name = "conv_in.weight"
        weight = load_file(every_draw / f"checkpoint-{step}/unet/diffusion_pytorch_model.safetensors")[name]
        decay = 0.0 if step == 1 else min(0.4, step / (9 + step))  # diffusers counts the first step as step 0
        average = weight if average is None else decay * average + (1 - decay) * weight.astype(np.float64)
    saved = load_file(every_draw / "checkpoint-6/unet_ema/diffusion_pytorch_model.safetensors")[name]
    np.testing.assert_allclose(saved, average, rtol=1e-5, atol=1e-7)
    assert np.array_equal(result_weights(every_draw)[name].numpy(), saved)
    assert json.loads((every_draw / "checkpoint-6/unet_ema/config.json").read_text())["optimization_step"] == 6


def test_noise_is_mixed_in_float32_and_weights_stay_float32_under_bf16(run_flax, plain, tmp_path):
    seen = {}

    class Network:
        def __call__(self, noisy, timesteps, text_states):
            seen["noisy"] = noisy.dtype
            return noisy.astype(jnp.bfloat16)

    ones = jnp.ones((2, 4, 8, 8), jnp.bfloat16)
    batch = {"timestep": jnp.array([0, 999]), "latent_mean": ones, "latent_std": ones, "text_states": ones}
    batch |= {name: ones.astype(jnp.float32) for name in ("noise", "latent_noise")}
    loss = script.training_loss(Network(), script.FlaxDDPMScheduler(), batch, 0.2, ObjectiveOptions(snr_gamma=5.0))
    assert seen["noisy"] == jnp.float32 and loss.dtype == jnp.float32 and loss.shape == (2,)

    run_flax(tmp_path, *BF16, *TRACKED)
    assert {weight.dtype for weight in result_weights(tmp_path).values()} == {torch.float32}
    assert logged(tmp_path) == pytest.approx(logged(plain), rel=2e-2)
    assert logged(tmp_path) != pytest.approx(logged(plain), rel=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Resume
# ---------------------------------------------------------------------------------------------------------------------


def cut_and_continue(run_flax, complete, cut, out, *flags):
    shutil.copytree(complete / f"checkpoint-{cut}", out / f"checkpoint-{cut}")
    assert run_flax(out, *flags, "--checkpointing_steps", "1", "--resume_from_checkpoint", "latest") == 0


@pytest.mark.parametrize(("name", "flags"), [("plain", []), ("every_draw", EVERY_DRAW)])
def test_resumed_equals_uninterrupted(request, run_flax, tmp_path, name, flags):
    """Ten images in windows of four (nine with one for validation): the cuts lie inside an epoch and at its end."""
    complete = request.getfixturevalue(name)
    for cut in (2, 3, 5):
        out = tmp_path / str(cut)
        cut_and_continue(run_flax, complete, cut, out, *TRACKED, *flags)
        assert result_bytes(out) == result_bytes(complete), f"cut after step {cut}"
        for curve in ("train_loss", "lr", "val_loss"):
            assert logged(out, curve) == {step: v for step, v in logged(complete, curve).items() if step > cut}
    for file in ("optimizer.safetensors", "unet/diffusion_pytorch_model.safetensors"):
        assert (out / "checkpoint-6" / file).read_bytes() == (complete / "checkpoint-6" / file).read_bytes()


def test_resumed_equals_uninterrupted_in_bf16(run_flax, tmp_path):
    run_flax(tmp_path / "complete", *BF16, "--checkpointing_steps", "1")
    cut_and_continue(run_flax, tmp_path / "complete", 2, tmp_path / "cut", *BF16)
    assert result_bytes(tmp_path / "cut") == result_bytes(tmp_path / "complete")


def test_a_run_is_repeated_from_its_file(run_flax, every_draw, tmp_path):
    """The default seed, which gives way to that of a checkpoint, is as firm as any other in it."""
    words = ["--config", str(every_draw / "run.yaml"), "--output_dir", str(tmp_path / "again")]
    assert script.main(words) == 0
    assert result_bytes(tmp_path / "again") == result_bytes(every_draw)
    first, second = ((folder / "run.yaml").read_text() for folder in (every_draw, tmp_path / "again"))
    assert second == first.replace(f"output_dir: {every_draw} ", f"output_dir: {tmp_path / 'again'} ")


def test_a_dry_run_leaves_nothing_behind(run_flax, plain, sd, tmp_path, capsys):
    out, kept = tmp_path / "out", tmp_path / "cache"
    assert run_flax(out, "--dry_run", *TRACKED, "--cache_latents", "--encoding_cache_dir", kept) == 0
    assert not out.exists() and not kept.exists()
    report = capsys.readouterr().out
    unet = sum(p.numel() for p in UNet2DConditionModel.from_pretrained(sd, subfolder="unet").parameters())
    assert re.search(rf"parameters of unet +trained +frozen\n(  \w+ +[\d,]+ +0\n)+  in all +{unet:,} +0\n", report)
    assert "steps       6 of 4 images\n" in report and "s a step (2 timed, after the first one)" in report


def test_fp16_without_an_accelerator(run_flax, tmp_path):
    sentence, code = run_flax.fails(tmp_path, "--mixed_precision", "fp16")
    assert "--mixed_precision fp16 does not run on this device" in sentence and code == 2


@pytest.fixture
def fp16_on_a_cpu(monkeypatch):
    """The loss scale of fp16 over a computation in float32, which is what a CPU has."""
    monkeypatch.setattr(processes, "check_precision", lambda name: None)
    monkeypatch.setitem(models.TYPES, "fp16", jnp.float32)


def far_from(params, noise):
    """Losses with a large gradient that take no time to compile."""
    return 1e3 * jnp.square(params["conv_in"]["bias"].sum() - noise.mean((1, 2, 3)) - 1)


def test_fp16_overflows_skip_the_step(run_flax, plain, tmp_path, monkeypatch, fp16_on_a_cpu):
    """Neither step nor schedule moves, only the data; the scale is halved until the gradients are finite. Cut and
    continued in between it comes to the same weights; fifty overflows in a row end the run."""
    scale = {"scale": np.float32(2.0**127), "good": np.int32(0)}
    monkeypatch.setattr(gradient, "new_loss_scale", lambda: scale)
    monkeypatch.setattr(script, "sample_losses", lambda params, batch, *_: far_from(params, batch["noise"]))
    flags = ["--mixed_precision", "fp16", *TRACKED, "--lr_scheduler", "linear", "--lr_warmup_steps", "0"]
    run_flax(tmp_path / "some", *flags, "--checkpointing_steps", "1")
    assert list(logged(tmp_path / "some")) == [1, 2, 3, 4, 5, 6]
    assert logged(tmp_path / "some", "lr")[6] == 0
    state = json.loads((tmp_path / "some/checkpoint-6/manifest.json").read_text())["state"]
    saved = load_file(tmp_path / "some/checkpoint-6/optimizer.safetensors")
    skipped = state["micro_step"] - 6
    assert skipped > 0 and saved["loss_scale/scale"] == 2.0 ** (127 - skipped)
    assert saved["optimizer/0/count"] == 6 and saved["loss_scale/good"] == 6
    cut_and_continue(run_flax, tmp_path / "some", 2, tmp_path / "cut", *flags)
    assert result_bytes(tmp_path / "cut") == result_bytes(tmp_path / "some")

    scale["scale"] = np.float32(np.inf)
    with pytest.raises(UserError, match="overflowed 50 times in a row"):
        run_flax(tmp_path / "all", *flags)


def test_loss_scale():
    state = {"scale": np.float32(8), "good": np.int32(gradient.STEPS_TO_GROW - 1)}
    assert gradient.update_loss_scale(state, np.True_) == {"scale": 16, "good": 0}
    assert gradient.update_loss_scale(state, np.False_) == {"scale": 4, "good": 0}


def test_number_of_threads_changes_nothing(run_flax, plain, tmp_path):
    for workers in (1, 3):
        run_flax(tmp_path / str(workers), "--dataloader_num_workers", workers)
        assert result_bytes(tmp_path / str(workers)) == result_bytes(plain)


def test_shards_of_a_weighted_source_are_read_too(run_flax, plain, tmp_path):
    """With one source, whose share is all; and its captions, of one tag each, are in any order the same."""
    shard(tmp_path / "set" / "a.tar", [(index, text.encode()) for index, text in enumerate(CAPTIONS)])
    path = config(tmp_path, {"path": "set", "weight": 0.5})
    run_flax(tmp_path / "out", "--train_data_config", path, "--shuffle_tags")
    assert result_bytes(tmp_path / "out") == result_bytes(plain)


def test_a_stream_is_resumed_and_is_that_of_the_torch_script(run_flax, run, tmp_path):
    for at in range(0, 10, 2):
        shard(tmp_path / "set" / f"{at}.tar", [(i, CAPTIONS[i].encode()) for i in (at, at + 1)])
    stream = ["--streaming", "--shuffle_buffer", "4", "--train_data_dir", tmp_path / "set", "--cache_dir", tmp_path]
    run_flax(tmp_path / "complete", *stream, "--dataloader_num_workers", "2", "--checkpointing_steps", "1")
    cut_and_continue(run_flax, tmp_path / "complete", 4, tmp_path / "cut", *stream)
    assert result_bytes(tmp_path / "cut") == result_bytes(tmp_path / "complete")
    run(tmp_path / "torch", *stream)
    assert relative_difference(tmp_path / "torch", tmp_path / "complete") < 1e-5


def test_a_base_model_in_one_file(run_flax, sd, tmp_path, monkeypatch):
    """Trains as its folder does; what converts it may be absent, and then that is said."""
    path = as_one_file(sd, tmp_path / "model.safetensors")
    flags = ["--pretrained_model_name_or_path", path, "--single_file_config", sd, "--cache_dir", tmp_path / "cache"]
    for name, more in (("folder", []), ("file", flags)):
        run_flax(tmp_path / name, *more, "--max_train_steps", "2")
    assert result_bytes(tmp_path / "file") == result_bytes(tmp_path / "folder")
    monkeypatch.setattr(models, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -r requirements\.txt"):
        run_flax(tmp_path / "again", *flags)


def test_sigkill_then_resume(run_flax, tmp_path):
    """A process that is killed, and another, this one, that continues: equal to a run that was left alone."""
    flags = ["--checkpointing_steps", "5", "--max_train_steps", "300", "--checkpoints_total_limit", "2"]
    process = run_flax.start(tmp_path / "killed", *flags)
    while not any((tmp_path / "killed").glob("checkpoint-1?")):
        assert process.poll() is None, process.stdout.read()
    process.kill()
    process.wait()
    assert not (tmp_path / "killed" / "README.md").exists(), "it was killed too late to show anything"
    latest = max(int(path.name[11:]) for path in (tmp_path / "killed").glob("checkpoint-*"))
    flags[3] = str(latest + 4)
    run_flax(tmp_path / "killed", *flags, "--resume_from_checkpoint", "latest")
    run_flax(tmp_path / "complete", *flags)
    assert result_bytes(tmp_path / "killed") == result_bytes(tmp_path / "complete")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_leaves_a_checkpoint_and_the_command_that_continues(
    run_flax, plain, tmp_path, monkeypatch, capsys, number
):
    def update(self, state, *values):
        real(self, state, *values)
        if state.step == 3:
            os.kill(os.getpid(), number)

    real = Progress.update
    monkeypatch.setattr(Progress, "update", update)
    monkeypatch.setattr(sys, "argv", ["train_text_to_image_flax.py"])
    assert run_flax(tmp_path, "--hub_token", "hf_secret") == 128 + number
    said = capsys.readouterr().err
    assert "stopped after step 3" in said and "hf_secret" not in said
    command = said.strip().splitlines()[-1].strip()
    assert command.startswith("python train_text_to_image_flax.py --pretrained")
    monkeypatch.setattr(Progress, "update", real)
    run_flax(tmp_path, "--resume_from_checkpoint", "latest")
    assert result_bytes(tmp_path) == result_bytes(plain)


def test_seed_of_the_checkpoint_is_kept(run_flax, plain, tmp_path):
    """The default seed is 0 here, for a new run: a continued one keeps its own unless another is given."""
    argv = run_flax.argv(tmp_path, "--checkpointing_steps", "1")
    at = argv.index("--seed")
    shutil.copytree(plain / "checkpoint-3", tmp_path / "checkpoint-3")
    script.main([*argv[:at], *argv[at + 2 :], "--resume_from_checkpoint", "latest"])
    assert result_bytes(tmp_path) == result_bytes(plain)


WRONG_CHECKPOINTS = {
    "missing": "optimizer.safetensors holds no optimizer/0/mu/conv_in/bias",
    "no optimizer": "cannot be read",
    "without fp16": "was not trained with --mixed_precision fp16",
}


@pytest.mark.parametrize("what", WRONG_CHECKPOINTS)
def test_a_checkpoint_that_does_not_fit(run_flax, plain, tmp_path, what, fp16_on_a_cpu):
    from safetensors.numpy import save_file

    folder = tmp_path / "checkpoint-3"
    shutil.copytree(plain / "checkpoint-3", folder)
    (folder / "manifest.json").unlink()  # as one made by another program: the content is not vouched for
    if what == "missing":
        save_file({"optimizer/0/count": np.array(3, np.int32)}, folder / "optimizer.safetensors")
    if what == "no optimizer":
        (folder / "optimizer.safetensors").unlink()
    flags = ["--mixed_precision", "fp16"] if what == "without fp16" else []
    sentence, code = run_flax.fails(tmp_path, *flags, "--resume_from_checkpoint", "checkpoint-3")
    assert WRONG_CHECKPOINTS[what] in sentence and code == 2


def test_an_average_can_be_turned_on_later_and_turned_off(run_flax, every_draw, tmp_path, capsys):
    folder = tmp_path / "checkpoint-5"
    shutil.copytree(every_draw / "checkpoint-5", folder)
    (folder / "manifest.json").unlink()
    shutil.rmtree(folder / "unet_ema")
    run_flax(tmp_path, *EVERY_DRAW, "--checkpointing_steps", "6", "--resume_from_checkpoint", "checkpoint-5")
    assert "holds no EMA weights" in capsys.readouterr().err
    for name, weight in load_file(tmp_path / "checkpoint-6/unet/diffusion_pytorch_model.safetensors").items():
        saved = result_weights(tmp_path)[name].numpy()  # the first step of an average takes the weights as they are
        assert np.array_equal(saved, weight), name

    unet, params = models.load_part(every_draw, "unet")
    fresh = TrainingState(unet, new_arrays(params, optimizers.make_optimizer((0.9, 0.999), 0.01, 1e-8)))
    fresh.read(every_draw / "checkpoint-5")
    assert set(fresh.arrays) == {"params", "optimizer"}


# ---------------------------------------------------------------------------------------------------------------------
# What is frozen runs once
# ---------------------------------------------------------------------------------------------------------------------


def kept_in(folder):
    return ["--cache_latents", "--cache_text_embeddings", "--center_crop", "--encoding_cache_dir", folder]


def entries(folder):
    """How many entries all caches in a folder hold."""
    return sum(len(next(iter(load_file(path).values()))) for path in Path(folder).rglob("*.safetensors"))


@pytest.fixture(scope="module")
def kept(run_flax, tmp_path_factory):
    """A run without caches and with them: (its folder, the other's, that of the caches)."""
    folder = tmp_path_factory.mktemp("kept")
    flags = [*TRACKED, *EVERY_DRAW, "--checkpointing_steps", "1"]
    run_flax(folder / "plain", *flags, "--center_crop")
    run_flax(folder / "cached", *flags, *kept_in(folder / "caches"))
    return folder / "plain", folder / "cached", folder / "caches"


def test_a_cached_run_is_the_same_to_the_bit(kept):
    plain, cached, caches = kept
    for curve in ("train_loss", "grad_norm", "val_loss"):
        assert logged(plain, curve) and logged(plain, curve) == logged(cached, curve), curve
    assert result_bytes(plain) == result_bytes(cached)
    assert entries(caches) == 2 * 9 + 1 + 10 + 1  # mirrored too, one for validation; the captions and the empty one


def test_a_cache_is_found_again_and_its_networks_never_run(run_flax, kept, tmp_path, monkeypatch, sd):
    """A run that continues with it ends in the same weights. Only images that are drawn bring the networks' weights
    to the device."""
    plain, cached, caches = kept

    def refuse(*_):
        raise AssertionError("a frozen network ran")

    monkeypatch.setattr(Encoder, "__call__", refuse)
    cut_and_continue(run_flax, cached, 3, tmp_path / "cut", *TRACKED, *EVERY_DRAW, *kept_in(caches))
    assert result_bytes(tmp_path / "cut") == result_bytes(plain)

    words = models.load_part(sd, "text_encoder")[1]["embeddings.token_embedding"]["embedding"].shape
    on_the_device, real = [], validation.draw_images

    def draw(*args, **options):
        on_the_device.append(any(array.shape == words for array in jax.live_arrays()))
        return real(*args, **options)

    monkeypatch.setattr(validation, "draw_images", draw)
    flags = [*PROMPTS, "--validation_steps", "6", "--train_batch_size", "2"]
    gc.collect()  # what other tests have left on the device
    run_flax(tmp_path / "drawn", *flags, *kept_in(caches))
    assert on_the_device == [False] and (tmp_path / "drawn" / "validation" / "step-000006.png").exists()


def test_bits_of_a_sample_depend_on_no_other(sd, monkeypatch):
    """Nor on how many there are: a cache that is filled in batches of one size serves those of another. On other
    devices than a CPU, where a batch runs as such, it comes to the same except rounding."""
    module, params = models.load_part(sd, "text_encoder")
    tokens = np.random.default_rng(0).integers(0, 99, (6, 16)).astype(np.int32)

    def encoded(*lead):
        count = lead[0] * lead[1]
        run = jax.jit(partial(frozen.encode_one_by_one, encode=script.encode_captions, network=module))
        made = run(params, {"tokens": tokens[:count].reshape(*lead, 16)}, count)["text_states"]
        assert made.shape[:2] == lead
        return np.asarray(made).reshape(count, 16, -1)

    complete = encoded(1, 6)
    for lead in ((1, 1), (1, 2), (2, 3)):
        assert np.array_equal(encoded(*lead), complete[: lead[0] * lead[1]]), lead
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    np.testing.assert_allclose(encoded(2, 3), complete, atol=1e-5)


def test_another_network_has_another_cache(sd):
    def digest(params, dtype=jnp.float32):
        module, _ = models.load_part(sd, "text_encoder", dtype)
        return Encoder(script.encode_captions, module, "tokens").digest(params)

    _, params = models.load_part(sd, "text_encoder")
    changed = jax.tree.map(np.copy, params)
    changed["final_layer_norm"]["bias"][0] += 1
    assert digest(params) == digest(jax.tree.map(np.copy, params))
    assert len({digest(params), digest(changed), digest(params, jnp.bfloat16)}) == 3


# ---------------------------------------------------------------------------------------------------------------------
# Devices and hosts
# ---------------------------------------------------------------------------------------------------------------------


def test_the_loop_never_waits_for_the_device(run_flax, tmp_path, monkeypatch):
    """Nothing is fetched between two fetches of the losses, whatever the number of steps."""
    kind, fetched = type(jnp.zeros(1)), []
    value = kind._value

    def count(array):
        fetched.append(array)
        return value.fget(array)

    counts = []
    monkeypatch.setattr(kind, "_value", property(count))
    for steps in (3, 13):
        run_flax(tmp_path / str(steps), "--max_train_steps", steps, "--logging_steps", "100")
        counts.append(len(fetched) - sum(counts))
    # a loss and a norm for each step come in one fetch at the end
    assert counts[1] - counts[0] == 2 * 10 and counts[0] > 6


def without_torch(folder):
    """A folder to import from that holds what is installed except torch and what needs it."""
    refused = re.compile(r"(torch|functorch|diffusers|accelerate|peft|bitsandbytes|_virtualenv)", re.I)
    folder.mkdir()
    for path in Path(np.__file__).parent.parent.iterdir():
        if not refused.match(path.name) and path.suffix != ".pth":
            (folder / path.name).symlink_to(path)
    return folder


def test_four_devices_equal_one_and_no_torch_is_needed(run_flax, plain, tmp_path):
    """From the first line to the validation images and the card, where torch and its libraries are not installed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["PYTHONPATH"] = str(without_torch(tmp_path / "site-packages"))
    environment["XLA_FLAGS"] += " --xla_force_host_platform_device_count=4"
    flags = ["--train_batch_size", "1", *TRACKED, *PROMPTS, "--validation_steps", "6"]
    flags += ["--cache_text_embeddings", "--encoding_cache_dir", tmp_path / "kept"]
    process = run_flax.start(tmp_path / "out", *flags, launcher=(sys.executable, "-S"), env=environment)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert relative_difference(tmp_path / "out", plain) < 1e-6
    assert logged(tmp_path / "out") == pytest.approx(logged(plain), rel=1e-5)
    assert (tmp_path / "out" / "validation" / "step-000006.png").exists() and (tmp_path / "out" / "README.md").exists()
    assert "PyTorch" not in said, "nothing about what is not needed"


def start_two(run_flax, out, *flags, folders=(None, None)):
    """Two processes, joined through jax.distributed, that start in these folders: [Popen, Popen]."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    return [
        run_flax.start(out, *flags, env=environment | {"JAX_PROCESS_ID": str(rank)}, cwd=folder or ROOT)
        for rank, folder in enumerate(folders)
    ]


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_stops_both_in_order(run_flax, tmp_path):
    flags = ["--train_batch_size", "2", "--checkpointing_steps", "20", "--max_train_steps", "9000"]
    processes = start_two(run_flax, tmp_path, *flags)
    while not (tmp_path / "checkpoint-20").exists():
        assert processes[0].poll() is None, processes[0].communicate()
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)
    said = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [128 + signal.SIGTERM] * 2, said
    stopped_after = int(re.search(r"stopped after step (\d+)", said[0])[1])
    assert checkpoints.damage_of(tmp_path / f"checkpoint-{stopped_after}") is None


def test_two_processes_equal_one(run_flax, tmp_path):
    """They share the work for the caches. Continued by one process, which only shares the samples out otherwise."""
    plain, cached = tmp_path / "plain", kept_in(tmp_path / "kept")
    run_flax(plain, *TRACKED, "--center_crop")
    flags = ["--train_batch_size", "2", *TRACKED, "--checkpointing_steps", "4", *cached]
    processes = start_two(run_flax, tmp_path / "two", *flags)
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert relative_difference(tmp_path / "two", plain) < 1e-6
    assert logged(tmp_path / "two") == pytest.approx(logged(plain), rel=1e-5)
    assert "a step" in said[0] and "a step" not in said[1], "the first process alone speaks"
    assert entries(tmp_path / "kept") == 10 + 10, "nothing is encoded twice"

    shutil.copytree(tmp_path / "two" / "checkpoint-4", tmp_path / "continued" / "checkpoint-4")
    run_flax(tmp_path / "continued", *cached, "--checkpointing_steps", "4", "--resume_from_checkpoint", "latest")
    assert relative_difference(tmp_path / "continued", plain) < 1e-6


@pytest.mark.slow
def test_two_machines_continue_what_one_process_wrote(run_flax, tmp_path):
    """The checkpoint must lie on both; the first one writes."""
    run_flax(tmp_path / "plain", "--checkpointing_steps", "4", "--use_ema")
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    shutil.copytree(tmp_path / "plain" / "checkpoint-4", folders[0] / "out" / "checkpoint-4")
    flags = [
        "--train_batch_size",
        "2",
        "--use_ema",
        "--checkpointing_steps",
        "6",
        "--resume_from_checkpoint",
        "latest",
    ]
    processes = start_two(run_flax, "out", *flags, folders=folders)
    said = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], said
    assert "".join(said).count("out/checkpoint-4 is missing, or another one, on") == 1, said
    shutil.copytree(folders[0] / "out", folders[1] / "out")
    processes = start_two(run_flax, "out", *flags, folders=folders)
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert relative_difference(folders[0] / "out", tmp_path / "plain") < 1e-6
    assert os.listdir(folders[1] / "out") == ["checkpoint-4"]


# ---------------------------------------------------------------------------------------------------------------------
# What it leaves behind
# ---------------------------------------------------------------------------------------------------------------------


def test_result_draws_the_same_in_torch_and_here(plain, sd):
    latents = np.random.default_rng(0).standard_normal((1, 4, 8, 8), dtype=np.float32)
    torch_pipeline = StableDiffusionPipeline.from_pretrained(plain, use_safetensors=True)
    torch_pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "height": 16, "width": 16}
    theirs = torch_pipeline("one", latents=torch.from_numpy(latents), output_type="np", **options).images
    pipeline, params = FlaxStableDiffusionPipeline.from_pretrained(plain)
    ours = pipeline(pipeline.prepare_inputs("one"), params, jax.random.key(0), latents=latents, **options).images
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    for part, name in (("vae", "diffusion_pytorch_model"), ("text_encoder", "model")):
        assert (plain / part / f"{name}.safetensors").read_bytes() == Path(
            sd, part, f"{name}.safetensors"
        ).read_bytes()


def test_a_variant_a_safety_checker_and_a_changed_scheduler(run_flax, plain, tmp_path, sd):
    """The weights of the variant under their plain names, what is not run copied, and a sampler that fits."""
    base, out = tmp_path / "base", tmp_path / "out"
    StableDiffusionPipeline.from_pretrained(sd).save_pretrained(base, variant="fp16")
    add_safety_checker(base)
    index = json.loads((base / "model_index.json").read_text())
    shutil.copytree(plain / "checkpoint-1", out / "checkpoint-1")  # its last step, so that none need be compiled
    flags = ["--pretrained_model_name_or_path", base, "--variant", "fp16", "--max_train_steps", "1"]
    flags += ["--resume_from_checkpoint", "latest"]
    run_flax(out, *flags, "--prediction_type", "v_prediction", "--rescale_betas_zero_snr")
    assert (out / "vae/diffusion_pytorch_model.safetensors").read_bytes() == (
        base / "vae/diffusion_pytorch_model.fp16.safetensors"
    ).read_bytes()
    assert (out / "safety_checker" / "config.json").exists()
    assert json.loads((out / "model_index.json").read_text())["safety_checker"] == index["safety_checker"]
    pipeline = StableDiffusionPipeline.from_pretrained(out, safety_checker=None, use_safetensors=True)
    config = pipeline.scheduler.config
    assert type(pipeline.scheduler).__name__ == "DDIMScheduler"  # PNDM cannot begin at pure noise
    assert config.rescale_betas_zero_snr and config.timestep_spacing == "trailing" and not config.clip_sample
    assert config.prediction_type == "v_prediction"


def test_grids_and_validation_loss_of_the_same_weights_are_equal(run_flax, tmp_path):
    """The noise of a prompt is the same each time, so what changes between two grids is what was learned."""
    validation = ["--validation_steps", "3", "--validation_at_start"]
    run_flax(tmp_path, *EVERY_DRAW, "--learning_rate", "0", *PROMPTS, *TRACKED, *validation)
    one, two, three = (np.asarray(Image.open(tmp_path / "validation" / f"step-00000{step}.png")) for step in (0, 3, 6))
    assert np.array_equal(one[50:], two[50:])  # below the title, which names the step
    assert np.array_equal(one[50:], three[50:])
    assert one.shape[1] > 2 * 256 and one.std() > 10
    assert len(set(logged(tmp_path, "val_loss").values())) == 1
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(next((tmp_path / "logs").rglob("events*")))).Reload()
    assert len(log.Images("validation")) == 3 and log.Images("validation")[0].width == 2 * 16


SECRET = "hf_do_not_leak_me"


def test_upload_takes_the_result_and_nothing_else(run_flax, tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    asked = {}

    class Url(str):
        repo_id = "somebody/digits"

    monkeypatch.setattr(huggingface_hub, "create_repo", lambda name, **options: Url())
    monkeypatch.setattr(huggingface_hub, "upload_folder", lambda **options: asked.update(options))
    run_flax(
        *(tmp_path, *TRACKED, "--push_to_hub", "--hub_token", SECRET, "--checkpointing_steps", "3"),
        *("--compilation_cache_dir", tmp_path / "compiled"),
    )
    files = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()]
    sent = set(filter_repo_objects(files, allow_patterns=asked["allow_patterns"]))
    assert {"README.md", "model_index.json", "unet/diffusion_pytorch_model.safetensors"} <= sent
    assert not [name for name in sent if re.search("checkpoint|logs|events|compiled", name)]
    assert asked["token"] == SECRET
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or SECRET.encode() not in path.read_bytes(), f"the token is in {path}"


def test_weights_and_biases(run_flax, tmp_path, monkeypatch):
    import types

    told = []

    class Run:
        def log(self, values, step):
            told.append((step, values))

        def finish(self):
            told.append("finished")

    wandb = types.SimpleNamespace(
        init=lambda project, config, dir: told.append(config) or Run(), Image=lambda image, caption: caption
    )
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(packages, "is_missing", lambda package: False)
    run_flax(tmp_path, "--report_to", "wandb", "--hub_token", SECRET, *PROMPTS, "--validation_steps", "6")
    assert told[0]["learning_rate"] == 1e-3 and SECRET not in str(told)
    assert [step for step, values in told[1:-1] if "train_loss" in values] == [1, 2, 3, 4, 5, 6]
    assert (6, {"validation": ["a handwritten one", "two"]}) in told and told[-1] == "finished"


WITHOUT_TORCH = """
import sys
import numpy as np
from training_utils.jax_backend.trackers import TensorBoard

tracker = TensorBoard(sys.argv[1], "run", {"seed": 7})
tracker.log({"train_loss": 0.25, "grad_norm": float("nan")}, 3)
tracker.writer.add_images("validation", np.full((2, 4, 6, 3), 200, np.uint8), 3, dataformats="NHWC")
tracker.finish()
assert "torch" not in sys.modules, "it takes seconds to import"
"""


def test_tensorboard_without_torch(tmp_path):
    """Curves, images side by side and the settings, and no word about a NaN, which the run itself reports."""
    words = [sys.executable, "-c", WITHOUT_TORCH, str(tmp_path / "logs")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert logged(tmp_path) == {3: 0.25} and np.isnan(logged(tmp_path, "grad_norm")[3])
    assert json.loads((tmp_path / "logs" / "run" / "settings.json").read_text()) == {"seed": 7}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (image,) = EventAccumulator(str(tmp_path / "logs" / "run")).Reload().Images("validation")
    assert (image.step, image.width, image.height) == (3, 12, 4)
    assert (np.asarray(Image.open(io.BytesIO(image.encoded_image_string))) == 200).all()


@pytest.mark.parametrize(("value", "words"), [(None, "is missing"), ("two", "is 'two', not a whole number")])
def test_hosts_that_are_named_wrongly(monkeypatch, value, words):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
    monkeypatch.setenv("JAX_PROCESS_ID", "0")
    monkeypatch.delenv("JAX_NUM_PROCESSES", raising=False)
    if value is not None:
        monkeypatch.setenv("JAX_NUM_PROCESSES", value)
    with pytest.raises(UserError, match=f"cannot find each other: JAX_NUM_PROCESSES {words}"):
        processes.connect_hosts()


def test_a_bug_of_ours_is_not_called_a_damaged_checkpoint(every_draw, monkeypatch):
    unet, params = models.load_part(every_draw, "unet")
    training = TrainingState(unet, new_arrays(params, optimizers.make_optimizer((0.9, 0.999), 0.01, 1e-8)))

    def broken(*_):
        raise KeyError("a bug")

    monkeypatch.setattr("flax_diffusion.weights.to_params", broken)
    with pytest.raises(KeyError, match="a bug"):
        training.read(every_draw / "checkpoint-5")


BAD_BASES = {
    "nowhere": "neither a folder nor found on the hub",
    "no unet": "has no part 'unet'",
    "sdxl": "is for StableDiffusionXLPipeline",
    "broken": "part 'unet' of base model",
    "no index": "has no model_index.json",
    "no such variant": "has no weights of --variant fp61",
    "x0": "this script trains epsilon and v_prediction",
    "pure noise": "from which epsilon cannot be predicted; add --prediction_type v_prediction",
    "inpainting": "only text-to-image models are supported",
}


@pytest.mark.parametrize("what", BAD_BASES)
def test_a_base_model_that_cannot_be_used(run_flax, tmp_path, sd, what):
    base, flags = tmp_path / "base", []
    if what != "nowhere":
        shutil.copytree(sd, base)
    if what == "no unet":
        shutil.rmtree(base / "unet")
    if what == "broken":
        (base / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"broken")
    if what == "no index":
        (base / "model_index.json").unlink()
    if what == "sdxl":
        index = json.loads((base / "model_index.json").read_text())
        (base / "model_index.json").write_text(json.dumps(index | {"_class_name": "StableDiffusionXLPipeline"}))
    if what == "no such variant":
        flags = ["--variant", "fp61"]
    if what == "x0":
        path = base / "scheduler" / "scheduler_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "sample"}))
    if what == "inpainting":
        UNet2DConditionModel(**UNET | {"in_channels": 9}).save_pretrained(base / "unet")
    if what == "pure noise":  # said before training, and not at the first validation
        flags = ["--rescale_betas_zero_snr", *PROMPTS]
    sentence, code = run_flax.fails(tmp_path / "out", "--pretrained_model_name_or_path", base, *flags)
    assert BAD_BASES[what] in sentence and code == 2


def test_an_image_that_cannot_be_read_is_named_and_what_was_trained_is_kept(run_flax, plain, images, tmp_path):
    shutil.copytree(images, tmp_path / "images")
    path = tmp_path / "images" / f"{draws.order(7, 0, 10)[8]}.png"  # in the third batch of the run
    complete = path.read_bytes()
    for workers in (0, 2):
        path.write_bytes(complete[:200])
        out, flags = tmp_path / str(workers), ["--train_data_dir", tmp_path / "images"]
        flags += ["--dataloader_num_workers", workers]
        sentence, _ = run_flax.fails(out, *flags)
        assert f"{path.name} cannot be read" in sentence
        assert f"what was trained until then is in {out}/checkpoint-2" in sentence
        path.write_bytes(complete)
        run_flax(out, *flags, "--resume_from_checkpoint", "latest")
        assert result_bytes(out) == result_bytes(plain)


def test_memory_that_runs_out_gets_a_sentence(monkeypatch, capsys):
    def main(argv):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes.")

    monkeypatch.setattr(sys, "argv", ["train_text_to_image_flax.py"])
    with pytest.raises(SystemExit) as left:
        exit.run_main(main)
    said = capsys.readouterr().err.strip()
    assert left.value.code == 1 and len(said.splitlines()) == 1 and "--gradient_checkpointing" in said


def test_a_step_is_compiled_once(compiled):
    """Over all runs above: their last steps of an epoch, which have fewer samples, took no second compilation."""
    assert compiled.traced and set(compiled.traced.values()) == {1}


def test_fewer_images_than_a_batch_are_counted_as_what_they_are(run_flax, tmp_path, capsys):
    check_a_run(run_flax, tmp_path / "out", write_images(tmp_path / "two", 2), 4, capsys)
