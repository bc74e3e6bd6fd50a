"""What is written: names and texts, rates, files of others, a disk that is full at the end."""

from __future__ import annotations

import os
import re
import resource
import signal
from pathlib import Path

import av

from cases import PROMPT, Running, last_line, model, pavdm, sentence, went_well


def texts_that_no_file_can_hold_are_refused_first(folder: Path) -> None:
    """E1: prompts, settings and names whose bytes are no UTF-8 leave nothing half-done."""
    (folder / "half.yaml").write_text('prompt: "a red three \\ud83d"\n')
    given = [model(folder), "num_frames=9", "output=films/a.mp4"]
    before = sorted(folder.iterdir())
    for words in (
        [b"a red caf\xe9"],
        [PROMPT, b"negative_prompt=caf\xe9"],
        ["half.yaml"],
        [PROMPT, b"output=films/caf\xe9.mp4"],
    ):
        said = sentence(pavdm(folder, "sample", *given, *words))
        assert "not text" in said or "surrogate" in said or "UTF-8" in said, said
        assert sorted(folder.iterdir()) == before


def rates_of_television_are_the_exact_ones(folder: Path) -> None:
    """E2: 29.97 and 23.976 are fractions over 1001."""
    words = ["sample", PROMPT, model(folder), "num_frames=9", "output=video.mp4", "--overwrite"]
    for given, rate in (("29.97", "30000/1001"), ("23.976", "24000/1001"), ("30000/1001", "30000/1001")):
        went_well(pavdm(folder, *words, f"fps={given}"))
        with av.open(str(folder / "video.mp4")) as container:
            assert str(container.streams.video[0].average_rate) == rate


def overwriting_takes_nothing_of_others(folder: Path) -> None:
    """E3: beside the video may lie a .json and a .safetensors of somebody else."""
    foreign = {"shot.json": '{"shot": 1, "frames": [1001, 1120]}', "shot.safetensors": "somebody's weights"}
    for name, text in foreign.items():
        (folder / name).write_text(text)
    words = ["num_frames=9", "output=shot.mp4", "save_latents=true", "--overwrite"]
    ended = pavdm(folder, "sample", PROMPT, model(folder), *words)
    assert {name: (folder / name).read_text() for name in foreign} == foreign
    assert "shot.json" in sentence(ended) and not (folder / "shot.mp4").exists()


def a_join_without_room_is_finished_by_the_same_command(folder: Path) -> None:
    """E5: all frames are there, none is rendered again."""
    words = ["sample", PROMPT, model(folder), "num_frames=197", "chunks_per_segment=1", "output=video.mp4"]

    def quota() -> None:  # segments pass, what is joined of them does not
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))

    first = pavdm(folder, *words, preexec_fn=quota)
    assert first.returncode and "Traceback" not in first.stderr and not (folder / "video.json").exists(), first.stderr
    parts = list((folder / "video.mp4.parts").glob("segment-*.mp4"))
    assert parts and "File too large" in last_line(first), (parts, first.stderr)
    again = went_well(pavdm(folder, *words))
    assert not re.search(r"chunk \d+:", again) and (folder / "video.json").exists(), again
    with av.open(str(folder / "video.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == 197


def an_output_has_one_writer(folder: Path) -> None:
    """H1: booked twice, the second is refused while the first lives, --overwrite or not."""
    tiny = model(folder)
    words = ["sample", PROMPT, tiny, "seed=1", "num_frames=405", "chunks_per_segment=1"]
    with Running(folder, *words, "output=video.mp4", "--overwrite") as first:
        first.until("chunk 1:")
        os.kill(first.process.pid, signal.SIGSTOP)  # it lives, and does not finish before the second has begun
        try:
            for more in ([], ["--overwrite"]):
                second = ["sample", "a blue seven", tiny, "seed=2", "num_frames=405", "output=video.mp4", *more]
                said = sentence(pavdm(folder, *second))
                assert f"is being written by process {first.process.pid}" in said, said
                assert "--overwrite" not in said
        finally:
            os.kill(first.process.pid, signal.SIGCONT)
        went_well(first.end())
    went_well(pavdm(folder, *words, "output=alone.mp4"))
    assert _pictures(folder / "video.mp4") == _pictures(folder / "alone.mp4")


def _pictures(path: Path) -> list[bytes]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24").tobytes() for frame in container.decode(video=0)]
