"""Captions: which one a sample takes, what is wrong with them, and which are too long."""

from training_utils.base.console import warn
from training_utils.data.problems import Problem, caption_fault


def texts_of(value):
    """The captions in a usable cell, a list of strings."""
    return [value] if isinstance(value, str) else list(value)


def caption_problems(rows):
    """The captions of a dataset that cannot be used, {index: Problem}, and the indices of the rows with an empty one,
    a list. Both are empty where captions are not read."""
    problems, empty = {}, []
    for index, value in enumerate(rows.values()):
        fault = caption_fault(value)
        if fault:
            problems[index] = Problem("no usable caption", rows.name(index), fault)
        elif not all(text.strip() for text in texts_of(value)):
            empty.append(index)
    return problems, empty


def warn_of_long_captions(rows, tokenizer, most=100_000):
    """Warn of captions beyond the tokenizer's limit, whose rest the text encoder never sees. Looks at the first `most`
    rows; at none of a stream, which it would have to read as a whole."""
    if rows.stream is not None:
        return
    count = min(len(rows), most)
    values = rows.dataset.select(range(count))[rows.caption_column]
    texts = [text for value in values for text in texts_of(value)]
    limit = tokenizer.model_max_length
    long = sum(
        len(ids) > limit
        for start in range(0, len(texts), 1000)
        for ids in tokenizer(texts[start : start + 1000], truncation=False, verbose=False).input_ids
    )
    if long:
        among = f"the first {len(texts)}" if count < len(rows) else f"{len(texts)}"
        warn(f"{long} of {among} captions are longer than {limit} tokens; the text encoder does not see the rest")


def choose_caption(captions, draw, dropout=0.0):
    """One of a row's captions, or with probability `dropout` None, which is trained as no caption; both drawn."""
    if dropout and draw("caption_dropout").random() < dropout:
        return None
    return captions[int(draw("caption").integers(len(captions)))] if len(captions) > 1 else captions[0]


def shuffle_tags(caption, draw, kept=0):
    """A caption whose parts between commas, its tags, are put into a drawn order, but for the first `kept`."""
    tags = [tag for tag in (part.strip() for part in caption.split(",")) if tag]
    order = draw("tags").permutation(len(tags[kept:]))
    return ", ".join(tags[:kept] + [tags[kept + at] for at in order])
