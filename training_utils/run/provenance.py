"""What a checkpoint remembers about the run that wrote it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Provenance:
    """Which run wrote a checkpoint: enough to tell whether another run continues it.

    `settings` are the flags that shape the result, {name: value that JSON can hold}; `samples` and `dataset_sha256`
    describe the images that are trained on.
    """

    script: str
    world_size: int
    settings: dict[str, Any]
    samples: int
    dataset_sha256: str

    def manifest_entries(self) -> dict[str, Any]:
        """What a checkpoint's manifest says of it."""
        return {
            "script": self.script,
            "world_size": self.world_size,
            "flags": self.settings,
            "data": {"samples": self.samples, "sha256": self.dataset_sha256},
        }

    @classmethod
    def from_manifest(cls, manifest: dict[str, Any]) -> Provenance:
        """What `manifest_entries` has put into a manifest."""
        return cls(
            script=manifest["script"],
            world_size=manifest["world_size"],
            settings=manifest["flags"],
            samples=manifest["data"]["samples"],
            dataset_sha256=manifest["data"]["sha256"],
        )
