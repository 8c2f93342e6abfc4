"""Calibration samples: how they are shared out, and the folder that pins them."""

import hashlib
import json
import random
from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from migician.calib import store
from migician.calib.records import Source
from migician.calib.sample import draw, share_out, shares
from migician.calib.scenes import TASKS, held_out, iter_batches, write_dataset
from migician.calib.store import (
    Sample,
    nano_calibration,
    nano_samples,
    open_calibration,
    resolution_of,
    write_calibration,
)
from migician.runtime.errors import MigicianError

SIZES = {"small": (300, 200), "medium": (600, 900), "large": (1400, 200)}


def content(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def make(number, task, pictures, resolution):
    names = [f"p/{resolution}.jpg", *["p/small.jpg"] * (pictures - 1)]
    question = "<image>\n" * pictures + f"Where is {number}?"
    talk = [{"from": "human", "value": question}, {"from": "gpt", "value": "There"}]
    return {"id": number, "images": names, "conversations": talk, "type": task}


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "set"
    (place / "p").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, (width, height) in SIZES.items():
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(place / f"p/{name}.jpg")
    return place


@pytest.fixture
def crossed(folder):
    """12 records of every task x number of pictures x resolution: 3 x 2 x 3 strata."""
    strata = [*product(("region", "diff", "common_object"), (2, 3), SIZES)] * 12
    records = [make(i, *stratum) for i, stratum in enumerate(strata)]
    (folder / "all.json").write_text(json.dumps(records))
    return folder / "all.json", records


def stratum_of(sample):
    sizes = [Image.open(image).size for image in sample.images]
    return sample.task, len(sizes), resolution_of(sizes)


def written(samples, out, **options):
    write_calibration(out, samples, **{"source": "test", "licence": "none", "seed": 0, **options})
    return out


# ---- shares
@pytest.mark.parametrize("total", [0, 1, 7, 29, 30, 31, 59, 60, 1000])
def test_shares_are_equal_where_there_is_enough(total):
    capacity = {"a": 10, "b": 100, "c": 1, "d": 0, "e": 10, "f": 20}
    given = shares(capacity, total, 3)
    assert sum(given.values()) == min(total, sum(capacity.values()))
    assert all(given[key] <= capacity[key] for key in given)
    for a, b in product(given, given):
        assert given[a] <= given[b] + 1 or given[b] == capacity[b]


def test_shares_do_not_depend_on_the_order_of_keys():
    capacity = {f"task{i}": 3 + i % 4 for i in range(17)}
    turned = dict(reversed(capacity.items()))
    assert all(shares(capacity, n, 1) == shares(turned, n, 1) for n in range(80))
    assert any(shares(capacity, n, 1) != shares(capacity, n, 2) for n in range(80))


def test_tasks_come_first_then_pictures_then_resolutions():
    capacity = {("a", 2, "small"): 50, ("b", 2, "small"): 50, ("b", 3, "small"): 50, ("b", 3, "large"): 2}
    given = share_out(capacity, 40, 0)
    assert given == {("a", 2, "small"): 20, ("b", 2, "small"): 10, ("b", 3, "small"): 8, ("b", 3, "large"): 2}


# ---- the draw
@pytest.mark.parametrize("samples", [18, 36, 50, 100, 216])
def test_strata_differ_by_at_most_one(crossed, samples):
    drawn = draw(Source(crossed[0]), samples, 0).samples
    assert len(drawn) == len({s.id for s in drawn}) == samples
    counts = Counter(map(stratum_of, drawn))
    assert len(counts) == 18
    for level in (1, 2, 3):
        parts = Counter(s[:level] for s in counts.elements())
        if level == 1 or samples % 18 == 0:
            assert max(parts.values()) - min(parts.values()) <= 1
    assert max(counts.values()) - min(counts.values()) <= 2


def test_a_rare_stratum_is_there_and_its_rest_goes_to_others(folder):
    records = [make(i, "common", 2, "small") for i in range(200)]
    records += [make(1000 + i, "rare", 2, "large") for i in range(3)]
    (folder / "all.json").write_text(json.dumps(records))
    counts = Counter(s.task for s in draw(Source(folder / "all.json"), 20, 0).samples)
    assert counts == {"common": 17, "rare": 3}


def test_a_draw_depends_on_seed_and_records_only(crossed, folder):
    path, records = crossed
    first = [(s.id, s.turns) for s in draw(Source(path), 40, 5).samples]
    assert first == [(s.id, s.turns) for s in draw(Source(path), 40, 5).samples]
    assert first != [(s.id, s.turns) for s in draw(Source(path), 40, 6).samples]
    random.Random(0).shuffle(records)
    path.unlink()
    (folder / "one.json").write_text(json.dumps(records[:70], indent=2))
    (folder / "two.jsonl").write_text("\n".join(map(json.dumps, records[70:])))
    assert first == [(s.id, s.turns) for s in draw(Source(folder), 40, 5).samples]


def test_a_draw_of_some_tasks(crossed):
    drawn = draw(Source(crossed[0]), 20, 0, tasks=("diff", "nowhere"))
    assert {s.task for s in drawn.samples} == {"diff"} and len(drawn.samples) == 20
    assert drawn.tally.tasks == {"diff": 72, "region": 72, "common_object": 72} and not drawn.tally.skipped


def test_a_chosen_record_with_a_cut_picture_is_replaced(folder):
    whole = (folder / "p/small.jpg").read_bytes()
    (folder / "p/large.jpg").write_bytes(whole[: len(whole) // 2])
    strata = [("diff", 2, ("small", "large")[i % 2]) for i in range(60)]  # their headers say "small" both
    (folder / "all.json").write_text(json.dumps([make(i, *s) for i, s in enumerate(strata)]))
    told = []
    drawn = draw(Source(folder / "all.json"), 25, 0, checking=told.append)
    assert len(drawn.samples) == 25 and all(int(s.id) % 2 == 0 for s in drawn.samples)
    assert set(drawn.tally.skipped) == {"unreadable_picture"} and 5 < drawn.tally.skipped["unreadable_picture"] <= 30
    assert told == list(range(1, 26))


# ---- the folder
def test_the_same_source_and_seed_give_the_same_bytes(crossed, tmp_path):
    for name in "ab":
        drawn = draw(Source(crossed[0]), 30, 1)
        written(drawn.samples, tmp_path / name / "calib", seed=1)
    a, b = content(tmp_path / "a"), content(tmp_path / "b")
    assert a == b and set(a) >= {"calib/manifest.json", "calib/records.jsonl"}
    assert str(tmp_path).encode() not in a["calib/manifest.json"] + a["calib/records.jsonl"]


def test_what_is_written_is_read(crossed, tmp_path):
    samples = draw(Source(crossed[0]), 30, 1).samples
    digest = write_calibration(
        tmp_path / "c", samples, source="all.json", licence="as the page says", seed=1, skipped={"bad_box": 2}
    )
    manifest = json.loads((tmp_path / "c/manifest.json").read_text(encoding="utf-8"))
    assert list(manifest) == ["format", "source", "licence", "seed", "samples", "counts", "records"]
    assert manifest["counts"]["tasks"] == {"common_object": 10, "diff": 10, "region": 10}
    assert manifest["counts"]["pictures"] == {"2": 15, "3": 15}
    assert list(manifest["counts"]["resolutions"]) == ["small", "medium", "large"]
    assert manifest["counts"]["skipped"] == {"bad_box": 2}
    calibration = open_calibration(tmp_path / "c", verify=True)
    assert calibration.sha256 == digest == hashlib.sha256((tmp_path / "c/manifest.json").read_bytes()).hexdigest()
    assert (calibration.source, calibration.licence, calibration.seed) == ("all.json", "as the page says", 1)
    assert calibration.counts == manifest["counts"]
    for ours, theirs, entry in zip(samples, calibration.samples, manifest["records"], strict=True):
        assert (ours.task, ours.turns, ours.id) == (theirs.task, theirs.turns, theirs.id)
        assert [Path(p).read_bytes() for p in ours.images] == [p.read_bytes() for p in theirs.images]
        sizes = [(i["width"], i["height"]) for i in entry["images"]]
        assert sizes == [Image.open(p).size for p in theirs.images] and entry["file"] == "all.json"
    assert {p.relative_to(tmp_path / "c").as_posix() for s in calibration.samples for p in s.images} == {
        f"pictures/{p.name}" for p in (tmp_path / "c/pictures").iterdir()
    }
    assert len(list((tmp_path / "c/pictures").iterdir())) == 3  # a picture of many records is there once


def test_turned_pictures_are_measured_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (90, 60)).save(tmp_path / "t.jpg", exif=exif)
    out = written([Sample("x", [tmp_path / "t.jpg"], [("q", "a")], "1")], tmp_path / "c")
    (image,) = json.loads((out / "manifest.json").read_text())["records"][0]["images"]
    assert (image["width"], image["height"]) == (60, 90)


def test_resolution_classes():
    assert [resolution_of([(100, n)]) for n in (512, 513, 1024, 1025)] == ["small", "medium", "medium", "large"]
    assert resolution_of([(100, 100), (2000, 10)]) == "large"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt),
        (OSError(28, "No space left on device"), MigicianError),
        (MemoryError(), MemoryError),
    ],
)
def test_an_interrupted_write_leaves_nothing(tmp_path, error, told):
    def stop(done):
        if done == 3:
            raise error

    drawn = nano_samples(5, 0)
    with pytest.raises(told):
        written(drawn, tmp_path / "deep/er/calib", progress=stop)
    assert not list(tmp_path.iterdir())
    (tmp_path / "calib").mkdir()
    with pytest.raises(told):
        written(drawn, tmp_path / "calib", progress=stop)
    assert [p.name for p in tmp_path.rglob("*")] == ["calib"]


def test_a_picture_that_vanishes_leaves_nothing(tmp_path):
    with pytest.raises(FileNotFoundError):
        written([Sample("x", [tmp_path / "no.png"], [("q", "a")], "1")], tmp_path / "calib")
    assert not list(tmp_path.iterdir())


def test_a_folder_replaces_nothing(tmp_path):
    drawn = nano_samples(2, 0)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("mine", "file", "link"):
        with pytest.raises(MigicianError, match="already there and not empty; choose another"):
            written(drawn, tmp_path / name)
    assert {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")} == {"mine", "mine/file", "file", "link"}
    (tmp_path / "empty").mkdir()
    assert len(open_calibration(written(drawn, tmp_path / "empty")).samples) == 2


def test_no_samples_are_no_folder(tmp_path):
    with pytest.raises(MigicianError, match="no samples"):
        written([], tmp_path / "calib")
    assert not list(tmp_path.iterdir())


def test_the_folder_can_be_read_by_whom_the_umask_lets(tmp_path):
    mode = written(nano_samples(1, 0), tmp_path / "c").stat().st_mode
    (tmp_path / "made").mkdir()
    assert mode == (tmp_path / "made").stat().st_mode


# ---- damage
def damage(path, change):
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize("name", ["manifest.json", "records.jsonl"])
@pytest.mark.parametrize("change", [lambda b: b[:-20], lambda b: b"", lambda b: b"[]\n", lambda b: b"\xff" + b[1:]])
def test_a_damaged_text_is_found_without_verify(tmp_path, name, change):
    out = written(nano_samples(3, 0), tmp_path / "c")
    damage(out / name, change)
    with pytest.raises(MigicianError, match=rf"{name}: damaged.*write the folder again"):
        open_calibration(out)


@pytest.mark.parametrize("which", ["picture", "record"])
def test_verify_names_the_damaged_file(tmp_path, which):
    out = written(nano_samples(3, 0), tmp_path / "c")
    path = sorted((out / "pictures").iterdir())[2] if which == "picture" else out / "records.jsonl"
    damage(path, lambda b: b.replace(b"<|box_end|>", b"<|box_and|>", 1) if which == "record" else b[:-1] + b"x")
    assert len(open_calibration(out).samples) == 3
    with pytest.raises(MigicianError, match=rf"{path.name}: damaged"):
        open_calibration(out, verify=True)


def test_a_missing_picture_is_named(tmp_path):
    out = written(nano_samples(3, 0), tmp_path / "c")
    path = sorted((out / "pictures").iterdir())[2]
    path.unlink()
    with pytest.raises(MigicianError, match=rf"{path.name}: missing"):
        open_calibration(out)


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(MigicianError, match=r"manifest\.json: No such file.*is no calibration folder"):
        open_calibration(tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'"format": 1', b'"format": 2', "format 2, this version reads 1"),
        (b'"samples": 2', b'"samples": 3', "manifest.json: damaged"),
        (b'"records": [', b'"recorts": [', "manifest.json: damaged"),
        (b'"pictures/', b'"../../../', "damaged"),
        (b'"task":', b'"tusk":', "damaged"),
    ],
)
def test_a_manifest_is_not_trusted(tmp_path, old, new, message):
    out = written(nano_samples(2, 0), tmp_path / "c")
    damage(out / "manifest.json", lambda b: b.replace(old, new))
    if old == b'"pictures/':
        damage(out / "records.jsonl", lambda b: b.replace(old, new))
    with pytest.raises(MigicianError, match=message):
        open_calibration(out)


# ---- drawn scenes
def pixels(samples):
    return {hashlib.sha256(image.tobytes()).hexdigest() for s in samples for image in s.images}


def test_nano_samples_are_even_and_a_function_of_the_seed():
    a, b, other = nano_samples(30, 7), nano_samples(45, 7), nano_samples(30, 8)
    assert Counter(s.task for s in a) == dict.fromkeys(TASKS, 3)
    assert len({s.id for s in a}) == 30
    for x, y in zip(a, b, strict=False):
        assert (x.task, x.turns, x.id) == (y.task, y.turns, y.id)
        assert all(np.array_equal(p, q) for p, q in zip(x.images, y.images, strict=True))
        assert 1 <= len(x.images) <= 3 and all(p.dtype == np.uint8 and p.shape == (196, 196, 3) for p in x.images)
        ((question, answer),) = x.turns
        assert question.strip() and answer.endswith("<|box_end|>") and "<image>" not in question
    assert not pixels(a) & pixels(other)


def test_nano_samples_meet_no_other_scene(tmp_path):
    drawn = pixels(nano_samples(40, 3))
    for task in TASKS:
        items = held_out(task, 6)
        assert not drawn & {hashlib.sha256(p.tobytes()).hexdigest() for i in items for p in i.scene["images"]}
    batches = iter_batches(3, 8, dict.fromkeys(TASKS, 1), max_images=3, workers=0)
    for _, batch in zip(range(3), batches, strict=False):
        assert not drawn & {hashlib.sha256(p.tobytes()).hexdigest() for s in batch for p in s["images"]}
    path = write_dataset(tmp_path / "set", 4, 3, max_images=3, difficulty=1.5)
    seen = {hashlib.sha256(np.asarray(Image.open(p)).tobytes()).hexdigest() for p in path.parent.glob("images/*")}
    assert not drawn & seen


@pytest.mark.parametrize("seed", [-1, 1_000_000])
def test_nano_seeds_stay_below_the_held_out_one(seed):
    with pytest.raises(ValueError, match="held out"):
        nano_samples(1, seed)


def test_nano_in_memory_is_nano_in_a_folder(tmp_path):
    drawn = nano_calibration(12, 4, tasks=TASKS[:4])
    out = written(drawn.samples, tmp_path / "c", source="nano", licence=store.NANO_LICENCE, seed=4)
    there = open_calibration(out, verify=True)
    assert (drawn.sha256, drawn.counts, drawn.source) == (there.sha256, there.counts, there.source)
    for ours, theirs in zip(drawn.samples, there.samples, strict=True):
        for image, path in zip(ours.images, theirs.images, strict=True):
            assert np.array_equal(image, np.asarray(Image.open(path)))
