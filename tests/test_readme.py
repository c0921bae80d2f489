"""Every command of the README runs, with a tiny model and few updates in place of a real one and many."""

import re
import shlex

import pytest
from conftest import ROOT, reset_accelerate
from diffusers import StableDiffusionPipeline

import train_text_to_image

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.S)
COMMANDS = [
    shlex.split(line)
    for block in BLOCKS
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith("accelerate launch")
]
SMALLER = ["--max_train_steps", "2", "--resolution", "16", "--report_to", "none", "--checkpointing_steps", "2"]


def test_there_are_commands():
    assert len(COMMANDS) >= 8


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[-1])
def test_command(command, sd, pictures, tmp_path, monkeypatch):
    """In process: the launcher's own flags are tested with real processes elsewhere."""
    script = next(at for at, word in enumerate(command) if word.endswith(".py"))
    words = command[script + 1 :]
    words[words.index("--pretrained_model_name_or_path") + 1] = sd
    if "--dataset_name" in words:
        at = words.index("--dataset_name")
        words[at : at + 2] = ["--train_data_dir", pictures]
    words[words.index("--train_data_dir") + 1] = pictures
    words[words.index("--output_dir") + 1] = str(tmp_path / "out")
    if "--validation_prompts" in words:
        words += ["--validation_num_inference_steps", "2"]
    if "--push_to_hub" in words:
        import huggingface_hub

        monkeypatch.setattr(huggingface_hub, "create_repo", lambda name, **_: type("", (), {"repo_id": name}))
        monkeypatch.setattr(huggingface_hub, "upload_folder", lambda **_: None)
    reset_accelerate()
    if "--enable_xformers_memory_efficient_attention" in words:
        with pytest.raises((SystemExit, train_text_to_image.UserError)):  # not on a CPU, which it says in one sentence
            train_text_to_image.main([*words, *SMALLER])
        return
    assert train_text_to_image.main([*words, *SMALLER]) == 0


def test_python_snippet(run, tmp_path, monkeypatch):
    snippet = re.search(r"```python\n(.*?)```", README, re.S)[1]
    run(tmp_path / "my_model", "--max_train_steps", "1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(StableDiffusionPipeline, "__call__", quick(StableDiffusionPipeline.__call__))
    exec(snippet, {})
    assert (tmp_path / "bicycle.png").stat().st_size > 100


def quick(call):
    return lambda self, prompt: call(self, prompt, num_inference_steps=2)
