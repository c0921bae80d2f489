"""Reading a folder of images, or of tar shards, and the captions beside them."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from training_utils.base.console import warn
from training_utils.base.formats import cut, shortened
from training_utils.data import files, problems, tar
from training_utils.data.caption_files import CaptionFiles, first_caption, is_caption_ending, read_caption
from training_utils.data.folder_repeats import repeated_folders
from training_utils.data.metadata import METADATA_FILES, read_metadata
from training_utils.data.problems import Findings, Problem
from training_utils.data.spelling import FoundNames

if TYPE_CHECKING:
    import datasets

WordsOf = Callable[[str], str | None]  # the caption that the name of an image's folder gives, or None


class CaptionedImage(NamedTuple):
    """The absolute path of an image, or its member path in a shard, and what was found for its caption."""

    path: str
    caption: Any


def read_shards(
    folder: Path,
    shards: Sequence[Path],
    caption_column: str | None,
    findings: Findings,
    words_of: WordsOf | None = None,
) -> tuple[list[CaptionedImage], str | None]:
    """(the captioned images in tar shards, the caption column). Adds to the findings."""
    images = []
    for shard in shards:
        images += tar.index_shard(os.path.realpath(shard), caption_column, findings.malformed, findings.left_out)
    captioned = []
    for path, found in images:
        caption = _captioned(path, found, findings.malformed, words_of)
        if caption is None:
            findings.unnamed.append(tar.display_name(path))
        else:
            captioned.append(caption)
    findings.images = len(images)
    if not captioned and not findings.malformed:
        missing = "captions: put a .txt, .caption or .json beside each image" if images else "images"
        sentence = f"the shards in {folder} ({shortened(shards, 1)}) hold no {missing}"
        findings.malformed.append(findings.left_out.added_to(sentence))
    return captioned, caption_column


def read_folder(
    folder: Path,
    images: Sequence[Path],
    caption_column: str | None,
    findings: Findings,
    words_of: WordsOf | None = None,
) -> tuple[list[CaptionedImage], str | None]:
    """(the captioned images in a folder, the caption column); all images, and None, where no caption can be read.
    Adds to the findings."""
    paths = [os.path.realpath(path) for path in images]
    findings.images = len(images)
    captioned = read_captions(folder, images, caption_column, findings.malformed, words_of)
    if findings.malformed and not captioned:
        caption_column = None
        captioned = [CaptionedImage(path, "") for path in paths]
    known = {image.path for image in captioned}
    findings.unnamed = [path for path in paths if path not in known]
    findings.repeated_lines = len(captioned) - len(known)
    return captioned, caption_column


def usable_images(captioned: Sequence[CaptionedImage], findings: Findings) -> list[CaptionedImage]:
    """The images that can be in a dataset; the others become problems among the findings."""
    usable = []
    for image in captioned:
        path, caption = image
        fault = problems.caption_fault(caption)
        if not tar.is_member_path(path) and not os.path.isfile(path):
            findings.problems.append(Problem("absent", path))
        elif fault:
            findings.problems.append(Problem("no usable caption", tar.display_name(path), fault))
        elif not problems.is_unicode(path):
            findings.problems.append(Problem("name not UTF-8", tar.display_name(path)))
        else:
            usable.append(image)
    return usable


def make_table(usable: Sequence[CaptionedImage], image_column: str, caption_column: str | None) -> "datasets.Dataset":
    """A datasets.Dataset of two columns, paths and captions; of the first alone where `caption_column` is None."""
    import datasets

    columns = {image_column: [image.path for image in usable]}
    features = {image_column: datasets.Value("string")}
    if caption_column is not None:
        captions = [image.caption for image in usable]
        features[caption_column] = datasets.Value("string")
        if any(isinstance(caption, list) for caption in captions):
            captions = [[caption] if isinstance(caption, str) else caption for caption in captions]
            features[caption_column] = datasets.List(datasets.Value("string"))
        columns[caption_column] = captions
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def read_captions(
    folder: Path,
    images: Sequence[Path],
    caption_column: str | None,
    malformed: list[str],
    words_of: WordsOf | None = None,
) -> list[CaptionedImage]:
    """The captioned images of a folder in the order of the metadata, an image once for each line that names it.

    Without metadata each has its own file, or else the caption `words_of(path)`. With `caption_column` None the
    captions are empty, and without metadata all images are named. What is malformed is added to `malformed`.
    """
    paths = files.files_in(folder).paths
    tables = [path for path in paths if path.name in METADATA_FILES]
    if tables:
        return _captions_of_metadata(tables, caption_column, malformed)
    if caption_column is None:
        return [CaptionedImage(os.path.realpath(path), "") for path in images]
    captioned = _captions_beside_images(images, paths, caption_column, malformed, words_of)
    if not captioned and not malformed:
        advice = _advice_on_captions(folder, images, caption_column, words_of)
        malformed.append(f"{folder} has no captions: {advice}")
    return captioned


def _captions_of_metadata(tables, caption_column, malformed):
    """The images that metadata name; `tables` are their paths."""
    tables.sort(key=lambda table: METADATA_FILES.index(table.name))
    for parent in sorted({table.parent for table in tables}):
        names = [table.name for table in tables if table.parent == parent]
        if len(names) > 1:
            warn(f"{parent} holds {' and '.join(names)}, and both are read; remove one")
    captioned = []
    found = FoundNames()
    for table in tables:
        word = _entry_word(table)
        count = 0
        without_column = []
        for number, entry in read_metadata(table, malformed):
            where = f"{table} {word} {number}"
            count += 1
            if not isinstance(entry, dict) or not isinstance(entry.get("file_name"), str):
                malformed.append(f'{where} has no "file_name"; each {word} names an image and its caption')
            elif caption_column is None:
                captioned.append(CaptionedImage(_image_path(table.parent, entry["file_name"], found), ""))
            elif caption_column not in entry:
                have = shortened([cut(key) for key in entry if key != "file_name"]) or "none beside file_name"
                sentence = f"{where} has no caption column '{caption_column}' (--caption_column); it has {have}"
                without_column.append(sentence)
            else:
                path = _image_path(table.parent, entry["file_name"], found)
                captioned.append(CaptionedImage(path, entry[caption_column]))
        # Where no entry has the column, it is the flag that is wrong, or the name of the column.
        if 1 < len(without_column) == count:
            malformed.append(f"{without_column[0]}; nor has any other {word}")
        else:
            malformed += without_column
    if not captioned and not malformed:
        word = _entry_word(tables[0])
        malformed.append(f"{tables[0]} names no image; each {word} names an image and its caption")
    return captioned


def _entry_word(table):
    return "row" if table.suffix == ".parquet" else "line"


def _captions_beside_images(images, paths, caption_column, malformed, words_of):
    """The images with a caption in a file of their own among `paths`, or in the name of their folder."""
    caption_files: CaptionFiles[Path] = CaptionFiles()
    for path in paths:
        stem, ending = os.path.splitext(path)
        if is_caption_ending(ending):
            caption_files.add(stem, ending, path)
    captioned = []
    for image in images:
        beside = [path for path in caption_files.of(os.path.splitext(image)[0]) if os.path.isfile(path)]
        found = None
        try:
            # One after the other, so that no file is read behind the one that counts.
            found = first_caption(
                read_caption(str(path), path.suffix, path.read_bytes(), caption_column) for path in beside
            )
        except OSError as error:
            malformed.append(f"{error.filename} cannot be read: {error.strerror}")
            continue
        caption = _captioned(os.path.realpath(image), found, malformed, words_of)
        if caption is not None:
            captioned.append(caption)
    return captioned


def _captioned(path, found, malformed, words_of):
    """An image with what its caption files hold, or else the caption that the name of its folder gives; None where
    there is no caption. Adds to `malformed`."""
    words = words_of(path) if words_of else None
    if words is not None and (found is None or (found.value is None and not found.malformed)):
        return CaptionedImage(path, words)
    if found is None:
        return None
    if found.sentence():
        malformed.append(found.sentence())
        return None
    return CaptionedImage(path, found.value)


def _advice_on_captions(folder, images, caption_column, words_of):
    """How to give captions to a folder that has none, as a clause."""
    misnamed = next((path for path in images if os.path.isfile(f"{path}.txt")), None)
    if misnamed:
        return f"the caption of {misnamed.name} belongs in {misnamed.stem}.txt, and there is a {misnamed.name}.txt"
    if not words_of and any(repeated_folders(path, folder) for path in images):
        return "with --repeats_from_folders the words in the names of its folders are the captions"
    first = images[0]
    return (
        "write a metadata.jsonl with lines like "
        f'{{"file_name": "{first.name}", "{caption_column}": "what it shows"}}, '
        f"or a {first.stem}.txt beside each image"
    )


def _image_path(folder, name, found):
    """The absolute path of an image that metadata in a folder name; `found` knows how files are spelled."""
    try:
        if "\\" in name and not os.path.exists(folder / name):  # written on Windows
            name = name.replace("\\", "/")
        return os.path.realpath(found.existing(str(folder / name)))
    except ValueError:  # a zero byte or half a character, which no file's name can hold
        return f"{folder}{os.sep}{name}"
