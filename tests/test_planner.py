"""The planner: stages where one video must be fast or the model does not fit, plain replicas where they win."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from helpers import tiny_checkpoint
from PIL import Image

from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.cli import main
from pavdm_dist.codecs.costs import Allocated, decode_memory
from pavdm_dist.codecs.wan import WanCodec
from pavdm_dist.config import ClusterConfig
from pavdm_dist.engine.order import epochs, join_of
from pavdm_dist.engine.stage import RowDone, Stage
from pavdm_dist.errors import ConfigError
from pavdm_dist.io.shipped import configs_root
from pavdm_dist.method.microbatches import Displaced
from pavdm_dist.method.schedule import Mode
from pavdm_dist.models.base import Activation
from pavdm_dist.planning.memory import MESSAGES, decoder_bytes
from pavdm_dist.planning.planner import choose, report
from pavdm_dist.planning.setups import Setup, Workload
from pavdm_dist.request.sampling import SamplingParams
from pavdm_dist.request.streams import build_stream
from pavdm_dist.request.video_request import VideoRequest

SMALL = ClusterConfig(devices=8, tflops=0.02)


def planned(
    cluster: ClusterConfig, chunks: int = 20, decoder: str | None = None, **chosen: object
) -> tuple[Setup, list[Setup], str]:
    checkpoint = Checkpoint.open("embedded")
    params = SamplingParams.resolve(checkpoint, **chosen)
    return choose(checkpoint, params, params.plan(chunks), cluster, decoder=decoder)


def test_one_video_takes_stages() -> None:
    best, setups, why = planned(SMALL)
    assert (best.mode, best.replicas, best.num_stages) == ("causal", 1, 8)
    assert "8 stages are" in why
    window = {setup.num_stages: setup for setup in setups if setup.mode == "window"}
    # The published method cannot fill two stages with one guided video: 2 P / (P + 1) at most.
    assert window[1].seconds / window[2].seconds <= 4 / 3
    assert window[8].seconds / best.seconds > 2


def test_many_videos_take_replicas() -> None:
    best, _, why = planned(replace(SMALL, videos=16))
    assert (best.replicas, best.num_stages) == (8, 1)
    assert "plain replicas" in why


def test_replicas_without_a_video_are_idle() -> None:
    for devices, videos, share in ((2, 3, 3 / 4), (4, 5, 5 / 8), (4, 8, 1.0)):
        best, _, _ = planned(replace(SMALL, devices=devices, videos=videos, tflops=0.02), mode="window")
        if best.num_stages == 1:
            assert best.utilisation == pytest.approx(share)


def test_units_are_as_large_as_fits() -> None:
    """Larger ones are faster where every block has an overhead, and need more memory."""
    slow = replace(SMALL, devices=1, block_overhead_ms=1.0)
    ample = planned(slow, mode="causal")[0]
    assert ample.chunks_per_unit > 1
    small = planned(replace(SMALL, devices=1), mode="causal")[0]
    tight = replace(slow, memory_gib=(ample.peak_gib + small.peak_gib) / 2)
    found = planned(tight, mode="causal")[0]
    assert 1 <= found.chunks_per_unit < ample.chunks_per_unit and found.peak_gib <= tight.memory_gib
    with pytest.raises(ConfigError, match=f"the leanest set-up on 1 devices needs {small.peak_gib:.3g} GiB"):
        planned(replace(slow, memory_gib=0.9 * small.peak_gib), mode="causal")


@pytest.mark.parametrize(
    ("devices", "decoder", "why"),
    [(1, None, "the model fits one device"), (2, "cuda", "one device samples and one decodes")],
)
def test_what_had_no_alternative_is_not_called_faster(devices: int, decoder: str | None, why: str) -> None:
    assert planned(replace(SMALL, devices=devices), decoder=decoder)[2].startswith(why)


def test_slow_links_are_no_gain() -> None:
    """Sends that are waited for hold several videos up as they do one."""
    best, setups, _ = planned(ClusterConfig(devices=3, videos=7), 36, "cuda", mode="causal")
    assert best.num_stages == 1 and {setup.num_stages for setup in setups} == {1, 2}


def test_a_model_that_does_not_fit_is_split() -> None:
    alone = planned(replace(SMALL, videos=16), mode="causal")[1][0]
    assert alone.num_stages == 1
    best, _, why = planned(replace(SMALL, videos=16, memory_gib=0.9 * alone.memory_gib[0]), mode="causal")
    assert best.num_stages > 1
    assert "does not fit one device" in why
    with pytest.raises(ConfigError, match=r"cluster.memory_gib=1e-05: the leanest set-up .* needs .* GiB"):
        planned(replace(SMALL, memory_gib=1e-5))


@pytest.mark.parametrize(
    ("stages", "mode"),
    [
        (2, "window"),
        *(
            pytest.param(stages, mode, marks=pytest.mark.slow)
            for stages, mode in ((1, "window"), (1, "causal"), (2, "causal"), (1, "displaced"), (2, "displaced"))
        ),
    ],
)
def test_stages_need_the_memory_that_is_predicted(mode: Mode, stages: int) -> None:
    checkpoint = Checkpoint.open("embedded")
    # Displaced: a full window is run whole at row 16.
    displaced = Displaced(16) if mode == "displaced" else None
    params = SamplingParams.resolve(checkpoint, mode=mode, num_inference_steps=12, displaced=displaced)
    stream = build_stream(VideoRequest("a red three drifting up", 0, 300), 0, params, checkpoint)
    job, blocks = Workload(checkpoint, params, stream.plan), 8 // stages
    running = [
        (Stage(checkpoint.backbone, (first, first + blocks)), Allocated()) for first in range(0, 8, blocks)
    ]  # fmt: skip
    for stage, _ in running:
        stage.prepare(stream)
    for unit in (unit for rows in islice(epochs(lambda n: None if n else join_of(stream, n), 1), 5) for unit in rows):
        incoming = None
        for stage, allocated in running:
            with allocated:
                # A message arrives in a buffer of its own.
                result = stage.run(unit, incoming and Activation(*(part.clone() for part in vars(incoming).values())))
            incoming = result if isinstance(result, Activation) else None
        if isinstance(result, RowDone) and result.latents is not None:
            running[0][0].feed(unit.stream, unit.row + 1, unit.chunk, result.latents)
    for stage, allocated in running:
        want = job.model.keys(*stage.blocks, first=stage.first, last=stage.last)
        weights = 4 * sum(value.numel() for name, value in job.model.state_dict().items() if want(name))
        chunks = 1 if mode == "causal" else 7
        messages = 4 * MESSAGES * chunks * 5 * 16 * job.model.spec.hidden_size
        predicted = job.memory.bytes(mode, stage.blocks, 1) - weights - messages
        assert predicted == pytest.approx(allocated.peak, rel=0.12)


def test_views_of_what_was_there_are_no_new_memory() -> None:
    weights = torch.zeros(30, 20)
    with Allocated() as allocated:
        made = torch.ones(5, 20) @ weights.t().contiguous().t().t()
    assert allocated.peak == 4 * (5 * 20 + 20 * 30 + 5 * 30) and made.shape == (5, 30)
    with Allocated() as allocated:
        weights.t()
    assert allocated.peak == 0


@pytest.mark.parametrize(
    ("model", "dtype"),
    [
        ("tiny", torch.float32),
        ("tiny", torch.bfloat16),
        ("embedded", torch.float32),
        # The tiny one shows bfloat16, which some CPUs emulate, this one shows the shape.
        pytest.param("embedded", torch.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_decoders_need_the_memory_that_is_predicted(model: str, dtype: torch.dtype, tmp_path: Path) -> None:
    vae = Checkpoint.open(tiny_checkpoint(tmp_path) if model == "tiny" else model).vae
    codec, cells, size, streams = WanCodec.from_pretrained(vae, dtype=dtype), (6, 10), 5, 2
    predicted = decode_memory(vae, *cells, dtype)
    tensors = [*codec.vae.parameters(), *codec.vae.buffers()]
    assert predicted.weights == sum(tensor.nbytes for tensor in tensors)
    decoders = [codec.decoder() for _ in range(streams)]
    with Allocated() as allocated:
        for decoder in (*decoders, *decoders, *decoders):
            decoder.decode(torch.zeros(codec.spec.latent_channels, size, *cells))
    assert predicted.cache == decoders[0].cache_bytes
    assert predicted.frames * size == decoders[0].decode(torch.zeros(codec.spec.latent_channels, size, *cells)).nbytes
    whole = decoder_bytes(predicted, size, streams, on_cpu=True) - predicted.weights
    assert whole == pytest.approx(allocated.peak, rel=0.05)
    assert decoder_bytes(predicted, size, streams, on_cpu=False) < whole + predicted.weights, "frames leave at once"


def test_what_a_codec_takes_is_counted_once_and_anew_when_it_is_another(tmp_path: Path) -> None:
    vae = tiny_checkpoint(tmp_path) / "vae"
    first = decode_memory(vae, 4, 6)
    assert decode_memory(vae, 4, 6) is first
    config = json.loads((vae / "config.json").read_text())
    (vae / "config.json").write_text(json.dumps({**config, "base_dim": 2 * config["base_dim"]}))
    assert decode_memory(vae, 4, 6).weights > first.weights


def test_a_decoder_that_does_not_fit_is_not_promised() -> None:
    own, shared, beside, none = (decoded(SMALL, decoder, mode="window") for decoder in ("cuda", "shared", "cpu", None))
    assert none.decoder_memory_gib == shared.decoder_memory_gib == 0
    assert beside.decoder_memory_gib > own.decoder_memory_gib > 0, "on a GPU frames leave at once"
    assert beside.memory_gib == none.memory_gib and beside.peak_gib == max(none.memory_gib)
    needed = own.decoder_memory_gib
    # Of one stage the weights and the window, and the decoder's own.
    alone, with_decoder = (
        decoded(replace(SMALL, devices=1), decoder, mode="window").memory_gib[0] for decoder in (None, "shared")
    )
    assert with_decoder == pytest.approx(alone + needed, rel=1e-3)
    least = rf"memory_gib={0.9 * needed:g}: the leanest set-up on 8 devices needs {needed:.3g} GiB on one of them"
    with pytest.raises(ConfigError, match=least):
        decoded(replace(SMALL, memory_gib=0.9 * needed), "cuda", mode="window")
    tight = replace(SMALL, devices=1, memory_gib=(alone + with_decoder) / 2)
    assert decoded(tight, "cpu", mode="window").memory_gib == (alone,), "its memory is not the device's"
    with pytest.raises(ConfigError, match=f"on 1 devices needs {with_decoder:.3g} GiB on one of them"):
        decoded(tight, "shared", mode="window")


def test_costs_are_those_of_the_rows() -> None:
    checkpoint = Checkpoint.open("embedded")
    params = SamplingParams.resolve(checkpoint, guidance_scale=1.0)
    plan = params.plan(4)
    (one, *_), cluster = planned(SMALL, 4, guidance_scale=1.0)[1], SMALL
    model = checkpoint.shape
    flop = sum(
        model.costs(model.grid(5 * len(row.window), 8, 8), model.spec.text_len).stage(0, 8) for row in plan.rows()
    )
    assert one.mode == "window" and one.num_stages == 1
    assert one.seconds == pytest.approx(flop / (cluster.tflops * 1e12))


def test_calls_of_cached_context_overlap_between_stages() -> None:
    """A second stage has the clean chunk's call while the first has its window's; decoding is counted once."""
    checkpoint, chosen = Checkpoint.open("wan2.1-t2v-1.3b"), {"context": "cached", "step": "renoise"}
    params = SamplingParams.resolve(
        checkpoint,
        num_inference_steps=4,
        window_chunks=4,
        context_chunks=6,
        anchor_chunks=1,
        guidance_scale=1,
        **chosen,
    )
    cluster = ClusterConfig(devices=8, link_gib_per_s=400)
    best, setups, why = choose(checkpoint, params, params.plan(40), cluster, torch.bfloat16)
    assert best.num_stages > 1 and f"{best.num_stages} stages are" in why
    # A clean chunk's call is a fifth of a row's work, half of it hidden behind two stages' way.
    assert setups[1].seconds == pytest.approx(0.9 * setups[0].seconds, rel=0.01)
    shared = choose(checkpoint, params, params.plan(40), cluster, torch.bfloat16, "shared")[1][0]
    decode = 40 * Workload(checkpoint, params, params.plan(40)).decode_flop / (cluster.tflops * 1e12)
    assert shared.seconds - setups[0].seconds == pytest.approx(decode, rel=0.06)


def decoded(cluster: ClusterConfig, decoder: str | None, **chosen: object) -> Setup:
    return planned(cluster, decoder=decoder, **chosen)[0]


def test_the_decoder_is_a_station() -> None:
    left_out, sampled = decoded(SMALL, "cpu"), decoded(SMALL, None)
    assert replace(left_out, decoder_memory_gib=0.0) == sampled and sampled.decode_seconds == 0, (
        "nobody said what a CPU does"
    )
    fast, slow = (decoded(replace(SMALL, decoder_tflops=rate), "cpu") for rate in (1.0, 1e-4))
    assert fast.seconds == pytest.approx(sampled.seconds, rel=0.01)
    assert slow.seconds == pytest.approx(20 * slow.decode_seconds, rel=0.01)
    assert slow.num_stages < fast.num_stages, "more stages would only wait for it"
    own = decoded(SMALL, "cuda")
    assert own.decode_seconds > 0 and own.devices == own.num_stages + 1 <= 8, "one device decodes"
    shared = decoded(SMALL, "shared", mode="window")
    alone = decoded(SMALL, None, mode="window")
    assert shared.decode_seconds == 0 and shared.seconds > alone.seconds
    with pytest.raises(ConfigError, match=r"cluster\.devices=1: decoder=cuda needs one beside the stages'"):
        decoded(replace(SMALL, devices=1), "cuda")


def test_previews_are_planned_as_what_they_take() -> None:
    checkpoint = Checkpoint.open("embedded")
    params = SamplingParams.resolve(checkpoint, mode="window")
    shared, colours = (
        choose(checkpoint, params, params.plan(20), SMALL, decoder="shared", preview=preview)[0]
        for preview in (None, "rgb")
    )
    alone = decoded(SMALL, None, mode="window")
    assert colours == alone and shared.memory_gib[-1] > alone.memory_gib[-1]
    told = [
        report(checkpoint, params, params.plan(20), SMALL, decoder="cpu", preview=preview) for preview in (None, "rgb")
    ]
    assert "decoding on CPUs" in told[0]["why"] and "decoding on CPUs" not in told[1]["why"]
    assert told[1]["choice"]["decode_tflop_per_chunk"] == 0


def test_a_slow_decoder_is_said_and_simulated() -> None:
    checkpoint = Checkpoint.open("embedded")
    params = SamplingParams.resolve(checkpoint)
    cluster = replace(SMALL, decoder_tflops=1e-3)
    silent = report(checkpoint, params, params.plan(8), SMALL, decoder="cpu")["why"]
    assert "decoding on CPUs is not in these times" in silent and "cluster.decoder_tflops says" in silent
    found = report(checkpoint, params, params.plan(8), cluster, decoder="cpu")
    assert "the decoder sets the pace" in found["why"]
    assert found["choice"]["decode_tflop_per_chunk"] == pytest.approx(
        found["choice"]["decode_seconds"] * 1e-3, rel=1e-3
    )
    assert found["choice"]["simulated_utilisation"] == pytest.approx(found["choice"]["utilisation"], rel=0.05)


def test_half_the_bytes_in_half_the_type() -> None:
    checkpoint = Checkpoint.open("embedded")
    params = SamplingParams.resolve(checkpoint)
    full, half = (
        Workload(checkpoint, params, params.plan(8), dtype).memory.bytes("window", (0, 8), 1)
        for dtype in (torch.float32, torch.bfloat16)
    )
    null = 4 * checkpoint.shape.state_dict()["rope.freqs"].numel()  # angles stay float32
    assert half - null == pytest.approx((full - null) / 2)


def test_the_shipped_shape_is_planned_as_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    file = str(configs_root() / "sample" / "opensora-240p.yaml")
    assert main(["plan", file, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["layer_split"][0][0] == 0 and found["layer_split"][-1][1] == 56
    assert found["sampling"]["guidance_scale"] == 7 and found["num_frames"] == 1440
    assert main(["plan", file, "cluster.devices=4", "--json"]) == 0
    choice = json.loads(capsys.readouterr().out)["cluster"]["choice"]
    assert sum(choice["layers_per_stage"]) == 56
    assert 1e9 < choice["memory_gib"][0] * 2**30 * choice["num_stages"] < 2e10
    assert main(["sample", "a red three", file]) == 2
    assert "stdit3-xl holds no weights: it can be planned, not sampled" in capsys.readouterr().err


@pytest.mark.parametrize("chunks", [1, 3, 30])
@pytest.mark.parametrize("videos", [1, 3])
@pytest.mark.parametrize("mode", ["window", "causal", "displaced"])
def test_the_prediction_is_what_the_simulator_says(chunks: int, videos: int, mode: Mode) -> None:
    checkpoint = Checkpoint.open("embedded")
    params = SamplingParams.resolve(checkpoint, mode=mode)
    cluster = ClusterConfig(devices=4, tflops=0.02, videos=videos, link_latency_ms=0.01)
    found = report(checkpoint, params, params.plan(chunks), cluster)["choice"]
    assert found["simulated_utilisation"] == pytest.approx(found["utilisation"], rel=0.05)


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("cluster.devices=0", "cluster.devices=0: must be 1 to 100,000"),
        ("cluster.videos=0", "cluster.videos=0: must be 1 to"),
        ("cluster.tflops=0", "cluster.tflops=0.0: must be above 0"),
        ("cluster.decoder_tflops=0", "cluster.decoder_tflops=0.0: must be above 0"),
        ("cluster.link_latency_ms=-1", "cluster.link_latency_ms=-1.0: must be 0 to"),
        ("cluster.chart=a.txt", "cluster.chart=a.txt: must end in .png"),
        ("cluster.gpus=8", "no such key 'gpus'"),
    ],
)
def test_impossible_clusters_are_one_sentence(word: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "seconds=5", "cluster.devices=2", word]) == 2
    assert sentence in capsys.readouterr().err


def test_the_command_prints_the_choice_and_draws_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chart = tmp_path / "plan.png"
    words = ["plan", "seconds=10", "cluster.devices=4", "cluster.tflops=0.02", "cluster.price_per_device_hour=2"]
    assert main([*words, f"cluster.chart={chart}", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["cluster"]
    assert found["choice"]["num_stages"] == 4
    assert found["choice"]["cost"] == pytest.approx(2 * found["choice"]["device_hours"], abs=1e-4)
    assert {row["mode"] for row in found["considered"]} == {"window", "causal"}
    with Image.open(chart) as picture:
        assert picture.size[0] > 1000


@pytest.mark.parametrize("devices", [8, 64])
def test_the_command_prints_tables_that_fit_a_terminal(devices: int, capsys: pytest.CaptureFixture[str]) -> None:
    # A third of a minute on devices that take as long for it as usual ones for a minute: as wide, and sooner drawn.
    words = ["plan", "seconds=20", "num_inference_steps=90", f"cluster.devices={devices}", "cluster.tflops=0.0067"]
    assert main([*words, "cluster.price_per_device_hour=1234.5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 120
    at = lines.index("  considered")
    header, *rows = (line.split() for line in lines[at + 1 :])
    assert header[:5] == ["mode", "replicas", "stages", "streams", "layers"]
    assert [row[2] for row in rows if row[0] == "window"] == [str(stages) for stages in range(1, 9)]
