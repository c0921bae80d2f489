"""Every command of the README runs, with a tiny model and few updates in place of a real one and many."""

import importlib
import re
import shlex

import pytest
from conftest import ROOT, reset_accelerate
from diffusers import StableDiffusionPipeline

from training_utils.reporting import UserError

README = (ROOT / "README.md").read_text()


def bash_commands(page, start):
    """The commands of a page's bash blocks that begin with `start`, each a list of words; comments are left out."""
    lines = "".join(re.findall(r"```bash\n(.*?)```", page, re.S)).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith(start)]


def python_snippets(page):
    return re.findall(r"```python\n(.*?)```", page, re.S)


def on_tiny_models(command, sd, sdxl, pictures, out):
    """The words after the script's name, with the tests' models, pictures and output folder in place of the page's."""
    script = next(at for at, word in enumerate(command) if word.endswith(".py"))
    words = command[script + 1 :]
    words[words.index("--pretrained_model_name_or_path") + 1] = sdxl if "sdxl" in command[script] else sd
    if "--pretrained_vae_model_name_or_path" in words:
        words[words.index("--pretrained_vae_model_name_or_path") + 1] = f"{sdxl}/vae"
    if "--dataset_name" in words:
        at = words.index("--dataset_name")
        words[at : at + 2] = ["--train_data_dir", pictures]
    words[words.index("--train_data_dir") + 1] = pictures
    words[words.index("--output_dir") + 1] = str(out)
    if "--validation_prompts" in words or "--validation_prompt" in words:
        words += ["--validation_num_inference_steps", "2"]
    return words


COMMANDS = bash_commands(README, "accelerate launch")
SMALLER = ["--max_train_steps", "2", "--resolution", "16", "--report_to", "none", "--checkpointing_steps", "2"]


def test_there_are_commands():
    assert len(COMMANDS) >= 8


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[-1])
def test_command(command, sd, sdxl, pictures, tmp_path, monkeypatch):
    """In process: the launcher's own flags are tested with real processes elsewhere."""
    script = next(word for word in command if word.endswith(".py"))
    main = importlib.import_module(script.removesuffix(".py")).main
    words = on_tiny_models(command, sd, sdxl, pictures, tmp_path / "out")
    if "--push_to_hub" in words:
        import huggingface_hub

        monkeypatch.setattr(huggingface_hub, "create_repo", lambda name, **_: type("", (), {"repo_id": name}))
        monkeypatch.setattr(huggingface_hub, "upload_folder", lambda **_: None)
    reset_accelerate()
    if "--enable_xformers_memory_efficient_attention" in words:
        with pytest.raises((SystemExit, UserError)):  # not on a CPU, which it says in one sentence
            main([*words, *SMALLER])
        return
    assert main([*words, *SMALLER]) == 0


@pytest.mark.parametrize("snippet", python_snippets(README))
def test_python_snippet(snippet, run, run_lora, sd, tmp_path, monkeypatch):
    run(tmp_path / "my_model", "--max_train_steps", "1")
    run_lora(tmp_path / "my_lora", "--max_train_steps", "1")
    monkeypatch.chdir(tmp_path)
    real = StableDiffusionPipeline.__call__
    monkeypatch.setattr(
        StableDiffusionPipeline, "__call__", lambda self, text: real(self, text, num_inference_steps=2)
    )
    exec(snippet.replace("stable-diffusion-v1-5/stable-diffusion-v1-5", sd), {})
    assert (tmp_path / "bicycle.png").stat().st_size > 100
