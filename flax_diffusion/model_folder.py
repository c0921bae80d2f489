"""A pipeline's folder: found on the disk or the hub, its tokenizer, its JSON files."""

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import ModelError
from .networks import PARTS
from .weight_files import file_patterns, has_weights

if TYPE_CHECKING:
    from transformers import CLIPTokenizer


def fetch(
    name: str | Path,
    revision: str | None = None,
    variant: str | None = None,
    cache_dir: str | Path | None = None,
) -> Path:
    """The local folder of a model: `name` itself where it is one, else the hub's, with the files that are read only.

    Raises ModelError, from the error that the hub client raised.
    """
    if os.path.isdir(name):
        return Path(name)
    import httpx2
    from huggingface_hub import snapshot_download

    def download(patterns):
        try:
            return Path(snapshot_download(name, revision=revision, cache_dir=cache_dir, allow_patterns=patterns))
        except (OSError, ValueError, httpx2.HTTPError) as error:
            # The client's own kinds are OSErrors and ValueErrors; those of its transport pass through it.
            raise ModelError(f"model {name} is neither a folder nor found on the hub: {first_line(error)}") from error

    folder = download(["model_index.json", "scheduler/*.json", "tokenizer/*.json", "tokenizer/*.txt"])
    for part in PARTS:
        for patterns in file_patterns(part, variant):
            download([f"{part}/{pattern}" for pattern in ("config.json", *patterns.all())])
            if has_weights(folder / part, part, variant):
                break
    return folder


def load_tokenizer(folder: Path) -> "CLIPTokenizer":
    """The tokenizer of a pipeline's folder. Raises ModelError."""
    from transformers import CLIPTokenizer

    if not (folder / "tokenizer").is_dir():
        raise ModelError(f"tokenizer: {folder} has no folder of that name")
    try:
        return CLIPTokenizer.from_pretrained(folder / "tokenizer")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelError(f"tokenizer: {folder / 'tokenizer'} cannot be loaded: {first_line(error)}") from error


def save_tokenizer(tokenizer: "CLIPTokenizer", source: Path | None, folder: Path) -> None:
    """Copy the files that the tokenizer was read from, which every release reads; where they are gone, write new ones.

    source: the pipeline's folder that the tokenizer may be from.
    """
    if source and tokenizer.name_or_path == str(source / "tokenizer") and Path(tokenizer.name_or_path).is_dir():
        # A pipeline may be saved where it came from.
        if source.resolve() != folder.resolve():
            copy_folder(source / "tokenizer", folder / "tokenizer")
    else:
        tokenizer.save_pretrained(folder / "tokenizer")


def copy_folder(source: Path, target: Path) -> None:
    """Copy the files of a folder into another one, with the permissions of new files: shutil's copytree would give
    them those of the source, which may be private or not writable."""
    for path in source.rglob("*"):
        if path.is_file():
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, and the folder that it is in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")


def first_line(error: Exception) -> str:
    """An exception as one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
