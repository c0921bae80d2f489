"""Where a run stands."""

from dataclasses import dataclass, field

from training_utils.data.plan import Position


@dataclass
class RunState:
    """Where a run stands: all that a checkpoint must hold beside weights and optimizer state.

    `step` counts optimizer steps, `micro_step` forward passes, `position` the place in the data.
    """

    seed: int
    step: int = 0
    micro_step: int = 0
    position: Position = field(default_factory=Position)
