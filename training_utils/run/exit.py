"""How a script ends: its exit code, and one sentence for what the user can fix."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from training_utils.base import exit_callbacks
from training_utils.base.console import TolerantStream, is_main_process, warn
from training_utils.base.errors import UserError, reason_of
from training_utils.cli.secrets import without_secrets
from training_utils.run import signals

TRACEBACK = "TRAINING_TRACEBACK"  # the variable that, set to 1, shows what led to an error of one sentence
INTERRUPTED = 130  # the exit code of a program that Ctrl-C has ended


def run_main(main: Callable[[Sequence[str]], int | None]) -> None:
    """Call `main(argv)` and leave with its exit code; a UserError becomes one sentence, without a stack trace unless
    TRAINING_TRACEBACK=1 asks for it.

    Secrets leave sys.argv, which trackers record.
    """
    argv = sys.argv[1:]
    sys.argv[1:] = without_secrets(argv)
    sys.stderr = TolerantStream(sys.stderr)
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # as startup.begin has left it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signals.follow_launcher()
    # A tracker writes its files in the background; when it cannot any more, the run goes on without it.
    threading.excepthook = _report_background_failure
    try:
        code = main(argv)
    except UserError as error:
        code = _report_user_error(error)
    except Exception as error:
        code = _report_failure(error)
    except KeyboardInterrupt:  # before the loop, where there is nothing to save yet
        code = INTERRUPTED
    exit_callbacks.call_exit_callbacks()
    if os.environ.get("WORLD_SIZE", "1") != "1":
        # Without the destructors of process groups, which can wait for each other for ever: see `end_training` in
        # torch_backend.processes and jax_backend.trackers.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)
    sys.exit(code)


def _report_user_error(error: UserError) -> int:
    """Print what a user can fix. Returns the exit code."""
    if error.everywhere is None and not is_main_process():
        # Where all processes have met it, the first one says so, and the launcher ends this one meanwhile.
        time.sleep(2)
    if is_main_process() or not error.everywhere:
        if os.environ.get(TRACEBACK) == "1":
            traceback.print_exception(error)
        _print_error(str(error))
    return error.exit_code


def _report_failure(error: Exception) -> int:
    """Print what is a fault of the machine as a sentence, and a bug as its stack trace. Returns the exit code."""
    sentence = _diagnosis(error)
    if sentence is None or os.environ.get(TRACEBACK) == "1":
        traceback.print_exception(error)
    if sentence is not None:
        _print_error(sentence)
    return 1


def _print_error(sentence: str) -> None:
    print(f"{Path(sys.argv[0]).name}: error: {sentence}", file=sys.stderr, flush=True)


def _report_background_failure(failed: threading.ExceptHookArgs) -> None:
    reason = reason_of(failed.exc_value) if failed.exc_value else failed.exc_type.__name__
    warn(f"a background thread failed ({reason})")


def _diagnosis(error: Exception) -> str | None:
    """A sentence for an error that is neither a bug nor a UserError, or None.

    The types are told by name, since torch may not be installed.
    """
    kind = type(error).__name__
    message = str(error)
    reason = reason_of(error)
    if kind == "OutOfMemoryError":
        return (
            f"out of device memory ({reason}); lower --train_batch_size, or try --gradient_checkpointing, "
            "--mixed_precision or --use_8bit_adam"
        )
    if "RESOURCE_EXHAUSTED" in message:  # JAX's status
        return (
            f"out of device memory ({reason}); lower --train_batch_size, or try --gradient_checkpointing or "
            "--mixed_precision bf16"
        )
    if "DataLoader worker" in message:
        return (
            f"a data worker was killed ({reason}), often because memory or, in a container, /dev/shm ran out (docker "
            "run --ipc=host); lower --dataloader_num_workers, and continue with --resume_from_checkpoint latest"
        )
    is_of_several = os.environ.get("WORLD_SIZE", "1") != "1"
    if is_of_several and (kind.startswith("Dist") or "gloo" in message.lower()):
        rank = os.environ.get("RANK", "?")
        return (
            f"process {rank} lost another process of this run ({reason}), whose own message is above if it could "
            "print one; start all of them again with --resume_from_checkpoint latest"
        )
    return None
