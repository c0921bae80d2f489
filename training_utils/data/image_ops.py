"""Decoding, turning, resizing and cropping images: PIL images in, PIL images or arrays out.

Whatever reads the file may find it damaged and raises UnusableImage; what is computed from decoded pixels does not.
"""

import os
import struct
from contextlib import suppress

import numpy as np
from PIL import ExifTags, Image

from training_utils.data import color
from training_utils.data.image_files import UnusableImage, decoding

Size = tuple[int, int]  # (width, height) in pixels

TRANSPARENT_BECOMES = (255, 255, 255)  # what lies under transparent pixels is arbitrary; white is what viewers show

# EXIF's orientation: how such an image is turned upright.
TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# What a PNG's tags begin with, and how far from its end they are looked for where they follow the pixels.
PNG_TAGS = (b"eXIf", b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")
PNG_TAGS_BYTES = 2**17

# The number that is white in an image of floating-point numbers: of those at least as large as its largest, the first
# one; 1 also for colors brighter than white, which are clipped, as viewers do.
WHITES = {16: 1, 255: 255, float("inf"): 65535}

FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
    "nearest_exact": Image.Resampling.NEAREST,  # Pillow's nearest takes pixel centres, which is what "exact" means
}


def upright_rgb(image: Image.Image, ignore_profile: bool = False) -> Image.Image:
    """The first frame of a PIL image, decoded, upright, in RGB; a copy. Its colors are in sRGB, unless its color
    profile is ignored. Raises UnusableImage."""
    _forget_unreadable_tags(image)
    with decoding():
        image.load()  # which may change its mode
    transposition = TRANSPOSITIONS.get(_orientation(image))
    if transposition is not None:
        image = image.transpose(transposition)
    return to_rgb(image, ignore_profile)


def is_turned(image: Image.Image) -> bool:
    """Whether a decoded PIL image is stored in another orientation than upright."""
    return _orientation(image) in TRANSPOSITIONS


def _orientation(image: Image.Image) -> int:
    """The orientation in the tags of a PIL image that are known until now; 1, upright, where none can be read."""
    orientation = None
    # PNG's own getexif decodes the image.
    with suppress(UnusableImage), decoding():
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
    if orientation is None and image.info.get("exif"):
        orientation = _orientation_in(image.info["exif"])
    return orientation or 1


def _orientation_in(block: bytes) -> int | None:
    """The orientation in a block of EXIF, for one in which Pillow does not come to it: it stops at the first tag whose
    value lies outside of the block."""
    block = block.removeprefix(b"Exif\0\0")
    order = ">" if block.startswith(b"MM") else "<"
    with suppress(struct.error):
        (start,) = struct.unpack_from(f"{order}I", block, 4)
        (count,) = struct.unpack_from(f"{order}H", block, start)
        for entry in range(count):
            tag, _, _, value = struct.unpack_from(f"{order}HHIH", block, start + 2 + 12 * entry)
            if tag == ExifTags.Base.Orientation:
                return value
    return None


def _forget_unreadable_tags(image: Image.Image) -> None:
    """Let a TIFF be decoded whose tags about the photograph are damaged: Pillow reads them after its pixels."""
    if image.format != "TIFF":
        return
    try:
        with decoding():
            exif = image.getexif()
    except UnusableImage:  # the image itself is damaged
        return
    for group in (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo, ExifTags.IFD.Interop):
        try:
            with decoding():
                exif.get_ifd(group)
        except UnusableImage:
            del exif[group]


def upright_size(image: Image.Image) -> Size:
    """The (width, height) of a PIL image when it is upright, from its header: it is not decoded, unless it is a PNG
    whose tags follow the pixels.

    Raises UnusableImage.
    """
    if image.format == "PNG" and "exif" not in image.info and _tags_follow_pixels(image):
        with decoding():
            image.load()
    # TIFF gives the upright size already.
    lies_on_its_side = _orientation(image) in (5, 6, 7, 8) and image.format != "TIFF"
    return image.size[::-1] if lies_on_its_side else image.size


def _tags_follow_pixels(image: Image.Image) -> bool:
    """Whether a PNG that is not decoded seems to have tags behind its pixels, where some programs put them."""
    with decoding():
        place = image.fp.tell()
        end = image.fp.seek(0, os.SEEK_END)
        image.fp.seek(max(place, end - PNG_TAGS_BYTES))
        last = image.fp.read(PNG_TAGS_BYTES)
        image.fp.seek(place)
    return any(tags in last for tags in PNG_TAGS)


def variant(image: Image.Image, ignore_profile: bool) -> str:
    """How `upright_rgb` shows an image, from its header: a word that stands in the keys of caches beside the digest
    of the file. Empty for most images, which are shown as they always were."""
    if not ignore_profile and color.is_converted(image):
        return "sRGB"
    return "float" if image.mode == "F" else ""


def to_rgb(image: Image.Image, ignore_profile: bool = False) -> Image.Image:
    """An RGB copy of a PIL image of any mode, in sRGB unless its color profile is ignored. Transparency lies on white;
    16-bit grey is scaled to 8, and so are floating-point numbers.

    Raises UnusableImage.
    """
    if image.mode == "LAB":
        return color.lab_to_srgb(image)
    profile = None if ignore_profile else color.profile_of(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = Image.fromarray(_to_8_bits(image))
    if image.has_transparency_data:
        image = _convert(image, "RGBA")
        ground = Image.new("RGBA", image.size, (*TRANSPARENT_BECOMES, 255))
        if profile is not None and profile.transform is not None:
            alpha = image.getchannel("A")
            image = profile.to_srgb(_convert(image, profile.mode))
            image.putalpha(alpha)
        return Image.alpha_composite(ground, image).convert("RGB")
    if profile is not None and profile.transform is not None:
        return profile.to_srgb(_convert(image, profile.mode))
    return _convert(image, "RGB")


def _to_8_bits(image: Image.Image) -> np.ndarray:
    """The grey values of a PIL image of more than 8 bits, uint8, shape (H, W)."""
    if image.mode.startswith("I;16"):
        return (np.asarray(image, dtype=np.uint16) >> 8).astype(np.uint8)
    values = np.asarray(image, dtype=np.float64)
    if image.mode == "I":
        white = 65535 if values.max(initial=0) > 255 else 255
        return (values.clip(0, white) * (255 / white)).astype(np.uint8)
    largest = values.max(initial=0, where=np.isfinite(values))
    white = next(white for most, white in WHITES.items() if largest <= most)
    values = np.nan_to_num(values, nan=0, posinf=white, neginf=0)
    return np.rint(values.clip(0, white) * (255 / white)).astype(np.uint8)


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
