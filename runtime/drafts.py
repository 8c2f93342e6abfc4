"""Guesses at the tokens to come, so that one pass over the weights yields several: lossless speculative decoding.

Where guesses come from, the surest first:

    forced   inside a box `<|box_start|>(316,58),(764,999)<|box_end|>` everything but the digits follows from the tokens
             before; how a vocabulary cuts these pieces is learned from its own encoding of one box
    phrase   what followed the last two or three tokens before: in the question, in this answer, in earlier answers
    digit    the same inside a number, where it comes true less often

A guess never changes the answer: the engine verifies all in one pass and keeps the greedy choice at every position
(migi_session_verify). It only has to pay: `Pace` knows what a pass of n rows costs here, measured as decoding goes, and
how often each kind of guess came true, and cuts a draft where the expected tokens per second are highest. `Turns`
compares whole answers with and without drafts: where guessing itself costs more than it saves, none is made.
Source: speculative decoding, arXiv 2211.17192; drafts from the prompt, "prompt lookup decoding" (Saxena 2023).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from .errors import ModelFileError

if TYPE_CHECKING:
    from .prompt import Vocabulary

__all__ = ["BoxGrammar", "Draft", "Pace", "Phrases", "Speculator", "Turns"]

FORCED, PHRASE3, PHRASE2, PHRASE_ON, DIGIT3, DIGIT2, DIGIT_ON = range(7)
_THREE, _TWO, _ON = range(3)  # after three known tokens, after two, after a guess from the same phrase
_PHRASES_BY, _DIGITS_BY = (PHRASE3, PHRASE2, PHRASE_ON), (DIGIT3, DIGIT2, DIGIT_ON)
_PRIORS = (0.97, 0.6, 0.35, 0.8, 0.3, 0.2, 0.4)  # how often a kind comes true before anything is known

_TRIES = 4  # passes of one size before its time is believed
_TRIAL_ANSWERS = 6  # drafted and plain in turns before the faster way is chosen
_WORTH = 1.1  # drafting must win by a tenth: following an answer costs a little, and answers differ by more than that
_RETRY_ANSWERS = 32  # until the other way is tried again; twice as long each time that nothing changed
_TELLING_TOKENS = 8  # an answer needs so many to count
_MEMORY_TOKENS = 4096  # of earlier answers; the older half leaves when it is full
_BREAK = -1  # stands between answers: no phrase runs across
_SAMPLE = ("<|box_start|>", "(", "316", ",", "158", "),(", "764", ",", "999", ")", "<|box_end|>")
_DIGITS = 3  # a coordinate below 1000 that is complete; shorter ones are not foreseen


State = tuple[int, int, int]  # in a box: its part, tokens seen of it, digits of the number behind it; part -1: in none
_OUTSIDE: State = (-1, 0, 0)


class BoxGrammar:
    """How a vocabulary writes a box, and what must follow at any place in one.

    parts[i]: the tokens before number i (0..3), parts[4]: those behind the last; empty for a vocabulary without boxes.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.parts = _learn_parts(vocabulary)
        self._opening_after = vocabulary.special.get("<|object_ref_end|>", _BREAK)
        self._vocabulary = vocabulary
        self._lengths: dict[int, int] = {}

    def _digits(self, token: int) -> int:
        """Digits that a token consists of; 0 for any other."""
        length = self._lengths.get(token)
        if length is None:
            text = self._vocabulary.token_bytes(token)
            length = self._lengths[token] = len(text) if text.isdigit() else 0
        return length

    def step(self, state: State, token: int) -> State:
        """Where an answer stands after one more token."""
        part, at, digits = state
        if not self.parts:
            return _OUTSIDE
        if token == self.parts[0][0]:
            return (0, 1, 0)
        if part < 0:
            return _OUTSIDE
        if at < len(self.parts[part]):
            if token != self.parts[part][at] or (part == 4 and at + 1 == len(self.parts[4])):
                return _OUTSIDE  # no box, or its end
            return (part, at + 1, 0)
        if length := self._digits(token):
            return (part, at, digits + length)
        if not digits or token != self.parts[part + 1][0] or (part == 3 and len(self.parts[4]) == 1):
            return _OUTSIDE
        return (part + 1, 1, 0)

    def forced(self, state: State, last: int) -> tuple[int, ...]:
        """What must follow, up to the next digit or the end of the box; last: the token before, which may open one."""
        part, at, digits = state
        if not self.parts:
            return ()
        if part < 0:
            return self.parts[0] if last == self._opening_after else ()
        if at < len(self.parts[part]):
            return self.parts[part][at:]
        return self.parts[part + 1] if digits >= _DIGITS else ()


def _learn_parts(vocabulary: Vocabulary) -> tuple[tuple[int, ...], ...]:
    """Splits the vocabulary's own encoding of a box at its numbers; () when it does not come apart there."""
    text = "".join(_SAMPLE)
    try:
        ids = vocabulary.encode(text)
    except ModelFileError:  # a vocabulary of words that lacks a digit, for one
        return ()
    parts: list[list[int]] = [[]]
    written, number = b"", b""
    for token in ids:
        piece = vocabulary.token_bytes(token)
        written += piece
        if piece.isdigit():
            number += piece
            continue
        if number:
            parts.append([])
        number = b""
        parts[-1].append(token)
    whole = written == text.encode() and len(parts) == 5 and all(parts)
    return tuple(map(tuple, parts)) if whole and vocabulary.is_special(parts[0][0]) else ()


class Phrases:
    """Tokens as they came, and where each two and three of them were last seen."""

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self.tokens: list[int] = []
        self._behind: dict[tuple[int, ...], int] = {}
        for token in tokens:
            self.push(token)

    def push(self, token: int) -> None:
        # the index of the tokens before this one, now that something follows them
        tokens = self.tokens
        at = len(tokens)
        if at >= 2 and token != _BREAK:
            self._behind[(tokens[-2], tokens[-1])] = at
            if at >= 3:
                self._behind[(tokens[-3], tokens[-2], tokens[-1])] = at
        tokens.append(token)

    def following(self, last: tuple[int, ...]) -> int | None:
        """Finds where the given two or three tokens were followed by something, most recently."""
        return self._behind.get(last)


class Pace:
    """What guesses cost and bring on this machine, learned while decoding."""

    def __init__(self, rows: int) -> None:
        self._seconds = [0.0] * (rows + 1)  # of a pass by its rows, guessing included; 0: not measured
        self._passes = [0] * (rows + 1)
        self._chances = list(_PRIORS)
        self._seen = [0] * len(_PRIORS)

    def cost(self, rows: int) -> float:
        """How long a pass of so many rows takes, as a multiple of a pass of one."""
        one, slope = self._seconds[1], 0.1  # what is not known yet costs little: it shall be tried
        if one and rows > 1:
            known = [n for n in range(2, len(self._seconds)) if self._passes[n] >= _TRIES]
            if known:
                near = min(known, key=lambda n: abs(n - rows))
                slope = (self._seconds[near] / one - 1) / (near - 1)
        return 1 + min(1.0, max(0.0, slope)) * (rows - 1)

    def took(self, rows: int, seconds: float) -> None:
        """Notes one pass. Other work on the machine only ever adds time, so the shortest of late is what counts."""
        self._passes[rows] += 1
        usual = self._seconds[rows]
        self._seconds[rows] = min(seconds, usual * 1.02) if usual else seconds

    def came(self, kinds: Sequence[int], true: int) -> None:
        """Notes that the first `true` guesses of a draft came true, and the next, if there is one, did not."""
        for i, kind in enumerate(kinds[: true + 1]):
            self._seen[kind] += 1
            weight = max(0.015, 1 / (self._seen[kind] + 4))
            self._chances[kind] += weight * ((i < true) - self._chances[kind])

    def worth(self, kinds: Sequence[int]) -> int:
        """How many guesses of a draft to verify: those with the most tokens per second, 0 if none gains 3 %."""
        best, most, tokens, chance = 0, 1.03, 1.0, 1.0
        for i, kind in enumerate(kinds):
            chance *= self._chances[kind]
            tokens += chance
            if kinds[i + 1 : i + 2] == [FORCED]:
                continue  # a forced token costs no pass of its own, unless a draft ends right before it
            if tokens / self.cost(i + 2) > most:
                best, most = i + 1, tokens / self.cost(i + 2)
        if not best and kinds:  # what is never tried cannot be seen to have changed
            self._forget(kinds[0])
        return best

    def _forget(self, kind: int) -> None:
        self._chances[kind] += 0.002 * (_PRIORS[kind] - self._chances[kind])
        one = self._seconds[1]
        for rows in range(2, len(self._seconds)):
            seconds = self._seconds[rows]
            if one and seconds > (usual := one * (1 + 0.1 * (rows - 1))):
                self._seconds[rows] = seconds + 0.01 * (usual - seconds)


class Turns:
    """Whether the next answer is drafted at all: on a small model guessing itself can cost more than it saves."""

    def __init__(self) -> None:
        self._answers = 0
        self._seconds: dict[bool, float] = {}  # of a token, drafted or not, as of late
        self._faster: bool | None = None  # what was chosen last
        self._wait = self._left = 0  # answers from one retry to the next, and until the next

    def drafted(self) -> bool:
        """Decides for the next answer: both ways in turns first, then the faster, now and then the other."""
        self._answers += 1
        if self._answers <= _TRIAL_ANSWERS or len(self._seconds) < 2:
            return self._answers % 2 == 1
        faster = self._seconds[True] * _WORTH <= self._seconds[False]
        if faster != self._faster:
            self._faster, self._wait, self._left = faster, _RETRY_ANSWERS, _RETRY_ANSWERS
        self._left -= 1
        if self._left:
            return faster
        self._wait = self._left = 2 * self._wait
        return not faster

    def took(self, drafted: bool, tokens: int, seconds: float) -> None:
        """Notes one answer; very short ones say little."""
        if tokens >= _TELLING_TOKENS:
            usual = self._seconds.setdefault(drafted, seconds / tokens)
            self._seconds[drafted] = usual + 0.3 * (seconds / tokens - usual)


class Speculator:
    """Guesses for one model's answers; what it learns lasts as long as the model.

    rows: the most tokens that one pass verifies, the certain one included.   stop: tokens that end an answer or have no
    place in one; no draft holds them.
    """

    def __init__(self, vocabulary: Vocabulary, *, rows: int, stop: Iterable[int]) -> None:
        self.rows, self.stop = rows, frozenset(stop)
        self.grammar, self.pace, self.turns = BoxGrammar(vocabulary), Pace(rows), Turns()
        self.memory = Phrases()

    def begin(self, prompt: Sequence[int]) -> Draft:
        """Begins an answer to a prompt."""
        return Draft(self, [token for token in prompt if token not in self.stop])

    def remember(self, tokens: Sequence[int]) -> None:
        """Keeps an answer's phrases for later ones."""
        if len(self.memory.tokens) > _MEMORY_TOKENS:
            self.memory = Phrases(self.memory.tokens[_MEMORY_TOKENS // 2 :])
        for token in (_BREAK, *tokens):
            self.memory.push(token)


class Draft:
    """Guesses at one answer's next tokens.

    guessed, true: how many guesses were verified so far, and how many of them came true.
    """

    def __init__(self, speculator: Speculator, prompt: Sequence[int]) -> None:
        self._speculator = speculator
        self._drafted = speculator.turns.drafted()  # if not, nothing is kept track of either
        self._phrases = Phrases(prompt if self._drafted else ())
        self._answer_at = max(0, len(prompt) - 2)  # the template's last words, known to every answer, lead into it
        self._state = _OUTSIDE
        self._tokens, self._seconds = 0, 0.0  # that the passes brought, and took
        self.guessed = self.true = 0

    def push(self, token: int) -> None:
        """Takes the answer's next token."""
        if not self._drafted:
            return
        self._state = self._speculator.grammar.step(self._state, token)
        self._phrases.push(token)

    def guess(self, room: int) -> tuple[list[int], list[int]]:
        """Guesses at most `room` tokens that follow and are worth a try: (tokens, kinds)."""
        if not self._drafted:
            return [], []
        tokens, kinds = self._all_guesses(min(room, self._speculator.rows - 1))
        count = self._speculator.pace.worth(kinds)
        return tokens[:count], kinds[:count]

    def _all_guesses(self, room: int) -> tuple[list[int], list[int]]:
        grammar, state = self._speculator.grammar, self._state
        last = self._phrases.tokens[-3:]
        tokens: list[int] = []
        kinds: list[int] = []
        run: tuple[list[int], int] | None = None  # the phrase that the draft follows, and where it stands in it
        while len(tokens) < room:
            more = grammar.forced(state, last[-1])[: room - len(tokens)] if last else ()
            if more:
                kind, run = FORCED, run and _follow(run, more)
            else:
                sure = _ON if run else _THREE
                if not run:
                    run, sure = self._find(last)
                token = run[0][run[1]] if run and run[1] < len(run[0]) else _BREAK
                if not run or token == _BREAK or token in self._speculator.stop:
                    break
                more, run = (token,), (run[0], run[1] + 1)
                kind = (_DIGITS_BY if state[0] >= 0 else _PHRASES_BY)[sure]
            for token in more:
                state = grammar.step(state, token)
                tokens.append(token)
                kinds.append(kind)
            last = [*last, *more][-3:]
        return tokens, kinds

    def _find(self, last: Sequence[int]) -> tuple[tuple[list[int], int] | None, int]:
        """What followed the last three tokens before, else the last two, and how sure that is."""
        for suffix, sure in ((tuple(last[-3:]), _THREE), (tuple(last[-2:]), _TWO)):
            for phrases in (self._phrases, self._speculator.memory):
                at = phrases.following(suffix)
                if at is not None:
                    return (phrases.tokens, at), sure
        return None, _TWO

    def verified(self, kinds: Sequence[int], true: int, seconds: float) -> None:
        """Takes what a pass over len(kinds) guesses brought: the first `true`, in seconds with the guessing."""
        self._tokens, self._seconds = self._tokens + true + 1, self._seconds + seconds
        self.guessed += len(kinds)
        self.true += true
        self._speculator.pace.took(len(kinds) + 1, seconds)
        self._speculator.pace.came(kinds, true)

    def finish(self) -> None:
        """Ends the answer and keeps a drafted one's phrases for later ones."""
        self._speculator.turns.took(self._drafted, self._tokens, self._seconds)
        if self._drafted:
            self._speculator.remember(self._phrases.tokens[self._answer_at :])


def _follow(run: tuple[list[int], int], tokens: Sequence[int]) -> tuple[list[int], int] | None:
    """The place behind these tokens in a phrase; None where it does not go on with them."""
    phrase, at = run
    return (phrase, at + len(tokens)) if phrase[at : at + len(tokens)] == list(tokens) else None
