"""Checks where an export shall go before its hours begin."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import click

from ..runtime.errors import ModelFileError
from ..runtime.files.checkpoint import Checkpoint
from .formats.table import Format

__all__ = ["check_places", "check_source"]


def check_places(out: str, rows: Sequence[Format], report: Path | None) -> Path:
    """Returns the place that -o names. Nothing is made there.   rows: the formats that go there.

    Raises click.UsageError for a folder where a file is written, ModelFileError for a place that cannot be written or
    is taken.
    """
    place = Path(out)
    for row in rows:
        target = row.target(place, several=len(rows) > 1)
        if not row.folder and (out.endswith(("/", os.sep)) or target.is_dir() or not target.name):
            example = place / f"model.{row.name}"
            raise click.UsageError(
                f"-o {out} is a folder and a .{row.name} file is written; give its name: -o {example}"
            )
        if not row.folder and os.path.lexists(target) and not target.is_file():
            raise ModelFileError(f"-o {out}: something is there that is no file; choose another name")
        row.check_target(target)
    _check_parent(place, "-o")
    if report is not None:
        _check_parent(report, "--report")
        if report.resolve() == place.resolve():
            raise click.UsageError(f"--report and -o both name {report}; give each its own.")
    return place


def check_source(checkpoint: Checkpoint, out: Path) -> None:
    """Raises ModelFileError where the export would take the place of what it reads."""
    for file in checkpoint.files:
        if out.exists() and out.samefile(file.path):
            raise ModelFileError(f"-o {out}: the source itself; choose another name")


def _check_parent(place: Path, option: str) -> None:
    parent = place.absolute().parent
    if not parent.is_dir():
        raise ModelFileError(f"{option} {place}: there is no folder {parent}; create it")
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise ModelFileError(
            f"{option} {place}: nothing can be written in {parent} ({error.strerror}); choose another place"
        ) from None
