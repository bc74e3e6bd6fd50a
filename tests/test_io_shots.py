"""The end of a film: found and read at the cost of what is taken; gaps in the timestamps end a shot."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from videos import numbered, numbers, write_video

from pavdm_dist.errors import MediaError
from pavdm_dist.io.reader import VideoReader
from pavdm_dist.io.shots import last_pictures, last_shot, shown_at
from pavdm_dist.io.video import read_clip

RATE = Fraction(24)


def with_gap(path: Path, before: int = 30, behind: int = 20, gap: int = 3_600_000, step: int = 42) -> Path:
    times = [step * i + gap * (i >= before) for i in range(before + behind)]
    return write_video(path, numbered(before + behind), 24, times)


def test_items_nearest_to_instants() -> None:
    frames = [(Fraction(n, 10), n) for n in range(5)]
    assert list(shown_at(iter(frames), [Fraction(n, 20) for n in range(-1, 11)])) == [
        0,
        0,
        0,
        1,
        1,
        2,
        2,
        3,
        3,
        4,
        4,
        4,
    ]


@pytest.mark.parametrize("suffix", ["mkv", "mp4", "ts"])
@pytest.mark.parametrize("fps", [None, 24, 12])
def test_a_clip_does_not_reach_over_a_gap(tmp_path: Path, suffix: str, fps: float | None) -> None:
    path = with_gap(tmp_path / f"gap.{suffix}", gap=5000 if suffix == "ts" else 3_600_000)
    every = 1 if fps != 12 else 2
    first, last = (numbers(read_clip(path, fps=fps, keep=keep)) for keep in ("first", "last"))
    assert first == list(range(0, 30, every))
    assert last == list(range(30, 50, every))
    assert numbers(read_clip(path, num_frames=4, fps=fps, keep="last")) == last[-4:]
    for keep, where in (("first", "before"), ("last", "behind")):
        with pytest.raises(MediaError, match=rf"has \d+ frames.* {where} a gap of \d+\.\d\d s in its timestamps, 99 "):
            read_clip(path, num_frames=99, fps=fps, keep=keep)


def test_a_gap_takes_neither_memory_nor_time(tmp_path: Path) -> None:
    path = with_gap(tmp_path / "gap.mkv", gap=30 * 24 * 3_600_000)
    tracemalloc.start()
    try:
        read_clip(path, fps=24, keep="last")
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()


def test_slow_films_have_no_gaps_at_their_own_rate(tmp_path: Path) -> None:
    """A picture every two seconds is a film at half a frame per second, and stills at 24."""
    path = write_video(tmp_path / "slow.mp4", numbered(12), 0.5)
    for fps in (None, 0.5):
        for keep in ("first", "last"):
            assert numbers(read_clip(path, fps=fps, keep=keep)) == list(range(12))
    assert numbers(read_clip(path, fps=24, keep="last"))[-1] == 11
    assert len(read_clip(path, fps=24, keep="last")) <= 48


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts", "avi"])
@pytest.mark.parametrize("fps", [24, 12, 30, 48])
def test_the_end_is_the_same_however_it_is_found(tmp_path: Path, suffix: str, fps: float) -> None:
    path = write_video(tmp_path / f"long.{suffix}", numbered(79).repeat(4, axis=0), gop=24)
    rate = Fraction(fps)
    whole = last_shot(path, rate)
    jumped = last_shot(path, rate, 17)
    assert (jumped.end, jumped.height, jumped.width) == (whole.end, 64, 96)
    all_of_it = np.stack(list(last_pictures(path, whole, rate, whole.num_frames(rate), None)))
    np.testing.assert_array_equal(np.stack(list(last_pictures(path, jumped, rate, 17, None))), all_of_it[-17:])
    np.testing.assert_array_equal(read_clip(path, num_frames=17, fps=fps, keep="last"), all_of_it[-17:])


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[Fraction]:
    """The times of all frames that are decoded."""
    times: list[Fraction] = []
    frames = VideoReader.frames

    def noted(reader: VideoReader, start: Fraction | None = None) -> Iterator[tuple[Fraction, Any]]:
        for time, frame in frames(reader, start):
            times.append(time)
            yield time, frame

    monkeypatch.setattr(VideoReader, "frames", noted)
    return times


def test_only_the_end_of_a_film_is_decoded(tmp_path: Path, decoded: list[Fraction]) -> None:
    counts = []
    for length in (600, 1800):
        path = write_video(tmp_path / f"{length}.mp4", np.broadcast_to(numbered(1, 16, 16), (length, 16, 16, 3)))
        decoded.clear()
        assert read_clip(path, num_frames=9, fps=24, keep="last").shape == (9, 16, 16, 3)
        counts.append(len(decoded))
    assert counts[0] == counts[1] < 200


@pytest.mark.parametrize("suffix", ["mp4", "ts"])
def test_key_frames_may_be_far_apart(tmp_path: Path, decoded: list[Fraction], suffix: str) -> None:
    """Twice from frame 500 on: x264's own distance. A jump into a transport stream lands behind the place."""
    still = np.broadcast_to(numbered(1, 16, 16), (720, 16, 16, 3))
    path = write_video(tmp_path / f"long.{suffix}", still, gop=250)
    assert read_clip(path, num_frames=9, fps=24, keep="last").shape == (9, 16, 16, 3)
    assert len(decoded) == 2 * 220


def test_a_film_without_times_is_read_from_its_beginning(tmp_path: Path) -> None:
    path = write_video(tmp_path / "raw.h264", numbered(60).repeat(3, axis=0), 25)
    np.testing.assert_array_equal(read_clip(path, num_frames=9, fps=25, keep="last"), read_clip(path)[-9:])


def test_a_lie_about_the_length_is_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.mkv", numbered(79).repeat(4, axis=0))
    expected = read_clip(path, num_frames=9, fps=24, keep="last")
    for lie in (Fraction(10**9), Fraction(5), Fraction(0), None):
        monkeypatch.setattr(VideoReader, "announced_end", property(lambda _, lie=lie: lie))
        np.testing.assert_array_equal(read_clip(path, num_frames=9, fps=24, keep="last"), expected)


def test_a_damaged_end_is_found_by_whoever_reads_the_end(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mkv", numbered(79).repeat(4, axis=0))
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 4])
    with pytest.raises(MediaError, match="is truncated"):
        read_clip(path, num_frames=9, fps=24, keep="last")
