"""Decoding, turning, resizing and cropping images: PIL images in, PIL images or arrays out."""

import numpy as np
from PIL import ExifTags, Image, ImageOps

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


def upright_rgb(image):
    """The first frame of a PIL image, decoded, upright, in RGB."""
    image.load()  # which may change its mode
    turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    return to_rgb(ImageOps.exif_transpose(image) if turned else image)  # which copies


def upright_size(image):
    """The (width, height) of a PIL image when it is upright, from its header: it is not decoded."""
    # PNG's own getexif decodes the image where its header has no effect, since the tags may follow the pixels.
    turned = Image.Image.getexif(image).get(ExifTags.Base.Orientation) in range(5, 9)
    # TIFF gives the upright size already.
    return image.size[::-1] if turned and image.format != "TIFF" else image.size


def to_rgb(image):
    """An RGB copy of a PIL image of any mode. Transparency lies on white; 16-bit grey is scaled to 8."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image, dtype=np.uint16) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        values = np.asarray(image, dtype=np.float64)
        top = 65535 if values.max(initial=0) > 255 else 255
        return Image.fromarray((values.clip(0, top) * (255 / top)).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, (*TRANSPARENT_BECOMES, 255))
        return Image.alpha_composite(ground, image).convert("RGB")
    return image.convert("RGB")


def is_transparent(image):
    """Whether `to_rgb` shows the ground anywhere in a PIL image."""
    if image.mode.startswith(("I", "F")) or not image.has_transparency_data:
        return False
    return image.convert("RGBA").getextrema()[3][0] < 255


def resize(image, size, interpolation):
    """Scale a PIL image so that it just covers `size`, (width, height): one side is equal, the other not less."""
    (width, height), (new_width, new_height) = image.size, size
    if new_width * height >= new_height * width:
        new = (new_width, max(new_height, new_width * height // width))
    else:
        new = (max(new_width, new_height * width // height), new_height)
    return image if new == image.size else image.resize(new, FILTERS[interpolation])


def crop(image, size, generator=None):
    """Cut `size`, (width, height), out of a PIL image: drawn by a generator, or from the middle when it is None.

    Returns (image, (top, left)), the corner in pixels of the image that came in.
    """
    (width, height), (new_width, new_height) = image.size, size
    if generator is None:
        top, left = round((height - new_height) / 2), round((width - new_width) / 2)
    else:
        top, left = int(generator.integers(height - new_height + 1)), int(generator.integers(width - new_width + 1))
    return image.crop((left, top, left + new_width, top + new_height)), (top, left)


def largest_within(size, shape):
    """The largest (width, height) of the ratio of `shape` that `size` has room for, to the pixel."""
    (width, height), (ratio_width, ratio_height) = size, shape
    if width * ratio_height >= height * ratio_width:
        return max(1, round(height * ratio_width / ratio_height)), height
    return width, max(1, round(width * ratio_height / ratio_width))


def to_array(image):
    """RGB PIL image to float32 in [-1, 1], shape (3, H, W)."""
    array = np.ascontiguousarray(np.asarray(image, dtype=np.float32).transpose(2, 0, 1))
    array /= 127.5
    array -= 1.0
    return array
