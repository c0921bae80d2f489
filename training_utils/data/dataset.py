"""The images and captions of a dataset, read when they are asked for."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from training_utils.base.formats import cut
from training_utils.data import image_ops, tar
from training_utils.data.arrow_column import ArrowColumn
from training_utils.data.image_files import StoredImage, UnusableImage, open_image, read_content, unusable_if
from training_utils.data.image_ops import Size
from training_utils.data.problems import Findings, texts_of

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True)
class Source:
    """Some rows of a dataset: what to call them, and how often an epoch shows them.

    An epoch shows each row `repeats` times. Or else, for all sources of a dataset or none, the share of an epoch's
    samples that the source has is proportional to its `weight`. `first_row` is the number of its first row.
    `is_folder` says that its images are files, or members of shards, which have names of their own.
    """

    title: str
    repeats: int = 1
    weight: float | None = None
    first_row: int = 0
    is_folder: bool = False


@dataclass(frozen=True)
class PartialSource:
    """Samples that an epoch shows only `count` of, drawn again in each epoch: their indices, int64."""

    indices: np.ndarray
    count: int


class ImageDataset:
    """The images and captions of a dataset; both are read when they are asked for.

    `table` is a datasets.Dataset whose image column is not decoded; `caption_column` is None where only the images
    matter; `root` is the folder of the images, resolved, where they are files; `findings` are shared with the
    datasets that are selected from this one. `row_numbers`, int64, are the rows of the table that belong to this
    dataset; by default all. `sizes`, int64, shape (N, 2), are the (width, height) in pixels at which each row is
    trained; None where the data do not decide it. `sources` are None where there is one alone, and `origins` the
    index of each row's. `partial_sources` are a list of PartialSource. With `ignore_color_profiles` the numbers of an
    image are taken for sRGB, whatever its profile says.
    """

    ignore_color_profiles: bool = False

    def __init__(
        self,
        table: "datasets.Dataset",
        image_column: str,
        caption_column: str | None,
        root: Any = None,
        findings: Findings | None = None,
        row_numbers: np.ndarray | None = None,
        sizes: np.ndarray | None = None,
        sources: Sequence[Source] | None = None,
        origins: np.ndarray | None = None,
    ) -> None:
        self.table = table
        self.image_column = image_column
        self.caption_column = caption_column
        self.root = root
        self.findings = Findings() if findings is None else findings
        self.row_numbers = np.arange(len(table)) if row_numbers is None else row_numbers
        self.sizes = sizes
        self.sources = sources
        self.origins = origins
        self.partial_sources: Sequence[PartialSource] = ()
        # Both are read when they are indexed.
        self._images = ArrowColumn(table, image_column, self.row_numbers)
        self._captions = None if caption_column is None else ArrowColumn(table, caption_column, self.row_numbers)

    def __len__(self) -> int:
        return len(self.row_numbers)

    @property
    def stream(self) -> Any:
        """This dataset where it is streamed, a StreamedDataset, else None."""
        return None

    # --- choosing rows -----------------------------------------------------------------------------------------------

    def select(self, indices: Sequence[int] | np.ndarray) -> "ImageDataset":
        """The rows with these indices, in this order."""
        indices = np.asarray(indices, dtype=np.int64)
        selected = ImageDataset(
            self.table,
            self.image_column,
            self.caption_column,
            root=self.root,
            findings=self.findings,
            row_numbers=self.row_numbers[indices],
            sizes=None if self.sizes is None else self.sizes[indices],
            sources=self.sources,
            origins=None if self.origins is None else self.origins[indices],
        )
        selected.ignore_color_profiles = self.ignore_color_profiles
        return selected

    def drop(self, indices: Sequence[int] | np.ndarray) -> "ImageDataset":
        """All rows except those with these indices."""
        if not len(indices):
            return self
        return self.select(np.delete(np.arange(len(self)), indices))

    def draw_subset(self, count: int, generator: np.random.Generator) -> np.ndarray:
        """The indices of `count` rows that a generator draws: int64."""
        return generator.permutation(len(self))[:count]

    # --- one row -----------------------------------------------------------------------------------------------------

    def name(self, index: int) -> str:
        """What to call a row in a message: its file where it has one of its own, else its number in the table."""
        cell = self._images.cell(index)
        # Its "bytes" are not made a Python object.
        return self._name_of(index, {"path": cell["path"].as_py()} if cell.is_valid else None)

    def _name_of(self, index: int, stored: StoredImage) -> str:
        """What to call a row whose stored image is at hand."""
        path = stored.get("path") if isinstance(stored, dict) else None
        source = None
        if self.sources is not None and self.origins is not None:
            source = self.sources[self.origins[index]]
        if path and (self.root is not None or (source is not None and source.is_folder)):
            return str(tar.display_name(path))
        number = int(self.row_numbers[index])
        name = f"row {number}" if source is None else f"row {number - source.first_row} of {source.title}"
        # Rows of a table may all have the same path, or a text that is none, which may be long.
        if not path:
            return name
        return f"{name}: {path if os.path.isfile(path) else cut(path)}"

    def stored_image(self, index: int) -> StoredImage:
        """The image of a row as it is stored: what `open_image` opens."""
        return self._images[index]

    def size(self, index: int) -> Size | None:
        """The (width, height) in pixels at which a row is trained, or None."""
        return None if self.sizes is None else tuple(self.sizes[index].tolist())

    def captions(self, index: int) -> list[str]:
        """The captions of a row, at least one."""
        assert self._captions is not None
        return texts_of(self._captions[index])

    def image(self, index: int) -> Image.Image:
        """The image of a row, upright, in sRGB. Raises BadSample, or UserError where the file cannot be reached."""
        stored = self.stored_image(index)
        try:
            with unusable_if(MemoryError), open_image(stored) as image:
                return image_ops.upright_rgb(image, self.ignore_color_profiles)
        except UnusableImage as error:
            raise error.problem(self._name_of(index, stored)).error() from error.__cause__ or error

    def digest_and_size(self, index: int) -> tuple[str, Size]:
        """(SHA-256, upright size) of the file of a row's image; of one that cannot be read, that of its name, and
        zeros. Behind the SHA-256 stands image_ops.variant where that says something."""
        try:
            content = read_content(self.stored_image(index))
            with unusable_if(MemoryError), open_image({"bytes": content}) as image:
                size = image_ops.upright_size(image)
                variant = image_ops.variant(image, self.ignore_color_profiles)
        except UnusableImage:  # what is wrong with it, whoever decodes it will say
            return hashlib.sha256(repr(self.name(index)).encode()).hexdigest(), (0, 0)
        return f"{hashlib.sha256(content).hexdigest()} {variant}".rstrip(), size

    # --- all rows ----------------------------------------------------------------------------------------------------

    def stored_images(self) -> Iterator[tuple[str, StoredImage]]:
        """(name, stored image) of every row."""
        for index in range(len(self)):
            stored = self._images[index]
            yield self._name_of(index, stored), stored

    def raw_captions(self) -> Sequence[Any]:
        """What the caption column holds in every row, usable or not; nothing where captions are not read."""
        return [] if self._captions is None else self._captions

    def file_indices(self) -> np.ndarray:
        """The indices of the rows whose image is a file of its own, whose header can be read without all the rest."""
        return np.flatnonzero(self._images.is_null("bytes"))

    def indices_without_image(self) -> np.ndarray:
        """The indices of the rows whose image is null."""
        return np.flatnonzero(self._images.is_null())

    def image_numbers(self) -> np.ndarray:
        """A number for the image of each row, int64, shape (N,): rows that name the same file have the same one."""
        numbers = np.arange(len(self))
        files = self.file_indices()
        if len(files):
            same = np.unique(self._images.field("path")[files], return_inverse=True)[1]
            numbers[files] = len(self) + same
        return np.unique(numbers, return_inverse=True)[1]

    def fingerprint(self) -> str:
        """SHA-256 over the captions, over the file names of a folder, and over the weights of sources: a resumed run
        compares it. Without captions and a folder, over up to a thousand images."""
        digest = hashlib.sha256()
        captions = [None] * len(self) if self._captions is None else self._captions
        for index, caption in enumerate(captions):
            name = os.path.relpath(self.name(index), self.root) if self.root else ""
            digest.update(json.dumps([name, caption]).encode())
        if self._captions is None and not self.root:
            for index in range(0, len(self), -(-len(self) // 1000)):
                digest.update(self._images[index].get("bytes") or b"")
        for part in self.partial_sources:
            digest.update(json.dumps([len(part.indices), part.count]).encode())
        return digest.hexdigest()
