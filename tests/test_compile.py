"""Blocks compiled whole compute what plain ones do; a rehearsal compiles all that a run needs, once for any depth."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from helpers import TINY, reference_chunks, tiny_model, tiny_stream
from linked import linked, sampled, staged
from staircase import LONG, video
from torch._dynamo.utils import counters
from wan_models import SKYREELS, WAN, tiny_wan

from pavdm_dist.config import SampleConfig, validate_sample
from pavdm_dist.engine import graphs
from pavdm_dist.engine.local import LocalEngine
from pavdm_dist.engine.options import EngineOptions
from pavdm_dist.engine.rehearsal import rehearsal, rehearse
from pavdm_dist.engine.stage import Stage
from pavdm_dist.errors import ConfigError, EngineError
from pavdm_dist.method.schedule import Mode
from pavdm_dist.method.stream import Stream
from pavdm_dist.models import compiling, stdit3_block
from pavdm_dist.models.base import Backbone, FrameInfo
from pavdm_dist.models.compiling import Compiler
from pavdm_dist.models.kernels import CHOICES, fused_attention, shape_of
from pavdm_dist.train.checks import check_settings
from pavdm_dist.train.recompute import Recompute, recompute_blocks
from pavdm_dist.train.train_settings import TrainConfig
from pavdm_dist.values.merging import load_config, to_yaml

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler on CPUs")
MODES = get_args(Mode)
# Of a mode with whole windows alone, a block of each kind; else an entrance and an exit beside those, and turning.
VERSIONS = {
    ("stdit3", "window"): 2, ("stdit3", "causal"): 4, ("stdit3", "displaced"): 8,
    ("wan", "window"): 1, ("wan", "causal"): 3, ("wan", "displaced"): 6,
}  # fmt: skip


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def models(kind: str, backend: str) -> tuple[Backbone, Backbone, Compiler]:
    """Plain, and compiled with the same weights."""
    plain = tiny_model(config=replace(TINY, depth=3)) if kind == "stdit3" else tiny_wan(config=SKYREELS)
    compiled, compiler = copy.deepcopy(plain), Compiler(backend)
    compiled.compile_repeated_blocks(compiler)
    return plain, compiled, compiler


def rehearsal_of(model: Backbone, stream: Stream) -> Stream:
    more = {"mode": stream.mode, "displaced": stream.displaced, "chunks_per_unit": stream.chunks_per_unit}
    return rehearsal(model, stream.plan, stream.latent_shape, stream.info, **more)


class Again(graphs.Capture):
    def make_ready(self) -> None:
        """There is nothing to load."""

    def __call__(self, call: Callable[[], None]) -> Callable[[], None]:
        return call


@pytest.fixture(autouse=True)
def graphs_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is captured is computed again."""
    monkeypatch.setattr(graphs, "Capture", Again)


def check(kind: str, backend: str, streams: list[Stream], versions: int) -> None:
    """A rehearsal on any cut compiles a version for every size; the run behind it none, whatever its texts' lengths.
    What a GPU captures of it runs here again."""
    plain, compiled, compiler = models(kind, backend)
    blocks, before = compiled.spec.num_blocks, counters["stats"]["unique_graphs"]
    found = {}
    for cuts in ([(0, blocks)], [(0, 1), (1, blocks)]):
        stages = [Stage(compiled, own, graphs=True) for own in cuts]
        for stage in stages:
            rehearsed = rehearse(stage, rehearsal_of(compiled, streams[0]), compiled=True)
            assert rehearsed.relative_error is not None and rehearsed.relative_error < 1e-5
        made = counters["stats"]["unique_graphs"] - before
        assert made == compiler.num_versions == versions
        for stream in streams:
            found[len(cuts), stream.id] = [clean.latents for _, clean in LocalEngine(stages).run([stream])]
        assert counters["stats"]["unique_graphs"] - before == made, "nothing is compiled once the links are used"
        assert compiler.num_versions == versions
    for stream in streams:
        for one, two, expected in zip(found[1, stream.id], found[2, stream.id], reference_chunks(plain, stream),
                                      strict=True):  # fmt: skip
            assert torch.equal(one, two)
            assert relative(one, expected.latents) < 1e-5


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        *(("stdit3", "window"), ("stdit3", "causal"), ("wan", "window"), ("wan", "causal")),
        *(pytest.param(kind, "displaced", marks=pytest.mark.slow) for kind in ("stdit3", "wan")),
    ],
)
def test_a_rehearsal_compiles_all_that_a_run_needs(kind: str, mode: Mode) -> None:
    streams = [tiny_stream(number, seed=number, mode=mode, num_chunks=5) for number in range(2)]
    check(kind, "eager", streams, VERSIONS[kind, mode])


@pytest.mark.parametrize("mode", ["window", "causal"])
def test_what_comes_by_a_link_is_what_was_rehearsed(mode: Mode) -> None:
    _, compiled, compiler = models("stdit3", "eager")
    stream, before = tiny_stream(mode=mode, num_chunks=5), counters["stats"]["unique_graphs"]
    stages = [Stage(compiled, own, graphs=True) for own in ((0, 1), (1, compiled.spec.num_blocks))]
    for stage in stages:
        rehearse(stage, rehearsal_of(compiled, stream), compiled=True)
    made = counters["stats"]["unique_graphs"] - before
    assert made == compiler.num_versions
    sampled(stages, linked(2, staged(torch.device("cpu"))), [stream])
    assert counters["stats"]["unique_graphs"] - before == made, "nothing is compiled while links are in use"


def test_a_run_has_the_kernels_of_its_own_shapes() -> None:
    """Whatever other runs have measured on that device."""
    _, compiled, _ = models("stdit3", "eager")
    stream = tiny_stream()
    stage = Stage(compiled, (0, compiled.spec.num_blocks))
    rehearse(stage, rehearsal_of(compiled, stream), compiled=True)
    own = next(iter(CHOICES.met))
    CHOICES.use({own: "flash", "2x3x5x8 reading 16, float32": "cudnn"})
    try:
        assert rehearse(stage, rehearsal_of(compiled, stream), compiled=True).kernels == {own: "flash"}
        assert CHOICES.chosen == {own: "flash"}
    finally:
        CHOICES.use({})


OTHERWISE_CUT = {
    "causal": replace(tiny_stream(mode="causal", num_chunks=5), chunks_per_unit=2),
    "displaced": replace(tiny_stream(mode="displaced", num_chunks=5), chunks_per_unit=2),
    "partitions": tiny_stream(partitions=3, num_chunks=5),
    "lookahead": tiny_stream(window_chunks=6, partitions=1, lookahead=True, num_chunks=7),
    "blocks": tiny_stream(block_chunks=3, context_chunks=2, num_chunks=8),
}
SLOW_CUTS = ("displaced", "partitions")


@pytest.mark.parametrize(
    "rows",
    [pytest.param(rows, marks=pytest.mark.slow if rows in SLOW_CUTS else ()) for rows in OTHERWISE_CUT],
)
def test_so_it_does_for_rows_that_are_cut_otherwise(rows: str) -> None:
    stream = OTHERWISE_CUT[rows]
    plain, compiled, compiler = models("stdit3", "eager")
    stage = Stage(compiled, (0, 6))
    rehearse(stage, rehearsal_of(compiled, stream), compiled=True)
    versions = compiler.num_versions
    found = [clean.latents for _, clean in LocalEngine([stage]).run([stream])]
    assert compiler.num_versions == versions
    for one, expected in zip(found, reference_chunks(plain, stream), strict=True):
        assert relative(one, expected.latents) < 1e-5


def test_so_it_does_where_clean_chunks_are_cached() -> None:
    stream = video(LONG, 9)
    plain = tiny_wan(config=replace(WAN, num_layers=4))
    compiled, compiler = copy.deepcopy(plain), Compiler("eager")
    compiled.compile_repeated_blocks(compiler)
    stage = Stage(compiled, (0, 4))
    rehearse(stage, rehearsal_of(compiled, stream), compiled=True)
    versions = compiler.num_versions
    found = [clean.latents for _, clean in LocalEngine([stage]).run([stream])]
    assert compiler.num_versions == versions
    for one, expected in zip(found, reference_chunks(plain, stream), strict=True):
        assert relative(one, expected.latents) < 1e-4


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["stdit3", "wan"])
def test_so_do_kernels_that_torch_makes(kind: str, mode: Mode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    stream = tiny_stream(mode=mode, num_chunks=4)
    check(kind, "inductor", [stream], VERSIONS[kind, mode])
    torch._dynamo.reset()
    counters["inductor"].clear()
    _, again, _ = models(kind, "inductor")
    rehearse(Stage(again, (0, again.spec.num_blocks)), rehearsal_of(again, stream), compiled=True)
    found = counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"]
    assert found == (VERSIONS[kind, mode], 0), "kept for the next run"


def test_rounding_that_blocks_amplify_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage behind others is rehearsed on noise: over 14 blocks its modulation makes much of a last bit."""
    model, stream = tiny_model(config=replace(TINY, depth=8)).bfloat16(), tiny_stream()
    model.compile_repeated_blocks(Compiler("eager"))

    def rounded(*given: torch.Tensor) -> torch.Tensor:
        out = whole(*given)
        return out * (1 + torch.randint(-1, 2, out.shape) * 2**-7)

    whole = stdit3_block._whole
    monkeypatch.setattr(Compiler, "of", lambda self, function, *_: rounded)
    found = rehearse(Stage(model, (2, 16), dtype=torch.bfloat16), rehearsal_of(model, stream), compiled=True)
    assert found.relative_error is not None and 2**-8 < found.relative_error < 2**-6


def test_compiled_blocks_that_compute_something_else_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, stream = tiny_model(), tiny_stream()
    model.compile_repeated_blocks(Compiler("eager"))
    monkeypatch.setattr(Compiler, "of", lambda self, function, *_: lambda *given: 1.01 * function(*given))
    with pytest.raises(EngineError, match=r"compiled block 1 differs from the plain one by .*; use compile=false"):
        rehearse(Stage(model, (1, 4)), rehearsal_of(model, stream), compiled=True)
    assert rehearse(Stage(model, (1, 4)), rehearsal_of(model, stream), compiled=False).relative_error is None


def test_attention_of_its_own_is_torchs() -> None:
    q, k, v = (torch.randn(2, 3, tokens, 8) for tokens in (5, 9, 9))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    out = fused_attention(q, k, v)
    assert out.shape == (2, 5, 3, 8) and out.is_contiguous() and torch.equal(out.transpose(1, 2), expected)
    torch.library.opcheck(fused_attention, (q, k, v), test_utils=("test_schema", "test_faketensor"))
    assert shape_of(q, k) == "2x3x5x8 reading 16, float32" != shape_of(q, q)
    assert shape_of(q, k[..., :8, :]) == "2x3x5x8 reading 8, float32"


def test_kernels_do_not_pad(monkeypatch: pytest.MonkeyPatch) -> None:
    """On GPUs alone they would: tests/test_gpu_units.py looks there at what went wrong then."""
    told = dict[str, object]()
    monkeypatch.setattr(torch, "compile", lambda function, **given: told.update(given) or function)
    Compiler().of(stdit3_block._enter, "kind")
    assert told["options"] == {"comprehensive_padding": False}
    Compiler("eager").of(stdit3_block._enter, "kind")
    assert told["options"] is None


def test_what_is_compiled_is_kept_in_this_users_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "mine")
    compiling.keep_on_disk()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "mine"
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    compiling.keep_on_disk()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "pavdm_dist" / "compiled")


@pytest.mark.parametrize(
    # What is captured is the same for all; the backward pass, and kernels for it, take long to build.
    "backend",
    [
        "eager",
        pytest.param("aot_eager", marks=pytest.mark.slow),
        pytest.param("inductor", marks=[pytest.mark.slow, needs_compiler]),
    ],
)
def test_gradients_are_those_of_plain_blocks(backend: str) -> None:
    plain = tiny_model(config=replace(TINY, depth=3))
    compiled = copy.deepcopy(plain)
    compiled.compile_repeated_blocks(Compiler(backend))
    again = copy.deepcopy(compiled)
    recompute_blocks(again, Recompute(every=1))
    found = []
    for model in (plain, compiled, again):
        model.requires_grad_(True).zero_grad()
        x, text = (
            torch.randn(shape, generator=torch.Generator().manual_seed(0))
            for shape in ((2, 4, 6, 4, 6), (2, 5, TINY.caption_channels))
        )
        out = model(x, torch.linspace(0, 1, 6).expand(2, -1), text, FrameInfo(32, 48, 24), chunk_causal=2)
        out.square().mean().backward()
        found.append({name: value.grad for name, value in model.named_parameters() if value.grad is not None})
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for name, gradient in other.items():
            assert relative(gradient, found[0][name]) < 1e-4, name


def test_auto_compiles_on_gpus() -> None:
    assert not EngineOptions(2).compiled and EngineOptions(2, gpus_per_stage=1).compiled
    assert EngineOptions(2, compile=True).compiled and not EngineOptions(2, gpus_per_stage=1, compile=False).compiled
    assert EngineOptions(2, gpus_per_stage=1, compile=False).rehearses and not EngineOptions(2).rehearses


def test_its_words_are_those_of_yaml_too(tmp_path: Path) -> None:
    assert load_config(SampleConfig).compile == "auto"
    file = tmp_path / "settings.yaml"
    for written, word in (("true", "true"), ("false", "false"), ("auto", "auto")):
        file.write_text(f"compile: {written}\n")
        config = load_config(SampleConfig, file)
        assert config.compile == load_config(SampleConfig, None, [f"compile={written}"]).compile == word
        file.write_text(to_yaml(config))
        assert load_config(SampleConfig, file) == config
    with pytest.raises(ConfigError, match=r"compile=maybe: must be auto, true or false"):
        load_config(SampleConfig, None, ["compile=maybe"])


def test_what_cannot_be_compiled_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"compile=true: .*num_stages=0"):
        validate_sample(load_config(SampleConfig, None, ["prompt=x", "compile=true"]))
    settings = ["compile=true", "zero.stage=3", "optimizer.name=adamw"]
    with pytest.raises(ConfigError, match=r"compile=true with zero\.stage=3"):
        check_settings(load_config(TrainConfig, None, settings), 2)
