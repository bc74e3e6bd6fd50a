"""Films that are open: their frames in showing order, whether all of them are there, and what they look like."""

from __future__ import annotations

import errno
import math
import re
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import IO, Any

import numpy as np

from pavdm_dist.errors import MediaError, UnreachableError
from pavdm_dist.io import picture as pictures
from pavdm_dist.io.decoders import decoder_of
from pavdm_dist.io.storage import exists, is_remote, open_read

# FFmpeg plays any text file as an animated terminal.
_NOT_VIDEO = ("tty",)
# What a file's storage says when it is not there, slow, or asked for too much at once.
_PASSING = {
    getattr(errno, f"E{name}")
    for name in (
        "AGAIN", "CONNABORTED", "CONNREFUSED", "CONNRESET", "HOSTDOWN", "HOSTUNREACH", "IO", "MFILE", "NETDOWN",
        "NETRESET", "NETUNREACH", "NFILE", "NOLINK", "NOTCONN", "REMOTEIO", "SHUTDOWN", "STALE", "TIMEDOUT",
    )
    if hasattr(errno, f"E{name}")
}  # fmt: skip
# Here a time may be where a frame lies in the file, which with B-frames is not when it is shown.
_IN_FILE_ORDER = ("avi", "asf")
# How writers of Matroska say how long one stream is.
_CLOCK = re.compile(r"(\d+):(\d\d):(\d\d(?:\.\d+)?)")


@dataclass
class _Seen:
    """What has been read of a film.

    Attributes:
        count: frames.
        first, shown: times of the first and the last of them.
        following: time of the next one where it says nothing.
        end: when the last one stops being shown.
        reached: as far as any stream has come.
        waiting: times of packets whose frames are still to come, in the order of the file.
        latest: of these times so far.
        worked_out: FFmpeg knows when each frame is shown though the file does not say: it looks into MPEG-4 and MPEG-2
            for it. Then times of packets go back where B-frames follow what they are shown before; places in a file
            only rise.
    """

    count: int = 0
    first: Fraction = Fraction(0)
    shown: Fraction = Fraction(0)
    following: Fraction = Fraction(0)
    end: Fraction = Fraction(0)
    reached: Fraction = Fraction(0)
    waiting: deque[Fraction | None] = field(default_factory=deque)
    latest: Fraction | None = None
    worked_out: bool = False

    def note(self, place: Fraction | None) -> None:
        """Takes the time of a packet that is about to be decoded."""
        self.waiting.append(place)
        if place is not None:
            self.worked_out = self.worked_out or (self.latest is not None and place < self.latest)
            self.latest = place

    def __str__(self) -> str:
        return f"after frame {self.count} ({float(self.end - self.first):.2f} s)"


class VideoReader:
    """A film's first video stream, made by :func:`open_video`.

    Attributes:
        path: of the file.
        rate: average frames per second, 25 where the file does not tell.
        num_frames: as the file says; None where it does not.
    """

    def __init__(self, path: str | Path, container: Any, stream: Any) -> None:
        from av.video.reformatter import VideoReformatter

        self.path, self._container, self._stream = path, container, stream
        self._decoder = decoder_of(path, stream)
        self.rate = Fraction(stream.average_rate or stream.guessed_rate or 25)
        self.num_frames: int | None = stream.frames or None
        self._in_file_order = container.format.name in _IN_FILE_ORDER and bool(stream.codec_context.has_b_frames)
        self._aspect = Fraction(stream.sample_aspect_ratio or 1)
        self._reformatter = VideoReformatter()  # one for all frames is faster than one for each

    @property
    def seconds(self) -> Fraction | None:
        """Length of the pictures as the file says, of its longest stream where it says that only; None = neither."""
        return self._own_seconds() or self._longest()

    @property
    def announced_end(self) -> Fraction | None:
        """When the pictures end as the file says, seconds of its own clock; None where it does not."""
        start = Fraction((self._stream.start_time or 0) * self._stream.time_base)
        return None if self.seconds is None else max(start, Fraction(0)) + self.seconds

    def frames(self, start: Fraction | None = None) -> Iterator[tuple[Fraction, Any]]:
        """(time in seconds, decoded frame) in showing order, and at the end a check that nothing is missing.

        Args:
            start: begin at a key frame before this time, as far as the container knows where one is; None = at the
                beginning, which only a reader that has given no frames yet can.

        Raises:
            MediaError: corrupt, truncated, without a frame, with time that runs backwards, or with no way to ``start``.
        """
        if start is not None:
            self._seek(start)
        seen = _Seen()
        for frame in self._decoded(seen):
            own = self._time(frame, seen)
            if start is not None and (own is None or not (seen.count or frame.key_frame)):
                # Pictures that are refreshed bit by bit are half-built at first and do not say so; without timestamps
                # of its own a frame behind a jump cannot be placed.
                raise MediaError(f"{self.path}: no key frame with a time behind the jump")
            time = seen.following if own is None else own
            if not seen.count:
                seen.first = time
            elif time < seen.shown:
                raise MediaError(
                    f"{self.path}: time runs backwards at frame {seen.count}, from {float(seen.shown):.2f} s to"
                    f" {float(time):.2f} s (joined videos?): write it anew with ffmpeg"
                )
            seen.shown, seen.following, seen.end = time, time + 1 / self.rate, time + self.shown_for(frame)
            seen.count += 1
            yield time, frame
        if not seen.count:
            raise MediaError(f"{self.path} has a video stream without frames")
        self._check_end(seen)

    def shown_for(self, frame: Any) -> Fraction:
        """Seconds for which a frame is shown: as it says itself, else by the average rate."""
        return Fraction(frame.duration * frame.time_base) if frame.duration else 1 / self.rate

    def picture(self, frame: Any, size: tuple[int, int] | None) -> np.ndarray:
        """As :func:`pavdm_dist.io.picture.picture`; errors name the file."""
        with self._naming():
            return pictures.picture(frame, size, self._aspect, self._reformatter)

    def shown_size(self, frame: Any) -> tuple[int, int]:
        """Height and width of a frame as it is shown, upright, in square pixels."""
        with self._naming():
            return pictures.shown_size(frame, self._aspect)

    @contextmanager
    def _naming(self) -> Iterator[None]:
        try:
            yield
        except MediaError as error:
            raise MediaError(f"{self.path}: {error}") from error

    def _seek(self, start: Fraction) -> None:
        import av

        try:
            if self._in_file_order and self._container.format.name == "asf":
                raise ValueError("behind a jump its times are those of other packets")
            self._container.seek(math.floor(start / self._stream.time_base), stream=self._stream, backward=True)
        except (av.FFmpegError, OverflowError, ValueError) as error:
            raise MediaError(f"{self.path}: no way to {float(start):.2f} s") from error

    def _decoded(self, seen: _Seen) -> Iterator[Any]:
        """Whole frames; other streams are followed to their ends, too, since a file's length is that of the longest."""
        import av

        try:
            for packet in _all_of(self._container.demux()):
                if packet.pts is not None:
                    seen.reached = max(seen.reached, (packet.pts + (packet.duration or 0)) * packet.time_base)
                if packet.stream is not self._stream:  # numbers do not tell: what ends a stream bears that of the first
                    continue
                if self._in_file_order and packet.size:
                    seen.note(None if packet.pts is None else Fraction(packet.pts * packet.time_base))
                damaged = packet.is_corrupt
                for frame in () if damaged else self._decoder.decode(packet):
                    damaged = damaged or frame.is_corrupt
                    if not damaged:
                        yield pictures.known_matrix(frame)
                if damaged:
                    yield from self._held_back()
                    raise MediaError(f"{self.path} is corrupt or truncated {seen}")
        except av.FFmpegError as error:
            yield from self._held_back()
            raise MediaError(f"{self.path} is corrupt or truncated {seen}: {error.strerror}") from error

    def _held_back(self) -> Iterator[Any]:
        """Whole frames before a fault that are still in the decoder: how many depends on its threads."""
        import av

        with suppress(av.FFmpegError):
            for frame in self._decoder.decode(None):
                if frame.is_corrupt:
                    return
                frame.time_base = self._stream.time_base  # which PyAV takes from a packet
                yield pictures.known_matrix(frame)

    def _time(self, frame: Any, seen: _Seen) -> Fraction | None:
        """When a frame is shown, as far as the file says."""
        if self._in_file_order and not seen.worked_out:  # frames come out as they are shown, so that places rise, too
            return seen.waiting.popleft() if seen.waiting else None
        return None if frame.pts is None else Fraction(frame.pts * frame.time_base)

    def _own_seconds(self) -> Fraction | None:
        """Length of the pictures alone, where the file tells it apart from that of other streams."""
        if self._stream.frames and self._stream.duration:
            return Fraction(self._stream.duration * self._stream.time_base)
        clock = _CLOCK.fullmatch(self._stream.metadata.get("DURATION", ""))
        return None if clock is None else 3600 * int(clock[1]) + 60 * int(clock[2]) + Fraction(clock[3])

    def _longest(self) -> Fraction | None:
        return Fraction(self._container.duration, 1_000_000) if self._container.duration else None

    def _check_end(self, seen: _Seen) -> None:
        """Containers without an index just end early; a packet of sound at the break ends others without a word."""
        declared, found = self._own_seconds(), seen.end
        tolerance = max(Fraction(1, 2), 2 / self.rate)  # frames may be left out by an edit list
        if declared is None:
            declared, found = self._longest() or Fraction(0), max(seen.end, seen.reached)
            # How long their last packet lasts, other streams need not say.
            tolerance = Fraction(1, 2) if len(self._container.streams) == 1 else Fraction(1)
        found = max(found, found - seen.first)  # some lengths count from 0 and some from the first frame
        if declared - found > tolerance:
            raise MediaError(
                f"{self.path} is truncated: {float(declared):.2f} s are announced, {float(found):.2f} s"
                f" ({seen.count} frames) are there"
            )


class _Source:
    """A file for PyAV, which prints a traceback where a damaged film sends it to a place that no file has.

    Attributes:
        trouble: what its storage said last that may pass.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.trouble: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def read(self, size: int = -1) -> bytes:
        with self._heard():
            return self._file.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        try:
            with self._heard():
                return self._file.seek(offset, whence)
        except (OSError, ValueError, OverflowError):
            return -1

    @contextmanager
    def _heard(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.trouble = error if error.errno in _PASSING else self.trouble
            raise


def _all_of(packets: Iterator[Any]) -> Iterator[Any]:
    """Packets to their end, at which PyAV stumbles over streams that have shown up on the way."""
    with suppress(IndexError):
        yield from packets


@contextmanager
def open_video(path: str | Path) -> Iterator[VideoReader]:
    """A film, local or remote.

    Raises:
        UnreachableError: its storage does not answer.
        MediaError: missing, not a video, audio only, or in a codec that this FFmpeg cannot decode.
    """
    import av

    source: _Source | None = None
    try:
        if not exists(path) or (not is_remote(path) and not Path(path).is_file()):
            raise MediaError(f"{path}: no such file")
        with open_read(path) as file:
            source = _Source(file)
            try:
                container: Any = av.open(source, metadata_errors="replace")
            except (av.FFmpegError, OSError) as error:
                raise MediaError(f"{path} is not a video, or it is truncated: {error.strerror}") from error
            with container:
                yield VideoReader(path, container, _video_stream(path, container))
    except (MediaError, OSError) as error:
        trouble = error if isinstance(error, OSError) and error.errno in _PASSING else source and source.trouble
        if trouble is not None and not isinstance(error, UnreachableError):
            raise UnreachableError(f"{path} cannot be read now: {trouble}") from error
        if isinstance(error, MediaError):
            raise
        raise MediaError(f"{path} cannot be read: {error}") from error


def _video_stream(path: str | Path, container: Any) -> Any:
    from av.stream import Disposition

    if container.format.name in _NOT_VIDEO:
        raise MediaError(f"{path} is not a video")
    # The cover of a music file is a video stream with one picture.
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    for stream in streams:
        if stream.codec_context is not None:
            return stream
    if streams:
        raise MediaError(f"{path}: this FFmpeg has no decoder for its video ({_codec_tag(container, streams[0])})")
    kinds = sorted({str(stream.type) for stream in container.streams})
    raise MediaError(f"{path} has no video, only {' and '.join(kinds) or 'no stream at all'}")


def _codec_tag(container: Any, stream: Any) -> str:
    """What the container calls a codec without a decoder, where PyAV would keep it."""
    import av.logging

    level = av.logging.get_level()
    av.logging.set_level(av.logging.INFO)  # else it dumps nothing
    try:
        said = container.dumps_format()
    finally:
        av.logging.set_level(level)
    found = re.search(rf"Stream #0:{stream.index}\D.*?Video: ([^,\n]+)", said)
    return found[1].strip().removeprefix("none (").split(" /")[0] if found else "unknown"
