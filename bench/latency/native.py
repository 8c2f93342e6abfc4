"""This project's own engine, driven token by token, so that an end of text ends nothing."""

import time
from typing import Any

import numpy as np

from ...runtime.backends.native import Pool, Session, Weights
from ...runtime.errors import ContextFullError, MigicianError
from ...runtime.files.open import open_checkpoint
from ...runtime.image import load_picture
from ...runtime.prompt import Vocabulary, build_prompt
from .workload import PROMPT, Case, Laps

__all__ = ["Native"]


class Native:
    """A model of any kind that migician-run takes. Raises what open_checkpoint and Weights raise."""

    def __init__(self, model: str, *, threads: int, precision: str) -> None:
        self._checkpoint = open_checkpoint(model)
        self._pool = Pool(threads)
        self._vocabulary = Vocabulary(self._checkpoint.tokenizer_json)
        try:
            self._weights = Weights(self._checkpoint)
        except MigicianError as error:  # it knows of tensors, not of files
            raise type(error)(f"{self._checkpoint.where}: {error}") from None
        self._fp32 = precision == "fp32"
        self._session: Session | None = None
        self.versions = {"kernels": self._pool.isa}

    def run(self, case: Case, images: list[np.ndarray]) -> dict[str, Any]:
        """Answers once; every phase starts cold."""
        laps = Laps()
        pictures = [load_picture(image, self._checkpoint.preprocessor) for image in images]
        grids = [self._checkpoint.preprocessor.grid(*picture.rgb.shape[:2]) for picture in pictures]
        ids = build_prompt(self._vocabulary, PROMPT, [rows * columns for rows, columns in grids])
        laps.lap("preprocess")
        session = self._emptied(ids, case.new_tokens)
        laps.skip()
        visions = [session.encode(picture.rgb) for picture in pictures]
        laps.lap("vision")
        session.sync(ids, visions)
        laps.lap("prefill")
        steps = self._decode(session, case.new_tokens)
        laps.lap("decode")
        return laps.to_run() | {"steps_ms": steps, "prompt_tokens": len(ids), "new_tokens": case.new_tokens}

    def _emptied(self, ids: list[int], new_tokens: int) -> Session:
        """A session with room, whose timeline shares not even the first token with `ids`."""
        wanted, limit = len(ids) + new_tokens, self._checkpoint.config.text.max_positions
        if wanted > limit:
            raise ContextFullError(
                f"{len(ids)} tokens of prompt and {new_tokens} new ones, the model's context is {limit}; "
                f"give fewer --pictures, a smaller --size or fewer --new-tokens"
            )
        if self._session is None or self._session.context < wanted:
            self._session = None  # its cache goes before the next one comes
            self._session = Session(self._weights, self._pool, context=wanted, fp32=self._fp32)
        other = next(token for token in range(3) if token not in (ids[0], self._checkpoint.config.image_token))
        self._session.sync([other], [])
        return self._session

    def _decode(self, session: Session, new_tokens: int) -> list[float]:
        """Decodes greedily without penalty; returns the milliseconds of each step, one fewer than tokens."""
        token, _ = session.greedy()
        steps = []
        for _ in range(new_tokens - 1):
            start = time.perf_counter()
            if token == self._checkpoint.config.image_token:  # random weights say that too; it stands for pictures only
                token = self._checkpoint.config.eos_tokens[0]
            session.append([token])
            token, _ = session.greedy()
            steps.append(1000 * (time.perf_counter() - start))
        return steps
