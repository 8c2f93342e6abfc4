"""What tells one run's answers from another's: an object in every line, so that lines of two runs never mix.

    {"index": 0, "response": "...", "seconds": 0.4, "run": {"model": "nano", "family": "migician", "mode": "direct",
     "precision": "auto", "max_side": null, "data": "1b2c3d4e", "backend": "auto"}}

The lines of releases up to 0.2 have it as words with spaces between; those are read still, and gone on with.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

__all__ = ["Run", "family_and_mode", "run_of", "same_run", "words"]

Run: TypeAlias = Mapping[str, Any]

_KEYS = ("model", "family", "mode", "precision", "max_side", "data")
_SWEEP_KEYS = ("model", "max_side", "bare", "threads", "min_pixels", "data")
_IMPLIED = (None, "auto", "native", "transformers")  # backends that the older words do not name


def run_of(
    model: str, family: str, *, mode: str, precision: str, max_side: int | None, data: str, backend: str = "auto"
) -> Run:
    """Describes a run of `accuracy`.   model: of a file or folder its name.   data: fingerprint of the questions."""
    name = Path(model).name if os.path.exists(model) else model
    return {**dict(zip(_KEYS, (name, family, mode, precision, max_side, data), strict=True)), "backend": backend}


def words(run: Any) -> str:
    """A run in words: as older releases wrote it into the lines, and as messages name it."""
    if isinstance(run, str):
        return run
    if isinstance(run, dict) and run.keys() >= set(_KEYS):
        model, family, mode, precision, side, data = (run[key] for key in _KEYS)
        own = "" if run.get("backend") in _IMPLIED else f" backend={run['backend']}"
        return f"{model} {family} {mode} {precision} side={side or 'native'} data={data}{own}"
    if isinstance(run, dict) and run.keys() >= set(_SWEEP_KEYS):
        model, side, bare, threads, pixels, data = (run[key] for key in _SWEEP_KEYS)
        how = f"{' bare' if bare else ''} threads={threads} min_pixels={pixels or 'own'}"
        return f"{model} side={side or 'native'}{how} data={data}"
    return json.dumps(run, ensure_ascii=False)


def same_run(one: Any, other: Any) -> bool:
    """Whether two lines are of one run; lines of an older release are told by their words."""
    if isinstance(one, str) or isinstance(other, str):
        return words(one) == words(other)
    return bool(one == other)


def family_and_mode(run: Any) -> tuple[str, str] | None:
    """What a line says of how its question was put; None where it does not."""
    if isinstance(run, dict):
        found = run.get("family"), run.get("mode")
    else:
        parts = str(run).rsplit(" ", 5)
        found = (parts[1], parts[2]) if len(parts) == 6 else (None, None)
    family, mode = found
    return (family, mode) if isinstance(family, str) and isinstance(mode, str) else None
