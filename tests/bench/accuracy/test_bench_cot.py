"""MIG-Bench's chain of thought: texts byte for byte, the picture of step 2, what the released script does instead."""

from pathlib import Path
from typing import Any

import pytest

from migician.bench.accuracy.cot import STEPS, ask, first_text, second_text, target_picture
from migician.bench.accuracy.data import Question
from migician.bench.accuracy.protocol import TASKS
from migician.bench.engines import Answered
from migician.runtime.errors import MigicianError

ORIGINAL = {
    "common_object": "Recognize it and locate this object in the 3th image. ",
    "correspondence": "Compare the marked area of the first image and find it in the second image. ",
    "diff": "These two images share one different object. Find it and locate it in the second image. ",
    "multi_view": "View the object (<|box_start|>(1,2),(3,4)<|box_end|> of the first image in the 2th image. ",
    "reasoning": "Which object of Image-2 feeds it? Find it and locate it in the second image. ",
    "refer_grounding": "Find and locate the same object in the second image. ",
    "region": "Find the content of the second region in the source picture. ",
    "view_diff": "They differ in view.  Find it and locate it in the second image. ",
    "object_tracking": "Track the one in the first image (<|box_start|>(1,2),(3,4)<|box_end|>) to the 4th image. ",
    "group_grounding": "Where is <|object_ref_start|>the red car<|object_ref_end|>?",
}
# step 1, step 2, the picture that it shows; RED is what step 1 said
EXPECTED = {
    "common_object": (
        "These images share one object in common. Recognize it and tell me its name in single phrase or words.",
        "Please locate and ground the target object according to the reference:<|object_ref_start|>RED<|object_ref_end|>.",  # noqa: E501
        2,
    ),
    "correspondence": (
        "For the first image, briefly describe the semantic/functional feature of the area marked by the red bounding box with really simple words.",  # noqa: E501
        "Ground the area that shares the same semantic or functional meaning of: <ref>RED</ref>.",
        1,
    ),
    "diff": (
        "Compare these two images carefully and tell me where does they differ. Please answer briefly in single phrase or words.",  # noqa: E501
        "According to the object difference/change: RED, please ground this difference with bounding box coordinates.",
        1,
    ),
    "multi_view": (
        "Describe the object in the first image marked with red bounding box with simple phrase or word. You can refer to other images for more precise recognition and description.",  # noqa: E501
        "Locate and ground the object <|object_ref_start|>RED<|object_ref_end|> with bounding box coordinates.",
        1,
    ),
    "reasoning": (
        "Which object of Image-2 feeds it?  Name this object in the Image-2 with simple phrase.",
        "Please locate and ground the object <|object_ref_start|>RED<|object_ref_end|> with bounding box coordinates.",
        1,
    ),
    "refer_grounding": (
        "Watch carefully and briefly describe the object in the Image-1 with simple phrase.",
        "Please find and ground the object <|object_ref_start|>RED<|object_ref_end|> with bounding box coordinates.",
        1,
    ),
    "region": (
        "Describe the content of the 3th picture with simple phrase or words.",
        "Please ground the object <|object_ref_start|>RED<|object_ref_end|> with bounding box coordinates.",
        0,
    ),
    "view_diff": (
        "Compare these two images carefully and describe the prominent different object with !really simple words or phrase!",  # noqa: E501
        "Now ground the object difference <ref>RED</ref> with bounding box coordinates.",
        1,
    ),
    "object_tracking": (
        "Describe the object in the first image marked with red bounding box with simple phrase.",
        "Now ground the target moving object <ref>RED<ref> with bounding box coordinates.",
        3,
    ),
    "group_grounding": (
        "Where is <|object_ref_start|>the red car<|object_ref_end|>? Just recognize and tell me which image is it in. Strictly answer from choice list: Image1 | Image2 | Image3 | Image4.",  # noqa: E501
        "Where is <|object_ref_start|>the red car<|object_ref_end|>?",
        0,
    ),
}
FORMAT = " Format:<|box_start|>(x1,y1),(x2,y2)<|box_end|>. Don't generate additional words."
INTERN = " Format:<box>[[x1,y1,x2,y2]]</box>. Don't generate additional words."


class Scripted:
    """Gives the responses in turn and remembers what it was asked."""

    name, versions = "scripted", {"scripted": "1"}

    def __init__(self, *responses: str, family: str = "migician") -> None:
        self.responses, self.family = list(responses), family
        self.asked: list[tuple[tuple[Path, ...], str, int]] = []

    def answer(self, images: Any, text: str, max_new_tokens: int) -> Answered:
        self.asked.append((tuple(images), text, max_new_tokens))
        return Answered(self.responses.pop(0))

    def close(self) -> None: ...


def a_question(task: str, text: str = "", *, need_format: bool = True) -> Question:
    count = 4 if task in ("common_object", "multi_view", "object_tracking", "group_grounding", "region") else 2
    images = tuple(Path(f"{i}.png") for i in range(count))
    return Question(7, task, images, text or ORIGINAL[task], (0.1, 0.1, 0.2, 0.2), "", need_format, None)


def test_every_task_has_steps() -> None:
    assert STEPS.keys() == TASKS.keys() == EXPECTED.keys()


@pytest.mark.parametrize("task", sorted(EXPECTED))
def test_texts_and_picture(task: str) -> None:
    first, second, picture = EXPECTED[task]
    question, model = a_question(task), Scripted(" RED. ", "x1-(100,200),(300,400)")
    reply = ask(question, model)
    assert model.asked == [
        (question.images, first, 128),
        ((question.images[picture],), second + FORMAT, 128),
    ]
    assert reply.response == "1(100,200),(300,400)"  # echoes of the format gone, no y-scaling
    assert reply.extra == {
        "steps": [
            {"question": first, "response": " RED. "},
            {"question": second + FORMAT, "response": "x1-(100,200),(300,400)"},
        ],
        "picture": picture,
    }


@pytest.mark.parametrize("task", sorted(EXPECTED))
def test_the_pieces_agree_with_the_whole(task: str) -> None:
    question = a_question(task)
    pieces = first_text(question), second_text(question, "RED"), target_picture(question, "RED")
    assert pieces == EXPECTED[task]


@pytest.mark.parametrize(
    ("words", "picture"),
    [("Image3", 2), ("It is in the second image", 1), ("none of them", 0), ("Image6", 0), ("Image-4", 3)],
)
def test_group_grounding_shows_the_chosen_picture(words: str, picture: int) -> None:
    model = Scripted(words, "(1,2),(3,4)")
    assert ask(a_question("group_grounding"), model).extra["picture"] == picture
    assert model.asked[1][0] == (Path(f"{picture}.png"),)


@pytest.mark.parametrize("text", ["Locate it in the first image. ", "Locate it. ", "Locate it in the 6th image. "])
def test_a_question_that_names_none_of_its_pictures_is_refused(text: str) -> None:
    with pytest.raises(MigicianError, match="question 7: names none of its pictures"):
        ask(a_question("common_object", text), Scripted("a", "b"))


def test_a_task_without_steps_is_refused() -> None:
    with pytest.raises(MigicianError, match="'counting' has no chain of thought"):
        ask(a_question("counting", "How many?"), Scripted("a", "b"))


def test_families_keep_their_own_form() -> None:
    model = Scripted("RED", "[[1,2,3,4]]", family="internvl2_8b")
    ask(a_question("view_diff"), model)
    first, second, _ = EXPECTED["view_diff"]
    assert model.asked[0][1:] == (f"Image-1: <image>\nImage-2: <image>\n{first}", 1024)
    assert model.asked[1][1:] == (f"Image-1: <image>\n{second}{INTERN}", 1024)
    model = Scripted("RED", "x", family="minicpm")
    ask(a_question("region"), model)
    assert model.asked[1][1] == (
        "Please ground the object <ref>RED</ref> with bounding box coordinates. Format:<box>x1 y1 x2 y2</box>. "
        "Don't generate addtional words."
    )


def test_pixels_of_the_one_picture_become_fractions() -> None:
    model = Scripted("RED", "(56,28),(112,84)", family="qwen2_5_vl")
    model.seen = lambda image: {"0.png": (56, 56), "1.png": (560, 280)}[image.name]  # type: ignore[attr-defined]
    reply = ask(a_question("diff"), model)
    assert reply.response == "(0.100000,0.100000),(0.200000,0.300000)"
    assert reply.extra["picture"] == 1


@pytest.mark.parametrize("task", sorted(EXPECTED))
@pytest.mark.parametrize("need_format", [True, False])
def test_the_released_qwen_path(task: str, need_format: bool) -> None:
    _, second, picture = EXPECTED[task]
    question, model = a_question(task, need_format=need_format), Scripted("RED.", "x(1,2),(3,4)", family="qwen2_vl")
    reply = ask(question, model, upstream_compat=True)
    assert [text for _, text, _ in model.asked] == [
        ORIGINAL[task] + FORMAT * need_format,  # its own first question is never sent
        second + FORMAT * (1 + need_format),
    ]
    assert model.asked[1][0] == (question.images[picture],)
    assert reply.response == "(1,2),(3,4)"


def test_the_other_released_paths() -> None:
    model = Scripted("RED", "x[[1,2,3,4]]", family="internvl2_8b")
    assert ask(a_question("reasoning"), model, upstream_compat=True).response == "[[1,2,3,4]]"
    assert model.asked[0][1].endswith(ORIGINAL["reasoning"] + " Name this object in the Image-2 with simple phrase.")
    model = Scripted("RED", "x[[1,2,3,4]]", family="mplug_owl3")
    assert ask(a_question("reasoning"), model, upstream_compat=True).response == "x[[1,2,3,4]]"
    assert model.asked[0][1].endswith("\n" + EXPECTED["reasoning"][0])
    assert model.asked[1][1].endswith(INTERN)
    with pytest.raises(MigicianError, match="no family minicpm"):
        ask(a_question("reasoning"), Scripted("a", "b", family="minicpm"), upstream_compat=True)


def test_the_intended_way_is_the_default() -> None:
    model = Scripted("RED", "(1,2),(3,4)", family="qwen2_vl")
    ask(a_question("diff"), model)
    assert model.asked[0][1] == EXPECTED["diff"][0]
