"""The shell of a report: one HTML page that needs nothing but itself, and the parts it is put together from.

No script, no file beside it, light or dark as its reader's setting. Arguments that are markup say so; all others are
words and are escaped. Colours of what a page shows are classes that set the CSS variable --c (charts.py).
"""

import os
from collections.abc import Iterable, Sequence
from html import escape

from ..files.write import whole_file
from .charts import STYLE as CHART_STYLE

__all__ = ["legend", "page", "section", "signed", "table", "tiles", "write_page"]


def page(title: str, sections: Iterable[str], *, style: str = "") -> str:
    """Returns the whole page.   sections: markup, empty ones are left out.   style: CSS of this kind of page."""
    body = "\n".join(section for section in sections if section)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>{CHART_STYLE}{_STYLE}{style}</style>\n</head>\n<body>\n<main>\n"
        f"{body}\n</main>\n</body>\n</html>\n"
    )


def write_page(path: str | os.PathLike[str], text: str) -> None:
    """Writes a page, or any text; it appears under its name complete or not at all.

    Raises ModelFileError when the place cannot be written.
    """
    with whole_file(path) as file:
        file.write(text.encode())


def section(title: str, body: str, intro: str = "") -> str:
    """A card with a heading.   body, intro: markup."""
    lead = f"<p>{intro}</p>" if intro else ""
    return f"<section><h2>{escape(title)}</h2>{lead}{body}</section>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, text: int = 1, last: str = "") -> str:
    """A table whose first `text` columns are words and whose others are numbers.

    head, rows: markup.   last: a class for the last row.
    """

    def row(cells: Sequence[str], tag: str, style: str = "") -> str:
        marks = [' class="num"' if i >= text else "" for i in range(len(cells))]
        inner = "".join(f"<{tag}{m}>{c}</{tag}>" for c, m in zip(cells, marks, strict=True))
        return f'<tr class="{style}">{inner}</tr>' if style else f"<tr>{inner}</tr>"

    lines = list(rows)
    body = "".join(row(cells, "td", last if i == len(lines) - 1 else "") for i, cells in enumerate(lines))
    return f'<div class="scroll"><table><thead>{row(head, "th")}</thead><tbody>{body}</tbody></table></div>'


def tiles(items: Sequence[tuple[str, str, str]], columns: int) -> str:
    """The figures that matter most: (name, figure, note); the figure is markup."""
    cards = "".join(
        f'<div class="tile"><dt>{escape(name)}</dt><dd>{figure}</dd><small>{escape(note)}</small></div>'
        for name, figure, note in items
    )
    return f'<dl class="tiles" style="--n:{columns}">{cards}</dl>'


def legend(items: Iterable[tuple[str, str]]) -> str:
    """What the colours mean: (class, words)."""
    keys = "".join(f'<span><i class="key {style}"></i>{escape(words)}</span>' for style, words in items)
    return f'<div class="legend">{keys}</div>'


def signed(value: float, digits: int) -> str:
    """A change with its sign, none where it rounds to nothing: "+0.3", "−0.3", "0.0"."""
    text = f"{abs(value):.{digits}f}"
    return text if not float(text) else f"{'+' if value > 0 else '−'}{text}"


_STYLE = """
:root{--page:#f6f7f9;--card:#fff;--ink:#1b2230;--soft:#5b6577;--line:#dfe3ea;--s0:#2467d6;--s1:#0f8f70;--s2:#c96a06;
--s3:#b83280;--s4:#7a5af0;--s5:#7b6a2e;--t0:#7a5af0;--t1:#b9770e;--t2:#7b8698;--good:#12924a;--bad:#d9243c}
@media(prefers-color-scheme:dark){:root{--page:#10141b;--card:#181e28;--ink:#e8ecf3;--soft:#9aa6b8;--line:#2c3544;
--s0:#6ea4ff;--s1:#35b894;--s2:#f0a04b;--s3:#e06bb2;--s4:#9d85ff;--s5:#cdb663;--t0:#9d85ff;--t1:#e5a549;--t2:#8a94a6;
--good:#3fcb7c;--bad:#ff6b7d}}
.s0{--c:var(--s0)}.s1{--c:var(--s1)}.s2{--c:var(--s2)}.s3{--c:var(--s3)}.s4{--c:var(--s4)}.s5{--c:var(--s5)}
.t0{--c:var(--t0)}.t1{--c:var(--t1)}.t2{--c:var(--t2)}.good{--c:var(--good)}.bad{--c:var(--bad)}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif;-webkit-text-size-adjust:100%}
main{max-width:1120px;margin:0 auto;padding:28px 20px 48px}
h1{font-size:27px;line-height:1.2;margin:2px 0 8px;overflow-wrap:anywhere}
h2{font-size:18px;margin:0 0 10px}h3{font-size:14px;margin:18px 0 6px;color:var(--soft);font-weight:600}
p{margin:0 0 12px;max-width:78ch}.over{margin:0;color:var(--soft);font-size:13px;letter-spacing:.04em}
.sub{display:flex;flex-wrap:wrap;gap:4px 16px;color:var(--soft);align-items:center;max-width:none}
.quiet{color:var(--soft);margin:0}
section{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:18px 20px;margin-top:16px}
section p{color:var(--soft)}
.tiles{display:grid;grid-template-columns:repeat(var(--n),1fr);gap:12px;margin:18px 0 0}
.tile{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:12px 16px}
.tile dt{color:var(--soft);font-size:13px}.tile dd{margin:2px 0;font-size:24px;font-weight:650;line-height:1.25}
.tile small{color:var(--soft);font-size:12.5px;display:block;min-height:1.4em}.was{color:var(--soft);font-weight:500}
.scroll{overflow-x:auto}section>p:last-child{margin-bottom:0}
table{border-collapse:collapse;width:100%;font-size:14px}
th{color:var(--soft);font-weight:600;text-align:left;font-size:12.5px;vertical-align:bottom}
td,th{padding:6px 10px;border-bottom:1px solid var(--line)}td{vertical-align:middle}
tr:last-child td{border-bottom:0}tr.total td{font-weight:650;border-top:2px solid var(--line)}
td:first-child,th:first-child{padding-left:0}td:last-child,th:last-child{padding-right:0}
.num{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}th.num{white-space:normal}
code{font:12.5px/1.4 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-wrap:anywhere}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;margin:0 0 10px;color:var(--soft);font-size:13px}
.key{display:inline-block;width:11px;height:11px;border-radius:3px;margin-right:7px;background:var(--c)}
summary{cursor:pointer;font-weight:650}details[open] summary{margin-bottom:10px}
@media(max-width:600px){main{padding:18px 12px 32px}section{padding:14px}h1{font-size:22px}
.tiles{grid-template-columns:1fr 1fr;gap:8px}.tile{padding:10px 12px}.tile dd{font-size:18px}
td,th{padding:6px 5px}table{font-size:13px}.bars,.bars .bar{min-width:44px}}
@media print{body{background:#fff}section,.tile{break-inside:avoid}}
"""
