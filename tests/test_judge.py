"""The judge: what the world drew is read back, and what was not asked for is called wrong."""

from __future__ import annotations

import math
import sys
from dataclasses import replace

import numpy as np
import pytest
from needs import needs

from pavdm_dist.digits import handwriting, world
from pavdm_dist.digits.judge import Judge, torus_centre
from pavdm_dist.digits.law import Motion, bouncing, drifting, stretches
from pavdm_dist.digits.prompts import AskedDigit, parse_prompt
from pavdm_dist.digits.scores import ChunkScore, displacements, line_errors, score_chunk, score_chunks, summarise
from pavdm_dist.digits.settings import SHIPPED
from pavdm_dist.digits.world import COLOURS, DIRECTIONS, FPS, SPEEDS, Digit, Scene
from pavdm_dist.errors import ConfigError

needs("draws handwritten digits", "sklearn")


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge()


def heldout(count: int, num_digits: int | None = None) -> list[Scene]:
    rng = np.random.default_rng(41)
    return [world.sample_scene(rng, "heldout", num_digits) for _ in range(count)]


def one(judge: Judge, frames: np.ndarray, prompt: str | tuple[AskedDigit, ...]) -> ChunkScore:
    asked = parse_prompt(prompt) if isinstance(prompt, str) else prompt
    return score_chunks(judge, frames, asked, FPS, len(frames))[0]


def lone(scene: Scene, **changes: object) -> tuple[AskedDigit, ...]:
    return (replace(parse_prompt(world.scene_prompt(scene))[0], **changes),)  # type: ignore[arg-type]


# --- prompts ----------------------------------------------------------------------------------------------------------


def test_every_prompt_of_the_world_is_read_back() -> None:
    for scene in heldout(100):
        for asked, digit in zip(parse_prompt(world.scene_prompt(scene)), scene.digits, strict=True):
            assert (asked.number, asked.colour, asked.motion) == (digit.number, digit.colour, digit.motion)
            assert asked.speed == pytest.approx(math.hypot(*digit.velocity))
            if asked.angle is not None:
                assert math.remainder(asked.angle - math.atan2(*digit.velocity), 2 * math.pi) == pytest.approx(0)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("a red elephant drifting up", "'a red elephant drifting up' is not of the form"),
        ("a red three drifting", "'a red three drifting' is not of the form"),
        ("a red three bouncing up", "'a red three bouncing up' is not of the form"),
        ("", "'' is not of the form"),
        ("a red three bouncing, a red four bouncing", "two digits of one colour"),
    ],
)
def test_prompts_of_another_world_are_refused(prompt: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_prompt(prompt)


# --- the judge on real frames -----------------------------------------------------------------------------------------


def test_real_videos_are_read_right(judge: Judge) -> None:
    scores = []
    for scene in heldout(24):
        scores += score_chunks(judge, world.render(scene, 0, 80), parse_prompt(world.scene_prompt(scene)), FPS)
    means = summarise(scores)
    assert means["digit"] is not None and means["digit"] > 0.98
    assert means["colour"] is not None and means["colour"] > 0.97
    assert means["count"] is not None and means["count"] > 0.97
    assert means["direction"] is not None and means["direction"] > 0.97
    assert means["speed_ratio"] == pytest.approx(1, abs=0.1)
    assert means["trajectory_error"] is not None and means["trajectory_error"] < 0.2
    assert means["law_error"] is not None and means["law_error"] < 0.15 and means["bounce"] == 1
    assert means["followed"] is not None and 0.8 < means["followed"] < 1, "some are behind others"
    assert means["frozen"] == means["empty"] == means["duplicated"] == 0


@pytest.mark.parametrize("fps", [1, 5, 15, 25, 30])
def test_speed_is_right_at_every_rate(judge: Judge, fps: int) -> None:
    image = int(handwriting.clear_images("heldout")[3][0])
    velocity = (0.0, SPEEDS[""] * FPS / fps)  # as the world's clock goes
    digit = Digit(3, image, "cyan", "drifting", "to the right", "", (30.0, 50.0), velocity)
    scene = Scene((digit,), (20, 20, 20), (0, 0))
    score = score_chunk(judge, world.render(scene, 0, 20), None, parse_prompt(world.scene_prompt(scene)), fps)
    assert score.direction == 1 and score.speed_ratio == pytest.approx(1, abs=0.03) and score.followed == 1


def test_every_speed_and_direction_is_measured(judge: Judge) -> None:
    image = int(handwriting.clear_images("heldout")[3][0])
    for word, speed in SPEEDS.items():
        for phrase, step in DIRECTIONS.items():
            angle = math.atan2(*step)
            velocity = (speed * math.sin(angle), speed * math.cos(angle))
            digit = Digit(3, image, "cyan", "drifting", phrase, word, (30.0, 50.0), velocity)
            score = one(judge, world.render(Scene((digit,), (20, 20, 20), (0, 0)), 0, 20), parse_prompt(
                world.scene_prompt(Scene((digit,), (20, 20, 20), (0, 0)))
            ))  # fmt: skip
            assert score.direction == 1 and score.speed_ratio == pytest.approx(1, abs=0.08), (word, phrase)


def test_what_was_not_asked_for_is_wrong(judge: Judge) -> None:
    for scene in heldout(12, num_digits=1):
        frames, digit = world.render(scene, 0, 20), scene.digits[0]
        other = next(colour for colour in COLOURS if colour != digit.colour)
        assert one(judge, frames, lone(scene)).digit == 1
        assert one(judge, frames, lone(scene, number=(digit.number + 1) % 10)).digit == 0
        wrong = one(judge, frames, lone(scene, colour=other))
        assert (wrong.colour, wrong.digit, wrong.count) == (0, 0, 1), "another colour is there, the asked one is not"
        ratio = one(judge, frames, lone(scene, speed=2 * lone(scene)[0].speed)).speed_ratio
        assert ratio is not None and ratio < 0.6
        angle = lone(scene)[0].angle
        if angle is not None:
            assert one(judge, frames, lone(scene, angle=angle + math.pi / 4)).direction == 0
        second = AskedDigit(0, other, "bouncing", None, 18.0)
        assert one(judge, frames, (*lone(scene), second)).count == 0
    for scene in heldout(6, num_digits=2):
        assert one(judge, world.render(scene, 0, 20), parse_prompt(world.scene_prompt(scene))[:1]).colour == 0


def test_digits_that_cover_each_other_are_not_asked_about(judge: Judge) -> None:
    images = handwriting.clear_images("heldout")
    pair = tuple(
        Digit(number, int(images[number][0]), colour, "drifting", "up", "", (10.0, left), (0.0, 0.0))
        for number, colour, left in ((3, "red", 10.0), (7, "blue", 20.0))
    )
    frames = world.render(Scene(pair, (20, 20, 20), (0, 0)), 0, 20)
    asked = parse_prompt("a red three drifting up, a blue seven drifting up")
    assert judge.read(frames, asked).covered.all()
    assert one(judge, frames, asked).digit is None


def test_frozen_empty_and_repeated_stretches_are_found(judge: Judge) -> None:
    scene = heldout(1, num_digits=1)[0]
    frames, asked = world.render(scene, 0, 40), lone(scene, speed=18.0)
    stuck = np.repeat(frames[:1], 40, axis=0)
    first, second = score_chunks(judge, stuck, asked, FPS, 20)
    assert first.frozen and second.frozen and second.duplicated and not first.duplicated and not first.empty
    repeated = score_chunks(judge, np.concatenate([frames[:20], frames[:20]]), asked, FPS, 20)
    assert [score.duplicated for score in repeated] == [False, True] and not repeated[1].frozen
    gap = frames[:20].copy()
    gap[7] = 25
    assert one(judge, gap, asked).empty
    dark = one(judge, np.full_like(frames[:20], 25), asked)
    assert (dark.digit, dark.colour, dark.count, dark.speed_ratio, dark.direction) == (0, 0, 0, None, None)
    assert dark.followed == 0


def test_a_digit_that_jumps_leaves_its_path(judge: Judge) -> None:
    scene = heldout(1, num_digits=1)[0]
    frames = world.render(scene, 0, 20)
    jumping = frames.copy()
    jumping[::2] = np.roll(jumping[::2], 4, axis=1)
    calm, jumpy = (one(judge, part, lone(scene)).trajectory_error for part in (frames, jumping))
    assert calm is not None and jumpy is not None and calm < 0.3 and jumpy == pytest.approx(2, abs=0.3)


def bounced(turn: int, wall_error: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """The middle of ink 20 px high and 10 wide that is reflected at the lower border before frame ``turn``."""
    time, wall = np.arange(20.0), 64 - 10 + wall_error
    down = wall + 1.2 * (time - turn + 0.5)
    path = np.stack([np.minimum(down, 2 * wall - down), 20 + 0.7 * time], axis=1)
    return path, np.tile([10.0, 5.0, 10.0, 5.0], (20, 1))


def test_the_bounce_law_is_fitted_exactly_and_no_other_turn_is() -> None:
    for turn in range(2, 19):
        motion = bouncing(*bounced(turn))
        assert motion is not None and motion.error < 1e-9 and motion.velocity == pytest.approx((1.2, 0.7))
    path, reach = bounced(9)
    path[3] = np.nan
    assert (bouncing(path, reach) or Motion(9, (0, 0))).error < 1e-9
    for wall_error in (-8.0, -3.0):
        motion = bouncing(*bounced(10, wall_error))
        assert motion is not None and motion.error > 0.9, "it turned before the frame's border"
    assert bouncing(path[:8], reach[:8]) is None


def test_the_torus_law_is_a_straight_line() -> None:
    time = np.arange(20.0)
    path = np.stack([60 + 1.5 * time, 3 - 0.5 * time], axis=1) % 64
    path[5:8] = np.nan
    motion = drifting(path)
    assert motion is not None and motion.error < 1e-9 and motion.velocity == pytest.approx((1.5, -0.5))
    assert drifting(path[:10]) is None
    path[10:] = (path[10:] + 3) % 64
    assert (drifting(path) or Motion(0, (0, 0))).error > 1
    for length in (5, 20, 21, 24, 100):
        parts = [np.arange(length)[part] for part in stretches(length)]
        assert np.concatenate(parts).tolist() == list(range(length)) and max(map(len, parts)) <= 20


def test_a_bouncing_digit_that_goes_its_own_way_is_found_out(judge: Judge) -> None:
    scene = next(scene for scene in heldout(20, 1) if scene.digits[0].motion == "bouncing")
    frames, asked = world.render(scene, 0, 60), lone(scene)
    assert one(judge, frames, asked).bounce == 1
    assert one(judge, frames, lone(scene, speed=asked[0].speed * 1.5)).bounce == 0, "too slow"
    swaying = np.stack([np.roll(frame, round(3 * math.sin(i)), 1) for i, frame in enumerate(frames)])
    assert one(judge, swaying, asked).bounce == 0
    law = one(judge, swaying, asked).law_error
    assert law is not None and law == pytest.approx(3 / math.sqrt(2), abs=0.5)


def test_the_reader_never_saw_a_generators_handwriting() -> None:
    from pavdm_dist.digits import judge as module

    crops, classes = module._unseen_handwriting(1, 0, SHIPPED)
    used = sum(len(images) for images in handwriting.clear_images("train").values())
    assert len(crops) == len(classes) == 1797 - used
    assert np.bincount(classes).min() > 100


# --- arithmetic -------------------------------------------------------------------------------------------------------


def test_centres_and_moves_cross_the_border() -> None:
    ink = np.zeros((2, 64, 64))
    ink[0, [63, 0], 10] = 1
    ink[1, [0, 1], 10] = 1
    centres = torus_centre(ink)
    assert (centres[0] + 0.25) % 64 == pytest.approx([0.25, 10.75])
    assert centres[1] == pytest.approx([1, 10.5])
    assert displacements(centres, 1) == pytest.approx(np.array([[1.0, 0.0]]))


def test_line_errors_are_those_of_least_squares() -> None:
    time = np.arange(9.0)
    bump = np.array([0, 1, 0, -1, 0, 1, 0, -1, 0.0])
    path = np.stack([60 + 1.5 * time, 3 - 0.5 * time + bump], axis=1) % 64
    fit = np.polyval(np.polyfit(time, bump, 1), time)
    assert line_errors(path) == pytest.approx([np.sqrt(np.mean((bump - fit) ** 2))])
    path[4] = np.nan
    assert line_errors(path) == []


def test_summaries_leave_out_what_could_not_be_judged() -> None:
    score = ChunkScore(1.0, 1.0, 1.0, 0.5, None, None, None, None, 0.0, False, False, True)
    means = summarise([score, replace(score, digit=None, colour=0.0, duplicated=False)])
    assert (means["digit"], means["colour"], means["direction"], means["duplicated"]) == (1.0, 0.5, None, 0.5)


def test_frames_of_another_size_and_a_missing_extra_are_refused(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"\[2, 32, 32, 3\]: the judge reads \[t, 64, 64, 3\]"):
        judge.read(np.zeros((2, 32, 32, 3), np.uint8), parse_prompt("a red three bouncing"))
    monkeypatch.setitem(sys.modules, "sklearn.svm", None)
    with pytest.raises(ConfigError, match=r"pip install 'pavdm-dist\[train\]'"):
        Judge()
