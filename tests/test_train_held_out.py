"""What is held out of training: clips, and with them all else of their films."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny_checkpoint
from training import TINY
from videos import numbered, write_video

from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.data.buckets import Bucket
from pavdm_dist.data.dataset import CachedClips, PixelClips
from pavdm_dist.data.prepare import PrepareConfig, prepare_command
from pavdm_dist.data.several import SeveralClips
from pavdm_dist.errors import ConfigError
from pavdm_dist.train.prepared import _held_out, _say_counts, video_data
from pavdm_dist.train.train_settings import TrainConfig
from pavdm_dist.values.merging import load_config


class Set:
    """Clips of two buckets, by the films that they are of."""

    def __init__(self, name: str, *films: str, root: str = "") -> None:
        self.identity, self.root, self._films = name, root or f"/{name}", films
        self.buckets = [Bucket.parse(text) for text in ("32x32x8@24", "64x64x8@24")]
        self.counts = [len(one) for one in films]

    def videos(self, bucket: int) -> list[str]:
        return list(self._films[bucket])

    def load(self, bucket: int, indices: Any) -> Any:
        return [f"{self._films[bucket][number]}{number}" for number in indices]


def split(count: int, *sets: Set) -> tuple[list[list[str]], list[list[str]]]:
    """Films of each bucket that are trained on, and held out."""
    clips = SeveralClips(sets)  # type: ignore[arg-type]
    used, held, _ = _held_out(clips, count)
    assert held is not None
    names = [clips.videos(bucket) for bucket in range(2)]
    return tuple(  # type: ignore[return-value]
        [[names[bucket][n][1] for n in part._numbers[bucket]] for bucket in range(2)]  # type: ignore[union-attr]
        for part in (used, held)
    )


def test_nothing_of_a_held_out_film_is_trained_on() -> None:
    assert split(2, Set("one", "abcde", "fgh")) == ([list("abc"), ["f"]], [list("de"), list("gh")])
    # Of d more is left out, in the other bucket, too; what is looked at stays the last two of each.
    assert split(2, Set("one", "aabbddd", "abcd")) == ([list("aabb"), list("ab")], [list("dd"), list("cd")])
    # A bucket that has no more clips than are held out is trained on, but for these films.
    assert split(2, Set("one", "abcd", "ad")) == ([list("ab"), ["a"]], [list("cd"), []])
    # Videos of one name in two sets are two.
    assert split(1, Set("one", "ab", ""), Set("two", "ab", "")) == ([list("aba"), []], [["b"], []])


def test_a_video_that_two_sets_hold_is_one_film() -> None:
    """Whichever bucket it is in; a run of before that left out less does not go on with this split."""
    one, other = Set("one", "abc", "", root="/v"), Set("two", "", "cde", root="/v")
    assert split(1, one, other) == ([list("ab"), ["d"]], [["c"], ["e"]])

    def kind(*sets: Set) -> str:
        return _held_out(SeveralClips(sets), 1)[2]  # type: ignore[arg-type]

    assert kind(one, other) == "places"
    assert kind(Set("one", "abc", "", root="/v"), Set("two", "", "dde", root="/v")) == "clips"
    assert kind(Set("one", "abcc", "", root="/v"), Set("two", "", "de", root="/v")) == "films"
    assert kind(Set("one", "abcc", ""), Set("two", "", "cde")) == "films", "as it was, where nothing has changed"


def test_a_set_tells_where_its_videos_lie(tmp_path: Path) -> None:
    write_video(tmp_path / "v" / "deep" / "a.mp4", numbered(40, 48, 48), 24)
    (tmp_path / "v" / "deep" / "a.txt").write_text("a red three")
    (tmp_path / "w").symlink_to(tmp_path / "v" / "deep")
    model = tiny_checkpoint(tmp_path / "model")
    places = set()
    for number, (source, bucket) in enumerate((("v", "32x32x8@24"), ("w", "32x32x2@24"))):
        output = str(tmp_path / f"set{number}")
        prepare_command(PrepareConfig([str(tmp_path / source)], output, str(model), [bucket], scene_cuts=False))
        for clips in (CachedClips(output), PixelClips(output, Checkpoint.open(model).codec)):
            several = SeveralClips([clips])
            places |= {several.place(video) for video in several.videos(0)}
    assert places == {os.path.realpath(tmp_path / "v" / "deep" / "a.mp4")}


def test_what_is_left_out_is_told(caplog: pytest.LogCaptureFixture) -> None:
    for films, warned in (("s" * 5 + "l" * 500, True), ("s" * 400 + "l" * 20, False), ("abcdefghijkl", False)):
        caplog.clear()
        clips = SeveralClips([Set("one", films, "x")])  # type: ignore[list-item]
        with caplog.at_level("INFO"):
            _say_counts(clips, *_held_out(clips, 8)[:2])
        left = films.count("l") - 8 if "s" in films else 0
        told = f"bucket 32x32x8@24: {len(films) - left - 8} clips are trained on, 8 held out, {left} left out as of"
        assert told in caplog.text and "bucket 64x64x8@24: 1 clips are trained on, 0 held out, 0 left" in caplog.text
        assert (f"leave out {left} of {len(films) - 7} other clips" in caplog.text) == warned


def test_films_that_are_all_held_out_are_said() -> None:
    with pytest.raises(ConfigError, match=r"validation\.clips=2: these clips are of all 1 films.*use fewer, or"):
        split(2, Set("one", "aaaa", ""))


@pytest.mark.parametrize("pixels", [False, True])
def test_clips_of_one_video_are_on_one_side(pixels: bool, tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "model")
    for number, frames in enumerate((70, 70, 40)):
        write_video(tmp_path / "videos" / f"{number}.mp4", numbered(frames, 48, 48), 24)
        (tmp_path / "videos" / f"{number}.txt").write_text("a red three")
    videos, output = str(tmp_path / "videos"), str(tmp_path / "set")
    prepare_command(PrepareConfig([videos], output, str(model), ["32x32x8@24"], scene_cuts=False))
    width = Checkpoint.open(model).shape.spec.text_dim
    words = [*TINY, f"data.folder={output}", f"data.model={model}", f"model.caption_channels={width}"]
    words += ["data.prefetch=0", "validation.clips=2", f"data.pixels={str(pixels).lower()}"]
    batches, _ = video_data(load_config(TrainConfig, None, words))
    assert batches.held_out is not None
    trained, held = (
        {name.split("#")[0] for step in range(4) for name in part.batch(step, 0, 1).ids}
        for part in (batches, batches.held_out)
    )
    assert trained == {"0.mp4"} and held == {"1.mp4", "2.mp4"}
    assert batches.identity["data_set"]["split"] == "films"
