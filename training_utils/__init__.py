"""What the nine training scripts share: flags, data, draws, losses, EMA weights, checkpoints, reporting.

`flags`, `data`, `problems`, `inspection`, `draws`, `losses`, `checkpoints`, `interruption`, `reporting`, `metrics` and
`hub` import no torch when they are imported, so that `--help` answers at once and the JAX script can use them without
it; nor do `report`, which is a program of its own, and `charts`, which draws its curves.
`engine`, `ema`, `lora`, `kandinsky`, `validation` and `libraries` are for the eight torch scripts,
`jax_engine` is for the JAX script.
"""
