"""The Flax networks and noise schedules are those of torch, and read what others wrote, now and years ago."""

import itertools
import json
import shutil

import flax.linen as nn
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, PNDMScheduler, UNet2DConditionModel
from flax import serialization
from flax.traverse_util import flatten_dict, unflatten_dict
from flax_tiny import compiled, in_jax, normal, relative_error, torch_text_encoder, torch_unet, torch_vae
from safetensors.numpy import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from flax_diffusion import (
    FlaxAutoencoderKL,
    FlaxCLIPTextModel,
    FlaxDDIMScheduler,
    FlaxDDPMScheduler,
    FlaxPNDMScheduler,
    FlaxUNet2DConditionModel,
    ModelError,
    schedulers,
    trajectory,
)
from flax_diffusion.layers import convolve
from flax_diffusion.networks import PARTS
from flax_diffusion.tensor_names import tensor_shapes, to_tensors
from flax_diffusion.weights import load_part, save_part

TOLERANCE = 1e-4

# ---------------------------------------------------------------------------------------------------------------------
# Networks
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["1.x", "2.x"])
def test_text_encoder(kind, tmp_path):
    network = torch_text_encoder(kind)
    module, params = in_jax(network, "text_encoder", tmp_path)
    ids = np.random.default_rng(0).integers(0, 100, (2, 16))
    with torch.no_grad():
        expected = network(torch.from_numpy(ids)).last_hidden_state
    got = compiled(lambda params: module.apply({"params": params}, ids))(params)
    assert relative_error(got, expected) < TOLERANCE


@pytest.mark.parametrize("kind", ["1.x", "plain"])
def test_autoencoder(kind, tmp_path):
    network = torch_vae(kind)
    module, params = in_jax(network, "vae", tmp_path)
    pixels, latents = normal(2, 3, 16, 24), normal(2, 4, 4, 6)
    with torch.no_grad():
        moments = network.encode(torch.from_numpy(pixels)).latent_dist
        image = network.decode(torch.from_numpy(latents)).sample

    @compiled
    def both(params):
        encoded = module.apply({"params": params}, pixels, method="encode")
        return *encoded, module.apply({"params": params}, latents, method="decode")

    for got, expected in zip(both(params), (moments.mean, moments.std, image)):
        assert relative_error(got, expected) < TOLERANCE


def unet_inputs(height, width):
    """Noisy latents, timesteps, text states and a target."""
    timesteps = np.array([3, 981], dtype=np.int32)
    return normal(2, 4, height, width), timesteps, normal(2, 5, 12, seed=1), normal(2, 4, height, width, seed=2)


def prediction_and_gradients(module, params, inputs):
    """The prediction and the gradients of its mean squared error, by their names in a safetensors file."""
    *inputs, target = inputs

    def loss(params):
        prediction = module.apply({"params": params}, *inputs)
        return ((prediction - target) ** 2).mean(), prediction

    gradients, prediction = compiled(jax.grad(loss, has_aux=True))(params)
    return prediction, to_tensors(module, jax.tree.map(np.asarray, gradients))


SIDES = {"1.x": (8, 8), "2.x": (7, 9)}  # odd ones, so that what is enlarged must be cut to what it is joined with


@pytest.fixture(scope="module", params=["1.x", "2.x"])
def unet(request, tmp_path_factory):
    """A torch UNet, the same in JAX and its parameters, inputs, and what JAX makes of them; the second kind with
    gradient checkpointing, which must not change a number."""
    network = torch_unet(request.param)
    module, params = in_jax(network, "unet", tmp_path_factory.mktemp("unet"))
    module = module.clone(gradient_checkpointing=request.param == "2.x")
    inputs = unet_inputs(*SIDES[request.param])
    return network, module, params, inputs, prediction_and_gradients(module, params, inputs)


def test_unet_and_every_gradient(unet):
    network, _, _, inputs, (prediction, gradients) = unet
    *arguments, target = map(torch.from_numpy, inputs)
    expected = network(*arguments).sample
    network.zero_grad()
    (expected - target).square().mean().backward()
    assert relative_error(prediction, expected.detach()) < TOLERANCE
    assert gradients.keys() == dict(network.named_parameters()).keys()
    errors = {name: relative_error(gradients[name], p.grad) for name, p in network.named_parameters()}
    assert max(errors.values()) < TOLERANCE, max(errors, key=errors.get)


@pytest.mark.parametrize("unet", ["2.x"], indirect=True)
def test_gradient_checkpointing(unet):
    """Each residual and transformer block is computed again, and nothing is where it is not asked for."""
    _, module, params, inputs, (prediction, _) = unet
    plain = module.clone(gradient_checkpointing=False)
    programs = [
        str(jax.make_jaxpr(lambda params: network.apply({"params": params}, *inputs[:3]))(params))  # noqa: B023
        for network in (module, plain)
    ]
    assert [program.count("remat") for program in programs] == [8 + 4, 0]
    again = compiled(lambda params: plain.apply({"params": params}, *inputs[:3]))(params)
    assert relative_error(again, prediction) < 1e-5


@pytest.mark.parametrize(
    ("part", "network"),
    [
        ("unet", torch_unet("1.x")),
        ("unet", torch_unet("2.x", norm_eps=1e-4)),
        ("vae", torch_vae("1.x")),
        ("text_encoder", torch_text_encoder("1.x")),
    ],
)
def test_norms_have_torchs_epsilon(part, network):
    """Which shows in the numbers only where activations are tiny."""
    module = PARTS[part].from_config(network.config.to_dict() if part == "text_encoder" else network.config)
    got = {}

    def note(call, args, kwargs, context):
        if isinstance(context.module, nn.GroupNorm | nn.LayerNorm):
            got[".".join(context.module.path)] = context.module.epsilon
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        arguments = [jnp.zeros(shape, kind) for shape, kind in module.example()]
        jax.eval_shape(lambda: module.init(jax.random.key(0), *arguments))
    norms = (torch.nn.GroupNorm, torch.nn.LayerNorm)
    assert got == {name: norm.eps for name, norm in network.named_modules() if isinstance(norm, norms)}


# Of Stable Diffusion 2.1; settings that are not here are the defaults of both libraries.
FULL_SIZE = [
    (
        FlaxUNet2DConditionModel,
        UNet2DConditionModel,
        dict(cross_attention_dim=1024, attention_head_dim=[5, 10, 20, 20], use_linear_projection=True),
    ),
    (
        FlaxAutoencoderKL,
        AutoencoderKL,
        dict(
            block_out_channels=[128, 256, 512, 512],
            layers_per_block=2,
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
        ),
    ),
    (
        FlaxCLIPTextModel,
        CLIPTextModel,
        dict(hidden_size=1024, intermediate_size=4096, num_attention_heads=16, num_hidden_layers=23),
    ),
]


@pytest.mark.parametrize(("ours", "theirs", "config"), FULL_SIZE)
def test_networks_of_full_size_have_torchs_parameters(ours, theirs, config):
    """Names and shapes; nothing of that size is computed."""
    with torch.device("meta"):
        network = CLIPTextModel(CLIPTextConfig(**config)) if theirs is CLIPTextModel else theirs(**config)
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    assert tensor_shapes(ours.from_config(config)) == expected


def operand_types(jaxpr, types=None):
    """The types of the first operand of each primitive in a traced function, {primitive: set of type names}."""
    types = {} if types is None else types
    for equation in jaxpr.eqns:
        if equation.invars:
            types.setdefault(str(equation.primitive), set()).add(str(equation.invars[0].aval.dtype))
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            operand_types(inner, types)
    return types


@pytest.mark.parametrize("unet", ["1.x"], indirect=True)
def test_half_precision(unet):
    """bf16 except for softmax, the statistics of norms and the timestep, whose parameters stay float32."""
    _, module, params, inputs, (prediction, _) = unet
    half = FlaxUNet2DConditionModel(module.config, dtype=jnp.bfloat16)

    def call(params):
        return half.apply({"params": params}, *inputs[:3])

    got = compiled(call)(params)
    assert got.dtype == jnp.bfloat16
    assert 1e-4 < relative_error(got, prediction) < 5e-2
    types = operand_types(jax.make_jaxpr(call)(params).jaxpr)
    assert types["conv_general_dilated"] == {"bfloat16"}
    assert types["exp"] == types["rsqrt"] == types["sin"] == types["cos"] == {"float32"}
    assert types["dot_general"] == {"bfloat16", "float32"}


UNET_REFUSALS = [
    ("down_block_types", ["AttnDownBlock2D", "DownBlock2D"]),
    ("up_block_types", ["UpBlock2D", "SimpleCrossAttnUpBlock2D"]),
    ("down_block_types", ["DownBlock2D"]),
    ("mid_block_type", "UNetMidBlock2DSimpleCrossAttn"),
    ("addition_embed_type", "text_time"),
    ("class_embed_type", "timestep"),
    ("num_class_embeds", 1000),
    ("encoder_hid_dim", 1280),
    ("resnet_time_scale_shift", "scale_shift"),
    ("num_attention_heads", 4),
    ("only_cross_attention", True),
    ("transformer_layers_per_block", [1, [1, 2]]),
    ("attention_type", "gated"),
    ("attention_head_dim", 3),
    ("attention_head_dim", [2, 2, 2]),
    ("norm_num_groups", None),
    ("time_cond_proj_dim", 256),
    ("act_fn", "gelu"),
    ("dropout", 0.1),
    ("a_setting_of_tomorrow", "on"),
]


@pytest.mark.parametrize(("name", "value"), UNET_REFUSALS)
def test_what_cannot_be_computed_is_refused(name, value):
    """In one sentence that names the part and the setting, before a weight is read."""
    config = dict(torch_unet("1.x").config)
    FlaxUNet2DConditionModel.from_config(config)
    with pytest.raises(ModelError) as caught:
        FlaxUNet2DConditionModel.from_config(config | {name: value})
    assert "unet" in str(caught.value) and name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (FlaxAutoencoderKL, "down_block_types", ["AttnDownEncoderBlock2D"]),
        (FlaxAutoencoderKL, "shift_factor", 0.1159),
        (FlaxAutoencoderKL, "layers_per_block", [1, 2]),
        (FlaxAutoencoderKL, "latents_mean", [0.0] * 4),
        (FlaxCLIPTextModel, "hidden_act", "gelu_new"),
        (FlaxCLIPTextModel, "use_attention_mask", True),
        (FlaxCLIPTextModel, "model_type", "t5"),
    ],
)
def test_other_parts_are_refused_too(kind, name, value):
    config = {"block_out_channels": [32]} if kind is FlaxAutoencoderKL else {}
    kind.from_config(config)
    with pytest.raises(ModelError, match=kind.part):
        kind.from_config(config | {name: value})


def test_a_config_is_read_like_a_dict_and_by_attributes():
    config = FlaxAutoencoderKL.from_config({"block_out_channels": [32]}).config
    assert config["scaling_factor"] == config.scaling_factor == 0.18215
    assert not hasattr(config, "no_such_setting")
    assert hash(config) == hash(FlaxAutoencoderKL.from_config({"block_out_channels": [32]}).config)


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------

MAKE = {"unet": torch_unet, "vae": torch_vae, "text_encoder": torch_text_encoder}
FILES = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A folder with the three parts as diffusers and transformers write them today."""
    folder = tmp_path_factory.mktemp("stored")
    for part, make in MAKE.items():
        make("1.x").save_pretrained(folder / part)
    return folder


@pytest.fixture
def copy(stored, tmp_path):
    return shutil.copytree(stored, tmp_path / "copy")


def same(params, expected):
    params, expected = flatten_dict(params), flatten_dict(expected)
    return params.keys() == expected.keys() and all(np.array_equal(params[path], expected[path]) for path in params)


def rewrite(folder, part, change):
    """Put `change({name: tensor})` in place of a part's tensors."""
    file = folder / part / f"{FILES[part]}.safetensors"
    save_file({name: np.ascontiguousarray(array) for name, array in change(load_file(file)).items()}, file)


@pytest.mark.parametrize(("part", "kind"), [("unet", UNet2DConditionModel), ("vae", AutoencoderKL)])
def test_what_is_written_is_what_diffusers_writes(stored, tmp_path, part, kind):
    module, params = load_part(stored, part)
    assert {array.dtype for array in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    save_part(tmp_path, part, params, module.config)
    ours, theirs = (kind.from_pretrained(folder / part) for folder in (tmp_path, stored))
    assert {**ours.config, "_name_or_path": ""} == {**theirs.config, "_name_or_path": ""}
    before, after = theirs.state_dict(), ours.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert same(load_part(tmp_path, part)[1], params)


def test_the_text_encoder_is_written_for_old_and_new_transformers(stored, tmp_path):
    module, params = load_part(stored, "text_encoder")
    save_part(tmp_path, "text_encoder", params, module.config)
    assert all(name.startswith("text_model.") for name in load_file(tmp_path / "text_encoder" / "model.safetensors"))
    ours, report = CLIPTextModel.from_pretrained(tmp_path / "text_encoder", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    before = CLIPTextModel.from_pretrained(stored / "text_encoder").state_dict()
    assert all(torch.equal(before[name], tensor) for name, tensor in ours.state_dict().items())


def older_clip(tensors):
    """As transformers 4 wrote it, here of a whole CLIP."""
    tensors = {f"text_model.{name}": array for name, array in tensors.items()}
    tensors["text_model.embeddings.position_ids"] = np.arange(16)[None]
    return tensors | {"logit_scale": np.ones(1, np.float32), "text_projection.weight": np.ones((4, 4), np.float32)}


def older_attention(tensors, convolutions=False):
    """As diffusers first named the autoencoder's attention; its projections were 1x1 convolutions in places."""
    changed = {}
    for name, array in tensors.items():
        if ".attentions." in name and ".to_" in name:
            for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
                name = name.replace(new, old)
            if convolutions and array.ndim == 2:
                array = array[:, :, None, None]
        changed[name] = array
    assert tensors.keys() != changed.keys()
    return changed


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("text_encoder", older_clip),
        ("vae", older_attention),
        ("vae", lambda tensors: older_attention(tensors, convolutions=True)),
    ],
)
def test_older_names_are_read(stored, copy, part, change):
    rewrite(copy, part, change)
    assert same(load_part(copy, part)[1], load_part(stored, part)[1])


def old_flax_tree(tensors, part):
    """The tree that diffusers' and transformers' Flax classes saved, from the tensors of a safetensors file."""
    tree = {}
    for name, array in (older_attention(tensors) if part == "vae" else tensors).items():
        *path, leaf = name.split(".")
        if leaf == "weight":
            leaf = {1: "scale", 2: "kernel", 4: "kernel"}[array.ndim]
            leaf = "embedding" if path[-1].endswith("embedding") and part == "text_encoder" else leaf
            if leaf == "kernel":
                array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
        if part == "text_encoder":  # layers were not joined with their number
            path = ["text_model", *path]
        else:
            path = ".".join(path).split(".")
            numbered = []
            for word in path:
                numbered[-1:] = [f"{numbered[-1]}_{word}"] if word.isdigit() else [*numbered[-1:], word]
            path = numbered
        tree[(*path, leaf)] = np.ascontiguousarray(array)
    return unflatten_dict(tree)


@pytest.mark.parametrize("part", list(MAKE))
def test_old_flax_folders_are_read(stored, copy, part):
    file = copy / part / f"{FILES[part]}.safetensors"
    old = old_flax_tree(load_file(file), part)
    file.unlink()
    name = "flax_model.msgpack" if part == "text_encoder" else "diffusion_flax_model.msgpack"
    (copy / part / name).write_bytes(serialization.msgpack_serialize(old))
    config = copy / part / "config.json"
    added = {"dtype": "float32", "use_memory_efficient_attention": False, "split_head_dim": False}
    config.write_text(json.dumps(json.loads(config.read_text()) | added))
    module, params = load_part(copy, part)
    assert same(params, load_part(stored, part)[1])
    save_part(copy / "new", part, params, module.config)
    assert "split_head_dim" not in json.loads((copy / "new" / part / "config.json").read_text())
    (copy / part / name).write_bytes(b"\x93no")
    with pytest.raises(ModelError, match=f"{part}: .* cannot be read"):
        load_part(copy, part)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_variants_and_stored_halves_become_float32(copy, dtype):
    torch_unet("1.x").to(dtype).save_pretrained(copy / "unet", variant="fp16")
    full, half = load_part(copy, "unet")[1], load_part(copy, "unet", variant="fp16")[1]
    assert not same(half, full)
    for one, other in zip(jax.tree.leaves(half), jax.tree.leaves(full)):
        assert one.dtype == np.float32
        np.testing.assert_allclose(one, other, rtol=1e-2)
    assert same(load_part(copy, "vae", variant="fp16")[1], load_part(copy, "vae")[1])  # a part without that variant
    (copy / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"unet.*only the variant.*fp16"):
        load_part(copy, "unet")


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_weights_in_several_files(stored, tmp_path, variant):
    torch_unet("1.x").save_pretrained(tmp_path / "unet", max_shard_size="50KB", variant=variant)
    assert len(list(tmp_path.glob("unet/*.safetensors"))) > 1
    assert same(load_part(tmp_path, "unet", variant=variant)[1], load_part(stored, "unet")[1])
    next(tmp_path.glob("unet/*00002-of*")).unlink()
    with pytest.raises(ModelError, match=r"unet.*00002-of.*not in"):
        load_part(tmp_path, "unet", variant=variant)


def without(name):
    return lambda tensors: {key: array for key, array in tensors.items() if key != name}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("conv_in.weight"), "unet: the weights hold no conv_in.weight"),
        (lambda tensors: tensors | {"conv_in.bias": np.ones(9, np.float32)}, r"conv_in.bias has shape \(9,\)"),
        (lambda tensors: tensors | {"add_embedding.bias": np.ones(9, np.float32)}, "hold add_embedding.bias"),
    ],
)
def test_weights_of_another_network_are_refused(copy, change, words):
    rewrite(copy, "unet", change)
    with pytest.raises(ModelError, match=words):
        load_part(copy, "unet")


def test_pickles_are_never_read(copy):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("unpickled",))

    (copy / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({"conv_in.weight": Bomb()}, copy / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(ModelError, match=r"unet: .*only pickled weights.*convert") as caught:
        load_part(copy, "unet")
    assert "\n" not in str(caught.value)


def test_broken_folders_are_named(copy):
    file = copy / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ModelError, match="unet: .*diffusion_pytorch_model.safetensors cannot be read"):
        load_part(copy, "unet")
    file.unlink()
    with pytest.raises(ModelError, match="unet: .*holds no diffusion_pytorch_model.safetensors"):
        load_part(copy, "unet")
    (copy / "vae" / "config.json").write_text("{")
    with pytest.raises(ModelError, match="vae: .*config.json is not valid JSON"):
        load_part(copy, "vae")
    shutil.rmtree(copy / "text_encoder")
    with pytest.raises(ModelError, match="text_encoder: .*has no config.json"):
        load_part(copy, "text_encoder")


def test_what_does_not_fit_is_not_written(stored, tmp_path):
    module, params = load_part(stored, "unet")
    with pytest.raises(ModelError, match="unreplicate"):
        save_part(tmp_path, "unet", jax.tree.map(lambda array: array[None], params), module.config)
    with pytest.raises(ModelError, match=r"conv_out\.bias is either missing"):
        save_part(tmp_path, "unet", params | {"conv_out": {"kernel": params["conv_out"]["kernel"]}}, module.config)
    assert not (tmp_path / "unet").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Noise schedules
# ---------------------------------------------------------------------------------------------------------------------

SD = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
OURS = {DDIMScheduler: FlaxDDIMScheduler, DDPMScheduler: FlaxDDPMScheduler, PNDMScheduler: FlaxPNDMScheduler}


@pytest.mark.parametrize(
    "config",
    [
        SD,
        SD | dict(rescale_betas_zero_snr=True),
        dict(beta_schedule="linear"),
        dict(beta_schedule="squaredcos_cap_v2"),
        dict(trained_betas=[0.1, 0.2, 0.3], num_train_timesteps=3),
    ],
)
def test_noise_and_velocity(config):
    ours, theirs = FlaxDDPMScheduler(**config), DDPMScheduler(**config)
    assert ours.alphas_cumprod.dtype == np.float32
    np.testing.assert_allclose(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=5e-5, atol=1e-9)
    last = len(ours.alphas_cumprod) - 1
    assert (ours.alphas_cumprod[last] == 0) == ours.config.rescale_betas_zero_snr
    x0, noise, steps = normal(4, 4, 2, 3), normal(4, 4, 2, 3, seed=1), np.array([0, 1, last // 2, last])
    for name in ("add_noise", "get_velocity"):
        got = jax.jit(getattr(ours, name))(x0, noise, steps)
        expected = getattr(theirs, name)(*map(torch.from_numpy, (x0, noise, steps)))
        assert relative_error(got, expected) < TOLERANCE
        mixed = getattr(ours, name)(x0.astype(jnp.bfloat16), noise.astype(jnp.bfloat16), steps)
        assert mixed.dtype == jnp.float32


def trajectories():
    """Every sampler with every setting that changes its steps."""
    for kind, spacing in itertools.product(("epsilon", "v_prediction"), ("leading", "trailing", "linspace")):
        config = SD | dict(prediction_type=kind, timestep_spacing=spacing, steps_offset=1)
        yield DDIMScheduler, config | dict(clip_sample=False, set_alpha_to_one=False)
        yield DDIMScheduler, config | dict(clip_sample=True, steps_offset=0)
        yield DDPMScheduler, config | dict(clip_sample=False)
        yield PNDMScheduler, config | dict(skip_prk_steps=True)
        yield PNDMScheduler, config | dict(skip_prk_steps=False, set_alpha_to_one=True)
    yield DDIMScheduler, config | dict(rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False)
    yield DDIMScheduler, config | dict(prediction_type="sample", clip_sample=True, clip_sample_range=2.0)


def a_network(sample, timestep):
    """Something smooth that is no linear function of what it is given."""
    return np.sin(1.3 * sample + timestep / 300) + 0.1 * np.cos(sample)


@pytest.mark.parametrize("count", [4, 7, 20])
def test_sampling_steps(count):
    """Whole trajectories in float64, so that what differs is the formula and not the rounding."""
    with jax.enable_x64(True):
        for kind, config in trajectories():
            ours, theirs = OURS[kind](**config), kind(**config)
            theirs.alphas_cumprod = torch.from_numpy(ours.alphas_cumprod.astype(np.float64))
            theirs.one = torch.ones((), dtype=torch.float64)
            if kind is not DDPMScheduler:
                to_one = theirs.config.set_alpha_to_one
                theirs.final_alpha_cumprod = theirs.one if to_one else theirs.alphas_cumprod[0]
            theirs.set_timesteps(count)
            plan = ours.plan(count)
            assert plan.timestep.tolist() == theirs.timesteps.tolist()
            expected = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 1, 2, 3)))
            state = trajectory.begin(plan, jnp.asarray(expected.numpy()))
            noise, options = None, {}
            for at, timestep in enumerate(theirs.timesteps.tolist()):
                if kind is DDPMScheduler:  # its noise, drawn twice
                    draw = torch.Generator().manual_seed(at)
                    noise = torch.randn(expected.shape, generator=draw, dtype=torch.float64).numpy()
                    options = {"generator": torch.Generator().manual_seed(at)}
                output = torch.from_numpy(a_network(expected.numpy(), timestep))
                expected = theirs.step(output, timestep, expected, **options).prev_sample
                row = jax.tree.map(lambda column: column[at], plan)  # noqa: B023
                state = trajectory.step(row, state, jnp.asarray(a_network(np.asarray(state[0]), timestep)), noise)
            assert relative_error(state[0], expected) < 1e-8, (kind, config)


@pytest.mark.parametrize(
    ("kind", "config", "count", "words"),
    [
        (FlaxDDIMScheduler, {}, 1001, "1001 steps"),
        (FlaxDDIMScheduler, {"steps_offset": 1}, 1000, "steps_offset = 1"),
        (FlaxDDIMScheduler, {"timestep_spacing": "sideways"}, 5, "timestep_spacing = 'sideways'"),
        (FlaxDDIMScheduler, {"thresholding": True}, 5, "thresholding"),
        (FlaxDDIMScheduler, {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, 5, "v_prediction"),
        (FlaxDDPMScheduler, {"variance_type": "learned"}, 5, "variance_type = 'learned'"),
        (FlaxPNDMScheduler, {}, 3, "at least 4 steps"),
        (FlaxPNDMScheduler, {"rescale_betas_zero_snr": True}, 5, "PNDM cannot"),
        (FlaxDDIMScheduler, {"beta_schedule": "sigmoid"}, 5, "beta_schedule = 'sigmoid'"),
        (FlaxDDIMScheduler, {"prediction_type": "flow_prediction"}, 5, "prediction_type = 'flow_prediction'"),
    ],
)
def test_schedules_that_cannot_be_sampled_are_refused(kind, config, count, words):
    with pytest.raises(ModelError, match=words):
        kind(**config).plan(count)


def test_other_samplers_are_replaced_by_ddim():
    config = SD | {"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True}
    with pytest.warns(UserWarning, match="EulerDiscreteScheduler.*DDIM"):
        replaced = schedulers.for_sampling(config)
    assert type(replaced) is FlaxDDIMScheduler
    assert replaced.torch_config(clip_sample=False) == config  # torch goes on with the model's own
    with pytest.warns(UserWarning, match="PNDM cannot begin in pure noise.*DDIM"):
        replaced = schedulers.for_sampling(SD | {"_class_name": "PNDMScheduler", "rescale_betas_zero_snr": True})
    assert replaced.torch_config()["_class_name"] == "DDIMScheduler"
    assert type(schedulers.for_sampling(SD | {"_class_name": "FlaxDDPMScheduler"})) is FlaxDDPMScheduler
    with pytest.raises(ModelError, match="FlowMatchEulerDiscreteScheduler"):
        schedulers.for_sampling({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})


def test_a_convolution_over_fewer_pixels_than_its_kernel_has():
    """Computed as a product of matrices, for speed on a CPU; its value and gradients are lax's."""
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal((2, 2, 1, 3), np.float32), rng.standard_normal((3, 3, 3, 5), np.float32)
    options = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
    ours, theirs = (
        jax.value_and_grad(
            lambda x, kernel, function=function: (function(x, kernel, (1, 1), [(1, 1), (1, 1)], **options) ** 2).sum(),
            argnums=(0, 1),
        )(x, kernel)
        for function in (convolve, jax.lax.conv_general_dilated)
    )
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5), ours, theirs)
