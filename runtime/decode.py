"""From a prompt to an answer: prefill, then token after token, drafts verified together, text when readable."""

import time
from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass

from .answer import Answer, Clock, Step, Token
from .backends.base import Engine
from .boxes import read_answer
from .cache import Kept
from .drafts import Draft, Speculator
from .loops import find_loop
from .memory import peak_rss_mb
from .prompt import TextStream, Vocabulary

__all__ = ["Turn", "decode"]


@dataclass(frozen=True)
class Turn:
    """One question, ready for an engine.

    ids: the whole prompt.   prompt: the question in words.   pictures: all encoded, in the order of the prompt.
    reused_pictures: how many of them earlier questions had left encoded.
    """

    ids: Sequence[int]
    prompt: str
    pictures: Sequence[Kept]
    reused_pictures: int
    max_new_tokens: int
    repetition_penalty: float


@dataclass
class _Written:
    """An answer as far as it has come. spans: of each token in characters of text, with its log-probability."""

    text: str
    tokens: list[Token]
    spans: list[tuple[int, int, float]]
    finish: str = "length"
    passes: int = 0


def decode(
    engine: Engine,
    turn: Turn,
    *,
    vocabulary: Vocabulary,
    eos: Collection[int],
    speculator: Speculator | None,
    clock: Clock,
) -> Generator[Step, None, Answer]:
    """Answers greedily, one Step per token; where guesses came true, several come together. Returns the whole answer.

    eos: tokens that end an answer.   speculator: None takes every token in a pass of its own.
    """
    reused = engine.sync(turn.ids, [picture.vision for picture in turn.pictures])
    clock.lap("prefill_ms")
    draft = speculator.begin(turn.ids) if speculator else None
    written = _Written("", [], [])
    stream = TextStream(vocabulary)
    found = [engine.greedy(turn.repetition_penalty)]
    while True:
        for token, logprob in found:  # end-of-text can only be the last: no guess is one
            if token in eos:
                written.finish = "stop"
                break
            start, piece = len(written.text), stream.push(token)
            written.text += piece
            written.tokens.append(Token(token, logprob))
            written.spans.append((start, len(written.text) + stream.pending, logprob))  # parts of a character cover it
            if draft:
                draft.push(token)
            yield Step(piece, token, logprob, clock.elapsed_ms())
        room = turn.max_new_tokens - len(written.tokens)
        if written.finish == "stop" or not room:
            break
        found = _advance(engine, draft, written.tokens[-1].id, room, turn.repetition_penalty)
        written.passes += 1
    if draft:
        draft.finish()
    written.text += stream.finish()
    clock.lap("decode_ms")
    return _answer(engine, turn, written, clock, reused)


def _advance(engine: Engine, draft: Draft | None, last: int, room: int, penalty: float) -> list[tuple[int, float]]:
    """Finds the 1 to `room` tokens after the last one, in one pass over the weights."""
    if draft is None:
        return engine.verify([last], penalty)
    start = time.perf_counter()
    guesses, kinds = draft.guess(room - 1)
    found = engine.verify([last, *guesses], penalty)
    draft.verified(kinds, len(found) - 1, time.perf_counter() - start)
    return found


def _answer(engine: Engine, turn: Turn, written: _Written, clock: Clock, reused_tokens: int) -> Answer:
    tokens, passes = written.tokens, written.passes
    sizes = [(kept.picture.width, kept.picture.height) for kept in turn.pictures]
    loop = find_loop([token.id for token in tokens]) if written.finish == "length" else None
    reading = read_answer(
        written.text,
        prompt=turn.prompt,
        sizes=sizes,
        token_spans=written.spans,
        loop=written.spans[loop.start][0] if loop else None,
    )
    decoded = len(tokens) - (written.finish == "length")  # the first token is the prompt's; end-of-text is one more
    stats = clock.stats | {
        "new_tokens": len(tokens),
        "peak_rss_mb": peak_rss_mb(),
        "weights_mb": round(engine.weights_bytes / 1e6, 1),
        "reused_tokens": reused_tokens,
        "reused_pictures": turn.reused_pictures,
        "decode_passes": passes,
        "tokens_per_pass": round(decoded / passes, 3) if passes else 1.0,
    }
    return Answer(
        text=written.text,
        boxes=reading.boxes,
        unparsed=reading.unparsed,
        tokens=tuple(tokens),
        prompt_tokens=len(turn.ids),
        finish=written.finish,
        stats=stats,
        points=reading.points,
        clipped=reading.clipped,
        repeated=loop.times - 1 if loop else 0,
    )
