"""Keeping secrets, such as the hub's token, out of what others can see."""

import os
import sys
from collections.abc import Sequence

from training_utils.cli import table
from training_utils.cli.arguments import Arguments

HANDED_ON = "TRAINING_HUB_TOKEN"  # the environment variable in which `hide_secrets` hands the token on


def hide_secrets(args: Arguments) -> None:
    """Start this process again without its secrets in the command line, which every user of a machine can list.

    The token goes on in the environment, which others cannot read. A launcher's command line is not ours to change.
    """
    if "hub_token" not in args.given or os.name != "posix":
        return
    launched = {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & os.environ.keys()
    if launched and os.environ.get("RANK", "0") == "0":
        print(
            "warning: the launcher shows --hub_token to every user of this machine, in the list of processes; "
            "`hf auth login`, once, makes the flag unnecessary",
            file=sys.stderr,
        )
    os.environ[HANDED_ON] = args.hub_token
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *without_secrets(sys.orig_argv[1:])])


def without_secrets(argv: Sequence[str] | None = None) -> list[str]:
    """The words of a command line, sys.argv's if None, without secret flags and their values."""
    secrets = table.names(lambda flag: flag.secret)
    kept = []
    skip = False
    for word in sys.argv[1:] if argv is None else argv:
        name = word.lstrip("-").split("=")[0]
        secret = word.startswith("--") and name in secrets
        if not secret and not skip:
            kept.append(word)
        skip = secret and "=" not in word
    return kept
