"""Uploading the result and the checkpoints to the hub."""

from __future__ import annotations

import concurrent.futures
import os
import shlex
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from training_utils.base import hub_errors
from training_utils.base.console import say, warn
from training_utils.base.errors import UserError
from training_utils.cli.options import HubOptions
from training_utils.run.exit import INTERRUPTED

CHECKPOINTS = "checkpoints"  # a branch of their own: who loads a pipeline by its id fetches all weights of a branch
REFUSALS = (401, 402, 403, 409)  # HTTP: the repository already exists, or this token may not create any
WAIT = 5  # seconds for which a process waits at a time, far less than a process group allows

Result = TypeVar("Result")


def open_repository(name: str | None, output_dir: str, token: str | None, private: bool, checkpoints: bool) -> str:
    """Create the repository, or find it there; returns its id. With `checkpoints` it gets a branch for them.

    Raises UserError, better now than after training: also where the token may not write, or where a repository that
    is to be `private` stands there in public.
    """
    from huggingface_hub import create_branch

    name = name or Path(output_dir).resolve().name
    try:
        repository, is_public = _create_or_find(name, token, private)
        if checkpoints and not (private and is_public):
            create_branch(repository, branch=CHECKPOINTS, exist_ok=True, token=token)
    except Exception as error:  # refused, unauthorised, unreachable: the client raises a dozen kinds
        raise UserError(
            f"--push_to_hub cannot open repository {name} ({hub_errors.hub_reason(error)}); see `hf auth login`"
        ) from error
    if private and is_public:
        raise UserError(
            f"--hub_private_repo: repository {repository} already exists and is public; make it private in its "
            "settings on the hub, or give another --hub_model_id"
        )
    return repository


def _create_or_find(name: str, token: str | None, private: bool) -> tuple[str, bool]:
    """The id of the repository, and whether it was found to be public where it is to be `private`. Raises what the
    hub's client raises."""
    from huggingface_hub import auth_check, create_repo, model_info
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    try:
        return create_repo(name, private=private or None, token=token).repo_id, False
    except HfHubHTTPError as error:
        if error.response is None or error.response.status_code not in REFUSALS:
            raise
        refusal = error
    # The client then also finds a stranger's.
    repository = create_repo(name, exist_ok=True, token=token).repo_id
    try:
        auth_check(repository, token=token, write=True)
    except RepositoryNotFoundError as error:  # what the hub answers a user whom it does not know
        raise refusal from error
    return repository, private and not model_info(repository, token=token).private


def open_uploads(
    ask: Callable[[Callable[[], str]], str],
    is_main: bool,
    options: HubOptions,
    output_dir: str,
) -> tuple[str | None, Uploads]:
    """The repository of a run, its id or None, and the Uploads of its checkpoints.

    `ask` gives each process what a function returns in the main one. Raises UserError, as `open_repository` does.
    """
    repository = None
    if options.push:
        repository = ask(
            lambda: open_repository(
                options.model_id, output_dir, options.token, options.private, options.push_checkpoints
            )
        )
    uploads_here = options.push_checkpoints and is_main
    return repository, Uploads(repository if uploads_here else None, options.token, output_dir)


def _push_later(command: str, token: str | None) -> str:
    """The words that tell how to upload later; the token that a flag gave is not among them."""
    login = ", after `hf auth login`," if token else ""
    return f"push it later{login} with: {command}"


def upload_result(folder: str, repository: str, token: str | None, allowed: Sequence[str]) -> None:
    """Upload the files of `folder` that match the patterns `allowed`, and no others, so that neither checkpoints nor
    logs are published. Raises UserError, with the command that tries again, when it fails: the result is safe."""
    from huggingface_hub import upload_folder

    try:
        upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=list(allowed),
            token=token,
            commit_message="End of training",
        )
    except Exception as error:  # the client raises a dozen kinds
        words = ["hf", "upload", repository, str(folder), "."]
        for pattern in allowed:
            words += ["--include", pattern]
        raise UserError(
            f"the model is in {folder}, but the upload failed ({hub_errors.hub_reason(error)}); "
            f"{_push_later(shlex.join(words), token)}",
            exit_code=1,
        ) from error
    say(f"pushed to {repository}")


def _call(make: Callable[[], Result]) -> Result:
    return make()


class Uploads:
    """Uploads checkpoints in the background, one after the other, onto the branch `checkpoints` of a repository.

    Each lies there in a folder of its name, by a single commit, complete or absent. Training neither waits for an
    upload nor ends by one: what fails is a warning. Of those that wait for their turn, one that rotation removes is
    left out, so that a slow connection costs the disk one checkpoint at most. Without a `repository` nothing is
    uploaded.
    """

    def __init__(self, repository: str | None, token: str | None, root: str | Path) -> None:
        self._repository = repository or ""
        self._token = token
        # Hard links to the files of the checkpoint that is being uploaded.
        self._links = Path(root) / ".uploads"
        self._uploads: list[concurrent.futures.Future[None]] = []
        if repository:
            from huggingface_hub import HfApi
            from huggingface_hub.utils import disable_progress_bars

            disable_progress_bars()  # they would draw over the run's own
            shutil.rmtree(self._links, ignore_errors=True)  # what a killed run left
            # It has one thread for what is to run in the background, which the end of the interpreter waits for: a
            # run of one process that ends in an error still ends what it uploads.
            self._api = HfApi(token=token)

    def add(self, checkpoint: Path | None) -> Path | None:
        """Have a checkpoint's folder uploaded, unless it is None; returns it. Does not wait."""
        if checkpoint and self._repository:
            self._uploads.append(self._api.run_as_future(self._upload, Path(checkpoint)))
        return checkpoint

    def finish(self, ask: Callable[[Callable[[], bool]], bool] = _call) -> None:
        """Wait until all is uploaded, or has failed.

        Of several processes the main one alone calls it, or every one does with `ask`, a collective call that gives
        each what a function returns in the main one. It is asked every few seconds: a single wait for as long as the
        upload takes would outlast what the process group allows.
        """
        if not all(upload.done() for upload in self._uploads):
            say("waiting for the upload of checkpoints, which another signal ends")
        while ask(self._wait):
            pass

    def add_last(self, checkpoint: Path | None, ask: Callable[[Callable[[], bool]], bool]) -> Path | None:
        """`add`, for a run that ends with this checkpoint, and `finish`."""
        self.add(checkpoint)
        self.finish(ask)
        return checkpoint

    def _wait(self) -> bool:
        """Wait a little for what is being uploaded. Returns whether there is anything left."""
        try:
            done, left = concurrent.futures.wait(self._uploads, timeout=WAIT)
        except KeyboardInterrupt:
            os._exit(INTERRUPTED)  # the thread would hold back any other end
        self._uploads = list(left)
        for upload in done:
            upload.result()  # raises what a bug has raised; a failure of the hub was a warning
        return bool(left)

    def _upload(self, checkpoint: Path) -> None:
        """Upload a checkpoint's folder, unless it is gone by now; a failure is a warning."""
        folder = self._folder_to_upload(checkpoint)
        if folder is None:
            say(f"{checkpoint.name} was removed before it could be uploaded")
            return
        try:
            self._api.upload_folder(
                repo_id=self._repository,
                folder_path=folder,
                path_in_repo=checkpoint.name,
                revision=CHECKPOINTS,
                delete_patterns="*",  # what an earlier run left under this name
                commit_message=checkpoint.name,
            )
        except Exception as error:  # the client raises a dozen kinds
            words = ["hf", "upload", self._repository, str(checkpoint), checkpoint.name, "--revision", CHECKPOINTS]
            warn(
                f"{checkpoint.name} is in {checkpoint.parent}, but its upload failed "
                f"({hub_errors.hub_reason(error)}); the run continues; "
                f"{_push_later(shlex.join(words), self._token)}"
            )
        else:
            say(f"pushed {checkpoint.name} to branch {CHECKPOINTS} of {self._repository}")
        finally:
            shutil.rmtree(self._links, ignore_errors=True)

    def _folder_to_upload(self, checkpoint: Path) -> Path | None:
        """A folder with the files of a checkpoint that rotation does not remove; None where it has removed them."""
        try:
            return Path(shutil.copytree(checkpoint, self._links / checkpoint.name, copy_function=os.link))
        except OSError:  # it is gone, or this file system has no hard links
            shutil.rmtree(self._links, ignore_errors=True)
            return checkpoint if checkpoint.is_dir() else None
