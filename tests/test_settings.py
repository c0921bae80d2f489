"""Each setting does what its help says, whatever the split into processes and micro-steps."""

import json

import numpy as np
import pytest
import torch
from conftest import logged, result_bytes, result_weights
from diffusers import StableDiffusionPipeline
from diffusers.optimization import get_scheduler
from tiny import build_sd

TRACKED = ["--report_to", "tensorboard"]


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("shape", ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant_with_warmup"])
def test_learning_rate_is_counted_in_steps(run, tmp_path, shape, accumulation):
    """The rate logged after step k is the schedule's at k, whatever the number of micro-steps in a step."""
    flags = ["--lr_scheduler", shape, "--lr_warmup_steps", "2", "--lr_num_cycles", "2", "--lr_power", "2"]
    run(tmp_path, *TRACKED, *flags, "--train_batch_size", "1", "--gradient_accumulation_steps", accumulation)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1e-3)
    schedule = get_scheduler(shape, optimizer, num_warmup_steps=2, num_training_steps=6, num_cycles=2, power=2)
    for rate in logged(tmp_path, "lr").values():
        optimizer.step()
        schedule.step()
        assert rate == pytest.approx(schedule.get_last_lr()[0], rel=1e-6)
    assert len(logged(tmp_path, "lr")) == 6


def test_scale_lr(run, tmp_path):
    run(tmp_path, *TRACKED, "--scale_lr", "--train_batch_size", "2", "--gradient_accumulation_steps", "3")
    assert logged(tmp_path, "lr")[1] == pytest.approx(1e-3 * 6)


def test_epochs_and_steps(run, tmp_path):
    """Ten images in windows of four are three steps an epoch; the last one has two images."""
    argv = run.argv(tmp_path, *TRACKED, "--num_train_epochs", "2")
    at = argv.index("--max_train_steps")
    from conftest import reset_accelerate

    import train_text_to_image

    reset_accelerate()
    train_text_to_image.main(argv[:at] + argv[at + 2 :])
    assert list(logged(tmp_path)) == [1, 2, 3, 4, 5, 6]


def test_clipping_and_its_absence(run, tmp_path):
    """A small threshold bounds what SGD-like steps see; 0 means off, and not gradients of zero."""
    run(tmp_path / "off", *TRACKED, "--max_grad_norm", "0")
    run(tmp_path / "huge", *TRACKED, "--max_grad_norm", "1e9")
    run(tmp_path / "tiny", *TRACKED, "--max_grad_norm", "1e-9")
    assert result_bytes(tmp_path / "off") == result_bytes(tmp_path / "huge") != result_bytes(tmp_path / "tiny")
    assert logged(tmp_path / "huge", "grad_norm")[1] > 1e-3
    assert logged(tmp_path / "off", "grad_norm") == logged(tmp_path / "huge", "grad_norm")


def test_average_is_what_is_saved(run, tmp_path):
    """Held against the average computed by hand from the weights after each step."""
    run(tmp_path, "--use_ema", "--ema_decay", "0.4", "--checkpointing_steps", "1")
    from safetensors.torch import load_file

    name = "conv_in.weight"
    average = None
    for step in range(1, 7):
        weight = load_file(tmp_path / f"checkpoint-{step}/unet/diffusion_pytorch_model.safetensors")[name].double()
        decay = 0.0 if step == 1 else min(0.4, step / (9 + step))  # diffusers counts the first step as step 0
        average = weight if average is None else decay * average + (1 - decay) * weight
    saved = load_file(tmp_path / "checkpoint-6/unet_ema/diffusion_pytorch_model.safetensors")[name]
    torch.testing.assert_close(saved.double(), average, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(result_weights(tmp_path)[name], saved, rtol=0, atol=0)


def test_offloaded_average_is_the_same(run, tmp_path):
    run(tmp_path / "device", "--use_ema", "--ema_decay", "0.5")
    run(tmp_path / "host", "--use_ema", "--ema_decay", "0.5", "--offload_ema", "--foreach_ema")
    for name, weight in result_weights(tmp_path / "device").items():
        torch.testing.assert_close(result_weights(tmp_path / "host")[name], weight, rtol=1e-6, atol=1e-8)


def test_gradient_checkpointing_changes_nothing(run, tmp_path, recomputed):
    run(tmp_path / "without")
    assert not recomputed
    run(tmp_path / "with", "--gradient_checkpointing")
    assert recomputed, "the flag is dead"
    assert result_bytes(tmp_path / "with") == result_bytes(tmp_path / "without")


def scheduler_config(out):
    return json.loads((out / "scheduler" / "scheduler_config.json").read_text())


def test_saved_scheduler_matches_the_prediction_type(run, tmp_path):
    run(tmp_path / "asked", "--prediction_type", "v_prediction")
    assert scheduler_config(tmp_path / "asked")["prediction_type"] == "v_prediction"
    assert scheduler_config(tmp_path / "asked")["_class_name"] == "PNDMScheduler"
    base = build_sd(tmp_path / "v", prediction_type="v_prediction")
    run(tmp_path / "own", "--pretrained_model_name_or_path", base)
    assert scheduler_config(tmp_path / "own")["prediction_type"] == "v_prediction"
    assert result_bytes(tmp_path / "own") == result_bytes(tmp_path / "asked")


def test_zero_terminal_snr_trains_and_samples(run, tmp_path):
    flags = ["--rescale_betas_zero_snr", "--prediction_type", "v_prediction", "--snr_gamma", "5"]
    run(tmp_path, *TRACKED, *flags)
    assert np.isfinite(list(logged(tmp_path).values())).all()
    config = scheduler_config(tmp_path)
    assert config["_class_name"] == "DDIMScheduler"  # PNDM cannot begin at pure noise
    assert config["rescale_betas_zero_snr"] and config["timestep_spacing"] == "trailing"
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path)
    assert pipeline.scheduler.alphas_cumprod[-1] < 1e-6
    pipeline.set_progress_bar_config(disable=True)
    assert np.isfinite(pipeline("x", num_inference_steps=2, output_type="np").images).all()


def test_zero_terminal_snr_with_epsilon_is_refused(run, run_lora, run_sdxl, run_lora_sdxl, tmp_path):
    for script in (run, run_lora, run_sdxl, run_lora_sdxl):
        sentence, code = script.fails(tmp_path, "--rescale_betas_zero_snr")
        assert "add --prediction_type v_prediction" in sentence and code == 2


def test_a_base_model_with_zero_terminal_snr_and_epsilon_is_finite_and_warned_of(run, tmp_path, capsys):
    base = build_sd(tmp_path / "base")
    path = tmp_path / "base" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rescale_betas_zero_snr": True}))
    flags = ["--pretrained_model_name_or_path", base, "--snr_gamma", "5", "--max_train_steps", "12"]
    run(tmp_path / "out", *TRACKED, *flags)
    assert "--prediction_type v_prediction goes with it" in capsys.readouterr().err
    assert np.isfinite(list(logged(tmp_path / "out").values())).all()


def test_dream_is_refused_for_a_model_that_predicts_v(run, tmp_path):
    base = build_sd(tmp_path / "v", prediction_type="v_prediction")
    sentence, code = run.fails(tmp_path / "out", "--pretrained_model_name_or_path", base, "--dream_training")
    assert "epsilon prediction only" in sentence and code == 2


CHANGES = {
    "seed": ["--seed", "8"],
    "flip": ["--random_flip"],
    "crop": ["--center_crop"],
    "dropout": ["--caption_dropout", "1"],
    "offset": ["--noise_offset", "0.1"],
    "perturbation": ["--input_perturbation", "0.1"],
    "min-SNR": ["--snr_gamma", "1"],
    "DREAM": ["--dream_training"],
    "DREAM detail": ["--dream_training", "--dream_detail_preservation", "3"],
    "weight decay": ["--adam_weight_decay", "0.5"],
    "betas": ["--adam_beta1", "0.5", "--adam_beta2", "0.9"],
    "epsilon": ["--adam_epsilon", "1e-2"],
    "adafactor": ["--optimizer", "adafactor"],
    "bf16": ["--mixed_precision", "bf16"],
    "validation split": ["--validation_split", "0.2"],
    "fewer": ["--max_train_samples", "5"],
}


def test_every_setting_that_shapes_the_result_does(run, tmp_path):
    run(tmp_path / "plain")
    results = {"plain": str(result_bytes(tmp_path / "plain"))}
    for name, flags in CHANGES.items():
        run(tmp_path / name, *flags)
        results[name] = str(result_bytes(tmp_path / name))
    assert len(set(results.values())) == len(results)


def test_a_warm_up_that_the_schedule_ignores_is_said(run, tmp_path, capsys):
    run(tmp_path, "--lr_warmup_steps", "3", "--max_train_steps", "1")
    assert "constant_with_warmup" in capsys.readouterr().err


def test_eight_bit_adam(run, tmp_path):
    pytest.importorskip("bitsandbytes")
    assert run(tmp_path, "--use_8bit_adam") == 0
