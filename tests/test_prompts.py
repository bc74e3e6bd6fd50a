"""Prompts that change: by time, and while a video runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from driving import CUTS, driven, equal, local_gang
from helpers import TINY, reference_chunks, tiny_checkpoint, tiny_model, tiny_stream
from torch import Tensor

from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.commands.progress import ChunkProgress
from pavdm_dist.commands.sample import render_command
from pavdm_dist.commands.videos import Video, Videos
from pavdm_dist.config import PromptChange, SampleConfig, validate_sample
from pavdm_dist.engine.driver import Driver
from pavdm_dist.engine.events import Failed, Finished
from pavdm_dist.engine.options import EngineOptions
from pavdm_dist.errors import ConfigError
from pavdm_dist.io.latents import read_latents
from pavdm_dist.io.metadata import read_sidecar
from pavdm_dist.method.schedule import Mode, WindowPlan
from pavdm_dist.method.stream import Conditioning, NewPrompt, Stream
from pavdm_dist.pipeline import PAVDMPipeline
from pavdm_dist.request.outputs import VideoChunk
from pavdm_dist.request.running import Running, TooLateError
from pavdm_dist.request.video_request import VideoRequest
from pavdm_dist.values.merging import load_config, to_yaml
from pavdm_dist.values.timed import chunk_schedule, first_prompt, timed

MODES: tuple[Mode, ...] = ("window", "causal", "displaced")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


def text(seed: int) -> Tensor:
    return torch.randn(4, TINY.caption_channels, generator=torch.Generator().manual_seed(seed))


# --- prompts by time ---------------------------------------------------------------------------------------------


def test_times_and_the_chunks_that_they_begin_with() -> None:
    assert timed({"20s": "b", "0s": "a", "1m1.5s": "d", "1m": "c"}) == [(0, "a"), (20, "b"), (60, "c"), (61.5, "d")]
    assert first_prompt({"20s": "b"}) is None and first_prompt({"0s": "a"}) == first_prompt({"0m": "a"}) == "a"
    # 24 frames a second, chunks of 17, 20, 20, ...: chunk k >= 1 begins at frame 17 + 20 (k - 1).
    prompts = {"0s": "a", "0.1s": "b", f"{17 / 24 + 0.02:.3f}s": "c", "20s": "d"}
    assert chunk_schedule(prompts, 24, 17, 20) == ((1, "b"), (2, "c"), (25, "d"))
    assert chunk_schedule({"20s": "d"}, 24, 20, 20) == ((24, "d"),)
    assert chunk_schedule({f"{37 / 24:.6f}s": "d"}, 24, 17, 20) == ((2, "d"),)  # rounding is no new chunk


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ({"20": "a"}, "'20' is no time; write 20s"),
        ({"9" * 400 + "s": "a"}, "'" + "9" * 77 + "...' is no time; write 20s"),
        ({"9" * 400 + "m": "a"}, "...' is no time; write 20s"),
        ({"": "a"}, "'' is no time"),
        ({"1h": "a"}, "'1h' is no time"),
        ({"-1s": "a"}, "'-1s' is no time"),
        ({"1s": "  "}, r"timed_prompts\[1s\]='  ': must be a prompt"),
        ({"60s": "a", "1m": "b"}, "60s and 1m are the same time"),
        ({"20s": "a", "20.1s": "b"}, "20 s and at 20.1 s would begin with the same chunk, 25"),
    ],
)
def test_times_that_are_none(prompts: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        chunk_schedule(prompts, 24, 17, 20)


def test_settings_by_file_and_command(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text('timed_prompts:\n  0s: a red three\n  20s: "no"\n')
    config = load_config(SampleConfig, file, ["timed_prompts.30s=a blue seven"])
    assert config.timed_prompts == {"0s": "a red three", "20s": "no", "30s": "a blue seven"}
    validate_sample(config)
    file.write_text(to_yaml(config))
    assert load_config(SampleConfig, file) == config
    assert load_config(SampleConfig, None, ['timed_prompts={"0s": "a: b"}']).timed_prompts == {"0s": "a: b"}
    with pytest.raises(ConfigError, match=r"timed_prompts.20s=False: must be text; YAML reads true or false"):
        load_config(SampleConfig, None, ["timed_prompts={20s: no}"])
    for words, message in (
        (["prompt=x", "timed_prompts={0s: y}"], "give one of them"),
        (["prompt=x", "timed_prompts={1s: y}", "prompt_schedule=[{from_chunk: 2, prompt: z}]"], "give one of them"),
        (["timed_prompts={1s: y}"], "nothing to render"),
        (["prompt=x", "timed_prompts={later: y}"], "'later' is no time"),
    ):
        with pytest.raises(ConfigError, match=message):
            validate_sample(load_config(SampleConfig, None, words))


def test_a_command_and_python_make_the_same_timed_video(model: Path, tmp_path: Path) -> None:
    prompts = {"0s": "a red three", "1s": "a blue seven"}
    config = SampleConfig(model=str(model), output=str(tmp_path / "v.mp4"), num_frames=45, timed_prompts=prompts)
    config.save_latents = True
    validate_sample(config)
    render_command(config, overwrite=False, progress=ChunkProgress)
    with PAVDMPipeline.from_pretrained(model) as pipeline:
        (latents,) = pipeline(prompts, num_frames=45, output_type="latent").frames
        (other,) = pipeline("a red three", num_frames=45, output_type="latent").frames
        with pytest.raises(ConfigError, match="needs one for 0s"):
            pipeline({"1s": "a blue seven"}, num_frames=45)
        with pytest.raises(ConfigError, match="the video has chunks 0 to 5"):
            pipeline({"0s": "a red three", "20s": "a blue seven"}, num_frames=45)
    assert torch.equal(torch.as_tensor(latents), read_latents(tmp_path / "v.safetensors"))
    assert not torch.equal(torch.as_tensor(latents), torch.as_tensor(other))
    # The same command again sees that nothing is left to do.
    assert render_command(config, overwrite=False, progress=ChunkProgress)["frames_per_second"] == 0
    # Frame 24 is in chunk 3 (5 + 8 + 8 = 21): the next chunk that begins is the fourth.
    assert read_sidecar(tmp_path / "v.mp4")["identity"]["prompt_schedule"] == [[4, "a blue seven"]]


# --- prompts while a video runs ----------------------------------------------------------------------------------


def scheduled(stream: Stream, from_chunk: int, new: Tensor) -> Stream:
    """The same stream with a prompt that was known from the start."""
    return replace(stream, conditioning=stream.conditioning.with_prompt(from_chunk, new))


@pytest.mark.parametrize("mode", MODES)
def test_a_prompt_told_to_running_stages_is_one_known_before(mode: Mode) -> None:
    stream, new = tiny_stream(num_chunks=12, mode=mode), NewPrompt(8, "new", text(9))

    def at(driver: Driver, finished: Finished) -> None:
        if finished.clean.index == 1:
            for _ in range(2):  # told twice it is one
                driver.set_prompt(stream.id, new)

    found = driven(stream, CUTS[1], at)
    assert equal(found, reference_chunks(tiny_model(), scheduled(stream, 8, new.text)))
    points = [finished.resume for finished in found if finished.resume is not None]
    assert points[-1].prompts == ((8, "new"),)


def test_one_that_comes_late_is_in_force_at_the_next_birth() -> None:
    stream, new = tiny_stream(num_chunks=12), NewPrompt(0, "new", text(9))

    def at(driver: Driver, finished: Finished) -> None:
        if finished.clean.index == 2:
            driver.set_prompt(stream.id, new)

    found = driven(stream, CUTS[0], at)
    assert found[-1].resume is not None
    ((chunk, prompt),) = found[-1].resume.prompts
    assert prompt == "new" and 5 <= chunk < 12
    assert equal(found, reference_chunks(tiny_model(), scheduled(stream, chunk, new.text)))


def test_one_that_comes_too_late_is_said(caplog: pytest.LogCaptureFixture) -> None:
    stream = tiny_stream(num_chunks=4)
    late = NewPrompt(9, "new", text(9))

    def at(driver: Driver, finished: Finished) -> None:
        driver.set_prompt(stream.id, late)

    assert equal(driven(stream, CUTS[0], at), reference_chunks(tiny_model(), stream))
    assert late.at(stream.plan, 0) is None and NewPrompt(3, "new", text(9)).at(stream.plan, 0) is not None
    assert late.at(stream.plan, stream.plan.num_rows) is None


def test_an_endless_video_changes_and_goes_on_where_it_was_left() -> None:
    endless, new = replace(tiny_stream(), plan=WindowPlan(6, 3, 2)), NewPrompt(7, "new", text(9))

    def at(driver: Driver, finished: Finished) -> None:
        if finished.clean.index == 1:
            driver.set_prompt(0, new)
        if finished.clean.index == 9:
            driver.stop(0)

    found = driven(endless, CUTS[1], at)
    whole = reference_chunks(
        tiny_model(), scheduled(replace(endless, plan=replace(endless.plan, num_chunks=len(found))), 7, new.text)
    )
    assert equal(found, whole)
    # From a point before the change came into force, and from one behind it.
    for index in (4, 8):
        point = found[index].resume
        assert point is not None and point.prompts == ((7, "new"),)
        rest = scheduled(replace(endless, resume=point, plan=replace(endless.plan, num_chunks=len(found))), 7, new.text)
        assert equal(driven(rest, CUTS[0]), whole[index + 1 :])


def test_a_lost_gang_keeps_what_was_told() -> None:
    stream, new = tiny_stream(num_chunks=12), NewPrompt(8, "new", text(9))
    driver = Driver(local_gang(CUTS[0]))
    driver.submit(stream)
    found: list[Finished] = []
    while not driver.idle:
        for output in driver.step(0.0):
            if isinstance(output, Finished):
                found.append(output)
                if output.clean.index == 1:
                    driver.set_prompt(stream.id, new)
                if output.clean.index in (4, 8):
                    driver.adopt(local_gang(CUTS[1]))
    assert equal(found, reference_chunks(tiny_model(), scheduled(stream, 8, new.text)))


def test_a_later_scheduled_prompt_keeps_its_chunk() -> None:
    conditioning = (
        Conditioning.build([(0, text(0)), (10, text(1))], None).with_prompt(4, text(2)).with_prompt(4, text(3))
    )
    keys = [conditioning.key(chunk, 0) for chunk in (3, 4, 9, 10)]
    assert keys[1] == keys[2] and len(set(keys)) == 3
    assert [start for start, _ in conditioning.prompts] == [0, 4, 10]


def test_a_text_that_was_dropped_is_no_other_text() -> None:
    conditioning = Conditioning.build([(0, text(0)), (4, text(1)), (8, text(2))], None)
    kept = conditioning.since(5)
    assert [kept.key(chunk, 0) for chunk in (4, 7, 8)] == [conditioning.key(chunk, 0) for chunk in (4, 7, 8)]
    for chunk in (3, 0, -1):
        with pytest.raises(ValueError, match=f"the text of chunk {chunk} is gone: texts are held from chunk 4 on"):
            kept.key(chunk, 0)
    assert conditioning.key(-1, 0) == conditioning.key(0, 0), "given chunks carry the first prompt"
    assert conditioning.since(-1) == conditioning


def _chunks(
    pipeline: PAVDMPipeline, request: VideoRequest, change: tuple[int, int, str] | None = None
) -> Iterator[VideoChunk]:
    """With a prompt set when a chunk has come: (that chunk, the one from which on, the prompt)."""
    for chunk in pipeline.iter_chunks([request], pipeline.params()):
        if change is not None and chunk.index == change[0]:
            pipeline.set_prompt(0, *change[1:])
        yield chunk


def test_set_prompt_from_python_and_a_resume_with_it(model: Path) -> None:
    known = VideoRequest("a red three", 0, 85, prompt_schedule=((8, "a blue seven"),))
    plain = replace(known, prompt_schedule=())
    with PAVDMPipeline.from_pretrained(model) as pipeline:
        with pytest.raises(ConfigError, match="no video is running"):
            pipeline.set_prompt(0, 0, "a blue seven")
        expected = [chunk.latents for chunk in _chunks(pipeline, known)]
        told = list(_chunks(pipeline, plain, (1, 8, "a blue seven")))
        assert all(torch.equal(a, b.latents) for a, b in zip(expected, told, strict=True))
        assert told[4].resume is not None
        again = replace(plain, resume=told[4].resume)
        rest = list(_chunks(pipeline, again))
        assert [chunk.index for chunk in rest] == list(range(5, 11))
        assert all(torch.equal(a, b.latents) for a, b in zip(expected[5:], rest, strict=True))
        frames = torch.cat([chunk.frames for chunk in rest])
        assert torch.equal(frames, torch.cat([chunk.frames for chunk in told[5:]]))
        for wrong, message in (
            ((0, 11, "a blue seven"), "video 0 has chunks 0 to 10"),
            ((0, -1, "a blue seven"), "from_chunk=-1: must be 0 or more"),
            ((0, 3, "a blue seven drifting up a red"), "has 7 tokens, the model takes at most 5"),
        ):
            chunks = pipeline.iter_chunks([plain], pipeline.params())
            next(chunks)
            with pytest.raises(ConfigError, match=message):
                pipeline.set_prompt(*wrong)
            chunks.close()


def test_a_prompt_that_no_chunk_could_follow_is_refused_also_in_a_video_that_goes_on(model: Path) -> None:
    request = VideoRequest("a red three", 0, 37)
    with PAVDMPipeline.from_pretrained(model) as pipeline:
        taken: dict[bool, list[int]] = {True: [], False: []}
        resume = None
        for chunk in pipeline.iter_chunks([request], pipeline.params()):
            assert chunk.resume is not None
            try:
                pipeline.set_prompt(0, 0, "a blue seven")
                taken[True].append(chunk.index)
            except TooLateError:
                taken[False].append(chunk.index)
                resume = resume or chunk.resume
            if chunk.index == 3:
                break
        assert taken[True] and taken[False] == list(range(len(taken[True]), 4)), "from one row on"
        assert resume is not None
        running = Running(pipeline.params(), pipeline.checkpoint)
        told: list[NewPrompt] = []
        # No engine has it yet, or says where it is.
        engine: Any = SimpleNamespace(at_work=lambda _: None, set_prompt=lambda _, new: told.append(new))
        for again in running.streams([replace(request, resume=resume), request], engine):
            assert not isinstance(again, Failed)
            if again.id:
                running.set_prompt(1, 0, "a blue seven")
            else:
                with pytest.raises(TooLateError, match=r"^video=0: all its chunks are born"):
                    running.set_prompt(0, 0, "a blue seven")
        assert len(told) == 1


def test_an_interrupted_command_goes_on_with_what_was_changed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SampleConfig("a red three", model=str(model), num_frames=85, save_latents=True, chunks_per_segment=3)
    known = replace(config, output=str(tmp_path / "k.mp4"), prompt_schedule=[PromptChange(8, "a blue seven")])
    told = replace(config, output=str(tmp_path / "t.mp4"))
    write = Videos.write

    def interrupted(self: Videos, video: Video, chunk: VideoChunk) -> bool:
        well = write(self, video, chunk)
        if chunk.index == 1:
            self.pipeline.set_prompt(chunk.video, 8, "a blue seven")
        if chunk.index == 4:
            raise KeyboardInterrupt
        return well

    with monkeypatch.context() as patch:
        patch.setattr(Videos, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            render_command(told, overwrite=False, progress=ChunkProgress)
    results = [render_command(one, overwrite=False, progress=ChunkProgress)["videos"][0] for one in (known, told)]
    assert results[0]["latents_sha256"] == results[1]["latents_sha256"]
    sidecar = read_sidecar(tmp_path / "t.mp4")
    assert sidecar["extra"]["prompt_changes"] == [[8, "a blue seven"]]
    assert "prompt_changes" not in read_sidecar(tmp_path / "k.mp4")["extra"]


@pytest.mark.slow  # the stages in this process show the same
def test_a_prompt_told_to_actors_and_tiles_in_the_decoder(ray_cluster: None, model: Path) -> None:
    request = VideoRequest("a red three", 0, 165)
    found = []
    for stages in (0, 2):
        # Without a backlog the stages are two epochs ahead at most: chunk 16 is not born when chunk 1 has come.
        engine = EngineOptions(stages, cpus_per_stage=0.5, backlog_bytes=1) if stages else None
        with PAVDMPipeline(Checkpoint.open(model), stages, engine=engine, decoder_tile=32) as pipeline:
            found.append(list(_chunks(pipeline, request, (1, 16, "a blue seven"))))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one.latents, other.latents) and torch.equal(one.frames, other.frames)
    assert found[1][-1].resume is not None and found[1][-1].resume.prompts == ((16, "a blue seven"),)
