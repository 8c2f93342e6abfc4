"""Calibration data: finding records in JSON of any size and any damage, and what makes a record unusable."""

import io
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from migician.calib.records import REASONS, BadRecord, Source, Tally, _Seen, task_name
from migician.calib.sample import draw
from migician.calib.scanner import MAX_VALUE_BYTES, Broken, scan
from migician.runtime.errors import MigicianError

BOX = "<|box_start|>(1,20),(300,1000)<|box_end|>"


def record(number, **changes):
    made = {
        "id": f"r{number}",
        "images": ["p/a.png", "p/b.jpg"],
        "conversations": [
            {"from": "human", "value": "<image>\n<image>\nWhere is the cup? "},
            {"from": "gpt", "value": f"In the first image. {BOX}"},
        ],
        "type": "Group-Grounding",
        **changes,
    }
    return {key: value for key, value in made.items() if value is not ...}


def turns(*texts):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


@pytest.fixture
def folder(tmp_path):
    """A folder with two sound pictures, one text file and one cut picture in p/, and a picture beside it."""
    place = tmp_path / "set"
    (place / "p").mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)
    Image.fromarray(noise).save(place / "p/a.png")
    Image.fromarray(noise[:50]).save(place / "p/b.jpg")
    Image.fromarray(noise).save(tmp_path / "outside.png")
    (place / "p/text.png").write_text("no picture at all")
    (place / "p/cut.jpg").write_bytes((place / "p/b.jpg").read_bytes()[:900])
    Image.fromarray(noise[:1].repeat(9, 1)).save(place / "p/thin.png")
    return place


def write(folder, records, name="all.json", **options):
    path = folder / name
    path.write_text(json.dumps(records, **options), encoding="utf-8")
    return path


def read(path, **options):
    tally = Tally()
    return [found for _, found, _ in Source(path, **options).records(tally)], tally


def values(text):
    data = text if isinstance(text, bytes) else text.encode()
    return [None if isinstance(item, Broken) else item.value for item in scan(io.BytesIO(data))]


# ---- the scanner
@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64, 1 << 16])
@pytest.mark.parametrize("indent", [None, 0, 2])
@pytest.mark.parametrize("ascii", [False, True])
def test_a_scan_equals_json_however_the_file_is_cut(monkeypatch, chunk, indent, ascii):
    monkeypatch.setattr("migician.calib.scanner._CHUNK_BYTES", chunk)
    nested = {"id": 'a"b\\', "x": "}{][", "y": [[], {}, {"z": "\\\""}]}
    content = [nested, [], 12, "te,xt", None, -1.5e3, {"ü": "日本 \\"}]
    assert values(json.dumps(content, indent=indent, ensure_ascii=ascii)) == content
    assert values("\n".join(json.dumps(value, ensure_ascii=ascii) for value in content[:2])) == content[:2]
    assert values("\n".join(json.dumps(value) for value in content[::-1])) == content[::-1]


@pytest.mark.parametrize("text", ["", " \n", "[]", " [ ] \n", "\ufeff[]"])
def test_nothing_to_scan(text):
    assert values(text) == []


def test_places_are_where_the_values_stand():
    text = json.dumps([record(i, note="ü") for i in range(5)], indent=3, ensure_ascii=False).encode()
    for data in (text, b"\xef\xbb\xbf" + text):
        items = list(scan(io.BytesIO(data)))
        assert [item.number for item in items] == [1, 2, 3, 4, 5]
        assert all(json.loads(data[item.start : item.start + item.size]) == item.value for item in items)


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text.replace('"x"', '"x', 1),  # a quote is lost
        lambda text: text[:-1],  # the closing brace
        lambda text: text[: len(text) // 2],  # the second half
        lambda text: text.replace("]", "", 1),
        lambda text: text.replace(":", "", 1),
        lambda text: text.replace('"x"', "nul", 1),
        lambda text: "garbage and more",
        lambda text: text.replace('"x"', '"\n"', 1),
    ],
)
def test_reading_goes_on_behind_a_broken_record(damage, indent):
    sound = [json.dumps(record(i), indent=indent) for i in range(4)]
    broken = damage(json.dumps({"id": "x", "images": ["a"], "note": {"k": [1]}}, indent=indent))
    for at in range(4):
        text = "[" + ",\n".join([*sound[:at], broken, *sound[at:]]) + "]"
        found = values(text)
        assert [v["id"] for v in found if v] == ["r0", "r1", "r2", "r3"], (at, text)
        assert found.count(None) == 1


def test_reading_goes_on_behind_a_broken_line():
    lines = ['{"first": 1, "id": 1}', '{"first": 2, "id', '{"first": 3}']
    assert values("\n".join(lines)) == [{"first": 1, "id": 1}, None, {"first": 3}]


def test_a_cut_file_is_told():
    text = json.dumps([record(0), record(1)])
    assert [v and v["id"] for v in values(text[:-1])] == ["r0", "r1", None]
    assert [v and v["id"] for v in values(text[:-30])] == ["r0", None]


@pytest.mark.parametrize("seed", range(40))
def test_a_changed_byte_costs_at_most_its_own_record(seed):
    rng = np.random.default_rng(seed)
    texts = [json.dumps(record(i), indent=(None, 0, 2)[seed % 3]).encode() for i in range(6)]
    at = int(rng.integers(6))
    place = int(rng.integers(1, len(texts[at]) - 1))  # not its first byte, by which it is found
    texts[at] = texts[at][:place] + bytes([rng.integers(256)] * int(rng.integers(2))) + texts[at][place + 1 :]
    ids = [v.get("id") for v in values(b"[" + b",\n".join(texts) + b"]") if isinstance(v, dict)]
    assert [i for i in ids if i in {f"r{n}" for n in range(6) if n != at}] == [f"r{n}" for n in range(6) if n != at]


def test_bytes_that_are_no_utf_8_and_nesting_without_end_are_broken():
    good = json.dumps(record(1))
    assert values(b'[{"id": "\xff"}, ' + good.encode() + b"]") == [None, record(1)]
    assert values('[{"id": ' + "[" * 100_000 + "]" * 100_000 + "}, " + good + "]") == [None, record(1)]


def test_an_endless_record_is_given_up():
    text = '[{"id": 1, "x": "' + "y" * (MAX_VALUE_BYTES + 200_000) + '"}, {"id": 2}]'
    assert values(text) == [None, {"id": 2}]


@pytest.mark.parametrize("layout", ["array", "one line", "lines"])
def test_memory_does_not_grow_with_the_file(folder, layout):
    def peak(n):
        path = folder / "big.json"
        between = {"array": ",\n", "one line": ",", "lines": "\n"}[layout]
        with open(path, "w") as file:
            file.write("" if layout == "lines" else "[")
            one = {"images": ["p/a.png"], "conversations": turns("<image>Where?", "There"), "note": "x" * 20_000}
            file.writelines((between if i else "") + json.dumps(record(i, **one)) for i in range(n))
            file.write("" if layout == "lines" else "]")
        tracemalloc.start()
        seen = 0
        for _ in Source(path).records(tally := Tally()):
            seen += 1
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert seen == tally.records == n
        return most, path.stat().st_size

    peak(50)  # imports and caches
    (small, _), (large, size) = peak(50), peak(400)
    assert size > 8_000_000
    assert large < small + 200_000  # a chunk and a record, seen in another moment


# ---- records
def test_a_sound_record(folder):
    (found,), tally = read(write(folder, [record(1, id=7)]))
    assert (found.id, found.task) == ("7", "group_grounding")
    assert found.images == (str(folder / "p/a.png"), str(folder / "p/b.jpg"))
    assert found.turns == (("Where is the cup? ", f"In the first image. {BOX}"),)
    assert tally.records == 1 and not tally.skipped and tally.tasks == {"group_grounding": 1}


def test_other_names_for_the_same(folder):
    talk = [{"role": "user", "content": "<image><image>Where?"}, {"role": "assistant", "content": "There."}]
    (found,), _ = read(write(folder, [record(1, conversations=talk, type=..., id=...)], name="Static_Diff.json"))
    assert (found.id, found.task, found.turns) == ("", "static_diff", (("Where?", "There."),))


@pytest.mark.parametrize(
    ("question", "kept"),
    [
        ("<image>\n<image>\nWhere? ", "Where? "),
        ("<image> <image>  Where?\n", "Where?\n"),
        ("\n<image>\n\n<image>Where?", "Where?"),
        ("  Where?\n<image>\n<image>\n", "  Where?"),
        ("<image>\nWhere?<image>", "Where?"),
        ("Image-1: <image>\nImage-2: <image>\nWhere?", "Image-1: Image-2: Where?"),
    ],
)
def test_placeholders_are_taken_out(folder, question, kept):
    (found,), _ = read(write(folder, [record(1, conversations=turns(question, "There."))]))
    assert found.turns == ((kept, "There."),)


def test_several_turns(folder):
    talk = turns("<image>\n<image>\nWhere?", f"There. {BOX}", "What is it?", "A cup")
    (found,), _ = read(write(folder, [record(1, conversations=talk)]))
    assert found.turns == (("Where?", f"There. {BOX}"), ("What is it?", "A cup"))


@pytest.mark.parametrize("name", ["p/a.png", "./p/a.png", "./set/p/a.png", "{folder}/p/a.png", "p/../p/a.png"])
def test_pictures_are_found(folder, name):
    named = name.format(folder=folder)
    (found,), _ = read(write(folder, [record(1, images=[named] * 2)]))
    assert found.images == (str(folder / "p/a.png"),) * 2


def test_pictures_are_found_below_the_root(folder, tmp_path):
    path = write(tmp_path, [record(1, images=["./set/p/a.png", "p/b.jpg"])], name="elsewhere.json")
    moved = path.rename(folder / "p/elsewhere.json")
    assert not read(moved)[0]
    assert len(read(moved, images=folder)[0]) == 1


BAD = {
    "broken_json": ['{"id": "x", "images": ["p/a.png"'],
    "not_an_object": [17, "text", None, [record(0)]],
    "no_images": [{"images": v} for v in (..., [], "p/a.png", [1], None, {"a": 1})],
    "no_conversation": [{"conversations": v} for v in (..., [], "text", ["text"], {"from": "human"})],
    "bad_turn": [
        {"conversations": [{"from": "system", "value": "x"}, *turns("<image><image>Where?", "There")]},
        {"conversations": [{"value": "<image><image>Where?"}, {"from": "gpt", "value": "There"}]},
        {"conversations": turns("<image><image>Where?", None)},
        {"conversations": turns("<image><image>Where?", ["There"])},
        {"conversations": turns("<image><image>Where?", "\ud800")},
    ],
    "turn_order": [
        {"conversations": turns("<image><image>Where?")},
        {"conversations": turns("<image><image>Where?", "There", "And?")},
        {"conversations": turns("<image><image>Where?", "There")[::-1]},
        {"conversations": [*turns("<image><image>Where?", "There"), {"from": "gpt", "value": "x"}]},
    ],
    "empty_text": [
        {"conversations": turns("<image>\n<image>\n", "There")},
        {"conversations": turns("<image><image>Where?", " \n")},
    ],
    "placeholders": [
        {"conversations": turns("Where?", "There")},
        {"conversations": turns("<image>Where?", "There")},
        {"conversations": turns("<image><image><image>Where?", "There")},
        {"conversations": turns("<image>Where?", "<image>There")},
        {"conversations": turns("<image><image>Where?", "There <image>")},
    ],
    "bad_box": [
        {"conversations": turns("<image><image>Where?", f"Here: <|box_start|>{box}<|box_end|>")}
        for box in ("(1,2),(3", "(1,2),(3,4001)", "(30,2),(3,4)", "(3,40),(30,4)", "(.1,.2),(.3,.4)", "", "(1,2)")
    ]
    + [{"conversations": turns("<image><image>Where?", f"{BOX} and <|box_start|>")}],
    "outside_root": [{"images": ["p/a.png", v]} for v in ("../outside.png", "{tmp}/outside.png", "/etc/hostname")],
    "missing_picture": [{"images": ["p/a.png", v]} for v in ("p/no.png", "", "p", "p/\0", "p/\ud800", "x" * 5000)],
    "unreadable_picture": [{"images": ["p/a.png", f"p/{v}"]} for v in ("text.png", "thin.png", "cut.jpg")],
    "duplicate_id": [{"id": "r0"}],
}


def place_bad(bad, number, tmp):
    """The JSON text of a record that differs from a sound one by `bad`."""
    if isinstance(bad, dict):
        bad = record(number, **bad)
        if isinstance(bad.get("images"), list):
            bad["images"] = [i.format(tmp=tmp) if isinstance(i, str) else i for i in bad["images"]]
    return bad if isinstance(bad, str) and bad.startswith("{") else json.dumps(bad)


def write_bad(folder, cases):
    """A file with sound records before, between and behind the cases; returns its path and the number of those."""
    texts = [json.dumps(record(0))]
    for number, bad in enumerate(cases, 1):
        texts += [place_bad(bad, 1000 + number, folder.parent), json.dumps(record(number))]
    path = folder / "all.json"
    path.write_text("[\n" + ",\n".join(texts) + "\n]\n")
    return path, 1 + len(cases)


@pytest.mark.parametrize("reason", BAD)
def test_each_kind_of_bad_record_has_its_reason(folder, reason):
    path, sound = write_bad(folder, BAD[reason])
    drawn = draw(Source(path), 500, 0)
    assert drawn.tally.skipped == {reason: len(BAD[reason])}
    assert sorted(int(s.id[1:]) for s in drawn.samples) == list(range(sound))
    file, number, detail = drawn.tally.examples[reason]
    assert (file, bool(detail)) == ("all.json", True)
    if reason != "unreadable_picture":  # those that only decoding shows come in the order of the draw
        assert number == 2


def test_all_kinds_in_one_file(folder):
    path, sound = write_bad(folder, [bad for cases in BAD.values() for bad in cases])
    drawn = draw(Source(path), 500, 0)
    assert drawn.tally.skipped == {reason: len(cases) for reason, cases in BAD.items()}
    assert set(BAD) == set(REASONS) and len(REASONS) >= 10
    assert len(drawn.samples) == sound
    assert drawn.tally.records == sound + sum(map(len, BAD.values()))


def test_the_same_id_in_another_task_is_another_record(folder):
    found, tally = read(write(folder, [record(1), record(1, type="region"), record(1)]))
    assert len(found) == 2 and tally.skipped == {"duplicate_id": 1}


def test_without_ids_the_same_record_twice_is_told(folder):
    other = record(1, id=..., conversations=turns("<image><image>What?", "That"))
    found, tally = read(write(folder, [record(1, id=...), other, record(1, id=...)]))
    assert len(found) == 2 and tally.skipped == {"duplicate_id": 1}


def test_a_broken_record_does_not_take_the_id(folder):
    found, tally = read(write(folder, [record(1, images=["p/no.png"] * 2), record(1)]))
    assert len(found) == 1 and tally.skipped == {"missing_picture": 1}


def test_many_ids_are_told_apart():
    seen = _Seen()
    assert all(seen.add(b"%d" % i) for i in range(20_000))
    assert not any(seen.add(b"%d" % i) for i in range(20_000))
    assert seen.add(b"20000")


def test_a_file_that_changes_between_the_readings(folder):
    path = write(folder, [record(1)])
    source = Source(path)
    (place,) = (place for place, _, _ in source.records(Tally()))
    path.write_text("[" + " " * path.stat().st_size)
    with pytest.raises(BadRecord, match="changed while it was read"):
        source.load(place)


# ---- sources
def test_a_folder_of_files(folder):
    write(folder, [record(1, type=...)], name="Region.json")
    (folder / "Common-Object.jsonl").write_text("\n".join(json.dumps(record(i, type=...)) for i in (1, 2)))
    found, tally = read(folder)
    assert [(f.task, f.id) for f in found] == [("common_object", "r1"), ("common_object", "r2"), ("region", "r1")]
    assert tally.records == 3


def test_files_below_a_folder_without_any(folder):
    (folder / "deep/er").mkdir(parents=True)
    write(folder / "deep/er", [record(1, type=...)], name="Region.json")
    (found,), _ = read(folder)
    assert found.task == "region" and found.images[0] == str(folder / "p/a.png")


def test_sources_that_are_none(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(MigicianError, match="no such file or folder"):
        Source(tmp_path / "nowhere.json")
    with pytest.raises(MigicianError, match=r"no \.json or \.jsonl file"):
        Source(tmp_path / "empty")
    with pytest.raises(MigicianError, match=r"--images .*no such folder"):
        Source(write(folder, []), images=tmp_path / "nowhere")


def test_progress_ends_at_the_size_of_the_source(folder):
    write(folder, [record(i) for i in range(200)], name="a.json")
    write(folder, [record(i, type="x") for i in range(200)], name="b.json")
    source, told = Source(folder), []
    list(source.records(Tally(), progress=told.append))
    assert told == sorted(told) and told[-1] == source.bytes == sum(Path(f).stat().st_size for f in source.files)
    assert len(told) > 5


@pytest.mark.parametrize(
    ("name", "expected"),
    [("Object-Tracking", "object_tracking"), (" multi view ", "multi_view"), ("図_1", "図_1"), ("--", "unnamed")],
)
def test_task_names(name, expected):
    assert task_name(name) == expected
