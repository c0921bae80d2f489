"""What the nine training scripts share: flags, data, draws, losses, caches, EMA weights, checkpoints, reporting.

`engine`, `frozen`, `sharding`, `zero`, `optimizers`, `ema`, `lora`, `kandinsky` and `validation` are for the eight
torch scripts, `jax_engine` is for the JAX script. The others import no torch when they are imported, so that `--help`
answers at once and the JAX script can use them without it. `report` is a program of its own.
"""
