"""migician-run: the system turn, places for pictures, points, slips and loops, as they are printed."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from migician import Answer, load
from migician.runtime.boxes import read_answer
from migician.runtime.run import _as_dict, _table, main

pytestmark = pytest.mark.slow


def run(tiny: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """Runs migician-run in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "migician.runtime.run", *map(str, words), "--model", str(tiny), "--threads", "1"],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        timeout=120,
    )


def test_the_system_turn_reaches_the_model(tiny: Path, picture: Path) -> None:
    def tokens(*options: str) -> int:
        done = run(tiny, picture, "where?", "--json", "--max-new-tokens", 3, *options)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)["prompt_tokens"]

    usual = tokens()
    assert tokens("--system", "You are a helpful assistant.") == usual
    assert tokens("--system", "Be brief.") < usual
    assert tokens("--system", "") < usual


def test_places_for_pictures_are_filled_or_explained(tiny: Path, picture: Path) -> None:
    done = run(tiny, picture, picture, "Image-1: <image>, Image-2: <image>. where?", "--json", "--max-new-tokens", 3)
    assert done.returncode == 0, done.stderr
    done = run(tiny, picture, picture, "<image> where?", "--max-new-tokens", 3)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "1 places for pictures (<image>) and 2 pictures were given; write one" in done.stderr


def test_a_loop_is_explained_and_flagged(tiny: Path, picture: Path) -> None:
    """The random model falls into one as soon as nothing keeps it from repeating itself."""
    words = (picture, "where?", "--repetition-penalty", 1, "--max-new-tokens", 200)
    done = run(tiny, *words)
    assert done.returncode == 0
    assert done.stderr.startswith("the answer repeats itself, ") and done.stderr.count("\n") == 1
    assert "200 tokens" in done.stderr and "nothing was cut that matters; " in done.stderr
    answer = json.loads(run(tiny, *words, "--json").stdout)
    assert (answer["repeated"], answer["finish"]) == (True, "length")
    short = run(tiny, picture, "where?", "--max-new-tokens", 6)
    assert short.stderr == "the answer was cut after 6 tokens; raise --max-new-tokens\n"
    assert json.loads(run(tiny, picture, "where?", "--max-new-tokens", 6, "--json").stdout)["repeated"] is False


def test_a_note_of_the_model_is_told_once(tmp_path: Path, picture: Path) -> None:
    from checkpoints import make_checkpoint

    folder = make_checkpoint(tmp_path / "model")
    (folder / "chat_template.jinja").write_text("{% macro f() %}{% endmacro %}")
    done = run(folder, picture, "where?", "--max-new-tokens", 3, "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["finish"]
    assert done.stderr.count("\n") == 1 and "chat template is not understood" in done.stderr


def answered(text: str) -> Answer:
    reading = read_answer(text, prompt="the cup", sizes=[(640, 480), (100, 100)])
    return Answer(
        text=text,
        boxes=reading.boxes,
        unparsed=reading.unparsed,
        tokens=(),
        prompt_tokens=7,
        finish="stop",
        points=reading.points,
        clipped=reading.clipped,
    )


def test_points_and_slips_in_json(tiny: Path) -> None:
    answer = answered("Image-1: <|box_start|>(500,250)<|box_end|>\nImage-2: (10,20),(1003,40)")
    with load(tiny) as model:
        told = _as_dict(answer, model, False)
        assert told["points"] == [{"image": 0, "label": "", "xy": [320.0, 120.0], "grid": [500, 250], "score": 0.0}]
        assert told["boxes"] == [
            {"image": 1, "label": "", "xyxy": [1.0, 2.0, 100.0, 4.0], "grid": [10, 20, 1000, 40], "score": 0.0}
        ]
        assert (told["clipped"], told["repeated"]) == (1, False)
        assert _as_dict(replace(answer, repeated=3), model, False)["repeated"] is True
        plain = _as_dict(answered("nothing"), model, False)
        assert (plain["points"], plain["boxes"], plain["clipped"], plain["repeated"]) == ([], [], 0, False)
        json.dumps(told, allow_nan=False)


def test_points_in_the_table() -> None:
    lines = _table(answered("(500,250)"), ["a.png", "b.png"]).splitlines()
    assert lines[0].split() == ["picture", "file", "label", "x", "y", "score"]
    assert lines[1].split() == ["1", "b.png", "50", "25", "0.00"]


def test_help_names_the_system_turn(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "--system TEXT" in capsys.readouterr().out
