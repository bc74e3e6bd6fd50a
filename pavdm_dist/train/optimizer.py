"""Muon for weight matrices, AdamW for the rest: reaches AdamW's loss in about half the steps at this size.

Muon (Jordan et al., 2024) replaces a matrix's momentum by the nearest orthogonal matrix, found with a few
Newton-Schulz products; the update is scaled to AdamW's usual size (Moonlight, 2025).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from pavdm_dist.models.devices import computes_bfloat16

# Coefficients of the quintic iteration that lifts small singular values fastest (Jordan et al.).
QUINTIC = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
UPDATE_SIZE = 0.2  # root mean square of AdamW's usual update


class MuonAdamW(torch.optim.Optimizer):
    """One optimizer over two kinds of parameters.

    Args:
        matrices: weights inside blocks that map channels to channels; they follow Muon at ``matrix_ratio`` times
            the rate. A convolution counts as the matrix ``[out, in * taps]``.
        others: embeddings, norms, biases, first and last layers; they follow AdamW.
        lr: learning rate of AdamW.
        betas: of AdamW.
        weight_decay: decoupled, of both kinds.
        matrix_ratio: Muon's rate over AdamW's.
        momentum: of Muon (Nesterov).
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        others: Iterable[nn.Parameter],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        matrix_ratio: float = 2.0,
        momentum: float = 0.95,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": 1e-8, "weight_decay": weight_decay, "momentum": momentum}
        groups = [{"params": list(matrices), "ratio": matrix_ratio}, {"params": list(others), "ratio": 0.0}]
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update from the gradients; ``closure`` is not supported."""
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if group["weight_decay"]:
                rate = group["lr"] * (group["ratio"] or 1.0)
                for parameter in parameters:
                    parameter.mul_(1 - rate * group["weight_decay"])
            (self._muon if group["ratio"] else self._adam)(parameters, group)

    def _muon(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        by_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
        for parameter in parameters:
            state, gradient = self.state[parameter], parameter.grad
            assert gradient is not None
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            state["momentum"].lerp_(gradient, 1 - group["momentum"])
            look_ahead = gradient.lerp(state["momentum"], group["momentum"]).flatten(1)
            by_shape.setdefault(look_ahead.shape, []).append((parameter, look_ahead))
        for shape, pairs in by_shape.items():
            size = group["lr"] * group["ratio"] * UPDATE_SIZE * max(shape) ** 0.5
            updates = orthogonalise(torch.stack([update for _, update in pairs]))
            for (parameter, _), update in zip(pairs, updates, strict=True):
                parameter.sub_(update.view_as(parameter), alpha=size)

    def _adam(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        first, second = group["betas"]
        for parameter in parameters:
            state, gradient = self.state[parameter], parameter.grad
            assert gradient is not None
            if not state:
                state |= {"step": 0, "mean": torch.zeros_like(parameter), "square": torch.zeros_like(parameter)}
            state["step"] += 1
        if not parameters:
            return
        # All at once: on a GPU one by one they are hundreds of kernels, each over few numbers. The bits are the same.
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        means, squares = ([self.state[parameter][name] for parameter in parameters] for name in ("mean", "square"))
        steps = [self.state[parameter]["step"] for parameter in parameters]
        torch._foreach_lerp_(means, gradients, 1 - first)
        torch._foreach_mul_(squares, second)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - second)
        spreads = torch._foreach_div(squares, [1 - second**step for step in steps])
        torch._foreach_sqrt_(spreads)
        torch._foreach_add_(spreads, group["eps"])
        torch._foreach_addcdiv_(parameters, means, spreads, [-group["lr"] / (1 - first**step) for step in steps])


def orthogonalise(matrices: Tensor) -> Tensor:
    """Nearly the orthogonal factor of each of ``[n, rows, columns]``: singular values end between 0.7 and 1.2.

    In bfloat16, which is enough (Jordan et al.), where the device has it.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    x = x.bfloat16() if computes_bfloat16(x.device) else x.float()
    a, b, c = QUINTIC
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x = x.to(matrices.dtype)
    return x.mT if tall else x
