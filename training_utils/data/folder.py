"""Reading a folder of images, or of tar shards, and the captions beside them."""

import csv
import io
import json
import os

from training_utils.base.console import warn
from training_utils.base.errors import reason_of
from training_utils.base.formats import shortened
from training_utils.data import files, problems, tar
from training_utils.data.problems import Problem


def read_shards(folder, found, caption_column, findings, words_of=None):
    """([(place, caption)] of the captioned images in tar shards, the caption column)."""
    images = [
        image
        for shard in found
        for image in tar.index(os.path.realpath(shard), files.IMAGE_ENDINGS, caption_column, findings.malformed)
    ]
    if words_of:
        images = [(place, words_of(place) if caption is None else caption) for place, caption in images]
    findings.images = len(images)
    findings.unnamed = [tar.shown(place) for place, caption in images if caption is None]
    named = [(place, caption) for place, caption in images if caption is not None]
    if not named and not findings.malformed:
        lack = "captions: put a .txt, .caption or .json beside each image" if images else "images"
        findings.malformed.append(f"the shards in {folder} ({shortened(found, 1)}) hold no {lack}")
    return named, caption_column


def read_folder(folder, found, caption_column, findings, words_of=None):
    """([(place, caption)] of the captioned images in a folder, the caption column); of all images, and None, where
    nothing can be made of the captions. Adds to the findings."""
    places = [os.path.realpath(path) for path in found]
    findings.images = len(found)
    named = read_captions(folder, found, caption_column, findings, words_of)
    if findings.malformed and not named:
        caption_column, named = None, [(place, "") for place in places]
    known = {place for place, _ in named}
    findings.unnamed = [place for place in places if place not in known]
    findings.repeats = len(named) - len(known)
    return named, caption_column


def usable_samples(named, findings):
    """The (place, caption) that can be in a dataset; the others become problems among the findings."""
    usable = []
    for place, caption in named:
        if not tar.is_place(place) and not os.path.isfile(place):
            findings.problems.append(Problem("absent", place))
        elif problems.caption_fault(caption):
            findings.problems.append(Problem("no usable caption", tar.shown(place), problems.caption_fault(caption)))
        elif not problems.is_unicode(place):
            findings.problems.append(Problem("name not UTF-8", tar.shown(place)))
        else:
            usable.append((place, caption))
    return usable


def make_table(usable, image_column, caption_column):
    """A Dataset of two columns, places and captions; of the first alone where `caption_column` is None."""
    import datasets

    rows = {image_column: [place for place, _ in usable]}
    features = {image_column: datasets.Value("string")}
    if caption_column is not None:
        rows[caption_column] = [caption for _, caption in usable]
        features[caption_column] = datasets.Value("string")
        if any(isinstance(caption, list) for caption in rows[caption_column]):
            rows[caption_column] = [[c] if isinstance(c, str) else c for c in rows[caption_column]]
            features[caption_column] = datasets.List(datasets.Value("string"))
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


def read_captions(folder, found, caption_column, findings, words_of=None):
    """[(absolute path, caption)] in the order of the metadata, an image once for each line that names it; `found` are
    the folder's images. Without metadata each has its own file, or else the caption `words_of(place)`. With
    `caption_column` None the captions are empty, and without metadata all images are named. What is malformed is
    added to the findings."""
    named, malformed = [], findings.malformed
    names = ["metadata.jsonl", "metadata.csv", "metadata.parquet"]
    tables = [path for path in files.files_in(folder)[0] if path.name in names]
    tables.sort(key=lambda table: names.index(table.name))
    for place in sorted({table.parent for table in tables}):
        beside = [table.name for table in tables if table.parent == place]
        if len(beside) > 1:
            warn(f"{place} holds {' and '.join(beside)}, and both are read; remove one")
    for table in tables:
        lacking, lines, word = [], 0, "row" if table.suffix == ".parquet" else "line"
        for line, entry in read_metadata(table, malformed):
            where, lines = f"{table} {word} {line}", lines + 1
            if not isinstance(entry, dict) or not isinstance(entry.get("file_name"), str):
                malformed.append(f'{where} has no "file_name"; each {word} names an image and its caption')
            elif caption_column is None:
                named.append((relative_name(table.parent, entry["file_name"]), ""))
            elif caption_column not in entry:
                have = ", ".join(key for key in entry if key != "file_name") or "none beside file_name"
                lacking.append(f"{where} has no caption column '{caption_column}' (--caption_column); it has {have}")
            else:
                named.append((relative_name(table.parent, entry["file_name"]), entry[caption_column]))
        same = 1 < len(lacking) == lines  # it is the flag that is wrong, or the name of the column
        malformed += [f"{lacking[0]}; nor has any other {word}"] if same else lacking
    if tables and not named and not malformed:
        word = "row" if tables[0].suffix == ".parquet" else "line"
        malformed.append(f"{tables[0]} names no image; each {word} names an image and its caption")
    if tables:
        return named
    if caption_column is None:
        return [(os.path.realpath(path), "") for path in found]
    for path in found:
        place = os.path.realpath(path)
        texts = [text for text in map(path.with_suffix, (".txt", ".caption")) if os.path.isfile(text)]
        if texts:
            content = read_text(texts[0], malformed)
            if content is not None:
                named.append((place, content.strip()))
        elif words_of and words_of(place) is not None:
            named.append((place, words_of(place)))
    if not named and not malformed:
        named_so = next((path for path in found if os.path.isfile(f"{path}.txt")), None)
        repeated = any(
            files.REPEATED.fullmatch(name) for path in found for name in path.relative_to(folder).parts[:-1]
        )
        if named_so:
            advice = (
                f"the caption of {named_so.name} belongs in {named_so.stem}.txt, and there is a {named_so.name}.txt"
            )
        elif repeated and not words_of:
            advice = "with --repeats_from_folders the words in the names of its folders are the captions"
        else:
            advice = (
                "write a metadata.jsonl with lines like "
                f'{{"file_name": "{found[0].name}", "{caption_column}": "what it shows"}}, '
                f"or a {found[0].stem}.txt beside each image"
            )
        malformed.append(f"{folder} has no captions: {advice}")
    return named


def relative_name(folder, name):
    try:
        if "\\" in name and not os.path.exists(folder / name):  # written on Windows
            name = name.replace("\\", "/")
        return os.path.realpath(folder / name)
    except ValueError:  # a zero byte or half a character, which no file's name can hold
        return f"{folder}{os.sep}{name}"


def read_text(path, malformed):
    """The text of a file, or None, and the reason among `malformed`."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        malformed.append(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8")
    except OSError as error:
        malformed.append(f"{path} cannot be read: {error.strerror}")


def read_metadata(path, malformed):
    """(line number, entry) for each line of a metadata.jsonl or metadata.csv that is one, or (row number, from 0,
    entry) for each row of a metadata.parquet; adds to `malformed`."""
    if path.suffix == ".parquet":
        yield from read_parquet(path, malformed)
        return
    text = read_text(path, malformed) or ""
    if path.suffix == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        try:
            header = reader.fieldnames or []
            if header and "file_name" not in header:
                hint = "; columns are to be separated by commas" if set(";\t") & set(header[0]) else ""
                have = f"only {', '.join(header)}{hint}"
                malformed.append(f'{path} has no column "file_name", which names the images, {have}')
                return
            for row in reader:
                if None in row:
                    malformed.append(
                        f"{path} line {reader.line_num} has more fields than the header; quote commas in captions"
                    )
                else:
                    yield reader.line_num, row
        except csv.Error as error:
            malformed.append(f"{path} is not CSV after line {reader.line_num}: {error}")
        return
    for line, content in enumerate(text.split("\n"), start=1):  # splitlines would also split at U+2028
        if content.strip():
            try:
                entry = json.loads(content)
            except json.JSONDecodeError as error:
                malformed.append(f"{path} line {line} is not JSON: {error.msg} at column {error.colno}")
            except (RecursionError, ValueError) as error:  # brackets without end, a number of thousands of digits
                malformed.append(f"{path} line {line} cannot be read: {error}")
            else:
                yield line, entry


def read_parquet(path, malformed):
    """(row number, entry) for each row of a parquet file; adds to `malformed` where it cannot be read."""
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for entry in batch.to_pylist():
                    yield row, entry
                    row += 1
    except (pyarrow.ArrowException, OSError) as error:
        place = f" from row {row} on" if row else ""
        malformed.append(f"{path} cannot be read as parquet{place}: {reason_of(error)}")
