"""How long a film is, in whose clock, and what decodes it: containers as recorders, editors and browsers leave them."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import av
import numpy as np
import pytest
from videos import numbered, numbers, write_video

from pavdm_dist.errors import MediaError, UnreachableError
from pavdm_dist.io import reader
from pavdm_dist.io.reader import _Source, open_video
from pavdm_dist.io.segments import SegmentWriter
from pavdm_dist.io.video import probe, read_clip

RATE = 24


def with_sound(path: Path, pictures: int, seconds: int, **options: str) -> Path:
    """Noisy pictures, and sound that lasts so many seconds."""
    rng = np.random.default_rng(0)
    codecs = {".webm": ("libvpx", "libopus", 48000), ".wmv": ("msmpeg4", "wmav2", 44100), ".flv": ("flv", "aac", 16000)}
    video_codec, sound_codec, hertz = codecs.get(path.suffix, ("libx264", "aac", 16000))
    with av.open(str(path), "w", options=options) as container:
        video, sound = container.add_stream(video_codec, rate=RATE), container.add_stream(sound_codec, rate=hertz)
        video.width, video.height, video.pix_fmt = 64, 64, "yuv420p"
        sound.layout, sound.bit_rate = "mono", 64_000
        for index in range(pictures):
            frame = av.VideoFrame.from_ndarray(rng.integers(0, 255, (64, 64, 3), np.uint8), format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, RATE)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        size = sound.codec_context.frame_size or 960
        kind = sound.codec_context.format.name
        for number in range(seconds * hertz // size):
            silence = np.zeros((1, size), np.int16 if kind.startswith("s16") else np.float32)
            part = av.AudioFrame.from_ndarray(silence, format=kind, layout="mono")
            part.sample_rate, part.pts, part.time_base = hertz, number * size, Fraction(1, hertz)
            container.mux(sound.encode(part))
        container.mux(sound.encode(None))
    return path


@pytest.mark.parametrize(
    ("suffix", "options"),
    [
        ("mkv", {}), ("webm", {}), ("ts", {}), ("wmv", {}), ("flv", {}), ("avi", {}), ("mov", {}), ("mp4", {}),
        ("mp4", {"movflags": "frag_keyframe+empty_moov"}),
        ("mp4", {"movflags": "dash+frag_keyframe"}),
    ],
)  # fmt: skip
def test_sound_that_lasts_longer_than_the_pictures(tmp_path: Path, suffix: str, options: dict[str, str]) -> None:
    path = with_sound(tmp_path / f"a.{suffix}", 48, 8, **options)
    assert len(read_clip(path)) == 48
    last = read_clip(path, num_frames=5, fps=RATE, keep="last")
    np.testing.assert_array_equal(last, read_clip(path)[-5:])


@pytest.mark.parametrize("suffix", ["mkv", "ts", "mp4"])
def test_the_last_frames_of_a_film_whose_sound_comes_first(tmp_path: Path, suffix: str) -> None:
    """Some frames leave the decoder only when it is told that nothing follows."""
    path = tmp_path / f"a.{suffix}"
    with av.open(str(path), "w") as container:
        sound, video = container.add_stream("aac", rate=16000), container.add_stream("libx264", rate=RATE)
        sound.layout, video.height, video.width, video.pix_fmt = "mono", 64, 96, "yuv420p"
        for index, frame in enumerate(numbered(30)):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts, picture.time_base = index, Fraction(1, RATE)
            container.mux(video.encode(picture))
        container.mux(video.encode(None))
        part = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        part.sample_rate, part.pts, part.time_base = 16000, 0, Fraction(1, 16000)
        container.mux([*sound.encode(part), *sound.encode(None)])
    assert numbers(read_clip(path, fps=RATE)) == list(range(30))


@pytest.mark.parametrize("suffix", ["mkv", "webm", "flv", "wmv"])
def test_what_was_cut_off_is_told_from_what_lasts_shorter(tmp_path: Path, suffix: str) -> None:
    whole = with_sound(tmp_path / f"a.{suffix}", 96, 4).read_bytes()
    (tmp_path / f"cut.{suffix}").write_bytes(whole[: len(whole) // 3])
    for keep in ("first", "last"):
        with pytest.raises(MediaError, match=rf"cut\.{suffix} is (corrupt or )?truncated"):
            read_clip(tmp_path / f"cut.{suffix}", fps=RATE, keep=keep)


def test_the_length_of_the_pictures_is_their_own(tmp_path: Path) -> None:
    assert probe(with_sound(tmp_path / "a.mkv", 48, 8)).seconds == pytest.approx(2, abs=0.1)
    assert probe(with_sound(tmp_path / "a.mp4", 48, 8)).seconds == 2


def test_a_codec_without_a_decoder_is_named(tmp_path: Path) -> None:
    whole = write_video(tmp_path / "a.mp4", numbered(12)).read_bytes()
    path = tmp_path / "x.mp4"
    path.write_bytes(whole.replace(b"avc1", b"zzz1"))
    with pytest.raises(MediaError, match=r"x\.mp4: this FFmpeg has no decoder for its video \(zzz1\)"):
        read_clip(path)
    matroska = write_video(tmp_path / "a.mkv", numbered(12)).read_bytes()
    path = tmp_path / "x.mkv"
    path.write_bytes(matroska.replace(b"V_MPEG4/ISO/AVC", b"V_MPEG9/ISO/XYZ"))
    with pytest.raises(MediaError, match=r"x\.mkv: this FFmpeg has no decoder for its video"):
        read_clip(path)


def test_time_is_read_one_way_wherever_a_film_is_read(tmp_path: Path) -> None:
    parts = b"".join(write_video(tmp_path / f"{n}.ts", numbered(30, start=10 * n), 24).read_bytes() for n in range(2))
    path = tmp_path / "joined.ts"
    path.write_bytes(parts)
    for keep, fps in (("first", None), ("last", None), ("first", 24), ("last", 24)):
        with pytest.raises(MediaError, match=r"joined\.ts(: time runs backwards| is corrupt)"):
            read_clip(path, fps=fps, keep=keep)


@pytest.mark.parametrize("suffix", ["avi", "wmv", "asf"])
def test_times_of_the_file_s_order_are_put_in_that_of_the_pictures(tmp_path: Path, suffix: str) -> None:
    path = write_video(tmp_path / f"b.{suffix}", numbered(78), 24)  # with B-frames
    with open_video(path) as reader:
        times = [time for time, _ in reader.frames()]
    assert all(abs(after - before - Fraction(1, 24)) < Fraction(2, 1000) for before, after in pairwise(times))
    for keep in ("first", "last"):
        assert numbers(read_clip(path, fps=24, keep=keep)) == list(range(78))
    assert numbers(read_clip(path, num_frames=5, fps=24, keep="last")) == list(range(73, 78))


@pytest.mark.parametrize(("name", "codec"), [("x.avi", "mpeg4"), ("x.asf", "mpeg4"), ("x.avi", "mpeg2video")])
def test_times_that_ffmpeg_has_worked_out_are_taken(tmp_path: Path, name: str, codec: str) -> None:
    """XviD and DivX: B-frames of an open group, which are not there behind a jump."""
    path, frames = tmp_path / name, numbered(78)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=RATE)
        stream.height, stream.width, stream.pix_fmt, stream.bit_rate = *frames.shape[1:3], "yuv420p", 4_000_000
        stream.codec_context.max_b_frames, stream.codec_context.gop_size = 2, 12
        for index, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts, picture.time_base = index, Fraction(1, RATE)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    with open_video(path) as reader:
        times = [time for time, _ in reader.frames()]
    assert all(abs(after - before - Fraction(1, RATE)) < Fraction(2, 1000) for before, after in pairwise(times))
    for keep in ("first", "last"):
        assert numbers(read_clip(path, fps=RATE, keep=keep)) == list(range(78))
    assert numbers(read_clip(path, num_frames=5, fps=RATE, keep="last")) == list(range(73, 78))
    if path.suffix == ".avi":
        with open_video(path) as reader:
            behind = {time: numbers(reader.picture(frame, None)[None]) for time, frame in reader.frames(Fraction(2))}
        assert len(behind) < 40 and behind == {time: [n] for n, time in enumerate(times) if time in behind}


def test_a_playlist_of_segments_is_a_film(tmp_path: Path) -> None:
    """What is left of an interrupted video can be gone on from."""
    writer = SegmentWriter(tmp_path / "v.mp4", 24, 64, 96, chunks_per_segment=1)
    frames = numbered(80)
    for index in range(4):
        writer.write_chunk(index, frames[20 * index : 20 * (index + 1)])
    assert numbers(read_clip(writer.playlist, fps=24)) == list(range(80))
    for count in (5, 30, 77):
        assert numbers(read_clip(writer.playlist, num_frames=count, fps=24, keep="last")) == list(range(80 - count, 80))


def test_jumps_land_before_the_place_and_give_the_same_frames(tmp_path: Path) -> None:
    for suffix in ("mp4", "mkv", "ts"):
        path = write_video(tmp_path / f"a.{suffix}", numbered(78).repeat(2, axis=0))
        with open_video(path) as reader:
            whole = {time: numbers(reader.picture(frame, None)[None]) for time, frame in reader.frames()}
        with open_video(path) as reader:
            behind = {time: numbers(reader.picture(frame, None)[None]) for time, frame in reader.frames(Fraction(4))}
        assert 0 < len(behind) < len(whole)
        assert behind.items() <= whole.items()


def test_places_that_no_file_has_are_no_exception(tmp_path: Path) -> None:
    """PyAV prints a traceback for every one that a damaged film makes it ask for."""
    path = write_video(tmp_path / "a.mp4", numbered(3))
    with open(path, "rb") as file:
        source = _Source(file)
        assert (source.seek(-5), source.seek(3), source.tell(), source.name) == (-1, 3, 3, str(path))


class Failing:
    """A file whose storage stops answering behind so many bytes."""

    def __init__(self, file: IO[bytes], works: int, number: int) -> None:
        self._file, self._works, self._number = file, works, number

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def _fail(self) -> None:
        if self._file.tell() >= self._works:
            raise OSError(self._number, "said")

    def read(self, size: int = -1) -> bytes:
        self._fail()
        return self._file.read(min(size, 4096))

    def seek(self, offset: int, whence: int = 0) -> int:
        self._fail()
        return self._file.seek(offset, whence)


@pytest.mark.parametrize("works", [0, 30_000])
@pytest.mark.parametrize(
    ("number", "kind"), [(errno.ETIMEDOUT, UnreachableError), (errno.EIO, UnreachableError), (errno.EINVAL, MediaError)]
)
def test_storage_that_does_not_answer_says_nothing_of_the_film(
    number: int, kind: type, works: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_video(tmp_path / "a.mkv", np.random.default_rng(0).integers(0, 256, (48, 64, 64, 3), np.uint8))
    assert path.stat().st_size > 60_000

    @contextmanager
    def opened(path: Path) -> Iterator[Failing]:
        with open(path, "rb") as file:
            yield Failing(file, works, number)

    monkeypatch.setattr(reader, "open_read", opened)
    with pytest.raises(MediaError) as raised, open_video(path) as film:
        list(film.frames())
    assert type(raised.value) is kind
    assert ("a.mkv cannot be read now: " in str(raised.value)) == (kind is UnreachableError)


def test_what_lies_before_a_fault_depends_on_no_threads(tmp_path: Path) -> None:
    """AV1's decoder holds back more frames the more threads it has, and has one for every core."""
    whole, torn = tmp_path / "a.mp4", tmp_path / "torn.mp4"
    frames = np.random.default_rng(0).integers(0, 256, (48, 64, 64, 3), np.uint8)
    with av.open(str(whole), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libsvtav1", rate=RATE, options={"preset": "12"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    content = whole.read_bytes()
    torn.write_bytes(content[: len(content) * 6 // 10])
    counts = []
    for threads in (1, 2, 4):
        with suppress(MediaError), open_video(torn) as film:
            film._decoder.thread_count = threads
            counts.append(0)
            for _ in film.frames():
                counts[-1] += 1
    assert 10 < counts[0] < 48 and len(set(counts)) == 1
