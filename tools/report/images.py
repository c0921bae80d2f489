"""The validation images: the grids that a run has drawn, by step."""

import base64
import io
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from tools.charts.series import colour_class
from tools.report.folder import RunFolder
from training_utils.base.errors import reason_of

# Grids that a page shows at most, over all runs.
MOST_GRIDS = 24
# Pixels that a grid is wide at most.
GRID_WIDTH = 900
# Characters that all images together take in the page.
MOST_CHARACTERS = 4_000_000


@dataclass(frozen=True)
class Thumbnail:
    """An image as a data URI, and its size in pixels."""

    uri: str
    width: int
    height: int


@dataclass(frozen=True)
class Grid:
    """The images of a run at a step. `thumbnail` is None where the file is damaged, which `problem` then says."""

    run_name: str
    css_class: str
    step: int
    description: str
    thumbnail: Thumbnail | None
    problem: str = ""


@dataclass(frozen=True)
class Gallery:
    """The grids, newest first: those of one step are a row. `steps` counts all steps that have any."""

    rows: list[list[Grid]]
    steps: int
    prompts: list[str]

    @property
    def broad(self) -> bool:
        """Whether grids are so wide that few should stand beside each other."""
        thumbnails = [grid.thumbnail for row in self.rows for grid in row if grid.thumbnail]
        return bool(thumbnails) and statistics.median(image.width / image.height for image in thumbnails) > 2


def gallery_of(runs: list[RunFolder]) -> Gallery:
    """The grids of all runs, as many steps as there is room for."""
    steps = sorted({step for run in runs for step in run.grids}, reverse=True)
    rows: list[list[Grid]] = []
    characters = 0
    for step in evenly_spread(steps, max(2, MOST_GRIDS // len(runs))):
        row = [_grid(run, index, step) for index, run in enumerate(runs) if step in run.grids]
        characters += sum(len(grid.thumbnail.uri) for grid in row if grid.thumbnail)
        if characters > MOST_CHARACTERS and rows:
            break
        rows.append(row)
    prompts = dict.fromkeys(prompt for run in runs for prompt in run.prompts())
    return Gallery(rows, len(steps), list(prompts))


def evenly_spread(items: Sequence[int], most: int) -> list[int]:
    """At most `most` of `items`, evenly spread, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(index * (len(items) - 1) / (most - 1))] for index in range(most)]


def _grid(run: RunFolder, index: int, step: int) -> Grid:
    path = run.grids[step]
    thumbnail = None
    problem = ""
    try:
        thumbnail = _thumbnail(path)
    except _Unreadable as error:
        problem = f"{path} cannot be read ({error})"
    description = f"images after {step:,} steps: {'; '.join(run.prompts())}"
    return Grid(run.name, colour_class(index), step, description, thumbnail, problem)


class _Unreadable(Exception):
    """Why an image cannot be read."""


def _thumbnail(path: Path) -> Thumbnail:
    """An image, made smaller where it is large. Raises _Unreadable where it is damaged."""
    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise _Unreadable(reason_of(error)) from error
    image.thumbnail((GRID_WIDTH, 2 * GRID_WIDTH))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85, optimize=True)
    encoded = base64.b64encode(file.getvalue()).decode()
    return Thumbnail(f"data:image/jpeg;base64,{encoded}", *image.size)
