"""Muon for many equal-shaped matrices at once: momentum, orthogonalized by Newton-Schulz steps.

Source: K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024); the step size that matches
AdamW's, 0.2 * sqrt(longer side), from arXiv:2502.16982.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["Muon"]


def orthogonalize(x: Tensor, steps: int = 5) -> Tensor:
    """x [N, m, n] with m <= n: moves all singular values near 1. fp32, or bf16 where that is the faster."""
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for _ in range(steps):
        s = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(s, s, s, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x


class Muon(torch.optim.Optimizer):
    """For matrices only; everything else wants AdamW beside it."""

    def __init__(
        self, params: Iterable[Tensor], lr: float = 3e-3, *, momentum: float = 0.95, weight_decay: float = 0.05
    ) -> None:
        super().__init__(list(params), {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            shapes: dict[tuple[int, int], list[tuple[Tensor, bool, Tensor]]] = {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(buffer, group["momentum"])
                flip = p.shape[0] > p.shape[1]
                shapes.setdefault((min(p.shape), max(p.shape)), []).append((p, flip, update.T if flip else update))
            for (_, longer), items in shapes.items():
                self._apply(group, items, longer)

    def _apply(self, group: dict[str, Any], items: list[tuple[Tensor, bool, Tensor]], longer: int) -> None:
        x = torch.stack([update for _, _, update in items])
        x = orthogonalize(x.bfloat16() if x.is_cuda else x).to(items[0][0].dtype) * (0.2 * longer**0.5)
        for (p, flip, _), y in zip(items, x, strict=True):
            p.mul_(1 - group["lr"] * group["weight_decay"]).add_(y.T if flip else y, alpha=-group["lr"])
