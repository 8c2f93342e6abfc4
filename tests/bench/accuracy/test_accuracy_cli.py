"""migician-bench accuracy and compare: the JSON line, merging, gates, usage, messages."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from accuracy_data import FORMAT, INVERTED, RECORDS, truth, write_answers, write_data

from migician.bench.accuracy import models
from migician.bench.cli import main
from migician.bench.engines import Answered
from migician.calib.scenes.mig_bench import write_mig_bench

TRUTHS = {i: truth(record) for i, record in enumerate(RECORDS)}
FIGURES = {"n", "acc@0.7", "acc@0.5", "acc@0.3", "mean_iou", "unparsed"}


class Fake:
    """Answers with a box made of its question."""

    asked, versions = 0, {"fake": "1"}

    def __init__(self, name: str, family: str) -> None:
        self.name, self.family, self.closed = name, family, False

    def answer(self, images: Sequence[Path], text: str, max_new_tokens: int) -> Answered:
        type(self).asked += 1
        return Answered(f"(10,10),({300 + len(text)},{400 + len(images)})")

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[Fake]:
    """Stands in for every model."""
    monkeypatch.setattr(models, "open_answerer", lambda name, **options: Fake(name, options["family"] or "migician"))
    monkeypatch.setattr(Fake, "asked", 0)
    return Fake


@pytest.fixture
def bench(capsys: pytest.CaptureFixture[str]):
    def run(*words: object) -> tuple[int, list[str], str]:
        """Exit status, lines of stdout, stderr."""
        with pytest.raises(SystemExit) as exit_:
            main([str(word) for word in words])
        out, err = capsys.readouterr()
        return int(exit_.value.code or 0), out.splitlines(), err

    return run


# ---- answers from anywhere
def test_the_json_line(tmp_path: Path, bench) -> None:
    data, answers = write_data(tmp_path), write_answers(tmp_path / "a.jsonl", TRUTHS)
    status, out, err = bench("accuracy", "--data", data, "--answers", answers)
    assert status == 0 and err == ""
    line = json.loads(out[-1])
    assert line["ave"] == {"published": 80.0, "none": 95.0}
    tasks = {record["task"] for record in RECORDS}
    assert set(line["tasks"]) == set(line["tasks_none"]) == tasks
    assert all(set(figures) == FIGURES for figures in [*line["tasks"].values(), *line["tasks_none"].values()])
    assert line["tasks_none"]["region"] == {
        "n": 2, "acc@0.7": 100.0, "acc@0.5": 100.0, "acc@0.3": 100.0, "mean_iou": 1.0, "unparsed": 0,
    }  # fmt: skip
    assert line["tasks"]["view_diff"]["acc@0.5"] == 0 and line["tasks"]["view_diff"]["acc@0.3"] == 100
    assert line["clean"]["ave"] == {"published": 85.0, "none": 100.0}
    assert line["clean"]["tasks"]["common_object"]["n"] == 2 and line["clean"]["excluded"] == INVERTED
    assert (line["n"], line["missing"], line["y_scale"]) == (15, 0, "published")
    low, high = line["ci"]["none"]["AVE"]
    assert low <= 95 <= high
    assert any(row.startswith("AVE ") and " 80.00 " in row and " 95.00 " in row for row in out)
    assert any("clean AVE 85.00, without 2 questions" in row for row in out)
    assert "Migician-7B" not in "".join(out)  # these are not the paper's questions


def test_missing_answers_are_reported(tmp_path: Path, bench) -> None:
    some = {i: TRUTHS[i] for i in (0, 2, 3, 8, 9)}
    answers = write_answers(tmp_path / "a.jsonl", {**some, 4: "no idea"})
    status, out, err = bench("accuracy", "--data", write_data(tmp_path), "--answers", answers, "--y-scale", "none")
    line = json.loads(out[-1])
    assert status == 0 and (line["missing"], line["y_scale"]) == (9, "none")
    assert "9 of 15 questions without an answer, counted as wrong: 1, 5-7, 10-14" in err
    assert line["tasks_none"]["diff"]["unparsed"] == 1
    assert line["tasks_none"]["common_object"]["acc@0.5"] == 50
    assert line["ave"]["none"] == pytest.approx((50 + 100 + 100) / 10)


def test_part_of_the_questions(tmp_path: Path, bench) -> None:
    data, answers = write_data(tmp_path), write_answers(tmp_path / "a.jsonl", TRUTHS)
    _, out, err = bench("accuracy", "--data", data, "--answers", answers, "--tasks", "region,diff", "--limit", 1)
    line = json.loads(out[-1])
    assert {task: figures["n"] for task, figures in line["tasks"].items()} == {"diff": 1, "region": 1}
    assert line["missing"] == 0 and err == ""


def test_the_scaling_follows_the_family(tmp_path: Path, bench) -> None:
    data = write_data(tmp_path)
    labelled = write_answers(tmp_path / "a.jsonl", TRUTHS, run="a model qwen2_vl direct auto side=native data=0")
    thought = write_answers(tmp_path / "b.jsonl", TRUTHS, run="m migician cot auto side=native data=0")
    plain = write_answers(tmp_path / "c.jsonl", TRUTHS, run="by hand, in one of many ways")
    objects = {
        "none": [{"family": "qwen2_vl", "mode": "direct"}, {"family": "migician", "mode": "cot-upstream", "more": 1}],
        "published": [{"family": "migician", "mode": "bare"}, {"family": "nobody's"}, {"family": 3}, {}, 7, [], None],
    }
    for rule, runs in objects.items():
        for run in runs:
            answers = write_answers(tmp_path / "d.jsonl", TRUTHS, run=run)
            assert json.loads(bench("accuracy", "--data", data, "--answers", answers)[1][-1])["y_scale"] == rule, run
    assert json.loads(bench("accuracy", "--data", data, "--answers", labelled)[1][-1])["y_scale"] == "none"
    assert json.loads(bench("accuracy", "--data", data, "--answers", thought)[1][-1])["y_scale"] == "none"
    assert json.loads(bench("accuracy", "--data", data, "--answers", plain)[1][-1])["y_scale"] == "published"
    asked = ("accuracy", "--data", data, "--answers", plain, "--family", "qwen2_vl")
    assert json.loads(bench(*asked)[1][-1])["y_scale"] == "none"


# ---- asking
def test_a_run_resumes_and_its_shards_merge_to_the_same(tmp_path: Path, bench, fake: type[Fake]) -> None:
    data = write_data(tmp_path, pictures=True)
    ask = ("accuracy", "--data", data, "--model", "m")
    status, out, err = bench(*ask, "--out", tmp_path / "whole.jsonl")
    whole = json.loads(out[-1])
    assert status == 0 and fake.asked == 15 and "15/15 answers" in err
    lines = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "half.jsonl").write_text("".join(lines[:7]) + lines[7][:20])  # killed while it wrote
    fake.asked = 0
    assert json.loads(bench(*ask, "--out", tmp_path / "half.jsonl")[1][-1]) == whole
    assert fake.asked == 8

    fake.asked = 0
    parts = [tmp_path / f"part{i}.jsonl" for i in (0, 1)]
    sizes = [json.loads(bench(*ask, "--shard", f"{i}/2", "--out", part)[1][-1])["n"] for i, part in enumerate(parts)]
    assert sum(sizes) == fake.asked == 15 and min(sizes) > 0
    joined = tmp_path / "joined.jsonl"
    status, out, err = bench("accuracy", "--data", data, "--merge", *parts, "--out", joined)
    merged = json.loads(out[-1])
    assert status == 0 and f"15 answers in {joined}" in err
    same = set(whole) - {"model"}
    assert {key: merged[key] for key in same} == {key: whole[key] for key in same}
    order = [json.loads(line)["index"] for line in joined.read_text().splitlines()]
    assert order == [json.loads(line)["index"] for line in lines]
    assert bench("compare", tmp_path / "whole.jsonl", joined, "--data", data, "--gate", "AVE drop<=0")[0] == 0


def test_parts_of_different_runs_do_not_merge(tmp_path: Path, bench) -> None:
    data = write_data(tmp_path)
    one = write_answers(tmp_path / "1.jsonl", {0: "a"}, run="bf16")
    two = write_answers(tmp_path / "2.jsonl", {1: "b"}, run="int4")
    status, _, err = bench("accuracy", "--data", data, "--merge", one, two)
    assert status == 1 and "merge parts of one run only" in err and err.count("\n") == 1
    three = write_answers(tmp_path / "3.jsonl", {0: "b"}, run="bf16")
    status, _, err = bench("accuracy", "--data", data, "--merge", one, three)
    assert status == 1 and "question 0 has two different answers" in err


def test_missing_pictures_are_counted_and_listed(tmp_path: Path, bench, fake: type[Fake]) -> None:
    data = write_data(tmp_path, pictures=True)
    gone = tmp_path / "MIG-Bench/images/object_tracking/4"
    gone.unlink()
    status, out, err = bench("accuracy", "--data", data, "--model", "m")
    line = json.loads(out[-1])
    assert status == 0 and fake.asked == 13
    assert "1 pictures missing; 2 questions not asked, they count as wrong:" in err and f"  {gone}\n" in err
    assert (line["n"], line["missing"], line["missing_pictures"]) == (15, 2, 1)
    assert line["tasks"]["object_tracking"]["acc@0.3"] == 0
    status, _, err = bench("accuracy", "--data", data, "--images", tmp_path / "nowhere", "--model", "m")
    assert status == 1 and "point --images at their root" in err and fake.asked == 13


def test_a_shard_is_the_same_whatever_is_missing(tmp_path: Path, bench, fake: type[Fake]) -> None:
    data = write_data(tmp_path, pictures=True)
    ask = ("accuracy", "--data", data, "--model", "m")
    bench(*ask, "--shard", "1/2", "--out", tmp_path / "a.jsonl")
    (tmp_path / "MIG-Bench/images/common_object/a.png").unlink()  # the first group's, of shard 0
    bench(*ask, "--shard", "1/2", "--out", tmp_path / "b.jsonl")
    a, b = ([json.loads(x)["index"] for x in (tmp_path / n).read_text().splitlines()] for n in ("a.jsonl", "b.jsonl"))
    assert a == b


def test_an_interrupted_run_says_how_it_goes_on(
    tmp_path: Path, bench, fake: type[Fake], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> Answered:
        raise KeyboardInterrupt

    monkeypatch.setattr(Fake, "answer", stop)
    out = tmp_path / "a.jsonl"
    status, _, err = bench("accuracy", "--data", write_data(tmp_path, pictures=True), "--model", "m", "--out", out)
    assert status == 130 and f"the answers so far are in {out}; the same command goes on from there" in err


def test_flips_of_drawn_questions_name_pictures_without_their_folder(tmp_path: Path, bench) -> None:
    ask = ("--drawn", 1, "--tasks", "region", "--y-scale", "none")
    data = write_mig_bench(tmp_path / "drawn", 1)
    index = next(i for i, record in enumerate(json.loads(data.read_text())) if record["task"] == "region")
    x1, y1, x2, y2 = json.loads(data.read_text())[index]["answer"]
    a = write_answers(tmp_path / "a.jsonl", {index: f"[{x1:.3f}, {y1:.3f}, {x2:.3f}, {y2:.3f}]"})
    b = write_answers(tmp_path / "b.jsonl", {index: "no"})
    status, out, _ = bench("compare", a, b, *ask)
    (lost,) = [row for row in out if row.startswith("lost")]
    assert status == 0 and lost.endswith(" ".join(f"region_00000_{k}.png" for k in range(1, lost.count(".png") + 1)))
    assert "/" not in lost


def test_another_model_does_not_go_on_in_the_same_file(tmp_path: Path, bench, fake: type[Fake]) -> None:
    ask = ("accuracy", "--data", write_data(tmp_path, pictures=True), "--out", tmp_path / "a.jsonl", "--model")
    assert bench(*ask, "one")[0] == 0
    for other in (("two",), ("one", "--max-side", 64), ("one", "--family", "qwen2_vl"), ("one", "--cot")):
        status, _, err = bench(*ask, *other)
        assert status == 1 and "holds answers of one migician direct auto side=native data=" in err


def test_published_questions_get_the_published_format_and_drawn_ones_none(
    tmp_path: Path, bench, fake: type[Fake], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts: list[str] = []
    answer = Fake.answer

    def listen(self: Fake, images: Sequence[Path], text: str, max_new_tokens: int) -> Answered:
        texts.append(text)
        return answer(self, images, text, max_new_tokens)

    monkeypatch.setattr(Fake, "answer", listen)
    data = write_data(tmp_path, pictures=True)
    asked = [record["question"] for record in RECORDS if record["task"] == "region"]
    for words, ending in (((), FORMAT), (("--with-format",), FORMAT), (("--bare",), "")):
        texts.clear()
        assert bench("accuracy", "--data", data, "--tasks", "region", "--model", "m", *words)[0] == 0
        assert texts == [question + ending for question in asked]
    for words, ends in (((), False), (("--with-format",), True)):
        texts.clear()
        assert bench("accuracy", "--drawn", 1, "--tasks", "diff", "--model", "m", *words)[0] == 0
        assert [text.endswith(FORMAT) for text in texts] == [ends]


RUN = {"model": "a model", "family": "migician", "mode": "direct", "precision": "auto", "max_side": 64}


def test_a_line_says_in_json_which_run_it_is_of(tmp_path: Path, bench, fake: type[Fake]) -> None:
    data, out = write_data(tmp_path, pictures=True), tmp_path / "a.jsonl"
    assert bench("accuracy", "--data", data, "--model", "a model", "--max-side", 64, "--out", out)[0] == 0
    found = {json.dumps(json.loads(line)["run"]) for line in out.read_text().splitlines()}
    (run,) = map(json.loads, found)
    assert {key: run[key] for key in RUN} == RUN and len(run["data"]) > 7
    assert set(run) == {*RUN, "data", "backend"}


def test_answers_of_an_older_release_are_gone_on_with(tmp_path: Path, bench, fake: type[Fake]) -> None:
    """Its lines say in words which run they are of; a model's name may hold spaces too."""
    ask = ("accuracy", "--data", write_data(tmp_path, pictures=True), "--max-side", 64, "--model", "a model")
    whole = json.loads(bench(*ask, "--out", tmp_path / "new.jsonl")[1][-1])
    lines = [json.loads(line) for line in (tmp_path / "new.jsonl").read_text().splitlines()]
    old = f"a model migician direct auto side=64 data={lines[0]['run']['data']}"
    half = "".join(json.dumps({**line, "run": old}) + "\n" for line in lines[:7])
    (tmp_path / "old.jsonl").write_text(half)
    fake.asked = 0
    assert json.loads(bench(*ask, "--out", tmp_path / "old.jsonl")[1][-1]) == whole and fake.asked == 8
    (tmp_path / "old.jsonl").write_text(half)
    parts = (tmp_path / "old.jsonl", tmp_path / "new.jsonl")
    for files in (parts, parts[::-1]):
        merged = json.loads(bench(ask[0], *ask[1:3], "--merge", *files)[1][-1])
        assert merged["ave"] == whole["ave"]
    status, _, err = bench(*ask[:-1], "model", "--out", tmp_path / "old.jsonl")
    assert status == 1 and f"holds answers of {old}, this run is model migician direct auto side=64" in err


def test_a_part_of_another_run_is_told_in_words(tmp_path: Path, bench) -> None:
    data = write_data(tmp_path)
    one = write_answers(tmp_path / "1.jsonl", {0: "a"}, run={**RUN, "data": "0", "backend": "native"})
    two = write_answers(tmp_path / "2.jsonl", {1: "b"}, run={**RUN, "data": "0", "backend": "torch"})
    status, _, err = bench("accuracy", "--data", data, "--merge", one, two)
    words = "a model migician direct auto side=64 data=0"
    assert status == 1 and f"is of {words}, " in err and f"of {words} backend=torch; merge parts of one run" in err


# ---- comparing
@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path, Path]:
    worse = {**TRUTHS, 8: "no", 0: "(0,0),(10,10)"}
    return (
        write_data(tmp_path),
        write_answers(tmp_path / "a.jsonl", TRUTHS),
        write_answers(tmp_path / "b.jsonl", worse),
    )


def test_compare(bench, pair: tuple[Path, Path, Path]) -> None:
    data, a, b = pair
    status, out, err = bench("compare", a, b, "--data", data, "--y-scale", "none")
    assert status == 0 and err == ""
    line = json.loads(out[-1])
    assert line["ave"]["change"] == pytest.approx(-7.5) and (line["ave"]["a"], line["ave"]["b"]) == (95.0, 87.5)
    assert line["ave"]["ci"][0] <= -7.5 <= line["ave"]["ci"][1]
    assert line["pooled"]["change"] == pytest.approx(-200 / 15, abs=1e-3)
    assert line["flips"] == {"lost": [0, 8], "won": []}
    lost = [row for row in out if row.startswith("lost ")]
    assert len(lost) == 2 and "lost 0 common_object  IoU 1.000 -> 0.000  [1] " in lost[0]
    assert all(f"common_object/{name}.png" in lost[0] for name in "abc")


@pytest.mark.parametrize(("gate", "status"), [("AVE drop<=7.5", 0), ("AVE drop<=7.4", 1), ("region>=60", 1)])
@pytest.mark.parametrize("command", ["compare", "accuracy"])
def test_gates_set_the_exit_status(bench, pair: tuple[Path, Path, Path], command: str, gate: str, status: int) -> None:
    data, a, b = pair
    words = ("compare", a, b) if command == "compare" else ("accuracy", "--answers", b, "--compare", a)
    found, out, err = bench(*words, "--data", data, "--y-scale", "none", "--gate", "AVE>=1", "--gate", gate)
    line = json.loads(out[-1])  # the figures come, whatever the gate says
    assert found == status and len(line["failed_gates"]) == status
    assert err == (f"migician-bench: {line['failed_gates'][0]}\n" if status else "")
    assert (line if command == "compare" else line["compare"])["ave"]["change"] == pytest.approx(-7.5)


def test_comparing_runs_that_answer_nothing_here(tmp_path: Path, bench) -> None:
    data = write_data(tmp_path)
    none = write_answers(tmp_path / "none.jsonl", {})
    status, _, err = bench("compare", none, none, "--data", data)
    assert status == 1 and "no answers to these questions" in err


# ---- usage
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "give --data FILE, the benchmark's questions, or --drawn N."),
        (("--data", "D", "--drawn", 3), "give --data FILE"),
        (("--drawn", 3, "--images", "."), "--images goes with --data"),
        (("--data", "D", "--shard", "2/2"), "write I/N"),
        (("--data", "D", "--shard", "x"), "write I/N"),
        (("--data", "D", "--merge"), "name the files to join."),
        (("--data", "D", "a.jsonl"), "add --merge to join files."),
        (("--data", "D", "--merge", "a.jsonl", "--answers", "b.jsonl"), "give one."),
        (("--data", "D", "--answers", "b.jsonl", "--model", "nano"), "--model: no model is asked"),
        (("--data", "D", "--answers", "b.jsonl", "--out", "c.jsonl"), "--answers has its own file."),
        (("--data", "D", "--gate", "AVE drop<=1"), "needs --compare OTHER to drop from."),
        (("--data", "D", "--gate", "AVE"), "is no gate; write"),
        (("--data", "D", "--tasks", ","), "names no task."),
        (("--data", "D", "--upstream-compat"), "--upstream-compat goes with --cot or another --benchmark."),
        (("--data", "D", "--bare", "--cot"), "--cot has its own texts."),
        (("--data", "D", "--benchmark", "mmiu", "--cot"), "only for --benchmark mig"),
        (("--drawn", 3, "--benchmark", "mmiu"), "needs --data"),
    ],
)
def test_usage(bench, words: tuple, message: str) -> None:
    status, out, err = bench("accuracy", *words)
    assert status == 2 and message in " ".join(err.split()) and not out


def test_a_gate_on_no_task_fails_before_anything_is_asked(tmp_path: Path, bench, fake: type[Fake]) -> None:
    data = write_data(tmp_path, pictures=True)
    status, out, err = bench("accuracy", "--data", data, "--model", "m", "--gate", "regions>=1")
    assert status == 1 and "no questions of regions" in err and fake.asked == 0 and not out


@pytest.mark.slow
def test_drawn_questions_through_the_embedded_model(tmp_path: Path, bench) -> None:
    ask = ("accuracy", "--drawn", 2, "--tasks", "diff,region", "--model", "nano", "--threads", 1)
    status, out, _ = bench(*ask, "--out", tmp_path / "a.jsonl")
    line = json.loads(out[-1])
    assert status == 0 and line["n"] == 4 and line["y_scale"] == "none" and line["model"] == "nano"
    answers = (tmp_path / "a.jsonl").read_text().splitlines()
    assert len(answers) == 4
    assert line["tasks_none"]["diff"]["unparsed"] == line["tasks_none"]["region"]["unparsed"] == 0
    (tmp_path / "b.jsonl").write_text("\n".join(answers[:2]) + "\n")
    again = json.loads(bench(*ask, "--out", tmp_path / "b.jsonl")[1][-1])
    assert again == line
