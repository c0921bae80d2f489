"""Names that Unicode can spell in two ways: é as one character, or as e and an accent, as macOS has it."""

import os
import unicodedata


def normal_form(name: str) -> str:
    """The one spelling, Unicode's NFC, of all names that look alike."""
    return unicodedata.normalize("NFC", name)


class FoundNames:
    """The names that folders hold, each folder listed once, when it is first needed."""

    def __init__(self) -> None:
        self._names: dict[str, dict[str, str]] = {}

    def existing(self, path: str) -> str:
        """A path in the spelling in which it exists; as it is where it exists so, or not at all."""
        if path.isascii() or os.path.lexists(path):
            return path
        parent, name = os.path.split(path)
        if not name or parent == path:
            return path
        parent = self.existing(parent)
        return os.path.join(parent, self._in_folder(parent).get(normal_form(name), name))

    def _in_folder(self, folder: str) -> dict[str, str]:
        if folder not in self._names:
            try:
                found = sorted(os.listdir(folder), reverse=True)
            except OSError:
                found = []
            self._names[folder] = {normal_form(name): name for name in found}
        return self._names[folder]
