"""Captions: which one a sample takes, what is wrong with them, and which are too long."""

import itertools
from typing import Any

from training_utils.base.console import warn
from training_utils.base.draws import SampleDraws
from training_utils.data.dataset import ImageDataset
from training_utils.data.problems import Problem, caption_fault, texts_of


def caption_problems(dataset: ImageDataset) -> tuple[dict[int, Problem], list[int]]:
    """The captions of a dataset that cannot be used, {index: Problem}, and the indices of rows with an empty one.
    Both are empty where captions are not read."""
    problems = {}
    empty = []
    for index, value in enumerate(dataset.raw_captions()):
        fault = caption_fault(value)
        if fault:
            problems[index] = Problem("no usable caption", dataset.name(index), fault)
        elif not all(text.strip() for text in texts_of(value)):
            empty.append(index)
    return problems, empty


def warn_of_long_captions(dataset: ImageDataset, tokenizer: Any, most: int = 100_000) -> None:
    """Warn of captions beyond the tokenizer's limit, whose rest the text encoder never sees.

    Reads the first `most` rows; none of a stream, which it would have to read completely.
    """
    if dataset.stream is not None:
        return
    count = min(len(dataset), most)
    values = itertools.islice(dataset.raw_captions(), count)
    texts = [text for value in values for text in texts_of(value)]
    limit = tokenizer.model_max_length
    long = 0
    for start in range(0, len(texts), 1000):
        tokens = tokenizer(texts[start : start + 1000], truncation=False, verbose=False).input_ids
        long += sum(len(ids) > limit for ids in tokens)
    if long:
        among = f"the first {len(texts)}" if count < len(dataset) else f"{len(texts)}"
        warn(f"{long} of {among} captions are longer than {limit} tokens; the text encoder does not see the rest")


def choose_caption(captions: list[str], draw: SampleDraws, dropout: float = 0.0) -> str | None:
    """One of a row's captions, or with probability `dropout` None, which is trained as no caption; both drawn."""
    if dropout and draw("caption_dropout").random() < dropout:
        return None
    if len(captions) == 1:
        return captions[0]
    return captions[int(draw("caption").integers(len(captions)))]


def shuffle_tags(caption: str, draw: SampleDraws, kept: int = 0) -> str:
    """A caption whose tags, the parts between commas, are put into a drawn order, except the first `kept`."""
    parts = [part.strip() for part in caption.split(",")]
    tags = [tag for tag in parts if tag]
    order = draw("tags").permutation(len(tags[kept:]))
    return ", ".join(tags[:kept] + [tags[kept + at] for at in order])
