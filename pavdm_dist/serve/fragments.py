"""Segments that lie on disk as one fragmented mp4 that can be played while it grows, by packet copy.

Every closed segment becomes one or more fragments (``moof`` and ``mdat``) whose times follow those before; the
beginning (``ftyp`` and ``moov``) is the same for all of them and is sent once. Browsers play it as it is, in a
``<video>`` or through Media Source Extensions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

from pavdm_dist.errors import MediaError
from pavdm_dist.io.storage import open_read

# Times of a fragment count from the beginning of the video, whatever comes before in this muxer (frag_discont, and no
# shift to zero); nothing is written behind the last one, so that more can follow.
_OPTIONS = {
    "movflags": "empty_moov+default_base_moof+frag_keyframe+frag_discont+skip_trailer",
    "use_editlist": "0",
    "avoid_negative_ts": "disabled",
}


class _Sink:
    """What a muxer has written since it was asked last; it cannot go back, and need not."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def write(self, data: bytes) -> int:
        self._bytes += data
        return len(data)

    def take(self) -> bytes:
        taken, self._bytes = bytes(self._bytes), bytearray()
        return taken


def fragments(
    path: str | Path, first_frame: int = 0, skip: int = 0, header: bool = True
) -> Iterator[tuple[bytes, int]]:
    """The frames of an H.264 mp4 without B-frames, as this package writes them; one fragment is in memory at a time.

    Args:
        path: a segment, or a whole video; local or remote.
        first_frame: number in the stream of the first frame that is given.
        skip: frames of the file that are left out, and those behind them up to a key frame, which depend on them.
        header: give ``ftyp`` and ``moov`` first.

    Yields:
        Bytes, and how many frames are complete with them.

    Raises:
        MediaError: it is no such file.
        OSError: it cannot be read.
    """
    import av

    sink = _Sink()
    with _opened(path) as source:
        rate = Fraction(source.average_rate)
        muxer: Any = av.open(sink, "w", format="mp4", options=_OPTIONS)
        held = given = 0
        with muxer:
            target: Any = muxer.add_stream_from_template(source, opaque=True)
            target.time_base = 1 / rate
            muxer.start_encoding()
            start = sink.take()
            if header:
                yield start, 0
            for index, packet in enumerate(packet for packet in source.container.demux(source) if packet.size):
                if index < skip or not (given or held or packet.is_keyframe):
                    continue
                packet.pts = packet.dts = first_frame + given + held
                packet.duration, packet.time_base = 1, 1 / rate
                packet.stream = target
                muxer.mux(packet)
                if ready := sink.take():  # a key frame, before which the muxer has ended a fragment
                    yield ready, held
                    given, held = given + held, 0
                held += 1
        if rest := sink.take():
            yield rest, held


def mime_type(path: str | Path) -> str:
    """What a browser must be told of a file of this package before it plays its fragments.

    Raises:
        MediaError: it is no such file.
        OSError: it cannot be read.
    """
    with _opened(path) as source:
        configuration = bytes(source.codec_context.extradata or b"")
    # RFC 6381: profile, constraints and level, with which an H.264 decoder configuration begins behind its version.
    return f'video/mp4; codecs="avc1.{configuration[1:4].hex()}"'


@contextmanager
def _opened(path: str | Path) -> Iterator[Any]:
    """The video stream of a file; what FFmpeg says of a damaged one becomes one sentence."""
    import av

    try:
        with open_read(path) as file, av.open(file, metadata_errors="replace") as container:
            yield container.streams.video[0]
    except (av.error.InvalidDataError, av.error.EOFError, IndexError, AttributeError) as error:
        raise MediaError(f"{path} is damaged: {error}") from error
