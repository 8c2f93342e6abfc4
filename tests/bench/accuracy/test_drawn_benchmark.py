"""The drawn benchmark: held-out questions in MIG-Bench's layout, for the code that scores the published data."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from migician.bench.accuracy.data import picture_order, read_mig_bench
from migician.bench.accuracy.scoring import score
from migician.calib.scenes import TASKS, held_out, mig_bench
from migician.calib.scenes.mig_bench import write_mig_bench
from migician.runtime.errors import ModelFileError

PER_TASK = 3


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mig_bench(tmp_path_factory.mktemp("drawn") / "set", PER_TASK)


@pytest.fixture(scope="module")
def records(data: Path) -> list[dict[str, Any]]:
    return json.loads(data.read_text("utf-8"))


@pytest.fixture(scope="module")
def asked() -> list:
    return [item for task in TASKS for item in held_out(task, PER_TASK)]


def test_they_are_the_held_out_questions(records, asked):
    assert [r["task"] for r in records] == [task for task in TASKS for _ in range(PER_TASK)]
    assert [r["question"] for r in records] == [item.question.text for item in asked]
    for record, item in zip(records, asked, strict=True):
        assert list(record) == ["task", "images", "question", "answer", "additional_info", "need_format"]
        truth = item.question.meta["box"]
        assert all(abs(a - b) <= 0.0005 for a, b in zip(record["answer"], truth, strict=True))
        assert all(v == round(v, 3) and 0 <= v <= 1 for v in record["answer"])


def test_the_pictures_are_those_of_the_scenes(data, records, asked):
    for record, item in zip(records, asked, strict=True):
        assert len(record["images"]) == len(item.scene["images"])
        for name, picture in zip(record["images"], item.scene["images"], strict=True):
            with Image.open(data.parent / name) as file:
                assert np.array_equal(np.array(file), picture)
    written = {str(path.relative_to(data.parent)) for path in data.parent.rglob("*") if path.is_file()}
    assert written == {"MIG_data.json", *(name for record in records for name in record["images"])}


def test_flags_and_notes_are_the_benchmarks(records):
    for record in records:
        task, info = record["task"], record["additional_info"]
        assert record["need_format"] is (task not in ("group_grounding", "object_tracking"))
        if task == "group_grounding":
            assert info in {f"It is in the {nth} image." for nth in ("first", "second", "third")}
        elif task == "reasoning":
            assert "Image-2" in info and record["question"] == f"{info} Find it and locate it in the second image. "
        else:
            assert info == ""


def test_the_reader_finds_pictures_and_targets(data, asked):
    questions = read_mig_bench(data)
    assert all(image.is_file() for q in questions for image in q.images)
    assert [q.target for q in questions] == [item.question.meta["image"] for item in asked]
    assert len({q.target for q in questions}) == 3


def test_questions_about_the_same_pictures_stand_together(data):
    questions = read_mig_bench(data)
    groups = picture_order(questions)
    assert [q.index for group in groups for q in group] == list(range(len(questions)))
    assert len(TASKS) < len(groups) < len(questions)
    assert max(map(len, groups)) == 2


def test_right_answers_score_everything(data, asked):
    questions = read_mig_bench(data)
    answers = {q.index: item.question.answer for q, item in zip(questions, asked, strict=True)}
    result = score(questions, answers, y_scale="none")
    assert sorted(result.tasks) == sorted(TASKS)
    assert result.ave(0.7) == 100.0 and not result.excluded
    assert score(questions, answers, y_scale="published").ave(0.7) < 100.0  # what its quirk costs


def test_fewer_questions_are_the_beginning_and_the_same_bytes(tmp_path, data, records):
    few = write_mig_bench(tmp_path / "few", 1, tasks=("region", "diff"))
    again = json.loads(few.read_text("utf-8"))
    assert again == [next(r for r in records if r["task"] == task) for task in ("region", "diff")]
    name = again[0]["images"][0]
    assert (few.parent / name).read_bytes() == (data.parent / name).read_bytes()


def test_a_folder_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(mig_bench, "_additional_info", stop)
    with pytest.raises(KeyboardInterrupt):
        write_mig_bench(tmp_path / "set", 1, tasks=("region",))
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    (tmp_path / "empty").mkdir()
    assert write_mig_bench(tmp_path / "empty", 1, tasks=("region",)).is_file()
    with pytest.raises(ModelFileError, match="choose another folder"):
        write_mig_bench(tmp_path / "empty", 1, tasks=("region",))


@pytest.mark.parametrize(
    ("per_task", "tasks", "message"),
    [(1, ("single",), "'single'"), (1, ("regions", "diff"), "'regions'"), (1, (), "no task"), (0, TASKS, "at least 1")],
)
def test_what_cannot_be_written_is_refused(tmp_path, per_task, tasks, message):
    with pytest.raises(ValueError, match=message):
        write_mig_bench(tmp_path / "set", per_task, tasks=tasks)
    assert list(tmp_path.iterdir()) == []
