"""Sets that grow: new videos go into a folder of their own, and training takes several."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import tiny_checkpoint
from videos import numbered, write_video

from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.data.dataset import CachedClips, PixelClips
from pavdm_dist.data.prepare import PrepareConfig, prepare_command
from pavdm_dist.data.several import SeveralClips
from pavdm_dist.errors import ConfigError
from pavdm_dist.train.prepared import video_data
from pavdm_dist.train.train_settings import TrainConfig
from pavdm_dist.values.merging import load_config, to_yaml


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory, model: Path) -> tuple[PrepareConfig, PrepareConfig]:
    """A set of one video, and one of what came later, with a bucket more."""
    root = tmp_path_factory.mktemp("grown")
    write_video(root / "v" / "b.mp4", numbered(20))
    first = PrepareConfig(
        [str(root / "v")], str(root / "p"), str(model), ["32x48x3@24"], captions="stem", shard_clips=2
    )
    prepare_command(first)
    write_video(root / "v" / "a.mp4", numbered(30, start=20))
    second = replace(first, output=str(root / "q"), besides=[first.output], buckets=["32x48x1@24", "32x48x3@24"])
    return first, second


def test_new_videos_are_told_where_to_go(grown: tuple[PrepareConfig, PrepareConfig]) -> None:
    first, second = grown
    with pytest.raises(
        ConfigError, match=r"made with fewer videos \(a\.mp4 is new, 1 such\): the new ones go into a fo"
    ):
        prepare_command(first)
    report = prepare_command(second)
    assert (report["videos"], report["clips"]) == (1, {"32x48x1@24": 3, "32x48x3@24": 3})
    with pytest.raises(ConfigError, match=r"besides=.*: all 2 videos are in there, none is new"):
        prepare_command(replace(second, besides=[first.output, second.output], output=second.output + "2"))
    with pytest.raises(ConfigError, match="besides=nowhere holds no data set: name a folder of"):
        prepare_command(replace(second, besides=["nowhere"]))


def test_a_video_that_was_mended_is_new(tmp_path: Path, model: Path) -> None:
    films = {name: write_video(tmp_path / "v" / f"{name}.mp4", numbered(20)) for name in ("a", "torn", "mute")}
    whole = films["torn"].read_bytes()
    films["torn"].write_bytes(whole[:100])
    for name in ("a", "torn"):
        films[name].with_suffix(".txt").write_text("a three")
    first = PrepareConfig(
        [str(tmp_path / "v")], str(tmp_path / "p"), str(model), ["32x48x3@24"], captions="skip", encode=False
    )
    assert len(prepare_command(first)["skipped"]) == 2
    films["torn"].write_bytes(whole)
    films["mute"].with_suffix(".txt").write_text("a seven")
    second = replace(first, output=str(tmp_path / "q"), besides=[first.output])
    report = prepare_command(second)
    assert (report["videos"], report["skipped"]) == (2, [])
    for damage in (lambda file: file.write_text('{"a.mp4": 1'), Path.unlink):
        damage(tmp_path / "p" / "sizes.json")
        with pytest.raises(ConfigError, match=r"besides=.*: sizes\.json or index\.json.* cannot be read: ") as raised:
            prepare_command(replace(second, output=str(tmp_path / "r")))
        assert "\n" not in str(raised.value)


def test_videos_that_have_moved_since_are_told_of(
    tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a", "b"):
        write_video(tmp_path / "v" / f"{name}.mp4", numbered(20)).with_suffix(".txt").write_text("a three")
    first = PrepareConfig([str(tmp_path / "v")], str(tmp_path / "p"), str(model), ["32x48x3@24"], encode=False)
    prepare_command(first)
    (tmp_path / "v").rename(tmp_path / "w")
    prepare_command(replace(first, source=[str(tmp_path / "w")], output=str(tmp_path / "q"), besides=[first.output]))
    assert f"besides={first.output}: none of its 2 videos is among these; where they have moved since" in caplog.text


def test_several_sets_are_one(grown: tuple[PrepareConfig, PrepareConfig], model: Path) -> None:
    sets = [CachedClips(config.output) for config in grown]
    clips = SeveralClips(sets)
    assert [str(bucket) for bucket in clips.buckets] == ["32x48x3@24", "32x48x1@24"]
    assert clips.counts == [5, 3]
    batch = clips.load(0, [4, 0, 2, 0])
    assert batch.ids == ["a.mp4#18", "b.mp4#0", "a.mp4#0", "b.mp4#0"]
    alone = sets[1].load(1, [2])
    assert torch.equal(batch.latents[0], alone.latents[0]) and batch.captions == ["a", "b", "a", "b"]
    assert batch.text is not None and batch.text_mask is not None and alone.text is not None
    assert torch.equal(batch.text[0][batch.text_mask[0]], alone.text[0])
    assert clips.load(1, [1]).ids == sets[1].load(0, [1]).ids
    pixels = SeveralClips([PixelClips(config.output, Checkpoint.open(model).codec) for config in grown])
    assert pixels.load(0, [4, 0]).text is None and pixels.load(0, [4, 0]).ids == batch.ids[:2]
    assert SeveralClips(sets[:1]).identity == sets[0].identity != clips.identity
    for bucket, indices in ((2, [0]), (0, [5]), (0, [])):
        with pytest.raises(IndexError, match="the buckets hold"):
            clips.load(bucket, indices)
    for wrong, said in (([], r"data\.folder=\[\]"), ([sets[0], sets[0]], "hold the same clips")):
        with pytest.raises(ConfigError, match=said):
            SeveralClips(wrong)


def test_training_takes_several(grown: tuple[PrepareConfig, PrepareConfig], model: Path, tmp_path: Path) -> None:
    folders = ", ".join(config.output for config in grown)
    width = Checkpoint.open(model).shape.spec.text_dim
    words = [
        f"data.model={model}", "data.batch_size=2", f"model.caption_channels={width}", "objective.window_chunks=2",
        "objective.num_inference_steps=2", "objective.latent_chunk_size=1", "data.prefetch=0",
    ]  # fmt: skip
    config = load_config(TrainConfig, None, [*words, f"data.folder=[{folders}]"])
    assert config.data.folder == [one.output for one in grown]
    batches, _ = video_data(config)
    seen = {name for step in range(12) for name in batches.batch(step, 0, 1).ids}
    assert {name.split("#")[0] for name in seen} == {"a.mp4", "b.mp4"}
    one = load_config(TrainConfig, None, [*words, f"data.folder={grown[0].output}"])
    assert one.data.folder == [grown[0].output]
    (tmp_path / "c.yaml").write_text(f"data:\n  folder: {grown[0].output}\n")
    assert load_config(TrainConfig, tmp_path / "c.yaml").data.folder == one.data.folder
    assert "folder: []" in to_yaml(load_config(TrainConfig))
