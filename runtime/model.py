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
from .cache import CACHE_BYTES, Kept, PictureCache
from .checkpoint import Checkpoint, open_checkpoint
from .config import ModelConfig
from .describe import describe
from .drafts import Draft, Speculator
from .engine import VERIFY_ROWS, Pool, Session, Vision, Weights
from .errors import ContextFullError, MigicianError, ModelFileError, UnsupportedError
from .image import Picture, PictureSource, content_key, load_picture, picture_name, read_source
from .prompt import TextStream, Vocabulary, build_prompt, token_spans

__all__ = ["Answer", "Chat", "Model", "Step", "Stream", "Token", "load"]

# Tokens a session has room for from the start: several pictures and some turns about them. Memory is taken only as they
# come (about 29 KB each for the 2B model, 57 for the 7B), so room costs nothing, and growing beyond it is rare.
_ROOMY_CONTEXT = 8192
_CONTEXT_STEP = 256


@dataclass(frozen=True)
class Token:
    """One generated token; logprob is the natural log of the model's own probability, before any penalty."""

    id: int
    logprob: float


@dataclass(frozen=True)
class Answer:
    """What the model said about the pictures.

    text keeps the model's tags; unparsed counts boxes that stay in the text because they are malformed. stats has
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
    reused_pictures: int
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
    """A loaded model. One call at a time; use one Model per thread, or share the file: pages are shared.

    What a question leaves behind makes the next one cheap: pictures are kept, encoded, by their content, at most
    cache_bytes of them, and the session keeps the KV cache of the last prompt and answer, of which the next prompt
    reuses what it begins with. The room for it grows without loss when a prompt needs more.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        threads: int = 0,
        precision: str = "auto",
        speculate: bool = True,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        if precision not in ("auto", "fp32"):
            raise UnsupportedError(f"precision {precision!r} is unknown; choose auto or fp32")
        if cache_bytes < 0:
            raise MigicianError(f"cache_bytes is {cache_bytes}; give a number of bytes, or 0 to keep no pictures")
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
        self._calls = 0  # for the session; a stream sees by them that another question came in between
        self._cache = PictureCache(cache_bytes)
        self._speculator: Speculator | None = None
        if speculate:
            stop = {*self.config.eos_tokens, self.config.image_token}
            self._speculator = Speculator(self._vocabulary, rows=VERIFY_ROWS, stop=stop)

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
        """Frees the session, the kept pictures and the weights' mapping; later calls raise MigicianError."""
        self._session = self._weights = None
        self._cache.clear()
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
        """Answers as ground() does, one Step per token; where guesses came true, several arrive together.

        Ask nothing else of the model before the last step: a stream that was overtaken raises MigicianError.
        """
        result: list[Answer] = []

        def steps() -> Iterator[Step]:
            clock = _Clock()
            pictures = self._load(images, max_side)
            clock.lap("preprocess_ms")
            ids = self._prompt(prompt, pictures, (), max_new_tokens)
            session = self._room(len(ids) + max_new_tokens)
            visions, reused = self._encode(session, pictures)
            clock.lap("vision_ms")
            turn = _Turn(ids, prompt, pictures, visions, reused, max_new_tokens, repetition_penalty)
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
        session.sync(ids, self._encode(session, pictures)[0])
        scores = session.append(answer, logprobs=True)
        assert scores is not None
        return scores

    def _load(self, images: Sequence[PictureSource], max_side: int | None) -> list[Picture]:
        if isinstance(images, (str, bytes, os.PathLike)):
            raise MigicianError("images must be a list of pictures; put the one picture in a list")
        return [self._open(image, max_side) for image in images]

    def _open(self, source: PictureSource, max_side: int | None) -> Picture:
        """Reads a picture, or finds it among those that are kept."""
        pre, name = self.preprocessor, picture_name(source)
        if not self._cache.limit_bytes:
            return load_picture(source, pre, max_side=max_side)
        source = read_source(source)
        key = content_key(source, max_side, pre.min_pixels, pre.max_pixels)
        kept = self._cache.get(key)
        if kept is not None:
            return kept.picture
        picture = load_picture(source, pre, max_side=max_side, name=name)
        return replace(picture, key=key or content_key(picture.rgb))

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
        """The session, with room for so many tokens; made roomy, and grown to at least twice its size."""
        if self._weights is None:
            raise MigicianError("the model is closed; load it again")
        self._calls += 1
        room = 2 * self._session.context if self._session else _ROOMY_CONTEXT
        room = min(max(-(-tokens // _CONTEXT_STEP) * _CONTEXT_STEP, room), max(tokens, self.config.text.max_positions))
        if self._session is None:
            try:
                self._session = self._open_session(room)
            except MigicianError:  # a system that does not promise memory before it is used
                self._session = self._open_session(tokens)
        elif self._session.context < tokens:
            try:
                self._session.grow(room)
            except MigicianError:  # not both caches at once: the old one goes, its prompt is computed again
                self._session = None
                self._session = self._open_session(tokens)
        return self._session

    def _open_session(self, context: int) -> Session:
        assert self._weights is not None
        return Session(self._weights, self._pool, context=context, fp32=self._fp32)

    def _encode(self, session: Session, pictures: Sequence[Picture]) -> tuple[list[Vision], int]:
        """Encodes the pictures that are not kept; returns all of them, and how many were."""
        if not self._cache.limit_bytes:
            return [session.encode(picture.rgb) for picture in pictures], 0
        visions, reused = [], 0
        for picture in pictures:
            kept = self._cache.get(picture.key)
            if kept is None:
                kept = Kept(picture, session.encode(picture.rgb))
                self._cache.put(picture.key, kept)
            else:
                reused += 1
            visions.append(kept.vision)
        return visions, reused

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
        reused = session.sync(turn.ids, turn.visions)
        call = self._calls
        clock.lap("prefill_ms")
        text, stream, finish = "", TextStream(self._vocabulary), "length"
        tokens: list[Token] = []
        draft = self._speculator.begin(turn.ids) if self._speculator else None
        found, passes = [session.greedy(penalty)], 0
        while True:
            for token, logprob in found:  # end-of-text can only be the last: no guess is one
                if token in self.config.eos_tokens:
                    finish = "stop"
                    break
                tokens.append(Token(token, logprob))
                piece = stream.push(token)
                text += piece
                if draft:
                    draft.push(token)
                yield Step(piece, token, logprob, clock.elapsed_ms())
                if call != self._calls:
                    raise MigicianError("another question was asked before this stream ended; take all its steps first")
            room = turn.max_new_tokens - len(tokens)
            if finish == "stop" or not room:
                break
            found = _advance(session, draft, tokens[-1].id, room, penalty)
            passes += 1
        if draft:
            draft.finish()
        text += stream.finish()
        clock.lap("decode_ms")
        result.append(self._answer(turn, text, tokens, finish, clock, reused, passes))

    def _answer(
        self,
        turn: _Turn,
        text: str,
        tokens: list[Token],
        finish: str,
        clock: _Clock,
        reused_tokens: int,
        passes: int,
    ) -> Answer:
        spans = [
            (start, end, token.logprob)
            for (start, end), token in zip(token_spans(self._vocabulary, [t.id for t in tokens]), tokens, strict=True)
        ]
        sizes = [(picture.width, picture.height) for picture in turn.pictures]
        boxes, unparsed = parse_boxes(text, prompt=turn.prompt, sizes=sizes, token_spans=spans)
        weights = self._weights.bytes if self._weights else 0
        decoded = len(tokens) - (finish == "length")  # the first token is the prompt's; end-of-text is one more
        stats = clock.stats | {
            "new_tokens": len(tokens),
            "peak_rss_mb": round(_peak_rss_mb(), 1),
            "weights_mb": round(weights / 1e6, 1),
            "reused_tokens": reused_tokens,
            "reused_pictures": turn.reused_pictures,
            "decode_passes": passes,
            "tokens_per_pass": round(decoded / passes, 3) if passes else 1.0,
        }
        return Answer(text, boxes, unparsed, tuple(tokens), len(turn.ids), finish, stats)


def _advance(session: Session, draft: Draft | None, last: int, room: int, penalty: float) -> list[tuple[int, float]]:
    """Finds the 1 to `room` tokens after the last one, in one pass over the weights."""
    if draft is None:
        return session.verify([last], penalty)
    start = time.perf_counter()
    guesses, kinds = draft.guess(room - 1)
    found = session.verify([last, *guesses], penalty)
    draft.verified(kinds, len(found) - 1, time.perf_counter() - start)
    return found


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
        reused = len(self._pictures)
        if self._visions is None:
            self._visions, reused = model._encode(session, self._pictures)
        clock.lap("vision_ms")
        turn = _Turn(ids, prompt, self._pictures, self._visions, reused, max_new_tokens, repetition_penalty)
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
    speculate: bool = True,
    cache_bytes: int = CACHE_BYTES,
) -> Model:
    """Loads a model: a .mig file, a Hugging Face folder, a hub id in the local cache, or "nano".

    source: None takes MIGICIAN_MODEL, else nano. threads: 0 is one per core. precision: "auto" lets activations be
    rounded, to int8 before quantized weights and to bf16 where the CPU multiplies that faster, "fp32" never.
    min_pixels, max_pixels: bounds on a resized picture's area, in place of the model's own.
    speculate: guess at coming tokens and verify several in one pass over the weights; the answer is the same without.
    cache_bytes: most memory for pictures that are kept, encoded, for later questions, 0 for none.
    Raises ModelFileError, UnsupportedError.
    """
    if backend != "native":
        raise UnsupportedError(f"backend {backend!r} is not part of this version; choose native")
    checkpoint = open_checkpoint(source or os.environ.get("MIGICIAN_MODEL") or "nano")
    try:
        model = Model(checkpoint, threads=threads, precision=precision, speculate=speculate, cache_bytes=cache_bytes)
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
