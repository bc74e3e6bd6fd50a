"""The seam: a backbone of another kind needs its own file and a line in the catalogue, nothing else."""

from __future__ import annotations

import json
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from helpers import TINY, reference_chunks, tiny_checkpoint, tiny_model, tiny_stream
from safetensors.torch import load_file, save_file
from wan_models import SKYREELS, tiny_wan
from whole_window import WholeWindow, whole_window

from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.config import ClusterConfig
from pavdm_dist.engine.local import LocalEngine
from pavdm_dist.engine.options import EngineOptions
from pavdm_dist.engine.stage import Stage
from pavdm_dist.errors import CheckpointError
from pavdm_dist.method.denoiser import ModelDenoiser, StreamDenoiser
from pavdm_dist.method.microbatches import Displaced
from pavdm_dist.method.sampler import guide
from pavdm_dist.method.schedule import Mode
from pavdm_dist.method.stream import Stream
from pavdm_dist.method.window import CleanChunk
from pavdm_dist.models.catalog import BACKBONES, backbone_shape, load_backbone
from pavdm_dist.models.stdit3 import STDiT3
from pavdm_dist.pipeline import PAVDMPipeline
from pavdm_dist.planning.costs import measure_costs
from pavdm_dist.planning.partition import layer_split
from pavdm_dist.planning.planner import choose
from pavdm_dist.request.sampling import SamplingParams
from pavdm_dist.request.streams import build_stream
from pavdm_dist.request.video_request import VideoRequest

CUTS = {1: [(0, 3)], 2: [(0, 1), (1, 3)], 3: [(0, 1), (1, 2), (2, 3)]}


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model folder whose backbone is another one."""
    monkeypatch.setitem(BACKBONES, "WholeWindow", WholeWindow)
    folder = tiny_checkpoint(tmp_path / "model")
    for file in (folder / "transformer").iterdir():
        file.unlink()
    whole_window().save_pretrained(folder / "transformer")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "transformer": ["tests", "WholeWindow"]}))
    return folder


@cache
def sampled_in(mode: Mode) -> tuple[list[Stream], list[list[CleanChunk]]]:
    """Streams of several kinds, and what the sampler makes of each."""
    streams = [
        tiny_stream(0, seed=1, mode=mode),
        tiny_stream(1, seed=2, guidance_scale=1.0, num_chunks=2, mode=mode),
        tiny_stream(2, seed=3, start="clip", end="cut", num_chunks=3, mode=mode),
        tiny_stream(3, seed=4, context_chunks=0, mode=mode),
    ]
    return streams, [reference_chunks(whole_window(), stream) for stream in streams]


@pytest.mark.parametrize("num_stages", CUTS)
@pytest.mark.parametrize("mode", ["window", "causal", "displaced"])
def test_another_backbone_on_stages_equals_the_sampler(num_stages: int, mode: Mode) -> None:
    whole, (streams, sampled) = whole_window(), sampled_in(mode)
    chunks: dict[int, list] = {stream.id: [] for stream in streams}
    for number, clean in LocalEngine([Stage(whole, blocks) for blocks in CUTS[num_stages]]).run(streams, 2):
        chunks[number].append(clean)
    for stream, reference in zip(streams, sampled, strict=True):
        for clean, expected in zip(chunks[stream.id], reference, strict=True):
            assert torch.equal(clean.latents, expected.latents)


def test_its_modes_are_what_they_say() -> None:
    """Kept keys of all tokens: causal is one masked forward, displaced with every step exact is window."""
    whole, stream = whole_window(), tiny_stream(mode="causal")
    window = stream.window()
    cached, masked = StreamDenoiser(whole, stream), ModelDenoiser(whole, stream, causal=True)
    for row in stream.plan.rows():
        x, levels = window.inputs(row)
        found, expected = ([denoise(x, levels, row, branch) for branch in range(2)] for denoise in (cached, masked))
        noisy = slice(len(row.context) * stream.plan.latent_chunk_size, None)
        for one, other in zip(found, expected, strict=True):
            assert (one - other)[:, :, noisy].norm() < 1e-5 * other[:, :, noisy].norm()
        window.update(row, guide(found, stream.guidance_scale))
    chunks = [
        reference_chunks(whole, tiny_stream(num_chunks=6, mode=mode, displaced=Displaced(1)))
        for mode in ("window", "displaced")
    ]
    stale = reference_chunks(whole, tiny_stream(num_chunks=6, mode="displaced"))
    for one, exact, other in zip(*chunks, stale, strict=True):
        assert torch.equal(one.latents, exact.latents) and not torch.equal(one.latents, other.latents)


def test_it_is_sampled_planned_and_cut_from_its_folder(model: Path) -> None:
    checkpoint = Checkpoint.open(model)
    params = SamplingParams.resolve(checkpoint, mode="causal")
    requests = [VideoRequest("a red three", 0, 20)]
    pipeline = PAVDMPipeline(checkpoint, device="cpu")
    found = [chunk.latents for chunk in pipeline.iter_chunks(requests, params)]
    stages = [Stage(load_backbone(checkpoint.transformer, blocks), blocks) for blocks in CUTS[3]]
    stream = build_stream(requests[0], 0, params, checkpoint)
    for (_, clean), latents in zip(LocalEngine(stages).run([stream]), found, strict=True):
        assert torch.equal(clean.latents, latents)
    # Without a learned text of no prompt the empty one is encoded.
    assert torch.equal(checkpoint.null_text, checkpoint.text_encoder.encode(""))
    split = layer_split(checkpoint, params, EngineOptions(2, cpus_per_decoder=1))
    assert split in ([(0, 1), (1, 3)], [(0, 2), (2, 3)])
    best, setups, _ = choose(checkpoint, params, params.plan(8), ClusterConfig(devices=8, tflops=1e-6))
    assert {setup.num_stages for setup in setups} == {1, 2, 3} and best.num_stages == 3


def test_its_blocks_are_timed_by_kind(model: Path) -> None:
    whole = Checkpoint.open(model).shape.shortened(torch.float32, "cpu")
    costs = measure_costs(whole, tiny_stream(), repeats=1)
    assert len(costs.blocks) == 1 and min(*costs.blocks, costs.embed, costs.head) > 0
    costs = measure_costs(tiny_wan(config=SKYREELS).shortened(torch.bfloat16, "cpu"), tiny_stream(), repeats=1)
    assert len(costs.blocks) == 1 and min(*costs.blocks, costs.embed, costs.head) > 0


def test_a_stage_reads_its_own_tensors(model: Path) -> None:
    whole = whole_window()
    for blocks in CUTS[3]:
        part = load_backbone(str(model / "transformer"), blocks)
        loaded = {name for name, value in part.state_dict().items() if not value.is_meta}
        want = part.keys(*blocks, first=blocks[0] == 0, last=blocks[1] == 3)
        assert loaded == {name for name in whole.state_dict() if want(name)}
        assert all(torch.equal(part.state_dict()[name], whole.state_dict()[name]) for name in loaded)


def test_an_unknown_class_names_the_known_ones(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path)
    file = folder / "transformer" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "_class_name": "FluxTransformer"}))
    with pytest.raises(CheckpointError, match=r"transformer is FluxTransformer, this version runs STDiT3"):
        Checkpoint.open(folder)
    # transformers' way of naming it, and files that do not say.
    for names in ({"architectures": ["STDiT3"]}, {}):
        file.write_text(json.dumps({key: value for key, value in config.items() if key != "_class_name"} | names))
        assert isinstance(Checkpoint.open(folder).shape, STDiT3)


@pytest.mark.parametrize("component", ["transformer", "vae", "text_encoder"])
@pytest.mark.parametrize("names", [{"_class_name": ["AutoencoderKLWan"]}, {"architectures": [{}]}])
def test_a_class_that_is_no_text_is_refused(component: str, names: dict, tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path)
    file = folder / component / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **names}))
    with pytest.raises(CheckpointError, match=rf"{component}\S*: {next(iter(names))}\S*=.* must be"):
        Checkpoint.open(folder).text_encoder.encode("a red three")


def test_a_backbone_knows_what_it_needs() -> None:
    stdit3, whole = tiny_model(), whole_window()
    for model in (stdit3, whole, tiny_wan(), tiny_wan(config=SKYREELS)):
        grid, stream = model.grid(6, 4, 6), tiny_stream()
        x, levels = torch.zeros(1, 4, 6, 4, 6), torch.zeros(1, 6)
        activation = model.embed(x, levels, stream.info)
        parts = (activation.hidden, activation.modulation, activation.time)
        assert model.activation_shapes(grid) == tuple(tuple(part.shape) for part in parts)
        costs = model.costs(grid, 5)
        assert len(costs.blocks) == model.spec.num_blocks == len(model.spec.block_kinds)
        assert costs.stage(0, model.spec.num_blocks) == sum(costs.blocks) + costs.embed + costs.head
        assert sum(costs.stage(*cut) for cut in pairwise(range(model.spec.num_blocks + 1))) == pytest.approx(
            costs.stage(0, model.spec.num_blocks)
        )
    assert [stdit3.kv_values(stdit3.grid(6, 4, 6), block) for block in range(2)] == [0, 2 * 6 * 6 * TINY.hidden_size]
    assert whole.kv_values(whole.grid(6, 4, 6), 0) == 2 * 6 * 6 * 16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tensors_that_stay_float32_do(tmp_path: Path, dtype: torch.dtype) -> None:
    tiny_model().save_pretrained(tmp_path)
    state = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    loaded = STDiT3.load(tmp_path, dtype=dtype)
    for name, value in loaded.state_dict().items():
        kept = name in ("rope.freqs", "y_embedder.y_embedding")
        assert value.dtype == (torch.float32 if kept else dtype)
        assert torch.equal(value, state[name].to(value.dtype))
    # Also where the checkpoint itself holds them in another type.
    save_file({name: value.half() for name, value in state.items()}, tmp_path / "diffusion_pytorch_model.safetensors")
    assert STDiT3.load(tmp_path, (0, 2), dtype).rope.freqs.dtype == torch.float32


def test_shapes_need_no_weights(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    shape = backbone_shape(tmp_path)
    assert shape.spec == tiny_model().spec and all(value.is_meta for value in shape.state_dict().values())
