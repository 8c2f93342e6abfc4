"""Reads what `migician-bench latency` wrote, and says in one line what is wrong with a file that it did not write."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ...runtime.errors import MigicianError
from ..engines import PHASES
from .measure import KIND

__all__ = ["read_result"]

_MAX_BYTES = 64 << 20
_TOP: Mapping[str, Any] = {
    "date": str, "command": str, "machine": dict, "load": list, "model": dict, "settings": dict, "engines": dict,
    "missing": list, "cases": list,
}  # fmt: skip
_CEILINGS = ("read_bytes", "read_bytes_1", "f32_ops", "int8_ops", "bf16_ops", "threads")
_CASE = ("pictures", "width", "height", "new_tokens", "patches", "visual_tokens", "prompt_tokens")


def read_result(path: Path) -> dict[str, Any]:
    """Returns the JSON object of a run: the file's last line that is one, or the whole file.

    Raises MigicianError when the file cannot be read or is not such a run.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise MigicianError(f"{path}: over {_MAX_BYTES >> 20} MB, no run of migician-bench latency")
        text = path.read_text("utf-8")
    except OSError as error:
        raise MigicianError(
            f"{path}: cannot be read ({error.strerror}); give a run of migician-bench latency"
        ) from None
    except UnicodeDecodeError:
        raise MigicianError(f"{path}: not text; give a run of migician-bench latency") from None
    result = _last_object(text)
    fault = "holds no JSON object" if result is None else _fault(result)
    if result is None or fault:
        raise MigicianError(f"{path}: {fault}; give what migician-bench latency wrote")
    return result


def _last_object(text: str) -> dict[str, Any] | None:
    for piece in (*reversed(text.strip().splitlines()), text):
        if piece.lstrip().startswith("{"):
            try:
                found = json.loads(piece)
            except (ValueError, RecursionError):
                continue
            if isinstance(found, dict):
                return found
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def _is_maybe_number(value: Any) -> bool:
    return value is None or _is_number(value)


def _are_numbers(table: Any, keys: Iterable[str] | None = None) -> bool:
    """`table` is an object in which these keys, or all, are numbers."""
    return isinstance(table, dict) and all(_is_number(table.get(key)) for key in (table if keys is None else keys))


def _fault(result: dict[str, Any]) -> str | None:
    """Says what of a run cannot be drawn; whatever is only printed may be anything."""
    if result.get("kind") != KIND:
        return "is JSON of another kind"
    if result.get("version") != 1:
        return f"has version {result.get('version')!r}, this release reads 1"
    sound = {key: isinstance(result.get(key), kind) for key, kind in _TOP.items()}
    sound["ceilings"] = result.get("ceilings") is None or _are_numbers(result["ceilings"], _CEILINGS)
    if all(sound.values()):
        sound["load"] = len(result["load"]) == 2 and all(map(_is_maybe_number, result["load"]))
        sound["settings"] = _are_numbers(result["settings"], ("threads",))
        sound["missing"] = all(isinstance(entry, dict) for entry in result["missing"])
        sound["engines"] = all(
            isinstance(engine, dict) and isinstance(engine.get("versions"), dict)
            for engine in result["engines"].values()
        )
        sound["cases"] = bool(result["cases"])
    if wrong := [key for key, good in sound.items() if not good]:
        return f"has no sound {wrong[0]!r}"
    return next((f"has a case {fault}" for fault in map(_case_fault, result["cases"]) if fault), None)


def _case_fault(case: Any) -> str | None:
    if not _are_numbers(case, _CASE):
        return "without its numbers"
    engines, rivals, work = case.get("engines"), case.get("ratios"), case.get("work")
    if not isinstance(engines, dict) or "migician" not in engines:
        return "without our own engine"
    if not isinstance(rivals, dict) or not all(map(_are_numbers, rivals.values())):
        return "without sound 'ratios'"
    if not isinstance(work, dict) or not all(_work_is_sound(work.get(phase)) for phase in PHASES[1:]):
        return "without sound 'work'"
    return next((f"without sound {fault!r}" for fault in map(_entry_fault, engines.values()) if fault), None)


def _work_is_sound(work: Any) -> bool:
    return _are_numbers(work, ("operations", "bytes")) and _is_maybe_number(work.get("floor_ms"))


def _entry_fault(entry: Any) -> str | None:
    """The name of what is wrong in one engine's figures."""
    if not isinstance(entry, dict):
        return "engines"
    for name in (*(f"{phase}_ms" for phase in PHASES), "total_ms", "step_ms"):
        wanted = name == "total_ms"
        if (wanted or entry.get(name) is not None) and not _are_numbers(entry.get(name), ("p50", "p90", "p99")):
            return name
    for name in ("tokens_per_s", "energy_j"):
        if not _is_maybe_number(entry.get(name)):
            return name
    if not _is_number(entry.get("peak_rss_mb")):
        return "peak_rss_mb"
    return None if _are_numbers(entry.get("shares", {})) else "shares"
