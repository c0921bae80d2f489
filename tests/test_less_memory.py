"""What takes less memory trains what it says: steps during the backward pass, weights in bfloat16, optimizers."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import STAND, logged, result_bytes, result_weights
from diffusers import (
    KandinskyV22Pipeline,
    KandinskyV22PriorPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from safetensors.torch import load_file

from training_utils.base import draws
from training_utils.cli.options import OptimizerOptions
from training_utils.torch_backend import optimizers
from training_utils.torch_backend.gradient import FusedBackward

TRACKED = ["--report_to", "tensorboard"]
FUSED = ["--fused_backward_pass", "--max_grad_norm", "0"]
FULL = ["run", "run_sdxl", "run_prior", "run_decoder"]


@pytest.fixture(params=FULL)
def full(request):
    """The runner of each script that trains every weight."""
    return request.getfixturevalue(request.param)


# --- steps during the backward pass --------------------------------------------------------------------------------


def test_steps_during_the_backward_pass_change_nothing(full, tmp_path):
    """Weights, average, losses and the gradient's norm, to the bit."""
    full(tmp_path / "after", *TRACKED, "--max_grad_norm", "0", "--use_ema")
    full(tmp_path / "during", *TRACKED, *FUSED, "--use_ema")
    assert result_bytes(tmp_path / "during") == result_bytes(tmp_path / "after")
    assert logged(tmp_path / "during") == logged(tmp_path / "after")
    assert logged(tmp_path / "during", "grad_norm") == pytest.approx(logged(tmp_path / "after", "grad_norm"), rel=1e-6)


def test_no_two_gradients_are_alive_at_once(run, tmp_path, monkeypatch):
    alive = []
    step_weight = FusedBackward._step_weight

    def watched(self, parameter):
        alive.append(sum(p.grad is not None for p in self.optimizer.param_groups[0]["params"]))
        step_weight(self, parameter)

    monkeypatch.setattr(FusedBackward, "_step_weight", watched)
    run(tmp_path, *FUSED, "--max_train_steps", "1")
    assert set(alive) == {1} and len(alive) == len(result_weights(tmp_path))


def poison(monkeypatch, step, grad=False):
    """Make the loss of one step, or only the gradient of a weight that comes late, not finite."""
    import train_text_to_image as script

    original, count = script.training_loss, iter(range(1, 99))

    def poisoned(unet, *rest):
        loss = original(unet, *rest)
        if next(count) == step:
            if not grad:
                return loss * float("nan")
            unet.conv_in.bias.register_hook(lambda gradient: gradient * float("inf"))
        return loss

    monkeypatch.setattr(script, "training_loss", poisoned)


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_a_loss_that_is_not_finite_moves_no_weight(run, tmp_path, monkeypatch, optimizer):
    flags = [*FUSED, "--optimizer", optimizer, "--use_ema"]
    run(tmp_path / "two", *flags, "--max_train_steps", "2")
    poison(monkeypatch, 3)
    sentence, code = run.fails(tmp_path / "stopped", *flags)
    assert "not finite" in sentence and code == 1
    saved = tmp_path / "stopped" / "checkpoint-2" / "unet_ema"
    shutil.copytree(saved, tmp_path / "average" / "unet")
    assert result_bytes(tmp_path / "average")[1] == result_bytes(tmp_path / "two")[1]


def test_a_gradient_that_is_not_finite_is_kept_from_its_weight(run, tmp_path, monkeypatch):
    """Weights whose gradients came before it have moved; its own, and what came after it, have not."""
    run(tmp_path / "two", "--max_grad_norm", "0", "--max_train_steps", "2")
    poison(monkeypatch, 3, grad=True)
    run(tmp_path / "skipped", *FUSED, "--on_nan", "skip", "--max_train_steps", "3")
    before, after = result_weights(tmp_path / "two"), result_weights(tmp_path / "skipped")
    assert all(weight.isfinite().all() for weight in after.values())
    assert torch.equal(before["conv_in.bias"], after["conv_in.bias"])
    assert not torch.equal(before["conv_out.bias"], after["conv_out.bias"])


def test_two_processes_are_refused(run, tmp_path, monkeypatch):
    monkeypatch.setattr(Accelerator, "num_processes", property(lambda self: 2))
    sentence, code = run.fails(tmp_path, *FUSED)
    assert "start one process" in sentence and code == 2


# --- weights in bfloat16 ---------------------------------------------------------------------------------------------


def test_rounding_is_to_a_neighbour_and_keeps_the_expectation():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(40, generator=generator) * torch.logspace(-30, 30, 40)
    sum_of, times = torch.zeros(40, dtype=torch.float64), 4000
    for _ in range(times):
        rounded = torch.empty(40, dtype=torch.bfloat16)
        optimizers.round_stochastically(values.clone(), rounded, generator)
        assert ((rounded.float() - values).abs() <= values.abs() * 2**-7).all()
        sum_of += rounded.double()
    torch.testing.assert_close(sum_of / times, values.double(), rtol=5 * 2**-8 / times**0.5, atol=0)
    exact = torch.tensor([0.0, -0.0, 1.0, -3.5, float("inf"), float("-inf")])
    rounded = torch.empty(6, dtype=torch.bfloat16)
    optimizers.round_stochastically(exact.clone(), rounded, generator)
    assert torch.equal(rounded.float(), exact)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "adamw8bit"])
def test_steps_too_small_for_bfloat16_add_up(name):
    """A hundred steps of a ten-thousandth of the weight: rounded to nearest, none of them would be seen."""
    if name == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    ends = {}
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.nn.Parameter(torch.ones(8192, dtype=dtype))
        step = [0]
        seed = None if dtype == torch.float32 else lambda index, step=step: draws.rounding_seed(0, step[0], index)
        optimizer = optimizers.make_optimizer(
            [weight], OptimizerOptions(name, weight_decay=0.0), learning_rate=1e-4, rounding_seed=seed
        )
        for _ in range(100):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
            step[0] += 1
        assert weight.dtype == dtype
        ends[dtype] = weight.detach().double()
    moved = 1 - ends[torch.float32].mean()
    assert moved == pytest.approx(0.01, rel=0.1)
    assert 1 - ends[torch.bfloat16].mean() == pytest.approx(moved.item(), rel=0.05)
    assert (1 - 1e-4 * torch.ones(1)).bfloat16() == 1


def test_a_mean_of_squares_can_fall():
    weight = torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
    count = iter(range(9999))
    optimizer = optimizers.make_optimizer(
        [weight],
        OptimizerOptions("adamw", weight_decay=0.0),
        learning_rate=1e-4,
        rounding_seed=lambda index: next(count),
    )
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    for _ in range(500):
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
    state = optimizer.state[weight]
    assert state["exp_avg_sq"].dtype == state["exp_avg"].dtype == torch.bfloat16
    assert state["exp_avg_sq"].double().mean() == pytest.approx(1e-3 * 0.999**500, rel=0.02)


def test_a_weight_in_bfloat16_keeps_the_hooks_of_its_gradient():
    """Through them DistributedDataParallel adds up the processes' gradients; they hang on the graph's last node."""
    weight = torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    node = weight.view_as(weight).grad_fn.next_functions[0][0]
    optimizer = optimizers.make_optimizer(
        [weight], OptimizerOptions("adamw", weight_decay=0.0), learning_rate=1e-2, rounding_seed=lambda index: 0
    )
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert weight.view_as(weight).grad_fn.next_functions[0][0] is node and (weight != 1).any()
    assert list(optimizer.state) == [weight] and optimizer.param_groups[0]["params"] == [weight]


@pytest.mark.parametrize(
    "full", [pytest.param(name, marks=[] if name in STAND else pytest.mark.slow) for name in FULL], indirect=True
)
def test_full_bf16(full, tmp_path):
    """Trains like float32 to within rounding, is the same during the backward pass, and saves what it trained."""
    validation = ["--validation_split", "0.2", *TRACKED, "--use_ema", "--ema_decay", "0.9"]
    full(tmp_path / "plain", *validation, "--mixed_precision", "bf16", "--max_grad_norm", "0")
    full(tmp_path / "after", *validation, "--full_bf16", "--max_grad_norm", "0", "--checkpointing_steps", "6")
    full(tmp_path / "during", *validation, "--full_bf16", *FUSED)
    assert result_bytes(tmp_path / "during") == result_bytes(tmp_path / "after")
    trained = {n: w for n, w in result_weights(tmp_path / "after").items() if n not in ("clip_mean", "clip_std")}
    assert {weight.dtype for weight in trained.values()} == {torch.bfloat16}
    plain, half = logged(tmp_path / "plain"), logged(tmp_path / "after")
    assert half == pytest.approx(plain, rel=0.03) and half != plain
    average = next((tmp_path / "after" / "checkpoint-6").glob("*_ema/*.safetensors"))
    assert {weight.dtype for weight in load_file(average).values()} == {torch.float32}
    assert_draws(full.script, tmp_path / "after")


def assert_draws(script, out):
    """The result loads in its library's own pipeline and draws something finite."""
    torch.manual_seed(0)
    given = {"num_inference_steps": 2, "output_type": "np"}
    if script.endswith("prior"):
        pipeline = KandinskyV22PriorPipeline.from_pretrained(out)
        made = pipeline("a handwritten one", num_inference_steps=2, output_type="np").image_embeds
    elif script.endswith("decoder"):
        pipeline = KandinskyV22Pipeline.from_pretrained(out)
        made = pipeline(torch.ones(1, 16), torch.zeros(1, 16), height=16, width=16, **given).images
    else:
        cls = StableDiffusionXLPipeline if script.endswith("sdxl") else StableDiffusionPipeline
        made = cls.from_pretrained(out)("a handwritten one", height=16, width=16, **given).images
    assert np.isfinite(made).all()


# --- optimizers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "paged_adamw8bit", "adafactor", "prodigy"])
def test_every_optimizer_follows_a_schedule(run, tmp_path, name):
    """A schedule that ends at zero makes the last step nothing; one that has not begun, the first."""
    pytest.importorskip({"adamw": "torch", "adafactor": "torch", "prodigy": "prodigyopt"}.get(name, "bitsandbytes"))
    flags = ["--optimizer", name, "--lr_scheduler", "linear", "--lr_warmup_steps", "1", "--max_train_steps", "3"]
    run(tmp_path, *flags, "--checkpointing_steps", "1", *(["--learning_rate", "1"] if name == "prodigy" else []))
    weights = [tmp_path / f"checkpoint-{step}/unet/diffusion_pytorch_model.safetensors" for step in (1, 2, 3)]
    base = Path(run.base) / "unet" / "diffusion_pytorch_model.safetensors"
    first, second, third = ({n: w.numpy().tobytes() for n, w in load_file(path).items()} for path in weights)
    assert first == {n: w.numpy().tobytes() for n, w in load_file(base).items()} and first != second != third


def test_prodigy_keeps_the_step_size_that_it_found(run, tmp_path, capsys):
    pytest.importorskip("prodigyopt")
    flags = ["--optimizer", "prodigy", "--checkpointing_steps", "40", "--max_train_steps", "45"]
    run(tmp_path / "complete", *flags, "--learning_rate", "1")
    group = torch.load(tmp_path / "complete/checkpoint-40/optimizer.bin", weights_only=True)["param_groups"][0]
    assert group["d"] > 2 * group["d0"] and group["k"] == 40
    said = capsys.readouterr()
    assert "--learning_rate 1" not in said.err and "weight decay" not in said.out
    shutil.copytree(tmp_path / "complete/checkpoint-40", tmp_path / "cut/checkpoint-40")
    run(tmp_path / "cut", *flags, "--learning_rate", "1", "--resume_from_checkpoint", "latest")
    assert result_bytes(tmp_path / "cut") == result_bytes(tmp_path / "complete")
    run(tmp_path / "other", *flags, "--learning_rate", "0.1", "--max_train_steps", "1")
    assert "by --learning_rate 0.1; it is made for --learning_rate 1" in capsys.readouterr().err
