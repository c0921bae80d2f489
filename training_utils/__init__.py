"""What the nine training scripts share, in rooms that import from left to right only:

base <- cli <- data <- cache <- run <- torch_backend or jax_backend <- the scripts

The rooms up to `run` import neither torch nor JAX, so that `--help` answers at once. `tests/test_structure.py` holds
the rule.
"""
