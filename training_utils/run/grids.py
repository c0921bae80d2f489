"""Validation images as one captioned grid."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw
from PIL.ImageFont import FreeTypeFont

from training_utils.base.console import say, warn
from training_utils.base.errors import reason_of
from training_utils.run.fonts import builtin, drawable
from training_utils.run.trackers import Tracker, log_images

MOST_LINES = 3  # of a caption
GAP = 12  # pixels between images
TITLE_HEIGHT = 40
LINE_HEIGHT = 18
BACKGROUND = (250, 250, 248)


def draw_grid(
    images: Sequence[Image.Image], captions: Sequence[str], title: str, columns: int = 4, side: int = 256
) -> Image.Image:
    """One sheet of square images under a title line, each with its caption.

    `side` is the size in pixels that each image is shown at; small ones are enlarged without smoothing.
    """
    title_font = builtin(18)
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    texts = []
    for caption in captions:
        text, font = drawable(caption, 14)
        texts.append((_fit(ruler, text, font, side, breaks_words=not caption.isascii()), font))
    most_lines = max(text.count("\n") + 1 for text, _ in texts)

    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    cell_width = side + GAP
    cell_height = side + 8 + LINE_HEIGHT * most_lines + GAP
    width = columns * cell_width + GAP
    sheet = Image.new("RGB", (width, TITLE_HEIGHT + rows * cell_height + GAP), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, 11), _fit(draw, title, title_font, width - 2 * GAP), fill=(30, 30, 30), font=title_font)
    for at, (image, (text, font)) in enumerate(zip(images, texts, strict=True)):
        row, column = divmod(at, columns)
        left = GAP + column * cell_width
        top = TITLE_HEIGHT + GAP // 2 + row * cell_height
        smooth = Image.Resampling.NEAREST if max(image.size) < side else Image.Resampling.LANCZOS
        sheet.paste(image.resize((side, side), smooth), (left, top))
        draw.multiline_text((left, top + side + 4), text, fill=(70, 70, 70), font=font, spacing=3)
    return sheet


def _fit(draw: ImageDraw.ImageDraw, text: str, font: FreeTypeFont, width: int, breaks_words: bool = False) -> str:
    """`text` broken into at most three lines of `width` pixels, the last one shortened if there is more."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer, font=font) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
        # What has no spaces, as in many scripts, is broken between any two letters.
        while breaks_words and draw.textlength(lines[-1], font=font) > width and len(lines) <= MOST_LINES:
            end = _letters_that_fit(draw, lines[-1], font, width)
            lines[-1:] = [lines[-1][:end], lines[-1][end:]]
    shown = lines[:MOST_LINES]
    if len(lines) > MOST_LINES:
        shown[-1] += " …"
    return "\n".join(_cut_to(draw, line, font, width) for line in shown)


def _letters_that_fit(draw: ImageDraw.ImageDraw, line: str, font: FreeTypeFont, width: int) -> int:
    """How many letters of a line are no wider than `width` pixels, at least one."""
    end = len(line) - 1
    while end > 1 and draw.textlength(line[:end], font=font) > width:
        end -= 1
    return end


def _cut_to(draw: ImageDraw.ImageDraw, line: str, font: FreeTypeFont, width: int) -> str:
    """A line that is no wider than `width` pixels, with … for what is cut off."""
    while draw.textlength(line, font=font) > width and len(line) > 2:
        line = line[:-2].rstrip() + "…"
    return line


def grid_name(step: int) -> str:
    """Where the validation images of a step lie inside the output folder."""
    return f"validation/step-{step:06d}.png"


def standing_grids(output_dir: str | Path, step: int) -> list[str]:
    """The grids of validation images that an earlier run left at this step, as names: one or none."""
    name = grid_name(step)
    return [name] if (Path(output_dir) / name).is_file() else []


def publish_images(
    trackers: list[Tracker],
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    step: int,
    output_dir: str | Path,
) -> None:
    """Write validation images as one captioned grid under `output_dir` and hand them to the trackers."""
    path = Path(output_dir) / grid_name(step)
    sheet = draw_grid(images, prompts, f"after {step:,} steps")
    log_images(trackers, images, prompts, step)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(path)
        say(f"step {step}: images in {path}")
    except OSError as error:
        warn(f"{path} could not be written ({reason_of(error)})")
