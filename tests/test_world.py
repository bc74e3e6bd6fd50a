"""The synthetic world: what the prompt says is what the frames show."""

from __future__ import annotations

import sys
import time

import numpy as np
import pytest
from needs import needs

from pavdm_dist.digits import handwriting, settings, world
from pavdm_dist.digits.settings import COLOURS, DIRECTIONS, FPS, NUMBERS, SIZE, SPEEDS
from pavdm_dist.digits.world import Digit, Scene
from pavdm_dist.errors import ConfigError

needs("draws handwritten digits", "sklearn")


def scenes(count: int, split: handwriting.Split = "train", num_digits: int | None = None) -> list[Scene]:
    rng = np.random.default_rng(7)
    return [world.sample_scene(rng, split, num_digits) for _ in range(count)]


def only(motion: str, speed: str, direction: str = "", number: int = 3) -> Scene:
    """A scene of one white digit in the middle."""
    glyphs = handwriting.split_indices("train")
    image = int(glyphs[handwriting.load_glyphs()[1][glyphs] == number][0])
    step = np.array(DIRECTIONS[direction] if direction else (0.6, 0.8))
    velocity = step / np.linalg.norm(step) * SPEEDS[speed]
    digit = Digit(number, image, "white", motion, direction, speed, (18.0, 18.0), (velocity[0], velocity[1]))
    return Scene((digit,), (20.0, 20.0, 20.0), (0.0, 0.0))


def centroid(frame: np.ndarray) -> np.ndarray:
    ink = frame[..., 0].astype(float) - 20
    return np.array([(ink.sum(1 - axis) * np.arange(SIZE)).sum() / ink.sum() for axis in (0, 1)])


def test_the_splits_share_no_image_and_hold_every_class() -> None:
    train, heldout = handwriting.split_indices("train"), handwriting.split_indices("heldout")
    classes = handwriting.load_glyphs()[1]
    assert not set(train) & set(heldout)
    assert len(train) + len(heldout) == len(classes) == 1797
    assert np.bincount(classes[heldout]).min() >= 30
    assert {digit.image for scene in scenes(50, "heldout") for digit in scene.digits} <= set(heldout)


def test_only_the_clearest_images_of_each_split_are_drawn() -> None:
    glyphs, classes = handwriting.load_glyphs()
    train = handwriting.split_indices("train")
    means = np.stack([glyphs[train[classes[train] == number]].mean(0) for number in range(10)])
    for split in ("train", "heldout"):
        clear = handwriting.clear_images(split)
        images = np.concatenate([clear[number] for number in range(10)])
        counts = [len(clear[number]) for number in range(10)]
        assert set(images) <= set(handwriting.split_indices(split))
        assert np.array_equal(classes[images], np.repeat(range(10), counts))
        # The class whose mean is nearest is the right one for each of them, as it is not for all images.
        nearest = ((glyphs[images][:, None] - means) ** 2).sum((-2, -1)).argmin(1)
        assert np.array_equal(nearest, classes[images])
        assert {digit.image for scene in scenes(200, split) for digit in scene.digits} <= set(images)
        members = np.bincount(classes[handwriting.split_indices(split)])
        assert counts == [round(count * 0.12) for count in members]


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ConfigError, match="'test' does not exist: use 'train' or 'heldout'"):
        handwriting.split_indices("test")  # type: ignore[arg-type]


def test_a_missing_scikit_learn_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    handwriting.load_glyphs.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ConfigError, match=r"pip install 'pavdm-dist\[train\]'"):
        handwriting.load_glyphs()


def test_the_same_generator_draws_the_same_scenes_and_frames() -> None:
    for one, other in zip(scenes(5), scenes(5), strict=True):
        assert one == other
        np.testing.assert_array_equal(world.render(one, 3, 9), world.render(other, 3, 9))


def test_any_part_of_a_video_equals_the_whole() -> None:
    for scene in scenes(4):
        np.testing.assert_array_equal(world.render(scene, 0, 40)[23:30], world.render(scene, 23, 7))


def test_prompts_hold_every_fact_and_only_words_of_the_vocabulary() -> None:
    for scene in scenes(200):
        prompt = world.scene_prompt(scene)
        phrases = prompt.split(", ")
        assert len(phrases) == len(scene.digits)
        for phrase, digit in zip(phrases, scene.digits, strict=True):
            assert phrase.startswith(f"a {digit.colour} {NUMBERS[digit.number]} {digit.motion}")
            assert (digit.speed in phrase) and (digit.direction in phrase)
            assert digit.number == handwriting.load_glyphs()[1][digit.image]
        assert set(prompt.replace(",", " ,").split()) <= set(settings.VOCABULARY)


def test_the_example_prompt_is_of_this_world() -> None:
    parts = only("drifting", "", "up and to the left").digits + only("bouncing", "fast", number=7).digits
    assert world.scene_prompt(Scene(parts, (20, 20, 20), (0, 0))) == (
        "a white three drifting up and to the left, a white seven bouncing fast"
    )


@pytest.mark.parametrize("speed", SPEEDS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_digits_drift_as_told(direction: str, speed: str) -> None:
    frames = world.render(only("drifting", speed, direction), 0, 7)
    moved = (centroid(frames[6]) - centroid(frames[0])) * FPS / 6
    assert np.linalg.norm(moved) == pytest.approx(SPEEDS[speed], rel=0.03)
    np.testing.assert_array_equal(np.sign(np.round(moved)), DIRECTIONS[direction])


def test_drifting_returns_after_one_round() -> None:
    scene = only("drifting", "fast", "to the right")
    period = SIZE * FPS / SPEEDS["fast"]  # 42.67 frames: three rounds are a whole number
    difference = world.render(scene, 0, 1).astype(int) - world.render(scene, round(3 * period), 1)
    assert np.abs(difference).max() <= 1


def test_bouncing_ink_stays_in_the_frame_and_reaches_the_walls() -> None:
    scene = only("bouncing", "fast")
    ink = (world.render(scene, 0, 600)[..., 0] > 130).sum(axis=(1, 2))
    assert ink.min() > 0.9 * ink.max()
    cover = (world.render(scene, 0, 600)[..., 0] > 60).any(0)
    assert cover[0].any() and cover[-1].any() and cover[:, 0].any() and cover[:, -1].any()
    steps = np.linalg.norm(np.diff(world.positions(scene.digits[0], 0, 600), axis=0), axis=1)
    assert steps.max() <= SPEEDS["fast"] / FPS + 1e-9


def test_colours_are_the_named_ones_and_the_last_digit_is_on_top() -> None:
    for scene in scenes(30, num_digits=2):
        frame = world.render(scene, 0, 1)[0].reshape(-1, 3).astype(int)
        top = COLOURS[scene.digits[-1].colour]
        assert (np.abs(frame - top).max(1) <= 1).sum() > 20
    under, over = only("drifting", "").digits[0], only("drifting", "").digits[0]
    stack = Scene((under, Digit(**{**over.__dict__, "colour": "red"})), (20, 20, 20), (0, 0))
    frame = world.render(stack, 0, 1)[0].reshape(-1, 3)
    assert not (frame.min(1) > 200).any(), "white shows through red"


def test_the_mask_covers_the_ink_and_little_else() -> None:
    for scene in scenes(10):
        frames, mask = world.render_pair(scene, 5, 4)
        np.testing.assert_array_equal(frames, world.render(scene, 5, 4))
        np.testing.assert_array_equal(mask, world.render_mask(scene, 5, 4))
        bright = frames.max(-1) > 70
        assert not (bright & ~mask).any()
        assert (mask & ~bright).mean() < 0.1


def test_counts_are_kept_and_impossible_ones_refused() -> None:
    assert [len(scene.digits) for scene in scenes(3, num_digits=3)] == [3, 3, 3]
    assert {len(scene.digits) for scene in scenes(40)} == {1, 2}
    with pytest.raises(ConfigError, match="num_digits=8 is impossible: use 1 to 7"):
        scenes(1, num_digits=8)


def test_rendering_keeps_up_with_training() -> None:
    rng = np.random.default_rng(0)
    world.render(world.sample_scene(rng), 0, 17)
    start, frames = time.process_time(), 0
    while time.process_time() - start < 0.5:
        frames += len(world.render(world.sample_scene(rng), 0, 17))
    assert frames / 0.5 > 1500
