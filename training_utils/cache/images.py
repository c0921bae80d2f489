"""What frozen networks made of images, as samples take it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from training_utils.base import draws
from training_utils.base.console import bar, warn
from training_utils.base.errors import UserError
from training_utils.cache.fill import Sample, encode_one, fill
from training_utils.cache.processes import Processes
from training_utils.cache.shard import Encoded
from training_utils.cache.store import Store
from training_utils.data import parallel
from training_utils.data.dataset import ImageDataset
from training_utils.data.problems import BadSample
from training_utils.data.samples import Samples

KEY_OF_NO_IMAGE = "no picture"  # the key under which every cache has the sample that stands for no image

Size = tuple[int, int]  # (width, height) in pixels


class CachedImages:
    """What the networks made of a dataset's images, read from a store in place of the images.

    Of an image that is cropped at random `crops` crops are kept. They are drawn from its content, so that every run
    finds the same ones. `digests` are those of the images' content, `sizes` their own (width, height), `unusable`
    maps indices to sentences. The `size` of a view is the one at which it is trained, None where there is no choice.
    """

    def __init__(self, store: Store, digests: Sequence[str], sizes: Sequence[Size], crops: int) -> None:
        self.store = store
        self.digests = digests
        self.sizes = sizes
        self.crops = crops
        self.unusable: dict[int, str] = {}

    def key(self, index: int, mirrored: bool, crop: int | None, size: Size | None) -> str:
        """The key of one view; `crop` is None for the middle of the image, else a number."""
        words = [self.digests[index]]
        if mirrored:
            words.append("mirrored")
        if crop is not None:
            words.append(f"crop {crop}")
        if size is not None:
            words.append(f"{size[0]} x {size[1]}")
        return " ".join(words)

    def crop_generator(self, index: int, crop: int | None) -> np.random.Generator | None:
        """The generator that draws where a crop lies; None for the middle of the image."""
        if crop is None:
            return None
        return draws.generator(int(self.digests[index][:15], 16), "cached_crop", crop)

    def views(
        self, index: int, random_flip: bool, random_crop: bool, size: Size | None
    ) -> list[tuple[bool, int | None]]:
        """All that `read` may be asked for: a list of (mirrored, crop)."""
        crops = range(self._crop_count(index, size)) if random_crop else [None]
        orientations = (False, True) if random_flip else (False,)
        return [(mirrored, crop) for mirrored in orientations for crop in crops]

    def crops_differ(self, index: int, size: Size | None) -> bool:
        """Whether crops of an image for a size can differ: whether its proportions are other ones."""
        width, height = self.sizes[index]
        crop_width, crop_height = size or (1, 1)
        return width * crop_height != height * crop_width

    def _crop_count(self, index: int, size: Size | None) -> int:
        return self.crops if self.crops_differ(index, size) else 1

    def read(
        self, index: int, mirrored: bool, generator: np.random.Generator | None, size: Size | None = None
    ) -> dict[str, np.ndarray]:
        """The entry of an image, mirrored or not; `generator` draws which crop, None takes the middle. Raises
        BadSample for an image that could not be used when the cache was made."""
        if index in self.unusable:
            raise BadSample(self.unusable[index])
        crop = None if generator is None else int(generator.integers(self._crop_count(index, size)))
        return self.store.read(self.key(index, mirrored, crop, size))

    def read_blank(self) -> dict[str, np.ndarray]:
        """The entry of what stands in the place of no image."""
        return self.store.read(KEY_OF_NO_IMAGE)


class EncodedImages:
    """What the networks make of a dataset's images, computed whenever one is asked for. `blank` is the sample that
    stands for no image."""

    def __init__(self, samples: Samples, encode: Callable[[Sample], Encoded], blank: Sample | None) -> None:
        self.samples = samples
        self.encode = encode
        self.blank = blank

    def read(self, *view: Any) -> dict[str, np.ndarray]:
        """The entry of an image; the arguments are those of `CachedImages.read`."""
        return encode_one(self.encode, self.samples.transform.view(self.samples.dataset, *view))

    def read_blank(self) -> dict[str, np.ndarray]:
        """The entry of what stands in the place of no image."""
        assert self.blank is not None
        return encode_one(self.encode, self.blank)


@dataclass(frozen=True)
class ImageView:
    """One view of one image, to be encoded. `crop` is None for the middle of the image, else a number."""

    samples: Samples
    index: int
    mirrored: bool
    crop: int | None
    size: Size | None

    def __str__(self) -> str:
        return self.samples.dataset.name(self.index)

    @property
    def is_skippable(self) -> bool:
        """Whether the user wants bad samples to be skipped."""
        return self.samples.on_bad_sample == "skip"

    def prepare(self) -> Sample | UserError:
        """The arrays that the networks take; a BadSample for an image that is to be skipped, another UserError for
        one that ends the run. They are returned: raised in a thread, one would come before those of earlier views."""
        transform = self.samples.transform
        generator = transform.image_cache.crop_generator(self.index, self.crop)
        size = () if self.size is None else (self.size,)
        try:
            return transform.view(self.samples.dataset, self.index, self.mirrored, generator, *size)
        except BadSample as error:
            return error if self.is_skippable else self.samples.refusal(error)
        except UserError as error:
            return error


def _prepare(item: ImageView | Sample) -> Sample | UserError:
    """The sample of a view, or the one that stands for no image, which is a sample already."""
    return item.prepare() if isinstance(item, ImageView) else item


def _may_skip(item: ImageView | Sample) -> bool:
    return isinstance(item, ImageView) and item.is_skippable


def hash_files(rows: ImageDataset, indices: Sequence[int], threads: int) -> list[tuple[str, Size]]:
    """`ImageDataset.digest_and_size` of some images, in order."""
    return list(bar(parallel.read_ahead(rows.digest_and_size, indices, threads), "reading images", len(indices)))


def cache_images(
    store: Store | None,
    sets: Sequence[Samples],
    encode: Callable[[Sample], Encoded],
    processes: Processes,
    batch_size: int = 1,
    crops: int = 1,
    blank: Sample | None = None,
) -> None:
    """Let the networks see every image of some Samples once and set `transform.image_cache` of each.

    `transform.view` makes what they see. `blank` is a sample that stands for no image, to be encoded too; `crops` are
    as in CachedImages, for the other arguments see `fill`. Where the store is None nothing is cached, and the networks
    run whenever an image is asked for. A collective call. Raises UserError.
    """
    if store is None:
        for samples in sets:
            samples.transform.image_cache = EncodedImages(samples, encode, blank)
        return
    for samples in sets:
        _hash_images(store, samples, processes, crops)
    views: dict[str, ImageView] = {}
    for samples in sets:
        for index in range(len(samples)):
            views |= _views_of(samples, index, samples.dataset.size(index))
    if crops == 1 and processes.rank == 0:
        _warn_of_single_crops(sets)
    # Views of one size lie together, so that they can be encoded together.
    in_order = sorted(views.items(), key=lambda pair: pair[1].size or ())
    wanted: dict[str, ImageView | Sample] = {KEY_OF_NO_IMAGE: blank} if blank else {}
    wanted |= in_order
    encode_missing = partial(
        fill,
        store,
        prepare=_prepare,
        encode=encode,
        processes=processes,
        batch_size=batch_size,
        skip_overflow=_may_skip,
    )
    failed = encode_missing(wanted, noun="views of images")
    if not failed:
        return
    stand_ins: dict[str, ImageView | Sample] = {}
    for samples in sets:
        _mark_unusable(samples, failed)
        stand_ins |= _views_of_stand_ins(samples)
    failed = encode_missing(stand_ins, noun="views of images that stand in for others")
    if failed:
        reason = next(iter(failed.values()))
        raise UserError(f"an image that stands in for another cannot be used either: {reason}", everywhere=True)


def _hash_images(store: Store, samples: Samples, processes: Processes, crops: int) -> None:
    """Give samples their CachedImages. The files are read once, divided among the processes. A collective call."""
    # A dataset may repeat images.
    _, firsts, same = np.unique(samples.dataset.row_numbers, return_index=True, return_inverse=True)
    mine = range(processes.rank, len(firsts), processes.world_size)
    contents = hash_files(samples.dataset, [int(firsts[at]) for at in mine], processes.threads)
    gathered = processes.gather(list(zip(mine, contents)))
    in_order = [content for _, content in sorted(gathered)]
    digests = [in_order[at][0] for at in same]
    sizes = [in_order[at][1] for at in same]
    samples.transform.image_cache = CachedImages(store, digests, sizes, crops)


def _warn_of_single_crops(sets: Sequence[Samples]) -> None:
    """Warn where images that are cropped at random have the same crop in every epoch."""
    count = 0
    for samples in sets:
        if samples.transform.random_crop:
            images = samples.transform.image_cache
            count += sum(images.crops_differ(index, samples.dataset.size(index)) for index in range(len(samples)))
    if count:
        warn(
            f"one random crop of each of {count:,} images is kept, the same in every epoch; --cached_crops 4 "
            "keeps four, in four times the room"
        )


def _views_of(samples: Samples, index: int, size: Size | None) -> dict[str, ImageView]:
    """All views of an image at a size, by key."""
    transform = samples.transform
    views = transform.image_cache.views(index, transform.random_flip, transform.random_crop, size)
    return {
        transform.image_cache.key(index, mirrored, crop, size): ImageView(samples, index, mirrored, crop, size)
        for mirrored, crop in views
    }


def _mark_unusable(samples: Samples, failed: dict[str, str]) -> None:
    """Note the images that have a view without an entry; `failed` are those views, {key: sentence}."""
    for index in range(len(samples)):
        views = _views_of(samples, index, samples.dataset.size(index))
        for key in failed.keys() & views.keys():
            samples.transform.image_cache.unusable[index] = failed[key]


def _views_of_stand_ins(samples: Samples) -> dict[str, ImageView]:
    """The views of images that stand in for unusable ones: at the size of the image in whose place they are."""
    unusable = samples.transform.image_cache.unusable
    usable = np.setdiff1d(np.arange(len(samples)), list(unusable))
    views: dict[str, ImageView] = {}
    if len(usable):
        for place in unusable:
            # The next usable one, as Samples goes on from there.
            index = int(usable[np.searchsorted(usable, place) % len(usable)])
            views |= _views_of(samples, index, samples.dataset.size(place))
    return views
