"""DeepSpeed's ZeRO under accelerate's launcher trains the same weights, and leaves the same files behind."""

import json
import re
import signal
import sys

import pytest
from conftest import IMAGES, ROOT, VALIDATION, logged, relative_difference, result_bytes
from processes import (
    DEEPSPEED,
    LONG,
    NEEDS_DEEPSPEED,
    bytes_held,
    continued,
    ended,
    files,
    launcher,
    machines,
    trains_as_one_process,
    wait_for,
)

from training_utils.run import checkpoints, commands

needs_deepspeed = pytest.mark.skipif(not DEEPSPEED, reason=NEEDS_DEEPSPEED)


def zero(stage):
    return ["--use_deepspeed", "--zero_stage", str(stage)]


# ---------------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------------


@needs_deepspeed
def test_zero_equals_one_process_and_its_checkpoint_is_the_same(run, one_process, tmp_path):
    """With accumulation; read by one process, and to the bit by as many with ZeRO."""
    import torch

    two = [*VALIDATION, "--train_batch_size", "1", "--gradient_accumulation_steps", "2"]
    prompts = [*IMAGES, "--validation_prompts", "one", "two", "three"]
    text = (ROOT / "examples/zero2.yaml").read_text() + "  gradient_accumulation_steps: auto\n"
    (tmp_path / "zero2.yaml").write_text(text)
    launch = launcher(2, "--config_file", str(tmp_path / "zero2.yaml"))
    (said,) = ended([run.start(tmp_path / "two", *two, *prompts, "--checkpointing_steps", "3", launcher=launch)])
    assert "built successfully" not in said  # nothing is compiled
    assert relative_difference(tmp_path / "two", one_process) < 1e-6
    for name in ("train_loss", "val_loss", "grad_norm"):
        assert logged(tmp_path / "two", name) == pytest.approx(logged(one_process, name), rel=1e-5)
    assert {name for name in files(tmp_path / "two") if "logs" not in name} == {
        name for name in files(one_process) if "logs" not in name
    }
    checkpoint = tmp_path / "two" / "checkpoint-3"
    saved, other = (
        torch.load(folder / "checkpoint-3" / "optimizer.bin") for folder in (tmp_path / "two", one_process)
    )
    assert saved["param_groups"] == other["param_groups"] and saved["state"].keys() == other["state"].keys()
    for number, moments in other["state"].items():
        for name, value in moments.items():
            torch.testing.assert_close(saved["state"][number][name], value, rtol=1e-4, atol=1e-7)
    continued(run, tmp_path / "one", checkpoint, *VALIDATION)
    assert relative_difference(tmp_path / "one", one_process) < 1e-6
    continued(run, tmp_path / "again", checkpoint, *two, launch=launcher(2, *zero(2)))
    assert result_bytes(tmp_path / "again") == result_bytes(tmp_path / "two")


@needs_deepspeed
@pytest.mark.slow
def test_zero_is_continued_by_any_number_of_processes(run, one_process, tmp_path):
    """With another stage too; and what one process wrote is continued with ZeRO."""
    two = [*VALIDATION, "--train_batch_size", "2"]
    ended([run.start(tmp_path / "two", *two, "--checkpointing_steps", "3", launcher=launcher(2, *zero(1)))])
    assert relative_difference(tmp_path / "two", one_process) < 1e-6
    assert logged(tmp_path / "two") == pytest.approx(logged(one_process), rel=1e-5)
    checkpoint = tmp_path / "two" / "checkpoint-3"
    continued(run, tmp_path / "again", checkpoint, *two, launch=launcher(2, *zero(1)))
    assert result_bytes(tmp_path / "again") == result_bytes(tmp_path / "two")
    four = [*VALIDATION, "--train_batch_size", "1"]
    continued(run, tmp_path / "four", checkpoint, *four, launch=launcher(4, *zero(2)))
    continued(run, tmp_path / "fsdp", checkpoint, *two, launch=launcher(2, "--use_fsdp", "--fsdp_version", "2"))
    continued(run, tmp_path / "from one", one_process / "checkpoint-3", *two, launch=launcher(2, *zero(2)))
    continued(run, tmp_path / "by one", one_process / "checkpoint-3", *VALIDATION, launch=launcher(1, *zero(2)))
    for name in ("four", "fsdp", "from one", "by one"):
        assert relative_difference(tmp_path / name, one_process) < 1e-6, name


ENGINES = {
    "run": (1, ["--gradient_checkpointing", "--dream_training", "--max_grad_norm", "0", "--use_ema", "--offload_ema"]),
    "run_sdxl": (1, ["--gradient_checkpointing", "--use_ema", "--validation_prompt", "one"]),
    "run_prior": (2, ["--gradient_checkpointing", "--use_ema", "--validation_prompts", "one", "--adam_epsilon=1e-5"]),
    "run_decoder": (2, ["--max_grad_norm", "0.1", "--use_ema", "--validation_prompts", "one", "--snr_gamma", "5"]),
}


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("name", ENGINES)
def test_every_full_fine_tune_runs_with_zero(request, tmp_path, name):
    run, (stage, own) = request.getfixturevalue(name), ENGINES[name]
    trains_as_one_process(run, tmp_path, own, launcher(2, *zero(stage)))


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_a_step_that_is_not_finite_reaches_no_share(run, tmp_path, stage):
    """One process' loss is poisoned; the run stops in the state before, or leaves this step out."""
    from test_faults import POISONED

    wrapper = tmp_path / "poisoned.py"
    wrapper.write_text(POISONED.format(root=str(ROOT)))
    flags = ["--train_batch_size", "2", "--use_ema"]
    launch = [*launcher(2, *zero(stage)), str(wrapper)]
    (said,) = ended([run.start(tmp_path / "stopped", *flags, launcher=launch)], code=1)
    assert said.count("step 4 is not finite") == 1, said
    assert [folder.name for folder in checkpoints.list_checkpoints(tmp_path / "stopped")] == ["checkpoint-3"]
    for name, kind in {"zero": zero(stage), "complete": ["--multi_gpu"]}.items():
        launch = [*launcher(2, *kind), str(wrapper)]
        (said,) = ended([run.start(tmp_path / name, *flags, "--on_nan", "skip", launcher=launch)])
        assert "step 4 is not finite" in said and "this step was skipped" in said
    assert relative_difference(tmp_path / "zero", tmp_path / "complete") < 1e-6
    run(tmp_path / "stopped", "--use_ema", "--resume_from_checkpoint", "latest")
    run(tmp_path / "healthy", "--use_ema")
    assert relative_difference(tmp_path / "stopped", tmp_path / "healthy") < 1e-6


@needs_deepspeed
@pytest.mark.slow
def test_each_process_holds_its_share_alone(run, tmp_path):
    """Of what AdamW keeps, with the weights that it steps, and in stage 2 of the gradient, as a dry run counts."""
    launches = [sys.executable], launcher(2, *zero(1)), launcher(2, *zero(2))
    full, one, two = (bytes_held(run, tmp_path, launch) for launch in launches)
    weights = full["weights that are trained"]
    for shared, gradients in ((one, weights), (two, weights / 2)):
        for name in ("weights that are trained", "moving average", "weights that are frozen"):
            assert shared[name] == full[name], name
        assert shared["their gradients"] == pytest.approx(gradients, rel=0.01)
        assert shared["state of the optimizer"] == pytest.approx(1.5 * weights, rel=0.01)


@needs_deepspeed
@pytest.mark.slow
def test_two_machines_with_zero_equal_one_process(run, one_process, tmp_path):
    kind = [*zero(2), "--deepspeed_multinode_launcher", "standard"]
    ended(machines(run, tmp_path / "four", *VALIDATION, "--checkpointing_steps", "3", kind=kind))
    assert relative_difference(tmp_path / "four", one_process) < 1e-6
    assert logged(tmp_path / "four") == pytest.approx(logged(one_process), rel=1e-5)
    continued(run, tmp_path / "one", tmp_path / "four" / "checkpoint-3", *VALIDATION)
    assert relative_difference(tmp_path / "one", one_process) < 1e-6


@needs_deepspeed
@pytest.mark.slow
def test_a_signal_stops_a_run_with_zero_in_order(run, tmp_path):
    process = run.start(tmp_path, *LONG, "--train_batch_size", "2", launcher=launcher(2, *zero(2)))
    wait_for([process], tmp_path / "checkpoint-20")
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=90)[0]
    stopped_after = int(re.search(r"stopped after step (\d+)", said)[1])
    assert checkpoints.damage_of(tmp_path / f"checkpoint-{stopped_after}") is None
    assert "accelerate launch --use_deepspeed --zero_stage 2 --num_processes 2 --mixed_precision no" in said


@needs_deepspeed
@pytest.mark.slow
def test_a_file_of_deepspeed_and_bf16(run, tmp_path):
    """Buckets so small that a gradient is sent in many parts; bf16 as without DeepSpeed."""
    sizes = {"stage": 1, "reduce_bucket_size": 1000, "allgather_bucket_size": 1000, "overlap_comm": True}
    config = {"zero_optimization": sizes, "bf16": {"enabled": True}, "train_batch_size": "auto"}
    (tmp_path / "zero.json").write_text(json.dumps(config))
    flags = ["--train_batch_size", "2", "--mixed_precision", "bf16", "--report_to", "tensorboard"]
    for name, kind in {"complete": ["--multi_gpu"], "zero": ["--use_deepspeed"]}.items():
        file = ["--deepspeed_config_file", str(tmp_path / "zero.json")] if name == "zero" else []
        ended([run.start(tmp_path / name, *flags, launcher=launcher(2, *kind, *file))])
    assert relative_difference(tmp_path / "zero", tmp_path / "complete") < 1e-4
    assert logged(tmp_path / "zero") == pytest.approx(logged(tmp_path / "complete"), rel=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------------------------------------

REFUSED = {
    "adapters": "too few weights",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE 3": "only stages 1 and 2 are supported",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE 0": "only stages 1 and 2 are supported",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE cpu": "offload_optimizer_device is not supported",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE nvme": "offload_param_device is not supported",
    "ACCELERATE_DYNAMO_BACKEND INDUCTOR": "without --dynamo_backend",
    "ACCELERATE_MIXED_PRECISION fp16": "not in fp16",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS 2": "_steps 2 in the configuration of DeepSpeed contradicts --gradient_",
    "ACCELERATE_GRADIENT_CLIPPING 0.5": "contradicts --max_grad_norm 1",
    "ACCELERATE_DEEPSPEED_CONFIG_FILE nowhere.json": "nowhere.json cannot be read",
    "--mixed_precision fp16": "not in fp16",
    "--optimizer adafactor": "--optimizer adamw alone",
    "--full_bf16": "--full_bf16 updates weights one by one",
    "--fused_backward_pass --max_grad_norm 0": "--fused_backward_pass updates weights one by one",
}
FILES = {
    '{"zero_optimization": {"stage": 3}}': "only stages 1 and 2 are supported",
    '{"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}': "offload_optimizer_device is not supported",
    '{"optimizer": {"type": "Lamb"}}': 'optimizer.type "Lamb" in the configuration of DeepSpeed contradicts',
    '{"optimizer": {"type": "AdamW", "params": {"lr": 3e-5}}}': "contradicts --learning_rate 0.001",
    '{"scheduler": {"type": "WarmupLR"}}': "the learning rate follows --lr_scheduler",
    '{"gradient_clipping": 0.1}': "contradicts --max_grad_norm 1",
    '{"fp16": {"enabled": true}}': "contradicts --mixed_precision no",
    '{"bf16": {"enabled": true}}': "contradicts --mixed_precision no",
    '{"train_batch_size": 64}': "contradicts 4 images in a step",
    "[1]": "it is not a JSON object",
    "{": "cannot be read",
}


def refusal(run, out, capsys, *flags):
    with pytest.raises(SystemExit) as left:
        run(out, *flags)
    assert left.value.code == 2 and not out.exists()
    return capsys.readouterr().err


@pytest.fixture
def launched(monkeypatch):
    """The environment that accelerate's launcher makes, with DeepSpeed installed or not."""
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    return monkeypatch


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_go_with_deepspeed_is_refused(run, run_lora, tmp_path, capsys, launched, what):
    if what.startswith("ACCELERATE"):
        launched.setenv(*what.split())
    flags = what.split() if what.startswith("--") else []
    assert REFUSED[what] in refusal(run_lora if what == "adapters" else run, tmp_path / "out", capsys, *flags)


@pytest.mark.parametrize("text", FILES)
def test_a_file_of_deepspeed_that_contradicts_the_flags_is_refused(run, tmp_path, capsys, launched, text):
    launched.delenv("ACCELERATE_DEEPSPEED_ZERO_STAGE")
    (tmp_path / "zero.json").write_text(text)
    launched.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "zero.json"))
    said = refusal(run, tmp_path / "out", capsys)
    assert FILES[text] in said and said.count("\n") == 1


AGREED = {
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": "auto"}},
    "gradient_clipping": 1.0,
    "gradient_accumulation_steps": "auto",
    "train_batch_size": 4,
    "train_micro_batch_size_per_gpu": 4,
    "bf16": {"enabled": "auto"},
    "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}, "reduce_bucket_size": "auto"},
}


def test_what_agrees_is_let_through_and_a_missing_deepspeed_is_named(run, tmp_path, capsys, launched):
    (tmp_path / "zero.json").write_text(json.dumps(AGREED))
    launched.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "zero.json"))
    launched.setattr("training_utils.cli.packages.is_missing", lambda package: package == "deepspeed")
    assert "pip install deepspeed==0.19.8" in refusal(run, tmp_path / "out", capsys)


def test_a_command_names_deepspeed(launched):
    environment = {"ACCELERATE_MIXED_PRECISION": "bf16", "WORLD_SIZE": "4"}
    for name, value in environment.items():
        launched.setenv(name, value)
    launched.setattr(sys, "argv", ["train_text_to_image.py"])
    start = "accelerate launch --use_deepspeed --zero_stage 2 --num_processes 4"
    assert commands.resume_command([]).startswith(f"{start} --mixed_precision bf16 ")
    for name, value in {"GROUP_WORLD_SIZE": "2", "GROUP_RANK": "0", "MASTER_ADDR": "10.0.0.1"}.items():
        launched.setenv(name, value)
    assert f"{start} --num_machines 2 --deepspeed_multinode_launcher standard --machine_rank 0" in (
        commands.resume_command([])
    )
