"""One model for several threads, forked children and copies: right answers one after the other, or one clear line."""

import copy
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from migician.runtime.errors import Cancelled, MigicianError
from migician.runtime.fair_lock import FairLock
from migician.runtime.model import load


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8))


QUESTIONS = [([noise(90, 60, i % 3), noise(60, 90, i)][: i % 3], f"where is {i}?") for i in range(6)]


def told(answer):
    return answer.text, [(token.id, token.logprob) for token in answer.tokens]


def answers(model):
    return [told(model.ground(images, prompt, max_new_tokens=8)) for images, prompt in QUESTIONS]


@pytest.fixture(scope="module")
def wanted(tiny):
    with load(tiny, threads=2) as model:
        return answers(model)


def in_child(work):
    """Runs work() in a forked child; returns what it gave, in JSON, or fails after a minute."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:  # pragma: no cover
        signal.alarm(60)
        try:
            os.write(writing, json.dumps(work()).encode())
            os._exit(0)
        except BaseException as error:
            os.write(writing, repr(error).encode())
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading) as file:
        text = file.read()
    _, status = os.waitpid(child, 0)
    assert status == 0, (status, text)
    return json.loads(text)


def as_json(value):
    return json.loads(json.dumps(value))


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_that_share_a_model_get_the_right_answers(tiny, wanted, threads):
    with load(tiny, threads=threads) as model, ThreadPoolExecutor(8) as pool:
        order = np.random.default_rng(0).permutation(48) % len(QUESTIONS)

        def ask(i):
            images, prompt = QUESTIONS[i]
            if i % 2:
                return told(model.ground(images, prompt, max_new_tokens=8))
            return told(model.chat(images).ask(prompt, max_new_tokens=8))

        for i, found in zip(order, pool.map(ask, order), strict=True):
            assert found == wanted[i]


def test_streams_in_threads_end_right_or_say_that_they_were_overtaken(tiny, wanted):
    def stream(i):
        try:
            steps = model.stream(*QUESTIONS[i], max_new_tokens=8)
            return told(steps.finish())
        except MigicianError as error:
            assert "before this stream ended" in str(error)
            return None

    with load(tiny, threads=2) as model, ThreadPoolExecutor(6) as pool:
        order = [i % len(QUESTIONS) for i in range(36)]
        found = list(pool.map(stream, order))
        assert all(f in (None, wanted[i]) for i, f in zip(order, found, strict=True))
        assert told(model.ground(*QUESTIONS[3], max_new_tokens=8)) == wanted[3]


def test_a_model_closed_under_waiting_questions_says_so(tiny, wanted):
    with load(tiny, threads=1) as model, ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(model.ground, *QUESTIONS[i % 6], max_new_tokens=8) for i in range(12)]
        asked[0].result()
        model.close()
        for i, one in enumerate(asked):
            try:
                assert told(one.result()) == wanted[i % 6]
            except MigicianError as error:
                assert "closed" in str(error)


def test_cancel_from_another_thread_ends_the_answer_under_way_alone(tiny, wanted):
    with load(tiny, threads=2) as model:
        stream = model.stream(*QUESTIONS[1], max_new_tokens=200)
        next(stream)
        threading.Thread(target=model.cancel).start()
        with pytest.raises(Cancelled):
            stream.finish()
        assert told(model.ground(*QUESTIONS[1], max_new_tokens=8)) == wanted[1]


def test_a_loaded_model_answers_in_a_forked_child(tiny, wanted):
    with load(tiny, threads=2) as model:
        assert answers(model) == wanted  # the threads have worked
        assert in_child(lambda: answers(model)) == as_json(wanted)
        assert in_child(lambda: in_child(lambda: answers(model))) == as_json(wanted)  # a child of the child
        assert answers(model) == wanted


def test_a_child_forked_in_the_middle_of_another_threads_answer_is_sound(tiny, wanted):
    with load(tiny, threads=2) as model:
        stop = threading.Event()

        def keep_asking():
            while not stop.is_set():
                model.ground(*QUESTIONS[2], max_new_tokens=8)

        thread = threading.Thread(target=keep_asking)
        thread.start()
        try:
            for _ in range(5):
                time.sleep(0.02)
                assert in_child(lambda: answers(model)) == as_json(wanted)
        finally:
            stop.set()
            thread.join()


def test_a_stream_begun_before_the_fork_goes_on_on_both_sides(tiny, wanted):
    with load(tiny, threads=2) as model:
        stream = model.stream(*QUESTIONS[2], max_new_tokens=8)
        next(stream)
        assert in_child(lambda: told(stream.finish())) == as_json(wanted[2])
        assert told(stream.finish()) == wanted[2]


@pytest.mark.slow
def test_backend_torch_answers_in_a_forked_child(tiny):
    code = f"""
import sys
sys.path.insert(0, {os.path.dirname(__file__)!r}); sys.path.insert(0, {os.path.dirname(os.path.dirname(__file__))!r})
import test_sharing as t
with t.load({str(tiny)!r}, backend="torch", precision="fp32") as model:
    wanted = t.answers(model)
    found = t.in_child(lambda: t.answers(model))
    assert [text for text, _ in found] == [text for text, _ in wanted]
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


def test_workers_of_multiprocessing_ask_a_model_loaded_before(tiny, wanted):
    code = f"""
import multiprocessing, sys
sys.path.insert(0, {os.path.dirname(__file__)!r}); sys.path.insert(0, {os.path.dirname(os.path.dirname(__file__))!r})
import test_sharing as t
model = t.load({str(tiny)!r}, threads=2)
def ask(i):
    return t.told(model.ground(*t.QUESTIONS[i], max_new_tokens=8))
if __name__ == "__main__":
    ask(0)
    with multiprocessing.get_context("fork").Pool(4) as pool:
        print(t.json.dumps(pool.map(ask, [i % 6 for i in range(24)])))
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == as_json([wanted[i % 6] for i in range(24)])


def test_a_copied_model_opens_the_same_file_again(tiny, wanted, monkeypatch, tmp_path):
    with load(tiny, threads=1, max_pixels=5000, cache_bytes=0) as model:
        monkeypatch.chdir(tmp_path)
        with pickle.loads(pickle.dumps(model)) as other, copy.deepcopy(model) as third:
            plain = answers(model)
            assert answers(other) == answers(third) == plain
            assert other.preprocessor == model.preprocessor and other._cache.limit_bytes == 0
        with pytest.raises(MigicianError, match="ask anew"):
            pickle.dumps(model.chat([]))
        with pytest.raises(MigicianError, match="copy the answer"):
            pickle.dumps(model.stream([], "x"))
    with multiprocessing.get_context("spawn").Pool(1) as pool, load(tiny, threads=1) as model:
        assert pool.apply(answers, (model,)) == wanted


def test_the_lock_is_handed_on_in_order():
    lock, order, threads = FairLock(), [], []

    def wait(i):
        with lock:
            order.append(i)

    with lock:
        for i in range(20):
            threads.append(threading.Thread(target=wait, args=(i,)))
            threads[-1].start()
            while len(lock._waiting) <= i:
                time.sleep(0.001)
        assert lock.held
    for thread in threads:
        thread.join()
    assert order == list(range(20)) and not lock.held


def test_who_waits_can_be_interrupted_and_blocks_nobody():
    lock = FairLock()
    entered, leave = threading.Event(), threading.Event()

    def hold():
        with lock:
            entered.set()
            leave.wait(30)

    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    holder = threading.Thread(target=hold)
    holder.start()
    entered.wait(30)
    before = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(Stop), lock:
            pass
    finally:
        signal.signal(signal.SIGALRM, before)
    assert not lock._waiting
    leave.set()
    holder.join()
    with lock:
        assert lock.held
        with pytest.raises(MigicianError, match="in the middle of an answer"), lock:
            pass
    assert not lock.held
