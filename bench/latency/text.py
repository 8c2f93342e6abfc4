"""The figures as words: what the command prints, and the Markdown table of a report."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..engines import PHASES
from .load import busy

__all__ = ["ceiling_line", "markdown", "printed"]

_NONE = "-"


def _number(value: float | None, digits: int = 0) -> str:
    """With thousands' commas; small numbers keep at least two significant digits."""
    if value is None:
        return _NONE
    if not digits and abs(value) < 10:
        digits = 2 if abs(value) >= 1 else 3
    elif not digits and abs(value) < 100:
        digits = 1
    return f"{value:,.{digits}f}"


def _p50(entry: Mapping[str, Any] | None) -> float | None:
    return entry["p50"] if entry else None


def ceiling_line(ceilings: Mapping[str, Any]) -> str:
    """The machine's ceilings in one line."""
    one, many, threads = ceilings["read_bytes_1"] / 1e9, ceilings["read_bytes"] / 1e9, ceilings["threads"]
    reads = f"reads {many:.1f} GB/s" + (f" ({one:.1f} on one thread)" if threads > 1 else "")
    products = [f"int8 {ceilings['int8_ops'] / 1e9:,.0f} GOPS"]
    if ceilings["bf16_ops"]:
        products.append(f"bf16 {ceilings['bf16_ops'] / 1e9:,.0f} GFLOPS")
    products.append(f"fp32 {ceilings['f32_ops'] / 1e9:,.0f} GFLOPS")
    plural = "s" if threads > 1 else ""
    return f"{reads}, multiplies {', '.join(products)} ({ceilings['isa']}, {threads} thread{plural})"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Columns padded to their widest cell; the first is words, the others numbers."""
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return [
        "  ".join(
            c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def printed(result: Mapping[str, Any]) -> str:
    """Everything a reader at a terminal wants, without the JSON."""
    lines = []
    if result["ceilings"]:
        lines += [f"ceilings: {ceiling_line(result['ceilings'])}", ""]
    for case in result["cases"]:
        size = f"{case['width']}x{case['height']}"
        lines.append(
            f"{case['pictures']} x {size} ({case['patches']:,} patches, {case['prompt_tokens']:,} prompt tokens), "
            f"{case['new_tokens']} new tokens"
        )
        for name, entry in case["engines"].items():
            lines += [f"  {line}" for line in _engine_table(name, entry, case["ratios"].get(name))]
        lines.append("")
    lines += [f"left out: {entry['engine']}: {entry['why']}" for entry in result["missing"]]
    return "\n".join(lines).rstrip("\n")


def _engine_table(name: str, entry: Mapping[str, Any], ratio: Mapping[str, float] | None) -> list[str]:
    """One engine's phases: p50, p90, p99, and the share of the ceilings or the ratio to ours."""
    last = "of the ceiling" if ratio is None else "x ours"
    rows = []
    for phase in (*PHASES, "total"):
        figures = entry[f"{phase}_ms"]
        if figures is None:
            continue
        if ratio is None:
            share = entry.get("shares", {}).get(phase)
            note = f"{100 * share:.1f} %" if share is not None else ""
        else:
            note = f"{ratio[phase]:.2f}" if phase in ratio else ""
        cpu = sum(entry["cpu_ms"].values()) if phase == "total" and entry.get("cpu_ms") else None
        cpu = entry["cpu_ms"][phase] if cpu is None and entry.get("cpu_ms") else cpu
        rows.append([phase, *(_number(figures[p]) for p in ("p50", "p90", "p99")), _number(cpu), note])
    if step := entry["step_ms"]:
        rows.append(["each token", *(_number(step[p]) for p in ("p50", "p90", "p99")), "", ""])
    lines = _table([name, "p50 ms", "p90 ms", "p99 ms", "cpu ms", last], rows)
    facts = [f"{_number(entry['tokens_per_s'])} tokens/s", f"peak {_number(entry['peak_rss_mb'])} MB"]
    if entry["energy_j"] is not None:
        facts.append(f"{_number(entry['energy_j'])} J")
    return [*lines, ", ".join(facts)]


def markdown(results: Sequence[Mapping[str, Any]]) -> str:
    """A table row for each case and engine, behind what ran where."""
    parts = []
    for result in results:
        parts += [*_markdown_head(result), *_markdown_rows(result), ""]
        parts += [f"Left out: {_cell(entry['engine'])}: {_cell(entry['why'])}." for entry in result["missing"]]
    return "\n".join(parts).rstrip("\n") + "\n"


def _cell(value: Any) -> str:
    return " ".join(str(value).replace("|", "\\|").split())


def _markdown_head(result: Mapping[str, Any]) -> list[str]:
    machine, model, settings = result["machine"], result["model"], result["settings"]
    versions = [f"{k} {v}" for engine in result["engines"].values() for k, v in engine["versions"].items()]
    load = " to ".join("unknown" if v is None else f"{v:.1f}" for v in result["load"])
    # files of the first releases do not name it
    backend = "" if settings.get("backend", "native") == "native" else f", backend {_cell(settings['backend'])}"
    lines = [
        f"## {_cell(model['name'])}, {_cell(model['mode'])}{backend}",
        "",
        f"{_cell(machine['cpu'])}, {machine['cores']} cores, {machine['memory_gib']} GiB; {_cell(machine['system'])}; "
        f"migician {_cell(machine['migician'])}, {_cell(', '.join(dict.fromkeys(versions)))}. {_cell(result['date'])}; "
        f"medians of {settings['repeat']}; load average {load}.",
        "",
    ]
    if result["command"]:
        lines += [f"    {_cell(result['command'])}", ""]
    if note := busy(result["load"][0], settings["threads"]):
        lines += [f"**{note[0].upper()}{note[1:]}.**", ""]
    if result["ceilings"]:
        lines += [f"Ceilings: {_cell(ceiling_line(result['ceilings']))}.", ""]
    return lines


def _markdown_rows(result: Mapping[str, Any]) -> list[str]:
    head = ["pictures", "engine", *(f"{p} ms" for p in (*PHASES, "total")), "tokens/s", "peak MB", "of the ceiling"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for case in result["cases"]:
        what = f"{case['pictures']} x {case['width']}x{case['height']}, {case['new_tokens']} new"
        for name, entry in case["engines"].items():
            shares = " / ".join(f"{100 * s:.0f}" for s in entry.get("shares", {}).values())
            figures = [_number(_p50(entry[f"{phase}_ms"])) for phase in (*PHASES, "total")]
            cells = [what, _cell(name), *figures, _number(entry["tokens_per_s"]), _number(entry["peak_rss_mb"])]
            lines.append("| " + " | ".join([*cells, f"{shares} %" if shares else _NONE]) + " |")
        for name, ratio in case["ratios"].items():
            figures = [
                f"{ratio[p]:.2f}x" if p in ratio else _NONE for p in (*PHASES, "total", "tokens_per_s", "peak_rss_mb")
            ]
            lines.append("| " + " | ".join([what, f"{_cell(name)} / ours", *figures, _NONE]) + " |")
    return lines
