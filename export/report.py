"""What an export measured: the figures of the report page, and those that go into the .mig file.

    Report.made      what was made of what and how: in the file too (`__metadata__["report"]`, read by describe.py)
    Report.size      of the file
    Report.accuracy  before and after, on held-out questions
    the rest         of the run: its time, its memory, its machine
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Accuracy", "Coverage", "Layer", "Made", "Report", "Size"]


@dataclass(frozen=True)
class Layer:
    """One matrix [N, K] and what its kind cost.

    Errors are relative: of the weights, and of the outputs over calibration inputs; rtn_ are those of rounding to
    nearest. None: not measured, as nothing was calibrated or the matrix stays bf16.   damping: of its Hessian.
    """

    name: str
    kind: str
    shape: Sequence[int]
    weight_error: float | None = None
    output_error: float | None = None
    rtn_weight_error: float | None = None
    rtn_output_error: float | None = None
    damping: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Its fields, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Coverage:
    """What the calibration consisted of.

    tasks: samples by task.   pictures: samples by how many pictures they have, as text.   sha256: of its manifest.
    """

    source: str
    samples: int
    seed: int
    sha256: str
    tasks: Mapping[str, int]
    pictures: Mapping[str, int]
    visual_tokens: int
    text_tokens: int


@dataclass(frozen=True)
class Made:
    """What was made of what and how; nothing in it depends on the machine or the clock."""

    model: str
    mode: str
    rotated: bool
    layers: Sequence[Layer]
    calibration: Coverage | None

    def to_text(self) -> str:
        """As JSON, for the file; the same for the same."""
        return json.dumps(asdict(self), sort_keys=True)


@dataclass(frozen=True)
class Size:
    """Of the weights as stored.   parts: bytes by part of the model."""

    bytes: int
    weights: int
    bits_per_weight: float
    parts: Mapping[str, int]


@dataclass(frozen=True)
class Accuracy:
    """Before and after: {mean {iou, acc50}, tasks {task: {n, iou, acc50}}}, and, where kept, scores {task: [IoU, ...]}.

    per_task: questions of each task, the same in the same order before and after.
    """

    per_task: int
    before: Mapping[str, Any]
    after: Mapping[str, Any]

    @property
    def drop(self) -> float:
        """By how much the mean IoU fell."""
        return self.before["mean"]["iou"] - self.after["mean"]["iou"]


@dataclass(frozen=True)
class Report:
    """All that was measured.   accuracy: None where nobody asked.   peak_rss_mb: of the exporter."""

    made: Made
    size: Size
    accuracy: Accuracy | None
    seconds: float
    peak_rss_mb: float
    machine: str
