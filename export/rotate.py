"""Orthogonal rotations of the residual streams and of the value heads, folded into the weights beforehand.

QuaRot (arXiv:2404.00456): a norm without gain commutes with an orthogonal Q, so x Q can flow where x did when every
reader takes W Q and every writer gives Q^T W. Outliers of single channels spread over all of them, and int8 serves.

Two things are our own. LayerNorm subtracts the mean, so the vision encoder's Q is made to keep the all-ones vector; it
then commutes with the norm as it stands, and neither the engine nor transformers has to know. And Q is never a dense
matrix: signs, a Kronecker product of two small orthogonal matrices, and one reflection.

Letters: N outputs, K inputs, D width of a residual stream, H heads, S size of a head.
"""

import math

import numpy as np
import torch
from torch import Tensor

__all__ = ["Rotation", "fold_gain", "hadamard", "read_rotated", "rotate_heads_in", "rotate_heads_out", "write_rotated"]


class Rotation:
    """An orthogonal f32[D, D] matrix Q, drawn from a seed; keeps_ones makes Q 1 = 1.

    apply(x) is x Q along the last dimension, in O(D (a + b)) a row where D = a b.
    """

    def __init__(self, size: int, seed: int, *, keeps_ones: bool = False) -> None:
        self.size = size
        rng = np.random.default_rng([seed, size])
        outer = _outer_factor(size)
        power = size // outer
        self._outer = torch.from_numpy(_orthogonal(outer, rng)).float()
        self._inner = torch.from_numpy(_orthogonal(power, rng)).float()
        self._signs = torch.from_numpy(rng.integers(0, 2, size) * 2.0 - 1).float()
        self._mirror: Tensor | None = None
        if keeps_ones:
            self._mirror = self._reflection()

    def _reflection(self) -> Tensor | None:
        """The unit vector v of a reflection F = 1 - 2 v v^T with Q F 1 = 1; None where Q already keeps ones."""
        v = self._kronecker(self._signs.double()) - 1  # Q^T 1 - 1
        length = float(v.norm())
        return (v / length).float() if length > 1e-6 else None

    def _kronecker(self, x: Tensor) -> Tensor:
        a, b = self._outer.to(x), self._inner.to(x)
        split = x.reshape(*x.shape[:-1], len(a), len(b))
        return (a.T @ (split @ b)).reshape(x.shape)

    def apply(self, x: Tensor) -> Tensor:
        """Returns x Q for f32[..., D]."""
        y = self._kronecker(x * self._signs.to(x))
        if self._mirror is None:
            return y
        v = self._mirror.to(x)
        return y - (y @ v)[..., None] * (2 * v)


def _outer_factor(size: int) -> int:
    """Splits a size into a factor and a power of two up to 128, both Hadamard orders where that can be had."""
    power = min(size & -size, 128)
    choices = [size // p for p in (128, 64, 32, 16, 8, 4, 2) if p <= power]
    return next((factor for factor in choices if hadamard(factor) is not None), size // power)


def _orthogonal(size: int, rng: np.random.Generator) -> np.ndarray:
    """A Hadamard matrix over sqrt(size) where one is known to us, else a random orthogonal one; f64[size, size]."""
    found = hadamard(size)
    if found is not None:
        return found / math.sqrt(size)
    q, r = np.linalg.qr(rng.standard_normal((size, size)))
    return q * np.sign(np.diag(r))


def hadamard(size: int) -> np.ndarray | None:
    """Returns a Hadamard matrix of this order by Sylvester's doubling and Paley's two constructions, or None.

    f64[size, size] of 1 and -1, rows orthogonal.   Source: Paley, On Orthogonal Matrices, 1933.
    """
    if size == 1:
        return np.ones((1, 1))
    if _is_prime(size - 1) and (size - 1) % 4 == 3:
        return _paley_first(size - 1)
    if size % 2 == 0 and _is_prime(size // 2 - 1) and (size // 2 - 1) % 4 == 1:
        return _paley_second(size // 2 - 1)
    half = hadamard(size // 2) if size % 2 == 0 else None
    return None if half is None else np.kron(np.array([[1.0, 1.0], [1.0, -1.0]]), half)


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))


def _jacobsthal(q: int) -> np.ndarray:
    """[q, q] quadratic characters of i - j: 1 for a square, -1 for none, 0 on the diagonal."""
    character = np.full(q, -1.0)
    character[[i * i % q for i in range(1, q)]] = 1
    character[0] = 0
    return character[np.subtract.outer(np.arange(q), np.arange(q)) % q]


def _paley_first(q: int) -> np.ndarray:
    skew = np.zeros((q + 1, q + 1))
    skew[0, 1:], skew[1:, 0], skew[1:, 1:] = 1, -1, _jacobsthal(q)
    return skew + np.eye(q + 1)


def _paley_second(q: int) -> np.ndarray:
    symmetric = np.zeros((q + 1, q + 1))
    symmetric[0, 1:], symmetric[1:, 0], symmetric[1:, 1:] = 1, 1, _jacobsthal(q)
    off, on = np.array([[1.0, 1.0], [1.0, -1.0]]), np.array([[1.0, -1.0], [-1.0, -1.0]])
    return np.kron(symmetric, off) + np.kron(np.eye(q + 1), on)


def fold_gain(w: Tensor, bias: Tensor | None, gain: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Moves a norm's gain f32[D] and shift f32[D] into the map behind it; K may be several D side by side."""
    copies = w.shape[1] // len(gain)
    if shift is not None:
        moved = w @ shift.repeat(copies)
        bias = moved if bias is None else bias + moved
    return w * gain.repeat(copies), bias


def read_rotated(w: Tensor, q: Rotation) -> Tensor:
    """Returns W Q for a map f32[N, K] that reads a rotated stream; K may be several D side by side."""
    return q.apply(w.reshape(len(w), -1, q.size)).reshape(w.shape)


def write_rotated(w: Tensor, bias: Tensor | None, q: Rotation) -> tuple[Tensor, Tensor | None]:
    """Returns Q^T W and b Q for a map f32[D, K] that writes into a rotated stream."""
    return q.apply(w.T).T.contiguous(), None if bias is None else q.apply(bias)


def rotate_heads_out(w: Tensor, bias: Tensor, q: Rotation) -> tuple[Tensor, Tensor]:
    """Rotates the outputs of a value map f32[H S, K] head by head."""
    turned = q.apply(w.reshape(-1, q.size, w.shape[1]).transpose(1, 2)).transpose(1, 2)
    return turned.reshape(w.shape), q.apply(bias.reshape(-1, q.size)).reshape(-1)


def rotate_heads_in(w: Tensor, q: Rotation) -> Tensor:
    """Takes that rotation back in the map f32[N, H S] behind the attention."""
    return read_rotated(w, q)
