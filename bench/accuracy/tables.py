"""Results as the commands print them: plain tables, one line for each flip, and the JSON object of the last line."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from .compare import Comparison
from .protocol import PAPER, TASKS, paper_ave
from .scoring import Result

__all__ = ["comparison_table", "flip_lines", "result_table", "summary"]

Results = Mapping[str, Result]  # by y-scaling: "published" and "none"
_RIVALS = ("Migician-7B", "Migician-7B, rerun", "Qwen2-VL-7B")


# ---- the JSON line
def summary(results: Results) -> dict[str, Any]:
    """The object of the last line on stdout: accuracies in percent, mean IoU 0..1.

    "ave", "tasks" (y-scaled as published), "tasks_none" and "clean" keep their shape from version to version; what
    follows them is more about the same answers.
    """
    published = results["published"]
    tidy = {rule: result.clean() for rule, result in results.items()}
    clean = _core(tidy) if tidy["published"].records else None  # nothing is left when every truth is broken
    return {
        **_core(results),
        "clean": {**(clean or {"ave": None, "tasks": {}, "tasks_none": {}}), "excluded": published.excluded},
        "n": len(published.records),
        "missing": len(published.missing),
        "ci": {rule: _intervals(result) for rule, result in results.items()},
        "pictures": {t: {"named": f.named, "right": f.named_right} for t, f in published.tasks.items() if f.named},
    }


def _core(results: Results) -> dict[str, Any]:
    return {
        "ave": {rule: round(results[rule].ave(), 4) for rule in ("published", "none")},
        "tasks": {task: figures.json() for task, figures in results["published"].tasks.items()},
        "tasks_none": {task: figures.json() for task, figures in results["none"].tasks.items()},
    }


def _intervals(result: Result) -> dict[str, list[float]]:
    return {name: [round(low, 4), round(high, 4)] for name, (low, high) in result.intervals().items()}


# ---- tables
def _lines(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    text = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        text.append("  ".join([row[0].ljust(widths[0]), *cells[1:]]).rstrip())
    return text


def result_table(results: Results, y_scale: str, *, published_data: bool) -> list[str]:
    """Accuracies by task, beside them those by the other y-scaling and, for the paper's own questions, its figures."""
    main, other = results[y_scale], results["none" if y_scale == "published" else "published"]
    name = "as answered" if y_scale == "published" else "y-scaled"
    rivals = _RIVALS if published_data else ()
    intervals = main.intervals()
    rows = [["task", "n", "acc@0.7", "acc@0.5", "95 %", "acc@0.3", "IoU", "no box", name, "named right", *rivals]]
    for task, f in main.tasks.items():
        row = [task, str(f.n), f"{f.accuracy[0.7]:.2f}", f"{f.accuracy[0.5]:.2f}", _span(intervals[task])]
        row += [f"{f.accuracy[0.3]:.2f}", f"{f.mean_iou:.3f}", str(f.unparsed)]
        row += [f"{other.tasks[task].accuracy[0.5]:.2f}", f"{f.named_right}/{f.named}" if f.named else "-"]
        rows.append([*row, *(_published(rival, task) for rival in rivals)])
    every = list(main.tasks.values())
    last = ["AVE", str(len(main.records)), f"{main.ave(0.7):.2f}", f"{main.ave():.2f}", _span(intervals["AVE"])]
    last += [f"{main.ave(0.3):.2f}", f"{fmean(f.mean_iou for f in every):.3f}", str(sum(f.unparsed for f in every))]
    named = sum(f.named for f in every)
    last += [f"{other.ave():.2f}", f"{sum(f.named_right for f in every)}/{named}" if named else "-"]
    rows.append([*last, *(f"{paper_ave(rival):.2f}" for rival in rivals)])
    if main.excluded:
        clean = main.clean()
        value = f"{clean.ave():.2f}" if clean.tasks else "-"
        left = f"without {len(main.excluded)} questions whose true box is inverted"
        return [*_lines(rows), f"clean AVE {value}, {left}"]
    return _lines(rows)


def _span(bounds: tuple[float, float]) -> str:
    return f"{bounds[0]:.1f} to {bounds[1]:.1f}"


def _published(row: str, task: str) -> str:
    return f"{PAPER[row][list(TASKS).index(task)]:.2f}" if task in TASKS else "-"


def comparison_table(comparison: Comparison) -> list[str]:
    """Both accuracies, the change and its interval, flips, by task and over all."""
    rows = [["task", "n", "A", "B", "change", "95 %", "lost", "won"]]
    for name, d in comparison.rows.items():
        row = [name, str(d.n), f"{d.a:.2f}", f"{d.b:.2f}", f"{d.change:+.2f}", f"{d.low:+.2f} to {d.high:+.2f}"]
        rows.append([*row, str(d.lost), str(d.won)])
    return _lines(rows)


def flip_lines(comparison: Comparison, *, below: Path | None = None) -> Iterable[str]:
    """One line for each question that one run answers right and the other does not, with its pictures.

    [2] is the picture, from 1, that the true box lies in.   below: name pictures from this folder on.
    """
    for flip in comparison.flips:
        q = flip.question
        which = "" if q.target is None else f" [{q.target + 1}]"
        pictures = " ".join(str(path.relative_to(below) if below else path) for path in q.images)
        kind = "lost" if flip.lost else "won"
        yield f"{kind:4} {q.index} {q.task}  IoU {flip.a.iou:.3f} -> {flip.b.iou:.3f} {which} {pictures}"
