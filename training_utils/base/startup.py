"""Settings that must be made before diffusers and transformers are imported."""

import logging
import signal
import sys
from contextlib import suppress
from pathlib import Path

from training_utils.base import launch
from training_utils.base.console import is_main_process


def begin():
    """Say that libraries are loaded, for a script that was started from a terminal, and have Ctrl-C end it quietly."""
    if Path(getattr(sys.modules["__main__"], "__file__", None) or "").name.startswith("train_text_to_image"):
        if sys.stderr.isatty() and is_main_process():
            print("loading libraries …", file=sys.stderr)  # for ten seconds nothing else is said
        if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
            # Ctrl-C ends the imports without their stack trace; `reporting.run` takes it back.
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def prepare():
    """Leave out what training never uses, and keep the terminal for what concerns the user.

    diffusers imports scipy.stats, where there is one, for the beta sigmas of some samplers: 0.8 s of start-up, and
    random draws that a reproducible start should not make. diffusers and PEFT import bitsandbytes, for quantized
    networks, and it torch's compiler: one to two seconds more; an optimizer of it is imported when it is asked for.
    transformers reports at each import that torchvision, which nothing here needs, is not installed. Call it before
    anything else of the two is imported.
    """
    if not launch.uses_deepspeed():  # accelerate imports it wherever it is installed: two seconds, and warnings
        sys.modules.setdefault("deepspeed", None)

    hidden = sys.modules.setdefault("bitsandbytes", None) is None  # it cannot be imported
    import diffusers.utils.import_utils

    with suppress(ImportError):  # JAX does without it
        import peft.helpers
        import peft.import_utils

        peft.import_utils.is_bnb_available()  # which remembers what it has found
    if hidden:
        del sys.modules["bitsandbytes"]

    diffusers.utils.import_utils._scipy_available = False
    logging.getLogger("transformers.utils.import_utils").addFilter(
        lambda record: "torchvision" not in record.getMessage()
    )

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on a CPU it reports a kernel that it does without

    # Six lines, of which engine.model_folder makes one, or a model that is all here already needs none.
    logging.getLogger("diffusers.pipelines.pipeline_utils").addFilter(
        lambda record: "Couldn't connect to the Hub" not in record.getMessage()
    )

    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()  # a bar for every file read or written
    transformers.utils.logging.disable_progress_bar()
