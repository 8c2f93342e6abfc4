"""This project's own file, which holds whatever a checkpoint does."""

from pathlib import Path

from ...runtime.files.checkpoint import Checkpoint
from ...runtime.files.config import ModelConfig
from ...runtime.files.mig import write_mig
from ...runtime.files.quantization import Quantization
from ...runtime.files.write import move_file
from .table import WriteOptions

__all__ = ["check", "write"]


def check(config: ModelConfig, policy: Quantization | None, where: str) -> None:
    """Every model has this form."""


def write(source: Checkpoint, target: Path, options: WriteOptions) -> None:
    """Writes one .mig file, or moves the one that is there."""
    if options.finished is None:
        write_mig(target, source)
    else:
        move_file(options.finished, target)
