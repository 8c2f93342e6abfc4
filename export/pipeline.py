"""Quantizes a model unit by unit: load, rotate, fit on what the quantized units before it give, pack, keep.

Only one unit's weights are in memory at a time, beside the activations of all samples.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..runtime.backends.native import Pool
from ..runtime.errors import MigicianError
from ..runtime.files.checkpoint import Checkpoint, derive
from ..runtime.files.config import ModelConfig, untied
from ..runtime.files.quantization import Quantization, matrices
from ..runtime.files.tensors import TensorFile
from .fit import Fitted, Fitter, pack, row_grid
from .folder import WorkFolder
from .inputs import Inputs
from .report import Layer
from .towers import Rows, run_block, run_layer, run_merger
from .units import Rotations, Unit, chunks_of, list_units, load_unit, matrices_of

__all__ = ["SENSITIVE", "Job", "finish", "layer_reports", "make_policy", "plan_of"]

SENSITIVE = ("visual.patch_embed.proj",)  # stays bf16: 0.2 % of the encoder's products, and reads bare pixels
_TABLE_ROWS = 8192  # rows of the embedding or the head at a time; a multiple of a block's 16

Progress = Callable[[float, float, str], None]  # work done, work in all (both in products), what is under way


def make_policy(
    config: ModelConfig, mode: str, *, rotated: bool = True, head_int4: bool = False, keep: Sequence[str] = SENSITIVE
) -> Quantization:
    """Decides the kind of every matrix.

    mode: "int8", or "int4" for the language model's layers with the rest in int8.   keep: names that stay bf16.
    Raises MigicianError for a name that is none of this model's.
    """
    if unknown := sorted(set(keep) - matrices(config).keys()):
        raise MigicianError(f"keep {unknown[0]}: no such map; names look like visual.merger.mlp.2")
    policy = Quantization(mode, 128, rotated, {})
    layers = {}
    for name, (_, columns) in matrices(config).items():
        four = name.startswith("model.layers.") or (head_int4 and name == "lm_head")
        kind = "int4" if mode == "int4" and four and policy.group(columns) else "int8"
        layers[name] = "bf16" if name in keep else kind
    if rotated and config.text.tied:  # the head takes the final norm's gain, the embedding does not
        layers["lm_head"] = "int4" if mode == "int4" and head_int4 and policy.group(config.text.hidden) else "int8"
    return Quantization(mode, 128, rotated, layers)


def plan_of(checkpoint: Checkpoint, policy: Quantization, calibration: Mapping[str, Any]) -> dict[str, Any]:
    """Describes an export so that two with the same description give the same bytes."""
    digest = hashlib.sha256()
    for key in ("config", "preprocessor", "generation"):
        digest.update(checkpoint.raw[key].encode())
    digest.update(checkpoint.tokenizer_json.encode())
    for name, tensor in checkpoint.tensors.items():
        ends = tensor.data[:4096].tobytes() + tensor.data[-4096:].tobytes()
        digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode() + ends)
    return {"model": digest.hexdigest(), "policy": json.loads(policy.to_text()), "calibration": dict(calibration)}


@dataclass(eq=False)
class Job:
    """One export under way.   inputs: None rounds to nearest.   device: of the arithmetic."""

    checkpoint: Checkpoint
    policy: Quantization
    inputs: Inputs | None
    folder: WorkFolder
    device: str = "cpu"
    progress: Progress = field(default=lambda done, total, what: None)

    def __post_init__(self) -> None:
        self._pool = Pool(torch.get_num_threads()) if self.device == "cpu" else None

    def run(self) -> None:
        """Does every unit that is not done yet. Can be killed at any point and started again."""
        units = list_units(self.checkpoint.config)
        costs = [self._cost(unit) for unit in units]
        rotations = Rotations(self.checkpoint.config) if self.policy.rotated else None
        start = self.folder.finished()
        x = self.folder.rows(start - 1) if start else None
        with torch.inference_mode():
            for number, unit in enumerate(units[start:], start):
                self.progress(sum(costs[:number]), sum(costs), unit.name)
                tensors, report, x = self._do(unit, rotations, x)
                self.folder.keep(number, tensors, [layer.to_dict() for layer in report], x)
                for file in self.checkpoint.files:
                    file.release()  # the source's pages would add up to the whole model
        self.progress(sum(costs), sum(costs), "packing")

    def _do(
        self, unit: Unit, rotations: Rotations | None, x: Tensor | None
    ) -> tuple[dict[str, Tensor], list[Layer], Tensor | None]:
        """One unit: its stored tensors, its report, the activations behind it."""
        if unit.kind in ("embedding", "head"):
            return self._table(unit, rotations, x)
        weights = load_unit(self.checkpoint, unit, rotations)
        for name in matrices_of(unit):
            if self.policy.layers[name] == "bf16":  # fitted to what will be stored
                weights[f"{name}.weight"] = weights[f"{name}.weight"].bfloat16().float()
        moved = {k: w.to(self.device) for k, w in weights.items()}
        fitter = Fitter(moved, self.policy.layers, self.policy.group_size, self._pool)
        x = self._through(unit, fitter, None if x is None else x.to(self.device))
        tensors = fitter.stored
        report = [fitted.report for fitted in fitter.fitted.values() if fitted.report]
        for name, w in fitter.weights.items():
            tensors[name] = self._as_stored(name, w)
            if w.dim() > 1:
                report.append(Layer(name.removesuffix(".weight"), "bf16", tuple(w.shape)))
        return tensors, report, None if x is None else x.cpu()

    def _as_stored(self, name: str, w: Tensor) -> Tensor:
        """Matrices as bf16 in the shape of the source, vectors as f32."""
        if w.dim() == 1:
            return w.cpu()
        return w.cpu().bfloat16().view(self.checkpoint.tensors[name].shape)

    def _through(self, unit: Unit, fitter: Fitter, x: Tensor | None) -> Tensor | None:
        """Runs the samples through a unit, fitting its maps on the way."""
        config, inputs = self.checkpoint.config, self.inputs
        if unit.kind == "stem":
            return self._stem(unit.name, fitter)
        rows = None
        if inputs is not None:
            make = {"block": inputs.vision_rows, "merger": inputs.merger_rows, "layer": inputs.language_rows}[unit.kind]
            rows = self._moved(make(_given(x)))
        if unit.kind == "merger":
            return run_merger(fitter, config.vision, unit.prefix, rows)
        if unit.kind == "block":
            run_block(fitter, config.vision, unit.prefix, rows)
        else:
            run_layer(fitter, config.text, unit.prefix, rows)
        return None if rows is None else rows.x

    def _moved(self, rows: Rows) -> Rows:
        weight = None if rows.weight is None else rows.weight.to(self.device)
        return Rows(rows.x, rows.spans, rows.angles, rows.chosen.to(self.device), weight)

    def _stem(self, name: str, fitter: Fitter) -> Tensor | None:
        if self.inputs is None:
            fitter.fit([name], None)
            return None
        pixels = torch.cat(list(self.inputs.pixels())).to(self.device)
        fitter.fit([name], pixels[self.inputs.vision_rows(pixels).chosen.to(self.device)])
        return fitter.apply(name, pixels)

    def _table(
        self, unit: Unit, rotations: Rotations | None, x: Tensor | None
    ) -> tuple[dict[str, Tensor], list[Layer], Tensor | None]:
        """The embedding or the head, some thousand rows at a time, rounded to nearest."""
        tensors: dict[str, Tensor] = {}
        report: list[Layer] = []
        if unit.kind == "head":
            norm = self.checkpoint.tensors["model.norm.weight"].to_f32()
            tensors["model.norm.weight"] = torch.ones(len(norm)) if rotations else torch.tensor(norm)
        if unit.name in self.policy.layers:
            table = _Table(unit.name, self.policy.layers[unit.name], self.policy.group_size)
            wanted = self.inputs.text_ids if self.inputs and unit.kind == "embedding" else None
            for part in chunks_of(self.checkpoint, unit, rotations, _TABLE_ROWS):
                table.add(part, wanted)
            tensors |= table.tensors()
            report.append(table.report())
            if self.inputs and unit.kind == "embedding":
                x = self.inputs.embed(torch.cat(table.picked), _given(x))
        return tensors, report, None if unit.kind == "head" else x

    def _cost(self, unit: Unit) -> float:
        """Estimates the products a unit takes, for the time left."""
        shapes, config = matrices(self.checkpoint.config), self.checkpoint.config
        total = 0.0
        for name in matrices_of(unit):
            n, k = shapes.get(name, (config.text.vocab, config.text.hidden))
            total += 40.0 * n * k  # rounding, packing, writing
            if self.inputs is None or unit.kind in ("embedding", "head"):
                continue
            rows = self.inputs.tokens if unit.kind == "layer" else self.inputs.patches
            rows = rows // config.vision.merge_size**2 if unit.kind == "merger" else rows
            total += 1.0 * n * k * rows
            if self.policy.layers[name] != "bf16":
                fitted = min(rows, self.inputs.fit_rows)
                total += fitted * (n * k + k * k / 2) + k**3 * 2 / 3 + n * k * k / 2
        return total


def _given(x: Tensor | None) -> Tensor:
    if x is None:
        raise ValueError("the activations behind the last unit are missing; delete the working folder and start again")
    return x


class _Table:
    """Rounds the rows of a large table as they come; picked holds the dequantized rows that were asked for."""

    def __init__(self, name: str, kind: str, group_limit: int) -> None:
        self._name, self._kind, self._group_limit = name, kind, group_limit
        self._parts: dict[str, list[Tensor]] = {}
        self._rows, self._columns, self._error, self._square = 0, 0, 0.0, 0.0
        self.picked: list[Tensor] = []

    def add(self, w: Tensor, wanted: Any) -> None:
        """Takes the next rows f32[n, K]; wanted: ascending row numbers of the table, or None."""
        if self._kind == "bf16":
            stored = {f"{self._name}.weight": w.bfloat16()}
            dense = w.bfloat16().float()
        else:
            grid = row_grid(self._kind, w, self._group_limit)
            fitted = Fitted(grid.round(w), grid)
            stored, dense = pack(self._name, fitted), fitted.dequantized()
        for name, tensor in stored.items():
            self._parts.setdefault(name, []).append(tensor)
        if wanted is not None:
            here = wanted[(wanted >= self._rows) & (wanted < self._rows + len(w))] - self._rows
            self.picked.append(dense[torch.from_numpy(here)])
        self._error += float((dense - w).square().sum(dtype=torch.float64))
        self._square += float(w.square().sum(dtype=torch.float64))
        self._rows, self._columns = self._rows + len(w), w.shape[1]

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors by name."""
        return {name: torch.cat(parts) for name, parts in self._parts.items()}

    def report(self) -> Layer:
        """The table's entry in the report."""
        shape = (self._rows, self._columns)
        if self._kind == "bf16":
            return Layer(self._name, self._kind, shape)
        error = (self._error / self._square) ** 0.5 if self._square else 0.0
        return Layer(self._name, self._kind, shape, error, rtn_weight_error=error, damping=0.0)


def finish(source: Checkpoint, policy: Quantization, folder: WorkFolder, calibration_hash: str) -> Checkpoint:
    """Puts the finished units together as one checkpoint, whose tensors lie in the working folder's files."""
    texts = {"quantization": policy.to_text(), "calibration": calibration_hash}
    if policy.rotated:
        texts["config"] = untied(json.loads(source.raw["config"]))
    files = [TensorFile(path) for path in folder.units(len(list_units(source.config)))]
    found = {name: tensor for file in files for name, tensor in file.tensors.items()}
    return derive(source, found, texts=texts, files=files, where=folder.path)


def layer_reports(folder: WorkFolder, count: int) -> Iterator[Layer]:
    """Yields the report entries of the finished units."""
    for path in folder.units(count):
        with TensorFile(path) as file:
            yield from (Layer(**entry) for entry in json.loads(file.metadata["report"]))
