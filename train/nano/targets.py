"""What the dense, throw-away losses of training ask for, cell by cell and token by token.

Letters: G cells along a picture's side, C = G * G.   Boxes of objects are in px, a cell is 28 px wide.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...calib.scenes import ORDINALS, Box, ObjectRecord, Sample
from .vocabulary import Vocabulary

__all__ = ["NO_TARGET", "SALIENT_TASKS", "AnswerWeights", "box_cells", "cell_links", "cell_objects", "object_tables",
           "salience", "weigh_answer"]  # fmt: skip

CELL_PX = 28
NO_TARGET = -1
SALIENT_TASKS = (
    "diff",
    "view_diff",
    "common_object",
    "refer_grounding",
    "correspondence",
)  # answers seen without words
_PUNCTUATION = frozenset(("(", ")", ",", "<|box_start|>", "<|box_end|>", "<|im_end|>"))


@dataclass(frozen=True)
class AnswerWeights:
    """How much each kind of answer token counts. The first digit, the only one that no digit before it gives away,
    counts its hundreds weight times `first`."""

    first: float = 3.0
    ordinal: float = 6.0
    word: float = 1.0
    punctuation: float = 0.2
    hundreds: float = 3.0
    tens: float = 1.5
    ones: float = 0.3


def weigh_answer(vocabulary: Vocabulary, ids: Sequence[int], w: AnswerWeights) -> tuple[list[float], list[int]]:
    """Weight of every answer token, and its place: 2 hundreds, 1 tens, 0 ones, -1 no digit."""
    pieces = [vocabulary.pieces[i] for i in ids]
    weights, places, run = [], [], 0
    for piece, after in zip(reversed(pieces), [False, *[p.isdigit() for p in reversed(pieces)]], strict=False):
        run = run + 1 if after and piece.isdigit() else 0
        places.append(min(2, run) if piece.isdigit() else NO_TARGET)
    places.reverse()
    for piece, place in zip(pieces, places, strict=True):
        if place != NO_TARGET:
            weights.append((w.ones, w.tens, w.hundreds)[place])
        elif piece in _PUNCTUATION:
            weights.append(w.punctuation)
        else:
            weights.append(w.word * w.ordinal if piece.strip() in ORDINALS else w.word)
    first = next((i for i, place in enumerate(places) if place != NO_TARGET), None)
    if first is not None:
        weights[first] *= w.first
    return weights, places


def _coverage(box: Box, grid: int, cell: float) -> np.ndarray:
    """f64[C]: the share of each cell that a box covers; box and cell in the same unit."""
    x = np.arange(grid) * cell
    w = np.clip(np.minimum(x + cell, box[2]) - np.maximum(x, box[0]), 0, None)
    h = np.clip(np.minimum(x + cell, box[3]) - np.maximum(x, box[1]), 0, None)
    return (h[:, None] * w[None]).reshape(-1) / cell**2


def box_cells(box: Box, grid: int) -> np.ndarray:
    """Cells that a 0..1 box covers well, at least the best one."""
    covered = _coverage(box, grid, 1 / grid)
    return np.flatnonzero(covered >= min(0.4, covered.max()))


def cell_objects(objects: Sequence[ObjectRecord], grid: int) -> np.ndarray:
    """i64[C]: number of the object that covers a cell most; -1 none, -2 too little to say either."""
    if not objects:
        return np.full(grid * grid, NO_TARGET)
    covered = np.stack([_coverage(entry["box"], grid, CELL_PX) for entry in objects])
    best, most = covered.argmax(0), covered.max(0)
    return np.where(most > 0.3, best, np.where(most > 0.06, -2, NO_TARGET))


def object_tables(
    pictures: Sequence[Sequence[ObjectRecord]], cells: Sequence[np.ndarray], grid: int
) -> dict[str, Tensor]:
    """What each covered cell shows: picture, cell, cls, colour i64[M]; dist f32[M, 4] to the object's edges in cells;
    box i64[M, 4] on the 0..999 grid."""
    picture, cell = np.nonzero(np.stack(cells) >= 0)
    shown = [pictures[p][cells[p][c]] for p, c in zip(picture.tolist(), cell.tolist(), strict=True)]
    box = np.array([entry["box"] for entry in shown], np.float32).reshape(-1, 4)
    middle = np.stack([cell % grid, cell // grid], 1) * CELL_PX + CELL_PX / 2
    dist = np.concatenate([middle - box[:, :2], box[:, 2:] - middle], 1) / CELL_PX
    on_grid = np.clip(np.rint(box * 1000 / (CELL_PX * grid)), 0, 999)
    tables = {
        "picture": picture,
        "cell": cell,
        "cls": np.array([entry["cls"] for entry in shown], np.int64),
        "colour": np.array([entry["col"] for entry in shown], np.int64),
        "dist": dist.astype(np.float32),
        "box": on_grid.astype(np.int64),
    }
    return {name: torch.from_numpy(table) for name, table in tables.items()}


def _scene_links(objects: Sequence[Sequence[ObjectRecord]], cells: Sequence[np.ndarray], starts: Sequence[int],
                 prefix: int) -> np.ndarray:  # fmt: skip
    """bool[3, P, P] of one scene; see cell_links."""
    count = len(cells[0])
    column = np.concatenate([start + np.arange(count) for start in starts])
    picture = np.repeat(np.arange(len(starts)), count)
    cls, key = np.full(len(column), NO_TARGET), np.full(len(column), NO_TARGET)
    for i, number in enumerate(np.concatenate(cells)):
        if number >= 0:
            entry = objects[picture[i]][number]
            cls[i], key[i] = entry["cls"], entry["cls"] * 100 + entry["col"]
    out = np.zeros((3, prefix, prefix), bool)
    for kind, value in enumerate((key, cls)):
        shown = (value >= 0) & (picture >= 1)
        same = (value[:, None] == value[None]) & shown[:, None] & (picture[None] < picture[:, None])
        out[kind][np.ix_(column, column)] = same
        new = np.flatnonzero(shown & ~same.any(1))
        out[kind][column[new], np.array(starts)[picture[new]] - 1] = True
    out[2][column[count:], column[:-count]] = True
    return out


def cell_links(scenes: Sequence[Sample], cells: Sequence[Sequence[np.ndarray]], starts: Sequence[Sequence[int]],
               grid: int) -> Tensor:  # fmt: skip
    """bool[3, B, P, P]: which columns a cell of a later picture should look at.

    0: cells of earlier pictures with its class and colour, 1: with its class; an object met for the first time is
    linked to its own picture's <|vision_start|>.   2: the cell at the same place of the picture before.
    """
    prefix = max(row[-1] for row in starts) + grid * grid + 1
    links = [_scene_links(s["objects"], c, row, prefix) for s, c, row in zip(scenes, cells, starts, strict=True)]
    return torch.from_numpy(np.stack(links, 1))


def salience(scenes: Sequence[Sample], starts: Sequence[Sequence[int]], grid: int) -> Tensor:
    """i64[4, n]: row, column, number in SALIENT_TASKS, whether a main answer covers the cell; later pictures only.

    For these tasks the pictures alone say what will be asked for; cells covered too little to say are left out.
    """
    out = [np.zeros((4, 0), np.int64)]
    for b, (scene, row) in enumerate(zip(scenes, starts, strict=True)):
        if scene["task"] not in SALIENT_TASKS:
            continue
        asked = [q.meta for q in scene["qas"] if not q.meta["aux"]]
        for k in range(1, len(row)):
            boxes = [_coverage(meta["box"], grid, 1 / grid) for meta in asked if meta["image"] == k]
            covered = np.max(boxes, 0) if boxes else np.zeros(grid * grid)
            yes = covered >= max(1e-6, min(0.4, covered.max()))
            at = np.flatnonzero(yes | (covered <= 0.06))
            task = SALIENT_TASKS.index(scene["task"])
            out.append(np.stack([np.full(len(at), b), row[k] + at, np.full(len(at), task), yes[at]]).astype(np.int64))
    return torch.from_numpy(np.concatenate(out, 1))
