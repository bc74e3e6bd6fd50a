"""On the device under test (no Ray is needed): types, places, and the same bits however a model is cut."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from devices_under_test import TYPES, built, relative
from helpers import reference_chunks, tiny_checkpoint, tiny_model, tiny_stream
from torch import Tensor
from wan_models import tiny_wan
from whole_window import whole_window

from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.codecs.wan import WanCodec
from pavdm_dist.engine.gpu_links import HostStagedLink
from pavdm_dist.engine.local import LocalEngine
from pavdm_dist.engine.messages import ACTIVATION, Header
from pavdm_dist.engine.order import epochs, join_of
from pavdm_dist.engine.stage import Stage
from pavdm_dist.engine.transport import LocalLink
from pavdm_dist.errors import ConfigError
from pavdm_dist.method.denoiser import StreamDenoiser
from pavdm_dist.method.sampler import sample
from pavdm_dist.method.schedule import Mode
from pavdm_dist.models.base import Activation, Backbone
from pavdm_dist.models.catalog import load_backbone
from pavdm_dist.models.devices import device_model
from pavdm_dist.models.text_cache import TextBank
from pavdm_dist.pipeline import PAVDMPipeline
from pavdm_dist.planning.costs import profiled_costs
from pavdm_dist.request.outputs import PAVDMPipelineOutput
from pavdm_dist.request.sampling import SamplingParams
from pavdm_dist.request.video_request import VideoRequest

pytestmark = pytest.mark.gpu
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


def latents_of(pipeline: PAVDMPipeline) -> Tensor:
    output = pipeline("a red three", num_frames=20, output_type="latent")
    assert isinstance(output, PAVDMPipelineOutput)
    return output.frames[0]


MODES: tuple[Mode, ...] = ("window", "causal", "displaced")
BUILDS = (tiny_model, whole_window, tiny_wan)
QUICK = (tiny_model, "window", torch.float32), (whole_window, "displaced", torch.bfloat16)


@pytest.mark.parametrize(
    ("build", "mode", "dtype"),
    [pytest.param(*case, marks=() if case in QUICK else slow) for case in product(BUILDS, MODES, TYPES)],
)
def test_any_cut_gives_the_same_bits(
    build: Callable[[], Backbone], mode: Mode, dtype: torch.dtype, device: torch.device
) -> None:
    model, stream = built(build, dtype, device), tiny_stream(mode=mode)
    denoise = StreamDenoiser(model, stream, TextBank(model.project_text, device), device)
    expected = list(sample(stream.window(device), denoise, stream.guidance_scale))
    last, close = model.spec.num_blocks, reference_chunks(build(), stream)
    for cuts in ([(0, last)], [(0, 1), (1, last)], [(0, 1), (1, 2), (2, last)]):
        found = list(LocalEngine([Stage(model, blocks, device, dtype) for blocks in cuts]).run([stream]))
        assert len(found) == len(expected) == len(close)
        for (_, clean), whole, on_cpu in zip(found, expected, close, strict=True):
            # What leaves a stage lies in main memory: its driver may have no GPU.
            assert clean.latents.dtype == torch.float32 and clean.latents.device.type == "cpu"
            assert torch.equal(clean.latents, whole.latents.cpu())
            # The sums of a GPU are in another order; rounding of weights and activations is what half types cost.
            assert relative(clean.latents, on_cpu.latents) < (1e-3 if dtype == torch.float32 else 0.1)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_weights_go_straight_to_the_device(model: Path, dtype: torch.dtype, device: torch.device) -> None:
    source, kept = Checkpoint.open(model).transformer, tiny_model().state_dict()
    for blocks in ((0, 2), (2, 4), None):
        part = load_backbone(source, blocks, dtype, device)
        loaded = {name: value for name, value in part.state_dict().items() if not value.is_meta}
        assert loaded
        for name, value in loaded.items():
            assert value.device.type == device.type
            assert value.dtype == (torch.float32 if part.keeps_float32(name) else dtype)
            assert torch.equal(value.cpu(), kept[name].to(value.dtype))


def test_a_pipeline_samples_where_and_in_what_it_is_told(model: Path, device: torch.device) -> None:
    automatic = PAVDMPipeline.from_pretrained(model)
    assert automatic.device_name == device_model(device)
    cpu = PAVDMPipeline.from_pretrained(model, device="cpu")
    latents = {}
    for name, pipeline in (("auto", automatic), ("cpu", cpu)):
        chunks = list(pipeline.iter_chunks([VideoRequest("a red three", 0, 20)], pipeline.params()))
        assert all(chunk.latents.device.type == chunk.frames.device.type == "cpu" for chunk in chunks)
        assert all(chunk.latents.dtype == torch.float32 for chunk in chunks)
        latents[name] = torch.cat([chunk.latents for chunk in chunks], dim=1)
    assert relative(latents["auto"], latents["cpu"]) < 1e-2
    assert torch.equal(latents["auto"], latents["cpu"]) == (device.type == "cpu"), "a GPU's sums are in another order"
    assert 1e-5 < relative(latents_of(automatic.to(torch.bfloat16)), latents["cpu"]) < 0.2
    assert torch.equal(latents_of(automatic.to("cpu", torch.float32)), latents["cpu"])
    with pytest.raises(ConfigError, match=r"device=cuda:64: this process sees \d+ GPUs"):
        automatic.to("cuda:64")


def test_a_resume_point_lies_in_main_memory_and_goes_on_bit_for_bit(model: Path, device: torch.device) -> None:
    pipeline = PAVDMPipeline.from_pretrained(model, device=device, torch_dtype=torch.bfloat16)
    request, params = VideoRequest("a red three", 3, 29), pipeline.params()
    whole = list(pipeline.iter_chunks([request], params))
    for done, chunk in enumerate(whole, start=1):
        point = chunk.resume
        assert point is not None and all(held.device.type == "cpu" for held in point.snapshot.latents.values())
        rest = list(pipeline.iter_chunks([replace(request, resume=point)], params))
        assert [later.index for later in rest] == list(range(done, len(whole)))
        for again, before in zip(rest, whole[done:], strict=True):
            assert torch.equal(again.latents, before.latents) and torch.equal(again.frames, before.frames)


def test_auto_is_what_the_files_hold_on_a_gpu_and_float32_on_a_cpu(tmp_path: Path, device: torch.device) -> None:
    folder = tiny_checkpoint(tmp_path)
    tiny_model().save_pretrained(folder / "transformer", torch.bfloat16)
    engine = PAVDMPipeline.from_pretrained(folder)._load()
    model, codec = engine._model, engine._codec
    assert isinstance(codec, WanCodec)
    held = torch.bfloat16 if device.type == "cuda" else torch.float32
    assert model.state_dict()["t_block.1.weight"].dtype == held
    assert model.state_dict()["rope.freqs"].dtype == torch.float32
    assert next(codec.vae.parameters()).dtype == torch.float32


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_a_codec_on_the_device_decodes_chunk_by_chunk(model: Path, dtype: torch.dtype, device: torch.device) -> None:
    source = Checkpoint.open(model).vae
    latents = torch.randn(4, 6, 4, 6, generator=torch.Generator().manual_seed(0))
    codec, reference = WanCodec.from_pretrained(source, device, dtype), WanCodec.from_pretrained(source)
    whole, parts = codec.decoder(), codec.decoder()
    together = whole.decode(latents)
    assert torch.equal(together, torch.cat([parts.decode(latents[:, :2]), parts.decode(latents[:, 2:])]))
    expected = reference.decoder().decode(latents)
    assert (together.float() - expected.float()).abs().mean() < (0.5 if dtype == torch.float32 else 4)


def test_activations_pass_through_host_memory(device: torch.device) -> None:
    model, stream = built(tiny_model, torch.bfloat16, device), tiny_stream()
    first, second = (Stage(model, blocks, device, torch.bfloat16) for blocks in ((0, 2), (2, 4)))
    link = HostStagedLink(LocalLink(), device)
    for stage in (first, second):
        stage.prepare(stream)
    unit = next(epochs(lambda epoch: None if epoch else join_of(stream, 0), 1))[0]
    sent, layout = first.run(unit, None), first.activation_layout(unit)
    assert isinstance(sent, Activation)
    header = Header(1, ACTIVATION, 0, 0, 0, -1, 0, layout.numel)
    link.post(layout)
    link.send(header, (sent.hidden, sent.modulation, sent.time), layout)
    found = Activation(*link.receive(header, layout))
    assert found.hidden.device.type == device.type and torch.equal(found.hidden, sent.hidden)
    second.run(unit, found)


def test_blocks_are_timed_on_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    checkpoint = Checkpoint.open("embedded")
    params = SamplingParams.resolve(checkpoint)
    costs = profiled_costs(
        checkpoint.shape, params.plan(None), (8, 8), params.info, 1, device.type, "causal", torch.bfloat16
    )
    assert len(costs.blocks) == 8 and min(*costs.blocks, costs.embed, costs.head) > 0
