"""Images and captions: reading them, checking them, preparing a sample, and which sample goes where.

Nothing here needs torch; what a batch holds are NumPy arrays, which torch's DataLoader turns into tensors.
"""

import csv
import functools
import hashlib
import io
import json
import os
import re
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from . import draws, shards
from .problems import (
    BadSample,
    Findings,
    Problem,
    caption_fault,
    content_of,
    is_unicode,
    listing,
    open_image,
    problem_of,
)
from .reporting import UserError, bar, reason_of, say, shortened, warn

IMAGE_ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff"}
OTHER_ENDINGS = {".heic", ".heif", ".jxl", ".psd", ".svg"}  # of images that Pillow does not read, or not well
COMPRESSED = re.compile(r"\.(tgz|tbz2?|txz|tar\.(gz|bz2|xz|zst|lz4))$")
HIDDEN = (".", "__")  # how names begin that nobody sees: thumbnails, copies, what was deleted
REPEATED = re.compile(r"([1-9]\d{0,2})_(.+)")  # 2024_photos is none
TRANSPARENT_BECOMES = (255, 255, 255)  # what lies under transparent pixels is arbitrary; white is what viewers show
FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
    "nearest_exact": Image.Resampling.NEAREST,  # Pillow's nearest takes pixel centres, which is what "exact" means
}


@dataclass(frozen=True)
class Source:
    """Some rows of a dataset: what to call them, how many times an epoch shows each, or else (for all the sources of
    a dataset, or none) their weight, to which the share of an epoch's samples that they have is proportional. `start`
    is the number of the first row."""

    title: str
    repeats: int = 1
    weight: float | None = None
    start: int = 0


class ImageDataset:
    """The images and captions of a dataset; both are read when they are asked for.

    `dataset` is a datasets.Dataset whose image column is not decoded; `caption_column` is None where only the
    images matter; `root` is the folder of the images, resolved, where they are files; `findings` are shared with
    the rows that are selected from these; `numbers` are the rows' places in the whole dataset, whose images are
    `stored`, an Arrow column. `sizes`, int64, shape (N, 2), are the (width, height) in pixels at which each row is
    trained; None where that is no matter of the data. `sources` are a list of Source, None where there is one, and
    `origins` the index of each row's. `partly` is what BatchPlan takes, and so is `stream`: the rows themselves where
    they are those of streams.py.
    """

    stream = None

    def __init__(
        self,
        dataset,
        image_column,
        caption_column,
        root=None,
        findings=None,
        numbers=None,
        stored=None,
        sizes=None,
        sources=None,
        origins=None,
    ):
        self.dataset, self.image_column, self.caption_column, self.root = dataset, image_column, caption_column, root
        self.sources, self.origins, self.partly = sources, origins, ()
        self.findings = Findings() if findings is None else findings
        self.numbers = np.arange(len(dataset)) if numbers is None else numbers
        self.stored = dataset.data.column(image_column) if stored is None else stored
        self.sizes = sizes
        self._images = dataset[image_column]  # read when they are indexed, like the captions
        self._captions = None if caption_column is None else dataset[caption_column]

    def __len__(self):
        return len(self.dataset)

    def select(self, indices):
        """The rows with these indices, in this order."""
        indices = np.asarray(indices, dtype=np.int64)
        columns = (self.image_column, self.caption_column)
        numbers, sizes, origins = (
            None if values is None else values[indices] for values in (self.numbers, self.sizes, self.origins)
        )
        shared = (self.root, self.findings, numbers, self.stored, sizes, self.sources, origins)
        return ImageDataset(self.dataset.select(indices), *columns, *shared)

    def without(self, indices):
        """The rows but for those with these indices."""
        return self.select(np.delete(np.arange(len(self)), indices)) if len(indices) else self

    def name(self, index):
        """What to call a row in a message: its file where it has one."""
        cell = self.stored[int(self.numbers[index])]
        return self._name(index, {"path": cell["path"].as_py()} if cell.is_valid else None)

    def _cell(self, index):
        return self._images[index]

    def _name(self, index, cell):
        path = cell.get("path") if isinstance(cell, dict) else None
        if path:
            return str(shards.shown(path))
        number = int(self.numbers[index])
        if self.sources is None:
            return f"row {number}"
        source = self.sources[self.origins[index]]
        return f"row {number - source.start} of {source.title}"

    def values(self):
        """What stands in the caption column of every row; nothing where captions are not read."""
        return [] if self.caption_column is None else self.dataset[self.caption_column]

    def drawn(self, count, generator):
        """The indices of `count` rows that a generator draws."""
        return generator.permutation(len(self))[:count]

    def cells(self):
        """(name, cell) of every row: what `open_image` opens."""
        return ((self._name(index, cell), cell) for index, cell in enumerate(self._images))

    def files(self):
        """The indices of the rows whose image is a file by itself, whose header can be read without all the rest."""
        alone = [chunk.field("bytes").is_null().to_numpy(False) for chunk in self.stored.chunks]
        return np.flatnonzero(np.concatenate([np.zeros(0, bool), *alone])[self.numbers])

    def images(self):
        """A number for the image of each row, int64, shape (N,): rows that name the same file have the same one."""
        images, files = np.arange(len(self)), self.files()
        if len(files):
            paths = np.concatenate([chunk.field("path").to_numpy(False) for chunk in self.stored.chunks])
            same = np.unique(paths[self.numbers[files]], return_inverse=True)[1]
            images[files] = len(self) + same
        return np.unique(images, return_inverse=True)[1]

    def without_image(self):
        """The indices of the rows whose image is null."""
        null = np.concatenate([np.zeros(0, bool), *(chunk.is_null().to_numpy(False) for chunk in self.stored.chunks)])
        return np.flatnonzero(null[self.numbers])

    def size(self, index):
        """The (width, height) in pixels at which a row is trained, or None."""
        return None if self.sizes is None else tuple(self.sizes[index].tolist())

    def captions(self, index):
        """The captions of a row, a list of at least one string."""
        return texts_of(self._captions[index])

    def image(self, index):
        """The image of a row, upright, in RGB. Raises BadSample, or UserError where the file cannot be reached."""
        cell = self._cell(index)
        try:
            with open_image(cell) as image:
                return upright_rgb(image)
        except Exception as error:  # Pillow raises a dozen kinds for a damaged file
            problem = problem_of(error, self._name(index, cell))
        raise (UserError if problem.kind in ("absent", "not readable") else BadSample)(problem.sentence())

    def content(self, index):
        """(SHA-256, upright size) of the file of a row's image; for one that cannot be read, of its name, and
        zeros."""
        cell = self._images[index]
        try:
            content = content_of(cell)
            with open_image({"bytes": content}) as image:
                return hashlib.sha256(content).hexdigest(), upright_size(image)
        except Exception:  # what is wrong with it, whoever decodes it will say
            return hashlib.sha256(repr(self.name(index)).encode()).hexdigest(), (0, 0)

    def fingerprint(self):
        """SHA-256 over the captions, over the file names of a folder, and over the weights of sources: a resumed run
        compares it. Without captions and a folder, over up to a thousand images."""
        digest = hashlib.sha256()
        for index, caption in enumerate([None] * len(self) if self._captions is None else self._captions):
            name = os.path.relpath(self.name(index), self.root) if self.root else ""
            digest.update(json.dumps([name, caption]).encode())
        if self._captions is None and not self.root:
            for index in range(0, len(self), -(-len(self) // 1000)):
                digest.update(self._images[index].get("bytes") or b"")
        for indices, count in self.partly:
            digest.update(json.dumps([len(indices), count]).encode())
        return digest.hexdigest()


def upright_rgb(image):
    """The first frame of a PIL image, decoded, upright, in RGB."""
    image.load()  # which may change its mode
    turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    return to_rgb(ImageOps.exif_transpose(image) if turned else image)  # which copies


def upright_size(image):
    """The (width, height) of a PIL image when it is upright, from its header: it is not decoded."""
    # PNG's own getexif decodes the image where its header has no effect, since the tags may follow the pixels.
    turned = Image.Image.getexif(image).get(ExifTags.Base.Orientation) in range(5, 9)
    # TIFF gives the upright size already.
    return image.size[::-1] if turned and image.format != "TIFF" else image.size


def to_rgb(image):
    """An RGB copy of a PIL image of any mode. Transparency lies on white; 16-bit grey is scaled to 8."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image, dtype=np.uint16) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        values = np.asarray(image, dtype=np.float64)
        top = 65535 if values.max(initial=0) > 255 else 255
        return Image.fromarray((values.clip(0, top) * (255 / top)).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, (*TRANSPARENT_BECOMES, 255))
        return Image.alpha_composite(ground, image).convert("RGB")
    return image.convert("RGB")


def is_transparent(image):
    """Whether `to_rgb` shows the ground anywhere in a PIL image."""
    if image.mode.startswith(("I", "F")) or not image.has_transparency_data:
        return False
    return image.convert("RGBA").getextrema()[3][0] < 255


# ---------------------------------------------------------------------------------------------------------------------
# Reading a dataset
# ---------------------------------------------------------------------------------------------------------------------


def load_rows(
    dataset_name=None,
    config_name=None,
    folder=None,
    cache_dir=None,
    image_column="image",
    caption_column="text",
    repeats_from_folders=False,
    config=None,
    shuffle_buffer=None,
):
    """Open a dataset. Returns Rows.

    `config` is a file that names several, as `sources` says; or else `dataset_name` (a hub id or local path, through
    the datasets library, `folder` passed on as data_dir); or else `folder`, a folder of images, of tar shards or of
    parquet tables. `repeats_from_folders` makes the folders in it that are named like `10_sks dog` sources that are
    repeated so often, and these words the caption of an image there that has no other. With `caption_column` None no
    captions are read, and none are needed. With a `shuffle_buffer`, a number of samples, shards and tables are read
    where they lie, as `streams` says. A column of the default name that is missing is taken to be the first (image)
    or second (caption) one, with a notice. Raises UserError for a dataset that cannot be opened. What is
    wrong with its samples is for `check` to say, which must follow: of a folder the samples whose caption or file is
    missing are left out already, and noted in the findings.
    """
    import datasets

    datasets.disable_progress_bars()
    if config is not None:
        from . import sources  # which needs this module

        return sources.load_rows(config, cache_dir, image_column, caption_column)
    if shuffle_buffer is not None:
        from . import streams  # as above

        return streams.load_rows(
            dataset_name, config_name, folder, cache_dir, image_column, caption_column, shuffle_buffer
        )
    findings, kind, parts, origins = Findings(), "tables", None, None
    if dataset_name is None:
        files, kind = files_of(Path(folder))
    title = f"--train_data_dir {folder}" if dataset_name is None else f"--dataset_name {dataset_name}"
    if kind == "tables":
        if repeats_from_folders:
            raise UserError(f"{title} holds tables; --repeats_from_folders is for folders of images or shards")
        place = (str(folder), None) if dataset_name is None else (dataset_name, folder)
        dataset = _read_tables(title, *place, config_name, cache_dir)
        if dataset_name is None:
            _warn_of_other_tables(title, files, str(folder), config_name, cache_dir)
    else:
        folder = Path(folder)
        repeats = _Repeats(folder, files)
        read = _read_shards if kind == "shards" else _read_folder
        words_of = repeats.words if repeats_from_folders else None
        named, caption_column = read(folder, files, caption_column, findings, words_of)
        usable = _usable(named, findings)
        dataset = _dataset_of(usable, image_column, caption_column)
        if repeats_from_folders and not repeats.folders:
            raise UserError(f"{title} holds no folder named like '10_sks dog', which --repeats_from_folders is about")
        if repeats_from_folders:
            parts, origins = repeats.sources([place for place, _ in usable])
        elif repeats.folders:
            name = next(iter(repeats.folders.values()))
            warn(f"folders named like '{name}' are not repeated; with --repeats_from_folders they are")
    columns = dataset.column_names
    image_column, caption_column = columns_of(columns, image_column, caption_column)
    try:
        dataset = dataset.cast_column(image_column, datasets.Image(decode=False))
    except Exception:
        kind = dataset.features[image_column]
        raise UserError(f"--image_column {image_column} holds {kind}, not images; there are {columns}") from None
    if kind != "tables":
        folder = folder.resolve()
        return ImageDataset(dataset, image_column, caption_column, folder, findings, sources=parts, origins=origins)
    if not len(dataset):
        raise UserError(f"{title} holds no images")
    return ImageDataset(dataset, image_column, caption_column, None, findings)


def _read_tables(title, name, data_dir, config_name, cache_dir):
    """The Dataset that the datasets library makes of a name and the data_dir that belongs to it."""
    import datasets

    try:
        splits = datasets.load_dataset(name, config_name, cache_dir=cache_dir, data_dir=data_dir)
    except Exception as error:  # the library raises its own, the hub client's, pyarrow's and the system's errors
        reason = reason_of(error.__cause__ or error)
        if reason.startswith("Config name is missing"):
            reason = f"{' '.join(str(error).split())}; --dataset_config_name picks one"
        raise UserError(f"{title} cannot be loaded: {reason}") from None
    return train_of(title, splits)


def _warn_of_other_tables(title, files, folder, config_name, cache_dir):
    """Name the tables of a folder that the datasets library does not take for the split `train`."""
    import datasets

    read = datasets.load_dataset_builder(folder, config_name, cache_dir=cache_dir).config.data_files["train"]
    read = {os.path.realpath(path) for path in read}
    other = [path for path in files if os.path.realpath(path) not in read]
    if other:
        warn(f"{title} holds tables that are not of its split 'train', and are not read: {shortened(other)}")


def train_of(title, splits):
    """What a dataset has under the name `train`. Raises UserError where it has no such split."""
    if "train" not in splits:
        raise UserError(f"{title} has no split 'train', only {', '.join(map(str, splits)) or 'none'}")
    return splits["train"]


def columns_of(columns, image_column, caption_column):
    """The columns of the images and of the captions among those of a table, as `column_of` finds them; the second is
    None where `caption_column` is. Raises UserError."""
    image_column = column_of(columns, image_column, "image", 0, "--image_column")
    if caption_column is not None:
        columns = [image_column, *(name for name in columns if name != image_column)]
        caption_column = column_of(columns, caption_column, "text", 1, "--caption_column")
    return image_column, caption_column


def column_of(columns, name, default, place, flag):
    """The column of this name or, where it is the `default` and missing, the one at this `place`, with a warning.
    Raises UserError where there is none."""
    if name in columns:
        return name
    if name != default or place >= len(columns):
        raise UserError(f"{flag} {name}: there is no such column, only {', '.join(columns)}")
    warn(f"there is no column '{name}'; {flag} is taken to be '{columns[place]}'")
    return columns[place]


def files_of(folder):
    """What a folder holds: (sorted paths, "images", "shards" or "tables"). Raises UserError for none of them."""
    kinds = {"images": [], "shards": [], "tables": [], "compressed": [], "others": [], "broken": []}
    others = dict.fromkeys(OTHER_ENDINGS, "others") | {".tar": "shards", ".parquet": "tables"}
    paths, failed = files_in(folder)
    for path in paths:
        ending = path.suffix.lower()
        kind = "images" if ending in IMAGE_ENDINGS else others.get(ending)
        if COMPRESSED.search(path.name.lower()):
            kind = "compressed"
        if kind and path.name != "metadata.parquet":
            kinds[kind if os.path.isfile(path) else "broken"].append(path)
    compressed, unread, broken = (kinds.pop(kind) for kind in ("compressed", "others", "broken"))
    for error in failed:
        warn(f"{error.filename} cannot be read ({error.strerror}) and is skipped")
    if broken:
        warn(f"links that lead nowhere are skipped: {shortened(broken)}")
    if unread:
        endings = ", ".join(sorted({path.suffix.lower() for path in unread}))
        warn(f"images of a kind that is not read ({endings}) are skipped: {shortened(unread)}; make them PNG")
    present = [kind for kind, paths in kinds.items() if paths]
    if compressed and present in ([], ["shards"]):
        raise UserError(
            f"{compressed[0]} is compressed, so that no image in it can be reached without all before it; unpack it "
            "to a plain .tar (gunzip)"
        )
    if not present:
        endings = ", ".join(sorted(IMAGE_ENDINGS))
        raise UserError(f"--train_data_dir {folder} holds no images ({endings}), nor .tar shards or .parquet tables")
    if present == ["shards", "tables"]:
        raise UserError(
            f"--train_data_dir {folder} holds .tar shards and .parquet tables; keep them in two folders, which "
            "--train_data_config can name both"
        )
    if len(present) > 1:
        others = [path for kind in present[1:] for path in kinds[kind]]
        warn(
            f"--train_data_dir {folder} holds images, and {shortened(others, 1)}, which is not read; "
            "--train_data_config names several datasets"
        )
    return kinds[present[0]], present[0]


def files_in(folder):
    """The files in a folder and in those inside it, sorted, but for hidden ones; links to folders are followed, into
    each folder once. Returns (paths, errors of folders that cannot be read)."""
    seen, found, failed = set(), [], []
    for place, inside, names in os.walk(folder, onerror=failed.append, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            inside.clear()
            continue
        seen.add(real)
        inside[:] = sorted(name for name in inside if not name.startswith(HIDDEN))
        found += [Path(place, name) for name in names if not name.startswith(HIDDEN)]
    return sorted(found), failed


def _read_shards(folder, found, caption_column, findings, words_of=None):
    """([(place, caption)] of the captioned images in tar shards, the caption column)."""
    images = [
        image
        for shard in found
        for image in shards.index(os.path.realpath(shard), IMAGE_ENDINGS, caption_column, findings.malformed)
    ]
    if words_of:
        images = [(place, words_of(place) if caption is None else caption) for place, caption in images]
    findings.images = len(images)
    findings.unnamed = [shards.shown(place) for place, caption in images if caption is None]
    named = [(place, caption) for place, caption in images if caption is not None]
    if not named and not findings.malformed:
        lack = "captions: put a .txt, .caption or .json beside each image" if images else "images"
        findings.malformed.append(f"the shards in {folder} ({shortened(found, 1)}) hold no {lack}")
    return named, caption_column


def _read_folder(folder, found, caption_column, findings, words_of=None):
    """([(place, caption)] of the captioned images in a folder, the caption column); of all images, and None, where
    nothing can be made of the captions. Adds to the findings."""
    places = [os.path.realpath(path) for path in found]
    findings.images = len(found)
    named = _read_captions(folder, found, caption_column, findings, words_of)
    if findings.malformed and not named:
        caption_column, named = None, [(place, "") for place in places]
    known = {place for place, _ in named}
    findings.unnamed = [place for place in places if place not in known]
    findings.repeats = len(named) - len(known)
    return named, caption_column


def _usable(named, findings):
    """The (place, caption) that can be in a dataset; the others become problems among the findings."""
    usable = []
    for place, caption in named:
        if not shards.is_place(place) and not os.path.isfile(place):
            findings.problems.append(Problem("absent", place))
        elif caption_fault(caption):
            findings.problems.append(Problem("no usable caption", shards.shown(place), caption_fault(caption)))
        elif not is_unicode(place):
            findings.problems.append(Problem("name not UTF-8", shards.shown(place)))
        else:
            usable.append((place, caption))
    return usable


def _dataset_of(usable, image_column, caption_column):
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


class _Repeats:
    """The folders inside a folder that are named like `10_sks dog`, as kohya's trainers have it: those words, ten
    times. `found` are the files; places are asked for."""

    def __init__(self, folder, found):
        self.folders = {}
        for path in found:
            names = [name for name in path.relative_to(folder).parts[:-1] if REPEATED.fullmatch(name)]
            if names:
                self.folders[os.path.realpath(path)] = names[-1]

    def _folder(self, place):
        return self.folders.get(place.split("\0")[0])

    def words(self, place):
        """What a place's folder is called, without the number; None where it has none."""
        folder = self._folder(place)
        return None if folder is None else REPEATED.fullmatch(folder)[2].strip()

    def sources(self, places):
        """A list of Source, and for each place the index of its own, int64."""
        names = [self._folder(place) for place in places]
        known = sorted({name for name in names if name}) + [None]
        sources = [Source(name or "", int(REPEATED.fullmatch(name)[1]) if name else 1) for name in known]
        return sources, np.array([known.index(name) for name in names], dtype=np.int64)


def _read_captions(folder, found, caption_column, findings, words_of=None):
    """[(absolute path, caption)] in the order of the metadata, an image once for each line that names it; `found` are
    the folder's images. Without metadata each has its own file, or else the caption `words_of(place)`. With
    `caption_column` None the captions are empty, and without metadata all images are named. What is malformed is
    added to the findings."""
    named, malformed = [], findings.malformed
    names = ["metadata.jsonl", "metadata.csv", "metadata.parquet"]
    tables = [path for path in files_in(folder)[0] if path.name in names]
    tables.sort(key=lambda table: names.index(table.name))
    for place in sorted({table.parent for table in tables}):
        beside = [table.name for table in tables if table.parent == place]
        if len(beside) > 1:
            warn(f"{place} holds {' and '.join(beside)}, and both are read; remove one")
    for table in tables:
        lacking, lines, word = [], 0, "row" if table.suffix == ".parquet" else "line"
        for line, entry in _read_table(table, malformed):
            where, lines = f"{table} {word} {line}", lines + 1
            if not isinstance(entry, dict) or not isinstance(entry.get("file_name"), str):
                malformed.append(f'{where} has no "file_name"; each {word} names an image and its caption')
            elif caption_column is None:
                named.append((_place(table.parent, entry["file_name"]), ""))
            elif caption_column not in entry:
                have = ", ".join(key for key in entry if key != "file_name") or "none beside file_name"
                lacking.append(f"{where} has no caption column '{caption_column}' (--caption_column); it has {have}")
            else:
                named.append((_place(table.parent, entry["file_name"]), entry[caption_column]))
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
            content = _read_text(texts[0], malformed)
            if content is not None:
                named.append((place, content.strip()))
        elif words_of and words_of(place) is not None:
            named.append((place, words_of(place)))
    if not named and not malformed:
        named_so = next((path for path in found if os.path.isfile(f"{path}.txt")), None)
        repeated = any(REPEATED.fullmatch(name) for path in found for name in path.relative_to(folder).parts[:-1])
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


def _place(folder, name):
    try:
        if "\\" in name and not os.path.exists(folder / name):  # written on Windows
            name = name.replace("\\", "/")
        return os.path.realpath(folder / name)
    except ValueError:  # a zero byte or half a character, which no file's name can hold
        return f"{folder}{os.sep}{name}"


def _read_text(path, malformed):
    """The text of a file, or None, and the reason among `malformed`."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        malformed.append(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8")
    except OSError as error:
        malformed.append(f"{path} cannot be read: {error.strerror}")


def _read_table(path, malformed):
    """(line number, entry) for each line of a metadata.jsonl or metadata.csv that is one, or (row number, from 0,
    entry) for each row of a metadata.parquet; adds to `malformed`."""
    if path.suffix == ".parquet":
        yield from _read_parquet(path, malformed)
        return
    text = _read_text(path, malformed) or ""
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


def _read_parquet(path, malformed):
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


def header_problems(rows):
    """The images that cannot be used as far as it shows without decoding them, {index: Problem}.

    Images that lie inside a table are not opened: reading all of them would take as long as decoding them.
    """
    problems = {int(at): Problem("no image", rows.name(int(at))) for at in rows.without_image()}
    files = rows.files()
    for index, problem in zip(files, read_ahead(_header_problem, rows.select(files).cells(), _threads())):
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


def _threads():
    return min(16, 4 * (os.cpu_count() or 1))  # they wait for the disk


def image_sizes(rows):
    """The size (width, height) of every image when it is upright, in pixels, int64, shape (N, 2).

    Headers are read, in threads, and no pixels. An image that cannot be opened gets zeros.
    """
    sizes = bar(read_ahead(_size_of, rows.cells(), _threads()), "sizes of images", len(rows))
    return np.array(list(sizes), dtype=np.int64).reshape(-1, 2)


def _size_of(named_cell):
    try:
        with open_image(named_cell[1]) as image:
            return upright_size(image)
    except Exception:  # `check`, or reading it, says what is wrong
        return (0, 0)


def read_ahead(function, items, threads, ahead=None):
    """`function(item)` of each item, in order, `ahead` items ahead, a few where it is None: all of them at once might
    not fit into memory."""
    waiting, pool = deque(), ThreadPoolExecutor(threads)
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > (ahead or 2 * threads):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def read_between(function, items, threads, many):
    """`function(item)` of each item, in order: `many` at a time, and none while the caller is busy with those."""
    with ThreadPoolExecutor(threads) as pool:
        for at in range(0, len(items), many):
            yield from list(pool.map(function, items[at : at + many]))


def check(rows, on_bad_sample="error"):
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


def split_validation(rows, fraction, seed):
    """Split rows into (training, held-out) by a draw from the seed; the second is None when `fraction` is 0.

    No image is in both: the rows that name one file go together, and the first are `repeated` only then.
    """
    if not fraction:
        return repeated(rows), None
    images = rows.images()
    total, generator = len(np.unique(images)), draws.generator(seed, "holdout")
    count = max(1, round(total * fraction))
    if count >= total:
        raise UserError(f"--validation_split {fraction} of {total} images leaves none to train on")
    if total == len(rows):
        val_samples = np.sort(rows.drawn(count, generator))
    else:
        val_samples = np.flatnonzero(np.isin(images, generator.permutation(total)[:count]))
    return repeated(rows.without(val_samples)), rows.select(val_samples)


def shown_of(rows):
    """How many rows each source has, and how many of its samples an epoch shows: int64, shape (sources,) each.

    With weights an epoch has as many samples as there are rows; each source has its share of them, rounded, and at
    least one.
    """
    counts = np.bincount(rows.origins, minlength=len(rows.sources))
    if rows.sources[0].weight is None:
        return counts, counts * [source.repeats for source in rows.sources]
    weights = np.array([source.weight for source in rows.sources]) * (counts > 0)
    shares = np.round(len(rows) * weights / weights.sum()).astype(np.int64)
    return counts, np.where(counts, np.maximum(1, shares), 0)


def repeated(rows):
    """Rows, each as many times in a row as an epoch can show it, `partly` set.

    What an epoch shows of a source beyond a multiple of its rows is some of their last copies, drawn anew each time.
    """
    if rows.sources is None:
        return rows
    counts, shown = shown_of(rows)
    repeats = -(-shown // np.maximum(counts, 1))
    copies = repeats[rows.origins]
    result, last = rows.select(np.repeat(np.arange(len(rows)), copies)), np.cumsum(copies) - 1
    rest = shown - counts * np.maximum(repeats - 1, 0)  # of the last copies of each source's rows
    result.partly = [
        (last[rows.origins == at], int(rest[at])) for at in range(len(counts)) if counts[at] and rest[at] < counts[at]
    ]
    return result


def take(rows, most, seed):
    """At most `most` rows (None for all), chosen by a draw from the seed that every process makes alike."""
    if most is None or most >= len(rows):
        if most is not None and most > len(rows):
            warn(f"--max_train_samples {most} is more than the {len(rows)} images there are; all of them are used")
        return rows
    return rows.select(np.sort(rows.drawn(most, draws.generator(seed, "subset"))))


# ---------------------------------------------------------------------------------------------------------------------
# Preparing a sample
# ---------------------------------------------------------------------------------------------------------------------


def resize(image, size, interpolation):
    """Scale a PIL image so that it just covers `size`, (width, height): one side is equal, the other not less."""
    (width, height), (new_width, new_height) = image.size, size
    if new_width * height >= new_height * width:
        new = (new_width, max(new_height, new_width * height // width))
    else:
        new = (max(new_width, new_height * width // height), new_height)
    return image if new == image.size else image.resize(new, FILTERS[interpolation])


def crop(image, size, generator=None):
    """Cut `size`, (width, height), out of a PIL image: drawn by a generator, or from the middle when it is None.

    Returns (image, (top, left)), the corner in pixels of the image that came in.
    """
    (width, height), (new_width, new_height) = image.size, size
    if generator is None:
        top, left = round((height - new_height) / 2), round((width - new_width) / 2)
    else:
        top, left = int(generator.integers(height - new_height + 1)), int(generator.integers(width - new_width + 1))
    return image.crop((left, top, left + new_width, top + new_height)), (top, left)


def largest_within(size, shape):
    """The largest (width, height) of the ratio of `shape` that `size` has room for, to the pixel."""
    (width, height), (ratio_width, ratio_height) = size, shape
    if width * ratio_height >= height * ratio_width:
        return max(1, round(height * ratio_width / ratio_height)), height
    return width, max(1, round(width * ratio_height / ratio_width))


def to_array(image):
    """RGB PIL image to float32 in [-1, 1], shape (3, H, W)."""
    array = np.ascontiguousarray(np.asarray(image, dtype=np.float32).transpose(2, 0, 1))
    array /= 127.5
    array -= 1.0
    return array


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


def choose_timestep(draw, timesteps, probabilities=None):
    """A timestep below `timesteps`: each as likely as the other, or by `probabilities`, shape (timesteps,)."""
    if probabilities is None:
        return int(draw("timestep").integers(0, timesteps))
    return min(int(np.searchsorted(np.cumsum(probabilities), draw("timestep").random(), side="right")), timesteps - 1)


# ---------------------------------------------------------------------------------------------------------------------
# Which sample goes where
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Position:
    """Where a run stands in its data: `sample` samples into `epoch`."""

    epoch: int = 0
    sample: int = 0

    def within(self, size):
        """This position in a set of `size`: the next epoch, where the set has become smaller."""
        return Position(self.epoch + 1, 0) if self.sample >= size else self


class BatchPlan:
    """Which of `size` samples each step of a run takes, and how they are shared out.

    A step takes the next `window` = batch_size * accumulation * world_size samples of the epoch's order, or what is
    left of it, and shares them out as evenly as can be over its micro-steps and processes, so every process makes the
    same number of micro-steps. The weights of a step's samples are accumulation * world_size / their number: a
    micro-batch's loss is the sum of weight x loss, and averaging over micro-steps and processes gives the mean over
    the samples, however they were shared out. An epoch has `per_epoch` steps, usually of `samples` samples.

    Where the samples are of several `shapes`, an array with an entry for each, a micro-batch holds samples of one.
    They are put into micro-batches of `batch_size` in the epoch's order, of which the last of each shape may have
    fewer; these are shuffled, and a step takes the next accumulation * world_size of them. So it may have fewer
    samples than the window, and the order depends on the batch size: a run that goes on with another one inside an
    epoch visits some of its samples twice and others not.

    `partly` is a list of (indices, count): of these samples an epoch visits only so many, drawn anew each time. With
    shapes too, epochs differ a little in the number of their steps, and `per_epoch` is that of the first.

    `stream` is the streams.Rows that the samples are of, or None. An epoch then has that stream's order, a process
    takes every world_size-th sample of it, and the stream is told which samples are coming.
    """

    def __init__(self, size, seed, batch_size, accumulation=1, world_size=1, shapes=None, partly=(), stream=None):
        self.partly, self.all, self.stream = partly, size, stream
        size -= sum(len(indices) - count for indices, count in partly)
        self.size, self.seed, self.batch_size = size, seed, batch_size
        self.accumulation, self.world_size = accumulation, world_size
        self.window = batch_size * accumulation * world_size
        self.per_epoch, self.samples, self.shape = -(-size // self.window), self.window, None
        if shapes is not None and (shapes != shapes[0]).any():
            _, shape, counts = np.unique(shapes, axis=0, return_inverse=True, return_counts=True)
            self.shape = shape.reshape(-1)
            batches = len(self._order(0)[1]) if partly else int((-(-counts // batch_size)).sum())
            self.per_epoch = -(-batches // (accumulation * world_size))
            self.samples = size / self.per_epoch
        self._order = functools.lru_cache(maxsize=3)(self._order)  # batches are read ahead of the loop's position

    @classmethod
    def of(cls, rows, seed, batch_size, accumulation, world_size):
        """The steps that take the samples of data.Rows."""
        return cls(len(rows), seed, batch_size, accumulation, world_size, rows.sizes, rows.partly, rows.stream)

    def _order(self, epoch):
        """The samples in the order in which an epoch visits them, and where in it each micro-batch ends; None without
        shapes."""
        if self.stream is not None:
            return self.stream.order(self.seed, epoch), None
        order = draws.order(self.seed, epoch, self.all)
        for at, (indices, count) in enumerate(self.partly):
            left_out = draws.generator(self.seed, "partly", epoch, at).permutation(indices)[count:]
            order = order[~np.isin(order, left_out)]
        if self.shape is None:
            return order, None
        groups = [order[self.shape[order] == shape] for shape in range(self.shape.max() + 1)]
        batches = [
            group[at : at + self.batch_size] for group in groups for at in range(0, len(group), self.batch_size)
        ]
        shuffled = [batches[at] for at in draws.generator(self.seed, "batches", epoch).permutation(len(batches))]
        return np.concatenate(shuffled), np.cumsum([len(batch) for batch in shuffled])

    def shares(self, position):
        """The samples of the step at a position: for each micro-step the indices, an array, of each process."""
        position, parts = position.within(self.size), self.accumulation * self.world_size
        order, ends = self._order(position.epoch)
        order = order[position.sample :]
        if self.stream is not None:
            return [order[: self.window][part::parts] for part in range(parts)]
        if ends is None:
            return np.array_split(order[: self.window], parts)
        ends = ends[ends > position.sample][:parts] - position.sample
        shares = np.split(order[: ends[-1]], ends[:-1])
        return shares + [order[:0]] * (parts - len(shares))

    def _coming(self, position):
        """The samples that a stream is told of: the next in the order of this epoch, and of the one after it."""
        many = max(self.stream.ahead, 4 * self.window)
        coming = [self._order(position.epoch)[0][position.sample :][:many]]
        if len(coming[0]) < many:
            coming.append(self._order(position.epoch + 1)[0][: many - len(coming[0])])
        return coming

    def after(self, position):
        """The position after the step at a position."""
        position = position.within(self.size)
        taken = sum(map(len, self.shares(position)))
        return Position(position.epoch, position.sample + taken).within(self.size)

    def names(self, rows, position):
        """What to call the images of the step at a position: a list."""
        return [rows.name(int(index)) for index in np.concatenate(self.shares(position))]

    def batches(self, position, rank=0):
        """Batches of (epoch, index, weight) for one process, without end, beginning at a position.

        A process left without a sample gets one of weight 0.
        """
        position = position.within(self.size)
        while True:
            if self.stream is not None:
                self.stream.expect(self._coming(position), rank, self.world_size)
            shares, epoch = self.shares(position), position.epoch
            weight = len(shares) / sum(map(len, shares))
            for share in shares[rank :: self.world_size]:
                yield [(epoch, int(i), weight) for i in share] or [(epoch, int(shares[0][0]), 0.0)]
            position = self.after(position)


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
        draw, skipped = draws.SampleDraws(self.seed, epoch, index), []
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


def validation_batches(size, batch_size, rank=0, world_size=1, shapes=None):
    """The batches of (epoch, index, weight) in which this process evaluates `size` validation samples.

    With `shapes`, an array with an entry for each sample, a batch holds samples of one.
    """
    mine = np.arange(rank, size, world_size)
    groups = [mine]
    if shapes is not None:
        shape = np.unique(shapes, axis=0, return_inverse=True)[1].reshape(-1)[mine]
        groups = [mine[shape == number] for number in np.unique(shape)]
    return [
        [(draws.VALIDATION_EPOCH, int(i), 1.0) for i in group[at : at + batch_size]]
        for group in groups
        for at in range(0, len(group), batch_size)
    ]
