"""Calls as diffusers' users write them: generators, blank texts, names and values that mean something else there."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import tiny_checkpoint

from pavdm_dist import PAVDMPipeline, SamplingParams, VideoRequest
from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.errors import ConfigError, PAVDMError, VideoError
from pavdm_dist.request.call import MAX_RESULT_BYTES, requests_of_call
from pavdm_dist.request.outputs import VideoChunk
from pavdm_dist.values.arguments import seeds_of

PROMPT = "a red three"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pipeline(model: Path) -> PAVDMPipeline:
    return PAVDMPipeline.from_pretrained(model, device="cpu")


@pytest.mark.parametrize("name", ["embedded", "some-org/some-model"])
@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("revison", "did you mean revision?"),
        ("torch_type", "did you mean torch_dtype?"),
        ("variant", "torch_dtype is what weights are turned into"),
        ("cache_dir", "HF_HUB_CACHE names the cache"),
        ("use_safetensors", "from_pretrained takes model, num_stages"),
    ],
)
def test_an_argument_that_is_none_is_named(name: str, argument: str, said: str) -> None:
    arguments: dict[str, Any] = {argument: "main"}
    with pytest.raises(ConfigError) as raised:
        PAVDMPipeline.from_pretrained(name, **arguments)
    assert f"no such argument {argument!r}" in str(raised.value) and said in str(raised.value)


def test_sampling_arguments_are_named_too(pipeline: PAVDMPipeline) -> None:
    instead = {"seconds": "num_frames says how long a video is", "size": r"did you mean height and width\?"}
    for name, said in instead.items():
        with pytest.raises(ConfigError, match=f"no such argument '{name}', {said}; sampling takes"):
            pipeline(PROMPT, **{name: 1})
    with pytest.raises(ConfigError, match=r"no such argument 'num_inference_step', did you mean num_inference_steps\?"):
        SamplingParams.resolve(pipeline.checkpoint, num_inference_step=3)
    with pytest.raises(ConfigError, match=r"no such argument 'eta'; sampling takes"):
        pipeline(PROMPT, eta=0.0)


def test_a_generator_that_is_used_gives_other_seeds() -> None:
    generator = torch.Generator().manual_seed(5)
    assert seeds_of(generator, 0, 3) == [5, 6, 7], "a fresh one is a seed"
    second, third = seeds_of(generator, 0, 2), seeds_of(generator, 0, 2)
    assert len({5, 6, 7, *second, *third}) == 7
    again = torch.Generator().manual_seed(5)
    assert [seeds_of(again, 0, n) for n in (3, 2, 2)] == [[5, 6, 7], second, third], "and can be had again"
    advanced = torch.Generator().manual_seed(5)
    torch.rand(1, generator=advanced)
    assert seeds_of(advanced, 0, 1) != [5]
    shared = torch.Generator().manual_seed(8)
    first, *others = seeds_of([shared] * 3, 0, 3)
    assert first == 8 and len({8, *others}) == 3


def test_videos_of_a_prompt_are_side_by_side_and_what_fits_no_memory_draws_no_seed(pipeline: PAVDMPipeline) -> None:
    params = pipeline.params(guidance_scale=1)
    asked: dict[str, Any] = {"negative_prompt": None, "num_frames": 5, "num_videos_per_prompt": 2, "seed": 3}
    asked |= {"generator": None, "video": None, "image": None, "keeps_frames": True}
    found = requests_of_call(["a", {"0s": "b", "1s": "c"}], params, pipeline.checkpoint, **asked)
    assert [(request.prompt, request.seed) for request in found] == [("a", 3), ("a", 4), ("b", 5), ("b", 6)]
    assert [bool(request.prompt_schedule) for request in found] == [False, False, True, True]
    pixel = params.height * params.width * 3 * 4
    generator = torch.Generator().manual_seed(5)
    asked |= {"generator": generator, "num_frames": MAX_RESULT_BYTES // (2 * pixel) + 1}
    with pytest.raises(ConfigError, match=r"num_frames=\d+: the result would take 4.0 GiB; use iter_chunks\(\)"):
        requests_of_call("a", params, pipeline.checkpoint, **asked)
    latents = requests_of_call("a", params, pipeline.checkpoint, **asked | {"keeps_frames": False})
    assert [request.seed for request in latents] == [5, 6], "nothing was drawn for the refused ones"
    with pytest.raises(ConfigError, match=r"prompt=\[\]: give a text, or a list of them"):
        requests_of_call([], params, pipeline.checkpoint, **asked)
    asked |= {"generator": None, "num_frames": 5, "negative_prompt": ["c", "d"]}
    found = requests_of_call(["a", "b"], params, pipeline.checkpoint, **asked)
    assert [request.negative_prompt for request in found] == ["c", "c", "d", "d"]


def test_one_generator_in_a_loop_makes_another_video_each_time(pipeline: PAVDMPipeline) -> None:
    generator = torch.Generator().manual_seed(0)
    settings: dict[str, Any] = {"num_frames": 5, "output_type": "latent", "guidance_scale": 1}
    one, two = (pipeline(PROMPT, generator=generator, **settings).frames[0] for _ in range(2))
    assert not torch.equal(one, two)
    assert torch.equal(one, pipeline(PROMPT, seed=0, **settings).frames[0])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"seed": -1}, "seed=-1: must be 0 or more; random.randrange"),
        ({"seed": None}, "seed=null: must be a whole number"),
        ({"seed": 1.0}, "seed=1.0: must be a whole number"),
        ({"seed": "5"}, "seed='5': must be a whole number"),
        ({"num_frames": "five"}, "num_frames=five: must be a whole number"),
        ({"num_frames": ""}, "num_frames='': must be a whole number"),
        ({"lookahead": "true"}, "lookahead='true': must be true or false"),
        ({"generator": 3}, "generator: must be a torch.Generator, or a list of them; seed takes a number"),
        ({"generator": [torch.Generator()] * 2}, "generator: 2 generators for 1 videos"),
        ({"prompt": None}, "prompt=null: give a text"),
        ({"prompt": 5}, "prompt=5: give a text"),
        ({"prompt": []}, "give a text, or a list of them"),
        ({"prompt": [7]}, "prompt=7: must be text, one for each video"),
        ({"prompt": "a\0b"}, "prompt 'a\\x00b' is not text: a file can hold neither NUL nor half a character"),
        ({"negative_prompt": ["a", "b"]}, "negative_prompt=['a', 'b']: must be one text, which is for all videos of"),
        (
            {"negative_prompt": [3]},
            "negative_prompt=[3]: must be one text, which is for all videos of the call, or a list",
        ),
        ({"negative_prompt": 3}, "negative_prompt=3: must be text"),
        (
            {"callback_on_step_end_tensor_inputs": ["prompt_embeds"]},
            "callback_on_step_end_tensor_inputs=['prompt_embeds']: must be ['latents']",
        ),
        ({"callback_on_step_end_tensor_inputs": "latents"}, "callback_on_step_end_tensor_inputs=latents: must be"),
        ({"output_type": []}, "output_type=[]: must be one of"),
        ({"latents": None}, "no such argument 'latents'"),
        ({"max_sequence_length": 512}, "no such argument 'max_sequence_length'"),
        ({"num_videos_per_prompt": None}, "num_videos_per_prompt=None: must be 1 to 1,000,000"),
        ({"num_frames": None}, "num_frames=None: a whole video needs a number; iter_chunks() takes endless ones"),
        ({"num_frames": 5.0}, "num_frames=5.0: must be a whole number"),
        ({"num_frames": "5"}, "num_frames='5': must be a whole number"),
        ({"num_frames": 0}, "num_frames=0: must be above 0"),
        ({"num_videos_per_prompt": 0}, "num_videos_per_prompt=0: must be 1 to 1,000,000"),
        ({"num_videos_per_prompt": 1.5}, "num_videos_per_prompt=1.5: must be a whole number"),
        ({"guidance_scale": "3"}, "guidance_scale='3': must be a number"),
        ({"guidance_scale": -3.0}, "guidance_scale=-3.0: must be 0 or more"),
        ({"guidance_scale": float("inf")}, "guidance_scale=inf: must be a finite number"),
        ({"context_noise": 2.0}, "context_noise=2.0: must be 0 to 0.9"),
        ({"context_noise": True}, "context_noise=True: must be a number"),
        ({"fps": 0}, "fps=0: must be above 0"),
        ({"fps": float("inf")}, "fps=inf: must be a finite number"),
        ({"time_shift": 0}, "time_shift=0: must be above 0"),
        ({"height": 32.5}, "height=32.5: must be a whole number"),
        ({"chunks_per_unit": "2"}, "chunks_per_unit='2': must be a whole number"),
        ({"anchor_chunks": "1"}, "anchor_chunks='1': must be a whole number"),
        ({"prompt_suffix": 5}, "prompt_suffix=5: must be text"),
        ({"video": "x.mp4"}, "video=x.mp4: must be uint8 frames [height, width, 3]"),
        ({"video": [np.zeros((2, 3)), np.zeros((4, 5))]}, ": must be uint8 frames [height, width, 3]"),
    ],
)
def test_values_that_cannot_be_are_named(pipeline: PAVDMPipeline, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        pipeline(**{"prompt": PROMPT, "num_frames": 5, **arguments})
    assert said in str(raised.value)


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        (((-3, "blue"),), "prompt_schedule[0]=(-3, 'blue'): must begin behind chunk 0"),
        (((0, "blue"),), "prompt_schedule[0]=(0, 'blue'): must begin behind chunk 0"),
        (((1, "blue"), (1, "red")), "prompt_schedule[1]=(1, 'red'): must begin behind chunk 1"),
        ((("1", "blue"),), "prompt_schedule[0][0]='1': must be a whole number"),
        (((1, 5),), "prompt_schedule[0][1]=5: must be text"),
        ((5,), "prompt_schedule[0]=5: must be a list of 2"),
    ],
)
def test_a_prompt_schedule_rises_from_chunk_1(schedule: Any, said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        VideoRequest(PROMPT, 0, 21, prompt_schedule=schedule)
    assert said in str(raised.value) and "an entry is (first chunk, prompt), and they rise" in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"threads_per_stage": 0}, "threads_per_stage=0: must be above 0"),
        ({"num_stages": "2"}, "num_stages='2': must be a whole number"),
        ({"num_stages": 1.5}, "num_stages=1.5: must be a whole number"),
        ({"decoder_tile": "16"}, "decoder_tile='16': must be a whole number"),
        ({"model": None}, "model=null: must be the name of a model, a folder or a hub id"),
        ({"engine": {}}, "engine={}: must be pavdm_dist.engine.options.EngineOptions, or None"),
        ({"lora": 5}, "lora=5: must be a list of pavdm_dist.models.source.Adapter"),
        ({"lora": "x"}, "lora=x: must be a list of pavdm_dist.models.source.Adapter"),
        ({"device": "mps"}, "device=mps: must be auto, cpu or cuda"),
        ({"device": "meta"}, "device=meta: must be auto, cpu or cuda"),
        ({"device": "cpu:3"}, "device=cpu:3: must be auto, cpu or cuda"),
    ],
)
def test_a_pipeline_that_cannot_be_is_refused(model: Path, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        PAVDMPipeline.from_pretrained(**{"model": model, **arguments})
    assert said in str(raised.value)


def test_none_is_nothing_said(model: Path) -> None:
    pipeline = PAVDMPipeline.from_pretrained(model, lora=None, device="cpu")
    assert not pipeline.checkpoint.adapters
    before = pipeline.computed_on, pipeline.dtype_name
    assert pipeline.to(None) is pipeline and (pipeline.computed_on, pipeline.dtype_name) == before
    assert pipeline.to(None, torch.bfloat16).dtype_name == "bfloat16"


@pytest.mark.parametrize("streams", ["abc", "2", -3, 0, 1.5, 2000])
def test_streams_are_a_count(pipeline: PAVDMPipeline, streams: Any) -> None:
    shown = "'2'" if streams == "2" else streams
    with pytest.raises(ConfigError, match=rf"streams={shown}: must be "):
        pipeline(PROMPT, num_frames=5, streams=streams)
    with pytest.raises(ConfigError, match=rf"streams={shown}: must be "):
        next(pipeline.iter_chunks([VideoRequest(PROMPT, 0, 5)], pipeline.params(), streams))


@pytest.mark.parametrize(
    ("what", "arguments", "said"),
    [
        ("set_prompt", (0, 5, None), "text=null: must be text"),
        ("set_prompt", ("0", 5, PROMPT), "video='0': must be a whole number"),
        ("set_prompt", (0, "5", PROMPT), "from_chunk='5': must be a whole number"),
        ("set_prompt", (-1, 5, PROMPT), "video=-1: must be 0 or more"),
        ("stop", ("0",), "video='0': must be a whole number"),
        ("cancel", (None,), "video=null: must be a whole number"),
    ],
)
def test_what_is_asked_of_a_running_video_is_checked(
    pipeline: PAVDMPipeline, what: str, arguments: tuple[Any, ...], said: str
) -> None:
    chunks = pipeline.iter_chunks([VideoRequest(PROMPT, 0, 21)], pipeline.params())
    next(chunks)
    with pytest.raises(ConfigError, match=said):
        getattr(pipeline, what)(*arguments)
    chunks.close()


@pytest.mark.parametrize("shape", [(9, 64, 48, 3), (9, 32, 48, 4), (9, 32, 48), "float"])
def test_a_clip_of_another_size_ends_its_video_alone(pipeline: PAVDMPipeline, shape: Any) -> None:
    params = pipeline.params(start="chunk")
    fitting = torch.zeros((9, 32, 48, 3), dtype=torch.uint8)
    other = fitting.float() if shape == "float" else torch.zeros(shape, dtype=torch.uint8)
    requests, failed = [VideoRequest(PROMPT, 1, 8, clip=clip) for clip in (other, fitting)], dict[int, PAVDMError]()
    found = list(pipeline.iter_chunks(requests, params, on_failed=failed.__setitem__))
    assert {chunk.video for chunk in found} == {1} and list(failed) == [0]
    got = re.escape(f"{str(other.dtype).removeprefix('torch.')} {list(other.shape)}")
    assert re.fullmatch(rf"video: must be uint8 \[t, 32, 48, 3\], got {got}", str(failed[0]))


def test_a_video_that_is_cancelled_is_no_whole_one(pipeline: PAVDMPipeline) -> None:
    def cancelling(chunk: VideoChunk) -> None:
        if (chunk.video, chunk.index) == (0, 1):
            pipeline.cancel(0)
            pipeline.cancel(2)

    with pytest.raises(VideoError, match=r"cancelled before the end: video 0, 2 of 3, counted from 0; iter_chunks\(\)"):
        pipeline([PROMPT] * 3, num_frames=45, callback_on_chunk=cancelling)
    pipeline.cancel(0)  # too late for that call, and not for the next one
    assert pipeline(PROMPT, num_frames=5).frames[0].shape[0] == 5


def test_numbers_of_numpy_are_numbers(pipeline: PAVDMPipeline) -> None:
    one = pipeline(PROMPT, num_frames=np.int64(5), num_inference_steps=np.int32(3), guidance_scale=np.float32(2))
    other = pipeline(PROMPT, num_frames=5, num_inference_steps=3, guidance_scale=2)
    np.testing.assert_array_equal(one.frames[0], other.frames[0])


def test_a_device_and_a_type_have_names(model: Path) -> None:
    pipeline = PAVDMPipeline.from_pretrained(model, device="cpu")
    assert pipeline.to(device="cpu", dtype=torch.bfloat16) is pipeline and pipeline.dtype_name == "bfloat16"
    assert pipeline.to(torch.float32).to(device="cpu").dtype_name == "float32"


def test_a_blank_negative_prompt_is_none(pipeline: PAVDMPipeline) -> None:
    for blank in ("", " ", "\t\n", "\u00a0"):
        assert VideoRequest(PROMPT, 0, 5, blank) == VideoRequest(PROMPT, 0, 5)
    made = [
        pipeline(PROMPT, negative_prompt=text, num_frames=5, output_type="latent").frames[0]
        for text in (None, "", "seven")
    ]
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])
    # Nor is it one that guidance_scale=1 would not use.
    pipeline(PROMPT, negative_prompt=" ", num_frames=5, guidance_scale=1)


def test_seeds_of_numpy_are_numbers() -> None:
    request = VideoRequest(PROMPT, np.int64(3), 5)  # type: ignore[arg-type]
    assert type(request.seed) is int and request == VideoRequest(PROMPT, 3, 5)


def test_guidance_below_one_is_told(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Elsewhere anything up to 1 is no guidance; here 0 is the model without its prompt."""
    logging.getLogger("pavdm_dist").propagate = True
    checkpoint = Checkpoint.open(model)
    SamplingParams.resolve(checkpoint, guidance_scale=1.0)
    assert not caplog.records
    SamplingParams.resolve(checkpoint, guidance_scale=0.0)
    assert "guidance_scale=0: below 1 the prompt counts for less" in caplog.text


def test_latents_that_a_callback_changes_are_refused(pipeline: PAVDMPipeline) -> None:
    def same(pipe: Any, step: int, level: float, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return given

    def others(pipe: Any, step: int, level: float, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        given["latents"] = given["latents"] * 0
        return given

    settings: dict[str, Any] = {"num_frames": 5, "guidance_scale": 1}
    seen = list[torch.Tensor]()

    def popping(pipe: Any, step: int, level: float, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        seen.append(given.pop("latents"))  # as callbacks for diffusers do, at every step
        return {"latents": seen[-1]}

    pipeline(PROMPT, callback_on_step_end=same, **settings)
    (latents,) = pipeline(PROMPT, callback_on_step_end=popping, output_type="latent", **settings).frames
    assert all(one.dim() == 5 for one in seen) and torch.equal(seen[-1][0], latents), "the last row's own chunk, clean"
    seen.clear()
    pipeline(PROMPT, callback_on_step_end=popping, end="cut", context_chunks=0, **settings)
    assert seen[-1].shape == seen[-2].shape, "those that are discarded, too"
    inputs = ["latents"]
    output = pipeline(PROMPT, callback_on_step_end=lambda *_: {}, callback_on_step_end_tensor_inputs=inputs, **settings)
    assert output[0] is output["frames"] is output.frames and output[:1] == (output.frames,)
    with pytest.raises(KeyError, match="video"):
        output["video"]
    with pytest.raises(ConfigError, match="callback_on_step_end: gave other latents back; here they can be looked at"):
        pipeline(PROMPT, callback_on_step_end=others, **settings)
