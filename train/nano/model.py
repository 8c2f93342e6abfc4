"""Qwen2-VL for batches of small pictures of one size: transformers' maths and parameter names, written for training.

Padded rows with an explicit [B, T, T] mask, so that several questions can share one picture prefix.
tests/test_train.py holds the logits to transformers' Qwen2VLForConditionalGeneration.

Letters: B rows, T tokens, N pictures, P patches of a picture, C cells (P / 4), D width, H heads.
"""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...runtime.files.config import CLIP_MEAN, CLIP_STD
from .vocabulary import IMAGE, VISION_START

__all__ = ["NanoConfig", "NanoModel", "patchify", "position_init"]

_MEAN = torch.tensor(CLIP_MEAN)
_STD = torch.tensor(CLIP_STD)


@dataclass(frozen=True)
class NanoConfig:
    """Geometry. size: side of every picture, px, a multiple of 28. The other names are Qwen2-VL's."""

    size: int = 196
    vision_dim: int = 192
    vision_depth: int = 4
    vision_heads: int = 4
    vision_mlp: int = 4
    vision_theta: float = 10000.0
    dim: int = 256
    layers: int = 6
    heads: int = 8
    kv_heads: int = 4
    intermediate: int = 640
    vocab: int = 320
    rope_theta: float = 300.0
    mrope_section: tuple[int, int, int] = (1, 5, 10)
    eps: float = 1e-6

    @property
    def grid(self) -> int:
        """Cells along a picture's side."""
        return self.size // 28

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "NanoConfig":
        """Raises ValueError for a name that is none."""
        if unknown := sorted(values.keys() - {field.name for field in fields(cls)}):
            raise ValueError(f"model: no such setting: {', '.join(unknown)}")
        values = dict(values)
        if "mrope_section" in values:
            values["mrope_section"] = tuple(values["mrope_section"])
        return cls(**values)


def patchify(images: Tensor) -> Tensor:
    """u8[N, H, W, 3] -> f32[N, P, 3 * 14 * 14], patches in 2x2-merged order, one temporal copy."""
    n, h, w, _ = images.shape
    mean, std = _MEAN.to(images.device), _STD.to(images.device)
    x = images.float().mul_(1 / 255.0).sub_(mean).div_(std)
    x = x.view(n, h // 28, 2, 14, w // 28, 2, 14, 3).permute(0, 1, 4, 2, 5, 7, 3, 6)
    return x.reshape(n, (h // 14) * (w // 14), 588)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [.., heads, head_dim] times a rotation of planes (i, i + head_dim / 2); cos, sin [.., 1, head_dim / 2]."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class _RMS(torch.autograd.Function):
    """x / rms(x) in few passes; the weight is folded into the next matrix."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        r = (norm.square() / x.shape[-1] + eps).rsqrt()
        ctx.save_for_backward(x, r)
        return x * r.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        x, r = ctx.saved_tensors
        s = (g * x).sum(-1, keepdim=True, dtype=torch.float32)
        return torch.addcmul(g * r.to(g.dtype), x, (-s * r**3 / x.shape[-1]).to(g.dtype)), None


class RMSNorm(nn.Module):
    """Normalizes only: the caller multiplies its matrix by `weight`."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return _RMS.apply(x, self.eps)


class VisionAttention(nn.Module):
    def __init__(self, c: NanoConfig) -> None:
        super().__init__()
        self.heads = c.vision_heads
        self.qkv = nn.Linear(c.vision_dim, 3 * c.vision_dim)
        self.proj = nn.Linear(c.vision_dim, c.vision_dim)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        n, p, d = x.shape
        q, k, v = self.qkv(x).view(n, p, 3, self.heads, -1).unbind(2)
        q, k, v = (t.transpose(1, 2) for t in (rotate(q, cos, sin), rotate(k, cos, sin), v))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, p, d))


class VisionMlp(nn.Module):
    def __init__(self, c: NanoConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(c.vision_dim, c.vision_mlp * c.vision_dim)
        self.fc2 = nn.Linear(c.vision_mlp * c.vision_dim, c.vision_dim)

    def forward(self, x: Tensor) -> Tensor:
        """quick_gelu(x) = silu(1.702 x) / 1.702, the factors folded into the matrices."""
        x = F.silu(F.linear(x, self.fc1.weight * 1.702, self.fc1.bias * 1.702))
        return F.linear(x, self.fc2.weight / 1.702, self.fc2.bias)


class VisionBlock(nn.Module):
    def __init__(self, c: NanoConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(c.vision_dim, eps=1e-6)
        self.norm2 = nn.LayerNorm(c.vision_dim, eps=1e-6)
        self.attn = VisionAttention(c)
        self.mlp = VisionMlp(c)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), cos, sin)
        return x + self.mlp(self.norm2(x))


class Merger(nn.Module):
    """Four patches to one cell: [N, P, D] -> [N, C, D of the language model]."""

    def __init__(self, c: NanoConfig) -> None:
        super().__init__()
        self.ln_q = nn.LayerNorm(c.vision_dim, eps=1e-6)
        d = 4 * c.vision_dim
        self.mlp = nn.Sequential(nn.Linear(d, d), nn.GELU(), nn.Linear(d, c.dim))

    def forward(self, x: Tensor) -> Tensor:
        n, p, d = x.shape
        return self.mlp(self.ln_q(x).view(n, p // 4, 4 * d))


class PatchEmbed(nn.Module):
    def __init__(self, c: NanoConfig) -> None:
        super().__init__()
        self.proj = nn.Conv3d(3, c.vision_dim, (2, 14, 14), (2, 14, 14), bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Both temporal halves are the same picture, so the kernel is summed over time."""
        return F.linear(x, self.proj.weight.sum(2).flatten(1))


class VisionTower(nn.Module):
    cos: Tensor
    sin: Tensor

    def __init__(self, c: NanoConfig) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(c)
        self.blocks = nn.ModuleList(VisionBlock(c) for _ in range(c.vision_depth))
        self.merger = Merger(c)
        half = c.vision_dim // c.vision_heads // 2
        frequency = c.vision_theta ** -(torch.arange(0, half, 2).float() / half)
        g = c.size // 14
        place = torch.stack(torch.meshgrid(torch.arange(g), torch.arange(g), indexing="ij"), -1)
        place = place.view(g // 2, 2, g // 2, 2, 2).permute(0, 2, 1, 3, 4).reshape(-1, 2)
        angle = (place[:, :, None].float() * frequency).flatten(1)[:, None]
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """f32[N, P, 588] -> [N, C, D]."""
        x = self.patch_embed(x)
        cos, sin = self.cos.to(x.dtype), self.sin.to(x.dtype)
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.merger(x)


class Attention(nn.Module):
    def __init__(self, c: NanoConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = c.heads, c.kv_heads, c.head_dim
        kv = c.kv_heads * c.head_dim
        self.q_proj = nn.Linear(c.dim, c.dim)
        self.k_proj = nn.Linear(c.dim, kv)
        self.v_proj = nn.Linear(c.dim, kv)
        self.o_proj = nn.Linear(c.dim, c.dim, bias=False)

    def forward(
        self,
        x: Tensor,
        norm: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor,
        *,
        cache: dict[str, Tensor] | None = None,
        keep: list[tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:
        """x [B, T, D] normalized; mask [B, 1, T, S] additive.

        cache grows by k and v; keep receives (q, k), [B, H, T, head_dim].
        """
        b, t, d = x.shape
        parts = (self.q_proj, self.k_proj, self.v_proj)
        weight, bias = torch.cat([p.weight for p in parts]) * norm, torch.cat([p.bias for p in parts])
        qkv = F.linear(x, weight, bias).view(b, t, self.heads + 2 * self.kv_heads, self.head_dim)
        qk, v = qkv.split([self.heads + self.kv_heads, self.kv_heads], 2)
        q, k = rotate(qk, cos, sin).split([self.heads, self.kv_heads], 2)
        group = self.heads // self.kv_heads
        k, v = (z.unsqueeze(3).expand(-1, -1, -1, group, -1).flatten(2, 3) for z in (k, v))
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))
        if cache is not None:
            if "k" in cache:
                k, v = torch.cat([cache["k"], k], 2), torch.cat([cache["v"], v], 2)
            cache["k"], cache["v"] = k, v
        if keep is not None:
            keep.append((q, k))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.to(q.dtype))
        return self.o_proj(out.transpose(1, 2).reshape(b, t, d))


class Mlp(nn.Module):
    def __init__(self, c: NanoConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(c.dim, c.intermediate, bias=False)
        self.up_proj = nn.Linear(c.dim, c.intermediate, bias=False)
        self.down_proj = nn.Linear(c.intermediate, c.dim, bias=False)

    def forward(self, x: Tensor, norm: Tensor) -> Tensor:
        gate, up = F.linear(x, torch.cat([self.gate_proj.weight, self.up_proj.weight]) * norm).chunk(2, -1)
        return self.down_proj(F.silu(gate) * up)


class Layer(nn.Module):
    def __init__(self, c: NanoConfig) -> None:
        super().__init__()
        self.self_attn = Attention(c)
        self.mlp = Mlp(c)
        self.input_layernorm = RMSNorm(c.dim, c.eps)
        self.post_attention_layernorm = RMSNorm(c.dim, c.eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, **options: Any) -> Tensor:
        norm1, norm2 = self.input_layernorm, self.post_attention_layernorm
        x = x + self.self_attn(norm1(x), norm1.weight, cos, sin, mask, **options)
        return x + self.mlp(norm2(x), norm2.weight)


class TextModel(nn.Module):
    frequency: Tensor
    axis: Tensor

    def __init__(self, c: NanoConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab, c.dim)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.layers))
        self.norm = RMSNorm(c.dim, c.eps)
        frequency = c.rope_theta ** -(torch.arange(0, c.head_dim, 2).float() / c.head_dim)
        axis = torch.tensor([i for i, n in enumerate(c.mrope_section) for _ in range(n)])
        self.register_buffer("frequency", frequency, persistent=False)
        self.register_buffer("axis", axis, persistent=False)

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions i64[B, 3, T] -> cos, sin f32[B, T, 1, head_dim / 2]; each plane follows one of the three axes."""
        angle = positions.float().index_select(1, self.axis).transpose(1, 2) * self.frequency
        return angle.cos()[:, :, None], angle.sin()[:, :, None]


class Inner(nn.Module):
    def __init__(self, c: NanoConfig) -> None:
        super().__init__()
        self.visual = VisionTower(c)
        self.language_model = TextModel(c)


class NanoModel(nn.Module):
    """The whole model; its state dict carries transformers' names (the tied lm_head left out)."""

    def __init__(self, c: NanoConfig) -> None:
        super().__init__()
        self.config = c
        self.model = Inner(c)
        for name, p in self.named_parameters():
            if p.dim() > 1 and "embed" not in name:
                nn.init.normal_(p, 0, 1 / math.sqrt(p[0].numel()))
                if any(part in name for part in ("o_proj", "down_proj", "attn.proj", "fc2")):
                    p.data.mul_(1 / math.sqrt(2 * (c.vision_depth if "visual" in name else c.layers)))
            elif "bias" in name:
                nn.init.zeros_(p)
        nn.init.normal_(self.model.visual.patch_embed.proj.weight, 0, 1 / math.sqrt(588) / 2)
        nn.init.normal_(self.model.language_model.embed_tokens.weight, 0, c.dim**-0.5)

    def embed(self, ids: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Token embeddings [B, T, D] with the picture cells filled in, in order; and the cells [N, C, D]."""
        cells = self.model.visual(patches)
        x = self.model.language_model.embed_tokens(ids).to(cells.dtype)
        return x.masked_scatter((ids == IMAGE)[..., None], cells.reshape(-1, cells.shape[-1])), cells

    def run(
        self,
        x: Tensor,
        positions: Tensor,
        mask: Tensor,
        *,
        caches: list[dict[str, Tensor]] | None = None,
        keep: dict[int, list[tuple[Tensor, Tensor]]] | None = None,
        taps: dict[int, Tensor] | None = None,
    ) -> Tensor:
        """Embeddings to normed states [B, T, D].

        keep: layer -> list that receives its (q, k).   taps: receives every layer's output.
        """
        text = self.model.language_model
        cos, sin = (z.to(x.dtype) for z in text.rope(positions))
        for i, layer in enumerate(text.layers):
            cache = None if caches is None else caches[i]
            x = layer(x, cos, sin, mask, cache=cache, keep=None if keep is None else keep.get(i))
            if taps is not None:
                taps[i] = x
        return text.norm(x)

    def logits(self, states: Tensor) -> Tensor:
        """Logits of states as run() returns them."""
        text = self.model.language_model
        return F.linear(states, text.embed_tokens.weight * text.norm.weight)


def _wave_bias(c: NanoConfig, frequency: Tensor, axis: Tensor, amplitude: float) -> Tensor:
    """q biases [H, hd]: head j is a quarter-phase wave over rows (even j) or columns (odd j).

    Four heads take a plane near 0.25 rad a cell, four one near 0.5. With k constant, the logit at distance delta is
    |q| |k| cos(frequency * delta - phase); a slow plane needs a steeper wave.
    """
    half = c.head_dim // 2
    bias = torch.zeros(c.heads, c.head_dim)
    for j in range(c.heads):
        planes = (axis == 1 + j % 2).nonzero().flatten()
        r = j // 2
        slow = (frequency[planes] / 0.25).log().abs().argsort()
        near = slow if r < 2 else (frequency[planes] / 0.5).log().abs().argsort()
        plane = planes[near[0] if r < 2 or near[0] != slow[0] or len(near) == 1 else near[1]]
        phase = frequency[plane] * (1 + (c.grid - 1) / 2) - (math.pi / 4 if r % 2 else -math.pi / 4)
        steep = math.sqrt(amplitude) * c.head_dim**0.25 * float((0.25 / frequency[plane]).clamp(1, 4))
        bias[j, plane] = steep * math.cos(-phase)
        bias[j, plane + half] = steep * math.sin(-phase)
    return bias


@torch.no_grad()
def position_init(m: NanoModel, amplitude: float = 3.0, seed: int = 0) -> None:
    """Gives layer 0 a code of absolute place: its heads look at <|vision_start|> with a weight that depends on the
    distance in rows or columns, and write a direction of their own.

    A vision tower with relative 2-D RoPE cannot know absolute place; without this start it is never learned.
    """
    c, text = m.config, m.model.language_model
    generator = torch.Generator().manual_seed(seed)
    attention: Any = text.layers[0].self_attn
    embedding = text.embed_tokens.weight
    embedding[:, 0] = 0  # dimension 0 belongs to <|vision_start|> alone
    embedding[VISION_START] *= 0.1
    embedding[VISION_START, 0] = 1.0
    last: Any = m.model.visual.merger.mlp[2]
    last.weight[0] = 0
    strength = math.sqrt(c.dim)  # size of that dimension after RMSNorm
    direction = torch.zeros(c.kv_heads, c.head_dim)
    direction[:, : c.head_dim // 2] = 1.0
    attention.k_proj.weight[:, 0] = direction.flatten() * c.head_dim**0.25 / strength * math.sqrt(amplitude)
    attention.q_proj.bias.copy_(_wave_bias(c, text.frequency, text.axis, amplitude).flatten())
    attention.v_proj.weight[:, 0] = torch.randn(c.kv_heads * c.head_dim, generator=generator) / strength * 2
    attention.o_proj.weight.mul_(math.sqrt(c.layers))
