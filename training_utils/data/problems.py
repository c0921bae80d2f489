"""What can be wrong with a sample, and how it is said.

What is wrong with a caption or with an image's header shows before training, what is wrong with an image's content
when it is decoded.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from training_utils.base.errors import UserError
from training_utils.base.formats import cut, shortened
from training_utils.data.left_out import LeftOut

# What can be wrong with a sample, and what to say of several samples of that kind.
UNREADABLE = "files cannot be read as images"
KINDS = {
    "absent": "images named in the metadata do not exist",
    "no usable caption": "captions are neither a string nor a list of strings",
    "no image": "rows hold no image",
    "zero bytes": UNREADABLE,
    "not an image": UNREADABLE,
    "damaged": UNREADABLE,
    "too large": UNREADABLE,
    "not readable": UNREADABLE,
    "too narrow": "images are more than 50 times as long as they are wide",
    "name not UTF-8": "files have a name that is not UTF-8",
}
# What a message shows of names and of what was found: a cell of a table may hold megabytes.
LONGEST_NAME = 300  # characters
LONGEST_FOUND = 200
LISTED = 10  # problems of a kind, in a sentence
LONGEST_LIST = 1500  # characters of all of them, so that a sentence fits onto a screen

# The kinds that depend on the machine and the moment: such a sample is never skipped, since another run may use it.
TEMPORARY = ("absent", "not readable")


@dataclass(frozen=True)
class Problem:
    """Why a sample cannot be used: a kind of KINDS, the sample's name, and what was found where that says more."""

    kind: str
    name: str
    found: str = ""

    def __str__(self) -> str:
        name = cut(self.name, LONGEST_NAME)
        return f"{name} ({cut(self.found, LONGEST_FOUND)})" if self.found else name

    def sentence(self) -> str:
        """What to say of this sample alone."""
        what = "read as an image" if KINDS[self.kind] == UNREADABLE else "used"
        found = cut(self.found, LONGEST_FOUND) or self.kind
        return f"{cut(self.name, LONGEST_NAME)} cannot be {what} ({found})"

    def error(self) -> UserError:
        """The BadSample to raise, or another UserError where the fault may lie in the machine."""
        kind = UserError if self.kind in TEMPORARY else BadSample
        return kind(self.sentence())


class BadSample(UserError):
    """A sample that cannot be used, at this time or any other: the fault lies in the data and not in the machine."""


@dataclass
class Findings:
    """What is known about a dataset beyond its rows.

    `malformed` are sentences about its metadata, `problems` those of samples that are therefore not among the rows,
    `images` is how many images the folder holds, `unnamed` are the paths of those without a caption,
    `repeated_lines` counts the lines that name an image again, `left_out` is what lies beside the images and captions,
    and `skipped` are the sentences that `note_skipped` was given.
    """

    malformed: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    images: int = 0
    unnamed: list[str] = field(default_factory=list)
    repeated_lines: int = 0
    left_out: LeftOut = field(default_factory=LeftOut)
    skipped: set[str] = field(default_factory=set)


def is_unicode(text: str) -> bool:
    """Whether a string can be stored: half a surrogate pair, from JSON or from a file's name, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def caption_fault(value: Any) -> str | None:
    """What was found in place of a caption, as a phrase; None for a caption that can be used."""
    texts = [value] if isinstance(value, str) else value
    if isinstance(texts, list) and texts and all(isinstance(text, str) and is_unicode(text) for text in texts):
        return None
    if value is None:
        return "nothing"
    return "an empty list" if value == [] else repr(value)[:80]


def texts_of(value: str | list[str]) -> list[str]:
    """The captions in a usable entry of a caption column."""
    return [value] if isinstance(value, str) else list(value)


def listing(problems: Iterable[Problem]) -> str:
    """Problems as one clause: how many of each sort, and up to ten of each by name, fewer where names are long."""
    groups: dict[str, list[Problem]] = {}
    for problem in problems:
        groups.setdefault(KINDS[problem.kind], []).append(problem)
    clause = ""
    for most in range(LISTED, 0, -1):
        clause = "; ".join(f"{len(group)} {what}: {shortened(group, most)}" for what, group in groups.items())
        if len(clause) <= LONGEST_LIST:
            break
    return clause
