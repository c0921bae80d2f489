"""Write the 1,797 handwritten digits that ship inside scikit-learn as a folder of images with captions.

    python quickstart/make_data.py --output_dir quickstart-output/digits

They are the test set of "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak, 1998, UCI repository): 13
people wrote on paper forms, and the scans were reduced to 8x8 counts of ink, 0 to 16. Each becomes a 32x32 image,
dark ink on white, and a line of `metadata.jsonl`:

    {"file_name": "0003.png", "text": "a handwritten three"}

With `--mirrored` each scan is followed by its mirror image, captioned "a mirrored handwritten three": a word that a
model of the plain digits does not know.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from sklearn.datasets import load_digits

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
FULL_INK = 16


def caption(digit: int, mirrored: bool = False) -> str:
    return f"a {'mirrored ' if mirrored else ''}handwritten {WORDS[digit]}"


def draw_scan(ink: np.ndarray) -> Image.Image:
    """Ink counts (8, 8) in 0..16 to a 32x32 RGB image, dark on white, with a margin of 4 pixels."""
    paper = np.rint(255 * (1 - np.pad(ink, 2) / FULL_INK)).astype(np.uint8)
    scan = Image.fromarray(paper).resize((36, 36), Image.Resampling.BICUBIC)
    return scan.crop((2, 2, 34, 34)).convert("RGB")


def read_ink(image: Image.Image) -> np.ndarray:
    """The way back: a 32x32 image to ink counts (8, 8) in 0..16."""
    paper = image.convert("L").crop((4, 4, 28, 28)).resize((8, 8), Image.Resampling.BOX)
    return FULL_INK * (1 - np.asarray(paper, dtype=np.float32) / 255)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description="Write scikit-learn's handwritten digits as a captioned image folder."
    )
    parser.add_argument("--output_dir", type=Path, default=Path("quickstart-output/digits"), help="folder to write to")
    parser.add_argument("--mirrored", action="store_true", help="add the mirror image of each, captioned as such")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    digits = load_digits()
    kinds = (False, True) if args.mirrored else (False,)
    with open(args.output_dir / "metadata.jsonl", "w", encoding="utf-8") as metadata:
        for index, (ink, digit) in enumerate(zip(digits.images, digits.target)):
            for mirrored in kinds:
                file_name = f"{index:04d}{'-mirrored' if mirrored else ''}.png"
                scan = draw_scan(ink)
                (ImageOps.mirror(scan) if mirrored else scan).save(args.output_dir / file_name)
                line = {"file_name": file_name, "text": caption(digit, mirrored)}
                metadata.write(json.dumps(line) + "\n")
    print(f"{len(digits.target) * len(kinds)} images and their captions are in {args.output_dir}")


if __name__ == "__main__":
    main()
