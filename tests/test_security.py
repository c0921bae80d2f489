"""Nothing that is read can run code, and no secret is written."""

import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tools.report.folder import read_run_folder
from tools.report.page import render_page
from training_utils.run import checkpoints

SECRET = "hf_do_not_leak_me"
PARTS = {
    "run": ["unet", "vae", "text_encoder"],
    "run_lora": ["unet", "vae", "text_encoder"],
    "run_sdxl": ["unet", "vae", "text_encoder", "text_encoder_2"],
    "run_lora_sdxl": ["unet", "vae", "text_encoder", "text_encoder_2"],
    "run_prior": ["prior", "text_encoder", "image_encoder"],
    "run_lora_prior": ["prior", "text_encoder", "image_encoder"],
    "run_decoder": ["unet", "movq", "image_encoder"],
    "run_lora_decoder": ["unet", "movq", "image_encoder"],
}


class Bomb:
    """Leaves a file behind if it is unpickled."""

    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return (os.system, (f"touch {self.trace}",))


def own_copy(run, folder):
    """Copies of a runner's base models, and the flags that name them."""
    import shutil

    flags, places = [], []
    for flag, base in zip(run.models[::2], run.models[1::2]):
        place = folder / Path(base).name / "copy"
        shutil.copytree(base, place)
        flags += [flag, place]
        places.append(place)
    return flags, places


@pytest.mark.parametrize(("runner", "part"), [(runner, part) for runner, parts in PARTS.items() for part in parts])
def test_weights_that_are_pickles_are_not_read(request, tmp_path, runner, part):
    run = request.getfixturevalue(runner)
    flags, places = own_copy(run, tmp_path / "bases")
    for weights in [path for place in places for path in (place / part).glob("*.safetensors")]:
        torch.save({"weights": Bomb(tmp_path / "it-ran")}, weights.with_suffix(".bin"))
        weights.unlink()
    sentence, code = run.fails(tmp_path / "out", *flags)
    assert f"part '{part}'" in sentence and "as a pickle only" in sentence and "safetensors" in sentence and code == 2
    assert not (tmp_path / "it-ran").exists()


@pytest.mark.parametrize(("runner", "part"), [(runner, parts[-1]) for runner, parts in PARTS.items()])
def test_code_that_a_model_brings_along_is_not_run(request, tmp_path, runner, part):
    """A folder may name classes of its own in model_index.json and configs, and hold the file that defines them."""
    import json

    run = request.getfixturevalue(runner)
    flags, places = own_copy(run, tmp_path / "bases")
    for place in places:
        index = json.loads((place / "model_index.json").read_text())
        if part in index:
            index[part] = ["brought_along", "Thing"]
            (place / part / "brought_along.py").write_text(f"open({str(tmp_path / 'it-ran')!r}, 'w')")
            (place / "brought_along.py").write_text(f"open({str(tmp_path / 'it-ran')!r}, 'w')")
            (place / "model_index.json").write_text(json.dumps(index))
            config = json.loads((place / part / "config.json").read_text())
            config["auto_map"] = {"AutoModel": "brought_along.Thing"}
            (place / part / "config.json").write_text(json.dumps(config))
    try:
        run(tmp_path / "out", *flags)
    except Exception as error:
        assert type(error).__name__ == "UserError", error
    assert not (tmp_path / "it-ran").exists()


def test_nothing_that_is_written_holds_the_token(each, tmp_path, monkeypatch, capfd):
    """Weights, checkpoints, logs, cards and what is printed, under both ways to write the flag."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "create_repo", lambda name, **_: type("", (), {"repo_id": name}))
    monkeypatch.setattr(huggingface_hub, "upload_folder", lambda **_: None)
    for form in (["--hub_token", SECRET], [f"--hub_token={SECRET}"]):
        out = tmp_path / str(len(form))
        each(out, *form, "--push_to_hub", "--report_to", "tensorboard", "--checkpointing_steps", "3")
        page = render_page([read_run_folder(out)])
        assert "finished: 6 of 6 steps" in page and page.count("<svg") == 5 and SECRET not in page
        files = [path for path in out.rglob("*") if path.is_file()]
        assert len(files) > 5 and not [path for path in files if SECRET.encode() in path.read_bytes()]
    printed = "".join(capfd.readouterr())
    assert "trained to step 6" in printed and SECRET not in printed


HOSTILE = "x](javascript:alert(1)) ```\n---\nlicense: mit\n---\n<script>alert(2)</script> ../../../etc/passwd | a | b"


@pytest.mark.parametrize("flag", ["--validation_prompts", "--validation_prompt"])
def test_a_prompt_breaks_out_of_nothing(run, run_lora, tmp_path, flag):
    from huggingface_hub import ModelCard

    script = run if flag.endswith("s") else run_lora
    validation = ["--validation_num_inference_steps", "2", "--validation_steps", "6"]
    script(tmp_path / "out", flag, HOSTILE, *validation, "--report_to", "tensorboard")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.license is None
    assert "<script>" not in card.text and not re.search(r"(?<!\\)\]\(javascript", card.text)
    assert all(line.count("```") <= 1 for line in card.text.splitlines()) and card.text.count("\n```") == 2
    names = {path.name for path in (tmp_path / "out" / "validation").iterdir()}
    assert names == {"step-000006.png"}


def test_captions_are_in_no_file_name_and_in_no_card(run, tmp_path):
    import json

    from tiny import write_images

    folder = Path(write_images(tmp_path / "images", 4))
    lines = [{"file_name": f"{index}.png", "text": HOSTILE} for index in range(4)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run(tmp_path / "out", "--train_data_dir", folder, "--checkpointing_steps", "3", "--report_to", "tensorboard")
    for path in (tmp_path / "out").rglob("*"):
        assert "javascript" not in path.name
        assert path.is_dir() or b"javascript" not in path.read_bytes()


def test_a_checkpoint_is_read_without_running_code(each, tmp_path):
    """Optimizer and averages of a run are tensors and numbers; a bomb in their place is refused. The learning-rate
    schedule is written for other programs and never read: it is a function of the step."""

    flags = ["--checkpointing_steps", "2", "--max_train_steps", "2", "--use_ema"]
    each(tmp_path, *flags)
    folder = tmp_path / "checkpoint-2"
    pickled = sorted(path for path in folder.rglob("*.bin"))
    assert pickled
    for path in pickled:
        torch.load(path, weights_only=True)
        before = path.read_bytes()
        torch.save(Bomb(tmp_path / "it-ran"), path)
        (folder / "manifest.json").rename(tmp_path / "manifest.json")  # else its digest would not match
        resumed = [*flags, "--resume_from_checkpoint", "checkpoint-2"]
        if path.name == "scheduler.bin":
            assert each(tmp_path, *resumed, "--checkpointing_steps", "0") == 0
        else:
            sentence, code = each.fails(tmp_path, *resumed)
            assert "cannot be read" in sentence and code == 2
        assert not (tmp_path / "it-ran").exists()
        path.write_bytes(before)
        (tmp_path / "manifest.json").rename(folder / "manifest.json")
    assert checkpoints.damage_of(folder) is None
    assert all(load_file(path) for path in folder.rglob("*.safetensors"))
