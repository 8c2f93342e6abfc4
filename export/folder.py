"""The working folder of an export: what is finished stays, so that a killed run goes on where it was.

    OUT.partial/plan.json             what is being made of what; another plan may not go on here
    OUT.partial/unit-0007.safetensors the stored tensors of a finished unit; `__metadata__["report"]` its entries
    OUT.partial/rows-0007.safetensors the activations behind it; only the last is kept

Every file appears under its name complete or not at all. A unit counts as finished once its own file is there, which
is written after its activations.
"""

import contextlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from torch import Tensor

from ..runtime.errors import MigicianError, ModelFileError
from ..runtime.files.write import remove_leftovers, whole_file

__all__ = ["WorkFolder", "write_file"]


def write_file(path: Path, content: bytes) -> None:
    """Writes a file, whole or not at all. Raises ModelFileError where that fails."""
    with whole_file(path, advice="free some space and go on with --resume") as file:
        file.write(content)


class WorkFolder:
    """Opens or makes the working folder of one plan.

    Raises MigicianError where another export stands there, or an unfinished one without `resume`.
    """

    def __init__(self, path: Path, plan: Mapping[str, Any], *, resume: bool) -> None:
        self.path = path
        text = json.dumps(plan, indent=1, sort_keys=True)
        known = path / "plan.json"
        if known.exists():
            if not resume:
                raise MigicianError(f"{path}: an unfinished export is there; go on with --resume or delete the folder")
            if known.read_text("utf-8") != text:
                raise MigicianError(
                    f"{path}: belongs to an export of another model or other options; delete it or choose another -o"
                )
            remove_leftovers(path)
            return
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ModelFileError(f"{path}: cannot be made ({error.strerror}); choose another -o") from None
        remove_leftovers(path)
        write_file(known, text.encode())

    def finished(self) -> int:
        """Counts the units that are done."""
        count = 0
        while self._unit(count).exists():
            count += 1
        return count

    def keep(
        self, number: int, tensors: Mapping[str, Tensor], report: Sequence[Mapping[str, Any]], rows: Tensor | None
    ) -> None:
        """Keeps a unit's tensors, its report, and the activations behind it."""
        if rows is not None:
            write_file(self._rows(number), save({"x": rows}))
        write_file(self._unit(number), save(dict(tensors), {"report": json.dumps(report)}))
        with contextlib.suppress(OSError):
            self._rows(number - 1).unlink()

    def rows(self, number: int) -> Tensor | None:
        """The activations behind a finished unit."""
        path = self._rows(number)
        return load_file(path)["x"] if path.exists() else None

    def units(self, count: int) -> list[Path]:
        """The files of the first units."""
        return [self._unit(number) for number in range(count)]

    def remove(self) -> None:
        """Deletes the folder; the export is complete."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _unit(self, number: int) -> Path:
        return self.path / f"unit-{number:04}.safetensors"

    def _rows(self, number: int) -> Path:
        return self.path / f"rows-{number:04}.safetensors"
