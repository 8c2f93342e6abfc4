"""Migician Edge: grounds objects across several images, on edge machines.

    import migician

    with migician.load("nano") as model:
        answer = model.ground(["a.jpg", "b.jpg"], "Where is the cup of the first image in the second one?")

Importing this package loads nothing; each name below is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .runtime.answer import Answer, Step, Token
    from .runtime.boxes import Box, Point
    from .runtime.errors import (
        Cancelled,
        ContextFullError,
        ImageError,
        MigicianError,
        ModelFileError,
        OutOfMemory,
        UnsupportedError,
    )
    from .runtime.model import Chat, Model, load

__version__ = "0.2.0"

__all__ = [
    "Answer",
    "Box",
    "Cancelled",
    "Chat",
    "ContextFullError",
    "ImageError",
    "MigicianError",
    "Model",
    "ModelFileError",
    "OutOfMemory",
    "Point",
    "Step",
    "Token",
    "UnsupportedError",
    "__version__",
    "load",
]

_HOME = {
    "Answer": "answer",
    "Box": "boxes",
    "Cancelled": "errors",
    "Chat": "model",
    "ContextFullError": "errors",
    "ImageError": "errors",
    "MigicianError": "errors",
    "Model": "model",
    "ModelFileError": "errors",
    "OutOfMemory": "errors",
    "Point": "boxes",
    "Step": "answer",
    "Token": "answer",
    "UnsupportedError": "errors",
    "load": "model",
}


def __getattr__(name: str) -> Any:
    """Imports a public name on its first use (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".runtime.{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
