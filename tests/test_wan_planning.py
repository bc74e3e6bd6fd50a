"""Public shapes: what they need, what is known of them, and what is said when a model is opened."""

from __future__ import annotations

import json
import logging
import math
import re
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from helpers import tiny_checkpoint, tiny_stream
from test_wan_loading import as_peft, low_rank
from wan_models import SKYREELS, tiny_wan

from pavdm_dist import checkpoint as checkpoints
from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.cli import main
from pavdm_dist.codecs.costs import Allocated
from pavdm_dist.engine.order import epochs, join_of
from pavdm_dist.engine.stage import Stage
from pavdm_dist.errors import CheckpointError, ConfigError
from pavdm_dist.io.shipped import shipped_models
from pavdm_dist.method.microbatches import Displaced
from pavdm_dist.method.schedule import Mode, WindowPlan
from pavdm_dist.method.stream import Conditioning, Stream
from pavdm_dist.models.base import Activation
from pavdm_dist.models.known import known_model
from pavdm_dist.models.loading import convert
from pavdm_dist.models.source import Source
from pavdm_dist.models.wan import Wan
from pavdm_dist.pipeline import PAVDMPipeline
from pavdm_dist.planning.costs import chunk_reads, estimated_costs
from pavdm_dist.planning.memory import MESSAGES, StageMemory

SHAPES = {
    "skyreels-v2-df-1.3b-540p": (1.436e9, "staircase-trained"),
    "skyreels-v2-df-14b-540p": (14.29e9, "staircase-trained"),
    "skyreels-v2-df-14b-720p": (14.29e9, "staircase-trained"),
    "wan2.1-t2v-1.3b": (1.419e9, "accepts"),
    "wan2.1-t2v-14b": (14.29e9, "accepts"),
    "wan2.2-ti2v-5b": (5.000e9, "mixed-trained"),
}


def test_every_shape_is_a_public_model() -> None:
    assert set(SHAPES) == set(shipped_models()) - {"embedded", "stdit3-xl"}


@pytest.mark.parametrize("name", SHAPES)
def test_a_public_shape_is_planned(name: str) -> None:
    parameters, support = SHAPES[name]
    model = Checkpoint.open(name)
    assert sum(value.numel() for value in model.shape.state_dict().values()) == pytest.approx(parameters, rel=1e-3)
    assert model.level_support == support and not model.has_weights
    sampling = model.defaults
    latents = (sampling.window_chunks + 1) * sampling.latent_chunk_size
    assert sampling.trained_latents is not None and latents <= sampling.trained_latents
    cells = model.codec_spec.latent_size(sampling.height, sampling.width)
    memory = StageMemory(model.shape, torch.bfloat16, 2, sampling.latent_chunk_size, sampling.window_chunks + 1, cells)
    blocks = model.shape.spec.num_blocks
    whole = memory.bytes("window", (0, blocks), 1)
    assert 2 * parameters < whole < 2 * parameters + 60e9
    assert 2 * memory.bytes("window", (0, blocks // 2), 1) < 2 * whole


def test_attention_over_what_others_left_is_counted() -> None:
    """For chunks of a large picture it is most of the work."""
    shape = Checkpoint.open("skyreels-v2-df-1.3b-540p").shape
    reads = [chunk_reads(mode, 4, 1, 5) for mode in ("causal", "displaced")]
    assert reads == [18, 25]
    whole, *chunks = (estimated_costs(shape, *shape_of).stage(0, 30) for shape_of in (
        (25, (68, 120)), *((5, (68, 120), read) for read in (*reads, None))
    ))  # fmt: skip
    assert 5 * chunks[1] == pytest.approx(whole, rel=1e-6)
    assert chunks[2] < 0.6 * chunks[1] and chunks[2] < chunks[0] < chunks[1]


def counted(model: Wan, stream: Stream, dtype: torch.dtype, device: str) -> tuple[float, int]:
    """Bytes that a stage of two blocks in the middle needs besides its weights and messages: predicted, and counted
    until a full window has been run twice."""
    plan, cells, mode = stream.plan, stream.latent_shape[1:], stream.mode
    size, full = plan.latent_chunk_size, plan.window_chunks + plan.context_chunks
    stage, allocated = Stage(model, (1, 3), device, dtype), Allocated()
    stage.prepare(stream)
    for unit in (unit for rows in islice(epochs(lambda n: None if n else join_of(stream, n), 1), 2) for unit in rows):
        frames = size * len(stream.batches.held(stream.plan.row(unit.row), unit.chunk))
        with allocated:
            shapes = model.activation_shapes(model.grid(frames, *cells))
            stage.run(unit, Activation(*(torch.zeros(shape, dtype=dtype, device=device) for shape in shapes)))
    assert unit.row >= plan.window_chunks + 1
    want = model.keys(1, 3, first=False, last=False)
    weights = sum(value.nbytes for name, value in model.state_dict().items() if want(name))
    chunk = model.activation_shapes(model.grid(size, *cells))[0]
    together = stream.chunks_per_unit
    messages = dtype.itemsize * MESSAGES * (together if mode == "causal" else full) * math.prod(chunk)
    predicted = StageMemory(model, dtype, 2, size, full, cells).bytes(mode, (1, 3), 1, together)
    return predicted - weights - messages, allocated.peak


@pytest.mark.parametrize(("mode", "together"), [("window", 1), ("causal", 1), ("causal", 2), ("displaced", 1)])
@pytest.mark.parametrize(("ffn_dim", "dtype"), [(560, torch.float32), (260, torch.bfloat16)], ids=["1.3B", "14B"])
def test_stages_need_the_memory_that_is_predicted(ffn_dim: int, mode: Mode, together: int, dtype: torch.dtype) -> None:
    """In the proportions of the public models."""
    model = tiny_wan(config=replace(SKYREELS, num_attention_heads=8, ffn_dim=ffn_dim, num_layers=4))
    convert(model, dtype, "cpu", model.keeps_float32)
    plan = {"num_inference_steps": 3, "num_chunks": 9, "latent_chunk_size": 3}
    stream = replace(
        tiny_stream(mode=mode, displaced=Displaced(3, exact_growing=False), **plan),
        latent_shape=(4, 12, 16),
        chunks_per_unit=together,
    )
    predicted, peak = counted(model, stream, dtype, "cpu")
    assert predicted == pytest.approx(peak, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["window", "causal", "displaced"])
@pytest.mark.parametrize("name", SHAPES)
def test_public_models_need_the_memory_that_is_predicted(name: str, mode: Mode) -> None:
    """At their own sizes, counted on shapes alone; what kernels take for themselves is not seen."""
    checkpoint = Checkpoint.open(name)
    model, sampling = checkpoint.shape, checkpoint.defaults
    assert isinstance(model, Wan)
    convert(model, torch.bfloat16, "meta", model.keeps_float32)
    window, size = sampling.window_chunks, sampling.latent_chunk_size
    text = torch.zeros(20, model.spec.text_dim)
    # The first full window is run whole, the next one chunk by chunk.
    displaced = Displaced(window, exact_growing=False)
    stream = replace(
        tiny_stream(mode=mode, displaced=displaced), plan=WindowPlan(window, window, size, 1, num_chunks=3 * window),
        latent_shape=(model.spec.latent_channels, *checkpoint.codec_spec.latent_size(sampling.height, sampling.width)),
        conditioning=Conditioning.build([(0, text)], text),
    )  # fmt: skip
    predicted, peak = counted(model, stream, torch.bfloat16, "meta")
    assert predicted == pytest.approx(peak, rel=0.06)


# --- what is known and said ------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model as diffusers publishes it: no sampling defaults."""
    folder = tiny_checkpoint(tmp_path / "model")
    for file in (folder / "transformer").iterdir():
        file.unlink()
    tiny_wan(config=SKYREELS).save_pretrained(folder / "transformer")
    index = json.loads((folder / "model_index.json").read_text())
    index |= {
        "_class_name": "SkyReelsV2DiffusionForcingPipeline",
        "transformer": ["diffusers", "SkyReelsV2Transformer3DModel"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def change(folder: Path, component: str = "", **values: object) -> None:
    file = folder / component / ("config.json" if component else "model_index.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_a_folder_of_a_public_shape_has_its_defaults(folder: Path, tmp_path: Path) -> None:
    own = Checkpoint.open(folder).defaults
    change(folder, sampling=None)
    assert Checkpoint.open(folder).defaults == checkpoints.SamplingDefaults(), "a shape of nobody"
    public = shipped_models()["wan2.1-t2v-1.3b"]
    for component in ("transformer", "vae", "text_encoder"):
        (folder / component / "config.json").write_text((public / component / "config.json").read_text())
    change(folder, transformer=["diffusers", "WanTransformer3DModel"])
    assert Checkpoint.open(folder).defaults == Checkpoint.open("wan2.1-t2v-1.3b").defaults != own
    change(folder, sampling={"num_inference_steps": 7})
    assert Checkpoint.open(folder).defaults.num_inference_steps == 7


def test_a_restrictive_licence_is_said_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoints._say_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        Checkpoint.open(folder)
        assert not caplog.records
        change(folder, license="terms: no ships")
        for _ in range(2):
            Checkpoint.open(folder)
    assert [record.getMessage() for record in caplog.records] == [
        f"model={folder}: its weights are under terms: no ships"
    ]


@pytest.mark.parametrize(
    ("index", "config", "said"),
    [
        ({}, {}, None),
        ({"_class_name": "SkyReelsV2Pipeline"}, {}, "never trained with different noise levels"),
        ({}, {"level_support": "accepts"}, "never trained with different noise levels"),
        ({}, {"level_support": "mixed-trained"}, "clean frames beside noisy ones"),
    ],
)
def test_what_to_expect_is_said(
    index: dict, config: dict, said: str | None, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(folder, **index)
    change(folder, "transformer", **config)
    assert main(["plan", f"model={folder}", "num_frames=20"]) == 0
    errors = capsys.readouterr().err
    assert (said in errors) if said else ("trained" not in errors)


def test_a_window_longer_than_those_of_training_is_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sampling = json.loads((folder / "model_index.json").read_text())["sampling"]
    change(folder, sampling={**sampling, "trained_latents": 8})
    assert main(["plan", f"model={folder}", "num_frames=20"]) == 0
    assert "windows of at most" not in capsys.readouterr().err
    assert main(["plan", f"model={folder}", "num_frames=20", "latent_chunk_size=3"]) == 0
    assert "windows of at most 8 latents; 12" in capsys.readouterr().err


def test_a_size_that_patches_do_not_divide_names_the_nearest(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["sample", "a red three", f"model={folder}", "height=40", "width=48", "output=never.mp4"]
    assert main(words) == 2
    assert (
        "height=40, width=48: this model's patches cover 16x16 pixels, sides must be multiples of these; nearest legal:"
        " height=32 width=48"
    ) in capsys.readouterr().err
    with pytest.raises(ConfigError, match="nearest legal: height=32 width=48"):
        PAVDMPipeline(Checkpoint.open(folder), device="cpu").params(height=40)


def test_the_hub_id_tells_models_of_one_shape_apart() -> None:
    public = {name: json.loads((shipped_models()[name] / "model_index.json").read_text()) for name in SHAPES}
    for name, index in public.items():
        transformer = json.loads((shipped_models()[name] / "transformer" / "config.json").read_text())
        found = known_model(Source(index["hub"]), {}, transformer, "here")
        assert (found.hub, found.sampling) == (index["hub"], index["sampling"])
        assert found.license == index.get("license")


@pytest.mark.parametrize(
    ("place", "index", "height"),
    [
        ("/models/SkyReels-V2-DF-14B-720P-Diffusers", {}, 720),
        ("/models/skyreels_720p", {}, 720),
        ("/hub/models--Skywork--SkyReels-V2-DF-14B-720P-Diffusers/snapshots/0123abcd", {}, 720),
        ("/720P/skyreels-540p", {}, 544),
        ("somebody/SkyReels-720P-of-mine", {}, 720),
        ("/models/mine", {"_name_or_path": "Skywork/SkyReels-V2-DF-14B-720P-Diffusers"}, 720),
        ("/models/mine", {"hub": "Skywork/SkyReels-V2-DF-14B-720P-Diffusers"}, 720),
    ],
)
def test_a_name_tells_models_of_one_shape_apart(place: str, index: dict, height: int) -> None:
    transformer = json.loads((shipped_models()["skyreels-v2-df-14b-540p"] / "transformer" / "config.json").read_text())
    found = known_model(Source(place), index, transformer, "here")
    assert found.sampling["height"] == height and found.doubt is None
    assert found.hub is not None and ("720P" in found.hub) == (height == 720)


def test_what_nothing_tells_apart_is_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoints._say_once.cache_clear()
    public = shipped_models()["skyreels-v2-df-14b-540p"]
    for component in ("transformer", "vae", "text_encoder"):
        (folder / component / "config.json").write_text((public / component / "config.json").read_text())
    own = json.loads((folder / "model_index.json").read_text())["sampling"]
    change(folder, sampling=None)
    with caplog.at_level(logging.WARNING):
        assert Checkpoint.open(folder).defaults.height == 544
    stem = "Skywork/SkyReels-V2-DF-14B"
    said = f"has the shape of {stem}-540P-Diffusers and {stem}-720P-Diffusers, whose defaults differ; those of the"
    assert f"model={folder}: {said} first are taken" in caplog.text
    checkpoints._say_once.cache_clear(), caplog.clear()
    change(folder, sampling=own, training={"steps": 3})
    with caplog.at_level(logging.WARNING):
        Checkpoint.open(folder)
    assert "defaults differ" not in caplog.text, "all of its defaults are its own"


def test_no_size_is_said_to_be_trained_that_no_model_names(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", f"model={folder}", "num_frames=20", "height=48", "width=64"]
    assert main(words) == 0 and "the model was trained at 32x48" in capsys.readouterr().err
    sampling = json.loads((folder / "model_index.json").read_text())["sampling"]
    change(folder, sampling={name: value for name, value in sampling.items() if name not in ("height", "width")})
    assert main(words) == 0 and "was trained at" not in capsys.readouterr().err


def test_defaults_of_a_models_own_are_added_to_those_of_the_public_one() -> None:
    folder = shipped_models()["wan2.1-t2v-1.3b"]
    public = json.loads((folder / "model_index.json").read_text())["sampling"]
    transformer = json.loads((folder / "transformer" / "config.json").read_text())

    def found(**index: object) -> dict:
        return known_model(Source("/somewhere"), index, transformer, "here").sampling

    assert found(sampling={"prompt_suffix": "film"}) == public | {"prompt_suffix": "film"}
    assert found(sampling={"fps": 24}, license="of its own") == public | {"fps": 24}
    own = {"levels": [1.0, 0.5], "num_inference_steps": 2}
    assert found(sampling=own) == {key: value for key, value in (public | own).items() if key != "time_shift"}
    assert found(sampling={"fps": 24}, training={"steps": 3}) == {"fps": 24}, "which says all of its own"


def test_two_experts_are_refused(folder: Path) -> None:
    change(folder, transformer_2=["diffusers", "WanTransformer3DModel"])
    with pytest.raises(CheckpointError, match="has two transformers"):
        Checkpoint.open(folder)
    change(folder, transformer_2=[None, None])
    Checkpoint.open(folder)


def test_lora_by_setting(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Refused before anything runs where it does not fit; part of the model's identity."""
    (tmp_path / "lora").mkdir()
    as_peft(low_rank(tiny_wan()), tmp_path / "lora")
    words = ["sample", "a red three", f"model={folder}", "num_frames=5", f"output={tmp_path / 'out.mp4'}"]
    lora = f"lora=[{{model: {tmp_path / 'lora'}, scale: 0.5}}]"
    assert main([*words, lora]) == 0
    sidecar = json.loads((tmp_path / "out.json").read_text())
    assert sidecar["weights"].endswith(" x 0.5") and sidecar["config"]["lora"][0]["scale"] == 0.5
    capsys.readouterr()
    assert main([*words, lora]) == 0 and "is complete already" in capsys.readouterr().err
    said = json.loads((settings := tmp_path / "lora" / "adapter_config.json").read_text())
    settings.write_text(json.dumps({**said, "base_model_name_or_path": "elsewhere"}, indent=7))
    assert main([*words, lora]) == 0 and "is complete already" in capsys.readouterr().err
    as_peft(low_rank(tiny_wan()), tmp_path / "lora", use_rslora=True)  # merged otherwise, by the same matrices
    assert main([*words, lora]) == 2
    assert re.search(r'was made with lora_settings=\["\w+\.\.\. \(now \["\w+', capsys.readouterr().err)
    (tmp_path / "lora" / "adapter_config.json").unlink()
    assert main([*words, lora]) == 2 and "(now [null])" in capsys.readouterr().err
    del sidecar["identity"]["lora_settings"]  # as earlier versions wrote it
    (tmp_path / "out.json").write_text(json.dumps(sidecar))
    assert main([*words, lora]) == 0 and "is complete already" in capsys.readouterr().err
    assert main([*words, "lora=[{model: /gone}]"]) == 2
    assert "lora=/gone: no such folder" in capsys.readouterr().err
    pairs = low_rank(tiny_wan())
    as_peft({"blocks.9.attn1.to_q": pairs["proj_out"]}, tmp_path / "lora")
    assert main([*words[:-1], f"output={tmp_path / 'other.mp4'}", lora]) == 2
    assert "the model has no blocks.9.attn1.to_q.weight" in capsys.readouterr().err
