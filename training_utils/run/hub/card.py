"""The model card, and how a model is called in public."""

import html
import json
import os
from pathlib import Path


def plain_markdown(text, most=300):
    """Text from a prompt or a dataset as one line that Markdown shows as it is, whatever it holds."""
    text = " ".join(str(text).split())[:most]
    return "".join(f"\\{c}" if c in "\\`*_{}[]()#+-!|~" else html.escape(c, quote=False) for c in text)


def public_name(name):
    """What to call a model or dataset in public: its hub id, or the name of its folder without the path."""
    return os.path.basename(os.path.abspath(name)) if name and os.path.exists(name) else name


def loading_call(name, revision=None, variant=None, config=None, public=False):
    """The method call, as Python text, by which a pipeline class loads what a run loaded under this name, a folder, a
    file or a hub id; `public` as public_name has it. A folder or file has no revisions, and of a folder the `variant`
    is read where it holds it. `config` belongs to a file."""
    shown = public_name if public else lambda name: name
    if os.path.isfile(name):
        options, method = {"config": config and shown(config)}, "from_single_file"
    elif os.path.isdir(name):
        held = variant and any(Path(name).glob(f"*/*.{variant}*"))
        options, method = {"variant": variant if held else None}, "from_pretrained"
    else:
        options, method = {"revision": revision, "variant": variant}, "from_pretrained"
    given = [f"{option}={_quoted(value)}" for option, value in options.items() if value]
    return f"{method}({', '.join([_quoted(shown(name)), *given])})"


def _quoted(text):
    return json.dumps(text, ensure_ascii=False)


def base_licence(base_model, token):
    """The licence that the hub states for the base model, a dict of the card's fields, or None: a fine-tuned model is
    under its base's licence."""
    if os.path.exists(base_model):
        return None
    from huggingface_hub import constants, model_info

    try:
        card = model_info(base_model, token=token).card_data
        link = card.license_link
        if link and "://" not in link:  # a file of the base's repository
            link = f"{constants.ENDPOINT}/{base_model}/blob/main/{link}"
        return {"license": card.license, "license_name": card.license_name, "license_link": link}
    except Exception:
        return None


def write_card(folder, repository, *, base_model, data, tags, facts, usage, images=(), token=None, prior=None):
    """Write README.md into `folder`, for the hub's `repository` or None.

    `data` is the dataset's hub id or None; `facts` a dict of settings worth reading; `usage` the Python lines that
    use the model; `images` a list of (path inside the folder, prompts), of which the hub's page shows each with its
    prompts; `token` the one for the hub, which is asked for the base model's licence; `prior` what a Kandinsky decoder
    was trained with, which diffusers reads from the card to assemble the two.
    """
    from huggingface_hub import ModelCard, ModelCardData

    if os.path.realpath(base_model) == os.path.realpath(folder):  # adapters beside their model, which has its own
        return
    licence = base_licence(base_model, token) if repository else None
    images = [pair for pair in images if (Path(folder) / pair[0]).exists()]  # else the disk was full
    examples = [
        {"text": ", ".join(dict.fromkeys(" ".join(prompt.split()) for prompt in prompts)), "output": {"url": path}}
        for path, prompts in images
    ]
    known = ModelCardData(
        base_model=None if os.path.exists(base_model) else base_model,
        # Without a slash it is the name of a loader, such as imagefolder.
        datasets=[data] if data and "/" in data and not os.path.exists(data) else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["text-to-image", "diffusers", "diffusers-training", *tags],
        widget=[example for example in examples if example["text"]] or None,
        **(licence or {}),
        **({"prior": [prior]} if prior and not os.path.exists(prior) else {}),
    )
    lines = [
        f"# {plain_markdown(repository or Path(folder).resolve().name)}",
        "",
        f"Fine-tuned from {plain_markdown(public_name(base_model))}",
    ]
    lines[-1] += f" on {plain_markdown(public_name(data))}." if data else "."
    for path, prompts in images:
        lines += ["", f"![validation images]({path})", ""]
        lines += [f"- {plain_markdown(prompt)}" for prompt in prompts]
    lines += ["", "## Use it", "", "```python", usage.strip(), "```", "", "## How it was trained", ""]
    lines += ["| setting | value |", "|---|---|"]
    for name, value in facts.items():
        if value is not None and value is not False:
            shown = public_name(value) if isinstance(value, str) else value  # no path of this machine
            lines.append(f"| {plain_markdown(name)} | {plain_markdown(shown)} |")
    ModelCard(f"---\n{known.to_yaml()}\n---\n\n" + "\n".join(lines) + "\n").save(Path(folder) / "README.md")
