"""The model card and the upload to the hub."""

import html
import json
import os
import shlex
from pathlib import Path

from .reporting import UserError, reason_of, say


def plain(text, most=300):
    """Text from a prompt or a data set as one line that Markdown shows as it is, whatever it holds."""
    text = html.escape(" ".join(str(text).split()))[:most]
    return "".join(f"\\{letter}" if letter in "\\`*_{}[]()#+-!|~" else letter for letter in text)


def open_repository(name, output_dir, token):
    """Create the repository, or find it there; returns its id. Raises UserError: better now than after training."""
    from huggingface_hub import create_repo

    name = name or Path(output_dir).resolve().name
    try:
        return create_repo(name, exist_ok=True, token=token).repo_id
    except Exception as error:  # refused, unauthorised, unreachable: the client raises a dozen kinds
        reason = reason_of(error)
        raise UserError(f"--push_to_hub cannot open repository {name} ({reason}); see `hf auth login`") from None


def read_index(folder):
    """The model_index.json of a pipeline's folder, a dict. Raises UserError where there is none that can be read."""
    path = Path(folder) / "model_index.json"
    try:
        index = json.loads(path.read_text())
    except OSError:
        raise UserError(
            f"base model {folder} has no model_index.json; it must be a folder in diffusers' layout"
        ) from None
    except ValueError as error:
        raise UserError(f"{path} cannot be read: {reason_of(error)}") from None
    if not isinstance(index, dict):
        raise UserError(f"{path} cannot be read: it holds no JSON object")
    return index


def public_name(name):
    """What to call a model or data set in public: its hub id, or the name of its folder without the path."""
    return os.path.basename(os.path.abspath(name)) if name and os.path.exists(name) else name


def base_licence(base_model, token):
    """The licence that the hub states for the base model, or None: a fine-tuned model is under its base's licence."""
    if os.path.exists(base_model):
        return None
    from huggingface_hub import model_info

    try:
        return model_info(base_model, token=token).card_data.license
    except Exception:
        return None


def write_card(folder, *, title, base_model, data, tags, facts, usage, pictures=(), licence=None, prior=None):
    """Write README.md into `folder`.

    `data` is the data set's hub id or None; `facts` a dict of settings worth reading; `usage` the Python lines that
    use the model; `pictures` a list of (path inside the folder, prompts); `prior` what a Kandinsky decoder was trained
    with, which diffusers reads from the card to assemble the two.
    """
    from huggingface_hub import ModelCard, ModelCardData

    known = ModelCardData(
        base_model=None if os.path.exists(base_model) else base_model,
        datasets=[data] if data and not os.path.exists(data) else None,
        license=licence,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["text-to-image", "diffusers", "diffusers-training", *tags],
        **({"prior": [prior]} if prior and not os.path.exists(prior) else {}),
    )
    lines = [
        f"# {plain(title)}",
        "",
        f"Fine-tuned from {plain(public_name(base_model))}",
    ]
    lines[-1] += f" on {plain(public_name(data))}." if data else "."
    for path, prompts in pictures:
        if not (Path(folder) / path).exists():  # the disk was full
            continue
        lines += ["", f"![validation pictures]({path})", ""]
        lines += [f"- {plain(prompt)}" for prompt in prompts]
    lines += ["", "## Use it", "", "```python", usage.strip(), "```", "", "## How it was trained", ""]
    lines += ["| setting | value |", "|---|---|"]
    for name, value in facts.items():
        if value is not None and value is not False:
            shown = public_name(value) if isinstance(value, str) else value  # no path of this machine
            lines.append(f"| {plain(name)} | {plain(shown)} |")
    ModelCard(f"---\n{known.to_yaml()}\n---\n\n" + "\n".join(lines) + "\n").save(Path(folder) / "README.md")


def upload(folder, repository, token, allowed):
    """Upload the files of `folder` that match the patterns `allowed`, and no others, so that neither checkpoints nor
    logs are published. Raises UserError, with the command that tries again, when it fails: the result is safe."""
    from huggingface_hub import upload_folder

    try:
        upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=allowed,
            token=token,
            commit_message="End of training",
        )
    except Exception as error:
        reason = reason_of(error)
        patterns = shlex.join(word for pattern in allowed for word in ("--include", pattern))
        raise UserError(
            f"the model stands in {folder}, but the upload failed ({reason}); push it later with: "
            f"{shlex.join(['hf', 'upload', repository, str(folder), '.'])} {patterns}",
            exit_code=1,
        ) from None
    say(f"pushed to {repository}")
