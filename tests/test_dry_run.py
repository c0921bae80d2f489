"""--dry_run tells what a run would be, measures it in the script's own steps, and leaves nothing behind."""

import re
import signal
from dataclasses import replace

import numpy as np
from conftest import result_weights
from diffusers import PriorTransformer, UNet2DConditionModel

from training_utils.data.plan import BatchPlan
from training_utils.run import dry_run
from training_utils.run.dry_run import MemoryUse, ParameterCount
from training_utils.run.facts import collect_facts
from training_utils.run.progress import Progress
from training_utils.run.provenance import Provenance
from training_utils.run.signals import Interruption
from training_utils.run.state import RunState

SETTINGS = {
    "run": "--use_ema --report_to tensorboard --validation_prompts one --gradient_accumulation_steps 2",
    "run_lora": "--train_text_encoder --use_ema --checkpointing_steps 1",
    "run_sdxl": "--full_bf16 --fused_backward_pass --max_grad_norm 0 --dataloader_num_workers 1",
    "run_lora_sdxl": "--cache_latents --cache_text_embeddings --dataloader_num_workers 1",
    "run_prior": "--cache_latents --cache_text_embeddings --optimizer adafactor",
    "run_decoder": "--cache_latents --caption_dropout 0.5 --push_to_hub",
    "run_lora_decoder": "--aspect_ratio_bucketing --bucket_reso_steps 8",
}


def numbers(report, title):
    """The columns of a table, {row: [numbers]}."""
    table = report.split(f"{title}", 1)[1].split("\n\n")[0].splitlines()[1:]
    return {
        re.split(r" {2,}", line.strip())[0]: [
            float(number.replace(",", "")) for number in re.findall(r" ([\d,.]+)", line)
        ]
        for line in table
    }


def test_a_dry_run_leaves_nothing_behind(each, request, tmp_path, capsys, monkeypatch):
    """Neither in the output folder, which it does not make, nor in the caches."""
    monkeypatch.chdir(tmp_path)
    words = SETTINGS.get(request.node.callspec.id, "").split()
    out, kept = tmp_path / "out", tmp_path / "cache"
    assert each(out, "--dry_run", "--validation_split", "0.2", "--encoding_cache_dir", kept, *words) == 0
    assert list(tmp_path.iterdir()) == []
    report = capsys.readouterr().out
    assert report.startswith("images      8 to train on, 2 for validation\n")
    one = 4 * (2 if "--gradient_accumulation_steps" in words else 1)
    assert f"steps       6 of {one} images\n" in report and f"epochs      {6 * one / 8:.1f}, of {8 // one} " in report
    assert "time " in report and "s a step (2 timed, after the first one)" in report and " for 6 steps" in report
    memory = numbers(report, "memory of this machine")
    assert memory["peak, as measured"][0] > memory["weights that are trained"][0] >= 0
    tables = re.findall(r"parameters of (\w+)", report)
    text = "text_encoder" if "--train_text_encoder" in words else None
    assert tables == [*(["prior"] if "prior" in each.script else ["unet"]), *([text] if text else [])]


def test_parameters_are_counted(run, run_lora, run_prior, sd, kandinsky, tmp_path, capsys):
    unet = UNet2DConditionModel.from_pretrained(sd, subfolder="unet")
    counts = {name: sum(p.numel() for p in module.parameters()) for name, module in unet.named_children()}
    total = sum(counts.values())
    run(tmp_path, "--dry_run")
    table = numbers(capsys.readouterr().out, "parameters of unet")
    assert table.pop("in all") == [total, 0]
    assert table == {name: [count, 0] for name, count in counts.items() if count}
    run_lora(tmp_path / "lora", "--max_train_steps", "1", "--rank", "2")
    capsys.readouterr()
    run_lora(tmp_path, "--dry_run", "--rank", "2")
    adapters = sum(weight.numel() for weight in result_weights(tmp_path / "lora").values())
    assert numbers(capsys.readouterr().out, "parameters of unet")["in all"] == [adapters, total]
    run_prior(tmp_path, "--dry_run")
    prior = PriorTransformer.from_pretrained(kandinsky[0], subfolder="prior")
    still = prior.clip_mean.numel() + prior.clip_std.numel()
    every = sum(p.numel() for p in prior.parameters())
    assert numbers(capsys.readouterr().out, "parameters of prior")["in all"] == [every - still, still]


def test_memory_is_added_up(run, sd, tmp_path, capsys, monkeypatch):
    """AdamW keeps two numbers for each weight and one for all, and an average a third."""
    seen = {}
    monkeypatch.setattr(dry_run, "print_report", lambda memory, **_: seen.update(memory.parts))
    unet = sum(p.numel() for p in UNet2DConditionModel.from_pretrained(sd, subfolder="unet").parameters())
    run(tmp_path, "--dry_run", "--use_ema")
    assert seen["weights that are trained"] == seen["their gradients"] == seen["moving average"] == 4 * unet
    assert 0 <= seen["state of the optimizer"] - 8 * unet < 4 * 300 and seen["weights that are frozen"] > 4e4
    run(tmp_path, "--dry_run", "--full_bf16", "--fused_backward_pass", "--max_grad_norm", "0")
    assert seen["weights that are trained"] == 2 * unet and 0 < seen["their gradients"] < unet / 2
    assert 0 <= seen["state of the optimizer"] - 4 * unet < 4 * 300 and seen["moving average"] == 0


def test_a_dry_run_goes_on_from_a_checkpoint(run, tmp_path, capsys):
    """It reads it, and counts what is left."""
    run(tmp_path, "--max_train_steps", "2", "--checkpointing_steps", "2")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    capsys.readouterr()
    run(tmp_path, "--dry_run", "--resume_from_checkpoint", "latest", "--max_train_steps", "8")
    said = capsys.readouterr()
    assert "resuming from" in said.err and "6 of" not in said.out
    assert "steps       8 of 4 images; 2 already made\n" in said.out and " for 6 steps" in said.out
    assert run(tmp_path, "--dry_run", "--resume_from_checkpoint", "latest", "--max_train_steps", "2") == 0
    assert "no steps are left" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_the_steps_are_those_of_the_run(run, tmp_path, monkeypatch):
    """Also of one whose frozen networks are cached: it would find on the disk what a dry run computes."""
    seen = []
    real = Progress.update

    def update(self, state, samples, loss, grad_norm, learning_rate):
        seen.append((replace(state), float(loss), float(grad_norm), learning_rate))
        real(self, state, samples, loss, grad_norm, learning_rate)

    monkeypatch.setattr(Progress, "update", update)
    words = ["--lr_scheduler", "linear", "--lr_warmup_steps", "2", "--center_crop"]
    run(tmp_path / "out", *words)
    total, seen[:] = seen[: dry_run.STEPS], []
    for more in ([], ["--cache_latents", "--cache_text_embeddings"]):
        run(tmp_path / "dry", "--dry_run", *words, *more)
        assert seen == total
        seen.clear()


def test_a_loss_that_is_no_number_and_a_signal_write_nothing(run, tmp_path, monkeypatch):
    out = tmp_path / "out"
    sentence, code = run.fails(out, "--dry_run", "--learning_rate", "1e30", "--max_grad_norm", "0")
    assert "is not finite" in sentence and code == 1 and not out.exists()
    monkeypatch.setattr(Interruption, "signal", lambda self: signal.SIGTERM)
    assert run(out, "--dry_run") == 128 + signal.SIGTERM and not out.exists()


def test_buckets_and_an_estimate(tmp_path, capsys):
    """The report's own arithmetic, for a run that is large."""
    sizes = np.array([[512, 512]] * 5 + [[576, 448]] * 7)

    class ImageDataset(list):
        stream = None

    rows = ImageDataset(range(12))
    rows.sizes = sizes
    batch_plan = BatchPlan(12, 0, 4, 1, 1, sizes)
    state = RunState(0, step=100)
    progress = Progress(state, 10_000, 1, None, None, None)
    progress.step_seconds.extend([60, 1.5, 2.5])
    settings = {"mixed_precision": "no"}
    facts = collect_facts(
        provenance=Provenance("s.py", world_size=1, settings=settings, samples=len(rows), dataset_sha256="x"),
        base_model="a model",
        device="a GPU",
        parameters=[],
        plan=batch_plan,
        val_dataset=None,
        steps=10_000,
        state=state,
    )
    dry_run.print_report(
        facts=facts,
        dataset=rows,
        progress=progress,
        networks={"unet": {"conv_in": ParameterCount(1, 2), "blocks": ParameterCount(3_000_000, 4)}},
        memory=MemoryUse("a GPU", parts={"weights": 2**30}, peak=3 * 2**30),
    )
    assert capsys.readouterr().out == (
        "images      12 to train on, 0 for validation\n"
        "  512 x 512                5\n"
        "  576 x 448                7\n"
        "steps       10,000 of up to 4 images, 3 on average; 100 already made\n"
        "epochs      2,500.0, of 4 steps each\n"
        "\n"
        "parameters of unet         trained          frozen\n"
        "  conv_in                        1               2\n"
        "  blocks                 3,000,000               4\n"
        "  in all                 3,000,001               6\n"
        "\n"
        "memory of a GPU for one process\n"
        "  weights                              1,024.0 MiB\n"
        "  activations and all the rest         2,048.0 MiB\n"
        "  peak, as measured                    3,072.0 MiB\n"
        "\n"
        "time        2 s a step (2 timed, after the first one)\n"
        "            5 h 30 min for 9,900 steps, without caches, checkpoints and validation\n"
    )
