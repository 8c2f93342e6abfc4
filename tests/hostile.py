"""Makes a model hostile to int8 activations without changing what it computes: outlier channels in both towers."""

from pathlib import Path

import numpy as np

from migician.runtime.files.checkpoint import derive
from migician.runtime.files.mig import write_mig
from migician.runtime.files.open import open_checkpoint
from migician.runtime.files.tensors import Tensor

FACTOR = 60.0


def make_hostile(source: str | Path, path: str | Path, channels: int = 4, seed: int = 0) -> Path:
    """Writes a copy of a model as f32 in which a few channels of every normed residual stream are 60 times larger.

    The norm's gain (and shift) grows, the readers' columns shrink: the product is what it was.
    """
    rng = np.random.default_rng(seed)
    with open_checkpoint(source) as model:
        values = {name: tensor.to_f32().copy() for name, tensor in model.tensors.items()}
        vision = rng.choice(model.config.vision.embed_dim, channels, replace=False)
        text = rng.choice(model.config.text.hidden, channels, replace=False)
        for i in range(model.config.vision.depth):
            _move(values, f"visual.blocks.{i}.norm1", [f"visual.blocks.{i}.attn.qkv"], vision)
            _move(values, f"visual.blocks.{i}.norm2", [f"visual.blocks.{i}.mlp.fc1"], vision)
        _move(values, "visual.merger.ln_q", ["visual.merger.mlp.0"], vision)
        for i in range(model.config.text.layers):
            layer = f"model.layers.{i}."
            _move(values, layer + "input_layernorm", [f"{layer}self_attn.{n}_proj" for n in "qkv"], text)
            _move(values, layer + "post_attention_layernorm", [f"{layer}mlp.{n}_proj" for n in ("gate", "up")], text)
        found = {
            name: Tensor(name, "F32", array.shape, np.frombuffer(array.tobytes(), np.uint8))
            for name, array in values.items()
        }
        write_mig(path, derive(model, found, texts={}, where=path))
    return Path(path)


def _move(values: dict[str, np.ndarray], norm: str, readers: list[str], channels: np.ndarray) -> None:
    width = len(values[norm + ".weight"])
    for kind in (".weight", ".bias"):
        if norm + kind in values:
            values[norm + kind][channels] *= FACTOR
    for reader in readers:
        columns = values[reader + ".weight"].reshape(len(values[reader + ".weight"]), -1, width)
        columns[:, :, channels] /= FACTOR
