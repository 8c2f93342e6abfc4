"""Throw-away heads and the dense losses that teach place, content matching and comparison.

A few digits per answer are too thin a signal for so small a model; every picture cell and every attention head that
matters gets a target of its own instead. Nothing of this is saved with the model: what remains is a plain Qwen2-VL.

| losses                                  | where                | what they teach                                    |
|-----------------------------------------|----------------------|----------------------------------------------------|
| v_object v_class v_colour v_dist        | vision cells         | what a cell shows, how far its object's edges are  |
| v_wave                                  | vision cells         | the same distances as sin and cos                  |
| b_number b_hundreds b_wave b_picture    | cells after layer 1  | the object's box; SwiGLU can add angles of waves   |
| b_digits b_tens                         | cells after layer 3  | its hundreds and tens digits                       |
| link_key link_class link_place          | heads of layers 1, 2 | a cell looks at its counterpart in earlier ones    |
| salient1 salient2                       | cells after 1 and 2  | is this cell the answer, as far as pictures tell |
| phrase                                  | heads of layer 2     | phrases and boxes look at their object             |
| answer                                  | heads of layer 4     | digits and ordinals look at the answer's cells     |
| text                                    | logits               | the next token                                     |
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...calib.scenes import CLASSES, COLOURS
from .model import NanoConfig, NanoModel, patchify
from .packing import Packed
from .targets import SALIENT_TASKS

__all__ = ["DEFAULT_WEIGHTS", "Heads", "Measured", "measure"]

_EDGE_PERIODS, _BOX_PERIODS = (0.7, 1.75, 3.5), (1000.0, 500.0, 250.0, 100.0, 50.0)
_EARLY, _LATE = 1, 3  # layers after which boxes are read from cells
_PHRASE_LAYER, _ANSWER_LAYER = 2, 4
_POINTER_HEADS = 4
_LINK_HEADS = {1: ((1,), (0,), (4,)), 2: ((1, 3), (5,), (7,))}  # layer -> heads for key, class and place
_HIDDEN = -1e9

DEFAULT_WEIGHTS = {
    "text": 1.0, "v_object": 0.5, "v_class": 0.5, "v_colour": 0.5, "v_dist": 1.0, "v_wave": 0.5,
    "b_number": 1.0, "b_hundreds": 0.5, "b_wave": 1.0, "b_picture": 0.1, "b_digits": 0.5, "b_tens": 1.0,
    "link_key": 0.3, "link_class": 0.2, "link_place": 0.3, "salient1": 1.0, "salient2": 1.0,
    "phrase": 1.0, "answer": 0.5,
}  # fmt: skip


class Heads(nn.Module):
    """The throw-away linear heads."""

    def __init__(self, c: NanoConfig) -> None:
        super().__init__()
        self.parts = [1, len(CLASSES), len(COLOURS), 4]
        self.vis = nn.Linear(c.dim, sum(self.parts))
        self.vis_wave = nn.Linear(c.dim, 4 * 2 * len(_EDGE_PERIODS))
        self.pos = nn.Linear(c.dim, 4 * 11)  # early: box in hundreds as numbers, and hundreds digits
        self.pos_wave = nn.Linear(c.dim, 4 * 2 * len(_BOX_PERIODS))
        self.pos2 = nn.Linear(c.dim, 4 * 20)  # late: hundreds and tens digits
        self.pic = nn.Linear(c.dim, 6)
        self.sal = nn.ModuleList(nn.Linear(c.dim, len(SALIENT_TASKS)) for _ in range(2))


@dataclass
class Measured:
    """losses: scalars to weigh and add.   watched: figures for the log."""

    losses: dict[str, Tensor]
    watched: dict[str, float]


def _waves(x: Tensor, periods: tuple[float, ...]) -> Tensor:
    """[.., 4] -> [.., 4, periods, 2]: sin and cos of 2 pi x / period."""
    angle = 2 * math.pi * x[..., None].float() / torch.tensor(periods, device=x.device)
    return torch.stack([angle.sin(), angle.cos()], -1)


def _normed(x: Tensor) -> Tensor:
    return F.rms_norm(x.float(), x.shape[-1:])


def _vision_losses(heads: Heads, cells: Tensor, batch: Packed) -> dict[str, Tensor]:
    cells = cells.float()
    shown, cls, colour, dist = heads.vis(cells).split(heads.parts, -1)
    sure, at = batch.cell != -2, (batch.object["picture"], batch.object["cell"])
    waves = heads.vis_wave(cells)[at].unflatten(-1, (4, len(_EDGE_PERIODS), 2))
    return {
        "v_object": F.binary_cross_entropy_with_logits(shown[..., 0][sure], (batch.cell >= 0).float()[sure]),
        "v_class": F.cross_entropy(cls[at], batch.object["cls"]),
        "v_colour": F.cross_entropy(colour[at], batch.object["colour"]),
        "v_dist": F.smooth_l1_loss(dist[at], batch.object["dist"], beta=0.03),
        "v_wave": F.mse_loss(waves, _waves(batch.object["dist"], _EDGE_PERIODS)),
    }


def _box_losses(heads: Heads, early: Tensor, late: Tensor, batch: Packed) -> Measured:
    picture = batch.object["picture"]
    at = batch.picture_row[picture], batch.picture_start[picture] + batch.object["cell"]
    early, late, box = _normed(early[at]), _normed(late[at]), batch.object["box"]
    hundreds, tens = (box // 100).flatten(), (box // 10 % 10).flatten()
    numbers, digits = heads.pos(early).split([4, 40], -1)
    later = heads.pos2(late).unflatten(-1, (4, 20))
    waves = heads.pos_wave(early).unflatten(-1, (4, len(_BOX_PERIODS), 2))
    error = (waves - _waves(box, _BOX_PERIODS)).square().mean((0, 1, 3))
    losses = {
        "b_number": F.smooth_l1_loss(numbers * 3 + 5, box / 100.0, beta=0.1),
        "b_hundreds": F.cross_entropy(digits.reshape(-1, 10), hundreds),
        "b_wave": error.mean(),
        "b_picture": F.cross_entropy(heads.pic(early), batch.picture_number[picture]),
        "b_digits": F.cross_entropy(later[..., :10].flatten(0, 1), hundreds),
        "b_tens": F.cross_entropy(later[..., 10:].flatten(0, 1), tens),
    }
    return Measured(losses, {f"wave{p:.0f}": float(e) for p, e in zip(_BOX_PERIODS, error.detach(), strict=True)})


def _pointer_loss(qk: tuple[Tensor, Tensor], mask: Tensor, rows: Tensor, cells: Tensor) -> Tensor:
    """-log of the attention mass that some heads give the right cells, from the rows' tokens."""
    q, k = qk
    if not len(rows):
        return q.sum() * 0
    pick = list(range(0, 2 * _POINTER_HEADS, 2))  # even heads: one of each kv group where there are two
    q, k = q[rows[:, 0], :, rows[:, 1]][:, pick].float(), k[:, pick].float()
    total, count = q.sum() * 0, 0
    for b in rows[:, 0].unique().tolist():
        of = rows[:, 0] == b
        score = torch.einsum("nhd,hld->nhl", q[of], k[b]) * q.shape[-1] ** -0.5
        score = score + mask[b, :, rows[of, 1]].transpose(0, 1)
        lost = score.logsumexp(-1) - score.masked_fill(~cells[of][:, None], _HIDDEN).logsumexp(-1)
        total, count = total + lost.sum(), count + lost.numel()
    return total / count


def _link_losses(kept: dict[int, list[tuple[Tensor, Tensor]]], batch: Packed) -> dict[str, Tensor]:
    """-log of the attention mass that some heads give a cell's counterparts in earlier pictures."""
    prefix, linked = batch.links.shape[-1], batch.links.any(-1)  # bool[3, B, P]
    total, count = [torch.zeros((), device=batch.ids.device)] * 3, [0] * 3
    for layer, kinds in _LINK_HEADS.items():
        q, k = kept[layer][0]
        used = [head for heads in kinds for head in heads]
        score = q[:, used, :prefix].float() @ k[:, used, :prefix].float().transpose(2, 3) * q.shape[-1] ** -0.5
        score = score + batch.mask[..., :prefix, :prefix]
        everything = score.logsumexp(-1)
        for kind, heads in enumerate(kinds):
            at = [used.index(head) for head in heads]
            right = score[:, at].masked_fill(~batch.links[kind][:, None], _HIDDEN).logsumexp(-1)
            lost = (everything[:, at] - right).masked_fill(~linked[kind][:, None], 0.0)
            total[kind] = total[kind] + lost.sum()
            count[kind] += int(linked[kind].sum()) * len(heads)
    names = ("link_key", "link_class", "link_place")
    return {name: loss / max(1, n) for name, loss, n in zip(names, total, count, strict=True)}


def _salience_losses(heads: Heads, taps: dict[int, Tensor], batch: Packed) -> dict[str, Tensor]:
    row, column, task, covered = batch.salient
    if not len(row):
        return {}
    out, five = {}, torch.tensor(5.0, device=row.device)  # answers cover few cells
    for i, layer in enumerate((1, 2)):
        logit = heads.sal[i](_normed(taps[layer][row, column])).gather(1, task[:, None])[:, 0]
        out[f"salient{layer}"] = F.binary_cross_entropy_with_logits(logit, covered.float(), pos_weight=five)
    return out


def _text_loss(logits: Tensor, batch: Packed, at: Tensor) -> Measured:
    entropy = F.cross_entropy(logits.float(), batch.target[at], reduction="none")
    weight, place = batch.weight[at], batch.place[at]
    chosen = {"first_digit": weight >= 9, "hundreds": place == 2, "tens": place == 1, "ones": place == 0}
    watched = {name: float(entropy[which].detach().mean()) for name, which in chosen.items() if which.any()}
    return Measured({"text": (entropy * weight).sum() / weight.sum()}, watched)


def measure(model: NanoModel, heads: Heads, batch: Packed, *, vision_only: bool = False) -> Measured:
    """Runs a batch forward and takes every loss of the table above; vision_only stops at the cells."""
    patches = patchify(batch.images)
    if vision_only:
        return Measured(_vision_losses(heads, model.model.visual(patches), batch), {})
    x, cells = model.embed(batch.ids, patches)
    taps: dict[int, Tensor] = {}
    kept: dict[int, list] = {layer: [] for layer in {_PHRASE_LAYER, _ANSWER_LAYER, *_LINK_HEADS}}
    states = model.run(x, batch.positions, batch.mask, keep=kept, taps=taps)
    at = batch.target >= 0
    text = _text_loss(model.logits(states[at]), batch, at)
    box = _box_losses(heads, taps[_EARLY], taps[_LATE], batch)
    losses = {
        **(_vision_losses(heads, cells, batch) if cells.requires_grad else {}),
        **box.losses,
        **_link_losses(kept, batch),
        **_salience_losses(heads, taps, batch),
        "phrase": _pointer_loss(kept[_PHRASE_LAYER][0], batch.mask, batch.phrase_rows, batch.phrase_cells),
        "answer": _pointer_loss(kept[_ANSWER_LAYER][0], batch.mask, batch.answer_rows, batch.answer_cells),
        **text.losses,
    }
    return Measured(losses, {**box.watched, **text.watched})
