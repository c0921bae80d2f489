"""Uploading the result and the checkpoints to the hub."""

import os
import shlex
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

from training_utils.base import hub_errors
from training_utils.base.console import say, warn
from training_utils.base.errors import UserError
from training_utils.cli.options import HubOptions

CHECKPOINTS = "checkpoints"  # a branch of their own: who loads a pipeline by its id fetches all weights of a branch


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
            f"--push_to_hub cannot open repository {name} ({hub_errors.hub_reason(error)}); see `hf auth login`"
        ) from None


def open_uploads(
    ask: Callable[[Callable[[], str]], str], is_main: bool, options: HubOptions, output_dir: str
) -> tuple[str | None, "Uploads"]:
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
    uploads_checkpoints = options.push_checkpoints and is_main
    return repository, Uploads(repository if uploads_checkpoints else None, options.token, output_dir)


def _later(command, token):
    """The words that tell how to upload later; the token that a flag gave is none of theirs."""
    return f"push it later{', after `hf auth login`,' if token else ''} with: {command}"


def upload_result(folder, repository, token, allowed):
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
            f"the model stands in {folder}, but the upload failed ({hub_errors.hub_reason(error)}); "
            f"{_later(command, token)}",
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
                f"{name} stands in {checkpoint.parent}, but its upload failed ({hub_errors.hub_reason(error)}); "
                "the run goes on; "
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
