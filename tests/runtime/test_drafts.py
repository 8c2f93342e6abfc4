"""Guesses at coming tokens: where they come from, when they pay, and that no answer depends on them."""

import numpy as np
import pytest
from checkpoints import make_checkpoint
from PIL import Image
from quantized import make_quantized

from migician.bench.speculation import measure
from migician.calib.scenes import held_out
from migician.runtime.backends.native import VERIFY_ROWS
from migician.runtime.drafts import (
    DIGIT3,
    DIGIT_ON,
    FORCED,
    PHRASE2,
    PHRASE3,
    PHRASE_ON,
    BoxGrammar,
    Draft,
    Pace,
    Phrases,
    Speculator,
    Turns,
)
from migician.runtime.errors import MigicianError
from migician.runtime.files.open import open_checkpoint
from migician.runtime.model import load
from migician.runtime.prompt import Vocabulary

BOX = "<|box_start|>(316,58),(764,999)<|box_end|>"


@pytest.fixture(autouse=True)
def always_drafted(monkeypatch, request):
    """Every answer is drafted, whatever this machine makes of it, but where that choice itself is tested."""
    if "turns" not in request.node.name:
        monkeypatch.setattr(Turns, "drafted", lambda self: True)


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8))


@pytest.fixture(scope="module")
def bytes_of_text(tiny):
    """A byte-level vocabulary, as Qwen2-VL's."""
    with open_checkpoint(tiny) as checkpoint:
        return Vocabulary(checkpoint.tokenizer_json)


@pytest.fixture(scope="module")
def words():
    """A vocabulary of words: nano's."""
    with open_checkpoint("nano") as checkpoint:
        return Vocabulary(checkpoint.tokenizer_json)


@pytest.fixture(params=["bytes", "words"])
def vocabulary(request, bytes_of_text, words):
    return bytes_of_text if request.param == "bytes" else words


# The box grammar


def walk(grammar, vocabulary, text):
    """(forced, in a number) after all of a text."""
    state, token = (-1, 0, 0), -1
    for token in vocabulary.encode(text):
        state = grammar.step(state, token)
    return list(grammar.forced(state, token)), state[0] >= 0


def test_all_but_the_digits_of_a_box_is_foreseen(vocabulary):
    grammar = BoxGrammar(vocabulary)
    tokens = vocabulary.encode("<|box_start|>(316,158),(764,999)<|box_end|>")
    state, guessed = (-1, 0, 0), 0
    for at, token in enumerate(tokens[:-1]):
        state = grammar.step(state, token)
        forced = list(grammar.forced(state, token))
        assert forced == tokens[at + 1 : at + 1 + len(forced)], vocabulary.decode(tokens[: at + 1])
        digit = vocabulary.token_bytes(tokens[at + 1]).isdigit()
        assert bool(forced) != digit, vocabulary.decode(tokens[: at + 1])
        guessed += bool(forced)
    assert guessed == len(tokens) - 12 - 1  # all but twelve digits and the opening tag
    assert grammar.step(state, tokens[-1]) == (-1, 0, 0)


def test_short_coordinates_are_followed(vocabulary):
    grammar = BoxGrammar(vocabulary)
    assert walk(grammar, vocabulary, "<|box_start|>(31,5),(764,") == ([], True)
    assert walk(grammar, vocabulary, "<|box_start|>(31,5),(764") == (vocabulary.encode(","), True)
    assert walk(grammar, vocabulary, "<|box_start|>(1000,5),(31,999") == (vocabulary.encode(")<|box_end|>"), True)


@pytest.mark.parametrize(
    "text",
    ["<|box_start|>316", "<|box_start|>(a", "<|box_start|>(316))", "<|box_start|>(,", BOX + "(", "plain words", ")"],
)
def test_outside_of_a_sound_box_nothing_is_forced(bytes_of_text, text):
    assert walk(BoxGrammar(bytes_of_text), bytes_of_text, text) == ([], False)


def test_a_reference_is_followed_by_a_box(vocabulary):
    after = walk(BoxGrammar(vocabulary), vocabulary, "<|object_ref_end|>")
    assert after == (vocabulary.encode("<|box_start|>("), False)


def test_a_vocabulary_without_digits_has_no_grammar():
    class Wordless:
        special = {}  # noqa: RUF012

        def encode(self, text):
            return [1]

        def token_bytes(self, token):
            return b"box"

    grammar = BoxGrammar(Wordless())
    assert grammar.parts == () and grammar.forced(grammar.step((-1, 0, 0), 1), 1) == ()


# Phrases and what pays


def test_phrases_are_found_where_they_were_last_seen():
    phrases = Phrases([1, 2, 3, 4, 1, 2, 3, 5, 9, 2, 3])
    assert phrases.tokens[phrases.following((1, 2, 3))] == 5
    assert phrases.tokens[phrases.following((2, 3))] == 5  # the last two are not yet followed
    assert phrases.following((7, 7)) is None
    phrases.push(6)
    assert phrases.tokens[phrases.following((2, 3))] == 6
    broken = Phrases([1, 2, -1, 3])
    assert broken.following((1, 2)) is None


def test_a_draft_ends_before_end_of_text(bytes_of_text):
    stop = bytes_of_text.special["<|im_end|>"]
    speculator = Speculator(bytes_of_text, rows=8, stop=[stop])
    speculator.remember([40, 41, 42, stop, 43])
    draft = speculator.begin([7])
    for token in (40, 41):
        draft.push(token)
    assert draft.guess(8)[0] == [42]
    draft.finish()
    assert speculator.begin([stop, stop]).guess(8) == ([], [])


def test_earlier_answers_and_the_question_are_phrasebooks(bytes_of_text):
    speculator = Speculator(bytes_of_text, rows=8, stop=[])
    draft = speculator.begin([50, 51, 52, 53, 54, 60, 61])
    for token in (70, 71, 51, 52):
        draft.push(token)
    tokens, kinds = draft.guess(7)
    assert tokens[:2] == [53, 54] and kinds[:2] == [PHRASE2, PHRASE_ON]
    assert draft.guess(1)[0] == [53] and draft.guess(0) == ([], [])
    draft.finish()
    other = speculator.begin([1, 60, 61])
    other.push(70)  # (60, 61, 70) led into the earlier answer
    tokens, kinds = other.guess(7)
    assert tokens[0] == 71 and kinds[0] == PHRASE3


def test_a_draft_goes_on_behind_a_guessed_number(vocabulary):
    speculator = Speculator(vocabulary, rows=8, stop=[])
    speculator.pace.took(1, 1.0)
    for _ in range(9):
        speculator.pace.took(4, 1.0)  # rows cost nothing: whatever is guessed is tried
    before = speculator.begin(vocabulary.encode("where"))
    for token in vocabulary.encode(BOX):
        before.push(token)
    before.finish()
    draft = speculator.begin(vocabulary.encode("is"))
    for token in vocabulary.encode("<|box_start|>(3"):
        draft.push(token)
    tokens, kinds = draft.guess(7)
    assert tokens == vocabulary.encode(BOX)[3:10]
    assert kinds[0] == DIGIT3 and kinds[2] == FORCED and kinds[3] == DIGIT_ON
    assert draft.guess(2)[0] == tokens[:2]


def test_no_draft_ends_right_before_what_is_forced():
    pace = Pace(8)
    pace._seconds[1:3], pace._passes[1:4] = [1.0, 1.2], [9, 9, 9]
    pace._chances[DIGIT3] = 0.3
    assert pace.worth([DIGIT3]) == 1  # 1.3 tokens in 1.2 passes
    assert pace.worth([DIGIT3, FORCED]) == 2  # 1.6 in 1.4
    pace._seconds[3] = 2.2  # a third row is dear: 1.6 tokens do not pay
    assert pace.worth([DIGIT3]) == 1
    assert pace.worth([DIGIT3, FORCED]) == 0  # the forced one would have come along for nothing


def test_the_memory_of_answers_is_bounded(bytes_of_text):
    speculator = Speculator(bytes_of_text, rows=8, stop=[])
    for i in range(300):
        speculator.remember([i % 90, *range(100, 140)])
    assert len(speculator.memory.tokens) < 4500


def test_a_draft_is_as_long_as_it_pays():
    pace = Pace(8)
    assert pace.worth([FORCED] * 3) == 3  # nothing known yet: tried
    for _ in range(20):
        pace.took(1, 0.010)
        pace.took(4, 0.011)
    assert pace.cost(4) == pytest.approx(1.1, abs=0.01) and pace.cost(7) == pytest.approx(1.2, abs=0.02)
    for _ in range(100):
        pace.came([PHRASE2, PHRASE2, PHRASE2], 1)
    assert pace.worth([PHRASE2, PHRASE2, PHRASE2]) >= 1
    for _ in range(100):
        pace.took(4, 0.040)  # four rows cost as much as four passes
    assert pace.worth([PHRASE2] * 3) == 0
    assert pace.worth([]) == 0


def test_poor_guesses_are_given_up_and_tried_again_after_a_while():
    pace = Pace(8)
    for _ in range(50):
        pace.took(1, 0.010)
        pace.took(2, 0.015)
        pace.came([PHRASE2], 0)
    assert pace.worth([PHRASE2]) == 0
    waited = 0
    while not pace.worth([PHRASE2]):
        waited += 1
        assert waited < 5000
    assert waited > 30  # at most one pass in thirty is risked: under 3 %


def _answers(turns, count, seconds):
    """Lets answers of 20 tokens take so many seconds a token, drafted or not; returns which were drafted."""
    drafted = []
    for _ in range(count):
        drafted.append(turns.drafted())
        turns.took(drafted[-1], 20, 20 * seconds[drafted[-1]])
    return drafted


@pytest.mark.parametrize("faster", [True, False])
def test_turns_choose_the_faster_way_and_try_the_other_now_and_then(faster):
    drafted = _answers(Turns(), 500, {faster: 1.0, not faster: 1.4})
    assert set(drafted[:6]) == {True, False}
    assert [i for i in range(6, 500) if drafted[i] != faster] == [37, 101, 229, 485]  # 32 later, 64, 128, 256


def test_turns_draft_only_where_that_wins_by_more_than_answers_differ():
    drafted = _answers(Turns(), 500, {True: 1.0, False: 1.05})
    assert [i for i in range(6, 500) if drafted[i]] == [37, 101, 229, 485]


def test_turns_change_with_the_machine_and_pass_over_short_answers():
    turns = Turns()
    assert _answers(turns, 40, {True: 1.0, False: 1.4})[-1]
    assert not _answers(turns, 200, {True: 2.0, False: 1.4})[-1]
    before = dict(turns._seconds)
    turns.took(True, 3, 0.0)
    assert turns._seconds == before


def test_a_hiccup_of_the_machine_is_no_measurement():
    pace = Pace(8)
    for _ in range(10):
        pace.took(1, 0.010)
        pace.took(2, 0.011)
    pace.took(2, 5.0)
    assert pace.cost(2) < 1.4


# The answer is the same


@pytest.fixture(scope="module", params=["bf16", "f32", "quantized"])
def checkpoint(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "model"
    if request.param == "quantized":
        plain = make_checkpoint(folder, seed=3)
        return make_quantized(plain, folder.parent / "model.mig")
    return make_checkpoint(folder, seed=4, dtype="bfloat16" if request.param == "bf16" else "float32")


QUESTIONS = [
    "where?",
    "the cup, the cup, the cup in both images and the cup in the image",
    f"what is at {BOX} and at {BOX}?",
]


def plainly(model, pictures, prompt, **options):
    """Plain greedy decoding by the session alone: one token, one pass."""
    loaded = model._read(pictures, None)
    ids = model._prompt(prompt, loaded, (), options["max_new_tokens"])
    session = model._begin(len(ids) + options["max_new_tokens"])
    session.sync(ids, [session.encode(kept.picture.rgb) for kept in loaded])
    found = []
    while len(found) < options["max_new_tokens"]:
        token, logprob = session.greedy(options["repetition_penalty"])
        if token in model.config.eos_tokens:
            break
        found.append((token, logprob))
        session.append([token])
    return found


class Guesses:
    """Drafts from outside: pieces of a known answer, some of them spoiled."""

    def __init__(self, answer, wrong, length):
        self.answer, self.wrong, self.length = answer, wrong, length
        self.pushed, self.rounds = [], 0
        self.seen = []

    def push(self, token):
        self.pushed.append(token)

    def guess(self, room):
        self.rounds += 1
        guesses = self.answer[len(self.pushed) : len(self.pushed) + min(room, self.length, VERIFY_ROWS - 1)]
        if guesses and self.wrong and self.rounds % self.wrong == 0:
            guesses[self.rounds % len(guesses)] ^= 1
        return guesses, [0] * len(guesses)

    def verified(self, kinds, true, seconds):
        self.seen.append((len(kinds), true))

    def finish(self):
        pass


@pytest.mark.slow
@pytest.mark.parametrize(("penalty", "pictures"), [(1.0, 0), (1.05, 2), (1.3, 2)])
def test_speculation_equals_plain_greedy(checkpoint, penalty, pictures):
    images = [noise(90, 60), noise(60, 90, 1)][:pictures]
    options = {"max_new_tokens": 40, "repetition_penalty": penalty}
    with load(checkpoint) as model, load(checkpoint, speculate=False) as plain:
        for question in QUESTIONS * 2:  # the second time the memory knows the answer
            wanted = plainly(plain, images, question, **options)
            answer = model.ground(images, question, **options)
            assert [(t.id, t.logprob) for t in answer.tokens] == wanted
            one_by_one = plain.ground(images, question, **options)
            assert one_by_one.tokens == answer.tokens and one_by_one.finish == answer.finish
            assert one_by_one.stats["decode_passes"] >= answer.stats["decode_passes"]
            assert one_by_one.stats["tokens_per_pass"] == 1.0 <= answer.stats["tokens_per_pass"]


@pytest.mark.parametrize(("wrong", "length"), [(0, 1), (0, 7), (1, 3), (1, 7), (2, 1), (3, 7)])
def test_right_and_wrong_drafts_leave_the_answer_alone(checkpoint, wrong, length, monkeypatch):
    images = [noise(90, 60)]
    with load(checkpoint) as model:
        for penalty in (1.0, 1.3):
            for limit in (1, 2, 8, 9, 25):
                options = {"max_new_tokens": limit, "repetition_penalty": penalty}
                wanted = plainly(model, images, "where?", **options)
                # beyond its end the known answer goes on: what the limit cuts must not matter
                known = plainly(model, images, "where?", max_new_tokens=limit + 8, repetition_penalty=penalty)
                guesses = Guesses([token for token, _ in known], wrong, length)
                monkeypatch.setattr(model._speculator, "begin", lambda prompt, guesses=guesses: guesses)
                answer = model.ground(images, "where?", **options)
                assert [(t.id, t.logprob) for t in answer.tokens] == wanted
                assert guesses.pushed == [token for token, _ in wanted]
                if not wrong:
                    assert all(count == true for count, true in guesses.seen)
                if wrong == 1:
                    assert all(true < count for count, true in guesses.seen if count)


def test_end_of_text_inside_a_draft_ends_the_answer(tiny, monkeypatch):
    with load(tiny) as model:
        options = {"max_new_tokens": 12, "repetition_penalty": 5.0}
        known = [token for token, _ in plainly(model, [], "say it", **options)]
        end = next(at for at in range(4, 12) if known[at] not in known[:at])
        object.__setattr__(model.config, "eos_tokens", (known[end],))
        wanted = [token for token, _ in plainly(model, [], "say it", **options)]
        assert wanted == known[:end]
        for length in (1, 2, 4, 7):
            guesses = Guesses(known, 0, length)
            monkeypatch.setattr(model._speculator, "begin", lambda prompt, guesses=guesses: guesses)
            answer = model.ground([], "say it", **options)
            assert [t.id for t in answer.tokens] == wanted and answer.finish == "stop"


def test_stream_gives_the_same_steps_in_order(checkpoint):
    options = {"max_new_tokens": 40, "repetition_penalty": 1.0}
    with load(checkpoint, speculate=False) as plain:
        wanted = [(s.token, s.text, s.logprob) for s in plain.stream([noise(90, 60)], QUESTIONS[1], **options)]
    with load(checkpoint) as model:
        for _ in range(2):
            stream = model.stream([noise(90, 60)], QUESTIONS[1], **options)
            steps = list(stream)
            assert [(s.token, s.text, s.logprob) for s in steps] == wanted
            assert [s.elapsed_ms for s in steps] == sorted(s.elapsed_ms for s in steps)
        assert stream.answer.stats["decode_passes"] < len(wanted)  # it says the same phrases again


def test_chat_speculates_and_says_the_same(checkpoint):
    turns = []
    for speculate in (False, True):
        with load(checkpoint, speculate=speculate) as model:
            chat = model.chat([noise(90, 60)])
            turns.append([chat.ask(question, max_new_tokens=30).tokens for question in QUESTIONS])
    assert turns[0] == turns[1]


def test_nano_boxes_need_fewer_passes(monkeypatch):
    passes = [0, 0]
    with load("nano") as model, load("nano", speculate=False) as plain:
        monkeypatch.setattr(model._speculator.pace, "took", lambda rows, seconds: None)  # as if rows cost nothing
        for item in held_out("group_grounding", 4):
            pictures, question = list(item.scene["images"]), item.question.text
            answer, wanted = (m.ground(pictures, question, max_new_tokens=48) for m in (model, plain))
            assert answer.tokens == wanted.tokens and answer.boxes == wanted.boxes and answer.boxes
            assert wanted.stats["tokens_per_pass"] == 1.0
            passes[0] += answer.stats["decode_passes"]
            passes[1] += wanted.stats["decode_passes"]
    assert passes[1] > 1.5 * passes[0]


def test_the_command_compares_both_ways():
    found = measure("nano", 1, always=True)
    assert found["questions"] == 10 and found["different"] == 0
    assert found["tokens_per_pass"] > 1.2 and found["plain_ms"] > 0 < found["drafted_ms"]


def test_verify_refuses_what_it_cannot_take(tiny):
    with load(tiny) as model:
        session = model._begin(100)
        with pytest.raises(MigicianError, match="call migi_session_sync first"):
            session.verify([5])
        session.sync([5, 6, 7], [])
        with pytest.raises(MigicianError, match="at most 8"):
            session.verify([5] * (VERIFY_ROWS + 1))
        with pytest.raises(MigicianError, match="no tokens"):
            session.verify([])
        assert len(session.verify([5])) == 1 and session._session.length == 4


def test_drafts_have_the_shape_that_decoding_expects():
    assert {"push", "guess", "verified", "finish"} <= set(vars(Draft)) & set(vars(Guesses))
