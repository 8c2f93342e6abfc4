"""Boxes, quads and points: parsing, labels, scores, loops, and which picture each box belongs to."""

import math
import random

import pytest

from migician.runtime.boxes import parse_boxes, read_answer
from migician.runtime.loops import find_loop

SIZES = [(640, 480), (100, 200), (1000, 1000), (500, 500)]
BOX = "<|box_start|>(100,200),(300,400)<|box_end|>"
FORMAT = "Format:<|box_start|>(x1,y1),(x2,y2)<|box_start|>. Don't generate addtional words."


def ref(words):
    return f"<|object_ref_start|>{words}<|object_ref_end|>"


def read(text, prompt="", pictures=1, **more):
    return read_answer(text, prompt=prompt, sizes=SIZES[:pictures], **more)


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


@pytest.mark.parametrize(
    ("text", "grid"),
    [
        ("<|quad_start|>(10,20),(110,30),(100,130),(5,120)<|quad_end|>", (5, 20, 110, 130)),
        ("<|quad_start|>(110,30),(100,130),(5,120),(10,20)<|quad_end|>", (5, 20, 110, 130)),
        ("<|quad_start|> (10,20), (110,20), (110,130), (10,130)", (10, 20, 110, 130)),
        ("<|box_start|>(10,20),(110,20),(110,130),(10,130)<|box_end|>", (10, 20, 110, 130)),
        ("(10,20),(10,130),(110,130),(110,20)", (10, 20, 110, 130)),
        ("<|quad_start|>(10,20),(110,130)<|quad_end|>", (10, 20, 110, 130)),
    ],
)
def test_a_quad_becomes_the_box_around_it(text, grid):
    reading = read(text)
    assert [box.grid for box in reading.boxes] == [grid]
    assert (reading.points, reading.unparsed, reading.clipped) == ((), 0, 0)
    assert reading.boxes[0].xyxy == pytest.approx([v * side / 1000 for v, side in zip(grid, SIZES[0] * 2, strict=True)])


def test_a_quad_has_one_score_and_one_picture():
    text = "<|quad_start|>(10,20),(110,30),(100,130),(5,120)<|quad_end|> in the second image"
    spans = [(i, i + 1, -0.5 if text[i].isdigit() else -9.0) for i in range(len(text))]
    (box,) = read(text, pictures=2, token_spans=spans).boxes
    assert (box.image, box.score) == (1, pytest.approx(math.exp(-0.5)))


@pytest.mark.parametrize(
    ("text", "boxes", "unparsed"),
    [
        ("<|quad_start|>(10,20),(110,30),(100,130)<|quad_end|>", 0, 1),
        ("<|quad_start|>(10,20),(110,30),(100,130),(5", 0, 1),
        ("<|quad_start|>(10,20),(110,30),(100,130),(5,1400)<|quad_end|>", 0, 1),
        ("<|quad_start|><|quad_end|>", 0, 1),
        ("(1,2),(3,4),(5,6),(7,8)", 2, 0),  # two boxes in a row
        ("(1,2),(3,4),(30,20),(10,40)", 1, 1),  # a box, and one with its corners out of order
        ("(1,2),(3,4),(5,6)", 1, 1),
    ],
)
def test_what_is_no_quad(text, boxes, unparsed):
    reading = read(text)
    assert (len(reading.boxes), reading.unparsed, reading.points) == (boxes, unparsed, ())


@pytest.mark.parametrize(
    ("text", "grids"),
    [
        ("<|box_start|>(123,456)<|box_end|>", [(123, 456)]),
        ("<|box_start|>( 123 , 456 )<|box_start|>", [(123, 456)]),
        ("(123,456)", [(123, 456)]),
        ("  (123, 456).\n", [(123, 456)]),
        ("'(123,456)'", [(123, 456)]),
        ("<|im_start|>(123,456)<|im_end|>", [(123, 456)]),
        ("click(start_box='(123,456)')", [(123, 456)]),
        ("click(start_box='<|box_start|>(123,456)<|box_end|>')", [(123, 456)]),
        ("Thought: the button is (2,3) wide.\nAction: click(start_box='(123,456)')", [(123, 456)]),
        ("drag(start_box='(1,2)', end_box='(3,4)')", [(1, 2), (3, 4)]),
        ("left_double(start_box='(1,2)')\nscroll(start_box='(3,4)', direction='down')", [(1, 2), (3, 4)]),
        ('{"action": "click", "coordinate": "(123,456)"}', [(123, 456)]),
        ("click(123, 456)", [(123, 456)]),
        ("<point>123 456</point>", [(123, 456)]),
        ("<point>(123,456)</point>", [(123, 456)]),
        ("CLICK <point>[[123, 456]]</point>", [(123, 456)]),
        ("click(point='<point>123 456</point>')", [(123, 456)]),
        ("<|point_start|>(1,2)<|point_end|>", [(1, 2)]),
        ("<|point_start|>(1,2),(3,4),(5,6)<|point_end|>", [(1, 2), (3, 4), (5, 6)]),
        (f"{ref('the button')}(123,456) and more", [(123, 456)]),
        ("1. (1,2)\n2. (3,4)\n- (5,6)", [(1, 2), (3, 4), (5, 6)]),
        ("(1,2) (3,4); (5,6)", [(1, 2), (3, 4), (5, 6)]),
        ("The button is here:\n(123,456)", [(123, 456)]),
        ("（123，456）", [(123, 456)]),
    ],
)
def test_points(text, grids):
    reading = read(text)
    assert [point.grid for point in reading.points] == grids
    assert (reading.boxes, reading.unparsed, reading.clipped) == ((), 0, 0)
    x, y = grids[0]
    assert reading.points[0].xy == pytest.approx((x * 640 / 1000, y * 480 / 1000))


@pytest.mark.parametrize(
    ("text", "boxes", "unparsed"),
    [
        ("(123,456),(789,999)", 1, 0),
        ("<|box_start|>(123,456),(789,999)<|box_end|>", 1, 0),
        ("(123,456)\n,(789,999)", 1, 0),
        ("There are (2,3) of them", 0, 0),
        ("See (1,2), or f(3,4), and A=(5,6).", 0, 0),
        ("position: (2,3)", 0, 0),
        ("<|box_start|>(123,456)", 0, 1),  # cut: the second corner may have been to come
        ("<|box_start|>(123,1456)<|box_end|>", 0, 1),
        ("(1920,1080)", 0, 1),
        ("<point>123</point>", 0, 1),
        ("<|point_start|>(1,2)", 0, 1),
        ("a <point> in time", 0, 0),
    ],
)
def test_what_is_no_point(text, boxes, unparsed):
    reading = read(text)
    assert (len(reading.boxes), reading.points, reading.unparsed) == (boxes, (), unparsed)


def test_points_have_labels_scores_and_pictures_like_boxes():
    text = f"{ref('the red button')}<|box_start|>(100,200)<|box_end|> in the second image\nImage-1: {BOX}"
    spans = [(i, i + 1, -0.25) for i in range(len(text))]
    reading = read(text, pictures=2, token_spans=spans)
    (point,), (box,) = reading.points, reading.boxes
    assert (point.image, point.label, point.xy) == (1, "the red button", (10, 40))
    assert point.score == pytest.approx(math.exp(-0.25))
    assert box.image == 0
    assert read("(1,2)", prompt=f"Click {ref('the tab')}").points[0].label == "the tab"


@pytest.mark.parametrize(
    ("text", "grid", "clipped"),
    [
        ("(990,20),(1003,400)", (990, 20, 1000, 400), 1),
        ("(0,0),(1000,1000)", (0, 0, 1000, 1000), 0),
        ("(0,0),(1050,1050)", (0, 0, 1000, 1000), 1),
        ("<|box_start|>(-3,20),(40,50)<|box_end|>", (0, 20, 40, 50), 1),
        ("<|quad_start|>(900,20),(1010,30),(1000,130),(890,120)<|quad_end|>", (890, 20, 1000, 130), 1),
    ],
)
def test_a_slip_over_the_edge_is_clipped_and_counted(text, grid, clipped):
    reading = read(text)
    assert ([box.grid for box in reading.boxes], reading.clipped, reading.unparsed) == ([grid], clipped, 0)
    assert all(0 <= v <= side for v, side in zip(reading.boxes[0].xyxy, SIZES[0] * 2, strict=True))


@pytest.mark.parametrize(
    "text", ["(0,0),(1051,20)", "(-51,0),(20,20)", "(1003,20),(1010,30)", "(20,-9),(30,-1)", "(1400,3)"]
)
def test_what_lies_outside_is_malformed(text):
    reading = read(text)
    assert (reading.boxes, reading.points, reading.clipped, reading.unparsed) == ((), (), 0, 1)


def test_clipped_points_are_counted():
    reading = read("(1003,20)\n(5,6)\n(7,-8)")
    assert ([p.grid for p in reading.points], reading.clipped) == ([(1000, 20), (5, 6), (7, 0)], 2)


# Loops


def looped(text):
    """The reading of an answer that was cut, its tokens the single characters of its text."""
    loop = find_loop([ord(c) for c in text])
    return read(text, pictures=4, loop=None if loop is None else loop.start), loop


def test_a_loop_is_said_once():
    reading, loop = looped(f"{ref('the cup')}{BOX}" * 40 + f"{ref('the cup')}<|box_start|>(1")
    assert loop.times == 40
    assert [(box.label, box.grid) for box in reading.boxes] == [("the cup", (100, 200, 300, 400))]
    assert reading.unparsed == 0


def test_what_came_before_a_loop_stays():
    first = "Image-1: (1,2),(3,4)\nImage-1: (1,2),(3,4)\nImage-2: (5,6),(7,8)\n"
    reading, _ = looped(first + "Image-3: (10,20),(30,40)\nImage-4: (50,60),(70,80)\n" * 9 + "Image-3: (10,2")
    assert [box.image for box in reading.boxes] == [0, 0, 1, 2, 3]
    assert reading.unparsed == 0


def test_equal_boxes_of_two_labels_stay_two():
    reading, _ = looped(f"{ref('a cup')}{BOX}{ref('a mug')}{BOX}" * 20)
    assert [box.label for box in reading.boxes] == ["a cup", "a mug"]


def test_points_and_malformed_boxes_of_a_loop_count_once():
    reading, _ = looped("(1,2)\n" * 30 + "(1")
    assert (len(reading.points), reading.unparsed) == (1, 0)
    reading, _ = looped("<|box_start|>(300,200),(100,400)<|box_end|>" * 30)
    assert (reading.boxes, reading.unparsed) == ((), 1)


def test_an_answer_that_ended_keeps_all_its_boxes():
    assert len(read(BOX * 40).boxes) == 40
    assert len(parse_boxes(BOX * 40, prompt="", sizes=SIZES)[0]) == 40


@pytest.mark.parametrize(
    ("tokens", "found"),
    [
        ([1, 2, 3] * 8, (0, 3, 8)),
        ([9, 9, 1, 2, 3, *[1, 2, 3] * 8, 1], (2, 3, 9)),
        ([7] * 24, (0, 1, 24)),
        ([5, 6, *range(20), *range(20), *range(20), 0, 1], (2, 20, 3)),
        ([7] * 23, None),  # too short to tell
        ([*range(20), *range(20), 0, 1], None),  # twice is no loop
        ([1, 2, 3] * 20 + [4], None),  # it went on
        (list(range(500)), None),
        ([], None),
    ],
)
def test_loops_are_found(tokens, found):
    loop = find_loop(tokens)
    assert (loop and (loop.start, loop.period, loop.times)) == found
    if loop:
        tail = tokens[loop.start :]
        assert all(tail[i] == tail[i - loop.period] for i in range(loop.period, len(tail)))


def test_loops_equal_a_search_by_hand():
    rng = random.Random(3)
    for _ in range(300):
        tokens = [rng.randrange(3) for _ in range(rng.randrange(12))]
        unit = [rng.randrange(3) for _ in range(rng.randint(1, 12))]
        tokens += (unit * 40)[: rng.randrange(90)]
        ends = [
            (start, period)
            for start in range(len(tokens))
            for period in range(1, (len(tokens) - start) // 3 + 1)
            if len(tokens) - start >= 24 and tokens[start + period :] == tokens[start : len(tokens) - period]
        ]
        loop = find_loop(tokens)
        assert (loop and (loop.start, loop.period)) == (min(ends) if ends else None)
