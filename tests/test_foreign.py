"""Files of other people beside ours: never replaced and never removed, whatever flags are given."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import tiny_checkpoint
from interrupting import interrupted, render
from PIL import Image
from safetensors.torch import save_file

from pavdm_dist import cli
from pavdm_dist.errors import ConfigError
from pavdm_dist.io.latents import read_latents

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


def lora(path: Path) -> bytes:
    save_file({"lora_A": torch.ones(2)}, path, {"format": "pt"})
    return path.read_bytes()


def test_latents_replace_latents_only(model: Path, tmp_path: Path) -> None:
    output, file = tmp_path / "shot01.mp4", tmp_path / "shot01.safetensors"
    for content in (b"somebody's LoRA", b"", lora(file)):
        file.write_bytes(content)
        for overwrite in (False, True):
            with pytest.raises(ConfigError, match=r"shot01.safetensors exists, .* is none of this program"):
                render(model, output, overwrite, save_latents=True)
        assert file.read_bytes() == content and [path.name for path in tmp_path.iterdir()] == [file.name]
    # Without latents it is in nobody's way.
    render(model, output)
    assert file.read_bytes() == content
    file.unlink()
    render(model, output, overwrite=True, save_latents=True)
    before = read_latents(file)
    render(model, output, overwrite=True, save_latents=True, seed=1)
    assert not torch.equal(before, read_latents(file))


def test_a_file_that_appears_while_a_video_is_made_stays(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "v.mp4"
    interrupted(model, output, monkeypatch, 2, save_latents=True)
    content = lora(tmp_path / "v.safetensors")
    with pytest.raises(ConfigError, match=r"v.safetensors exists, .* is none of this program"):
        render(model, output, save_latents=True)
    assert (tmp_path / "v.safetensors").read_bytes() == content
    (tmp_path / "v.safetensors").unlink()
    (made,) = render(model, output, save_latents=True)
    assert made["num_frames"] == 21


@pytest.mark.parametrize("words", [["plan", "cluster.devices=1", "cluster.chart="], ["simulate", "chunks=4", "chart="]])
def test_a_chart_replaces_charts_only(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    chart = tmp_path / "holiday.png"
    command = [*words[:-1], f"{words[-1]}{chart}", *([f"model={model}"] if words[0] == "plan" else [])]
    Image.new("RGB", (4, 4), "red").save(chart)
    for content in (chart.read_bytes(), b"notes"):
        chart.write_bytes(content)
        assert cli.main(command) == 2
        assert f"{words[-1]}{chart} exists and is no chart of this program" in capsys.readouterr().err
        assert chart.read_bytes() == content
    chart.unlink()
    assert [cli.main(command) for _ in range(2)] == [0, 0]


def test_a_clip_is_not_replaced_by_what_is_made_of_it(model: Path, tmp_path: Path) -> None:
    (made,) = render(model, tmp_path / "clip.mp4", num_frames=45)
    content = (tmp_path / "clip.mp4").read_bytes()
    (tmp_path / "link.mp4").symlink_to(tmp_path / "clip.mp4")
    for video in ("clip.mp4", "link.mp4"):
        with pytest.raises(ConfigError, match=rf"output=.*clip.mp4 would replace video=.*{video}; choose another name"):
            render(model, tmp_path / "clip.mp4", True, video=str(tmp_path / video), start="chunk")
    parts = tmp_path / "o.mp4.parts"
    parts.mkdir()
    (parts / "playlist.ffconcat").write_text("ffconcat version 1.0\n")
    with pytest.raises(ConfigError, match="would replace video="):
        render(model, tmp_path / "o.mp4", True, video=str(parts / "playlist.ffconcat"), start="chunk")
    assert (tmp_path / "clip.mp4").read_bytes() == content and made["num_frames"] == 45
