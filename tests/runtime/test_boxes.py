"""Boxes: parsing, labels, scores, and which picture each box belongs to."""

import math

import pytest

from migician.runtime.boxes import parse_boxes

SIZES = [(640, 480), (100, 200), (1000, 1000), (500, 500)]
BOX = "<|box_start|>(100,200),(300,400)<|box_end|>"
FORMAT = "Format:<|box_start|>(x1,y1),(x2,y2)<|box_start|>. Don't generate addtional words."


def ref(words):
    return f"<|object_ref_start|>{words}<|object_ref_end|>"


def images(text, prompt="", pictures=4):
    boxes, unparsed = parse_boxes(text, prompt=prompt, sizes=SIZES[:pictures])
    assert unparsed == 0
    return [box.image for box in boxes]


def test_pixels_are_those_of_the_picture_as_given():
    (box,), unparsed = parse_boxes(f"Image-2: {ref('the cup')}{BOX}", prompt="", sizes=SIZES)
    assert unparsed == 0
    assert (box.image, box.label, box.grid) == (1, "the cup", (100, 200, 300, 400))
    assert box.xyxy == pytest.approx((10, 40, 30, 80))
    (edge,), _ = parse_boxes("<|box_start|>(0,0),(1000,1000)<|box_end|>", prompt="", sizes=SIZES[:1])
    assert edge.xyxy == (0, 0, 640, 480)


@pytest.mark.parametrize(
    "text",
    [
        BOX,
        "(100,200),(300,400)",
        "( 100 , 200 ), (300,400)",
        "<|box_start|>(100,200),(300,400)",
        "<|box_start|>(100,200),(300,400)<|box_start|>",
        "<|box_start|> (100,200),(300,400) <|box_end|>.",
    ],
)
def test_forms_of_one_box(text):
    boxes, unparsed = parse_boxes(text, prompt="", sizes=SIZES)
    assert [box.grid for box in boxes] == [(100, 200, 300, 400)] and unparsed == 0


@pytest.mark.parametrize(
    ("text", "sound", "unparsed"),
    [
        ("", 0, 0),
        ("There is none (2 cups, 3 plates).", 0, 0),
        ("<|box_start|>(300,200),(100,400)<|box_end|>", 0, 1),
        ("<|box_start|>(100,200),(300,1400)<|box_end|>", 0, 1),
        ("<|box_start|>(100,200),(300<|box_end|>", 0, 1),
        ("<|box_start|>(100,200),(30", 0, 1),
        ("(100,200),(30", 0, 1),
        ("(10.5,20),(30,40)", 0, 1),
        ("<|box_start|><|box_end|>", 0, 1),
        ("(100,200),(99999999999,400)", 0, 1),
        (f"{BOX}<|box_start|>(1,2),(3<|box_end|>{BOX}", 2, 1),
        (BOX * 3, 3, 0),
        ("(5,5),(5,5)", 1, 0),
    ],
)
def test_malformed_boxes_are_counted(text, sound, unparsed):
    boxes, left = parse_boxes(text, prompt="", sizes=SIZES)
    assert (len(boxes), left) == (sound, unparsed)


def test_no_picture_to_lie_in():
    assert parse_boxes(BOX, prompt="", sizes=[]) == ((), 1)


def test_labels():
    def labels(text, prompt=""):
        return [box.label for box in parse_boxes(text, prompt=prompt, sizes=SIZES)[0]]

    assert labels(f"{ref('a')}{BOX}{BOX}{ref(' b  c ')}{BOX}") == ["a", "a", "b c"]
    assert labels(BOX, f"Find {ref('the dog')}.") == ["the dog"]
    assert labels(BOX, f"Find {ref('the dog')} and {ref('the cat')}.") == [""]
    assert labels(BOX) == [""]


def test_score_is_the_geometric_mean_over_the_digits():
    text = "a (1,2),(3,4)"
    spans = [(i, i + 1, -1.0 if text[i].isdigit() else -50.0) for i in range(len(text))]
    (box,), _ = parse_boxes(text, prompt="", sizes=SIZES, token_spans=spans)
    assert box.score == pytest.approx(math.exp(-1))
    (merged,), _ = parse_boxes(text, prompt="", sizes=SIZES, token_spans=[(2, 7, -0.5), (7, 13, -0.1)])
    assert merged.score == pytest.approx(math.exp(-0.3))
    assert parse_boxes(text, prompt="", sizes=SIZES)[0][0].score == 0.0
    for bad in (-math.inf, math.nan):
        assert parse_boxes(text, prompt="", sizes=SIZES, token_spans=[(0, 13, bad)])[0][0].score == 0.0
    assert parse_boxes(text, prompt="", sizes=SIZES, token_spans=[(0, 13, 1e-9)])[0][0].score <= 1.0


@pytest.mark.parametrize(
    ("words", "image"),
    [
        ("It's in the third image.", 2),
        ("Image-3:", 2),
        ("image 3", 2),
        ("Image3", 2),
        ("In the 2th image,", 1),
        ("in the 3rd picture", 2),
        ("the 1st photo", 0),
        ("picture two", 1),
        ("the last image", 3),
        ("the second one", 1),
        ("in the first image there is one, and in the fourth image", 3),
        ("in the 9th image", 3),  # beyond the pictures: names none, so the default
    ],
)
def test_the_answer_names_the_picture(words, image):
    assert images(f"{words} {BOX}") == [image]


def test_many_boxes_find_their_own_picture():
    assert images(f"Image-1: {BOX}, Image-3: {BOX}{BOX} Image-2: {BOX}") == [0, 2, 2, 1]
    assert images(f"{BOX} in the second image and {BOX} in the third image") == [1, 2]
    assert images(f"Image-1: {ref('the second picture on the wall')}{BOX}") == [0]


@pytest.mark.parametrize(
    ("question", "pictures", "image"),
    [
        ("These images share one object in common. Recognize it and locate it in the 3th image. ", 4, 2),
        ("Recognize it and locate it in the second image", 4, 1),
        ("Find and ground it in the image-2.", 4, 1),
        (
            "For the object in the first image marked with red bounding box"
            "(<|box_start|>(139,305),(495,743)<|box_end|>), please locate it in the 4th image. ",
            4,
            3,
        ),
        ("Compare these two images carefully and give me the coordinates of their difference.", 2, 1),
        ("Can you find the area of the second image in the source image? Locate it in the first image.", 4, 0),
        ("Where in the source image is the content of the 2th picture?", 4, 0),
        ("Which animal feeds this one? Find it and locate it in the second image. ", 3, 1),
        ("the cup", 1, 0),
        ("the cup", 3, 2),
    ],
)
def test_the_question_names_the_picture(question, pictures, image):
    assert images(BOX, question, pictures) == [image]
    assert images(BOX, question + FORMAT, pictures) == [image]


SOURCE_BOX = "<|box_start|>(139,305),(495,743)<|box_end|>"
MIG_BENCH = [  # verbatim, trailing spaces and all
    ("These images share one object in common. Recognize and locate this object in the 1th image. ", 4, 0),
    ("These images share one object in common. Recognize and locate this object in the 3th image. ", 4, 2),
    ("Compare these two images carefully and give me the coordinates of their difference. ", 2, 1),
    (
        "You are now presented with two objects. For the area marked by the red bounding box in the first image, "
        "identify and locate the corresponding area in the second image that serves a similar function or shares a "
        "similar meaning. ",
        2,
        1,
    ),
    (
        "You are given a source image followed by its several regions. Please locate the 3th region picture in the "
        "source image. ",
        4,
        0,
    ),
    (
        "Compare these two images carefully and give me the coordinates of their real difference in the second image.  "
        "Find it and locate it in the second image. ",
        2,
        1,
    ),
    ("Find and locate where does the object in image-1 locate in the image-2.", 2, 1),
    (
        "These are a sequence of images containing moving objects. For the object in the first image marked with red "
        f"bounding box({SOURCE_BOX}), please locate it in the 4th image. ",
        4,
        3,
    ),
    (
        "These images share one object in common(the object marked with red bounding box in the first image"
        f"({SOURCE_BOX}). Recognize and locate this object in the 2th image. ",
        4,
        1,
    ),
    (
        "Locate the item in Image-2 that can cook, bake and process the stuff in Image-1. Find it and locate it in the "
        "second image. ",
        2,
        1,
    ),
]


@pytest.mark.parametrize(("question", "pictures", "image"), MIG_BENCH)
def test_wordings_of_mig_bench(question, pictures, image):
    for prompt in (question, question + FORMAT):
        assert images(BOX, prompt, pictures) == [image]


@pytest.mark.parametrize(
    ("question", "image"),
    [
        ("Locate the item in Image-2 that can cook the stuff in Image-1.", 1),
        ("Find in the second image the object that is marked in the first image.", 1),
        ("Locate the object marked in the first image in the third image.", 2),
        (f"Locate {ref('the cup on the first picture')} in the third image.", 2),
        (f"Locate {ref('the cup in the second image')}.", 1),
        ("Ground it in the 7th image.", 3),
    ],
)
def test_free_questions(question, image):
    assert images(BOX, question) == [image]


def test_mig_bench_answers():
    assert images(f"It is in the first image. {BOX}.", f"Please locate: {ref('a white truck')}.") == [0]
    assert images(f"Image-1: {BOX}\nImage-2: {BOX}\nImage-3: {BOX}") == [0, 1, 2]


def test_the_answer_wins_over_the_question():
    assert images(f"In the first image {BOX}", "Locate it in the 3th image.") == [0]
