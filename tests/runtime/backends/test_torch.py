"""transformers behind the seam: the native engine's answers, two ways to the same one, stopped in the middle, refusals.

test_parity.py compares it with transformers driven by itself.
"""

import gc
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
import weakref

import numpy as np
import pytest
from checkpoints import make_checkpoint
from PIL import Image
from quantized import make_quantized

torch = pytest.importorskip("torch", reason="backend torch needs it; install the [torch] extra")
transformers = pytest.importorskip("transformers")

import safetensors.torch as safetensors  # noqa: E402

from migician.calib.scenes import TASKS, held_out  # noqa: E402
from migician.runtime.backends import open_engine  # noqa: E402
from migician.runtime.backends import torch as backend  # noqa: E402
from migician.runtime.backends.base import Options  # noqa: E402
from migician.runtime.errors import Cancelled, MigicianError, ModelFileError, UnsupportedError  # noqa: E402
from migician.runtime.files.mig import write_mig  # noqa: E402
from migician.runtime.files.open import open_checkpoint  # noqa: E402
from migician.runtime.image import load_picture  # noqa: E402
from migician.runtime.model import load  # noqa: E402

pytestmark = pytest.mark.slow

SHAPES = {
    "mha-tied": {"hidden": 128, "heads": 4, "kv_heads": 4, "v_dim": 64},
    "gqa2-untied-v5": {"hidden": 256, "layers": 3, "heads": 8, "kv_heads": 4, "tied": False, "layout": "v5"},
    "gqa7-f32-nested": {
        "hidden": 448,
        "heads": 7,
        "kv_heads": 1,
        "tied": False,
        "v_dim": 128,
        "v_heads": 4,
        "shards": 3,
        "dtype": "float32",
        "layout": "nested",
    },
}
SIZES = [(97, 61), (300, 40), (40, 280)]
PROMPT = list(range(40, 70))


def draw(count, seed=0):
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 255, (h, w, 3), np.uint8)) for w, h in SIZES[:count]]


def assert_same(answer, other, atol=2e-3):
    """The same tokens, each as probable; a penalty keeps random models from repeating one token for ever."""
    assert [token.id for token in answer.tokens] == [token.id for token in other.tokens]
    scores = [[token.logprob for token in each.tokens] for each in (answer, other)]
    np.testing.assert_allclose(*scores, atol=atol)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """On a busy machine torch's threads wait for each other longer than these models compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=list(SHAPES))
def pair(request, tmp_path_factory):
    """(backend torch, backend native, folder), both in fp32."""
    folder = make_checkpoint(
        tmp_path_factory.mktemp(request.param), seed=3, max_pixels=28 * 28 * 64, **SHAPES[request.param]
    )
    with load(folder, precision="fp32", backend="torch") as ours, load(folder, precision="fp32") as native:
        yield ours, native, folder


@pytest.fixture
def engine(tiny):
    """The engine alone, in fp32."""
    with open_checkpoint(tiny) as checkpoint:
        yield open_engine("torch", checkpoint, Options(fp32=True))


def greedy_tokens(engine, count, penalty=1.2):
    """[(token, log-probability)] after what the engine holds, one by one."""
    found = []
    for _ in range(count):
        found.append(engine.greedy(penalty))
        engine.append([found[-1][0]])
    return found


# ---- the same numbers


@pytest.mark.parametrize("count", [0, 1, 3])
def test_answers_equal_the_native_ones(pair, count):
    ours, native, _ = pair
    ask = {"max_new_tokens": 16, "repetition_penalty": 1.3}
    answer = ours.ground(draw(count), "find the thing", **ask)
    assert_same(answer, native.ground(draw(count), "find the thing", **ask))
    assert len(answer.tokens) >= 8 and answer.stats["weights_mb"] > 0


@pytest.mark.parametrize("count", [0, 1, 3])
def test_given_answers_score_as_in_the_native_engine(pair, count):
    ours, native, _ = pair
    text = "It is (12,34),(56,78) in the image. " * 6  # more tokens than one block of logits
    got = ours.logprobs(draw(count), "where?", text)
    assert got.dtype == np.float32 and len(got) > backend._LOGIT_ROWS
    np.testing.assert_allclose(got, native.logprobs(draw(count), "where?", text), atol=2e-3)


def test_a_second_question_and_a_stream_equal_the_native_ones(pair):
    answers = []
    for model in pair[:2]:
        chat = model.chat(draw(3))
        first, second = (chat.ask(words, max_new_tokens=8, repetition_penalty=1.3) for words in ("what?", "and where?"))
        assert second.stats["reused_pictures"] == 3 and second.stats["reused_tokens"] > first.prompt_tokens
        stream = model.stream(draw(2), "where?", max_new_tokens=8, repetition_penalty=1.3)
        steps = list(stream)
        assert [step.token for step in steps] == [token.id for token in stream.answer.tokens]
        answers.append((first, second, stream.answer))
    for ours, native in zip(*answers, strict=True):
        assert_same(ours, native)


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_other_floats_are_read_as_the_native_engine_reads_them(tmp_path, dtype):
    folder = make_checkpoint(tmp_path / "model", dtype="float32", tied=False)
    path = folder / "model.safetensors"
    weights = {name: w.to(getattr(torch, dtype)) for name, w in safetensors.load_file(path).items()}
    safetensors.save_file(weights, path)
    with load(folder, precision="fp32") as native, load(folder, precision="fp32", backend="torch") as other:
        wanted, found = (m.logprobs(draw(1), "where?", "the cup is here") for m in (native, other))
    np.testing.assert_allclose(found, wanted, atol=2e-3)


def test_nano_finds_the_same_boxes():
    with load("nano", precision="fp32", backend="torch") as ours, load("nano", precision="fp32") as native:
        for task in TASKS:
            (item,) = held_out(task, 1)
            answers = [m.ground(item.scene["images"], item.question.text, max_new_tokens=48) for m in (ours, native)]
            assert answers[0].boxes and answers[0].boxes[0].grid == answers[1].boxes[0].grid
            assert_same(*answers)


def test_a_vision_rope_of_another_base_is_taken_over_or_refused(tmp_path):
    folder = make_checkpoint(tmp_path / "model", layout="v5")
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["rope_parameters"]["rope_theta"] = 123.0
    (folder / "config.json").write_text(json.dumps(config))
    if not hasattr(backend.Qwen2VLVisionConfig, "default_rope_type"):
        with pytest.raises(UnsupportedError, match=r"model: .*newer transformers"):
            load(folder, backend="torch")
        return
    with load(folder, precision="fp32", backend="torch") as ours, load(folder, precision="fp32") as native:
        assert_same(*(model.ground(draw(2), "where?", max_new_tokens=8) for model in (ours, native)))


def test_a_mig_file_is_read_in_place(tiny, tmp_path):
    with open_checkpoint(tiny) as checkpoint:
        write_mig(tmp_path / "model.mig", checkpoint)
    with load(tiny, backend="torch") as folder, load(tmp_path / "model.mig", backend="torch") as mig:
        stored = mig._checkpoint.tensors["model.layers.1.mlp.up_proj.weight"]
        layer = mig._engine._model.model.language_model.layers[1]
        assert layer.mlp.up_proj.weight.data_ptr() == stored.data.ctypes.data
        assert mig._engine.weights_bytes == sum(tensor.nbytes for tensor in mig._checkpoint.tensors.values())
        assert_same(*(model.ground(draw(2), "where?", max_new_tokens=8) for model in (folder, mig)), atol=0)


def test_bf16_is_near_and_never_guesses(tiny):
    ask = {"max_new_tokens": 12, "repetition_penalty": 1.3}
    with load(tiny, backend="torch") as half, load(tiny, backend="torch", precision="fp32") as full:
        assert half._engine.versions["dtype"] == "bfloat16" and half._engine.verify_rows == 1
        text = "the image is at (1,2)"
        scores = [model.logprobs(draw(2), "where?", text) for model in (half, full)]
        np.testing.assert_allclose(*scores, atol=0.2)
        assert np.abs(scores[0] - scores[1]).max() > 1e-4  # it is another arithmetic
        drafted = half.ground(draw(1), "where?", **ask)
    with load(tiny, backend="torch", speculate=False) as plain:
        assert_same(drafted, plain.ground(draw(1), "where?", **ask), atol=0)


# ---- one timeline


def test_a_kept_prefix_equals_a_cold_start(engine, monkeypatch):
    monkeypatch.setattr(backend, "_CHUNK", 16)
    pre, image = engine._preprocessor, engine._config.image_token
    pictures = [engine.encode(load_picture(each, pre).rgb) for each in draw(2)]
    places = [[image] * picture.tokens for picture in pictures]
    first = [*PROMPT, *places[0], 5, *places[1], *PROMPT]
    second = [*first[:-10], 9, 8, 7]
    assert engine.sync(first, pictures) == 0
    engine.append([3, 4])
    assert engine.sync(second, pictures) == len(first) - 10
    warm = greedy_tokens(engine, 6)
    assert engine.sync(second, pictures) == len(second) - 1  # its logits are gone
    assert engine.sync(second, pictures) == len(second)
    again = greedy_tokens(engine, 6)
    assert engine.sync([1, 2], []) == 0
    engine.sync(second, pictures)
    for one, other, cold in zip(warm, again, greedy_tokens(engine, 6), strict=True):
        assert one[0] == other[0] == cold[0]
        assert one[1] == pytest.approx(cold[1], abs=1e-4) and other[1] == pytest.approx(cold[1], abs=1e-4)
    other = engine.encode(load_picture(draw(1)[0], pre).rgb)  # the same pixels, but another object
    assert engine.sync(second, [other, pictures[1]]) == len(PROMPT)


def test_one_picture_may_stand_twice_and_across_chunks(tiny, monkeypatch):
    monkeypatch.setattr(backend, "_CHUNK", 7)
    image = draw(3)[2]
    with load(tiny, precision="fp32", backend="torch") as ours, load(tiny, precision="fp32") as native:
        for images in ([image, image], [image, *draw(1), image]):
            answers = [model.ground(images, "where?", max_new_tokens=6) for model in (ours, native)]
            assert_same(*answers)


def test_verified_guesses_equal_token_by_token(engine):
    penalty = 1.2
    engine.sync(PROMPT, [])
    plain = greedy_tokens(engine, 12, penalty)
    tokens = [token for token, _ in plain]
    for wrong in (None, 1, 3, 5):  # the place of a guess that is no greedy choice
        guesses = tokens[:6]
        if wrong is not None:
            guesses[wrong] = (guesses[wrong] + 1) % 200
        engine.sync(PROMPT, [])
        assert engine.greedy(penalty) == pytest.approx(plain[0], abs=1e-4)
        found = engine.verify(guesses, penalty)
        assert len(found) == (wrong or 6)
        found += engine.verify([found[-1][0]], penalty)
        for got, want in zip(found, plain[1:], strict=False):
            assert got == pytest.approx(want, abs=1e-4)


def test_drafts_change_no_answer():
    guessed = []
    how = {"precision": "fp32", "backend": "torch"}
    with load("nano", **how) as drafted, load("nano", **how, speculate=False) as plain:
        for task in TASKS[:3]:
            (item,) = held_out(task, 1)
            answers = [model.ground(item.scene["images"], item.question.text) for model in (drafted, plain)]
            assert_same(*answers)
            guessed.append(answers[0].stats["tokens_per_pass"])
    assert max(guessed) > 1.2  # some guesses came true


@pytest.mark.parametrize("kind", [Cancelled, KeyboardInterrupt])
@pytest.mark.parametrize("work", ["sync", "append", "verify"])
def test_work_stopped_between_layers_leaves_the_timeline_whole(engine, monkeypatch, work, kind):
    monkeypatch.setattr(backend, "_CHUNK", 8)
    second = [*PROMPT[:20], *range(80, 100)]
    engine.sync(PROMPT, [])
    plain = greedy_tokens(engine, 6)
    engine.sync(second, [])
    after = greedy_tokens(engine, 6)

    def stop(*_):
        if next(passes) == 1:  # the second chunk, or the second token, has the first layer's keys by now
            if kind is KeyboardInterrupt:
                raise kind
            engine.cancel()

    calls = {
        "sync": lambda: engine.sync(second, []),
        "append": lambda: engine.append(list(range(10, 40)), logprobs=True),
        "verify": lambda: [engine.verify([5], 1.2) for _ in range(3)],
    }
    engine.sync([1], [])
    engine.sync(PROMPT, [])
    passes = itertools.count()
    hook = engine._model.model.language_model.layers[0].register_forward_hook(stop)
    with pytest.raises(kind):
        calls[work]()
    hook.remove()
    lengths = [layer.keys.shape[-2] for layer in engine._cache.layers]
    assert len(set(lengths)) > 1  # it was stopped in the middle indeed
    if work == "sync":
        assert engine.sync(second, []) == 28  # one chunk of it was through
        assert [token for token, _ in greedy_tokens(engine, 6)] == [token for token, _ in after]
    assert engine.sync(PROMPT, []) == (20 if work == "sync" else len(PROMPT) - 1)
    for got, want in zip(greedy_tokens(engine, 6), plain, strict=True):
        assert got == pytest.approx(want, abs=1e-4)


def test_another_thread_cancels(tmp_path):
    folder = make_checkpoint(tmp_path / "deep", v_depth=40, max_pixels=28 * 28 * 2000)
    image = Image.fromarray(np.zeros((616, 616, 3), np.uint8))
    with load(folder, backend="torch", cache_bytes=0) as model:
        threading.Timer(0.1, model.cancel).start()
        with pytest.raises(Cancelled):
            for _ in range(100):
                model.ground([image], "x", max_new_tokens=1)
        assert model.ground(draw(1), "x", max_new_tokens=2).tokens


def test_a_signal_stops_the_encoder_between_layers(tmp_path):
    folder = make_checkpoint(tmp_path / "deep", v_depth=40, max_pixels=28 * 28 * 2000)
    image = Image.fromarray(np.zeros((616, 616, 3), np.uint8))

    def stop(*_):
        raise KeyboardInterrupt

    with load(folder, backend="torch", precision="fp32", cache_bytes=0) as model:
        model.ground([image], "x", max_new_tokens=1)
        start = time.perf_counter()
        model.ground([image], "x", max_new_tokens=1)
        whole = time.perf_counter() - start
        before = signal.signal(signal.SIGALRM, stop)
        try:
            signal.setitimer(signal.ITIMER_REAL, whole / 5)
            start = time.perf_counter()
            with pytest.raises(KeyboardInterrupt):
                model.ground([image], "x", max_new_tokens=1)
            assert time.perf_counter() - start < 0.8 * whole
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        assert model.ground(draw(1), "x", max_new_tokens=2).tokens


def test_closing_lets_go_of_the_weights(tiny):
    model = load(tiny, backend="torch", precision="fp32")
    model.ground(draw(1), "x", max_new_tokens=2)
    weights = weakref.ref(model._engine._model.lm_head.weight)
    gc.collect()
    gc.disable()
    try:
        model.close()
        assert weights() is None
    finally:
        gc.enable()
    with pytest.raises(MigicianError, match="closed"):
        model.ground([], "x")


# ---- what is refused


def test_what_does_not_fit_the_timeline_is_one_line_and_costs_nothing(engine):
    with pytest.raises(MigicianError, match="no prompt"):
        engine.greedy()
    engine.sync(PROMPT, [])
    want, image = engine.greedy(), engine._config.image_token
    picture = engine.encode(np.zeros((56, 84, 3), np.uint8))
    for wrong in ([1, 2], [1, image], [image] * 7):
        with pytest.raises(MigicianError, match="picture"):
            engine.sync(wrong, [picture])
    with pytest.raises(MigicianError, match="no tokens"):
        engine.sync([], [])
    for wrong in ([-1], [10**6]):
        with pytest.raises(MigicianError, match="vocabulary"):
            engine.append(wrong)
    with pytest.raises(MigicianError, match="picture's place"):
        engine.verify([image])
    for penalty in (0.0, -1.0, float("nan")):
        with pytest.raises(MigicianError, match="penalty"):
            engine.greedy(penalty)
    assert engine.greedy() == want and engine.sync(PROMPT, []) == len(PROMPT)


def test_a_quantized_file_is_refused(tiny, tmp_path):
    path = make_quantized(tiny, tmp_path / "small.mig")
    with pytest.raises(UnsupportedError, match=r"small\.mig: .*use backend native, or give the bf16 checkpoint"):
        load(path, backend="torch")


def test_a_geometry_that_transformers_lacks_is_refused(tmp_path):
    folder = make_checkpoint(tmp_path / "wide", hidden=128, heads=4, head_dim=64)
    with pytest.raises(UnsupportedError, match=r"wide: .*use backend native"):
        load(folder, backend="torch")


@pytest.mark.parametrize(
    ("tensor", "words"), [("visual.merger.mlp.2.bias", "encoder"), ("model.norm.weight", "logits")]
)
def test_nan_weights_are_told(tiny, tensor, words):
    with open_checkpoint(tiny) as checkpoint:
        broken = checkpoint.tensors[tensor]
        checkpoint.tensors[tensor] = type(broken)(
            tensor, "F32", broken.shape, np.full(broken.shape, np.nan, "<f4").view("u1")
        )
        engine = open_engine("torch", checkpoint, Options(fp32=True))
        with pytest.raises(ModelFileError, match=f"{words}.* not finite"):
            engine.sync([engine._config.image_token] * 6, [engine.encode(np.zeros((56, 84, 3), np.uint8))])


MEMORY = """
import resource, sys
import numpy as np
from migician.runtime.backends import open_engine
from migician.runtime.backends.base import Options
from migician.runtime.errors import MigicianError, OutOfMemory
from migician.runtime.files.open import open_checkpoint

def scarce(mb, call):
    used = int(open("/proc/self/status").read().split("VmSize:")[1].split()[0]) << 10
    resource.setrlimit(resource.RLIMIT_AS, (used + (mb << 20), resource.RLIM_INFINITY))
    try:
        call()
    except MigicianError as error:
        print(type(error).__name__, error)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

checkpoint = open_checkpoint(sys.argv[1])
engine = open_engine("torch", checkpoint, Options(threads=1, fp32=True))
engine.encode(np.zeros((56, 56, 3), np.uint8))
engine.sync(list(range(100)), [])
scarce(40, lambda: open_engine("torch", checkpoint, Options(threads=1, fp32=True)))
scarce(40, lambda: engine.encode(np.zeros((2800, 2800, 3), np.uint8)))
print(engine.sync(list(range(100)), []))
scarce(40, lambda: engine.append(list(range(100)), logprobs=True))
print(engine.sync(list(range(100)), []), engine.greedy()[1] < 0)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits its own memory as Linux counts it")
def test_the_end_of_memory_is_told(tmp_path):
    folder = make_checkpoint(tmp_path / "wide", hidden=64, vocab=250_000)
    done = subprocess.run([sys.executable, "-c", MEMORY, str(folder)], capture_output=True, text=True, timeout=120)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == 5, done.stderr
    assert lines[0].startswith("OutOfMemory no memory for the weights on ") and "smaller model" in lines[0]
    assert lines[1].startswith("OutOfMemory no memory for a picture") and "--max-side" in lines[1]
    assert lines[2] == "100"  # the timeline is no part of that
    assert lines[3].startswith("OutOfMemory no memory for 200 tokens") and "fewer or smaller" in lines[3]
    assert lines[4] == "0 True"


# ---- the command


def run(*words, code=None):
    call = ["-m", "migician.runtime.run"] if code is None else ["-c", code]
    return subprocess.run(
        [sys.executable, *call, *map(str, words)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=120,
    )


@pytest.mark.slow
def test_the_command_answers_and_stderr_stays_clean(tiny, picture):
    words = ("--model", tiny, "--max-new-tokens", 6, "--precision", "fp32", "--json", "--stats", "--logprobs")
    done = run(picture, picture, "where?", "--backend", "torch", *words)
    assert done.returncode == 0 and done.stderr.count("\n") == 1 and done.stderr.startswith("model model: bf16, ")
    answer, native = json.loads(done.stdout), json.loads(run(picture, picture, "where?", *words).stdout)
    assert (answer["backend"], native["backend"]) == ("torch", "native")
    assert answer["text"] == native["text"] and len(answer["tokens"]) == len(native["tokens"])
    assert answer["stats"].keys() == native["stats"].keys()


@pytest.mark.parametrize("package", ["torch", "transformers"])
def test_a_missing_package_is_one_line(tiny, picture, package):
    code = f"import sys; sys.modules[{package!r}] = None; from migician.runtime.run import main; main()"
    done = run(picture, "where?", "--model", tiny, "--backend", "torch", code=code)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "pip install 'migician[torch]'" in done.stderr and package in done.stderr
    assert run(picture, "where?", "--model", tiny, "--max-new-tokens", 1, code=code).returncode == 0


def test_it_says_what_computes_and_takes_threads(tiny):
    try:
        with open_checkpoint(tiny) as checkpoint:
            engine = open_engine("torch", checkpoint, Options(threads=3))
            assert torch.get_num_threads() == 3
            open_engine("torch", checkpoint, Options(threads=0))
            assert torch.get_num_threads() == 3  # 0 leaves the choice to torch
    finally:
        torch.set_num_threads(1)
    versions = engine.versions
    assert versions["torch"] == torch.__version__ and versions["transformers"] == transformers.__version__
    assert versions["device"].startswith("cuda" if torch.cuda.is_available() else "cpu")
    assert versions["attention"] in ("sdpa", "flash_attention_2")
