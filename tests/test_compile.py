"""torch.compile, switched on where accelerate is launched: the same run, saved under the same names."""

import shutil
import sys

import pytest
import torch
from conftest import KANDINSKY, relative_difference, result_bytes
from tiny import write_images
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._functorch.aot_autograd import make_boxed_func

from training_utils.run import commands


@pytest.fixture(scope="module")
def nine(tmp_path_factory):
    """Nine images: windows of four, four and one."""
    return write_images(tmp_path_factory.mktemp("nine") / "train", 9)


def compiled(run, monkeypatch, backend, out, *flags):
    """Run it compiled; returns how many times the network was compiled."""
    counters.clear()
    with monkeypatch.context() as patch:
        patch.setenv("ACCELERATE_DYNAMO_BACKEND", backend)
        assert run(out, *flags) == 0
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


@pytest.fixture(params=["run_lora", pytest.param("run", marks=pytest.mark.slow)])
def first(request):
    return request.getfixturevalue(request.param)


def test_a_compiled_run(first, tmp_path, monkeypatch, nine):
    """Traced and not made faster, it trains to the same bits, with checkpoints and averages that either kind of run
    reads; the odd window at the end of each epoch is compiled once, and validation not at all."""
    shared = ["--train_data_dir", nine, "--use_ema", "--checkpointing_steps", "2", "--validation_steps", "2"]
    validation = ["--validation_split", "0", "--validation_num_inference_steps", "1"]
    prompt = "--validation_prompts" if first.script == "train_text_to_image" else "--validation_prompt"
    first(tmp_path / "plain", *shared)
    times = compiled(
        first, monkeypatch, "eager", tmp_path / "compiled", *shared, *validation, prompt, "a handwritten one"
    )
    assert times <= 3
    assert result_bytes(tmp_path / "compiled") == result_bytes(tmp_path / "plain")
    for folder in (tmp_path / "plain", tmp_path / "compiled"):
        names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        assert not any("_orig_mod" in name for name in names)
    shutil.copytree(tmp_path / "compiled" / "checkpoint-2", tmp_path / "cut" / "checkpoint-2")
    first(tmp_path / "cut", *shared, "--resume_from_checkpoint", "latest")
    assert result_bytes(tmp_path / "cut") == result_bytes(tmp_path / "plain")


LESS = ["--full_bf16", "--fused_backward_pass", "--max_grad_norm", "0", "--gradient_checkpointing"]
SLOW = {name: ["--use_ema"] for name in ["run_sdxl", "run_lora_sdxl", *KANDINSKY]} | {"run": LESS}


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_every_script_compiled(request, name, tmp_path, monkeypatch, nine):
    run = request.getfixturevalue(name)
    flags = ["--train_data_dir", nine, *SLOW[name], "--checkpointing_steps", "2"]
    # aot_eager is quicker, but of this UNet some CPUs lay out a convolution's result as it does not foresee.
    backend = "inductor" if "decoder" in name else "aot_eager"
    run(tmp_path / "plain", *flags)
    assert compiled(run, monkeypatch, backend, tmp_path / "compiled", *flags) <= 3
    assert relative_difference(tmp_path / "compiled", tmp_path / "plain") < (1e-2 if name == "run" else 1e-4)
    shutil.copytree(tmp_path / "compiled" / "checkpoint-2", tmp_path / "cut" / "checkpoint-2")
    compiled(run, monkeypatch, backend, tmp_path / "cut", *flags, "--resume_from_checkpoint", "latest")
    assert relative_difference(tmp_path / "cut", tmp_path / "compiled") < (1e-2 if name == "run" else 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["run", "run_lora", "run_prior"])
def test_compiled_by_inductor(request, name, tmp_path, monkeypatch, nine):
    """As a user does it. Its kernels round in their own way."""
    run = request.getfixturevalue(name)
    flags = ["--train_data_dir", nine, "--use_ema", "--checkpointing_steps", "3"]
    run(tmp_path / "plain", *flags)
    assert compiled(run, monkeypatch, "inductor", tmp_path / "compiled", *flags) <= 3
    assert relative_difference(tmp_path / "compiled", tmp_path / "plain") < 1e-3
    shutil.copytree(tmp_path / "compiled" / "checkpoint-3", tmp_path / "cut" / "checkpoint-3")
    compiled(run, monkeypatch, "inductor", tmp_path / "cut", *flags, "--resume_from_checkpoint", "latest")
    assert relative_difference(tmp_path / "cut", tmp_path / "compiled") < 1e-3


def reusing(graph, _):
    """A graph whose results lie in the same memory at every call, as those of CUDA graphs do."""
    kept = []

    def call(*args):
        made = graph(*args)
        kept[:] = kept or [None if result is None else torch.empty_like(result) for result in made]
        return [None if new is None else own.copy_(new).detach() for own, new in zip(kept, made, strict=True)]

    return make_boxed_func(call)


def test_gradients_of_replayed_graphs_add_up(run_lora_prior, tmp_path, monkeypatch, nine):
    """A stand-in for CUDA graphs, which a CPU does not have; what they write over must not be a gradient in use."""
    backend = aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph), bw_compiler=reusing)
    torch._dynamo.lookup_backend("cudagraphs")  # which registers it
    monkeypatch.setitem(torch._dynamo.backends.registry._COMPILER_FNS, "cudagraphs", backend)
    flags = ["--train_data_dir", nine, "--train_batch_size", "2", "--gradient_accumulation_steps", "2"]
    run_lora_prior(tmp_path / "plain", *flags)
    compiled(run_lora_prior, monkeypatch, "cudagraphs", tmp_path / "replayed", *flags)
    assert relative_difference(tmp_path / "replayed", tmp_path / "plain") < 1e-4


def test_the_prior_compiled_by_regions(run_prior, tmp_path, monkeypatch, nine):
    flags = ["--train_data_dir", nine, "--use_ema"]
    run_prior(tmp_path / "plain", *flags)
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "true")
    assert compiled(run_prior, monkeypatch, "eager", tmp_path / "compiled", *flags) > 3
    assert result_bytes(tmp_path / "compiled") == result_bytes(tmp_path / "plain")


def test_regions_of_a_unet_are_refused(run, tmp_path, monkeypatch, capsys):
    """accelerate's cuts fail inside of diffusers' UNet, which asks of a part whether it is there."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "true")
    with pytest.raises(SystemExit) as refusal:
        run(tmp_path / "out")
    assert refusal.value.code == 2
    assert "without --dynamo_use_regional_compilation" in capsys.readouterr().err


DREAM = ["--dream_training"]
REPLAYED = {"run": DREAM, "run_lora": DREAM} | {name: [] for name in ["run_sdxl", "run_lora_sdxl", *KANDINSKY]}


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU, and TEST_ON_GPU=1")
@pytest.mark.parametrize("name", REPLAYED)
def test_replayed_as_cuda_graphs(request, name, tmp_path, monkeypatch, nine):
    """Gradients add up over micro-batches and are not those of the last replay; each size has graphs of its own."""
    run = request.getfixturevalue(name)
    flags = ["--train_data_dir", nine, *REPLAYED[name], "--use_ema", "--gradient_accumulation_steps", "2"]
    run(tmp_path / "plain", *flags, "--train_batch_size", "2")
    compiled(run, monkeypatch, "cudagraphs", tmp_path / "replayed", *flags, "--train_batch_size", "2")
    assert not counters["inductor"]["cudagraph_skips"]
    assert relative_difference(tmp_path / "replayed", tmp_path / "plain") < 1e-2


def test_the_command_that_continues_compiles_too(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    monkeypatch.setattr(sys, "argv", ["train.py"])
    assert "--mixed_precision no --dynamo_backend inductor train.py" in commands.resume_command([])
    monkeypatch.setenv("ACCELERATE_DYNAMO_MODE", "reduce-overhead")
    assert "--dynamo_backend inductor --dynamo_mode reduce-overhead" in commands.resume_command([])
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "true")
    assert "--dynamo_use_regional_compilation train.py" in commands.resume_command([])
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    assert "dynamo" not in commands.resume_command([])
