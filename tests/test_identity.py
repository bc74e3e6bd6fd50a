"""What must be equal for a video to be gone on with, and what for a complete one to be left alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import tiny_checkpoint
from interrupting import PROMPT, interrupted, render
from pretrained import named_only, stand_in
from previews import tensors
from safetensors.torch import save_file

from pavdm_dist import cli
from pavdm_dist.codecs.catalog import codec_spec
from pavdm_dist.commands import origin
from pavdm_dist.commands.sample import check_videos
from pavdm_dist.config import SampleConfig
from pavdm_dist.errors import ConfigError
from pavdm_dist.io.differences import changes
from pavdm_dist.io.metadata import read_sidecar, sidecar_path, versions
from pavdm_dist.io.state import read_state, write_state

LATER = ("device", "decoder_device", "decoder_threads")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(
    ("now", "said"),
    [
        ({"threads_per_decoder": 2}, r"decoder_threads=1 \(now 2\);"),
        ({"device": "cuda"}, r'device="cpu" \(now "cuda"\);'),
        ({"decoder": "cuda"}, r'decoder_device="cpu" \(now "cuda"\);'),
        ({}, None),
    ],
)
def test_where_it_is_computed_is_part_of_a_begun_video(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, now: dict[str, object], said: str | None
) -> None:
    """Stages are planned here and not started: nothing of a cluster or a GPU is needed to refuse them."""
    output = tmp_path / "v.mp4"
    settings = {"num_frames": 21, "guidance_scale": 1.0, "dtype": "float32", "compile": "false"}
    interrupted(model, output, monkeypatch, 2, **settings)
    config = SampleConfig(PROMPT, model=str(model), output=str(output), num_stages=2, **(settings | now))  # type: ignore[arg-type]
    if said is None:
        check_videos(config, overwrite=False)  # the number of stages is no part of it
        return
    with pytest.raises(ConfigError, match=rf"was begun with {said}"):
        check_videos(config, overwrite=False)
    _forget_what_came_later(output)
    check_videos(config, overwrite=False)


def test_versions_are_part_of_a_begun_video_and_not_of_a_complete_one(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made, begun = tmp_path / "made.mp4", tmp_path / "begun.mp4"
    render(model, made)
    interrupted(model, begun, monkeypatch, 2)
    stamp = made.stat().st_mtime_ns
    for name in ("diffusers", "torch"):
        with monkeypatch.context() as patched:
            patched.setattr(origin, "versions", lambda changed=name: versions() | {changed: "0.1"})
            with caplog.at_level("INFO"):
                render(model, made)
            assert f"{made} is complete already" in caplog.text and made.stat().st_mtime_ns == stamp
            caplog.clear()
            with pytest.raises(ConfigError, match=rf'begun with versions.{name}="\S+" \(now "0.1"\); give the same'):
                render(model, begun)
    with pytest.raises(ConfigError, match="was made with seed=0"):
        render(model, made, seed=1)
    _forget_what_came_later(begun)
    render(model, begun)
    assert Path(sidecar_path(begun)).exists()


def test_transformers_is_part_of_it_where_it_encodes_prompts(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    stand_in(monkeypatch)
    has = versions() | {"transformers": "4.0"}
    monkeypatch.setattr(origin, "versions", lambda: has)
    output, other = tmp_path / "v.mp4", tmp_path / "other.mp4"
    encodes = named_only(tmp_path / "model")
    interrupted(encodes, output, monkeypatch, 2)
    interrupted(model, other, monkeypatch, 2)
    has = has | {"transformers": "5.0"}
    render(model, other)  # words of its own
    with pytest.raises(ConfigError, match=r'begun with versions.transformers="4.0" \(now "5.0"\)'):
        render(encodes, output)
    has = has | {"transformers": None}  # what was encoded is kept
    render(encodes, output)
    assert "transformers" not in read_sidecar(output)["identity"]["versions"]


def test_a_complete_video_is_left_alone_on_another_kind_of_device(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "v.mp4"
    render(model, output)
    path = Path(sidecar_path(output))
    sidecar = read_sidecar(output)
    assert {name: sidecar["identity"][name] for name in LATER} == {
        "device": "cpu",
        "decoder_device": "cpu",
        "decoder_threads": 1,
    }
    path.write_text(json.dumps(sidecar | {"identity": sidecar["identity"] | {"device": "cuda", "decoder_threads": 8}}))
    stamp = output.stat().st_mtime_ns
    render(model, output)
    assert output.stat().st_mtime_ns == stamp


def test_a_complete_video_is_left_alone_where_what_was_left_to_the_machine_differs(model: Path, tmp_path: Path) -> None:
    """Made on a GPU, asked for again on a CPU; the values that a command names are still asked of it."""
    output = tmp_path / "v.mp4"
    render(model, output)
    path = Path(sidecar_path(output))
    sidecar = read_sidecar(output)
    identity = sidecar["identity"]
    of_gpu = {"dtype": "bfloat16", "compile": True, "sampling": identity["sampling"] | {"chunks_per_unit": 3}}
    assert all(identity[name] != value for name, value in of_gpu.items())
    path.write_text(json.dumps(sidecar | {"identity": identity | of_gpu}))
    stamp = output.stat().st_mtime_ns
    render(model, output)
    assert output.stat().st_mtime_ns == stamp
    for named, said in (
        ({"dtype": "float32"}, r'dtype="bfloat16" \(now "float32"\)'),
        ({"compile": "false"}, r"compile=true \(now false\)"),
        ({"chunks_per_unit": 1}, r"sampling.chunks_per_unit=3 \(now 1\)"),
    ):
        with pytest.raises(ConfigError, match=rf"was made with {said}, and its sidecar"):
            render(model, output, **named)


def test_a_preview_is_known_by_what_its_file_holds(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder alone is enough from anywhere; other weights under the same name are others."""
    weights = tensors(codec_spec(model / "vae"))
    (tmp_path / "here").mkdir()
    save_file(weights, tmp_path / "here" / "tiny.safetensors")
    output = tmp_path / "v.mp4"
    monkeypatch.chdir(tmp_path / "here")
    interrupted(model, output, monkeypatch, 2, preview_decoder="tiny.safetensors")
    monkeypatch.chdir(tmp_path)
    save_file({**weights, "decoder.1.bias": weights["decoder.1.bias"] + 1}, tmp_path / "here" / "other.safetensors")
    with pytest.raises(ConfigError, match=r'begun with preview_sha256="\w+\.\.\. \(now "\w+\.\.\.\)'):
        render(model, output, preview_decoder="here/other.safetensors")
    assert cli.main(["sample", "--resume", f"{output}.parts"]) == 0
    render(model, output, preview_decoder=str(tmp_path / "here" / "tiny.safetensors"))
    with pytest.raises(ConfigError, match=r"was made with preview_decoder"):
        render(model, output, preview_decoder="rgb")
    # Earlier versions kept the path.
    path = output.with_suffix(".json")
    sidecar = read_sidecar(output)
    del sidecar["identity"]["preview_sha256"]
    path.write_text(json.dumps(sidecar | {"identity": sidecar["identity"] | {"preview_decoder": "tiny.safetensors"}}))
    render(model, output, preview_decoder="here/tiny.safetensors")


def _forget_what_came_later(output: Path) -> None:
    """A state as an earlier version wrote it."""
    parts = f"{output}.parts"
    state = read_state(parts)
    assert state is not None
    before = {name: value for name, value in state.identity.items() if name not in LATER}
    before["versions"] = {name: value for name, value in before["versions"].items() if name != "diffusers"}
    vars(state)["identity"] = before
    write_state(parts, state)


def test_a_rate_that_was_kept_as_it_was_written_is_the_one_that_files_have() -> None:
    def facts(fps: float) -> dict[str, object]:
        return {"fps": fps, "sampling": {"fps": fps, "mode": "window"}}

    assert not changes(facts(29.97), facts(30000 / 1001)) and not changes(facts(23.98), facts(23.976))
    assert changes(facts(24), facts(25)) == "fps=24.0 (now 25.0), sampling.fps=24.0 (now 25.0)"
