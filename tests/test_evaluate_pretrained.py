"""``pavdm eval`` on networks of transformers', tiny and random: figures are VBench's formulas, in float64, on pictures
that are resampled here and features that are computed here (DINO) or by the library's whole CLIP."""

from __future__ import annotations

import json
import logging
import os
import pickle
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from resampling import consistency, resampled
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from pavdm_dist.cli import main
from pavdm_dist.errors import CheckpointError
from pavdm_dist.evaluate.network_kinds import CLIP_B, DINO, Kind
from pavdm_dist.evaluate.network_meter import Consistency, NetworkMeter
from pavdm_dist.evaluate.networks import Network, open_network
from pavdm_dist.io.reader import open_video
from pavdm_dist.io.video import export_to_video

transformers = pytest.importorskip("transformers")

SIZE, SIDE, PATCH, COUNT = (72, 120), 32, 8, 19  # 120 x 32 / 72 = 53.3: six patches, and pixels beside the last
Floats = NDArray[np.float64]
BLOCKS = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``dino/`` in the form of facebook/dino-vitb16, ``clip/`` and ``large/`` of OpenAI's CLIPs, and a head."""
    root, shape = tmp_path_factory.mktemp("networks"), {"image_size": SIDE, "patch_size": PATCH, **BLOCKS}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        # Wider than the library's start, so that positions and blocks count.
        dino = transformers.ViTModel(transformers.ViTConfig(initializer_range=0.4, **shape), add_pooling_layer=False)
        torch.nn.init.normal_(dino.embeddings.position_embeddings)
        dino.save_pretrained(root / "dino")
        for name, width in (("clip", 12), ("large", 24)):
            words = {"vocab_size": 64, "max_position_embeddings": 8, "bos_token_id": 1, "eos_token_id": 2, **BLOCKS}
            config = transformers.CLIPConfig(
                text_config=words | {"projection_dim": width}, vision_config=shape | {"projection_dim": width},
                projection_dim=width, initializer_factor=10.0,
            )  # fmt: skip
            transformers.CLIPModel(config).save_pretrained(root / name)
        torch.save({"weight": torch.randn(1, 24), "bias": torch.randn(1)}, root / "head.pth")
    return root


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Colours that drift from noise to noise."""
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    one, other = np.random.default_rng(1).integers(0, 256, (2, 9, 11, 3)).astype(float)
    frames = [resampled(one + (other - one) * i / COUNT, SIZE, False) for i in range(COUNT)]
    export_to_video(np.stack(frames).astype(np.uint8), str(path), 8)
    return path


def frames_of(path: Path) -> list[NDArray[np.uint8]]:
    with open_video(str(path)) as reader:
        return [reader.picture(frame, None) for _, frame in reader.frames()]


def as_tensor(pictures: list[Floats], kind: Kind) -> torch.Tensor:
    rows = np.stack([(picture / 255 - kind.mean) / kind.std for picture in pictures])
    return torch.from_numpy(rows).permute(0, 3, 1, 2)


def dino_features(folder: Path, frames: list[NDArray[np.uint8]]) -> Floats:
    """All frames at once, in float64, by the published names of DINO's tensors and its definition: norms with 1e-6, and
    positions that are resampled with a tenth of a patch added to the size."""
    tensors = {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], tensors[f"{name}.weight"], tensors[f"{name}.bias"], 1e-6)

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (2, -1)).transpose(1, 2)

    pictures = as_tensor([resampled(frame.astype(float), (32, 53), False) for frame in frames], DINO)
    name = "embeddings.patch_embeddings.projection"
    patches = F.conv2d(pictures, tensors[f"{name}.weight"], tensors[f"{name}.bias"], PATCH).flatten(2).transpose(1, 2)
    positions, side = tensors["embeddings.position_embeddings"], SIDE // PATCH
    grid = resampled(positions[0, 1:].reshape(side, side, -1).numpy(), (4, 6), True, (4.1 / side, 6.1 / side))
    first = (tensors["embeddings.cls_token"] + positions[:, :1]).expand(len(frames), 1, -1)
    x = torch.cat([first, patches + torch.from_numpy(grid.reshape(1, 24, -1))], 1)
    for number in range(2):
        block = f"encoder.layer.{number}"
        seen = norm(f"{block}.layernorm_before", x)
        parts = [heads(linear(f"{block}.attention.attention.{part}", seen)) for part in ("query", "key", "value")]
        mixed = F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)
        x = x + linear(f"{block}.attention.output.dense", mixed)
        wide = F.gelu(linear(f"{block}.intermediate.dense", norm(f"{block}.layernorm_after", x)))
        x = x + linear(f"{block}.output.dense", wide)
    return norm("layernorm", x)[:, 0].numpy()


@torch.no_grad()
def clip_features(folder: Path, frames: list[NDArray[np.uint8]]) -> Floats:
    """All frames at once, in float64, by the whole CLIP's own parts."""
    model = transformers.CLIPModel.from_pretrained(folder).double().eval()
    pictures = as_tensor([resampled(frame.astype(float), (32, 53), True)[:, 10:42] for frame in frames], CLIP_B)
    return model.visual_projection(model.vision_model(pictures).pooler_output).numpy()


def opened(folder: Path, kind: Kind) -> Network:
    return open_network("dino", str(folder), kind, torch.device("cpu"), torch.float32)


def test_figures_are_vbenchs(networks: Path, film: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.mp4").write_text("no film")
    words = [f"dino={networks / 'dino'}", f"clip={networks / 'clip'}", f"aesthetic={networks / 'head.pth'}"]
    words += [f"aesthetic_clip={networks / 'large'}", "chunk_seconds=0.75"]
    words += [f"{name}=off" for name in ("motion", "scenes", "features", "digits")]
    assert main(["eval", str(tmp_path / "bad.mp4"), str(film), *words, "--json"]) == 101
    captured = capsys.readouterr()
    (video,) = json.loads(captured.out)["videos"]
    assert "Loading weights" not in captured.err and "LOAD REPORT" not in captured.err
    frames = frames_of(film)
    found = {
        "dino_subject_consistency": consistency(dino_features(networks / "dino", frames)),
        "clip_background_consistency": consistency(clip_features(networks / "clip", frames)),
    }
    borders = [0, 6, 12, 18, COUNT]
    for name, scores in found.items():
        assert np.ptp(scores) > 0.01, "otherwise it shows nothing"
        assert video["whole"][name] == pytest.approx(np.mean(scores), abs=2e-6)
        means = [np.mean(scores[max(a - 1, 0) : b - 1]) for a, b in pairwise(borders)]
        assert video["chunks"][name] == pytest.approx(means, abs=2e-6)
    head, rows = torch.load(networks / "head.pth"), clip_features(networks / "large", frames)
    scores = rows / np.linalg.norm(rows, axis=1, keepdims=True) @ head["weight"][0].numpy() + head["bias"].item()
    assert video["whole"]["clip_aesthetic_quality"] == pytest.approx(np.mean(scores) / 10, abs=2e-6)


def test_frames_one_by_one_give_what_all_of_them_give(networks: Path, film: Path) -> None:
    frames = frames_of(film)
    for name, kind in (("dino", DINO), ("clip", CLIP_B)):
        network = opened(networks / name, kind)
        whole = network(torch.stack([network.prepared(frame) for frame in frames]))
        alone = np.concatenate([network(network.prepared(frame)[None]) for frame in frames])
        assert alone == pytest.approx(whole, abs=1e-5)
        for length in (1, 5, COUNT):
            meter = NetworkMeter(name, network, Consistency(), 8.0, None)
            for number, frame in enumerate(frames):
                meter.add(frame, number % length == 0)
            assert meter.whole() == pytest.approx(np.mean(consistency(whole)), abs=1e-6)
            assert len(meter.per_chunk()) == -(-COUNT // length)


def test_features_are_dinos_where_the_library_differs(networks: Path, film: Path, tmp_path: Path) -> None:
    frames, folder = frames_of(film)[:2], tmp_path / "faint"
    tensors = copied(networks, "dino", folder)
    faint = {name: tensor * (1e-3 if name.startswith("embeddings.") else 1) for name, tensor in tensors.items()}
    save_file(faint, folder / "model.safetensors", {"format": "pt"})
    for place in (networks / "dino", folder):  # tokens so faint that what norms add to their spread counts
        network = opened(place, DINO)
        found = network(torch.stack([network.prepared(frame) for frame in frames]))
        assert found == pytest.approx(dino_features(place, frames), abs=1e-4)
    network = opened(networks / "dino", DINO)
    square = network.prepared(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))[None]
    theirs = transformers.ViTModel.from_pretrained(networks / "dino", add_pooling_layer=False).eval()
    with torch.no_grad():
        expected = theirs(square).last_hidden_state[:, 0].double().numpy()
    assert network(square) == pytest.approx(expected, abs=1e-4)


def test_bfloat16_is_near(networks: Path, film: Path) -> None:
    frames = frames_of(film)[:4]
    low = open_network("dino", str(networks / "dino"), DINO, torch.device("cpu"), torch.bfloat16)
    found = low(torch.stack([low.prepared(frame) for frame in frames]))
    expected = dino_features(networks / "dino", frames)
    assert 0 < np.abs(found - expected).max() < 0.15 * np.abs(expected).max() and low.about["dtype"] == "bfloat16"


def copied(networks: Path, name: str, target: Path) -> dict[str, torch.Tensor]:
    """A folder with the settings of one, and its tensors."""
    target.mkdir()
    (target / "config.json").write_bytes((networks / name / "config.json").read_bytes())
    return load_file(networks / name / "model.safetensors")


def test_other_forms_of_the_same_weights_give_the_same(networks: Path, tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)

    def seen(folder: Path, kind: Kind) -> Floats:
        network = opened(folder, kind)
        return network(network.prepared(picture)[None])

    tensors = copied(networks, "dino", tmp_path / "pickled")
    torch.save(tensors, tmp_path / "pickled" / "pytorch_model.bin")
    assert np.array_equal(seen(tmp_path / "pickled", DINO), seen(networks / "dino", DINO))
    vision = transformers.CLIPVisionModelWithProjection.from_pretrained(networks / "clip")
    vision.save_pretrained(tmp_path / "vision")
    assert np.array_equal(seen(tmp_path / "vision", CLIP_B), seen(networks / "clip", CLIP_B))
    vision.save_pretrained(tmp_path / "shards", max_shard_size="5KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").exists()
    assert np.array_equal(seen(tmp_path / "shards", CLIP_B), seen(networks / "clip", CLIP_B))


class Harm:
    """What a file of pickles may hold."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("harmed",)


def test_files_that_are_no_such_weights_are_one_sentence(
    networks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tensors = copied(networks, "clip", tmp_path / "lacking")
    del tensors["visual_projection.weight"]
    save_file(tensors, tmp_path / "lacking" / "model.safetensors", {"format": "pt"})
    tensors = copied(networks, "dino", tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text()) | {"hidden_size": 32}
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    copied(networks, "dino", tmp_path / "torn")
    (tmp_path / "torn" / "model.safetensors").write_bytes(b"no weights")
    copied(networks, "dino", tmp_path / "harm")
    (tmp_path / "harm" / "pytorch_model.bin").write_bytes(pickle.dumps(Harm(), 2))
    for name, kind, said in (
        ("lacking", CLIP_B, r"its weights lack visual_projection\.weight$"),
        ("other", DINO, "cannot be loaded: ."),
        ("torn", DINO, "cannot be loaded: ."),
        ("harm", DINO, "cannot be loaded: ."),
    ):
        with pytest.raises(CheckpointError, match=rf"dino=\S+{name}: {said}") as caught:
            opened(tmp_path / name, kind)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "harmed").exists()


def test_the_library_speaks_as_before(networks: Path) -> None:
    log = transformers.utils.logging
    before = log.get_verbosity(), log.is_progress_bar_enabled()
    opened(networks / "dino", DINO)
    assert (log.get_verbosity(), log.is_progress_bar_enabled()) == before
    assert "transformers" in sys.modules and logging.getLogger("transformers").level == before[0]
