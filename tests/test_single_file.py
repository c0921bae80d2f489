"""A base model in one file, as WebUI keeps it, trains to the same weights as its folder."""

import errno
import json
import os
import re
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from conftest import Runner, result_bytes
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from test_disks import private, refuse_to_rename

from training_utils.base.errors import UserError
from training_utils.run import single_file

UNET = [  # diffusers' names to those of the original, for two blocks of one layer
    ("time_embedding.linear_1", "time_embed.0"),
    ("time_embedding.linear_2", "time_embed.2"),
    ("add_embedding.linear_1", "label_emb.0.0"),
    ("add_embedding.linear_2", "label_emb.0.2"),
    ("conv_in", "input_blocks.0.0"),
    ("conv_norm_out", "out.0"),
    ("conv_out", "out.2"),
    (r"down_blocks.0.downsamplers.0.conv", "input_blocks.2.0.op"),
    (r"down_blocks.0.resnets.0", "input_blocks.1.0"),
    (r"down_blocks.1.resnets.0", "input_blocks.3.0"),
    (r"down_blocks.1.attentions.0", "input_blocks.3.1"),
    ("mid_block.resnets.0", "middle_block.0"),
    ("mid_block.attentions.0", "middle_block.1"),
    ("mid_block.resnets.1", "middle_block.2"),
    ("up_blocks.0.upsamplers.0.conv", "output_blocks.1.2.conv"),
    *((f"up_blocks.{at // 2}.resnets.{at % 2}", f"output_blocks.{at}.0") for at in range(4)),
    *((f"up_blocks.0.attentions.{at}", f"output_blocks.{at}.1") for at in range(2)),
]
RESNET = {
    **{"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3"},
    **{"time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"},
}
VAE = [
    (r"(en|de)coder\.conv_norm_out", r"\1coder.norm_out"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0", "mid.attn_1"),
    (r"down_blocks\.(\d)\.resnets", r"down.\1.block"),
    (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.0", "up.1"),
    (r"up_blocks\.1", "up.0"),
    (r"(up\.\d)\.resnets", r"\1.block"),
    (r"(up\.\d)\.upsamplers\.0", r"\1.upsample"),
    ("conv_shortcut", "nin_shortcut"),
    (r"attn_1\.group_norm", "attn_1.norm"),
    (r"attn_1\.to_out\.0", "attn_1.proj_out"),
    (r"attn_1\.to_([qkv])", r"attn_1.\1"),
]


OPEN_CLIP = {
    "text_model.": "",
    "encoder.layers": "transformer.resblocks",
    "embeddings.token_embedding": "token_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm": "ln_final",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn": "attn",
}


def as_open_clip(encoder):
    """The weights of SDXL's second text encoder as OpenCLIP names them, queries, keys and values in one."""
    weights, fused = {}, {}
    for name, tensor in encoder.items():
        for old, new in OPEN_CLIP.items():
            name = name.replace(old, new)
        part = re.fullmatch(r"(.*attn\.)([qkv])_proj\.(weight|bias)", name)
        if part:
            fused.setdefault(f"{part[1]}in_proj_{part[3]}", {})[part[2]] = tensor
        elif name == "text_projection.weight":
            weights["text_projection"] = tensor.T.contiguous()
        else:
            weights[name] = tensor
    return weights | {name: torch.cat([parts[part] for part in "qkv"]) for name, parts in fused.items()}


def as_one_file(folder, path):
    """The weights of a tiny Stable Diffusion or SDXL folder in one file, under the names of the original."""
    parts = ("unet", "vae", "text_encoder", "text_encoder_2")
    files = {part: next(Path(folder, part).glob("*.safetensors"), None) for part in parts}
    read, weights = {part: load_file(file) for part, file in files.items() if file}, {}
    xl = "text_encoder_2" in read
    if xl:
        second = as_open_clip(read["text_encoder_2"])
        weights |= {f"conditioner.embedders.1.model.{name}": tensor for name, tensor in second.items()}
    for name, tensor in read["unet"].items():
        old, new = next(pair for pair in UNET if name.startswith(pair[0] + "."))
        rest = name.removeprefix(old)
        if "resnets" in old:
            rest = re.sub("|".join(RESNET), lambda found: RESNET[found[0]], rest)
        weights[f"model.diffusion_model.{new}{rest}"] = tensor
    for name, tensor in read["vae"].items():
        for old, new in VAE:
            name = re.sub(old, new, name)
        pointwise = "attn_1" in name and tensor.dim() == 2  # convolutions of 1 x 1 there
        weights[f"first_stage_model.{name}"] = tensor[:, :, None, None].contiguous() if pointwise else tensor
    for name, tensor in read["text_encoder"].items():
        prefix = "conditioner.embedders.0" if xl else "cond_stage_model"
        weights[f"{prefix}.transformer.text_model.{name.removeprefix('text_model.')}"] = tensor
    save_file(weights, path)
    return path


@pytest.fixture(scope="module")
def one_file(sd, tmp_path_factory):
    return as_one_file(sd, tmp_path_factory.mktemp("one") / "model.safetensors")


def test_one_file_trains_as_its_folder(run, sd, one_file, tmp_path, monkeypatch):
    flags = ["--pretrained_model_name_or_path", one_file, "--single_file_config", sd, "--max_train_steps", "2"]
    cache = ["--cache_dir", tmp_path / "cache"]
    run(tmp_path / "folder", "--max_train_steps", "2")
    run(tmp_path / "file", *flags, *cache)
    assert result_bytes(tmp_path / "file") == result_bytes(tmp_path / "folder")
    kept = list((tmp_path / "cache" / "text-to-image-models").iterdir())
    assert len([path for path in kept if path.is_dir()]) == 1
    monkeypatch.setattr(single_file, "_convert", None)  # a second run finds it
    run(tmp_path / "again", *flags, *cache, "--max_train_steps", "1")


def test_what_a_killed_conversion_left_goes(sd, one_file, tmp_path, monkeypatch):
    def killed(path, cls, config, cache_dir, folder, schedule):
        (folder.parent / f"unfinished-{folder.name}-x").mkdir()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(single_file, "_convert", killed)
        single_file.convert_single_file(one_file, StableDiffusionPipeline, sd, tmp_path)
    single_file.convert_single_file(one_file, StableDiffusionPipeline, sd, tmp_path)
    assert not list(tmp_path.rglob("unfinished-*"))


@pytest.mark.parametrize("can_rename", [True, False])
def test_a_conversion_is_complete_or_absent_and_follows_the_umask(sd, one_file, tmp_path, monkeypatch, can_rename):
    """On a disk that does not rename folders too, where a kill may come between two files."""
    before = os.umask(0o022)
    try:
        if not can_rename:
            refuse_to_rename(monkeypatch, errno.ENOSYS)
        with monkeypatch.context() as patch:
            real = os.replace

            def killed(source, target):
                if Path(target).parent.name == "vae":
                    raise KeyboardInterrupt
                real(source, target)

            patch.setattr(os, "replace", killed)
            with nullcontext() if can_rename else pytest.raises(KeyboardInterrupt):
                single_file.convert_single_file(one_file, StableDiffusionPipeline, sd, tmp_path)
        folder = single_file.convert_single_file(one_file, StableDiffusionPipeline, sd, tmp_path)
    finally:
        os.umask(before)
    StableDiffusionPipeline.from_pretrained(folder)
    assert private(folder, 0o022) == [] and not list(tmp_path.rglob("unfinished-*"))


def test_so_does_one_of_sdxl(sdxl, images, tmp_path):
    """Its text encoders have other widths, as the real ones do: by that diffusers tells them apart."""
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(1)
    wide = CLIPTextConfig.from_pretrained(sdxl, subfolder="text_encoder_2", hidden_size=24)
    unet = UNet2DConditionModel.load_config(sdxl, subfolder="unet") | {"cross_attention_dim": 16 + 24}
    folder, cache = tmp_path / "sdxl", ["--cache_dir", tmp_path / "cache"]
    StableDiffusionXLPipeline.from_pretrained(
        sdxl, text_encoder_2=CLIPTextModelWithProjection(wide), unet=UNet2DConditionModel.from_config(unet)
    ).save_pretrained(folder)
    path = as_one_file(folder, tmp_path / "model.safetensors")
    run = Runner("train_text_to_image_lora_sdxl", str(folder), images)
    run(tmp_path / "folder", "--max_train_steps", "2")
    flags = ["--pretrained_model_name_or_path", path, "--single_file_config", folder]
    run(tmp_path / "file", "--max_train_steps", "2", *flags, *cache)
    assert result_bytes(tmp_path / "file") == result_bytes(tmp_path / "folder")


def test_a_vae_of_one_file_or_of_a_full_model(sdxl, images, tmp_path):
    """kohya's --vae is such a file; the other VAE of the three is the base's own."""
    full_model = load_file(as_one_file(sdxl, tmp_path / "model.safetensors"))
    prefix = "first_stage_model."
    vae = {name.removeprefix(prefix): value for name, value in full_model.items() if name.startswith(prefix)}
    save_file(vae, tmp_path / "vae.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "not.safetensors")
    run = Runner("train_text_to_image_sdxl", sdxl, images)
    flag = "--pretrained_vae_model_name_or_path"
    run(tmp_path / "own", "--max_train_steps", "1")
    for name, other in (("file", tmp_path / "vae.safetensors"), ("pipeline", sdxl)):
        run(tmp_path / name, "--max_train_steps", "1", flag, other)
        assert result_bytes(tmp_path / name) == result_bytes(tmp_path / "own")
    sentence, code = run.fails(tmp_path / "none", flag, tmp_path / "not.safetensors")
    assert "not.safetensors cannot be loaded as a 'vae'" in sentence and code == 2


def refused(path, tmp_path, config):
    from diffusers import StableDiffusionPipeline

    with pytest.raises(UserError) as caught:
        single_file.convert_single_file(path, StableDiffusionPipeline, config, tmp_path / "cache")
    assert not [folder for folder in (tmp_path / "cache").glob("*/*") if folder.is_dir()]
    return str(caught.value)


def test_files_that_cannot_be_converted(sd, sdxl, one_file, tmp_path):
    """... leave nothing behind, and no part is taken from the folder of the settings."""
    settings_are_fetched = refused(one_file, tmp_path, None)  # without a network
    assert "--single_file_config can name a folder" in settings_are_fetched
    (tmp_path / "model.ckpt").write_bytes(b"x")
    assert "others are pickles, which could run code" in refused(tmp_path / "model.ckpt", tmp_path, sd)
    (tmp_path / "bad.safetensors").write_bytes(b"x")
    assert "bad.safetensors cannot be read" in refused(tmp_path / "bad.safetensors", tmp_path, sd)
    without = {name: tensor for name, tensor in load_file(one_file).items() if "cond_stage" not in name}
    save_file(without, tmp_path / "without.safetensors")
    assert "without.safetensors cannot be converted" in refused(tmp_path / "without.safetensors", tmp_path, sd)


def test_the_precision_of_the_file_is_kept(sd, one_file, tmp_path):
    from diffusers import StableDiffusionPipeline

    half = {name: tensor.to(torch.float16) for name, tensor in load_file(one_file).items()}
    save_file(half, tmp_path / "half.safetensors")
    folder = single_file.convert_single_file(
        tmp_path / "half.safetensors", StableDiffusionPipeline, sd, tmp_path / "cache"
    )
    stored = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}


def add_keys(one_file, path, *names, metadata=None):
    """A copy of a file with some keys that hold no weights, in float16 otherwise."""
    weights = {name: tensor.half() for name, tensor in load_file(one_file).items()}
    save_file(weights | {name: torch.tensor([]) for name in names}, path, metadata)
    return path


def schedule_of(folder):
    return json.loads((folder / "scheduler" / "scheduler_config.json").read_text())


@pytest.mark.parametrize(
    ("names", "metadata", "zero_snr"),
    [
        (["v_pred"], None, False),
        (["v_pred", "ztsnr"], None, True),
        ([], {"modelspec.prediction_type": "v"}, False),
        (["ztsnr"], {"modelspec.prediction_type": "v"}, True),
    ],
)
def test_a_file_that_says_that_it_predicts_v(sd, one_file, tmp_path, names, metadata, zero_snr):
    """NoobAI's files say so by keys, others by metadata; an empty float32 key does not make them twice as large."""
    path = add_keys(one_file, tmp_path / "v.safetensors", *names, metadata=metadata)
    folder = single_file.convert_single_file(str(path), StableDiffusionPipeline, sd, tmp_path)
    config = schedule_of(folder)
    assert config["prediction_type"] == "v_prediction"
    assert config.get("rescale_betas_zero_snr", False) is zero_snr
    assert (config.get("timestep_spacing") == "trailing") is zero_snr
    # PNDM, which this base samples with, cannot start from pure noise.
    assert config["_class_name"] == ("DDIMScheduler" if zero_snr else "PNDMScheduler")
    assert {tensor.dtype for tensor in load_file(next(folder.glob("unet/*.safetensors"))).values()} == {torch.float16}
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pipeline("a one", num_inference_steps=5, height=16, width=16)


def test_a_file_that_says_nothing_keeps_its_schedule_and_its_folder(sd, one_file, tmp_path):
    """Caches and checkpoints of earlier runs belong to that folder."""
    folder = single_file.convert_single_file(str(one_file), StableDiffusionPipeline, sd, tmp_path)
    assert schedule_of(folder)["prediction_type"] == "epsilon"
    save_file(load_file(one_file), tmp_path / "e.safetensors", {"modelspec.prediction_type": "epsilon"})
    told = single_file.convert_single_file(str(tmp_path / "e.safetensors"), StableDiffusionPipeline, sd, tmp_path)
    assert schedule_of(told) == schedule_of(folder)


@pytest.mark.parametrize("name", ["edm_mean", "edm_vpred.sigma_max"])
def test_a_file_of_another_formulation_is_refused(run_lora, sd, one_file, tmp_path, name):
    path = add_keys(one_file, tmp_path / "edm.safetensors", name)
    flags = ["--pretrained_model_name_or_path", path, "--single_file_config", sd]
    sentence, code = run_lora.fails(tmp_path / "out", *flags, "--cache_dir", tmp_path)
    assert f"has the key {name}" in sentence and "EDM" in sentence and code == 2


def test_v_prediction_is_trained_and_drawn(run_lora, sd, one_file, tmp_path):
    """As from a folder whose scheduler predicts v."""
    path = add_keys(one_file, tmp_path / "v.safetensors", "v_pred")
    folder = Path(shutil.copytree(sd, tmp_path / "folder"))
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"prediction_type": "v_prediction"}))
    for part in ("unet", "vae", "text_encoder"):
        (file,) = (folder / part).glob("*.safetensors")
        save_file({name: tensor.half() for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    shared = ["--max_train_steps", "2"]
    run_lora(tmp_path / "a", *shared, "--pretrained_model_name_or_path", folder)
    cache = ["--cache_dir", tmp_path / "cache"]
    run_lora(tmp_path / "b", *shared, "--pretrained_model_name_or_path", path, "--single_file_config", sd, *cache)
    assert result_bytes(tmp_path / "a") == result_bytes(tmp_path / "b")
