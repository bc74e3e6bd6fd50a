"""What a file says of its pictures is applied: orientation, colours, range, transparency."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.video.reformatter import VideoReformatter

from pavdm_dist.commands import clip
from pavdm_dist.data import prepare
from pavdm_dist.data.clips import scan_video
from pavdm_dist.errors import MediaError
from pavdm_dist.io import colour, decoders
from pavdm_dist.io.picture import Orientation, kept_share, orientation, picture, remarks
from pavdm_dist.io.reader import open_video
from pavdm_dist.io.video import probe, read_clip

SIDE = 64
# BT.2087: from BT.2020 to BT.709.
BT2087 = [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]]
# The published matrices of NTSC of 1953, from C to D65 by Bradford's, and to BT.709, as one.
NTSC1953 = [[1.4858, -0.4033, -0.0825], [-0.0251, 0.9542, 0.0710], [-0.0272, -0.0441, 1.0713]]


def write(path: Path, frames: list[Any], codec: str = "libx264", pix_fmt: str = "yuv420p", **more: Any) -> Path:
    """Frames as they are; ``more``: attributes of the codec's context, ``matrix``, ``turn`` and ``options``."""
    options = {"crf": "8"} if codec == "libx264" else {}
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=24, options=options | more.pop("options", {}))
        stream.width, stream.height, stream.pix_fmt = frames[0].width, frames[0].height, pix_fmt
        if "turn" in more:
            degrees, flips = more.pop("turn")
            stream.set_display_rotation(degrees, **flips)
        if "matrix" in more:
            stream.set_display_matrix(more.pop("matrix"))
        for name, value in more.items():
            setattr(stream.codec_context, name, value)
        for index, frame in enumerate(frames):
            frame.pts, frame.time_base = index, Fraction(1, 24)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def corner() -> np.ndarray:
    """Grey, with a green block at the top right."""
    picture = np.full((SIDE, 2 * SIDE, 3), 20, np.uint8)
    picture[:16, -48:] = (20, 220, 20)
    return picture


def rgb(picture: np.ndarray) -> Any:
    return av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")


def place(picture: np.ndarray) -> str:
    shown = picture.astype(int)
    y, x = np.argwhere(shown[..., 1] - shown[..., 0] > 60).mean(0)
    return f"{'top' if y < shown.shape[0] / 2 else 'bottom'} {'left' if x < shown.shape[1] / 2 else 'right'}"


@pytest.mark.parametrize(
    ("degrees", "flips", "expected"),
    [
        (0, {}, "top right"), (0, {"hflip": True}, "top left"), (0, {"vflip": True}, "bottom right"),
        (180, {}, "bottom left"), (90, {}, "top left"), (270, {}, "bottom right"),
        (90, {"hflip": True}, "top right"), (270, {"hflip": True}, "bottom left"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("size", [None, (32, 32)])
def test_all_eight_orientations(
    tmp_path: Path, degrees: int, flips: dict[str, bool], expected: str, size: tuple[int, int] | None
) -> None:
    path = write(tmp_path / "f.mp4", [rgb(corner())] * 2, turn=(degrees, flips))
    height, width = size or (None, None)
    shown = read_clip(path, num_frames=1, height=height, width=width)[0]
    if size is None:
        assert shown.shape[:2] == ((2 * SIDE, SIDE) if degrees % 180 else (SIDE, 2 * SIDE))
        assert (probe(path).height, probe(path).width) == shown.shape[:2]
        assert place(shown) == expected
    else:  # the block reaches half into the square
        assert place(shown) == expected


def test_a_matrix_that_other_side_data_hides_is_said() -> None:
    class Hidden:
        """As PyAV has a frame with side data of a kind that it does not know."""

        rotation, color_trc, interlaced_frame = 90, 1, False
        format = av.VideoFormat("yuv420p")

        @property
        def side_data(self) -> Any:
            raise ValueError("29 is not a valid Type")

    (said,) = remarks(Hidden())
    assert said == "perhaps mirrored" and said in clip._TOLD and said in prepare._REMARKS
    assert orientation(Hidden()) == Orientation(transposed=True, upside_down=True)


def test_what_is_neither_turned_by_quarters_nor_mirrored_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "f.mp4", [rgb(corner())] * 2, turn=(30, {}))
    with pytest.raises(MediaError, match=r"f\.mp4: its pictures are turned by -?\d+ degrees"):
        read_clip(path)
    for matrix in ([0] * 9, [1 << 16, 60, 0, -60, 1 << 16, 0, 0, 0, 1 << 30]):  # none at all; a hair's breadth
        path = write(tmp_path / "g.mp4", [rgb(corner())] * 2, matrix=matrix)
        assert place(read_clip(path)[0]) == "top right"


def code(light: float) -> float:
    """Luminance in nits as PQ, 0..1."""
    power = (light / 10000) ** (2610 / 16384)
    return ((3424 / 4096 + 2413 / 128 * power) / (1 + 2392 / 128 * power)) ** (2523 / 32)


def ten_bit(path: Path, luma: float, transfer: int, primaries: int = 9, matrix: int = 9) -> Path:
    """A wall of one grey: luma 0..1, limited range, 10 bits."""
    frames = []
    for _ in range(2):
        frame = av.VideoFrame(SIDE, SIDE, "yuv420p10le")
        for plane, value in zip(frame.planes, (round(64 + 876 * luma), 512, 512), strict=True):
            plane.update(np.full(plane.buffer_size // 2, value, np.uint16).tobytes())
        frames.append(frame)
    tags = {"color_primaries": primaries, "color_trc": transfer, "colorspace": matrix, "color_range": 1}
    options = {"x265-params": "log-level=none:bframes=0"}
    return write(path, frames, "libx265", "yuv420p10le", options=options, **tags)


def test_hdr_is_brought_to_the_range_of_sdr_and_said(tmp_path: Path) -> None:
    shown = [read_clip(ten_bit(tmp_path / "pq.mp4", code(nits), 16))[0].mean() for nits in (0, 36.5, 203, 1000)]
    assert shown[0] < 4 and shown == sorted(shown)
    assert 118 < shown[1] < 130 and shown[2] > 230, "18 % grey, and white as paper"
    assert shown[3] > 250
    grey = [read_clip(ten_bit(tmp_path / "hlg.mp4", signal, 18))[0].mean() for signal in (0, 0.38, 0.75, 1)]
    assert grey[0] < 4 and grey == sorted(grey)
    assert 100 < grey[1] < 130 and grey[2] > 230
    with open_video(tmp_path / "hlg.mp4") as reader:
        assert remarks(next(reader.frames())[1]) == ("hdr",)


def test_wide_colours_without_hdr_are_sdr(tmp_path: Path) -> None:
    path = ten_bit(tmp_path / "wide.mp4", 0.5, 14)
    assert read_clip(path)[0].mean() == pytest.approx(127, abs=6)
    with open_video(path) as reader:
        assert remarks(next(reader.frames())[1]) == ()


@pytest.mark.parametrize(("transfer", "primaries", "word"), [(9, 1, "logarithmic"), (17, 10, "SMPTE 428")])
def test_colours_that_nobody_shows_as_they_are_are_refused(
    tmp_path: Path, transfer: int, primaries: int, word: str
) -> None:
    with pytest.raises(MediaError, match=rf"log\.mp4: its colours are {word}: convert it to BT\.709 first"):
        read_clip(ten_bit(tmp_path / "log.mp4", 0.5, transfer, primaries, 1))


def test_the_colours_of_other_screens_are_brought_to_ours() -> None:
    """Oracles by hand: a primary of BT.709 in the other's numbers is that primary again."""
    # Not all greens of BT.709 are colours of film and of the first television.
    for primaries, grey in ((colour.BT2020, 0), (colour.P3, 0), (colour.BT470M, 0.2), (colour.FILM, 0.2)):
        assert colour.needs_conversion(1, primaries)
        np.testing.assert_allclose(colour._to_bt709(primaries).sum(1), 1, atol=1e-6)  # white is white
        back = np.linalg.inv(colour._to_bt709(primaries))
        for light in (1 - 2 * grey) * np.eye(3) + grey:
            coded = np.round(np.clip(back @ light, 0, 1) ** (1 / 2.4) * 65535).astype(np.uint16)
            found = colour.converted(coded[None, None], 14, primaries)
            np.testing.assert_allclose(found[0, 0], light ** (1 / 2.4) * 255, atol=2)
    np.testing.assert_allclose(colour._to_bt709(colour.BT2020), BT2087, atol=5e-4)
    np.testing.assert_allclose(colour._to_bt709(colour.BT470M), NTSC1953, atol=5e-4)
    assert not any(colour.needs_conversion(6, near) for near in (1, 2, 5, 6, 7, 22)), "television of our days"
    for transfer in (colour.PQ, colour.HLG, colour.LINEAR, 14):
        ramp = np.linspace(0, 65535, 200).astype(np.uint16)[None, :, None].repeat(3, axis=2)
        found = colour.converted(ramp, transfer, colour.BT2020)
        assert found[0, 0].max() == 0 and found[0, -1].min() >= 234 and np.ptp(found, axis=2).max() <= 1
        assert (np.diff(found[0, :, 0].astype(int)) >= 0).all()


@pytest.mark.parametrize(("matrix", "red"), [(1, 0.2126), (6, 0.299), (5, 0.299), (9, 0.2627)])
@pytest.mark.parametrize("full", [False, True])
def test_matrix_and_range_are_the_file_s(tmp_path: Path, matrix: int, red: float, full: bool) -> None:
    """Pure red, in the luma and chroma of every matrix."""
    blue = {1: 0.0722, 6: 0.114, 5: 0.114, 9: 0.0593}[matrix]
    luma, cb, cr = red, -red / (2 * (1 - blue)), 0.5
    scale = (lambda y: 255 * y, lambda c: 128 + 255 * c) if full else (lambda y: 16 + 219 * y, lambda c: 128 + 224 * c)
    frames = []
    for _ in range(2):
        frame = av.VideoFrame(SIDE, SIDE, "yuv420p")
        for plane, value in zip(frame.planes, (scale[0](luma), scale[1](cb), scale[1](cr)), strict=True):
            plane.update(np.full(plane.buffer_size, min(255, round(value)), np.uint8).tobytes())
        frame.color_range, frame.colorspace = 2 if full else 1, matrix
        frames.append(frame)
    path = write(tmp_path / "m.mp4", frames, colorspace=matrix, color_range=2 if full else 1, color_trc=1)
    shown = read_clip(path)[0].reshape(-1, 3).mean(0)
    np.testing.assert_allclose(shown, (255, 0, 0), atol=6)


def test_a_matrix_that_nothing_can_convert_is_named() -> None:
    frame = av.VideoFrame(SIDE, SIDE, "yuv420p")
    for plane in frame.planes:
        plane.update(bytes([128]) * plane.buffer_size)
    frame.colorspace = 14  # ICtCp
    with pytest.raises(MediaError, match=r"its colours cannot be read: pixels yuv420p, matrix 14"):
        picture(frame, None, Fraction(1), VideoReformatter())
    frame.colorspace = 3  # reserved: says nothing
    assert picture(frame, (32, 32), Fraction(1), VideoReformatter()).mean() == pytest.approx(130, abs=2)


def test_films_of_the_reserved_matrix_are_looked_at_for_cuts(tmp_path: Path) -> None:
    frames = np.concatenate([np.full((20, SIDE, SIDE, 3), grey, np.uint8) for grey in (20, 220)])
    path = tmp_path / "a.webm"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libvpx-vp9", rate=24)
        stream.width, stream.height, stream.pix_fmt = SIDE, SIDE, "yuv420p"
        stream.codec_context.colorspace = 3
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    found = scan_video(str(path), True)
    assert len(found.times) == 40 and found.cuts == [20] and found.fault is None


@pytest.mark.parametrize(
    ("name", "codec", "layout"),
    [("a.mov", "png", "rgba"), ("a.webm", "libvpx", "yuva420p"), ("a.webm", "libvpx-vp9", "yuva420p")],
)
def test_what_is_transparent_is_shown_on_black(
    tmp_path: Path, name: str, codec: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = np.full((SIDE, SIDE, 4), 200, np.uint8)
    pixels[:, : SIDE // 2, 3], pixels[:, SIDE // 2 :, 3] = 0, 255
    frames = [av.VideoFrame.from_ndarray(pixels, format="rgba") for _ in range(2)]
    options = {"auto-alt-ref": "0"} if codec == "libvpx" else {}  # else it refuses transparency
    path = write(tmp_path / name, frames, codec, layout, options=options)
    shown = read_clip(path)
    edge = 8  # what compression blurs
    assert shown.shape == (2, SIDE, SIDE, 3)
    assert shown[:, :, : SIDE // 2 - edge].max() <= 2
    assert abs(shown[:, :, SIDE // 2 + edge :].astype(int) - 200).max() <= 3
    with open_video(path) as reader:
        assert remarks(next(reader.frames())[1]) == ("transparent",)
    if codec != "png":
        monkeypatch.setattr(decoders, "_WITH_ALPHA", {"vp8": "libnone", "vp9": "libnone"})
        with pytest.raises(MediaError, match=r"a\.webm: its video is transparent, which this FFmpeg has no decoder"):
            read_clip(path)


def test_pictures_that_change_their_size_need_one(tmp_path: Path) -> None:
    parts = [write(tmp_path / f"{n}.h264", [rgb(corner()[:, : SIDE * (n + 1)])] * 3) for n in range(2)]
    path = tmp_path / "both.h264"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    with pytest.raises(MediaError, match=r"both\.h264: the size of its pictures changes on the way; give height and"):
        read_clip(path)
    assert read_clip(path, height=32, width=32).shape == (6, 32, 32, 3)


def test_share_of_a_picture_that_is_kept() -> None:
    assert kept_share((128, 64), (64, 64)) == kept_share((64, 128), (64, 64)) == Fraction(1, 2)
    assert kept_share((1080, 1920), (240, 424)) > Fraction(99, 100)
