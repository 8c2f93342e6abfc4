"""Checks of what callers pass: each returns the value as the runtime uses it, or raises MigicianError naming it.

Strings are not taken for numbers, nor True for 1: what a caller meant by them is a guess. numpy's numbers are numbers.
"""

import math
import operator
from typing import Any

from .errors import MigicianError

__all__ = ["check_count", "check_factor", "check_question", "check_text"]


def check_question(prompt: Any, max_new_tokens: Any = 1, repetition_penalty: Any = None, system: Any = None) -> None:
    """Checks all that comes with a question; a repetition penalty or a system turn may be None."""
    check_text("prompt", prompt, what="the question")
    check_count("max_new_tokens", max_new_tokens)
    if repetition_penalty is not None:
        check_factor("repetition_penalty", repetition_penalty)
    if system is not None:
        check_text("system", system, what="the system turn")


def check_text(name: str, value: Any, *, what: str) -> str:
    """A string. what: what to give instead, for the message."""
    if isinstance(value, str):
        return str(value)
    raise MigicianError(f"{name} is {_shown(value)}; give {what} as a string")


def check_count(name: str, value: Any, *, least: int = 1, most: int = (1 << 31) - 1) -> int:
    """A whole number from `least` to `most`."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or not least <= number <= most:
        bound = f"at most {most}" if number is not None and number > most else f"at least {least}"
        raise MigicianError(f"{name} is {_shown(value)}; give a whole number, {bound}")
    return number


def check_factor(name: str, value: Any) -> float:
    """A finite number above 0."""
    try:
        number = math.nan if isinstance(value, (bool, str, bytes)) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not (math.isfinite(number) and number > 0):
        raise MigicianError(f"{name} is {_shown(value)}; give a finite number above 0")
    return number


def _shown(value: Any) -> str:
    """A value in a message: short, on one line, a string recognisable as one."""
    kind = type(value).__name__
    try:
        text = " ".join(repr(value).split())
    except Exception:  # of somebody else's class
        return f"of class {kind}"
    return text if len(text) <= 40 else f"{text[:37]}... ({kind})"
