"""One HTML page about an accuracy run: scores by task, the paper's beside them, and what the worst answers look like.

The page is self-contained: pictures are small and inline, boxes lie over them, nothing is loaded. What it shows is a
report as report.py makes it.
"""

import base64
import io
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from ...runtime.errors import ImageError
from ...runtime.files.archive import open_file
from ...runtime.report.charts import Ring, bar, radar
from ...runtime.report.page import legend, page, section, signed, table, tiles, write_page
from .protocol import PAPER, TASKS, Box, paper_ave, strip_tags
from .report import (
    EXPLAINED,
    OTHER_DATA,
    REFERENCES,
    RULES,
    Item,
    Report,
    Run,
    is_published,
    make_report,
    reference,
    task_order,
)

__all__ = ["Run", "is_published", "make_report", "render_html", "write_html"]

_MOST_MISSES, _MOST_FLIPS, _MOST_LINES = 24, 8, 40
_LARGE_PX, _SMALL_PX = 320, 208  # longest side of the picture asked about, of the others
_BUDGET = 1_900_000  # bytes of pictures, a third more in the page
_NONE, _HYPHEN = "–", "\u2011"  # the hyphen does not break a line
_ASKED = re.compile(r"\((\d+),\s*(\d+)\),\s*\((\d+),\s*(\d+)\)")


# --------------------------------------------------------------------------------------------------------- the page


def write_html(path: str | os.PathLike[str], report: Report, *, budget: int = _BUDGET) -> None:
    """Writes the page; it appears under its name complete or not at all.

    budget: bytes that its pictures may take; what would go beyond is left out and counted.
    Raises MigicianError when the place cannot be written.
    """
    write_page(path, render_html(report, budget=budget))


def render_html(report: Report, *, budget: int = _BUDGET) -> str:
    """Returns the whole page as HTML."""
    purse = _Purse(budget)
    return page(
        f"Accuracy: {report['title']}",
        [
            _headline(report),
            _overview(report),
            _tasks(report),
            _paper(report),
            _comparison(report.get("comparison"), purse),
            _misses(report, purse),
            _failures(report),
            _missing(report),
        ],
        style=_STYLE,
    )


# ------------------------------------------------------------------------------------------------------------- scores


def _interval(interval: tuple[float, float] | None) -> str:
    return _NONE if interval is None else f"{interval[0]:.1f} to {interval[1]:.1f}"


def _share(interval: tuple[float, float] | None) -> tuple[float, float] | None:
    return None if interval is None else (interval[0] / 100, interval[1] / 100)


def _sum(scores: Mapping[str, Any], key: str) -> int:
    return sum(task[key] for task in scores["tasks"].values())


def _headline(report: Report) -> str:
    run = report["runs"][0]
    scores = run["scores"][run["rule"]]
    other = "none" if run["rule"] == "published" else "published"
    cells = [
        (f"AVE, {RULES[run['rule']]}", f"{scores['ave']:.1f} %", f"95 % interval {_interval(scores['interval'])}"),
        (f"AVE, {RULES[other]}", f"{run['scores'][other]['ave']:.1f} %", "the same answers, the other rule"),
    ]
    if run["rule"] in run["clean"]:
        note = f"without {run['faulty']} questions of faulty truth"
        cells.append(("Clean AVE", f"{run['clean'][run['rule']]:.1f} %", note))
    cells.append(("Mean IoU", f"{scores['iou']:.3f}", "mean of the tasks"))
    unparsed, missing = _sum(scores, "unparsed"), _sum(scores, "missing")
    note = f"of {_sum(scores, 'n') - missing:,} answers" + (f"; {missing:,} unanswered" if missing else "")
    cells.append(("Without a box", f"{unparsed:,}", note))
    facts = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in report["facts"].items())
    listed = f'<section><dl class="facts">{facts}</dl></section>' if facts else ""
    more = len(report["runs"]) - 1
    others = f"<span>and {more} more {'run' if more == 1 else 'runs'}</span>" if more else ""
    return (
        f'<header><p class="over">Accuracy · {escape(report["title"])}</p><h1>{escape(run["name"])}</h1>'
        f'<p class="sub"><span>{report["questions"]:,} questions</span>{others}</p></header>'
        f"{tiles(cells, len(cells))}{listed}"
    )


def _styled(report: Report) -> list[tuple[str, Mapping[str, Any]]]:
    """Each run with its colour's class."""
    return [(f"s{i % 6}", run) for i, run in enumerate(report["runs"])]


def _overview(report: Report) -> str:
    """The radar, and the runs in a table."""
    order, keys, rings = task_order(report), [], []
    for style, run in _styled(report):
        of_task = run["scores"][run["rule"]]["tasks"]
        rings.append(Ring(style, run["name"], [of_task[t]["acc50"] / 100 if t in of_task else None for t in order]))
        keys.append((style, run["name"]))
    for i, row in enumerate(REFERENCES if report["published_data"] else ()):
        values = [None if (v := reference(row, task)) is None else v / 100 for task in order]
        rings.append(Ring(f"t{i}", row, values, thin=True))
        keys.append((f"t{i}", f"{row}, published"))
    figure = ""
    if len(order) >= 3:
        words = [_NONE if v is None else f"{100 * v:.1f}" for v in rings[0].values] if len(report["runs"]) == 1 else []
        figure = f"<figure>{radar('Accuracy by task', order, rings, values=words)}</figure>"
    clean = any(run["clean"] for run in report["runs"])
    rows = [_run_row(style, run, clean=clean) for style, run in _styled(report)]
    head = ("Run", "as answered", f"y{_HYPHEN}scaled", "95 %", *(["clean"] if clean else []), "mean IoU")
    note = "" if report["published_data"] else f"<p>{OTHER_DATA}</p>"
    side = f"<div>{table(head, rows)}<p>{EXPLAINED}</p>{note}</div>"
    return section("Accuracy at IoU ≥ 0.5", f'{legend(keys)}<div class="pair">{figure}{side}</div>')


def _run_row(style: str, run: Mapping[str, Any], *, clean: bool) -> list[str]:
    scores = run["scores"][run["rule"]]
    aves = [f"{run['scores'][rule]['ave']:.1f}" for rule in ("none", "published")]
    own = 0 if run["rule"] == "none" else 1
    aves[own] = f"<b>{aves[own]}</b>"
    cleaned = [f"{run['clean'][run['rule']]:.1f}" if run["rule"] in run["clean"] else _NONE] if clean else []
    name = f'<i class="key {style}"></i>{escape(run["name"])}'
    return [name, *aves, _interval(scores["interval"]), *cleaned, f"{scores['iou']:.3f}"]


def _tasks(report: Report) -> str:
    """A table for each run, the first one open."""
    tables = []
    for i, (style, run) in enumerate(_styled(report)):
        body = _task_table(report, run, style)
        if len(report["runs"]) > 1:
            name = f"{escape(run['name'])}, {RULES[run['rule']]}"
            body = f"<details{' open' if i == 0 else ''}><summary>{name}</summary>{body}</details>"
        tables.append(body)
    intro = "Percent of answers with IoU ≥ 0.7, 0.5 and 0.3; the thin line in a bar is the 95 % interval at 0.5."
    return section("By task", "".join(tables), intro)


def _task_table(report: Report, run: Mapping[str, Any], style: str) -> str:
    scores = run["scores"][run["rule"]]
    rivals = REFERENCES if report["published_data"] else ()
    named = any(t["named"] for t in scores["tasks"].values())
    rows = []
    for task in (t for t in task_order(report) if t in scores["tasks"]):
        t = scores["tasks"][task]
        row = [escape(task), _bars(style, t["acc50"], t["interval"]), f"{t['acc70']:.1f}", f"<b>{t['acc50']:.1f}</b>"]
        row += [_interval(t["interval"]), f"{t['acc30']:.1f}", f"{t['iou']:.3f}", f"{t['unparsed']:,}"]
        row += [f"{t['named_right']:,} of {t['named']:,}" if t["named"] else _NONE] if named else []
        row += [f"{t['n']:,}", *(_NONE if (v := reference(r, task)) is None else f"{v:.1f}" for r in rivals)]
        rows.append(row)
    every = list(scores["tasks"].values())
    acc70, acc30 = (sum(t[key] for t in every) / len(every) for key in ("acc70", "acc30"))
    total = ["mean", _bars(style, scores["ave"], scores["interval"]), f"{acc70:.1f}", f"{scores['ave']:.1f}"]
    total += [_interval(scores["interval"]), f"{acc30:.1f}", f"{scores['iou']:.3f}", f"{_sum(scores, 'unparsed'):,}"]
    total += [f"{_sum(scores, 'named_right'):,} of {_sum(scores, 'named'):,}"] if named else []
    total += [f"{_sum(scores, 'n'):,}", *(f"{paper_ave(rival):.1f}" for rival in rivals)]
    pictures = ["right picture named"] if named else []
    head = ["Task", "", "≥ 0.7", "≥ 0.5", "95 %", "≥ 0.3", "mean IoU", "no box", *pictures, "questions"]
    head = [words.replace("≥ ", "≥\u00a0") for words in head] + [rival.replace("-", _HYPHEN) for rival in rivals]
    return table(head, [*rows, total], text=2, last="total")


def _bars(style: str, percent: float, interval: tuple[float, float] | None) -> str:
    return f'<div class="bars">{bar(style, percent / 100, _share(interval))}</div>'


def _paper(report: Report) -> str:
    """The published table, ours on top."""
    if not report["published_data"]:
        return ""
    rows = []
    for style, run in _styled(report):
        scores = run["scores"][run["rule"]]
        cells = [f"<b>{scores['tasks'][t]['acc50']:.1f}</b>" if t in scores["tasks"] else _NONE for t in TASKS]
        name = f'<i class="key {style}"></i><b>{escape(run["name"])}</b>'
        rows.append([name, f"<b>{scores['ave']:.1f}</b>", *cells])
    for name, values in sorted(PAPER.items(), key=lambda row: -paper_ave(row[0])):
        rows.append([escape(name), f"{paper_ave(name):.1f}", *(f"{v:.1f}" for v in values)])
    intro = (
        "Published figures at IoU ≥ 0.5 in percent, best AVE first (arXiv:2501.05767v3, Table 1); the rerun of "
        "Migician's released weights is a third party's."
    )
    return section("Beside the published table", table(("Model", "AVE", *map(escape, TASKS.values())), rows), intro)


# ----------------------------------------------------------------------------------------------------------- pictures


class _Purse:
    """Bytes that pictures may still take; the same picture at the same size is coded once."""

    def __init__(self, budget: int) -> None:
        self.left = budget
        self._coded: dict[tuple[Path, int], tuple[str, int, int] | None] = {}

    def picture(self, path: Path, side: int) -> tuple[str, int, int] | None:
        """(data URL, width, height) at most `side` px long; None for a picture that cannot be read."""
        key = (path, side)
        if key not in self._coded:
            self._coded[key] = _small(path, side)
        return self._coded[key]

    def afford(self, cost: int) -> bool:
        """Takes the cost if there is as much."""
        if cost > self.left:
            return False
        self.left -= cost
        return True


def _small(path: Path, side: int) -> tuple[str, int, int] | None:
    """The picture as a data URL: JPEG, or PNG where that is smaller, as it is for flat drawings."""
    try:
        with open_file(path) as file, Image.open(file) as opened:
            picture = ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, ValueError, SyntaxError, ImageError, Image.DecompressionBombError):
        return None
    if max(picture.size) > side:
        picture.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=3.0)
    codings = []
    for kind, options in (("jpeg", {"quality": 78, "optimize": True}), ("png", {"optimize": True})):
        buffer = io.BytesIO()
        picture.save(buffer, kind, **options)
        codings.append((len(buffer.getvalue()), kind, buffer.getvalue()))
    _, kind, data = min(codings)
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}", picture.width, picture.height


def _frame(style: str, box: Box, hint: str) -> str:
    """A box over a picture; corners out of order are put in order, and what is outside is cut off."""
    x1, x2 = (min(max(v, 0.0), 1.0) for v in sorted((box[0], box[2])))
    y1, y2 = (min(max(v, 0.0), 1.0) for v in sorted((box[1], box[3])))
    place = f"left:{100 * x1:.2f}%;top:{100 * y1:.2f}%;width:{100 * (x2 - x1):.2f}%;height:{100 * (y2 - y1):.2f}%"
    return f'<i class="frame {style}" style="{place}" title="{escape(hint)}"></i>'


def _asked_box(question: str) -> Box | None:
    """The box that a question about a marked object gives of the first picture."""
    found = _ASKED.search(question)
    if not found:
        return None
    x1, y1, x2, y2 = (int(v) / 1000 for v in found.groups())
    return x1, y1, x2, y2


def _card(item: Item, purse: _Purse) -> str | None:
    """One question with its pictures; None when the purse has too little left.

    The answer is drawn where the truth lies: the published evaluation does not ask which picture was meant either.
    """
    asked, shots, cost = _asked_box(item.question), [], 0
    for i, path in enumerate(item.pictures):
        main = i == item.target or len(item.pictures) == 1
        frames = _frame("asked", asked, "marked in the question") if asked and i == 0 else ""
        if main:
            frames += _frame("good", item.truth, "truth")
            found = [(style, f"{name}: IoU {iou:.2f}", box) for style, name, box, iou in item.answers if box]
            frames += "".join(_frame(style, box, hint) for style, hint, box in found)
        coded = purse.picture(path, _LARGE_PX if main else _SMALL_PX)
        cost += len(coded[0]) if coded else 0
        shots.append(_shot(i + 1, coded, frames, main=main))
    if not purse.afford(cost):
        return None
    said = f"<p>Answer <code>{escape(item.response)}</code></p>" if item.response else ""
    scored = " · ".join(
        f'<span class="{style}">{escape(name)}</span> {"no box" if box is None else f"IoU {iou:.2f}"}'
        for style, name, box, iou in item.answers
    )
    known = item.target is not None or len(item.pictures) == 1
    unknown = "" if known else "<p>Which picture the truth lies in is not known.</p>"
    question = escape(" ".join(strip_tags(item.question).split()))
    return (
        f"<article><h3><b>{escape(item.task)}</b> <span>question {item.index:,} · {scored}</span></h3>"
        f'<div class="shots">{"".join(shots)}</div><p class="asking">{question}</p>{said}{unknown}</article>'
    )


def _shot(number: int, coded: tuple[str, int, int] | None, frames: str, *, main: bool) -> str:
    """One picture with what lies over it."""
    caption = f"<figcaption>{number}</figcaption>"
    if coded is None:
        return f'<figure class="shot"><div class="gone">cannot be read</div>{caption}</figure>'
    url, width, height = coded
    picture = f'<img src="{url}" width="{width}" height="{height}" alt="picture {number}">'
    return f'<figure class="shot{" main" if main else ""}"><div>{picture}{frames}</div>{caption}</figure>'


def _cards(items: Sequence[Item], purse: _Purse) -> Iterator[str]:
    """Cards while the purse lasts."""
    for item in items:
        card = _card(item, purse)
        if card is None:
            return
        yield card


def _gallery(items: Sequence[Item], purse: _Purse, most: int) -> str:
    cards = list(_cards(items[:most], purse))
    left = len(items) - len(cards)
    note = f'<p class="quiet">{left:,} more not shown.</p>' if left else ""
    return f'<div class="cards">{"".join(cards)}</div>{note}'


_FRAMES = (("good", "truth"), ("bad", "answer"), ("asked", "marked in the question"))


def _misses(report: Report, purse: _Purse) -> str:
    items = report["misses"]
    if not items:
        return section("Worst misses", '<p class="quiet">No answer with a box below IoU 0.5.</p>')
    run = report["runs"][0]
    scaled = ", y-scaled as they are scored" if run["rule"] == "published" else ""
    intro = (
        f"{escape(run['name'])}: answers with the least overlap, tasks in turn. Boxes{scaled} are drawn on the picture "
        "the truth lies in; pictures are reduced."
    )
    return section("Worst misses", legend(_FRAMES) + _gallery(items, purse, _MOST_MISSES), intro)


def _comparison(comparison: Mapping[str, Any] | None, purse: _Purse) -> str:
    if comparison is None:
        return ""
    first, second, tasks = comparison["first"], comparison["second"], comparison["tasks"]
    rows = [
        [
            escape(task),
            f"{t['first']:.1f}",
            f"{t['second']:.1f}",
            signed(t["change"], 1),
            f"{t['won']:,}",
            f"{t['lost']:,}",
        ]
        for task, t in tasks.items()
    ]
    won, lost = (sum(t[key] for t in tasks.values()) for key in ("won", "lost"))
    aves = [f"{ave:.1f}" for ave in comparison["ave"]]
    rows.append(["mean", *aves, signed(comparison["change"], 1), f"{won:,}", f"{lost:,}"])
    low, high = comparison["interval"]
    intro = (
        f"{escape(second)} against {escape(first)}, question by question: {signed(comparison['change'], 1)} points of "
        f"AVE, 95 % interval {signed(low, 1)} to {signed(high, 1)}."
    )
    body = table(("Task", escape(first), escape(second), "change", "won", "lost"), rows, last="total")
    for key, words in (
        ("lost", "Right in the first, wrong in the second"),
        ("won", "Wrong in the first, right in the second"),
    ):
        if comparison[key]:
            body += f"<h3>{words}</h3>{legend([('good', 'truth'), ('was', first), ('bad', second)])}"
            body += _gallery(comparison[key], purse, _MOST_FLIPS)
    return section("Compared", body, intro)


def _failures(report: Report) -> str:
    items = report["failures"]
    if not items:
        return ""
    rows = [
        [escape(item.task), f"{item.index:,}", f"<code>{escape(item.response[:200]) or 'nothing'}</code>"]
        for item in items[:_MOST_LINES]
    ]
    left = len(items) - len(rows)
    note = f'<p class="quiet">{left:,} more.</p>' if left else ""
    return section("Answers without a box", table(("Task", "Question", "Answer"), rows, text=3) + note)


def _missing(report: Report) -> str:
    paths = [str(path) for path in report["missing"]]
    if not paths:
        return ""
    listed = "".join(f"<li><code>{escape(path)}</code></li>" for path in paths[:_MOST_LINES])
    left = len(paths) - _MOST_LINES
    note = f'<p class="quiet">{left:,} more.</p>' if left > 0 else ""
    return section("Missing pictures", f"<ul>{listed}</ul>{note}", f"{len(paths):,} pictures; their questions score 0.")


_STYLE = """
.facts{display:grid;grid-template-columns:max-content 1fr;gap:4px 18px;margin:0}
.facts dt{color:var(--soft)}.facts dd{margin:0;min-width:0;overflow-wrap:anywhere}
.pair{display:grid;grid-template-columns:minmax(0,1fr) minmax(0,1fr);gap:8px 28px;align-items:center}
.pair p{margin:12px 0 0;font-size:13.5px}.pair td:first-child{min-width:118px}.pair .key{margin-right:6px}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,430px),1fr));gap:16px}
article{border:1px solid var(--line);border-radius:8px;padding:12px 14px;min-width:0}
article h3{margin:0 0 8px;color:var(--ink);font-size:13.5px}article h3>span{color:var(--soft);font-weight:400}
article h3 .bad,article h3 .was{color:var(--c);font-weight:600}
article p{margin:8px 0 0;font-size:13.5px;color:var(--soft)}article .asking{color:var(--ink)}
.cards+.quiet{margin-top:10px}details+details{margin-top:10px}
.shots{display:flex;flex-wrap:wrap;gap:8px;align-items:flex-end}.shot{flex:0 1 auto;width:110px}.shot.main{width:176px}
.shot>div{position:relative;line-height:0}.shot img{width:100%;height:auto;border-radius:3px}
figcaption{font-size:12px;color:var(--soft);line-height:1.5}.shot.main figcaption{font-weight:600;color:var(--ink)}
.frame{position:absolute;border:2px solid var(--c);border-radius:1px;
box-shadow:0 0 0 1px #ffffffb0,inset 0 0 0 1px #ffffffb0}
.asked{--c:#2467d6}.was{--c:#e08a00}.frame.asked{border-style:dashed}
.frame.good{border-color:#0fa958}.frame.bad{border-color:#e2263f}.key.good{--c:#0fa958}.key.bad{--c:#e2263f}
.gone{background:var(--line);color:var(--soft);font-size:12px;padding:28px 6px;text-align:center;line-height:1.3}
@media(max-width:760px){.pair{grid-template-columns:minmax(0,1fr)}}
@media(max-width:600px){.facts{grid-template-columns:1fr;gap:0}.facts dd{margin-bottom:8px}article{padding:10px}}
"""
