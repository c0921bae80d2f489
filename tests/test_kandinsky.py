"""Kandinsky 2.2: the losses are the formulas', what is saved loads into today's pipelines, either stage goes with the
other, and the conditions are those that the pipelines feed."""

import copy
import dataclasses
import importlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import KANDINSKY, logged, result_bytes, result_weights
from diffusers import (
    DDPMScheduler,
    KandinskyV22CombinedPipeline,
    KandinskyV22Pipeline,
    KandinskyV22PriorPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import image, write_images

import train_text_to_image_decoder
import train_text_to_image_lora_prior
import train_text_to_image_prior
from training_utils.base.draws import SampleDraws
from training_utils.base.errors import UserError
from training_utils.cli.options import DataOptions, ObjectiveOptions
from training_utils.data import buckets, checking, image_ops, opening
from training_utils.run.facts import RunFacts
from training_utils.run.hub.card import write_card
from training_utils.torch_backend import lora, models, optimizers
from training_utils.torch_backend.kandinsky import latent_shape

LARGE = ["--learning_rate", "5e-2"]  # so that what was learned shows in an image
FEW_STEPS = ["--validation_num_inference_steps", "2"]
PROMPTS = {False: ["--validation_prompts", "a handwritten one", "a handwritten two"]}
PROMPTS[True] = ["--validation_prompt", "a handwritten one", "--num_validation_images", "2"]


@pytest.fixture(params=KANDINSKY)
def any_script(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(params=["run_prior", "run_decoder"])
def full(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(params=["run_lora_prior", "run_lora_decoder"])
def adapters(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def stages(kandinsky):
    """Both stages as pipelines: (prior, decoder)."""
    return KandinskyV22PriorPipeline.from_pretrained(kandinsky[0]), KandinskyV22Pipeline.from_pretrained(kandinsky[1])


def fresh(kandinsky):
    return KandinskyV22PriorPipeline.from_pretrained(kandinsky[0]), KandinskyV22Pipeline.from_pretrained(kandinsky[1])


def draw(prior, decoder, prompt="a handwritten one"):
    """An image (16, 16, 3) of both stages from fixed noise."""
    for pipeline in (prior, decoder):
        pipeline.set_progress_bar_config(disable=True)
    pair = prior(prompt, num_inference_steps=3, generator=torch.Generator().manual_seed(0))
    noise = torch.Generator().manual_seed(1)
    return decoder(**pair, height=16, width=16, num_inference_steps=2, generator=noise, output_type="np").images[0]


# --- the losses ------------------------------------------------------------------------------------------------------


def squared_cosine():
    """Cumulative products of the prior's schedule in float64 (Nichol & Dhariwal 2021, arXiv 2102.09672, eq. 17)."""
    level = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.cumprod(1 - np.minimum(1 - level[1:] / level[:-1], 0.999))


def linear():
    return np.cumprod(1 - np.linspace(0.00085, 0.012, 1000))


def a_batch(*latent_shape):
    rng = np.random.default_rng(0)
    normal = lambda *shape: torch.from_numpy(rng.standard_normal(shape).astype(np.float32))  # noqa: E731
    mask = torch.arange(16)[None] < torch.tensor([3, 9, 16, 2])[:, None]
    return {
        "clip_pixels": normal(4, 3, 16, 16),
        "pixels": normal(4, 3, 16, 16).clip(-1, 1),
        "tokens": torch.from_numpy(rng.integers(0, 100, (4, 16))),
        "token_mask": mask,
        "timestep": torch.tensor([0, 250, 700, 999]),
        "noise": normal(4, *latent_shape),
    }


def doubled(batch):
    return {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}


def encoded(prior, batch):
    """A batch with what the prior's frozen networks make of it."""
    script = train_text_to_image_prior
    images = script.encode_images(prior.image_encoder, batch)
    return batch | images | script.encode_captions(prior.text_encoder, batch)


@pytest.mark.parametrize("gamma", [None, 5.0])
def test_loss_of_the_prior(stages, gamma):
    prior, batch = stages[0], a_batch(16)
    schedule = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="sample")
    statistics = prior.prior.clip_mean.detach(), prior.prior.clip_std.detach()
    got = train_text_to_image_prior.training_loss(
        prior.prior, schedule, encoded(prior, batch), statistics, ObjectiveOptions(gamma)
    )

    exact, text, vision = (copy.deepcopy(m).double() for m in (prior.prior, prior.text_encoder, prior.image_encoder))
    a = torch.from_numpy(squared_cosine())[batch["timestep"]][:, None]
    inputs = doubled(batch)
    with torch.no_grad():
        x0 = (vision(inputs["clip_pixels"]).image_embeds - exact.clip_mean) / exact.clip_std
        caption = text(inputs["tokens"])
        noisy = a.sqrt() * x0 + (1 - a).sqrt() * inputs["noise"]
        output = exact(
            noisy, batch["timestep"], caption.text_embeds, caption.last_hidden_state, inputs["token_mask"]
        ).predicted_image_embedding
        expected = (output - x0).square().mean(dim=1)
        if gamma:
            expected *= (a / (1 - a)).flatten().clip(max=gamma)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("gamma", [None, 5.0])
def test_loss_of_the_decoder(kandinsky, stages, gamma):
    decoder, vision, batch = stages[1], stages[0].image_encoder, a_batch(4, 8, 8)
    schedule = DDPMScheduler.from_pretrained(kandinsky[1], subfolder="scheduler")
    made = train_text_to_image_decoder.encode_images((decoder.movq, vision), batch)
    got = train_text_to_image_decoder.training_loss(decoder.unet, schedule, batch | made, ObjectiveOptions(gamma))

    unet, movq, vision = (copy.deepcopy(m).double() for m in (decoder.unet, decoder.movq, vision))
    a = torch.from_numpy(linear())[batch["timestep"]].view(-1, 1, 1, 1)
    inputs = doubled(batch)
    with torch.no_grad():
        x0 = movq.encode(inputs["pixels"]).latents
        seen = {"image_embeds": vision(inputs["clip_pixels"]).image_embeds}
        noisy = a.sqrt() * x0 + (1 - a).sqrt() * inputs["noise"]
        output = unet(noisy, batch["timestep"], None, added_cond_kwargs=seen).sample[:, :4]
        expected = (output - inputs["noise"]).square().mean(dim=(1, 2, 3))
        if gamma:
            snr = (a / (1 - a)).flatten()
            expected *= snr.clip(max=gamma) / snr
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-6)


def test_padding_does_not_reach_the_prior(stages):
    """The mask is the tokenizer's: what stands in the padded places changes nothing."""
    prior = stages[0]
    schedule = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="sample")
    statistics = prior.prior.clip_mean.detach(), prior.prior.clip_std.detach()
    loss = lambda batch: train_text_to_image_prior.training_loss(prior.prior, schedule, batch, statistics)  # noqa: E731
    batch = encoded(prior, a_batch(16))
    before = loss(batch)
    batch["text_states"] = torch.where(batch["token_mask"][:, :, None], batch["text_states"], 7.0)
    torch.testing.assert_close(loss(batch), before, rtol=1e-6, atol=1e-7)
    unmasked = loss(batch | {"token_mask": torch.ones_like(batch["token_mask"])})
    assert (unmasked - before).abs().max() > 1e-5


def test_learned_variance_gets_no_gradient_of_its_own(kandinsky, stages):
    unet = copy.deepcopy(stages[1].unet)
    schedule = DDPMScheduler.from_pretrained(kandinsky[1], subfolder="scheduler")
    batch, networks = a_batch(4, 8, 8), (stages[1].movq, stages[0].image_encoder)
    batch |= train_text_to_image_decoder.encode_images(networks, batch)
    train_text_to_image_decoder.training_loss(unet, schedule, batch).sum().backward()
    assert unet.conv_out.weight.grad[4:].abs().max() == 0 < unet.conv_out.weight.grad[:4].abs().min()
    assert all(parameter.grad is not None for parameter in unet.parameters())
    assert all(p.grad is None for part in (stages[1].movq, stages[0].image_encoder) for p in part.parameters())


# --- what a sample is ------------------------------------------------------------------------------------------------


def prepared(script, run, images, *flags, index=3):
    """A sample as the script prepares it, and its image."""
    args = script.parse_args(run.argv("out", *flags))
    rows = opening.load_dataset(DataOptions(folder=images, caption_column=getattr(args, "caption_column", None)))
    prior = KandinskyV22PriorPipeline.from_pretrained(run.base[0])
    if "decoder" in script.__name__:
        rows.sizes = buckets.training_sizes(rows, args.resolution, args.buckets)
        transform = script.SampleTransform(args, prior.image_processor, (4, 2), 1000)
    else:
        transform = script.SampleTransform(args, prior.tokenizer, prior.image_processor, 16, 1000)
    return transform(rows, index, SampleDraws(7, 0, index)), rows.image(index), prior


def test_a_dropped_caption_is_what_the_prior_pipeline_calls_unconditional(run_prior, images):
    sample, _, prior = prepared(train_text_to_image_prior, run_prior, images, "--caption_dropout", "1")
    empty = prior.tokenizer("", padding="max_length", max_length=prior.tokenizer.model_max_length)
    assert sample["tokens"].tolist() == empty.input_ids
    assert sample["token_mask"].tolist() == [bool(seen) for seen in empty.attention_mask]


def test_a_dropped_image_is_what_the_decoder_is_told_of_no_image(run_decoder, images):
    sample, _, prior = prepared(train_text_to_image_decoder, run_decoder, images, "--caption_dropout", "1")
    with torch.no_grad():
        got = prior.image_encoder(torch.from_numpy(sample["clip_pixels"])[None]).image_embeds
        torch.testing.assert_close(got, prior.get_zero_embed())


def test_the_decoder_sees_the_middle_square_and_clip_the_same(run_decoder, images):
    """Bicubic to the resolution, with the original's quick reduction unless asked otherwise."""
    sample, image, prior = prepared(train_text_to_image_decoder, run_decoder, images, "--resolution", "8")
    middle = image.crop((2, 0, 18, 16))  # of 20 x 16
    expected = middle.resize((8, 8), Image.Resampling.BICUBIC, reducing_gap=1)
    np.testing.assert_array_equal(sample["pixels"], image_ops.to_array(expected))
    np.testing.assert_array_equal(
        sample["clip_pixels"], prior.image_processor(image, return_tensors="np").pixel_values[0]
    )
    flags = ["--resolution", "8", "--reducing_gap", "3", "--image_interpolation_mode", "lanczos"]
    sample, image, _ = prepared(train_text_to_image_decoder, run_decoder, images, *flags)
    expected = image.crop((2, 0, 18, 16)).resize((8, 8), Image.Resampling.LANCZOS, reducing_gap=3)
    np.testing.assert_array_equal(sample["pixels"], image_ops.to_array(expected))


def test_flip_and_crop_reach_both_views_of_the_decoder(run_decoder, images):
    """CLIP must see what the UNet is to draw, or the decoder learns to mirror and shift images by chance."""
    flags = ["--random_flip", "--random_crop"]
    views = set()
    for index in range(10):
        sample, image, prior = prepared(train_text_to_image_decoder, run_decoder, images, *flags, index=index)
        shown = Image.fromarray(np.uint8(np.round((sample["pixels"].transpose(1, 2, 0) + 1) * 127.5)))
        seen = prior.image_processor(shown, return_tensors="np").pixel_values[0]
        np.testing.assert_allclose(sample["clip_pixels"], seen, atol=1e-5)  # 16 pixels: nothing is resized
        matches = [
            (flipped, left)
            for flipped in (False, True)
            for left in range(5)
            if np.array_equal(
                np.asarray(shown),
                np.asarray(image)[:, ::-1][:, left : left + 16] if flipped else np.asarray(image)[:, left : left + 16],
            )
        ]
        views |= set(matches)
    assert {flipped for flipped, _ in views} == {False, True} and len({left for _, left in views}) > 1


def test_the_decoder_needs_no_captions(run_decoder, tmp_path):
    folder = tmp_path / "bare"
    folder.mkdir()
    for index in range(5):
        Image.new("RGB", (20, 20), (index * 40, 0, 90)).save(folder / f"{index}.png")
    assert run_decoder(tmp_path / "out", "--train_data_dir", folder, "--max_train_steps", "2") == 0


def test_which_images_of_a_folder_the_decoder_sees(tmp_path, capsys):
    """Those that the metadata name, where there are some, as in the original; no hidden ones."""
    write_images(tmp_path, 3)
    (tmp_path / ".checkpoints").mkdir()
    shutil.copy(tmp_path / "0.png", tmp_path / ".checkpoints" / "0-copy.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "2.png"}\n{"file_name": "0.png"}\n')
    rows = opening.load_dataset(DataOptions(folder=tmp_path, caption_column=None))
    checking.check_dataset(rows)
    assert [Path(rows.name(index)).name for index in range(len(rows))] == ["2.png", "0.png"]
    assert "1 of 3 images" in capsys.readouterr().err
    (tmp_path / "metadata.jsonl").unlink()
    rows = opening.load_dataset(DataOptions(folder=tmp_path, caption_column=None))
    assert [Path(rows.name(index)).name for index in range(len(rows))] == ["0.png", "1.png", "2.png"]


def test_a_table_of_images_alone_is_told_from_another(tmp_path):
    """A resumed decoder notices other images, though there are neither captions nor file names to compare."""
    import datasets

    prints = []
    for name, order in (("one", range(4)), ("two", (1, 0, 2, 3)), ("three", range(4))):
        (tmp_path / name).mkdir()
        rows = {"image": [image(index) for index in order]}
        features = datasets.Features({"image": datasets.Image()})
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / name / "train.parquet")
        source = dict(dataset_name=str(tmp_path / name), cache_dir=tmp_path / "cache", caption_column=None)
        prints.append(opening.load_dataset(DataOptions(**source)).fingerprint())
    assert prints[0] == prints[2] != prints[1]


# --- saving and loading ----------------------------------------------------------------------------------------------


def test_a_full_result_loads_by_itself_and_goes_with_the_stock_other_stage(full, kandinsky, tmp_path):
    before = draw(*fresh(kandinsky))
    full(tmp_path, *LARGE)
    prior, decoder = fresh(kandinsky)
    if "prior" in full.script:
        prior = KandinskyV22PriorPipeline.from_pretrained(tmp_path, use_safetensors=True)
    else:
        decoder = KandinskyV22Pipeline.from_pretrained(tmp_path, use_safetensors=True)
    after = draw(prior, decoder)
    assert np.isfinite(after).all() and np.abs(after - before).max() > 0.01
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert "Pil" not in json.dumps(index), "a class name that older transformers do not know"
    stock = f"{kandinsky['decoder' in full.script]}"
    for part in set(index) - {"prior", "unet", "scheduler"}:  # frozen parts as they were, in their own precision
        for weights in (tmp_path / part).glob("*.safetensors"):
            one, two = load_file(weights), load_file(f"{stock}/{part}/{weights.name}")
            assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_a_half_precision_base_stays_as_it_was_stored(run_prior, kandinsky, tmp_path):
    prior = KandinskyV22PriorPipeline.from_pretrained(kandinsky[0])
    prior.text_encoder.half()
    prior.image_encoder.half()
    prior.save_pretrained(tmp_path / "base")
    run_prior(tmp_path / "out", "--pretrained_prior_model_name_or_path", tmp_path / "base")
    types = {part: models.stored_dtype(tmp_path / "out" / part) for part in ("prior", "text_encoder", "image_encoder")}
    assert types == {"prior": torch.float32, "text_encoder": torch.float16, "image_encoder": torch.float16}


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_normalisation_survives(run_prior, run_lora_prior, kandinsky, tmp_path, monkeypatch, precision):
    """clip_mean and clip_std are what they were, to the bit, after training, and in float32 while adapters train."""
    weights = "prior/diffusion_pytorch_model.safetensors"
    stock = load_file(f"{kandinsky[0]}/{weights}")
    run_prior(tmp_path / "full", *LARGE, "--adam_weight_decay", "0.5", "--use_ema", "--mixed_precision", precision)
    trained = load_file(tmp_path / "full" / weights)
    for name in ("clip_mean", "clip_std"):
        assert torch.equal(trained[name], stock[name])
    assert not torch.equal(trained["proj_in.weight"], stock["proj_in.weight"])

    seen = {}
    real = train_text_to_image_lora_prior.training_loss

    def spy(network, schedule, batch, statistics, *rest):
        seen["statistics"] = statistics
        return real(network, schedule, batch, statistics, *rest)

    monkeypatch.setattr(train_text_to_image_lora_prior, "training_loss", spy)
    run_lora_prior(tmp_path / "adapters", "--mixed_precision", precision)
    for got, name in zip(seen["statistics"], ("clip_mean", "clip_std")):
        assert got.dtype == torch.float32 and torch.equal(got, stock[name])


def combined(prior, decoder):
    parts = {f"prior_{name}": part for name, part in prior.components.items()}
    return KandinskyV22CombinedPipeline(**decoder.components, **parts)


def test_the_combined_pipeline_takes_both_results(run_prior, run_decoder, tmp_path):
    for run in (run_prior, run_decoder):
        run(tmp_path / run.script, "--max_train_steps", "1")
    prior = KandinskyV22PriorPipeline.from_pretrained(tmp_path / run_prior.script)
    decoder = KandinskyV22Pipeline.from_pretrained(tmp_path / run_decoder.script)
    pipeline = combined(prior, decoder)
    pipeline.set_progress_bar_config(disable=True)
    size = dict(height=16, width=16, num_inference_steps=2, prior_num_inference_steps=2)
    assert pipeline("a handwritten one", **size, output_type="np").images.shape == (1, 16, 16, 3)


FORMS = {"plain": [], "alpha": ["--lora_alpha", "16", "--rank", "2"], "DoRA": ["--use_dora"]}


@pytest.mark.parametrize("form", FORMS)
def test_adapters_that_load_are_those_that_were_trained(adapters, kandinsky, tmp_path, monkeypatch, form):
    """The loaded pipeline draws the very image that the network draws which was just trained; the base stays."""
    name, network = ("prior", "prior") if "prior" in adapters.script else ("unet", "decoder")
    trained = {}
    real = lora.save_adapters
    monkeypatch.setattr(
        lora, "save_adapters", lambda folder, adapted: (trained.update(adapted), real(folder, adapted))
    )
    adapters(tmp_path, *LARGE, *FORMS[form])
    own = dict(zip(("prior", "decoder"), fresh(kandinsky)))
    before = draw(**own)
    setattr(own[network], name, trained[name].eval())
    after = draw(**own)
    assert np.abs(after - before).max() > 1e-3

    loaded = dict(zip(("prior", "decoder"), fresh(kandinsky)))
    getattr(loaded[network], name).load_lora_adapter(str(tmp_path), prefix=name, use_safetensors=True)
    np.testing.assert_allclose(draw(**loaded), after, atol=2e-4)
    stock = load_file(f"{kandinsky[network == 'decoder']}/{name}/diffusion_pytorch_model.safetensors")
    base = {key.replace(".base_layer", ""): value for key, value in trained[name].state_dict().items()}
    assert all(torch.equal(base[key], value) for key, value in stock.items())


def test_layers_and_metadata_of_the_adapters(adapters, tmp_path):
    """Every attention layer is reached, in the decoder the projections of the image's embedding as well."""
    adapters(tmp_path, "--lora_alpha", "8", "--mixed_precision", "bf16")
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", "pt") as file:
        facts, names = json.loads(file.metadata()["lora_adapter_metadata"]), list(file.keys())
        assert {file.get_tensor(name).dtype for name in names} == {torch.float32}
    part, layers = "prior", ["to_k", "to_out.0", "to_q", "to_v"]
    if "decoder" in adapters.script:
        part, layers = "unet", ["add_k_proj", "add_v_proj", *layers]
    assert facts[f"{part}.r"] == 4 and facts[f"{part}.lora_alpha"] == 8
    assert facts[f"{part}.target_modules"] == layers
    assert not any(folder in json.dumps(facts) for folder in adapters.base), "a path of this machine"
    attentions = {name.split(f".{layer}.")[0] for name in names for layer in layers if f".{layer}." in name}
    assert {name.split(".lora_")[0] for name in names} == {f"{at}.{layer}" for at in attentions for layer in layers}
    module = getattr(fresh(adapters.base)[part == "unet"], part)
    assert {at.removeprefix(f"{part}.") for at in attentions} == {
        name for name, child in module.named_modules() if type(child).__name__ == "Attention"
    }


def test_adapters_learn(adapters, tmp_path):
    """The loss on validation images with fixed noise falls well below the base's; every adapter has moved."""
    flags = ["--max_train_steps", "40", "--rank", "8", "--report_to", "tensorboard", "--validation_split", "0.3"]
    losses = {}
    for rate in ("0", "1e-2"):
        adapters(tmp_path / rate, *flags, "--validation_steps", "40", "--learning_rate", rate)
        losses[rate] = logged(tmp_path / rate, "val_loss")[40]
    assert losses["1e-2"] < 0.95 * losses["0"]
    moved = [weight for name, weight in result_weights(tmp_path / "1e-2").items() if ".lora_B." in name]
    assert len(moved) > 5 and all(weight.abs().max() > 0 for weight in moved)


def test_adapters_train_in_float32(adapters, tmp_path, monkeypatch):
    seen = {}
    real = optimizers.make_optimizer

    def spy(parameters, *words, **options):
        seen["types"] = {parameter.dtype for parameter in parameters}
        return real(parameters, *words, **options)

    monkeypatch.setattr(optimizers, "make_optimizer", spy)
    adapters(tmp_path, "--mixed_precision", "bf16", "--max_train_steps", "1")
    assert seen["types"] == {torch.float32}


def test_average_is_saved(full, tmp_path):
    full(tmp_path / "average", *LARGE, "--use_ema", "--ema_decay", "0.5", "--checkpointing_steps", "3")
    full(tmp_path / "plain", *LARGE)
    average, plain = result_weights(tmp_path / "average"), result_weights(tmp_path / "plain")
    assert any(not torch.equal(average[name], plain[name]) for name in plain)
    part = "prior" if "prior" in full.script else "unet"
    names = {path.name for path in (tmp_path / "average" / "checkpoint-3").iterdir()}
    assert names == {part, f"{part}_ema", "optimizer.bin", "scheduler.bin", "manifest.json"}


# --- settings --------------------------------------------------------------------------------------------------------

BOTH = {
    "seed": ["--seed", "8"],
    "flip": ["--random_flip"],
    "dropout": ["--caption_dropout", "1"],
    "min-SNR": ["--snr_gamma", "1"],
    "weight decay": ["--adam_weight_decay", "0.5"],
    "adafactor": ["--optimizer", "adafactor"],
    "bf16": ["--mixed_precision", "bf16"],
    "validation split": ["--validation_split", "0.2"],
}
DECODER = {
    "crop": ["--random_crop"],
    "offset": ["--noise_offset", "0.1"],
    "filter": ["--image_interpolation_mode", "nearest"],
    "exact reduction": ["--reducing_gap", "3"],
}


def test_every_setting_that_shapes_the_result_does(full, tmp_path):
    changes = BOTH | (DECODER if "decoder" in full.script else {})
    plain = ["--resolution", "8"]
    full(tmp_path / "plain", *plain)
    results = {"plain": str(result_bytes(tmp_path / "plain"))}
    for name, flags in changes.items():
        full(tmp_path / name, *plain, *flags)
        results[name] = str(result_bytes(tmp_path / name))
    assert len(set(results.values())) == len(results)


def test_gradient_checkpointing_changes_nothing(any_script, tmp_path, recomputed):
    any_script(tmp_path / "without")
    assert not recomputed
    any_script(tmp_path / "with", "--gradient_checkpointing")
    assert recomputed, "the flag is dead"
    assert result_bytes(tmp_path / "with") == result_bytes(tmp_path / "without")


def test_gradient_checkpointing_keeps_less(stages):
    """In the prior too, for which diffusers has none: counted in bytes that wait for the backward pass."""

    def kept(prior):
        sizes = []
        batch = a_batch(16)
        states = stages[0].text_encoder(batch["tokens"])
        inputs = (batch["noise"], batch["timestep"], states.text_embeds.detach(), states.last_hidden_state.detach())
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.nbytes), t)[1], lambda t: t):
            prior(*inputs, batch["token_mask"])
        return sum(sizes)

    prior = copy.deepcopy(stages[0].prior)
    complete = kept(prior)
    models.checkpoint_blocks(prior.transformer_blocks)
    assert kept(prior) < complete / 2


def test_a_prior_trains_without_a_decoder(run_prior, run_lora_prior, tmp_path):
    """A decoder is only for the look of it; one that is asked for and not there is said before training."""
    flags = ["--pretrained_decoder_model_name_or_path", "nowhere/decoder"]
    for run in (run_prior, run_lora_prior):
        assert run(tmp_path / run.script, *flags) == 0
        sentence, code = run.fails(tmp_path / "told", *flags, *PROMPTS["lora" in run.script])
        assert "validation images need both networks, and base model nowhere/decoder" in sentence and code == 2


def test_a_decoder_trains_with_the_image_encoder_alone(run_decoder, run_lora_decoder, kandinsky, tmp_path):
    shutil.copytree(kandinsky[0], tmp_path / "prior")
    for part in ("prior", "text_encoder", "tokenizer", "scheduler"):
        shutil.rmtree(tmp_path / "prior" / part)
    flags = ["--pretrained_prior_model_name_or_path", tmp_path / "prior"]
    for run in (run_decoder, run_lora_decoder):
        assert run(tmp_path / run.script, *flags) == 0
        sentence, code = run.fails(tmp_path / "told", *flags, *PROMPTS["lora" in run.script])
        assert "validation images need both networks" in sentence and "no part 'tokenizer'" in sentence and code == 2


def test_what_is_not_used_is_not_fetched(run_decoder, kandinsky, tmp_path, monkeypatch):
    """Of a prior on the hub a decoder's training needs what sees images, unless it draws some."""
    asked = []

    def download(name, **options):
        asked.append(
            {part for part, value in options.items() if value is None} & {"prior", "text_encoder", "tokenizer"}
        )
        return kandinsky[0]

    monkeypatch.setattr(KandinskyV22PriorPipeline, "download", download)
    flags = ["--pretrained_prior_model_name_or_path", "some/prior", "--max_train_steps", "1"]
    run_decoder(tmp_path / "quiet", *flags)
    assert asked == [{"prior", "text_encoder", "tokenizer"}]
    run_decoder(tmp_path / "images", *flags, *PROMPTS[False], *FEW_STEPS)
    assert asked[-1] == set()


def test_a_variant_of_the_trained_stage_alone(run_prior, run_decoder, kandinsky, tmp_path):
    for run, cls, folder in zip(
        (run_prior, run_decoder), (KandinskyV22PriorPipeline, KandinskyV22Pipeline), kandinsky
    ):
        base = tmp_path / run.script
        cls.from_pretrained(folder).to(torch.float16).save_pretrained(base, variant="fp16")
        flags = [run.models[0 if run is run_prior else 2], base, "--variant", "fp16"]
        assert run(tmp_path / f"{run.script}-out", *flags, *PROMPTS[False], *FEW_STEPS) == 0


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_validation_images(any_script, tmp_path, precision):
    """Both stages draw, from the same noise each time: where nothing is learned the images do not change."""
    flags = [
        *PROMPTS["lora" in any_script.script],
        *FEW_STEPS,
        "--validation_steps",
        "3",
        "--mixed_precision",
        precision,
    ]
    any_script(tmp_path / "learns", *flags, *LARGE)
    any_script(tmp_path / "stays", *flags, "--learning_rate", "0", "--adam_weight_decay", "0")

    def grid(name, step):
        return np.asarray(Image.open(tmp_path / name / f"validation/step-{step:06d}.png").crop((0, 40, 560, 300)))

    assert not np.array_equal(grid("learns", 3), grid("learns", 6))
    np.testing.assert_array_equal(grid("stays", 3), grid("stays", 6))
    if precision == "no":
        any_script(tmp_path / "unseen", *LARGE)
        assert result_bytes(tmp_path / "unseen") == result_bytes(tmp_path / "learns")


def test_what_is_uploaded(any_script, tmp_path, monkeypatch):
    import fnmatch

    import huggingface_hub

    seen = {}
    monkeypatch.setattr(huggingface_hub, "create_repo", lambda name, **_: type("", (), {"repo_id": name}))
    monkeypatch.setattr(huggingface_hub, "upload_folder", lambda **options: seen.update(options))
    out = tmp_path / "out"
    flags = ["--push_to_hub", "--hub_model_id", "me/model", "--checkpointing_steps", "3", "--report_to", "tensorboard"]
    any_script(out, *flags, *PROMPTS["lora" in any_script.script], *FEW_STEPS)
    files = [path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()]
    sent = {name for name in files if any(fnmatch.fnmatch(name, pattern) for pattern in seen["allow_patterns"])}
    left = {name for name in files if name.startswith(("checkpoint-", "logs/", "run.yaml", "metrics.jsonl"))}
    assert sent == set(files) - left and left
    card = (out / "README.md").read_text()
    assert "kandinsky" in card and "me/model" in card and not any(folder in card for folder in any_script.base)


def test_the_card_of_a_decoder_names_its_prior(tmp_path):
    """diffusers assembles both stages from a decoder's id by that entry; a folder of this machine would be no use."""
    from huggingface_hub import ModelCard

    known = dict.fromkeys((field.name for field in dataclasses.fields(RunFacts)), None) | {"settings": {}}
    facts = dict(
        repository=None, base_model="a/decoder", data=None, tags=[], facts=RunFacts(**known), step=1, usage=""
    )
    write_card(tmp_path, **facts, prior="kandinsky-community/kandinsky-2-2-prior")
    assert ModelCard.load(tmp_path / "README.md").data.prior == ["kandinsky-community/kandinsky-2-2-prior"]
    write_card(tmp_path, **facts, prior=str(tmp_path))
    assert "prior" not in (tmp_path / "README.md").read_text()


# --- what a user can get wrong ---------------------------------------------------------------------------------------


def test_the_wrong_folder(any_script, kandinsky, sd, tmp_path):
    swapped = ["--pretrained_prior_model_name_or_path", kandinsky[1]]
    swapped += ["--pretrained_decoder_model_name_or_path", kandinsky[0]]
    sentence, code = any_script.fails(tmp_path, *swapped)
    assert "is for KandinskyV22" in sentence and code == 2
    sentence, code = any_script.fails(tmp_path, *any_script.models[:1], sd, any_script.models[2], sd)
    assert "is for StableDiffusionPipeline" in sentence and code == 2


def test_a_prior_without_its_normalisation(run_prior, run_lora_prior, kandinsky, tmp_path):
    shutil.copytree(kandinsky[0], tmp_path / "prior")
    weights = tmp_path / "prior" / "prior" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(weights) | {"clip_std": torch.zeros(1, 16)}, weights)
    for run in (run_prior, run_lora_prior):
        sentence, code = run.fails(tmp_path / "out", "--pretrained_prior_model_name_or_path", tmp_path / "prior")
        assert "clip_std" in sentence and code == 2


def test_a_prior_that_predicts_noise(run_prior, kandinsky, tmp_path):
    shutil.copytree(kandinsky[0], tmp_path / "prior")
    config = tmp_path / "prior" / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace('"sample"', '"epsilon"'))
    sentence, code = run_prior.fails(tmp_path / "out", "--pretrained_prior_model_name_or_path", tmp_path / "prior")
    assert "predicts 'epsilon'" in sentence and code == 2


def test_a_decoder_for_another_task(any_script, kandinsky, tmp_path):
    """An inpainting decoder's UNet takes the mask and the masked image as well."""
    pipeline = KandinskyV22Pipeline.from_pretrained(kandinsky[1])
    unet = UNet2DConditionModel.from_config(dict(pipeline.unet.config) | {"in_channels": 9})
    pipeline.register_modules(unet=unet)
    pipeline.save_pretrained(tmp_path / "decoder")
    flags = ["--pretrained_decoder_model_name_or_path", tmp_path / "decoder", *PROMPTS["lora" in any_script.script]]
    sentence, code = any_script.fails(tmp_path / "out", *flags)
    assert "takes 9 channels, and its latents have 4" in sentence and code == 2


def test_a_decoder_without_a_scheduler(any_script, kandinsky, tmp_path):
    shutil.copytree(kandinsky[1], tmp_path / "decoder")
    shutil.rmtree(tmp_path / "decoder" / "scheduler")
    flags = ["--pretrained_decoder_model_name_or_path", tmp_path / "decoder", *PROMPTS["lora" in any_script.script]]
    sentence, code = any_script.fails(tmp_path / "out", *flags)
    assert "part 'scheduler'" in sentence or "no part 'scheduler'" in sentence
    assert code == 2


def test_one_stage_does_not_overwrite_the_other(run_prior, run_decoder, run_lora_prior, run_lora_decoder, tmp_path):
    """Both stages' scripts have the same default --output_dir, and an adapter file or an index has one name."""
    for one, two in ((run_prior, run_decoder), (run_lora_prior, run_lora_decoder)):
        out = tmp_path / one.script
        one(out, "--max_train_steps", "1")
        before = result_bytes(out)
        sentence, code = two.fails(out, "--max_train_steps", "1")
        assert "holds the result of another run" in sentence and code == 2
        one(out, "--max_train_steps", "2")
        assert result_bytes(out) != before


def test_a_checkpoint_of_the_original_prior_script_continues(run_prior, kandinsky, tmp_path, capsys):
    """Its Adam holds every parameter, the two statistics too, which never get a gradient."""
    prior = KandinskyV22PriorPipeline.from_pretrained(kandinsky[0]).prior
    optimizer = torch.optim.AdamW(prior.parameters(), lr=1e-3)
    prior.proj_in.weight.sum().backward()
    optimizer.step()
    folder = tmp_path / "checkpoint-2"
    prior.save_pretrained(folder / "prior")
    torch.save(optimizer.state_dict(), folder / "optimizer.bin")
    assert run_prior(tmp_path, "--resume_from_checkpoint", "latest", "--adam_weight_decay", "0.5") == 0
    assert "was not made by this suite" in capsys.readouterr().err
    stock, trained = (
        load_file(f"{base}/prior/diffusion_pytorch_model.safetensors") for base in (kandinsky[0], tmp_path)
    )
    assert torch.equal(stock["clip_mean"], trained["clip_mean"]) and torch.equal(
        stock["clip_std"], trained["clip_std"]
    )


def test_a_resolution_that_the_decoder_cannot_halve():
    """Three halvings by MOVQ and three by the UNet, as in the released decoder."""
    four_levels = SimpleNamespace(config=SimpleNamespace(block_out_channels=(1,) * 4, latent_channels=4))
    latents = latent_shape
    assert latents(four_levels, four_levels, resolution=768) == (4, 8)
    with pytest.raises(UserError, match="--resolution 776 is not a multiple of 64, the decoder's; try 768"):
        latents(four_levels, four_levels, resolution=776)
    with pytest.raises(UserError, match="--bucket_reso_steps 96 is not a multiple of 64"):
        latents(four_levels, four_levels, resolution=768, bucket_reso_steps=96)


@pytest.mark.parametrize("name", [name.replace("run", "train_text_to_image") for name in KANDINSKY])
def test_no_device_is_named(name):
    """They run wherever torch does."""
    import inspect

    source = inspect.getsource(importlib.import_module(name))
    assert "cuda" not in source.lower()
