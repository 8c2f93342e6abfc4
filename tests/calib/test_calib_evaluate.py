"""Scoring a model on held-out drawn scenes."""

import json
from statistics import fmean
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from migician.calib.scenes import evaluate as module
from migician.calib.scenes import held_out
from migician.calib.scenes.evaluate import evaluate, evaluate_task, score_answer
from migician.runtime.boxes import Box


def answer(box, image):
    grid = tuple(round(1000 * v) for v in box)
    return SimpleNamespace(boxes=(Box(image, "", (0.0, 0.0, 0.0, 0.0), grid, 0.0),))


class Knowing:
    """Answers right, but half a box off in every second question and nothing in every fifth."""

    def __init__(self, tasks, n):
        self.truth = {}
        for task in tasks:
            for i, item in enumerate(held_out(task, n)):
                self.truth[task, item.question.text, item.scene["images"][0].tobytes()] = i, item
        self.tasks = tasks

    def ground(self, images, prompt, *, max_new_tokens):
        (i, item), *_ = [
            found for (_, text, first), found in self.truth.items() if (text, first) == (prompt, images[0].tobytes())
        ]
        x1, y1, x2, y2 = item.question.meta["box"]
        if i % 5 == 4:
            return SimpleNamespace(boxes=())
        return answer((x1, y1, x2 - (x2 - x1) * 0.6 * (i % 2), y2), item.question.meta["image"])


def test_a_box_in_the_wrong_picture_counts_nothing():
    item = held_out("diff", 1)[0]
    box, image = item.question.meta["box"], item.question.meta["image"]
    assert score_answer(answer(box, image), item) > 0.95
    assert score_answer(answer(box, 1 - image), item) == 0
    assert score_answer(SimpleNamespace(boxes=()), item) == 0


def test_evaluate():
    told = []
    model = Knowing(["diff", "region"], 5)
    result = evaluate(model, 5, ["diff", "region"], lambda task, scores: told.append((task, len(scores))))
    assert list(result) == ["mean", "tasks", "scores"] and list(result["tasks"]) == ["diff", "region"]
    for task, scores in result["scores"].items():
        assert [round(s, 1) for s in scores] == [1.0, 0.4, 1.0, 0.4, 0.0]
        assert result["tasks"][task] == {"n": 5, "iou": fmean(scores), "acc50": 0.4}
    assert result["mean"]["acc50"] == pytest.approx(0.4)
    assert result["mean"]["iou"] == pytest.approx(fmean(t["iou"] for t in result["tasks"].values()))
    assert told == [(task, n) for task in ("diff", "region") for n in range(1, 6)]
    alone = evaluate_task(Knowing(["diff"], 5), held_out("diff", 5))
    assert alone == {**result["tasks"]["diff"], "scores": result["scores"]["diff"]}


def test_an_unknown_task_is_refused():
    with pytest.raises(ValueError, match="unknown task 'walk'"):
        evaluate(Knowing([], 0), 1, ["walk"])


def test_the_command(root):
    if not (root / "runtime" / "nano.mig").exists():
        pytest.skip("this checkout has no runtime/nano.mig")
    done = CliRunner().invoke(module.main, ["--per-task", "2", "--tasks", "group_grounding,refer_grounding"])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout.splitlines()[-1])
    assert list(result) == ["model", "per_task", "mean", "tasks"]
    assert list(result["tasks"]) == ["group_grounding", "refer_grounding"] and result["mean"]["iou"] > 0.7
    assert "acc@0.5" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [(["--tasks", "walk"], 2, "walk: choose from group_grounding"), (["--model", "./nowhere.mig"], 1, "nowhere.mig")],
)
def test_the_command_fails_in_one_line(arguments, code, message):
    done = CliRunner().invoke(module.main, arguments)
    assert done.exit_code == code and message in done.output and "Traceback" not in done.output
