"""One video's files, and what they are when chunks, disks or earlier files are not as they should be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from recordings import (
    CHUNKS,
    FACTS,
    HEIGHT,
    RATE,
    WIDTH,
    Decoder,
    Sampler,
    Way,
    kill,
    packets,
    result,
    undisturbed_runs,
)
from safetensors.torch import save_file

from pavdm_dist.errors import ConfigError, MediaError
from pavdm_dist.io import latents as latents_file
from pavdm_dist.io import recording
from pavdm_dist.io.latents import LatentsWriter, latents_sha256
from pavdm_dist.io.metadata import is_complete, read_sidecar
from pavdm_dist.io.segments import SegmentWriter

SIDECAR = json.dumps({"versions": {"pavdm_dist": "0.0.1"}})


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], tuple[Any, ...]]:
    return undisturbed_runs(tmp_path_factory)


def test_the_files_are_those_of_the_frames(tmp_path: Path, undisturbed: Callable[[int], tuple[Any, ...]]) -> None:
    following, decode, plain = Sampler(None), Decoder(None), SegmentWriter(tmp_path / "v.mp4", RATE, HEIGHT, WIDTH, 2)
    latents = [next(following).clone() for _ in range(CHUNKS)]
    for index, part in enumerate(latents):
        plain.write_chunk(index, decode(part))
    plain.finish()
    assert undisturbed(2)[:2] == (packets(tmp_path / "v.mp4"), torch.cat(latents, dim=1).numpy().tobytes())


def test_latents_that_are_not_what_was_written_are_told(
    tmp_path: Path, undisturbed: Callable[[int], tuple[Any, ...]], caplog: pytest.LogCaptureFixture
) -> None:
    def flip(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[-3] ^= 1
        path.write_bytes(content)

    damages: list[Callable[[Path], Any]] = [flip, lambda path: path.write_bytes(path.read_bytes()[:-10])]
    damages += [lambda path: path.write_bytes(b""), lambda path: save_file({"latents": torch.zeros(2, 4, 2, 3)}, path)]
    for number, damage in enumerate(damages):
        output, way = tmp_path / str(number) / "v.mp4", Way(2, 1)
        made = way.open(output)
        way.go_on(made, until=5)
        kill(made)
        damaged = Path(f"{output}.parts") / "latents-000002-000003.safetensors"
        damage(damaged)
        caplog.clear()
        again = way.open(output, resume=True)
        assert f"{damaged} is not what was written there" in caplog.text
        assert (again.next_chunk, again.point) == (0, None), "at once, not when all has been sampled"
        way.go_on(again)
        damage(damaged)  # behind this process' back
        with pytest.raises(MediaError, match=r"no longer what was written there|not a readable safetensors"):
            again.finish(FACTS)
        again.abort()
        assert not output.exists() and not is_complete(output)
        last = way.open(output, resume=True)
        assert (last.next_chunk, last.complete) == (0, False)
        way.go_on(last)
        last.finish(FACTS, {"seed": 3})
        assert result(output) == undisturbed(2)


def test_files_that_are_gone_are_made_again(tmp_path: Path, undisturbed: Callable[[int], tuple[Any, ...]]) -> None:
    for name in ("segment-000000-000001.mp4", "segment-000002-000003.mp4", "latents-000002-000003.safetensors"):
        output, way = tmp_path / name / "v.mp4", Way(2, 1)
        made = way.open(output)
        way.go_on(made, until=5)
        kill(made)
        (tmp_path / name / "v.mp4.parts" / name).unlink()
        again = way.open(output, resume=True)
        assert (again.next_chunk, again.point, again.pending) == (0, None, {})
        way.go_on(again)
        again.finish(FACTS, {"seed": 3})
        assert result(output) == undisturbed(2)


def test_abort_leaves_what_can_be_played_and_gone_on_with(
    tmp_path: Path, undisturbed: Callable[[int], tuple[Any, ...]]
) -> None:
    output, way = tmp_path / "v.mp4", Way(2, 1)
    nothing = way.open(output)
    assert nothing.abort() is None
    assert list(tmp_path.iterdir()) == []
    made = way.open(output)
    way.go_on(made, until=5)
    playlist = tmp_path / "v.mp4.parts" / "playlist.ffconcat"
    assert made.abort() == f"37 frames of {output} are playable in {playlist}"
    with av.open(str(playlist), format="concat") as container:
        assert sum(1 for _ in container.decode(video=0)) == 37
    assert not (tmp_path / "v.mp4.parts" / "lock.json").exists()
    again = way.open(output, resume=True)
    assert (again.next_chunk, list(again.pending)) == (5, [4])
    way.go_on(again)
    again.finish(FACTS, {"seed": 3})
    assert result(output) == undisturbed(2)


def test_a_full_disk_at_the_end_leaves_a_video_that_can_be_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Callable[[int], tuple[Any, ...]]
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    output, way = tmp_path / "v.mp4", Way(2, 0)
    made = way.open(output)
    way.go_on(made)
    with monkeypatch.context() as patched:
        patched.setattr(LatentsWriter, "join", full)
        with pytest.raises(OSError, match="No space left"):
            made.finish(FACTS)
        assert "53 frames" in (made.abort() or "")
    again = way.open(output, resume=True)
    assert again.complete
    again.finish(FACTS, {"seed": 3})
    assert result(output) == undisturbed(2)


def test_the_input_stands_in_front_and_counts_for_no_group(
    tmp_path: Path, undisturbed: Callable[[int], tuple[Any, ...]]
) -> None:
    output, way = tmp_path / "v.mp4", Way(2, 1)
    frames = Decoder(None)(next(Sampler(None)))
    made = way.open(output)
    made.write_input(frames)
    way.go_on(made, until=3)
    kill(made)
    again = way.open(output, resume=True)
    assert again.next_chunk == 2
    again.write_input(frames)
    way.go_on(again)
    assert again.finish(FACTS, {"seed": 3}).num_frames == 5 + 53
    assert [packet for _, _, packet in packets(output)[5:]] == [packet for _, _, packet in undisturbed(2)[0]]
    assert read_sidecar(output)["latents_sha256"] == undisturbed(2)[2]


def test_overwrite_starts_anew_and_the_old_sidecar_goes_first(
    tmp_path: Path, undisturbed: Callable[[int], tuple[Any, ...]]
) -> None:
    output, way = tmp_path / "v.mp4", Way(2, 1)
    output.write_bytes(b"an old video")
    for name, sentence in (
        ("v.mp4", "exists; choose another"),
        ("v.json", "its sidecar"),
        ("v.safetensors", "its lat"),
    ):
        if name == "v.safetensors":
            save_file({"latents": torch.zeros(4, 1, 4, 6)}, tmp_path / name, dict(latents_file._METADATA))
        else:
            (tmp_path / name).write_text(SIDECAR)
        for options in ({}, {"resume": True}):
            with pytest.raises(ConfigError, match=f"{sentence}.*--overwrite|is complete"):
                way.open(output, **options)
        (tmp_path / name).unlink()
    assert list(tmp_path.iterdir()) == []
    output.write_bytes(b"an old video")
    (tmp_path / "v.json").write_text(SIDECAR)
    made = way.open(output, overwrite=True)
    assert not is_complete(output) and output.read_bytes() == b"an old video"
    way.go_on(made, until=4)
    kill(made)
    again = way.open(output, resume=True)
    assert again.next_chunk == 4
    kill(again)
    afresh = way.open(output, overwrite=True)
    assert (afresh.next_chunk, afresh.point) == (0, None)
    way.go_on(afresh)
    afresh.finish(FACTS, {"seed": 3})
    assert result(output) == undisturbed(2)


def test_chunks_come_in_order(tmp_path: Path) -> None:
    made = Way().open(tmp_path / "v.mp4")
    latents = next(Sampler(None))
    frames = Decoder(None)(latents)
    with pytest.raises(ValueError, match="cannot be finished: chunk 0 is next"):
        made.finish(FACTS)
    assert made.write(0, frames, latents)
    assert not made.write(0, frames, latents)
    with pytest.raises(ValueError, match="chunk 2 arrived, 1 is next"):
        made.write(2, frames, latents)
    assert made.finish(FACTS).latents_sha256 == latents_sha256(latents)


def test_a_remote_store(tmp_path: Path, undisturbed: Callable[[int], tuple[Any, ...]]) -> None:
    import fsspec

    output, way, store = "memory://recordings/v.mp4", Way(2, 1, recording.SAVE_SECONDS), fsspec.filesystem("memory")
    made = way.open(output)
    way.go_on(made, until=5)
    with pytest.raises(ConfigError, match="is being written"):
        way.open(output, resume=True)
    kill(made)
    again = way.open(output, resume=True)
    assert (again.next_chunk, list(again.pending)) == (5, [4])
    way.go_on(again)
    again.finish(FACTS, {"seed": 3})
    store.get("/recordings/v.json", str(tmp_path / "v.json"))
    store.get("/recordings/v.mp4", str(tmp_path / "v.mp4"))
    store.get("/recordings/v.safetensors", str(tmp_path / "v.safetensors"))
    assert store.find("/recordings") == [f"/recordings/v.{name}" for name in ("json", "mp4", "safetensors")]
    assert result(tmp_path / "v.mp4") == undisturbed(2)
    store.rm("/recordings", recursive=True)
