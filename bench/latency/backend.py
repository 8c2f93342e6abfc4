"""This runtime's backends, driven token by token through the seam they share, so that an end of text ends nothing."""

import time
from collections.abc import Sequence

from ...runtime.backends import check_backend, open_engine
from ...runtime.backends.base import Options
from ...runtime.errors import ContextFullError, MigicianError
from ...runtime.files.open import open_checkpoint
from ...runtime.image import load_picture
from ...runtime.prompt import Vocabulary, build_prompt
from ..engines import Answered, Laps, Picture

__all__ = ["Backend"]


class Backend:
    """A model of any kind that migician-run takes, in one of runtime.backends.BACKENDS: an Engine of engines.py.

    threads: 0 is the backend's choice.   precision: "auto" or "fp32".   Raises what open_checkpoint and the backend do.
    """

    family = "qwen2_vl"

    def __init__(self, model: str, *, backend: str = "native", threads: int = 0, precision: str = "auto") -> None:
        check_backend(backend)
        self._checkpoint = open_checkpoint(model)
        self._vocabulary = Vocabulary(self._checkpoint.tokenizer_json)
        options = Options(threads=threads, fp32=precision == "fp32")
        try:
            self._engine = open_engine(backend, self._checkpoint, options)
        except MigicianError as error:  # it knows of tensors, not of files
            raise type(error)(f"{self._checkpoint.where}: {error}") from None
        self.name = self._checkpoint.name
        self.versions = self._engine.versions

    def answer(self, images: Sequence[Picture], text: str, max_new_tokens: int, *, exact: bool = False) -> Answered:
        """Answers once; every phase starts cold."""
        laps, engine = Laps(), self._engine
        pictures = [load_picture(image, self._checkpoint.preprocessor) for image in images]
        grids = [self._checkpoint.preprocessor.grid(*picture.rgb.shape[:2]) for picture in pictures]
        ids = build_prompt(self._vocabulary, text, [rows * columns for rows, columns in grids])
        laps.lap("preprocess")
        self._empty(ids, max_new_tokens)
        laps.skip()
        visions = [engine.encode(picture.rgb) for picture in pictures]
        laps.lap("vision")
        engine.sync(ids, visions)
        laps.lap("prefill")
        tokens, steps = self._decode(max_new_tokens, exact)
        laps.lap("decode")
        return Answered(self._vocabulary.decode(tokens, skip_special=True), laps.times(len(ids), steps))

    def close(self) -> None:
        """Frees the engine and the weights' mapping."""
        self._engine.close()
        self._checkpoint.close()

    def _empty(self, ids: Sequence[int], new_tokens: int) -> None:
        """Makes room, and leaves a timeline that shares not even the first token with `ids`."""
        wanted, limit = len(ids) + new_tokens, self._checkpoint.config.text.max_positions
        if wanted > limit:
            raise ContextFullError(
                f"{len(ids)} tokens of prompt and {new_tokens} new ones, the model's context is {limit}; "
                f"give fewer --pictures, a smaller --size or fewer --new-tokens"
            )
        self._engine.grow(wanted)
        other = next(token for token in range(3) if token not in (ids[0], self._checkpoint.config.image_token))
        self._engine.sync([other], [])

    def _decode(self, new_tokens: int, exact: bool) -> tuple[list[int], list[float]]:
        """Decodes greedily; returns the tokens and the milliseconds of each step, one fewer than tokens."""
        engine, config = self._engine, self._checkpoint.config
        penalty = 1.0 if exact else self._checkpoint.repetition_penalty
        tokens, steps = [engine.greedy(penalty)[0]], list[float]()
        while len(tokens) < new_tokens and (exact or tokens[-1] not in config.eos_tokens):
            start = time.perf_counter()
            token = tokens[-1]
            if token == config.image_token:  # random weights say that too; it stands for pictures only
                token = config.eos_tokens[0]
            engine.append([token])
            tokens.append(engine.greedy(penalty)[0])
            steps.append(1000 * (time.perf_counter() - start))
        return tokens, steps
