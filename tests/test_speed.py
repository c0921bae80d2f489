"""The steady loop never waits for the device: nothing is fetched between two looks at the losses."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

FETCHES = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default}


class Fetches(TorchDispatchMode):
    """Counts the operations that hand a tensor's content to Python, each of which waits for a GPU's queue to drain."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in FETCHES
        return function(*args, **(kwargs or {}))


def fetches(run, out, updates):
    counter = Fetches()
    with counter:
        flags = ["--use_ema", "--snr_gamma", "5", "--noise_offset", "0.1", "--gradient_accumulation_steps", "2"]
        run(out, *flags, "--max_train_steps", updates, "--logging_steps", "100", "--lr_scheduler", "cosine")
    return counter.count


def test_the_number_of_fetches_does_not_grow_with_the_number_of_updates(run, tmp_path):
    assert fetches(run, tmp_path / "few", 3) == fetches(run, tmp_path / "many", 13)


def test_the_counter_counts():
    counter = Fetches()
    with counter:
        torch.ones(3).sum().item()
    assert counter.count == 1
