"""A dataset whose samples come from a stream."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from training_utils.data import problems
from training_utils.data.dataset import ImageDataset
from training_utils.data.image_files import StoredImage
from training_utils.data.problems import BadSample, Findings, Problem, texts_of
from training_utils.data.streaming.order import epoch_order
from training_utils.data.streaming.source import Source


class StreamedDataset(ImageDataset):
    """Samples of a Source, with the methods of an ImageDataset.

    `row_numbers` are their numbers in the source, int64; by default all. `sizes` are as in ImageDataset.
    """

    def __init__(
        self,
        source: Source,
        caption_column: str | None,
        findings: Findings,
        row_numbers: np.ndarray | None = None,
        sizes: np.ndarray | None = None,
    ) -> None:
        self.source = source
        self.caption_column = caption_column
        self.findings = findings
        self.row_numbers: np.ndarray = np.arange(source.starts[-1]) if row_numbers is None else row_numbers
        self.sizes = sizes
        self.root = None
        self.sources = None
        self.origins = None
        self.partial_sources = ()
        self.caption_values: list[Any] = []

    def __len__(self) -> int:
        return len(self.row_numbers)

    def select(self, indices: Sequence[int] | np.ndarray) -> "StreamedDataset":
        """The samples with these indices, in this order."""
        indices = np.asarray(indices, dtype=np.int64)
        sizes = None if self.sizes is None else self.sizes[indices]
        row_numbers = self.row_numbers[indices]
        selected = StreamedDataset(self.source, self.caption_column, self.findings, row_numbers, sizes)
        selected.ignore_color_profiles = self.ignore_color_profiles
        return selected

    # --- what a sample holds -----------------------------------------------------------------------------------------

    def name(self, index: int) -> str:
        """What to call a sample in a message: its member of a shard where its chunk is here, else its number in the
        file."""
        return self.source.name(self.row_numbers[index])

    def _name_of(self, index: int, stored: StoredImage) -> str:
        return self.name(index)

    def stored_image(self, index: int) -> StoredImage:
        return _image_cell(self.source.read(self.row_numbers[index], "image"))

    def captions(self, index: int) -> list[str]:
        """The captions of a sample, at least one. Raises BadSample."""
        value = _caption_value(self.source.read(self.row_numbers[index], "caption"))
        fault = problems.caption_fault(value)
        if fault:
            raise BadSample(Problem("no usable caption", self.name(index), fault).sentence())
        return texts_of(value)

    def stored_images(self) -> Iterator[tuple[str, StoredImage]]:
        """(name, stored image) of every sample. Their chunks are fetched one after the other; `raw_captions` has the
        captions then."""
        self.caption_values = []
        ends = np.cumsum(self.lengths)
        for begin, end in zip(ends - self.lengths, ends):
            this_chunk = self.row_numbers[begin : begin + 1]
            next_chunk = self.row_numbers[end : end + 1]
            self.source.expect([this_chunk, next_chunk], idle_steps=0)
            for number in self.row_numbers[begin:end]:
                cell = _image_cell(self.source.read(number, "image"))
                if self.caption_column is not None:
                    self.caption_values.append(_caption_value(self.source.read(number, "caption")))
                yield self.source.name(number), cell

    def raw_captions(self) -> list[Any]:
        """What `stored_images` has met in the caption column."""
        return self.caption_values

    def file_indices(self) -> np.ndarray:
        """None of the images is a file by itself."""
        return np.zeros(0, dtype=np.int64)

    def indices_without_image(self) -> np.ndarray:
        """None is known before its turn comes."""
        return np.zeros(0, dtype=np.int64)

    def fingerprint(self) -> str:
        """SHA-256 over the files' names and sizes, the samples of each chunk, and which of them these are."""
        digest = hashlib.sha256(self.source.digest().encode())
        digest.update(np.ascontiguousarray(self.row_numbers).tobytes())
        return digest.hexdigest()

    # --- which samples, and when -------------------------------------------------------------------------------------

    @property
    def stream(self) -> "StreamedDataset":
        """The stream that a BatchPlan asks for the order of an epoch: this dataset."""
        return self

    @property
    def ahead(self) -> int:
        """How many samples ahead chunks are fetched."""
        return self.source.buffer

    @cached_property
    def lengths(self) -> np.ndarray:
        """How many of these samples lie in each chunk that has any: int64."""
        chunks = self.source.chunk_of(self.row_numbers)
        last_of_chunk = np.flatnonzero(np.diff(chunks))
        return np.diff(np.append(last_of_chunk + 1, len(chunks)), prepend=0)

    def draw_subset(self, count: int, generator: np.random.Generator) -> np.ndarray:
        """The indices of `count` samples: those of chunks that a generator draws, of the last chunk only the first."""
        ends = np.cumsum(self.lengths)
        indices = []
        found = 0
        for chunk in generator.permutation(len(ends)):
            if found < count:
                samples = np.arange(ends[chunk] - self.lengths[chunk], ends[chunk])[: count - found]
                indices.append(samples)
                found += len(samples)
        return np.concatenate(indices)

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """The order in which an epoch visits these samples: int64 indices."""
        return epoch_order(seed=seed, epoch=epoch, sizes=self.lengths, buffer=self.source.buffer)

    def expect(self, coming: Sequence[np.ndarray], rank: int, world_size: int) -> None:
        """Be told which samples come next, arrays of indices; see Source.expect. Does not wait."""
        self.source.expect([self.row_numbers[indices] for indices in coming], rank, world_size)


def _image_cell(content: bytes | None) -> StoredImage:
    """What a chunk holds for an image, as problems.open_image takes it."""
    return None if content is None else {"bytes": content, "path": None}


class _UnreadableCaption:
    """Stands in the place of a caption that could not be read, and is shown as the reason."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def __repr__(self) -> str:
        return self.reason


def _caption_value(text: str) -> Any:
    """What a chunk holds for a caption, as JSON: a list of it alone, or a string that says why there is none."""
    value = json.loads(text)
    return value[0] if isinstance(value, list) else _UnreadableCaption(value)
