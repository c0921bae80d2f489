"""What a run leaves behind: a pipeline that draws, grids to look at, curves, a card, an upload without secrets."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import logged, result_bytes, result_weights
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file

from training_utils.run import exit
from training_utils.run.hub.card import loading_call

TRACKED = ["--report_to", "tensorboard"]
PROMPTS = [
    "--validation_prompts",
    "a handwritten one",
    "a [link](x) | `code` <b>",
    "--validation_num_inference_steps",
    "2",
]


def drawn(folder, **options):
    pipeline = StableDiffusionPipeline.from_pretrained(folder, use_safetensors=True, **options)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(0)
    return pipeline("a handwritten one", num_inference_steps=2, generator=noise, output_type="np").images[0]


def test_result_loads_and_draws_something_else_than_the_base(run, tmp_path, sd):
    run(tmp_path)
    image = drawn(tmp_path)
    assert image.shape == (16, 16, 3) and np.isfinite(image).all()
    assert np.abs(image - drawn(sd)).max() > 1e-3


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_frozen_parts_keep_their_precision(run, tmp_path, sd, precision):
    """A base whose VAE is float16 and text encoder float32 comes out with just that, whatever it was computed in."""
    base = tmp_path / "base"
    pipeline = StableDiffusionPipeline.from_pretrained(sd)
    pipeline.vae.half()
    pipeline.save_pretrained(base)
    run(tmp_path / "out", "--pretrained_model_name_or_path", base, "--mixed_precision", precision)
    for part, name in (("vae", "diffusion_pytorch_model"), ("text_encoder", "model")):
        before, after = (load_file(folder / part / f"{name}.safetensors") for folder in (base, tmp_path / "out"))
        after = {name.removeprefix("text_model."): tensor for name, tensor in after.items()}
        assert {k: v.dtype for k, v in before.items()} == {k: v.dtype for k, v in after.items()}
        assert all(torch.equal(before[key], after[key]) for key in before)
    assert (
        load_file(tmp_path / "out/unet/diffusion_pytorch_model.safetensors")["conv_in.weight"].dtype == torch.float32
    )


@pytest.mark.parametrize("trained", ["run", "run_sdxl", "run_prior", "run_decoder"])
def test_earlier_releases_read_the_result_and_it_names_no_path(trained, request, tmp_path):
    """They want a tokenizer's vocab.json and merges.txt, and the level text_model in a text encoder's names."""
    trained = request.getfixturevalue(trained)
    trained(tmp_path)
    tokenizers = sorted(tmp_path.glob("tokenizer*"))
    assert len(tokenizers) == {"sdxl": 2, "decoder": 0}.get(trained.script.split("_")[-1], 1)
    for folder in tokenizers:
        model = json.loads((folder / "tokenizer.json").read_text())["model"]
        assert json.loads((folder / "vocab.json").read_text()) == model["vocab"]
        merges = [line.split() for line in (folder / "merges.txt").read_text().splitlines() if line[0] != "#"]
        assert merges == [merge.split() if isinstance(merge, str) else merge for merge in model["merges"]]
    for path in tmp_path.glob("text_encoder*/model.safetensors"):
        assert all(name.startswith(("text_model.", "text_projection.")) for name in load_file(path))
    index = json.loads((tmp_path / "model_index.json").read_text())
    DiffusionPipeline.from_pretrained(tmp_path, use_safetensors=True)
    assert index["_class_name"]
    base = trained.base if isinstance(trained.base, tuple) else [trained.base]
    for path in (tmp_path / "model_index.json", *tmp_path.glob("*/*.json")):
        assert "_name_or_path" not in path.read_text() and not any(str(folder) in path.read_text() for folder in base)


def test_a_variant_is_read(run, tmp_path, sd):
    StableDiffusionPipeline.from_pretrained(sd).save_pretrained(tmp_path / "base", variant="fp16")
    run(tmp_path / "variant", "--pretrained_model_name_or_path", tmp_path / "base", "--variant", "fp16")
    run(tmp_path / "plain")
    assert result_bytes(tmp_path / "variant") == result_bytes(tmp_path / "plain")
    assert drawn(tmp_path / "variant").shape == (16, 16, 3)


def test_grids(run, tmp_path):
    run(tmp_path, *PROMPTS, "--validation_steps", "2", "--report_to", "tensorboard")
    grids = sorted(path.name for path in (tmp_path / "validation").iterdir())
    assert grids == ["step-000002.png", "step-000004.png", "step-000006.png"]
    sheets = [np.asarray(Image.open(tmp_path / "validation" / name)) for name in grids]
    assert sheets[0].shape[1] > 2 * 256 and sheets[0].std() > 10
    assert (sheets[0] != sheets[2]).any()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = 0
    for events in (tmp_path / "logs").rglob("events*"):
        log = EventAccumulator(str(events)).Reload()
        shown += sum(len(log.Images(tag)) for tag in log.Tags()["images"])
    assert shown == 3  # TensorBoard lays the images of one step side by side


def test_grids_of_the_same_weights_are_equal(run, tmp_path):
    """The noise of a prompt is the same each time, so what changes between two grids is what was learned."""
    flags = [*PROMPTS, "--learning_rate", "0", "--adam_weight_decay", "0", "--validation_steps", "3"]
    run(tmp_path, *flags)
    one, two = (np.asarray(Image.open(tmp_path / "validation" / f"step-00000{step}.png")) for step in (3, 6))
    assert np.array_equal(one[50:], two[50:])  # below the title, which names the step


def test_validation_by_epochs_and_never(run, tmp_path):
    run(tmp_path / "epochs", *PROMPTS, "--validation_epochs", "1", "--max_train_steps", "7")
    names = sorted(path.name for path in (tmp_path / "epochs" / "validation").iterdir())
    assert names == ["step-000003.png", "step-000006.png", "step-000007.png"]
    run(tmp_path / "never", *PROMPTS, "--validation_epochs", "0")
    assert not (tmp_path / "never" / "validation").exists()


def test_validation_loss_is_the_same_for_the_same_weights(run, tmp_path):
    flags = ["--validation_split", "0.3", "--validation_steps", "1", "--report_to", "tensorboard"]
    frozen = ["--learning_rate", "0", "--adam_weight_decay", "0", "--random_flip", "--caption_dropout", "0.5"]
    run(tmp_path / "still", *flags, *frozen)
    values = set(logged(tmp_path / "still", "val_loss").values())
    assert len(values) == 1
    run(tmp_path / "other batch", *flags, *frozen, "--train_batch_size", "1")
    assert logged(tmp_path / "other batch", "val_loss")[1] == pytest.approx(values.pop(), rel=1e-5)
    run(tmp_path / "learning", *flags, "--max_train_steps", "40")
    learned = logged(tmp_path / "learning", "val_loss")
    assert learned[40] < learned[1]


def test_every_step_is_logged(run, tmp_path):
    run(tmp_path, "--report_to", "tensorboard", "--max_train_steps", "23", "--logging_steps", "10")
    for name in ("train_loss", "lr", "grad_norm", "samples_per_second", "memory_resident_gib"):
        assert list(logged(tmp_path, name)) == list(range(1, 24)), name


def test_of_two_stored_copies_the_one_that_is_read_counts(run, tmp_path, sd):
    """A folder often holds fp16 copies beside the full ones; the result has the precision of those that were read."""
    base = tmp_path / "base"
    pipeline = StableDiffusionPipeline.from_pretrained(sd)
    pipeline.save_pretrained(base)
    pipeline.to(torch.float16).save_pretrained(base, variant="fp16")
    for name, flags, expected in (("plain", [], torch.float32), ("half", ["--variant", "fp16"], torch.float16)):
        run(tmp_path / name, "--pretrained_model_name_or_path", base, *flags)
        weights = load_file(tmp_path / name / "vae" / "diffusion_pytorch_model.safetensors")
        assert {weight.dtype for weight in weights.values()} == {expected}


def test_a_variant_of_the_unet_alone(run, tmp_path, sd):
    """Stable Diffusion 1.5 keeps the weights before averaging as variant `non_ema` of its UNet and of nothing else."""
    base = tmp_path / "base"
    pipeline = StableDiffusionPipeline.from_pretrained(sd)
    pipeline.save_pretrained(base)
    torch.nn.init.zeros_(pipeline.unet.conv_out.weight)
    pipeline.unet.save_pretrained(base / "unet", variant="non_ema")
    run(tmp_path / "out", "--pretrained_model_name_or_path", base, "--variant", "non_ema", "--learning_rate", "0")
    assert not result_weights(tmp_path / "out")["conv_out.weight"].any()


SECRET = "hf_do_not_leak_me"


@pytest.fixture
def hub(monkeypatch):
    """Stands in for the hub's client at its own interface; keeps what it was asked."""
    import huggingface_hub

    asked = {}

    class Url(str):
        repo_id = "somebody/digits"

    monkeypatch.setattr(
        huggingface_hub, "create_repo", lambda name, **options: asked.update(name=name, create=options) or Url()
    )
    monkeypatch.setattr(huggingface_hub, "upload_folder", lambda **options: asked.update(upload=options))
    return asked


def test_upload_takes_the_result_and_nothing_else(run, tmp_path, hub):
    from huggingface_hub.utils import filter_repo_objects

    flags = ["--push_to_hub", "--hub_token", SECRET, "--hub_model_id", "digits", "--report_to", "tensorboard"]
    run(tmp_path, *flags, *PROMPTS, "--validation_steps", "6", "--checkpointing_steps", "3", "--use_ema")
    assert hub["name"] == "digits" and hub["create"]["token"] == SECRET
    assert hub["upload"]["repo_id"] == "somebody/digits" and hub["upload"]["token"] == SECRET
    files = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()]
    sent = set(filter_repo_objects(files, allow_patterns=hub["upload"]["allow_patterns"]))
    assert {"README.md", "model_index.json", "unet/diffusion_pytorch_model.safetensors"} <= sent
    assert "validation/step-000006.png" in sent
    assert not [name for name in sent if "checkpoint" in name or "logs" in name or "events" in name]
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or SECRET.encode() not in path.read_bytes(), f"the token is in {path}"


def test_trackers_do_not_see_the_token(run, tmp_path, monkeypatch):
    """wandb records sys.argv of the process; it must hold no secret while the script runs."""
    import sys

    monkeypatch.setattr(sys, "argv", ["script.py", *run.argv(tmp_path, "--hub_token", SECRET, "--push_to_hub")])
    seen = {}

    def main(argv):
        seen.update(argv=argv, recorded=list(sys.argv))

    with pytest.raises(SystemExit):
        exit.run_main(main)
    assert SECRET in seen["argv"] and SECRET not in " ".join(seen["recorded"])


def test_a_failed_upload_keeps_the_result_and_says_how_to_repeat_it(run, tmp_path, hub, monkeypatch):
    import huggingface_hub

    def refuse(**_):
        raise OSError("connection reset")

    monkeypatch.setattr(huggingface_hub, "upload_folder", refuse)
    sentence, code = run.fails(tmp_path, "--push_to_hub", "--hub_token", SECRET)
    assert code == 1 and "connection reset" in sentence and "hf upload somebody/digits" in sentence
    assert SECRET not in sentence
    assert drawn(tmp_path).shape == (16, 16, 3)


def test_a_wrong_token_is_found_before_training(run, tmp_path, monkeypatch):
    import huggingface_hub

    def refuse(*_, **__):
        raise OSError("401 Unauthorized")

    monkeypatch.setattr(huggingface_hub, "create_repo", refuse)
    sentence, code = run.fails(tmp_path, "--push_to_hub")
    assert code == 2 and "401 Unauthorized" in sentence
    assert not (tmp_path / "model_index.json").exists()


def test_model_card(run, tmp_path):
    from huggingface_hub import ModelCard

    run(tmp_path / "my model", *PROMPTS, "--validation_steps", "6", "--snr_gamma", "5")
    card = ModelCard.load(tmp_path / "my model" / "README.md")
    assert card.data.library_name == "diffusers" and "stable-diffusion" in card.data.tags
    assert card.data.license is None, "the licence is the base model's, which a local folder does not state"
    assert "validation/step-000006.png" in card.text
    assert "a \\[link\\]\\(x\\) \\| \\`code\\` &lt;b&gt;" in card.text, "a prompt must not break out of the card"
    assert "| snr\\_gamma | 5.0 |" in card.text
    assert str(tmp_path) not in card.text.replace(f'from_pretrained("{tmp_path / "my model"}"', "")


BAD_BASES = {
    "no weights": "has no weights; ",
    "no settings": "has no settings, config.json; ",
    "nowhere": "neither a folder nor found on the hub: there is nothing at this path",
    "no unet": "has no part 'unet'",
    "sdxl": "StableDiffusionPipeline models; train_text_to_image_sdxl.py, or its twin for LoRA, trains those",
    "broken": "part 'unet' of base model",
    "no index": "has no model_index.json",
    "no such variant": "has no weights of --variant fp61",
    "half an index": "model_index.json cannot be read",
    "an index of something else": "it holds no JSON object",
}


@pytest.mark.parametrize("what", BAD_BASES)
def test_a_base_model_that_cannot_be_used(run, tmp_path, sd, what):
    base = tmp_path / "base"
    if what != "nowhere":
        shutil.copytree(sd, base)
    if what == "no unet":
        shutil.rmtree(base / "unet")
    if what == "no weights":
        (base / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    if what == "no settings":
        (base / "unet" / "config.json").unlink()
    if what == "broken":
        (base / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"broken")
    if what == "no index":
        (base / "model_index.json").unlink()
    if what == "half an index":
        (base / "model_index.json").write_text('{"_class_name"')
    if what == "an index of something else":
        (base / "model_index.json").write_text("[]")
    if what == "sdxl":
        index = json.loads((base / "model_index.json").read_text())
        (base / "model_index.json").write_text(json.dumps(index | {"_class_name": "StableDiffusionXLPipeline"}))
    flags = ["--variant", "fp61"] if what == "no such variant" else []
    sentence, code = run.fails(tmp_path / "out", "--pretrained_model_name_or_path", base, *flags)
    assert BAD_BASES[what] in sentence and code == 2


@pytest.mark.parametrize("what", ["garbage", "empty", "cut off"])
@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_a_part_whose_weights_are_damaged(run, tmp_path, sd, part, what):
    """Of diffusers' and of transformers' own errors."""
    base = tmp_path / "base"
    shutil.copytree(sd, base)
    (weights,) = (base / part).glob("*.safetensors")
    content = weights.read_bytes()
    weights.write_bytes({"garbage": b"garbage" * 9, "empty": b"", "cut off": content[: len(content) // 2]}[what])
    sentence, code = run.fails(tmp_path / "out", "--pretrained_model_name_or_path", base)
    assert f"part '{part}' of base model {base} cannot be loaded: {weights.name} is damaged or cut off" in sentence
    assert code == 2


def test_a_sampler_that_diffusers_does_not_have(run, tmp_path, sd):
    base = tmp_path / "base"
    shutil.copytree(sd, base)
    path = base / "scheduler" / "scheduler_config.json"
    path.write_text(path.read_text().replace("PNDMScheduler", "TomorrowScheduler"))
    sentence, code = run.fails(tmp_path / "out", "--pretrained_model_name_or_path", base)
    assert "is a TomorrowScheduler, which this diffusers does not have" in sentence and code == 2


@pytest.mark.parametrize("sampler", ["EDMEulerScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_a_base_model_without_a_schedule_of_betas(run_sdxl, tmp_path, sampler):
    base = tmp_path / "base"
    shutil.copytree(run_sdxl.base, base)
    path = base / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({"_class_name": sampler, "num_train_timesteps": 1000}))
    sentence, code = run_sdxl.fails(tmp_path / "out", "--pretrained_model_name_or_path", base)
    assert f"is a {sampler}, which has no schedule of betas" in sentence and code == 2


@pytest.mark.parametrize("trained", ["run", "run_lora", "run_sdxl", "run_lora_sdxl"])
def test_a_base_model_for_another_task(trained, request, tmp_path):
    """An inpainting UNet takes the mask and the masked image as well."""
    trained = request.getfixturevalue(trained)
    base = tmp_path / "base"
    shutil.copytree(trained.base, base)
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    UNet2DConditionModel.from_config(dict(unet.config) | {"in_channels": 9}).save_pretrained(base / "unet")
    sentence, code = trained.fails(tmp_path / "out", "--pretrained_model_name_or_path", base)
    assert "takes 9 channels, and its latents have 4" in sentence and code == 2


def test_validation_before_the_first_step_shows_the_base_model(run, tmp_path):
    flags = [*PROMPTS, "--validation_split", "0.2", "--validation_at_start", "--validation_steps", "3", *TRACKED]
    run(tmp_path / "out", *flags, "--checkpointing_steps", "3")
    assert sorted(logged(tmp_path / "out", "val_loss")) == [0, 3, 6]
    grids = sorted(path.name for path in (tmp_path / "out" / "validation").iterdir())
    assert grids == [f"step-{step:06d}.png" for step in (0, 3, 6)]
    run(tmp_path / "still", *flags, "--learning_rate", "0", "--max_train_steps", "3")
    still = [(tmp_path / "still" / "validation" / f"step-{step:06d}.png") for step in (0, 3)]
    grids_shown = [np.asarray(Image.open(path))[60:] for path in still]  # below the title
    assert (
        np.array_equal(*grids_shown)
        and logged(tmp_path / "still", "val_loss")[0] == logged(tmp_path / "out", "val_loss")[0]
    )
    shutil.rmtree(tmp_path / "out" / "validation")
    run(tmp_path / "out", *flags, "--resume_from_checkpoint", "checkpoint-3")
    assert [path.name for path in (tmp_path / "out" / "validation").iterdir()] == ["step-000006.png"]


def test_a_finished_run_that_is_continued_keeps_the_images_of_its_card(run, tmp_path):
    flags = [*PROMPTS, "--validation_steps", "6", "--checkpointing_steps", "6"]
    run(tmp_path, *flags)
    card = (tmp_path / "README.md").read_text()
    run(tmp_path, *flags, "--resume_from_checkpoint", "latest")
    assert "validation/step-000006.png" in card and (tmp_path / "README.md").read_text() == card


def test_how_a_base_model_is_loaded(tmp_path):
    """As Python text: from a folder with a variant or without, from a file, from the hub."""
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "model.fp16.safetensors").touch()
    (tmp_path / "one.safetensors").touch()
    folder, file = str(tmp_path), str(tmp_path / "one.safetensors")
    given = ("main", "fp16", "sdxl")
    assert loading_call(folder, *given) == f'from_pretrained("{folder}", variant="fp16")'
    assert loading_call(folder, "main", "bf16", public=True) == f'from_pretrained("{tmp_path.name}")'
    assert loading_call(file, *given) == f'from_single_file("{file}", config="sdxl")'
    assert loading_call(file, public=True) == 'from_single_file("one.safetensors")'
    assert loading_call("me/model") == 'from_pretrained("me/model")'
    assert loading_call("me/model", *given) == 'from_pretrained("me/model", revision="main", variant="fp16")'


def test_preview_leaves_the_training_copies_alone(run, tmp_path):
    """Previews use the parts that train, not second copies from the disk; the VAE stays where and what it was."""
    loads = []
    real = AutoencoderKL.from_pretrained.__func__

    def counted(cls, *args, **options):
        loads.append(args)
        return real(cls, *args, **options)

    original = AutoencoderKL.from_pretrained
    AutoencoderKL.from_pretrained = classmethod(counted)
    try:
        run(tmp_path, *PROMPTS, "--validation_steps", "2")
    finally:
        AutoencoderKL.from_pretrained = original
    assert len(loads) == 2  # once to train, once to be saved as it was
