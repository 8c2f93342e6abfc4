"""MIG-Bench's published protocol, quirks and all: prompt, reading of boxes, y-scaling, IoU, the paper's table.

Source of the rules: eval/MIG_bench_eval.py and eval/utils.py of github.com/thunlp/Migician, and arXiv:2501.05767v3.
Published figures contain the quirks, so they stay; each is marked "quirk".
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

__all__ = [
    "FORMAT",
    "MAX_NEW_TOKENS",
    "PAPER",
    "TASKS",
    "THRESHOLDS",
    "Y_SCALE",
    "Box",
    "Reading",
    "direct_prompt",
    "first_box",
    "iou",
    "paper_ave",
    "read_boxes",
    "scale_y",
    "strip_tags",
]

Box = tuple[float, float, float, float]  # x1, y1, x2, y2, 0..1 of width and height

# ---- tasks and the paper
TASKS: Mapping[str, str] = MappingProxyType(  # name in the data file: name in the paper's Table 1
    {
        "diff": "Static diff",
        "view_diff": "Robust diff",
        "common_object": "Common object",
        "object_tracking": "Object tracking",
        "multi_view": "Multi-view",
        "region": "Region",
        "refer_grounding": "Referring",
        "group_grounding": "Group",
        "reasoning": "Reasoning",
        "correspondence": "Co-reference",
    }
)
# Table 1, Acc@0.5 in percent, columns in the order of TASKS; the last row is a third party's rerun of the released
# weights (MG-Thinker's paper). Expect 61 to 64 on average from the released weights, not the paper's single cells:
# their users get common object near 68 and multi-view near 52 (the repository's issue 6).
# fmt: off
PAPER: Mapping[str, tuple[float, ...]] = MappingProxyType({
    "Human":               (99.50, 97.87, 98.00, 100.0, 96.88, 100.0, 98.99, 91.06, 92.08, 97.44),
    "LLaVA-OV-72B":        (13.26,  5.34, 26.84, 12.91,  7.64,  2.14, 17.83, 21.60, 11.88,  8.55),
    "InternVL2-76B":       (15.91, 10.64, 36.40, 30.73, 20.83,  5.74, 46.46, 41.28, 32.67, 26.50),
    "Qwen2-VL-72B":        (46.12, 46.81, 64.46, 26.73, 22.57, 18.62, 33.33, 62.53, 50.50, 17.09),
    "Mantis-8B":           ( 1.52,  0.00,  3.31, 12.18,  2.08,  1.00,  1.01, 10.02,  0.00,  0.85),
    "LLaVA-OV-7B":         ( 6.06,  3.19,  3.43,  0.18,  1.04,  1.08,  9.09, 15.43,  6.93,  0.85),
    "MiniCPM-V 2.6":       (14.58,  2.13, 14.34,  9.82,  6.25,  1.75, 11.11, 10.02,  2.97,  2.56),
    "mPLUG-Owl3-7B":       (18.56,  6.38, 34.93,  8.55,  7.64,  2.41,  7.07, 22.85,  9.09,  5.98),
    "InternVL2-8B":        ( 6.92,  7.45, 25.49, 20.73,  9.72,  3.49, 28.28, 30.26, 17.82,  9.40),
    "Qwen2-VL-7B":         (27.84, 38.30, 19.36, 20.73, 11.81, 25.95, 23.23, 58.52, 48.51, 11.97),
    "mPLUG-Owl3-7B +CoT":  (16.29,  8.51, 55.39, 44.36, 25.35, 19.04, 36.36, 30.86, 18.81, 10.26),
    "InternVL2-8B +CoT":   (14.58,  7.45, 72.54, 40.91, 27.78, 28.60, 67.68, 44.49, 41.58, 11.97),
    "Qwen2-VL-7B +CoT":    (23.48, 40.43, 63.85, 62.73, 42.71, 24.85, 54.55, 43.29, 51.49, 30.77),
    "Qwen2-VL-72B +CoT":   (33.33, 47.87, 69.24, 70.18, 60.42, 51.04, 78.79, 70.74, 70.30, 35.04),
    "Migician-7B":         (65.15, 46.81, 84.19, 70.73, 60.07, 74.31, 76.77, 66.53, 59.41, 34.19),
    "Migician-7B, rerun":  (70.64, 45.74, 72.76, 67.82, 60.07, 72.57, 75.76, 84.12, 52.58, 33.33),
})
_PAPER_AVE: Mapping[str, float] = MappingProxyType({  # as printed; LLaVA-OV-72B's is not the mean of its row
    "Human": 97.18, "LLaVA-OV-72B": 13.65, "InternVL2-76B": 26.72, "Qwen2-VL-72B": 38.88, "Mantis-8B": 3.20,
    "LLaVA-OV-7B": 4.73, "MiniCPM-V 2.6": 7.55, "mPLUG-Owl3-7B": 12.35, "InternVL2-8B": 15.96, "Qwen2-VL-7B": 28.62,
    "mPLUG-Owl3-7B +CoT": 26.52, "InternVL2-8B +CoT": 35.76, "Qwen2-VL-7B +CoT": 43.82, "Qwen2-VL-72B +CoT": 58.70,
    "Migician-7B": 63.82, "Migician-7B, rerun": 63.54,
})
# fmt: on


def paper_ave(row: str) -> float:
    """The AVE that a row of PAPER was published with."""
    return _PAPER_AVE[row]


# ---- prompt
MAX_NEW_TOKENS = 128
# Quirks: glued to the question without a space, a second box_start where box_end belongs, "addtional"; appended to
# every question, whatever its need_format says.
FORMAT = "Format:<|box_start|>(x1,y1),(x2,y2)<|box_start|>. Don't generate addtional words."


def direct_prompt(question: str) -> str:
    """The user turn behind the pictures, byte for byte."""
    return question + FORMAT


# ---- reading boxes
_SPECIAL = re.compile(
    r"<\|(?:endoftext|im_start|im_end|object_ref_start|object_ref_end|box_start|box_end|quad_start|quad_end"
    r"|vision_start|vision_end|vision_pad|image_pad|video_pad)\|>"
)
_INT, _REAL = r"(\d+)", r"(\d+\.\d+)"
_CASCADE = (
    re.compile(rf"\({_INT},\s*{_INT}\),\s*\({_INT},\s*{_INT}\)"),
    re.compile(rf"\[{_REAL},\s*{_REAL},\s*{_REAL},\s*{_REAL}\]"),
    re.compile(rf"\({_REAL},{_REAL}\),\({_REAL},{_REAL}\)"),  # quirk: no spaces allowed
    re.compile(rf"\({_REAL},\s*{_REAL},\s*{_REAL},\s*{_REAL}\)"),
    re.compile(rf"\[{_INT},\s*{_INT},\s*{_INT},\s*{_INT}\]"),
    re.compile(rf"<box>{_INT}\s+{_INT}\s+{_INT}\s+{_INT}</box>"),
)


@dataclass(frozen=True)
class Reading:
    """The boxes of an answer.

    boxes: 0..1 where the answer's numbers are sound, in the answer's order.   spans: where they stand, in characters of
    strip_tags(text).   form: which expression of the cascade matched, 1 to 6; 0 for none.
    """

    boxes: tuple[Box, ...]
    spans: tuple[tuple[int, int], ...]
    form: int


def strip_tags(text: str) -> str:
    """Removes special tokens, as the published evaluation decodes: the reader never sees them."""
    return _SPECIAL.sub("", text)


def read_boxes(text: str) -> Reading:
    """Reads an answer's boxes: the first of six expressions that matches anywhere takes all its matches.

    Numbers over 1 are thousandths. Quirk: in an answer with exactly one box 1 is a thousandth too, in one with several
    it is the whole side.
    """
    text = strip_tags(text)
    for form, pattern in enumerate(_CASCADE, 1):
        matches = list(pattern.finditer(text))
        if matches:
            single = len(matches) == 1
            boxes = tuple(_box(match, single) for match in matches)
            return Reading(boxes, tuple(match.span() for match in matches), form)
    return Reading((), (), 0)


def _box(match: re.Match[str], single: bool) -> Box:
    x1, y1, x2, y2 = (_unit(float(v), single) for v in match.groups())
    return x1, y1, x2, y2


def _unit(value: float, single: bool) -> float:
    thousandths = value >= 1 if single else value > 1
    return value / 1000 if thousandths else value


# ---- y-scaling
# Family: whether published figures scale y. The other families' answers are taken as they are.
Y_SCALE: Mapping[str, str] = MappingProxyType({"migician": "published"})


def scale_y(box: Box) -> Box:
    """Stretches a box downwards as Migician's own evaluation does: y1 by 5 %, y2 by 10 %, at most 0.999, 3 decimals.

    Its author's reason: a shift seen after finetuning (the repository's issue 11). It costs a perfect answer too: the
    truth itself scores 90.6 with it.
    """
    x1, y1, x2, y2 = box
    return x1, round(min(y1 * 1.05, 0.999), 3), x2, round(min(y2 * 1.10, 0.999), 3)


def first_box(reading: Reading, y_scale: str) -> Box | None:
    """The box that is scored: the first; None without one.

    y_scale: "published" or "none". Quirk: the published scaling leaves answers with several boxes alone.
    """
    if not reading.boxes:
        return None
    box = reading.boxes[0]
    return scale_y(box) if y_scale == "published" and len(reading.boxes) == 1 else box


# ---- IoU
THRESHOLDS = (0.7, 0.5, 0.3)  # an answer at the threshold counts


def iou(a: Box, b: Box) -> float:
    """Intersection over union; 0 where a box has corners out of order, or both are points."""
    wide = min(a[2], b[2]) - max(a[0], b[0])
    high = min(a[3], b[3]) - max(a[1], b[1])
    if wide <= 0 or high <= 0:  # so it is where corners are out of order
        return 0.0
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - wide * high
    return wide * high / union if union > 0 else 0.0
