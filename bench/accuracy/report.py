"""What an accuracy run's page and table show, as one plain dictionary made of answers.

    title, questions      what was asked, and how many questions
    published_data        whether they are the paper's own: only then do its figures stand beside ours
    facts                 {label: words}: machine, command, date, ...; may be empty
    runs                  [{name, rule, scores {rule: S}, clean {rule: AVE}, faulty}]; the rules of y-scaling are "none"
                          and "published", `rule` is what the model's family is published with; faulty questions, which
                          no answer can score, are left out of `clean`
                          S: {ave, interval, iou, tasks {task: T}}; T: {n, acc70, acc50, acc30, interval, iou, unparsed,
                          missing, named, named_right}
    misses, failures      [Item] of the first run: the worst answers with a box; those without one
    missing               pictures that are not there
    comparison            None, or the first run against another one, question by question: {first, second, change,
                          interval, tasks {task: {first, second, change, lost, won}}, lost [Item], won [Item]}

Accuracies, AVE and intervals (low, high), which hold 95 %, are in percent, IoU in 0..1.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar

from .compare import Comparison, Flip, compare
from .data import Question, missing_pictures
from .protocol import PAPER, TASKS, Box
from .scoring import Record, Result, score

__all__ = [
    "EXPLAINED",
    "OTHER_DATA",
    "REFERENCES",
    "RULES",
    "Item",
    "Report",
    "Run",
    "is_published",
    "make_report",
    "reference",
    "task_order",
]

Report = Mapping[str, Any]
_T = TypeVar("_T")
_NOTHING: Any = object()

REFERENCES = ("Migician-7B", "Qwen2-VL-7B", "Human")  # rows of the paper that stand beside ours
RULES = {"none": "boxes as answered", "published": "y-scaled"}
EXPLAINED = (
    "AVE is the mean over the tasks of the percentage of questions whose answer's first box overlaps the truth with "
    "IoU ≥ 0.5. Migician's published evaluation stretches boxes downwards before it scores them (y-scaled); a user of "
    "the model gets boxes as answered. Intervals are bootstrapped over groups of questions about the same pictures."
)
OTHER_DATA = "These are not the questions of the paper, so its figures say nothing about them and are not shown."
_PUBLISHED = {  # questions in MIG-Bench's data file
    "common_object": 816,
    "correspondence": 117,
    "diff": 528,
    "group_grounding": 499,
    "multi_view": 288,
    "region": 1203,
    "view_diff": 94,
    "refer_grounding": 99,
    "object_tracking": 550,
    "reasoning": 101,
}


@dataclass(frozen=True)
class Item:
    """One answered question.

    index: its place in the data file.   target: the picture the truth lies in, from 0, None where that is not known.
    answers: [(class of its frame, whose it is, box or None, IoU)], one for each run that is shown.
    response: what the model said, "" where more than one did.
    """

    task: str
    index: int
    question: str
    pictures: Sequence[Path]
    target: int | None
    truth: Box
    answers: Sequence[tuple[str, str, Box | None, float]]
    response: str = ""


@dataclass(frozen=True)
class Run:
    """A model's answers.   answers: {index: response}.   y_scale: the rule its family is published with."""

    name: str
    answers: Mapping[int, str]
    y_scale: str = "none"


def is_published(questions: Sequence[Question]) -> bool:
    """Tells MIG-Bench's own data file, whole, from any other by its numbers of questions."""
    return Counter(q.task for q in questions) == _PUBLISHED


def make_report(
    title: str,
    questions: Sequence[Question],
    runs: Sequence[Run],
    *,
    baseline: Run | None = None,
    published_data: bool = False,
    facts: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Scores runs by both rules of y-scaling and gathers what a page shows of them.

    questions: those that were to be answered.   runs: at least one; misses are those of the first.
    baseline: what the first run is compared with; it is laid beside the runs too.   published_data: see is_published.
    Raises MigicianError when neither the first run nor the baseline answers any question.
    """
    by_index = {q.index: q for q in questions}
    first = score(questions, runs[0].answers, y_scale=runs[0].y_scale)
    bare = [_item(by_index[r.index], [(r, "bad", runs[0].name)], runs[0]) for r in first.records if r.unparsed]
    comparison, shown = None, list(runs)
    if baseline is not None:
        shown += [] if baseline in shown else [baseline]
        other = score(questions, baseline.answers, y_scale=baseline.y_scale)
        comparison = _compared(compare(questions, other, first), baseline.name, runs[0].name)
    return {
        "title": title,
        "questions": len(questions),
        "published_data": published_data,
        "facts": dict(facts or {}),
        "runs": [_scored(questions, run) for run in shown],
        "misses": [_item(by_index[r.index], [(r, "bad", runs[0].name)], runs[0]) for r in _worst(first.records)],
        "failures": bare,
        "missing": sorted(missing_pictures(questions)),
        "comparison": comparison,
    }


def _scored(questions: Sequence[Question], run: Run) -> dict[str, Any]:
    results = {rule: score(questions, run.answers, y_scale=rule) for rule in RULES}
    clean = {rule: result.clean() for rule, result in results.items() if result.excluded}
    return {
        "name": run.name,
        "rule": run.y_scale,
        "scores": {rule: _figures(result) for rule, result in results.items()},
        "clean": {rule: result.ave() for rule, result in clean.items() if result.tasks},
        "faulty": len(results[run.y_scale].excluded),
    }


def _figures(result: Result) -> dict[str, Any]:
    intervals = result.intervals()
    tasks: dict[str, dict[str, Any]] = {
        task: {
            "n": f.n,
            **{f"acc{round(100 * threshold)}": value for threshold, value in f.accuracy.items()},
            "interval": intervals[task],
            "iou": f.mean_iou,
            "unparsed": f.unparsed,
            "missing": f.missing,
            "named": f.named,
            "named_right": f.named_right,
        }
        for task, f in result.tasks.items()
    }
    iou = sum(t["iou"] for t in tasks.values()) / len(tasks) if tasks else 0.0
    return {"ave": result.ave(), "interval": intervals.get("AVE"), "iou": iou, "tasks": tasks}


def _item(question: Question, answers: Sequence[tuple[Record, str, str]], run: Run | None = None) -> Item:
    response = run.answers.get(question.index, "") if run else ""
    frames = [(style, name, record.box, record.iou) for record, style, name in answers]
    return Item(
        question.task,
        question.index,
        question.question,
        question.images,
        question.target,
        question.answer,
        frames,
        response,
    )


def _worst(records: Sequence[Record]) -> list[Record]:
    """Answers with a box and an IoU below 0.5: tasks in turn, in a task the least overlap first, then the farthest."""
    by_task: dict[str, list[Record]] = {}
    for record in records:
        if record.box is not None and not record.correct and not record.inverted:
            by_task.setdefault(record.task, []).append(record)
    for group in by_task.values():
        group.sort(key=lambda r: (r.iou, -_distance(r.truth, r.box), r.index))
    return _in_turn(sorted(by_task.values(), key=len, reverse=True))


def _in_turn(groups: Iterable[Sequence[_T]]) -> list[_T]:
    """The first of each group, then the second of each, and so on."""
    rows = zip_longest(*groups, fillvalue=_NOTHING)
    return [thing for row in rows for thing in row if thing is not _NOTHING]


def _distance(a: Box, b: Box | None) -> float:
    """How far apart two boxes' middles are, along both axes together."""
    return 2.0 if b is None else (abs(a[0] + a[2] - b[0] - b[2]) + abs(a[1] + a[3] - b[1] - b[3])) / 2


def _compared(comparison: Comparison, first: str, second: str) -> dict[str, Any]:
    ave = comparison.rows["AVE"]

    def items(flips: Iterable[Flip]) -> list[Item]:
        by_task: dict[str, list[Item]] = {}
        for f in flips:
            item = _item(f.question, [(f.a, "was", first), (f.b, "bad", second)])
            by_task.setdefault(item.task, []).append(item)
        return _in_turn(by_task.values())

    return {
        "first": first,
        "second": second,
        "ave": (ave.a, ave.b),
        "change": ave.change,
        "interval": (ave.low, ave.high),
        "tasks": {
            name: {"first": row.a, "second": row.b, "change": row.change, "lost": row.lost, "won": row.won}
            for name, row in comparison.rows.items()
            if name not in ("AVE", "pooled")
        },
        "lost": items(f for f in comparison.flips if f.lost),
        "won": items(f for f in comparison.flips if not f.lost),
    }


# ---- reading a report
def task_order(report: Report) -> list[str]:
    """The tasks of a report, the published ones in the paper's order."""
    present = {task for run in report["runs"] for task in run["scores"][run["rule"]]["tasks"]}
    return [task for task in TASKS if task in present] + sorted(present - set(TASKS))


def reference(row: str, task: str) -> float | None:
    """A figure of the paper in percent; None for a task that it does not have."""
    order = list(TASKS)
    return PAPER[row][order.index(task)] if task in order else None
