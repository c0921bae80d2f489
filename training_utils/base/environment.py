"""What a result depends on beside its flags: library versions, and the memory of this process."""

import functools
import importlib.metadata
import os
import resource
import sys
from pathlib import Path


@functools.cache
def library_versions():
    """The libraries that shape a result, {name: version}."""
    names = ["torch", "diffusers", "transformers", "accelerate", "peft", "jax", "flax", "optax", "numpy"]
    found = {dist.metadata["Name"].lower(): dist.version for dist in importlib.metadata.distributions()}
    return {name: found[name] for name in names if name in found}


def peak_memory():
    """The most host memory that this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory_in_use():
    """The host memory that this process has now, in GiB, as a value to log; where only its peak is known, that."""
    try:
        size = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        size = peak_memory()
    return {"memory_resident_gib": size / 2**30}
