"""The contact sheet: its boxes lie where they should, and no input breaks it."""

import numpy as np
import pytest
from fontfile import make_font
from PIL import Image

from migician.runtime.boxes import Box, Point
from migician.runtime.draw import _wrap, contact_sheet
from migician.runtime.fonts import Lettering

RED = (230, 25, 75)  # the first colour of the palette


def box(image, xyxy, label="", score=0.0):
    return Box(image, label, xyxy, (0, 0, 0, 0), score)


def point(image, xy, label="", score=0.0):
    return Point(image, label, xy, (0, 0), score)


def gray(*size):
    return Image.new("RGB", size, (128, 128, 128))


def test_a_box_is_drawn_on_its_own_picture():
    sheet = np.asarray(contact_sheet([gray(200, 200), gray(200, 200)], [box(1, (50, 50, 150, 100))]))
    picture = (sheet == 128).all(-1)
    columns = np.flatnonzero(picture.any(0))
    middle = (columns[0] + columns[-1]) // 2
    rows, cols = np.nonzero((sheet == RED).all(-1))
    assert len(rows) and cols.min() > middle
    left, right = columns[columns > middle][0], columns[-1]
    top, bottom = np.flatnonzero(picture.any(1))[[0, -1]]
    scale = (right - left + 1) / 200
    assert cols.min() == pytest.approx(left + 50 * scale, abs=3)
    assert cols.max() == pytest.approx(left + 150 * scale, abs=3)
    assert rows.min() == pytest.approx(top + 50 * (bottom - top + 1) / 200, abs=3)
    assert rows.max() == pytest.approx(top + 100 * (bottom - top + 1) / 200, abs=3)


def test_small_pictures_are_enlarged_and_large_ones_reduced():
    for size in ((60, 60), (3000, 3000)):
        sheet = np.asarray(contact_sheet([gray(*size)], []))
        widest = np.flatnonzero((sheet == 128).all(-1).any(0))
        assert 300 < len(widest) < 700


def test_labels_and_titles_change_the_sheet():
    plain = contact_sheet([gray(200, 200)], [box(0, (50, 80, 150, 150))])
    labelled = contact_sheet([gray(200, 200)], [box(0, (50, 80, 150, 150), "the cup", 0.93)])
    titled = contact_sheet([gray(200, 200)], [box(0, (50, 80, 150, 150))], title="<|box_start|>Where is it? " * 12)
    assert plain.size == labelled.size and plain.tobytes() != labelled.tobytes()
    assert titled.width == plain.width and titled.height > plain.height + 60  # wrapped over several lines


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 7, 12, 40])
def test_any_number_of_pictures(count):
    sheet = contact_sheet([gray(20, 20)] * count, [box(count - 1, (1, 1, 9, 9), "x")] if count else [], title="x")
    assert sheet.mode == "RGB" and sheet.width < 2500


@pytest.mark.parametrize(
    "boxes",
    [
        [box(5, (0, 0, 5, 5))],
        [box(0, (0, 0, 0, 0), "a point", 1.0)],
        [box(0, (-50, -50, 900, 900), "too large")],
        [box(0, (0, 0, 3, 3), "words " * 60, 0.5)],
        [box(0, (0, 0, 3, 3), "日本語 \U0001f600", 0.5)],
        [box(0, (1, 1, 9, 9), f"label {i}") for i in range(30)],
        [box(0, (1, 1, 9, 9), "two\nlines\x00\x1b[0m\t\u202e\u2028")],
        [box(0, (1, 1, 9, 9), "\ud83d half a letter")],
        [box(0, (1, 1, 9, 9), "x" * 200_000), box(0, (1, 1, 9, 9), "杯" * 200_000)],
    ],
)
def test_odd_boxes(boxes):
    for size in ((1, 1), (10, 10), (1, 180), (180, 1)):
        assert contact_sheet([gray(*size)], boxes, title="w" * 300).width > 0


@pytest.mark.parametrize("title", ["word " * 40_000, "w" * 200_000, "杯子" * 100_000, "a\nb\n" * 9_000])
def test_a_long_title_is_cut(title):
    plain, titled = contact_sheet([gray(200, 200)], []), contact_sheet([gray(200, 200)], [], title=title)
    assert plain.height + 60 < titled.height < plain.height + 8 * 32 + 20


def test_chinese_fills_its_lines(monkeypatch, tmp_path):
    """It has no spaces to cut at: a line ends where it is full, after Latin words as well."""
    monkeypatch.setenv("MIGICIAN_FONT", str(make_font(tmp_path / "block.ttf", "杯子")))
    lettering = Lettering(24)
    lines = _wrap("Where is " + "杯子" * 30, lettering, 432)
    assert "".join(lines) == "Where is " + "杯子" * 30
    assert all(432 - 24 < lettering.length(line) <= 432 for line in lines[:-1])
    assert _wrap("the cup and the saucer", lettering, 120) == ["the cup", "and the", "saucer"]


def test_labels_of_other_scripts_are_drawn(monkeypatch, tmp_path):
    monkeypatch.setenv("MIGICIAN_FONT", str(make_font(tmp_path / "block.ttf", "杯子")))
    sheet = np.asarray(contact_sheet([gray(200, 200)], [box(0, (50, 80, 150, 150), "杯子 cup", 0.5)], title="杯子"))
    ink = (sheet == (29, 33, 41)).all(-1)[:60]  # the title: two blocks
    assert ink.sum() == pytest.approx(2 * (24 * 0.8) ** 2, rel=0.15)
    rows, columns = np.nonzero((sheet == RED).all(-1))
    patch = sheet[rows.min() : rows.max(), columns.min() : columns.max()]
    assert ((patch == 255).all(-1)).sum() > 2 * 13**2  # white blocks on the label's red


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_any_mode(mode):
    assert contact_sheet([Image.new(mode, (30, 20))], [box(0, (1, 1, 9, 9))]).mode == "RGB"


def test_a_point_is_a_cross_on_its_own_picture():
    plain = np.asarray(contact_sheet([gray(200, 200), gray(200, 200)], []))
    sheet = np.asarray(contact_sheet([gray(200, 200), gray(200, 200)], [], points=[point(1, (50, 150))]))
    assert sheet.shape == plain.shape
    rows, cols = np.nonzero((plain == 128).all(-1))
    left, right = np.unique(cols)[[0, -1]]
    side = rows.max() - rows.min() + 1
    x, y = right + 1 - side * 150 // 200, rows.min() + side * 150 // 200
    rows, cols = np.nonzero((sheet == RED).all(-1))
    assert (cols.min() + cols.max()) / 2 == pytest.approx(x, abs=2)
    assert (rows.min() + rows.max()) / 2 == pytest.approx(y, abs=2)
    arms = (sheet[rows.min() : rows.max() + 1, cols.min() : cols.max() + 1] == RED).all(-1)
    middle = arms.shape[0] // 2, arms.shape[1] // 2
    assert arms[middle[0]].all() and arms[:, middle[1]].all() and not arms[0, 0] and not arms[-1, -1]
    changed = np.unique(np.nonzero((sheet != plain).any(-1))[1])
    assert changed.min() > (left + right) / 2


def test_points_have_labels_and_colours_beside_boxes():
    boxes, points = [box(0, (20, 20, 90, 90), "the cup")], [point(0, (150, 150), "the tab", 0.5)]
    sheet = np.asarray(contact_sheet([gray(200, 200)], boxes, points=points))
    first, second = (np.array(c) for c in (RED, (10, 124, 255)))
    assert (sheet == first).all(-1).any() and (sheet == second).all(-1).any()
    assert contact_sheet([gray(200, 200)], boxes).tobytes() != sheet.tobytes()


@pytest.mark.parametrize("where", [(0, 0), (10, 10), (-5, 400), (1e6, 1e6)])
def test_odd_points(where):
    for size in ((1, 1), (10, 10), (1, 180), (180, 1)):
        marks = [point(0, where, "words " * 60, 0.5), point(7, where)]
        assert contact_sheet([gray(*size)], [], points=marks, title="x").width > 0
