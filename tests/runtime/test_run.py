"""migician-run: what it prints where, and that nothing a user can pass ends in a traceback."""

import io
import json
import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from checkpoints import make_checkpoint
from PIL import Image
from quantized import make_quantized

pytestmark = pytest.mark.slow

QUESTION = "Where is the image in the second picture?"


def run(*words: object, stdin: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    """Runs migician-run in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "migician.runtime.run", *map(str, words)],
        input=stdin,
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONIOENCODING": "utf-8", **env},
        timeout=120,
    )


def short(tiny: Path, *words: object, **more: str) -> subprocess.CompletedProcess[str]:
    return run(*words, "--model", tiny, "--max-new-tokens", 6, "--threads", 1, **more)


def assert_one_line(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """Exit 1, nothing on stdout, one clear line on stderr."""
    assert done.returncode == 1, (done.returncode, done.stderr)
    assert done.stdout == ""
    assert done.stderr.startswith("migician-run: ") and done.stderr.count("\n") == 1, done.stderr
    assert "Traceback" not in done.stderr and "internal error" not in done.stderr
    for word in words:
        assert word in done.stderr, done.stderr


# What it prints


def test_stdout_is_the_answer_alone(tiny: Path, picture: Path) -> None:
    done = short(tiny, picture, picture, QUESTION)
    assert done.returncode == 0, done.stderr
    as_json = json.loads(short(tiny, picture, picture, QUESTION, "--json").stdout)
    assert done.stdout == as_json["text"] + "\n"


def test_json_has_the_keys_of_the_contract(tiny: Path, picture: Path) -> None:
    done = short(tiny, picture, picture, QUESTION, "--json", "--logprobs")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    answer = json.loads(done.stdout)
    assert {"text", "boxes", "model", "backend", "prompt_tokens", "finish", "tokens", "stats"} <= set(answer)
    assert answer["backend"] == "native" and answer["finish"] in ("stop", "length")
    assert all(set(token) == {"id", "logprob"} and token["logprob"] <= 0 for token in answer["tokens"])
    stats = {"preprocess_ms", "vision_ms", "prefill_ms", "decode_ms", "new_tokens", "peak_rss_mb", "weights_mb"}
    assert set(answer["stats"]) >= stats
    assert len(answer["tokens"]) == answer["stats"]["new_tokens"]
    assert "tokens" not in json.loads(short(tiny, picture, QUESTION, "--json").stdout)


def test_stream_says_the_same(tiny: Path, picture: Path) -> None:
    plain, stream = short(tiny, picture, QUESTION), short(tiny, picture, QUESTION, "--stream")
    assert (stream.returncode, stream.stdout) == (0, plain.stdout)
    both = short(tiny, picture, QUESTION, "--stream", "--json")
    assert json.loads(both.stdout)["text"] + "\n" == plain.stdout == both.stderr[: len(plain.stdout)]


def test_stats_and_logprobs_are_told_on_stderr(tiny: Path, picture: Path) -> None:
    done = short(tiny, picture, QUESTION, "--stats", "--logprobs")
    assert "prefill_ms" in done.stderr and "token " in done.stderr
    assert done.stdout == short(tiny, picture, QUESTION).stdout
    assert done.stderr.startswith("model model: bf16, 16.0 bits per weight, ")


@pytest.mark.parametrize("mode", ["int4", "int8"])
def test_a_quantized_model_answers_and_says_so(tiny: Path, picture: Path, tmp_path: Path, mode: str) -> None:
    words = {"int4": "int4 groups of 64 to 128 + int8, rotated, ", "int8": "int8, "}[mode]
    path = make_quantized(tiny, tmp_path / "small.mig", mode, rotated=mode == "int4")
    done = short(path, picture, QUESTION, "--stats", "--json")
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith(f"model small: {words}") and "bits per weight" in done.stderr
    plain = json.loads(short(tiny, picture, QUESTION, "--json").stdout)["stats"]
    assert 0 < json.loads(done.stdout)["stats"]["weights_mb"] < plain["weights_mb"] * 0.7


def test_a_damaged_quantized_model_is_one_line(tiny: Path, picture: Path, tmp_path: Path) -> None:
    path = make_quantized(tiny, tmp_path / "small.mig")
    content = path.read_bytes()
    path.write_bytes(content[:-64] + bytes(64))
    assert_one_line(short(path, picture, QUESTION), str(path), "checksum")
    path.write_bytes(content.replace(b"weight_group", b"weight_gruop", 1))
    assert_one_line(short(path, picture, QUESTION), str(path), "weight_group")


def test_a_model_that_another_tool_quantized_is_one_line(picture: Path, tmp_path: Path) -> None:
    def change(folder: Path) -> None:
        edit_json(folder / "config.json", quantization_config={"quant_method": "awq"})

    assert_one_line(short(broken(tmp_path, change), picture, QUESTION), "awq", "bf16")


def test_stats_say_what_the_model_is_beside_json_too(tiny: Path, picture: Path) -> None:
    done = short(tiny, picture, QUESTION, "--stats", "--json")
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("model model: bf16, ")
    assert json.loads(done.stdout)["stats"]["weights_mb"] > 0


def test_the_prompt_may_come_from_stdin(tiny: Path, picture: Path) -> None:
    assert short(tiny, picture, "-", stdin=QUESTION + "\n").stdout == short(tiny, picture, QUESTION).stdout


def test_the_environment_names_the_model(tiny: Path, picture: Path) -> None:
    options = ("--max-new-tokens", 6, "--threads", 1)
    done = run(picture, QUESTION, *options, MIGICIAN_MODEL=str(tiny))
    assert (done.returncode, done.stdout) == (0, short(tiny, picture, QUESTION).stdout)


def test_every_number_option_reaches_the_model(tiny: Path, picture: Path) -> None:
    def tokens(*options: object) -> int:
        done = short(tiny, picture, QUESTION, "--json", *options)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)["prompt_tokens"]

    usual = tokens("--precision", "fp32", "--repetition-penalty", "1.05")
    assert tokens("--min-pixels", 28 * 28 * 64, "--max-pixels", 28 * 28 * 256) > usual
    assert tokens("--max-side", 56, "--min-pixels", 28 * 28) < usual


def test_the_sheet_is_written_whole(tiny: Path, picture: Path, tmp_path: Path) -> None:
    out = tmp_path / "sheet.png"
    done = short(tiny, picture, picture, QUESTION, "--draw", out)
    assert done.returncode == 0, done.stderr
    assert str(out) in done.stderr
    with Image.open(out) as sheet:
        assert sheet.format == "PNG" and min(sheet.size) >= 60
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]


# Bad command lines


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("only-one.png",),
        ("a.png", "b", "--precision", "fp8"),
        ("a.png", "b", "--backend", "tpu"),
        ("a.png", "b", "--max-new-tokens", "0"),
        ("a.png", "b", "--threads", "-1"),
        ("a.png", "b", "--repetition-penalty", "nan"),
        ("a.png", "b", "--repetition-penalty", "0"),
        ("a.png", "b", "--min-pixels", "9000", "--max-pixels", "8000"),
        ("a.png", "b", "--draw", "sheet.txt"),
        ("a.png", "b", "--nonsense"),
    ],
)
def test_a_wrong_command_line_is_usage(words: tuple[str, ...]) -> None:
    done = run(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("Usage: migician-run") and "Traceback" not in done.stderr


def test_a_sheet_needs_its_folder(tiny: Path, picture: Path, tmp_path: Path) -> None:
    assert_one_line(short(tiny, picture, QUESTION, "--draw", tmp_path / "no" / "sheet.png"), "create it")


# Bad pictures


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims its size and holds one byte of pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def image_bytes(width: int, height: int, form: str) -> bytes:
    out = io.BytesIO()
    noise = np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(noise).save(out, form)
    return out.getvalue()


BAD_PICTURES: dict[str, Callable[[], bytes]] = {
    "text.png": lambda: b"this is a text\n" * 20,
    "cut.jpg": lambda: image_bytes(200, 100, "JPEG")[:3000],
    "cut.png": lambda: image_bytes(200, 100, "PNG")[:3000],
    "empty.png": lambda: b"",
    "thin.png": lambda: image_bytes(1, 5000, "PNG"),
    "bomb.png": lambda: png_header(30000, 30000),
}


@pytest.mark.parametrize("name", BAD_PICTURES)
def test_a_bad_picture_is_one_line(tiny: Path, picture: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(BAD_PICTURES[name]())
    assert_one_line(short(tiny, picture, path, QUESTION), name)


def test_a_missing_picture_and_a_folder_are_one_line(tiny: Path, picture: Path, tmp_path: Path) -> None:
    assert_one_line(short(tiny, picture, tmp_path / "none.png", QUESTION), "none.png")
    assert_one_line(short(tiny, tmp_path, QUESTION), tmp_path.name)


def test_one_pixel_is_a_picture(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "dot.png"
    path.write_bytes(image_bytes(1, 1, "PNG"))
    assert short(tiny, path, QUESTION).returncode == 0


def test_an_empty_prompt_is_one_line(tiny: Path, picture: Path) -> None:
    assert_one_line(short(tiny, picture, ""))
    assert_one_line(short(tiny, picture, " \n"))
    assert_one_line(short(tiny, picture, "-", stdin=""))


def test_two_hundred_pictures_do_or_say_so(tiny: Path, picture: Path, tmp_path: Path) -> None:
    done = short(tiny, *[picture] * 200, QUESTION, "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["prompt_tokens"] > 800, done.stderr
    small = make_checkpoint(tmp_path / "small", max_positions=256)
    assert_one_line(short(small, *[picture] * 200, QUESTION), "256")


# Bad models


def broken(tmp_path: Path, change: Callable[[Path], None], **options: int) -> Path:
    folder = make_checkpoint(tmp_path / "broken", **options)
    change(folder)
    return folder


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **changes}))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def rename_shape(path: Path) -> None:
    """Turns the first norm's shape [128] into [64, 2]: sound as a file, wrong for the model."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["model.norm.weight"]["shape"] = [64, 2]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def poison(path: Path) -> None:
    """Makes the final norm NaN (bf16 0x7FC0)."""
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    start, end = json.loads(data[8 : 8 + length])["model.norm.weight"]["data_offsets"]
    data[8 + length + start : 8 + length + end] = b"\xc0\x7f" * ((end - start) // 2)
    path.write_bytes(data)


BAD_MODELS: dict[str, tuple[Callable[[Path], None], int]] = {
    "missing shard": (lambda folder: (folder / "model-00002-of-00003.safetensors").unlink(), 3),
    "wrong shape": (lambda folder: rename_shape(folder / "model.safetensors"), 1),
    "truncated": (lambda folder: cut(folder / "model.safetensors"), 1),
    "NaN weights": (lambda folder: poison(folder / "model.safetensors"), 1),
    "other architecture": (lambda folder: edit_json(folder / "config.json", model_type="llama"), 1),
    "config not JSON": (lambda folder: (folder / "config.json").write_text("{"), 1),
    "no config": (lambda folder: (folder / "config.json").unlink(), 1),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), 1),
    "tokenizer not JSON": (lambda folder: (folder / "tokenizer.json").write_text("[]"), 1),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), 1),
}


@pytest.mark.parametrize("name", BAD_MODELS)
def test_a_bad_model_is_one_line(tmp_path: Path, picture: Path, name: str) -> None:
    change, shards = BAD_MODELS[name]
    folder = broken(tmp_path, change, shards=shards)
    assert_one_line(short(folder, picture, QUESTION))


def test_a_model_that_is_nowhere_is_one_line(tmp_path: Path, picture: Path) -> None:
    assert_one_line(short(tmp_path / "none.mig", picture, QUESTION), "none.mig")
    assert_one_line(short(tmp_path, picture, QUESTION))
    (tmp_path / "text.mig").write_text("not a model\n")
    assert_one_line(short(tmp_path / "text.mig", picture, QUESTION), "text.mig")


# Signals and pipes


def test_ctrl_c_is_130(tmp_path: Path, picture: Path) -> None:
    model = make_checkpoint(tmp_path / "slow", hidden=256, layers=6, heads=4, inter=1024)
    words = [picture, QUESTION, "--model", model, "--max-new-tokens", 30000, "--stream", "--threads", 1]
    command = [sys.executable, "-m", "migician.runtime.run", *map(str, words)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # a shell's background job ignores the signal, and so would its children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout is not None
    process.stdout.read(1)  # it is decoding
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, story = process.communicate(timeout=60)
    if process.returncode == 0:
        pytest.skip("this random model ended its answer before the signal came")
    assert (process.returncode, story.decode().strip()) == (130, "migician-run: interrupted")


def test_a_closed_pipe_is_no_traceback(tiny: Path, picture: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    words = [picture, QUESTION, "--model", tiny, "--max-new-tokens", 4]
    command = [sys.executable, "-m", "migician.runtime.run", *map(str, words)]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert done.returncode == 1 and done.stderr == b""
