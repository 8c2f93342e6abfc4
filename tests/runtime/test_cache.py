"""Work kept between questions: pictures by their content, the KV prefix, growing sessions; and no answer shows it."""

import json

import numpy as np
import pytest
from checkpoints import make_checkpoint
from click.testing import CliRunner
from PIL import Image
from quantized import make_quantized

from migician.bench.second_question import main as second_question
from migician.runtime import cache as cache_module
from migician.runtime.backends import native
from migician.runtime.backends.native import VERIFY_ROWS
from migician.runtime.cache import CACHE_BYTES, PictureCache
from migician.runtime.errors import Cancelled, ContextFullError, MigicianError, OutOfMemory
from migician.runtime.files.config import Preprocessor
from migician.runtime.model import load


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8))


def tokens(answer):
    return [(t.id, t.logprob) for t in answer.tokens]


def ids(answer):
    return [t.id for t in answer.tokens]


def prompt(model, pictures, question):
    return model._prompt(question, model._read(pictures, None), (), 12)


def shared(a, b):
    """Length of the common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class Encoded:
    """Stands for an encoded picture of so many bytes."""

    def __init__(self, size):
        self.bytes = size


def keep(cache, name, size):
    """Reads and encodes a 28x28 picture that takes `size` bytes in all; returns how many were encoded already."""
    kept = cache.read(np.full((28, 28, 3), name, np.uint8), Preprocessor(784, 784), None)
    return cache.encode([kept], lambda rgb: Encoded(size - rgb.nbytes))


def test_the_least_recently_used_pictures_leave_first():
    cache = PictureCache(10_000)
    assert [keep(cache, name, size) for name, size in ((1, 4000), (2, 4000), (3, 2000 + 400))] == [0, 0, 0]
    assert len(cache) == 2 and cache.size_bytes == 6400  # the third took the first one's place
    assert keep(cache, 2, 4000) == 1  # 3 is the oldest now
    assert keep(cache, 4, 5000) == 0 and cache.size_bytes == 9000
    assert keep(cache, 2, 4000) == keep(cache, 4, 5000) == 1
    assert keep(cache, 3, 2400) == 0 and cache.size_bytes == 7400


def test_a_picture_beyond_the_bound_is_not_kept_and_evicts_nothing():
    cache = PictureCache(10_000)
    assert keep(cache, 1, 7000) == 0
    assert keep(cache, 2, 10_001) == 0 == keep(cache, 2, 10_001)
    assert keep(cache, 1, 7000) == 1
    none = PictureCache(0)
    assert keep(none, 1, 3000) == 0 == keep(none, 1, 3000)
    assert len(none) == 0 == none.size_bytes


def test_a_picture_given_twice_counts_once():
    cache, pre = PictureCache(10_000), Preprocessor(784, 784)
    one, other = (cache.read(np.zeros((28, 28, 3), np.uint8), pre, None) for _ in range(2))
    assert one is other and (len(cache), cache.size_bytes) == (1, 2352)
    assert cache.encode([one, other], lambda rgb: Encoded(70)) == 1
    assert (len(cache), cache.size_bytes) == (1, 2352 + 70)
    cache.clear()
    assert (len(cache), cache.size_bytes) == (0, 0)


@pytest.fixture(scope="module", params=["plain", "quantized"])
def checkpoint(request, tiny, tmp_path_factory):
    if request.param == "plain":
        return tiny
    return make_quantized(tiny, tmp_path_factory.mktemp("quantized") / "model.mig")


def test_a_second_question_reuses_pictures_and_prefix_and_says_the_same(checkpoint):
    pictures = [noise(90, 60), noise(120, 150, 1)]
    questions = ["where is it?", "is it there?", "where is it?"]
    with load(checkpoint, cache_bytes=0) as cold:
        wanted = []
        for question in questions:
            cold._engine._session = None
            wanted.append(cold.ground(pictures, question, max_new_tokens=12))
    assert all(a.stats["reused_pictures"] == 0 == a.stats["reused_tokens"] for a in wanted)
    with load(checkpoint) as warm:
        for i, question in enumerate(questions):
            answer = warm.ground(pictures, question, max_new_tokens=12)
            assert tokens(answer) == tokens(wanted[i]), question  # to the bit
            assert answer.stats["reused_pictures"] == (2 if i else 0)
            same = i and shared(*[prompt(warm, pictures, q) for q in questions[i - 1 : i + 1]])
            assert answer.stats["reused_tokens"] == min(same, answer.prompt_tokens - VERIFY_ROWS - 1)


def test_other_pictures_with_the_same_question_are_not_mistaken(tiny):
    with load(tiny) as model, load(tiny, cache_bytes=0) as cold:
        for seed in (0, 1, 0, 2, 1):
            answer = model.ground([noise(90, 60, seed)], "x", max_new_tokens=8)
            cold._engine._session = None
            assert tokens(answer) == tokens(cold.ground([noise(90, 60, seed)], "x", max_new_tokens=8))
        assert answer.stats["reused_pictures"] == 1
        one = model.ground([noise(90, 60, 1), noise(90, 60, 0)], "x", max_new_tokens=8)
        other = model.ground([noise(90, 60, 0), noise(90, 60, 1)], "x", max_new_tokens=8)
        assert one.stats["reused_pictures"] == other.stats["reused_pictures"] == 2
        cold._engine._session = None
        assert tokens(other) == tokens(cold.ground([noise(90, 60, 0), noise(90, 60, 1)], "x", max_new_tokens=8))


@pytest.mark.parametrize("kind", ["path", "bytes", "array", "reversed", "pil", "palette"])
def test_a_kept_picture_is_not_read_again(tiny, tmp_path, monkeypatch, kind):
    picture = noise(90, 60)
    picture.save(tmp_path / "a.png")
    array = np.asarray(picture)
    give = {
        "path": lambda: tmp_path / "a.png",
        "bytes": lambda: (tmp_path / "a.png").read_bytes(),
        "array": lambda: array.copy(),
        "reversed": lambda: np.ascontiguousarray(array[:, :, ::-1])[:, :, ::-1],
        "pil": lambda: Image.fromarray(array),
        "palette": lambda: picture.quantize(16),  # read again, but not encoded again
    }[kind]
    read, load_picture = [], cache_module.load_picture
    monkeypatch.setattr(cache_module, "load_picture", lambda *a, **k: read.append(a) or load_picture(*a, **k))
    with load(tiny) as model:
        first = model.ground([give()], "where?", max_new_tokens=8)
        again = model.ground([give()], "where?", max_new_tokens=8)
        assert tokens(again) == tokens(first) and again.stats["reused_pictures"] == 1
        assert len(read) == (2 if kind == "palette" else 1)
        other = model.ground([give()], "where?", max_new_tokens=8, max_side=40)
        assert other.stats["reused_pictures"] == (kind == "palette")  # its pixels end as the same
        assert model._cache.size_bytes == sum(
            kept.picture.rgb.nbytes + kept.vision.bytes for kept, _ in model._cache._kept.values()
        )


def test_a_file_that_changed_is_read_again(tiny, tmp_path):
    with load(tiny) as model, load(tiny, cache_bytes=0) as cold:
        for seed in (0, 1):
            noise(90, 60, seed).save(tmp_path / "a.png")
            answer = model.ground([tmp_path / "a.png"], "where?", max_new_tokens=8)
            assert answer.stats["reused_pictures"] == 0
            cold._engine._session = None
            assert tokens(answer) == tokens(cold.ground([tmp_path / "a.png"], "where?", max_new_tokens=8))


def test_the_cache_keeps_its_bound_and_evicted_pictures_come_anew(tiny):
    with load(tiny) as model:
        plain = [model.ground([noise(90, 60, seed)], "x", max_new_tokens=6) for seed in range(3)]
        size = model._cache.size_bytes // 3
        assert size > 0
    with load(tiny, cache_bytes=2 * size + size // 2) as model:
        for seed, wanted in [(0, 0), (1, 0), (2, 0), (0, 0), (2, 1), (0, 1)]:
            answer = model.ground([noise(90, 60, seed)], "x", max_new_tokens=6)
            assert answer.stats["reused_pictures"] == wanted, seed
            assert ids(answer) == ids(plain[seed])
            assert model._cache.size_bytes <= 2 * size + size // 2
    assert len(model._cache) == 0  # closed


def test_chat_reuses_everything_but_the_new_question(tiny):
    pictures = [noise(90, 60), noise(120, 150, 1)]
    with load(tiny) as model:
        chat = model.chat(pictures)
        first = chat.ask("where?", max_new_tokens=10)
        model.ground([noise(70, 70, 5)], "something else", max_new_tokens=4)  # the session forgets, the pictures stay
        second = chat.ask("and now?", max_new_tokens=10)
        third = chat.ask("and then?", max_new_tokens=10)
    assert first.stats["reused_pictures"] == 0 and first.stats["reused_tokens"] == 0
    assert second.stats["reused_pictures"] == third.stats["reused_pictures"] == 2
    assert second.prompt_tokens > second.stats["reused_tokens"] < first.prompt_tokens
    assert third.stats["reused_tokens"] > second.prompt_tokens  # the second answer, too
    with load(tiny, cache_bytes=0) as cold:
        chat = cold.chat(pictures)
        again = [chat.ask(question, max_new_tokens=10) for question in ("where?", "and now?", "and then?")]
    assert [ids(answer) for answer in again] == [ids(first), ids(second), ids(third)]


def test_a_growing_session_keeps_what_it_has_and_says_the_same(tiny, monkeypatch):
    pictures = [noise(90, 60)]
    with load(tiny) as roomy:
        long = "word " * 300
        wanted = [roomy.ground(pictures, question, max_new_tokens=8) for question in ("a", long, "a")]
    monkeypatch.setattr(native, "_ROOMY_CONTEXT", 1)
    with load(tiny) as model:
        answers, contexts = [], []
        for question in ("a", long, "a"):
            answers.append(model.ground(pictures, question, max_new_tokens=8))
            contexts.append(model._engine._session.context)
    assert contexts[0] < contexts[1] == contexts[2]
    assert [tokens(a) for a in answers] == [tokens(a) for a in wanted]
    assert answers[1].stats["reused_tokens"] == wanted[1].stats["reused_tokens"] > 6  # kept across the growth


def test_without_memory_to_grow_the_prompt_is_computed_again(tiny, monkeypatch):
    monkeypatch.setattr(native, "_ROOMY_CONTEXT", 1)
    with load(tiny) as model:
        first = model.ground([noise(90, 60)], "a", max_new_tokens=4)

        def refuse(*_):
            raise OutOfMemory("no memory")

        monkeypatch.setattr(native.Session, "grow", refuse)
        answer = model.ground([noise(90, 60)], "word " * 300, max_new_tokens=4)
        assert answer.stats["reused_tokens"] == 0 and answer.stats["reused_pictures"] == 1
        assert ids(model.ground([noise(90, 60)], "a", max_new_tokens=4)) == ids(first)


def test_a_system_that_promises_little_memory_gets_a_small_session(tiny, monkeypatch):
    made, new = [], native.Session.__init__

    def stingy(self, *arguments, context, **more):
        made.append(context)
        if context > 1000:
            raise OutOfMemory("no memory")
        new(self, *arguments, context=context, **more)

    monkeypatch.setattr(native.Session, "__init__", stingy)
    with load(tiny) as model:
        assert model.ground([noise(90, 60)], "a", max_new_tokens=4).tokens
    assert len(made) == 2 and made[0] > 1000 > made[1]


def test_errors_and_cancelling_leave_nothing_wrong_behind(tmp_path):
    folder = make_checkpoint(tmp_path / "model", max_positions=400)
    pictures = [noise(90, 60), noise(60, 90, 1)]
    with load(folder, cache_bytes=0) as cold:
        wanted = cold.ground(pictures, "where?", max_new_tokens=20)
    with load(folder) as model:
        model.cancel()
        with pytest.raises(Cancelled):  # while the first picture is encoded
            model.ground(pictures, "where?", max_new_tokens=20)
        assert tokens(model.ground(pictures, "where?", max_new_tokens=20)) == tokens(wanted)
        for taken in (1, 3, 7):
            stream = model.stream(pictures, "where?", max_new_tokens=20)
            for _ in range(taken):
                next(stream)
            model.cancel()
            with pytest.raises(Cancelled):
                list(stream)
            assert tokens(model.ground(pictures, "where?", max_new_tokens=20)) == tokens(wanted)
        with pytest.raises(ContextFullError):
            model.ground(pictures, "where? " * 400, max_new_tokens=20)
        chat = model.chat(pictures)
        model.cancel()
        with pytest.raises(Cancelled):
            chat.ask("where?", max_new_tokens=20)
        assert tokens(chat.ask("where?", max_new_tokens=20)) == tokens(wanted)


def test_a_stream_that_was_overtaken_says_so(tiny):
    with load(tiny) as model:
        stream = model.stream([noise(90, 60)], "where?", max_new_tokens=9)
        next(stream)
        wanted = model.ground([], "x", max_new_tokens=3)
        with pytest.raises(MigicianError, match="before this stream ended"):
            list(stream)
        abandoned = model.stream([noise(90, 60)], "where?", max_new_tokens=9)
        next(abandoned)
        assert tokens(model.ground([], "x", max_new_tokens=3)) == tokens(wanted)


def test_a_bound_below_zero_is_refused(tiny):
    with pytest.raises(MigicianError, match="cache_bytes is -1"):
        load(tiny, cache_bytes=-1)
    assert CACHE_BYTES == 256 << 20


@pytest.mark.parametrize("form", [[], ["--jpeg"]])
def test_the_second_question_is_timed_behind_the_first(tiny, form):
    options = ["--model", str(tiny), "--pictures", "2", "--size", "90x60", "--repeat", "2", "--threads", "1"]
    found = json.loads(CliRunner().invoke(second_question, options + form).stdout)
    assert (found["pictures"], found["width"], found["height"], found["new_tokens"]) == (2, 90, 60, 1)
    assert min(found["first_ms"], found["second_ms"]) > 0
    assert found["share"] == pytest.approx(found["second_ms"] / found["first_ms"], abs=0.01)
    assert "'9' is no WIDTHxHEIGHT" in CliRunner().invoke(second_question, ["--size", "9"]).stderr
