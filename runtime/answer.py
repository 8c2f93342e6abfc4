"""What a question gives back: the answer, its tokens, the steps in which it came, and how long each phase took."""

import time
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from .boxes import Box, Point
from .errors import MigicianError

__all__ = ["Answer", "Clock", "Step", "Stream", "Token"]


@dataclass(frozen=True)
class Token:
    """One generated token; logprob is the natural log of the model's own probability, before any penalty."""

    id: int
    logprob: float


@dataclass(frozen=True)
class Answer:
    """What the model said about the pictures.

    text keeps the model's tags; unparsed counts boxes and points that stay in the text because they are malformed,
    clipped those that reached a little beyond the picture and were moved onto its edge. repeated: how often an answer
    that was cut had said its end before, 0 for all others; boxes and points then hold each repeated one once. stats has
    preprocess_ms, vision_ms, prefill_ms, decode_ms, new_tokens, peak_rss_mb, weights_mb; reused_tokens of the prompt
    and reused_pictures, which earlier questions had left computed; decode_passes, how often the weights were read for
    the answer, and tokens_per_pass, 1 where every token took a pass of its own.
    """

    text: str
    boxes: tuple[Box, ...]
    unparsed: int
    tokens: tuple[Token, ...]
    prompt_tokens: int
    finish: str  # "stop" or "length"
    stats: dict[str, float] = field(default_factory=dict)
    points: tuple[Point, ...] = ()
    clipped: int = 0
    repeated: int = 0


@dataclass(frozen=True)
class Step:
    """One decoding step: the text that became readable with it, the token, milliseconds since the call."""

    text: str
    token: int
    logprob: float
    elapsed_ms: float


class Clock:
    """Milliseconds per phase."""

    def __init__(self) -> None:
        self.start = self._last = time.perf_counter()
        self.stats: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """What was done since the last lap was this phase."""
        now = time.perf_counter()
        self.stats[name] = round(1000 * (now - self._last), 3)
        self._last = now

    def elapsed_ms(self) -> float:
        """Since the beginning."""
        return round(1000 * (time.perf_counter() - self.start), 3)


class Stream(Iterator[Step]):
    """Steps of an answer as they are decoded; `answer` holds the whole once the steps have ended.

    lock: held for as long as a step takes.
    """

    def __init__(self, steps: Generator[Step, None, Answer], lock: AbstractContextManager[None] | None = None) -> None:
        self._steps, self._lock = steps, lock or nullcontext()
        self._answer: Answer | None = None

    def __next__(self) -> Step:
        try:
            with self._lock:
                return next(self._steps)
        except StopIteration as end:
            self._answer = self._answer or end.value
            raise

    def __reduce__(self) -> tuple[object, ...]:
        raise MigicianError("a stream is under way in this process; take its steps and copy the answer")

    def finish(self) -> Answer:
        """Takes the steps that are left and returns the whole answer."""
        for _ in self:
            pass
        return self.answer

    @property
    def answer(self) -> Answer:
        """The whole answer. Raises MigicianError while steps are left."""
        if self._answer is None:
            raise MigicianError("the answer is not complete; take all steps of the stream first")
        return self._answer
