"""What frozen networks made of images, as samples take it."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

from training_utils.base import draws
from training_utils.base.console import bar, warn
from training_utils.base.errors import UserError
from training_utils.cache import fill
from training_utils.data import parallel
from training_utils.data.problems import BadSample

BLANK = "no picture"


class CachedImages:
    """What the networks made of a dataset's images: `read` stands in for `Prepare.show` and the networks.

    Of an image that is cropped at random `crops` crops are kept. They are drawn from its content, so that every run
    finds the same ones. `digests` are those of the images' content, `sizes` their own (width, height), `unusable`
    maps indices to sentences. The `size` of a view is the one at which it is shown, None where there is no choice.
    """

    def __init__(self, store, digests, sizes, crops):
        self.store, self.digests, self.sizes, self.crops, self.unusable = store, digests, sizes, crops, {}

    def key(self, index, mirrored, crop, size):
        """The key of one view; `crop` is None for the middle of the image, else a number."""
        words = [self.digests[index], *(["mirrored"] if mirrored else []), *([] if crop is None else [f"crop {crop}"])]
        return " ".join(words if size is None else [*words, f"{size[0]} x {size[1]}"])

    def corner(self, index, crop):
        """The generator of one crop."""
        return None if crop is None else draws.generator(int(self.digests[index][:15], 16), "cached_crop", crop)

    def views(self, index, mirrors, cropped, size):
        """All that `read` may be asked for: a list of (mirrored, crop)."""
        crops = range(self._crops(index, size)) if cropped else [None]
        return [(mirrored, crop) for mirrored in ((False, True) if mirrors else (False,)) for crop in crops]

    def has_room(self, index, size):
        """Whether crops of an image for this size can differ."""
        (width, height), (shown_width, shown_height) = self.sizes[index], size or (1, 1)
        return width * shown_height != height * shown_width

    def _crops(self, index, size):
        return self.crops if self.has_room(index, size) else 1

    def read(self, index, mirrored, generator, size=None):
        """The entry of an image, mirrored or not; `generator` draws which crop, None takes the middle. Raises
        BadSample for an image that could not be used when the cache was made."""
        if index in self.unusable:
            raise BadSample(self.unusable[index])
        crop = None if generator is None else int(generator.integers(self._crops(index, size)))
        return self.store.read(self.key(index, mirrored, crop, size))

    def read_blank(self):
        """The entry of what stands in the place of no image."""
        return self.store.read(BLANK)


@dataclass(frozen=True)
class ImageView:
    """One view of one row's image, to be shown to the networks."""

    samples: Any
    index: int
    mirrored: bool
    crop: Any
    size: Any

    def __str__(self):
        return self.samples.dataset.name(self.index)


def _show(view):
    if isinstance(view, dict):
        return view
    samples, prepare = view.samples, view.samples.prepare
    try:
        corner = prepare.images.corner(view.index, view.crop)
        size = () if view.size is None else (view.size,)
        return prepare.show(samples.dataset, view.index, view.mirrored, corner, *size)
    except BadSample as error:
        return error if samples.on_bad_sample == "skip" else samples.refusal(error)
    except UserError as error:
        return error


def hash_files(rows, indices, threads):
    """`ImageDataset.digest_and_size` of some images, in order."""
    return list(bar(parallel.read_ahead(rows.digest_and_size, indices, threads), "reading images", len(indices)))


def cache_images(store, sets, encode, team=None, batch_size=None, crops=1, blank=None):
    """Let the networks see every image of some data.Samples once, as their `prepare` shows them, and put what they
    made of it in `prepare.images`; `blank` is a sample to show them too, `crops` as in Images. For the rest see
    `fill`. Raises UserError.

    Where the store is None nothing is kept, and the networks run whenever an image is asked for.
    """
    if store is None:
        for samples in sets:
            samples.prepare.images = SimpleNamespace(
                read=lambda *view, samples=samples: fill.first_entry(
                    encode, samples.prepare.show(samples.dataset, *view)
                ),
                read_blank=lambda: fill.first_entry(encode, blank),
            )
        return
    for samples in sets:
        _, firsts, same = np.unique(
            samples.dataset.row_numbers, return_index=True, return_inverse=True
        )  # some are repeated
        mine = range(team.rank, len(firsts), team.world)
        looks = hash_files(samples.dataset, [int(firsts[at]) for at in mine], team.threads)
        seen = [look for _, look in sorted(team.gather(list(zip(mine, looks))))]
        digests, sizes = [seen[at][0] for at in same], [seen[at][1] for at in same]
        samples.prepare.images = CachedImages(store, digests, sizes, crops)
    wanted, narrowed = {}, 0
    for samples in sets:
        for index in range(len(samples)):
            size = samples.dataset.size(index)
            wanted |= _views(samples, index, size)
            narrowed += samples.prepare.cropped and samples.prepare.images.has_room(index, size)
    if narrowed and crops == 1 and team.rank == 0:
        warn(
            f"one random crop of each of {narrowed:,} images is kept, the same in every epoch; --cached_crops 4 "
            "keeps four, in four times the room"
        )
    # Views of one size lie together, so that they can be encoded together.
    wanted = dict(sorted(wanted.items(), key=lambda pair: pair[1].size or ()))
    failed = fill.fill(
        store, ({BLANK: blank} if blank else {}) | wanted, _show, encode, team, batch_size, "views of images"
    )
    if failed:
        stand_ins = {}
        for samples in sets:
            images, sized = samples.prepare.images, samples.dataset.size
            for index in range(len(samples)):
                for key in failed.keys() & _views(samples, index, sized(index)).keys():
                    images.unusable[index] = failed[key]
            usable = np.setdiff1d(np.arange(len(samples)), list(images.unusable))
            for place in images.unusable if len(usable) else ():
                index = int(usable[np.searchsorted(usable, place) % len(usable)])  # as data.Samples goes on from there
                stand_ins |= _views(samples, index, sized(place))
        failed = fill.fill(
            store, stand_ins, _show, encode, team, batch_size, "views of images that stand in for others"
        )
        if failed:
            reason = next(iter(failed.values()))
            raise UserError(f"an image that stands in for another cannot be used either: {reason}", everywhere=True)


def _views(samples, index, size):
    """All views of an image that are shown at a size, {key: _View}."""
    images, prepare = samples.prepare.images, samples.prepare
    return {
        images.key(index, *view, size): ImageView(samples, index, *view, size)
        for view in images.views(index, prepare.mirrors, prepare.cropped, size)
    }
