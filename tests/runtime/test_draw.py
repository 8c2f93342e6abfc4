"""The contact sheet: its boxes lie where they should, and no input breaks it."""

import numpy as np
import pytest
from PIL import Image

from migician.runtime.boxes import Box
from migician.runtime.draw import contact_sheet

RED = (230, 25, 75)  # the first colour of the palette


def box(image, xyxy, label="", score=0.0):
    return Box(image, label, xyxy, (0, 0, 0, 0), score)


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
    ],
)
def test_odd_boxes(boxes):
    for size in ((1, 1), (10, 10), (1, 180), (180, 1)):
        assert contact_sheet([gray(*size)], boxes, title="w" * 300).width > 0


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_any_mode(mode):
    assert contact_sheet([Image.new(mode, (30, 20))], [box(0, (1, 1, 9, 9))]).mode == "RGB"
