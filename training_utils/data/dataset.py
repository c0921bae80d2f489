"""The images and captions of a dataset, read when they are asked for."""

import hashlib
import json
import os
from dataclasses import dataclass

import numpy as np

from training_utils.base.errors import UserError
from training_utils.data import image_ops, problems, tar
from training_utils.data.captions import texts_of
from training_utils.data.problems import BadSample, Findings


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
            return str(tar.shown(path))
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
            with problems.open_image(cell) as image:
                return image_ops.upright_rgb(image)
        except Exception as error:  # Pillow raises a dozen kinds for a damaged file
            problem = problems.problem_of(error, self._name(index, cell))
        raise (UserError if problem.kind in ("absent", "not readable") else BadSample)(problem.sentence())

    def content(self, index):
        """(SHA-256, upright size) of the file of a row's image; for one that cannot be read, of its name, and
        zeros."""
        cell = self._images[index]
        try:
            content = problems.content_of(cell)
            with problems.open_image({"bytes": content}) as image:
                return hashlib.sha256(content).hexdigest(), image_ops.upright_size(image)
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
