"""What a training step reads of its texts: the same numbers however much padding stands behind them."""

from __future__ import annotations

import copy
import random
from dataclasses import replace

import pytest
import torch
from helpers import TINY, tiny_model
from wan_models import tiny_wan

from pavdm_dist.models.base import FrameInfo
from pavdm_dist.models.compiling import Compiler
from pavdm_dist.train.model import Text, TextToVideo

INFO = FrameInfo(32, 48, 24)


@pytest.mark.parametrize(
    ("lengths", "dropped", "read", "masked"),
    [
        ((4, 4), (False, False), 4, False),
        ((3, 3), (False, False), 3, False),
        ((2, 4), (False, False), 4, True),
        ((2, 3), (False, False), 3, True),
        ((1,), (False,), 1, False),
        ((2, 3), (True, False), TINY.model_max_length, True),
        ((2, 3), (True, True), TINY.model_max_length, False),
    ],
)
def test_nothing_is_read_behind_the_longest_text(
    lengths: tuple[int, ...], dropped: tuple[bool, ...], read: int, masked: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    count = len(lengths)
    embeddings = torch.randn(count, 4, TINY.caption_channels, generator=generator)
    mask = torch.arange(4) < torch.tensor(lengths)[:, None]
    known = Text(["a"] * count, embeddings, mask)
    assert known.lengths == lengths
    unknown = Text(["a"] * count, embeddings, mask)
    object.__setattr__(unknown, "lengths", None)  # as where the mask lies on a GPU from the first
    x = torch.randn(count, TINY.in_channels, 3, 4, 6, generator=generator)
    levels = torch.rand(count, 3, generator=generator)
    model = TextToVideo(tiny_model().requires_grad_(), None)
    tokens, given_mask = model._tokens(x, known, list(dropped))
    assert tokens.shape[1] == read and (given_mask is not None) == masked
    gradients = []
    for text in (known, unknown):
        velocity = model(x, levels, text, list(dropped), INFO, None)
        loss = velocity.square().mean()
        gradients.append([velocity, *torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)])
    for one, other in zip(*gradients, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_lengths_follow_their_samples() -> None:
    mask = torch.tensor([[True, False], [True, True], [False, True]])
    assert Text(["a"] * 3, torch.zeros(3, 2, 5), mask).lengths is None, "real tokens that do not come first"
    text = Text(["a"] * 2, torch.zeros(2, 2, 5), mask[:2])
    there = text.to(torch.device("meta"))  # nobody looks at a mask there
    assert there.lengths == (1, 2) and there.part(slice(1, None, 1)).lengths == (2,)
    assert Text(["a"] * 2, there.embeddings, there.mask).lengths is None
    assert Text(["a"]).lengths is None


# Of STDiT3 there are four times as many versions to trace; the rule is the same.
@pytest.mark.parametrize("kind", [pytest.param("stdit3", marks=pytest.mark.slow), "wan"])
def test_compiled_blocks_train_on_texts_of_all_lengths(kind: str) -> None:
    """Torch gives a compiled function up after eight versions; what it meets here in turn is more than that."""
    plain = (tiny_model(config=replace(TINY, depth=1)) if kind == "stdit3" else tiny_wan()).requires_grad_()
    model = copy.deepcopy(plain)
    model.compile_repeated_blocks(Compiler("eager"))
    draw, generator = random.Random(0), torch.Generator().manual_seed(0)
    trained, expected = (TextToVideo(one, None) for one in (model, plain))
    for step in range(16):
        frames = draw.choice([1, 5, 10])
        lengths = [draw.randint(1, 4) for _ in range(2)]
        longest = max(lengths)
        embeddings = torch.randn(2, longest, model.spec.text_dim, generator=generator)
        text = Text(["a"] * 2, embeddings, torch.arange(longest) < torch.tensor(lengths)[:, None])
        x = torch.randn(2, model.spec.latent_channels, frames, 4, 6, generator=generator)
        levels, causal = torch.rand(2, frames, generator=generator), draw.choice([None, 5])
        causal = causal if frames > 1 else None
        dropped = [draw.random() < 0.2 for _ in range(2)]
        found, own = (part(x, levels, text, dropped, INFO, causal) for part in (trained, expected))
        torch.testing.assert_close(found, own, atol=1e-5, rtol=1e-5, msg=f"step {step}")
        found.square().mean().backward()
