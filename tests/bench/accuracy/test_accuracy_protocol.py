"""MIG-Bench's protocol: prompt, reading of boxes with every quirk, y-scaling, IoU, the paper's table.

Every expectation is derived by hand from the rules of Migician's eval/utils.py and eval/MIG_bench_eval.py; the reason
stands beside it.
"""

from statistics import fmean

import pytest

from migician.bench.accuracy.protocol import (
    FORMAT,
    MAX_NEW_TOKENS,
    PAPER,
    TASKS,
    direct_prompt,
    first_box,
    iou,
    paper_ave,
    read_boxes,
    scale_y,
)

B = (0.1, 0.2, 0.3, 0.4)  # (100,200),(300,400)
C = (0.5, 0.6, 0.7, 0.8)
SCALED = (0.1, 0.21, 0.3, 0.44)  # B: 0.2 * 1.05, 0.4 * 1.10

# (answer, expression that reads it, boxes, first box y-scaled, why)
ANSWERS = [
    # ---- 1: (x1,y1),(x2,y2) in whole numbers
    ("(100,200),(300,400)", 1, [B], SCALED, "the usual answer"),
    ("(100, 200), (300, 400)", 1, [B], SCALED, r"\s* after each comma"),
    ("(100,\n200),\t(300,  400)", 1, [B], SCALED, r"\s is any white space"),
    ("(100,200)(300,400)", 0, [], None, "the comma between the points is required"),
    ("(100,200) ,(300,400)", 0, [], None, "no space before a comma"),
    ("( 100,200),(300,400)", 0, [], None, "no space behind a parenthesis"),
    ("(100 ,200),(300,400)", 0, [], None, "no space before a comma inside a point either"),
    ("(-100,200),(300,400)", 0, [], None, "no sign"),
    ("(+100,200),(300,400)", 0, [], None, "no sign"),
    ("((100,200),(300,400))", 1, [B], SCALED, "found anywhere, so inside parentheses"),
    ("It's in the third image. (100,200),(300,400)", 1, [B], SCALED, "words around it do not matter"),
    ("(100,200),(300,400).", 1, [B], SCALED, "nor does a full stop"),
    ("(100,200),(300,400),(500,600),(700,800)", 1, [B, C], B, "two boxes in a row; several are never y-scaled"),
    ("(100,200),(300,400) (500,600),(700,800)", 1, [B, C], B, "the first of several counts, unscaled"),
    ("(100,200),(300,400)\n(100,200),(300,400)", 1, [B, B], B, "the same box twice is several"),
    ("(100,200),(300,400),(500,600)", 1, [B], SCALED, "a point too many is left over: one box"),
    ("(100,200),(300", 0, [], None, "cut off at the token limit"),
    ("(100,200)", 0, [], None, "a point is no box"),
    ("(100,200,300,400)", 0, [], None, "whole numbers in one pair of parentheses match nothing: 4 wants decimals"),
    ("(000,007),(010,0400)", 1, [(0.0, 0.007, 0.01, 0.4)], (0.0, 0.007, 0.01, 0.44), "leading zeros; 0.00735 to 3"),
    # ---- tags: the published evaluation decodes without special tokens
    ("<|box_start|>(100,200),(300,400)<|box_end|>", 1, [B], SCALED, "tags are not seen"),
    ("<|box_start|>(100,200),(300,400)<|box_start|>", 1, [B], SCALED, "nor the wrong closing tag of the format"),
    ("<|box_start|>(100,200)<|box_end|>,<|box_start|>(300,400)<|box_end|>", 1, [B], SCALED, "nor those between points"),
    ("<|object_ref_start|>a cup<|object_ref_end|><|box_start|>(100,200),(300,400)<|box_end|><|im_end|>", 1, [B], SCALED,
     "nor those of a reference, nor the end of the turn"),
    ("<|note|>(100,200),(300,400)", 1, [B], SCALED, "what only looks like a tag stays, and does not matter here"),
    ("(100,<|note|>200),(300,400)", 0, [], None, "but inside a point it does"),
    ("(<|box_start|>100,200),(300,400)", 1, [B], SCALED, "a real tag inside a point is gone"),
    # ---- single box: from 1 on a number is thousandths
    ("(0,0),(1000,1000)", 1, [(0.0, 0.0, 1.0, 1.0)], (0.0, 0.0, 1.0, 0.999), "1000 is 1; y2 stops at 0.999"),
    ("(0,0),(1,1)", 1, [(0.0, 0.0, 0.001, 0.001)], (0.0, 0.0, 0.001, 0.001), "quirk: a single 1 is 0.001; 0.0011 to 3"),
    ("(1,1),(999,999)", 1, [(0.001, 0.001, 0.999, 0.999)], (0.001, 0.001, 0.999, 0.999), "0.00105 to 3 is 0.001"),
    ("(0,0),(2,2)", 1, [(0.0, 0.0, 0.002, 0.002)], (0.0, 0.0, 0.002, 0.002), "0.0022 to 3"),
    ("(100,200),(300,1500)", 1, [(0.1, 0.2, 0.3, 1.5)], (0.1, 0.21, 0.3, 0.999), "pixels beyond 1000 stay beyond 1"),
    ("(100,980),(300,990)", 1, [(0.1, 0.98, 0.3, 0.99)], (0.1, 0.999, 0.3, 0.999), "both ends of y at the limit"),
    ("(300,200),(100,400)", 1, [(0.3, 0.2, 0.1, 0.4)], (0.3, 0.21, 0.1, 0.44), "corners out of order are not swapped"),
    # ---- several boxes: only above 1 is a number thousandths
    ("(0,0),(1,1) (100,200),(300,400)", 1, [(0.0, 0.0, 1.0, 1.0), B], (0.0, 0.0, 1.0, 1.0), "quirk: here 1 stays 1"),
    ("(0,0),(2,2) (100,200),(300,400)", 1, [(0.0, 0.0, 0.002, 0.002), B], (0.0, 0.0, 0.002, 0.002), "2 is thousandths"),
    ("[1.0, 1.0, 1.0, 1.0][0.1, 0.2, 0.3, 0.4]", 2, [(1.0, 1.0, 1.0, 1.0), B], (1.0, 1.0, 1.0, 1.0), "1.0 stays 1"),
    # ---- 2: [x1, y1, x2, y2] in decimals
    ("[0.1, 0.2, 0.3, 0.4]", 2, [B], SCALED, "fractions as they are"),
    ("[0.1,0.2,0.3,0.4]", 2, [B], SCALED, r"\s* is optional"),
    ("[[0.1, 0.2, 0.3, 0.4]]", 2, [B], SCALED, "a list in a list"),
    ("[0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.8]", 2, [B, C], B, "several: unscaled"),
    ("[100.0, 200.0, 300.0, 400.0]", 2, [B], SCALED, "decimals from 1 on are thousandths"),
    ("[0.0, 0.0, 1.0, 1.0]", 2, [(0.0, 0.0, 0.001, 0.001)], (0.0, 0.0, 0.001, 0.001), "quirk: a single 1.0 is 0.001"),
    ("[0.1, 0.2, 0.3, 1]", 0, [], None, "mixed: 2 wants decimals, 5 whole numbers"),
    ("[.1, .2, .3, .4]", 0, [], None, "a digit before the point is required"),
    ("[0.1 0.2 0.3 0.4]", 0, [], None, "commas are required"),
    ("[0.1, 0.2, 0.3]", 0, [], None, "four numbers"),
    ("[0.1, 0.2, 0.3, 0.4, 0.5]", 0, [], None, "not five"),
    ("[10%, 20%, 30%, 40%]", 0, [], None, "no percent signs"),
    # ---- 3: (x1,y1),(x2,y2) in decimals
    ("(0.1,0.2),(0.3,0.4)", 3, [B], SCALED, "fractions"),
    ("(0.1, 0.2),(0.3, 0.4)", 0, [], None, "quirk: no spaces in this one"),
    ("(0.1, 0.2),(0.3,0.4)", 0, [], None, "quirk: nor in the first point alone"),
    ("(0.1,0.2),(0.3, 0.4)", 0, [], None, "quirk: nor in the second"),
    ("(0.1,0.2), (0.3,0.4)", 0, [], None, "quirk: nor between the points"),
    ("(0.1,0.2),(0.3,0.4)(0.5,0.6),(0.7,0.8)", 3, [B, C], B, "several: unscaled"),
    ("(100.0,200.0),(300.0,400.0)", 3, [B], SCALED, "thousandths with a decimal point"),
    ("(0.1,200),(0.3,400)", 0, [], None, "mixed: 1 wants whole numbers, 3 decimals"),
    # ---- 4: (x1, y1, x2, y2) in decimals
    ("(0.1, 0.2, 0.3, 0.4)", 4, [B], SCALED, "fractions"),
    ("(0.1,0.2,0.3,0.4)", 4, [B], SCALED, r"\s* is optional"),
    ("(0.1, 0.2, 0.3, 0.4) or (0.5, 0.6, 0.7, 0.8)", 4, [B, C], B, "several: unscaled"),
    # ---- 5: [x1, y1, x2, y2] in whole numbers
    ("[100, 200, 300, 400]", 5, [B], SCALED, "thousandths"),
    ("[[100,200,300,400]]", 5, [B], SCALED, "InternVL2's list in a list"),
    ("<box>[100, 200, 300, 400]</box>", 5, [B], SCALED, "in box tags too"),
    ("[100, 200, 300, 400] [500, 600, 700, 800]", 5, [B, C], B, "several: unscaled"),
    ("[0, 0, 1, 1]", 5, [(0.0, 0.0, 0.001, 0.001)], (0.0, 0.0, 0.001, 0.001), "quirk: a single 1 is 0.001"),
    ("[0, 0, 1, 1] [0, 0, 1, 1]", 5, [(0.0, 0.0, 1.0, 1.0)] * 2, (0.0, 0.0, 1.0, 1.0), "quirk: twice, 1 is the side"),
    ("[ 100, 200, 300, 400 ]", 0, [], None, "no space inside the brackets"),
    # ---- 6: <box>x1 y1 x2 y2</box>
    ("<box>100 200 300 400</box>", 6, [B], SCALED, "MiniCPM's"),
    ("<box>100  200\n300 400</box>", 6, [B], SCALED, r"\s+ between the numbers"),
    ("<box>100 200 300 400</box><box>500 600 700 800</box>", 6, [B, C], B, "several: unscaled"),
    ("<box> 100 200 300 400 </box>", 0, [], None, "no space inside the tags"),
    ("<box>100,200,300,400</box>", 0, [], None, "commas are not white space"),
    ("<BOX>100 200 300 400</BOX>", 0, [], None, "capitals are others"),
    # ---- the order of the expressions
    ("[0.5, 0.6, 0.7, 0.8] (100,200),(300,400)", 1, [B], SCALED, "1 before 2, wherever they stand"),
    ("[500, 600, 700, 800] [0.1, 0.2, 0.3, 0.4]", 2, [B], SCALED, "2 before 5"),
    ("(0.5, 0.6, 0.7, 0.8) (0.1,0.2),(0.3,0.4)", 3, [B], SCALED, "3 before 4"),
    ("[500, 600, 700, 800] (0.1, 0.2, 0.3, 0.4)", 4, [B], SCALED, "4 before 5"),
    ("<box>500 600 700 800</box> [100, 200, 300, 400]", 5, [B], SCALED, "5 before 6"),
    ("(100,200),(300,400) [0.5, 0.6, 0.7, 0.8]", 1, [B], SCALED, "boxes of another form do not count as several"),
    # ---- no box at all
    ("", 0, [], None, "nothing"),
    ("There is no such object.", 0, [], None, "words only"),
    ("x1=100, y1=200, x2=300, y2=400", 0, [], None, "no parentheses"),
    ("(x1,y1),(x2,y2)", 0, [], None, "the format itself"),
    ('{"bbox_2d": [100, 200, 300, 400]}', 5, [B], SCALED, "Qwen2.5's JSON matches 5"),
    ("（100，200），（300，400）", 0, [], None, "other parentheses"),
]  # fmt: skip


def test_the_table_is_as_long_as_it_says() -> None:
    assert len(ANSWERS) >= 60
    assert {form for _, form, *_ in ANSWERS} == set(range(7))


@pytest.mark.parametrize(("text", "form", "boxes", "scaled", "why"), ANSWERS, ids=[a[0][:40] for a in ANSWERS])
def test_answers(text: str, form: int, boxes: list, scaled: tuple | None, why: str) -> None:
    reading = read_boxes(text)
    assert reading.form == form, why
    assert len(reading.boxes) == len(reading.spans) == len(boxes), why
    for found, expected in zip(reading.boxes, boxes, strict=True):
        assert found == pytest.approx(expected, abs=1e-12), why
    raw, stretched = first_box(reading, "none"), first_box(reading, "published")
    if not boxes:
        assert raw is stretched is None, why
    else:
        assert raw == pytest.approx(boxes[0], abs=1e-12), why
        assert stretched == pytest.approx(scaled, abs=1e-12), why


def test_prompt_byte_for_byte() -> None:
    question = "These images share one object in common. Recognize and locate this object in the 1th image. "
    assert direct_prompt(question).encode() == (
        b"These images share one object in common. Recognize and locate this object in the 1th image. "
        b"Format:<|box_start|>(x1,y1),(x2,y2)<|box_start|>. Don't generate addtional words."
    )
    assert direct_prompt("find <|object_ref_start|>a cup<|object_ref_end|>.").endswith("<|object_ref_end|>." + FORMAT)
    assert MAX_NEW_TOKENS == 128


@pytest.mark.parametrize(
    ("box", "expected", "why"),
    [
        ((0.1, 0.2, 0.3, 0.4), (0.1, 0.21, 0.3, 0.44), "5 % and 10 %, x as it is"),
        ((0.1234, 0.1234, 0.1234, 0.1234), (0.1234, 0.13, 0.1234, 0.136), "y alone is rounded to 3 places"),
        ((0.0, 0.0, 1.0, 1.0), (0.0, 0.0, 1.0, 0.999), "at most 0.999"),
        ((0.0, 0.97, 1.0, 0.98), (0.0, 0.999, 1.0, 0.999), "1.0185 and 1.078 both end there"),
        ((0.0, 1.5, 1.0, 2.0), (0.0, 0.999, 1.0, 0.999), "beyond the picture too"),
    ],
)
def test_y_scaling(box: tuple, expected: tuple, why: str) -> None:
    assert scale_y(box) == pytest.approx(expected, abs=1e-12), why


@pytest.mark.parametrize(
    ("a", "b", "expected", "why"),
    [
        ((0.0, 0.0, 1.0, 1.0), (0.0, 0.0, 1.0, 1.0), 1.0, "the same"),
        ((0.0, 0.0, 1.0, 1.0), (0.0, 0.0, 0.5, 1.0), 0.5, "half of it"),
        ((0.0, 0.0, 0.5, 0.5), (0.25, 0.25, 0.75, 0.75), 0.0625 / 0.4375, "no one is added to sides"),
        ((0.0, 0.0, 0.4, 0.4), (0.4, 0.0, 0.8, 0.4), 0.0, "touching"),
        ((0.0, 0.0, 0.4, 0.4), (0.6, 0.6, 0.8, 0.8), 0.0, "apart along both axes: no product of two negatives"),
        ((0.4, 0.0, 0.2, 1.0), (0.0, 0.0, 1.0, 1.0), 0.0, "x out of order"),
        ((0.0, 0.0, 1.0, 1.0), (0.0, 0.8, 1.0, 0.2), 0.0, "y out of order"),
        ((0.4, 0.4, 0.2, 0.2), (0.4, 0.4, 0.2, 0.2), 0.0, "both inverted: still nothing"),
        ((0.5, 0.5, 0.5, 0.5), (0.5, 0.5, 0.5, 0.5), 0.0, "points: the original divides by zero here"),
        ((0.0, 0.0, 1e-200, 1e-200), (0.0, 0.0, 1e-200, 1e-200), 0.0, "areas too small for a float"),
        ((0.0, 0.0, 1.048, 1.0), (0.0, 0.0, 1.0, 1.0), 1 / 1.048, "beyond the picture is not cut off"),
        ((0.0, 0.0, 1.0, 1.0), (0.0, 0.0, float("inf"), 1.0), 0.0, "a number with 400 digits"),
    ],
)
def test_iou(a: tuple, b: tuple, expected: float, why: str) -> None:
    assert iou(a, b) == pytest.approx(expected, abs=1e-12), why
    assert iou(b, a) == pytest.approx(expected, abs=1e-12), why


def test_a_number_with_very_many_digits_is_no_crash() -> None:
    reading = read_boxes(f"(0,0),({'9' * 400},1)")
    box = first_box(reading, "published")
    assert box is not None and iou((0.0, 0.0, 1.0, 1.0), box) == 0.0


def test_the_papers_table_has_the_published_averages() -> None:
    assert len(TASKS) == 10
    for name, row in PAPER.items():
        assert len(row) == 10, name
        off = 0.86 if name == "LLaVA-OV-72B" else 0.006  # printed with an average that is not its cells' mean
        assert fmean(row) == pytest.approx(paper_ave(name), abs=off), name
    assert dict(zip(TASKS, PAPER["Migician-7B"], strict=True))["region"] == 74.31
