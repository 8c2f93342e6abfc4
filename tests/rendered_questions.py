"""One question, and how every family of models is asked it."""

from pathlib import Path

from migician.bench.accuracy.data import Question

ASKED = "Where is <|object_ref_start|>it<|object_ref_end|> (<|box_start|>(1,20),(300,4)<|box_end|>) in the 2th image? "
QWEN = "Format:<|box_start|>(x1,y1),(x2,y2)<|box_start|>. Don't generate addtional words."
LIST = " Format:<box>[x1, y1, x2, y2]</box>. Don't generate addtional words."
RENDERED = {
    "migician": ASKED + QWEN,
    "qwen2_vl": ASKED + QWEN,
    "qwen2_5_vl": ASKED + QWEN,
    "internvl2_8b": "Image-1: <image>\nImage-2: <image>\nWhere is <ref>it</ref> (<box>[1,20,300,4]</box>) in the 2th "
    "image? Format:<box>[[x1,y1,x2,y2]]</box>. Don't generate addtional words.",
    "minicpm": "Where is <ref>it</ref> (<box>[1,20,300,4]</box>) in the 2th image? Format:<box>x1 y1 x2 y2</box>. "
    "Don't generate addtional words.",
    "mantis": "Where is <ref>it</ref> (<box>[0.1,0.20,0.300,0.4]</box>) in the 2th image? " + LIST,
    "llava_onevision": "image1:<image>\nimage2:<image>\nWhere is <ref>it</ref>  in the 2th image? " + LIST,
    "mplug_owl3": "Image-1:<image>\nImage-2:<image>\nWhere is <ref>it</ref>  in the 2th image? " + LIST,
    "cogvlm": "Where is it ((1,20),(300,4)) in the 2th image?  Coordinates format:[[x0,y0,x1,y1]].",
}


def a_question(images: tuple[Path, ...], task: str = "multi_view", target: int | None = 1) -> Question:
    return Question(0, task, images, ASKED, (0.1, 0.1, 0.2, 0.2), "", True, target)
