"""Quantizes the maps of one unit as their inputs come in, and applies them as the engine will.

Letters: N outputs, K inputs, T rows of activations.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..runtime.backends.native import Pool, integer_sums
from ..runtime.files.tensors import Tensor as Stored
from .gptq import gptq_rows, gram
from .grid import Grid, dequantize_activations, int4_grid, int8_grid
from .packing import group_size, pack_int4, pack_int8
from .report import Layer

__all__ = ["Fitted", "Fitter", "pack", "row_grid"]

_ERROR_ROWS = 512  # rows of activations on which output errors are measured


@dataclass(eq=False)
class Fitted:
    """One quantized matrix.   q: i8[N, K].   report: its entry in the report, None where it is only a part."""

    q: Tensor
    grid: Grid
    report: Layer | None = None

    def dequantized(self) -> Tensor:
        """Returns f32[N, K]."""
        return self.grid.dequantize(self.q)


def row_grid(kind: str, w: Tensor, group_limit: int, importance: Tensor | None = None) -> Grid:
    """Fits the grid of a kind to f32[N, K]."""
    if kind == "int8":
        return int8_grid(w)
    return int4_grid(w, group_size(w.shape[1], group_limit), importance)


def pack(name: str, fitted: Fitted) -> dict[str, Tensor]:
    """Returns the stored tensors of a matrix by name."""
    q, grid = fitted.q.cpu().numpy(), fitted.grid
    scale = torch.zeros(-(-len(q) // 16) * 16)
    scale[: len(q)] = grid.scale
    if grid.factor is None:
        return {f"{name}.weight": torch.from_numpy(pack_int8(q)), f"{name}.weight_scale": scale}
    blocks, groups = pack_int4(q, grid.factor.cpu().numpy())
    return {
        f"{name}.weight": torch.from_numpy(np.ascontiguousarray(blocks)),
        f"{name}.weight_group": torch.from_numpy(np.ascontiguousarray(groups)),
        f"{name}.weight_scale": scale,
    }


def _relative(error: Tensor, truth: Tensor) -> float:
    size = float(truth.norm())
    return float(error.norm()) / size if size > 0 else 0.0


class Fitter:
    """The maps of one unit: float until fit() has seen their inputs, quantized from then on.

    weights: f32 tensors by full name.   kinds: name of a map -> "int8", "int4" or "bf16".
    pool: multiplies by what was quantized with the engine's own integer products; None does the same in float, on the
    device of the weights.   stored: what goes into the file, by name.
    """

    def __init__(
        self, weights: dict[str, Tensor], kinds: Mapping[str, str], group_limit: int, pool: Pool | None = None
    ) -> None:
        self.weights, self.kinds, self._group_limit, self._pool = weights, kinds, group_limit, pool
        self.fitted: dict[str, Fitted] = {}
        self.stored: dict[str, Tensor] = {}
        self._dense: dict[str, Tensor] = {}

    def fit(self, names: Sequence[str], x: Tensor | None, weight: Tensor | None = None) -> None:
        """Quantizes maps that read the same x f32[T, K]; rounds to nearest where x is None. weight: f32[T]."""
        for kind in ("int8", "int4"):
            chosen = [name for name in names if self.kinds[name] == kind]
            if chosen:
                self._fit(kind, chosen, x, weight)

    def _fit(self, kind: str, names: Sequence[str], x: Tensor | None, weight: Tensor | None) -> None:
        parts = [self.weights[name + ".weight"] for name in names]
        w = torch.cat(parts) if len(parts) > 1 else parts[0]
        q, damping, probe = None, 0.0, None
        importance = None
        if x is not None:
            x = dequantize_activations(x)
            probe = x[:: max(1, len(x) // _ERROR_ROWS)][:_ERROR_ROWS]
            hessian = gram(x, weight)
            importance = hessian.diagonal().clone()
        grid = row_grid(kind, w, self._group_limit, importance)
        nearest = grid.round(w)
        if x is not None:
            q, damping = gptq_rows(w, hessian, grid)
        start = 0
        for name, part in zip(names, parts, strict=True):
            rows = slice(start, start := start + len(part))
            own = Grid(kind, grid.scale[rows], None if grid.factor is None else grid.factor[rows], grid.group)
            self._keep(name, own, nearest[rows], None if q is None else q[rows], probe, damping)

    def _keep(
        self, name: str, grid: Grid, nearest: Tensor, q: Tensor | None, probe: Tensor | None, damping: float
    ) -> None:
        w = self.weights.pop(name + ".weight")
        chosen = nearest if q is None else q
        dense = grid.dequantize(chosen)
        rounded = grid.dequantize(nearest)
        errors = {"weight_error": _relative(dense - w, w), "rtn_weight_error": _relative(rounded - w, w)}
        if probe is not None:
            truth = probe @ w.T
            errors["output_error"] = _relative(probe @ dense.T - truth, truth)
            errors["rtn_output_error"] = _relative(probe @ rounded.T - truth, truth)
        del rounded  # as large as the matrix in float
        report = Layer(name, grid.kind, tuple(w.shape), damping=damping, **errors)
        self.fitted[name] = Fitted(chosen, grid, report)
        self.stored |= pack(name, self.fitted[name])
        if self._pool is None:
            self._dense[name] = dense

    def apply(self, name: str, x: Tensor) -> Tensor:
        """Returns x W^T + b for f32[T, K], with the engine's rounding of x where W is quantized."""
        bias = self.weights.get(name + ".bias")
        if name not in self.fitted:
            return torch.nn.functional.linear(x, self.weights[name + ".weight"], bias)
        if self._pool is None:
            return torch.nn.functional.linear(dequantize_activations(x), self._dense[name], bias)
        scale = self.fitted[name].grid.scale
        sums, row_scales = integer_sums(self._pool, self._view(name, "weight"), self._factors(name), x.numpy())
        y = torch.from_numpy(sums)[:, : len(scale)].float().mul_(torch.from_numpy(row_scales)[:, None]).mul_(scale)
        return y if bias is None else y.add_(bias)

    def _view(self, name: str, part: str) -> Stored:
        tensor = self.stored[f"{name}.{part}"]
        data = tensor.numpy()
        kind = {torch.int8: "I8", torch.uint8: "U8"}[tensor.dtype]
        return Stored(f"{name}.{part}", kind, data.shape, data.reshape(-1).view(np.uint8))

    def _factors(self, name: str) -> Stored | None:
        return self._view(name, "weight_group") if f"{name}.weight_group" in self.stored else None
