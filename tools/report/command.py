"""The command that writes the page."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from tools.report.folder import read_run_folders
from tools.report.page import render_page
from training_utils.base.console import warn
from training_utils.base.errors import UserError, reason_of
from training_utils.cli.values import path
from training_utils.run import metrics

PROGRAM = "python -m tools.report"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One sentence and exit code 2, instead of a screen of usage."""
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line: `folders`, a list, and `output`, or None."""
    parser = _Parser(prog=PROGRAM, description="Write one page about a run, or about several.")
    parser.add_argument("folders", nargs="+", metavar="OUTPUT_DIR", help="output folder of a run")
    parser.add_argument(
        "--output", type=path, metavar="FILE", help="the page; left out, report.html in the first folder"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page, print its path, and return the exit code. Raises UserError."""
    args = parse_args(argv)
    runs = read_run_folders(args.folders)
    for run in runs:
        if run.log is None:
            warn(f"{run.path} holds no {metrics.NAME}; its curves are not known")
    output = Path(args.output or runs[0].path / "report.html")
    page = render_page(runs)
    try:
        # A path whose bytes are no text stands in the page with question marks.
        output.write_text(page, encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error.strerror or reason_of(error)}") from error
    print(output)
    return 0
