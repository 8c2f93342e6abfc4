"""MIG-Bench by a single-image chain of thought: what to look for, said from all pictures, then found in one.

Step 1 asks for words R about the object, step 2 asks one picture for its box. `ask` is the procedure as the paper's
appendix means it; upstream_compat repeats the released script with its mistakes, for whoever has to re-trace a figure.
Scores of the chain of thought are never y-scaled.

Source: Migician's eval/MIG_bench_cot.py (github.com/thunlp/Migician), strings byte for byte, and arXiv:2501.05767v3.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from ...runtime.errors import MigicianError
from ..engines import Engine
from .data import Question, picture_index
from .families import Family, find, render, scored
from .runner import Reply

__all__ = ["STEPS", "Step", "ask", "first_text", "second_text", "target_picture"]

RESPONSE = "[RESPONCE]"  # sic; where R goes
_LOCATE_IT = "Find it and locate it in the second image. "


@dataclass(frozen=True)
class Step:
    """A task's two steps.

    first: the whole first question, or what follows the benchmark's own where `keeps` is set.
    second: the second question; "" is the benchmark's own.
    picture: the one that step 2 shows: 0, 1, the one "named" in the question, or the one "chosen" in step 1.
    """

    first: str
    second: str
    picture: Literal[0, 1, "named", "chosen"]
    keeps: bool = False


# fmt: off
STEPS: Mapping[str, Step] = MappingProxyType({
    "common_object": Step(
        "These images share one object in common. Recognize it and tell me its name in single phrase or words.",
        "Please locate and ground the target object according to the reference:"
        "<|object_ref_start|>[RESPONCE]<|object_ref_end|>.",
        "named",
    ),
    "correspondence": Step(
        "For the first image, briefly describe the semantic/functional feature of the area marked by the red bounding "
        "box with really simple words.",
        "Ground the area that shares the same semantic or functional meaning of: <ref>[RESPONCE]</ref>.",
        1,
    ),
    "diff": Step(
        "Compare these two images carefully and tell me where does they differ. Please answer briefly in single phrase "
        "or words.",
        "According to the object difference/change: [RESPONCE], please ground this difference with bounding box "
        "coordinates.",
        1,
    ),
    "multi_view": Step(
        "Describe the object in the first image marked with red bounding box with simple phrase or word. You can refer "
        "to other images for more precise recognition and description.",
        "Locate and ground the object <|object_ref_start|>[RESPONCE]<|object_ref_end|> with bounding box coordinates.",
        "named",
    ),
    "reasoning": Step(
        " Name this object in the Image-2 with simple phrase.",
        "Please locate and ground the object <|object_ref_start|>[RESPONCE]<|object_ref_end|> with bounding box "
        "coordinates.",
        1,
        keeps=True,
    ),
    "refer_grounding": Step(
        "Watch carefully and briefly describe the object in the Image-1 with simple phrase.",
        "Please find and ground the object <|object_ref_start|>[RESPONCE]<|object_ref_end|> with bounding box "
        "coordinates.",
        1,
    ),
    "region": Step(
        "Describe the content of the XXXth picture with simple phrase or words.",
        "Please ground the object <|object_ref_start|>[RESPONCE]<|object_ref_end|> with bounding box coordinates.",
        0,
    ),
    "view_diff": Step(
        "Compare these two images carefully and describe the prominent different object with !really simple words or "
        "phrase!",
        "Now ground the object difference <ref>[RESPONCE]</ref> with bounding box coordinates.",
        1,
    ),
    "object_tracking": Step(
        "Describe the object in the first image marked with red bounding box with simple phrase.",
        "Now ground the target moving object <ref>[RESPONCE]<ref> with bounding box coordinates.",  # sic: not closed
        "named",
    ),
    "group_grounding": Step(
        " Just recognize and tell me which image is it in. Strictly answer from choice list: ",
        "",
        "chosen",
        keeps=True,
    ),
})
# fmt: on


def ask(question: Question, engine: Engine, *, upstream_compat: bool = False) -> Reply:
    """Puts a question in two steps: an Ask of the runner. The reply keeps both of them and the picture of the second.

    upstream_compat: with the mistakes of the released script, which differ by family, see _Released.
    Raises MigicianError for a task without steps, or a question that should name a picture and does not.
    """
    family = find(engine.family)
    released = _Released(family, question) if upstream_compat else None
    text = released.first() if released else first_text(question)
    images = question.images[:1] if family.first_only else question.images
    first = engine.answer(images, render(family, text, len(images)), family.new_tokens).text
    words = first.strip().strip(".")
    at = target_picture(question, words)
    second = second_text(question, words) + (released.formats if released else _thought(family))
    raw = engine.answer(question.images[at : at + 1], render(family, second, 1), family.new_tokens).text
    # "x1" and "-1" as a model may echo them from the format would keep the parser from its numbers.
    response = raw if released and released.keeps_echoes else raw.replace("-", "").replace("x", "")
    reply = scored(family, engine, question.images[at : at + 1], 0, response)
    steps = [{"question": text, "response": first}, {"question": second, "response": raw}]
    return Reply(reply.response, {**reply.extra, "steps": steps, "picture": at})


def _step(question: Question) -> Step:
    step = STEPS.get(question.task)
    if step is None:
        raise MigicianError(f"question {question.index}: task {question.task!r} has no chain of thought; leave it out")
    return step


def _thought(family: Family) -> str:
    """The format of step 2; families without one of their own take that of the direct question."""
    return family.thought or " " + family.format.lstrip()


def first_text(question: Question) -> str:
    """Writes step 1's question."""
    step = _step(question)
    if question.task == "region":
        return step.first.replace("XXXth", f"{picture_index(question.question) + 2}th")
    if question.task == "group_grounding":
        choices = " | ".join(f"Image{n}" for n in range(1, len(question.images) + 1))
        return question.question + step.first + choices + "."
    return (question.question.replace(_LOCATE_IT, "") if step.keeps else "") + step.first


def second_text(question: Question, words: str) -> str:
    """Writes step 2's question, without its format. words: what step 1 said."""
    return _step(question).second.replace(RESPONSE, words) or question.question


def target_picture(question: Question, words: str) -> int:
    """Finds the picture that step 2 shows, from 0; a choice that is none of the pictures is the first.

    Raises MigicianError when the question had to name a picture and does not.
    """
    which = _step(question).picture
    at: int
    if isinstance(which, int):
        at = which
    elif which == "chosen":
        found = picture_index(words)
        at = found if 0 <= found < len(question.images) else 0
    else:
        at = picture_index(question.question.replace("first", ""))
    if not 0 <= at < len(question.images):
        raise MigicianError(f"question {question.index}: names none of its pictures; take the published data file")
    return at


class _Released:
    """What the released script does in place of the procedure.

    Qwen2-VL's path writes step 1's question, then sends the benchmark's own, with the format where need_format is set;
    in step 2 such questions get the format twice. InternVL2's leaves "Find it and locate it ..." in reasoning.
    mPLUG-Owl3's hands the answer to the parser as it is. No other family has a path there.
    """

    def __init__(self, family: Family, question: Question) -> None:
        self._family, self._question = family, question
        self._qwen = family.name in ("migician", "qwen2_vl", "qwen2_5_vl")
        self.keeps_echoes = family.name == "mplug_owl3"
        if not self._qwen and family.name not in ("internvl2_8b", "mplug_owl3"):
            raise MigicianError(
                f"the released chain of thought has no family {family.name}; leave the compatible mode off"
            )

    @property
    def formats(self) -> str:
        """What ends step 2's question."""
        return _thought(self._family) * (2 if self._qwen and self._question.need_format else 1)

    def first(self) -> str:
        """Step 1's question as sent."""
        if self._qwen:
            return self._question.question + (_thought(self._family) if self._question.need_format else "")
        if self._question.task == "reasoning" and self._family.name == "internvl2_8b":
            return self._question.question + STEPS["reasoning"].first
        return first_text(self._question)
