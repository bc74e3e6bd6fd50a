"""Whole H.264 mp4 files from a stream of frames, and their joining by packet copy (PyAV, libx264)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from pavdm_dist.errors import ConfigError, MediaError
from pavdm_dist.io.storage import atomic_path, open_read
from pavdm_dist.values.rates import as_rate

# Without mbtree: its SIMD code reads beyond the last macroblock of a row when their number is no multiple of 4,
# so that at such widths the same frames gave different packets, depending on what was in memory.
_X264 = "open-gop=0:mbtree=0"
# BT.709 in H.264's numbering: untagged files are shown with other colours by some players.
_BT709 = 1
_LIMITED_RANGE = 1


@dataclass(frozen=True)
class EncoderOptions:
    """How frames are compressed.

    Attributes:
        crf: libx264's constant quality, 0 (lossless) to 51.
        preset: libx264's speed preset.
        threads: encoder threads; the bits of the file depend on it.
        keyframe_seconds: longest distance between two key frames.
    """

    crf: int = 17
    preset: str = "medium"
    threads: int = 1
    keyframe_seconds: float = 2.0


def check_size(height: int, width: int) -> None:
    """Refuses sizes that yuv420p can't hold.

    Raises:
        ConfigError: a side below 2 or odd.
    """
    for name, value in (("height", height), ("width", width)):
        if value < 2 or value % 2:
            legal = f"{value - 1} or {value + 1}" if value > 2 else "2"
            raise ConfigError(f"{name}={value} must be even for H.264 with 4:2:0 colour; nearest legal: {legal}")


def check_frames(frames: Any, height: int, width: int) -> np.ndarray:
    """A numpy view of uint8 frames ``[t, height, width, 3]`` (numpy or CPU tensor).

    Raises:
        ValueError: another type or shape.
    """
    array = np.asarray(frames)
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[1:] != (height, width, 3) or not len(array):
        raise ValueError(f"frames must be uint8 [t >= 1, {height}, {width}, 3], got {array.dtype} {list(array.shape)}")
    return array


@contextmanager
def _as_disk_errors() -> Iterator[None]:
    """What an encoder says of itself ends one video, as a full disk does; FFmpeg tells the two apart poorly."""
    import av

    try:
        yield
    except av.FFmpegError as error:
        if isinstance(error, OSError):
            raise
        raise OSError(f"the encoder failed: {error}") from error


class VideoEncoder:
    """Writes frames to one mp4; frame i is shown at exactly i / fps.

    There are no B-frames: every frame depends on earlier ones only, so a file can be cut after any packet and
    files can be joined by copying packets, and decoding order is showing order.

    Args:
        path: local file to write.
        rate: frames per second.
        height, width: even.
        options: compression.

    Raises:
        ConfigError: odd size, or this PyAV was built without libx264.
    """

    def __init__(self, path: Path, rate: Fraction, height: int, width: int, options: EncoderOptions) -> None:
        import av

        check_size(height, width)
        require_libx264()
        self._rate = rate
        self._path, self._count = path, 0
        self._lost = False
        self._container: Any = av.open(str(path), "w", format="mp4")
        settings = {"crf": str(options.crf), "preset": options.preset, "x264-params": _X264}
        self._stream: Any = self._container.add_stream("libx264", rate=rate, options=settings)
        self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, "yuv420p"
        context = self._stream.codec_context
        context.thread_count = options.threads
        context.max_b_frames = 0
        context.gop_size = max(1, round(options.keyframe_seconds * rate))
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        context.color_range = _LIMITED_RANGE

    @_as_disk_errors()
    def write(self, frame: np.ndarray) -> None:
        """Appends one uint8 frame ``[height, width, 3]``.

        Raises:
            OSError: it cannot be written, or encoded.
        """
        import av

        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        picture = picture.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
        picture.colorspace, picture.color_range = _BT709, _LIMITED_RANGE
        picture.pts, picture.time_base = self._count, 1 / self._rate
        self._count += 1
        try:
            self._container.mux(self._stream.encode(picture))
        except Exception:
            self._lost = True
            raise

    @_as_disk_errors()
    def close(self) -> int:
        """Completes the file. A second call does nothing, and fails where the first one did.

        Returns:
            The number of frames in it.

        Raises:
            OSError: the disk is full, or was when a frame was written: the file has a hole and must not be kept.
        """
        container, self._container = self._container, None
        if container is None and not self._lost:
            return self._count
        lost, self._lost = self._lost, True  # until it is known to be whole
        if container is not None:
            try:
                # After a failure FFmpeg would go on behind the hole and call the file complete; where not even the
                # header could be written, it takes the process with it.
                if not lost:
                    container.mux(self._stream.encode(None))
            finally:
                container.close()
        if lost:
            raise OSError("a frame could not be written")
        check_whole(self._path, self._count)
        self._lost = False
        return self._count


def require_libx264() -> None:
    """Checks that PyAV can write H.264.

    Raises:
        ConfigError: it can't.
    """
    import av

    if "libx264" not in av.codecs_available:
        raise ConfigError(f"PyAV {av.__version__} has no libx264 encoder; run pip install --force-reinstall av")


@contextmanager
def _segment(path: str | Path) -> Iterator[Any]:
    """A segment to read; what FFmpeg says of a damaged one becomes one sentence."""
    import av

    try:
        with open_read(path) as file, av.open(file, metadata_errors="replace") as container:
            yield container
    except (av.error.InvalidDataError, av.error.EOFError, IndexError, AttributeError) as error:
        raise MediaError(f"{path} is damaged: {error}; pass --overwrite to start anew") from error


def check_whole(path: Path, num_frames: int) -> None:
    """Reads a file again that was just written: FFmpeg says nothing of what is lost when it closes one on a full disk.

    Raises:
        OSError: it has not that many whole frames.
    """
    import av

    found = 0
    with (
        suppress(av.FFmpegError, IndexError, AttributeError),
        av.open(str(path), metadata_errors="replace") as container,
    ):
        for packet in container.demux(container.streams.video[0]):
            found += bool(packet.size) and not packet.is_corrupt
    if found != num_frames:
        raise OSError(f"{found} of {num_frames} frames have reached the disk, it may be full")


@_as_disk_errors()
def remux(
    segments: Sequence[str | Path],
    output: str | Path,
    fps: float | Fraction | str,
    num_frames: int,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Joins segments into one mp4 by copying packets; frame i is shown at exactly i / fps.

    Args:
        segments: files of :class:`VideoEncoder` with the same options.
        output: appears in one move.
        fps: frames per second.
        num_frames: packets to copy; the rest is left out.
        metadata: stored as compact JSON in the comment tag.

    Raises:
        MediaError: the segments have fewer frames, or come from different encoders.
        OSError: one cannot be read, or the output not written.
    """
    import av

    rate = as_rate(fps)
    copied = 0
    with atomic_path(output) as staged:
        # With the index in front the file can be played while it is loaded.
        joined: Any = av.open(str(staged), "w", format="mp4", options={"movflags": "+faststart"})
        with joined:
            target: Any = None
            header: bytes | None = None
            if metadata:
                text = json.dumps(metadata, separators=(",", ":"), ensure_ascii=False, sort_keys=True)
                joined.metadata["comment"] = text
            for path in segments:
                if copied == num_frames:
                    break
                with _segment(path) as container:
                    source: Any = container.streams.video[0]
                    if target is None:
                        target = joined.add_stream_from_template(source, opaque=True)
                        target.time_base = 1 / rate
                        header = source.codec_context.extradata
                    if source.codec_context.extradata != header:
                        raise MediaError(f"{path} was made by another encoder than the segments before it")
                    for packet in container.demux(source):
                        if packet.size == 0 or copied == num_frames:
                            continue
                        packet.pts = packet.dts = copied
                        packet.duration, packet.time_base = 1, 1 / rate
                        packet.stream = target
                        joined.mux(packet)
                        copied += 1
        if copied != num_frames:
            raise MediaError(f"the segments of {output} hold {copied} frames, {num_frames} are needed")
        check_whole(staged, num_frames)


def export_to_video(
    frames: Iterable[Any], path: str | Path, fps: float | str = 24, options: EncoderOptions | None = None
) -> str:
    """Writes frames to an mp4, in one pass and in one move.

    Args:
        frames: pictures of equal size, any iterable: ``[H, W, 3]`` arrays or tensors, uint8 or float in [0, 1],
            or PIL images.
        path: the mp4, local or remote; replaced when it exists.
        fps: frames per second; see :func:`~pavdm_dist.values.rates.as_rate`.

    Returns:
        ``path`` as text.

    Raises:
        ConfigError: no frames, or odd size.
    """
    encoder: VideoEncoder | None = None
    with atomic_path(path) as staged:
        for item in frames:
            frame = np.asarray(item)
            if np.issubdtype(frame.dtype, np.floating):
                frame = np.round(frame.clip(0, 1) * 255).astype(np.uint8)
            if encoder is None:
                height, width = frame.shape[:2]
                encoder = VideoEncoder(staged, as_rate(fps), height, width, options or EncoderOptions())
            encoder.write(check_frames(frame[None], height, width)[0])
        if encoder is None:
            raise ConfigError(f"{path}: there are no frames to write")
        encoder.close()
    return str(path)
