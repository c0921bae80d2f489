"""What a user can fix, as an exception, and how exceptions are put into one line."""

import pickle


class UserError(Exception):
    """Something a user can fix, in one sentence. `exit_code` is 2 for a wrong command or dataset, else 1.

    `everywhere` is True for an error that all processes raise together, and False for one that one of them met by
    itself; None where that is not known.
    """

    def __init__(self, message, exit_code=2, everywhere=None):
        super().__init__(message)
        self.exit_code, self.everywhere = exit_code, everywhere

    def __reduce__(self):
        """Pickled with its cause, so that it keeps it from a data worker or another process; exceptions do not by
        themselves. A cause that cannot be pickled is dropped."""
        state = dict(self.__dict__)
        if self.__cause__ is not None and _can_be_pickled(self.__cause__):
            state["__cause__"] = self.__cause__
        return type(self), self.args, state


def _can_be_pickled(error):
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # a library's exception may raise anything here, and no other code of ours runs
        return False
    return True


def reason_of(error):
    """An exception as one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def cut_short(error, keep):
    """The UserError of an image that ends a run of one process. `keep()` writes what was trained until then, and
    returns its folder, or None."""
    folder = keep()
    kept = f"what was trained until then is in {folder}" if folder else "what was trained until then was not written"
    return UserError(f"{error}; {kept}", exit_code=error.exit_code, everywhere=error.everywhere)
