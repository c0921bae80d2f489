"""The nearest word that is known, for a word that is not."""

import difflib
from collections.abc import Iterable


def suggestion(word: str, known: Iterable[str], quote: str = "", cutoff: float = 0.6) -> str:
    """What to add to the sentence that a word is not known: "; did you mean …?", or nothing."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=cutoff)
    return f"; did you mean {quote}{close[0]}{quote}?" if close else ""
