"""How much work a question is, from the model's geometry alone, and how long a machine needs for it at the least.

Letters: P patches of one picture, T tokens of the prompt, D width. A product with its addition counts as two
operations. Norms, softmax, RoPE and activations are left out: they are under one percent of the operations.

    vision    products   2 P (patch D + L (3 D D + D D + 2 D M)) + 2 P / 4 (4 D 4 D + 4 D hidden)
              attention  2 L 2 P P D
    prefill   products   2 T (L - 1) (D (q + 2 kv) + q D + 3 D M) + 2 T 2 D kv + 2 (2 D q + 3 D M + vocab D), as the
                         last layer's keys and values alone are wanted of all tokens
              attention  2 (L - 1) 2 (T (T + 1) / 2) q + 2 2 T q
    decode    bytes      every weight of the language model and its head once, and the KV cache so far
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ...runtime.files.checkpoint import Checkpoint
from ...runtime.files.config import ModelConfig
from ...runtime.files.quantization import matrices

__all__ = ["Work", "attention_kind", "decode_work", "floor_ms", "language_bytes", "prefill_work", "vision_work"]

_HEADS = ("lm_head", "model.embed_tokens")


@dataclass(frozen=True)
class Work:
    """Operations of matrix products by the kind they run in (int8, bf16, f32), of attention, and bytes read once."""

    products: Mapping[str, float] = field(default_factory=dict)
    attention: float = 0.0
    bytes: float = 0.0

    @property
    def operations(self) -> float:
        """All of them."""
        return sum(self.products.values()) + self.attention


def _kinds(checkpoint: Checkpoint, precision: str) -> dict[str, str]:
    """The kind each matrix is multiplied in: int8 where it is quantized, else what it is stored as."""
    layers = checkpoint.quantization.layers if checkpoint.quantization else {}
    kinds = {}
    for name in matrices(checkpoint.config):
        if precision == "fp32":
            kinds[name] = "f32"
        elif layers.get(name, "bf16") != "bf16":
            kinds[name] = "int8"
        else:
            kinds[name] = "bf16" if checkpoint.tensors[f"{name}.weight"].dtype == "BF16" else "f32"
    return kinds


def _head(config: ModelConfig) -> str:
    return "model.embed_tokens" if config.text.tied else "lm_head"


def _stored(checkpoint: Checkpoint, prefixes: Sequence[str]) -> int:
    return sum(t.nbytes for name, t in checkpoint.tensors.items() if name.startswith(tuple(prefixes)))


def language_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of weights that one decoding step reads: all layers, the last norm, the head."""
    return _stored(checkpoint, ["model.layers.", "model.norm.", f"{_head(checkpoint.config)}."])


def vision_work(checkpoint: Checkpoint, patches: Sequence[int], precision: str = "auto") -> Work:
    """The work of encoding pictures of so many patches each."""
    v, kinds, total = checkpoint.config.vision, _kinds(checkpoint, precision), sum(patches)
    products = dict.fromkeys(("int8", "bf16", "f32"), 0.0)
    for name, (n, k) in matrices(checkpoint.config).items():
        if name.startswith("visual."):
            rows = total / v.merge_size**2 if name.startswith("visual.merger.") else total
            products[kinds[name]] += 2.0 * rows * n * k
    attention = sum(4.0 * v.depth * p * p * v.embed_dim for p in patches)
    return Work(products, attention, len(patches) * _stored(checkpoint, ["visual."]))


def prefill_work(checkpoint: Checkpoint, tokens: int, precision: str = "auto") -> Work:
    """The work of a prompt of so many tokens.

    All need the last layer's keys and values; the rest of that layer and the head work for the last token alone.
    """
    t, kinds, head = checkpoint.config.text, _kinds(checkpoint, precision), _head(checkpoint.config)
    products = dict.fromkeys(("int8", "bf16", "f32"), 0.0)
    for name, (n, k) in matrices(checkpoint.config).items():
        if not name.startswith("visual.") and (name == head or name not in _HEADS):
            last = name.startswith(f"model.layers.{t.layers - 1}.") and not name.endswith(("k_proj", "v_proj"))
            products[kinds[name]] += 2.0 * (1 if last or name == head else tokens) * n * k
    attention = 4.0 * ((t.layers - 1) * tokens * (tokens + 1) / 2 + tokens) * t.heads * t.head_dim
    return Work(products, attention, language_bytes(checkpoint))


def decode_work(checkpoint: Checkpoint, length: float, precision: str = "auto") -> Work:
    """The work of one further token behind `length` others."""
    t, one = checkpoint.config.text, prefill_work(checkpoint, 1, precision)
    cache = 2 * t.layers * length * t.kv_heads * t.head_dim * (4 if precision == "fp32" else 2)
    return Work(one.products, 4.0 * t.layers * length * t.heads * t.head_dim, one.bytes + cache)


def attention_kind(ceilings: Mapping[str, float], precision: str) -> str:
    """What attention's products could run in: bf16 where the machine has it and the precision allows it, else f32."""
    return "bf16" if precision == "auto" and ceilings.get("bf16_ops", 0) > ceilings["f32_ops"] else "f32"


def floor_ms(work: Work, ceilings: Mapping[str, float], precision: str = "auto") -> float:
    """The least time for the work on a machine of these ceilings: computing, or reading if that takes longer."""
    rates = {"int8": ceilings["int8_ops"], "f32": ceilings["f32_ops"]}
    rates["bf16"] = ceilings.get("bf16_ops") or rates["f32"]
    seconds = sum(operations / rates[kind] for kind, operations in work.products.items())
    seconds += work.attention / rates[attention_kind(ceilings, precision)]
    return 1000 * max(seconds, work.bytes / ceilings["read_bytes"])
