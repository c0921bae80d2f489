"""Color profiles: what the numbers of an image mean, and how they become sRGB, which is what a network is shown.

Viewers convert an image that has a profile; those of phones (Display P3), of cameras (Adobe RGB) and of print (CMYK)
are not sRGB. LittleCMS, through Pillow's ImageCms, does it here.
"""

import io
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageCms

# The most that a profile may move any color, in levels of 256, and still be taken for sRGB. Programs write sRGB with
# slightly different curves and primaries, and such images keep their very numbers.
SRGB_TOLERANCE = 2

MODE_OF_SPACE = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # ICC's name of a color space: Pillow's mode

GREY_MODES = ("1", "L", "LA", "La", "I", "F", "I;16", "I;16B", "I;16L", "I;16N")


@dataclass(frozen=True)
class Profile:
    """A color profile: the mode of the images that it is for, RGB, L or CMYK, and the ImageCmsTransform from that
    mode to sRGB; None where it is sRGB already."""

    mode: str
    transform: Any

    def to_srgb(self, image: Image.Image) -> Image.Image:
        """An image of the profile's mode in sRGB."""
        return self.transform.apply(image)


def profile_of(image: Image.Image) -> Profile | None:
    """The profile that is embedded in an image, from its header; None where there is none, or one that cannot be
    used: it is damaged, or is for other colors than the image has."""
    content = image.info.get("icc_profile")
    profile = _read(content) if content and image.mode != "LAB" else None
    if profile is None:
        return None
    if image.mode in GREY_MODES:
        fits = profile.mode in ("L", "RGB")  # many programs put an RGB profile into grey images too
    else:
        fits = profile.mode == ("CMYK" if image.mode == "CMYK" else "RGB")
    return profile if fits else None


def is_unusable(image: Image.Image) -> bool:
    """Whether an image has a profile that cannot be used. That of a Lab image is not needed."""
    return bool(image.info.get("icc_profile")) and image.mode != "LAB" and profile_of(image) is None


def is_converted(image: Image.Image) -> bool:
    """Whether an image has a profile that is not sRGB, so that its colors are converted."""
    profile = profile_of(image)
    return profile is not None and profile.transform is not None


def lab_to_srgb(image: Image.Image) -> Image.Image:
    """A Lab image, whose colors need no profile, in sRGB."""
    return _lab_transform().apply(image)


# A dataset has few profiles, each in many images, and a transform of CMYK takes 10 ms to build.
@lru_cache(maxsize=64)
def _read(content: bytes) -> Profile | None:
    """The profile in some bytes; None where they are damaged, or no profile of an image's colors."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(content))
        mode = MODE_OF_SPACE.get(source.profile.xcolor_space.strip())
        if mode is None:
            return None
        transform = ImageCms.ImageCmsTransform(source, _builtin("sRGB"), mode, "RGB")
    except (OSError, ValueError, TypeError, ImageCms.PyCMSError):
        return None
    return Profile(mode, None if _changes_nothing(transform, mode) else transform)


def _changes_nothing(transform: Any, mode: str) -> bool:
    """Whether a transform leaves colors as they are, as far as a grid of them shows."""
    if mode == "CMYK":
        return False
    if mode == "L":
        colors = Image.linear_gradient("L")
    else:
        steps = np.arange(0, 256, 15, dtype=np.uint8)
        grid = np.stack(np.meshgrid(steps, steps, steps), axis=-1)
        colors = Image.fromarray(grid.reshape(len(steps), -1, 3))
    before = np.asarray(colors.convert("RGB"), dtype=np.int16)
    after = np.asarray(transform.apply(colors), dtype=np.int16)
    return bool(np.abs(after - before).max() <= SRGB_TOLERANCE)


@lru_cache
def _lab_transform() -> Any:
    return ImageCms.ImageCmsTransform(_builtin("LAB"), _builtin("sRGB"), "LAB", "RGB")


def _builtin(space: str) -> Any:
    """LittleCMS's own profile of a color space."""
    return ImageCms.ImageCmsProfile(ImageCms.createProfile(space))
