"""Drawn scenes: the same for ever, boxes that fit, MIG-Bench's words, seeds that keep held-out questions out."""

import hashlib
import itertools
import json
import re

import numpy as np
import pytest
from PIL import Image

from migician.calib import scenes
from migician.calib.scenes import dataset, sprites
from migician.runtime.errors import ModelFileError

ALL = (*scenes.TASKS, *scenes.EASY_TASKS)
BOX = r"<\|box_start\|>\(\d+,\d+\),\(\d+,\d+\)<\|box_end\|>"
REF = r"<\|object_ref_start\|>[a-z ]+<\|object_ref_end\|>"

# MIG-Bench's questions as released, with 2 for any picture number, [B] for any box and [R] for any reference
MIG_BENCH = {
    "group_grounding": [
        "Please find the bounding box coordinates for the area described by: [R].",
        "Identify the bounding box of the region described by the following expression: [R].",
        "Please locate the bounding box of the region described in this sentence: [R].",
        "Please determine the bounding box coordinates for the area described here: [R].",
        "Please specify the bounding box coordinates for the region indicated by this sentence: [R].",
        "Please provide the bounding box coordinate of the region this sentence describes: [R].",
        "Provide the bounding box of the region this expression refers to: [R].",
        "Give the bounding box of the region that this sentence refers to: [R].",
        "Provide the bounding box coordinates for the region referred to by this sentence: [R].",
        "Give the bounding box coordinates of the area mentioned in this sentence: [R].",
        "Please identify the bounding box coordinates for the area described by this sentence: [R].",
    ],
    "common_object": [
        "These images share one object in common. Recognize and locate this object in the 2th image. ",
    ],
    "diff": ["Compare these two images carefully and give me the coordinates of their difference. "],
    "region": [
        "You are given a source image followed by its several regions. Please locate the 2th region picture in the "
        "source image. ",
    ],
    "refer_grounding": ["Find and locate where does the object in image-1 locate in the image-2."],
    "object_tracking": [
        "These are a sequence of images containing moving objects. For the object in the first image marked with red "
        "bounding box([B]), please locate it in the 2th image. ",
    ],
    "multi_view": [
        "These images share one object in common(the object marked with red bounding box in the first image([B]). "
        "Recognize and locate this object in the 2th image. ",
    ],
    "view_diff": [
        "Compare these two images carefully and give me the coordinates of their real difference in the second image."
        "  Find it and locate it in the second image. ",
    ],
    "correspondence": [
        "You are now presented with two objects. For the area marked by the red bounding box in the first image, "
        "identify and locate the corresponding area in the second image that serves a similar function or shares a "
        "similar meaning. ",
    ],
}
# sha256 (first 16 digits) of questions and answers, and of pictures, of three sets: shipped weights learned from these
GOLDEN = {
    "group_grounding": ("c7ffbf455eb9a51e", "9aaab8387d6e6524"),
    "common_object": ("e32d55cc5c96dded", "7854b76c5cc97f32"),
    "diff": ("d856e5f3d4193e7d", "6d956cfcbebc3c60"),
    "region": ("0e19366578ecb756", "ebd8a120d2d71f19"),
    "refer_grounding": ("c21fd41604a5ecca", "0f863029a0c22409"),
    "object_tracking": ("6cfc24b06dcd3b82", "a1e01d7d33a6f81a"),
    "multi_view": ("535d708d55ae7177", "cea0cbd714cc99ff"),
    "view_diff": ("c44472f0371c3cc8", "dd32329257765034"),
    "correspondence": ("9992637b5974598a", "c321f7b946503ce2"),
    "reasoning": ("20ce225b1b471685", "4885e06efad18a5e"),
    "single": ("50a566e42dd3f6c9", "23f1e8da770898b1"),
    "naming": ("c964f22c1977f163", "23f1e8da770898b1"),
}


def draw(task, seed, **options):
    return scenes.sample(np.random.default_rng([5, seed]), task, **{"max_images": 3, "difficulty": 1, **options})


def digest(parts):
    h = hashlib.sha256()
    for part in parts:
        h.update(part)
    return h.hexdigest()[:16]


def digests(task):
    sets = [draw(task, seed, difficulty=seed) for seed in range(3)]
    words = digest(f"{q.text}\n{q.answer}\n".encode() for s in sets for q in s["qas"])
    return words, digest(picture.tobytes() for s in sets for picture in s["images"])


def same(a, b):
    assert a["task"] == b["task"] and a["qas"] == b["qas"] and a["objects"] == b["objects"]
    assert len(a["images"]) == len(b["images"])
    assert all(np.array_equal(p, q) for p, q in zip(a["images"], b["images"], strict=True))


@pytest.fixture(scope="module", params=ALL)
def sets(request):
    return [draw(request.param, seed, difficulty=seed % 5 / 2, max_images=2 + seed % 4) for seed in range(6)]


# ---- pictures and boxes
@pytest.mark.parametrize("task", ALL)
def test_scenes_never_change(task):
    assert digests(task) == GOLDEN[task]


def test_the_same_generator_state_gives_the_same_set():
    same(draw("view_diff", 3), draw("view_diff", 3))
    assert draw("view_diff", 3)["qas"] != draw("view_diff", 4)["qas"]


@pytest.mark.parametrize("size", [(196, 196), (140, 224)])
@pytest.mark.parametrize("task", scenes.TASKS)
def test_pictures_have_the_size_asked_for(task, size):
    for picture in draw(task, 1, size=size)["images"]:
        assert picture.shape == (*size, 3) and picture.dtype == np.uint8


def test_boxes_are_inside_pictures(sets):
    for s in sets:
        assert len(s["images"]) == len(s["objects"])
        for picture, objects in zip(s["images"], s["objects"], strict=True):
            height, width = picture.shape[:2]
            for o in objects:
                x1, y1, x2, y2 = o["box"]
                assert 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height


@pytest.mark.parametrize("cls", range(len(scenes.CLASSES)), ids=scenes.CLASSES)
@pytest.mark.parametrize(("side", "flip"), [(36, False), (71, True), (140, False)])
def test_boxes_are_tight(cls, side, flip):
    background = np.full((196, 196, 3), 230, np.uint8)
    t = sprites.thing(cls, 0, 98.3, 95.6, side, flip=flip)
    changed = (sprites.render(background, [t]) != background).any(2)
    ys, xs = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
    # the faintest edge row of a shrunken shape may round away
    assert np.abs(np.subtract((xs[0], ys[0], xs[-1] + 1, ys[-1] + 1), t.box)).max() <= 1
    assert xs[0] >= t.box[0] and ys[0] >= t.box[1] and xs[-1] < t.box[2] and ys[-1] < t.box[3]
    assert max(t.box[2] - t.box[0], t.box[3] - t.box[1]) == side


def test_the_difference_is_all_that_differs():
    s = draw("diff", 2)
    (first, second), question = s["images"], next(q for q in s["qas"] if not q.meta["aux"])
    x1, y1, x2, y2 = (round(196 * v) for v in question.meta["box"])
    changed = (first != second).any(2)
    assert changed[y1:y2, x1:x2].any() and changed.sum() == changed[y1:y2, x1:x2].sum()


# ---- words
def test_answers_parse_to_the_box_asked_for(sets):
    for q in itertools.chain.from_iterable(s["qas"] for s in sets):
        if q.meta["task"] == "naming":
            assert re.fullmatch(rf"an? ({'|'.join(scenes.COLOURS)}) ({'|'.join(scenes.CLASSES)})", q.answer)
            continue
        assert scenes.iou(scenes.parse_box(q.answer), q.meta["box"]) > 0.9
        if q.meta["task"] == "group_grounding":
            assert q.answer.startswith(f"It is in the {scenes.ORDINALS[q.meta['image']]} image. <|box_start|>")
        else:
            assert re.fullmatch(BOX, q.answer)


def test_a_question_has_one_answer(sets):
    for s in sets:
        assert 1 <= len(s["qas"]) <= 8
        assert len({q.text for q in s["qas"]}) == len({(q.text, q.answer) for q in s["qas"]})


@pytest.mark.parametrize("task", MIG_BENCH)
def test_questions_are_mig_bench_s_word_for_word(task):
    seen = set()
    for seed in range(6):
        for q in draw(task, seed, max_images=2 if task == "object_tracking" else 3)["qas"]:
            if q.meta["task"] == task:
                text = re.sub(REF, "[R]", re.sub(BOX, "[B]", q.text))
                seen.add(re.sub(r"\dth", "2th", text))
    assert seen <= set(MIG_BENCH[task])


def test_every_mig_bench_wording_is_in_use():
    known = {re.sub(REF, "[R]", re.sub(BOX, "[B]", text)) for text in scenes.texts()}
    assert {wording for wordings in MIG_BENCH.values() for wording in wordings} <= known
    assert set(MIG_BENCH) | {"reasoning"} == set(scenes.TASKS)


def test_texts_hold_every_word_that_scenes_use(sets):
    pieces = re.compile(r"<\|[a-z_]+\|>|\d|[A-Za-z]+|\s|[^\w\s]")
    known = set(itertools.chain.from_iterable(pieces.findall(text) for text in scenes.texts())) | set("0123456789")
    for q in itertools.chain.from_iterable(s["qas"] for s in sets):
        assert set(pieces.findall(q.text + q.answer)) <= known


def test_boxes_as_text():
    assert scenes.format_box((0, 0.0126, 0.5, 1)) == "<|box_start|>(0,13),(500,999)<|box_end|>"
    assert scenes.parse_box("It is (1,20),(300, 999).") == (0.001, 0.02, 0.3, 0.999)
    assert scenes.parse_box("nowhere") is None
    assert scenes.iou((0, 0, 2, 1), (1, 0, 3, 1)) == pytest.approx(1 / 3)
    assert scenes.iou((0, 0, 1, 1), (2, 2, 3, 3)) == 0


@pytest.mark.parametrize(
    ("task", "options"),
    [("walk", {}), ("diff", {"max_images": 1}), ("diff", {"max_images": 7}), ("diff", {"size": (100, 196)}),
     ("diff", {"difficulty": 3})],
)  # fmt: skip
def test_arguments_out_of_range_are_refused(task, options):
    with pytest.raises(ValueError, match=r"; (choose|give)|: give"):
        draw(task, 0, **options)


# ---- held out
@pytest.mark.parametrize("task", ALL)
def test_held_out_questions(task):
    items = scenes.held_out(task, 5)
    assert len(items) == 5 and [item.question for item in scenes.held_out(task, 3)] == [i.question for i in items[:3]]
    for item in items:
        assert item.question in item.scene["qas"] and item.question.meta["task"] == task
        assert 1 <= len(item.scene["images"]) <= 3
        assert sum(other.scene is item.scene for other in items) <= 2


def test_held_out_scenes_come_from_the_reserved_seed():
    rng = np.random.default_rng([1_000_000, scenes.TASKS.index("region")])
    same(scenes.held_out("region", 1)[0].scene, scenes.sample(rng, "region", max_images=3, difficulty=1))


@pytest.mark.parametrize("seed", [-1, 1_000_000, 2**40])
def test_training_seeds_stay_below_the_held_out_one(seed, tmp_path):
    with pytest.raises(ValueError, match="held out"):
        scenes.iter_batches(seed, 1, {"diff": 1})
    with pytest.raises(ValueError, match="held out"):
        scenes.write_dataset(tmp_path / "set", 1, seed)
    assert not list(tmp_path.iterdir())


# ---- stream
def test_a_stream_equals_batches_drawn_here():
    options = {"size": [(196, 196), (140, 168)], "max_images": 3, "difficulty": (0, 2, 4), "start": 1}
    here = scenes.iter_batches(7, 2, {"diff": 1, "single": 2}, workers=0, **options)
    there = scenes.iter_batches(7, 2, {"single": 2, "diff": 1}, workers=2, **options)
    for ours, theirs in itertools.islice(zip(here, there, strict=False), 4):
        for a, b in zip(ours, theirs, strict=True):
            same(a, b)
    there.close()


def test_a_stopped_worker_is_told(capfd):
    stream = scenes.iter_batches(1, 1, {"walk": 1}, workers=1)
    with pytest.raises(RuntimeError, match="worker stopped"):
        next(stream)
    assert "unknown task 'walk'" in capfd.readouterr().err


@pytest.mark.parametrize("weights", [{}, {"diff": 0}, {"diff": 2, "single": -1}])
def test_weights_must_choose_a_task(weights):
    with pytest.raises(ValueError, match="choose no task"):
        scenes.iter_batches(1, 1, weights)


# ---- on disk
def test_dataset(tmp_path):
    path = scenes.write_dataset(tmp_path / "deep" / "set", 3, 11, tasks=["diff", "multi_view"], max_images=3)
    assert path == tmp_path / "deep" / "set" / "scenes.json"
    records = json.loads(path.read_text(encoding="utf-8"))
    assert [r["type"] for r in records] == ["diff"] * 3 + ["multi_view"] * 3
    assert len({r["id"] for r in records}) == 6
    for r in records:
        assert list(r) == ["id", "images", "conversations", "type"]
        human, answer = r["conversations"]
        assert human["from"] == "human" and answer["from"] == "gpt" and re.fullmatch(BOX, answer["value"])
        prefix = "<image>\n" * len(r["images"])
        assert human["value"].startswith(prefix) and "<image>" not in human["value"][len(prefix) :]
        for name in r["images"]:
            with Image.open(path.parent / name) as picture:
                assert picture.size == (196, 196) and picture.mode == "RGB"
    written = {name for r in records for name in r["images"]}
    assert written == {f"images/{p.name}" for p in (path.parent / "images").iterdir()}


def test_a_dataset_is_a_function_of_its_arguments(tmp_path):
    def content(folder):
        return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    (tmp_path / "b").mkdir()  # an empty folder is taken over
    a, b, c = (
        scenes.write_dataset(tmp_path / x, 2, seed, tasks=["region"]) for x, seed in zip("abc", (1, 1, 2), strict=True)
    )
    assert content(a.parent) == content(b.parent) != content(c.parent)


def test_a_dataset_is_complete_or_not_there(tmp_path, monkeypatch):
    def full(*_args, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dataset.json, "dump", full)
    with pytest.raises(ModelFileError, match="No space"):
        scenes.write_dataset(tmp_path / "set", 1, 1, tasks=["diff"])
    assert not list(tmp_path.iterdir())


def test_a_dataset_replaces_nothing(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ModelFileError, match="choose another folder"):
        scenes.write_dataset(tmp_path, 1, 1)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
