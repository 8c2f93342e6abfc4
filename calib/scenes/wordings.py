"""What is asked and what is answered, word for word.

The ten tasks use MIG-Bench's own templates, including their trailing and double spaces, "1th image" and the bracket
that multi_view never closes: a model trained here must meet the same strings there. Fields in braces:
{phrase} a description in reference tags, {box} a box in box tags, {nth} a picture number from 1, {question} a sentence.
"""

import re
from collections.abc import Iterator, Sequence

from .sprites import CLASSES, COLOURS, Box

__all__ = [
    "EASY_TASKS",
    "ORDINALS",
    "REASONING",
    "TASKS",
    "WORDINGS",
    "format_box",
    "format_ref",
    "parse_box",
    "texts",
    "with_article",
]

ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")
_SHARED = "These images share one object in common"

WORDINGS: dict[str, tuple[str, ...]] = {
    "group_grounding": (
        "Please find the bounding box coordinates for the area described by: {phrase}.",
        "Identify the bounding box of the region described by the following expression: {phrase}.",
        "Please locate the bounding box of the region described in this sentence: {phrase}.",
        "Please determine the bounding box coordinates for the area described here: {phrase}.",
        "Please specify the bounding box coordinates for the region indicated by this sentence: {phrase}.",
        "Please provide the bounding box coordinate of the region this sentence describes: {phrase}.",
        "Provide the bounding box of the region this expression refers to: {phrase}.",
        "Give the bounding box of the region that this sentence refers to: {phrase}.",
        "Provide the bounding box coordinates for the region referred to by this sentence: {phrase}.",
        "Give the bounding box coordinates of the area mentioned in this sentence: {phrase}.",
        "Please identify the bounding box coordinates for the area described by this sentence: {phrase}.",
    ),
    "common_object": (_SHARED + ". Recognize and locate this object in the {nth}th image. ",),
    "diff": ("Compare these two images carefully and give me the coordinates of their difference. ",),
    "region": (
        "You are given a source image followed by its several regions. "
        "Please locate the {nth}th region picture in the source image. ",
    ),
    "refer_grounding": ("Find and locate where does the object in image-1 locate in the image-2.",),
    "object_tracking": (
        "These are a sequence of images containing moving objects. For the object in the first "
        "image marked with red bounding box({box}), please locate it in the {nth}th image. ",
    ),
    "multi_view": (
        _SHARED + "(the object marked with red bounding box in the first image({box}). "
        "Recognize and locate this object in the {nth}th image. ",
    ),
    "view_diff": (
        "Compare these two images carefully and give me the coordinates of their real difference "
        "in the second image.  Find it and locate it in the second image. ",
    ),
    "correspondence": (
        "You are now presented with two objects. For the area marked by the red bounding box in "
        "the first image, identify and locate the corresponding area in the second image that "
        "serves a similar function or shares a similar meaning. ",
    ),
    "reasoning": ("{question} Find it and locate it in the second image. ",),
    # Not of the benchmark: one-picture steps on the way to the ten, and what is at a box.
    "single": ("Where is {phrase}?", "Find and locate {phrase} in the image.", "Locate {phrase}."),
    "naming": ("What is at {box}?", "Which object is at {box}?", "Recognize the object at {box}."),
    "naming_nth": ("What is at {box} in the {nth}th image?", "Which object is at {box} in the {nth}th image?"),
}
TASKS = tuple(WORDINGS)[:10]
EASY_TASKS = ("single", "naming")

# What "reasoning" asks of the second picture, by the relation meant
REASONING: dict[str, tuple[str, ...]] = {
    "colour": (
        "Which object in Image-2 has the same colour as the object in Image-1 but another shape?",
        "Locate the object in Image-2 that shares only its colour with the object in Image-1.",
    ),
    "shape": (
        "Which object in Image-2 has the same shape as the object in Image-1 but another colour?",
        "Locate the object in Image-2 that shares only its shape with the object in Image-1.",
    ),
    "same": ("Which object in Image-2 has the same shape and the same colour as the object in Image-1?",),
    "neither": ("Which object in Image-2 has neither the colour nor the shape of the object in Image-1?",),
    "largest": ("Which is the largest object in Image-2 with the same colour as the object in Image-1?",),
    "smallest": ("Which is the smallest object in Image-2 with the same colour as the object in Image-1?",),
}

_PHRASES = ("a {}", "the {}", "{}", "a small {}", "a large {}", "the small {}", "the large {}")
_BOX = re.compile(r"\((\d+),\s*(\d+)\),\s*\((\d+),\s*(\d+)\)")


def format_box(box: Sequence[float]) -> str:
    """Writes a 0..1 box as '<|box_start|>(x1,y1),(x2,y2)<|box_end|>' with integers 0..999."""
    x1, y1, x2, y2 = (min(999, max(0, round(1000 * v))) for v in box)
    return f"<|box_start|>({x1},{y1}),({x2},{y2})<|box_end|>"


def format_ref(phrase: str) -> str:
    """Puts a phrase in reference tags."""
    return f"<|object_ref_start|>{phrase}<|object_ref_end|>"


def parse_box(text: str) -> Box | None:
    """Reads the first box in a text as 0..1 numbers; None if there is none."""
    found = _BOX.search(text)
    if not found:
        return None
    x1, y1, x2, y2 = (int(v) / 1000 for v in found.groups())
    return x1, y1, x2, y2


def with_article(phrase: str) -> str:
    """Turns 'a orange' into 'an orange'."""
    return phrase.replace("a orange", "an orange")


def texts() -> Iterator[str]:
    """Yields every template and every phrase in use, which is what a tokenizer must know."""
    box, ref = "<|box_start|>(12,345),(678,90)<|box_end|>", format_ref("the red star")
    for wordings in WORDINGS.values():
        for wording in wordings:
            yield from (wording.format(phrase=ref, box=box, question=box, nth=n) for n in range(1, 7))
    for questions in REASONING.values():
        yield from (WORDINGS["reasoning"][0].format(question=q) for q in questions)
    yield from (f"It is in the {ordinal} image. {box}" for ordinal in ORDINALS)
    for cls in (*CLASSES, "object"):
        yield format_ref(f"the {cls}")
        for colour in COLOURS:
            yield from (format_ref(with_article(phrase.format(f"{colour} {cls}"))) for phrase in _PHRASES)
