"""Commands that were stopped, and batches of which one video fails."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import av

from cases import PROMPT, Running, model, pavdm, sentence, went_well

FOUR = ("a red three", "a blue seven", "a red seven", "a blue three")


def _frames(*paths: Path) -> int:
    count = 0
    for path in paths:
        with av.open(str(path)) as container:
            count += sum(1 for _ in container.decode(video=0))
    return count


def _stamps(folder: Path, pattern: str) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob(pattern)}


def the_same_command_goes_on_after_a_kill(folder: Path) -> None:
    """F9: what was finished is neither rendered again nor thrown away."""
    words = ["sample", PROMPT, model(folder), "num_frames=805", "output=video.mp4"]
    parts = folder / "video.mp4.parts"
    with Running(folder, *words) as first:
        first.until("chunk 20:")
        first.end(signal.SIGKILL)
    finished = _stamps(parts, "segment-*.mp4")
    assert len(finished) >= 3
    with Running(folder, *words, name="again") as again:
        again.until("chunk ")
        os.kill(again.process.pid, signal.SIGSTOP)  # while we look
        kept = _stamps(parts, "segment-*.mp4")
        os.kill(again.process.pid, signal.SIGCONT)
        said = went_well(again.end())
    assert finished.items() <= kept.items()
    went_on = re.search(r"goes on at chunk (\d+)", said)
    assert went_on is not None and int(went_on[1]) >= 18 and "chunk 0:" not in said, said
    assert (folder / "video.json").exists() and _frames(folder / "video.mp4") == 805


def finished_videos_of_a_batch_stay(folder: Path) -> None:
    """H2: started again after a kill, the others are made."""
    (folder / "four.txt").write_text("\n".join(FOUR))
    words = ["sample", "prompts=four.txt", "output=films", model(folder), "num_frames=205"]
    with Running(folder, *words) as first:
        first.until("video 2 chunk")
        first.end(signal.SIGKILL)
    finished = _stamps(folder / "films", "*.json")
    assert len(finished) == 2, finished
    said = went_well(pavdm(folder, *words))
    stamps = _stamps(folder / "films", "*.json")
    assert finished.items() <= stamps.items() and len(stamps) == 4
    assert said.count("is complete already") == 2, said
    assert len(list((folder / "films").glob("*.mp4"))) == 4 and not list((folder / "films").glob("*.parts"))


def _saves_all_frames(folder: Path, number: signal.Signals) -> None:
    with Running(folder, "sample", PROMPT, model(folder), "num_frames=100000", "output=video.mp4") as run:
        run.until("chunk 9:")
        ended = run.end(number)
    said = sentence(ended, 128 + number)
    counted = re.search(r"interrupted: .*?(\d+) .*frames of video\.mp4 are playable in (\S+)", said)
    assert counted is not None, said
    parts = folder / "video.mp4.parts"
    frames = _frames(*parts.glob("segment-*.mp4"))
    assert frames == int(counted[1]) >= 5 + 9 * 8 and not list(parts.glob(".*")), (said, os.listdir(parts))


def a_scheduler_that_ends_a_video_costs_no_frame(folder: Path) -> None:
    """H3: SIGTERM saves, says where, and leaves nothing half-written."""
    _saves_all_frames(folder, signal.SIGTERM)


def a_terminal_that_closes_costs_no_frame(folder: Path) -> None:
    """H3b: SIGHUP, too."""
    _saves_all_frames(folder, signal.SIGHUP)


def one_video_that_fails_costs_no_other(folder: Path) -> None:
    """H5: the rest of the batch is made, the one is named, the status says how many."""
    (folder / "four.txt").write_text("\n".join(FOUR))
    words = ["sample", "prompts=four.txt", "output=films", model(folder), "num_frames=205"]
    # A file where the second video needs a folder, put there after all checks: the first has begun.
    with Running(folder, *words) as run:
        run.until((folder / "films").exists)
        (folder / "films/0001-a-blue-seven-s1.mp4.parts").touch()
        ended = run.end()
    said = sentence(ended, 101)
    assert "0001-a-blue-seven-s1.mp4" in said and "the others are complete" in said, said
    assert sorted(name[:4] for name in _stamps(folder / "films", "*.json")) == ["0000", "0002", "0003"]
    # With two at a time on stages, too.
    (folder / "more").mkdir()
    (folder / "more/0001-a-blue-seven-s1.mp4.parts").touch()
    ended = pavdm(folder, *words, "output=more", "num_stages=1", "streams=2")
    assert "0001-a-blue-seven-s1.mp4" in sentence(ended, 101)
    assert sorted(name[:4] for name in _stamps(folder / "more", "*.json")) == ["0000", "0002", "0003"]
