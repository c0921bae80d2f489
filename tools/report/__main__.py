"""`python -m tools.report` begins here."""

import sys

from tools.report.command import PROGRAM, main
from training_utils.run import exit

# What an error's sentence begins with; this file's own name would tell nobody anything.
sys.argv[0] = PROGRAM
exit.run_main(main)
