"""The model inside the package: small enough, complete, and it paints what the prompt says."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from pavdm_dist.io.shipped import EMBEDDED
from pavdm_dist.pipeline import PAVDMPipeline

MEGABYTE = 10**6


def test_weights_are_small() -> None:
    files = [path for path in EMBEDDED.rglob("*") if path.is_file()]
    assert {path.parent.name for path in files} == {"embedded", "transformer", "vae", "text_encoder"}
    assert sum(path.stat().st_size for path in files) < 20 * MEGABYTE


@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("colour", "channel"),
    [("red", 0), *(pytest.param(*other, marks=pytest.mark.slow) for other in (("green", 1), ("blue", 2)))],
)
def test_the_prompted_colour_is_on_the_screen(colour: str, channel: int) -> None:
    pipeline = PAVDMPipeline.from_pretrained()
    frames = pipeline(f"a {colour} three bouncing", num_frames=37, seed=1).frames[0]
    bright = frames.max(axis=-1) > 0.5
    share = bright.mean(axis=(1, 2))
    assert (share[17:] > 0.01).all(), "something is there in every frame of the second chunk"
    assert (share < 0.4).all(), "and it is a digit on a plain background, not a wash"
    mean = frames[17:][bright[17:]].mean(axis=0)
    assert np.argmax(mean) == channel
    assert mean[channel] > 1.5 * np.delete(mean, channel).max()


def test_words_outside_the_vocabulary_are_named(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("pavdm_dist").propagate = True
    encoder = PAVDMPipeline.from_pretrained().checkpoint.text_encoder
    encoder.encode("a purple seven drifting up")
    assert "'purple' is not in this model's vocabulary" in caplog.text
    assert "magenta" in caplog.text


@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("prompt", "seed"),
    [pytest.param("a yellow zero bouncing slowly", 1, marks=pytest.mark.slow), ("a white four drifting down", 2)],
)
def test_the_prompted_digit_is_read_back(prompt: str, seed: int) -> None:
    pytest.importorskip("sklearn")
    from pavdm_dist.digits.judge import Judge
    from pavdm_dist.digits.prompts import parse_prompt
    from pavdm_dist.digits.scores import score_chunks, summarise

    frames = (
        (PAVDMPipeline.from_pretrained()(prompt, num_frames=60, seed=seed).frames[0] * 255).round().astype(np.uint8)
    )
    means = summarise(score_chunks(Judge(), frames[20:], parse_prompt(prompt), 24))
    assert means["digit"] is not None and means["digit"] > 0.7
    assert means["colour"] == means["count"] == 1
