"""The model card, and how a model is called in public."""

from __future__ import annotations

import html
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training_utils.run.facts import RunFacts

MARKDOWN = "\\`*_{}[]()#+-!|~"  # characters that it gives a meaning to


@dataclass(frozen=True)
class CardImage:
    """A validation image, by its path inside the model's folder, and the prompts that it shows."""

    path: str
    prompts: Sequence[str]


def plain_markdown(text: object, most: int = 300) -> str:
    """Text from a prompt or a dataset as one line that Markdown shows as it is, whatever it holds."""
    line = " ".join(str(text).split())[:most]
    escaped = []
    for character in line:
        escaped.append(f"\\{character}" if character in MARKDOWN else html.escape(character, quote=False))
    return "".join(escaped)


def public_name(name: str) -> str:
    """What to call a model or dataset in public: its hub id, or the name of its folder without the path."""
    return os.path.basename(os.path.abspath(name)) if os.path.exists(name) else name


def loading_call(
    name: str,
    revision: str | None = None,
    variant: str | None = None,
    config: str | None = None,
    public: bool = False,
) -> str:
    """The method call, as Python text, by which a pipeline class loads what a run loaded under this name, a folder, a
    file or a hub id; `public` as public_name has it. A folder or file has no revisions, and of a folder the `variant`
    is read where it holds it. `config` belongs to a file."""
    method = "from_pretrained"
    if os.path.isfile(name):
        method = "from_single_file"
        options = {"config": public_name(config) if public and config else config}
    elif os.path.isdir(name):
        has_variant = variant and any(Path(name).glob(f"*/*.{variant}*"))
        options = {"variant": variant if has_variant else None}
    else:
        options = {"revision": revision, "variant": variant}
    arguments = [_quoted(public_name(name) if public else name)]
    arguments += [f"{option}={_quoted(value)}" for option, value in options.items() if value]
    return f"{method}({', '.join(arguments)})"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def base_licence(base_model: str, token: str | None) -> dict[str, str | None]:
    """The licence that the hub states for the base model, as the card's fields; {} where it states none, or cannot be
    asked. A fine-tuned model is under its base's licence."""
    if os.path.exists(base_model):
        return {}
    from huggingface_hub import constants, model_info

    try:
        card = model_info(base_model, token=token).card_data
    except Exception:  # the client raises a dozen kinds; the card then states no licence
        return {}
    if card is None:
        return {}
    link = card.get("license_link")
    if link and "://" not in link:  # a file of the base's repository
        link = f"{constants.ENDPOINT}/{base_model}/blob/main/{link}"
    return {"license": card.get("license"), "license_name": card.get("license_name"), "license_link": link}


def write_card(
    folder: str | Path,
    repository: str | None,
    *,
    base_model: str,
    data: str | None,
    tags: Sequence[str],
    facts: RunFacts,
    step: int,
    usage: str,
    images: Sequence[CardImage] = (),
    token: str | None = None,
    prior: str | None = None,
) -> None:
    """Write README.md into `folder`, for the hub's `repository` or None.

    `data` is the dataset's hub id or None; `step` the last step; `usage` the Python lines that use the model;
    `images` those that the hub's page shows; `token` the one for the hub, which is asked for the base model's
    licence; `prior` what a Kandinsky decoder was trained with, which diffusers reads from the card to assemble the
    two.
    """
    from huggingface_hub import ModelCard, ModelCardData

    if os.path.realpath(base_model) == os.path.realpath(folder):  # adapters beside their model, which has its own
        return
    # A grid is missing where the disk was full.
    images = [image for image in images if (Path(folder) / image.path).exists()]
    optional: dict[str, Any] = base_licence(base_model, token) if repository else {}
    if prior and not os.path.exists(prior):
        optional["prior"] = [prior]
    # Without a slash it is the name of a loader, such as imagefolder.
    is_on_hub = data and "/" in data and not os.path.exists(data)
    known = ModelCardData(
        base_model=None if os.path.exists(base_model) else base_model,
        datasets=[data] if is_on_hub else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["text-to-image", "diffusers", "diffusers-training", *tags],
        widget=_widget(images) or None,
        **optional,
    )
    text = "\n".join(
        [
            f"# {plain_markdown(repository or Path(folder).resolve().name)}",
            "",
            _origin_line(base_model, data),
            *_image_lines(images),
            *("", "## Use it", "", "```python", usage.strip(), "```", ""),
            *("## How it was trained", "", *_setting_lines(facts, step)),
        ]
    )
    ModelCard(f"---\n{known.to_yaml()}\n---\n\n{text}\n").save(Path(folder) / "README.md")


def _widget(images: Sequence[CardImage]) -> list[dict[str, Any]]:
    """The examples that the hub's page shows: each image with its prompts, each prompt once and on one line."""
    examples = []
    for image in images:
        prompts = dict.fromkeys(" ".join(prompt.split()) for prompt in image.prompts)
        text = ", ".join(prompts)
        if text:
            examples.append({"text": text, "output": {"url": image.path}})
    return examples


def _origin_line(base_model: str, data: str | None) -> str:
    line = f"Fine-tuned from {plain_markdown(public_name(base_model))}"
    return f"{line} on {plain_markdown(public_name(data))}." if data else f"{line}."


def _image_lines(images: Sequence[CardImage]) -> list[str]:
    lines = []
    for image in images:
        lines += ["", f"![validation images]({image.path})", ""]
        lines += [f"- {plain_markdown(prompt)}" for prompt in image.prompts]
    return lines


def _setting_lines(facts: RunFacts, step: int) -> list[str]:
    """A table of the settings that are not off."""
    lines = ["| setting | value |", "|---|---|"]
    settings = facts.settings | {"seed": facts.seed, "steps": step, "images": facts.dataset_images}
    for name, value in settings.items():
        if value is not None and value is not False:
            shown = public_name(value) if isinstance(value, str) else value  # without a path of this machine
            lines.append(f"| {plain_markdown(name)} | {plain_markdown(shown)} |")
    return lines
