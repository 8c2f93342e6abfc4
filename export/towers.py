"""Both towers in torch, one unit at a time, quantizing each map as soon as its inputs are known.

The mathematics of runtime/MODEL.md. All sequences lie end to end in one matrix of rows; products run on pieces of it,
attention on one sequence at a time. What a map is fitted to comes from the quantized maps before it.

Letters: R rows of all sequences, T tokens or patches of one, D width, H heads, S head size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..runtime.files.config import TextConfig, VisionConfig
from .fit import Fitter

__all__ = ["Rows", "language_angles", "run_block", "run_layer", "run_merger", "vision_angles"]

_PIECE = 1024  # rows that go through a map at a time: what it makes of them stays in cache


@dataclass(eq=False)
class Rows:
    """Sequences end to end.

    x: f32[R, D].   spans: first and last row of each sequence.   angles: per sequence, (cos, sin) f32[T, S / 2].
    chosen: i64[n], the rows that maps are fitted to.   weight: f32[n] of these, None for all alike.
    """

    x: Tensor
    spans: Sequence[tuple[int, int]]
    angles: Sequence[tuple[Tensor, Tensor]]
    chosen: Tensor
    weight: Tensor | None = None


def vision_angles(c: VisionConfig, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of a picture of rows x columns patches, in merge order: f32[T, S / 2] each."""
    m = c.merge_size
    grid = np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"))
    place = grid.reshape(2, rows // m, m, columns // m, m).transpose(1, 3, 2, 4, 0).reshape(-1, 2)
    quarter = c.head_dim // 4
    frequency = 1 / c.rope_theta ** (torch.arange(quarter).float() / quarter)
    angle = (torch.from_numpy(place).float()[:, :, None] * frequency).flatten(1)
    return angle.cos(), angle.sin()


def language_angles(c: TextConfig, positions: np.ndarray) -> tuple[Tensor, Tensor]:
    """Cosines and sines of M-RoPE for i32[3, T] positions: f32[T, S / 2] each."""
    half = c.head_dim // 2
    frequency = 1 / c.rope_theta ** (torch.arange(half).float() * 2 / c.head_dim)
    axis = torch.repeat_interleave(torch.arange(3), torch.tensor(c.mrope_section))
    angle = torch.from_numpy(positions).float().T[:, axis] * frequency
    return angle.cos(), angle.sin()


def _turn(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates f32[T, H, S] by rotary embedding, planes (i, i + S / 2)."""
    cosine, sine = (a[:, None].to(x.device) for a in angles)
    first, second = x.chunk(2, -1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], -1)


def _attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """softmax(q k^T / sqrt(S)) v for f32[T, H, S]; k and v may have fewer heads. Returns f32[T, H S]."""
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
    return out[0].transpose(0, 1).flatten(1)


def _pieces(count: int) -> Iterator[slice]:
    for start in range(0, count, _PIECE):
        yield slice(start, min(start + _PIECE, count))


def run_block(f: Fitter, c: VisionConfig, prefix: str, rows: Rows | None) -> None:
    """One vision block over all pictures; rows.x is what comes out. Without rows the maps are only rounded."""
    qkv, proj, fc1, fc2 = (prefix + name for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"))
    if rows is None:
        for name in (qkv, proj, fc1, fc2):
            f.fit([name], None)
        return
    x, chosen = rows.x, rows.chosen

    def norm(part: Tensor, name: str) -> Tensor:
        gain, shift = f.weights[f"{prefix}{name}.weight"], f.weights[f"{prefix}{name}.bias"]
        return F.layer_norm(part, (c.embed_dim,), gain, shift, 1e-6)

    f.fit([qkv], norm(x[chosen], "norm1"))
    out = torch.empty_like(x)
    for (start, stop), angles in zip(rows.spans, rows.angles, strict=True):
        q, k, v = f.apply(qkv, norm(x[start:stop], "norm1")).unflatten(1, (3, c.heads, c.head_dim)).unbind(1)
        out[start:stop] = _attend(_turn(q, angles), _turn(k, angles), v, causal=False)
    f.fit([proj], out[chosen])
    for piece in _pieces(len(x)):
        x[piece] += f.apply(proj, out[piece])
    del out
    h = norm(x[chosen], "norm2")
    f.fit([fc1], h)
    f.fit([fc2], _quick_gelu(f.apply(fc1, h)))
    for piece in _pieces(len(x)):
        x[piece] += f.apply(fc2, _quick_gelu(f.apply(fc1, norm(x[piece], "norm2"))))


def _quick_gelu(x: Tensor) -> Tensor:
    return F.silu(1.702 * x).div_(1.702)  # silu(a x) / a


def run_merger(f: Fitter, c: VisionConfig, prefix: str, rows: Rows | None) -> Tensor | None:
    """The merger over all pictures: f32[R / merge^2, hidden], the pictures' tokens end to end."""
    fc1, fc2 = prefix + "mlp.0", prefix + "mlp.2"
    if rows is None:
        f.fit([fc1], None)
        f.fit([fc2], None)
        return None
    width = c.embed_dim * c.merge_size**2
    x = rows.x.view(-1, width)

    def norm(part: Tensor) -> Tensor:
        gain, shift = f.weights[prefix + "ln_q.weight"], f.weights[prefix + "ln_q.bias"]
        return F.layer_norm(part.view(-1, c.embed_dim), (c.embed_dim,), gain, shift, 1e-6).view(-1, width)

    h = norm(x[rows.chosen])
    f.fit([fc1], h)
    f.fit([fc2], F.gelu(f.apply(fc1, h)))
    return torch.cat([f.apply(fc2, F.gelu(f.apply(fc1, norm(x[piece])))) for piece in _pieces(len(x))])


def run_layer(f: Fitter, c: TextConfig, prefix: str, rows: Rows | None) -> None:
    """One layer of the language model over all sequences; rows.x is what comes out."""
    q, k, v, o = (f"{prefix}self_attn.{name}_proj" for name in "qkvo")
    gate, up, down = (f"{prefix}mlp.{name}_proj" for name in ("gate", "up", "down"))
    if rows is None:
        for names in ([q, k, v], [o], [gate, up], [down]):
            f.fit(names, None)
        return
    x, chosen, weight = rows.x, rows.chosen, rows.weight

    def norm(part: Tensor, name: str) -> Tensor:
        return F.rms_norm(part, (c.hidden,), f.weights[f"{prefix}{name}.weight"], c.rms_eps)

    def inner(h: Tensor) -> Tensor:
        return F.silu(f.apply(gate, h)) * f.apply(up, h)

    f.fit([q, k, v], norm(x[chosen], "input_layernorm"), weight)
    out = torch.empty(len(x), c.heads * c.head_dim, device=x.device)
    for (start, stop), angles in zip(rows.spans, rows.angles, strict=True):
        h = norm(x[start:stop], "input_layernorm")
        heads = [f.apply(name, h).unflatten(1, (-1, c.head_dim)) for name in (q, k, v)]
        out[start:stop] = _attend(_turn(heads[0], angles), _turn(heads[1], angles), heads[2], causal=True)
    f.fit([o], out[chosen], weight)
    for piece in _pieces(len(x)):
        x[piece] += f.apply(o, out[piece])
    del out
    h = norm(x[chosen], "post_attention_layernorm")
    f.fit([gate, up], h, weight)
    f.fit([down], inner(h), weight)
    for piece in _pieces(len(x)):
        x[piece] += f.apply(down, inner(norm(x[piece], "post_attention_layernorm")))
