"""What trackers are told."""

import numpy as np

from training_utils.base.console import warn
from training_utils.base.errors import reason_of


def tracker_config(settings):
    """A dict of settings as trackers take it: numbers, strings and booleans."""
    simple = (bool, int, float, str, type(None))
    return {name: value if isinstance(value, simple) else str(value) for name, value in settings.items()}


def log_images(tracker, images, captions, step):
    """Hand images (a list of PIL) to a tracker, if it is one that shows images, at this step."""
    if tracker.name == "tensorboard":
        array = np.stack([np.asarray(image) for image in images])
        tracker.writer.add_images("validation", array, step, dataformats="NHWC")
    elif tracker.name == "wandb":
        import wandb

        shown = [wandb.Image(image, caption=caption) for image, caption in zip(images, captions)]
        tracker.log({"validation": shown}, step=step)
    elif tracker.name == "comet_ml":
        for at, image in enumerate(images):
            tracker.writer.log_image(image, name=f"validation {captions[at]}", step=step)


def tell_trackers(trackers, action):
    """Do `action(tracker)` with each of a list of trackers. One that fails is named and leaves the list; the run goes
    on."""
    for tracker in list(trackers):
        try:
            action(tracker)
        except Exception as error:
            warn(f"{tracker.name} failed ({reason_of(error)}); the run goes on without it")
            trackers.remove(tracker)
