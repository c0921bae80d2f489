"""Why the hub, or a path that is not there, could not give what was asked for."""

from training_utils.base.errors import reason_of


def hub_reason(error: BaseException) -> str:
    """Why the hub, or a library that asked it, failed with this exception: one line, with what to do where that helps.

    The client's own first line is often no more than `401 Client Error`, and libraries hide it behind theirs.
    """
    from huggingface_hub import errors

    # Which link in the chain of exceptions is the client's.
    link: BaseException | None = error
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


def not_found(name: str, error: BaseException) -> str:
    """Why a model that is not a folder was not found on the hub either: as `hub_reason` says, except for a name that
    can only be a path, where the client says no more than how names of repositories look."""
    has_no_id = name.startswith(("/", ".", "~")) or name.count("/") > 1 or "\\" in name
    if has_no_id or name.endswith(".safetensors"):
        return "there is nothing at this path"
    return hub_reason(error)
