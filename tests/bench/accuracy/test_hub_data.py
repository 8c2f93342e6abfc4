"""MIG-Bench from the hub, its pictures in a zip file: the same questions, answers and pages as unpacked."""

import json
import re
from pathlib import Path

import pytest
from accuracy_data import RECORDS, write_answers, write_data
from small_hub import SmallHub
from zips import written

from migician.bench import cli
from migician.bench.accuracy.data import missing_pictures, read_mig_bench
from migician.bench.accuracy.models import _data_url
from migician.runtime.errors import MigicianError

NAME = "Org/MIG-Bench"


@pytest.fixture
def local(tmp_path: Path) -> Path:
    """The data file beside its unpacked pictures."""
    (tmp_path / "local").mkdir()
    return write_data(tmp_path / "local", pictures=True)


@pytest.fixture(params=["images", "MIG-Bench/images", "home/author/MIG-Bench/images"])
def files(request: pytest.FixtureRequest, tmp_path: Path, local: Path) -> dict[str, bytes]:
    """The dataset's files; its real archive's inner folder is not known."""
    folder = local.parent / "MIG-Bench" / "images"
    inside = {
        f"{request.param}/{path.relative_to(folder)}": path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }
    packed = written(tmp_path / "images.zip", inside)
    return {"MIG_data.json": local.read_bytes(), "images.zip": packed.read_bytes(), "README.md": b"x"}


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as leaving:
        cli.main([str(word) for word in words])
    out, err = capsys.readouterr()
    return int(leaving.value.code or 0), out, err


def test_the_questions_of_a_dataset(hub: SmallHub, files: dict[str, bytes], local: Path) -> None:
    hub.add(NAME, files, kind="datasets")
    theirs, ours = read_mig_bench(Path(NAME)), read_mig_bench(local)
    assert len(theirs) == len(RECORDS) and not missing_pictures(theirs)
    for one, other in zip(theirs, ours, strict=True):
        assert (one.question, one.answer, one.target) == (other.question, other.answer, other.target)
        assert [_data_url(image, None) for image in one.images] == [_data_url(image, None) for image in other.images]
    assert [r.path.rpartition("/")[2] for r in hub.requests if r.method == "GET" and "/api/" not in r.path] == [
        "MIG_data.json",
        "images.zip",
    ]
    hub.requests.clear()
    assert read_mig_bench(NAME) == theirs and not hub.requests


@pytest.mark.parametrize("files", ["home/author/MIG-Bench/images"], indirect=True)
def test_an_accuracy_run_is_the_same(
    hub: SmallHub, tmp_path: Path, files: dict[str, bytes], local: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.add(NAME, files, kind="datasets")
    found = []
    for i, data in enumerate((NAME, local)):
        out = tmp_path / f"{i}.jsonl"
        words = ("--tasks", "diff,reasoning,region", "--limit", 1, "--out", out)
        code, stdout, err = run(capsys, "accuracy", "--data", data, "--model", "nano", *words)
        assert code == 0, err
        answers = [json.loads(line) for line in out.read_text().splitlines()]
        found.append(({a["index"]: a["response"] for a in answers}, json.loads(stdout.splitlines()[-1])))
    assert found[0] == found[1] and len(found[0][0]) == 3 and found[0][1]["missing_pictures"] == 0


def test_a_page_shows_the_same_pictures(
    hub: SmallHub, tmp_path: Path, files: dict[str, bytes], local: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.add(NAME, files, kind="datasets")
    answers = write_answers(tmp_path / "answers.jsonl", dict.fromkeys(range(len(RECORDS)), "(1,2),(30,40)"))
    shown = []
    for data in (NAME, local):
        words = ("accuracy", "--data", data, "--answers", answers, "--html", tmp_path / "page.html")
        assert run(capsys, *words)[0] == 0
        shown.append(re.findall(r"data:image/[^\"']+", (tmp_path / "page.html").read_text()))
    assert shown[0] == shown[1] and len(shown[0]) > 5


def test_compare_takes_a_dataset_too(
    hub: SmallHub, tmp_path: Path, files: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    hub.add(NAME, files, kind="datasets")
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text('{"index": 0, "response": "(1,2),(3,4)"}\n')
    code, stdout, err = run(capsys, "compare", tmp_path / "a.jsonl", tmp_path / "b.jsonl", "--data", NAME)
    assert code == 0 and json.loads(stdout.splitlines()[-1])["unasked"] == len(RECORDS) - 1, err


def test_datasets_that_do_not_fit(hub: SmallHub, tmp_path: Path, local: Path) -> None:
    two = {"one.json": local.read_bytes(), "two.json": local.read_bytes()}
    hub.add("Org/Two", two, kind="datasets")
    with pytest.raises(MigicianError, match=r"several JSON files; .*one\.json, .*two\.json"):
        read_mig_bench("Org/Two")
    with pytest.raises(MigicianError, match="no such dataset"):
        read_mig_bench("Org/None")
    hub.requests.clear()
    for word in ("Org/None.json", "local/none", tmp_path / "none"):
        with pytest.raises(MigicianError, match="give MIG-Bench's MIG_data"):
            read_mig_bench(word)
    assert not hub.requests
