"""Answers to figures: per question, per task, AVE; confidence intervals by resampling picture groups."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean

import numpy as np

from ...runtime.boxes import parse_boxes
from .data import Question, picture_order
from .protocol import TASKS, THRESHOLDS, Box, Reading, first_box, iou, read_boxes, strip_tags

__all__ = ["RESAMPLES", "Figures", "Interval", "Record", "Result", "interval", "resample", "score"]

RESAMPLES = 2000
Interval = tuple[float, float]  # 95 %, in percent points
_NAMES_NOTHING = {"diff"}  # either picture is right: both have the same layout


@dataclass(frozen=True)
class Record:
    """One question and what its answer is worth.

    response: None where no answer was given.   box: what is scored, 0..1, None without one.   boxes: how many the
    answer has.   form: the expression that read them, 1 to 6, 0 for none.   iou: with the true box, 0 without a box.
    named: the picture that the answer itself says its box lies in, from 0; None where it says nothing.
    target: the picture it should lie in, None where that is not known.   truth: as published.
    group: the same number for questions about the same pictures.
    """

    index: int
    task: str
    response: str | None
    box: Box | None
    boxes: int
    form: int
    iou: float
    named: int | None
    target: int | None
    truth: Box
    group: int

    @property
    def missing(self) -> bool:
        return self.response is None

    @property
    def unparsed(self) -> bool:
        """Whether there is an answer without a readable box."""
        return self.response is not None and self.box is None

    @property
    def correct(self) -> bool:
        return self.iou >= 0.5

    @property
    def inverted(self) -> bool:
        """Whether the true box has corners out of order, so that nothing can score."""
        return self.truth[0] > self.truth[2] or self.truth[1] > self.truth[3]


@dataclass(frozen=True)
class Figures:
    """A task's figures.

    n: its questions.   accuracy: {threshold: percent}.   mean_iou: 0..1.   unparsed: answers without a readable box.
    missing: questions without an answer.   named: answers that say which picture, of those whose picture is known;
    named_right: those that say the right one.
    """

    n: int
    accuracy: Mapping[float, float]
    mean_iou: float
    unparsed: int
    missing: int
    named: int
    named_right: int

    def json(self) -> dict[str, float]:
        accuracy = {f"acc@{t}": round(value, 4) for t, value in self.accuracy.items()}
        return {"n": self.n, **accuracy, "mean_iou": round(self.mean_iou, 6), "unparsed": self.unparsed}


@dataclass(frozen=True)
class Result:
    """Scored answers. records: in the order of the questions.   tasks: TASKS' order, then others by name."""

    y_scale: str
    records: tuple[Record, ...]
    tasks: Mapping[str, Figures] = field(init=False)

    def __post_init__(self) -> None:
        by_task: dict[str, list[Record]] = {}
        for record in self.records:
            by_task.setdefault(record.task, []).append(record)
        order = [*TASKS, *sorted(by_task.keys() - TASKS.keys())]
        object.__setattr__(self, "tasks", {t: _figures(by_task[t]) for t in order if t in by_task})

    def ave(self, threshold: float = 0.5) -> float:
        """The headline: the mean of the tasks' accuracies, in percent, each task counting alike; nan without one."""
        return fmean(f.accuracy[threshold] for f in self.tasks.values()) if self.tasks else math.nan

    @property
    def pooled(self) -> float:
        """Accuracy at 0.5 over all questions, in percent."""
        return 100 * fmean(r.correct for r in self.records) if self.records else math.nan

    @property
    def missing(self) -> list[int]:
        return [r.index for r in self.records if r.missing]

    @property
    def excluded(self) -> list[int]:
        """Questions that the clean score leaves out: their true boxes are inverted."""
        return [r.index for r in self.records if r.inverted]

    def clean(self) -> "Result":
        """The same without the questions that no answer can score."""
        return replace(self, records=tuple(r for r in self.records if not r.inverted))

    def intervals(self) -> dict[str, Interval]:
        """95 % intervals of accuracy at 0.5: of each task, of "AVE" and of "pooled"."""
        draws = resample(self.records, lambda r: 100.0 * r.correct)
        return {name: interval(values) for name, values in draws.items()}


def _figures(records: Sequence[Record]) -> Figures:
    ious = [r.iou for r in records]
    named = [r for r in records if r.named is not None]
    return Figures(
        n=len(records),
        accuracy={t: 100 * sum(value >= t for value in ious) / len(ious) for t in THRESHOLDS},
        mean_iou=fmean(ious),
        unparsed=sum(r.unparsed for r in records),
        missing=sum(r.missing for r in records),
        named=len(named),
        named_right=sum(r.named == r.target for r in named),
    )


def score(questions: Sequence[Question], answers: Mapping[int, str], *, y_scale: str) -> Result:
    """Scores answers as the benchmark does.

    answers: {index: response}; a question without one counts as wrong.   y_scale: "published" or "none".
    Raises ValueError for another y_scale.
    """
    if y_scale not in ("published", "none"):
        raise ValueError(f"y_scale is {y_scale!r}; take published or none")
    groups = {q.index: i for i, group in enumerate(picture_order(questions)) for q in group}
    return Result(y_scale, tuple(_record(q, answers.get(q.index), groups[q.index], y_scale) for q in questions))


def _record(q: Question, response: str | None, group: int, y_scale: str) -> Record:
    reading = read_boxes(response or "")
    box = first_box(reading, y_scale)
    overlap = iou(q.answer, box) if box else 0.0
    named = None
    if response is not None and reading.boxes and q.target is not None and q.task not in _NAMES_NOTHING:
        named = _named(response, reading, len(q.images))
    boxes = len(reading.boxes)
    return Record(q.index, q.task, response, box, boxes, reading.form, overlap, named, q.target, q.answer, group)


def _named(response: str, reading: Reading, pictures: int) -> int | None:
    """The picture that an answer's own words give its first box.

    The runtime's reader falls back on the question where the answer says nothing: so it is asked twice, with questions
    that point to different pictures, and what does not depend on them is the answer's.
    """
    if pictures < 2:
        return None
    words, at = [], 0
    text = strip_tags(response)
    for start, end in reading.spans:  # boxes of every form, in the one form that it knows
        words += [text[at:start], "(0,0),(1,1)"]
        at = end
    plain = "".join([*words, text[at:]])
    found = set()
    for question in ("the first image", "the last image"):
        boxes, _ = parse_boxes(plain, prompt=question, sizes=[(1000, 1000)] * pictures)
        found.add(boxes[0].image)
    return found.pop() if len(found) == 1 else None


# ---- resampling
def resample(records: Sequence[Record], value: Callable[[Record], float], *, seed: int = 0) -> dict[str, np.ndarray]:
    """Draws the means of a value anew: {task, "AVE", "pooled": f64[RESAMPLES]}.

    Picture groups are drawn within their task, with replacement: questions about the same pictures are not independent.
    """
    rng = np.random.default_rng(seed)
    sums: dict[str, dict[int, list[float]]] = {}
    for r in records:
        cell = sums.setdefault(r.task, {}).setdefault(r.group, [0.0, 0.0])
        cell[0] += value(r)
        cell[1] += 1
    draws, shares = {}, []
    for task, groups in sums.items():
        table = np.array(list(groups.values()))  # f64[groups, 2]: sum and number
        weights = rng.multinomial(len(table), np.full(len(table), 1 / len(table)), RESAMPLES)
        totals = weights @ table
        draws[task] = totals[:, 0] / totals[:, 1]
        shares.append(table[:, 1].sum() / len(records))
    if draws:
        means = np.stack(list(draws.values()))
        draws["AVE"], draws["pooled"] = means.mean(axis=0), np.array(shares) @ means
    return draws


def interval(draws: np.ndarray) -> Interval:
    """The middle 95 %."""
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)
