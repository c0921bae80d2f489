"""The model card and the upload to the hub."""

import html
import json
import os
import shlex
import shutil
import threading
from pathlib import Path

from .reporting import UserError, reason_of, say, warn

CHECKPOINTS = "checkpoints"  # a branch of their own: who loads a pipeline by its id fetches all weights of a branch


def plain(text, most=300):
    """Text from a prompt or a dataset as one line that Markdown shows as it is, whatever it holds."""
    text = " ".join(str(text).split())[:most]
    return "".join(f"\\{c}" if c in "\\`*_{}[]()#+-!|~" else html.escape(c, quote=False) for c in text)


def reason(error):
    """Why the hub, or a library that asked it, failed with this exception: one line, with what to do where that helps.

    The client's own first line is often no more than `401 Client Error`, and libraries hide it behind theirs.
    """
    from huggingface_hub import errors

    link = error
    while link is not None and not isinstance(link, errors.HfHubHTTPError):
        link = link.__cause__ or link.__context__
    if link is None:
        return reason_of(error)
    status = link.response.status_code if link.response is not None else None
    if isinstance(link, errors.GatedRepoError):
        return "it is gated; ask for access on its page on the hub, then log in with `hf auth login`"
    if isinstance(link, errors.RepositoryNotFoundError):
        return "there is no such repository, or it is private and `hf auth login` has not been run with a right to it"
    if isinstance(link, errors.RevisionNotFoundError):
        return "it has no such revision"
    if status == 401:
        return "the hub asks for a valid token (401); `hf auth login` stores one"
    if status == 403:
        return f"the token has no right to it (403: {link.server_message or 'forbidden'})"
    return reason_of(link)


def not_found(name, error):
    """Why a model that is no folder was not found on the hub either: `reason`, but for a name that can only be a path,
    of which the client says no more than how names of repositories look."""
    if name.startswith(("/", ".", "~")) or name.count("/") > 1 or "\\" in name or name.endswith(".safetensors"):
        return "there is nothing at this path"
    return reason(error)


# Words of the pipeline's class that tell apart what the scripts train, and the scripts.
FAMILIES = {
    "XL": "train_text_to_image_sdxl.py",
    "Prior": "train_text_to_image_prior.py",
    "Kandinsky": "train_text_to_image_decoder.py",
    "StableDiffusion": "train_text_to_image.py",
}


def refuse_another_family(name, folder, wanted):
    """Raise UserError where the base model in a folder is not one that the pipeline class `wanted` loads."""
    family = str(read_index(folder).get("_class_name", ""))
    if any((word in family) != (word in wanted) for word in ("XL", "Kandinsky", "V22", "Prior")):
        script = next((script for word, script in FAMILIES.items() if word in family), None)
        advice = f"; {script}, or its twin for LoRA, trains those" if script else ""
        raise UserError(f"base model {name} is for {family}; this script trains {wanted} models{advice}")


def open_repository(name, output_dir, token, private, checkpoints):
    """Create the repository, or find it there; returns its id. With `checkpoints` it gets a branch for them.

    Raises UserError, better now than after training: also where the token may not write, or where a repository that
    is to be `private` stands there in public.
    """
    from huggingface_hub import auth_check, create_branch, create_repo, model_info
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    name = name or Path(output_dir).resolve().name
    try:
        try:
            repository = create_repo(name, private=private or None, token=token).repo_id
        except HfHubHTTPError as error:
            if error.response is None or error.response.status_code not in (401, 402, 403, 409):
                raise
            # It stands there already, or this token may not create any; the client then also finds a stranger's.
            repository = create_repo(name, exist_ok=True, token=token).repo_id
            try:
                auth_check(repository, token=token, write=True)
            except RepositoryNotFoundError:  # what the hub answers a user whom it does not know
                raise error from None
            if private and not model_info(repository, token=token).private:
                raise UserError(
                    f"--hub_private_repo: repository {repository} stands there already and is public; make it private "
                    "in its settings on the hub, or give another --hub_model_id"
                ) from None
        if checkpoints:
            create_branch(repository, branch=CHECKPOINTS, exist_ok=True, token=token)
        return repository
    except UserError:
        raise
    except Exception as error:  # refused, unauthorised, unreachable: the client raises a dozen kinds
        raise UserError(
            f"--push_to_hub cannot open repository {name} ({reason(error)}); see `hf auth login`"
        ) from None


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
    """What to call a model or dataset in public: its hub id, or the name of its folder without the path."""
    return os.path.basename(os.path.abspath(name)) if name and os.path.exists(name) else name


def loader(name, revision=None, variant=None, config=None, public=False):
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


def start(ask, is_main, push, name, output_dir, token, private, checkpoints):
    """The repository of a run, its id or None, and the Uploads of its checkpoints.

    `ask` gives each process what a function returns in the main one. Raises UserError, as `open_repository` does.
    """
    repository = ask(lambda: open_repository(name, output_dir, token, private, checkpoints)) if push else None
    return repository, Uploads(repository if checkpoints and is_main else None, token, output_dir)


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
        f"# {plain(repository or Path(folder).resolve().name)}",
        "",
        f"Fine-tuned from {plain(public_name(base_model))}",
    ]
    lines[-1] += f" on {plain(public_name(data))}." if data else "."
    for path, prompts in images:
        lines += ["", f"![validation images]({path})", ""]
        lines += [f"- {plain(prompt)}" for prompt in prompts]
    lines += ["", "## Use it", "", "```python", usage.strip(), "```", "", "## How it was trained", ""]
    lines += ["| setting | value |", "|---|---|"]
    for name, value in facts.items():
        if value is not None and value is not False:
            shown = public_name(value) if isinstance(value, str) else value  # no path of this machine
            lines.append(f"| {plain(name)} | {plain(shown)} |")
    ModelCard(f"---\n{known.to_yaml()}\n---\n\n" + "\n".join(lines) + "\n").save(Path(folder) / "README.md")


def _later(command, token):
    """The words that tell how to upload later; the token that a flag gave is none of theirs."""
    return f"push it later{', after `hf auth login`,' if token else ''} with: {command}"


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
        patterns = shlex.join(word for pattern in allowed for word in ("--include", pattern))
        command = f"{shlex.join(['hf', 'upload', repository, str(folder), '.'])} {patterns}"
        raise UserError(
            f"the model stands in {folder}, but the upload failed ({reason(error)}); {_later(command, token)}",
            exit_code=1,
        ) from None
    say(f"pushed to {repository}")


class Uploads:
    """Uploads checkpoints in the background, one after the other, onto the branch `checkpoints` of a repository.

    Each lies there in a folder of its name, by a single commit, whole or absent. Training neither waits for an upload
    nor ends by one: what fails is a warning. Of those that wait for their turn, one that rotation removes is left out,
    so that a slow line costs the disk one checkpoint at most. Without a `repository` nothing is uploaded.
    """

    def __init__(self, repository, token, root):
        self.repository, self.token, self.links = repository, token, Path(root) / ".uploads"
        self.waiting, self.thread, self.lock = [], None, threading.Lock()
        if repository:
            from huggingface_hub.utils import disable_progress_bars

            disable_progress_bars()  # they would draw over the run's own
            shutil.rmtree(self.links, ignore_errors=True)  # of a run that was killed

    def add(self, checkpoint):
        """Have a checkpoint's folder uploaded, unless it is None; returns it. Does not wait."""
        if checkpoint and self.repository:
            with self.lock:
                self.waiting.append(Path(checkpoint))
                if self.thread is None:
                    # Not a daemon: a run of one process that ends in an error still ends what it uploads.
                    self.thread = threading.Thread(target=self._work)
                    self.thread.start()
        return checkpoint

    def finish(self, ask=lambda make: make()):
        """Wait until all is uploaded, or has failed.

        Of several processes the main one alone calls it, or every one does with `ask`, a collective call that gives
        each what a function returns in the main one. It is asked every few seconds: a single wait for as long as the
        upload takes would outlast what the process group allows.
        """
        if self.thread is not None:
            say("waiting for the upload of checkpoints, which another signal ends")
        while ask(self._goes_on):
            pass

    def add_last(self, checkpoint, ask):
        """`add`, for a run that ends with this checkpoint, and `finish`."""
        self.add(checkpoint)
        self.finish(ask)
        return checkpoint

    def _goes_on(self, seconds=5):
        thread = self.thread
        if thread is None:
            return False
        try:
            thread.join(seconds)
        except KeyboardInterrupt:
            os._exit(130)  # the thread would hold back any other end
        return thread.is_alive()

    def _work(self):
        while True:
            with self.lock:
                if not self.waiting:
                    self.thread = None
                    return
                checkpoint = self.waiting.pop(0)
            self._upload(checkpoint)

    def _upload(self, checkpoint):
        from huggingface_hub import upload_folder

        name = checkpoint.name
        try:
            folder = self._held(checkpoint)
            if folder is None:
                say(f"{name} was removed before it could be uploaded")
                return
            upload_folder(
                repo_id=self.repository,
                folder_path=folder,
                path_in_repo=name,
                revision=CHECKPOINTS,
                delete_patterns="*",  # what an earlier run left under this name
                token=self.token,
                commit_message=name,
            )
            say(f"pushed {name} to branch {CHECKPOINTS} of {self.repository}")
        except Exception as error:
            words = ["hf", "upload", self.repository, str(checkpoint), name, "--revision", CHECKPOINTS]
            warn(
                f"{name} stands in {checkpoint.parent}, but its upload failed ({reason(error)}); the run goes on; "
                f"{_later(shlex.join(words), self.token)}"
            )
        finally:
            shutil.rmtree(self.links, ignore_errors=True)

    def _held(self, checkpoint):
        """A folder with the files of a checkpoint that rotation does not take away; None where it already has."""
        try:
            return shutil.copytree(checkpoint, self.links / checkpoint.name, copy_function=os.link)
        except OSError:  # it is gone, or this file system has no hard links
            return checkpoint if checkpoint.is_dir() else None
