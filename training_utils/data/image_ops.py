"""Decoding, turning, resizing and cropping images: PIL images in, PIL images or arrays out.

Whatever reads the file may find it damaged and raises UnusableImage; what is computed from decoded pixels does not.
"""

import numpy as np
from PIL import ExifTags, Image, ImageOps

from training_utils.data.image_files import decoding

Size = tuple[int, int]  # (width, height) in pixels

TRANSPARENT_BECOMES = (255, 255, 255)  # what lies under transparent pixels is arbitrary; white is what viewers show

FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
    "nearest_exact": Image.Resampling.NEAREST,  # Pillow's nearest takes pixel centres, which is what "exact" means
}


def upright_rgb(image: Image.Image) -> Image.Image:
    """The first frame of a PIL image, decoded, upright, in RGB; a copy. Raises UnusableImage."""
    with decoding():
        image.load()  # which may change its mode
    if is_turned(image):
        with decoding():
            image = ImageOps.exif_transpose(image)
    return to_rgb(image)


def is_turned(image: Image.Image) -> bool:
    """Whether a decoded PIL image is stored in another orientation than upright. Raises UnusableImage."""
    with decoding():
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    return orientation in range(2, 9)


def upright_size(image: Image.Image) -> Size:
    """The (width, height) of a PIL image when it is upright, from its header: it is not decoded.

    Raises UnusableImage.
    """
    # PNG's own getexif decodes the image where its header has no tags, since they may follow the pixels.
    with decoding():
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
    # TIFF gives the upright size already.
    lies_on_its_side = orientation in range(5, 9) and image.format != "TIFF"
    return image.size[::-1] if lies_on_its_side else image.size


def to_rgb(image: Image.Image) -> Image.Image:
    """An RGB copy of a PIL image of any mode. Transparency lies on white; 16-bit grey is scaled to 8.

    Raises UnusableImage.
    """
    if image.mode.startswith("I;16"):
        grey = (np.asarray(image, dtype=np.uint16) >> 8).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.mode in ("I", "F"):
        values = np.asarray(image, dtype=np.float64)
        top = 65535 if values.max(initial=0) > 255 else 255
        grey = (values.clip(0, top) * (255 / top)).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.has_transparency_data:
        image = _convert(image, "RGBA")
        ground = Image.new("RGBA", image.size, (*TRANSPARENT_BECOMES, 255))
        return Image.alpha_composite(ground, image).convert("RGB")
    return _convert(image, "RGB")


def _convert(image: Image.Image, mode: str) -> Image.Image:
    """A decoded PIL image in another mode. Raises UnusableImage: palettes and transparency can be damaged too."""
    with decoding():
        return image.convert(mode)


def is_transparent(image: Image.Image) -> bool:
    """Whether `to_rgb` shows the ground anywhere in a decoded PIL image. Raises UnusableImage."""
    if image.mode.startswith(("I", "F")) or not image.has_transparency_data:
        return False
    lowest_alpha, _ = _convert(image, "RGBA").getextrema()[3]
    return lowest_alpha < 255


def resize(image: Image.Image, size: Size, interpolation: str) -> Image.Image:
    """Scale a PIL image so that it just covers `size`, (width, height): one side is equal, the other not less.

    `interpolation` is a name of FILTERS.
    """
    width, height = image.size
    new_width, new_height = size
    if new_width * height >= new_height * width:
        new = (new_width, max(new_height, new_width * height // width))
    else:
        new = (max(new_width, new_height * width // height), new_height)
    return image if new == image.size else image.resize(new, FILTERS[interpolation])


def crop(image: Image.Image, size: Size, generator: np.random.Generator | None = None) -> tuple[Image.Image, Size]:
    """Cut `size`, (width, height), out of a PIL image: drawn by a generator, or from the middle when it is None.

    Returns (image, (top, left)), the corner in pixels of the image that came in.
    """
    width, height = image.size
    new_width, new_height = size
    if generator is None:
        top = round((height - new_height) / 2)
        left = round((width - new_width) / 2)
    else:
        top = int(generator.integers(height - new_height + 1))
        left = int(generator.integers(width - new_width + 1))
    return image.crop((left, top, left + new_width, top + new_height)), (top, left)


def largest_within(size: Size, shape: Size) -> Size:
    """The largest (width, height) of the ratio of `shape` that `size` has room for, to the pixel."""
    width, height = size
    ratio_width, ratio_height = shape
    if width * ratio_height >= height * ratio_width:
        return max(1, round(height * ratio_width / ratio_height)), height
    return width, max(1, round(width * ratio_height / ratio_width))


def to_array(image: Image.Image) -> np.ndarray:
    """RGB PIL image to float32 in [-1, 1], shape (3, H, W)."""
    array = np.ascontiguousarray(np.asarray(image, dtype=np.float32).transpose(2, 0, 1))
    array /= 127.5
    array -= 1.0
    return array
