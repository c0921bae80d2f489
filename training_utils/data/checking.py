"""Looking at every caption and at the header of every image before anything is trained."""

import numpy as np

from training_utils.base.console import bar, warn
from training_utils.base.errors import UserError
from training_utils.base.formats import shortened
from training_utils.data import image_ops, parallel
from training_utils.data.captions import caption_problems
from training_utils.data.problems import Problem, listing, open_image, problem_of


def header_problems(rows):
    """The images that cannot be used as far as it shows without decoding them, {index: Problem}.

    Images that lie inside a table are not opened: reading all of them would take as long as decoding them.
    """
    problems = {int(at): Problem("no image", rows.name(int(at))) for at in rows.without_image()}
    files = rows.files()
    for index, problem in zip(
        files, parallel.read_ahead(_header_problem, rows.select(files).cells(), parallel.num_threads())
    ):
        if problem:
            problems.setdefault(int(index), problem)
    return problems


def _header_problem(named_cell):
    name, cell = named_cell
    try:
        with open_image(cell):
            return None
    except Exception as error:
        return problem_of(error, name)


def image_sizes(rows):
    """The size (width, height) of every image when it is upright, in pixels, int64, shape (N, 2).

    Headers are read, in threads, and no pixels. An image that cannot be opened gets zeros.
    """
    sizes = bar(parallel.read_ahead(_size_of, rows.cells(), parallel.num_threads()), "sizes of images", len(rows))
    return np.array(list(sizes), dtype=np.int64).reshape(-1, 2)


def _size_of(named_cell):
    try:
        with open_image(named_cell[1]) as image:
            return image_ops.upright_size(image)
    except Exception:  # `check`, or reading it, says what is wrong
        return (0, 0)


def check_dataset(rows, on_bad_sample="error"):
    """Look at every caption, and open the header of every image that is a file.

    Samples that cannot be used raise a UserError that lists them, or with `on_bad_sample` "skip" are listed in a
    warning. Returns the indices of those among the rows, for `ImageDataset.without`. Malformed metadata, and a
    dataset of which nothing can be used, are errors either way.
    """
    findings = rows.findings
    if findings.malformed:
        more = len(findings.malformed) - 1
        rest = f" (and {more} more such lines, which --check_data lists)" if more else ""
        raise UserError(findings.malformed[0] + rest)
    captions, empty = caption_problems(rows)
    bad = header_problems(rows) | captions
    problems = [*findings.problems, *(bad[index] for index in sorted(bad))]
    if problems and on_bad_sample == "error":
        captionless = any(problem.kind == "no usable caption" for problem in problems)
        advice = "give each image a caption" if captionless else "fix or remove them"
        rest = " (--check_data lists all of them)" if len(problems) > 10 else ""
        raise UserError(f"{listing(problems)}; {advice}, or leave such samples out with --on_bad_sample skip{rest}")
    if len(bad) == len(rows):
        raise UserError(f"not one sample can be used: {listing(problems)}")
    if problems:
        warn(f"{len(problems)} of {len(findings.problems) + len(rows)} samples are left out: {listing(problems)}")
    if findings.unnamed:
        where = f"{len(findings.unnamed)} of {findings.images} images in {rows.root or 'the shards'}"
        lack = "are not in the metadata" if rows.caption_column is None else "have no caption"
        warn(f"{where} {lack} and are left out")
    if findings.repeats:
        warn(f"{findings.repeats} lines of the metadata name an image again; each line is a sample")
    if empty:
        warn(f"{len(empty)} captions are empty and are trained as such: {shortened([rows.name(i) for i in empty])}")
    return sorted(bad)
