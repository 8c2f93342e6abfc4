"""The engine through Python: signals, other threads, instruction sets, damaged weights, the session's room."""

import itertools
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from checkpoints import make_checkpoint
from PIL import Image

from migician.runtime.backends import native as engine
from migician.runtime.errors import Cancelled, ContextFullError, MigicianError, ModelFileError, UnsupportedError
from migician.runtime.model import load


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8))


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    """A model deep enough that one large picture takes a good part of a second."""
    folder = tmp_path_factory.mktemp("slow")
    return make_checkpoint(folder, v_dim=256, v_heads=4, v_depth=24, max_pixels=28 * 28 * 2000)


@pytest.mark.slow
def test_a_signal_stops_the_encoder_between_layers(slow):
    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    with load(slow, cache_bytes=0) as model:
        start = time.perf_counter()
        model.ground([noise(1100, 1000)], "x", max_new_tokens=1)
        whole = time.perf_counter() - start
        before = signal.signal(signal.SIGALRM, stop)
        try:
            signal.setitimer(signal.ITIMER_REAL, whole / 5)
            start = time.perf_counter()
            with pytest.raises(Stop):
                model.ground([noise(1100, 1000)], "x", max_new_tokens=1)
            assert time.perf_counter() - start < 0.8 * whole
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        assert model.ground([noise(30, 30)], "x", max_new_tokens=2).tokens  # still usable


def test_another_thread_cancels(slow):
    with load(slow) as model:
        threading.Timer(0.1, model.cancel).start()
        with pytest.raises(Cancelled):
            for _ in range(100):
                model.ground([noise(1008, 1008)], "x", max_new_tokens=1)


def test_threads_and_instruction_sets_agree_to_the_bit(tiny, monkeypatch):
    answers = []
    for isa in (line.split()[0] for line in engine.kernel_report().splitlines()):
        monkeypatch.setenv("MIGICIAN_ISA", isa)
        for threads in (1, 2):
            try:
                with load(tiny, threads=threads, precision="fp32") as model:
                    answers.append(model.ground([noise(90, 60), noise(40, 70, 1)], "where?", max_new_tokens=8).tokens)
            except UnsupportedError as error:
                print("skipped:", error)
    assert len(answers) >= 4  # scalar and amx-emulated run everywhere
    assert all(tokens == answers[0] for tokens in answers[1:])


def test_stream_gives_the_answer_piece_by_piece(tiny):
    with load(tiny) as model:
        stream = model.stream([noise(90, 60)], "where?", max_new_tokens=9)
        with pytest.raises(MigicianError, match="not complete"):
            _ = stream.answer
        steps = list(stream)
        answer = stream.answer
    assert [s.token for s in steps] == [t.id for t in answer.tokens]
    assert answer.text.startswith("".join(s.text for s in steps))
    assert all(a.elapsed_ms <= b.elapsed_ms for a, b in itertools.pairwise(steps))
    wanted = {"preprocess_ms", "vision_ms", "prefill_ms", "decode_ms", "new_tokens", "peak_rss_mb", "weights_mb"}
    assert wanted <= set(answer.stats)


def test_repetition_penalty_changes_what_is_chosen_not_what_is_reported(tiny):
    with load(tiny) as model:
        plain = model.ground([], "say it", max_new_tokens=12, repetition_penalty=1.0)
        strong = model.ground([], "say it", max_new_tokens=12, repetition_penalty=5.0)
    assert [t.id for t in plain.tokens] != [t.id for t in strong.tokens]
    assert len({t.id for t in strong.tokens}) >= len({t.id for t in plain.tokens})
    assert all(t.logprob <= 0 for t in strong.tokens)


def test_too_much_for_the_context_is_an_error(tmp_path):
    folder = make_checkpoint(tmp_path / "short", max_positions=256)
    with load(folder) as model, pytest.raises(ContextFullError, match="context is 256"):
        model.ground([noise(500, 500)], "x", max_new_tokens=200)


def test_nan_weights_are_told(tmp_path):
    folder = make_checkpoint(tmp_path / "nan", dtype="float32")
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-400_000:-200_000] = np.full(50_000, np.nan, np.float32).tobytes()
    path.write_bytes(data)
    with load(folder) as model, pytest.raises(ModelFileError, match="not finite"):
        model.ground([noise(60, 60)], "x", max_new_tokens=2)


def test_closed_models_and_wrong_requests(tiny):
    model = load(tiny)
    with pytest.raises(MigicianError, match=r"a\.jpg: no such file"):
        model.ground("a.jpg", "x")
    with pytest.raises(MigicianError, match="at least 1"):
        model.ground([], "x", max_new_tokens=0)
    model.close()
    with pytest.raises(MigicianError, match="closed"):
        model.ground([], "x")
    with pytest.raises(UnsupportedError, match="precision"):
        load(tiny, precision="int3")
    with pytest.raises(UnsupportedError, match="backend"):
        load(tiny, backend="abacus")


def test_kernel_report_names_the_table_in_use():
    report = engine.kernel_report()
    assert report.count("in use") == 1 and "scalar" in report
    assert engine.Pool(1).isa in report


def test_the_runtime_never_imports_torch(tiny):
    ask = f"migician.load({str(tiny)!r}).ground([], 'x', max_new_tokens=1)"
    code = f"import sys, migician; {ask}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
