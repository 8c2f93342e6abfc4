"""Two runs side by side: differences, intervals, flips, gates."""

from pathlib import Path

import pytest
from accuracy_data import INVERTED, RECORDS, truth, write_data

from migician.bench.accuracy.compare import Gate, check_gates, compare, failed_gates, parse_gate
from migician.bench.accuracy.data import read_mig_bench
from migician.bench.accuracy.scoring import score
from migician.runtime.errors import MigicianError

TRUTHS = {i: truth(record) for i, record in enumerate(RECORDS)}


@pytest.fixture
def questions(tmp_path: Path) -> list:
    return read_mig_bench(write_data(tmp_path))


def pair(questions: list, a: dict, b: dict):
    return compare(questions, score(questions, a, y_scale="none"), score(questions, b, y_scale="none"))


def test_a_run_beside_itself(questions: list) -> None:
    comparison = pair(questions, TRUTHS, TRUTHS)
    assert not comparison.flips and comparison.p == 1.0
    for row in comparison.rows.values():
        assert (row.change, row.low, row.high, row.lost, row.won) == (0, 0, 0, 0, 0)
    assert (comparison.unasked, comparison.missing_a, comparison.missing_b) == (0, 0, 0)


def test_lost_and_won(questions: list) -> None:
    a = {**TRUTHS, 4: "no"}
    b = {**TRUTHS, 8: "no", 0: "(0,0),(10,10)"}
    comparison = pair(questions, a, b)
    assert [(f.question.index, f.lost) for f in comparison.flips] == [(0, True), (8, True), (4, False)]
    rows = comparison.rows
    assert (rows["region"].a, rows["region"].b, rows["region"].change) == (100, 50, -50)
    assert (rows["region"].lost, rows["region"].won) == (1, 0)
    assert rows["diff"].change == 100 and rows["diff"].low == rows["diff"].high == 100
    assert rows["common_object"].change == -25
    assert rows["AVE"].change == pytest.approx((100 - 50 - 25) / 10)
    assert rows["pooled"].change == pytest.approx(-100 / 15)
    assert rows["AVE"].low <= rows["AVE"].change <= rows["AVE"].high
    assert (rows["AVE"].lost, rows["AVE"].won) == (rows["pooled"].lost, rows["pooled"].won) == (2, 1)
    assert comparison.p == 1.0  # 2 of 3 tosses: as even as it gets
    line = comparison.json()
    assert line["flips"] == {"lost": [0, 8], "won": [4]}
    assert set(line["tasks"]) == {r["task"] for r in RECORDS}
    assert line["ave"]["change"] == pytest.approx(2.5)


def test_the_interval_is_of_the_paired_difference(tmp_path: Path) -> None:
    records = [{**RECORDS[0], "images": [f"{i}.png"], "answer": [0.0, 0.0, 1.0, 1.0]} for i in range(100)]
    questions = read_mig_bench(write_data(tmp_path, records=records))
    right, wrong = "(0,0),(1000,1000)", "no"
    a = {i: right if i < 50 else wrong for i in range(100)}
    b = {**a, 0: wrong}  # one flip of a hundred: unpaired, both accuracies alone vary by 10 points
    row = pair(questions, a, b).rows["AVE"]
    assert row.change == -1 and row.low >= -4 and row.high <= 0
    comparison = pair(questions, a, {**a, **dict.fromkeys(range(6), wrong)})
    assert comparison.p == pytest.approx(2 / 2**6)


def test_unanswered_questions(questions: list) -> None:
    a = {i: TRUTHS[i] for i in (0, 2, 3, 4)}
    b = {i: TRUTHS[i] for i in (0, 2, 3, 9)}
    comparison = pair(questions, a, b)
    assert comparison.unasked == len(RECORDS) - 5
    assert (comparison.missing_a, comparison.missing_b) == (1, 1)
    assert [(f.question.index, f.lost) for f in comparison.flips] == [(4, True), (9, False)]
    assert set(comparison.rows) == {"common_object", "correspondence", "diff", "region", "AVE", "pooled"}
    with pytest.raises(MigicianError, match="neither run answers"):
        pair(questions, {}, {})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("AVE drop<=1.0", Gate("AVE drop<=1.0", "AVE", True, "<=", 1.0)),
        ("  ave   drop <= 1", Gate("ave drop <= 1", "AVE", True, "<=", 1.0)),
        ("AVE>=60", Gate("AVE>=60", "AVE", False, ">=", 60.0)),
        ("pooled drop < -0.5", Gate("pooled drop < -0.5", "pooled", True, "<", -0.5)),
        ("region > 70.25", Gate("region > 70.25", "region", False, ">", 70.25)),
    ],
)
def test_gates(text: str, expected: Gate) -> None:
    assert parse_gate(text) == expected


@pytest.mark.parametrize(
    "text", ["", "AVE", "AVE drop", "AVE == 3", "AVE drop<=", "AVE drop<=x", "AVE rise>=1", "<= 3"]
)
def test_what_is_no_gate(text: str) -> None:
    with pytest.raises(ValueError, match="is no gate; write"):
        parse_gate(text)


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("AVE drop<=2.5", True),  # exactly
        ("AVE drop<2.5", False),
        ("AVE drop<=2.49", False),
        ("region drop<=0", True),
        ("common_object drop<=20", False),
        ("pooled drop<=6.67", True),
        ("AVE>=92.5", True),
        ("AVE>92.5", False),
        ("diff>=100", True),
    ],
)
def test_gates_hold_or_fail(questions: list, text: str, holds: bool) -> None:
    a, b = TRUTHS, {**TRUTHS, 0: "no"}  # common_object falls from 50 to 25
    result = score(questions, b, y_scale="none")
    failed = failed_gates([parse_gate(text)], result, pair(questions, a, b))
    assert (not failed) is holds
    if failed:
        assert failed[0].startswith(f"gate '{text}' failed: ")


def test_a_gate_without_a_figure_fails(questions: list) -> None:
    result = score(questions[:1], TRUTHS, y_scale="none")
    assert failed_gates([parse_gate("AVE drop<=1")], result, None) == ["gate 'AVE drop<=1' failed: AVE drop is unknown"]
    assert failed_gates([parse_gate("region>=0")], result, None) == ["gate 'region>=0' failed: region is unknown"]


def test_gates_on_what_is_not_asked_are_refused_at_once() -> None:
    check_gates([parse_gate("AVE>=1"), parse_gate("pooled drop<=1"), parse_gate("diff>=1")], {"diff"})
    with pytest.raises(MigicianError, match="no questions of region; choose from AVE, pooled, diff"):
        check_gates([parse_gate("region>=1")], {"diff"})


def test_an_answer_to_a_broken_question_never_flips(questions: list) -> None:
    comparison = pair(questions, TRUTHS, {**TRUTHS, **dict.fromkeys(INVERTED, "no")})
    assert not comparison.flips
