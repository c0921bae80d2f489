"""Adapters: what is trained is what is saved, in each layout; the base stays as it was; nothing is left in half."""

import copy
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import logged, result_weights
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from peft.tuners.lora.layer import LoraLayer
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from training_utils.torch_backend import lora, optimizers

LARGE = ["--learning_rate", "5e-2", "--adam_weight_decay", "0"]  # so that the adapters show in an image
WITH_TEXT = ["--train_text_encoder"]


@pytest.fixture(params=["run_lora", "run_lora_sdxl"])
def either(request):
    """The runner of each LoRA script."""
    return request.getfixturevalue(request.param)


def pipeline_of(run, **options):
    cls = StableDiffusionXLPipeline if "xl" in run.script else StableDiffusionPipeline
    pipeline = cls.from_pretrained(run.base, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline):
    noise = torch.Generator().manual_seed(0)
    shape = dict(height=16, width=16, num_inference_steps=2, guidance_scale=3.0)
    return pipeline("a handwritten one", generator=noise, output_type="np", **shape).images[0]


FORMS = {
    "plain": [],
    "alpha": ["--lora_alpha", "16", "--rank", "2"],
    "text": [*WITH_TEXT, "--lora_alpha", "2"],
    "DoRA": ["--use_dora", *WITH_TEXT],
}


@pytest.mark.parametrize("form", FORMS)
def test_what_was_trained_is_what_loads(either, tmp_path, monkeypatch, form):
    """The loaded pipeline draws the very image that the networks draw which were just trained, in both layouts."""
    import importlib

    script = importlib.import_module(either.script)
    trained = {}
    real = script.save_result
    monkeypatch.setattr(
        script, "save_result", lambda args, adapted, sampler: (trained.update(adapted), real(args, adapted, sampler))
    )
    kohya = [] if form == "DoRA" else ["--save_kohya_format"]  # which has no place for what DoRA learns
    either(tmp_path, *LARGE, *FORMS[form], *kohya)
    own = pipeline_of(either)
    before = draw(own)
    for name, model in trained.items():
        setattr(own, name, model.eval())
    after = draw(own)
    assert np.abs(after - before).max() > 0.01

    loaded = pipeline_of(either)
    loaded.load_lora_weights(str(tmp_path))
    np.testing.assert_allclose(draw(loaded), after, atol=2e-4)
    if kohya:
        kohya = pipeline_of(either)
        kohya.load_lora_weights(str(tmp_path), weight_name="pytorch_lora_weights_kohya.safetensors")
        np.testing.assert_allclose(draw(kohya), after, atol=2e-4)


def test_kohya_layout_is_the_one_that_webui_reads(run_lora, run_lora_sdxl, tmp_path, monkeypatch):
    monkeypatch.setattr(lora, "KOHYA_BASE_VERSIONS", {16: "tiny", 32: "tiny"})
    flags = [*WITH_TEXT, "--save_kohya_format", "--rank", "2", "--lora_alpha", "6"]
    run_lora(tmp_path / "sd", *flags)
    run_lora_sdxl(tmp_path / "xl", *flags)
    expected = {
        "sd": ["lora_te_text_model_encoder_layers_0_self_attn_q_proj"],
        "xl": [f"lora_te{i}_text_model_encoder_layers_0_self_attn_q_proj" for i in (1, 2)],
    }
    for name, text in expected.items():
        state = load_file(tmp_path / name / "pytorch_lora_weights_kohya.safetensors")
        for layer in ["lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0", *text]:
            assert state[f"{layer}.lora_down.weight"].shape[0] == state[f"{layer}.lora_up.weight"].shape[1] == 2
            assert state[f"{layer}.alpha"] == 6
        assert {key.split("_", 2)[1] for key in state} <= {"unet", "te", "te1", "te2"}
        with safe_open(tmp_path / name / "pytorch_lora_weights_kohya.safetensors", "pt") as file:
            metadata = {"ss_network_module": "networks.lora", "ss_network_dim": "2", "ss_network_alpha": "6.0"}
            assert file.metadata() == {"format": "pt", "ss_base_model_version": "tiny", "ss_v2": "False"} | metadata


BASES = {
    768: {"ss_base_model_version": "sd_v1", "ss_v2": "False"},
    1024: {"ss_base_model_version": "sd_v2", "ss_v2": "True"},
    2048: {"ss_base_model_version": "sdxl_base_v1-0", "ss_v2": "False"},
    16: {},
}


@pytest.mark.parametrize("width", BASES)
def test_kohyas_file_says_which_model_it_is_for(width, tmp_path):
    """WebUI lists a file with models of SD 2 where ss_v2 is True, and with those of SDXL by the version."""
    unet = UNet2DConditionModel(
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=width,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        attention_head_dim=2,
    )
    lora.add_adapter(unet, lora.UNET_LAYERS, 2)
    lora.save_kohya(tmp_path, {"unet": unet})
    with safe_open(tmp_path / lora.KOHYA_FILE, "pt") as file:
        facts = file.metadata()
    assert {name: facts[name] for name in ("ss_base_model_version", "ss_v2") if name in facts} == BASES[width]


def test_adapters_beside_their_base_leave_it_as_it_was(run_lora, tmp_path):
    shutil.copytree(run_lora.base, tmp_path, dirs_exist_ok=True)
    (tmp_path / "README.md").write_text("of the base")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    beside = ["--pretrained_model_name_or_path", tmp_path]
    with pytest.raises(SystemExit):
        run_lora(tmp_path, *beside, "--prediction_type", "v_prediction")
    run_lora(tmp_path, *beside)
    assert (tmp_path / lora.ADAPTER_FILE).exists() and all(
        path.read_bytes() == content for path, content in before.items()
    )


def test_what_an_earlier_run_left_beside_the_adapters_goes(run_lora, tmp_path):
    run_lora(tmp_path, "--save_kohya_format", "--prediction_type", "v_prediction")
    assert {"scheduler", lora.KOHYA_FILE} <= {path.name for path in tmp_path.iterdir()}
    run_lora(tmp_path)
    assert not {"scheduler", lora.KOHYA_FILE} & {path.name for path in tmp_path.iterdir()}


def test_adafactor_moves_adapters_as_far_as_adamw_does(run_lora, tmp_path):
    """With a rate in proportion to the weights it would be by a thousandth, since they begin at zero."""
    moved = {}
    for optimizer in ("adamw", "adafactor"):
        run_lora(tmp_path / optimizer, "--learning_rate", "1e-4", "--optimizer", optimizer)
        weights = load_file(tmp_path / optimizer / "pytorch_lora_weights.safetensors")
        moved[optimizer] = max(weight.abs().max().item() for name, weight in weights.items() if ".lora_B." in name)
    assert 0.25 < moved["adafactor"] / moved["adamw"] < 4


def test_layout_and_metadata(either, tmp_path):
    either(tmp_path, *WITH_TEXT, "--lora_alpha", "8", "--lora_dropout", "0.1")
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", "pt") as file:
        facts, names = json.loads(file.metadata()["lora_adapter_metadata"]), list(file.keys())
        assert {file.get_tensor(name).dtype for name in names} == {torch.float32}
    assert facts["unet.r"] == 4 and facts["unet.lora_alpha"] == 8 and facts["text_encoder.lora_alpha"] == 8
    assert str(either.base) not in json.dumps(facts), "a path of this machine"
    assert facts["unet.target_modules"] == ["to_k", "to_out.0", "to_q", "to_v"]
    text = {name.split(".")[0] for name in names} - {"unet"}
    assert text == ({"text_encoder", "text_encoder_2"} if "xl" in either.script else {"text_encoder"})
    for part in text:  # the names that every version of the libraries reads
        assert any(name.startswith(f"{part}.text_model.encoder.layers.0.self_attn.q_proj.lora_A") for name in names)


@pytest.mark.parametrize("alpha", [4, 6])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("precision", ["float64", "float32", "autocast", "half base"])
def test_our_forward_is_that_of_peft(run_lora, alpha, dropout, precision):
    """Output and gradients, as closely as the precision rounds."""
    unet = UNet2DConditionModel.from_pretrained(run_lora.base, subfolder="unet")
    if precision == "half base":
        unet.bfloat16()
    lora.add_adapter(unet, lora.UNET_LAYERS, 4, alpha, dropout)
    draw = torch.Generator().manual_seed(0)
    for parameter in lora.trainable_parameters([unet]):
        parameter.data = 0.05 * torch.randn(parameter.shape, generator=draw)
    latents, text = torch.randn(2, 4, 8, 8, generator=draw), torch.randn(2, 77, 16, generator=draw)
    if precision == "float64":
        unet, latents, text = unet.double(), latents.double(), text.double()
    original = copy.deepcopy(unet)
    layers = [module for module in original.modules() if isinstance(module, LoraLayer)]
    assert layers and all(layer.lora_variant for layer in layers)
    for layer in layers:
        layer.lora_variant.clear()
        layer.cast_input_dtype_enabled = True
    if precision == "half base":
        latents, text = latents.bfloat16(), text.bfloat16()
    found = {}
    for name, network in {"ours": unet.train(), "PEFT's": original.train()}.items():
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            output = network(latents, torch.tensor([3, 800]), text).sample
        assert output.dtype == latents.dtype or precision == "autocast" and output.dtype == torch.bfloat16
        output.double().square().sum().backward()
        found[name] = [output, *(parameter.grad for parameter in lora.trainable_parameters([network]))]
    assert all(gradient.abs().max() > 0 for gradient in found["ours"])
    ours, theirs = (torch.cat([tensor.detach().double().flatten() for tensor in all]) for all in found.values())
    allowed = {"float64": 1e-13, "float32": 1e-5}.get(precision, 0.03)
    assert (ours - theirs).norm() < allowed * theirs.norm()


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_adapters_learn_in_float32_and_the_base_stays(either, tmp_path, monkeypatch, precision):
    """In bf16 a step of 1e-5 to a weight of 0.25 would be rounded away."""

    seen = {}
    real = optimizers.make_optimizer

    def spy(parameters, *words, **options):
        seen["types"] = {parameter.dtype for parameter in parameters}
        return real(parameters, *words, **options)

    monkeypatch.setattr(optimizers, "make_optimizer", spy)
    flags = ["--mixed_precision", precision, *WITH_TEXT, "--learning_rate", "1e-6", "--adam_weight_decay", "0"]
    either(tmp_path, *flags, "--checkpointing_steps", "1", "--max_train_steps", "2")
    assert seen["types"] == {torch.float32}
    one, two = (load_file(tmp_path / f"checkpoint-{step}/pytorch_lora_weights.safetensors") for step in (1, 2))
    moved = (one["unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_q.lora_A.weight"]
             - two["unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_q.lora_A.weight"])  # fmt: skip
    assert 0 < moved.abs().max() < 2e-6
    assert not any("base_layer" in name for name in one)


def test_gradients_are_clipped(either, tmp_path):
    """In the original the parameters were used up before clipping saw them: norm 0, and nothing was clipped."""
    flags = ["--report_to", "tensorboard", "--adam_weight_decay", "0", "--adam_epsilon", "1"]
    either(tmp_path / "free", *flags, "--max_grad_norm", "0")
    either(tmp_path / "clipped", *flags, "--max_grad_norm", "1e-5")
    assert logged(tmp_path / "clipped", "grad_norm")[1] > 1e-3
    start = {}
    either(tmp_path / "start", "--learning_rate", "0", "--adam_weight_decay", "0")
    start, free, clipped = (result_weights(tmp_path / name) for name in ("start", "free", "clipped"))
    distance = lambda weights: sum(float((weights[k] - start[k]).square().sum()) for k in start) ** 0.5  # noqa: E731
    assert distance(clipped) < distance(free) / 100


def test_average_of_the_adapters_is_saved(either, tmp_path):
    either(tmp_path, "--use_ema", "--ema_decay", "0.4", "--checkpointing_steps", "1")
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_q.lora_B.weight"
    average = None
    for step in range(1, 7):
        weight = load_file(tmp_path / f"checkpoint-{step}/pytorch_lora_weights.safetensors")[name].double()
        decay = 0.0 if step == 1 else min(0.4, step / (9 + step))
        average = weight if average is None else decay * average + (1 - decay) * weight
    torch.testing.assert_close(result_weights(tmp_path)[name].double(), average, rtol=1e-5, atol=1e-9)


def test_text_encoder_learns_only_on_request(either, tmp_path):
    either(tmp_path / "without", *LARGE)
    either(tmp_path / "with", *LARGE, *WITH_TEXT)
    assert not [name for name in result_weights(tmp_path / "without") if name.startswith("text_encoder")]
    text = {name: w for name, w in result_weights(tmp_path / "with").items() if "lora_B" in name and "text_" in name}
    parts = {"text_encoder.", "text_encoder_2."} if "xl" in either.script else {"text_encoder."}
    for part in parts:
        assert any(weight.any() for name, weight in text.items() if name.startswith(part)), part


def test_resume_with_another_rank_or_part_is_refused(either, tmp_path):
    either(tmp_path, "--checkpointing_steps", "3")
    sentence, code = either.fails(tmp_path, "--resume_from_checkpoint", "checkpoint-3", "--rank", "8")
    assert "holds adapters of rank 4, this run has --rank 8" in sentence and code == 2
    sentence, code = either.fails(tmp_path, "--resume_from_checkpoint", "checkpoint-3", *WITH_TEXT)
    assert "does not hold the adapters of this run's text_encoder" in sentence and code == 2


def test_resume_without_a_part_that_was_trained_is_refused(either, tmp_path):
    either(tmp_path, "--train_text_encoder", "--max_train_steps", "1", "--checkpointing_steps", "1")
    sentence, code = either.fails(tmp_path, "--resume_from_checkpoint", "latest")
    assert "holds adapters of text_encoder" in sentence and "use the same flags" in sentence and code == 2


def test_a_checkpoint_in_the_original_scripts_names_continues(run_lora, tmp_path, capsys):
    """They write diffusers' older names (to_q.lora.down) and no manifest."""
    from diffusers.utils import convert_state_dict_to_diffusers
    from safetensors.torch import save_file

    run_lora(tmp_path, "--checkpointing_steps", "3")
    folder = tmp_path / "checkpoint-3"
    before = load_file(folder / "pytorch_lora_weights.safetensors")
    older = convert_state_dict_to_diffusers(before)
    assert set(older) != set(before)
    save_file(older, folder / "pytorch_lora_weights.safetensors")
    (folder / "manifest.json").unlink()
    run_lora(tmp_path, "--resume_from_checkpoint", "checkpoint-3", "--max_train_steps", "3")
    assert "was not made by this suite" in capsys.readouterr().err
    after = result_weights(tmp_path)
    assert all(torch.equal(after[name], before[name]) for name in before) and set(after) == set(before)


def test_card_and_upload(either, tmp_path, monkeypatch):
    import importlib

    from huggingface_hub.utils import filter_repo_objects

    flags = ["--validation_prompt", "a handwritten one", "--num_validation_images", "3", "--validation_steps", "6"]
    flags += ["--validation_num_inference_steps", "2", "--save_kohya_format", "--mixed_precision", "bf16"]
    either(tmp_path, *flags, "--checkpointing_steps", "3")
    files = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()]
    sent = set(filter_repo_objects(files, allow_patterns=importlib.import_module(either.script).UPLOADED))
    assert sent == {
        "README.md",
        "pytorch_lora_weights.safetensors",
        "pytorch_lora_weights_kohya.safetensors",
        "validation/step-000006.png",
    }
    card = (tmp_path / "README.md").read_text()
    assert "load_lora_weights" in card and "lora" in card and str(either.base) not in card


@pytest.mark.parametrize("changed", [True, False])
def test_the_lines_of_the_card_draw_with_the_sampler_of_the_training(either, tmp_path, monkeypatch, changed):
    flags = ["--prediction_type", "v_prediction", "--rescale_betas_zero_snr"] if changed else []
    either(tmp_path / "out", "--max_train_steps", "1", *flags)
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), re.S)
    folders = {"out": tmp_path / "out", Path(either.base).name: either.base}
    for name, folder in folders.items():
        code = code.replace(f'"{name}"', f'"{folder}"')
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    assert Image.open("image.png").size[0] > 0
    config = names["pipeline"].scheduler.config
    assert config.prediction_type == ("v_prediction" if changed else "epsilon")
    assert bool(config.get("rescale_betas_zero_snr")) == changed == (tmp_path / "out" / "scheduler").exists()


def test_no_images_asked_for(either, tmp_path):
    either(tmp_path, "--validation_prompt", "x", "--num_validation_images", "0")
    assert not (tmp_path / "validation").exists()
