"""Checking every caption and the header of every image before anything is trained."""

from collections.abc import Iterable

import numpy as np

from training_utils.base.console import bar, warn
from training_utils.base.errors import UserError
from training_utils.base.formats import shortened
from training_utils.data import image_ops, parallel
from training_utils.data.captions import caption_problems
from training_utils.data.dataset import ImageDataset
from training_utils.data.image_files import StoredImage, UnusableImage, open_image
from training_utils.data.image_ops import Size
from training_utils.data.problems import Findings, Problem, listing


def header_problems(dataset: ImageDataset) -> dict[int, Problem]:
    """The images that cannot be used as far as it shows without decoding them, {index: Problem}.

    Images that lie inside a table are not opened: reading all of them would take as long as decoding them.
    """
    problems = {int(at): Problem("no image", dataset.name(int(at))) for at in dataset.indices_without_image()}
    indices = dataset.file_indices()
    files = dataset.select(indices).stored_images()
    found = parallel.read_ahead(_header_problem, files, parallel.num_threads())
    for index, problem in zip(indices, found):
        if problem:
            problems.setdefault(int(index), problem)
    return problems


def _header_problem(named_image: tuple[str, StoredImage]) -> Problem | None:
    name, stored = named_image
    try:
        with open_image(stored):
            return None
    except UnusableImage as error:
        return error.problem(name)


def image_sizes(dataset: ImageDataset) -> np.ndarray:
    """The size (width, height) of every image when it is upright, in pixels, int64, shape (N, 2).

    Headers are read, in threads, and no pixels. An image that cannot be opened gets zeros.
    """
    read = parallel.read_ahead(_size_of, dataset.stored_images(), parallel.num_threads())
    sizes = list(bar(read, "sizes of images", len(dataset)))
    return np.array(sizes, dtype=np.int64).reshape(-1, 2)


def _size_of(named_image: tuple[str, StoredImage]) -> Size:
    try:
        with open_image(named_image[1]) as image:
            return image_ops.upright_size(image)
    except UnusableImage:  # `check_dataset`, or reading it, says what is wrong
        return (0, 0)


def check_dataset(dataset: ImageDataset, on_bad_sample: str = "error") -> list[int]:
    """Check every caption, and open the header of every image that is a file.

    Samples that cannot be used raise a UserError that lists them, or with `on_bad_sample` "skip" are listed in a
    warning. Returns the indices of those among the rows, for `ImageDataset.drop`. Malformed metadata, and a dataset
    without a usable sample, are errors either way.
    """
    findings = dataset.findings
    if findings.malformed:
        more = len(findings.malformed) - 1
        rest = f" (and {more} more such lines, which --check_data lists)" if more else ""
        raise UserError(findings.malformed[0] + rest)
    captions, empty = caption_problems(dataset)
    bad = header_problems(dataset) | captions
    problems = [*findings.problems, *(bad[index] for index in sorted(bad))]
    if problems and on_bad_sample == "error":
        captionless = any(problem.kind == "no usable caption" for problem in problems)
        advice = "give each image a caption" if captionless else "fix or remove them"
        rest = " (--check_data lists all of them)" if len(problems) > 10 else ""
        raise UserError(f"{listing(problems)}; {advice}, or leave such samples out with --on_bad_sample skip{rest}")
    if len(bad) == len(dataset):
        raise UserError(f"not one sample can be used: {listing(problems)}")
    if problems:
        total = len(findings.problems) + len(dataset)
        warn(f"{len(problems)} of {total} samples are left out: {listing(problems)}")
    _warn_of_findings(dataset, findings, empty)
    return sorted(bad)


def _warn_of_findings(dataset: ImageDataset, findings: Findings, empty: Iterable[int]) -> None:
    """Warn of what can be used, or is left out, and is perhaps not meant; `empty` are rows with an empty caption."""
    for group in findings.left_out.groups():
        warn(group.sentence)
    if findings.unnamed:
        where = f"{len(findings.unnamed)} of {findings.images} images in {dataset.root or 'the shards'}"
        reason = "are not in the metadata" if dataset.caption_column is None else "have no caption"
        warn(f"{where} {reason} and are left out")
    if findings.repeated_lines:
        warn(f"{findings.repeated_lines} lines of the metadata name an image again; each line is a sample")
    if empty:
        names = [dataset.name(index) for index in empty]
        warn(f"{len(names)} captions are empty and are trained as such: {shortened(names)}")
