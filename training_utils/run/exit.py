"""How a script ends: its exit code, and one sentence for what the user can fix."""

import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

from training_utils.base import exit_callbacks
from training_utils.base.console import TolerantStream, is_main_process, warn
from training_utils.base.errors import UserError, reason_of
from training_utils.cli.secrets import without_secrets
from training_utils.run import signals


def run_main(main):
    """Call `main(argv)` and leave with its exit code; a UserError becomes one sentence, never a stack trace.

    Secrets leave sys.argv, which trackers record.
    """
    argv = sys.argv[1:]
    sys.argv[1:] = without_secrets(argv)
    sys.stderr = TolerantStream(sys.stderr)
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # as libraries.begin has left it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signals.follow_launcher()
    # A tracker writes its files in the background; when it cannot any more, the run goes on without it.
    threading.excepthook = lambda failed: warn(f"a background thread failed ({reason_of(failed.exc_value)})")
    try:
        code = main(argv)
    except UserError as error:
        if error.everywhere is None and not is_main_process():
            time.sleep(2)  # where all have met it, the first one says so, and the launcher ends this one meanwhile
        if is_main_process() or not error.everywhere:
            print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr, flush=True)
        code = error.exit_code
    except Exception as error:
        sentence = _diagnosis(error)
        if sentence is None:
            traceback.print_exc()
        else:
            print(f"{Path(sys.argv[0]).name}: error: {sentence}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:  # before the loop, where there is nothing to save yet
        code = 130
    for leave in exit_callbacks.EXIT_CALLBACKS:
        leave()
    if os.environ.get("WORLD_SIZE", "1") != "1":
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # without the destructors of process groups, see engine.finish and jax_engine.finish
    sys.exit(code)


def _diagnosis(error):
    """A sentence for an error that is no fault of this code but no UserError either, or None.

    The types are told by name, since torch may not be installed.
    """
    kind, reason = type(error).__name__, reason_of(error)
    if kind == "OutOfMemoryError":
        return (
            f"out of device memory ({reason}); lower --train_batch_size, or try --gradient_checkpointing, "
            "--mixed_precision or --use_8bit_adam"
        )
    if "RESOURCE_EXHAUSTED" in str(error):  # JAX's status
        return (
            f"out of device memory ({reason}); lower --train_batch_size, or try --gradient_checkpointing or "
            "--mixed_precision bf16"
        )
    if "DataLoader worker" in str(error):
        return (
            f"a data worker was killed ({reason}), often for want of memory or, in a container, of /dev/shm (docker "
            "run --ipc=host); lower --dataloader_num_workers, and continue with --resume_from_checkpoint latest"
        )
    if os.environ.get("WORLD_SIZE", "1") != "1" and (kind.startswith("Dist") or "gloo" in str(error).lower()):
        rank = os.environ.get("RANK", "?")
        return (
            f"process {rank} lost another process of this run ({reason}), whose own message stands above if it could "
            "leave one; start all of them again with --resume_from_checkpoint latest"
        )
    return None
