"""What a result depends on beside its flags: library versions, and the memory of this process."""

import functools
import importlib.metadata
import sys


@functools.cache
def library_versions() -> dict[str, str]:
    """The libraries that shape a result, {name: version}."""
    names = ["torch", "diffusers", "transformers", "accelerate", "peft", "jax", "flax", "optax", "numpy"]
    found = {dist.metadata["Name"].lower(): dist.version for dist in importlib.metadata.distributions()}
    return {name: found[name] for name in names if name in found}


def resident_memory() -> int:
    """The host memory that this process has now, in bytes."""
    import psutil

    return psutil.Process().memory_info().rss


def peak_memory() -> int:
    """The most host memory that this process has had, in bytes; where the system does not tell, what it has now."""
    import psutil

    memory = psutil.Process().memory_info()
    if sys.platform == "win32":
        return memory.peak_wset
    try:
        import resource
    except ImportError:
        return memory.rss
    # The unit is bytes on macOS and KiB elsewhere.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def memory_metrics() -> dict[str, float]:
    """The host memory that this process has now, in GiB, as a value to log."""
    return {"memory_resident_gib": resident_memory() / 2**30}
