"""Every command of the README and of two pages in docs runs, with a tiny model for a real one and few updates."""

import importlib
import json
import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT, reset_accelerate
from diffusers import KandinskyV22Pipeline, KandinskyV22PriorPipeline, StableDiffusionPipeline
from PIL import Image
from test_formats import write_tar

from training_utils.reporting import UserError

README = (ROOT / "README.md").read_text()
DOCS = "".join((ROOT / "docs" / name).read_text() for name in ("speed.md", "streaming.md"))


def bash_commands(page, start):
    """The commands of a page's bash blocks that begin with `start`, each a list of words; comments are left out."""
    lines = "".join(re.findall(r"```bash\n(.*?)```", page, re.S)).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith(start)]


def python_snippets(page):
    return re.findall(r"```python\n(.*?)```", page, re.S)


def with_the_config(words, out):
    """The words with the page's YAML for the file that --config names, and room beside it for the tests' own."""
    (config,) = (block for block in re.findall(r"```yaml\n(.*?)```", README, re.S) if "output_dir" in block)
    path = out.with_name("run.yaml")
    path.write_text(config)
    words[words.index("--config") + 1] = str(path)
    ours = ("--pretrained_model_name_or_path", "--train_data_dir", "--output_dir")
    return words + [word for name in ours if name not in words for word in (name, "")]


def as_shards(pictures, folder):
    """A folder of tar shards, one for each of the tests' pictures."""
    lines = [json.loads(line) for line in (Path(pictures) / "metadata.jsonl").read_text().splitlines()]
    for at, line in enumerate(lines):
        name = Path(line["file_name"])
        pair = [(name.name, (Path(pictures) / name).read_bytes()), (f"{name.stem}.txt", line["text"].encode())]
        write_tar(folder / f"{at}.tar", pair)
    return str(folder)


def on_tiny_models(command, sd, sdxl, kandinsky, pictures, out):
    """The words after the script's name, with the tests' models, pictures and output folder in place of the page's."""
    script = next(at for at, word in enumerate(command) if word.endswith(".py"))
    words = command[script + 1 :]
    if "--streaming" in words:
        pictures = as_shards(pictures, out.with_name("shards"))
        words += ["--cache_dir", str(out.with_name("cache"))]
    if "--check_data" in words:
        words[words.index("--train_data_dir") + 1] = pictures
        return words
    if "--config" in words:
        words = with_the_config(words, out)
    if "--pretrained_model_name_or_path" in words:
        words[words.index("--pretrained_model_name_or_path") + 1] = sdxl if "sdxl" in command[script] else sd
    else:
        words += ["--pretrained_prior_model_name_or_path", kandinsky[0]]
        words += ["--pretrained_decoder_model_name_or_path", kandinsky[1]]
    if "--pretrained_vae_model_name_or_path" in words:
        words[words.index("--pretrained_vae_model_name_or_path") + 1] = f"{sdxl}/vae"
    if "--dataset_name" in words:
        at = words.index("--dataset_name")
        words[at : at + 2] = ["--train_data_dir", pictures]
    words[words.index("--train_data_dir") + 1] = pictures
    words[words.index("--output_dir") + 1] = str(out)
    if "--cache_latents" in words and "--encoding_cache_dir" not in words:
        words += ["--encoding_cache_dir", str(out / "encodings")]
    if "--aspect_ratio_bucketing" in words:
        words += ["--bucket_reso_steps", "8"]
    if {"--validation_prompts", "--validation_prompt", "--config"} & set(words):
        words += ["--validation_num_inference_steps", "2"]
    return words


COMMANDS = [
    command
    for command in bash_commands(README + DOCS, ("accelerate launch", "python train"))
    if not any("flax" in word for word in command)  # tests/test_flax_docs.py runs that
]
SMALLER = ["--max_train_steps", "2", "--resolution", "16", "--report_to", "none", "--checkpointing_steps", "2"]


def test_there_are_commands():
    assert len(COMMANDS) >= 8


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[-1])
def test_command(command, sd, sdxl, kandinsky, pictures, tmp_path, monkeypatch):
    """In process: the launcher's own flags are tested with real processes elsewhere."""
    script = next(word for word in command if word.endswith(".py"))
    main = importlib.import_module(script.removesuffix(".py")).main
    words = on_tiny_models(command, sd, sdxl, kandinsky, pictures, tmp_path / "out")
    if "--check_data" in words:
        assert main(words) == 0
        return
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


SNIPPETS = python_snippets(README)


@pytest.mark.parametrize("snippet", [snippet for snippet in SNIPPETS if "kandinsky" not in snippet.lower()])
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


@pytest.fixture(scope="module")
def kandinsky_results(run_prior, run_decoder, run_lora_prior, run_lora_decoder, tmp_path_factory):
    """A folder that holds what the page's commands leave, trained hard enough to show in a picture."""
    import shutil

    folder = tmp_path_factory.mktemp("results")
    shutil.copytree(run_prior.base[1], folder / "stock_decoder")
    card = f"---\nprior:\n- {run_prior.base[0]}\n---\n"  # by which, on the hub, a decoder's card names its prior
    (folder / "stock_decoder" / "README.md").write_text(card)
    runs = {"my_prior": run_prior, "my_decoder": run_decoder}
    runs |= {"my_prior_lora": run_lora_prior, "my_decoder_lora": run_lora_decoder}
    for name, run in runs.items():
        run(folder / name, "--learning_rate", "5e-2")
    return folder


@pytest.mark.parametrize("snippet", [snippet for snippet in SNIPPETS if "kandinsky" in snippet.lower()])
def test_kandinsky_snippet(snippet, kandinsky, kandinsky_results, monkeypatch):
    """The very lines, small pictures and fixed noise aside, draw another picture than the stock networks do."""
    import torch

    for cls, small in (
        (KandinskyV22PriorPipeline, dict(num_inference_steps=2)),
        (KandinskyV22Pipeline, dict(num_inference_steps=2, height=16, width=16)),
    ):

        def call(self, *args, _real=cls.__call__, _small=small, **options):
            return _real(self, *args, **(options | _small | {"generator": torch.Generator().manual_seed(0)}))

        monkeypatch.setattr(cls, "__call__", call)
    monkeypatch.chdir(kandinsky_results)
    prior, decoder = (f'"kandinsky-community/kandinsky-2-2-{name}"' for name in ("prior", "decoder"))
    pictures = []
    for trained in (True, False):
        lines = snippet
        if not trained:
            lines = re.sub(r".*load_lora_adapter.*\n", "", lines)
            lines = lines.replace('"my_prior"', prior).replace('"my_decoder"', decoder)
        exec(lines.replace(prior, repr(kandinsky[0])).replace(decoder, "'stock_decoder'"), {})
        pictures.append(Image.open("bicycle.png").convert("RGB").tobytes())
    assert pictures[0] != pictures[1]
