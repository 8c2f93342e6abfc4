"""Pictures in a dataset's zip files, here or on the hub: the calibration folder is that of unpacked ones."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from small_hub import TOKEN, SmallHub
from zips import volumes, written

from migician.calib import cli
from migician.calib.pictures import Pictures
from migician.calib.records import Source, Tally
from migician.calib.store import open_calibration
from migician.runtime.errors import MigicianError
from migician.runtime.files import download

AUTHOR = "home/author/opensource_datasets/"
NAME = "Org/MGrounding-630k"
JSON = "MGrounding-630k.json"
TASKS = {"common_object": "Common_Object", "object_tracking": "Object_Tracking", "free_form": "Free-Form"}


def picture(seed: int, size: tuple[int, int] = (60, 40)) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, "JPEG")
    return stream.getvalue()


def made() -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    """(records, {path: picture}) in MGrounding-630k's layout: three tasks, four records of two pictures each."""
    records, pictures = [], {}
    for t, (task, folder) in enumerate(TASKS.items()):
        for i in range(4):
            names = [f"MGrounding-630k/{folder}/sub/{i}_{k}.jpg" for k in range(2)]
            pictures.update({name: picture(100 * t + 10 * i + k, (60 + 8 * i, 40)) for k, name in enumerate(names)})
            turns = [{"from": "human", "value": f"<image>\n<image>\nWhich is number {i}?"}]
            turns.append({"from": "gpt", "value": "<|box_start|>(1,20),(300,1000)<|box_end|>"})
            made = {"id": f"{task}_{i}", "images": [f"./{n}" for n in names], "conversations": turns, "type": task}
            records.append(made)
    return records, pictures


RECORDS, PICTURES = made()


def packed(folder: Path) -> Path:
    """The dataset as it is published: zips with the author's folders in them, one of them in volumes."""
    folder.mkdir(parents=True)
    (folder / JSON).write_text(json.dumps(RECORDS))
    for task in TASKS.values():
        inside = {AUTHOR + name: content for name, content in PICTURES.items() if f"/{task}/" in name}
        if task == "Object_Tracking":
            volumes(folder / f"{task}.zip", inside, 9000)
        else:
            written(folder / f"{task}.zip", inside)
    return folder


def unpacked(folder: Path) -> Path:
    """The same with its pictures as files."""
    for name, content in PICTURES.items():
        (folder.parent / name).parent.mkdir(parents=True, exist_ok=True)
        (folder.parent / name).write_bytes(content)
    (folder / JSON).write_text(json.dumps(RECORDS))
    return folder


def calib(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    """(status, stderr) of migician-calib."""
    with pytest.raises(SystemExit) as leaving:
        cli.main([str(word) for word in words])
    return int(leaving.value.code or 0), capsys.readouterr().err


def content(folder: Path) -> tuple[str, dict[str, bytes]]:
    """(source, all else) of a calibration folder."""
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    manifest = json.loads(found.pop("manifest.json"))
    open_calibration(folder, verify=True)
    return manifest.pop("source"), {**found, "manifest": json.dumps(manifest).encode()}


@pytest.fixture
def expected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, bytes]:
    """What a calibration folder of the unpacked pictures holds."""
    source = unpacked(tmp_path / "unpacked" / "MGrounding-630k")
    assert calib(capsys, source, "-o", tmp_path / "expected", "--samples", 6)[0] == 0
    found = content(tmp_path / "expected")[1]
    assert len(found) == 2 + 12
    return found


@pytest.fixture
def files(tmp_path: Path) -> dict[str, bytes]:
    """The published files, and some that nobody asks for."""
    folder = packed(tmp_path / "published")
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {"Object_Tracking.z01", "Object_Tracking.z02", "Object_Tracking.zip"} <= found.keys()
    return {**found, "README.md": b"# words", "dataset_infos.json": b"{}", "train/0.parquet": b"p" * 2000}


def fetched(hub: SmallHub) -> list[str]:
    """The files whose content was asked for, in order."""
    return [r.path.rpartition("/")[2] for r in hub.requests if r.method == "GET" and "/api/" not in r.path]


def test_zips_beside_the_records_are_read_in_place(
    tmp_path: Path, expected: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    source = packed(tmp_path / "packed" / "MGrounding-630k")
    before = sorted(tmp_path.joinpath("packed").rglob("*"))
    for word, name in ((source, "folder"), (source / JSON, "file")):
        code, err = calib(capsys, word, "-o", tmp_path / name, "--samples", 6)
        assert code == 0, err
        assert content(tmp_path / name)[1] == expected
    assert sorted(tmp_path.joinpath("packed").rglob("*")) == before


def test_zips_in_the_pictures_root(
    tmp_path: Path, expected: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    source = packed(tmp_path / "packed" / "MGrounding-630k")
    (tmp_path / "elsewhere").mkdir()
    (source / JSON).rename(tmp_path / "elsewhere" / JSON)
    words = (tmp_path / "elsewhere" / JSON, "-o", tmp_path / "calib", "--samples", 6, "--images", source)
    assert calib(capsys, *words)[0] == 0
    assert content(tmp_path / "calib")[1] == expected


def test_a_dataset_of_the_hub(
    hub: SmallHub,
    tmp_path: Path,
    files: dict[str, bytes],
    expected: dict[str, bytes],
    capsys: pytest.CaptureFixture[str],
) -> None:
    commit = hub.add(NAME, files, kind="datasets")
    code, err = calib(capsys, NAME, "-o", tmp_path / "calib", "--samples", 6)
    assert code == 0, err
    source, found = content(tmp_path / "calib")
    assert (source, found) == (f"{NAME}@{commit[:12]}", expected)
    # one task's archives after the other's, in the records' order, each once, the one that names its volumes last
    volume_names = sorted(file for file in files if file.startswith("Object_Tracking."))
    assert fetched(hub) == [JSON, "Common_Object.zip", *volume_names, "Free-Form.zip"]
    assert f"{len(volume_names) + 2} archives, " in err
    hub.requests.clear()
    code, err = calib(capsys, f"{NAME}@{commit[:8]}", "-o", tmp_path / "again", "--samples", 6)
    assert code == 0 and content(tmp_path / "again") == (source, expected) and not hub.requests


def test_only_the_archives_of_the_tasks_asked_for(
    hub: SmallHub, tmp_path: Path, files: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    hub.add(NAME, files, kind="datasets")
    words = (NAME, "-o", tmp_path / "calib", "--samples", 3, "--tasks", "Free-Form")
    code, err = calib(capsys, *words)
    assert code == 0, err
    assert fetched(hub) == [JSON, "Free-Form.zip"]
    assert open_calibration(tmp_path / "calib").counts["tasks"] == {"free_form": 3}


def test_offline_with_what_is_here(
    hub: SmallHub,
    tmp_path: Path,
    files: dict[str, bytes],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, err = calib(capsys, NAME, "-o", tmp_path / "none")
    assert code == 1 and "offline" in err and f"hf download --repo-type dataset {NAME}" in err
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    hub.add(NAME, files, kind="datasets")
    assert calib(capsys, NAME, "-o", tmp_path / "a", "--samples", 3, "--tasks", "free_form")[0] == 0
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert calib(capsys, NAME, "-o", tmp_path / "b", "--samples", 3, "--tasks", "free_form")[0] == 0
    code, err = calib(capsys, NAME, "-o", tmp_path / "c", "--samples", 3)
    assert code == 1 and "archive is not in the cache" in err and "offline" in err
    assert f"hf download --repo-type dataset {NAME} --revision" in err and not (tmp_path / "c").exists()


def test_a_cut_archive_goes_on(
    hub: SmallHub,
    tmp_path: Path,
    files: dict[str, bytes],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(download, "_PAUSES_S", (0.01,))
    hub.add(NAME, files, kind="datasets")
    hub.cut["Common_Object.zip"] = [5000, 0, 0, 0]
    code, err = calib(capsys, NAME, "-o", tmp_path / "calib", "--samples", 2, "--tasks", "common_object")
    assert code == 1 and "goes on" in err.splitlines()[-1]
    hub.cut.clear()
    assert calib(capsys, NAME, "-o", tmp_path / "calib", "--samples", 2, "--tasks", "common_object")[0] == 0
    assert hub.fetched("Common_Object.zip")[-1].range == "bytes=5000-"


def test_volumes_that_another_tool_fetched_in_part(
    hub: SmallHub, tmp_path: Path, files: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    import huggingface_hub

    hub.add(NAME, files, kind="datasets")
    for file in (JSON, "Object_Tracking.zip"):
        huggingface_hub.hf_hub_download(NAME, file, repo_type="dataset")
    hub.requests.clear()
    code, err = calib(capsys, NAME, "-o", tmp_path / "calib", "--samples", 2, "--tasks", "object_tracking")
    assert code == 0, err
    assert set(fetched(hub)) == {file for file in files if file.startswith("Object_Tracking.z0")}


def test_a_picture_that_no_archive_has_is_a_bad_record(hub: SmallHub, tmp_path: Path, files: dict[str, bytes]) -> None:
    broken = json.loads(files[JSON])
    broken[1]["images"][0] = "./MGrounding-630k/Common_Object/sub/none.jpg"
    broken[2]["images"][0] = "../../../etc/passwd"
    hub.add(NAME, {**files, JSON: json.dumps(broken).encode()}, kind="datasets")
    tally = Tally()
    found = list(Source(NAME).records(tally, tasks=["common_object"]))
    assert [record.id for _, record, _ in found] == ["common_object_0", "common_object_3"]
    assert tally.skipped == {"missing_picture": 1, "outside_root": 1}
    assert fetched(hub) == [JSON, "Common_Object.zip"]


@pytest.mark.parametrize(
    ("need", "said"),
    [
        ("gated", "/datasets/Org/MGrounding-630k, then set HF_TOKEN"),
        ("private", "no such dataset"),
        ("none", "dataset"),
    ],
)
def test_datasets_that_are_not_to_be_had(
    hub: SmallHub, tmp_path: Path, files: dict[str, bytes], capsys: pytest.CaptureFixture[str], need: str, said: str
) -> None:
    hub.add(NAME if need != "none" else "Org/Other", files, kind="datasets", need=need)
    code, err = calib(capsys, NAME, "-o", tmp_path / "calib")
    assert code == 1 and said in err and err.count("\n") == 1


def test_a_gated_dataset_with_a_token(hub: SmallHub, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(NAME, files, kind="datasets", need="gated")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert len(list(Source(NAME).records(Tally()))) == len(RECORDS)
    assert {r.token for r in hub.requests if r.side == "storage"} == {""}


def test_datasets_of_another_layout(hub: SmallHub, files: dict[str, bytes]) -> None:
    hub.add(NAME, {"README.md": b"x", "dataset_infos.json": b"{}", "train/0.parquet": b"x"}, kind="datasets")
    with pytest.raises(MigicianError, match=r"no \.json or \.jsonl .*; "):
        Source(NAME)
    hub.add("Org/Loose", {JSON: files[JSON]}, kind="datasets")  # pictures in no archive
    tally = Tally()
    assert not list(Source("Org/Loose").records(tally)) and tally.skipped == {"missing_picture": len(RECORDS)}
    assert len([r for r in hub.requests if "Loose" in r.path and "/api/" in r.path]) <= 2


def test_archives_with_names_of_no_task_are_all_looked_into(hub: SmallHub, tmp_path: Path) -> None:
    first, second = ({f"pics/{i}.jpg": picture(i)} for i in (1, 2))
    packs = {"a.zip": written(tmp_path / "a.zip", first), "b.zip": written(tmp_path / "b.zip", second)}
    records = [{**RECORDS[0], "id": str(i), "images": [f"pics/{i}.jpg"] * 2} for i in (1, 2)]
    files = {"all.json": json.dumps(records).encode(), **{name: path.read_bytes() for name, path in packs.items()}}
    hub.add(NAME, files, kind="datasets")
    found = list(Source(NAME).records(Tally()))
    assert [record.id for _, record, _ in found] == ["1", "2"]
    assert fetched(hub) == ["all.json", "a.zip", "b.zip"]


def test_ways_in_which_paths_and_members_may_differ(tmp_path: Path) -> None:
    layouts = {
        "Whole.zip": "Whole/x.jpg",
        "Deep.zip": "home/me/set/Deep/x.jpg",
        "Bare.zip": "x.jpg",
        "Named.zip": "set/Named/x.jpg",
    }
    for archive, member in layouts.items():
        written(tmp_path / archive, {member: b"1", f"{member}.other": b"2"})
    pictures = Pictures([tmp_path])
    for archive, member in layouts.items():
        stem = archive[:-4]
        for name in (f"./set/{stem}/x.jpg", f"{stem}/x.jpg", f"set//{stem}/./x.jpg", f"set\\{stem}\\x.jpg"):
            assert pictures.find(name) == f"{tmp_path / archive}/{member}", name
        assert pictures.find(f"set/{stem}/y.jpg") is None
    assert pictures.find("set/Other/x.jpg") is None  # Bare.zip has one, but no part of the path says so
    for name in ("", ".", "/", "set/Whole/../Whole/x.jpg", "x.jpg\0"):
        assert pictures.find(name) is None


def test_a_damaged_archive_is_named(tmp_path: Path) -> None:
    (tmp_path / "Common_Object.zip").write_bytes(b"PK, but not a zip file")
    with pytest.raises(MigicianError, match=r"Common_Object\.zip.* no sound zip file .*; "):
        Pictures([tmp_path]).find("set/Common_Object/x.jpg")
