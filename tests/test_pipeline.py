"""Prompts in, videos out: in this process and on stage actors, from Python and from the command line."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from forked import Program
from helpers import tiny_checkpoint
from PIL import Image
from previews import tiny_decoder

from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.commands.dry_run import dry_run
from pavdm_dist.commands.plan import plan_report
from pavdm_dist.commands.progress import ChunkProgress
from pavdm_dist.commands.sample import render_command
from pavdm_dist.commands.simulate import SimulateConfig, simulate_report
from pavdm_dist.config import DisplacedConfig, SampleConfig, validate_sample
from pavdm_dist.engine.inline import InlineEngine
from pavdm_dist.engine.order import Join, epochs
from pavdm_dist.errors import CheckpointError, ConfigError, MediaError
from pavdm_dist.io.latents import latents_sha256, read_latents
from pavdm_dist.io.metadata import cpu_model, read_sidecar
from pavdm_dist.io.recording import Recording
from pavdm_dist.io.video import export_to_video, read_clip
from pavdm_dist.method.microbatches import MicroBatches
from pavdm_dist.method.stream import Stream
from pavdm_dist.pipeline import PAVDMPipeline
from pavdm_dist.planning.simulator import of_trace
from pavdm_dist.request import running
from pavdm_dist.request.sampling import SamplingParams
from pavdm_dist.request.video_request import VideoRequest
from pavdm_dist.values.merging import load_config

PROMPT = "a red three drifting up"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    ramp = np.linspace(0, 200, 45)[:, None, None, None] + np.zeros((45, 32, 48, 3))
    export_to_video(ramp.astype(np.uint8), str(path), 24)
    return path


def _render(model: Path, output: Path, overwrite: bool = False, **settings: object) -> list[dict]:
    config = SampleConfig(prompt=PROMPT, model=str(model), output=str(output))
    for name, value in settings.items():
        setattr(config, name, value)
    return render_command(config, overwrite=overwrite, progress=ChunkProgress)["videos"]


@pytest.fixture(scope="module")
def displaced(ray_cluster: None, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``2.mp4``, made by two stages in mode displaced, and ``trace.json``: what they did when."""
    folder = tmp_path_factory.mktemp("displaced")
    settings = {"num_frames": 23, "num_stages": 2, "mode": "displaced", "preview_decoder": str(tiny_decoder(model))}
    _render(model, folder / "2.mp4", trace=str(folder / "trace.json"), **settings)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_the_decoder_has_threads_and_a_type_of_its_own(ray_cluster: None, model: Path, tmp_path: Path) -> None:
    own = {"decoder": "cpu", "cpus_per_decoder": 1.0, "threads_per_decoder": 2, "decoder_dtype": "bfloat16"}
    found = {}
    for name, settings in {"own": {"num_stages": 1, **own}, "shared": {"decoder": "shared"}}.items():
        output = tmp_path / f"{name}.mp4"
        found[name] = _render(model, output, num_frames=13, **settings)[0]["latents_sha256"]
    assert found["own"] == found["shared"], "what is sampled does not know who decodes"
    frames = [read_clip(str(tmp_path / f"{name}.mp4")).astype(int) for name in found]
    assert 0 < np.abs(frames[0] - frames[1]).mean() < 20, "rounding, and what the encoder makes of it"


@pytest.mark.timeout(120)
def test_causal_needs_a_checkpoint_that_was_trained_for_it(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"mode=causal: .*no training .*allow_untrained_causal=true"):
        _render(model, tmp_path / "refused.mp4", num_frames=23, mode="causal")
    settings = {"num_frames": 23, "mode": "causal", "allow_untrained_causal": True}
    with pytest.raises(ConfigError, match="context_chunks=2: mode=causal takes 0 or 1"):
        _render(model, tmp_path / "refused.mp4", context_chunks=2, **settings)
    causal = _render(model, tmp_path / "causal.mp4", **settings)[0]["latents_sha256"]
    window = _render(model, tmp_path / "window.mp4", num_frames=23)[0]["latents_sha256"]
    assert causal != window
    extra = read_sidecar(tmp_path / "causal.mp4")["extra"]
    assert (extra["sampling"]["mode"], extra["sampling"]["chunks_per_unit"], extra["tier"]) == (
        "causal",
        1,
        "same bits",
    )
    _render(model, tmp_path / "together.mp4", chunks_per_unit=2, **settings)
    extra = read_sidecar(tmp_path / "together.mp4")["extra"]
    assert (extra["sampling"]["chunks_per_unit"], extra["tier"]) == (2, "same mathematics")
    with pytest.raises(ConfigError, match=r"was made with sampling.chunks_per_unit=2 \(now 1\)"):
        _render(model, tmp_path / "together.mp4", chunks_per_unit=1, **settings)


@pytest.mark.timeout(120)
def test_displaced_needs_no_training_and_its_knobs_no_other_mode(displaced: Path, model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"displaced\.resync_every_steps=5: mode=window does not read it"):
        _render(model, tmp_path / "refused.mp4", num_frames=23, displaced=DisplacedConfig(resync_every_steps=5))
    settings = {"num_frames": 23, "mode": "displaced"}
    (alone,) = _render(model, tmp_path / "0.mp4", **settings)
    sidecar = read_sidecar(displaced / "2.mp4")
    assert alone["latents_sha256"] == sidecar["latents_sha256"]
    sampling = sidecar["extra"]["sampling"]
    assert (sampling["mode"], sampling["displaced"]["resync_every_steps"]) == ("displaced", 25)
    assert sidecar["extra"]["tier"] == "approximate" and "compiled" not in sidecar["extra"]
    settings |= {"num_frames": 60, "displaced": DisplacedConfig(None, exact_growing=False, adaptive=1e-6)}
    with pytest.raises(
        ConfigError,
        match=r"displaced.adaptive=1e-06: needs at least 2 steps per shift, .* use num_inference_steps=6 or more",
    ):
        _render(model, tmp_path / "refused.mp4", num_inference_steps=3, **settings)
    _render(model, tmp_path / "adaptive.mp4", num_inference_steps=9, **settings)
    assert read_sidecar(tmp_path / "adaptive.mp4")["extra"]["resyncs"][:3] == [6, 9, 12]


@pytest.mark.timeout(120)
def test_a_traced_run_can_be_drawn_and_is_the_order(displaced: Path, model: Path, tmp_path: Path) -> None:
    file, chart = tmp_path / "trace.json", tmp_path / "trace.png"
    with pytest.raises(ConfigError, match=r"trace=.*: there are no stages to trace with num_stages=0"):
        validate_sample(SampleConfig(prompt="a three", trace=str(file)))
    with pytest.raises(ConfigError, match=r"trace=.*a.txt: must end in .json"):
        validate_sample(SampleConfig(prompt="a three", num_stages=1, trace="a.txt"))
    file.write_text("mine")
    sidecar = "is the name of a video's sidecar"
    detour = f"{tmp_path}/./none/../a.json"
    for name, sentence in ((file, "exists"), (tmp_path / "a.json", sidecar), (detour, sidecar)):
        with pytest.raises(ConfigError, match=f"trace={name}.*{sentence}"):
            _render(model, tmp_path / "a.mp4", num_frames=23, num_stages=2, trace=str(name))
    trace = str(displaced / "trace.json")
    found = of_trace(trace)
    params = PAVDMPipeline.from_pretrained(model).params(mode="displaced")
    join = Join(0, 0, 0, params.plan(4).num_rows, 2, MicroBatches(params.plan(4), "displaced"))
    order = [unit for units in epochs(lambda epoch: join if epoch == 0 else None, 1) for unit in units]
    for stage in range(2):
        assert [part.unit for part in found.busy if part.stage == stage] == order
    assert [(one.stream, one.chunk) for one in found.decoded] == [(0, chunk) for chunk in range(4)]
    assert all(0 < one.start < one.end <= found.makespan for one in found.decoded)
    report = simulate_report(SimulateConfig(trace=trace, chart=str(chart)))
    assert report["decoder_busy"] > 0
    assert report["num_stages"] == 2 and report["units"] == len(order) and 0 < report["utilisation"] <= 1
    with Image.open(chart) as picture:
        assert picture.size[0] > 1000


@pytest.mark.timeout(120)
def test_on_stages_a_prompt_file_renders_each_line_as_alone_in_this_process(
    ray_cluster: None, model: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red three drifting up\n\na blue seven\na three\n")
    settings = {"num_frames": 23, "save_latents": True, "chunks_per_segment": 2}
    together = _render(
        model, tmp_path / "all", prompt=None, prompts=str(prompts), num_stages=1, streams=3, seed=7, **settings
    )
    assert [Path(video["output"]).name for video in together] == [
        "0000-a-red-three-drifting-up-s7.mp4",
        "0001-a-blue-seven-s8.mp4",
        "0002-a-three-s9.mp4",
    ]
    (alone,) = _render(model, tmp_path / "alone.mp4", prompt="a blue seven", seed=8, **settings)
    for video in (alone, together[1]):
        output = Path(video["output"])
        assert read_clip(str(output)).shape == (23, 32, 48, 3)
        latents = read_latents(output.with_suffix(".safetensors"))
        assert latents.shape == (4, 8, 4, 6)  # 5, 8, 8, 8 frames -> four chunks of two latents
        assert latents_sha256(latents) == video["latents_sha256"]
        assert output.read_bytes() == (tmp_path / "alone.mp4").read_bytes()
    assert alone["latents_sha256"] == together[1]["latents_sha256"] != together[0]["latents_sha256"]


def test_one_bad_line_of_a_prompt_file_is_refused_before_the_first_video(model: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red three\na blue seven drifting up a red three\n")
    with pytest.raises(ConfigError, match=r"'a blue seven drifting up a red three' has 8 tokens.* at most 5"):
        _render(model, tmp_path / "out", prompt=None, prompts=str(prompts), num_frames=8)
    assert not (tmp_path / "out").exists()


def test_a_prompt_schedule_changes_chunks_born_after_it(model: Path, tmp_path: Path) -> None:
    from pavdm_dist.config import PromptChange

    settings = {"num_frames": 45, "save_latents": True}
    _render(model, tmp_path / "one.mp4", **settings)
    _render(model, tmp_path / "two.mp4", prompt_schedule=[PromptChange(4, "a blue seven")], **settings)
    one, two = (read_latents(tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    same = [torch.equal(one[:, 2 * k : 2 * k + 2], two[:, 2 * k : 2 * k + 2]) for k in range(6)]
    # Chunk 4 is born at row 8; chunk 1 is clean after row 7 (W = 3, S = 2), chunk 2 still has company of chunk 4.
    assert same == [True, True, False, False, False, False]


def test_sidecar_says_how_to_make_it_again(model: Path, tmp_path: Path) -> None:
    (video,) = _render(model, tmp_path / "v.mp4", num_frames=9, seed=3, negative_prompt="a blue seven")
    sidecar = json.loads((tmp_path / "v.json").read_text())
    assert sidecar["config"]["seed"] == sidecar["seed"] == 3
    assert sidecar["prompt"] == PROMPT
    assert sidecar["latents_sha256"] == video["latents_sha256"]
    assert sidecar["num_frames"] == 9
    assert sidecar["device"] == f"cpu {cpu_model()}"
    assert len(sidecar["chunk_seconds"]) == 2
    assert sidecar["versions"]["torch"] == torch.__version__.split("+")[0] or sidecar["versions"]["torch"]
    assert not (tmp_path / "v.mp4.parts").exists()


def test_length_is_trimmed_to_the_frame_and_prefixes_agree(model: Path) -> None:
    pipeline = PAVDMPipeline.from_pretrained(model)
    short = pipeline(PROMPT, num_frames=6, output_type="np").frames[0]
    assert short.shape == (6, 32, 48, 3)
    assert short.dtype == np.float32
    # Chunk 0 is born and denoised in the same company whether three or four chunks follow (W = 3).
    three = pipeline(PROMPT, num_frames=21, output_type="latent").frames[0]
    four = pipeline(PROMPT, num_frames=29, output_type="latent").frames[0]
    assert torch.equal(three[:, :2], four[:, :2])


def test_call_takes_diffusers_arguments(model: Path) -> None:
    pipeline = PAVDMPipeline.from_pretrained(model)
    steps, chunks = [], []
    (frames,) = pipeline(
        [PROMPT, "a blue seven"],
        num_frames=9,
        num_videos_per_prompt=2,
        generator=torch.Generator().manual_seed(5),
        guidance_scale=1.0,
        output_type="pt",
        return_dict=False,
        callback_on_step_end=lambda pipe, step, level, tensors: steps.append((step, level)),
        callback_on_chunk=chunks.append,
    )
    assert len(frames) == 4
    assert frames[0].shape == (9, 3, 32, 48)
    again = pipeline("a blue seven", num_frames=9, seed=7, guidance_scale=1.0, output_type="pt").frames[0]
    assert torch.equal(frames[2], again)
    assert [step for step, _ in steps[:8]] == list(range(8))
    assert steps[0][1] == 1.0
    assert [(chunk.video, chunk.index) for chunk in chunks] == [(v, i) for v in range(4) for i in range(2)]
    assert [chunk.last for chunk in chunks] == [False, True] * 4
    with pytest.raises(ConfigError, match=r"output_type='gif'"):
        pipeline(PROMPT, output_type="gif")
    with pytest.raises(ConfigError, match=r"iter_chunks"):
        pipeline(PROMPT, num_frames=10**7)
    with pytest.raises(ConfigError, match=r"no such argument 'step_count'"):
        pipeline(PROMPT, step_count=4)


@pytest.mark.parametrize(("start", "context", "needed"), [("chunk", 1, 5), ("clip", 1, 21), ("clip", 0, 17)])
def test_start_from_a_clip(model: Path, clip: Path, tmp_path: Path, start: str, context: int, needed: int) -> None:
    settings = {"start": start, "context_chunks": context, "video": str(clip), "num_frames": 16}
    (new,) = _render(model, tmp_path / "new.mp4", **settings)
    (both,) = _render(model, tmp_path / "both.mp4", include_input=True, **settings)
    assert new["latents_sha256"] == both["latents_sha256"]
    rerendered = 0 if start == "chunk" else 2 * 2 * 4
    assert new["num_frames"] == 16
    assert both["num_frames"] == 45 - rerendered + 16
    # After the clip every chunk gives 8 frames: 16 frames are two chunks, not 5 + 8 + 3.
    assert plan_report(SampleConfig(model=str(model), **settings))["chunks"] == 2
    short = tmp_path / "short.mp4"
    export_to_video(np.zeros((needed - 1, 32, 48, 3), np.uint8), str(short), 24)
    with pytest.raises(ConfigError, match=rf"needs at least {needed}"):
        _render(model, tmp_path / "x.mp4", **{**settings, "video": str(short)})


def test_the_clip_matters_and_guidance_sees_the_negative_prompt(model: Path, clip: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.mp4"
    export_to_video(np.full((45, 32, 48, 3), 90, np.uint8), str(other), 24)
    settings = {"start": "chunk", "num_frames": 8}
    seen = {
        _render(model, tmp_path / "a.mp4", video=str(clip), **settings)[0]["latents_sha256"],
        _render(model, tmp_path / "b.mp4", video=str(other), **settings)[0]["latents_sha256"],
        _render(model, tmp_path / "c.mp4", num_frames=8)[0]["latents_sha256"],
        _render(model, tmp_path / "d.mp4", num_frames=8, negative_prompt="a blue seven")[0]["latents_sha256"],
        _render(model, tmp_path / "e.mp4", num_frames=8, guidance_scale=1.0)[0]["latents_sha256"],
    }
    assert len(seen) == 5


@pytest.mark.parametrize("fps", [23.98, 23.97, 23.976, "24000/1001", "ntsc-film"])
def test_frames_are_counted_at_the_rate_that_files_have(model: Path, fps: float | str) -> None:
    params = SamplingParams.resolve(Checkpoint.open(model), fps=fps)
    assert params.fps == 24000 / 1001
    report = plan_report(load_config(SampleConfig, None, [f"model={model}", "seconds=60", f"fps={fps}"]))
    assert (report["num_frames"], report["seconds"]) == (1439, pytest.approx(1439 * 1001 / 24000, abs=1e-3))


@pytest.mark.parametrize("method", ["pavdm", "autoregressive"])
def test_what_is_too_long_to_forecast_is_scaled_by_a_dry_run(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: Literal["pavdm", "autoregressive"]
) -> None:
    """The command would make it; ``pavdm plan`` says how much it can plan."""
    config = SampleConfig("a", model=str(model), output=str(tmp_path / "v.mp4"), num_frames=2005, method=method)
    whole = dry_run(config, False)
    monkeypatch.setattr("pavdm_dist.commands.plan.MAX_ROWS", 300)
    found = dry_run(config, False)
    said = found.pop("forecast")
    of = int(said.split()[1])
    assert said == f"of {of} chunks step by step, scaled to {whole['chunks']}" and of < whole["chunks"]
    assert list(found) == list(whole)
    for name in ("chunks", "num_frames", "seconds", "sampling", "layer_split", "first_chunk_after_calls"):
        assert found[name] == whole[name]
    for name in ("model_calls", "latent_evaluations", "pipeline_utilisation", "useful_stages"):
        assert found[name] == pytest.approx(whole[name], rel=0.05)
    with pytest.raises(ConfigError, match=rf"num_frames=2005: .* plan at most chunks={of}, the rest goes on"):
        plan_report(config)
    assert plan_report(replace(config, num_frames=None), chunks=of)["chunks"] == of


def test_plan_report_is_the_worked_example(model: Path) -> None:
    config = SampleConfig(
        model=str(model), num_inference_steps=30, window_chunks=6, latent_chunk_size=5, start="chunk", num_stages=2
    )
    report = plan_report(config, chunks=84)
    assert report["model_calls"] == 445
    assert report["latent_evaluations"] == 14825
    assert report["first_chunk_after_calls"] == 30
    assert report["pipeline_utilisation"] == pytest.approx(2 / 3, abs=1e-4)
    causal = replace(config, mode="causal", allow_untrained_causal=True)
    assert plan_report(causal, chunks=84)["pipeline_utilisation"] == 0.9981, "what the simulator finds"
    exact = replace(causal, mode="displaced", displaced=DisplacedConfig(resync_every_steps=1))
    assert plan_report(exact, chunks=84)["pipeline_utilisation"] == pytest.approx(2 / 3, abs=1e-4)
    assert report["layer_split"] == [[0, 3], [3, 4]], "this tiny model's decoder weighs as much as its blocks"
    previews = replace(config, preview_decoder="rgb")
    assert plan_report(previews, chunks=84)["layer_split"] == [[0, 2], [2, 4]], "colours weigh nothing"
    pipeline = PAVDMPipeline(Checkpoint.open(model), num_stages=2, preview_decoder="rgb")
    assert pipeline.split(pipeline.params()) == [(0, 2), (2, 4)]
    with pytest.raises(CheckpointError, match="preview_decoder=nowhere: no such file"):
        plan_report(replace(config, preview_decoder="nowhere"), chunks=84)
    config.cpus_per_decoder = 1
    assert plan_report(config, chunks=84)["layer_split"] == [[0, 2], [2, 4]]
    config.num_stages = 5
    with pytest.raises(ConfigError, match=r"num_stages=5: the model has 4 blocks"):
        plan_report(config, chunks=84)


def test_bad_input_ends_before_anything_is_written(model: Path, tmp_path: Path) -> None:
    taken = tmp_path / "taken.mp4"
    taken.write_bytes(b"mine")
    with pytest.raises(ConfigError, match=r"taken.mp4 exists.*--overwrite"):
        _render(model, taken)
    assert taken.read_bytes() == b"mine"
    for settings, error, pattern in [
        ({"height": 33}, ConfigError, r"height=33.*32 or 40"),
        ({"window_chunks": 4}, ConfigError, r"window_chunks=4 does not divide num_inference_steps=6"),
        ({"num_stages": 9}, ConfigError, r"4 blocks, use 1 to 4"),
        ({"prompt": "a " * 40}, ConfigError, r"tokens|words"),
        ({"video": str(tmp_path / "no.mp4"), "start": "chunk"}, MediaError, r"no.mp4"),
    ]:
        with pytest.raises(error, match=pattern):
            _render(model, tmp_path / "none.mp4", **{"num_frames": 8, **settings})
    assert {path.name for path in tmp_path.iterdir()} == {"taken.mp4"}


def test_an_output_that_is_being_written_is_refused(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "v.mp4"
    writing = Recording.open(output, fps=24, height=32, width=48, identity={})
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match=rf"output=.*v\.mp4 is being written by process {os.getpid()}"):
            _render(model, output, overwrite, num_frames=8)
    assert writing.abort() is None
    _render(model, output, num_frames=8)


def test_checkpoints_that_do_not_fit_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no-such-folder"):
        Checkpoint.open(tmp_path / "no-such-folder")
    folder = tiny_checkpoint(tmp_path)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "transformer": ["x", "FluxTransformer"]}))
    with pytest.raises(CheckpointError, match=r"transformer is FluxTransformer, this version runs STDiT3"):
        Checkpoint.open(folder)
    (folder / "model_index.json").write_text(json.dumps(index))
    config = json.loads((folder / "transformer" / "config.json").read_text())
    (folder / "transformer" / "config.json").write_text(json.dumps({**config, "hidden_size": 64}))
    with pytest.raises(CheckpointError, match=r"tensor .* is \[.*\], the model needs"):
        _ = Checkpoint.open(folder).backbone
    (folder / "transformer" / "config.json").write_text(json.dumps({**config, "in_channels": 8}))
    with pytest.raises(CheckpointError, match=r"vae has 4 latent channels, transformer takes 8"):
        Checkpoint.open(folder)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("stages", [0, 1])
def test_ctrl_c_leaves_playable_segments_and_says_where(model: Path, tmp_path: Path, stages: int) -> None:
    words = [PROMPT, f"model={model}", "num_frames=200000", f"num_stages={stages}", "output=v.mp4"]
    words += [f"preview_decoder={tiny_decoder(model)}"] if stages else []
    process = Program(["-m", "pavdm_dist", "sample", *words, "chunks_per_segment=2"], folder=tmp_path)
    parts = tmp_path / "v.mp4.parts"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and len(list(parts.glob("*.mp4")) if parts.exists() else []) < 2:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    errors, _ = process.communicate(timeout=40)
    assert process.returncode == 130
    assert "frames of v.mp4 are playable in v.mp4.parts" in errors.splitlines()[-1]
    assert not (tmp_path / "v.mp4").exists()
    assert not (tmp_path / "v.json").exists()
    segments = sorted(parts.glob("*.mp4"))
    assert len(read_clip(str(segments[0]))) == 5 + 8
    assert Fraction(len(read_clip(str(segments[1])))) == 8 + 8


def test_iter_chunks_takes_requests_lazily(model: Path) -> None:
    pipeline = PAVDMPipeline.from_pretrained(model)
    taken = []

    def endless():
        while True:
            taken.append(len(taken))
            yield VideoRequest(PROMPT, seed=len(taken), num_frames=5)

    chunks = pipeline.iter_chunks(endless(), pipeline.params(guidance_scale=1.0))
    assert [next(chunks).video for _ in range(3)] == [0, 1, 2]
    assert len(taken) == 3


def test_a_run_keeps_nothing_of_videos_that_are_over(model: Path) -> None:
    """A server's run lasts for months."""
    kept, failed = list[tuple[int, ...]](), list[int]()

    def held() -> tuple[int, ...]:
        assert pipeline._running is not None
        return tuple(pipeline._running._videos)

    def requests() -> Iterator[VideoRequest]:
        for number, (prompt, frames) in enumerate(((PROMPT, 9), ("a " * 500, 9), (PROMPT, 4000), (PROMPT, 9))):
            kept.append(held())
            yield VideoRequest(prompt, number, frames)
        kept.append(held())

    with PAVDMPipeline.from_pretrained(model) as pipeline:
        chunks = pipeline.iter_chunks(requests(), pipeline.params(), on_failed=lambda number, _: failed.append(number))
        for chunk in chunks:
            at = pipeline.at_work(chunk.video)
            assert at is not None and at.row > 0 and pipeline.at_work(99) is None
            if chunk.video == 2:
                pipeline.set_prompt(2, 40, "a blue seven")
                with pytest.raises(ConfigError, match="video=0: is over"):
                    pipeline.set_prompt(0, 40, "a blue seven")
                pipeline.cancel(2)
                pipeline.cancel(3)  # before its turn
        engine = pipeline._engines.current
        assert isinstance(engine, InlineEngine)
        assert kept == [()] * 5 and failed == [1] and pipeline.at_work(3) is None and not held()
        assert not pipeline.resyncs


def test_what_is_asked_of_a_video_that_is_being_built_is_for_it(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its clip and its texts take seconds to encode, in which it is neither to come nor in an engine's hands."""
    build, asked = running.build_stream, list[int]()

    def slowly(request: VideoRequest, number: int, *rest: Any) -> Stream:
        built = build(request, number, *rest)
        if number not in asked:
            asked.append(number)
            pipeline.cancel(number) if number == 0 else pipeline.stop(number)
        return built

    monkeypatch.setattr(running, "build_stream", slowly)
    with PAVDMPipeline.from_pretrained(model) as pipeline:
        requests = [VideoRequest(PROMPT, 0, None), VideoRequest(PROMPT, 1, None), VideoRequest("a " * 500, 2, 9)]
        chunks = pipeline.iter_chunks(requests, pipeline.params(guidance_scale=1.0), on_failed=lambda *_: None)
        found = list(islice(chunks, 30))
        assert {chunk.video for chunk in found} == {1} and found[-1].last and len(found) < 10


def test_a_run_that_a_later_one_has_ended_says_so_and_asks_nothing_of_it(model: Path) -> None:
    with PAVDMPipeline.from_pretrained(model) as pipeline:
        endless = [VideoRequest(PROMPT, 0, None)]
        old, new = (pipeline.iter_chunks(endless, pipeline.params(guidance_scale=1.0)) for _ in range(2))
        next(old)
        next(new)
        pipeline.stop(0)
        with pytest.raises(ConfigError, match="this run was ended by a later one"):
            next(old)
        rest = list(islice(new, 20))
        assert rest[-1].last and len(rest) < 10
