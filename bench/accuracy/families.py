"""How each family of models is asked for a box: one row of data per family, one function that applies it.

Rows: the eight families of Migician's eval/MIG_bench_eval.py, whose strings are kept byte for byte (sic: "addtional",
a second box_start where box_end belongs, leading spaces in some and not in others), and qwen2_5_vl, which writes
absolute pixels. The tails for MIBench and MMIU come from the same script, those for the chain of thought from
eval/MIG_bench_cot.py.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from ...runtime.errors import MigicianError
from ...runtime.image import open_picture, smart_resize
from ..engines import Engine
from .data import Question
from .protocol import FORMAT, MAX_NEW_TOKENS, Y_SCALE
from .runner import Reply

__all__ = ["FAMILIES", "Family", "ask", "detect", "find", "on_grid", "render", "resized", "scored"]

PICTURE = "<image>"  # in a header or a question: a picture goes here
_THOUGHT = " Format:{}. Don't generate additional words."  # this one is spelled right
_QWEN_THOUGHT = _THOUGHT.format("<|box_start|>(x1,y1),(x2,y2)<|box_end|>")
_INTERN_THOUGHT = _THOUGHT.format("<box>[[x1,y1,x2,y2]]</box>")
_LIST = " Format:<box>[x1, y1, x2, y2]</box>. Don't generate addtional words."
_SHORT_TAGS = (
    ("<|box_start|>", "<box>"),
    ("<|box_end|>", "</box>"),
    ("<|object_ref_start|>", "<ref>"),
    ("<|object_ref_end|>", "</ref>"),
)
_NO_TAGS = tuple((tag, "") for tag, _ in _SHORT_TAGS)
_CORNERS = r"\((\d+),(\d+)\),\((\d+),(\d+)\)"
_SOURCE_BOX = r"\(<box>" + _CORNERS + r"</box>\)"  # misses the unbalanced ones of multi_view, as published


@dataclass(frozen=True)
class Family:
    """One family's form.

    named: words in a model's name that say it is one.   model_types: the same of its config.json.
    format: what is glued to the question.   task_formats: and more behind it, by task.
    thought: the format of the chain of thought's second step.
    header: written once per picture before the question, {n} counts from 1; with <image>, pictures stand in the text.
    tags, boxes: how the question's tags and boxes are rewritten, boxes as (pattern, replacement).
    first_only: only the first picture is shown.   longest_side: of a picture, in pixels; smaller ones stay.
    beams: of a beam search, 1 is greedy.   pixels: boxes are pixels of the resized picture, not thousandths.
    placeholders: what becomes of <image> in MIBench's questions.   mibench_side: as longest_side, but small pictures
    grow to it.   mibench_tail, mmiu_tail: ends of these questions.   mibench_tokens: new tokens there.
    listed, doubled: the published script compares MIBench's answer with a list, counts MMIU's questions twice.
    """

    name: str
    named: tuple[str, ...]
    model_types: tuple[str, ...]
    format: str
    thought: str = ""
    task_formats: tuple[tuple[str, str], ...] = ()
    header: str = ""
    tags: tuple[tuple[str, str], ...] = ()
    boxes: tuple[str, str] | None = None
    first_only: bool = False
    longest_side: int | None = None
    new_tokens: int = MAX_NEW_TOKENS
    beams: int = 1
    pixels: bool = False
    placeholders: Literal["keep", "name", "drop"] = "drop"
    mibench_side: int | None = None
    mibench_tail: str = ""
    mibench_tokens: int = MAX_NEW_TOKENS
    mmiu_tail: str = ""
    listed: bool = False
    doubled: bool = False

    @property
    def inline(self) -> bool:
        """Whether pictures stand in the text; otherwise all come before it."""
        return PICTURE in self.header

    @property
    def y_scaled(self) -> bool:
        """Whether the published score stretches the boxes' y."""
        return Y_SCALE.get(self.name) == "published"


_ROWS = (
    Family(
        "migician", ("migician",), (),
        format=FORMAT, thought=_QWEN_THOUGHT, placeholders="keep", listed=True, doubled=True,
    ),
    Family(
        "qwen2_5_vl", ("qwen2.5-vl", "qwen2_5_vl", "qwen2.5vl"), ("qwen2_5_vl",),
        format=FORMAT, thought=_QWEN_THOUGHT, pixels=True, placeholders="keep", listed=True, doubled=True,
    ),
    Family(
        "qwen2_vl", ("qwen2-vl", "qwen2_vl", "qwen2vl"), ("qwen2_vl",),
        format=FORMAT, thought=_QWEN_THOUGHT, placeholders="keep", listed=True, doubled=True,
    ),
    Family(
        "internvl2_8b", ("internvl",), ("internvl", "internvl_chat"),
        format="Format:<box>[[x1,y1,x2,y2]]</box>. Don't generate addtional words.", thought=_INTERN_THOUGHT,
        header="Image-{n}: <image>\n", tags=_SHORT_TAGS, boxes=(_CORNERS, r"[\1,\2,\3,\4]"), new_tokens=1024,
        placeholders="keep", mibench_tail="Don't generate additional words.", mibench_tokens=64,
    ),
    Family(
        "llava_onevision", ("llava-onevision", "llava_onevision", "llava-ov"), ("llava_onevision",),
        format=_LIST, header="image{n}:<image>\n", tags=_SHORT_TAGS, boxes=(_SOURCE_BOX, ""), new_tokens=100,
        placeholders="keep", mibench_side=800, listed=True,
    ),
    Family(
        "minicpm", ("minicpm",), ("minicpmv", "minicpmo"),
        format="Format:<box>x1 y1 x2 y2</box>. Don't generate addtional words.",
        tags=_SHORT_TAGS, boxes=(_CORNERS, r"[\1,\2,\3,\4]"), longest_side=500, new_tokens=2048,
        placeholders="name", mibench_tokens=2048, mmiu_tail="\nPlease only answer with the single letter.",
    ),
    Family(
        "mantis", ("mantis",), ("mllava",),
        format=_LIST, tags=_SHORT_TAGS, boxes=(_CORNERS, r"[0.\1,0.\2,0.\3,0.\4]"), new_tokens=1024, beams=5,
    ),
    Family(
        "mplug_owl3", ("mplug-owl3", "mplug_owl3"), ("mplugowl3",),
        format=_LIST, thought=_INTERN_THOUGHT, header="Image-{n}:<image>\n", tags=_SHORT_TAGS,
        boxes=(_SOURCE_BOX, ""), new_tokens=256, placeholders="keep", doubled=True,
    ),
    Family(
        "cogvlm", ("cogvlm",), ("cogvlm",),
        format=" Coordinates format:[[x0,y0,x1,y1]].", task_formats=(("diff", "Ground it in the right image."),),
        tags=_NO_TAGS, first_only=True, new_tokens=2048,
    ),
)  # fmt: skip
FAMILIES: Mapping[str, Family] = MappingProxyType({family.name: family for family in _ROWS})


def find(name: str) -> Family:
    """Finds a family by name, dashes or underscores. Raises MigicianError when there is none."""
    family = FAMILIES.get(name.lower().replace("-", "_").replace(".", "_"))
    if family is None:
        raise MigicianError(f"family {name!r} is unknown; choose from {', '.join(sorted(FAMILIES))}")
    return family


def detect(model: str, model_type: str | None = None) -> Family | None:
    """Finds the family that a model's name, else its config.json's model_type, says; None when neither does.

    Of a path only the last part is its name. Migician is a Qwen2-VL by its model_type, so only its name tells it.
    """
    word = re.split(r"[/\\]", model.rstrip("/\\"))[-1].lower()
    for family in _ROWS:
        if any(part in word for part in family.named):
            return family
    return next((family for family in _ROWS if model_type in family.model_types), None)


def render(family: Family, question: str, pictures: int, *, ending: str = "") -> str:
    """Writes the user's turn: headers, question and ending, then tags and boxes rewritten."""
    header = "".join(family.header.replace("{n}", str(n)) for n in range(1, pictures + 1))
    text = header + (question.replace(PICTURE, "") if family.inline else question) + ending
    for tag, other in family.tags:
        text = text.replace(tag, other)
    if family.boxes is not None:
        text = re.sub(*family.boxes, text)
    return text


def ask(question: Question, engine: Engine) -> Reply:
    """Puts a question of MIG-Bench in the form of the engine's family: an Ask of the runner."""
    family = find(engine.family)
    images = question.images[:1] if family.first_only else question.images
    ending = family.format + dict(family.task_formats).get(question.task, "")
    text = render(family, question.question, len(images), ending=ending)
    response = engine.answer(images, text, family.new_tokens).text
    return scored(family, engine, images, question.target, response)


def scored(family: Family, engine: Engine, images: Sequence[Path], target: int | None, response: str) -> Reply:
    """Makes a response ready for the published parser: pixels become fractions of the picture they were seen in.

    target: the picture the box lies in; the last one where that is not known.
    """
    if not family.pixels:
        return Reply(response)
    image = images[-1 if target is None or target >= len(images) else target]
    measure = getattr(engine, "seen", None)  # engines of this package know what they do to a picture
    width, height = measure(image) if measure else resized(*open_picture(image).size)
    return Reply(on_grid(response, width, height), {"pixels": response, "seen": [width, height]})


def resized(width: int, height: int) -> tuple[int, int]:
    """(width, height) after the resize that Qwen2.5-VL is published with: 4 to 16384 cells of 28 by 28 pixels."""
    rows, columns = smart_resize(height, width, min_pixels=4 * 28 * 28, max_pixels=16384 * 28 * 28)
    return columns, rows


_NUMBER = r"\s*(\d+(?:\.\d+)?)\s*"
_PIXEL_BOX = re.compile(
    rf"[\[(]{_NUMBER},{_NUMBER}(?:[\])]\s*,\s*[\[(]|,){_NUMBER},{_NUMBER}[\])]"
    rf"|<box>{_NUMBER}\s{_NUMBER}\s{_NUMBER}\s{_NUMBER}</box>"
)


def on_grid(response: str, width: int, height: int) -> str:
    """Rewrites a response's boxes from pixels to fractions, as (0.125000,0.5…),(…), which the parser takes as they are.

    width, height: of the picture the pixels count in. Values are kept below 1, which the parser would read as 0.001.
    """

    def fractions(match: re.Match[str]) -> str:
        values = [float(v) for v in match.groups() if v is not None]
        sides = (width, height, width, height)
        x1, y1, x2, y2 = (f"{min(v / side, 0.999999):.6f}" for v, side in zip(values, sides, strict=True))
        return f"({x1},{y1}),({x2},{y2})"

    return _PIXEL_BOX.sub(fractions, response)
