"""What every command does at its edges: closed streams, other encodings, a forgotten question, versions, completion."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import migician

QUESTION = "Where is the image in the second picture?"
COMMANDS = ("runtime.run", "export.cli", "calib.cli", "bench.cli", "train.cli")


def shell(line: str, stdin: bytes | None = None, **env: str) -> subprocess.CompletedProcess[bytes]:
    """Runs a line of sh in which $RUN is migician-run."""
    run = f"{sys.executable} -m migician.runtime.run"
    more = {"PYTHONIOENCODING": "", "RUN": run, **env}
    keep = {key: value for key, value in {**os.environ, **more}.items() if value}
    return subprocess.run(["sh", "-c", line], input=stdin, capture_output=True, env=keep, timeout=120)


@pytest.fixture
def words(tiny: Path, picture: Path) -> str:
    return f"{picture} --model {tiny} --max-new-tokens 6 --threads 1"


def one_line(done: subprocess.CompletedProcess[bytes], *wanted: str) -> None:
    text = done.stderr.decode()
    assert done.returncode == 1 and text.startswith("migician-run: ") and text.count("\n") == 1, text
    assert "internal error" not in text and all(word in text for word in wanted), text


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_says_its_version(name: str) -> None:
    done = subprocess.run([sys.executable, "-m", f"migician.{name}", "--version"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == migician.__version__


def test_completion_is_had_from_click() -> None:
    code = "import sys; sys.argv = ['migician-run']; from migician.runtime.run import main; main()"
    env = {**os.environ, "_MIGICIAN_RUN_COMPLETE": "bash_source"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0 and "_MIGICIAN_RUN_COMPLETE=bash_complete" in done.stdout


@pytest.mark.parametrize("form", ["", "--json"])
def test_a_closed_stdout_is_one_line(words: str, form: str) -> None:
    one_line(shell(f"$RUN {words} {form} 'where?' >&-"), "standard output is closed")


@pytest.mark.parametrize("closed", ["<&-", "2>&-", "<&- 2>&-"])
def test_other_closed_streams_cost_no_answer(words: str, closed: str) -> None:
    plain = shell(f"$RUN {words} 'where?'").stdout
    done = shell(f"$RUN {words} 'where?' {closed}")
    assert (done.returncode, done.stdout) == (0, plain) and plain


def test_a_question_from_a_closed_stdin_is_one_line(words: str) -> None:
    one_line(shell(f"$RUN {words} - <&-"), "standard input is closed")


def test_a_byte_order_mark_is_no_word(words: str) -> None:
    text = "哪里? where?"
    plain = shell(f"$RUN {words} - --json", stdin=text.encode())
    marked = shell(f"$RUN {words} - --json", stdin=b"\xef\xbb\xbf" + text.encode() + b"\n")
    assert plain.returncode == 0, plain.stderr
    first, second = (json.loads(done.stdout) for done in (plain, marked))
    assert (first["text"], first["prompt_tokens"]) == (second["text"], second["prompt_tokens"])


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "gbk", "latin-1"])
def test_a_question_in_another_encoding_is_refused(words: str, encoding: str) -> None:
    text = "où est-ce?" if encoding == "latin-1" else "在第一张图里找到杯子"
    one_line(shell(f"$RUN {words} -", stdin=text.encode(encoding)), "not UTF-8", "iconv")


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "ascii"])
@pytest.mark.parametrize("form", ["", "--json", "--stream"])
def test_an_answer_fits_any_stdout(tiny: Path, tmp_path: Path, encoding: str, form: str) -> None:
    path = tmp_path / "图片.png"
    Image.new("RGB", (60, 60), "red").save(path)
    line = f"$RUN {path} --model {tiny} --max-new-tokens 40 --threads 1 {form} '杯子在哪里?'"
    plain, done = shell(line, PYTHONIOENCODING="utf-8"), shell(line, PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr
    if form == "--json":
        assert json.loads(done.stdout)["text"] == json.loads(plain.stdout)["text"]
    else:
        assert len(done.stdout) >= len(plain.stdout.decode())


def test_a_forgotten_question_is_a_usage_error(words: str, picture: Path, tmp_path: Path) -> None:
    odd = tmp_path / "a picture without an ending"
    odd.write_bytes(picture.read_bytes())
    for last in (f"'{picture}'", f"'{odd}'", "b.png", "not/there.JPG", "photo.heic", "'data:image/png;base64,AAAA'"):
        done = shell(f"$RUN {words} {last}")
        assert done.returncode == 2 and b"is a picture: give the question" in done.stderr, (last, done.stderr)
    done = shell(f"$RUN {picture}")
    assert done.returncode == 2 and b"is a picture" in done.stderr
    assert shell("$RUN").returncode == 2


def test_a_file_that_is_no_picture_may_be_a_question(words: str, tmp_path: Path) -> None:
    (tmp_path / "where").write_text("not a picture")
    done = shell(f"cd '{tmp_path}' && $RUN {words} where")
    assert done.returncode == 0, done.stderr


def test_a_question_without_pictures_is_answered(tiny: Path) -> None:
    done = shell(f"$RUN --model {tiny} --max-new-tokens 6 --threads 1 --json 'what is a cup?'")
    assert done.returncode == 0, done.stderr
    with migician.load(tiny, threads=1) as model:
        assert json.loads(done.stdout)["text"] == model.ground([], "what is a cup?", max_new_tokens=6).text


def test_pictures_are_decoded_once_for_answer_and_sheet(
    tiny: Path, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from click.testing import CliRunner

    from migician.runtime import image
    from migician.runtime.run import command

    opened = []
    read = image._open_file
    monkeypatch.setattr(image, "_open_file", lambda source: opened.append(source) or read(source))
    words = [str(picture), str(picture), QUESTION, "--model", str(tiny), "--max-new-tokens", "3", "--threads", "1"]
    plain = CliRunner().invoke(command, words)
    opened.clear()
    done = CliRunner().invoke(command, [*words, "--draw", str(tmp_path / "x.png")])
    assert done.exit_code == 0 and done.stdout == plain.stdout
    assert len(opened) == 2
    assert Image.open(io.BytesIO((tmp_path / "x.png").read_bytes())).size[0] > 400


def test_a_picture_that_is_too_thin_is_named_beside_a_sheet(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "thin.png"
    Image.new("RGB", (2, 900)).save(path)
    one_line(shell(f"$RUN {path} --model {tiny} --draw {tmp_path}/x.png 'where?'"), "thin.png: 2x900", "crop or pad")
