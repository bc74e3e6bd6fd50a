"""Types and devices are settings: what is computed in which type, what a device cannot do, where the decoder is."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import reference_chunks, tiny_checkpoint, tiny_model, tiny_stream
from whole_window import whole_window

from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.commands.resolve import open_pipeline
from pavdm_dist.config import SampleConfig
from pavdm_dist.engine.gpu_links import HostStagedLink
from pavdm_dist.engine.local import LocalEngine
from pavdm_dist.engine.messages import LATENTS, Header
from pavdm_dist.engine.options import EngineOptions
from pavdm_dist.engine.order import Unit, epochs, join_of
from pavdm_dist.engine.stage import Stage
from pavdm_dist.engine.transport import LocalLink
from pavdm_dist.errors import ConfigError
from pavdm_dist.io.metadata import cpu_model
from pavdm_dist.method.microbatches import WHOLE
from pavdm_dist.method.schedule import Mode
from pavdm_dist.models import devices
from pavdm_dist.models.base import Activation
from pavdm_dist.models.devices import check_dtype, choose_device, choose_dtype
from pavdm_dist.models.loading import convert
from pavdm_dist.models.source import Source
from pavdm_dist.pipeline import PAVDMPipeline
from pavdm_dist.planning.partition import layer_split
from pavdm_dist.request.sampling import SamplingParams
from pavdm_dist.request.video_request import VideoRequest

PROMPT = "a red three drifting up"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("build", [tiny_model, whole_window])
@pytest.mark.parametrize("mode", ["window", "causal", "displaced"])
def test_bfloat16_stages_equal_the_bfloat16_model(build: type, mode: Mode) -> None:
    """And what crosses a boundary has the setting's type, whatever a stage's first tensor has; latents are float32."""
    model, stream = build(), tiny_stream(mode=mode)
    exact = reference_chunks(model, stream)
    convert(model, torch.bfloat16, "cpu", model.keeps_float32)
    expected = reference_chunks(model, stream)
    for ends in ([0, model.spec.num_blocks], [0, 1, model.spec.num_blocks], [0, 1, 2, model.spec.num_blocks]):
        engine = LocalEngine([Stage(model, blocks, dtype=torch.bfloat16) for blocks in pairwise(ends)])
        for (_, clean), whole, full in zip(engine.run([stream]), expected, exact, strict=True):
            assert clean.latents.dtype == torch.float32
            assert torch.equal(clean.latents, whole.latents)
            change = (clean.latents - full.latents).norm() / full.latents.norm()
            assert 1e-5 < change < 0.1


def test_what_travels_is_what_was_planned() -> None:
    stream = tiny_stream()
    unit: Unit = next(epochs(lambda epoch: None if epoch else join_of(stream, 0), 1))[0]
    for model in (tiny_model(), whole_window()):
        convert(model, torch.bfloat16, "cpu", model.keeps_float32)
        stage = Stage(model, (0, 1), dtype=torch.bfloat16)
        stage.prepare(stream)
        layout = stage.activation_layout(unit)
        sent = stage.run(unit, None)
        assert isinstance(sent, Activation)
        for part, shape in zip((sent.hidden, sent.modulation, sent.time), layout.shapes, strict=True):
            assert (tuple(part.shape), part.dtype) == (shape, layout.dtype)
        assert stage.latents_layout(0, 1, unit.chunk).dtype == torch.float32


def test_this_process_samples_in_the_type_it_is_told(model: Path) -> None:
    pipeline = PAVDMPipeline.from_pretrained(model, torch_dtype=torch.bfloat16, device="cpu")
    plain = PAVDMPipeline.from_pretrained(model, device="cpu")
    assert pipeline.device_name == f"cpu {cpu_model()}"
    (half,), (full,) = (one(PROMPT, num_frames=9, output_type="latent").frames for one in (pipeline, plain))
    assert half.dtype == torch.float32
    assert 1e-5 < (half - full).norm() / full.norm() < 0.1
    assert torch.equal(pipeline.to(torch.float32)(PROMPT, num_frames=9, output_type="latent").frames[0], full)
    assert pipeline.to("cpu") is pipeline


@pytest.mark.parametrize("num_stages", [0, 2])
def test_what_was_refused_is_not_kept(model: Path, num_stages: int) -> None:
    pipeline = PAVDMPipeline(Checkpoint.open(model), num_stages, device="cpu")
    with pytest.raises(ConfigError, match="device=cuda:99: "):
        pipeline.to("cuda:99")
    assert pipeline.to(torch.bfloat16).dtype_name == "bfloat16" and pipeline.computed_on["device"] == "cpu"


def test_the_codec_has_a_type_of_its_own(model: Path) -> None:
    checkpoint = Checkpoint.open(model)
    pipelines = [PAVDMPipeline(checkpoint, device="cpu", decoder_dtype=name) for name in ("float32", "bfloat16")]
    request = [VideoRequest(PROMPT, 0, 13)]
    full, half = (list(pipeline.iter_chunks(request, pipeline.params())) for pipeline in pipelines)
    for one, other in zip(full, half, strict=True):
        assert torch.equal(one.latents, other.latents)
        assert not torch.equal(one.frames, other.frames)
        assert (one.frames.float() - other.frames.float()).abs().mean() < 3


def test_a_float16_checkpoint_runs_in_float32_on_a_cpu(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path, torch.float16)
    source = Source.of(tmp_path)
    assert choose_dtype("auto", torch.device("cpu"), source) == torch.float32
    assert choose_dtype("auto", torch.device("meta"), source) == torch.float16  # what is not a CPU takes what is held
    assert choose_dtype(torch.bfloat16, torch.device("cpu"), source) == torch.bfloat16


def test_what_a_device_cannot_do_is_one_sentence(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert choose_device("auto") == torch.device("cpu")
    with pytest.raises(ConfigError, match=r"device=cuda: this process sees 0 GPUs; use device=cpu"):
        PAVDMPipeline.from_pretrained(model, device="cuda")
    with pytest.raises(ConfigError, match=r"decoder=cuda: this process sees 0 GPUs; use decoder=cpu"):
        PAVDMPipeline(Checkpoint.open(model), decoder="cuda")
    for name, value in (("decoder", "cuda"), ("decoder_dtype", "bfloat16")):
        with pytest.raises(ConfigError, match=rf"{name}={value}: .*engine=EngineOptions\(2, {name}='{value}'\)"):
            PAVDMPipeline(Checkpoint.open(model), num_stages=2, **{name: value})
    with pytest.raises(ConfigError, match=r"device=tpu: must be auto, cpu or cuda"):
        PAVDMPipeline.from_pretrained(model, device="tpu")
    with pytest.raises(ConfigError, match=r"dtype=float16: a CPU computes in float32 or bfloat16"):
        PAVDMPipeline.from_pretrained(model, torch_dtype=torch.float16)
    with pytest.raises(ConfigError, match=r"decoder_dtype=float16: a CPU computes in float32 or bfloat16"):
        PAVDMPipeline(Checkpoint.open(model), decoder_dtype="float16")
    with pytest.raises(ConfigError, match=r"dtype=float64: must be auto, bfloat16, float16 or float32"):
        PAVDMPipeline.from_pretrained(model, torch_dtype=torch.float64)
    with monkeypatch.context() as broken:
        gpus(broken, 1)  # torch says that there is one, and fails when it is used
        with pytest.raises(ConfigError, match=r"device=cuda: the GPU cannot be used \(.*use device=cpu"):
            choose_device("auto")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(ConfigError, match=r"dtype=bfloat16: Tesla T4 cannot compute in it; use float16 or float32"):
        check_dtype("dtype", "bfloat16", torch.device("cuda"))


def test_a_cpu_without_bfloat16_is_told_of(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    said = (
        "dtype=bfloat16: this CPU has no instructions for bfloat16; float32 is many times as fast here, in twice the"
        " memory"
    )
    for has, told in ((True, []), (False, [said])):
        monkeypatch.setattr(devices, "computes_bfloat16", lambda device, has=has: has)
        caplog.clear()
        check_dtype("dtype", "bfloat16", torch.device("cpu"))
        check_dtype("dtype", "float32", torch.device("cpu"))
        assert [record.getMessage() for record in caplog.records] == told


@pytest.mark.parametrize(
    ("chosen", "sentence"),
    [
        ({"backend": "nccl", "gpus_per_stage": 0.5}, "nccl needs gpus_per_stage of 1, .* not 0.5; use backend=gloo"),
        ({"gpus_per_stage": 2}, "gpus_per_stage=2: a stage computes on one GPU; use 1, or more stages"),
        ({"dtype": "float16"}, "dtype=float16: a CPU computes in float32 or bfloat16"),
        ({"dtype": "half"}, "dtype=half: must be auto, float32, bfloat16 or float16"),
        ({"decoder": "gpu"}, "decoder=gpu: must be cpu, cuda or shared"),
        ({"decoder_dtype": "float16"}, "decoder_dtype=float16: a CPU computes"),
        ({"decoder": "shared", "cpus_per_decoder": 2}, "cpus_per_decoder=2: decoder=shared has none of its own"),
        ({"gpus_per_decoder": 0.5}, "gpus_per_decoder=0.5: is of decoder=cuda, not of decoder=cpu"),
        ({"decoder": "cuda", "gpus_per_decoder": 2}, "gpus_per_decoder=2: must be above 0 and at most 1"),
        ({"threads_per_decoder": 0}, "threads_per_decoder=0: must be above 0"),
        ({"cpus_per_stage": -1}, "cpus_per_stage=-1: must be 0 to 1,024"),
        ({"cpus_per_stage": float("nan")}, "cpus_per_stage=nan: must be a finite number"),
        ({"cpus_per_stage": None}, "cpus_per_stage=null: must be a number"),
        ({"gpus_per_stage": -0.5}, "gpus_per_stage=-0.5: must be 0 to 1,024"),
        ({"cpus_per_decoder": -1}, "cpus_per_decoder=-1: must be 0 to 1,024"),
        ({"layers_per_stage": [2, "x"]}, r"layers_per_stage\[1\]=x: must be a whole number"),
        ({"stall_limit_s": 0}, "stall_limit_s=0: must be above 0"),
        ({"max_restarts": 1.5}, "max_restarts=1.5: must be a whole number"),
        ({"num_stages": "2"}, "num_stages='2': must be a whole number"),
        ({"num_stages": 1.5}, "num_stages=1.5: must be a whole number"),
        ({"num_stages": 0}, "num_stages=0: must be 1 to 1,024; 0 runs in this process, without this engine"),
        ({"num_stages": -1}, "num_stages=-1: must be 1 to 1,024"),
    ],
)
def test_engine_options_name_what_is_legal(chosen: dict, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        EngineOptions(**{"num_stages": 2, **chosen})


def test_what_a_pipeline_and_its_engine_say_together(model: Path) -> None:
    checkpoint = Checkpoint.open(model)

    def settled(*said: int, **engine: int) -> tuple[int, int, EngineOptions | None]:
        options = EngineOptions(**engine) if engine else None
        pipeline = PAVDMPipeline(checkpoint, *said, engine=options)
        return pipeline.num_stages, pipeline.threads_per_stage, pipeline.engine

    for said, engine, expected in (
        ((), {}, (0, 1)),
        ((0, 3), {}, (0, 3)),
        ((2,), {}, (2, 1)),
        ((), {"num_stages": 2, "threads_per_stage": 4}, (2, 4)),
        ((2, 4), {"num_stages": 2, "threads_per_stage": 4}, (2, 4)),
        ((2, 4), {"num_stages": 2}, (2, 4)),
    ):
        *found, options = settled(*said, **engine)
        assert tuple(found) == expected
        assert options is None or (options.num_stages, options.threads_per_stage) == expected
    with pytest.raises(ConfigError, match="num_stages=3: engine has num_stages=2; give one of them, or the same twice"):
        settled(3, num_stages=2)
    with pytest.raises(ConfigError, match="threads_per_stage=2: engine has threads_per_stage=4; give one of them"):
        settled(2, 2, num_stages=2, threads_per_stage=4)
    numbers = EngineOptions(np.int64(2), cpus_per_stage=np.float32(0.5))  # type: ignore[arg-type]
    assert type(numbers.num_stages) is int and numbers.bundles() == [{"CPU": 0.5}] * 2


def test_stages_get_their_device_from_the_pipeline(model: Path) -> None:
    checkpoint = Checkpoint.open(model)
    pipeline = PAVDMPipeline(checkpoint, 2)
    assert pipeline.engine is not None and (pipeline.engine.device, pipeline.engine.transport) == ("cpu", "gloo")
    pipeline.to("cuda", torch.bfloat16)
    assert (pipeline.engine.gpus_per_stage, pipeline.engine.dtype, pipeline.engine.transport) == (1, "bfloat16", "nccl")
    assert pipeline.to("cpu").engine.gpus_per_stage == 0  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match=r"device=cpu: gpus_per_stage=1 gives every stage a GPU"):
        PAVDMPipeline(checkpoint, 2, engine=EngineOptions(2, gpus_per_stage=1), device="cpu")


def gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def test_gpus_that_stay_idle_are_told(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("pavdm_dist").propagate = True
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    gpus(monkeypatch, 4)
    checkpoint = Checkpoint.open(model)
    for device in ("cpu", "cuda"):
        PAVDMPipeline(checkpoint, 2, device=device)
    assert not caplog.records, "that is what was asked for"
    pipeline = PAVDMPipeline(checkpoint, 2).to(torch.bfloat16)
    (record,) = caplog.records
    said = "4 GPUs of this machine stay idle: to stages device=auto means CPUs; device=cuda gives every stage a GPU"
    assert record.levelname == "WARNING" and said in record.getMessage() and pipeline.engine is not None
    caplog.clear()
    # A machine with a GPU that torch cannot use: a wheel for CPUs, or an old driver.
    gpus(monkeypatch, 0)
    monkeypatch.setattr(devices, "_GPU_FILES", str(tmp_path / "nvidia[0-9]*"))
    PAVDMPipeline(checkpoint)
    assert not caplog.records
    (tmp_path / "nvidia0").touch()
    PAVDMPipeline(checkpoint)
    assert "nvidia0 is a GPU, but torch" in caplog.text and "can use none: it was built without CUDA" in caplog.text
    caplog.clear()
    PAVDMPipeline(checkpoint, device="cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    PAVDMPipeline(checkpoint)
    assert not caplog.records


def test_a_decoder_on_cpus_beside_stages_on_gpus_is_told(
    model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("pavdm_dist").propagate = True
    for chosen, told in (({"device": "cuda"}, 1), ({"device": "cuda", "decoder": "cpu"}, 0), ({"device": "cpu"}, 0)):
        caplog.clear()
        open_pipeline(SampleConfig(model=str(model), num_stages=2, **chosen))  # type: ignore[arg-type]
        assert caplog.text.count("decoder=auto decodes on CPUs beside stages on GPUs") == told


def test_bundles_hold_the_decoder_where_it_is() -> None:
    gpus = EngineOptions(2, gpus_per_stage=1)
    stage = {"CPU": 1.0, "GPU": 1.0}
    assert gpus.bundles() == [stage, stage] and gpus.decoder_gpus == 0
    own = replace(gpus, decoder="cuda", gpus_per_decoder=0.5, cpus_per_decoder=1)
    assert own.bundles() == [stage, stage, {"CPU": 1.0, "GPU": 0.5}]
    assert replace(gpus, decoder="cuda").bundles()[2] == {"GPU": 1.0}
    shared = replace(gpus, decoder="shared")
    assert shared.bundles() == [stage, stage]
    # Both actors of the last bundle fit into it, and so see the same GPU.
    assert shared.stage_gpus(0) == 1 and shared.stage_gpus(1) + shared.decoder_gpus == 1 and shared.decoder_gpus > 0
    assert [options.decoder_device for options in (gpus, own, shared)] == ["cpu", "cuda", "cuda"]
    assert replace(gpus, threads_per_decoder=4).decoder_threads == 4 and gpus.decoder_threads == 1
    assert EngineOptions(2, gpus_per_stage=0.5).transport == "gloo"


@pytest.mark.parametrize(
    ("chosen", "slower"),
    [
        ({}, True),  # on the last stage's CPU
        ({"cpus_per_decoder": 1}, False),
        ({"decoder": "shared"}, True),
        ({"decoder": "cuda"}, False),
        ({"gpus_per_stage": 1}, False),
        ({"gpus_per_stage": 1, "cpus_per_decoder": 1}, False),
        ({"gpus_per_stage": 1, "decoder": "cuda"}, False),
        ({"gpus_per_stage": 1, "decoder": "shared"}, True),
    ],
)
def test_decoding_costs_the_last_stage_where_it_computes_there(chosen: dict, slower: bool) -> None:
    options = EngineOptions(2, **chosen)
    assert options.decoder_slows_last_stage == slower
    checkpoint = Checkpoint.open("embedded")
    split = layer_split(checkpoint, SamplingParams.resolve(checkpoint), options)
    assert split == ([(0, 5), (5, 8)] if slower else [(0, 4), (4, 8)])


def test_a_staged_link_carries_what_it_is_given() -> None:
    """Through host memory and back; here both are the CPU, on a GPU the same calls copy."""
    link = HostStagedLink(LocalLink(), torch.device("cpu"))
    stage = Stage(tiny_model(), (0, 4))
    stage.prepare(tiny_stream())
    layout = stage.latents_layout(0, 1, WHOLE)
    header = Header(1, LATENTS, 0, 0, 1, WHOLE, 0, layout.numel)
    sent = torch.randn(layout.shapes[0])
    link.post(layout)
    link.send(header, [sent], layout)
    (found,) = link.receive(header, layout)
    link.close()
    assert torch.equal(found, sent) and link.bytes_sent == layout.num_bytes


@pytest.mark.parametrize("told", ["gpu", "gpu and not slow", "gpu and slow", " gpu "])
def test_only_tests_for_gpus_see_them_and_none_runs_without(told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from conftest import pytest_configure

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        pytest.UsageError, match=r"^-m gpu: torch sees no GPU here; without it these tests run on the CPU"
    ):
        pytest_configure(asked(told))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    pytest_configure(asked(told))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3"


@pytest.mark.parametrize(
    "told", ["not slow", "", "slow", "not slow and not gpu", "gpu or slow", "gpu and slow or not slow"]
)
def test_all_other_runs_hide_gpus(told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from conftest import pytest_configure

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    pytest_configure(asked(told))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


def asked(markexpr: str) -> Any:
    """A configuration of pytest with this ``-m``."""
    return SimpleNamespace(option=SimpleNamespace(markexpr=markexpr))
