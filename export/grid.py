"""The numbers that quantized weights may take, rounding to nearest, and the engine's integer arithmetic in torch.

int8:  w = q s            q in -127..127, one s per row
int4:  w = q f s          q in -8..7, an integer f in 1..16 per row and group of columns, one s per row

The two levels are QServe's (arXiv:2405.04532): q f fits int8, so prefill runs as a plain int8 product. The s have so
few significant bits that f s is exact in IEEE half, and copies of a file in formats with half scales lose nothing.

Letters: N rows (outputs), K columns (inputs), G groups along K, T tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Grid", "dequantize_activations", "int4_grid", "int8_grid", "integer_sums", "quantize_activations"]

_MAX_FACTOR = 16
_SMALLEST = 2.0**-24  # the last place of a half
_INT4_BITS, _INT8_BITS = 7, 11  # significant bits of s; a factor up to 16 adds four
_NOTHING = 1e-30  # rows of activations no larger than this are zeros
_SHRINK_STEPS = 6  # how many smaller factors an int4 group tries: clipping its extremes may pay


@dataclass(frozen=True, eq=False)
class Grid:
    """The numbers one matrix may take.

    kind: "int8" or "int4".   scale: f32[N].   factor: u8[N, G] for int4, None for int8.   group: columns per factor.
    """

    kind: str
    scale: Tensor
    factor: Tensor | None = None
    group: int = 0

    @property
    def bounds(self) -> tuple[int, int]:
        return (-8, 7) if self.kind == "int4" else (-127, 127)

    def step(self, column: int) -> Tensor:
        """The distance of neighbours in one column, f32[N]."""
        return self.scale if self.factor is None else self.scale * self.factor[:, column // self.group]

    def round(self, w: Tensor) -> Tensor:
        """Rounds f32[N, K] to nearest: i8[N, K]."""
        steps = self._steps(w.shape[1])
        return (w / steps).nan_to_num(0, 0, 0).round_().clamp_(*self.bounds).to(torch.int8)

    def dequantize(self, q: Tensor) -> Tensor:
        """Returns f32[N, K] for i8[N, K]."""
        return self.int8(q).float() * self.scale[:, None]

    def int8(self, q: Tensor) -> Tensor:
        """What the engine multiplies with: i8[N, K], q itself or q f."""
        if self.factor is None:
            return q
        return q * self.factor.to(torch.int8).repeat_interleave(self.group, 1)

    def _steps(self, columns: int) -> Tensor:
        if self.factor is None:
            return self.scale[:, None]
        return (self.scale[:, None] * self.factor).repeat_interleave(columns // self.factor.shape[1], 1)


def _round_up(scale: Tensor, bits: int) -> Tensor:
    """Rounds f32 scales up to so many significant bits and to multiples of 2^-24; zero becomes the smallest."""
    wide = scale.double().clamp(min=_SMALLEST)
    unit = torch.exp2(torch.floor(torch.log2(wide)) - (bits - 1)).clamp(min=_SMALLEST)
    return (torch.ceil(wide / unit) * unit).float()


def int8_grid(w: Tensor) -> Grid:
    """Fits one scale per row of f32[N, K]: the largest magnitude becomes 127."""
    return Grid("int8", _round_up(w.abs().amax(1) / 127, _INT8_BITS))


def int4_grid(w: Tensor, group: int, importance: Tensor | None = None) -> Grid:
    """Fits scales and factors of f32[N, K], K % group == 0, by least squares over the factors that come into question.

    importance: f32[K], weight of each column's squared error (a Hessian's diagonal).
    """
    grouped = w.reshape(len(w), -1, group)
    # the step at which nothing is clipped; the top group of a row gets the factor 16
    need = torch.maximum(grouped.amax(2) / 7, -grouped.amin(2) / 8)
    scale = _round_up(need.amax(1) / _MAX_FACTOR, _INT4_BITS)
    top = torch.ceil(need / scale[:, None]).clamp_(1, _MAX_FACTOR)
    weight = None if importance is None else importance.reshape(1, -1, group)
    best, lowest = top.clone(), torch.full_like(top, torch.inf)
    for less in range(_SHRINK_STEPS):
        factor = (top - less).clamp(min=1)
        step = (scale[:, None] * factor)[..., None]
        error = torch.round(grouped / step).clamp_(-8, 7).mul_(step).sub_(grouped).square_()
        total = (error if weight is None else error.mul_(weight)).sum(2)
        better = total < lowest
        best[better], lowest[better] = factor[better], total[better]
    return Grid("int4", scale, best.to(torch.uint8), group)


def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds rows of f32[T, K] as the engine does: (i8[T, K], f32[T] scales), bit for bit."""
    top = _largest(x)
    return (x * _inverse(top)).round_().to(torch.int8), top[:, 0] / 127


def dequantize_activations(x: Tensor) -> Tensor:
    """Returns f32[T, K] as the engine's integer products see them."""
    top = _largest(x)
    return (x * _inverse(top)).round_().mul_(top / 127)


def _largest(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, torch.inf, -1, keepdim=True)


def _inverse(top: Tensor) -> Tensor:
    return torch.where(top > _NOTHING, 127 / top, torch.zeros_like(top))


def integer_sums(x: Tensor, q: Tensor, grid: Grid) -> Tensor:
    """The engine's integer product of f32[T, K] activations with i8[N, K] weights: i64[T, N], exact.

    Products are below 2^14 and K below 2^16, so that f64 sums hold every bit.
    """
    a, _ = quantize_activations(x)
    return (a.double() @ grid.int8(q).double().T).long()
