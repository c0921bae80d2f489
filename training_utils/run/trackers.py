"""What trackers are told."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from training_utils.base.console import warn
from training_utils.base.errors import reason_of
from training_utils.run.metrics import Metrics

Tracker = Any  # one of accelerate's, or of ours with the same interface


def tracker_config(settings: dict[str, Any]) -> dict[str, Any]:
    """A dict of settings as trackers take it: numbers, strings and booleans."""
    simple = (bool, int, float, str, type(None))
    return {name: value if isinstance(value, simple) else str(value) for name, value in settings.items()}


def log_values(trackers: list[Tracker], values: Mapping[str, float], step: int) -> None:
    """Hand the numbers of a step, {name: value}, to every tracker."""
    for tracker in list(trackers):
        _call_tracker(trackers, tracker, partial(tracker.log, values, step=step))


def log_images(trackers: list[Tracker], images: Sequence[Image.Image], captions: Sequence[str], step: int) -> None:
    """Hand images to every tracker that shows images, at this step."""
    for tracker in list(trackers):
        if tracker.name == "tensorboard":
            array = np.stack([np.asarray(image) for image in images])
            add = partial(tracker.writer.add_images, "validation", array, step, dataformats="NHWC")
            _call_tracker(trackers, tracker, add)
        elif tracker.name == "wandb":
            _call_tracker(trackers, tracker, partial(_log_to_wandb, tracker, images, captions, step))
        elif tracker.name == "comet_ml":
            for image, caption in zip(images, captions):
                add = partial(tracker.writer.log_image, image, name=f"validation {caption}", step=step)
                if not _call_tracker(trackers, tracker, add):
                    break


def _log_to_wandb(tracker: Tracker, images: Sequence[Image.Image], captions: Sequence[str], step: int) -> None:
    import wandb

    shown = [wandb.Image(image, caption=caption) for image, caption in zip(images, captions)]
    tracker.log({"validation": shown}, step=step)


def finish_trackers(trackers: list[Tracker]) -> None:
    """Have every tracker write what it still holds, and close it."""
    for tracker in list(trackers):
        _call_tracker(trackers, tracker, tracker.finish)


def _call_tracker(trackers: list[Tracker], tracker: Tracker, call: Callable[[], object]) -> bool:
    """Call a tracker. One that fails is named and leaves the list, and the run goes on. Returns whether it did not."""
    if isinstance(tracker, Metrics):  # ours: it reports a full disk itself, and anything else is a bug
        call()
        return True
    try:
        call()
    except Exception as error:  # each tracker's own kinds: of its network, of its account, of the disk
        warn(f"{tracker.name} failed ({reason_of(error)}); the run continues without it")
        trackers.remove(tracker)
        return False
    return True
