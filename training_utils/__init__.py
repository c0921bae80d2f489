"""What the nine training scripts share, in rooms that import from left to right only:

base <- cli <- data <- cache <- run <- torch_backend or jax_backend <- the scripts

The rooms up to `run` import neither torch nor JAX, so that `--help` answers at once. `tests/test_structure.py` holds
the rule.
"""

import sys

# Before any file that an older Python cannot read.
if sys.version_info < (3, 11):  # noqa: UP036 (the scripts are not installed, so no installer has checked it)
    version = ".".join(map(str, sys.version_info[:3]))
    problem = f"needs Python 3.11 or later, and {sys.executable} is Python {version}; the README says how to set it up"
    sys.stderr.write(f"{sys.argv[0]}: error: {problem}\n")
    sys.exit(2)
