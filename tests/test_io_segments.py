"""Segments, playlist and the final file: exact frames and timestamps, replays, interruption, resumption."""

from __future__ import annotations

import json
import resource
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from pavdm_dist.errors import ConfigError
from pavdm_dist.io.encode import EncoderOptions, VideoEncoder
from pavdm_dist.io.segments import SegmentWriter
from pavdm_dist.io.video import read_clip

HEIGHT, WIDTH, RATE = 32, 48, 24


def chunk(index: int) -> np.ndarray:
    """The frames of one chunk as a Wan-layout codec gives them: 5 for the first, 8 for others."""
    count = 5 if index == 0 else 8
    small = np.random.default_rng(index).integers(0, 256, (count, HEIGHT // 8, WIDTH // 8, 3), dtype=np.uint8)
    return small.repeat(8, axis=1).repeat(8, axis=2)


def frames_of(chunks: int) -> np.ndarray:
    return np.concatenate([chunk(index) for index in range(chunks)])


def writer(folder: Path, **options: object) -> SegmentWriter:
    return SegmentWriter(folder / "out.mp4", RATE, HEIGHT, WIDTH, **{"chunks_per_segment": 2, **options})


def packets(path: Path | str) -> list[bytes]:
    with av.open(str(path)) as container:
        return [bytes(packet) for packet in container.demux(video=0) if packet.size]


def close_to(read: np.ndarray, frames: np.ndarray) -> None:
    """Equal up to compression: blocks of 8 pixels lose colour resolution at their borders."""
    assert read.shape == frames.shape
    assert np.abs(read.astype(int) - frames).mean() < 8
    assert np.abs(read[:, 3::8, 3::8].astype(int) - frames[:, 3::8, 3::8]).max() < 40


@pytest.mark.parametrize("num_frames", [None, 45, 44, 38, 37, 30, 5, 1])
def test_final_file_has_exact_frames_and_times(tmp_path: Path, num_frames: int | None) -> None:
    out = writer(tmp_path)
    for index in range(6):
        assert out.write_chunk(index, chunk(index))
    segments = sorted((tmp_path / "out.mp4.parts").glob("*.mp4"))
    assert len(segments) == 3
    written = [packet for path in segments for packet in packets(path)]
    wanted = 45 if num_frames is None else num_frames
    assert out.finish(num_frames) == wanted
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.mp4"]
    with av.open(str(tmp_path / "out.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.height, stream.width, stream.frames, stream.average_rate) == (HEIGHT, WIDTH, wanted, RATE)
        assert stream.duration * stream.time_base == Fraction(wanted, RATE)
        times = [frame.pts * frame.time_base for frame in container.decode(stream)]
    assert times == [Fraction(index, RATE) for index in range(wanted)]
    assert packets(tmp_path / "out.mp4") == written[:wanted]
    close_to(read_clip(tmp_path / "out.mp4"), frames_of(6)[:wanted])


def test_fractional_rate(tmp_path: Path) -> None:
    out = SegmentWriter(tmp_path / "out.mp4", 30000 / 1001, HEIGHT, WIDTH, 1)
    for index in range(3):
        out.write_chunk(index, chunk(index))
    out.finish()
    with av.open(str(tmp_path / "out.mp4")) as container:
        times = [frame.pts * frame.time_base for frame in container.decode(video=0)]
    assert times == [Fraction(index * 1001, 30000) for index in range(21)]


def test_playlist_plays_whatever_is_there(tmp_path: Path) -> None:
    out = writer(tmp_path)
    out.write_chunk(0, chunk(0))
    assert not Path(out.playlist).exists()
    for index in range(1, 5):
        out.write_chunk(index, chunk(index))
        # Only whole segments are named, and no unfinished file is.
        whole = (index + 1) // 2 * 2
        with av.open(out.playlist, format="concat") as container:
            played = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        close_to(played, frames_of(whole))
    for path in Path(out.parts).glob("*.mp4"):
        with av.open(str(path)) as container:
            first = next(container.demux(video=0))
            assert first.is_keyframe
            assert first.pts == 0


def test_replays_are_dropped_and_gaps_refused(tmp_path: Path) -> None:
    out = writer(tmp_path)
    taken = [out.write_chunk(index, chunk(index)) for index in (0, 1, 2, 1, 0, 2, 3)]
    assert taken == [True, True, True, False, False, False, True]
    assert out.next_chunk == 4
    assert not out.write_chunk(3, chunk(3))
    with pytest.raises(ValueError, match="chunk 5 arrived, 4 is next"):
        out.write_chunk(5, chunk(5))
    with pytest.raises(ValueError, match="frames must be uint8"):
        out.write_chunk(4, chunk(4)[:, :-2])
    assert out.finish() == len(frames_of(4))
    close_to(read_clip(tmp_path / "out.mp4"), frames_of(4))


def test_impossible_lengths(tmp_path: Path) -> None:
    out = writer(tmp_path)
    out.write_chunk(0, chunk(0))
    for num_frames in (0, 6, -1):
        with pytest.raises(ValueError, match=f"{num_frames} frames asked of .*, 5 were written"):
            out.finish(num_frames)
    assert out.finish(5) == 5


def test_abort_leaves_a_playable_rest_and_resume_goes_on(tmp_path: Path) -> None:
    whole = writer(tmp_path / "whole")
    for index in range(6):
        whole.write_chunk(index, chunk(index))
    whole.finish(43)

    first = writer(tmp_path)
    for index in range(5):
        first.write_chunk(index, chunk(index))
    state = first.abort()
    assert (state.playlist, state.num_frames, state.next_chunk) == (first.playlist, 37, 5)
    with av.open(first.playlist, format="concat") as container:
        assert sum(1 for _ in container.decode(video=0)) == 37
    with pytest.raises(ConfigError, match=r"segments of an interrupted run.*--overwrite"):
        writer(tmp_path)

    again = writer(tmp_path, resume=True)
    assert again.next_chunk == 4
    assert again.num_frames == 29
    for index in range(3, 6):  # chunk 3 is a replay
        again.write_chunk(index, chunk(index))
    again.finish(43)
    assert packets(tmp_path / "out.mp4") == packets(tmp_path / "whole" / "out.mp4")
    assert (tmp_path / "out.mp4").read_bytes() == (tmp_path / "whole" / "out.mp4").read_bytes()


def test_killed_writer_leaves_whole_segments(tmp_path: Path) -> None:
    killed = writer(tmp_path)
    for index in range(3):
        killed.write_chunk(index, chunk(index))
    # No abort: the third chunk is in an unnamed temporary file.
    again = writer(tmp_path, resume=True)
    assert again.next_chunk == 2
    assert sorted(path.name for path in Path(again.parts).iterdir()) == [
        "playlist.ffconcat",
        "segment-000000-000001.mp4",
    ]
    fresh = writer(tmp_path, overwrite=True)
    assert fresh.next_chunk == 0
    assert not Path(fresh.parts).exists()


def test_abort_inside_the_first_chunk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, seen = VideoEncoder.write, []

    def interrupted(self: VideoEncoder, frame: np.ndarray) -> None:
        seen.append(frame)
        if len(seen) == 4:
            raise KeyboardInterrupt
        write(self, frame)

    monkeypatch.setattr(VideoEncoder, "write", interrupted)
    out = writer(tmp_path, chunks_per_segment=1)
    with pytest.raises(KeyboardInterrupt):
        out.write_chunk(0, chunk(0))
    state = out.abort()
    assert (state.playlist, state.num_frames, state.next_chunk) == (None, 0, 0)
    assert list(tmp_path.iterdir()) == []


def test_resume_refuses_other_settings(tmp_path: Path) -> None:
    out = writer(tmp_path)
    for index in range(4):
        out.write_chunk(index, chunk(index))
    with pytest.raises(ConfigError, match="written with chunks_per_segment=2"):
        writer(tmp_path, resume=True, chunks_per_segment=3)
    with pytest.raises(ConfigError, match="48x32 at 24 fps, this run makes 48x32 at 25 fps"):
        SegmentWriter(tmp_path / "out.mp4", 25, HEIGHT, WIDTH, 2, resume=True)


@pytest.mark.parametrize(("height", "width", "named"), [(33, 48, "height=33.*32 or 34"), (32, 1, "width=1.*: 2")])
def test_odd_sizes_are_refused(tmp_path: Path, height: int, width: int, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        SegmentWriter(tmp_path / "out.mp4", RATE, height, width)
    with pytest.raises(ConfigError, match=r"must end in \.mp4"):
        SegmentWriter(tmp_path / "out.webm", RATE, 32, 32)


def test_metadata_is_in_the_comment(tmp_path: Path) -> None:
    out = writer(tmp_path)
    out.write_chunk(0, chunk(0))
    out.finish(metadata={"prompt": "a red three, drifting ü", "seed": 7})
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert json.loads(container.metadata["comment"]) == {"prompt": "a red three, drifting ü", "seed": 7}


def test_memory_does_not_grow_with_the_length(tmp_path: Path) -> None:
    frames = (
        np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3), dtype=np.uint8).repeat(16, axis=1).repeat(16, axis=2)
    )
    out = SegmentWriter(tmp_path / "out.mp4", RATE, 128, 128, 4, EncoderOptions(preset="ultrafast"))

    def resident_after(first: int, last: int) -> int:
        for index in range(first, last):
            out.write_chunk(index, frames)
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    early = resident_after(0, 20)
    late = resident_after(20, 80)
    # Had the 60 later chunks been kept, it would be 24 MB more.
    assert late - early < 6 * 2**20


def test_equal_frames_give_equal_packets(tmp_path: Path) -> None:
    """At a width of 3 macroblocks, where libx264's default settings read memory that nobody wrote."""

    def encoded() -> list[bytes]:
        encoder = VideoEncoder(tmp_path / "a.mp4", Fraction(RATE), HEIGHT, WIDTH, EncoderOptions())
        for frame in frames:
            encoder.write(frame)
        encoder.close()
        return packets(tmp_path / "a.mp4")

    frames = frames_of(2)
    random = np.random.default_rng(0)
    first = encoded()
    for _ in range(40):
        # All ones is NaN for a reader that takes freed memory for floats.
        scratch: list = [np.full(size, 255, dtype=np.uint8) for size in random.integers(16, 120_000, 300)]
        for position in random.permutation(300):
            scratch[position] = None
        assert encoded() == first


def test_a_remote_store(tmp_path: Path) -> None:
    import fsspec

    target = "memory://videos/out.mp4"
    out = SegmentWriter(target, RATE, HEIGHT, WIDTH, 2)
    for index in range(3):
        out.write_chunk(index, chunk(index))
    out.finish(20)
    store = fsspec.filesystem("memory")
    assert store.find("/videos") == ["/videos/out.mp4"]
    close_to(read_clip(target), frames_of(3)[:20])
    store.rm("/videos", recursive=True)


def test_the_input_is_a_segment_of_its_own_in_front(tmp_path: Path) -> None:
    before = chunk(7)
    out = writer(tmp_path)
    assert out.write_input(before)
    assert not out.write_input(before)
    for index in range(3):
        out.write_chunk(index, chunk(index))
    names = ["input.mp4", "playlist.ffconcat", "segment-000000-000001.mp4"]
    assert sorted(path.name for path in Path(out.parts).glob("[a-z]*")) == names
    assert out.num_frames == 8 + 5 + 8 + 8
    again = writer(tmp_path, resume=True)
    assert (again.next_chunk, again.num_frames) == (2, 8 + 5 + 8)
    assert not again.write_input(before)
    again.write_chunk(2, chunk(2))
    assert again.finish() == 29
    close_to(read_clip(tmp_path / "out.mp4"), np.concatenate([before, frames_of(3)]))


def test_an_input_that_is_gone_is_written_again(tmp_path: Path) -> None:
    out = writer(tmp_path)
    out.write_input(chunk(7))
    for index in range(2):
        out.write_chunk(index, chunk(index))
    (Path(out.parts) / "input.mp4").unlink()
    again = writer(tmp_path, resume=True)
    assert again.next_chunk == 2
    assert again.write_input(chunk(7)) and not again.write_input(chunk(7))
    again.write_chunk(2, chunk(2))
    assert again.finish() == 29
    close_to(read_clip(tmp_path / "out.mp4"), np.concatenate([chunk(7), frames_of(3)]))


def test_resume_and_removal_touch_only_what_is_the_writers_own(tmp_path: Path) -> None:
    out = writer(tmp_path)
    for index in range(3):
        out.write_chunk(index, chunk(index))
    parts = Path(out.parts)
    foreign = {"state.safetensors", "notes.txt", "segment-000000-000001.mp4.bak", ".notes.txt.0123abcd.tmp"}
    for name in foreign:
        (parts / name).write_text("mine")
    (parts / "segment-000002-000002.mp4").write_text("partial")
    again = writer(tmp_path, resume=True)
    own = {"segment-000000-000001.mp4", "playlist.ffconcat"}
    assert {path.name for path in parts.iterdir()} == own | foreign
    again.write_chunk(2, chunk(2))
    assert again.finish() == len(frames_of(3))
    assert {path.name for path in parts.iterdir()} == foreign
    assert writer(tmp_path, overwrite=True).next_chunk == 0
    assert {path.name for path in parts.iterdir()} == foreign


def test_a_shorter_last_segment_is_kept_when_the_video_ends_with_it(tmp_path: Path) -> None:
    out = writer(tmp_path)
    for index in range(3):
        out.write_chunk(index, chunk(index))
    out.close()
    again = writer(tmp_path, resume=True, num_chunks=3)
    assert (again.next_chunk, again.closed_chunks) == (3, 3)
    assert again.finish() == len(frames_of(3))
