"""migician-bench report: pages from runs, and one line for what is no run."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from html_page import Page

from migician.bench.cli import command
from migician.bench.latency.figures import Curve, curves, duration
from migician.bench.latency.page import render
from migician.bench.latency.results import read_result
from migician.bench.latency.text import markdown
from migician.runtime.errors import MigicianError


def figures(value: float) -> dict[str, Any]:
    return {"p50": value, "p90": 1.1 * value, "p99": 1.2 * value, "values": [value]}


def engine(scale: float, shares: bool) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "preprocess_ms": figures(20 * scale), "vision_ms": figures(6000 * scale), "prefill_ms": figures(2000 * scale),
        "decode_ms": figures(3100 * scale), "total_ms": figures(11120 * scale), "step_ms": figures(100 * scale),
        "tokens_per_s": 10 / scale, "peak_rss_mb": 2000 * scale, "energy_j": None, "prompt_tokens": 434,
    }  # fmt: skip
    return entry | ({"shares": {"vision": 0.3, "prefill": 0.4, "decode": 0.6}} if shares else {})


def case(pictures: int, width: int = 640, height: int = 480, *, peer: bool = False) -> dict[str, Any]:
    engines = {"migician": engine(pictures, True)}
    if peer:
        engines["transformers bf16"] = engine(5.0 * pictures, False)
    work = {
        phase: {"operations": 1e12, "attention": 1e10, "bytes": 1e9, "floor_ms": 500.0}
        for phase in ("vision", "prefill", "decode")
    }
    return {
        "pictures": pictures, "width": width, "height": height, "new_tokens": 32, "patches": 1564 * pictures,
        "visual_tokens": 391 * pictures, "prompt_tokens": 434, "work": work, "engines": engines,
        "ratios": {"transformers bf16": {"vision": 5.0, "total": 5.0, "peak_rss_mb": 1.5}} if peer else {},
    }  # fmt: skip


@pytest.fixture
def run() -> dict[str, Any]:
    return {
        "kind": "migician latency", "version": 1, "date": "2026-11-24T12:00:00+00:00",
        "command": "migician-bench latency",
        "machine": {"cpu": "A CPU", "cores": 2, "flags": ["avx2"], "memory_gib": 23.5, "board": None, "system": "Linux",
                    "python": "3.11", "migician": "0.2.0", "numpy": "2"},
        "load": [0.5, 2.1],
        "model": {"name": "2b-int4", "format": "mig", "mode": "int4", "bytes": 1400000000, "weights": 2208985600},
        "settings": {"precision": "auto", "threads": 2, "repeat": 3, "warm_up": 1, "prompt": "x"},
        "ceilings": {"isa": "avx2", "threads": 2, "read_bytes": 2e10, "read_bytes_1": 1.5e10, "f32_ops": 2e11,
                     "int8_ops": 4e11, "bf16_ops": 0.0},
        "engines": {"migician": {"versions": {"kernels": "avx2"}, "load_ms": [90.0], "meter": None}},
        "missing": [{"engine": "onnxruntime", "why": "not there"}],
        "cases": [case(1, peer=True), case(2), case(4), case(1, 1280, 960)],
    }  # fmt: skip


def test_the_page_has_every_part_and_needs_nothing_else(run: dict[str, Any]) -> None:
    text = render([run])
    page = Page(text)
    assert page.outside == [] and "http" not in text
    for heading in ("Where the time goes", "How it grows", "ceilings", "Every figure", "How it was measured"):
        assert heading in text
    assert "transformers bf16" in text and "onnxruntime: not there" in text
    assert text.count("<svg") == 3  # over pictures, over sizes, the roofline
    assert "30.0 %" in text and "15.5 s" in text  # 31 steps of 500 ms each is what decoding needs at the least


def test_a_page_of_one_question_without_ceilings(run: dict[str, Any]) -> None:
    run["ceilings"], run["cases"] = None, [case(1)]
    del run["cases"][0]["engines"]["migician"]["shares"]
    text = render([run])
    Page(text)
    assert "How it grows" not in text and "<svg" not in text


def test_two_runs_share_a_page(run: dict[str, Any]) -> None:
    other = copy.deepcopy(run)
    other["model"] |= {"name": "2b", "mode": "bf16"}
    text = render([run, other])
    Page(text)
    assert text.count("How it was measured") == 2 and "migician 2b bf16" in text and "migician 2b-int4" in text


def test_a_busy_machine_is_named(run: dict[str, Any]) -> None:
    assert "busy" not in render([run]) and "busy" not in markdown([run])
    run["load"][0] = 12.3
    assert "load average 12.3 before" in render([run]) and "load average 12.3 before" in markdown([run])


def test_words_of_a_run_are_escaped(run: dict[str, Any]) -> None:
    evil = "<script>alert(1)</script>&"
    run["model"]["name"] = run["command"] = run["machine"]["cpu"] = run["date"] = evil
    run["missing"] = [{"engine": evil, "why": evil}]
    run["cases"][0]["engines"][evil] = engine(2.0, False)
    run["cases"][0]["ratios"][evil] = {"total": 2.0}
    text = render([run])
    assert Page(text).outside == [] and "<script" not in text


def test_the_markdown_has_a_row_for_each_engine(run: dict[str, Any]) -> None:
    run["missing"][0]["why"] = "a | b"
    text = markdown([run])
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + 4 + 2  # head, ours four times, the peer and its ratio
    assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1
    assert "a \\| b" in text and "5.00x" in text


def test_the_command_takes_files_and_whole_outputs(run: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(run))
    (tmp_path / "b.txt").write_text(f"some table\n\n{json.dumps(run)}\n")
    (tmp_path / "c.json").write_text(json.dumps(run, indent=2))
    words = [*(str(tmp_path / name) for name in ("a.json", "b.txt", "c.json")), "-o", str(tmp_path / "out.html")]
    done = CliRunner().invoke(
        command, ["report", *words, "--markdown", str(tmp_path / "out.md")], catch_exceptions=False
    )
    assert done.exit_code == 0
    assert (tmp_path / "out.html").read_text().startswith("<!doctype html>")
    assert (tmp_path / "out.md").read_text().count("## 2b-int4") == 3


def broken(run: dict[str, Any], path: str, value: Any) -> str:
    run = copy.deepcopy(run)
    *steps, last = path.split(".")
    place: Any = run
    for step in steps:
        place = place[int(step)] if step.isdigit() else place[step]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return json.dumps(run)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("kind", "another"), ("version", 2), ("machine", None), ("load", [1]), ("ceilings", {"read_bytes": 1}),
        ("cases", []), ("cases", [3]), ("cases.0.pictures", "x"), ("cases.0.engines", {}), ("cases.0.work", None),
        ("cases.0.engines.migician.total_ms", {"p50": None}), ("cases.0.work.decode", 3), ("cases.0.ratios", 1),
        ("cases.0.engines.migician.total_ms", None), ("cases.0.engines.migician.peak_rss_mb", ...),
        ("cases.0.work.vision.bytes", "x"), ("cases.0.ratios", {"a": 1}), ("engines", {"a": 1}), ("missing", [1]),
        ("settings", {}),
        ("cases.0.engines.migician.shares", {"vision": "x"}), ("cases.0.engines.migician.tokens_per_s", "x"),
    ],
)  # fmt: skip
def test_a_damaged_run_is_one_line(run: dict[str, Any], tmp_path: Path, path: str, value: Any) -> None:
    file = tmp_path / "run.json"
    file.write_text(broken(run, path, value))
    with pytest.raises(MigicianError, match=r"run\.json: (has|is).*migician-bench latency"):
        read_result(file)


def test_what_is_no_run_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"\xff\xfe")
    (tmp_path / "y").write_text("no JSON")
    for name in ("x", "y", "z"):
        with pytest.raises(MigicianError, match="migician-bench latency"):
            read_result(tmp_path / name)


def test_times_as_people_say_them() -> None:
    said = [duration(ms) for ms in (0.42, 8.76, 87.4, 999.4, 1234, 75400, 250_000)]
    assert said == ["0.42 ms", "8.8 ms", "87 ms", "999 ms", "1.23 s", "75.4 s", "4 min 10 s"]


def test_a_curve_keeps_inside_its_frame() -> None:
    text = curves("t", [Curve("total", "total", [(1, 3.3), (8, 27.1)])], x_unit="pictures", x_words=str)
    places = [float(v) for pair in re.findall(r'points="([^"]+)"', text) for v in re.split("[ ,]", pair)]
    assert min(places) >= 0 and max(places[0::2]) <= 380 and max(places[1::2]) <= 250
