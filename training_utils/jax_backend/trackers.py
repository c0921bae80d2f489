"""Trackers without torch. Their interface is that of accelerate's."""

import json
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from training_utils.base.errors import UserError, reason_of
from training_utils.jax_backend import processes
from training_utils.run.trackers import log_values


class Tracker(Protocol):
    """What the curves of a run are logged to."""

    name: str

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log numbers by name for a step."""

    def finish(self) -> None:
        """Write what is left, and close."""


class TensorBoard:
    """Writes TensorBoard's files by tensorboardX; the run's settings go into settings.json beside them.

    `writer` is tensorboardX's SummaryWriter, which also takes images.
    """

    name = "tensorboard"

    def __init__(self, folder: str | Path, project: str, settings: Mapping[str, Any]) -> None:
        with _without_torch():
            from tensorboardX import SummaryWriter

        # It would warn of each NaN loss, in lines of its own across the progress bar; the run itself speaks of them.
        logging.getLogger("tensorboardX.x2num").setLevel(logging.ERROR)
        folder = Path(folder) / project
        self.writer = SummaryWriter(str(folder), flush_secs=1)
        (folder / "settings.json").write_text(json.dumps(settings, indent=1) + "\n")

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log numbers by name for a step."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def finish(self) -> None:
        """Write what is left, and close."""
        self.writer.close()


@contextmanager
def _without_torch() -> Iterator[None]:
    """The context in which torch cannot be imported, unless it is already.

    tensorboardX imports it where it is installed, for no more than the name of a type: seconds, and another runtime
    beside JAX.
    """
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]  # with which an import raises ImportError
    try:
        yield
    finally:
        del sys.modules["torch"]


class WandB:
    """Logs to Weights & Biases."""

    name = "wandb"

    def __init__(self, folder: str | Path, project: str, settings: Mapping[str, Any]) -> None:
        import wandb

        Path(folder).mkdir(parents=True, exist_ok=True)
        try:
            self.run = wandb.init(project=project, config=settings, dir=str(folder))
        except wandb.errors.Error as error:  # no account, no network
            raise ConnectionError(reason_of(error)) from error

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Log values by name for a step."""
        self.run.log(values, step=step)

    def finish(self) -> None:
        """Write what is left, and close."""
        self.run.finish()


TRACKERS: dict[str, type[TensorBoard] | type[WandB]] = {"tensorboard": TensorBoard, "wandb": WandB}
PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}


def start_trackers(report_to: str, folder: Path, project: str, settings: Mapping[str, Any]) -> list[Tracker]:
    """The trackers that `--report_to` names, in the main process; `all` means those that are installed.

    Raises UserError where one cannot be opened.
    """
    if not processes.is_main() or report_to == "none":
        return []
    names = [report_to]
    if report_to == "all":
        names = [name for name in TRACKERS if find_spec(PACKAGES[name])]
    try:
        return [TRACKERS[name](folder, project, settings) for name in names]
    except (OSError, ImportError) as error:  # no account, no network, a disk that is full, another version
        shown = ", ".join(names)
        raise UserError(
            f"the tracker cannot be opened ({shown}: {reason_of(error)}); --report_to none trains without one"
        ) from error


def log_metrics(trackers: list[Tracker], values: Mapping[str, float], step: int) -> None:
    """Hand {name: number} of a step to every tracker."""
    log_values(trackers, values, step)
