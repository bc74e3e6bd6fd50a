"""Cuts, rates and exact reading of clips, on generated and on real videos."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from videos import numbered, numbers, shipped_videos, shots, write_video

from pavdm_dist.codecs.base import CodecSpec
from pavdm_dist.data import clips as clips_module
from pavdm_dist.data.buckets import Bucket, parse_buckets
from pavdm_dist.data.clips import ClipRef, Scan, plan_clips, read_frames, scan_video
from pavdm_dist.data.shards import write_shard
from pavdm_dist.errors import ConfigError, MediaError

SPEC = CodecSpec(16, 8)


def planned(path: Path, *buckets: str, scene_cuts: bool = True) -> tuple[list[Bucket], list[tuple[int, ClipRef]], int]:
    shapes = parse_buckets(buckets, 24, SPEC)
    clips, short = plan_clips("v", "a video", scan_video(str(path), scene_cuts), shapes, SPEC, upscale=False)
    return shapes, clips, short


def read(path: Path, bucket: Bucket, clip: ClipRef) -> np.ndarray:
    return read_frames(str(path), clip, bucket, bucket.num_frames(SPEC))


def test_cuts_are_found_where_they_are(tmp_path: Path) -> None:
    # The second and the last shot are shorter than any window of a detector.
    path = write_video(tmp_path / "shots.mp4", shots([20, 2, 30, 40, 1]))
    scan = scan_video(str(path), scene_cuts=True)
    assert scan.cuts == [20, 22, 52, 92]
    assert (scan.sizes, len(scan.times), scan.end) == ([(0, 64, 96)], 93, Fraction(93, 24))


def test_no_clip_crosses_a_cut_and_no_frame_is_in_two(tmp_path: Path) -> None:
    frames = shots([20, 31, 6, 40])
    path = write_video(tmp_path / "shots.mp4", frames)
    shapes, clips, short = planned(path, "64x96x4@24", "64x96x2@24")
    assert [(bucket, clip.first, clip.frames, clip.scene) for bucket, clip in clips] == [
        (0, 0, 13, (0, 20)), (1, 13, 5, (0, 20)),
        (0, 20, 13, (20, 51)), (0, 33, 13, (20, 51)), (1, 46, 5, (20, 51)),
        (1, 51, 5, (51, 57)),
        (0, 57, 13, (57, 97)), (0, 70, 13, (57, 97)), (0, 83, 13, (57, 97)),
    ]  # fmt: skip
    assert short == 0
    for bucket, clip in clips:
        found = read(path, shapes[bucket], clip).astype(int)
        assert np.abs(found - frames[clip.first]).mean() < 6, "all of one shot"
    _, whole, _ = planned(path, "64x96x4@24", scene_cuts=False)
    assert [clip.first for _, clip in whole] == [0, 13, 26, 39, 52, 65, 78]


def test_real_cuts_and_short_scenes() -> None:
    path = shipped_videos()["bikes"]
    assert scan_video(str(path), scene_cuts=True).cuts == [30, 76, 137, 187, 242]
    shapes, clips, short = planned(path, "128x304x9@24")
    assert [clip.scene for _, clip in clips] == [(30, 76), (76, 137), (137, 187), (187, 242)]
    assert short == 2
    for _, clip in clips:
        assert clip.scene[0] <= clip.first and clip.first + clip.frames <= clip.scene[1]
        assert clip.frames == 34, "33 frames at 24 fps last as long as 34 at 25"
    assert read(path, shapes[0], clips[0][1]).shape == (33, 128, 304, 3)


def test_real_videos_read_the_same_by_jump_and_from_the_beginning() -> None:
    for name in ("carphone_pristine", "bikes"):
        path = str(shipped_videos()[name])
        shapes, clips, _ = planned(Path(path), "128x144x3@12")
        for bucket, clip in clips[1:]:
            jumped = clips_module._read(path, clip, shapes[bucket], 9, seek=clip.start)
            assert np.array_equal(jumped, clips_module._read(path, clip, shapes[bucket], 9, seek=None))


@pytest.mark.parametrize(
    ("source_fps", "fps", "expected"),
    [
        (24, 24, list(range(17))),
        (48, 24, list(range(0, 34, 2))),
        (12, 24, [i // 2 for i in range(17)]),  # halfway between two frames the earlier one counts
        (30, 24, [0, 1, 2, 4, 5, 6, 7, 9, 10, 11, 12, 14, 15, 16, 17, 19, 20]),
        (25, 8, [0, 3, 6, 9, 12, 16, 19, 22, 25, 28, 31, 34, 37, 41, 44, 47, 50]),
    ],
)
def test_rates_are_converted_by_time(tmp_path: Path, source_fps: float, fps: float, expected: list[int]) -> None:
    path = write_video(tmp_path / "n.mp4", numbered(60), source_fps)
    shapes, clips, _ = planned(path, f"64x96x5@{fps}")
    found = read(path, shapes[0], clips[0][1])
    assert numbers(found) == expected
    if len(clips) > 1:
        second = numbers(read(path, shapes[0], clips[1][1]))
        assert second[0] == expected[-1] + 1
        assert np.array_equal(np.diff(second), np.diff(expected))


def test_a_variable_rate_is_followed_by_its_timestamps(tmp_path: Path) -> None:
    # 10 frames every 20 ms, then 10 every 100 ms.
    times = [*range(0, 200, 20), *range(200, 1200, 100)]
    path = write_video(tmp_path / "v.mp4", numbered(20), 50, times)
    shapes, clips, _ = planned(path, "64x96x3@10", scene_cuts=False)
    assert numbers(read(path, shapes[0], clips[0][1])) == [0, 5, 10, 11, 12, 13, 14, 15, 16]


def test_pictures_are_scaled_to_cover_and_cut_to_the_centre(tmp_path: Path) -> None:
    frames = np.zeros((9, 96, 192, 3), np.uint8)
    frames[:, :, 48:144] = 200  # exactly what a square crop keeps
    path = write_video(tmp_path / "wide.mp4", frames)
    shapes, clips, _ = planned(path, "48x48x3@24", scene_cuts=False)
    inner = read(path, shapes[0], clips[0][1])[:, :, 3:-3]
    assert np.abs(inner.astype(int) - 200).max() <= 8
    fine = np.zeros((9, 96, 96, 3), np.uint8)
    fine[:, :, ::2] = 240  # stripes finer than the bucket can show must not alias
    path = write_video(tmp_path / "fine.mp4", fine)
    shapes, clips, _ = planned(path, "32x32x3@24", scene_cuts=False)
    assert np.abs(read(path, shapes[0], clips[0][1])[:, 4:-4, 4:-4].astype(int) - 120).max() <= 16


def test_small_and_short_videos_give_no_clip(tmp_path: Path) -> None:
    path = write_video(tmp_path / "n.mp4", numbered(10))
    assert planned(path, "64x96x4@24")[1:] == ([], 1)
    assert planned(path, "128x96x2@24")[1:] == ([], 1)
    scan = scan_video(str(path), False)
    clips, _ = plan_clips("v", "", scan, parse_buckets(["128x96x2@24"], 24, SPEC), SPEC, upscale=True)
    assert len(clips) == 2


def test_a_replaced_video_is_noticed(tmp_path: Path) -> None:
    path = write_video(tmp_path / "n.mp4", numbered(40))
    shapes, clips, _ = planned(path, "64x96x3@24")
    write_video(path, numbered(40), 30)
    with pytest.raises(MediaError, match=r"n\.mp4 is not the video that was scanned: frames 9 to 18"):
        read(path, shapes[0], clips[1][1])
    write_video(path, numbered(12))
    with pytest.raises(MediaError, match="is not the video that was scanned"):
        read(path, shapes[0], clips[1][1])


def test_clips_go_through_json_exactly() -> None:
    clip = ClipRef("a.mp4", "Ü", 3, 9, Fraction(1001, 30000), Fraction(1, 3), (0, 40))
    assert ClipRef.from_json(clip.as_json()) == clip
    assert clip.id == "a.mp4#3"


def test_a_missing_detector_is_named_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "scenedetect", None)
    with pytest.raises(ConfigError, match=r"pip install 'pavdm-dist\[data\]' \(or set scene_cuts=false"):
        scan_video(str(write_video(tmp_path / "n.mp4", numbered(3))), scene_cuts=True)


def test_the_last_frame_of_a_variable_rate_is_as_long_as_it_says(tmp_path: Path) -> None:
    """A screen recording: a frame every two seconds, then a second at 25 frames per second."""
    times = [2000 * i for i in range(20)] + [40_000 + 40 * i for i in range(25)]
    path = write_video(tmp_path / "screen.mp4", numbered(45), 25, times)
    scan = scan_video(str(path), scene_cuts=False)
    assert scan.end == Fraction(41)
    shapes, clips, _ = planned(path, "64x96x5@24", scene_cuts=False)
    last = numbers(read(path, shapes[0], clips[-1][1]))
    assert max(last.count(number) for number in last) <= 2, "no frame is held longer than it was shown"


def test_time_that_runs_backwards_is_said(tmp_path: Path) -> None:
    path = tmp_path / "joined.ts"
    packets = bytearray()
    for number in range(2):
        packets += write_video(tmp_path / f"{number}.ts", numbered(30, start=10 * number), 24).read_bytes()
    counters: dict[int, int] = {}
    for at in range(0, len(packets), 188):  # counted on, as a recorder that joins them would
        stream = packets[at + 1] % 32 * 256 + packets[at + 2]
        counters[stream] = (counters.get(stream, -1) + bool(packets[at + 3] & 16)) % 16
        packets[at + 3] = packets[at + 3] & 0xF0 | counters[stream]
    path.write_bytes(packets)
    with pytest.raises(MediaError, match=r"joined\.ts: time runs backwards at frame 30, from .* s to .* s"):
        scan_video(str(path), scene_cuts=False)


def test_transport_streams_are_read_by_jumping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "long.ts", numbered(78).repeat(4, axis=0), 24)
    shapes, clips, _ = planned(path, "64x96x3@24", scene_cuts=False)
    seeks: list[Fraction | None] = []
    whole = clips_module._read

    def counted(location: str, clip: ClipRef, bucket: Bucket, frames: int, seek: Fraction | None) -> np.ndarray:
        found = whole(location, clip, bucket, frames, seek)
        seeks.append(seek)
        return found

    monkeypatch.setattr(clips_module, "_read", counted)
    for bucket, clip in clips:
        jumped = read(path, shapes[bucket], clip)
        np.testing.assert_array_equal(jumped, whole(str(path), clip, shapes[bucket], 9, None))
    assert None not in seeks[6:], "behind the first seconds nothing is read from the beginning"


def with_sound(path: Path, frames: np.ndarray, fps: int) -> Path:
    """As a web server has it: AAC beside the pictures, the index in front."""
    import av

    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        video = container.add_stream("libx264", rate=fps, options={"crf": "18", "g": "12", "threads": "1"})
        video.height, video.width, video.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        audio = container.add_stream("aac", rate=44100, layout="mono")
        noise = np.random.default_rng(0).normal(0, 0.2, (1, 44100 // fps)).astype(np.float32)
        for index, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            picture.pts = index
            container.mux(video.encode(picture))
            sound = av.AudioFrame.from_ndarray(noise, format="fltp", layout="mono")
            sound.sample_rate, sound.pts = 44100, index * noise.shape[1]
            container.mux(audio.encode(sound))
        container.mux(video.encode(None))
        container.mux(audio.encode(None))
    return path


def test_a_download_that_broke_off_is_found_also_with_sound(tmp_path: Path) -> None:
    whole = with_sound(tmp_path / "whole.mp4", shots([60, 60]), 24)
    assert len(scan_video(str(whole), scene_cuts=False).times) == 120
    content = whole.read_bytes()
    for percent in (40, 55, 70, 80):
        broken = tmp_path / f"{percent}.mp4"
        broken.write_bytes(content[: len(content) * percent // 100])
        with pytest.raises(MediaError, match="truncated"):
            scan_video(str(broken), scene_cuts=False)


def test_a_recording_that_starts_late_is_whole(tmp_path: Path) -> None:
    path = write_video(tmp_path / "late.mkv", numbered(30), 25, [2000 + 40 * i for i in range(30)])
    assert len(scan_video(str(path), scene_cuts=False).times) == 30


def test_a_picture_that_changes_its_shape_is_a_cut_or_none_but_no_fault() -> None:
    import av

    from pavdm_dist.data.cuts import CutFinder

    finder = CutFinder()
    for height, width in [(64, 96)] * 8 + [(96, 64)] * 8:
        frame = np.full((height, width, 3), 90 if height == 64 else 200, np.uint8)
        finder.add(av.VideoFrame.from_ndarray(frame, format="rgb24"))
    assert finder.cuts() in ([], [8])


def test_pictures_that_are_refreshed_bit_by_bit_are_whole_behind_a_jump(tmp_path: Path) -> None:
    import av

    path, frames = tmp_path / "refresh.mp4", shots([160], 128, 192).copy()
    frames += np.arange(160, dtype=np.uint8)[:, None, None, None]
    with av.open(str(path), "w") as container:
        options = {"crf": "10", "threads": "1", "x264-params": "intra-refresh=1:keyint=30:bframes=0"}
        stream = container.add_stream("libx264", rate=24, options=options)
        stream.height, stream.width, stream.pix_fmt = 128, 192, "yuv420p"
        for index, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts = index
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    shapes, clips, _ = planned(path, "128x192x3@24", scene_cuts=False)
    assert len(clips) > 10
    for bucket, clip in clips:
        expected = clips_module._read(str(path), clip, shapes[bucket], 9, seek=None)
        np.testing.assert_array_equal(read(path, shapes[bucket], clip), expected)


@pytest.mark.parametrize("frames_before", [112, 100, 115, 1])
def test_no_clip_is_made_of_a_frame_that_stands_still(tmp_path: Path, frames_before: int) -> None:
    """A camera that was paused for an hour: what is before it and what is behind it are two shots of one scene."""
    times = [42 * i + 3_600_000 * (i >= frames_before) for i in range(frames_before + 60)]
    path = write_video(tmp_path / "gap.mkv", numbered(80).repeat(3, axis=0)[: len(times)], 24, times)
    shapes, clips, short = planned(path, "64x96x10@24", "64x96x1@24", scene_cuts=False)
    assert short == 0
    for bucket, clip in clips:
        assert bucket == 1 or clip.frames >= 36
        assert not clip.first < frames_before < clip.first + clip.frames
        assert read(path, shapes[bucket], clip).shape[0] == (37, 1)[bucket]
    assert sum(clip.frames for _, clip in clips) == len(times), "every frame is in a clip"


def test_a_last_frame_that_is_shown_for_long_is_not_held(tmp_path: Path) -> None:
    path = write_video(tmp_path / "credits.mp4", numbered(20), 24)
    scan = scan_video(str(path), scene_cuts=False)
    held = Scan(scan.sizes, scan.times, scan.end + 60, scan.cuts)
    buckets = parse_buckets(["64x96x3@24"], 24, SPEC)
    plans = [plan_clips("v", "", one, buckets, SPEC, upscale=False) for one in (held, scan)]
    assert plans[0] == plans[1] and len(plans[0][0]) == 2


def test_every_scene_has_the_buckets_of_its_own_size(tmp_path: Path) -> None:
    """As calls record themselves, small until the network is known; nothing is enlarged, and no clip has two sizes."""
    parts = [write_video(tmp_path / f"{n}.h264", numbered(30, 64 * n, 96 * n, 30 * (n - 1)), 25) for n in (1, 2)]
    path = tmp_path / "call.h264"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    scan = scan_video(str(path), scene_cuts=False)
    assert scan.sizes == [(0, 64, 96), (30, 128, 192)] and scan.cuts == [30] and len(scan.times) == 60
    assert [scan.size(frame) for frame in (0, 29, 30, 59)] == [(64, 96)] * 2 + [(128, 192)] * 2
    large, both = ["128x192x3@25"], ["128x192x3@25", "64x96x3@25"]
    for names, wanted in (
        (large, [(0, 30), (0, 39), (0, 48)]),
        (both, [(1, 0), (1, 9), (1, 18), (0, 30), (0, 39), (0, 48)]),
    ):
        shapes = parse_buckets(names, 25, SPEC)
        clips, short = plan_clips("v", "", scan, shapes, SPEC, upscale=False)
        assert [(bucket, clip.first) for bucket, clip in clips] == wanted and short == (names is large)
        for bucket, clip in clips:
            assert numbers(read(path, shapes[bucket], clip)) == list(range(clip.first, clip.first + 9))


def test_a_slow_bucket_takes_what_a_fast_one_leaves(tmp_path: Path) -> None:
    """A picture every two seconds: a film at half a frame per second, single pictures at 24."""
    path = write_video(tmp_path / "slow.mp4", numbered(20), 0.5)
    _, clips, _ = planned(path, "64x96x3@24", "64x96x3@0.5", scene_cuts=False)
    assert [(bucket, clip.first, clip.frames) for bucket, clip in clips] == [(1, 0, 9), (1, 9, 9)]
    assert planned(path, "64x96x3@24", scene_cuts=False)[1:] == ([], 1)


def test_what_lies_before_a_fault_can_be_taken(tmp_path: Path) -> None:
    """A transport stream with a packet that was lost on the way."""
    whole = write_video(tmp_path / "whole.ts", shots([48, 48]), 24).read_bytes()
    packets = [whole[at : at + 188] for at in range(0, len(whole), 188)]
    path = tmp_path / "lost.ts"
    path.write_bytes(b"".join(packets[: len(packets) * 3 // 4] + packets[len(packets) * 3 // 4 + 1 :]))
    with pytest.raises(MediaError, match="corrupt or truncated after frame") as refused:
        scan_video(str(path), scene_cuts=True)
    scan = scan_video(str(path), scene_cuts=True, cut=True)
    assert scan.fault == str(refused.value) and 48 < len(scan.times) < 96 and scan.cuts == [48]
    shapes = parse_buckets(["64x96x3@24"], 24, SPEC)
    clips, _ = plan_clips("v", "", scan, shapes, SPEC, upscale=False)
    assert len(clips) > 5
    for _, clip in clips:
        np.testing.assert_array_equal(read(path, shapes[0], clip), read(tmp_path / "whole.ts", shapes[0], clip))
    (tmp_path / "none.mp4").write_bytes(b"nothing")
    with pytest.raises(MediaError, match="not a video"):
        scan_video(str(tmp_path / "none.mp4"), scene_cuts=False, cut=True)


@pytest.mark.parametrize(("latent", "word", "said"), [(1e6, 1.0, "latents"), (1.0, float("nan"), "text")])
def test_numbers_that_are_none_reach_no_shard(tmp_path: Path, latent: float, word: float, said: str) -> None:
    """Too large for float16 is infinite there."""
    clips = [ClipRef(name, "a three", 0, 5, Fraction(0), Fraction(1, 24), (0, 5)) for name in ("a.mp4", "b.mp4")]
    latents = [torch.ones(4, 2, 2, 3), torch.full((4, 2, 2, 3), latent)]
    texts = [torch.ones(1, 3), torch.full((2, 3), word)]
    with pytest.raises(MediaError, match=f"b.mp4: its {said} cannot be held in float16: the model is damaged"):
        write_shard(tmp_path / "s.safetensors", latents, texts, clips, {})
    assert not list(tmp_path.iterdir())
