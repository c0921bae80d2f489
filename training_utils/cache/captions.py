"""What text encoders made of captions, as samples take it."""

import hashlib
from types import SimpleNamespace

from training_utils.cache import fill


class CachedCaptions:
    """What the text encoders made of captions: `read(tokens)` is the entry of what `Prepare.tokenize` made."""

    def __init__(self, store):
        self.store = store

    @staticmethod
    def key(tokens):
        """The same for the same tokens."""
        return hashlib.sha256(b"".join(array.tobytes() for array in tokens.values())).hexdigest()

    def read(self, tokens):
        return self.store.read(self.key(tokens))


def cache_captions(store, sets, encode, team=None, batch_size=None, empty=False):
    """Let the text encoders read every caption of some data.Samples once, the empty one too where it is `empty` that
    may be asked for, and put what they made of it in `prepare.captions`. For the other arguments see `fill`. Raises
    UserError.

    Where the store is None nothing is kept, and the networks run whenever a caption is asked for.
    """
    if store is None:
        for samples in sets:
            samples.prepare.captions = SimpleNamespace(read=lambda tokens: fill.first_entry(encode, tokens))
        return
    texts = dict.fromkeys([""] if empty else [])
    for samples in sets:
        for index in range(len(samples)):
            texts |= dict.fromkeys(samples.dataset.captions(index))
    tokenize, wanted = sets[0].prepare.tokenize, {}
    for text in texts:
        wanted.setdefault(CachedCaptions.key(tokenize(text)), text)
    fill.fill(store, wanted, tokenize, encode, team, batch_size, "captions")
    for samples in sets:
        samples.prepare.captions = CachedCaptions(store)
