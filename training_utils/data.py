"""Pictures and captions: reading them, checking them, preparing a sample, and which sample goes where.

Nothing here needs torch; what a batch holds are NumPy arrays, which torch's DataLoader turns into tensors.
"""

import csv
import hashlib
import io
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from . import draws
from .reporting import UserError, warn

PICTURE_ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
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


class Rows:
    """The pictures and captions of a data set; both are read when they are asked for.

    `dataset` is a datasets.Dataset whose picture column is not decoded; `caption_column` is None where only the
    pictures matter; `root` is the folder of the pictures, resolved, where they are files.
    """

    def __init__(self, dataset, image_column, caption_column, root=None):
        self.dataset, self.image_column, self.caption_column, self.root = dataset, image_column, caption_column, root
        self._pictures = dataset[image_column]  # read when they are indexed, like the captions
        self._captions = None if caption_column is None else dataset[caption_column]

    def __len__(self):
        return len(self.dataset)

    def select(self, indices):
        """The rows with these indices, in this order."""
        return Rows(self.dataset.select(indices), self.image_column, self.caption_column, self.root)

    def name(self, index):
        """What to call a row in a message: its file where it has one."""
        cell = self._pictures[index]
        path = cell.get("path") if isinstance(cell, dict) else None
        return str(path) if path else f"row {index}"

    def captions(self, index):
        """The captions of a row, a list of at least one string."""
        value = self._captions[index]
        return [value] if isinstance(value, str) else list(value)

    def picture(self, index):
        """The picture of a row, upright, in RGB. Raises UserError that names it when it cannot be read."""
        cell = self._pictures[index]
        try:
            with Image.open(io.BytesIO(cell["bytes"]) if cell.get("bytes") else cell["path"]) as picture:
                return to_rgb(ImageOps.exif_transpose(picture))
        except Exception as error:  # Pillow raises a dozen kinds for a damaged file
            raise UserError(f"{self.name(index)} cannot be read as a picture ({error}); mend or remove it") from None

    def fingerprint(self):
        """SHA-256 over the captions, and over the file names of a folder: a resumed run compares it."""
        digest = hashlib.sha256()
        for index, caption in enumerate([None] * len(self) if self._captions is None else self._captions):
            name = os.path.relpath(self.name(index), self.root) if self.root else ""
            digest.update(json.dumps([name, caption]).encode())
        return digest.hexdigest()


def to_rgb(picture):
    """An RGB copy of a PIL picture of any mode. Transparency lies on white; 16-bit grey is scaled to 8."""
    if picture.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(picture, dtype=np.uint16) >> 8).astype(np.uint8)).convert("RGB")
    if picture.mode in ("I", "F"):
        values = np.asarray(picture, dtype=np.float64)
        top = 65535 if values.max(initial=0) > 255 else 255
        return Image.fromarray((values.clip(0, top) * (255 / top)).astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        ground = Image.new("RGBA", picture.size, (*TRANSPARENT_BECOMES, 255))
        return Image.alpha_composite(ground, picture).convert("RGB")
    return picture.convert("RGB")


# ---------------------------------------------------------------------------------------------------------------------
# Reading a data set
# ---------------------------------------------------------------------------------------------------------------------


def load_rows(
    dataset_name=None, config_name=None, folder=None, cache_dir=None, image_column="image", caption_column="text"
):
    """Open a data set. Returns Rows.

    `dataset_name` (a hub id or local path, through the datasets library, `folder` passed on as data_dir) or else
    `folder`, a folder of pictures. With `caption_column` None no captions are read, and none are needed. A column of
    the default name that is missing is taken to be the first (picture) or second (caption) one, with a notice. Raises
    UserError for everything that a user can mend.
    """
    import datasets

    datasets.disable_progress_bars()
    if dataset_name is None:
        dataset = _read_folder(Path(folder), image_column, caption_column)
    else:
        try:
            splits = datasets.load_dataset(dataset_name, config_name, cache_dir=cache_dir, data_dir=folder)
        except Exception as error:  # the library raises its own, the hub client's, pyarrow's and the system's errors
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"--dataset_name {dataset_name} cannot be loaded: {reason}") from None
        if "train" not in splits:
            raise UserError(f"--dataset_name {dataset_name} has no split 'train', only {', '.join(splits)}")
        dataset = splits["train"]
    columns = dataset.column_names
    image_column = _column(columns, image_column, "image", 0, "--image_column")
    if caption_column is not None:
        caption_column = _column(columns, caption_column, "text", 1, "--caption_column")
    try:
        dataset = dataset.cast_column(image_column, datasets.Image(decode=False))
    except Exception:
        kind = dataset.features[image_column]
        raise UserError(f"--image_column {image_column} holds {kind}, not pictures; there are {columns}") from None
    if not len(dataset):
        raise UserError(f"{dataset_name or folder} holds no pictures")
    return Rows(dataset, image_column, caption_column, Path(folder).resolve() if dataset_name is None else None)


def _column(columns, name, default, place, flag):
    if name in columns:
        return name
    if name != default or place >= len(columns):
        raise UserError(f"{flag} {name}: there is no such column, only {', '.join(columns)}")
    warn(f"there is no column '{name}'; {flag} is taken to be '{columns[place]}'")
    return columns[place]


def _read_folder(folder, image_column, caption_column):
    """A folder of pictures as a Dataset of two columns, absolute paths and captions; of all its paths alone where
    `caption_column` is None."""
    import datasets

    found = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix.lower() in PICTURE_ENDINGS)
    if not found:
        raise UserError(f"--train_data_dir {folder} holds no pictures ({', '.join(sorted(PICTURE_ENDINGS))})")
    if caption_column is None:
        return datasets.Dataset.from_dict({image_column: [str(path.resolve()) for path in found]})
    tables = sorted(folder.rglob("metadata.jsonl")) + sorted(folder.rglob("metadata.csv"))
    named = []  # (path, caption), a picture once for each line that names it
    for table in tables:
        for line, entry in _read_table(table):
            where = f"{table} line {line}"
            if not isinstance(entry, dict) or not isinstance(entry.get("file_name"), str):
                raise UserError(f'{where} has no "file_name"; each line names a picture and its caption')
            if caption_column not in entry:
                have = ", ".join(key for key in entry if key != "file_name") or "none beside file_name"
                raise UserError(f"{where} has no caption column '{caption_column}' (--caption_column); it has {have}")
            named.append(((table.parent / entry["file_name"]).resolve(), entry[caption_column]))
    if not tables:
        for path in found:
            text = path.with_suffix(".txt")
            if text.is_file():
                named.append((path.resolve(), _read_text(text).strip()))
        if not named:
            raise UserError(
                f"{folder} has no captions: write a metadata.jsonl with lines like "
                f'{{"file_name": "{found[0].name}", "{caption_column}": "what it shows"}}, '
                f"or a {found[0].stem}.txt beside each picture"
            )
    paths = [path for path, _ in named]
    absent = [str(path) for path in paths if not path.is_file()]
    if absent:
        more = f" and {len(absent) - 10} more" if len(absent) > 10 else ""
        raise UserError(f"{len(absent)} pictures named in the metadata do not exist: {', '.join(absent[:10])}{more}")
    unnamed = len({path.resolve() for path in found} - set(paths))
    if unnamed:
        warn(f"{unnamed} of {len(found)} pictures in {folder} have no caption and are left out")
    if len(set(paths)) < len(paths):
        warn(f"{len(paths) - len(set(paths))} lines of the metadata name a picture again; each line is a sample")
    rows = {image_column: [str(path) for path in paths], caption_column: [caption for _, caption in named]}
    _check_captions(rows[caption_column], lambda index: rows[image_column][index])
    if any(isinstance(value, list) for value in rows[caption_column]):
        rows[caption_column] = [[v] if isinstance(v, str) else v for v in rows[caption_column]]
    return datasets.Dataset.from_dict(rows)


def _read_text(path):
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None


def _read_table(path):
    """(line number, entry) for each line of a metadata.jsonl or metadata.csv."""
    text = _read_text(path)
    if path.suffix == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""))
        for row in reader:
            if None in row:
                raise UserError(
                    f"{path} line {reader.line_num} has more fields than the header; quote commas in captions"
                )
            yield reader.line_num, row
        return
    for line, content in enumerate(text.split("\n"), start=1):  # splitlines would also split at U+2028
        if content.strip():
            try:
                yield line, json.loads(content)
            except json.JSONDecodeError as error:
                raise UserError(f"{path} line {line} is not JSON: {error.msg} at column {error.colno}") from None


def _check_captions(values, name):
    bad = []
    for index, value in enumerate(values):
        several = isinstance(value, list) and value and all(isinstance(text, str) for text in value)
        if not isinstance(value, str) and not several:
            bad.append(f"{name(index)} ({'an empty list' if value == [] else repr(value)})")
    if bad:
        more = f" and {len(bad) - 10} more" if len(bad) > 10 else ""
        raise UserError(
            f"{len(bad)} captions are neither a string nor a list of strings: {', '.join(bad[:10])}{more}; "
            "give each picture a caption"
        )


def check(rows):
    """Look at every caption, and open the header of every picture in a folder. Raises UserError that lists what is
    wrong. Pictures that lie inside a table are opened in training only: reading all of them would take as long."""
    if rows.caption_column is not None:
        _check_captions(rows.dataset[rows.caption_column], rows.name)
    absent = rows.dataset.data.column(rows.image_column).null_count
    if absent:
        raise UserError(f"column '{rows.image_column}' has {absent} rows without a picture")
    bad = []
    for cell in rows.dataset[rows.image_column] if rows.root else []:
        try:
            with Image.open(cell["path"]):
                pass
        except Exception as error:
            bad.append(f"{cell['path']} ({str(error).splitlines()[0]})")
    if bad:
        more = f" and {len(bad) - 10} more" if len(bad) > 10 else ""
        raise UserError(f"{len(bad)} files cannot be read as pictures: {', '.join(bad[:10])}{more}")


def warn_of_long_captions(rows, tokenizer, most=100_000):
    """Say how many captions are longer than the tokenizer's limit, whose rest the text encoder never sees."""
    count = min(len(rows), most)
    values = rows.dataset.select(range(count))[rows.caption_column]
    texts = [text for value in values for text in ([value] if isinstance(value, str) else value)]
    limit = tokenizer.model_max_length
    long = sum(
        len(ids) > limit
        for start in range(0, len(texts), 1000)
        for ids in tokenizer(texts[start : start + 1000], truncation=False, verbose=False).input_ids
    )
    if long:
        among = f"the first {len(texts)}" if count < len(rows) else f"{len(texts)}"
        warn(f"{long} of {among} captions are longer than {limit} tokens; the text encoder does not see the rest")


def hold_out(rows, fraction, seed):
    """Split rows into (training, held-out) by a draw from the seed; the second is None when `fraction` is 0."""
    if not fraction:
        return rows, None
    count = max(1, round(len(rows) * fraction))
    if count >= len(rows):
        raise UserError(f"--validation_split {fraction} of {len(rows)} pictures leaves none to train on")
    order = draws.generator(seed, "holdout").permutation(len(rows))
    return rows.select(np.sort(order[count:])), rows.select(np.sort(order[:count]))


def take(rows, most, seed):
    """At most `most` rows (None for all), chosen by a draw from the seed that every process makes alike."""
    if most is None or most >= len(rows):
        if most is not None and most > len(rows):
            warn(f"--max_train_samples {most} is more than the {len(rows)} pictures there are; all of them are used")
        return rows
    return rows.select(np.sort(draws.generator(seed, "subset").permutation(len(rows))[:most]))


# ---------------------------------------------------------------------------------------------------------------------
# Preparing a sample
# ---------------------------------------------------------------------------------------------------------------------


def resize(picture, size, interpolation):
    """Scale a PIL picture so that its shorter side is `size` pixels."""
    width, height = picture.size
    if width <= height:
        new = (size, max(size, int(size * height / width)))
    else:
        new = (max(size, int(size * width / height)), size)
    return picture if new == picture.size else picture.resize(new, FILTERS[interpolation])


def crop(picture, size, draw=None):
    """Cut a square of `size` pixels: drawn by `draw`, a SampleDraws, or from the middle when it is None.

    Returns (picture, (top, left)), the corner in pixels of the picture that came in.
    """
    width, height = picture.size
    if draw is None:
        top, left = round((height - size) / 2), round((width - size) / 2)
    else:
        generator = draw("crop")
        top, left = int(generator.integers(height - size + 1)), int(generator.integers(width - size + 1))
    return picture.crop((left, top, left + size, top + size)), (top, left)


def to_array(picture):
    """RGB PIL picture to float32 in [-1, 1], shape (3, H, W)."""
    return np.asarray(picture, dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1.0


def choose_caption(captions, draw, dropout=0.0):
    """One of a row's captions, or with probability `dropout` None, which is trained as no caption; both drawn."""
    if dropout and draw("caption_dropout").random() < dropout:
        return None
    return captions[int(draw("caption").integers(len(captions)))] if len(captions) > 1 else captions[0]


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

    def advance(self, window, size):
        """The position after one update that takes `window` samples from a set of `size`."""
        return Position(self.epoch, self.sample + window).within(size)


class UpdateSampler:
    """Batches of (epoch, index, weight) for one process, without end, beginning at a position.

    An update takes the next `batch_size * accumulation * world_size` samples of the epoch's order, or what is left of
    it, and shares them out as evenly as can be over its micro-steps and processes, so every process makes the same
    number of micro-steps. The weights of an update's samples are accumulation * world_size / samples: a micro-batch's
    loss is the sum of weight x loss, and averaging over micro-steps and processes gives the mean over the samples,
    however they were shared out. A process left without a sample gets one of weight 0.
    """

    def __init__(self, size, seed, position, batch_size, accumulation=1, rank=0, world_size=1):
        self.size, self.seed, self.position = size, seed, position
        self.accumulation, self.rank, self.world_size = accumulation, rank, world_size
        self.window = batch_size * accumulation * world_size

    def __iter__(self):
        position = self.position
        while True:
            order = draws.order(self.seed, position.epoch, self.size)
            epoch = position.epoch
            while position.epoch == epoch:
                samples = order[position.sample : position.sample + self.window]
                shares = np.array_split(samples, self.accumulation * self.world_size)
                weight = self.accumulation * self.world_size / len(samples)
                for share in shares[self.rank :: self.world_size]:
                    yield [(epoch, int(i), weight) for i in share] or [(epoch, int(samples[0]), 0.0)]
                position = position.advance(self.window, self.size)


class Samples:
    """Rows, prepared: item (epoch, index, weight) is the dict of arrays that `prepare(rows, index, draw)` makes."""

    def __init__(self, rows, prepare, seed):
        self.rows, self.prepare, self.seed = rows, prepare, seed

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, key):
        epoch, index, weight = key
        try:
            sample = self.prepare(self.rows, index, draws.SampleDraws(self.seed, epoch, index))
        except UserError as error:
            return error  # raised in a worker it would arrive as a stack trace
        return sample | {"weight": np.float32(weight)}


def names_after(samples, position, window):
    """What to call the pictures of the update after a Position: a list of at most `window`."""
    order = draws.order(samples.seed, position.epoch, len(samples))
    return [samples.rows.name(int(index)) for index in order[position.sample : position.sample + window]]


def collate(samples):
    """Stack samples into one dict of arrays with a leading batch axis; a UserError among them is handed on."""
    for sample in samples:
        if isinstance(sample, UserError):
            return sample
    return {key: np.stack([sample[key] for sample in samples]) for key in samples[0]}


def held_out_samples(size, batch_size, rank=0, world_size=1):
    """The batches of (epoch, index, weight) in which this process evaluates `size` held-out samples."""
    mine = range(rank, size, world_size)
    return [[(draws.HELD_OUT, i, 1.0) for i in mine[at : at + batch_size]] for at in range(0, len(mine), batch_size)]
