"""Muon for matrices and AdamW for the rest."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pavdm_dist.train import optimizer as module
from pavdm_dist.train.optimizer import MuonAdamW, orthogonalise


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_orthogonalise_levels_the_singular_values_of_wide_and_tall_matrices(
    has_bfloat16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "computes_bfloat16", lambda device: has_bfloat16)
    generator = torch.Generator().manual_seed(0)
    for shape in ((3, 16, 48), (2, 48, 16), (1, 32, 32)):
        matrices = torch.randn(shape, generator=generator)
        values = torch.linalg.svdvals(orthogonalise(matrices))
        assert values.max() < 1.3
        assert values.median() > 0.65
    left, spectrum, right = torch.linalg.svd(torch.randn(1, 16, 48, generator=generator), full_matrices=False)
    expected = left @ right
    product = (orthogonalise(left @ torch.diag_embed(spectrum) @ right) * expected).sum() / 16
    assert 0.7 < product < 1.2, "same singular vectors"
    rounded = orthogonalise(expected)
    assert torch.equal(rounded, rounded.bfloat16().float()) == has_bfloat16


def test_the_rest_follows_torchs_adamw() -> None:
    torch.manual_seed(0)
    ours, theirs = nn.Linear(5, 3), nn.Linear(5, 3)
    theirs.load_state_dict(ours.state_dict())
    mine = MuonAdamW([], ours.parameters(), 0.01, (0.9, 0.99), weight_decay=0.1)
    reference = torch.optim.AdamW(theirs.parameters(), 0.01, (0.9, 0.99), weight_decay=0.1)
    for _ in range(6):
        x = torch.randn(4, 5)
        for model, optimizer in ((ours, mine), (theirs, reference)):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(ours.weight, theirs.weight)


def test_a_matrix_moves_as_far_as_under_adamw_times_the_ratio() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(40, 10))
    before = weight.detach().clone()
    weight.grad = torch.randn(40, 10)
    MuonAdamW([weight], [], lr=0.01, matrix_ratio=2.0).step()
    moved = (weight.detach() - before).square().mean().sqrt().item()
    assert 0.6 < moved / (0.01 * 2.0 * 0.2) < 1.2


def test_a_convolution_moves_as_the_matrix_of_its_output_channels() -> None:
    generator = torch.Generator().manual_seed(4)
    start, gradient = (torch.randn(8, 6, 3, 3, generator=generator) for _ in range(2))
    kernel, matrix = nn.Parameter(start.clone()), nn.Parameter(start.flatten(1).clone())
    for parameter in (kernel, matrix):
        parameter.grad = gradient.view_as(parameter).clone()
        MuonAdamW([parameter], [], lr=0.1).step()
    assert not torch.equal(kernel, start)
    assert torch.equal(kernel.flatten(1), matrix)
