"""On a CUDA device (`-m gpu`; no Ray is needed): types, devices, and the same bits however a model is cut."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
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
from pavdm_dist.models.base import Activation
from pavdm_dist.models.catalog import load_backbone
from pavdm_dist.models.loading import convert
from pavdm_dist.models.text_cache import TextBank
from pavdm_dist.pipeline import PAVDMPipeline
from pavdm_dist.planning.costs import profiled_costs
from pavdm_dist.request.sampling import SamplingParams
from pavdm_dist.request.video_request import VideoRequest

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
TYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module", autouse=True)
def _plain_products() -> None:
    assert torch.cuda.is_available(), "run these where there is a GPU"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


def on_gpu(build: type, dtype: torch.dtype) -> torch.nn.Module:
    model = build()
    convert(model, dtype, CUDA, model.keeps_float32)
    return model


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.cpu() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("mode", ["window", "causal", "displaced"])
@pytest.mark.parametrize("build", [tiny_model, whole_window, tiny_wan])
def test_any_cut_gives_the_same_bits(build: type, mode: Mode, dtype: torch.dtype) -> None:
    model, stream = on_gpu(build, dtype), tiny_stream(mode=mode)
    denoise = StreamDenoiser(model, stream, TextBank(model.project_text, CUDA))
    expected = list(sample(stream.window(CUDA), denoise, stream.guidance_scale))
    last, close = model.spec.num_blocks, reference_chunks(build(), stream)
    for cuts in ([(0, last)], [(0, 1), (1, last)], [(0, 1), (1, 2), (2, last)]):
        found = list(LocalEngine([Stage(model, blocks, CUDA, dtype) for blocks in cuts]).run([stream]))
        assert len(found) == len(expected) == len(close)
        for (_, clean), whole, on_cpu in zip(found, expected, close, strict=True):
            # What leaves a stage lies in main memory: its driver may have no GPU.
            assert clean.latents.dtype == torch.float32 and clean.latents.device.type == "cpu"
            assert torch.equal(clean.latents, whole.latents.cpu())
            # The sums of a GPU are in another order; rounding of weights and activations is what half types cost.
            assert relative(clean.latents, on_cpu.latents) < (1e-3 if dtype == torch.float32 else 0.1)


@pytest.mark.parametrize("dtype", TYPES)
def test_weights_go_straight_to_the_device(model: Path, dtype: torch.dtype) -> None:
    source = Checkpoint.open(model).transformer
    for blocks in ((0, 2), (2, 4), None):
        part = load_backbone(source, blocks, dtype, "cuda")
        loaded = {name: value for name, value in part.state_dict().items() if not value.is_meta}
        assert loaded
        for name, value in loaded.items():
            assert value.device.type == "cuda"
            assert value.dtype == (torch.float32 if part.keeps_float32(name) else dtype)
            assert torch.equal(value.cpu(), tiny_model().state_dict()[name].to(value.dtype))


def test_a_pipeline_samples_where_and_in_what_it_is_told(model: Path) -> None:
    automatic = PAVDMPipeline.from_pretrained(model)
    assert automatic.device_name == torch.cuda.get_device_name()
    cpu = PAVDMPipeline.from_pretrained(model, device="cpu")
    latents = {}
    for name, pipeline in (("auto", automatic), ("cpu", cpu)):
        chunks = list(pipeline.iter_chunks([VideoRequest("a red three", 0, 20)], pipeline.params()))
        assert all(chunk.latents.device.type == chunk.frames.device.type == "cpu" for chunk in chunks)
        assert all(chunk.latents.dtype == torch.float32 for chunk in chunks)
        latents[name] = torch.cat([chunk.latents for chunk in chunks], dim=1)
    assert 0 < relative(latents["auto"], latents["cpu"]) < 1e-2
    half = automatic.to(torch.bfloat16)("a red three", num_frames=20, output_type="latent").frames[0]
    assert 1e-5 < relative(half, latents["cpu"]) < 0.2
    assert torch.equal(automatic.to("cpu", torch.float32)("a red three", num_frames=20, output_type="latent").frames[0],
                       latents["cpu"])  # fmt: skip
    with pytest.raises(ConfigError, match=r"device=cuda:64: this process sees \d+ GPUs"):
        automatic.to("cuda:64")


def test_a_resume_point_lies_in_main_memory_and_goes_on_bit_for_bit(model: Path) -> None:
    pipeline = PAVDMPipeline.from_pretrained(model, device="cuda", torch_dtype=torch.bfloat16)
    request, params = VideoRequest("a red three", 3, 29), pipeline.params()
    whole = list(pipeline.iter_chunks([request], params))
    for done, chunk in enumerate(whole, start=1):
        point = chunk.resume
        assert point is not None and all(held.device.type == "cpu" for held in point.snapshot.latents.values())
        rest = list(pipeline.iter_chunks([replace(request, resume=point)], params))
        assert [later.index for later in rest] == list(range(done, len(whole)))
        for again, before in zip(rest, whole[done:], strict=True):
            assert torch.equal(again.latents, before.latents) and torch.equal(again.frames, before.frames)


def test_auto_is_what_the_files_hold(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path)
    tiny_model().save_pretrained(folder / "transformer", torch.bfloat16)
    engine = PAVDMPipeline.from_pretrained(folder)._load()
    model, codec = engine._model, engine._codec
    assert model.state_dict()["t_block.1.weight"].dtype == torch.bfloat16
    assert model.state_dict()["rope.freqs"].dtype == torch.float32
    assert next(codec.vae.parameters()).dtype == torch.float32


@pytest.mark.parametrize("dtype", TYPES)
def test_a_codec_on_the_gpu_decodes_chunk_by_chunk(model: Path, dtype: torch.dtype) -> None:
    source = Checkpoint.open(model).vae
    latents = torch.randn(4, 6, 4, 6, generator=torch.Generator().manual_seed(0))
    codec, reference = WanCodec.from_pretrained(source, CUDA, dtype), WanCodec.from_pretrained(source)
    whole, parts = codec.decoder(), codec.decoder()
    together = whole.decode(latents)
    assert torch.equal(together, torch.cat([parts.decode(latents[:, :2]), parts.decode(latents[:, 2:])]))
    expected = reference.decoder().decode(latents)
    assert (together.float() - expected.float()).abs().mean() < (0.5 if dtype == torch.float32 else 4)


def test_activations_pass_through_host_memory() -> None:
    model, stream = on_gpu(tiny_model, torch.bfloat16), tiny_stream()
    first, second = (Stage(model, blocks, CUDA, torch.bfloat16) for blocks in ((0, 2), (2, 4)))
    link = HostStagedLink(LocalLink(), CUDA)
    for stage in (first, second):
        stage.prepare(stream)
    unit = next(epochs(lambda epoch: None if epoch else join_of(stream, 0), 1))[0]
    sent, layout = first.run(unit, None), first.activation_layout(unit)
    assert isinstance(sent, Activation)
    header = Header(1, ACTIVATION, 0, 0, 0, -1, 0, layout.numel)
    link.post(layout)
    link.send(header, (sent.hidden, sent.modulation, sent.time), layout)
    found = Activation(*link.receive(header, layout))
    assert found.hidden.device.type == "cuda" and torch.equal(found.hidden, sent.hidden)
    second.run(unit, found)


def test_blocks_are_timed_on_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    checkpoint = Checkpoint.open("embedded")
    params = SamplingParams.resolve(checkpoint)
    costs = profiled_costs(
        checkpoint.shape, params.plan(None), (8, 8), params.info, 1, "cuda", "causal", torch.bfloat16
    )
    assert len(costs.blocks) == 8 and min(*costs.blocks, costs.embed, costs.head) > 0
