"""What text encoders made of captions, as samples take it."""

import hashlib
from collections.abc import Callable, Sequence

import numpy as np

from training_utils.cache.fill import Sample, encode_one, fill
from training_utils.cache.processes import Processes
from training_utils.cache.shard import Encoded
from training_utils.cache.store import Store
from training_utils.data.samples import Samples


class CachedCaptions:
    """What the text encoders made of captions, read from a store."""

    def __init__(self, store: Store) -> None:
        self.store = store

    @staticmethod
    def key(tokens: Sample) -> str:
        """The same for the same tokens."""
        return hashlib.sha256(b"".join(array.tobytes() for array in tokens.values())).hexdigest()

    def read(self, tokens: Sample) -> dict[str, np.ndarray]:
        """The entry of what `tokenize` made of a caption."""
        return self.store.read(self.key(tokens))


class EncodedCaptions:
    """What the text encoders make of captions, computed whenever one is asked for."""

    def __init__(self, encode: Callable[[Sample], Encoded]) -> None:
        self.encode = encode

    def read(self, tokens: Sample) -> dict[str, np.ndarray]:
        """The entry of what `tokenize` made of a caption."""
        return encode_one(self.encode, tokens)


def cache_captions(
    store: Store | None,
    sets: Sequence[Samples],
    encode: Callable[[Sample], Encoded],
    processes: Processes,
    batch_size: int = 1,
    empty: bool = False,
) -> None:
    """Let the text encoders read every caption of some Samples once and set `transform.caption_cache` of each.

    With `empty` they read the empty caption too. For the other arguments see `fill`. Where the store is None nothing
    is cached, and the networks run whenever a caption is asked for. A collective call. Raises UserError.
    """
    if store is None:
        for samples in sets:
            samples.transform.caption_cache = EncodedCaptions(encode)
        return
    texts = dict.fromkeys([""] if empty else [])
    for samples in sets:
        for index in range(len(samples)):
            texts |= dict.fromkeys(samples.dataset.captions(index))
    tokenize = sets[0].transform.tokenize
    wanted: dict[str, str] = {}
    for text in texts:
        wanted.setdefault(CachedCaptions.key(tokenize(text)), text)
    fill(
        store,
        wanted,
        prepare=tokenize,
        encode=encode,
        processes=processes,
        batch_size=batch_size,
        noun="captions",
    )
    for samples in sets:
        samples.transform.caption_cache = CachedCaptions(store)
