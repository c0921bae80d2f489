"""The nearest name that is known, for one that is not: only where it is surely the one that was meant."""

from collections.abc import Iterable

SHORTEST = 2  # letters that a misspelt word has at least
WORDS_IN_COMMON = 3  # with which names may differ in another word


def suggestion(word: str, known: Iterable[str], quote: str = "") -> str:
    """What to add to the sentence that a word is not known: "; did you mean …?", or nothing."""
    nearest = closest(word, known)
    return f"; did you mean {quote}{nearest}{quote}?" if nearest is not None else ""


def closest(word: str, known: Iterable[str]) -> str | None:
    """The known name that a word misspells or begins, or None.

    A wrong suggestion is worse than none: each part of the name, between underscores, has to be the same or a typo.
    """
    plain = _plain(word)
    names = {_plain(name): name for name in known}
    if plain in names:
        return names[plain]
    begun = [name for name in names if name.startswith(plain)]
    if len(begun) == 1 and _tells_much_of(plain, begun[0]):
        return names[begun[0]]
    typos = [name for name in names if _is_typo(plain, name)]
    return names[min(typos, key=lambda name: _distance(plain, name))] if typos else None


def _plain(name: str) -> str:
    return name.lstrip("-").replace("-", "_").lower()


def _tells_much_of(beginning: str, name: str) -> bool:
    """Whether the beginning of a name holds a word and a third of its letters, or two thirds of its letters."""
    share = len(beginning) / len(name)
    holds_a_word = "_" in name[: len(beginning) + 1]
    return share > 2 / 3 or (share >= 1 / 3 and holds_a_word)


def _is_typo(word: str, name: str) -> bool:
    ours = name.split("_")
    theirs = word.split("_")
    if len(theirs) == len(ours):
        return all(map(_is_typo_of_part, theirs, ours))
    # Another word at the end, or one that is missing there.
    shared = min(len(theirs), len(ours))
    if shared >= WORDS_IN_COMMON and abs(len(theirs) - len(ours)) == 1:
        return all(map(_is_typo_of_part, theirs[:shared], ours[:shared]))
    return _distance("".join(theirs), "".join(ours)) <= 1  # with other underscores


def _is_typo_of_part(word: str, part: str) -> bool:
    """Whether two words differ in one letter, or one more for every six, but not in their digits, nor in their
    first letter, unless it is exchanged with the second one."""
    if word == part:
        return True
    if [letter for letter in word if letter.isdigit()] != [letter for letter in part if letter.isdigit()]:
        return False
    if word[:1] != part[:1] and sorted(word[:2]) != sorted(part[:2]):
        return False
    shorter = min(len(word), len(part))
    return shorter >= SHORTEST and _distance(word, part) <= 1 + shorter // 6


def _distance(one: str, other: str) -> int:
    """How many letters were added, left out, replaced or exchanged with their neighbour (optimal string alignment)."""
    before: list[int] = []
    row = list(range(len(other) + 1))
    for i, letter in enumerate(one, 1):
        before, last, row = row, before, [i]
        for j, wanted in enumerate(other, 1):
            cost = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (letter != wanted))
            if i > 1 and j > 1 and letter == other[j - 2] and one[i - 2] == wanted:
                cost = min(cost, last[j - 2] + 1)
            row.append(cost)
    return row[-1]
