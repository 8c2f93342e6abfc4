"""The public API: load a model, ask about several pictures, get text and boxes.

with load("nano") as model:
    answer = model.ground(["a.jpg", "b.jpg"], "the cup in both pictures")
    print(answer.boxes[0].image, answer.boxes[0].xyxy)
"""

import os
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any

import numpy as np

from .boxes import Box, parse_boxes
from .checkpoint import Checkpoint, open_checkpoint
from .config import ModelConfig
from .describe import describe
from .engine import Pool, Session, Vision, Weights
from .errors import ContextFullError, MigicianError, ModelFileError, UnsupportedError
from .image import Picture, PictureSource, load_picture
from .prompt import TextStream, Vocabulary, build_prompt, token_spans

__all__ = ["Answer", "Chat", "Model", "Step", "Stream", "Token", "load"]


@dataclass(frozen=True)
class Token:
    """One generated token; logprob is the natural log of the model's own probability, before any penalty."""

    id: int
    logprob: float


@dataclass(frozen=True)
class Answer:
    """What the model said about the pictures.

    text keeps the model's tags; unparsed counts boxes that stay in the text because they are malformed. stats has
    preprocess_ms, vision_ms, prefill_ms, decode_ms, new_tokens, peak_rss_mb, weights_mb.
    """

    text: str
    boxes: tuple[Box, ...]
    unparsed: int
    tokens: tuple[Token, ...]
    prompt_tokens: int
    finish: str  # "stop" or "length"
    stats: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """One decoding step: the text that became readable with it, the token, milliseconds since the call."""

    text: str
    token: int
    logprob: float
    elapsed_ms: float


@dataclass(frozen=True)
class _Turn:
    """One question, ready for the engine."""

    ids: list[int]
    prompt: str
    pictures: Sequence[Picture]
    visions: Sequence[Vision]
    max_new_tokens: int
    repetition_penalty: float | None


def _peak_rss_mb() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024 * 1024 if sys.platform == "darwin" else 1024)


class _Clock:
    """Milliseconds per phase."""

    def __init__(self) -> None:
        self.start = self._last = time.perf_counter()
        self.stats: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.stats[name] = round(1000 * (now - self._last), 3)
        self._last = now

    def elapsed_ms(self) -> float:
        return round(1000 * (time.perf_counter() - self.start), 3)


class Stream(Iterator[Step]):
    """Steps of an answer as they are decoded; `answer` holds the whole once the steps have ended."""

    def __init__(self, steps: Iterator[Step], result: list[Answer]) -> None:
        self._steps, self._result = steps, result

    def __next__(self) -> Step:
        return next(self._steps)

    @property
    def answer(self) -> Answer:
        """The whole answer. Raises MigicianError while steps are left."""
        if not self._result:
            raise MigicianError("the answer is not complete; take all steps of the stream first")
        return self._result[0]


class Model:
    """A loaded model. One call at a time; use one Model per thread, or share the file: pages are shared."""

    def __init__(self, checkpoint: Checkpoint, *, threads: int = 0, precision: str = "auto") -> None:
        if precision not in ("auto", "fp32"):
            raise UnsupportedError(f"precision {precision!r} is unknown; choose auto or fp32")
        self.name = checkpoint.name
        self.backend = "native"
        self.config: ModelConfig = checkpoint.config
        self.preprocessor = checkpoint.preprocessor
        self._checkpoint = checkpoint
        self._fp32 = precision == "fp32"
        self._pool = Pool(threads)
        try:
            self._vocabulary = Vocabulary(checkpoint.tokenizer_json)
            self._weights: Weights | None = Weights(checkpoint)
        except (ModelFileError, UnsupportedError) as error:  # these know of tensors and words, not of files
            raise type(error)(f"{checkpoint.where}: {error}") from None
        self._session: Session | None = None

    def __enter__(self) -> "Model":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def describe(self) -> dict[str, Any]:
        """Says what the model's file is: size by part, quantization policy, what its exporter measured."""
        if self._weights is None:
            raise MigicianError("the model is closed; load it again")
        return describe(self._checkpoint)

    def close(self) -> None:
        """Frees the session and the weights' mapping; later calls raise MigicianError."""
        self._session = self._weights = None
        self._checkpoint.close()

    def ground(
        self,
        images: Sequence[PictureSource],
        prompt: str,
        *,
        max_new_tokens: int = 512,
        max_side: int | None = None,
        repetition_penalty: float | None = None,
    ) -> Answer:
        """Answers one question about the pictures, greedily.

        images: paths, bytes, PIL images or arrays u8[H, W, 3]; may be empty for a question without pictures.
        repetition_penalty: None takes the checkpoint's own.
        Raises ImageError, ContextFullError, MigicianError for an empty prompt.
        """
        steps = self.stream(
            images, prompt, max_new_tokens=max_new_tokens, max_side=max_side, repetition_penalty=repetition_penalty
        )
        for _ in steps:
            pass
        return steps.answer

    def stream(
        self,
        images: Sequence[PictureSource],
        prompt: str,
        *,
        max_new_tokens: int = 512,
        max_side: int | None = None,
        repetition_penalty: float | None = None,
    ) -> Stream:
        """Answers as ground() does, one Step per token."""
        result: list[Answer] = []

        def steps() -> Iterator[Step]:
            clock = _Clock()
            pictures = self._load(images, max_side)
            clock.lap("preprocess_ms")
            ids = self._prompt(prompt, pictures, (), max_new_tokens)
            session = self._room(len(ids) + max_new_tokens)
            visions = [session.encode(picture.rgb) for picture in pictures]
            clock.lap("vision_ms")
            turn = _Turn(ids, prompt, pictures, visions, max_new_tokens, repetition_penalty)
            yield from self._decode(session, turn, clock, result)

        return Stream(steps(), result)

    def chat(self, images: Sequence[PictureSource], *, max_side: int | None = None) -> "Chat":
        """Opens a conversation about the pictures; they are read and encoded once."""
        return Chat(self, self._load(images, max_side))

    def logprobs(self, images: Sequence[PictureSource], prompt: str, answer_text: str) -> np.ndarray:
        """Scores a given answer: f32[T], the natural log-probability of each of its tokens, teacher-forced."""
        pictures = self._load(images, None)
        answer = self._vocabulary.encode(answer_text)
        if not answer:
            return np.empty(0, np.float32)
        ids = self._prompt(prompt, pictures, (), len(answer))
        session = self._room(len(ids) + len(answer))
        session.sync(ids, [session.encode(picture.rgb) for picture in pictures])
        scores = session.append(answer, logprobs=True)
        assert scores is not None
        return scores

    def _load(self, images: Sequence[PictureSource], max_side: int | None) -> list[Picture]:
        if isinstance(images, (str, bytes, os.PathLike)):
            raise MigicianError("images must be a list of pictures; put the one picture in a list")
        return [load_picture(image, self.preprocessor, max_side=max_side) for image in images]

    def _prompt(
        self,
        prompt: str,
        pictures: Sequence[Picture],
        history: Sequence[tuple[str, Sequence[int]]],
        max_new_tokens: int,
    ) -> list[int]:
        if max_new_tokens < 1:
            raise MigicianError(f"max_new_tokens is {max_new_tokens}; ask for at least 1")
        unit = self.preprocessor.patch_size * self.preprocessor.merge_size
        cells = [(p.rgb.shape[0] // unit) * (p.rgb.shape[1] // unit) for p in pictures]
        ids = build_prompt(self._vocabulary, prompt, cells, history=history)
        limit = self.config.text.max_positions
        if len(ids) + max_new_tokens > limit:
            raise ContextFullError(
                f"the prompt has {len(ids)} tokens ({sum(cells)} of them pictures) and {max_new_tokens} may follow, "
                f"the model's context is {limit}; give fewer pictures, --max-side or --max-new-tokens"
            )
        return ids

    def _room(self, tokens: int) -> Session:
        """The session, made anew when it is too small; sizes grow in steps so that this is rare."""
        if self._weights is None:
            raise MigicianError("the model is closed; load it again")
        if self._session is None or self._session.context < tokens:
            self._session = None  # the old cache goes before the new one comes
            context = min(-(-tokens // 256) * 256, max(tokens, self.config.text.max_positions))
            self._session = Session(self._weights, self._pool, context=context, fp32=self._fp32)
        return self._session

    def _decode(
        self,
        session: Session,
        turn: _Turn,
        clock: _Clock,
        result: list[Answer],
    ) -> Iterator[Step]:
        penalty = turn.repetition_penalty
        if penalty is None:
            penalty = self._checkpoint.repetition_penalty
        session.sync(turn.ids, turn.visions)
        clock.lap("prefill_ms")
        text, stream, finish = "", TextStream(self._vocabulary), "length"
        tokens: list[Token] = []
        while len(tokens) < turn.max_new_tokens:
            token, logprob = session.greedy(penalty)
            if token in self.config.eos_tokens:
                finish = "stop"
                break
            tokens.append(Token(token, logprob))
            piece = stream.push(token)
            text += piece
            yield Step(piece, token, logprob, clock.elapsed_ms())
            if len(tokens) < turn.max_new_tokens:
                session.append([token])
        text += stream.finish()
        clock.lap("decode_ms")
        spans = [
            (start, end, token.logprob)
            for (start, end), token in zip(token_spans(self._vocabulary, [t.id for t in tokens]), tokens, strict=True)
        ]
        sizes = [(picture.width, picture.height) for picture in turn.pictures]
        boxes, unparsed = parse_boxes(text, prompt=turn.prompt, sizes=sizes, token_spans=spans)
        weights = self._weights.bytes if self._weights else 0
        stats = clock.stats | {
            "new_tokens": len(tokens),
            "peak_rss_mb": round(_peak_rss_mb(), 1),
            "weights_mb": round(weights / 1e6, 1),
        }
        result.append(Answer(text, boxes, unparsed, tuple(tokens), len(turn.ids), finish, stats))


class Chat:
    """A conversation about one set of pictures; earlier turns and encoded pictures are never computed again."""

    def __init__(self, model: Model, pictures: list[Picture]) -> None:
        self._model, self._pictures = model, pictures
        self._visions: list[Vision] | None = None
        self._turns: list[tuple[str, list[int]]] = []

    def ask(self, prompt: str, *, max_new_tokens: int = 512, repetition_penalty: float | None = None) -> Answer:
        """Answers the next question; the answers before it stay in the context. Raises as Model.ground does."""
        model, clock, result = self._model, _Clock(), list[Answer]()
        clock.stats["preprocess_ms"] = 0.0
        ids = model._prompt(prompt, self._pictures, self._turns, max_new_tokens)
        session = model._room(len(ids) + max_new_tokens)
        if self._visions is None:
            self._visions = [session.encode(picture.rgb) for picture in self._pictures]
        clock.lap("vision_ms")
        turn = _Turn(ids, prompt, self._pictures, self._visions, max_new_tokens, repetition_penalty)
        for _ in model._decode(session, turn, clock, result):
            pass
        self._turns.append((prompt, [token.id for token in result[0].tokens]))
        return result[0]


def load(
    source: str | os.PathLike[str] | None = None,
    *,
    threads: int = 0,
    precision: str = "auto",
    backend: str = "native",
    min_pixels: int | None = None,
    max_pixels: int | None = None,
) -> Model:
    """Loads a model: a .mig file, a Hugging Face folder, a hub id in the local cache, or "nano".

    source: None takes MIGICIAN_MODEL, else nano. threads: 0 is one per core. precision: "auto" lets activations be
    rounded, to int8 before quantized weights and to bf16 where the CPU multiplies that faster, "fp32" never.
    min_pixels, max_pixels: bounds on a resized picture's area, in place of the model's own.
    Raises ModelFileError, UnsupportedError.
    """
    if backend != "native":
        raise UnsupportedError(f"backend {backend!r} is not part of this version; choose native")
    checkpoint = open_checkpoint(source or os.environ.get("MIGICIAN_MODEL") or "nano")
    try:
        model = Model(checkpoint, threads=threads, precision=precision)
        pre = model.preprocessor
        low, high = min_pixels or pre.min_pixels, max_pixels or pre.max_pixels
        if max_pixels and not min_pixels:
            low = min(low, high)
        if not 0 < low <= high:
            raise MigicianError(f"pictures between {low} and {high} pixels; give bounds above 0, min before max")
        model.preprocessor = replace(pre, min_pixels=low, max_pixels=high)
        return model
    except BaseException:
        checkpoint.close()
        raise
