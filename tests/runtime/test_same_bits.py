"""One answer on every machine: nano in bf16, int8 and int4 gives the same tokens and log-probabilities to the bit.

By every instruction set this CPU has and, under qemu, by those of aarch64.

Left out are tables that multiply bf16 by bf16 (avx512bf16, amx and its emulation): they round activations, and differ
by design.
"""

import json
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
from quantized import make_quantized

from migician.runtime.backends import native as engine
from migician.runtime.backends.native import lib
from migician.runtime.demo import EXAMPLES
from migician.runtime.files.open import open_checkpoint
from migician.runtime.image import load_picture
from migician.runtime.model import load
from migician.runtime.prompt import Vocabulary, build_prompt

C_TESTS = Path(__file__).resolve().parents[1] / "c"
NEW_TOKENS = 20


@pytest.fixture(scope="module", params=["bf16", "int8", "int4"])
def nano(request, tmp_path_factory):
    """nano as shipped, or rounded to nearest: its path."""
    if request.param == "bf16":
        return "nano"
    return str(make_quantized("nano", tmp_path_factory.mktemp("same") / "nano.mig", request.param))


def _instruction_sets():
    lines = engine.kernel_report().splitlines()
    return [line.split()[0] for line in lines if "not on this CPU" not in line and "bf16 products as float" in line]


def _question():
    """The bundled question with the fewest pictures."""
    return min(
        json.loads((EXAMPLES / "examples.json").read_text("utf-8")), key=lambda question: len(question["images"])
    )


@pytest.mark.slow
def test_every_instruction_set_gives_the_same_bits(nano, monkeypatch):
    question, answers = _question(), {}
    for isa in _instruction_sets():
        monkeypatch.setenv("MIGICIAN_ISA", isa)
        with load(nano, threads=2) as model:
            pictures = [EXAMPLES / name for name in question["images"]]
            answers[isa] = model.ground(pictures, question["prompt"], max_new_tokens=NEW_TOKENS).tokens
    assert len(answers) > 1 and len(answers["scalar"]) > 8
    for isa, answer in answers.items():
        assert answer == answers["scalar"], isa


def _write_down(path, source, question):
    """Writes one question for tests/c/replay.c."""
    with open_checkpoint(source) as checkpoint, open(path, "wb") as file:
        weights = engine.Weights(checkpoint)
        file.write(bytes(engine.ffi.buffer(weights.config)))
        file.write(struct.pack("<i", len(checkpoint.tensors)))
        for name, tensor in checkpoint.tensors.items():
            kind = {"BF16": lib.MIGI_BF16, "F32": lib.MIGI_F32, "I8": lib.MIGI_I8, "U8": lib.MIGI_U8}[tensor.dtype]
            shape = [*tensor.shape, 0, 0, 0, 0, 0][:5]
            file.write(struct.pack("<i", len(name)) + name.encode() + b"\0")
            file.write(struct.pack("<ii6q", kind, len(tensor.shape), *shape, tensor.nbytes))
            file.write(tensor.data.tobytes())
        pictures = [load_picture(EXAMPLES / name, checkpoint.preprocessor).rgb for name in question["images"]]
        file.write(struct.pack("<i", len(pictures)))
        for rgb in pictures:
            file.write(struct.pack("<ii", *rgb.shape[:2]) + rgb.tobytes())
        factor = checkpoint.preprocessor.factor
        cells = [rgb.shape[0] * rgb.shape[1] // factor**2 for rgb in pictures]
        ids = build_prompt(Vocabulary(checkpoint.tokenizer_json), question["prompt"], cells)
        file.write(struct.pack("<i", len(ids)) + np.array(ids, "<i4").tobytes())
        file.write(struct.pack("<if", NEW_TOKENS, checkpoint.repetition_penalty))


def _replay(path, programs):
    """What each of the programs says about one question; they run side by side."""
    running = [subprocess.Popen([*p, path, isa], stdout=subprocess.PIPE, text=True) for p, isa in programs]
    said = [process.communicate(timeout=600)[0].split() for process in running]
    assert [process.returncode for process in running] == [0] * len(running)
    return said


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which("aarch64-linux-gnu-gcc") and shutil.which("qemu-aarch64")),
    reason="aarch64: install gcc-aarch64-linux-gnu and qemu-user",
)
def test_aarch64_gives_the_same_bits(nano, tmp_path):
    _write_down(tmp_path / "question", nano, _question())
    made = ["native", "aarch64"]
    subprocess.run(["make", "-s", "-C", C_TESTS, *(f"build/{kind}/replay" for kind in made)], check=True)
    qemu = ["qemu-aarch64", "-cpu", "max", C_TESTS / "build/aarch64/replay"]
    sets = ("neon", "neon-dotprod", "neon-i8mm")
    programs = [([C_TESTS / "build/native/replay"], "scalar"), *((qemu, isa) for isa in sets)]
    want, *others = _replay(tmp_path / "question", programs)
    assert len(want) == 2 * NEW_TOKENS
    for isa, got in zip(sets, others, strict=True):
        assert got == want, isa
