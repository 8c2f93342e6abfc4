"""Weights at rest: one safetensors file holds a model, its throw-away heads, its vocabulary and its history."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save

from ...runtime.files.write import whole_file
from .model import NanoConfig

__all__ = ["State", "load_state", "save_state"]

_FORMAT = "migician-nano-state"


@dataclass
class State:
    """What training goes on from, or export starts from. Tensor names as in NanoModel and Heads.

    history: what has been trained so far, in words and numbers, for the model card.
    """

    config: NanoConfig
    pieces: list[str]
    model: dict[str, torch.Tensor]
    heads: dict[str, torch.Tensor] = field(default_factory=dict)
    history: dict[str, Any] = field(default_factory=dict)


def save_state(path: str | os.PathLike[str], state: State, *, dtype: torch.dtype = torch.bfloat16) -> None:
    """Writes a state; it appears under its name complete or not at all. Raises ModelFileError where it cannot."""
    tensors = {f"model.{name}": tensor for name, tensor in state.model.items()}
    tensors.update({f"heads.{name}": tensor for name, tensor in state.heads.items()})
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in tensors.items()}
    words = {"config": state.config.to_dict(), "pieces": state.pieces, "history": state.history}
    metadata = {"format": _FORMAT, **{key: json.dumps(value) for key, value in words.items()}}
    with whole_file(path) as file:
        file.write(save(tensors, metadata))


def load_state(path: str | os.PathLike[str]) -> State:
    """Reads a state; the tensors come as fp32. Raises ValueError for another kind of file."""
    with safe_open(os.fspath(path), "pt") as file:
        metadata: Mapping[str, str] = file.metadata() or {}
        if metadata.get("format") != _FORMAT:
            raise ValueError(
                f"{path}: not a training state; give train/nano/nano_state.safetensors or one that train wrote"
            )
        tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    parts: dict[str, dict[str, torch.Tensor]] = {"model": {}, "heads": {}}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = tensor
    config = NanoConfig.from_dict(json.loads(metadata["config"]))
    return State(
        config, json.loads(metadata["pieces"]), parts["model"], parts["heads"], json.loads(metadata["history"])
    )
