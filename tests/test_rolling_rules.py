"""What remains of the rules for students of few levels: nothing leaks, one masked call, frames, memory, refusals.

Where each of the sheet's oracles is tested; unless a file is named, in ``test_staircase.py``:

| oracle | | test |
|---|---|---|
| 1 | levels | ``test_levels``; another shift: ``test_a_shift_of_its_own`` here |
| 2 | rows | ``test_short_videos_have_the_same_staircase``; ``test_rolling.py::test_rows_of_published_runs`` |
| 3 | counts | ``test_counts``; noises: ``test_without_a_flow_a_chunk_is_its_noises_mixed`` |
| 4 | zero flow | ``test_without_a_flow_a_chunk_is_its_noises_mixed`` |
| 5 | perfect model | ``test_a_perfect_model_gives_its_target_at_every_level`` |
| 6 | conversion | ``test_rolling.py::test_steps_of_published_runs_to_the_bit`` |
| 7 | context | ``test_what_is_read``; ``test_rolling.py::test_rows_of_published_runs`` |
| 8 | clean passes | ``test_what_is_read``; ``test_rolling.py::test_published_runs`` |
| 9 | anchor's place | ``test_rolling_forward.py::test_kept_keys_read_at_other_places`` |
| 10 | shifted places | ``test_any_length_follows_the_rules`` (true places), ``test_memory_is_constant`` (400 chunks) |
| 11 | no leaks | ``test_what_noisy_calls_leave_is_never_read``, ``test_a_clean_call_gives_keys_and_values_alone`` |
| 12 | needed passes | ``test_rolling.py``: ``test_rows_of_published_runs``, ``test_published_runs`` |
| 13 | one call or two | ``test_a_clean_call_and_its_row_are_one_masked_call`` here |
| 14 | both directions | ``test_a_chunk_knows_of_those_that_shared_its_window_alone`` |
| 15 | Self-Forcing | ``test_rolling.py`` (``self_forcing_k4``); ``test_any_length_follows_the_rules[forcing]`` |
| 16 | text | ``test_rolling_forward.py`` (zero rows are read); ``test_stages_equal_one_process`` (two videos) |
| 17 | public class | ``test_wan.py``, ``test_wan_loading.py``; ``test_rolling_forward.py::test_one_forward`` |
| 18 | stages | ``test_stages_equal_one_process`` |
| 19 | going on | ``test_staircase_resume.py`` |
| 20 | frames | ``test_frames_of_a_video`` here; streamed = whole: ``test_codecs_real_layouts.py`` |
| 21 | memory | ``test_memory_at_the_published_size`` here |
| 22 | refusals | ``test_refusals`` here; ``test_staircase_settings.py``; ``test_convert.py`` |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from rolling_cases import relative
from staircase import CUTS, FORCING, MODEL, OTHER, ROLLING, video
from torch import Tensor
from wan_models import INFO, tiny_wan

from pavdm_dist.checkpoint import Checkpoint
from pavdm_dist.codecs.costs import decode_memory
from pavdm_dist.engine.local import LocalEngine
from pavdm_dist.engine.stage import Stage
from pavdm_dist.errors import ConfigError
from pavdm_dist.method.denoiser import StreamDenoiser
from pavdm_dist.method.levels import NoiseSchedule
from pavdm_dist.method.sampler import Denoiser, sample
from pavdm_dist.method.schedule import PlanRow, WindowPlan
from pavdm_dist.method.stream import Stream
from pavdm_dist.models.attention import attention
from pavdm_dist.models.base import Activation, BlockContext
from pavdm_dist.models.clean_memory import CleanMemory
from pavdm_dist.models.kv_cache import Memory, Pair, Turn
from pavdm_dist.models.text_cache import TextRun
from pavdm_dist.models.wan import Wan
from pavdm_dist.planning.memory import MESSAGES, StageMemory
from pavdm_dist.request.sampling import SamplingParams

NAN = float("nan")
# As in docs/models.md.
STUDENT = {
    "num_inference_steps": 5, "window_chunks": 5, "latent_chunk_size": 3, "context": "cached", "context_chunks": 6,
    "anchor_chunks": 1, "step": "renoise", "guidance_scale": 1.0, "height": 480, "width": 832, "fps": 16,
}  # fmt: skip


def sampled(stream: Stream, denoise: Denoiser) -> list[Tensor]:
    return [clean.latents for clean in sample(stream.window(), denoise)]


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))


# --- 1, 20, 22: before anything is computed --------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return Checkpoint.open("wan2.1-t2v-1.3b")


def test_a_shift_of_its_own(checkpoint: Checkpoint) -> None:
    """It shows in the levels, which ``pavdm plan`` prints; a model with a table refuses it."""
    params = SamplingParams.resolve(checkpoint, **STUDENT, time_shift=8.0)
    assert params.schedule.levels[::-1] == pytest.approx([1, 32 / 33, 12 / 13, 16 / 19, 2 / 3, 0], abs=1e-7)
    assert SamplingParams.resolve(checkpoint, **STUDENT).schedule.levels != params.schedule.levels


def test_frames_of_a_video(checkpoint: Checkpoint) -> None:
    """9, then 12 a chunk; other numbers of frames are cut from the next whole chunk."""
    spec = checkpoint.codec_spec
    assert [spec.frames_in_chunk(3, first) for first in (True, False)] == [9, 12]
    for chunks, frames in ((1, 9), (7, 81), (42, 501), (84, 1005)):
        numbers = (max(1, frames - 11), frames, frames + 1)
        assert [spec.chunks_for_frames(n, 3, warm=False) for n in numbers] == [chunks, chunks, chunks + 1]


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ({"guidance_scale": 5.0}, "guidance_scale=5: step=renoise is for models that were distilled with guidance"),
        ({"mode": "displaced"}, "mode=displaced: with context=cached noisy chunks see each other; use mode=window"),
        ({"window_chunks": 2}, "window_chunks=2 does not divide num_inference_steps=5: use window_chunks 1 or 5"),
        ({"context_chunks": 3}, "context_chunks=3: with context=cached a call sees .* use 5 or more"),
        ({"height": 500}, r"height=500 cannot be divided by 8.*nearest legal: 496 or 504"),
        ({"levels": [1.0, 0.5, 0.25]}, "num_inference_steps=5: the model knows 3 levels alone"),
    ],
)
def test_refusals(checkpoint: Checkpoint, chosen: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as refusal:
        SamplingParams.resolve(checkpoint, **{**STUDENT, **chosen})
    assert "\n" not in str(refusal.value)


# --- 21: at the published size, on shapes alone ----------------------------------------------------------


def test_memory_at_the_published_size(checkpoint: Checkpoint) -> None:
    """480x832 in bfloat16: what a block keeps of seven chunks and of a text, what crosses a link; the planner's."""
    shape, params = checkpoint.shape, SamplingParams.resolve(checkpoint, **STUDENT)
    cells = checkpoint.codec_spec.latent_size(params.height, params.width)
    kept = 2 * shape.kv_values(shape.grid(7 * 3, *cells), 0)
    text = 2 * 2 * shape.spec.text_len * shape.spec.hidden_size
    assert (kept / 1e6, text / 1e6) == (pytest.approx(201.3, abs=0.1), pytest.approx(3.15, abs=0.01))
    window, clean = (
        2 * torch.Size(shape.activation_shapes(shape.grid(latents, *cells))[0]).numel() for latents in (15, 3)
    )
    assert (window / 1e6, clean / 1e6) == (pytest.approx(71.9, abs=0.1), pytest.approx(14.4, abs=0.1))
    # The planner's stage: so much for each block, and an eighth chunk while the newest leaves its own.
    assert params.cached == 8 and params.widest == 6
    memory = StageMemory(shape, torch.bfloat16, 1, 3, params.widest, cells, params.cached)
    weights = StageMemory(shape, torch.bfloat16, 1, 3, params.widest, cells)
    many, few = ((memory.bytes("window", (0, n), 1), weights.bytes("window", (0, n), 0)) for n in (20, 10))
    assert (many[0] - few[0]) - (many[1] - few[1]) == 10 * (kept * 8 // 7 + text)
    read = 3 * 8 * clean
    hops = MESSAGES * (window + clean)
    whole = shape.spec.activation_copies * (window + clean)
    assert memory.bytes("window", (0, 10), 1) == few[1] + 10 * (kept * 8 // 7 + text) + read
    assert weights.bytes("window", (10, 20), 0) - weights_of(shape, 10, 20) == whole + hops


def weights_of(shape: Any, first: int, last: int) -> int:
    want = shape.keys(first, last, first=False, last=False)
    return sum(
        value.numel() * (4 if shape.keeps_float32(name) else 2)
        for name, value in shape.state_dict().items()
        if want(name)
    )


def test_what_a_decoder_remembers_at_the_published_size(checkpoint: Checkpoint) -> None:
    """1.889 GB in 16 bit."""
    memory = decode_memory(checkpoint.vae, *checkpoint.codec_spec.latent_size(480, 832), torch.bfloat16)
    assert memory.cache == 1_888_573_440


# --- 11: what nobody may read ----------------------------------------------------------------------------


class Spoiling(CleanMemory):
    """Fills what noisy calls left with NaN, once the call is over."""

    spoiled = 0

    def begin(self, window: tuple[int, ...], chunk: int | None) -> None:
        for pair in getattr(self, "noisy", ()):
            for part in pair:
                part.fill_(NAN)
                Spoiling.spoiled += 1
        self.noisy: list[Pair] = []
        super().begin(window, chunk)

    def attend(self, block: int, keys: Tensor, values: Tensor, first: int, turn: Turn, frame_tokens: int = 1) -> Pair:
        if self._clean is None:
            self.noisy.append((keys, values))
        return super().attend(block, keys, values, first, turn, frame_tokens)


@pytest.mark.parametrize("plan", [ROLLING, OTHER], ids=("rolling", "other"))
def test_what_noisy_calls_leave_is_never_read(plan: WindowPlan) -> None:
    stream, before = video(plan, 9), Spoiling.spoiled
    denoise = StreamDenoiser(MODEL, stream)
    memories: list[Memory | None] = [Spoiling(plan.latent_chunk_size, plan.context_chunks, plan.anchor_chunks)]
    denoise._memories = memories
    assert same(sampled(stream, denoise), sampled(stream, StreamDenoiser(MODEL, stream)))
    assert Spoiling.spoiled - before == 2 * MODEL.spec.num_blocks * (stream.plan.num_rows - 1), "all but the last row's"


def poisoned(spoil: Callable[[int], bool]) -> tuple[Wan, list[int]]:
    """The model, but what leaves chosen blocks in a clean chunk's own call is NaN; and which calls that were."""
    model, seen = tiny_wan(config=MODEL.config), list[int]()
    block = model.block

    def run(index: int, activation: Activation, context: BlockContext) -> Activation:
        out = block(index, activation, context)
        assert isinstance(context.memory, CleanMemory)
        if context.memory._clean is None or not spoil(index):
            return out
        seen.append(context.memory._clean)
        return Activation(torch.full_like(out.hidden, NAN), out.modulation, out.time)

    model.block = run  # type: ignore[method-assign]
    return model, seen


@pytest.mark.parametrize("plan", [ROLLING, FORCING], ids=("rolling", "forcing"))
def test_a_clean_call_gives_keys_and_values_alone(plan: WindowPlan) -> None:
    """In one process and on stages; what leaves an earlier block is read by those behind it."""
    stream = video(plan, 7)
    expected = sampled(stream, StreamDenoiser(MODEL, stream))
    model, seen = poisoned(lambda index: index == 3)
    assert same(sampled(stream, StreamDenoiser(model, stream)), expected) and seen == [*range(6)]
    found = [clean.latents for _, clean in LocalEngine([Stage(model, blocks) for blocks in CUTS[1]]).run([stream])]
    assert same(found, expected) and seen == 2 * [*range(6)]
    spoiled, _ = poisoned(lambda index: index == 2)
    with pytest.raises(Exception, match="not finite"):
        sampled(stream, StreamDenoiser(spoiled, stream))


# --- 13: the newest clean chunk and the window in one call -----------------------------------------------


class OneCall:
    """A row as one masked call, at true places: the clean chunk reads its own past, the window what is the window's.

    Args:
        stream: one step a shift.
        masked: False lets all read all.
    """

    def __init__(self, stream: Stream, masked: bool = True) -> None:
        self.stream, self.masked = stream, masked
        self.kept: dict[int, dict[int, Pair]] = {}

    def begin(self, window: tuple[int, ...], chunk: int | None) -> None: ...

    def attend(self, block: int, keys: Tensor, values: Tensor, first: int, turn: Turn, frame_tokens: int = 1) -> Pair:
        size = 3 * frame_tokens
        for chunk in self.row.context:
            self.kept.setdefault(chunk, {})[block] = keys[..., :size, :], values[..., :size, :]
        read = [(*self.kept[chunk][block], place * size) for chunk, place in self.places]
        read.append((keys, values, first))
        return torch.cat([turn(k, place) for k, _, place in read], -2), torch.cat([v for _, v, _ in read], -2)

    @torch.inference_mode()
    def __call__(self, x: Tensor, levels: Tensor, row: PlanRow, branch: int) -> Tensor:
        plan, stream = self.stream.plan, self.stream
        self.row, front, context = row, row.chunks[0], len(row.context)
        past = [(chunk, chunk) for one in row.context for chunk in plan.reads(row, one)]
        anchors = [chunk for chunk in plan.reads(row) if chunk < plan.anchor_chunks]
        recent = [chunk for chunk in plan.reads(row) if chunk not in anchors]
        oldest = recent[0] if recent else front
        seen = [(chunk, oldest - len(anchors) + chunk) for chunk in anchors] + [(chunk, chunk) for chunk in recent]
        behind = [one for one in seen if one[0] not in row.context]  # the newest is in the call
        self.places = list(dict.fromkeys(past + behind))
        rows = []
        for place, _ in enumerate(row.window):
            own = [context == 0 or (place < context) == (other < context) for other, _ in enumerate(row.window)]
            if place >= context and context:  # a noisy chunk reads the clean one as the newest of the recent
                own[0] = True
            rows.append([one in (past if place < context else behind) for one in self.places] + own)
        grid = MODEL.grid(*x.shape[2:])
        tokens = 3 * grid.tokens_per_frame
        mask = torch.tensor(rows).repeat_interleave(tokens, 0).repeat_interleave(tokens, 1) | (not self.masked)
        runs = [
            TextRun(3 * slot, 3 * slot + 3, MODEL.project_text(text[None]))
            for slot, chunk in enumerate(row.window)
            for text in [stream.conditioning.texts[stream.conditioning.key(chunk, 0)]]
        ]

        def attend(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
            return attention(query, key, value, attn_mask=mask)

        where = BlockContext(grid, runs, first_frame=3 * row.window[0], memory=self, attend=attend)
        activation = MODEL.embed(x, levels, INFO)
        for index in range(MODEL.spec.num_blocks):
            activation = MODEL.block(index, activation, where)
        return MODEL.to_velocity(MODEL.head(activation, grid), x, levels)


@pytest.mark.parametrize("plan", [ROLLING, FORCING], ids=("rolling", "forcing"))
@pytest.mark.parametrize("chunks", [2, 7, 12])
def test_a_clean_call_and_its_row_are_one_masked_call(plan: WindowPlan, chunks: int) -> None:
    if plan is FORCING:
        plan = replace(plan, num_inference_steps=1)  # one step a shift, each of which begins one
    stream = replace(video(plan, chunks), schedule=NoiseSchedule(plan.num_inference_steps, 5.0))
    found, expected = torch.stack(sampled(stream, OneCall(stream))), sampled(stream, StreamDenoiser(MODEL, stream))
    assert relative(found, torch.stack(expected)) < 1e-6
    assert relative(torch.stack(sampled(stream, OneCall(stream, masked=False))), torch.stack(expected)) > 1e-4
