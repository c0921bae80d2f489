"""Samples and batches as the data workers make them."""

import numpy as np

from training_utils.base.console import say, warn
from training_utils.base.draws import SampleDraws
from training_utils.base.errors import UserError
from training_utils.data.problems import BadSample


class Samples:
    """Rows, prepared: item (epoch, index, weight) is the dict of arrays that `prepare(rows, index, draw)` makes.

    With `on_bad_sample` "skip", the next usable row stands in for one that turns out to be a BadSample, with the draws
    of the place: so what is trained is still a function of the data, seed, epoch and index alone. The sample then
    also holds "skipped", sentences about the rows that were skipped.
    """

    def __init__(self, rows, prepare, seed, on_bad_sample="error"):
        self.rows, self.prepare, self.seed, self.on_bad_sample = rows, prepare, seed, on_bad_sample

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, key):
        epoch, index, weight = key
        draw, skipped = SampleDraws(self.seed, epoch, index), []
        for at in range(index, index + len(self)):
            try:
                sample = self.prepare(self.rows, at % len(self), draw)
            except BadSample as error:
                if self.on_bad_sample == "error":
                    return self.refusal(error)
                skipped.append(str(error))
            except UserError as error:
                return error  # raised in a worker it would arrive as a stack trace
            else:
                sample["weight"] = np.float32(weight)
                return sample | {"skipped": skipped} if skipped else sample
        return UserError(f"not one of {len(self)} samples can be used; the first: {skipped[0]}")

    @staticmethod
    def refusal(error):
        """The UserError that a BadSample becomes where none may be skipped."""
        return UserError(f"{error}; fix or remove it, or leave it out with --on_bad_sample skip", everywhere=False)


def collate(samples):
    """Stack samples into one dict of arrays with a leading batch axis; a UserError among them is handed on.

    Where rows were skipped, "skipped" holds the sentences about them, a list for `note_skipped`.
    """
    for sample in samples:
        if isinstance(sample, UserError):
            return sample
    skipped = [sentence for sample in samples for sentence in sample.pop("skipped", [])]
    batch = {key: np.stack([sample[key] for sample in samples]) for key in samples[0]}
    return batch | {"skipped": skipped} if skipped else batch


def note_skipped(rows, sentences):
    """Warn of rows that others stood in for, each once in this process, and count them in the findings."""
    for sentence in sentences:
        if sentence not in rows.findings.skipped:
            rows.findings.skipped.add(sentence)
            warn(f"{sentence}; the next image stands in for it", everywhere=True)


def say_skipped(skipped):
    """Say at the end of a run how many images others stood in for; `skipped` is the set in the findings."""
    if skipped:
        say(f"{len(skipped)} images could not be used in training; each time the next one stood in for it")
