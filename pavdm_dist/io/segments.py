"""A video that grows on disk: whole segments that are playable at any moment, joined by stream copy at the end.

While a video is made, ``<output>.parts/`` holds one complete mp4 per fixed group of chunks and a playlist
(ffconcat: ``ffplay``, ``mpv`` and ``ffmpeg -i`` read it). A segment appears by a rename and the playlist is
replaced by a rename, so a process that dies at any point leaves what was finished, whole. A group always starts
with a fresh encoder: a segment depends on its own frames only, and rendering it again gives the same packets.
Frames that come before chunk 0 (a clip that the video goes on from) are a segment of their own, outside the groups.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from pavdm_dist.errors import ConfigError, MediaError
from pavdm_dist.io import storage
from pavdm_dist.io.encode import (
    EncoderOptions,
    VideoEncoder,
    check_frames,
    check_size,
    remux,
    require_libx264,
)
from pavdm_dist.io.parts import holds_work, parts_folder
from pavdm_dist.values.rates import as_rate

PLAYLIST = "playlist.ffconcat"
INPUT = "input.mp4"
_SEGMENT = re.compile(r"segment-(\d{6,})-(\d{6,})\.mp4")
# In the playlist, before a segment that ends inside of its group: a writer that goes on makes the whole group anew.
SHORT = "# short group"
# A segment in the playlist: perhaps the mark, the name, seconds.
ENTRY = re.compile(rf"({SHORT}\n)?file ({_SEGMENT.pattern}|{re.escape(INPUT)})\nduration (\S+)\n")
# What a writer may remove: everything else in the folder is somebody else's.
SEGMENT_NAMES = re.compile(rf"{_SEGMENT.pattern}|segment\.mp4|{re.escape(INPUT)}|{re.escape(PLAYLIST)}")


@dataclass(frozen=True)
class Segment:
    """One complete mp4: chunks ``first_chunk .. last_chunk``, ``num_frames`` frames, and its lines in the playlist."""

    name: str
    first_chunk: int
    last_chunk: int
    num_frames: int
    entry: str


@dataclass(frozen=True)
class Interrupted:
    """What an unfinished video left behind.

    Attributes:
        playlist: plays everything there is; None when there is nothing.
        num_frames: frames in it.
        next_chunk: the first chunk that is not in it.
    """

    playlist: str | None
    num_frames: int
    next_chunk: int


class SegmentWriter:
    """Takes chunks of frames in order and makes an mp4 of them.

    Args:
        output: the mp4 to make, local or remote.
        fps: frames per second.
        height, width: even.
        chunks_per_segment: chunks in one segment; what a crash can cost is less than this many chunks.
        options: compression.
        resume: go on behind the complete segments of an earlier, interrupted writer; its partial last segment
            is dropped, since a group is always written by one encoder. ``next_chunk`` says where it goes on.
        num_chunks: with ``resume``, the chunks of the whole video when the earlier writer had closed all of them: then
            a shorter last segment is complete, too.
        overwrite: drop the segments of an earlier writer. Without ``resume`` or this they are an error.

    Raises:
        ConfigError: odd size, no libx264, an output that is not an .mp4, segments of another run or of
            another size, rate or grouping.
    """

    def __init__(
        self,
        output: str | Path,
        fps: float | Fraction,
        height: int,
        width: int,
        chunks_per_segment: int = 6,
        options: EncoderOptions | None = None,
        resume: bool = False,
        num_chunks: int | None = None,
        overwrite: bool = False,
    ) -> None:
        check_size(height, width)
        require_libx264()
        if chunks_per_segment < 1:
            raise ConfigError(f"chunks_per_segment={chunks_per_segment}: must be at least 1")
        if not str(output).lower().endswith(".mp4"):
            raise ConfigError(f"output={output}: the name must end in .mp4")
        self.output = str(output)
        self.parts = parts_folder(output)
        self._rate = as_rate(fps)
        self._size = (height, width)
        self._group = chunks_per_segment
        self._options = options or EncoderOptions()
        self._input: Segment | None = None
        self._segments: list[Segment] = []
        self._encoder: VideoEncoder | None = None
        self._staged: Path | None = None
        self._open_frames = 0
        self._next = 0
        if resume:
            self._find_segments(num_chunks)
            self._next = self.closed_chunks
        elif overwrite:
            storage.remove_matching(self.parts, SEGMENT_NAMES)
        elif holds_work(self.parts):
            raise ConfigError(
                f"output={output}: {self.parts} holds the segments of an interrupted run; "
                "choose another name or pass --overwrite"
            )

    @property
    def next_chunk(self) -> int:
        """The chunk that must come next."""
        return self._next

    @property
    def closed_chunks(self) -> int:
        """Chunks in complete segments: 0 .. ``closed_chunks`` - 1."""
        return self._segments[-1].last_chunk + 1 if self._segments else 0

    @property
    def num_frames(self) -> int:
        """Frames taken so far, those of the input and of the open segment included."""
        return sum(segment.num_frames for segment in self._all_segments()) + self._open_frames

    @property
    def playlist(self) -> str:
        """Path of the playlist of all complete segments."""
        return storage.join(self.parts, PLAYLIST)

    def write_input(self, frames: Iterable[Any]) -> bool:
        """Takes the frames that come before chunk 0; they are a complete segment when this returns.

        Args:
            frames: uint8 ``[height, width, 3]``, numpy or CPU tensors, one or more; read one after the other, and not
                at all when they are not new.

        Returns:
            Whether they were new; False = they are there, perhaps of an earlier writer, which this one resumes.

        Raises:
            ValueError: wrong frames, or none.
        """
        if self._input is not None:
            return False
        with storage.atomic_path(storage.join(self.parts, INPUT)) as staged:
            encoder = VideoEncoder(staged, self._rate, *self._size, self._options)
            count = 0
            for count, frame in enumerate(frames, 1):  # noqa: B007
                encoder.write(check_frames(frame[None], *self._size)[0])
            if not count:
                raise ValueError("there are no frames to write")
            encoder.close()
        self._input = self._segment(INPUT, -1, -1, count)
        self._write_playlist()
        return True

    def write_chunk(self, index: int, frames: Any) -> bool:
        """Takes the frames of chunk ``index``; closes the segment when its group is full.

        Args:
            index: 0-based; must be ``next_chunk``. Older ones, replayed after a restart, are dropped.
            frames: uint8 ``[t, height, width, 3]``, t >= 1, numpy or CPU tensor.

        Returns:
            Whether the chunk was new.

        Raises:
            ValueError: a chunk is missing in between, or wrong frames.
        """
        if index < self._next:
            return False
        if index > self._next:
            raise ValueError(f"chunk {index} arrived, {self._next} is next")
        array = check_frames(frames, *self._size)
        if self._encoder is None:
            self._staged = storage.stage(storage.join(self.parts, "segment.mp4"))
            self._encoder = VideoEncoder(self._staged, self._rate, *self._size, self._options)
        for frame in array:
            self._encoder.write(frame)
            self._open_frames += 1
        self._next += 1
        if self._next % self._group == 0:
            self.close()
        return True

    def finish(self, num_frames: int | None = None, metadata: Mapping[str, Any] | None = None) -> int:
        """As :meth:`join`; then removes the segments."""
        wanted = self.join(num_frames, metadata)
        self.remove()
        return wanted

    def join(self, num_frames: int | None = None, metadata: Mapping[str, Any] | None = None) -> int:
        """Joins the segments into the output, which appears in one move.

        Args:
            num_frames: frames of the output; what was taken beyond is cut off. None = all.
            metadata: stored as compact JSON in the mp4's comment tag.

        Returns:
            The number of frames of the output.

        Raises:
            ValueError: ``num_frames`` is below 1 or above what was taken.
        """
        wanted = self.num_frames if num_frames is None else num_frames
        if not 1 <= wanted <= self.num_frames:
            raise ValueError(f"{wanted} frames asked of {self.output}, {self.num_frames} were written")
        self.close()
        paths = [storage.join(self.parts, segment.name) for segment in self._all_segments()]
        remux(paths, self.output, self._rate, wanted, metadata)
        return wanted

    def remove(self) -> None:
        """Removes the segments and the playlist, and the folder unless something else is in it."""
        self._input, self._segments = None, []
        storage.remove_matching(self.parts, SEGMENT_NAMES)

    def abort(self) -> Interrupted:
        """Ends the open segment early, so that everything taken so far can be played.

        Never raises for a segment that cannot be completed (a full disk): that one is dropped.
        """
        taken = self._next
        try:
            self.close()
        except Exception:  # whatever went wrong, the complete segments stay
            taken = self.closed_chunks
            self.drop_open()
        if not self._segments:
            self.remove()
            return Interrupted(None, 0, 0)
        return Interrupted(self.playlist, self.num_frames, taken)

    def close(self) -> None:
        """Completes the open segment, though its group may not be full; only :meth:`join` may follow."""
        if self._encoder is None or self._staged is None:
            return
        first, last = self.closed_chunks, self._next - 1
        if last < first:  # interrupted in the middle of the group's first chunk
            self.drop_open()
            return
        count = self._encoder.close()
        segment = self._segment(f"segment-{first:06d}-{last:06d}.mp4", first, last, count)
        storage.commit(self._staged, storage.join(self.parts, segment.name))
        self._segments.append(segment)
        self._encoder, self._staged, self._open_frames = None, None, 0
        self._write_playlist()

    def drop_open(self) -> None:
        """Forgets the open segment, which :meth:`close` would complete."""
        if self._encoder is not None:
            with suppress(Exception):
                self._encoder.close()
        if self._staged is not None:
            storage.discard(self._staged)
        self._encoder, self._staged, self._open_frames = None, None, 0

    def _all_segments(self) -> list[Segment]:
        return [*([] if self._input is None else [self._input]), *self._segments]

    def _segment(self, name: str, first: int, last: int, num_frames: int) -> Segment:
        mark = f"{SHORT}\n" if (last + 1) % self._group else ""
        entry = f"{mark}file {name}\nduration {float(num_frames / self._rate):.6f}\n"
        return Segment(name, first, last, num_frames, entry)

    def _write_playlist(self) -> None:
        # Replaced as a whole, so that it can be read at any moment; an hour of short chunks makes some 100 kB of it.
        with storage.atomic_write(self.playlist, "w") as file:
            file.write("ffconcat version 1.0\n")
            file.writelines(segment.entry for segment in self._all_segments())

    def _find_segments(self, num_chunks: int | None) -> None:
        """Takes the complete groups of an earlier writer, from chunk 0 without a gap; its other files are removed."""
        names = storage.list_names(self.parts)
        found = sorted((int(match[1]), int(match[2]), match[0]) for match in map(_SEGMENT.fullmatch, names) if match)
        for position, (first, last, _) in enumerate(found):
            length = last - first + 1
            if length > self._group or (length < self._group and position < len(found) - 1):
                raise ConfigError(
                    f"chunks_per_segment={self._group}: {self.parts} was written with chunks_per_segment={length}"
                )
        if INPUT in names:
            self._input = self._segment(INPUT, -1, -1, self._check_segment(INPUT))
        for first, last, name in found:
            whole = last == first + self._group - 1 or last + 1 == num_chunks
            if whole and first == self.closed_chunks:
                self._segments.append(self._segment(name, first, last, self._check_segment(name)))
        kept = {segment.name for segment in self._all_segments()}
        storage.remove_matching(self.parts, SEGMENT_NAMES, keep=kept)
        if kept:
            self._write_playlist()

    def _check_segment(self, name: str) -> int:
        """Frames of a segment that is known to have this writer's size and rate."""
        import av

        path = storage.join(self.parts, name)
        try:
            with storage.open_read(path) as file, av.open(file, metadata_errors="replace") as container:
                stream: Any = container.streams.video[0]
                found = (stream.height, stream.width, stream.average_rate)
                count = int(stream.frames)
        except (av.FFmpegError, IndexError, AttributeError) as error:  # a stream without a codec has no size
            raise MediaError(f"{path} is not a readable segment; remove {self.parts} to start anew") from error
        if found != (*self._size, self._rate):
            raise ConfigError(
                f"{path} is {found[1]}x{found[0]} at {found[2]} fps, this run makes "
                f"{self._size[1]}x{self._size[0]} at {self._rate} fps"
            )
        return count
