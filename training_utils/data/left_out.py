"""What lies in a dataset and is not trained: counted and named, by the reason."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from training_utils.data.plug_ins import PLUG_INS

NAMED = 10  # of each reason that many are named

# Reason: what to say of several such files, and what to do about them, where there is something.
REASONS = {
    **{plug_in.title: (f"{plug_in.title} images", plug_in.advice) for plug_in in PLUG_INS},
    "kind": ("images of an unsupported kind", "convert them to PNG"),
    "mask": ("masks and conditioning images of another trainer", ""),
    "hidden": ("hidden images (names that begin with a dot)", ""),
    "folder": ("folders that are hidden or belong to another program", ""),
    "unreadable folder": ("folders that cannot be read", ""),
    "broken link": ("links to what does not exist", ""),
    "shard link": ("links in shards to what does not come before them", "write the shards with the files themselves"),
    "sparse": ("sparse files in shards", "write the shards without --sparse"),
    "caption": ("text files that belong to no image", ""),
    "other": ("files of other kinds", ""),
}


@dataclass(frozen=True)
class Group:
    """Files that are left out for the same reason: what they are, how many, the first ones, and what to do about
    them, where there is something."""

    what: str
    count: int
    names: list[str]
    advice: str

    def listed(self, shown: Callable[[str], str] = str) -> str:
        """The names, each as `shown` gives it, and how many more there are."""
        rest = self.count - len(self.names)
        more = f" and {rest:,} more" if rest else ""
        return ", ".join(map(shown, self.names)) + more

    @property
    def sentence(self) -> str:
        """What a run says of them."""
        advice = f"; {self.advice}" if self.advice else ""
        return f"{self.count:,} {self.what} are skipped: {self.listed()}{advice}"


@dataclass
class LeftOut:
    """What is not trained, {reason: how many}, and the names of the first ones. Reasons are keys of REASONS."""

    counts: dict[str, int] = field(default_factory=dict)
    names: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, name: str) -> None:
        """Count one more."""
        self._add(reason, 1, [name])

    def merge(self, other: "LeftOut") -> None:
        """Count what another one has."""
        for reason, count in other.counts.items():
            self._add(reason, count, other.names[reason])

    def _add(self, reason: str, count: int, names: list[str]) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + count
        known = self.names.setdefault(reason, [])
        known += names[: NAMED - len(known)]

    def __len__(self) -> int:
        return sum(self.counts.values())

    def groups(self) -> Iterator[Group]:
        """What there is, in the order of REASONS."""
        for reason, (what, advice) in REASONS.items():
            if count := self.counts.get(reason, 0):
                yield Group(what, count, self.names[reason], advice)

    def added_to(self, sentence: str) -> str:
        """A sentence about missing images or captions, and what there is instead."""
        return "; ".join([sentence, *(group.sentence for group in self.groups())])

    def as_json(self) -> list[dict[str, Any]]:
        """What JSON can hold of it."""
        return [self.counts, self.names]

    @classmethod
    def from_json(cls, facts: list[dict[str, Any]]) -> "LeftOut":
        """What `as_json` made."""
        counts, names = facts
        return cls(counts, names)
