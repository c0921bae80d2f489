"""The optimizer table: everything about an optimizer stands in its row. Imports no library."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from training_utils.cli.packages import Package


@dataclass(frozen=True)
class Optimizer:
    """Everything about one optimizer of the torch scripts."""

    name: str  # in --optimizer
    help: str  # what follows its name in the help
    built_by: str  # the class, "module:Class"
    takes: tuple[str, ...]  # its arguments that follow from flags, of betas, eps and weight_decay
    fixed: Mapping[str, Any] = field(default_factory=dict)  # its other arguments
    package: Package | None = None  # that it needs, beside torch
    # It has a kernel that makes a step in one launch. Under loss scaling that kernel skips an overflow in itself, and
    # accelerate could not tell that it did: there it is left off.
    has_fused_kernel: bool = False
    # What of its state may be bfloat16 with --full_bf16: what is as large as a weight, or as one of its sides.
    bfloat16_state: frozenset[str] = frozenset()
    # What it finds out during a run and keeps beside its settings in a checkpoint.
    found_settings: frozenset[str] = frozenset()
    not_with: Mapping[str, str] = field(default_factory=dict)  # flags that it does not go with, and why
    above_zero: tuple[str, ...] = ()  # flags that must not be 0
    made_for_learning_rate: float | None = None  # since it finds the size of its steps by itself
    can_be_sharded: bool = False  # FSDP and DeepSpeed update the weights by it


BITSANDBYTES = Package("bitsandbytes", pip="bitsandbytes", title="bitsandbytes")
PRODIGYOPT = Package("prodigyopt", pip="prodigyopt==1.1.2", title="prodigyopt")
ADAM = ("betas", "eps", "weight_decay")
ONE_STEP_SIZE = "finds one step size for all weights, and --{flag} updates them one by one"

OPTIMIZERS = {
    row.name: row
    for row in (
        Optimizer(
            "adamw",
            help="is the usual one",
            built_by="torch.optim:AdamW",
            takes=ADAM,
            has_fused_kernel=True,
            bfloat16_state=frozenset(["exp_avg", "exp_avg_sq"]),
            can_be_sharded=True,
        ),
        Optimizer(
            "adamw8bit",
            help="keeps its state in 8 bits",
            built_by="bitsandbytes.optim:AdamW8bit",
            takes=ADAM,
            package=BITSANDBYTES,
        ),
        Optimizer(
            "paged_adamw8bit",
            help="moves that state to host memory when the GPU's runs out",
            built_by="bitsandbytes.optim:PagedAdamW8bit",
            takes=ADAM,
            package=BITSANDBYTES,
        ),
        Optimizer(
            "adafactor",
            help="keeps less state in memory",
            built_by="torch.optim:Adafactor",
            takes=("weight_decay",),
            fixed={
                # By default torch chooses it on a GPU, and it holds several times the weights for a moment.
                "foreach": False,
                # The rate as it is: by default torch takes it in proportion to a weight's RMS, which for adapters,
                # zero at first, is a thousandth of it.
                "eps": (None, 1.0),
            },
            bfloat16_state=frozenset(["row_var", "col_var", "variance"]),
        ),
        Optimizer(
            "prodigy",
            help="finds its own step size, with --learning_rate 1",
            built_by="prodigyopt:Prodigy",
            takes=ADAM,
            # What diffusers' own scripts set; without the second a warm-up would distort the step size that it finds.
            fixed={"use_bias_correction": True, "safeguard_warmup": True},
            package=PRODIGYOPT,
            found_settings=frozenset(["d", "d_max", "d_hat", "d_numerator", "d_denom", "k"]),
            not_with={"fused_backward_pass": ONE_STEP_SIZE, "full_bf16": ONE_STEP_SIZE},
            above_zero=("learning_rate", "adam_epsilon"),
            made_for_learning_rate=1,
        ),
    )
}


def found_settings() -> frozenset[str]:
    """What any of the optimizers finds out during a run and keeps beside its settings."""
    return frozenset().union(*(row.found_settings for row in OPTIMIZERS.values()))


def help_text() -> str:
    """The help of --optimizer."""
    return "; ".join(f"{row.name} {row.help}" for row in OPTIMIZERS.values())
