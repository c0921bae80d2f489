"""Stable Diffusion XL: what the UNet is told about size, crop and text is true, and in full precision."""

import copy

import numpy as np
import pytest
import torch
from conftest import logged, result_bytes, result_weights
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file
from tiny import build_sdxl, write_images
from transformers import CLIPTextModel, CLIPTextModelWithProjection

import train_text_to_image_lora_sdxl
import train_text_to_image_sdxl
from training_utils.base import draws, losses
from training_utils.base.draws import SampleDraws
from training_utils.cli.options import DataOptions, ObjectiveOptions
from training_utils.data import buckets, image_ops, opening

SCRIPTS = [train_text_to_image_sdxl, train_text_to_image_lora_sdxl]


def prepared(script, run, tmp_path, *flags, rows=None, probabilities=None):
    """The samples that a run with these flags would make, as a function of (epoch, index)."""
    from transformers import CLIPTokenizer

    args = script.parse_args(run.argv(tmp_path, *flags))
    tokenizers = [CLIPTokenizer.from_pretrained(run.base, subfolder=name) for name in ("tokenizer", "tokenizer_2")]
    rows = opening.load_dataset(DataOptions(folder=args.train_data_dir)) if rows is None else rows
    rows.sizes = buckets.training_sizes(rows, args.resolution, args.buckets)
    transform = script.SampleTransform(args, tokenizers, (4, 2), probabilities, 1000)
    return rows, lambda epoch, index: transform(rows, index, SampleDraws(args.seed, epoch, index))


@pytest.mark.parametrize("script", SCRIPTS)
def test_time_ids_are_those_of_the_crop_that_was_cut(script, run_sdxl, tmp_path):
    """Each image holds its own coordinates as colours, so that what was cut can be read off and compared."""
    folder = tmp_path / "coordinates"
    sizes = [(40, 30), (30, 40), (33, 33), (64, 32)]
    write_images(folder, len(sizes))
    for index, (width, height) in enumerate(sizes):
        across, down = np.meshgrid(np.arange(width), np.arange(height))
        Image.fromarray(np.stack([across, down, 0 * across], -1).astype(np.uint8)).save(folder / f"{index}.png")
    for flip in ([], ["--random_flip"]):
        flags = ["--train_data_dir", folder, "--resolution", "24", *flip]
        rows, sample = prepared(script, run_sdxl, tmp_path, *flags)
        corners = set()
        for index, (width, height) in enumerate(sizes):
            for epoch in range(12):
                got = sample(epoch, index)
                assert got["time_ids"].dtype == np.float32
                first_height, first_width, top, left, *target = got["time_ids"].tolist()
                assert (first_height, first_width) == (height, width) and target == [24, 24]
                resized = image_ops.resize(rows.image(index), (24, 24), "lanczos")
                mirrored = flip and SampleDraws(7, epoch, index)("flip").random() < 0.5
                uncropped = image_ops.to_array(resized)[:, :, :: -1 if mirrored else 1]
                cut = uncropped[:, int(top) : int(top) + 24, int(left) : int(left) + 24]
                assert np.array_equal(got["pixels"], cut)
                corners.add((index, top, left))
        assert len(corners) > 12


def test_time_ids_reach_the_unet_unrounded_in_bf16(run_sdxl, tmp_path, monkeypatch):
    seen = []
    real = UNet2DConditionModel.forward

    def spy(self, sample, timestep, encoder_hidden_states, added_cond_kwargs=None, **rest):
        seen.append(added_cond_kwargs["time_ids"])
        return real(self, sample, timestep, encoder_hidden_states, added_cond_kwargs=added_cond_kwargs, **rest)

    monkeypatch.setattr(UNet2DConditionModel, "forward", spy)
    folder = tmp_path / "wide"
    write_images(folder, 4)
    for index in range(4):
        Image.new("RGB", (1027 + index, 515)).save(folder / f"{index}.png")
    run_sdxl(tmp_path / "out", "--train_data_dir", folder, "--mixed_precision", "bf16", "--max_train_steps", "1")
    assert seen[0].dtype == torch.float32
    assert sorted(row[1] for row in seen[0].tolist()) == [1027, 1028, 1029, 1030]


@pytest.fixture(scope="module")
def parts(sdxl):
    text = [
        CLIPTextModel.from_pretrained(sdxl, subfolder="text_encoder").eval(),
        CLIPTextModelWithProjection.from_pretrained(sdxl, subfolder="text_encoder_2").eval(),
    ]
    vae = AutoencoderKL.from_pretrained(sdxl, subfolder="vae").eval()
    return UNet2DConditionModel.from_pretrained(sdxl, subfolder="unet"), vae, text


def a_batch(size=4):
    rng = np.random.default_rng(0)
    normal = lambda *shape: torch.from_numpy(rng.standard_normal(shape).astype(np.float32))  # noqa: E731
    return {
        "pixels": normal(size, 3, 16, 16).clip(-1, 1),
        "tokens": torch.from_numpy(rng.integers(0, 100, (size, 16))),
        "tokens_2": torch.from_numpy(rng.integers(0, 100, (size, 16))),
        "caption_given": torch.tensor([1.0, 0.0, 1.0, 0.0]),
        "time_ids": torch.tensor([[1027.0, 515, 3, 7, 16, 16]] * size),
        "timestep": torch.tensor([0, 250, 700, 999]),
        "latent_noise": normal(size, 4, 8, 8),
        "noise": normal(size, 4, 8, 8),
    }


def reference(parts, batch, kind, snr_gamma, zero_dropped):
    """The loss in float64: SDXL's conditioning (arXiv 2307.01952), DDPM's noising, min-SNR."""
    unet, vae = (copy.deepcopy(part).double() for part in parts[:2])
    one, two = (copy.deepcopy(part).double() for part in parts[2])
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    a = torch.from_numpy(np.cumprod(1 - betas))[batch["timestep"]].view(-1, 1, 1, 1)
    with torch.no_grad():
        moments = vae.encode(batch["pixels"].double()).latent_dist
        x0 = vae.config.scaling_factor * (moments.mean + moments.std * batch["latent_noise"].double())
        first = one(batch["tokens"], output_hidden_states=True)
        second = two(batch["tokens_2"], output_hidden_states=True)
        states = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1)
        pooled = second.text_embeds
        if zero_dropped:
            states, pooled = states.clone(), pooled.clone()
            states[[1, 3]], pooled[[1, 3]] = 0, 0
        noise = batch["noise"].double()
        noisy = a.sqrt() * x0 + (1 - a).sqrt() * noise
        target = noise if kind == "epsilon" else a.sqrt() * noise - (1 - a).sqrt() * x0
        conditions = {"text_embeds": pooled, "time_ids": batch["time_ids"].double()}
        error = unet(noisy, batch["timestep"], states, added_cond_kwargs=conditions).sample - target
    loss, snr = error.square().mean(dim=(1, 2, 3)), (a / (1 - a)).flatten()
    if snr_gamma:
        loss = loss * snr.clip(max=snr_gamma) / (snr if kind == "epsilon" else snr + 1)
    return loss


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("snr_gamma", "zero_dropped"), [(None, True), (5.0, False)])
def test_training_loss(script, sdxl, parts, kind, snr_gamma, zero_dropped):
    schedule = DDPMScheduler.from_pretrained(sdxl, subfolder="scheduler", prediction_type=kind)
    unet, vae, encoders = parts
    batch = a_batch()
    batch |= script.encode_images(vae, batch) | script.encode_captions(encoders, batch)
    got = script.training_loss(
        unet, schedule, batch, vae.config.scaling_factor, zero_dropped, ObjectiveOptions(snr_gamma)
    )
    expected = reference(parts, a_batch(), kind, snr_gamma, zero_dropped)
    torch.testing.assert_close(got.detach().double(), expected, rtol=5e-5, atol=1e-7)


def test_dropped_captions_are_what_the_pipeline_feeds_for_an_empty_prompt(sdxl, parts):
    """Zeros, and not the encoding of "", where the base model's pipeline does so; the encoding where it does not."""
    for zero in (True, False):
        pipeline = StableDiffusionXLPipeline.from_pretrained(sdxl, force_zeros_for_empty_prompt=zero)
        _, negative, _, negative_pooled = pipeline.encode_prompt("x", do_classifier_free_guidance=True)
        ids = pipeline.tokenizer("", padding="max_length", max_length=16, return_tensors="pt").input_ids
        batch = {"tokens": ids, "tokens_2": ids, "caption_given": torch.zeros(1)}
        batch |= train_text_to_image_sdxl.encode_captions(parts[2], batch)
        states, pooled = train_text_to_image_sdxl.text_of(batch, zero)
        torch.testing.assert_close(states, negative, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(pooled, negative_pooled, rtol=1e-5, atol=1e-6)
        assert bool(states.any()) is not zero


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("flag", ["--proportion_empty_prompts", "--caption_dropout"])
def test_dropping_is_drawn_again_each_time_a_sample_is_seen(script, run_sdxl, tmp_path, flag):
    rows, sample = prepared(script, run_sdxl, tmp_path, flag, "0.4")
    given = np.array([[sample(epoch, index)["caption_given"] for index in range(10)] for epoch in range(40)])
    assert abs(given.mean() - 0.6) < 0.08
    assert all(0 < share < 1 for share in given.mean(axis=0)), "no image is always without its caption"


def test_an_empty_caption_in_the_data_is_encoded_and_not_dropped(run_sdxl, tmp_path):
    folder = tmp_path / "empty"
    write_images(folder, 1)
    (folder / "metadata.jsonl").write_text('{"file_name": "0.png", "text": ""}\n')
    rows, sample = prepared(
        train_text_to_image_sdxl, run_sdxl, tmp_path, rows=opening.load_dataset(DataOptions(folder=folder))
    )
    assert sample(0, 0)["caption_given"] == 1


EXPECTED = {
    ("none",): None,
    ("earlier", 3.0, 0.25): ((0, 250), 3.0),
    ("later", 3.0, 0.25): ((750, 1000), 3.0),
    ("later", 3.0, 0.0): ((0, 0), 3.0),
    ("range", 0.5, 0.25, 100, 200): ((100, 200), 0.5),
}


@pytest.mark.parametrize("case", EXPECTED)
def test_timestep_bias(case):
    got = losses.timestep_probabilities(1000, *case)
    if EXPECTED[case] is None:
        assert got is None
        return
    (first, last), times = EXPECTED[case]
    inside = np.zeros(1000, dtype=bool)
    inside[first:last] = True
    assert got.sum() == pytest.approx(1)
    assert np.allclose(got[~inside], got[~inside][0])
    if inside.any():
        assert np.allclose(got[inside], times * got[~inside][0])
    drawn = [draws.choose_timestep(SampleDraws(0, epoch, 0), 1000, got) for epoch in range(2000)]
    share = inside[drawn].mean()
    assert share == pytest.approx(got[inside].sum(), abs=0.04)


@pytest.mark.parametrize("bounds", [(0, 1001), (5, 5), (6, 5)])
def test_a_range_beyond_the_schedule(bounds):
    with pytest.raises(ValueError, match="not within a schedule of 1000"):
        losses.timestep_probabilities(1000, "range", 2.0, 0.25, *bounds)


def test_a_range_beyond_the_schedule_is_one_sentence(run_sdxl, run_lora_sdxl, tmp_path):
    for run in (run_sdxl, run_lora_sdxl):
        sentence, code = run.fails(tmp_path, "--timestep_bias_strategy", "range", "--timestep_bias_end", "2000")
        assert "--timestep_bias_strategy range: the timesteps 0 to 2000 are not within" in sentence and code == 2


def test_the_vae_stays_in_float32_where_it_must_and_says_why(run_sdxl, run_lora_sdxl, tmp_path, capsys, monkeypatch):
    seen, real = [], AutoencoderKL.encode
    fixed = AutoencoderKL.from_pretrained(run_sdxl.base, subfolder="vae")
    fixed.register_to_config(force_upcast=False)
    fixed.save_pretrained(tmp_path / "fixed")
    own = f"{run_sdxl.base}/vae"
    vaes = {None: "SDXL's own VAE overflows", own: f"the VAE {own} overflows", tmp_path / "fixed": None}
    monkeypatch.setattr(AutoencoderKL, "encode", lambda self, x, **kw: (seen.append(x.dtype), real(self, x, **kw))[1])
    for run in (run_sdxl, run_lora_sdxl):
        for vae, sentence in vaes.items():
            other = [] if vae is None else ["--pretrained_vae_model_name_or_path", vae]
            run(tmp_path / run.script, "--mixed_precision", "bf16", "--max_train_steps", "1", *other)
            said = capsys.readouterr().err
            assert set(seen) == {torch.float32 if sentence else torch.bfloat16}
            assert (f"{sentence} in half precision and runs in float32" if sentence else "") in said
            assert bool(sentence) == ("runs in float32" in said)
            seen.clear()


def test_another_vae_is_saved_with_the_result(run_sdxl, tmp_path):
    vae = AutoencoderKL.from_pretrained(run_sdxl.base, subfolder="vae")
    torch.nn.init.zeros_(vae.decoder.conv_out.weight)
    vae.half().save_pretrained(tmp_path / "vae")
    run_sdxl(tmp_path / "out", "--pretrained_vae_model_name_or_path", tmp_path / "vae")
    saved = load_file(tmp_path / "out" / "vae" / "diffusion_pytorch_model.safetensors")
    card = (tmp_path / "out" / "README.md").read_text().split("## How it was trained")[1]
    assert str(tmp_path) not in card.replace("\\", "") and "vae" in card
    assert not saved["decoder.conv_out.weight"].any() and saved["decoder.conv_out.weight"].dtype == torch.float16


def test_result_loads_and_draws(run_sdxl, tmp_path):
    flags = ["--validation_prompt", "a handwritten one", "--validation_num_inference_steps", "2"]
    run_sdxl(tmp_path, *flags, "--validation_steps", "3", "--use_ema", "--mixed_precision", "bf16")
    pipeline = StableDiffusionXLPipeline.from_pretrained(tmp_path, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("x", height=16, width=16, num_inference_steps=2, output_type="np").images[0]
    assert image.shape == (16, 16, 3) and np.isfinite(image).all()
    assert sorted(path.name for path in (tmp_path / "validation").iterdir()) == ["step-000003.png", "step-000006.png"]
    assert np.asarray(Image.open(tmp_path / "validation" / "step-000003.png")).std() > 10
    assert result_weights(tmp_path)["conv_in.weight"].dtype == torch.float32


def test_validation_loss_falls(run_sdxl, tmp_path):
    flags = ["--validation_split", "0.3", "--report_to", "tensorboard", "--validation_steps", "30"]
    run_sdxl(tmp_path, *flags, "--max_train_steps", "60", "--learning_rate", "5e-3")
    seen = logged(tmp_path, "val_loss")
    assert seen[60] < seen[30]


@pytest.mark.parametrize("sibling", ["run_lora", "run_sdxl", "run_lora_sdxl"])
def test_validation_loss_is_the_same_for_the_same_weights(request, tmp_path, sibling):
    flags = ["--validation_split", "0.3", "--validation_steps", "2", "--report_to", "tensorboard", "--random_flip"]
    still = ["--learning_rate", "0", "--adam_weight_decay", "0", "--caption_dropout", "0.5", "--noise_offset", "0.1"]
    request.getfixturevalue(sibling)(tmp_path, *flags, *still)
    seen = logged(tmp_path, "val_loss")
    assert len(seen) == 3 and len(set(seen.values())) == 1


def test_zero_terminal_snr(run_sdxl, tmp_path):
    import json

    flags = ["--rescale_betas_zero_snr", "--prediction_type", "v_prediction", "--snr_gamma", "5"]
    run_sdxl(tmp_path, *flags, "--report_to", "tensorboard")
    assert np.isfinite(list(logged(tmp_path).values())).all()
    config = json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())
    assert config["prediction_type"] == "v_prediction" and config["rescale_betas_zero_snr"]
    assert config["_class_name"] == "EulerDiscreteScheduler" and config["timestep_spacing"] == "trailing"


def test_a_base_that_encodes_empty_prompts_trains_so(run_sdxl, tmp_path):
    other = build_sdxl(tmp_path / "base", zero_empty_prompt=False)
    flags = ["--proportion_empty_prompts", "1"]
    run_sdxl(tmp_path / "zeros", *flags)
    run_sdxl(tmp_path / "encoded", *flags, "--pretrained_model_name_or_path", other)
    assert result_bytes(tmp_path / "zeros") != result_bytes(tmp_path / "encoded")


def test_sd_given_to_sdxl_and_the_other_way_round(run_lora, run_lora_sdxl, tmp_path):
    for run, base in ((run_lora, run_lora_sdxl.base), (run_lora_sdxl, run_lora.base)):
        sentence, code = run.fails(tmp_path, "--pretrained_model_name_or_path", base)
        assert "this script trains" in sentence and code == 2


def test_debug_loss_logs_each_images_own_loss_with_its_step(run_lora_sdxl, tmp_path):
    run_lora_sdxl(tmp_path, "--debug_loss", "--report_to", "tensorboard", "--max_train_steps", "3")
    values = {1: [], 2: [], 3: []}
    for index in range(10):
        [name] = [f"loss_for_{path}" for path in sorted(images_of(run_lora_sdxl)) if path.endswith(f"/{index}.png")]
        for step, value in logged(tmp_path, name).items():
            values[step].append(value)
    assert len({round(value, 6) for several in values.values() for value in several}) == 10
    assert logged(tmp_path) == pytest.approx({step: np.mean(several) for step, several in values.items()}, rel=1e-5)


def images_of(run):
    from pathlib import Path

    return [str(path.resolve()) for path in Path(run.images).glob("*.png")]
