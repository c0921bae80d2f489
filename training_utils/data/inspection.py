"""Checking every caption and every image of a dataset before anything is trained: what `--check_data` prints."""

import hashlib
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np
from PIL import Image

from training_utils.base.console import bar, is_main_process
from training_utils.base.formats import cut, shortened
from training_utils.cli.options import BucketLimits, DataOptions
from training_utils.data import buckets, color, image_ops, opening, parallel, selection
from training_utils.data.captions import caption_problems
from training_utils.data.dataset import ImageDataset
from training_utils.data.image_files import StoredImage, UnusableImage, decoding, open_image, unusable_if
from training_utils.data.image_ops import Size
from training_utils.data.problems import KINDS, LONGEST_FOUND, LONGEST_NAME, Problem, texts_of

SIDES = [64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 4096]
# Upper bound of width / height: what to call it.
RATIOS = {
    1 / 2: "below 1:2, tall",
    2 / 3: "1:2 to 2:3",
    4 / 5: "2:3 to 4:5",
    5 / 4: "4:5 to 5:4, square or nearly",
    3 / 2: "5:4 to 3:2",
    2: "3:2 to 2:1",
    float("inf"): "2:1 and above, wide",
}
LONGEST_BAR = 40  # characters, in a histogram


@dataclass(frozen=True)
class DecodedImage:
    """What a decoded image is like: its name, its size when upright, a digest of its pixels, and whether it has more
    than one frame, transparent parts, was stored turned, has a color profile that is not sRGB, or one that cannot be
    used."""

    name: str
    size: Size
    digest: bytes
    is_animated: bool
    is_transparent: bool
    is_turned: bool
    is_converted: bool
    has_unusable_profile: bool


def check_data(options: DataOptions, resolution: int | None, limits: BucketLimits | None = None) -> int:
    """Check a complete dataset and print a report. Returns the exit code: 0 when every sample can be used, else 2.

    `resolution` is the side in pixels that the images are resized to, None where the script does not resize them;
    without `limits` they are cut to squares. Only the main process does it. Raises UserError for a dataset that cannot
    be opened.
    """
    if not is_main_process():
        return 0
    dataset = opening.load_dataset(options)
    images, image_problems, bad = decode_images(dataset)
    captions, empty = caption_problems(dataset)
    bad |= captions.keys()
    findings = dataset.findings
    problems = [*findings.problems, *captions.values(), *image_problems]
    unusable = len(findings.problems) + len(bad)
    samples = len(findings.problems) + len(dataset)
    usable = dataset.drop(sorted(bad))
    title = options.dataset_name or options.folder or options.config
    blocks = [
        _summary(title, samples, unusable, dataset, captions, images),
        _sources(usable),
        _malformed(findings.malformed),
        _unusable_lines(problems, dataset.root),
        _remarks(dataset, images, [dataset.name(index) for index in empty], None if limits else resolution),
        _left_out(findings.left_out, dataset.root),
        _histogram("shorter side in pixels", *_sides(images, resolution)),
        _histogram("width to height", *_ratios(images)),
        _buckets(usable, limits),
        [_verdict(samples, unusable, findings)],
    ]
    text = "\n\n".join("\n".join(lines) for lines in blocks if lines)
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    return 2 if unusable or findings.malformed else 0


# ---------------------------------------------------------------------------------------------------------------------
# Decoding
# ---------------------------------------------------------------------------------------------------------------------


def decode_images(dataset: ImageDataset) -> tuple[list[DecodedImage], list[Problem], set[int]]:
    """Decode every image, in threads, under a progress bar. Returns the images, the problems of those that cannot be
    decoded, and the indices of the rows that have such a problem.

    Each file of a folder is decoded once, however many rows show it, and those too whose caption cannot be used.
    """
    images: Iterable[tuple[str, StoredImage]] = dataset.stored_images()
    total = len(dataset)
    rows_of: dict[str, list[int]] = {}  # by name, for files
    if dataset.root is not None:
        files = {}
        for index, (name, stored) in enumerate(images):
            rows_of.setdefault(name, []).append(index)
            files[name] = stored
        for problem in dataset.findings.problems:
            # The name of a shard's member is not a file.
            if problem.kind == "no usable caption" and os.path.isfile(problem.name):
                rows_of.setdefault(problem.name, [])
                files[problem.name] = {"path": problem.name}
        images = files.items()
        total = len(files) or total
    threads = min(8, os.cpu_count() or 1)  # decoding lets go of the interpreter; each thread holds a complete image
    decode = partial(_decode, ignore_profiles=dataset.ignore_color_profiles)
    results = parallel.read_ahead(decode, images, threads)
    decoded: list[DecodedImage] = []
    problems: list[Problem] = []
    bad: set[int] = set()
    for at, result in enumerate(bar(results, "images", total, delay=0)):
        if isinstance(result, DecodedImage):
            decoded.append(result)
        else:
            problems.append(result)
            bad.update([at] if dataset.root is None else rows_of[result.name])
    return decoded, problems, bad


def _decode(named_image: tuple[str, StoredImage], ignore_profiles: bool) -> DecodedImage | Problem:
    name, stored = named_image
    try:
        with unusable_if(MemoryError), open_image(stored) as image:
            rgb = image_ops.upright_rgb(image, ignore_profiles)
            # Asked for before `_is_animated`, which moves on from the first frame.
            transparent = image_ops.is_transparent(image)
            return DecodedImage(
                name=name,
                size=rgb.size,
                digest=_digest(rgb),
                is_transparent=transparent,
                is_turned=image_ops.is_turned(image),
                is_converted=color.is_converted(image),
                has_unusable_profile=color.is_unusable(image),
                is_animated=_is_animated(image),
            )
    except UnusableImage as error:
        return error.problem(name)


def _digest(rgb: Image.Image) -> bytes:
    return hashlib.blake2b(repr(rgb.size).encode() + rgb.tobytes(), digest_size=16).digest()


def _is_animated(image: Image.Image) -> bool:
    if image.format == "MPO":  # a camera's JPEG with a preview behind it
        return False
    try:
        with decoding():
            return getattr(image, "n_frames", 1) > 1  # reads through the file, after the first frame was decoded
    except UnusableImage:  # a later frame is damaged, which nothing here reads
        return True


# ---------------------------------------------------------------------------------------------------------------------
# The report
# ---------------------------------------------------------------------------------------------------------------------


def _short(name, root):
    """A name as the report shows it: inside the folder, on one line whatever it holds."""
    name = os.path.relpath(name, root) if root and os.path.isabs(name) else name
    return cut(name, LONGEST_NAME)


def _size(size):
    return f"{size[0]} x {size[1]}"


def _summary(title, samples, unusable, dataset, captions, images):
    usable = f"{unusable:,} cannot be used" if unusable else "all can be used"
    lines = [f"dataset    {title}", f"samples    {samples:,}, {usable}"]
    if dataset.caption_column is not None:
        values = [value for index, value in enumerate(dataset.raw_captions()) if index not in captions]
        count = sum(len(texts_of(value)) for value in values)
        lines.append(f"captions   {count:,}")
    lines.append(f"images     {len(images):,} decoded")
    if images:
        ordered = sorted(images, key=lambda image: image.size[0] * image.size[1])
        landmarks = {"smallest": ordered[0], "median": ordered[len(ordered) // 2], "largest": ordered[-1]}
        for word, image in landmarks.items():
            lines.append(f"{word:10} {_size(image.size)}  {_short(image.name, dataset.root)}")
    return lines


def _sources(dataset):
    """What an epoch shows of each source, where there are several."""
    if not dataset.sources or not len(dataset):
        return []
    table = [("source", "usable", "an epoch shows")]
    for source, count, shown in zip(dataset.sources, *selection.samples_per_epoch(dataset)):
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
            found = f"  ({cut(problem.found, LONGEST_FOUND)})" if problem.found not in ("", kind) else ""
            lines.append(f"      {_short(problem.name, root)}{found}")
    return lines


def _remarks(dataset, images, empty, resolution):
    """What can be used and is perhaps not meant: how many, and the first ten by name. `empty` are the names of rows
    with an empty caption."""
    small = [image.name for image in images if resolution and min(image.size) < resolution]
    equal = [group for group in _equal_images(images) if len(group) > 1]
    names_of = {
        "empty captions, trained as such": empty,
        f"images with a side below {resolution} pixels, which are enlarged": small,
        "images of more than one frame; the first is used": [image.name for image in images if image.is_animated],
        "images with transparent parts, which are laid on white": [
            image.name for image in images if image.is_transparent
        ],
        "images stored rotated, which are turned upright": [image.name for image in images if image.is_turned],
        _converted(dataset): [image.name for image in images if image.is_converted],
        "images with a color profile that cannot be used, which are taken for sRGB": [
            image.name for image in images if image.has_unusable_profile
        ],
        "images without a caption, which are left out": dataset.findings.unnamed,
    }
    remarks = []
    for what, names in names_of.items():
        remarks.append((what, len(names), [_short(name, dataset.root) for name in names]))
    equations = [" = ".join(_short(image.name, dataset.root) for image in group[:3]) for group in equal]
    copies = sum(len(group) - 1 for group in equal)
    remarks.append(("images that another one equals pixel by pixel", copies, equations))
    repeated_lines = dataset.findings.repeated_lines
    remarks.append(("lines of the metadata that name an image again; each is a sample", repeated_lines, []))
    lines = []
    for what, count, names in remarks:
        if count:
            lines.append(f"  {what}: {count:,}")
            lines += [f"      {shortened(names)}"] if names else []
    return ["usable, but worth checking", *lines] if lines else []


def _converted(dataset):
    """What happens to images whose color profile is not sRGB."""
    if dataset.ignore_color_profiles:
        return "images with a color profile that is ignored (--ignore_color_profiles)"
    return "images with a color profile other than sRGB, which are converted to it"


def _left_out(left_out, root):
    """What lies in the dataset and is not trained, by the reason."""
    lines = []
    for group in left_out.groups():
        lines.append(f"  {group.what}: {group.count:,}")
        lines.append(f"      {group.listed(lambda name: _short(name, root))}")
        lines += [f"      {group.advice}"] if group.advice else []
    return ["not trained", *lines] if lines else []


def _equal_images(images):
    groups = {}
    for image in images:
        groups.setdefault(image.digest, []).append(image)
    return groups.values()


def _sides(images, resolution):
    """Labels and counts of the shorter sides; the resolution is one of the bounds."""
    bounds = sorted({*SIDES, *([resolution] if resolution else [])})
    labels = [f"below {bounds[0]}", *(f"{low} to {high - 1}" for low, high in zip(bounds, bounds[1:]))]
    return [*labels, f"{bounds[-1]} and more"], _counts([min(image.size) for image in images], bounds)


def _ratios(images):
    return list(RATIOS.values()), _counts([image.size[0] / image.size[1] for image in images], list(RATIOS)[:-1])


def _counts(values, bounds):
    return np.bincount(np.searchsorted(bounds, values, side="right"), minlength=len(bounds) + 1)


def _buckets(dataset, limits):
    """What a run would say of its aspect-ratio buckets."""
    if limits is None or not len(dataset):
        return []
    assignment = buckets.assign(dataset, limits)
    lines = [assignment.table[0], *(f"  {line}" for line in assignment.table[1:])]
    for remark, names in assignment.remarks:
        lines += [f"  {remark}", f"      {shortened([_short(name, dataset.root) for name in names])}"]
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
        bar = "#" * int(np.ceil(LONGEST_BAR * counts[at] / counts.max()))
        lines.append(f"  {labels[at]:<{width}}  {counts[at]:>8,}  {bar}".rstrip())
    return lines


def _verdict(samples, unusable, findings):
    if findings.malformed:
        return "The metadata have to be fixed before anything can be trained."
    if unusable == samples:
        return "Not one sample can be used: fix them before anything is trained."
    if unusable:
        return f"{unusable:,} of {samples:,} samples cannot be used: fix them, or train with --on_bad_sample skip."
    left_out = len(findings.left_out)
    beside = f" What else lies there is named above ({left_out:,})." if left_out else ""
    return f"Every sample can be used.{beside}"
