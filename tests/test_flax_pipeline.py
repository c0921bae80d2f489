"""FlaxStableDiffusionPipeline draws what torch's pipeline draws, saves what both load, and runs where no torch is."""

import contextlib
import fnmatch
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import flax_tiny
import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import ROOT
from diffusers import DDIMScheduler, EulerDiscreteScheduler, StableDiffusionPipeline
from flax_tiny import normal, relative_error
from make_base import build_tokenizer
from tiny import build_sd, build_sdxl

from flax_diffusion import (
    FlaxDDIMScheduler,
    FlaxDDPMScheduler,
    FlaxStableDiffusionPipeline,
    ModelError,
    pipeline,
)
from flax_diffusion.weight_files import MSGPACK, STEMS
from flax_diffusion.weights import load_part

PROMPTS = ["a handwritten one", "a handwritten two, and then more of it"]
STEPS = 5
LATENTS = normal(2, 4, 8, 8)


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Each of these images is drawn once or twice, so what takes time is XLA's optimization."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "_on_one_device", flax_tiny.compiled(pipeline._generate, static_argnums=0))
        yield


@pytest.fixture(scope="module")
def loaded(sd):
    return FlaxStableDiffusionPipeline.from_pretrained(sd)


def draw(loaded, prompts=PROMPTS, **options):
    """Images of `prompts` from the first LATENTS, (prompts, H, W, 3)."""
    pipe, params = loaded
    options = dict(num_inference_steps=STEPS, guidance_scale=5.0, latents=LATENTS[: len(prompts)]) | options
    return np.asarray(pipe(pipe.prepare_inputs(prompts), params, jax.random.key(0), **options).images)


def draw_in_torch(folder, prompts=PROMPTS, scheduler=None, **options):
    """The same in torch, with the folder's own scheduler or another."""
    parts = {"safety_checker": None} | ({"scheduler": scheduler} if scheduler else {})
    pipe = StableDiffusionPipeline.from_pretrained(folder, use_safetensors=True, **parts)
    pipe.set_progress_bar_config(disable=True)
    options = dict(num_inference_steps=STEPS, guidance_scale=5.0, latents=LATENTS[: len(prompts)]) | options
    options["latents"] = torch.from_numpy(options["latents"])
    return pipe(prompts, output_type="np", **options).images


def with_scheduler(loaded, scheduler):
    pipe, params = loaded
    return FlaxStableDiffusionPipeline(pipe.vae, pipe.text_encoder, pipe.tokenizer, pipe.unet, scheduler), params


@contextlib.contextmanager
def compilations():
    """A list that gets the durations of what is compiled meanwhile, or fetched from the persistent cache."""
    durations = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            durations.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield durations
    jax.monitoring.unregister_event_duration_listener(listen)


# ---------------------------------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------------------------------


def test_a_image_is_torchs(loaded, sd):
    image = draw(loaded)
    assert image.shape == (2, 16, 16, 3) and image.dtype == np.float32
    assert image.min() >= 0 and image.max() <= 1 and image.std() > 0.05
    assert relative_error(image, draw_in_torch(sd)) < 1e-4  # PNDM, as the folder says


def test_a_image_of_ddim_is_torchs(loaded, sd):
    """The defaults of DDIM clip x0, which neither pipeline does to latents."""
    config = dict(loaded[0].scheduler.config)
    image = draw(with_scheduler(loaded, FlaxDDIMScheduler.from_config(config)))
    assert relative_error(image, draw_in_torch(sd, scheduler=DDIMScheduler.from_config(config))) < 1e-4


def test_a_image_of_the_second_kind_is_torchs(tmp_path):
    """v-prediction, gelu, linear projections, heads of each block; a negative prompt and a wide image."""
    folder = build_sd(tmp_path / "sd", prediction_type="v_prediction")
    flax_tiny.torch_unet("2.x", cross_attention_dim=16).save_pretrained(tmp_path / "sd" / "unet")
    flax_tiny.torch_text_encoder("2.x", len(build_tokenizer())).save_pretrained(tmp_path / "sd" / "text_encoder")
    loaded = FlaxStableDiffusionPipeline.from_pretrained(folder)
    options = dict(prompts=PROMPTS[:1], height=8, width=24, latents=normal(1, 4, 4, 12))
    image = draw(loaded, neg_prompt_ids=loaded[0].prepare_inputs("a zero"), **options)
    assert image.shape == (1, 8, 24, 3)
    assert relative_error(image, draw_in_torch(folder, negative_prompt=["a zero"], **options)) < 1e-4


def test_guidance(loaded, sd):
    """1 or less is none, as in torch; one scale a prompt; and another scale, prompt or pipeline compiles nothing."""
    plain = draw(loaded, guidance_scale=1.0)
    assert relative_error(plain, draw_in_torch(sd, guidance_scale=1.0)) < 1e-4
    with compilations() as compiled:
        np.testing.assert_array_equal(draw(loaded, guidance_scale=0), plain)
        mixed = draw(with_scheduler(loaded, loaded[0].scheduler), guidance_scale=np.array([5.0, 1.0]))
        np.testing.assert_allclose(mixed, [draw(loaded)[0], plain[1]], atol=1e-6)
        assert np.abs(draw(loaded, prompts=["a handwritten six", ""], guidance_scale=3) - plain).max() > 1e-3
    assert compiled == []


def test_the_key_draws_the_noise(loaded):
    """Also that which DDPM adds at each step."""
    pipe, params = with_scheduler(loaded, FlaxDDPMScheduler.from_config(loaded[0].scheduler.config))
    ids = pipe.prepare_inputs(PROMPTS)
    call = lambda key, latents: np.asarray(pipe(ids, params, jax.random.key(key), STEPS, latents=latents).images)  # noqa: E731
    images = [call(key, latents) for latents in (None, LATENTS) for key in (1, 1, 2)]
    assert np.isfinite(images).all()
    for first, again, other in (images[:3], images[3:]):
        np.testing.assert_array_equal(first, again)
        assert np.abs(first - other).max() > 1e-3


def test_half_precision_draws_nearly_the_same(sd, loaded):
    image = draw(FlaxStableDiffusionPipeline.from_pretrained(sd, dtype=jnp.bfloat16))
    assert 1e-5 < np.abs(image - draw(loaded)).max() < 0.1


def test_numpy_to_pil():
    images = np.zeros((4, 2, 8, 16, 3))
    images[..., 0], images[3, 1, ..., 1] = 1, 0.5
    converted = FlaxStableDiffusionPipeline.numpy_to_pil(images)
    assert len(converted) == 8 and converted[0].size == (16, 8)
    assert converted[0].getpixel((0, 0)) == (255, 0, 0) and converted[7].getpixel((5, 5)) == (255, 128, 0)
    assert len(FlaxStableDiffusionPipeline.numpy_to_pil(images[0, 0])) == 1


def test_prepare_inputs(loaded):
    pipe, _ = loaded
    ids = pipe.prepare_inputs(["one", "a very long prompt " * 20])
    assert ids.shape == (2, 16) and ids.dtype == np.int32
    np.testing.assert_array_equal(ids[0], pipe.prepare_inputs("one")[0])
    tokens = pipe.tokenizer("one", max_length=16, padding="max_length", truncation=True).input_ids
    assert ids[0].tolist() == tokens
    with pytest.raises(ValueError, match="string"):
        pipe.prepare_inputs([1])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(height=15), "multiples of 2, not 15 and 16"),
        (dict(latents=LATENTS[:1]), r"latents have shape \(1, 4, 8, 8\), not \(2, 4, 8, 8\)"),
        (dict(jit=True), "shard"),
        (dict(num_inference_steps=2000), "2000 steps"),
    ],
)
def test_inputs_that_do_not_fit(loaded, options, words):
    with pytest.raises(ValueError, match=words):
        draw(loaded, **options)


def test_params_must_be_replicated_with_jit_and_only_then(loaded):
    pipe, params = loaded
    ids, replicated = pipe.prepare_inputs(PROMPTS), jax.tree.map(lambda array: array[None], params)
    with pytest.raises(ValueError, match="must be replicated"):
        pipe(ids[None], params, jax.random.split(jax.random.key(0), 1), jit=True)
    with pytest.raises(ValueError, match="must not be replicated"):
        pipe(ids, replicated, jax.random.key(0))


# ---------------------------------------------------------------------------------------------------------------------
# Where there are several devices and no torch
# ---------------------------------------------------------------------------------------------------------------------

SNIPPET = """
import json, sys
for name in ("torch", "diffusers", "accelerate"):
    sys.modules[name] = None  # as if they were not installed

import jax
import numpy as np
from flax.jax_utils import replicate
from flax.training.common_utils import shard

from flax_diffusion import FlaxStableDiffusionPipeline

pipeline, params = FlaxStableDiffusionPipeline.from_pretrained(sys.argv[1], revision="flax", from_pt=True)
prompts = ["a handwritten one"] * jax.device_count()
prompt_ids = shard(pipeline.prepare_inputs(prompts))
p_params = replicate(params)
prng_seed = jax.random.split(jax.random.PRNGKey(0), jax.device_count())
images = pipeline(prompt_ids, p_params, prng_seed, 5, jit=True).images
events = []
jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: events.append(event))
other = pipeline(prompt_ids, p_params, prng_seed, 5, guidance_scale=2.0, jit=True)[0]
compiled = sum("backend_compile" in event for event in events)
pil_images = pipeline.numpy_to_pil(np.asarray(images.reshape((images.shape[0],) + images.shape[-3:])))

one_by_one = [pipeline(prompt_ids[at], params, prng_seed[at], 5).images for at in range(jax.device_count())]
print(json.dumps({
    "devices": len(images.sharding.device_set),
    "shape": images.shape,
    "images": len(pil_images),
    "error": float(abs(np.asarray(images) - np.asarray(one_by_one)).max()),
    "spread": float(np.asarray(images).std(axis=0).max()),
    "guidance": float(abs(np.asarray(images) - np.asarray(other)).max()),
    "compiled": compiled,
    "torch": [name for name in ("torch", "diffusers", "accelerate") if sys.modules[name]],
}))
"""


def test_the_well_known_snippet_on_four_devices_without_torch(sd):
    """As it stands in many a notebook, with one changed import."""
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": flax_tiny.COMPILED,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
    }
    command = [sys.executable, "-W", "error::UserWarning", "-c", SNIPPET, sd]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    result = json.loads(ended.stdout.splitlines()[-1])
    assert result["devices"] == 4 and result["shape"] == [4, 1, 16, 16, 3] and result["images"] == 4
    assert result["error"] < 1e-5
    assert result["spread"] > 1e-3 and result["guidance"] > 1e-3
    assert result["compiled"] == 0
    assert result["torch"] == []


# ---------------------------------------------------------------------------------------------------------------------
# Folders
# ---------------------------------------------------------------------------------------------------------------------


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def trained(params):
    """`params` with a UNet that has learned something."""
    return params | {"unet": jax.tree.map(lambda array: array * np.float32(1.05), params["unet"])}


def test_what_is_saved_draws_the_same_in_torch_and_here(sd, loaded, tmp_path):
    pipe, params = loaded
    params = trained(params)
    pipe.save_pretrained(tmp_path, params)
    before, after = files(sd), files(tmp_path)
    assert before.keys() == after.keys()
    changed = {name for name in before if before[name] != after[name]}
    configs = {"model_index.json", "scheduler/scheduler_config.json", "unet/config.json"}
    assert changed - configs == {"unet/diffusion_pytorch_model.safetensors"}
    image = draw((pipe, params))
    assert relative_error(image, draw(loaded)) > 1e-3
    assert relative_error(image, draw_in_torch(tmp_path)) < 1e-4
    np.testing.assert_array_equal(image, draw(FlaxStableDiffusionPipeline.from_pretrained(tmp_path)))


def test_frozen_parts_keep_their_precision_and_their_bytes(sd, tmp_path):
    """The files of a variant come out under the plain name, since the folder has one precision a part."""
    halves = StableDiffusionPipeline.from_pretrained(sd, dtype=torch.float16)
    halves.save_pretrained(tmp_path / "base", variant="fp16")
    (tmp_path / "base" / "tokenizer" / "vocab.json").write_text("{}")  # of an older release, and not read here
    pipe, params = FlaxStableDiffusionPipeline.from_pretrained(tmp_path / "base", variant="fp16")
    pipe.save_pretrained(tmp_path / "out", trained(params))
    before, after = files(tmp_path / "base"), files(tmp_path / "out")
    for name in ("vae/diffusion_pytorch_model", "text_encoder/model"):
        assert after[f"{name}.safetensors"] == before[f"{name}.fp16.safetensors"]
    assert "tokenizer/vocab.json" in after
    unet = StableDiffusionPipeline.from_pretrained(tmp_path / "out", dtype="auto").unet
    assert unet.dtype == torch.float32
    assert draw(FlaxStableDiffusionPipeline.from_pretrained(tmp_path / "out")).std() > 0.05


def test_a_pipeline_of_parts_is_saved_too(sd, loaded, tmp_path):
    """Without a folder to copy from, with a scheduler of one's own."""
    config = loaded[0].scheduler.config
    pipe, params = with_scheduler(loaded, FlaxDDIMScheduler.from_config(config, timestep_spacing="trailing"))
    pipe.save_pretrained(tmp_path, params)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "DDIMScheduler"]
    assert relative_error(draw((pipe, params)), draw_in_torch(tmp_path)) < 1e-4
    again, _ = FlaxStableDiffusionPipeline.from_pretrained(tmp_path)
    assert type(again.scheduler) is FlaxDDIMScheduler and again.scheduler.config.clip_sample is False


def test_a_pipeline_may_be_saved_where_it_came_from(sd, tmp_path):
    folder = shutil.copytree(sd, tmp_path / "sd")
    before = files(folder)
    pipe, params = FlaxStableDiffusionPipeline.from_pretrained(folder)
    pipe.save_pretrained(folder, trained(params))
    changed = {name for name, content in files(folder).items() if content != before[name]}
    assert {name for name in changed if name.endswith("safetensors")} == {"unet/diffusion_pytorch_model.safetensors"}
    assert load_part(folder, "unet")[1]["conv_in"]["bias"] == pytest.approx(params["unet"]["conv_in"]["bias"] * 1.05)


def test_another_sampler_stays_the_folders_own(sd, tmp_path):
    folder = Path(build_sd(tmp_path / "sd"))
    StableDiffusionPipeline.from_pretrained(folder)
    config = EulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
    config.save_pretrained(folder / "scheduler")
    with pytest.warns(UserWarning, match="no EulerDiscreteScheduler here: images are drawn with DDIM"):
        pipe, params = FlaxStableDiffusionPipeline.from_pretrained(folder)
    pipe.save_pretrained(tmp_path / "out", params)
    assert type(StableDiffusionPipeline.from_pretrained(tmp_path / "out").scheduler) is EulerDiscreteScheduler


def test_from_the_hub_come_no_pickles_and_nothing_that_is_not_read(sd, tmp_path, monkeypatch):
    """A stand-in for the hub, with every file that such a repository may hold."""
    hub = shutil.copytree(sd, tmp_path / "hub")
    for part, stem in STEMS.items():
        for name in (f"{stem}.bin", f"{stem}.non_ema.safetensors", f"{MSGPACK[part]}.msgpack"):
            (hub / part / name).write_bytes(b"")
        shutil.copyfile(hub / part / f"{stem}.safetensors", hub / part / f"{stem}.fp16.safetensors")
    (hub / "safety_checker").mkdir()
    (hub / "safety_checker" / "model.safetensors").write_bytes(b"")
    (hub / "v1-5-pruned.ckpt").write_bytes(b"")
    asked = []

    def download(name, revision=None, cache_dir=None, allow_patterns=None):
        asked.append((name, revision))
        for path in hub.rglob("*"):
            inside = str(path.relative_to(hub))
            if path.is_file() and any(fnmatch.fnmatch(inside, pattern) for pattern in allow_patterns):
                (Path(cache_dir) / inside).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, Path(cache_dir) / inside)
        return str(cache_dir)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    FlaxStableDiffusionPipeline.from_pretrained("some/model", revision="main", cache_dir=tmp_path / "plain")
    assert files(tmp_path / "plain").keys() == files(sd).keys()
    assert set(asked) == {("some/model", "main")}
    FlaxStableDiffusionPipeline.from_pretrained("some/model", variant="fp16", cache_dir=tmp_path / "half")
    assert {Path(name).name for name in files(tmp_path / "half") if name.startswith("unet")} == {
        "config.json",
        "diffusion_pytorch_model.fp16.safetensors",
    }
    for path in hub.rglob("*.safetensors"):
        path.unlink()
    old = files(pipeline.fetch("some/model", revision="flax", cache_dir=tmp_path / "old"))  # as they once were
    assert sorted(Path(name).suffix for name in old if not name.endswith(".json")) == [".msgpack"] * 3


def test_models_that_cannot_be_used_are_named(sd, tmp_path, monkeypatch):
    with pytest.raises(ModelError, match="model no/such is neither a folder nor found on the hub"):
        FlaxStableDiffusionPipeline.from_pretrained("no/such")
    with pytest.raises(ModelError, match="unet.*addition_embed_type"):
        FlaxStableDiffusionPipeline.from_pretrained(build_sdxl(tmp_path / "xl"))
    base = shutil.copytree(sd, tmp_path / "base")
    shutil.rmtree(base / "tokenizer")
    with pytest.raises(ModelError, match="tokenizer: .*no folder of that name"):
        FlaxStableDiffusionPipeline.from_pretrained(base)
    flax_tiny.torch_unet("1.x", in_channels=9, cross_attention_dim=16).save_pretrained(base / "unet")
    shutil.copytree(Path(sd) / "tokenizer", base / "tokenizer")
    with pytest.raises(ModelError, match="unet: it takes 9 channels"):  # inpainting
        FlaxStableDiffusionPipeline.from_pretrained(base)
    flax_tiny.torch_unet("1.x").save_pretrained(base / "unet")
    with pytest.raises(ModelError, match="text states of width 12, the text encoder's have 16"):
        FlaxStableDiffusionPipeline.from_pretrained(base)
