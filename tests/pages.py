"""The README and the pages in docs/: their blocks, and their commands with the tests' tiny models put in."""

import json
import re
import shlex
from pathlib import Path
from typing import NamedTuple

from conftest import ROOT
from test_formats import write_tar

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = [path.name for path in sorted(ROOT.glob("train_text_to_image*.py"))]
SMALLER = ["--max_train_steps", "2", "--resolution", "16", "--report_to", "none", "--checkpointing_steps", "2"]
SD, SDXL = "stable-diffusion-v1-5/stable-diffusion-v1-5", "stabilityai/stable-diffusion-xl-base-1.0"


class Block(NamedTuple):
    page: str
    language: str
    text: str


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def blocks(*languages):
    """The fenced blocks of all pages, a list of Block; those in these languages, where any are named."""
    found = [
        Block(name_of(page), *parts)
        for page in PAGES
        for parts in re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.S | re.M)
    ]
    return [block for block in found if not languages or block.language in languages]


def prose(page):
    """The text of a page between its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.S | re.M)


class Command(NamedTuple):
    """A line of a bash block. `script` is the one of ours that it starts, or None; `flags` the words after it."""

    page: str
    words: tuple
    script: str | None
    flags: tuple


def commands():
    """Every command of the bash blocks, a list of Command; comments are left out."""
    found = []
    for block in blocks("bash"):
        for line in block.text.replace("\\\n", " ").splitlines():
            words = tuple(shlex.split(line, comments=True))
            at = next((at for at, word in enumerate(words) if word in SCRIPTS), None)
            found += [Command(block.page, words, at and words[at], words[at + 1 :] if at else ())] if words else []
    return found


def different(some):
    """Of commands that are the same except where the result lies, how long it trains and at which size, the first."""
    aside = {"--output_dir", *SMALLER[::2]}

    def essence(command):
        flags = list(command.flags)
        for name in aside & set(flags):
            at = flags.index(name)
            del flags[at : at + 2]
        return command.script, frozenset(" ".join(flags).split(" --"))

    return list({essence(command): command for command in reversed(some)}.values())[::-1]


def run_files():
    """{name: text} of the blocks that are files for --config; the first line of each names it."""
    texts = [block.text for block in blocks("yaml") if re.search(r"^output_dir:", block.text, re.M)]
    return {text.splitlines()[0].removeprefix("# "): text for text in texts}


def as_shards(images, folder):
    """A folder of tar shards, one for each of the tests' images."""
    for at, line in enumerate((Path(images) / "metadata.jsonl").read_text().splitlines()):
        entry = json.loads(line)
        name = Path(entry["file_name"])
        pair = [(name.name, (Path(images) / name).read_bytes()), (f"{name.stem}.txt", entry["text"].encode())]
        write_tar(folder / f"{at}.tar", pair)
    return str(folder)


def on_tiny_models(command, sd, sdxl, kandinsky, images, out):
    """The words after the script's name, with the tests' models, images and output folder in place of the page's."""
    words = list(command.flags)

    def put(name, value):
        if name in words:
            words[words.index(name) + 1] = value
        else:
            words.extend([name, value])

    if "--dataset_name" in words:
        words[words.index("--dataset_name")] = "--train_data_dir"
    if "--streaming" in words:
        put("--cache_dir", str(out.with_name("cache")))
        images = as_shards(images, out.with_name("shards"))
    put("--train_data_dir", images)
    if "--check_data" in words:
        return words
    if "--config" in words:
        files, at = run_files(), words.index("--config") + 1
        path = out.with_name("config.yaml")
        path.write_text(files.get(words[at], "seed: 7\n"))  # what a run leaves is held against its run elsewhere
        words[at] = str(path)
    if "prior" in command.script or "decoder" in command.script:
        put("--pretrained_prior_model_name_or_path", kandinsky[0])
        put("--pretrained_decoder_model_name_or_path", kandinsky[1])
    else:
        put("--pretrained_model_name_or_path", sdxl if "sdxl" in command.script else sd)
    if "--pretrained_vae_model_name_or_path" in words:
        put("--pretrained_vae_model_name_or_path", f"{sdxl}/vae")
    put("--output_dir", str(out))
    if "--cache_latents" in words:
        put("--encoding_cache_dir", str(out / "encodings"))
    if "--aspect_ratio_bucketing" in words:
        put("--bucket_reso_steps", "8")
    if {"--validation_prompts", "--validation_prompt", "--config"} & set(words):
        put("--validation_num_inference_steps", "2")
    return words
