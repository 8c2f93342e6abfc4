"""The public API: load a model, ask about several pictures, get text and boxes.

with load("nano") as model:
    answer = model.ground(["a.jpg", "b.jpg"], "the cup in both pictures")
    print(answer.boxes[0].image, answer.boxes[0].xyxy)
"""

import os
import weakref
from collections.abc import Generator, Iterable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any

import numpy as np

from .answer import Answer, Clock, Step, Stream
from .arguments import check_count, check_question, check_text
from .backends import check_backend, open_engine
from .backends.base import Engine, Options
from .cache import CACHE_BYTES, Kept, PictureCache
from .chat_template import read_template
from .decode import Turn, decode
from .drafts import Speculator
from .errors import ContextFullError, ImageError, MigicianError, ModelFileError, UnsupportedError
from .fair_lock import FairLock
from .files.checkpoint import Checkpoint
from .files.config import ModelConfig, Preprocessor
from .files.describe import describe
from .files.open import open_checkpoint
from .prompt import build_prompt, check_words
from .sources import FileBytes, PictureSource, as_list

__all__ = ["Chat", "Model", "load"]


_loaded: "weakref.WeakSet[Model]" = weakref.WeakSet()


class Model:
    """A loaded model. Threads may share it: it answers one question at a time, in the order in which they were asked.

    A forked child may go on using it. Several answers at once take several models; the file's pages are shared.
    Pickled or deep-copied, it opens the same file again.

    What a question leaves behind makes the next one cheap: pictures are kept, encoded, by their content, at most
    cache_bytes of them, and the engine keeps the KV cache of the last prompt and answer, of which the next prompt
    reuses what it begins with. The room for it grows without loss when a prompt needs more.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        backend: str = "native",
        options: Options | None = None,
        speculate: bool = True,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.name = checkpoint.name
        self.notes = checkpoint.notes
        self.backend = backend
        self.config: ModelConfig = checkpoint.config
        self.preprocessor = checkpoint.preprocessor
        self._checkpoint = checkpoint
        self._vocabulary = check_words(checkpoint)
        try:
            self._engine: Engine | None = open_engine(backend, checkpoint, options or Options())
        except (ModelFileError, UnsupportedError) as error:  # these know of tensors, not of files
            raise type(error)(f"{checkpoint.where}: {error}") from None
        self._template = read_template(checkpoint.raw.get("chat_template"), knows=self._vocabulary.knows)
        if self._template.note:
            self.notes = (*self.notes, f"{checkpoint.where}: {self._template.note}")
        self._line = FairLock()
        self._questions = 0  # a stream sees by them that another one came in between
        self._again: tuple[Any, ...] = ()  # what load() was asked, for a copy
        self._cache = PictureCache(cache_bytes)
        self._speculator: Speculator | None = None
        if speculate:
            stop = {*self.config.eos_tokens, self.config.image_token}
            self._speculator = Speculator(self._vocabulary, rows=self._engine.verify_rows, stop=stop)
        _loaded.add(self)

    def __reduce__(self) -> tuple[Any, ...]:
        if not self._again:
            raise MigicianError("this model was not made by load(), so it cannot be opened again; load it there")
        return _load_again, self._again

    def __enter__(self) -> "Model":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def describe(self) -> dict[str, Any]:
        """Says what the model's file is: size by part, quantization policy, what its exporter measured."""
        self._opened()
        return describe(self._checkpoint)

    def close(self) -> None:
        """Frees the engine, the kept pictures and the weights' mapping; later calls raise MigicianError."""
        with self._line:
            if self._engine is not None:
                self._engine.close()
            self._engine = None
            self._cache.clear()
            self._checkpoint.close()

    def ground(
        self,
        images: Iterable[PictureSource] | PictureSource,
        prompt: str,
        *,
        max_new_tokens: int = 512,
        max_side: int | None = None,
        repetition_penalty: float | None = None,
        system: str | None = None,
    ) -> Answer:
        """Answers one question about the pictures, greedily.

        images: paths, data: or file: URLs, bytes, PIL images or arrays u8[H, W, 3], or one such; may be empty for a
            question without pictures.
        prompt: as many `<image>` in it as there are pictures say where they stand; without any they stand before it.
        repetition_penalty: None takes the checkpoint's own.   system: words of the system turn; None leaves it to the
        model's chat template, "" is an empty turn.
        Raises ImageError, ContextFullError, MigicianError for an empty prompt or an argument of another kind.
        """
        check_question(prompt, max_new_tokens, repetition_penalty, system)
        with self._line:
            return Stream(self._steps(images, prompt, max_new_tokens, max_side, repetition_penalty, system)).finish()

    def stream(
        self,
        images: Iterable[PictureSource] | PictureSource,
        prompt: str,
        *,
        max_new_tokens: int = 512,
        max_side: int | None = None,
        repetition_penalty: float | None = None,
        system: str | None = None,
    ) -> Stream:
        """Answers as ground() does, one Step per token; where guesses came true, several arrive together.

        Ask nothing else of the model before the last step: a stream that was overtaken raises MigicianError.
        """
        check_question(prompt, max_new_tokens, repetition_penalty, system)
        return Stream(self._steps(images, prompt, max_new_tokens, max_side, repetition_penalty, system), self._line)

    def _steps(
        self,
        images: Iterable[PictureSource] | PictureSource,
        prompt: str,
        max_new_tokens: int,
        max_side: int | None,
        repetition_penalty: float | None,
        system: str | None,
    ) -> Generator[Step, None, Answer]:
        clock = Clock()
        pictures = self._read(images, max_side)
        clock.lap("preprocess_ms")
        return (yield from self._ask(prompt, pictures, (), max_new_tokens, repetition_penalty, clock, system))

    def chat(
        self,
        images: Iterable[PictureSource] | PictureSource,
        *,
        max_side: int | None = None,
        system: str | None = None,
    ) -> "Chat":
        """Opens a conversation about the pictures; they are read and encoded once. system: as of ground()."""
        check_question("", system=system)
        with self._line:
            return Chat(self, self._read(images, max_side), system)

    def logprobs(self, images: Iterable[PictureSource] | PictureSource, prompt: str, answer_text: str) -> np.ndarray:
        """Scores a given answer: f32[T], the natural log-probability of each of its tokens, teacher-forced."""
        check_question(prompt)
        check_text("answer_text", answer_text, what="the answer to be scored")
        with self._line:
            pictures = self._read(images, None)
            answer = self._vocabulary.encode(answer_text)
            if not answer:
                return np.empty(0, np.float32)
            ids = self._prompt(prompt, pictures, (), len(answer))
            engine = self._begin(len(ids) + len(answer))
            self._cache.encode(pictures, engine.encode)
            engine.sync(ids, [picture.vision for picture in pictures])
            scores = engine.append(answer, logprobs=True)
        assert scores is not None
        return scores

    def cancel(self) -> None:
        """Stops the question that another thread has under way, within one layer; it raises Cancelled there."""
        if self._engine is not None:
            self._engine.cancel()

    def _opened(self) -> Engine:
        if self._engine is None:
            raise MigicianError("the model is closed; load it again")
        return self._engine

    def _read(self, images: Iterable[PictureSource] | PictureSource, max_side: int | None) -> list[Kept]:
        if max_side is not None:
            max_side = check_count("max_side", max_side)
        kept = []
        for i, image in enumerate(as_list(images)):
            try:
                kept.append(self._cache.read(image, self.preprocessor, max_side))
            except ImageError as error:
                if isinstance(image, (str, os.PathLike, FileBytes)) or bool(getattr(image, "filename", "")):
                    raise  # its name says which one it is
                raise ImageError(f"images[{i}]: {error}") from None
        return kept

    def _prompt(
        self,
        prompt: str,
        pictures: Sequence[Kept],
        history: Sequence[tuple[str, Sequence[int]]],
        max_new_tokens: int,
        system: str | None = None,
    ) -> list[int]:
        grids = [self.preprocessor.grid(*kept.picture.rgb.shape[:2]) for kept in pictures]
        cells = [rows * columns for rows, columns in grids]
        ids = build_prompt(
            self._vocabulary, prompt, cells, history=history, system=system, template=self._template
        )
        limit = self.config.text.max_positions
        if len(ids) + max_new_tokens > limit:
            raise ContextFullError(
                f"the prompt has {len(ids)} tokens ({sum(cells)} of them pictures) and {max_new_tokens} may follow, "
                f"the model's context is {limit}; give fewer pictures, --max-side or --max-new-tokens"
            )
        return ids

    def _begin(self, tokens: int) -> Engine:
        """The engine, with room for so many tokens, at the service of a new question."""
        engine = self._opened()
        self._questions += 1
        engine.grow(tokens)
        return engine

    def _ask(
        self,
        prompt: str,
        pictures: Sequence[Kept],
        history: Sequence[tuple[str, Sequence[int]]],
        max_new_tokens: int,
        repetition_penalty: float | None,
        clock: Clock,
        system: str | None,
    ) -> Generator[Step, None, Answer]:
        """The steps of an answer about pictures that are read; the clock stands behind their reading."""
        ids = self._prompt(prompt, pictures, history, max_new_tokens, system)
        engine = self._begin(len(ids) + max_new_tokens)
        reused = self._cache.encode(pictures, engine.encode)
        clock.lap("vision_ms")
        if repetition_penalty is None:
            repetition_penalty = self._checkpoint.repetition_penalty
        turn = Turn(ids, prompt, pictures, reused, max_new_tokens, repetition_penalty)
        steps = decode(
            engine,
            turn,
            vocabulary=self._vocabulary,
            eos=self.config.eos_tokens,
            speculator=self._speculator,
            clock=clock,
        )
        question = self._questions
        while True:
            try:
                step = next(steps)
            except StopIteration as end:
                return end.value
            yield step
            if question != self._questions:
                raise MigicianError("another question was asked before this stream ended; take all its steps first")

    def _after_fork(self) -> None:
        """In a forked child: the threads that waited or answered are not there any more."""
        interrupted, self._line = self._line.held, FairLock()
        if self._engine is not None:
            self._engine.after_fork(interrupted)


def _after_fork() -> None:
    for model in list(_loaded):
        model._after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class Chat:
    """A conversation about one set of pictures; earlier turns and encoded pictures are never computed again."""

    def __init__(self, model: Model, pictures: list[Kept], system: str | None = None) -> None:
        self._model, self._pictures, self._system = model, pictures, system
        self._turns: list[tuple[str, list[int]]] = []

    def ask(self, prompt: str, *, max_new_tokens: int = 512, repetition_penalty: float | None = None) -> Answer:
        """Answers the next question; the answers before it stay in the context. Raises as Model.ground does."""
        check_question(prompt, max_new_tokens, repetition_penalty)
        model, turns = self._model, self._turns
        with model._line:
            clock = Clock()
            clock.stats["preprocess_ms"] = 0.0
            steps = model._ask(prompt, self._pictures, turns, max_new_tokens, repetition_penalty, clock, self._system)
            answer = Stream(steps).finish()
            turns.append((prompt, [token.id for token in answer.tokens]))
        return answer

    def __reduce__(self) -> tuple[Any, ...]:
        raise MigicianError("a chat holds pictures that are encoded in this process; copy its model and ask anew")


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
    """Loads a model: a .mig file, a Hugging Face folder, a hub id (downloaded if need be), or "nano".

    source: None takes MIGICIAN_MODEL, else nano. threads: 0 is one per core. precision: "auto" lets activations be
    rounded, to int8 before quantized weights and to bf16 where the CPU multiplies that faster, "fp32" never.
    backend: what computes, one of backends.BACKENDS; "torch" rounds to bf16 throughout with precision "auto".
    min_pixels, max_pixels: bounds on a resized picture's area, in place of the model's own.
    speculate: guess at coming tokens and verify several in one pass over the weights; the answer is the same without.
    cache_bytes: most memory for pictures that are kept, encoded, for later questions, 0 for none.
    Raises ModelFileError, UnsupportedError.
    """
    check_backend(backend)
    if precision not in ("auto", "fp32"):
        raise UnsupportedError(f"precision {precision!r} is unknown; choose auto or fp32")
    cache_bytes = check_count("cache_bytes", cache_bytes, least=0, most=1 << 62)
    threads = check_count("threads", threads, least=0)
    checkpoint = open_checkpoint(source or os.environ.get("MIGICIAN_MODEL") or "nano")
    try:
        preprocessor = _bounded(checkpoint.preprocessor, min_pixels, max_pixels)
        options = Options(threads=threads, fp32=precision == "fp32")
        model = Model(checkpoint, backend=backend, options=options, speculate=speculate, cache_bytes=cache_bytes)
        model.preprocessor = preprocessor
        asked = {"threads": threads, "precision": precision, "backend": backend, "min_pixels": min_pixels}
        asked |= {"max_pixels": max_pixels, "speculate": speculate, "cache_bytes": cache_bytes}
        model._again = os.path.abspath(checkpoint.where), asked
        return model
    except BaseException:
        checkpoint.close()
        raise


def _load_again(source: str, asked: dict[str, Any]) -> Model:
    return load(source, **asked)


def _bounded(pre: Preprocessor, min_pixels: int | None, max_pixels: int | None) -> Preprocessor:
    """The model's own bounds on a resized picture's area, or those given in their place."""
    for name, value in (("min_pixels", min_pixels), ("max_pixels", max_pixels)):
        if value is not None:
            check_count(name, value, least=0)
    low, high = min_pixels or pre.min_pixels, max_pixels or pre.max_pixels
    if max_pixels and not min_pixels:
        low = min(low, high)
    if not 0 < low <= high:
        raise MigicianError(f"pictures between {low} and {high} pixels; give bounds above 0, min before max")
    return replace(pre, min_pixels=low, max_pixels=high)
