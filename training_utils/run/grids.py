"""Validation images as one captioned grid."""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from training_utils.base.console import say, warn
from training_utils.base.errors import reason_of
from training_utils.run.trackers import log_images, tell_trackers


def _font(size):
    return ImageFont.load_default(size)


def _fit(draw, text, font, width):
    """`text` broken into at most three lines of `width` pixels, the last one shortened if there is more."""
    lines, words = [""], text.split()
    for word in words:
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer, font=font) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    short = lines[:3]
    if len(lines) > 3:
        short[-1] += " …"
    for at, line in enumerate(short):
        while draw.textlength(line, font=font) > width and len(line) > 2:
            line = line[:-2].rstrip() + "…"
        short[at] = line
    return "\n".join(short)


def draw_grid(images, captions, title, columns=4, side=256):
    """One captioned contact sheet of square PIL images: (images, captions, title line) to a PIL image.

    `side` is the size in pixels that each image is shown at; small ones are enlarged without smoothing.
    """
    columns = min(columns, len(images))
    gap, title_height = 12, 40
    rows = -(-len(images) // columns)
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    texts = [_fit(ruler, caption, _font(14), side) for caption in captions]
    caption_height = 8 + 18 * max(text.count("\n") + 1 for text in texts)
    width = columns * (side + gap) + gap
    sheet = Image.new("RGB", (width, title_height + rows * (side + caption_height + gap) + gap), (250, 250, 248))
    draw = ImageDraw.Draw(sheet)
    draw.text((gap, 11), _fit(draw, title, _font(18), width - 2 * gap), fill=(30, 30, 30), font=_font(18))
    for at, (image, text) in enumerate(zip(images, texts, strict=True)):
        left = gap + (at % columns) * (side + gap)
        top = title_height + gap // 2 + (at // columns) * (side + caption_height + gap)
        smooth = Image.Resampling.NEAREST if max(image.size) < side else Image.Resampling.LANCZOS
        sheet.paste(image.resize((side, side), smooth), (left, top))
        draw.multiline_text((left, top + side + 4), text, fill=(70, 70, 70), font=_font(14), spacing=3)
    return sheet


def grid_name(step):
    """Where the validation images of a step lie inside the output folder."""
    return f"validation/step-{step:06d}.png"


def standing_grids(output_dir, step):
    """The grids of validation images that an earlier run left at this step, as names: one or none."""
    return [name for name in [grid_name(step)] if (Path(output_dir) / name).is_file()]


def publish_images(trackers, images, prompts, step, output_dir):
    """Write images (a list of PIL) as one captioned grid under `output_dir` and hand them to the trackers."""
    path = Path(output_dir) / grid_name(step)
    sheet = draw_grid(images, prompts, f"after {step:,} steps")
    tell_trackers(trackers, lambda tracker: log_images(tracker, images, prompts, step))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(path)
        say(f"step {step}: images in {path}")
    except OSError as error:
        warn(f"{path} could not be written ({reason_of(error)})")
