"""GPTQ: rounds weights column by column and lets the columns still open make up for each error.

Source: Frantar et al., arXiv:2210.17323, Algorithm 1; columns in order of falling Hessian diagonal ("act-order") while
scales stay those of the natural groups ("static groups"), so that codes are stored in natural order.

Letters: N rows (outputs), K columns (inputs), T tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .grid import Grid

__all__ = ["Rounded", "gptq_rows", "gram"]

_BLOCK = 128  # columns whose errors are passed on together
_TRIANGLE = 256  # rows of a triangle that is inverted directly
_DAMPINGS = (0.01, 0.03, 0.1, 0.3, 1.0)  # of the diagonal's mean; a matrix that is not positive definite tries the next


class Rounded(NamedTuple):
    """q: i8[N, K].   damping: what the Hessian needed, 0 where rounding to nearest was all that could be done."""

    q: Tensor
    damping: float


def gram(x: Tensor, weight: Tensor | None = None) -> Tensor:
    """Returns the weighted mean of x x^T over rows of f32[T, K], weight f32[T]: half of GPTQ's Hessian, f32[K, K]."""
    total = float(len(x))
    if weight is not None:
        x, total = x * weight.sqrt()[:, None], float(weight.sum())
    if x.device.type == "cpu":
        rows = x.contiguous().numpy()
        return torch.from_numpy(rows.T @ rows) / total  # numpy sees x^T x and computes one triangle only
    return x.T @ x / total


def gptq_rows(w: Tensor, hessian: Tensor, grid: Grid) -> Rounded:
    """Quantizes weight rows onto a grid, column by column, spreading each error over the columns left.

    w: f32[N, K].   hessian: f32[K, K], mean of x x^T; it is overwritten (at K = 18944 a copy is 1.4 GB).
    Inputs that never were active are rounded to nearest.
    Raises ValueError on a shape mismatch.   Cost: O(N K^2 + K^3) time, two f32[K, K] alive.
    """
    columns = w.shape[1]
    if hessian.shape != (columns, columns):
        raise ValueError(f"a Hessian {tuple(hessian.shape)} for {columns} columns")
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    factor, damping = _inverse_factor(hessian, order)
    if factor is None:
        return Rounded(grid.round(w), 0.0)
    open_columns = w.T[order].contiguous()  # [K, N]: a column's update is one contiguous row
    q = torch.empty(columns, len(w), dtype=torch.int8, device=w.device)
    positions = order.tolist()
    for first in range(0, columns, _BLOCK):
        last = min(first + _BLOCK, columns)
        errors = _round_block(open_columns[first:last], factor[first:last, first:last], grid, positions[first:last], q)
        if last < columns:
            open_columns[last:].addmm_(factor[first:last, last:].T, errors, alpha=-1)
    return Rounded(q.T.contiguous(), damping)


def _round_block(block: Tensor, factor: Tensor, grid: Grid, positions: list[int], q: Tensor) -> Tensor:
    """Rounds the columns of a block f32[B, N] in turn; returns what each leaves to the later ones, f32[B, N]."""
    errors = torch.empty_like(block)
    diagonal = factor.diagonal().tolist()
    for i, column in enumerate(positions):
        step = grid.step(column)
        rounded = (block[i] / step).round_().clamp_(*grid.bounds)
        q[column] = rounded
        torch.sub(block[i], rounded.mul_(step), out=errors[i]).div_(diagonal[i])
        if i + 1 < len(block):
            block[i + 1 :].addr_(factor[i, i + 1 :], errors[i], alpha=-1)
    return errors


def _inverse_factor(hessian: Tensor, order: Tensor) -> tuple[Tensor | None, float]:
    """Returns the upper triangular U with U^T U = the damped inverse in this order, and the damping that worked.

    With J the reversal of rows or columns and J H J = L L^T, U is J L^-1 J: one Cholesky factor and one triangular
    inverse, 2/3 K^3 products, where factor, inverse and factor again would take 4/3 K^3 and a third matrix.
    """
    mean = float(hessian.diagonal().mean())
    if not mean > 0 or mean == float("inf"):
        return None, 0.0
    backwards = order.flip(0)
    ordered = hessian[backwards][:, backwards]
    hessian.set_()  # lets go of the storage
    before = 0.0
    for damping in _DAMPINGS:
        ordered.diagonal().add_((damping - before) * mean)
        before = damping
        lower, fault = torch.linalg.cholesky_ex(ordered)
        if int(fault):
            continue
        _invert_lower(lower)
        if bool(torch.isfinite(lower.diagonal()).all()):
            return lower.flip(0, 1), damping
    return None, 0.0


def _invert_lower(lower: Tensor) -> None:
    """Inverts a lower triangular f32[K, K] in place: K^3 / 3 products, nearly all in large triangular solves."""
    if len(lower) <= _TRIANGLE:
        eye = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
        lower.copy_(torch.linalg.solve_triangular(lower, eye, upper=False))
        return
    half = len(lower) // 2
    first, corner, second = lower[:half, :half], lower[half:, :half], lower[half:, half:]
    left = torch.linalg.solve_triangular(second, corner, upper=False)
    corner.copy_(torch.linalg.solve_triangular(first, left, upper=False, left=False)).neg_()
    del left
    _invert_lower(first)
    _invert_lower(second)
