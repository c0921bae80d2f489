"""The steady loop never waits for the device: nothing is fetched between two fetches of the losses."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

FETCHES = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default}


class Fetches(TorchDispatchMode):
    """Counts the operations that hand a tensor's content to Python; each waits for a GPU's queue to drain."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in FETCHES
        return function(*args, **(kwargs or {}))


LESS_MEMORY = ["--fused_backward_pass", "--max_grad_norm", "0", "--use_ema"]
PATHS = {
    "run": "--use_ema --snr_gamma 5 --noise_offset 0.1 --gradient_accumulation_steps 2 --lr_scheduler cosine".split(),
    "run during the backward pass": LESS_MEMORY,
    "run in bfloat16": [*LESS_MEMORY, "--full_bf16"],
    "run with adafactor during the backward pass": ["--optimizer", "adafactor", *LESS_MEMORY],
    "run with adafactor": ["--optimizer", "adafactor", "--on_nan", "skip"],
    "run_lora": ["--use_ema", "--train_text_encoder"],
    "run_sdxl": [*LESS_MEMORY, "--full_bf16"],
    "run_lora_sdxl": ["--use_ema", "--train_text_encoder"],
    "run_prior": LESS_MEMORY,
    "run_lora_prior": ["--use_ema"],
    "run_decoder": LESS_MEMORY,
    "run_lora_decoder": ["--use_ema"],
}
# For the norm of the gradient, during the backward pass of each: its kernel has no switch.
FETCH_EACH_STEP = ["run with adafactor", "run with adafactor during the backward pass"]


def fetches(run, out, flags, steps):
    counter = Fetches()
    with counter:
        run(out, *flags, "--max_train_steps", steps, "--logging_steps", "100")
    return counter.count


@pytest.mark.parametrize("path", PATHS)
def test_the_number_of_fetches_does_not_grow_with_the_number_of_steps(request, path, tmp_path):
    run, flags = request.getfixturevalue(path.split()[0]), PATHS[path]
    grown = fetches(run, tmp_path / "many", flags, 7) - fetches(run, tmp_path / "few", flags, 3)
    assert (grown > 0) if path in FETCH_EACH_STEP else (grown == 0)


def test_the_counter_counts():
    counter = Fetches()
    with counter:
        torch.ones(3).sum().item()
    assert counter.count == 1
