"""A look at every caption and every image of a dataset before anything is trained: what `--check_data` prints."""

import hashlib
import os
import sys
from typing import NamedTuple

import numpy as np
from PIL import ExifTags

from training_utils.base.console import bar, is_main_process
from training_utils.base.formats import shortened
from training_utils.cli.options import BucketLimits, DataOptions
from training_utils.data import buckets, image_ops, opening, parallel, selection
from training_utils.data.captions import caption_problems, texts_of
from training_utils.data.problems import KINDS, open_image, problem_of

SIDES = [64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 4096]
RATIOS = {  # upper bound of width / height: what to call it
    1 / 2: "below 1:2, tall",
    2 / 3: "1:2 to 2:3",
    4 / 5: "2:3 to 4:5",
    5 / 4: "4:5 to 5:4, square or nearly",
    3 / 2: "5:4 to 3:2",
    2: "3:2 to 2:1",
    float("inf"): "2:1 and above, wide",
}
BAR = 40  # characters of the longest bar of a histogram


class Look(NamedTuple):
    """What a decoded image is like: its name, its size (width, height) when upright, a digest of its pixels, and
    whether it has more frames than one, transparent parts, or was stored turned."""

    name: str
    size: tuple
    digest: bytes
    animated: bool
    transparent: bool
    turned: bool


def check_data(options: DataOptions, resolution: int | None, limits: BucketLimits | None = None) -> int:
    """Look at a whole dataset and print a report. Returns the exit code: 0 when every sample can be used, else 2.

    `resolution` is the side in pixels that the images are resized to, None where the script does not resize them;
    without `limits` they are cut to squares. Of several processes only the first one looks. Raises UserError for a
    dataset that cannot be opened.
    """
    if not is_main_process():
        return 0
    rows = opening.load_dataset(options)
    looks, problems, bad = look_at_images(rows)
    captions, empty = caption_problems(rows)
    unusable = len(rows.findings.problems) + len(bad | captions.keys())
    problems = [*rows.findings.problems, *captions.values(), *problems]
    samples = len(rows) + len(rows.findings.problems)
    title = options.dataset_name or options.folder or options.config
    blocks = [
        _summary(title, samples, unusable, rows, captions, looks),
        _sources(rows.without(sorted(bad | captions.keys()))),
        _malformed(rows.findings.malformed),
        _unusable_lines(problems, rows.root),
        _remarks(rows, looks, [rows.name(index) for index in empty], None if limits else resolution),
        _histogram("shorter side in pixels", *_sides(looks, resolution)),
        _histogram("width to height", *_ratios(looks)),
        _buckets(rows.without(sorted(bad | captions.keys())), limits),
        [_verdict(samples, unusable, rows.findings.malformed)],
    ]
    text = "\n\n".join("\n".join(lines) for lines in blocks if lines)
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    return 2 if unusable or rows.findings.malformed else 0


# ---------------------------------------------------------------------------------------------------------------------
# Looking
# ---------------------------------------------------------------------------------------------------------------------


def look_at_images(rows):
    """Decode every image, in threads, under a progress bar. Returns a list of Look, a list of Problem, and the set
    of the rows' indices that have such a problem.

    Of a folder each file is decoded once, however many rows show it, and those too whose caption cannot be used.
    """
    images, shown_by, cells = rows.cells(), {}, {}
    if rows.root is not None:
        for index, (name, cell) in enumerate(images):
            shown_by.setdefault(name, []).append(index)
            cells[name] = cell
        for problem in rows.findings.problems:
            if problem.kind == "no usable caption" and os.path.isfile(problem.name):  # which no place in a shard is
                shown_by.setdefault(problem.name, [])
                cells[problem.name] = {"path": problem.name}
        images = cells.items()
    threads = min(8, os.cpu_count() or 1)  # decoding lets go of the interpreter; each thread holds a whole image
    results = parallel.read_ahead(_look, images, threads)
    total = len(shown_by) or len(rows)
    looks, problems, bad = [], [], set()
    for at, result in enumerate(bar(results, "images", total, delay=0)):
        if isinstance(result, Look):
            looks.append(result)
        else:
            problems.append(result)
            bad.update([at] if rows.root is None else shown_by[result.name])
    return looks, problems, bad


def _look(named_cell):
    """An image's Look, or its Problem."""
    name, cell = named_cell
    try:
        with open_image(cell) as image:
            rgb, turned = image_ops.upright_rgb(image), image.getexif().get(ExifTags.Base.Orientation) in range(2, 9)
            transparent = image_ops.is_transparent(image)  # of the first frame
            return Look(name, rgb.size, _digest(rgb), _is_animated(image), transparent, turned)
    except Exception as error:  # Pillow raises a dozen kinds for a damaged file
        return problem_of(error, name)


def _digest(rgb):
    return hashlib.blake2b(repr(rgb.size).encode() + rgb.tobytes(), digest_size=16).digest()


def _is_animated(image):
    if image.format == "MPO":  # a camera's JPEG with a preview behind it
        return False
    try:
        return getattr(image, "n_frames", 1) > 1  # looks through the file, after the first frame was decoded
    except Exception:  # a later frame is damaged, which nothing here reads
        return True


# ---------------------------------------------------------------------------------------------------------------------
# Telling
# ---------------------------------------------------------------------------------------------------------------------


def _short(name, root):
    """A name as the report shows it: inside the folder, on one line whatever it holds."""
    name = os.path.relpath(name, root) if root and os.path.isabs(name) else name
    return name if name.isprintable() else repr(name)[1:-1]


def _size(size):
    return f"{size[0]} x {size[1]}"


def _summary(title, samples, unusable, rows, captions, looks):
    usable = "all of which can be used" if not unusable else f"{unusable:,} of which cannot be used"
    lines = [f"dataset   {title}", f"samples    {samples:,}, {usable}"]
    if rows.caption_column is not None:
        count = sum(len(texts_of(value)) for index, value in enumerate(rows.values()) if index not in captions)
        lines.append(f"captions   {count:,}")
    lines.append(f"images     {len(looks):,} decoded")
    if looks:
        ordered = sorted(looks, key=lambda look: look.size[0] * look.size[1])
        for word, look in (("smallest", ordered[0]), ("median", ordered[len(ordered) // 2]), ("largest", ordered[-1])):
            lines.append(f"{word:10} {_size(look.size)}  {_short(look.name, rows.root)}")
    return lines


def _sources(rows):
    """What an epoch shows of each source, where there are several."""
    if not rows.sources or not len(rows):
        return []
    table = [("source", "usable", "an epoch shows")]
    for source, count, shown in zip(rows.sources, *selection.samples_per_epoch(rows)):
        table.append((_short(source.title, None) or "elsewhere", f"{count:,}", f"{shown:,}"))
    width = max(len(line[0]) for line in table)
    return [f"{title:<{width}}  {count:>8}  {shown:>14}" for title, count, shown in table]


def _malformed(sentences):
    return ["metadata to be fixed", *(f"  {sentence}" for sentence in sentences)] if sentences else []


def _unusable_lines(problems, root):
    """Every problem, under its kind."""
    if not problems:
        return []
    lines = ["cannot be used"]
    for kind in KINDS:
        group = [problem for problem in problems if problem.kind == kind]
        lines += [f"  {kind}: {len(group):,}"] if group else []
        for problem in group:
            found = f"  ({problem.found})" if problem.found not in ("", kind) else ""
            lines.append(f"      {_short(problem.name, root)}{found}")
    return lines


def _remarks(rows, looks, empty, resolution):
    """What can be used and is perhaps not meant: how many, and the first ten by name."""
    small = [look for look in looks if resolution and min(look.size) < resolution]
    same = [group for group in _alike(looks) if len(group) > 1]
    named = {
        "empty captions, trained as such": empty,
        f"images with a side below {resolution} pixels, which are enlarged": [look.name for look in small],
        "images of more than one frame, of which the first is used": [x.name for x in looks if x.animated],
        "images with transparent parts, which are laid on white": [x.name for x in looks if x.transparent],
        "images stored lying, which are turned upright": [x.name for x in looks if x.turned],
        "images without a caption, which are left out": rows.findings.unnamed,
    }
    remarks = [(len(names), what, [_short(name, rows.root) for name in names]) for what, names in named.items()]
    shown = [" = ".join(_short(look.name, rows.root) for look in group[:3]) for group in same]
    remarks.append((sum(len(group) - 1 for group in same), "images that another one equals pixel by pixel", shown))
    remarks.append((rows.findings.repeats, "lines of the metadata that name an image again; each is a sample", []))
    remarks = [remark for remark in remarks if remark[0]]
    lines = ["can be used, but look"] if remarks else []
    for count, what, names in remarks:
        lines.append(f"  {what}: {count:,}")
        lines += [f"      {shortened(names)}"] if names else []
    return lines


def _alike(looks):
    groups = {}
    for look in looks:
        groups.setdefault(look.digest, []).append(look)
    return groups.values()


def _sides(looks, resolution):
    """Labels and counts of the shorter sides; the resolution is one of the bounds."""
    bounds = sorted({*SIDES, *([resolution] if resolution else [])})
    labels = [f"below {bounds[0]}", *(f"{low} to {high - 1}" for low, high in zip(bounds, bounds[1:]))]
    return [*labels, f"{bounds[-1]} and more"], _counts([min(look.size) for look in looks], bounds)


def _ratios(looks):
    return list(RATIOS.values()), _counts([look.size[0] / look.size[1] for look in looks], list(RATIOS)[:-1])


def _counts(values, bounds):
    return np.bincount(np.searchsorted(bounds, values, side="right"), minlength=len(bounds) + 1)


def _buckets(rows, limits):
    """What a run would say of its aspect-ratio buckets."""
    if limits is None or not len(rows):
        return []
    _, lines, remarks = buckets.assign(rows, limits)
    lines = [lines[0], *(f"  {line}" for line in lines[1:])]
    for remark, names in remarks:
        lines += [f"  {remark}", f"      {shortened([_short(name, rows.root) for name in names])}"]
    return lines


def _histogram(title, labels, counts):
    """A bar a label, from the first that is not empty to the last."""
    filled = np.flatnonzero(counts)
    if not len(filled):
        return []
    span = range(filled[0], filled[-1] + 1)
    width = max(len(labels[at]) for at in span)
    lines = [title]
    for at in span:
        bar = "#" * int(np.ceil(BAR * counts[at] / counts.max()))
        lines.append(f"  {labels[at]:<{width}}  {counts[at]:>8,}  {bar}".rstrip())
    return lines


def _verdict(samples, unusable, malformed):
    if malformed:
        return "The metadata have to be fixed before anything can be trained."
    if unusable == samples:
        return "Not one sample can be used: fix them before anything is trained."
    if unusable:
        return f"{unusable:,} of {samples:,} samples cannot be used: fix them, or train with --on_bad_sample skip."
    return "Every sample can be used."
