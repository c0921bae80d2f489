"""Ask a fine-tuned model for ten of each digit, have a classifier of real digits read them, and show them all.

    python quickstart/score.py --model_dir quickstart-output/model --grid quickstart-output/digits.png

The last line is `digit accuracy: 0.NN`, the share of drawings that are read as the word in their prompt. The folder
may hold Stable Diffusion 1.x or XL, and `--lora_dir` loads adapters into it. With `--mirrored` the model is asked for
ten mirrored digits of each as well; the classifier reads them in a mirror, and the line before the last is `mirrored
digit accuracy: 0.NN`.
"""

import argparse
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent))

from training_utils.base import startup

startup.prepare()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from diffusers import DiffusionPipeline  # noqa: E402
from make_data import WORDS, caption, read_ink  # noqa: E402
from PIL import Image, ImageDraw, ImageFont, ImageOps  # noqa: E402
from sklearn.datasets import load_digits  # noqa: E402
from sklearn.model_selection import train_test_split  # noqa: E402
from sklearn.svm import SVC  # noqa: E402

PER_DIGIT = 10
PAPER, INK, FAINT, WRONG = "#ffffff", "#1a1a1a", "#e4e4e4", "#c8102e"


def fit_reader() -> tuple[SVC, float]:
    """A classifier fitted on three quarters of the real scans, and its accuracy on the rest."""
    digits = load_digits()
    seen, unseen, seen_labels, unseen_labels = train_test_split(
        digits.data, digits.target, test_size=0.25, random_state=0, stratify=digits.target
    )
    reader = SVC(gamma=0.001, C=10).fit(seen, seen_labels)
    return reader, reader.score(unseen, unseen_labels)


def load_pipeline(model_dir: Path, lora_dir: Path | None = None, **parts) -> DiffusionPipeline:
    """The model of whatever kind, with these parts in place of its own, and the adapters in it if there are any."""
    pipeline = DiffusionPipeline.from_pretrained(model_dir, **parts)
    if lora_dir is not None:
        pipeline.load_lora_weights(lora_dir)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw_digits(
    pipeline: DiffusionPipeline, mirrored: bool, steps: int, guidance_scale: float, seed: int
) -> list[Image.Image]:
    """Ten images of each digit in turn, all in one batch."""
    return pipeline(
        [caption(digit, mirrored) for digit in range(len(WORDS)) for _ in range(PER_DIGIT)],
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        generator=torch.Generator().manual_seed(seed),
    ).images


def read_digits(reader: SVC, images: list[Image.Image], mirrored: bool) -> np.ndarray:
    """What the classifier takes each image for, (digits, PER_DIGIT); mirrored ones it sees in a mirror."""
    seen = [ImageOps.mirror(image) if mirrored else image for image in images]
    return reader.predict([read_ink(image).ravel() for image in seen]).reshape(len(WORDS), PER_DIGIT)


def draw_grid(images: list[Image.Image], hits: np.ndarray, mirrored: bool) -> Image.Image:
    """One row a word, misread drawings framed in red. `hits` is (digits, PER_DIGIT) of bool."""
    cell, gap, margin, label_width, title_height = 64, 4, 24, 84, 60
    step = cell + gap
    width = margin + label_width + PER_DIGIT * step - gap + margin
    height = margin + title_height + len(WORDS) * step - gap + margin
    grid = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(grid)
    title = caption(0, mirrored).removesuffix(WORDS[0])
    pen.text((margin, margin - 4), f"“{title}…”", INK, ImageFont.load_default(24))
    misread = "" if hits.all() else ", the others are framed"
    pen.text(
        (margin, margin + 28),
        f"{hits.size} drawings, {hits.sum()} read by a classifier as the word asked for{misread}",
        "#707070",
        ImageFont.load_default(14),
    )
    for row, word in enumerate(WORDS):
        top = margin + title_height + row * step
        pen.text((margin, top + cell // 2), word, INK, ImageFont.load_default(20), anchor="lm")
        for column in range(PER_DIGIT):
            left = margin + label_width + column * step
            image = images[row * PER_DIGIT + column].convert("RGB")
            grid.paste(image.resize((cell, cell), Image.Resampling.BICUBIC), (left, top))
            colour, line = (FAINT, 1) if hits[row, column] else (WRONG, 2)
            pen.rectangle((left - 1, top - 1, left + cell, top + cell), outline=colour, width=line)
    return grid


def side_by_side(grids: list[Image.Image]) -> Image.Image:
    row = Image.new("RGB", (sum(grid.width for grid in grids), grids[0].height), PAPER)
    left = 0
    for grid in grids:
        row.paste(grid, (left, 0))
        left += grid.width
    return row


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Draw ten of each digit, have a classifier read them, show them all.")
    parser.add_argument("--model_dir", type=Path, default=Path("quickstart-output/model"), help="fine-tuned pipeline")
    parser.add_argument("--lora_dir", type=Path, help="adapters to load into it")
    parser.add_argument("--mirrored", action="store_true", help="ask for mirrored digits as well")
    parser.add_argument("--grid", type=Path, default=Path("quickstart-output/digits.png"), help="image to write")
    parser.add_argument("--num_inference_steps", type=int, default=25, help="denoising steps for each drawing")
    parser.add_argument("--guidance_scale", type=float, default=3.0, help="pull towards the caption; 1 is none")
    parser.add_argument("--seed", type=int, default=0, help="of the noise that the drawings start from")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    reader, real_accuracy = fit_reader()
    print(f"the classifier reads {real_accuracy:.1%} of the real scans that it was not fitted on")

    pipeline = load_pipeline(args.model_dir, args.lora_dir)
    grids, results = [], []
    for mirrored in (True, False) if args.mirrored else (False,):
        kind = "mirrored digit" if mirrored else "digit"
        images = draw_digits(pipeline, mirrored, args.num_inference_steps, args.guidance_scale, args.seed)
        read = read_digits(reader, images, mirrored)
        hits = read == np.arange(len(WORDS))[:, None]
        for word, row, row_hits in zip(WORDS, read, hits):
            mistaken = ", ".join(WORDS[digit] for digit in row[~row_hits])
            others = f", the others read as {mistaken}" if mistaken else ""
            print(f"{'mirrored ' if mirrored else ''}{word:>6}: {row_hits.sum():2d} of {PER_DIGIT}{others}")
        grids.append(draw_grid(images, hits, mirrored))
        results.append(f"{kind} accuracy: {hits.mean():.2f}")

    args.grid.parent.mkdir(parents=True, exist_ok=True)
    side_by_side(grids).save(args.grid)
    print(f"the drawings are in {args.grid}")
    print("\n".join(results))


if __name__ == "__main__":
    main()
