"""Scenes to training tensors: one row holds a scene's pictures once and several questions about them.

    [system turn][picture]..[picture] | question answer | question answer | ...

Every branch sees the shared prefix and itself, never another branch, and its positions go on from the prefix: for each
question that is exactly the prompt of a user who asks only this.

Letters: B rows, T tokens, N pictures of the batch, P prefix tokens, C cells of a picture, G cells along its side.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...calib.scenes import ORDINALS, Box, Question, Sample, parse_box
from .targets import (
    NO_TARGET,
    AnswerWeights,
    box_cells,
    cell_links,
    cell_objects,
    object_tables,
    salience,
    weigh_answer,
)
from .vocabulary import ASSISTANT, IMAGE, PAD, SYSTEM, VISION_END, VISION_START, Vocabulary

__all__ = ["PackOptions", "Packed", "pack"]

_END = "<|im_end|>"
_LENGTH_STEP = 32  # rows are padded to a multiple of it


@dataclass(frozen=True)
class PackOptions:
    """branches: questions per scene at most.   corrupt: share of answer digits that are wrong as input (not as target).

    A wrong digit in the input makes the picture decide, not the digits before it.
    """

    branches: int = 6
    corrupt: float = 0.2
    weights: AnswerWeights = field(default_factory=AnswerWeights)


@dataclass
class Packed:
    """A batch. Text targets are shifted: target[b, t] is the token after position t, -1 where none is learned."""

    images: Tensor  # u8[N, H, W, 3]
    ids: Tensor  # i64[B, T]
    positions: Tensor  # i64[B, 3, T]
    mask: Tensor  # f32[B, 1, T, T], additive
    target: Tensor  # i64[B, T]
    weight: Tensor  # f32[B, T]
    place: Tensor  # i64[B, T]: 2 hundreds, 1 tens, 0 ones, -1 other
    cell: Tensor  # i64[N, C]: object number, -1 none, -2 neither
    object: dict[str, Tensor]  # by covered cell: picture, cell, cls, colour, dist, box
    picture_row: Tensor  # i64[N]
    picture_start: Tensor  # i64[N]: column of the picture's first cell
    picture_number: Tensor  # i64[N]: which picture of its scene
    answer_rows: Tensor  # i64[R, 2]: (row, column) of tokens that should look at answer_cells
    answer_cells: Tensor  # bool[R, T]
    phrase_rows: Tensor  # i64[R, 2], the same for tokens of the question
    phrase_cells: Tensor  # bool[R, T]
    links: Tensor  # bool[3, B, P, P]: same class and colour, same class, same place (targets.cell_links)
    salient: Tensor  # i64[4, n]: row, column, task, whether the answer covers the cell (targets.salience)

    def to(self, device: torch.device | str) -> "Packed":
        moved: dict[str, Any] = {}
        for entry in fields(self):
            value = getattr(self, entry.name)
            many = isinstance(value, dict)
            moved[entry.name] = {k: v.to(device) for k, v in value.items()} if many else value.to(device)
        return Packed(**moved)


@dataclass
class _Row:
    """One row while it grows."""

    ids: list[int]
    positions: list[np.ndarray] = field(default_factory=list)
    segment: list[int] = field(default_factory=list)  # 0 prefix, k the k-th branch
    target: list[int] = field(default_factory=list)
    weight: list[float] = field(default_factory=list)
    place: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)  # column of each picture's first cell
    next_position: int = 0

    def extend(self, ids: Sequence[int], segment: int) -> None:
        self.ids += ids
        self.segment += [segment] * len(ids)
        self.target += [NO_TARGET] * len(ids)
        self.weight += [0.0] * len(ids)
        self.place += [NO_TARGET] * len(ids)


def _prefix(vocabulary: Vocabulary, pictures: int, grid: int) -> _Row:
    """System turn and pictures, with M-RoPE positions."""
    head = vocabulary.encode(SYSTEM)
    row = _Row([])
    row.extend(head, 0)
    row.positions.append(np.repeat(np.arange(len(head))[None], 3, 0))
    p, (y, x) = len(head), np.divmod(np.arange(grid * grid), grid)
    for _ in range(pictures):
        row.starts.append(len(row.ids) + 1)
        row.extend([VISION_START, *[IMAGE] * grid * grid, VISION_END], 0)
        cells = np.stack([np.full(grid * grid, p + 1), y + p + 1, x + p + 1])
        row.positions += [np.full((3, 1), p), cells, np.full((3, 1), p + 1 + grid)]
        p += grid + 2
    row.next_position = p
    return row


def _choose(questions: Sequence[Question], branches: int, rng: np.random.Generator) -> list[Question]:
    """At most `branches` of a scene's questions, two of them extra ones where there are any."""
    if len(questions) <= branches:
        return list(questions)
    main = [q for q in questions if not q.meta["aux"]]
    extra = [q for q in questions if q.meta["aux"]]
    chosen = [main[i] for i in rng.permutation(len(main))][: max(1, branches - min(2, len(extra)))]
    return chosen + [extra[i] for i in rng.permutation(len(extra))][: branches - len(chosen)]


class _Pointers:
    """Tokens that should look at certain cells: (row, column) and the cells' columns."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, int]] = []
        self.cells: list[np.ndarray] = []

    def add(self, row: int, column: int, cells: np.ndarray, times: int = 1) -> None:
        self.rows += [(row, column)] * times
        self.cells += [cells] * times

    def tensors(self, length: int) -> tuple[Tensor, Tensor]:
        mask = np.zeros((len(self.rows), length), bool)
        for i, cells in enumerate(self.cells):
            mask[i, cells] = True
        return torch.from_numpy(np.array(self.rows, np.int64).reshape(-1, 2)), torch.from_numpy(mask)


class _Packer:
    """Packs the scenes of one batch."""

    def __init__(self, vocabulary: Vocabulary, grid: int, options: PackOptions, rng: np.random.Generator) -> None:
        self.vocabulary, self.grid, self.options, self.rng = vocabulary, grid, options, rng
        self.assistant, self.end = vocabulary.encode(ASSISTANT), vocabulary.encode(_END)
        self.zero = vocabulary.ids["0"]
        self.rows: list[_Row] = []
        self.answer, self.phrase = _Pointers(), _Pointers()

    def scene(self, scene: Sample) -> None:
        row = _prefix(self.vocabulary, len(scene["images"]), self.grid)
        for k, question in enumerate(_choose(scene["qas"], self.options.branches, self.rng), 1):
            self._branch(row, question, k)
        self.rows.append(row)

    def _branch(self, row: _Row, question: Question, segment: int) -> None:
        asked, answer = self.vocabulary.encode(question.text), self.vocabulary.encode(question.answer) + self.end
        weight, place = weigh_answer(self.vocabulary, answer, self.options.weights)
        start = len(row.ids)
        lead = len(asked) + len(self.assistant)  # tokens before the answer
        cells = row.starts[question.meta["image"]] + box_cells(question.meta["box"], self.grid)
        self._point_answer(start + lead - 1, answer, place, question, cells)
        self._point_phrase(start, asked, row.starts, question, cells)
        shown = [*asked, *self.assistant, *self._corrupted(answer)]
        row.extend(shown, segment)
        at = slice(start + lead - 1, start + lead - 1 + len(answer))
        row.target[at], row.weight[at], row.place[at] = answer, weight, place
        positions = np.arange(row.next_position, row.next_position + len(shown))
        row.positions.append(np.repeat(positions[None], 3, 0))

    def _corrupted(self, answer: list[int]) -> list[int]:
        """The answer as input, some digits replaced by random ones."""
        shown = list(answer)
        for i, token in enumerate(answer):
            if self.zero <= token < self.zero + 10 and self.rng.random() < self.options.corrupt:
                shown[i] = self.zero + int(self.rng.integers(10))
        return shown

    def _point_answer(
        self, before: int, answer: list[int], place: list[int], question: Question, cells: np.ndarray
    ) -> None:
        """Tokens that predict a digit or an ordinal look at the answer's cells; for naming, those that predict words.

        before: column that predicts the first token. The first digit, and words, count six times.
        """
        first = next((i for i, p in enumerate(place) if p != NO_TARGET), -1)
        for i, token in enumerate(answer):
            word = self.vocabulary.pieces[token].strip()
            points = word.isalpha() if question.meta["task"] == "naming" else word in ORDINALS
            if place[i] != NO_TARGET or points:
                times = 6 if i == first or place[i] == NO_TARGET else 1
                self.answer.add(len(self.rows), before + i, cells, times)

    def _point_phrase(
        self, start: int, asked: list[int], starts: list[int], question: Question, cells: np.ndarray
    ) -> None:
        """A box or a phrase in the question, and the ends of both turns, look at the object they mean."""
        row, naming = len(self.rows), question.meta["task"] == "naming"
        ends = [len(asked) + 1, len(asked) + len(self.assistant) - 1]
        box: Box | None = parse_box(question.text)
        tag = self.vocabulary.ids["<|box_end|>" if box else "<|object_ref_end|>"]
        if box:
            cells = starts[question.meta["image"] if naming else 0] + box_cells(box, self.grid)
        elif naming:
            return
        for i in [*([asked.index(tag)] if tag in asked else []), *ends]:
            self.phrase.add(row, start + i, cells)


def _pad(rows: Sequence[_Row]) -> dict[str, np.ndarray]:
    """Rows side by side, padded at their ends."""
    length = -(-max(len(row.ids) for row in rows) // _LENGTH_STEP) * _LENGTH_STEP
    shape = (len(rows), length)
    out: dict[str, Any] = {
        "ids": np.full(shape, PAD, np.int64),
        "positions": np.zeros((len(rows), 3, length), np.int64),
        "segment": np.full(shape, -1, np.int64),
        "target": np.full(shape, NO_TARGET, np.int64),
        "weight": np.zeros(shape, np.float32),
        "place": np.full(shape, NO_TARGET, np.int64),
    }
    for b, row in enumerate(rows):
        values: dict[str, Any] = {**vars(row), "positions": np.concatenate(row.positions, 1)}
        for name, array in out.items():
            array[b, ..., : len(row.ids)] = values[name]
    return out


def pack(
    scenes: Sequence[Sample],
    vocabulary: Vocabulary,
    grid: int,
    rng: np.random.Generator,
    options: PackOptions | None = None,
) -> Packed:
    """Packs scenes of one picture size, grid cells of 28 px a side; rng chooses questions and corrupts digits."""
    packer = _Packer(vocabulary, grid, options or PackOptions(), rng)
    for scene in scenes:
        packer.scene(scene)
    padded = {name: torch.from_numpy(array) for name, array in _pad(packer.rows).items()}
    segment, length = padded.pop("segment"), padded["ids"].shape[1]
    own = (segment[:, None, :] == 0) | (segment[:, None, :] == segment[:, :, None])
    seen = torch.ones(length, length, dtype=torch.bool).tril()[None] & own
    mask = torch.zeros(len(scenes), 1, length, length).masked_fill_(~seen[:, None], -1e9)
    answer_rows, answer_cells = packer.answer.tensors(length)
    phrase_rows, phrase_cells = packer.phrase.tensors(length)
    cell = [[cell_objects(objects, grid) for objects in scene["objects"]] for scene in scenes]
    places = [(b, start, k) for b, row in enumerate(packer.rows) for k, start in enumerate(row.starts)]
    picture_row, picture_start, picture_number = torch.tensor(places).unbind(1)
    starts = [row.starts for row in packer.rows]
    return Packed(
        images=torch.from_numpy(np.stack([image for scene in scenes for image in scene["images"]])),
        mask=mask,
        cell=torch.from_numpy(np.concatenate([np.stack(pictures) for pictures in cell])),
        object=object_tables(
            [objects for scene in scenes for objects in scene["objects"]],
            [one for pictures in cell for one in pictures],
            grid,
        ),
        picture_row=picture_row,
        picture_start=picture_start,
        picture_number=picture_number,
        answer_rows=answer_rows,
        answer_cells=answer_cells,
        phrase_rows=phrase_rows,
        phrase_cells=phrase_cells,
        links=cell_links(scenes, cell, starts, grid),
        salient=salience(scenes, starts, grid),
        **padded,
    )
