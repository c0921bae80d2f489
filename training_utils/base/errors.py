"""What a user can fix, as an exception, and how exceptions are put into one line."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any


class UserError(Exception):
    """Something a user can fix, in one sentence. `exit_code` is 2 for a wrong command or dataset, else 1.

    `everywhere` is True for an error that all processes raise together, and False for one that one of them met by
    itself; None where that is not known.
    """

    def __init__(self, message: str, exit_code: int = 2, everywhere: bool | None = None) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.everywhere = everywhere

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled with its cause, so that it keeps it from a data worker or another process; exceptions do not by
        themselves. A cause that cannot be pickled is dropped."""
        state = dict(self.__dict__)
        if self.__cause__ is not None and _can_be_pickled(self.__cause__):
            state["__cause__"] = self.__cause__
        return type(self), self.args, state


def _can_be_pickled(error: BaseException) -> bool:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # a library's exception may raise anything here, and no other code of ours runs
        return False
    return True


def reason_of(error: BaseException) -> str:
    """An exception as one line."""
    message = str(error).strip() or type(error).__name__
    return message.splitlines()[0]


def with_saved_state(error: UserError, save: Callable[[], Path | None]) -> UserError:
    """The UserError of an image that ends a run of one process, which also says where its weights are.

    `save()` writes what was trained until then, and returns its folder, or None where that failed.
    """
    folder = save()
    saved = f"what was trained until then is in {folder}" if folder else "what was trained until then was not written"
    return UserError(f"{error}; {saved}", exit_code=error.exit_code, everywhere=error.everywhere)
