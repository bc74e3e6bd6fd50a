"""Pictures to begin with: what their files say of them is applied, as that of films is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from pavdm_dist.errors import MediaError
from pavdm_dist.io.image import read_image

SIDE = 32


def half_seen(mode: str) -> Image.Image:
    """Light grey, transparent on the left."""
    pixels = np.full((SIDE, SIDE, 4), 200, np.uint8)
    pixels[:, : SIDE // 2, 3], pixels[:, SIDE // 2 :, 3] = 0, 255
    picture = Image.fromarray(pixels)
    if mode != "P":
        return picture.convert(mode)
    indexed = Image.fromarray((pixels[..., 3] // 255).astype(np.uint8), "P")
    indexed.putpalette([200] * 6)
    indexed.info["transparency"] = 0
    return indexed


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_shown_on_black(tmp_path: Path, mode: str) -> None:
    picture = half_seen(mode)
    options = {"transparency": 0} if mode == "P" else {}
    picture.save(tmp_path / "a.png", **options)
    for source in (tmp_path / "a.png", picture):
        shown = read_image(source, SIDE, SIDE)
        assert shown[:, : SIDE // 2].max() == 0 and shown[:, SIDE // 2 :].min() == 200


def test_sixteen_bits_of_grey_are_scaled(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, SIDE * SIDE).reshape(SIDE, SIDE).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    shown = read_image(tmp_path / "a.png", SIDE, SIDE)
    assert (shown == np.round(ramp / 257).astype(np.uint8)[..., None]).all()


def test_numbers_without_a_white_are_refused(tmp_path: Path) -> None:
    for dtype, mode in ((np.float32, "F"), (np.int32, "I")):
        Image.fromarray(np.ones((SIDE, SIDE), dtype)).save(tmp_path / "a.tif")
        with pytest.raises(MediaError, match=rf"image=\S+a\.tif: its numbers \(mode {mode}\) do not say what white is"):
            read_image(tmp_path / "a.tif", SIDE, SIDE)


def test_colour_profiles_are_applied_or_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    grey = Image.new("LAB", (SIDE, SIDE), (137, 128, 128))  # L* = 137 / 255 * 100 is about half of sRGB's range
    grey.save(tmp_path / "lab.tif", icc_profile=lab)
    assert abs(read_image(tmp_path / "lab.tif", SIDE, SIDE).astype(int) - 128).max() <= 2
    plain = Image.new("RGB", (SIDE, SIDE), (10, 130, 250))
    plain.save(tmp_path / "srgb.png", icc_profile=srgb)
    assert (read_image(tmp_path / "srgb.png", SIDE, SIDE) == (10, 130, 250)).all() and not caplog.records
    for damaged in (b"no profile at all", lab):  # damaged, and of other pictures
        plain.save(tmp_path / "b.png", icc_profile=damaged)
        caplog.clear()
        assert (read_image(tmp_path / "b.png", SIDE, SIDE) == (10, 130, 250)).all()
        assert "b.png: its colour profile cannot be applied, its colours are taken for sRGB" in caplog.text
