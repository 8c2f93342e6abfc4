"""MIG-Bench's data file and figures: targets, picture groups, accuracies, clean score, named pictures, intervals."""

import json
from pathlib import Path

import numpy as np
import pytest
from accuracy_data import INVERTED, RECORDS, TARGETS, truth, write_answers, write_data

from migician.bench.accuracy.data import (
    fingerprint,
    missing_pictures,
    picture_index,
    picture_order,
    read_answers,
    read_mig_bench,
    select,
)
from migician.bench.accuracy.protocol import TASKS
from migician.bench.accuracy.scoring import RESAMPLES, resample, score
from migician.runtime.errors import MigicianError

TRUTHS = {i: truth(record) for i, record in enumerate(RECORDS)}


@pytest.fixture
def questions(tmp_path: Path) -> list:
    return read_mig_bench(write_data(tmp_path))


# ---- the data file
def test_questions_keep_what_the_file_says(questions: list) -> None:
    assert [q.index for q in questions] == list(range(len(RECORDS)))
    assert [q.question for q in questions] == [record["question"] for record in RECORDS]
    assert "image.  Find" in next(q for q in questions if q.task == "view_diff").question
    assert questions[2].answer == (0.1, 0.2, 1.048, 0.9)
    assert [q.index for q in questions if q.inverted] == INVERTED
    assert {q.task for q in questions if not q.need_format} == {"group_grounding", "object_tracking"}


def test_targets(questions: list) -> None:
    assert [q.target for q in questions] == TARGETS


def test_a_target_beyond_the_pictures_is_none(tmp_path: Path) -> None:
    record = {**RECORDS[0], "question": RECORDS[0]["question"].replace("1th", "9th")}
    unnamed = {**RECORDS[6], "additional_info": "It is somewhere. <|box_start|>(1,1),(2,2)<|box_end|>"}
    assert RECORDS[6]["task"] == "group_grounding"
    assert [q.target for q in read_mig_bench(write_data(tmp_path, records=[record, unnamed]))] == [None, None]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It is in the first image.", 0),
        ("Image-2", 1),
        ("Image3", 2),
        ("Image 4", 3),
        ("the 5th one", 4),
        ("sixth", 5),
        ("the second and the first", 0),  # the order of the tests, not of the words
        ("image-1", -1),  # capitals matter
        ("Image-12", 0),  # a substring test: Image-1 is in it
        ("11th", 0),  # 1th is in it
        ("nowhere", -1),
    ],
)
def test_picture_index(text: str, expected: int) -> None:
    assert picture_index(text) == expected


def test_groups_are_those_of_the_pictures(questions: list) -> None:
    groups = picture_order(questions)
    assert [[q.index for q in group] for group in groups][:2] == [[0, 1, 2, 5], [3]]
    assert sorted(q.index for group in groups for q in group) == list(range(len(RECORDS)))
    assert all(len({q.images for q in group}) == 1 for group in groups)
    assert len(groups) == len({q.images for q in questions})


@pytest.mark.parametrize("layout", ["MIG-Bench/images", "images", "beside", "bare"])
def test_pictures_are_found_where_downloads_put_them(tmp_path: Path, layout: str) -> None:
    home = {"beside": tmp_path / "MIG-Bench"}.get(layout, tmp_path)
    home.mkdir(exist_ok=True)
    path = write_data(home)
    root = {"MIG-Bench/images": home / "MIG-Bench" / "images", "images": home / "images",
            "beside": tmp_path / "MIG-Bench" / "images", "bare": home}[layout]  # fmt: skip
    for record in RECORDS:
        for image in record["images"]:
            file = root.joinpath(*Path(image).parts[2:])
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
    assert not missing_pictures(read_mig_bench(path))


def test_missing_pictures_are_listed_with_their_questions(tmp_path: Path) -> None:
    path = write_data(tmp_path, pictures=True)
    gone = tmp_path / "MIG-Bench/images/object_tracking/4"
    gone.unlink()
    indices = [i for i, record in enumerate(RECORDS) if record["task"] == "object_tracking"]
    assert missing_pictures(read_mig_bench(path)) == {gone: indices}
    elsewhere = read_mig_bench(path, tmp_path / "nowhere")
    assert len(missing_pictures(elsewhere)) == len({image for record in RECORDS for image in record["images"]})


def test_the_fingerprint_is_of_the_questions_not_of_the_place(tmp_path: Path, questions: list) -> None:
    (tmp_path / "other").mkdir()
    assert fingerprint(read_mig_bench(write_data(tmp_path / "other"))) == fingerprint(questions)
    changed = [{**RECORDS[0], "question": "Where? "}, *RECORDS[1:]]
    assert fingerprint(read_mig_bench(write_data(tmp_path, records=changed))) != fingerprint(questions)


def test_select(questions: list) -> None:
    assert [q.index for q in select(questions, tasks=("region",), limit=1)] == [8]
    assert [q.index for q in select(questions, limit=2)] == [0, 1, 3, 4, 6, 7, 8, 9, 10, 11, 12, 13, 14]
    with pytest.raises(MigicianError, match="no question of tracking; choose from common_object, "):
        select(questions, tasks=("region", "tracking"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "give MIG-Bench's MIG_data.json"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("{}", "not a JSON array of questions"),
        ("[]", "not a JSON array of questions"),
        ("[1]", "record 0: not an object"),
        ([{**RECORDS[0], "images": []}], "'images' is not a list of paths"),
        ([{**RECORDS[0], "images": ["../../secret.png"]}], "lies outside the pictures' folder"),
        ([{**RECORDS[0], "images": ["/etc/secret.png"]}], "lies outside the pictures' folder"),
        ([RECORDS[0], {**RECORDS[0], "answer": [0.1, 0.2, 0.3]}], "record 1: 'answer' is not four numbers"),
        ([{**RECORDS[0], "answer": [0.1, 0.2, 0.3, True]}], "'answer' is not four numbers"),
        ([{**RECORDS[0], "answer": [0.1, 0.2, 0.3, float("nan")]}], "'answer' is not four numbers"),
        ([{**RECORDS[0], "question": None}], "'question' is not a text"),
        ([{**RECORDS[0], "task": 3}], "'task' is not a word"),
        ([{**RECORDS[0], "additional_info": 3}], "'additional_info' is not a text"),
    ],
)
def test_data_files_that_are_none(tmp_path: Path, text: object, words: str) -> None:
    path = tmp_path / "data.json"
    if text is not None:
        path.write_text(text if isinstance(text, str) else json.dumps(text))
    with pytest.raises(MigicianError, match=words):
        read_mig_bench(path)


# ---- answers
@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("nothing", "line 2 is not JSON"),
        ("[0]", "line 2 is not an object"),
        ('{"response": "x"}', "line 2: 'index' is not a whole number"),
        ('{"index": true, "response": "x"}', "line 2: 'index' is not a whole number"),
        ('{"index": -1, "response": "x"}', "line 2: 'index' is not a whole number"),
        ('{"index": 1}', "line 2: 'response' is not a text"),
        ('{"index": 99, "response": "x"}', "no question has index 99"),
        ('{"index": 0, "response": "y"}', "question 0 has two different answers"),
    ],
)
def test_answers_that_are_none(tmp_path: Path, questions: list, line: str, words: str) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text('{"index": 0, "response": "x"}\n' + line + '\n{"index": 2, "response": "x"}\n')
    with pytest.raises(MigicianError, match=words):
        read_answers(path, questions)


def test_answers_may_repeat_and_errors_are_none(tmp_path: Path, questions: list) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text(
        '{"index": 3, "response": "x", "seconds": 1}\n\n{"index": 3, "response": "x"}\n'
        '{"index": 4, "response": "", "error": "no picture"}\n{"index": 5, "resp'
    )
    assert read_answers(path, questions) == {3: "x"}


# ---- figures
def test_the_truth_scores_all_but_what_cannot(questions: list) -> None:
    result = score(questions, TRUTHS, y_scale="none")
    assert [r.index for r in result.records if not r.correct] == INVERTED == result.excluded
    assert result.tasks["common_object"].accuracy == pytest.approx({0.7: 50, 0.5: 50, 0.3: 50})
    assert result.ave() == pytest.approx((9 * 100 + 50) / 10)  # each task counts alike
    assert result.pooled == pytest.approx(100 * 13 / 15)  # each question does
    assert list(result.tasks) == list(TASKS)  # the paper's order
    clean = result.clean()
    assert clean.ave() == 100 and len(clean.records) == 13 and clean.excluded == []
    assert result.tasks["common_object"].json() == {
        "n": 4, "acc@0.7": 50.0, "acc@0.5": 50.0, "acc@0.3": 50.0, "mean_iou": 0.5, "unparsed": 0,
    }  # fmt: skip


def test_the_y_scaling_costs_the_truth(questions: list) -> None:
    result = score(questions, TRUTHS, y_scale="published")
    wrong = {r.index for r in result.records if not r.correct}
    # view_diff: 0.722..0.816 becomes 0.758..0.898, 58 of 176; the flat box of object_tracking: 0.525..0.605, 25 of 105.
    assert wrong == {*INVERTED, 10, 13}
    by_index = {r.index: r for r in result.records}
    assert by_index[10].box == pytest.approx((0.383, 0.758, 0.603, 0.898))
    assert by_index[10].iou == pytest.approx(58 / 176)
    assert by_index[13].iou == pytest.approx(25 / 105)
    assert result.tasks["view_diff"].accuracy == {0.7: 0, 0.5: 0, 0.3: 100}


def test_thresholds_count_what_is_equal_to_them(questions: list) -> None:
    half = {9: "[0.1, 0.1, 0.2, 0.2]"}  # region's 0.1..0.3 by 0.1..0.2: exactly half
    (record,) = score([questions[9]], half, y_scale="none").records
    assert record.iou == pytest.approx(0.5)
    exact = {0: "(0,0),(500,1000)"}
    whole = [{**RECORDS[0], "answer": [0.0, 0.0, 1.0, 1.0]}]
    result = score(_read(whole, questions), exact, y_scale="none")
    assert result.records[0].iou == 0.5 and result.records[0].correct
    assert result.tasks["common_object"].accuracy == {0.7: 0, 0.5: 100, 0.3: 100}


def _read(records: list, like: list) -> list:
    from dataclasses import replace

    return [replace(q, answer=tuple(r["answer"])) for r, q in zip(records, like, strict=False)]


def test_missing_answers_are_wrong_and_told_from_unreadable_ones(questions: list) -> None:
    answers = {0: "no idea", 2: TRUTHS[2]}
    result = score(questions[:3], answers, y_scale="none")
    figures = result.tasks["common_object"]
    assert (figures.n, figures.unparsed, figures.missing) == (3, 1, 1)
    assert figures.accuracy[0.5] == pytest.approx(100 / 3)
    assert result.missing == [1]


def test_which_picture_an_answer_names(questions: list) -> None:
    box = "(241,378),(447,621)"
    said = {
        f"It is in the third image. {box}": 2,
        f"Image-3: {box}": 2,
        f"{box} in the second image": 1,
        f"In the last image: {box}": 2,
        f"The first image, {box}; the third image, (1,2),(3,4)": 0,  # the first box counts
        "Image-2: [241, 378, 447, 621]": 1,  # whatever the box's form
        "Image-2 <box>241 378 447 621</box>": 1,
        box: None,
        "It is in the third image.": None,  # no box
        f"It is in the seventh image. {box}": None,  # there are three
    }
    group = [q for q in questions if q.task == "group_grounding"]
    for response, expected in said.items():
        (record,) = score(group, {group[0].index: response}, y_scale="none").records
        assert record.named == expected, response
    result = score(group, {group[0].index: f"It is in the third image. {box}"}, y_scale="none")
    assert (result.tasks["group_grounding"].named, result.tasks["group_grounding"].named_right) == (1, 1)
    result = score(group, {group[0].index: f"It is in the first image. {box}"}, y_scale="none")
    assert (result.tasks["group_grounding"].named, result.tasks["group_grounding"].named_right) == (1, 0)
    assert result.tasks["group_grounding"].accuracy[0.5] == 100  # the benchmark does not ask which picture
    diff = [q for q in questions if q.task == "diff"]
    (record,) = score(diff, {diff[0].index: f"In the first image: {box}"}, y_scale="none").records
    assert record.named is None  # either is right


def test_an_unknown_scaling_is_refused(questions: list) -> None:
    with pytest.raises(ValueError, match="take published or none"):
        score(questions, {}, y_scale="raw")


# ---- intervals
def test_intervals_hold_the_value_and_repeat(questions: list) -> None:
    answers = {**TRUTHS, 0: "no", 9: "no"}
    result = score(questions, answers, y_scale="none")
    intervals = result.intervals()
    assert set(intervals) == {*result.tasks, "AVE", "pooled"}
    low, high = intervals["AVE"]
    assert low <= result.ave() <= high
    assert intervals == result.intervals()
    assert intervals["diff"] == (100, 100)


def test_resampling_draws_picture_groups(tmp_path: Path) -> None:
    def spread(pictures: int) -> float:
        """Of the mean of 40 questions, half right, asked about so many sets of pictures."""
        records = [
            {**RECORDS[0], "images": [f"{i * pictures // 40}.png"], "answer": [0.0, 0.0, 1.0, 1.0]} for i in range(40)
        ]
        asked = read_mig_bench(write_data(tmp_path, records=records))
        answers = {i: "(0,0),(1000,1000)" if i < 20 else "no" for i in range(40)}
        draws = resample(score(asked, answers, y_scale="none").records, lambda r: 100.0 * r.correct)
        assert draws["pooled"].shape == (RESAMPLES,)
        np.testing.assert_allclose(draws["pooled"], draws["AVE"])  # one task
        return float(draws["pooled"].std())

    # The deviation of a mean of n draws of a coin: 50 / sqrt(n). Questions about the same pictures are one draw.
    assert spread(40) == pytest.approx(50 / 40**0.5, rel=0.1)
    assert spread(10) == pytest.approx(50 / 10**0.5, rel=0.1)


def test_write_answers_is_what_read_answers_reads(tmp_path: Path, questions: list) -> None:
    assert read_answers(write_answers(tmp_path / "a.jsonl", TRUTHS, seconds=1.5), questions) == TRUTHS
