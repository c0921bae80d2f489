"""The base model is looked through before training: what is missing, incomplete or of another kind is one sentence."""

import json
import re
import shutil
import struct
import time
from pathlib import Path

import pytest
import torch
from broken_models import (
    BROKEN,
    INCOMPLETE,
    add_safety_checker,
    change_weights,
    edit,
    pickle_safety_checker,
    under_module,
)
from diffusers import AutoencoderKL, AutoencoderTiny, LMSDiscreteScheduler, StableDiffusionXLPipeline

import train_text_to_image_sdxl
from training_utils.run import base_model
from training_utils.torch_backend import models


@pytest.fixture
def base(sd, tmp_path):
    return Path(shutil.copytree(sd, tmp_path / "base"))


def refused(run, base, *flags):
    """What a run says of a base model that it refuses."""
    sentence, code = run.fails(base.parent / "out", "--pretrained_model_name_or_path", base, *flags)
    assert code == 2 and "\n" not in sentence
    return sentence


@pytest.mark.parametrize("what", [*BROKEN, *INCOMPLETE])
def test_a_part_that_is_not_what_it_must_be(run_lora, base, what):
    change, words = (BROKEN | INCOMPLETE)[what]
    change(base)
    assert re.search(words, refused(run_lora, base))


@pytest.mark.parametrize(
    ("trained", "part"),
    [
        ("run_sdxl", "text_encoder_2"),
        ("run_lora_sdxl", "text_encoder"),
        ("run_sdxl", "vae"),
        ("run_prior", "image_encoder"),
        ("run_prior", "prior"),
        ("run_lora_prior", "text_encoder"),
        ("run_decoder", "image_encoder"),
        ("run_decoder", "movq"),
        ("run_lora_decoder", "unet"),
    ],
)
def test_each_network_of_each_script_must_be_complete(request, tmp_path, trained, part):
    run = request.getfixturevalue(trained)
    bases = run.base if isinstance(run.base, tuple) else (run.base,)
    names = ["prior_", "decoder_"] if isinstance(run.base, tuple) else [""]
    flags = []
    for name, base in zip(names, bases, strict=True):
        copy = Path(shutil.copytree(base, tmp_path / f"base {name}"))
        flags += [f"--pretrained_{name}model_name_or_path", copy]
        if (copy / part).is_dir():
            under_module(copy, part)
    sentence, code = run.fails(tmp_path / "out", *flags)
    assert f"part '{part}'" in sentence and "with `module.` before their names" in sentence and code == 2


@pytest.mark.parametrize("left_out", [True, False])
def test_only_what_is_needed_of_a_prior_is_looked_at(run_decoder, tmp_path, left_out):
    """A decoder's training takes a prior's image encoder, and its other parts for validation images alone."""
    prior = Path(shutil.copytree(run_decoder.base[0], tmp_path / "prior"))
    shutil.rmtree(prior / "text_encoder")
    flags = ["--pretrained_prior_model_name_or_path", prior, "--max_train_steps", "1"]
    if left_out:
        assert run_decoder(tmp_path / "out", *flags) in (0, None)
    else:
        sentence, _ = run_decoder.fails(tmp_path / "out", *flags, "--validation_prompts", "a one")
        assert "no part 'text_encoder'" in sentence


def test_a_tiny_autoencoder_in_place_of_the_vae(run_lora_sdxl, tmp_path):
    AutoencoderTiny().save_pretrained(tmp_path / "taesd")
    sentence, code = run_lora_sdxl.fails(tmp_path / "out", "--pretrained_vae_model_name_or_path", tmp_path / "taesd")
    assert "is a AutoencoderTiny; this script needs a AutoencoderKL there" in sentence and code == 2


def test_a_base_model_without_a_vae_of_its_own(run_sdxl, tmp_path):
    """Where another is given, it is not needed."""
    base = Path(shutil.copytree(run_sdxl.base, tmp_path / "base"))
    shutil.move(base / "vae", tmp_path / "vae")
    flags = ["--pretrained_model_name_or_path", base, "--pretrained_vae_model_name_or_path", tmp_path / "vae"]
    run_sdxl(tmp_path / "out", *flags, "--max_train_steps", "1")
    assert (tmp_path / "out" / "vae").is_dir()


def test_a_safety_checker_is_saved_with_the_result(run, base):
    add_safety_checker(base)
    out = base.parent / "out"
    run(out, "--pretrained_model_name_or_path", base, "--max_train_steps", "1")
    assert (out / "safety_checker" / "model.safetensors").is_file() and (out / "feature_extractor").is_dir()


SAVED = {
    "no checker": (lambda base: shutil.rmtree(base / "safety_checker"), "'safety_checker' .* is missing"),
    "no image processor": (
        lambda base: shutil.rmtree(base / "feature_extractor"),
        "'feature_extractor' .* is missing",
    ),
    "a pickle": (pickle_safety_checker, "'safety_checker' .* as a pickle only"),
    "settings of the processor": (
        lambda base: (base / "feature_extractor" / "preprocessor_config.json").write_text("{"),
        "preprocessor_config.json cannot be read",
    ),
    "settings of the checker": (
        lambda base: (base / "safety_checker" / "config.json").unlink(),
        "'safety_checker' .* has no settings",
    ),
    "half a checker": (
        lambda base: (base / "safety_checker" / "model.safetensors").write_bytes(b"half"),
        "'safety_checker' .* is damaged or cut off",
    ),
    "an unknown class": (
        lambda base: edit(base / "model_index.json", safety_checker=["stable_diffusion", "TomorrowsChecker"]),
        "is a TomorrowsChecker, which this diffusers does not have",
    ),
    "an unknown library": (
        lambda base: edit(base / "model_index.json", image_encoder=["tomorrow", "Encoder"]),
        "'image_encoder' .* is a Encoder, which this diffusers does not have",
    ),
    "no entry": (lambda base: edit(base / "model_index.json", vae=None), "does not name its part 'vae'"),
}


@pytest.mark.parametrize("what", SAVED)
def test_a_part_that_only_the_result_needs(run, run_lora, base, what):
    """Looked at before training, and not at all where adapters alone are saved."""
    add_safety_checker(base)
    change, words = SAVED[what]
    change(base)
    assert re.search(words, refused(run, base))
    run_lora(base.parent / "lora", "--pretrained_model_name_or_path", base, "--max_train_steps", "1")


def test_a_sampler_whose_package_is_missing(run, base, monkeypatch):
    edit(base / "scheduler" / "scheduler_config.json", _class_name="LMSDiscreteScheduler")
    monkeypatch.setattr(LMSDiscreteScheduler, "_backends", ["torch", "no_such_package"], raising=False)
    assert "is a LMSDiscreteScheduler, which needs: pip install no_such_package" in refused(run, base)


def test_weights_that_settings_leave_out_are_named(run_lora, base, capsys):
    """A text encoder without its last layer is one way to skip it; a complete CLIP holds an image encoder too."""
    edit(base / "text_encoder" / "config.json", num_hidden_layers=1)
    run_lora(base.parent / "out", "--pretrained_model_name_or_path", base, "--max_train_steps", "1")
    assert "part 'text_encoder' of base model" in (said := capsys.readouterr().err)
    assert "has no place for weights of its file, which are left out: 16, such as" in said


def test_older_names_of_weights_are_read(run_lora, base, capsys):
    """The level text_model and the position_ids of older releases of transformers."""

    def older(tensors):
        ids = {"text_model.embeddings.position_ids": torch.arange(16)[None]}
        return ids | {f"text_model.{name.removeprefix('text_model.')}": value for name, value in tensors.items()}

    change_weights(base, "text_encoder", older)
    run_lora(base.parent / "out", "--pretrained_model_name_or_path", base, "--max_train_steps", "1")
    assert "text_encoder" not in capsys.readouterr().err


def test_headers_of_a_model_of_real_size_are_read_and_no_weights(base):
    """Files of 3.4, 0.3 and 0.5 GB, sparse, in well under a second."""
    sizes = {"unet": (686, 5_000_000), "vae": (248, 1_350_000), "text_encoder": (196, 2_500_000)}
    for part, (count, bytes_each) in sizes.items():
        header = {
            f"weight.{index}": {
                "dtype": "F32",
                "shape": [bytes_each // 4],
                "data_offsets": [index * bytes_each, (index + 1) * bytes_each],
            }
            for index in range(count)
        }
        text = json.dumps(header).encode()
        (path,) = (base / part).glob("*.safetensors")
        with open(path, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + count * bytes_each)
    started = time.perf_counter()
    base_model.check_base_model(str(base), base, "StableDiffusionPipeline")
    assert time.perf_counter() - started < 0.5


def test_latents_are_scaled_as_the_pipeline_scales_them(tmp_path, sdxl):
    """A VAE with statistics of each channel: the pipeline draws the image that its latents were made of."""
    torch.manual_seed(0)
    vae = AutoencoderKL.from_pretrained(sdxl, subfolder="vae")
    plain = train_text_to_image_sdxl.encode_images(vae, {"pixels": torch.zeros(1, 3, 16, 16)})
    assert models.latent_statistics(vae) == []
    statistics = {"latents_mean": [0.5, -1.0, 2.0, 0.0], "latents_std": [2.0, 0.5, 1.0, 4.0]}
    vae.register_to_config(**statistics)
    made = train_text_to_image_sdxl.encode_images(vae, {"pixels": torch.zeros(1, 3, 16, 16)})
    assert models.latent_statistics(vae) == list(statistics.values())

    mean, std = (torch.tensor(values, dtype=torch.float64).view(1, 4, 1, 1) for values in statistics.values())
    assert torch.allclose(made["latent_mean"].double(), (plain["latent_mean"].double() - mean) / std, atol=1e-6)
    assert torch.allclose(made["latent_std"].double(), plain["latent_std"].double() / std, rtol=1e-6)

    pipeline = StableDiffusionXLPipeline.from_pretrained(sdxl, vae=vae)
    pipeline.set_progress_bar_config(disable=True)
    latents = made["latent_mean"] * vae.config.scaling_factor
    pipeline.scheduler.step = lambda *_, **__: (latents,)  # it always arrives at these
    drawn = pipeline("a one", num_inference_steps=1, height=16, width=16, output_type="pt").images
    wanted = (vae.decode(plain["latent_mean"]).sample / 2 + 0.5).clamp(0, 1)
    assert torch.allclose(drawn, wanted, atol=1e-4)
