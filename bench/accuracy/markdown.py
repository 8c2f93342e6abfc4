"""An accuracy report as Markdown: the tables of the page, for a repository, an issue or a terminal."""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ...runtime.report.page import signed, write_page
from .protocol import paper_ave
from .report import EXPLAINED, OTHER_DATA, REFERENCES, RULES, Report, reference, task_order

__all__ = ["markdown_table", "render_markdown", "write_markdown"]

_NONE = "–"
_MOST_LINES = 20


def write_markdown(path: str | os.PathLike[str], report: Report) -> None:
    """Writes the report; it appears under its name complete or not at all.

    Raises MigicianError when the place cannot be written.
    """
    write_page(path, render_markdown(report))


def render_markdown(report: Report) -> str:
    """Returns the report as Markdown."""
    names = ", ".join(run["name"] for run in report["runs"])
    facts = "\n".join(f"- {label}: {value}" for label, value in report["facts"].items())
    parts = [
        f"# {_words(report['title'])}: {_words(names)}",
        facts,
        f"{report['questions']:,} questions. {EXPLAINED}" + ("" if report["published_data"] else f" {OTHER_DATA}"),
        _runs(report),
        *(_tasks(report, run) for run in report["runs"]),
        _published(report),
        _comparison(report.get("comparison")),
        _left(report),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], *, text: int = 1) -> str:
    """A table whose first `text` columns are words and whose others are numbers; bars in cells are escaped."""

    def line(cells: Iterable[str]) -> str:
        return f"| {' | '.join(_words(cell) for cell in cells)} |"

    rule = ["---" if i < text else "---:" for i in range(len(head))]
    return "\n".join([line(head), f"| {' | '.join(rule)} |", *map(line, rows)])


def _words(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _interval(interval: tuple[float, float] | None) -> str:
    return _NONE if interval is None else f"{interval[0]:.1f} to {interval[1]:.1f}"


def _sum(scores: Mapping[str, Any], key: str) -> int:
    return sum(task[key] for task in scores["tasks"].values())


def _runs(report: Report) -> str:
    rows = []
    for run in report["runs"]:
        scores = run["scores"][run["rule"]]
        clean = f"{run['clean'][run['rule']]:.1f} ({run['faulty']} left out)" if run["rule"] in run["clean"] else _NONE
        aves = [f"{run['scores'][rule]['ave']:.1f}" for rule in ("none", "published")]
        tail = [clean, f"{scores['iou']:.3f}", f"{_sum(scores, 'unparsed'):,}", f"{_sum(scores, 'missing'):,}"]
        rows.append([run["name"], RULES[run["rule"]], *aves, _interval(scores["interval"]), *tail])
    head = ("run", "its rule", "AVE, as answered", "AVE, y-scaled", "95 %", "clean", "mean IoU", "no box", "unanswered")
    return markdown_table(head, rows, text=2)


def _tasks(report: Report, run: Mapping[str, Any]) -> str:
    scores = run["scores"][run["rule"]]
    rows = []
    for task in (t for t in task_order(report) if t in scores["tasks"]):
        t = scores["tasks"][task]
        accuracies = [f"{t['acc70']:.1f}", f"{t['acc50']:.1f}", _interval(t["interval"]), f"{t['acc30']:.1f}"]
        named = f"{t['named_right']:,} of {t['named']:,}" if t["named"] else _NONE
        rows.append([task, *accuracies, f"{t['iou']:.3f}", f"{t['unparsed']:,}", named, f"{t['n']:,}"])
    every = list(scores["tasks"].values())
    acc70, acc30 = (sum(t[key] for t in every) / len(every) for key in ("acc70", "acc30"))
    means = [f"{acc70:.1f}", f"**{scores['ave']:.1f}**", _interval(scores["interval"]), f"{acc30:.1f}"]
    tail = [f"{scores['iou']:.3f}", f"{_sum(scores, 'unparsed'):,}"]
    named = f"{_sum(scores, 'named_right'):,} of {_sum(scores, 'named'):,}" if _sum(scores, "named") else _NONE
    rows.append(["**mean**", *means, *tail, named, f"{_sum(scores, 'n'):,}"])
    head = ("task", "IoU ≥ 0.7", "≥ 0.5", "95 %", "≥ 0.3", "mean IoU", "no box", "right picture named", "questions")
    return f"## {_words(run['name'])}, {RULES[run['rule']]}\n\n{markdown_table(head, rows)}"


def _published(report: Report) -> str:
    if not report["published_data"]:
        return ""
    runs = [(run["name"], run["scores"][run["rule"]]) for run in report["runs"]]
    rows = []
    for task in task_order(report):
        ours = [f"{s['tasks'][task]['acc50']:.1f}" if task in s["tasks"] else _NONE for _, s in runs]
        theirs = [_NONE if (v := reference(row, task)) is None else f"{v:.1f}" for row in REFERENCES]
        rows.append([task, *ours, *theirs])
    rows.append(["**AVE**", *(f"{s['ave']:.1f}" for _, s in runs), *(f"{paper_ave(row):.1f}" for row in REFERENCES)])
    head = ("task", *(name for name, _ in runs), *(f"{row}, published" for row in REFERENCES))
    intro = "IoU ≥ 0.5 in percent; published figures from arXiv:2501.05767v3, Table 1."
    return f"## Beside the published figures\n\n{intro}\n\n{markdown_table(head, rows)}"


def _comparison(comparison: Mapping[str, Any] | None) -> str:
    if comparison is None:
        return ""
    tasks = comparison["tasks"]
    rows = [
        [task, f"{t['first']:.1f}", f"{t['second']:.1f}", signed(t["change"], 1), f"{t['won']}", f"{t['lost']}"]
        for task, t in tasks.items()
    ]
    won, lost = (sum(t[key] for t in tasks.values()) for key in ("won", "lost"))
    aves = [f"{ave:.1f}" for ave in comparison["ave"]]
    rows.append(["**mean**", *aves, signed(comparison["change"], 1), f"{won}", f"{lost}"])
    low, high = comparison["interval"]
    first, second = comparison["first"], comparison["second"]
    intro = (
        f"Question by question: {signed(comparison['change'], 1)} points of AVE, 95 % interval {signed(low, 1)} to "
        f"{signed(high, 1)}."
    )
    table = markdown_table(("task", first, second, "change", "won", "lost"), rows)
    return f"## {_words(second)} against {_words(first)}\n\n{intro}\n\n{table}"


def _left(report: Report) -> str:
    missing = [str(path) for path in report["missing"]]
    if not missing:
        return ""
    listed = "\n".join(f"- `{path}`" for path in missing[:_MOST_LINES])
    more = f"\n- and {len(missing) - _MOST_LINES:,} more" if len(missing) > _MOST_LINES else ""
    return f"## Missing pictures\n\n{len(missing):,}; their questions score 0.\n\n{listed}{more}"
