"""Engines behind one protocol (base.py).

A backend is a module of this package with `open_engine(checkpoint, options) -> Engine`, and a row in BACKENDS.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING

from ..errors import UnsupportedError

if TYPE_CHECKING:
    from ..files.checkpoint import Checkpoint
    from .base import Engine, Options

__all__ = ["BACKENDS", "check_backend", "open_engine"]

# name: the extra of this package that installs what it needs, "" where nothing more is needed
BACKENDS: Mapping[str, str] = {"native": "", "torch": "torch"}


def check_backend(name: str) -> None:
    """Raises UnsupportedError for a name that is none of BACKENDS."""
    if name not in BACKENDS:
        raise UnsupportedError(f"backend {name!r} is not part of this version; choose {' or '.join(BACKENDS)}")


def open_engine(name: str, checkpoint: "Checkpoint", options: "Options") -> "Engine":
    """Opens a checkpoint in the engine of that name; only its own module is imported.

    Raises UnsupportedError for an unknown name, or where a package that it needs is missing; what the engine raises.
    """
    check_backend(name)
    try:
        module = import_module(f".{name}", __name__)
    except ImportError as error:
        if not BACKENDS[name]:
            raise
        raise UnsupportedError(
            f"backend {name} cannot be loaded ({error}); install it: pip install 'migician[{BACKENDS[name]}]'"
        ) from None
    return module.open_engine(checkpoint, options)
