"""The command line. It imports the standard library alone, so that --help and a wrong flag are answered at once."""

from training_utils.cli.arguments import Arguments
from training_utils.cli.parsing import parse
from training_utils.cli.run_file import as_file
from training_utils.cli.secrets import hide_secrets, without_secrets

__all__ = ["Arguments", "as_file", "hide_secrets", "parse", "without_secrets"]
