"""The few-level staircase by its rules: levels, rows, what is read and what is drawn; stages equal one process."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import TINY, tiny_model
from rolling_cases import relative
from staircase import CUTS, FEW, FORCING, FOUR, LONG, MODEL, NAMES, PLANS, ROLLING, latents_of, of, video
from torch import Tensor
from wan_models import INFO, WAN, random, tiny_wan

from pavdm_dist.engine.local import LocalEngine
from pavdm_dist.engine.stage import Stage
from pavdm_dist.errors import ConfigError
from pavdm_dist.method.denoiser import StreamDenoiser
from pavdm_dist.method.levels import NoiseSchedule
from pavdm_dist.method.sampler import sample
from pavdm_dist.method.schedule import PlanRow, WindowPlan
from pavdm_dist.method.stream import Conditioning, Stream
from pavdm_dist.method.window import Window, chunk_noise
from pavdm_dist.models.base import BlockContext
from pavdm_dist.models.clean_memory import CleanMemory
from pavdm_dist.models.kv_cache import Pair, Turn
from pavdm_dist.models.text_cache import TextRun

FINAL = 1e-5


# --- what follows from the rules -------------------------------------------------------------------------


def test_levels() -> None:
    assert FEW.levels[::-1] == pytest.approx([1, 20 / 21, 15 / 17, 10 / 13, 5 / 9, 0], abs=1e-7)
    assert FOUR.levels[::-1] == pytest.approx([1, 15 / 16, 5 / 6, 5 / 8, 0], abs=1e-7)
    table = NoiseSchedule(2, table=(0.9523810148239136, 0.5))
    assert table.levels == (0.0, 0.5, 0.9523810148239136) and table.level(2) == table.levels[2]


@pytest.mark.parametrize("table", [(), (1.0, 1.0), (0.5, 0.75), (1.5, 0.5), (0.5, 0.0), (1.0,)])
def test_levels_that_are_none_are_refused(table: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match=r"levels|num_inference_steps=1$"):
        NoiseSchedule(2, table=table)


def test_short_videos_have_the_same_staircase() -> None:
    """A chunk is in T rows, whatever the length; the levels never stand still."""
    rows = [[*zip(row.chunks, (5 - left for left in row.steps_left), strict=True)] for row in of(ROLLING, 2).rows()]
    assert rows == [
        [(0, 0)], [(0, 1), (1, 0)], [(0, 2), (1, 1)], [(0, 3), (1, 2)], [(0, 4), (1, 3)], [(1, 4)]
    ]  # fmt: skip
    assert [of(ROLLING, chunks).num_rows for chunks in (1, 2, 5, 7, 42)] == [5, 6, 9, 11, 46]


def test_counts() -> None:
    """Latents through the model: T W of them a shift and chunk, and every chunk but the last once more."""
    assert [of(ROLLING, n).latent_evaluations for n in (7, 12, 42, 84, 341)] == [123, 213, 753, 1509, 6135]
    assert of(LONG, 7).latent_evaluations == of(FORCING, 7).latent_evaluations == 102


def test_what_is_read() -> None:
    plan = of(ROLLING, 12)
    assert [plan.reads(plan.row(n)) for n in (*range(4, 12), 15)] == [
        (), (0,), (0, 1), (0, 2), (0, 3), (0, 4), (0, 5), (0, 6), (0, 6, 7, 8, 9, 10)
    ]  # fmt: skip
    assert [plan.reads(plan.row(n), n - 5) for n in (5, 8, 11, 12, 15)] == [
        (), (0, 1, 2), (0, 1, 2, 3, 4, 5), (1, 2, 3, 4, 5, 6), (4, 5, 6, 7, 8, 9)
    ]  # fmt: skip
    assert plan.kept(5) == () and plan.kept(6) == (0,) and plan.kept(13) == (0, 2, 3, 4, 5, 6, 7)
    assert plan.kept(15) == (0, 4, 5, 6, 7, 8, 9) and plan.kept(16) == ()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"context_chunks": 4}, "use 5 or more"),
        ({"context": "joint"}, "anchor_chunks=1: context=joint keeps none"),
        ({"start": "chunk"}, "start=chunk gives chunks that left no keys"),
        ({"anchor_chunks": -1}, "anchor_chunks=-1: 0 or more"),
        ({"context": "kept"}, "must be joint or cached"),
    ],
)
def test_plans_that_cannot_be_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        replace(ROLLING, **wrong)


# Shares of a chunk's noises where the model gives no flow; a wrong level, one noise for all or an Euler step differ.
SHARES = {5: (8 / 13923, 160 / 13923, 20 / 221, 40 / 117, 5 / 9), 4: (1 / 256, 15 / 256, 5 / 16, 5 / 8)}


class Noises:
    """Unit noise by chunk and step, which remembers what was asked for."""

    def __init__(self) -> None:
        self.drawn: list[tuple[int, str]] = []

    def __call__(self, index: int, use: str = "0") -> Tensor:
        self.drawn.append((index, use))
        return self.of(index, int(use))

    @staticmethod
    def of(index: int, step: int) -> Tensor:
        return chunk_noise(3, index, (2, 3, 2, 2), str(step) if step else "")


@pytest.mark.parametrize("chunks", [1, 2, 5, 7])
@pytest.mark.parametrize("schedule", [FEW, FOUR], ids=("T=5", "T=4"))
def test_without_a_flow_a_chunk_is_its_noises_mixed(schedule: NoiseSchedule, chunks: int) -> None:
    steps, noises = schedule.num_inference_steps, Noises()
    window = Window(of(ROLLING if steps == 5 else LONG, chunks), schedule, noises, again=noises, step="renoise")
    for clean in sample(window, lambda x, levels, row, branch: torch.zeros_like(x)):
        expected = sum(share * noises.of(clean.index, step) for step, share in enumerate(SHARES[steps]))
        assert (clean.latents - expected).abs().max() < 1e-6
    assert sorted(noises.drawn) == [(chunk, str(step)) for chunk in range(chunks) for step in range(steps)]


@pytest.mark.parametrize("chunks", [1, 2, 4, 8])
def test_a_perfect_model_gives_its_target_at_every_level(chunks: int) -> None:
    noises = Noises()
    window = Window(of(ROLLING, chunks), FEW, noises, again=noises, step="renoise")

    def target(index: int) -> Tensor:
        return chunk_noise(99, index, (2, 3, 2, 2))

    def perfect(x: Tensor, levels: Tensor, row: PlanRow, branch: int) -> Tensor:
        goal = torch.cat([target(index) for index in row.window], dim=1).unsqueeze(0)
        for slot, (index, left) in enumerate(zip(row.chunks, row.steps_left, strict=True), start=len(row.context)):
            level = FEW.levels[left]
            expected = (1 - level) * target(index) + level * noises.of(index, 5 - left)
            assert (x[0, :, 3 * slot : 3 * slot + 3] - expected).abs().max() < 1e-6
        return (goal - x) / levels.clamp(min=1e-6)[:, None, :, None, None]

    for clean in sample(window, perfect):
        assert (clean.latents - target(clean.index)).abs().max() < 1e-6


# --- with a model ----------------------------------------------------------------------------------------


@torch.inference_mode()
def by_hand(stream: Stream) -> list[Tensor]:
    """Chunk by chunk from the rules, at true places: no plan, no memory, no window."""
    steps, width = stream.plan.num_inference_steps, stream.plan.window_chunks
    chunks, span, levels = stream.plan.num_chunks or 0, stream.plan.context_chunks + 1, stream.schedule.levels[::-1]
    kept: dict[int, dict[int, Pair]] = {}
    state = [noise(stream, index, 0) for index in range(chunks)]

    class Places:
        def __init__(self, read: list[tuple[int, int]]) -> None:
            self.read, self.left = read, dict[int, Pair]()

        def begin(self, window: tuple[int, ...], chunk: int | None) -> None: ...

        def attend(self, block: int, keys: Tensor, values: Tensor, first: int, turn: Turn, frame_tokens: int) -> Pair:
            self.left[block] = keys, values
            pairs = [(*kept[index][block], place * 3 * frame_tokens) for index, place in self.read]
            pairs.append((keys, values, first))
            return torch.cat([turn(k, at) for k, _, at in pairs], -2), torch.cat([v for _, v, _ in pairs], -2)

    def call(own: list[int], times: list[float], read: list[tuple[int, int]]) -> tuple[Tensor, dict[int, Pair]]:
        memory, x = Places(read), torch.cat([state[index] for index in own], dim=1)[None]
        texts = [stream.conditioning.texts[stream.conditioning.key(index, 0)] for index in own]
        runs = [TextRun(3 * slot, 3 * slot + 3, MODEL.project_text(text[None])) for slot, text in enumerate(texts)]
        context = BlockContext(MODEL.grid(*x.shape[2:]), runs, first_frame=3 * own[0], memory=memory)
        activation = MODEL.embed(x, torch.tensor(times).repeat_interleave(3)[None], INFO)
        for index in range(MODEL.spec.num_blocks):
            activation = MODEL.block(index, activation, context)
        return MODEL.head(activation, context.grid)[0], memory.left

    shift = steps // width
    for row in range((chunks - 1) * shift + steps):
        own = [index for index in range(chunks) if 0 <= row - index * shift < steps]
        done, front = [row - index * shift for index in own], own[0]
        anchors = min(stream.plan.anchor_chunks, front)
        recent = range(max(anchors, front - (span - len(own) - anchors)), front)
        oldest = recent[0] if recent else front
        read = [(index, oldest - anchors + index) for index in range(anchors)] + [(index, index) for index in recent]
        flow, _ = call(own, [levels[step] for step in done], read)
        for index, step, part in zip(own, done, flow.split(3, dim=1), strict=True):
            state[index] = (state[index].double() - levels[step] * part.double()).float()
            if step + 1 < steps:
                level = levels[step + 1]
                state[index] = (1 - level) * state[index] + level * noise(stream, index, step + 1)
            else:
                before = [(seen, seen) for seen in range(max(0, index - span + 1), index)]
                _, kept[index] = call([index], [0.0], before)
    return state


def noise(stream: Stream, index: int, step: int) -> Tensor:
    return chunk_noise(stream.seed, index, (4, 3, 4, 4), str(step) if step else "")


@pytest.mark.parametrize("chunks", [1, 2, 4, 10])
@pytest.mark.parametrize("plan", PLANS, ids=NAMES)
def test_any_length_follows_the_rules(plan: WindowPlan, chunks: int) -> None:
    stream = video(plan, chunks)
    for found, expected in zip(latents_of(stream), by_hand(stream), strict=True):
        assert relative(found, expected) < FINAL


def test_a_chunk_knows_of_those_that_shared_its_window_alone() -> None:
    short, long = (latents_of(video(ROLLING, chunks)) for chunks in (7, 9))
    assert [torch.equal(one, two) for one, two in zip(short, long[:7], strict=True)] == [True] * 3 + [False] * 4


@pytest.mark.parametrize("plan", PLANS, ids=NAMES)
def test_stages_equal_one_process(plan: WindowPlan) -> None:
    """Any cut, two videos side by side, each with a cache of its own."""
    streams = [video(plan, chunks, number) for number, chunks in enumerate((9, 3))]
    expected = [latents_of(stream) for stream in streams]
    for cut in CUTS:
        chunks: list[list[Tensor]] = [[], []]
        for number, clean in LocalEngine([Stage(MODEL, blocks) for blocks in cut]).run(streams, 2):
            chunks[number].append(clean.latents)
        for found, wanted in zip(chunks, expected, strict=True):
            assert all(torch.equal(one, two) for one, two in zip(found, wanted, strict=True))


def test_attention_over_the_frames_of_a_place_does_as_well() -> None:
    """A model of another kind, with blocks that leave nothing, each on a stage of its own."""
    model, texts = tiny_model(), {"a": random(3, TINY.caption_channels)}
    stream = replace(video(ROLLING, 8), conditioning=Conditioning(texts, ((0, "a"),)))
    expected = [clean.latents for clean in sample(stream.window(), StreamDenoiser(model, stream))]
    blocks = model.spec.num_blocks
    for cut in ([(0, blocks)], [(block, block + 1) for block in range(blocks)]):
        found = [clean.latents for _, clean in LocalEngine([Stage(model, part) for part in cut]).run([stream])]
        assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))


def test_memory_is_constant() -> None:
    """From the chunk on that has seen all of its past to chunk 400, and past the 1024 places of a common table."""
    model = tiny_wan(config=replace(WAN, num_layers=1))
    stream = replace(video(ROLLING, 400), latent_shape=(4, 2, 2))
    denoise, held = StreamDenoiser(model, stream), list[tuple[int, int]]()
    memory = denoise._memories[0]
    assert isinstance(memory, CleanMemory)

    def after(row: PlanRow, window: Window, _: object) -> None:
        held.append((memory.num_bytes, len(window.snapshot().latents)))

    for clean in sample(stream.window(), denoise, callback=after):
        assert clean.latents.isfinite().all()
    chunk = 2 * 4 * 3 * model.config.width  # bytes: keys and values of three latents of one token
    assert set(held[12:400]) == {(7 * chunk, 5)} and max(size for size, _ in held) == 7 * chunk
    (tables,) = model.rope._tables.values()
    assert [len(cos) for cos, _ in tables] == [8, 16, 24], "angles of the places of a call, however long the video"
