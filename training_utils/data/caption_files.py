"""Caption files: the caption of an image in a file of its own, in a folder as in a shard.

A caption file has the name of its image up to the last dot. Where an image has several, the first that holds a caption
counts, in the order of CAPTION_ENDINGS.
"""

import json
import os
from collections.abc import Iterable
from typing import Any, Generic, NamedTuple, TypeVar

from training_utils.base.errors import reason_of
from training_utils.base.formats import cut, shortened
from training_utils.data.spelling import normal_form

CAPTION_ENDINGS = (".json", ".txt", ".caption")

Item = TypeVar("Item")


class FoundCaption(NamedTuple):
    """What a caption file holds: the caption, None for a null; or else a sentence, `malformed` where the file cannot
    be read, `missing` where its JSON has no such column."""

    value: Any = None
    malformed: str | None = None
    missing: str | None = None

    def sentence(self) -> str | None:
        """Why there is no caption, where that is known."""
        return self.malformed or self.missing


class CaptionFiles(Generic[Item]):
    """The caption files of a folder or of a shard, as whatever describes one, by the name of their image.

    Names that Unicode can spell in two ways are equal where no other is spelled the same.
    """

    def __init__(self) -> None:
        self._exact: dict[str, dict[str, Item]] = {}
        self._normal: dict[str, dict[str, Item]] = {}

    def add(self, stem: str, ending: str, item: Item) -> None:
        """Add the file of this name and ending; it replaces an earlier one of the same."""
        self._exact.setdefault(stem, {})[ending] = item
        normal = normal_form(stem)
        if normal != stem:
            self._normal.setdefault(normal, {})[ending] = item

    def of(self, stem: str) -> list[Item]:
        """The caption files of the image with this name, without its ending, the first that counts first."""
        normal = normal_form(stem)
        found = self._normal.get(normal, {}) | self._exact.get(normal, {}) | self._exact.get(stem, {})
        # An ending in capitals counts where there is none in small letters.
        ordered = sorted(found, key=lambda ending: (CAPTION_ENDINGS.index(ending.lower()), ending != ending.lower()))
        return [found[ending] for ending in ordered]

    def without_image(self, images: Iterable[str]) -> list[str]:
        """The sorted names, without their ending, of caption files that belong to none of these images."""
        known = {normal_form(os.path.splitext(name)[0]) for name in images}
        return sorted(stem for stem in self._exact if normal_form(stem) not in known)


def is_caption_ending(ending: str) -> bool:
    """Whether a file with this ending, with its dot, may hold a caption."""
    return ending.lower() in CAPTION_ENDINGS


def read_caption(where: str, ending: str, content: bytes, caption_column: str) -> FoundCaption:
    """What the content of a caption file holds, of a `.json` in this column; `where` is what to call the file."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return FoundCaption(malformed=f"{where} is not UTF-8 text (byte {error.start}); save it as UTF-8")
    if ending.lower() != ".json":
        return FoundCaption(text.strip())
    try:
        entry = json.loads(text)
    except (RecursionError, ValueError) as error:
        return FoundCaption(malformed=f"{where} is not JSON: {reason_of(error)}")
    if isinstance(entry, dict) and caption_column in entry:
        return FoundCaption(entry[caption_column])
    have = shortened([cut(key) for key in entry]) if isinstance(entry, dict) and entry else "nothing"
    return FoundCaption(missing=f"{where} has no caption column '{caption_column}' (--caption_column); it has {have}")


def first_caption(files: Iterable[FoundCaption]) -> FoundCaption | None:
    """What counts of an image's caption files: the first caption or malformed file, or else why there is no caption.
    None where there is no file."""
    reason = None
    for found in files:
        if found.value is not None or found.malformed:
            return found
        reason = reason or found
    return reason
