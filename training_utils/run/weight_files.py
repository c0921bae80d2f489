"""Files of weights: what fails while they are written, and whether one is complete."""

import zipfile
from pathlib import Path


def write_errors() -> tuple[type[Exception], ...]:
    """The exceptions by which a disk that is full, or gone, shows where weights are written.

    torch.save raises RuntimeError, and so does a device that fails; a process without memory for the copy of the
    weights on the host raises MemoryError. Any other exception is a bug.
    """
    from safetensors import SafetensorError

    return OSError, RuntimeError, MemoryError, SafetensorError


def is_complete_safetensors(path: Path) -> bool:
    """Whether a safetensors file can be opened, which compares its header with its size."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np"):
            return True
    except (OSError, SafetensorError):
        return False


def is_complete_torch_file(path: Path) -> bool:
    """Whether a file of torch.save, a zip whose directory comes last, is complete."""
    return zipfile.is_zipfile(path)
