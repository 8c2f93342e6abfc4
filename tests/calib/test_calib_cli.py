"""migician-calib from end to end: what it writes, says, and leaves behind when it fails."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from migician.calib import cli
from migician.calib.scenes import TASKS, write_dataset
from migician.calib.store import open_calibration


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as leaving:
        cli.main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return leaving.value.code, out, err


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """60 sound records; treat as read-only."""
    return write_dataset(tmp_path_factory.mktemp("scenes") / "set", 6, 5, max_images=3)


@pytest.fixture
def mixed(scenes, tmp_path):
    """The same with five broken records."""
    records = json.loads(scenes.read_text())
    for i, changes in enumerate([{"images": []}, {"images": ["no.png"]}, {"images": ["no.png"]}, {"conversations": 1}]):
        turns = [{"from": "human", "value": "<image>Where?"}, {"from": "gpt", "value": "There"}]
        records.append({"id": f"bad{i}", "images": ["x"], "conversations": turns, "type": "diff", **changes})
    (tmp_path / "mixed.json").write_text(json.dumps(records)[:-1] + ', {"id": "cut", "images": [}]')
    return tmp_path / "mixed.json"


def test_a_source_becomes_a_folder(mixed, scenes, tmp_path, capsys):
    out = tmp_path / "calib"
    code, stdout, stderr = run(
        capsys, mixed, "-o", out, "--samples", 20, "--images", scenes.parent, "--licence", "our own"
    )
    assert (code, stdout) == (0, f"{out}\n")
    calibration = open_calibration(out, verify=True)
    assert calibration.counts["tasks"] == dict.fromkeys(sorted(TASKS), 2)
    skipped = {"broken_json": 1, "missing_picture": 2, "no_conversation": 1, "no_images": 1}
    assert calibration.counts["skipped"] == skipped
    assert (calibration.source, calibration.licence, calibration.seed) == ("mixed.json", "our own", 0)
    assert "65 records read, 5 left out" in stderr
    lines = {line.split()[0]: line for line in stderr.splitlines() if line.strip()}
    assert lines["missing_picture"].split()[1] == "2"
    assert lines["missing_picture"].endswith("mixed.json record 62: no.png")
    assert "mixed.json record 65: " in lines["broken_json"]
    assert lines["correspondence"].split() == ["correspondence", "2"]


def test_the_same_command_writes_the_same_bytes(scenes, tmp_path, capsys):
    for name in ("a", "b", "c"):
        seed = 1 if name == "c" else 0
        assert run(capsys, scenes, "-o", tmp_path / name, "--samples", 12, "--seed", seed)[0] == 0
    a, b, c = ((tmp_path / name / "manifest.json").read_bytes() for name in "abc")
    assert a == b != c


def test_fewer_than_asked_for_is_said(scenes, tmp_path, capsys):
    code, _, stderr = run(capsys, scenes, "-o", tmp_path / "c", "--tasks", "Region, diff,walk")
    assert code == 0
    assert "12 samples, not 256" in stderr and "no usable record of walk; the source has " in stderr
    assert set(open_calibration(tmp_path / "c").counts["tasks"]) == {"region", "diff"}


def test_nano(tmp_path, capsys):
    for name in "ab":
        code, stdout, _ = run(capsys, "nano", "-o", tmp_path / name, "--samples", 10, "--seed", 4)
        assert (code, stdout) == (0, f"{tmp_path / name}\n")
    assert (tmp_path / "a/manifest.json").read_bytes() == (tmp_path / "b/manifest.json").read_bytes()
    calibration = open_calibration(tmp_path / "a", verify=True)
    assert calibration.counts["tasks"] == dict.fromkeys(sorted(TASKS), 1) and calibration.source == "nano"


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("[]", [], r"all.json: no records in it; give a JSON array"),
        ("", [], r"no records in it"),
        ("<html>", [], r"none of 1 records can be used; 1 of them broken_json \(first: all.json record 1, "),
        ('[{"id": 1}, 2, {"id": 3}]', [], r"2 of them no_images \(first: all.json record 1, images is missing"),
        ("good", ["--tasks", "walk"], r"no usable record of walk; choose from diff \(1\)"),
        ("gone", [], r"none of 1 records .* missing_picture .*; point --images at"),
    ],
)
def test_an_empty_result_says_why(tmp_path, capsys, content, options, message):
    Image.fromarray(np.zeros((60, 90, 3), np.uint8)).save(tmp_path / "a.png")
    turns = [{"from": "human", "value": "<image>Where?"}, {"from": "gpt", "value": "There"}]
    one = {"images": ["a.png"], "conversations": turns, "type": "diff"}
    texts = {"good": json.dumps([one]), "gone": json.dumps([one | {"images": ["b.png"]}])}
    (tmp_path / "all.json").write_text(texts.get(content, content))
    code, stdout, stderr = run(capsys, tmp_path / "all.json", "-o", tmp_path / "deep/c", *options)
    assert (code, stdout) == (1, "")
    assert stderr.startswith("migician-calib: ") and stderr.count("\n") == 1
    assert re.search(message, stderr), stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "all.json"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nowhere.json", "-o", "c"], 1, "nowhere.json: no such file or folder; give"),
        (["nano"], 2, "Missing option '-o'"),
        (["nano", "-o", "c", "--samples", "0"], 2, "--samples"),
        (["nano", "-o", "c", "--seed", "1000000"], 2, "held out"),
        (["nano", "-o", "c", "--tasks", "walk"], 2, "nano has group_grounding"),
        (["nano", "-o", "c", "--tasks", ","], 2, "names no task"),
        (["nano", "-o", "c", "--images", "."], 2, "do not go with nano"),
        (["nano", "-o", "full"], 1, "full: already there and not empty; choose another folder"),
        (["full", "-o", "full"], 1, "full: already there and not empty"),
        (["full", "-o", "c"], 1, "no .json or .jsonl file"),
        (["full", "-o", "c", "--images", "no"], 1, "--images no: no such folder"),
        (["nano", "-o", "full/file/c"], 1, "full/file is no folder that can be written to; choose"),
    ],
)
def test_failures_are_one_line(tmp_path, capsys, monkeypatch, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("mine")
    status, stdout, stderr = run(capsys, *arguments)
    assert (status, stdout) == (code, "") and message in stderr
    assert code == 2 or stderr.count("\n") == 1
    assert [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")] == ["full", "full/file"]


def test_help_has_the_contract_and_examples(capsys):
    code, text, _ = run(capsys, "--help")
    assert code == 0 and text.startswith("Usage: migician-calib [OPTIONS] SOURCE")
    for words in ("-o, --out", "--samples", "--seed", "--tasks", "--images", "--licence", "migician-calib nano -o "):
        assert words in text


def test_ctrl_c_leaves_nothing(tmp_path):
    code = "from migician.calib.cli import main; main(['nano', '-o', 'deep/calib', '--samples', '100000'])"
    child = subprocess.Popen(
        [sys.executable, "-c", code.replace("main([", "print(flush=True); main([")],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # a shell's background job ignores the signal
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert child.stdout.readline() == "\n"
    time.sleep(0.5)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert (child.returncode, out, err.strip()) == (130, "", "migician-calib: interrupted")
    assert not list(tmp_path.iterdir())


def test_ctrl_c_while_writing_leaves_nothing(scenes, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code, stdout, stderr = run(capsys, scenes, "-o", tmp_path / "calib")
    finally:
        signal.signal(signal.SIGINT, before)
    assert (code, stdout, stderr.strip()) == (130, "", "migician-calib: interrupted")
    assert not list(tmp_path.iterdir())


def test_an_unforeseen_error_is_one_line_too(scenes, tmp_path, capsys, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("two\nlines")

    monkeypatch.setattr("migician.calib.sample.draw", fail)
    code, stdout, stderr = run(capsys, scenes, "-o", tmp_path / "calib")
    assert (code, stdout) == (1, "")
    assert stderr.startswith("migician-calib: internal error: RuntimeError: two lines; please report")


def test_progress_is_shown_on_a_terminal_only(capsys, monkeypatch):
    console = pytest.importorskip("rich.console")
    with cli._bars() as bar:
        assert bar("reading", 10) is None
    monkeypatch.setattr(console.Console, "is_terminal", property(lambda self: True))
    with cli._bars() as bar:
        moves = bar("reading all.json", 10)
        moves(5)
    out, err = capsys.readouterr()
    assert out == "" and "reading all.json" in err and "50%" in err
