"""``pavdm eval`` with networks of the user's: VBench's formulas, its pictures, and what is refused; a stand-in for
transformers, so that every run of the tests runs it. With transformers: ``tests/test_evaluate_pretrained.py``."""

from __future__ import annotations

import json
import re
import sys
from importlib.machinery import ModuleSpec
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hub import COMMIT, REPOSITORY, serve
from numpy.typing import NDArray
from resampling import consistency, resampled
from safetensors.torch import save_file
from torch import Tensor, nn

from pavdm_dist.cli import main
from pavdm_dist.errors import CheckpointError, ConfigError
from pavdm_dist.evaluate import measured
from pavdm_dist.evaluate.network_kinds import CLIP_B, DINO, dino_positions, middle, resized
from pavdm_dist.evaluate.network_meter import Aesthetic, Consistency, NetworkMeter
from pavdm_dist.evaluate.networks import Network, open_network
from pavdm_dist.io.reader import open_video
from pavdm_dist.io.video import export_to_video

RNG = np.random.default_rng(0)
WIDTH = 6
CHUNKS = (1, 5, 8, 9)


class StandIn(nn.Module):
    """Gives ``WIDTH`` numbers of a picture's coarse shape, in the form of either network of transformers'."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(hidden_size=WIDTH, projection_dim=WIDTH)
        weight = np.random.default_rng(1).normal(size=(WIDTH, 3 * 16))
        self.weight = nn.Parameter(torch.from_numpy(weight).float())

    def forward(self, pictures: Tensor, interpolate_pos_encoding: bool = False) -> SimpleNamespace:
        assert not self.training and pictures.dtype == torch.float32 and len(pictures) <= 8
        found = nn.functional.adaptive_avg_pool2d(pictures, 4).flatten(1) @ self.weight.T
        if interpolate_pos_encoding:
            return SimpleNamespace(last_hidden_state=torch.stack([found, torch.full_like(found, 9)], 1))
        assert pictures.shape[2] == pictures.shape[3] == 32
        return SimpleNamespace(image_embeds=found)


@pytest.fixture
def transformers(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A stand-in for the library; the options that networks were loaded with."""
    seen: list[dict[str, Any]] = []
    library = ModuleType("transformers")
    library.__spec__ = ModuleSpec("transformers", None)

    def load(folder: str, **options: Any) -> tuple[nn.Module, dict[str, Any]]:
        seen.append(options)
        content = (Path(folder) / "model.safetensors").read_text()
        if content == "torn":
            raise OSError("Unable to load weights\nfrom there")
        model = StandIn()
        model.embeddings = SimpleNamespace(position_embeddings=None)  # type: ignore[assignment]
        return model, {"missing_keys": {content} - {"whole"}}

    kind = SimpleNamespace(from_pretrained=load)
    log = SimpleNamespace(
        get_verbosity=lambda: 30, is_progress_bar_enabled=lambda: True, set_verbosity=lambda level: None,
        set_verbosity_error=lambda: None, disable_progress_bar=lambda: None, enable_progress_bar=lambda: None,
    )  # fmt: skip
    parts = {"ViTModel": kind, "CLIPVisionModelWithProjection": kind, "utils": SimpleNamespace(logging=log)}
    for name, part in parts.items():
        setattr(library, name, part)
    monkeypatch.setitem(sys.modules, "transformers", library)
    return seen


def folder(root: Path, name: str, weights: str | None = "whole", **config: Any) -> Path:
    """Of a network whose pictures have 32 pixels; ``weights`` are those of the stand-in."""
    (root / name).mkdir()
    shape = {"image_size": 32, "patch_size": 8}
    inner = (
        {"model_type": "clip", "vision_config": shape} if name.startswith("clip") else {"model_type": "vit", **shape}
    )
    (root / name / "config.json").write_text(json.dumps(inner | config))
    if weights is not None:
        (root / name / "model.safetensors").write_text(weights)
    return root / name


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """23 frames of 48x84 pixels that change slowly, a cut in them."""
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    rows, columns = np.mgrid[:48, :84] / 48
    waves = [np.sin(4 * rows + k + 0.2 * i * (k + 1)) * np.cos(5 * columns - k) for i in range(23) for k in range(3)]
    frames = (127 + 120 * np.stack(waves).reshape(23, 3, 48, 84).transpose(0, 2, 3, 1)).astype(np.uint8)
    frames[15:] = 255 - frames[15:]
    export_to_video(frames, str(path), 23)
    return path


def frames_of(path: Path) -> list[NDArray[np.uint8]]:
    with open_video(str(path)) as reader:
        return [reader.picture(frame, None) for _, frame in reader.frames()]


class Rows:
    """Features that are given, frame by frame; a frame is its number."""

    def __init__(self, rows: NDArray[np.float64]) -> None:
        self.rows = rows
        self.calls: list[int] = []

    def prepared(self, frame: NDArray[np.uint8]) -> Tensor:
        return torch.tensor(int(frame[0, 0, 0]))

    def __call__(self, pictures: Tensor) -> NDArray[np.float64]:
        self.calls.append(len(pictures))
        return self.rows[pictures.numpy()]


def metered(rows: Rows, score: Any, fps: float = 24.0, rate: float | None = None) -> NetworkMeter:
    """Frames in chunks of ``CHUNKS``."""
    meter, borders = NetworkMeter("name", rows, score, fps, rate), {0, *np.cumsum(CHUNKS).tolist()}
    for number in range(len(rows.rows)):
        meter.add(np.full((2, 2, 3), number, np.uint8), number in borders)
    return meter


# --- formulas --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [(23,), (1, 22), (1,) * 23, (8, 8, 7)])
def test_consistency_in_parts_is_that_of_the_whole(parts: tuple[int, ...]) -> None:
    features, score = RNG.normal(size=(23, WIDTH)), Consistency()
    cuts = np.cumsum((0, *parts))
    found = np.concatenate([score(features[a:b]) for a, b in pairwise(cuts)])
    assert np.isnan(found[0])
    assert found[1:] == pytest.approx(consistency(features), abs=1e-14)
    assert Consistency()(np.array([[1.0, 0], [-1, 0], [0, 1]]))[1:].tolist() == [0, 0]


def test_chunks_and_the_whole_are_means_of_their_frames() -> None:
    rows = Rows(RNG.normal(size=(23, WIDTH)))
    meter, scores = metered(rows, Consistency()), consistency(rows.rows)
    expected = [None, *(float(np.mean(scores[a - 1 : b - 1])) for a, b in ((1, 6), (6, 14), (14, 23)))]
    assert meter.per_chunk() == pytest.approx(expected) and meter.whole() == pytest.approx(np.mean(scores))
    assert rows.calls == [8, 8, 7], "no more at a time, and each frame once"


def test_fewer_frames_are_looked_at_where_that_is_wished() -> None:
    rows = Rows(RNG.normal(size=(23, WIDTH)))
    meter, scores = metered(rows, Consistency(), 24.0, 8.0), consistency(rows.rows[::3])
    assert meter.whole() == pytest.approx(np.mean(scores)) and sum(rows.calls) == 8
    assert meter.per_chunk() == pytest.approx([None, scores[0], np.mean(scores[1:4]), np.mean(scores[4:])])
    all_of_them = Rows(rows.rows)
    assert metered(all_of_them, Consistency(), 24.0, 50.0).whole() == pytest.approx(np.mean(consistency(rows.rows)))
    one = NetworkMeter("name", rows, Consistency(), 24.0, None)
    one.add(np.zeros((2, 2, 3), np.uint8), True)
    assert one.per_chunk() == [None] and one.whole() is None


def test_aesthetic_quality_is_a_sum_of_features_of_length_one() -> None:
    rows, weight = Rows(RNG.normal(size=(23, WIDTH))), RNG.normal(size=WIDTH)
    meter = metered(rows, Aesthetic(weight, 5.0))
    scores = [(row @ weight / np.sqrt((row**2).sum()) + 5) / 10 for row in rows.rows]
    assert meter.whole() == pytest.approx(np.mean(scores))
    means = [float(np.mean(scores[a:b])) for a, b in pairwise((0, *np.cumsum(CHUNKS)))]
    assert meter.per_chunk() == pytest.approx(means)


def test_numbers_that_are_none_are_said() -> None:
    rows = Rows(np.full((23, WIDTH), np.inf))
    with pytest.raises(ConfigError, match="name: the network's features are not finite; dtype=float32"):
        metered(rows, Consistency())


# --- pictures --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "cubic"), [("bilinear", False), ("bicubic", True)])
@pytest.mark.parametrize(
    ("size", "wanted"), [((50, 89), (32, 56)), ((89, 50), (56, 32)), ((20, 31), (32, 49)), ((32, 57), (32, 57))]
)
def test_pictures_are_resized_without_antialiasing(
    mode: str, cubic: bool, size: tuple[int, int], wanted: tuple[int, int]
) -> None:
    picture = RNG.integers(0, 256, (*size, 3), dtype=np.uint8)
    found = resized(torch.from_numpy(picture).permute(2, 0, 1).float(), 32, mode)
    expected = resampled(picture.astype(float), wanted, cubic)
    assert found.permute(1, 2, 0).numpy() == pytest.approx(expected, abs=2e-3)


def test_networks_get_their_own_pictures() -> None:
    picture = RNG.integers(0, 256, (50, 89, 3), dtype=np.uint8)
    for kind, cubic in ((DINO, False), (CLIP_B, True)):
        network = Network(kind, StandIn(), 32, torch.device("cpu"), torch.float32, {})
        expected = (resampled(picture.astype(float), (32, 56), cubic) / 255 - kind.mean) / kind.std
        expected = expected[:, 12:44] if kind is CLIP_B else expected
        assert network.prepared(picture).permute(1, 2, 0).numpy() == pytest.approx(expected, abs=1e-4)
    # Halves are rounded to the even number, as torchvision rounds them.
    assert middle(torch.arange(57.0).expand(3, 32, 57), 32)[0, 0, 0] == 12
    assert middle(torch.arange(59.0).expand(3, 32, 59), 32)[0, 0, 0] == 14


def test_positions_of_other_sizes_are_dinos() -> None:
    positions = RNG.normal(size=(1, 17, WIDTH))
    found = dino_positions(torch.from_numpy(positions).float(), 8, 32, 56)
    grid = resampled(positions[0, 1:].reshape(4, 4, WIDTH), (4, 7), True, (4.1 / 4, 7.1 / 4))
    expected = np.concatenate([positions[:, :1], grid.reshape(1, 28, WIDTH)], 1)
    assert found.numpy() == pytest.approx(expected, abs=1e-5)
    own = torch.from_numpy(positions)
    assert dino_positions(own, 8, 32, 32) is own
    assert dino_positions(own.bfloat16(), 8, 33, 39).shape == (1, 17, WIDTH), "pixels beside the last patch"


# --- the command -----------------------------------------------------------------------------------------

PLAIN = [f"{name}=off" for name in ("motion", "scenes", "features", "digits")]


def test_figures_are_vbenchs_in_chunks_and_whole(
    film: Path, tmp_path: Path, transformers: list[dict[str, Any]], capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    head = tmp_path / "head.pth"
    weight, bias = torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(2)), torch.tensor([5.5])
    torch.save({"weight": weight, "bias": bias}, head)
    broken = tmp_path / "broken.mp4"
    broken.write_text("no film")
    words = [f"dino={folder(tmp_path, 'dino')}", f"clip={folder(tmp_path, 'clip')}", f"aesthetic={head}"]
    words += [f"aesthetic_clip={folder(tmp_path, 'clip-large')}", "chunk_seconds=0.5", f"output={tmp_path / 'out'}"]
    assert main(["eval", str(broken), str(film), *PLAIN, *words, "--json"]) == 101
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    (video,) = report["videos"]
    frames = frames_of(film)
    found = {}
    for name, kind in (("dino_subject_consistency", DINO), ("clip_background_consistency", CLIP_B)):
        network = Network(kind, StandIn(), 32, torch.device("cpu"), torch.float32, {})
        found[name] = consistency(np.concatenate([network(network.prepared(frame)[None]) for frame in frames]))
    rows = np.concatenate([network(network.prepared(frame)[None]) for frame in frames])
    quality = rows / np.linalg.norm(rows, axis=1, keepdims=True) @ weight[0].numpy() + 5.5
    for name, scores in found.items():
        assert video["whole"][name] == pytest.approx(np.mean(scores), abs=1e-6)
        assert video["chunks"][name] == pytest.approx([np.mean(scores[:11]), np.mean(scores[11:])], abs=1e-6)
        assert video["drift"][name]["slope"] < 0, "the cut"
        assert name in (tmp_path / "out" / "report.html").read_text()
    assert video["whole"]["clip_aesthetic_quality"] == pytest.approx(quality.mean() / 10, abs=1e-6)
    assert "subject_consistency_eff" not in video["chunks"]
    assert [row["video"] for row in report["failed"]] == [str(broken)]
    about = report["networks"]
    assert list(about) == ["dino", "clip", "aesthetic_clip"]
    assert about["dino"]["model"] == str(tmp_path / "dino") and about["dino"]["dtype"] == "float32"
    assert all(
        options["weights_only"] and not options["trust_remote_code"] and options["local_files_only"]
        for options in transformers
    )
    assert captured.err.count("is not of the shape of") == 3
    assert "dino: is not of the shape of facebook/dino-vitb16; its figures are not VBench's" in captured.err
    assert main(["eval", str(film), *PLAIN, words[0], "pictures_per_second=11.5", "--json"]) == 0
    fewer = json.loads(capsys.readouterr().out)["videos"][0]["whole"]["dino_subject_consistency"]
    network = Network(DINO, StandIn(), 32, torch.device("cpu"), torch.float32, {})
    rows = np.concatenate([network(network.prepared(frame)[None]) for frame in frames[::2]])
    assert fewer == pytest.approx(np.mean(consistency(rows)), abs=1e-6)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["dino={missing}"], r"dino=\S+missing: no such folder"),
        (["dino=nowhere"], r"dino=nowhere: no such folder here, and hub ids are owner/name"),
        (["dino={empty}"], r"dino=\S+empty: \S+config\.json is missing"),
        (["dino={clip}"], r"dino=\S+clip: config\.json: model_type=clip: must be vit, such as facebook/dino-vitb16"),
        (["clip={dino}"], r"model_type=vit: must be clip or clip_vision_model, such as openai/clip-vit-base-patch32"),
        (["dino={untyped}"], r"dino=\S+untyped: config\.json: model_type=null: must be vit"),
        (["dino={small}"], r"dino=\S+small: config\.json: image_size=4: is less than patch_size=8"),
        (["dino={oblong}"], r"dino=\S+oblong: config\.json: image_size=\[32, 48\]: must be a whole number"),
        (["dino={grey}"], r"dino=\S+grey: config\.json: num_channels=1: must be 3"),
        (["dino={bare}"], r"dino=\S+bare: has no weights: expected model\.safetensors"),
        (["dino={torn}"], r"dino=\S+torn: cannot be loaded: Unable to load weights$"),
        (["dino={lacking}"], r"dino=\S+lacking: its weights lack layernorm\.bias"),
        (["dino={dino}", "dtype=float16", "device=cpu"], r"dtype=float16: a CPU computes in float32 or bfloat16"),
        (
            ["aesthetic={head}"],
            r"aesthetic=\S+: reads features of a CLIP; name it, too: aesthetic_clip=openai",
        ),
        (["aesthetic_clip={clip}"], r"aesthetic_clip=\S+: is for aesthetic=, the head that reads it"),
        (["aesthetic={missing}", "aesthetic_clip={clip}"], r"aesthetic=\S+missing: no such file; LAION's linear head"),
        (["aesthetic={clip}/config.json", "aesthetic_clip={clip}"], r"aesthetic=\S+json: cannot be read \(.+\); LAION"),
        (["aesthetic={other}", "aesthetic_clip={clip}"], r"aesthetic=\S+: holds something else; LAION's linear head"),
        (
            ["aesthetic={head}", "aesthetic_clip={clip}"],
            r"aesthetic=\S+: reads 768 numbers, aesthetic_clip=\S+ gives 6",
        ),
        (["pictures_per_second=2"], r"pictures_per_second=2: is for dino=, clip= and aesthetic=; name one of them"),
        (["dino={dino}", "pictures_per_second=0"], r"pictures_per_second=0.*: must be above 0"),
    ],
)
@pytest.mark.usefixtures("transformers")
def test_what_cannot_be_is_said_before_a_video_is_opened(
    words: list[str], said: str, film: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def opened(*_: object) -> None:
        raise AssertionError("a video is opened")

    monkeypatch.setattr(measured, "open_video", opened)
    for name in ("dino", "clip"):
        folder(tmp_path, name)
    folder(tmp_path, "untyped", model_type=None)
    folder(tmp_path, "small", image_size=4)
    folder(tmp_path, "oblong", image_size=[32, 48])
    folder(tmp_path, "grey", num_channels=1)
    folder(tmp_path, "bare", None)
    folder(tmp_path, "torn", "torn")
    folder(tmp_path, "lacking", "layernorm.bias")
    (tmp_path / "empty").mkdir()
    save_file({"weight": torch.zeros(1, 768), "bias": torch.zeros(1)}, tmp_path / "head.safetensors")
    save_file({"weight": torch.zeros(2, 768), "bias": torch.zeros(2)}, tmp_path / "other.safetensors")
    names = {file.stem: str(file) for file in tmp_path.iterdir()} | {"missing": str(tmp_path / "missing")}
    assert main(["eval", str(film), *PLAIN, *(word.format(**names) for word in words)]) == 2
    *warnings, error = capsys.readouterr().err.strip().splitlines()
    assert re.search(said, error) and all("is not of the shape" in warning for warning in warnings)


def test_a_missing_package_is_said(
    film: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main(["eval", str(film), *PLAIN, f"dino={folder(tmp_path, 'dino')}"]) == 2
    assert re.search(r"dino=\S+dino: needs transformers: pip install 'pavdm-dist\[text\]'", capsys.readouterr().err)
    assert main(["eval", str(film), *PLAIN]) == 0, "nobody needs it who names no network"


def test_hub_ids_are_fetched_as_models_are(
    tmp_path: Path, transformers: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    there = folder(tmp_path, "dino")
    for name in ("pytorch_model.bin", "flax_model.msgpack", "README.md"):
        (there / name).write_text("not asked for")
    with serve(there, tmp_path / "cache", monkeypatch) as hub:
        network = open_network("dino", REPOSITORY, DINO, torch.device("cpu"), torch.float32)
        assert hub.fetched() == {"config.json", "model.safetensors"} and len(transformers) == 1
        assert network.about["model"] == f"{REPOSITORY}@{COMMIT}"
        with pytest.raises(CheckpointError, match=r"clip=someone/none: model='someone/none' is no folder here"):
            open_network("clip", "someone/none", CLIP_B, torch.device("cpu"), torch.float32)
