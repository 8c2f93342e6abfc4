"""MIBench and MMIU: reading, prompts, scoring, and the published script's quirks behind their switch."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from migician.bench.accuracy import mibench, mmiu
from migician.bench.accuracy.families import find
from migician.bench.engines import Answered
from migician.runtime.errors import MigicianError

REQUEST = "Please only strictly answer from the choice list: "


class Scripted:
    """Answers in turn; remembers texts, new tokens and the sizes of the pictures at that moment."""

    name, versions = "scripted", {"scripted": "1"}

    def __init__(self, *responses: str, family: str = "migician") -> None:
        self.responses, self.family = list(responses), family
        self.asked: list[tuple[str, int, list[tuple[int, int]]]] = []
        self.paths: list[Path] = []

    def answer(self, images: Any, text: str, max_new_tokens: int) -> Answered:
        self.paths += images
        self.asked.append((text, max_new_tokens, [Image.open(image).size for image in images]))
        return Answered(self.responses.pop(0))

    def close(self) -> None: ...


def mi(task: str, answer: str, **more: Any) -> dict[str, Any]:
    question = "Compare <image> with <image>. Which? "
    images = ["image/wide.png", "image/tall.png"]
    record = {"id": task, "task": task, "question": question, "image": images, "options": ["cat", "a dog."]}
    return {**record, "answer": answer, **more}


def mm(task: str, output: str, **more: Any) -> dict[str, Any]:
    record = {"task": task, "question": "Which one?", "context": "Select.\nA: cat\nB: dog", "output": output}
    return {**record, "input_image_path": ["./image/wide.png", "./image/tall.png"], **more}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "image").mkdir()
    Image.new("RGB", (1000, 301), "red").save(tmp_path / "image" / "wide.png")
    Image.new("RGB", (30, 100), "blue").save(tmp_path / "image" / "tall.png")
    return tmp_path


def write(path: Path, *records: Any) -> Path:
    path.write_text(json.dumps(records), "utf-8")
    return path


# ---- MIBench
def test_mibench_asks_as_published(root: Path) -> None:
    data = write(root / "multi_image_instruction.json", mi("general_comparison", "a dog."))
    model = Scripted("It is a dog")
    result = mibench.evaluate(model, data)
    text = "Compare <image> with <image>. Which? " + REQUEST + "cat | a dog."
    assert model.asked == [(text, 128, [(1000, 301), (30, 100)])]
    assert result == {
        "benchmark": "mibench", "model": "scripted", "family": "migician", "upstream_compat": False, "questions": 1,
        "tasks": {"general_comparison": {"questions": 1, "correct": 1, "accuracy": 100.0}}, "average": 100.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("family", "text"),
    [
        ("qwen2_vl", "Compare <image> with <image>. Which? " + REQUEST + "cat | a dog."),
        ("minicpm", "Compare Image-1 with Image-2. Which? " + REQUEST + "cat | a dog."),
        ("llava_onevision", "Compare <image> with <image>. Which? " + REQUEST + "cat | a dog."),
        ("internvl2_8b", "Compare <image> with <image>. Which? " + REQUEST
         + "cat | a dog.Don't generate additional words."),
        ("mantis", "Compare  with . Which? " + REQUEST + "cat | a dog."),
    ],
)  # fmt: skip
def test_mibench_forms(root: Path, family: str, text: str) -> None:
    data = write(root / "x.json", mi("general_comparison", "cat"))
    (choice,) = mibench.read(data)
    assert mibench.prompt(find(family), choice) == text


def test_pictures_without_a_place_come_first(root: Path) -> None:
    (choice,) = mibench.read(write(root / "x.json", mi("general_comparison", "cat", question="Which <image>? ")))
    assert mibench.prompt(find("llava_onevision"), choice) == (
        "image1:<image>\nimage2:<image>\nWhich ? " + REQUEST + "cat | a dog."
    )


def test_mibench_brings_llavas_pictures_to_800(root: Path) -> None:
    data = write(root / "x.json", mi("general_comparison", "cat"))
    model = Scripted("cat", family="llava_onevision")
    mibench.evaluate(model, data)
    assert model.asked[0][2] == [(800, 240), (240, 800)]  # down and up, whole pixels cut
    assert not any(path.exists() for path in model.paths)


def test_mibench_averages_tasks_not_questions(root: Path) -> None:
    first = write(
        root / "multi_image_instruction.json",
        mi("general_comparison", "cat"), mi("general_comparison", "cat"), mi("general_comparison", "cat."),
    )  # fmt: skip
    write(root / "multimodal_knowledge_seeking.json", mi("text_rich_images", "a dog."))
    ticks: list[tuple[int, int]] = []
    result = mibench.evaluate(
        Scripted("cat", "dog", "a cat, surely", "A dog"), root, progress=lambda *tick: ticks.append(tick)
    )
    assert result["tasks"] == {
        "general_comparison": {"questions": 3, "correct": 2, "accuracy": 66.6667},
        "text_rich_images": {"questions": 1, "correct": 0, "accuracy": 0.0},
    }
    assert result["average"] == pytest.approx(100 / 3, abs=1e-4)
    assert ticks == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert mibench.evaluate(Scripted("cat", "cat", "cat"), first)["questions"] == 3


@pytest.mark.parametrize(("family", "right"), [("migician", 1), ("llava_onevision", 1), ("minicpm", 2)])
def test_mibench_as_the_published_script_scores(root: Path, family: str, right: int) -> None:
    data = write(root / "x.json", mi("general_comparison", "cat."), mi("general_comparison", "cat."))
    result = mibench.evaluate(Scripted("cat", "a cat", family=family), data, upstream_compat=True)
    assert list(result["tasks"]) == list(mibench.TASKS)
    assert result["tasks"]["general_comparison"] == {
        "questions": 1000, "correct": right, "accuracy": round(right / 10, 4),
    }  # fmt: skip
    assert result["average"] == round(right / 90, 4)
    assert mibench.evaluate(Scripted("cat", "a cat", family=family), data)["average"] == 100


def test_the_published_script_has_nine_tasks(root: Path) -> None:
    data = write(root / "x.json", mi("hallucination", "cat"))
    with pytest.raises(MigicianError, match="no task hallucination"):
        mibench.evaluate(Scripted("cat"), data, upstream_compat=True)


# ---- MMIU
def test_mmiu_asks_as_published(root: Path) -> None:
    data = write(root / "all.json", mm("counting", "B"))
    model = Scripted("B: dog")
    result = mmiu.evaluate(model, data)
    text = "Question:\nWhich one?\nSpecifically:\nSelect.\nA: cat\nB: dog"
    assert model.asked == [(text, 128, [(800, 240), (240, 800)])]
    assert not any(path.exists() for path in model.paths)
    assert result == {
        "benchmark": "mmiu", "model": "scripted", "family": "migician", "upstream_compat": False, "questions": 1,
        "tasks": {"counting": {"questions": 1, "correct": 1, "accuracy": 100.0}}, "average": 100.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("family", "text", "tokens"),
    [
        ("mplug_owl3", "Question:\nImage-1:<image>\nImage-2:<image>\nWhich one?\nSpecifically:\nS", 256),
        ("llava_onevision", "Question:\nimage1:<image>\nimage2:<image>\nWhich one?\nSpecifically:\nS", 100),
        ("minicpm", "Question:\nWhich one?\nSpecifically:\nS\nPlease only answer with the single letter.", 2048),
    ],
)
def test_mmiu_forms(root: Path, family: str, text: str, tokens: int) -> None:
    model = Scripted("A", family=family)
    mmiu.evaluate(model, write(root / "x.json", mm("counting", "A", context="S")))
    assert model.asked[0][:2] == (text, tokens)


@pytest.mark.parametrize(("family", "asked"), [("migician", 2), ("mplug_owl3", 2), ("llava_onevision", 1)])
def test_mmiu_as_the_published_script_scores(root: Path, family: str, asked: int) -> None:
    data = write(root / "x.json", mm("counting", "A"), mm("ordering", "B"), mm("counting", "B"))
    responses = ("A", "C", "no")
    clean = mmiu.evaluate(Scripted(*responses, family=family), data)
    assert clean["tasks"] == {
        "counting": {"questions": 2, "correct": 1, "accuracy": 50.0},
        "ordering": {"questions": 1, "correct": 0, "accuracy": 0.0},
    }
    assert clean["average"] == 25
    published = mmiu.evaluate(Scripted(*responses, family=family), data, upstream_compat=True)
    assert published["tasks"] == {"counting": {"questions": 2 * asked, "correct": 1, "accuracy": 50 / asked}}
    assert published["average"] == 50 / asked
    assert mmiu.evaluate(Scripted("x", "x", "x"), data, upstream_compat=True)["average"] == 0


def test_json_lines_and_another_root(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    data = tmp_path_factory.mktemp("elsewhere") / "all.jsonl"
    data.write_text(json.dumps(mm("a", "A")) + "\n" + json.dumps(mm("b", "B")) + "\n", "utf-8")
    assert [choice.images[0] for choice in mmiu.read(data, root)] == [root / "image" / "wide.png"] * 2


# ---- what is wrong
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no question"),
        ("[]", "holds no question"),
        ("{", "not JSON"),
        ("[1]", "record 0: not an object"),
        (json.dumps([mi("t", "a") | {"options": "cat"}]), "record 0: 'options' is not a list"),
        (json.dumps([mi("t", "a"), mi("t", "a") | {"answer": 3}]), "record 1: 'answer' is not a text"),
        (json.dumps([mi("t", "a") | {"image": ["../x.png"]}]), "lies outside the pictures' folder"),
        (json.dumps([mi("t", "a") | {"image": ["/etc/x.png"]}]), "lies outside the pictures' folder"),
        (json.dumps([mi("t", "a") | {"image": ["image/wide.png", "image/no.png"]}]), "1 of 2 pictures are not there"),
    ],
)
def test_damaged_data_is_one_line(root: Path, text: str, message: str) -> None:
    data = root / "x.json"
    data.write_text(text, "utf-8")
    with pytest.raises(MigicianError, match=message) as caught:
        mibench.evaluate(Scripted(), data)
    assert "\n" not in str(caught.value)


def test_missing_files_are_one_line(root: Path) -> None:
    with pytest.raises(MigicianError, match="No such file"):
        mmiu.evaluate(Scripted(), root / "none.json")
    with pytest.raises(MigicianError, match=r"has none of multi_image_instruction\.json"):
        mibench.evaluate(Scripted(), root)
