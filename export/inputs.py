"""Calibration samples as both towers want them: patches, token ids, positions, and the rows that maps are fitted to.

Letters: P patches, T tokens, R rows of all sequences end to end.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..calib.store import Sample
from ..runtime.chat_template import read_template
from ..runtime.files.checkpoint import Checkpoint
from ..runtime.image import load_picture, patchify
from ..runtime.prompt import Vocabulary, build_prompt, rope_positions
from .towers import Rows, language_angles, vision_angles

__all__ = ["FIT_ROWS", "TEXT_SHARE", "Inputs"]

FIT_ROWS = 8192  # rows of activations that a Hessian is made of, at most
TEXT_SHARE = 0.5  # of the Hessian's weight that text tokens get, however few they are beside the visual ones


@dataclass(frozen=True, eq=False)
class _Sequence:
    """ids: i64[T].   positions: i32[3, T].   pictures: numbers of its pictures."""

    ids: np.ndarray
    positions: np.ndarray
    pictures: range


class Inputs:
    """The samples of one calibration, prepared for one model.

    Each is the whole conversation, answers included: a model is calibrated on the tokens that it will write.
    max_side: px; larger pictures are shrunk first.   text_share: see TEXT_SHARE.   fit_rows: see FIT_ROWS.
    Raises ImageError for a picture that cannot be read.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        samples: Sequence[Sample],
        *,
        seed: int,
        max_side: int,
        text_share: float = TEXT_SHARE,
        fit_rows: int = FIT_ROWS,
    ) -> None:
        self._config, self._pre = checkpoint.config, checkpoint.preprocessor
        self._seed, self._share, self.fit_rows = seed, text_share, fit_rows
        self._rgb: list[np.ndarray] = []
        self._sequences: list[_Sequence] = []
        vocabulary = Vocabulary(checkpoint.tokenizer_json)
        self._template = read_template(checkpoint.raw.get("chat_template"), knows=vocabulary.knows)
        for sample in samples:
            self._add(sample, vocabulary, max_side)
        self._ids = np.concatenate([s.ids for s in self._sequences])

    def _add(self, sample: Sample, vocabulary: Vocabulary, max_side: int) -> None:
        first = len(self._rgb)
        self._rgb += [load_picture(image, self._pre, max_side=max_side).rgb for image in sample.images]
        grids = [self._cells(rgb) for rgb in self._rgb[first:]]
        *history, (question, answer) = sample.turns
        cells = [rows * columns for rows, columns in grids]
        prompt = build_prompt(vocabulary, question, cells, history=history, template=self._template)
        ids = np.array([*prompt, *vocabulary.encode(answer + "<|im_end|>")])
        positions = rope_positions(ids, grids, image_token=self._config.image_token)
        self._sequences.append(_Sequence(ids, positions, range(first, len(self._rgb))))

    def _cells(self, rgb: np.ndarray) -> tuple[int, int]:
        return rgb.shape[0] // self._pre.factor, rgb.shape[1] // self._pre.factor

    @property
    def patches(self) -> int:
        """Patches of all pictures."""
        return sum(rgb.shape[0] * rgb.shape[1] for rgb in self._rgb) // self._pre.patch_size**2

    @property
    def tokens(self) -> int:
        """Tokens of all conversations."""
        return len(self._ids)

    @property
    def visual_tokens(self) -> int:
        return int((self._ids == self._config.image_token).sum())

    @property
    def text_ids(self) -> np.ndarray:
        """The different tokens that are words: i64[n], ascending."""
        return np.setdiff1d(self._ids, [self._config.image_token])

    def pixels(self) -> Iterator[Tensor]:
        """Yields each picture's patches, f32[P, 3 * 2 * 14 * 14]."""
        for rgb in self._rgb:
            yield torch.from_numpy(patchify(rgb, self._pre))

    def vision_rows(self, x: Tensor) -> Rows:
        """Puts the pictures' activations f32[R, D] together with where each stands."""
        grids = [(rgb.shape[0] // self._pre.patch_size, rgb.shape[1] // self._pre.patch_size) for rgb in self._rgb]
        angles = {grid: vision_angles(self._config.vision, *grid) for grid in set(grids)}
        spans = _spans([rows * columns for rows, columns in grids])
        return Rows(x, spans, [angles[grid] for grid in grids], self._some(np.arange(len(x)), self.fit_rows, 0))

    def merger_rows(self, x: Tensor) -> Rows:
        """As vision_rows(), but the chosen rows count merged cells."""
        rows = self.vision_rows(x)
        cells = len(x) // self._pre.merge_size**2
        return Rows(x, rows.spans, rows.angles, self._some(np.arange(cells), self.fit_rows, 0))

    def language_rows(self, x: Tensor) -> Rows:
        """Puts the conversations' activations f32[R, D] together; text and visual rows get their shares of weight."""
        visual = self._ids == self._config.image_token
        text = self._some(np.flatnonzero(~visual), self.fit_rows // 2, 1)
        seen = self._some(np.flatnonzero(visual), self.fit_rows - len(text), 2)
        share = self._share if len(seen) else 1.0
        weight = torch.cat(
            [torch.full((len(text),), share / len(text)), torch.full((len(seen),), (1 - share) / max(1, len(seen)))]
        )
        angles = [language_angles(self._config.text, s.positions) for s in self._sequences]
        sizes = [len(s.ids) for s in self._sequences]
        return Rows(x, _spans(sizes), angles, torch.cat([text, seen]), weight)

    def embed(self, table: Tensor, visual: Tensor) -> Tensor:
        """Makes the language model's input f32[R, D].

        table: f32[n, D], the rows of text_ids.   visual: f32[visual tokens, D], in the order of the pictures.
        """
        x = torch.empty(len(self._ids), table.shape[1])
        picture = self._ids == self._config.image_token
        x[torch.from_numpy(picture)] = visual.cpu()
        x[torch.from_numpy(~picture)] = table[torch.from_numpy(np.searchsorted(self.text_ids, self._ids[~picture]))]
        return x

    def _some(self, rows: np.ndarray, most: int, stream: int) -> Tensor:
        """At most so many of these row numbers, at random from the seed, ascending: i64[n]."""
        if len(rows) > most:
            rng = np.random.default_rng([self._seed, stream, most])
            rows = np.sort(rng.choice(rows, most, replace=False))
        return torch.from_numpy(rows.astype(np.int64))


def _spans(sizes: Sequence[int]) -> list[tuple[int, int]]:
    ends = np.cumsum(sizes).tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))
