"""The report page: sound HTML that loads nothing and is true to its figures; charts whose words do not collide."""

import dataclasses
import json
import math
import os
import re
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from html_page import Page

from migician.export.page import iou_change, render_report, write_report
from migician.export.report import Accuracy, Coverage, Layer, Made, Report, Size
from migician.runtime.errors import ModelFileError
from migician.runtime.report.charts import Line, bar, bounds, line_chart, shares

MODULES = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
BLOCKS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


def make_layers(layers: int, depth: int, *, calibrated: bool = True) -> list[Layer]:
    names = [f"visual.blocks.{i}.{module}" for i in range(depth) for module in BLOCKS]
    names += [f"model.layers.{i}.{module}" for i in range(layers) for module in MODULES]
    entries = [
        Layer(
            name=name,
            kind="int8" if name.startswith("visual") else "int4",
            shape=(64, 128),
            weight_error=0.05 + 0.001 * i,
            output_error=0.02 + 0.0001 * i if calibrated else None,
            rtn_weight_error=0.045 + 0.001 * i,
            rtn_output_error=0.03 + 0.0001 * i if calibrated else None,
            damping=0.01,
        )
        for i, name in enumerate(names)
    ]
    return [*entries, Layer("visual.patch_embed.proj", "bf16", (64, 1176))]


def side(shift: float, *, scores: bool = True) -> dict[str, Any]:
    asked = {"region": [0.5 + shift, 0.7 + shift], "diff <1>": [0.2, 0.4 + 2 * shift]}
    tasks = {task: {"n": 2, "iou": sum(s) / 2, "acc50": sum(x >= 0.5 for x in s) / 2} for task, s in asked.items()}
    mean = {key: sum(task[key] for task in tasks.values()) / 2 for key in ("iou", "acc50")}
    return {"mean": mean, "tasks": tasks, **({"scores": asked} if scores else {})}


def make_report(count: int = 28, depth: int = 32, **changes: Any) -> Report:
    """changes: of any field, wherever in the report it is."""
    fields: dict[str, Any] = {
        "model": "Migician & <b>co</b>",
        "mode": "int4",
        "rotated": True,
        "weights": 8_291_375_616,
        "bytes": 5_213_000_000,
        "bits_per_weight": 5.03,
        "parts": {"vision": 690_000_000, "language model": 3_430_000_000, "head": 1_090_000_000, "other": 0},
        "layers": make_layers(count, depth),
        "calibration": Coverage(
            source="scenes <drawn>",
            samples=128,
            seed=7,
            sha256="ab" * 32,
            tasks={"region": 100, "diff <1>": 28},
            pictures={"10": 2, "2": 126},
            visual_tokens=98_112,
            text_tokens=17_210,
        ),
        "accuracy": Accuracy(2, side(0.0), side(-0.1)),
        "seconds": 9412.0,
        "peak_rss_mb": 6100.0,
        "machine": 'EPYC "Milan" <16>',
        **changes,
    }
    parts = {kind: {f.name: fields.pop(f.name) for f in dataclasses.fields(kind)} for kind in (Made, Size)}
    return Report(made=Made(**parts[Made]), size=Size(**parts[Size]), **fields)


VARIANTS: dict[str, dict[str, Any]] = {
    "full": {},
    "bare": {"accuracy": None, "calibration": None, "layers": make_layers(2, 2, calibrated=False)},
    "no vision": {"layers": make_layers(2, 0)},
    "one layer": {"layers": make_layers(1, 1)},
    "deep": {"layers": make_layers(80, 32)},
    "no layers": {"layers": []},
    "nothing quantized": {"layers": make_layers(0, 0)},
    "no scores": {"accuracy": Accuracy(2, side(0, scores=False), side(-0.1, scores=False))},
    "larger": {"weights": 100, "bytes": 400, "parts": {}},
    "errors of zero": {"layers": [replace(layer, output_error=0.0) for layer in make_layers(3, 2)]},
    "odd errors": {"layers": [replace(layer, output_error=math.nan) for layer in make_layers(3, 2)]},
}


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_the_page_is_sound_and_loads_nothing(variant):
    text = render_report(make_report(**VARIANTS[variant]))
    page = Page(text)
    assert page.count("h1") == 1 and page.count("style") == 1
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert not re.search(r"url\(|@import|https?:|\bsrc=|\bhref=", text)
    assert not re.search(r"\bnan\b|\binf\b|None|null", page.words)
    assert "<b>co</b>" not in text and "Migician & <b>co</b>" in page.words and 'EPYC "Milan" <16>' in page.words
    assert "prefers-color-scheme:dark" in text and 'name="viewport"' in text


def test_the_figures_are_those_of_the_report():
    words = Page(render_report(make_report())).words
    for figure in ("5.21 GB", "69 % smaller than bf16 (16.6 GB)", "5.03", "8.29 billion", "2 h 37 min", "6.10 GB"):
        assert figure in words, figure
    for figure in ("128 samples", "115,322 tokens", "98,112 of pictures, 17,210 of text", "scenes <drawn>", "ab" * 32):
        assert figure in words, figure
    assert "−0.100" in words  # 0.45 before, 0.35 after
    assert re.search(r"diff <1>.*0\.300.*0\.200.*−0\.100", words)
    assert "690 MB" in words and "13.2 %" in words and "Left in bf16" in words
    assert re.search(r"Pictures in a sample\s+2\s+126\s+10\s+2\s", words)  # by number, not by letter


def test_what_was_not_measured_is_said():
    words = Page(render_report(make_report(**VARIANTS["bare"]))).words
    assert "not measured" in words and "rounded to nearest" in words
    assert "Relative weight error by layer" in words and "output error by layer" not in words
    assert "Relative output error by layer" in Page(render_report(make_report())).words


@pytest.mark.parametrize(("layers", "depth", "charts"), [(2, 2, 11), (28, 32, 11), (28, 0, 7), (0, 0, 0)])
def test_one_chart_for_each_kind_of_module(layers, depth, charts):
    page = Page(render_report(make_report(layers, depth)))
    assert page.count("svg") == charts
    assert page.count("circle") == 7 * layers + 4 * depth
    assert page.count("polyline") == 2 * charts


def test_the_worst_ten_are_in_order():
    layers = make_layers(28, 0)
    for index, error in ((5, 0.9), (90, 0.8)):
        layers[index] = replace(layers[index], output_error=error)
    text = render_report(make_report(layers=layers))
    table = text[text.index("The ten largest errors") :].split("</table>")[0]
    names = [re.sub("<wbr>", "", name) for name in re.findall("<code>(.*?)</code>", table)]
    assert len(names) == 10
    assert names[:3] == [layers[5].name, layers[90].name, layers[195].name]
    errors = [float(value) for value in re.findall(r'<td class="num">([\d.]+) %</td>', table)[::4]]
    assert errors == sorted(errors, reverse=True) and errors[0] == 90.0


def test_layers_unlike_their_siblings_are_named_and_ringed():
    layers = make_layers(4, 1)
    odd = next(i for i, layer in enumerate(layers) if layer.name == "model.layers.2.mlp.down_proj")
    layers[odd] = replace(layers[odd], kind="int8")
    text = render_report(make_report(layers=layers))
    assert text.count('class="dot after ring"') == 1
    policy = Page(text).words.split("Policy")[1]
    assert re.search(r"Unlike most of their module: +model\. +layers\. +2\. +mlp\. +down_proj +int8", policy)
    assert "ring" not in " ".join(re.findall('class="dot[^"]*"', render_report(make_report())))


def test_the_interval_is_that_of_paired_questions():
    tasks = {"a": {"n": 4}, "b": {"n": 2}}
    before = {"mean": {"iou": 0.5}, "tasks": tasks, "scores": {"a": [0.5] * 4, "b": [0.2, 0.8]}}
    after = {"mean": {"iou": 0.4}, "tasks": tasks, "scores": {"a": [0.5, 0.3, 0.5, 0.3], "b": [0.1, 0.7]}}
    change, half, questions = iou_change(Accuracy(4, before, after))
    # task a: gaps 0, -.2, 0, -.2: variance .04/3, over 4; task b: gaps alike, none; two tasks
    assert math.isclose(change, -0.1) and questions == 6
    assert half is not None and math.isclose(half, 1.96 * math.sqrt(0.04 / 3 / 4) / 2)
    for broken in ({"a": [0.5] * 4}, {"a": [0.5] * 3, "b": [0.1, 0.7]}, {"a": [0.5] * 4, "b": [0.1]}, None):
        assert iou_change(Accuracy(4, before, {**after, "scores": broken}))[1] is None


def test_a_page_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    write_report(path, make_report())
    first = path.read_bytes()
    assert first.decode() == render_report(make_report())
    with pytest.raises(ModelFileError, match="cannot be written"):
        write_report(tmp_path / "nowhere" / "report.html", make_report())

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ModelFileError, match="No space left"):
        write_report(path, make_report(model="other"))
    assert path.read_bytes() == first and [entry.name for entry in tmp_path.iterdir()] == ["report.html"]


def test_the_file_says_what_was_made_and_nothing_of_the_machine():
    layer = Layer("lm_head", "int8", (64, 128), 0.25, rtn_weight_error=0.5, damping=0.0)
    made = Made("nano", "int8", False, [layer], make_report().made.calibration)
    assert made.to_text() == (
        '{"calibration": {"pictures": {"10": 2, "2": 126}, "samples": 128, "seed": 7, "sha256": "' + "ab" * 32 + '", '
        '"source": "scenes <drawn>", "tasks": {"diff <1>": 28, "region": 100}, "text_tokens": 17210, '
        '"visual_tokens": 98112}, "layers": [{"damping": 0.0, "kind": "int8", "name": "lm_head", "output_error": null, '
        '"rtn_output_error": null, "rtn_weight_error": 0.5, "shape": [64, 128], "weight_error": 0.25}], '
        '"mode": "int8", "model": "nano", "rotated": false}'
    )
    assert json.loads(replace(made, layers=[], calibration=None).to_text())["calibration"] is None
    assert Layer(**layer.to_dict()) == layer


# ------------------------------------------------------------------------------------------------------------ charts


def texts(svg: str) -> list[tuple[float, float, str, str]]:
    """(x, y, anchor, words) of every text."""
    found = re.findall(r'<text (?:class="title" )?x="([\d.]+)" y="([\d.]+)"(?: text-anchor="(\w+)")?>(.*?)</text>', svg)
    return [(float(x), float(y), anchor or "start", words) for x, y, anchor, words in found]


def boxes(svg: str) -> list[tuple[float, float, float, float]]:
    """Generous boxes around the words: 6.2 px a letter, 10 px high."""
    made = []
    for x, y, anchor, words in texts(svg):
        width = 6.2 * len(words)
        left = x - {"start": 0.0, "middle": width / 2, "end": width}[anchor]
        made.append((left, y - 9, left + width, y + 1))
    return made


@pytest.mark.parametrize("last", [0, 1, 2, 3, 5, 7, 11, 23, 27, 31, 35, 79, 127])
@pytest.mark.parametrize("values", [(0.02, 0.03), (0.0001, 0.5), (0.05, 0.05), (1e-7, 3.0), (0.011, 0.019)])
def test_words_of_a_chart_neither_collide_nor_leave_it(last, values):
    low, high = bounds(values)
    assert low <= values[0] and values[1] <= high and low < high
    points = [(i, values[i % 2], "hint") for i in range(last + 1)]
    svg = line_chart("self_attn.q_proj", [Line("after", points)], last=last, low=low, high=high, unit="layer")
    placed = boxes(svg)
    assert len(placed) >= 4 and str(last) in [words for *_, words in texts(svg)]
    for i, (x1, y1, x2, y2) in enumerate(placed):
        assert x1 >= -8 and y1 >= 0 and x2 <= 270 and y2 <= 172
        for a1, b1, a2, b2 in placed[:i]:
            assert x2 <= a1 or a2 <= x1 or y2 <= b1 or b2 <= y1, (placed[i], (a1, b1, a2, b2))


def test_heights_are_logarithmic_and_larger_is_higher():
    points = [(0, 0.001, "a"), (1, 0.01, "b"), (2, 0.1, "c"), (3, 0.5, "outside")]
    svg = line_chart("q", [Line("after", points)], last=3, low=0.001, high=0.1, unit="layer")
    heights = [float(y) for y in re.findall(r'cy="([\d.]+)"', svg)]
    columns = [float(x) for x in re.findall(r'cx="([\d.]+)"', svg)]
    assert heights[0] > heights[1] > heights[2] == heights[3]
    assert abs(heights[0] - 2 * heights[1] + heights[2]) < 0.2
    assert all(abs((b - a) - (columns[1] - columns[0])) < 0.2 for a, b in pairwise(columns))
    lines = {y for _, y, anchor, words in texts(svg) if anchor == "end" and words == "1 %"}
    assert len(lines) == 1 and abs(lines.pop() - 3.5 - heights[1]) < 0.2


def test_words_in_charts_are_escaped():
    svg = line_chart("<q>", [Line("after", [(0, 0.01, '<"h">')])], last=0, low=0.001, high=0.1, unit="<u>")
    assert "<q>" not in svg and "<u>" not in svg and '<"h">' not in svg and "&lt;q&gt;" in svg
    assert "<x>" not in shares([("p0", 1.0, "<x>")])


@pytest.mark.parametrize(("share", "width"), [(-1, "0.0%"), (0.5, "50.0%"), (2, "100.0%")])
def test_a_bar_stays_in_its_frame(share, width):
    assert f"width:{width}" in bar("after", share)
