"""The folders in which downloads, and what is made of them, are kept."""

import os


def downloads(cache_dir: str | None) -> str:
    """The folder of the downloads: --cache_dir, or else the hub client's."""
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    return cache_dir or os.path.expanduser(os.environ.get("HF_HOME") or os.path.join(caches, "huggingface"))


def encodings(encoding_cache_dir: str | None, cache_dir: str | None) -> str:
    """The folder of what frozen networks made of images and captions: --encoding_cache_dir, or one beside the
    downloads."""
    return encoding_cache_dir or os.path.join(downloads(cache_dir), "text-to-image-encodings")
