"""What a training step reads of its texts: the same numbers however much padding stands behind them."""

from __future__ import annotations

import pytest
import torch
from helpers import TINY, tiny_model

from pavdm_dist.models.base import FrameInfo
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
    assert text.part(slice(1, None, 1)).lengths == (2,) and text.to(torch.device("cpu")).lengths == (1, 2)
    assert Text(["a"]).lengths is None
