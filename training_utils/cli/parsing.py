"""The command line of a script: argparse built from the flag table, --help, and the checks that follow."""

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from training_utils.base.formats import line_width
from training_utils.base.launch import is_first_here
from training_utils.cli import rules, run_file, table
from training_utils.cli.arguments import Arguments
from training_utils.cli.flag import Flag, Group
from training_utils.cli.launcher_variables import variables_problem
from training_utils.cli.notices import notices
from training_utils.cli.packages import installation_problem
from training_utils.cli.scripts import SCRIPTS
from training_utils.cli.secrets import HANDED_ON
from training_utils.cli.unknown import advice
from training_utils.cli.values import plain_type

METAVARS = {int: "N", float: "X", str: "TEXT"}


def parse(argv: Sequence[str] | None, script: str, description: str) -> Arguments:
    """Parse and check the command line of a script, by its name; `argv` None is this process' own. The first line of
    `description` stands above --help.

    Exits with 2 and one sentence for a wrong flag, a wrong value or flags that contradict each other.
    """
    groups = table.groups_of(script)
    known = table.flags_of(script)
    description = description.splitlines()[0]
    parser = build(description, groups)
    given = vars(parser.parse_args(argv))
    incomplete = variables_problem(SCRIPTS[script])
    if incomplete is not None:
        parser.leave(incomplete)
    absent = installation_problem(SCRIPTS[script])
    if absent is not None:
        parser.leave(absent, only_first=True)
    if "config" in given:
        values = build(description, groups, exit_on_error=False)
        given = _beside_the_file(_from_file(parser, given["config"], known, values), given, known)
    # --check_data needs no model.
    missing = [f"--{name}" for name, flag in known.items() if flag.required and name not in given]
    if missing and not given.get("check_data"):
        parser.error(f"the following arguments are required: {', '.join(missing)}")
    # An unset variable of the shell counts as not given.
    for name in ("train_data_dir", "resume_from_checkpoint"):
        if given.get(name) == "":
            del given[name]
    args = Arguments(**{name: given.get(name, flag.default) for name, flag in known.items()})
    args.script = SCRIPTS[script]
    args.given = frozenset(name for name in given if given[name] is not False)
    _take_from_environment(args)
    problem = rules.contradiction(args)
    if problem is not None:
        parser.error(problem)
    _apply_other_names(args)
    args.notices = notices(args)
    _apply_consequences(args)
    return args


def build(description: str, groups: Sequence[Group], exit_on_error: bool = True) -> "_Parser":
    """The parser for these flags. A value that the user did not give is absent from its result, even a required one.

    Each --NAME that is on or off has a --no_NAME, which the help leaves out. Without `exit_on_error` a wrong value
    raises argparse.ArgumentError.
    """
    parser = _Parser(
        usage="%(prog)s [flags]",
        description=description,
        formatter_class=_Help,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,  # an abbreviated --hub_token would not be recognised as a secret
        exit_on_error=exit_on_error,
    )
    for group in groups:
        section = parser.add_argument_group(group.title)
        for flag in group.flags:
            _add_flag(section, flag)
    return parser


def _add_flag(section: Any, flag: Flag) -> None:
    if flag.type is bool:
        section.add_argument(f"--{flag.name}", action="store_true", help=_escaped(flag.help))
        section.add_argument(f"--no_{flag.name}", action="store_false", dest=flag.name, help=argparse.SUPPRESS)
        return
    default = "" if flag.default is None else f" (default: {flag.default})"
    metavar = METAVARS[plain_type(flag.type)]
    words = flag.help + default
    if flag.choices:
        metavar = f"{{{','.join(flag.choices)}}}"
        # argparse does not break the line of a flag and its choices.
        if len(f"  --{flag.name} {metavar}") > line_width(sys.stdout):
            metavar = METAVARS[str]
            words = f"{flag.help}: {', '.join(flag.choices)}{default}"
    section.add_argument(
        f"--{flag.name}",
        type=flag.type,
        nargs=flag.nargs,
        choices=flag.choices,
        metavar=metavar,
        help=_escaped(words),
    )


def _escaped(text: str) -> str:
    return text.replace("%", "%%")


class _Help(argparse.HelpFormatter):
    """Help that fits the terminal."""

    def __init__(self, prog: str) -> None:
        width = line_width(sys.stdout)
        super().__init__(prog, max_help_position=min(36, width // 3), width=width)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One sentence and exit code 2, instead of a screen of usage."""
        if message.startswith("unrecognized arguments: "):
            word = message.split(": ", 1)[1].split()[0].split("=")[0]
            message = self._not_a_flag(word)
        self.leave(f"{message} (see --help)", only_first=True)

    def leave(self, message: str, only_first: bool = False) -> NoReturn:
        """Print a sentence and leave with exit code 2. With `only_first` the first process of a machine prints it for
        all of them."""
        if only_first and not is_first_here():
            time.sleep(2)  # or the launcher, which ends all when one has ended, could end the first one too early
            self.exit(2)
        self.exit(2, f"{self.prog}: error: {message}\n")

    def _not_a_flag(self, word: str) -> str:
        """What to say of a word of the command line that is no flag of this script."""
        known = self._option_string_actions
        if not word.startswith("-"):
            return (
                f"'{word}' belongs to no flag: one that is on or off takes no value, and a value with spaces, quotes"
            )
        return f"there is no flag {word}{advice(word, known)}"


def _from_file(
    parser: argparse.ArgumentParser, path: str, known: Mapping[str, Flag], values: argparse.ArgumentParser
) -> dict[str, Any]:
    """The flags that a file gives, {name: value}; exits as the parser does. `values` is one that raises errors."""

    def convert(name: str, text: str) -> Any:
        try:
            value = getattr(values.parse_args([f"--{name}={text}"]), name)
        except argparse.ArgumentError as error:
            raise ValueError(error.message) from error
        return value[0] if known[name].nargs else value

    try:
        return run_file.read(path, known, convert)
    except ValueError as error:
        parser.error(str(error))


def _beside_the_file(filed: dict[str, Any], given: dict[str, Any], known: Mapping[str, Flag]) -> dict[str, Any]:
    """The flags of a file and those of the command line, which win, and put what they replace out of effect."""
    replaced = {other for name in given for other in known[name].replaces}
    return {name: value for name, value in filed.items() if name not in replaced} | given


def _take_from_environment(args: Arguments) -> None:
    if args.hub_token is None:
        args.hub_token = os.environ.get(HANDED_ON)
    if os.environ.get("LOCAL_RANK"):
        args.local_rank = int(os.environ["LOCAL_RANK"])


def _apply_other_names(args: Arguments) -> None:
    """Set the flag that another one stands for."""
    if args.get("use_8bit_adam"):
        args.optimizer = "adamw8bit"
    if args.get("proportion_empty_prompts"):
        args.caption_dropout = args.proportion_empty_prompts
    if args.get("full_bf16"):
        args.mixed_precision = "bf16"


def _apply_consequences(args: Arguments) -> None:
    """Set the flags that have no say beside others."""
    if args.dry_run:
        # It logs each step, and leaves nothing behind.
        args.logging_steps = 1
        args.validation_steps = 0
        args.checkpointing_steps = 0
        args.report_to = "none"
        args.push_to_hub = False
        args.validation_at_start = False
        # The frozen networks run where the samples are made.
        if args.caches.images or args.caches.captions:
            args.dataloader_num_workers = 0
    if not args.cache_latents or not rules.crops_at_random(args):
        args.cached_crops = None
    if not args.streaming:
        args.shuffle_buffer = None
