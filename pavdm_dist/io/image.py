"""Pictures that videos begin with."""

from __future__ import annotations

import io
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np

from pavdm_dist.errors import ConfigError, MediaError, first_line
from pavdm_dist.io.storage import open_read

logger = logging.getLogger(__name__)


def read_image(source: Any, height: int, width: int) -> np.ndarray:
    """A picture at a size: upright, scaled to cover it and cut to its centre.

    As in films, what is transparent is shown on black. Colours of another profile are brought to sRGB, 16 bits of grey
    to 8.

    Args:
        source: a local or remote file, a PIL image, or uint8 ``[H, W, 3]``.
        height, width: pixels.

    Returns:
        uint8 ``[height, width, 3]``.

    Raises:
        MediaError: no such file, no picture, or numbers that no one can tell the white of.
        ConfigError: neither a file nor a picture.
    """
    from PIL import Image, ImageOps

    if isinstance(source, str | Path):
        if not os.fspath(source):
            raise ConfigError("image=: name a file")
        try:
            with open_read(source) as file, Image.open(file) as opened:
                picture = _rgb(ImageOps.exif_transpose(opened), f"image={source}")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise MediaError(f"image={source}: is no readable picture: {first_line(error)}") from error
    elif isinstance(source, Image.Image):
        picture = _rgb(ImageOps.exif_transpose(source), "image")
    else:
        array = np.asarray(source)
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] != 3 or not array.size:
            raise ConfigError(f"image: must be a file, a PIL image or uint8 [H, W, 3], got {array.dtype} {array.shape}")
        picture = Image.fromarray(array)
    return np.array(ImageOps.fit(picture, (width, height), Image.Resampling.BICUBIC))


def _rgb(picture: Any, name: str) -> Any:
    """A PIL image of any mode in sRGB, on black."""
    from PIL import Image

    if picture.mode in ("F", "I"):
        raise MediaError(f"{name}: its numbers (mode {picture.mode}) do not say what white is; save it with 16 bits")
    if picture.mode.startswith("I;16"):
        grey = np.asarray(picture).astype(np.float32) / 257
        return Image.fromarray(np.round(grey).astype(np.uint8)).convert("RGB")
    if not picture.has_transparency_data:
        return _srgb(picture, name)
    seen = picture.convert("RGBA")
    black = Image.new("RGB", seen.size)
    black.paste(_srgb(seen.convert("RGB"), name, picture.info.get("icc_profile")), mask=seen.getchannel("A"))
    return black


def _srgb(picture: Any, name: str, profile: bytes | None = None) -> Any:
    """An opaque picture in sRGB, by its own profile or the one that is given."""
    from PIL import ImageCms

    profile = profile or picture.info.get("icc_profile")
    if not profile:
        return picture.convert("RGB")
    try:
        own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "srgb" in ImageCms.getProfileDescription(own).lower():
            return picture.convert("RGB")
        return ImageCms.profileToProfile(picture, own, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImportError, OSError, ImageCms.PyCMSError) as error:
        logger.warning("%s: its colour profile cannot be applied, its colours are taken for sRGB: %s", name, error)
        return picture.convert("RGB")
