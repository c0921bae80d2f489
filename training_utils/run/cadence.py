"""After which steps a checkpoint is written and a validation made."""

from training_utils.run.state import RunState


def checkpoint_due(state: RunState, every: int, last: int) -> bool:
    """Whether a checkpoint is due after this step: each `every` steps (0: never) and at the `last` one."""
    if not every:
        return False
    return state.step % every == 0 or state.step == last


def validation_due(state: RunState, steps: int | None, epochs: int, last: int) -> bool:
    """Whether to validate after this step: each `steps` steps, or without it each `epochs` epochs; and at the `last`
    step. 0 means never."""
    every = epochs if steps is None else steps
    if not every:
        return False
    if state.step == last:
        return True
    if steps is not None:
        return state.step % steps == 0
    ends_epoch = state.position.sample == 0
    return ends_epoch and state.position.epoch % epochs == 0
