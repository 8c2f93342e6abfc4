"""Reports of accuracy runs and sweeps: true to their figures, sound, self-contained; words in charts do not collide."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from html_page import Page
from PIL import Image

from migician.bench.accuracy import sweep as sweeping
from migician.bench.accuracy.data import Question
from migician.bench.accuracy.gallery import Run, is_published, make_report, render_html, write_html
from migician.bench.accuracy.markdown import markdown_table, render_markdown, write_markdown
from migician.bench.accuracy.protocol import TASKS
from migician.bench.accuracy.sweep import Setting, row, sweep
from migician.bench.accuracy.sweep_page import render_html as render_sweep
from migician.bench.accuracy.sweep_page import render_markdown as render_sweep_markdown
from migician.runtime.errors import MigicianError
from migician.runtime.report.charts import Point, Ring, Series, radar, scatter

pytestmark = pytest.mark.slow

BOX = "(100,200),(300,400)"
TRUTH = (0.1, 0.2, 0.3, 0.4)


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"{name}.png" for name in "ab"]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (120, 160, 3), np.uint8)).save(path)
    return paths


def question(index: int, task: str, images: list[Path], **changes: Any) -> Question:
    fields = {"question": f"Where <{index}>? ", "answer": TRUTH, "info": "", "need_format": True, "target": 1}
    return Question(index, task, tuple(images), **{**fields, **changes})


@pytest.fixture
def questions(pictures: list[Path]) -> list[Question]:
    return [question(i, task, pictures) for i, task in enumerate(["diff", "diff", "region", "region", "view_diff"])]


ANSWERS = {0: BOX, 1: "(700,700),(900,900)", 2: "I see <nothing> & more", 3: "(100,200),(300,450)", 4: "(0,0),(90,90)"}


def report(questions: list[Question], **changes: Any) -> dict[str, Any]:
    runs = changes.pop("runs", [Run("nano <int4>", ANSWERS)])
    return make_report("Drawn & more", questions, runs, **changes)


# ---------------------------------------------------------------------------------------------------------- accuracy


def test_the_report_counts_what_was_answered(questions):
    made = report(questions)
    run = made["runs"][0]
    tasks = run["scores"]["none"]["tasks"]
    assert [tasks[t]["acc50"] for t in ("diff", "region", "view_diff")] == [50.0, 50.0, 0.0]
    assert tasks["region"]["acc70"] == 50.0 and tasks["region"]["unparsed"] == 1
    assert math.isclose(tasks["region"]["iou"], 0.4)  # 0.2 x 0.2 in 0.2 x 0.25, and no box
    assert math.isclose(run["scores"]["none"]["ave"], 100 / 3)
    low, high = run["scores"]["none"]["interval"]
    assert low <= 100 / 3 <= high
    assert run["scores"]["published"]["ave"] != run["scores"]["none"]["ave"] or tasks["diff"]["n"] == 2
    assert [item.index for item in made["failures"]] == [2] and made["missing"] == []
    assert [item.index for item in made["misses"]] == [4, 1] or [item.index for item in made["misses"]] == [1, 4]
    assert run["clean"] == {} and run["faulty"] == 0


def test_questions_of_faulty_truth_are_left_out_of_the_clean_score(questions, pictures):
    inverted = question(5, "diff", pictures, answer=(0.5, 0.2, 0.3, 0.4))
    made = report([*questions, inverted], runs=[Run("nano", {**ANSWERS, 5: BOX})])
    run = made["runs"][0]
    assert run["faulty"] == 1
    assert math.isclose(run["scores"]["none"]["tasks"]["diff"]["acc50"], 100 / 3)
    assert math.isclose(run["clean"]["none"], 100 / 3)
    assert 5 not in [item.index for item in made["misses"]]
    assert "Clean AVE" in Page(render_html(made)).words and "33.3 (1 left out)" in render_markdown(made)


def test_the_page_is_sound_and_loads_nothing(questions):
    text = render_html(report(questions, facts={"command": "migician-bench accuracy <x>"}))
    page = Page(text)
    assert len(page.all("h1")) == 1 and len(page.all("style")) == 1 and len(page.all("svg")) == 1
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert all((a["src"] or "").startswith("data:image/") for a in page.all("img"))
    assert not re.search(r"url\(|@import|https?:|\bhref=", text)
    assert not re.search(r"\bnan\b|\binf\b|None|null", page.words)
    assert "<int4>" not in text and "nano <int4>" in page.words and "Drawn & more" in page.words
    assert "I see <nothing> & more" in page.words and "command migician-bench accuracy <x>" in " ".join(
        page.words.split()
    )
    assert "prefers-color-scheme:dark" in text and 'name="viewport"' in text


def test_the_figures_are_on_the_page_and_in_the_table(questions):
    made = report(questions)
    words, table = " ".join(Page(render_html(made)).words.split()), render_markdown(made)
    assert "33.3 %" in words and "Without a box 1 of 5 answers" in words
    assert re.search(r"region 50\.0 50\.0 [\d.]+ to [\d.]+ 50\.0 0\.400 1 2\b", words)
    assert re.search(r"\| region \| 50\.0 \| 50\.0 \| [\d.]+ to [\d.]+ \| 50\.0 \| 0\.400 \| 1 \|", table)
    assert "| **mean** |" in table and "**33.3**" in table


def test_boxes_lie_where_they_are(questions):
    page = Page(render_html(report(questions[:2])))
    frames = {a["class"]: a["style"] for a in page.all("i", "frame")}
    assert frames["frame good"] == "left:10.00%;top:20.00%;width:20.00%;height:20.00%"
    assert frames["frame bad"] == "left:70.00%;top:70.00%;width:20.00%;height:20.00%"
    assert len(page.all("figure", "main")) == 1 and len(page.all("figure", "shot")) == 2


def test_a_box_in_the_question_is_drawn_in_the_first_picture(pictures):
    text = "the object marked(<|box_start|>(500,250),(750,1000)<|box_end|>), locate it in the 2th image. "
    asked = question(0, "multi_view", pictures, question=text)
    page = Page(render_html(make_report("x", [asked], [Run("m", {0: "(0,0),(90,90)"})])))
    assert [a["style"] for a in page.all("i", "asked") if "frame" in (a["class"] or "")] == [
        "left:50.00%;top:25.00%;width:25.00%;height:75.00%"
    ]
    assert "<|box_start|>" not in page.words and "(500,250),(750,1000)" in page.words


def test_the_worst_come_first_and_tasks_take_turns(pictures):
    far, near, partial = "(800,800),(990,990)", "(310,200),(400,400)", "(200,200),(400,400)"
    asked = [question(i, task, pictures) for i, task in enumerate(["diff", "diff", "diff", "region", "region"])]
    made = report(asked, runs=[Run("m", {0: partial, 1: near, 2: far, 3: partial, 4: BOX})])
    assert [item.index for item in made["misses"]] == [2, 3, 1, 0]


def test_the_papers_figures_stand_only_beside_its_own_questions(questions):
    ours, theirs = (report(questions, published_data=flag) for flag in (False, True))
    for text in (render_html(ours), render_markdown(ours)):
        assert "Migician-7B" not in text and "63.8" not in text and "not the questions of the paper" in text
    for text in (render_html(theirs), render_markdown(theirs)):
        assert "Migician-7B" in text and "63.8" in text and "65.2" in text and "97.2" in text
    assert render_html(theirs).count('class="outline') == 4 and render_html(ours).count('class="outline') == 1


def test_only_the_whole_published_file_is_taken_for_it(pictures):
    counts = dict(zip(TASKS, (528, 94, 816, 550, 288, 1203, 99, 499, 101, 117), strict=True))
    whole = [question(0, task, pictures) for task in counts for _ in range(counts[task])]
    assert len(whole) == 4295 and is_published(whole) and not is_published(whole[1:]) and not is_published([])


def test_several_runs_are_laid_over_each_other(questions):
    text = render_html(report(questions, runs=[Run("a", ANSWERS), Run("b", {}), Run("c", ANSWERS, "published")]))
    page = Page(text)
    assert text.count('class="outline') == 3 and len(page.all("details")) == 3
    assert "and 2 more runs" in page.words and "c, y-scaled" in page.words


def test_flips_are_shown_on_both_sides(questions):
    before = Run("bf16", {**ANSWERS, 1: BOX, 3: "(900,900),(990,990)"})
    made = report(questions, baseline=before)
    comparison = made["comparison"]
    assert [run["name"] for run in made["runs"]] == ["nano <int4>", "bf16"]
    assert [item.index for item in comparison["lost"]] == [1] and [item.index for item in comparison["won"]] == [3]
    assert comparison["tasks"]["diff"] == {"first": 100.0, "second": 50.0, "change": -50.0, "lost": 1, "won": 0}
    assert math.isclose(comparison["change"], 0.0, abs_tol=1e-9)
    page = Page(render_html(made))
    words = " ".join(page.words.split())
    assert "Right in the first, wrong in the second" in words and "diff 100.0 50.0 −50.0 0 1" in words
    assert len(page.all("i", "was")) == 2 + 2  # a frame and a key for each side
    assert "| diff | 100.0 | 50.0 | −50.0 | 0 | 1 |" in render_markdown(made)


def test_missing_and_unreadable_pictures_are_named(questions, pictures):
    pictures[0].unlink()
    pictures[1].write_bytes(b"not a picture")
    made = report(questions)
    page = Page(render_html(made))
    assert made["missing"] == [pictures[0]] and str(pictures[0]) in page.words and "cannot be read" in page.words
    assert str(pictures[0]) in render_markdown(made)


def test_pictures_stay_within_the_budget(tmp_path):
    rng = np.random.default_rng(1)
    asked = []
    for i in range(12):
        path = tmp_path / f"{i}.png"
        Image.fromarray(rng.integers(0, 256, (600, 900, 3), np.uint8)).save(path)
        asked.append(question(i, "region", [path], target=0))
    made = make_report("x", asked, [Run("m", dict.fromkeys(range(12), "(0,0),(90,90)"))])
    whole, small = render_html(made, budget=10_000_000), render_html(made, budget=300_000)
    assert whole.count("<img") == 12 and "more not shown" not in whole
    shown = small.count("<img")
    assert 0 < shown < 12 and f"{12 - shown} more not shown" in small
    assert sum(len(url) for url in re.findall(r'src="(data:[^"]+)"', small)) <= 300_000
    assert len(small) < 350_000


def test_files_appear_whole_and_say_where_they_cannot(tmp_path, questions):
    made = report(questions)
    write_html(tmp_path / "a.html", made)
    write_markdown(tmp_path / "a.md", made)
    assert (tmp_path / "a.html").read_text("utf-8") == render_html(made)
    assert (tmp_path / "a.md").read_text("utf-8") == render_markdown(made)
    for write in (write_html, write_markdown):
        with pytest.raises(MigicianError, match="cannot be written"):
            write(tmp_path / "nowhere" / "a", made)


def test_markdown_cells_keep_their_columns():
    lines = markdown_table(["a", "b"], [["x|y", "1\n2"]]).splitlines()
    assert lines == ["| a | b |", "| --- | ---: |", "| x\\|y | 1 2 |"]


# ------------------------------------------------------------------------------------------------------------ charts


def texts(svg: str) -> list[tuple[float, float, float, float, str]]:
    """Boxes of the words: 5.6 px a letter at 11 px, 9 px high."""
    found = re.findall(r'<text(?: class="\w+")? x="([-\d.]+)" y="([-\d.]+)"(?: text-anchor="(\w+)")?>(.*?)</text>', svg)
    made = []
    for x, y, anchor, words in found:
        width = 5.6 * len(words)
        left = float(x) - {"": 0.0, "start": 0.0, "middle": width / 2, "end": width}[anchor]
        made.append((left, float(y) - 8, left + width, float(y) + 1, words))
    return made


def assert_apart(svg: str) -> list[str]:
    width, height = (float(v) for v in re.findall(r'viewBox="0 0 (\d+) (\d+)"', svg)[0])
    placed = texts(svg)
    assert len(placed) == svg.count("<text")
    for i, (x1, y1, x2, y2, words) in enumerate(placed):
        assert x1 >= -1 and y1 >= -1 and x2 <= width + 1 and y2 <= height + 1, words
        for a1, b1, a2, b2, other in placed[:i]:
            assert x2 <= a1 or a2 <= x1 or y2 <= b1 or b2 <= y1, (words, other)
    return [words for *_, words in placed]


def points(svg: str, tag: str) -> list[list[tuple[float, float]]]:
    found = re.findall(rf'<{tag} class="outline[^"]*" points="([^"]*)"', svg)
    return [[tuple(float(v) for v in pair.split(",")) for pair in places.split()] for places in found]


def test_a_radar_has_its_first_axis_upwards_and_its_edge_at_one():
    ring = Ring("s0", "nano", [1.0, 0.5, 0.0, 0.25])
    (outline,) = points(radar("x", ["a", "b", "c", "d"], [ring]), "polygon")
    (cx, top), (right, cy), third, fourth = outline
    assert third == (cx, cy) and cy - top == pytest.approx(2 * (right - cx), abs=0.2)
    assert cx - fourth[0] == pytest.approx((cy - top) / 4, abs=0.2)


def test_a_radar_passes_by_what_is_not_known_and_keeps_in_its_frame():
    rings = [Ring("s0", "<a>", [2.0, None, -1.0]), Ring("t0", "b", [0.5, 0.5, 0.5], thin=True)]
    svg = radar("<t>", ["<x>", "y", "z"], rings)
    first, second = points(svg, "polygon")
    assert len(first) == 2 and len(second) == 3 and svg.count("<circle") == 2
    (edge,), (same,) = (
        points(radar("t", ["x", "y", "z"], [Ring("s0", "a", [v, v, v])]), "polygon") for v in (1.0, 2.0)
    )
    assert edge == same and first[0] == edge[0]
    assert "<x>" not in svg and "<t>" not in svg and "<a>" not in svg and "&lt;x&gt;" in svg


@pytest.mark.parametrize("count", [3, 5, 8, 10])
@pytest.mark.parametrize("values", [(), ("100.0",) * 10])
def test_words_of_a_radar_neither_collide_nor_leave_it(count, values):
    names = list(TASKS)[:count]
    words = assert_apart(radar("x", names, [Ring("s0", "a", [0.5] * count)], values=values[:count]))
    assert set(names) <= set(words)


def test_in_a_scatter_left_is_faster_and_up_is_better():
    series = [Series("s0", [Point(10, 50), Point(100, 80), Point(1000, 20, interval=(10, 30))])]
    svg = scatter("x", series, x_unit="ms", y_unit="%")
    xs, ys = ([float(v) for v in re.findall(rf'<circle[^>]* {c}="([\d.]+)"', svg)] for c in ("cx", "cy"))
    assert xs[0] < xs[1] < xs[2] and abs((xs[1] - xs[0]) - (xs[2] - xs[1])) < 0.2  # logarithmic
    assert ys[1] < ys[0] < ys[2]
    (whisker,) = re.findall(r'class="whisker s0" x1="([\d.]+)" x2="([\d.]+)" y1="([\d.]+)" y2="([\d.]+)"', svg)
    low, high = float(whisker[2]), float(whisker[3])
    assert float(whisker[0]) == xs[2] and low > ys[2] > high
    assert scatter("x", [], x_unit="ms", y_unit="%") == ""


@pytest.mark.parametrize("spread", [1.0001, 1.3, 3, 40, 5000])
@pytest.mark.parametrize(("low", "high"), [(0, 100), (90.1, 90.3), (0, 0), (100, 100), (55, 71)])
def test_words_of_a_scatter_neither_collide_nor_leave_it(spread, low, high):
    dots = [
        Point(20 * spread ** (i / 3), low + (high - low) * i / 3, label)
        for i, label in enumerate(("112", "336", "800", "native"))
    ]
    words = assert_apart(
        scatter("x", [Series("s0", dots), Series("s1", dots)], x_unit="ms", y_unit="%", limits=(0, 100))
    )
    numbers = [
        float(w.replace(",", "")) for w in words if re.fullmatch(r"[\d.,]+", w) and w not in ("112", "336", "800")
    ]
    assert len(numbers) >= 5
    if spread >= 40:
        assert {"112", "native"} & set(words)


# ------------------------------------------------------------------------------------------------------------- sweep


def stats(total: float, peak: float = 50.0) -> dict[str, float]:
    phases = {"preprocess_ms": 1.0, "vision_ms": total / 2, "prefill_ms": total / 4, "decode_ms": total / 4 - 1}
    return {**phases, "new_tokens": 17, "prompt_tokens": 90, "peak_rss_mb": peak, "weights_mb": 14.0}


def test_a_row_has_medians_and_the_largest_peak(questions):
    totals, peaks = [10.0, 500.0, 20.0, 30.0, 40.0], [50.0, 60.0, 90.0, 70.0, 50.0]
    lines = [
        {"index": i, "response": ANSWERS[i], "stats": stats(t, p)}
        for i, (t, p) in enumerate(zip(totals, peaks, strict=True))
    ]
    made = row(Setting("nano", 336), questions, [*lines, {"index": 77, "response": BOX}], "qwen2_vl")
    assert made["total_ms"] == 30.0 and made["vision_ms"] == 15.0 and made["peak_rss_mb"] == 90.0
    assert made["ave"] == 33.3333 and made["y_scale"] == "none" and made["no_box"] == 1 and made["unanswered"] == 0
    assert row(Setting("m", None), questions, lines, "migician")["y_scale"] == "published"
    partly = row(Setting("m", None), questions, lines[:1], "qwen2_vl")
    assert partly["unanswered"] == 4 and partly["ave"] == 16.6667
    with pytest.raises(MigicianError, match="no question was answered"):
        row(Setting("m", None), questions, [{"index": 0, "response": "", "error": "no such picture"}], "qwen2_vl")


def test_unbeaten_is_what_no_other_row_beats():
    rows = [{"total_ms": t, "ave": a} for t, a in [(10, 50.0), (20, 60.0), (30, 55.0), (40, 60.0), (10, 50.0)]]
    assert [sweeping._unbeaten(r, rows) for r in rows] == [True, True, False, False, True]


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("sweep")
    arguments = ["nano", "--max-side", "112,native", "--drawn", "1", "--tasks", "region,diff", "--threads", "1"]
    files = ["--answers", str(folder / "a"), "--html", str(folder / "s.html"), "--markdown", str(folder / "s.md")]
    done = CliRunner().invoke(sweep, [*arguments, *files], catch_exceptions=False)
    assert done.exit_code == 0
    return folder, json.loads(done.stdout.splitlines()[-1])


def test_a_sweep_measures_every_setting(swept):
    folder, result = swept
    assert [(r["model"], r["max_side"]) for r in result["rows"]] == [("nano", 112), ("nano", None)]
    assert result["questions"] == 2 and result["tasks"] == 2 and result["machine"]["cpu"]
    assert result["bare"] and all(r["no_box"] == 0 for r in result["rows"])
    for r in result["rows"]:
        assert r["total_ms"] > 0 and r["peak_rss_mb"] > 10 and r["prompt_tokens"] > 98  # two pictures of 49 cells
    assert any(r["best"] for r in result["rows"])
    assert sorted(path.name for path in (folder / "a").iterdir()) == ["nano-112.jsonl", "nano-native.jsonl"]
    lines = [json.loads(line) for line in (folder / "a" / "nano-112.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines] == [2, 3] and all(line["stats"]["vision_ms"] > 0 for line in lines)


def test_its_page_and_table_show_every_setting(swept):
    folder, result = swept
    text = (folder / "s.html").read_text("utf-8")
    page = Page(text)
    assert text == render_sweep(result) and (folder / "s.md").read_text("utf-8") == render_sweep_markdown(result)
    assert len(page.all("circle")) == 2 and len(page.all("div", "phases")) == 2
    assert not re.search(r"url\(|@import|https?:|\bsrc=|\bhref=", text) and "None" not in page.words
    assert (folder / "s.md").read_text("utf-8").count("| nano | ") == 2


def test_a_sweep_goes_on_where_it_was_cut_off(swept):
    folder, result = swept
    kept = folder / "a" / "nano-112.jsonl"
    before = kept.read_text()
    kept.write_text(before.splitlines()[0] + "\n" + before.splitlines()[1][:20])
    arguments = ["nano", "--max-side", "112", "--drawn", "1", "--tasks", "region,diff", "--threads", "1"]
    done = CliRunner().invoke(sweep, [*arguments, "--answers", str(folder / "a")], catch_exceptions=False)
    after = kept.read_text().splitlines()
    assert after[0] == before.splitlines()[0] and len(after) == 2
    assert json.loads(done.stdout.splitlines()[-1])["rows"][0]["ave"] == result["rows"][0]["ave"]
    other = CliRunner().invoke(sweep, [*arguments, "--with-format", "--answers", str(folder / "a")])
    assert isinstance(other.exception, MigicianError) and "holds answers of" in str(other.exception)


def test_a_model_that_is_not_there_is_one_line(tmp_path):
    done = CliRunner().invoke(sweep, [str(tmp_path / "no.mig"), "--drawn", "1", "--tasks", "diff"])
    assert isinstance(done.exception, MigicianError) and "\n" not in str(done.exception)
    assert "no.mig" in str(done.exception) and "see its message above" not in str(done.exception)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing argument"),
        (["nano", "--max-side", "0"], "write pixels or native"),
        (["nano", "--max-side", "112,,168"], "write pixels or native"),
        (["nano", "--data", "x.json", "--drawn", "1"], "give one"),
        (["nano", "--images", "x"], "--images goes with --data"),
    ],
)
def test_what_cannot_be_swept_is_a_usage_error(arguments, message):
    done = CliRunner().invoke(sweep, arguments)
    assert done.exit_code == 2 and message in done.output
