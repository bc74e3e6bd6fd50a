"""Pictures that videos begin with."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from pavdm_dist.errors import ConfigError, MediaError
from pavdm_dist.io.storage import open_read


def read_image(source: Any, height: int, width: int) -> np.ndarray:
    """A picture at a size: upright, scaled to cover it and cut to its centre.

    Args:
        source: a local or remote file, a PIL image, or uint8 ``[H, W, 3]``.
        height, width: pixels.

    Returns:
        uint8 ``[height, width, 3]``.

    Raises:
        MediaError: no such file, or no picture.
        ConfigError: neither a file nor a picture.
    """
    from PIL import Image, ImageOps

    if isinstance(source, str | Path):
        if not os.fspath(source):
            raise ConfigError("image=: name a file")
        try:
            with open_read(source) as file, Image.open(file) as opened:
                picture = ImageOps.exif_transpose(opened).convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise MediaError(f"image={source}: is no readable picture: {str(error).splitlines()[0]}") from error
    elif isinstance(source, Image.Image):
        picture = ImageOps.exif_transpose(source).convert("RGB")
    else:
        array = np.asarray(source)
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] != 3 or not array.size:
            raise ConfigError(f"image: must be a file, a PIL image or uint8 [H, W, 3], got {array.dtype} {array.shape}")
        picture = Image.fromarray(array)
    return np.array(ImageOps.fit(picture, (width, height), Image.Resampling.BICUBIC))
