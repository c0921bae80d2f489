"""What to say of a flag that a script does not have: its name here, why there is none, or the nearest spelling."""

from collections.abc import Collection

from training_utils.cli import table
from training_utils.cli.suggestion import suggestion
from training_utils.cli.table.absent import instead_of


def advice(word: str, known: Collection[str]) -> str:
    """What follows "there is no flag WORD" in a sentence; "" where nothing can be said.

    `known` are the flags of the script, written as `word` is, with or without dashes.
    """
    name = word.lstrip("-").replace("-", "_")
    plain = {flag.lstrip("-") for flag in known}
    names_here = [(flag, flag.called_elsewhere(name)) for flag in table.rows()]
    same = [(flag, words) for flag, words in names_here if words is not None]
    for flag, words in same:
        if flag.name in plain:
            return f"; here it is {words}"
    if same:
        _, words = same[0]
        return f" here; in others of these scripts it is {words}"
    if name in table.names(lambda flag: True) and name not in plain:
        otherwise = [flag.otherwise for flag in table.rows() if flag.name == name and flag.otherwise is not None]
        if otherwise:
            return f" here, only in others of these scripts: {otherwise[0]}"
        return " here, only in others of these scripts" + suggestion(word, known)
    instead = instead_of(name)
    if instead is not None:
        return f" here: {instead}"
    return suggestion(word, known)
