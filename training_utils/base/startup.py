"""Settings that must be made before diffusers and transformers are imported."""

import logging
import signal
import sys
from contextlib import suppress
from pathlib import Path

from training_utils.base import launch
from training_utils.base.console import is_main_process


def begin() -> None:
    """Say that libraries are loaded, for a script that was started from a terminal, and have Ctrl-C end it quietly."""
    program = getattr(sys.modules["__main__"], "__file__", None) or ""
    if not Path(program).name.startswith("train_text_to_image"):
        return
    if sys.stderr.isatty() and is_main_process():
        print("loading libraries …", file=sys.stderr)  # for ten seconds nothing else is said
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        # Ctrl-C ends the imports without their stack trace; `exit.run_main` takes it back.
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def prepare() -> None:
    """Leave out what training never uses, and keep the terminal for what concerns the user.

    Call it before anything else of diffusers and transformers is imported.
    """
    if not launch.uses_deepspeed():
        # accelerate imports it wherever it is installed: two seconds, and warnings.
        sys.modules.setdefault("deepspeed", None)  # type: ignore[arg-type]  # so that importing it fails
    _import_without_bitsandbytes()
    _leave_out_scipy()
    _quieten()


def _import_without_bitsandbytes() -> None:
    """Have diffusers and PEFT find that bitsandbytes is not installed.

    They import it for quantized networks, and it torch's compiler: one to two seconds. An optimizer of it is imported
    when it is asked for.
    """
    is_hidden = sys.modules.setdefault("bitsandbytes", None) is None  # type: ignore[arg-type]  # importing it fails
    import diffusers.utils.import_utils  # noqa: F401 (which remembers what it has found)

    with suppress(ImportError):  # JAX does without PEFT
        import peft.helpers
        import peft.import_utils

        peft.import_utils.is_bnb_available()  # which remembers what it has found
    if is_hidden:
        del sys.modules["bitsandbytes"]


def _leave_out_scipy() -> None:
    """Have diffusers do without scipy.stats, which it imports for the beta sigmas of some samplers: 0.8 s of start-up,
    and random draws that a reproducible start should not make."""
    import diffusers.utils.import_utils

    diffusers.utils.import_utils._scipy_available = False  # listed in base/private_interfaces.py


def _quieten() -> None:
    """Silence what the libraries report that needs nothing done."""
    # transformers says at each import that torchvision is not installed, which nothing here needs.
    logging.getLogger("transformers.utils.import_utils").addFilter(
        lambda record: "torchvision" not in record.getMessage()
    )
    # On a CPU it reports a kernel that it does without.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # Six lines that models.model_folder turns into one, or that a model which is here already does not need.
    logging.getLogger("diffusers.pipelines.pipeline_utils").addFilter(
        lambda record: "Couldn't connect to the Hub" not in record.getMessage()
    )

    import diffusers.utils.logging
    import transformers.utils.logging

    # A bar for every file that is read or written.
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
