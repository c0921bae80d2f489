"""Samples and batches as the data workers make them."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from training_utils.base.console import say, warn
from training_utils.base.draws import SampleDraws
from training_utils.base.errors import UserError
from training_utils.data.dataset import ImageDataset
from training_utils.data.problems import BadSample

Sample = dict[str, Any]  # arrays by name, and "skipped", a list of sentences, where rows were skipped


class SampleTransform(Protocol):
    """What makes a script's samples, in the data workers.

    `view` makes one view of an image, mirrored or not with `random_flip`, and cropped at random with `random_crop`.
    The caches have what frozen networks made of images and captions; they are None where there is none. A script whose
    network reads no captions has neither `caption_cache` nor `tokenize`.
    """

    random_flip: bool
    random_crop: bool
    image_cache: Any
    caption_cache: Any
    view: Callable[..., Sample]
    tokenize: Callable[[str], Sample]

    def __call__(self, dataset: ImageDataset, index: int, draw: SampleDraws) -> Sample: ...


class Samples:
    """A dataset's rows as samples: item (epoch, index, weight) is the dict of arrays that `transform(dataset,
    index, draw)` makes, or the UserError that it raised.

    With `on_bad_sample` "skip", the next usable row stands in for a BadSample, with the draws of the row it stands in
    for: so what is trained is still a function of the data, seed, epoch and index alone. The sample then also holds
    "skipped", sentences about the rows that were skipped. Whatever else `transform` raises is a bug and is raised.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        transform: SampleTransform,
        seed: int,
        on_bad_sample: str = "error",
    ) -> None:
        self.dataset = dataset
        self.transform = transform
        self.seed = seed
        self.on_bad_sample = on_bad_sample

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int, float]) -> Sample | UserError:
        epoch, index, weight = key
        draw = SampleDraws(self.seed, epoch, index)
        skipped = []
        for at in range(index, index + len(self)):
            try:
                sample = self.transform(self.dataset, at % len(self), draw)
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
    def refusal(error: BadSample) -> UserError:
        """The UserError that a BadSample becomes where none may be skipped."""
        sentence = f"{error}; fix or remove it, or leave it out with --on_bad_sample skip"
        refusal = UserError(sentence, everywhere=False)
        refusal.__cause__ = error
        return refusal


def collate(samples: Sequence[Sample | UserError]) -> Sample | UserError:
    """Stack samples into one dict of arrays with a leading batch axis; a UserError among them is returned instead.

    Where rows were skipped, "skipped" holds the sentences about them, a list for `note_skipped`.
    """
    usable: list[Sample] = []
    for sample in samples:
        if isinstance(sample, UserError):
            return sample
        usable.append(sample)
    skipped = [sentence for sample in usable for sentence in sample.pop("skipped", [])]
    batch: Sample = {key: np.stack([sample[key] for sample in usable]) for key in usable[0]}
    return batch | {"skipped": skipped} if skipped else batch


def note_skipped(dataset: ImageDataset, sentences: Iterable[str]) -> None:
    """Warn of rows that others stood in for, each once in this process, and count them in the findings."""
    for sentence in sentences:
        if sentence not in dataset.findings.skipped:
            dataset.findings.skipped.add(sentence)
            warn(f"{sentence}; the next image stands in for it", everywhere=True)


def say_skipped(skipped: set[str]) -> None:
    """Say at the end of a run how many images others stood in for; `skipped` is the set in the findings."""
    if skipped:
        say(f"{len(skipped)} images could not be used in training; each time the next one stood in for it")
