"""Reading and writing clips: rate, size, rotation, and every way a file can be unfit."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from pavdm_dist.errors import ConfigError, MediaError
from pavdm_dist.io.video import export_to_video, probe, read_clip

RATE = 24


def coloured(count: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Flat frames whose yellow rises by 5 and whose right half has blue added: order and side can be read off."""
    frames = np.zeros((count, height, width, 3), dtype=np.uint8)
    frames[..., :2] = (np.arange(count) * 5)[:, None, None, None]
    frames[:, :, width // 2 :, 2] = 200
    return frames


def noisy(count: int, height: int = 48, width: int = 64) -> np.ndarray:
    blocks = np.random.default_rng(0).integers(0, 256, (count, height // 8, width // 8, 3), dtype=np.uint8)
    return blocks.repeat(8, axis=1).repeat(8, axis=2)


def encode(path: Path, frames: np.ndarray, rotation: int = 0, **options: str) -> Path:
    """As a phone or ffmpeg would write it: B-frames allowed, container by suffix."""
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("libx264", rate=RATE, options={"crf": "12"})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        if rotation:
            stream.set_display_rotation(rotation)
        for index, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts, picture.time_base = index, Fraction(1, RATE)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encode(tmp_path_factory.mktemp("clip") / "clip.mp4", coloured(48))


def order(frames: np.ndarray) -> list[int]:
    """Which of the ``coloured`` frames these are, by their green."""
    return [round(frame[..., 1].mean() / 5) for frame in frames.astype(float)]


def test_round_trip_keeps_number_size_colour_and_order(tmp_path: Path) -> None:
    frames = coloured(30)
    export_to_video(frames, tmp_path / "out.mp4", fps=RATE)
    read = read_clip(tmp_path / "out.mp4")
    assert read.shape == frames.shape
    assert read.dtype == np.uint8
    # Flat areas survive; the one sharp edge is blurred by the halved colour resolution.
    assert np.abs(read.astype(int) - frames)[:, :, np.r_[0:28, 36:64]].max() <= 4
    assert order(read) == list(range(30))


def test_export_takes_floats_and_pictures(tmp_path: Path) -> None:
    from PIL import Image

    frames = coloured(5)
    export_to_video((frame / 255 for frame in frames), tmp_path / "float.mp4", fps=RATE)
    export_to_video([Image.fromarray(frame) for frame in frames], tmp_path / "pil.mp4", fps=RATE)
    assert np.array_equal(read_clip(tmp_path / "float.mp4"), read_clip(tmp_path / "pil.mp4"))


def test_export_refuses_odd_sizes_and_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "out.mp4"
    target.write_bytes(b"old")
    with pytest.raises(ConfigError, match=r"width=63 must be even.*62 or 64"):
        export_to_video(coloured(3)[:, :, :63], target)
    with pytest.raises(ConfigError, match="no frames"):
        export_to_video([], target)
    assert target.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]


@pytest.mark.parametrize(
    ("fps", "expected"),
    [
        (24, list(range(48))),
        (12, list(range(0, 48, 2))),
        (48, [k // 2 for k in range(96)]),
        (8, list(range(0, 48, 3))),
        (30, [round(Fraction(k * 24, 30) - Fraction(1, 1000)) for k in range(60)]),
    ],
)
def test_rate_conversion_takes_the_nearest_frame(clip: Path, fps: float, expected: list[int]) -> None:
    assert order(read_clip(clip, fps=fps)) == [min(index, 47) for index in expected]


def test_first_and_last_frames(clip: Path) -> None:
    assert order(read_clip(clip, num_frames=5)) == [0, 1, 2, 3, 4]
    assert order(read_clip(clip, num_frames=5, keep="last")) == [43, 44, 45, 46, 47]
    # 48 frames: 45 = 4 * 11 + 1 is what a codec with four frames per latent can take.
    assert order(read_clip(clip, temporal_stride=4)) == list(range(45))
    assert order(read_clip(clip, temporal_stride=4, keep="last")) == list(range(3, 48))


def test_size_is_covered_and_cut_to_the_centre(clip: Path) -> None:
    read = read_clip(clip, num_frames=2, height=24, width=24)
    assert read.shape == (2, 24, 24, 3)
    # The border between the halves stays in the middle.
    assert read[0, :, :10, 2].max() < 30
    assert read[0, :, 14:, 2].min() > 170
    assert read_clip(clip, num_frames=1, height=96, width=32).shape == (1, 96, 32, 3)
    with pytest.raises(ConfigError, match="both or none"):
        read_clip(clip, height=24)


def test_rotation_is_undone(tmp_path: Path) -> None:
    path = encode(tmp_path / "lying.mp4", coloured(4), rotation=90)
    info = probe(path)
    assert (info.height, info.width) == (64, 48)
    upright = read_clip(path)
    assert upright.shape == (4, 64, 48, 3)
    # A quarter turn counter-clockwise brings the right half to the top.
    assert upright[0, :28, :, 2].min() > 170
    assert upright[0, 36:, :, 2].max() < 30
    assert read_clip(path, height=32, width=24)[0, :14, :, 2].min() > 170


def test_probe(clip: Path) -> None:
    info = probe(clip)
    assert (info.height, info.width, info.fps, info.num_frames, info.seconds) == (48, 64, 24.0, 48, 2.0)


def test_too_short_names_needed_found_and_legal(clip: Path) -> None:
    with pytest.raises(MediaError, match=r"has 48 frames, 97 are needed; nearest legal number for this clip: 45"):
        read_clip(clip, num_frames=97, temporal_stride=4)
    with pytest.raises(MediaError, match=r"has 24 frames at 12 fps, 30 are needed"):
        read_clip(clip, num_frames=30, fps=12)


def test_missing_and_not_a_video(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="no such file"):
        read_clip(tmp_path / "none.mp4")
    with pytest.raises(MediaError, match="no such file"):
        read_clip(tmp_path)
    for name, content in {
        "noise.mp4": np.random.default_rng(1).bytes(5000),
        "empty.mp4": b"",
        "notes.txt": b"hello world\n" * 50,
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(MediaError, match="not a video"):
            read_clip(tmp_path / name)


def sound(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 16000
        container.mux(stream.encode(silence))
        container.mux(stream.encode(None))
    return path


def test_audio_only(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="has no video, only audio"):
        read_clip(sound(tmp_path / "sound.mp4"))


def test_video_stream_without_frames(tmp_path: Path) -> None:
    whole = encode(tmp_path / "whole.mkv", noisy(10)).read_bytes()
    # Matroska: keep the header, drop all clusters.
    (tmp_path / "bare.mkv").write_bytes(whole[: whole.index(b"\x1f\x43\xb6\x75")])
    with pytest.raises(MediaError, match=r"without frames|not a video"):
        read_clip(tmp_path / "bare.mkv")


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize("damage", ["cut", "zeros"])
def test_truncated_and_corrupt_files(tmp_path: Path, suffix: str, damage: str) -> None:
    options = {"movflags": "+faststart"} if suffix == "mp4" else {}
    data = bytearray(encode(tmp_path / f"whole.{suffix}", noisy(60), **options).read_bytes())
    middle = len(data) * 6 // 10
    if damage == "cut":
        del data[middle:]
    else:
        data[middle : middle + 3000] = bytes(3000)
    (tmp_path / f"bad.{suffix}").write_bytes(data)
    with pytest.raises(MediaError, match=r"corrupt|truncated"):
        read_clip(tmp_path / f"bad.{suffix}")
    # What lies before the damage can still be asked for.
    assert len(read_clip(tmp_path / f"bad.{suffix}", num_frames=5)) == 5


def test_truncated_without_index(tmp_path: Path) -> None:
    data = encode(tmp_path / "whole.mp4", noisy(30)).read_bytes()
    (tmp_path / "bad.mp4").write_bytes(data[: len(data) // 2])
    with pytest.raises(MediaError, match="truncated"):
        read_clip(tmp_path / "bad.mp4")
