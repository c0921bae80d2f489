"""Trackers without torch."""

import io
import json
import time
from importlib.util import find_spec
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from training_utils.base.errors import UserError, reason_of
from training_utils.data import samples
from training_utils.jax_backend import devices
from training_utils.run import output_folder
from training_utils.run.trackers import finish_trackers, log_values


class TensorBoard:
    """Writes TensorBoard's files without torch or TensorFlow; the interface is that of accelerate's trackers."""

    name = "tensorboard"

    def __init__(self, folder, project, settings):
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self.folder, self.writer = Path(folder) / project, self
        self.events = EventFileWriter(str(self.folder))
        (self.folder / "settings.json").write_text(json.dumps(settings, indent=1) + "\n")

    def _add(self, step, **value):
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        summary = Summary(value=[Summary.Value(**value)])
        self.events.add_event(Event(wall_time=time.time(), step=step, summary=summary))

    def log(self, values, step):
        """Curves: {name: number} at a step."""
        for name, value in values.items():
            self._add(step, tag=name, simple_value=value)
        self.events.flush()

    def add_images(self, name, images, step, dataformats="NHWC"):
        """Images side by side, uint8 of shape (N, H, W, 3)."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        assert dataformats == "NHWC"
        sheet, file = Image.fromarray(np.concatenate(images, axis=1)), io.BytesIO()
        sheet.save(file, "PNG")
        image = Summary.Image(
            height=sheet.height, width=sheet.width, colorspace=3, encoded_image_string=file.getvalue()
        )
        self._add(step, tag=name, image=image)
        self.events.flush()

    def finish(self):
        self.events.close()


class WandB:
    """Logs to Weights & Biases; the interface is that of accelerate's trackers."""

    name = "wandb"

    def __init__(self, folder, project, settings):
        import wandb

        Path(folder).mkdir(parents=True, exist_ok=True)
        self.run = wandb.init(project=project, config=settings, dir=str(folder))

    def log(self, values, step):
        self.run.log(values, step=step)

    def finish(self):
        self.run.finish()


TRACKERS = {"tensorboard": TensorBoard, "wandb": WandB}


def make_trackers(report_to, folder, project, settings):
    """The trackers that `--report_to` names, of the main process; `all` means those that are installed. Raises
    UserError where one cannot be opened."""
    if not devices.is_main() or report_to == "none":
        return []
    names = [name for name in TRACKERS if find_spec(name)] if report_to == "all" else [report_to]
    try:
        return [TRACKERS[name](folder, project, settings) for name in names]
    except Exception as error:  # no account, no network, another version
        names = ", ".join(names)
        raise UserError(
            f"the tracker cannot be opened ({names}: {reason_of(error)}); or give --report_to none"
        ) from None


def log_metrics(trackers, values, step):
    """Hand {name: number} of a step to every tracker."""
    log_values(trackers, values, step)


def say_skipped(skipped):
    """`data.say_skipped` for all hosts together; `skipped` is this one's set. A collective call."""
    samples.say_skipped(set(devices.gather(sorted(skipped))))


def end_training(trackers):
    """Close the trackers, let go of the output folder, and part from the other processes, once all have come this far.

    A process that fails does not come here, and `reporting.run` ends it at once: at this point it would wait in vain.
    """
    finish_trackers(trackers)
    output_folder.release()
    if jax.process_count() > 1:
        jax.distributed.shutdown()
