"""The embedded default works from the data to the score."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

LAUNCH = "accelerate.commands.launch --cpu --num_processes 1 --num_machines 1 --mixed_precision no".split()


def script(name, *words):
    """Run a script, or a module, and return what it prints."""
    start = [sys.executable, name] if name.endswith(".py") else [sys.executable, "-m", name]
    done = subprocess.run([*start, *map(str, words)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_from_data_to_score(tmp_path):
    """As `make quickstart`, with four steps in place of its hundreds: the score is then a guess."""
    script("quickstart/make_data.py", "--output_dir", tmp_path / "digits")
    entries = [json.loads(line) for line in (tmp_path / "digits" / "metadata.jsonl").read_text().splitlines()]
    assert len(entries) == 1797
    assert {entry["text"].split()[-1] for entry in entries} == set(
        "zero one two three four five six seven eight nine".split()
    )
    image = np.asarray(Image.open(tmp_path / "digits" / entries[0]["file_name"]))
    assert image.shape == (32, 32, 3) and image.std() > 30

    script("quickstart/make_base.py", "--output_dir", tmp_path / "base")
    flags = f"--pretrained_model_name_or_path {tmp_path}/base --train_data_dir {tmp_path}/digits --output_dir"
    flags += f" {tmp_path}/model --resolution 32 --train_batch_size 16 --max_train_steps 4 --report_to none"
    script(*LAUNCH, "--dynamo_backend", "no", "train_text_to_image.py", *flags.split())
    said = script("quickstart/score.py", "--model_dir", tmp_path / "model", "--grid", tmp_path / "grid.png")
    score = re.fullmatch(r"digit accuracy: ([01]\.\d\d)", said.strip().splitlines()[-1])
    assert score and float(score[1]) < 0.5
    assert min(Image.open(tmp_path / "grid.png").size) > 500


@pytest.mark.slow
def test_sdxl_and_a_new_word(tmp_path):
    """As `make quickstart-sdxl`, with two steps in place of its hundreds."""
    script("quickstart/make_data.py", "--output_dir", tmp_path / "mirrored", "--mirrored")
    entries = [json.loads(line) for line in (tmp_path / "mirrored" / "metadata.jsonl").read_text().splitlines()]
    assert len(entries) == 2 * 1797
    images = {}
    for entry in entries[:8]:
        images[entry["text"]] = np.asarray(Image.open(tmp_path / "mirrored" / entry["file_name"]))
    assert np.array_equal(images["a handwritten three"], images["a mirrored handwritten three"][:, ::-1])

    script("quickstart/make_base.py", "--output_dir", tmp_path / "base", "--sdxl")
    flags = f"--train_data_dir {tmp_path}/mirrored --resolution 32 --train_batch_size 16 --max_train_steps 2"
    flags = ["--dynamo_backend", "no"], [*flags.split(), "--report_to", "none", "--checkpointing_steps", "0"]
    for name, base, out in (("sdxl", "base", "model"), ("lora_sdxl", "model", "lora")):
        folders = ["--pretrained_model_name_or_path", tmp_path / base, "--output_dir", tmp_path / out]
        script(*LAUNCH, *flags[0], f"train_text_to_image_{name}.py", *folders, *flags[1])
    said = script(
        *("quickstart/score.py", "--model_dir", tmp_path / "model", "--lora_dir", tmp_path / "lora", "--mirrored"),
        *("--grid", tmp_path / "grid.png"),
    )
    last = said.strip().splitlines()[-2:]
    assert re.fullmatch(r"mirrored digit accuracy: [01]\.\d\d", last[0])
    assert re.fullmatch(r"digit accuracy: [01]\.\d\d", last[1])


def test_the_vae_that_is_committed_is_small_and_good(tmp_path):
    import torch
    from diffusers import AutoencoderKL
    from make_data import draw_scan
    from sklearn.datasets import load_digits

    size = sum(path.stat().st_size for path in (ROOT / "quickstart" / "vae").iterdir())
    assert size < 1_000_000
    vae = AutoencoderKL.from_pretrained(ROOT / "quickstart" / "vae")
    images = np.stack([np.asarray(draw_scan(scan).convert("RGB")) for scan in load_digits().images[:64]])
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        latents = vae.encode(pixels).latent_dist.mean
        error = (vae.decode(latents).sample - pixels).square().mean()
    assert error < 0.002
    assert 0.7 < latents.std() * vae.config.scaling_factor < 1.3


@pytest.mark.slow
@pytest.mark.parametrize("target", ["quickstart", "quickstart-lora", "quickstart-sdxl", "quickstart-flax"])
def test_it_reaches_its_accuracy(target, tmp_path):
    done = subprocess.run(["make", target, f"OUT={tmp_path}"], cwd=ROOT, check=True, capture_output=True, text=True)
    scores = re.findall(r"^((?:mirrored )?digit accuracy): ([01]\.\d\d)$", done.stdout, re.M)
    assert scores[-1][0] == "digit accuracy" and ("mirrored digit accuracy" in dict(scores)) == (
        target in ("quickstart-lora", "quickstart-sdxl")
    )
    assert all(float(score) >= 0.9 for _, score in scores)


def test_tables_and_charts_of_settings(tmp_path):
    import compare

    runs = {"off": [({4: 0.5, 8: 0.25}, {1: 0.1, 2: 0.2, 4: 0.4, 8: 0.9})] * 2}
    runs["on"] = [({4: 0.2, 8: 0.3}, {1: 0.0, 2: 0.2, 4: 0.4, 8: top}) for top in (0.8, 1.0)]
    head, _, off, on = compare.table(runs, 8)
    assert head.split(" | ")[-4:] == [f"read rightly after {step}" for step in (1, 2, 4)] + ["read rightly after 8 |"]
    assert off == "| off | 0.2500 | 0.10 | 0.20 | 0.40 | 0.90 |"
    assert on == "| on | 0.3000 | 0.00 | 0.20 | 0.40 | 0.90 (0.80 to 1.00) |"
    compare.charts(runs, tmp_path, "weights", "every weight")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "settings-weights-accuracy.svg",
        "settings-weights-loss.svg",
    ]


@pytest.mark.slow
def test_settings_are_compared(tmp_path, monkeypatch, capsys):
    """As `make compare`, with 40 images of each set, eight steps of each run and ten drawings at each validation."""
    import compare
    import score

    for name, words in (("digits", []), ("mirrored", ["--mirrored"])):
        script("quickstart/make_data.py", "--output_dir", tmp_path / name, *words)
        lines = (tmp_path / name / "metadata.jsonl").read_text().splitlines()[:40]
        (tmp_path / name / "metadata.jsonl").write_text("\n".join(lines))
    script("quickstart/make_base.py", "--output_dir", tmp_path / "base")
    monkeypatch.setattr(score, "PER_DIGIT", 1)
    folders = [word for name in ("digits", "mirrored", "base") for word in (f"--{name}", str(tmp_path / name))]
    words = ["--output_dir", str(tmp_path / "out"), "--charts", str(tmp_path / "charts"), "--seeds", "1"]
    compare.main([*folders, *words, "--max_train_steps", "8"])
    said = capsys.readouterr().out
    assert all(f"| {name} | 0." in said for name in (*compare.WEIGHTS, *compare.RANKS))
    assert len(list((tmp_path / "charts").glob("settings-*.svg"))) == 4
