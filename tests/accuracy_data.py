"""A small data file in MIG-Bench's layout, with the published one's faults, for the tests of the accuracy commands."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

FORMAT = "Format:<|box_start|>(x1,y1),(x2,y2)<|box_start|>. Don't generate addtional words."


def _record(task: str, images: Sequence[str], question: str, answer: Sequence[float], info: str = "") -> dict[str, Any]:
    return {
        "task": task,
        "images": [f"./MIG-Bench/images/{task}/{image}" for image in images],
        "question": question,
        "answer": list(answer),
        "additional_info": info,
        "need_format": task not in ("group_grounding", "object_tracking"),
    }


_COMMON = "These images share one object in common. Recognize and locate this object in the {}th image. "
_REGION = "You are given a source image followed by its several regions. Please locate the {}th region picture in the source image. "  # noqa: E501
_TRACKED = (
    "These are a sequence of images containing moving objects. For the object in the first image marked with red "
    "bounding box(<|box_start|>(139,305),(495,743)<|box_end|>), please locate it in the {}th image. "
)
_VIEW = "Compare these two images carefully and give me the coordinates of their real difference in the second image.  Find it and locate it in the second image. "  # noqa: E501

RECORDS = [
    _record("common_object", ["a.png", "b.png", "c.png"], _COMMON.format(1), [0.321, 0.096, 0.999, 0.724]),
    _record("common_object", ["a.png", "b.png", "c.png"], _COMMON.format(2), [0.6, 0.2, 0.3, 0.9]),  # 1: x inverted
    _record("common_object", ["a.png", "b.png", "c.png"], _COMMON.format(3), [0.1, 0.2, 1.048, 0.9]),  # out of range
    _record("correspondence", ["a.png", "b.png"], "Locate the corresponding area in the second image. ",
            [0.032, 0.64, 0.445, 0.994]),
    _record("diff", ["a.png", "b.png"], "Compare these two images carefully and give me the coordinates of their "
            "difference. ", [0.0, 0.0, 0.998, 0.486]),
    _record("group_grounding", ["a.png", "b.png", "c.png"], "Find: <|object_ref_start|>a truck<|object_ref_end|>.",
            [0.241, 0.378, 0.447, 0.621], "It is in the third image. <|box_start|>(241,378),(447,621)<|box_end|>. "),
    _record("multi_view", ["a.png", "b.png", "c.png"], "These images share one object in common(the object marked with "
            "red bounding box in the first image(<|box_start|>(451,265),(519,388)<|box_end|>). Recognize and locate "
            "this object in the 2th image. ", [0.443, 0.247, 0.522, 0.395]),
    _record("region", ["a.png", "b.png", "c.png"], _REGION.format(1), [0.421, 0.104, 0.606, 0.507]),
    _record("region", ["a.png", "b.png", "c.png"], _REGION.format(2), [0.1, 0.1, 0.3, 0.2]),
    _record("view_diff", ["a.png", "b.png"], _VIEW, [0.383, 0.722, 0.603, 0.816]),
    _record("refer_grounding", ["a.png", "b.png"], "Find where does the object in image-1 locate in the image-2.",
            [0.26, 0.473, 0.428, 0.93]),
    _record("object_tracking", list("123456"), _TRACKED.format(2), [0.082, 0.338, 0.54, 0.812]),
    _record("object_tracking", list("123456"), _TRACKED.format(6), [0.1, 0.5, 0.2, 0.55]),
    _record("reasoning", ["a.png", "a.png"], "What might they need? Find it and locate it in the second image. ",
            [0.442, 0.471, 0.555, 0.645], "What might they need?"),
]  # fmt: skip
# Interleaved: the third group's questions do not stand together in the file.
RECORDS.insert(5, _record("common_object", ["a.png", "b.png", "c.png"], _COMMON.format(1), [0.2, 0.9, 0.4, 0.5]))
INVERTED = [1, 5]
TARGETS = [0, 1, 2, 1, 1, 0, 2, 1, 0, 0, 1, 1, 1, 5, 1]


def write_data(folder: Path, *, pictures: bool = False, records: Sequence[dict[str, Any]] = RECORDS) -> Path:
    """Writes MIG_data.json, with tiny pictures where asked to."""
    path = folder / "MIG_data.json"
    path.write_text(json.dumps(list(records)))
    if pictures:
        for image in {image for record in records for image in record["images"]}:
            (folder / image).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (56, 56), (90, 30, 10)).save(folder / image, "png")
    return path


def truth(record: dict[str, Any]) -> str:
    """The record's box as a model would say it."""
    x1, y1, x2, y2 = (round(1000 * v) for v in record["answer"])
    return f"<|box_start|>({x1},{y1}),({x2},{y2})<|box_end|>"


def write_answers(path: Path, answers: dict[int, str], **extra: Any) -> Path:
    """Writes JSON lines of answers."""
    lines = [json.dumps({"index": index, "response": response, **extra}) for index, response in answers.items()]
    path.write_text("".join(line + "\n" for line in lines))
    return path
