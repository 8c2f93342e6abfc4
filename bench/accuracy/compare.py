"""Two runs, question by question: differences with intervals, flips, gates."""

import math
import operator
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...runtime.errors import MigicianError
from .data import Question
from .scoring import Interval, Record, Result, interval, resample

__all__ = ["Comparison", "Difference", "Flip", "Gate", "check_gates", "compare", "failed_gates", "parse_gate"]


@dataclass(frozen=True)
class Difference:
    """Accuracy at 0.5 of both runs in percent; change is b - a in percent points, with its 95 % interval."""

    n: int
    a: float
    b: float
    change: float
    low: float
    high: float
    lost: int
    won: int

    def json(self) -> dict[str, Any]:
        ci = [round(self.low, 4), round(self.high, 4)]
        numbers = {"a": round(self.a, 4), "b": round(self.b, 4), "change": round(self.change, 4), "ci": ci}
        return {"n": self.n, **numbers, "lost": self.lost, "won": self.won}


@dataclass(frozen=True)
class Flip:
    """A question that one run answers right and the other does not. lost: a is the one that is right."""

    question: Question
    a: Record
    b: Record

    @property
    def lost(self) -> bool:
        return self.a.correct


@dataclass(frozen=True)
class Comparison:
    """Runs a (the baseline) and b over the questions that either answers.

    rows: by task, then "AVE" (tasks count alike) and "pooled" (questions count alike).   flips: lost ones first.
    p: how often chance alone would flip as unevenly as this (McNemar's exact test, two-sided).
    unasked: questions that neither answers, left out.   missing_a, missing_b: answered by the other alone, so wrong.
    """

    rows: Mapping[str, Difference]
    flips: Sequence[Flip]
    p: float
    unasked: int
    missing_a: int
    missing_b: int

    def json(self) -> dict[str, Any]:
        rows = {name: row.json() for name, row in self.rows.items()}
        ave, pooled = rows.pop("AVE"), rows.pop("pooled")
        flips = {
            "lost": [f.question.index for f in self.flips if f.lost],
            "won": [f.question.index for f in self.flips if not f.lost],
        }
        pooled["p"] = round(self.p, 6)
        left = {"unasked": self.unasked, "missing_a": self.missing_a, "missing_b": self.missing_b}
        return {"ave": ave, "pooled": pooled, "tasks": rows, "flips": flips, **left}


def compare(questions: Sequence[Question], a: Result, b: Result) -> Comparison:
    """Pairs two results of the same questions.

    A question that only one run answers is wrong in the other; one that neither answers says nothing and is left out.
    Raises MigicianError if that leaves none.
    """
    of_a, of_b = ({r.index: r for r in result.records} for result in (a, b))
    pairs = [Flip(q, of_a[q.index], of_b[q.index]) for q in questions]
    kept = [p for p in pairs if not (p.a.missing and p.b.missing)]
    if not kept:
        raise MigicianError("neither run answers any of these questions; give the data file that was asked")
    side_a = Result(a.y_scale, tuple(p.a for p in kept))
    side_b = Result(b.y_scale, tuple(p.b for p in kept))
    flips = [p for p in kept if p.a.correct != p.b.correct]
    return Comparison(
        rows=_rows(side_a, side_b, flips),
        flips=sorted(flips, key=lambda p: (not p.lost, p.question.index)),
        p=_chance(sum(f.lost for f in flips), len(flips)),
        unasked=len(pairs) - len(kept),
        missing_a=len(side_a.missing),
        missing_b=len(side_b.missing),
    )


def _chance(lost: int, flips: int) -> float:
    """Probability that `flips` tosses of a coin are as uneven as `lost` or more."""
    smaller = min(lost, flips - lost)
    tail = sum(math.comb(flips, k) for k in range(smaller + 1))
    return min(1.0, 2 * tail / 2**flips)


def _rows(a: Result, b: Result, flips: Sequence[Flip]) -> dict[str, Difference]:
    right_b = {r.index: r.correct for r in b.records}
    draws = resample(a.records, lambda r: 100.0 * (right_b[r.index] - r.correct))
    rows = {}
    for name in [*a.tasks, "AVE", "pooled"]:
        before, after = _accuracy(a, name), _accuracy(b, name)
        bounds: Interval = interval(draws[name])
        inside = [f for f in flips if name in (f.question.task, "AVE", "pooled")]
        lost = sum(f.lost for f in inside)
        n = a.tasks[name].n if name in a.tasks else len(a.records)
        rows[name] = Difference(n, before, after, after - before, *bounds, lost, len(inside) - lost)
    return rows


def _accuracy(result: Result, name: str) -> float:
    if name == "AVE":
        return result.ave()
    return result.pooled if name == "pooled" else result.tasks[name].accuracy[0.5]


# ---- gates
_OPERATORS = {"<=": operator.le, "<": operator.lt, ">=": operator.ge, ">": operator.gt}
_GATE = re.compile(r"\s*(?P<name>\w+)(?P<drop>\s+drop)?\s*(?P<sign><=|>=|<|>)\s*(?P<bound>-?\d+(?:\.\d+)?)\s*")


@dataclass(frozen=True)
class Gate:
    """A condition on a run: "AVE drop<=1.0", at most one point below the other run, or "AVE>=60", by itself."""

    text: str
    name: str
    drop: bool
    sign: str
    bound: float

    def holds(self, value: float) -> bool:
        """Whether an accuracy, or a drop in one, passes; a value that is not a number does not."""
        if math.isnan(value):
            return False
        return bool(_OPERATORS[self.sign](round(value, 9), self.bound))  # 61.0 - 60.0 must not miss 1.0 by rounding


def parse_gate(text: str) -> Gate:
    """Reads "NAME [drop] OP NUMBER": NAME is AVE, pooled or a task, OP one of <= < >= >, NUMBER in percent points.

    Raises ValueError, whose text says what to write.
    """
    found = _GATE.fullmatch(text)
    if found is None:
        raise ValueError(f'{text!r} is no gate; write "AVE drop<=1.0" or "AVE>=60" (AVE, pooled or a task)')
    name = {"ave": "AVE", "pooled": "pooled"}.get(found["name"].lower(), found["name"])
    return Gate(" ".join(text.split()), name, found["drop"] is not None, found["sign"], float(found["bound"]))


def check_gates(gates: Sequence[Gate], tasks: Collection[str]) -> None:
    """Raises MigicianError for a gate on a task that has no questions, before they are asked."""
    for gate in gates:
        if gate.name not in ("AVE", "pooled", *tasks):
            known = ", ".join(["AVE", "pooled", *sorted(tasks)])
            raise MigicianError(f"gate {gate.text!r}: no questions of {gate.name}; choose from {known}")


def failed_gates(gates: Sequence[Gate], result: Result, comparison: Comparison | None) -> list[str]:
    """Says which gates fail, one line each; empty where all hold. What has no figure fails.

    comparison: with the run to drop from, as its a.
    """
    failed = []
    for gate in gates:
        value = math.nan
        if not gate.drop and gate.name in ("AVE", "pooled", *result.tasks):
            value = _accuracy(result, gate.name)
        elif gate.drop and comparison is not None and gate.name in comparison.rows:
            value = -comparison.rows[gate.name].change
        if not gate.holds(value):
            what = "unknown" if math.isnan(value) else f"{value:.2f}"
            failed.append(f"gate {gate.text!r} failed: {gate.name}{' drop' if gate.drop else ''} is {what}")
    return failed
