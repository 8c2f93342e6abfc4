"""Runs: asking order, JSON lines, resuming after a kill, shards, questions that cannot be asked."""

import fcntl
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from accuracy_data import FORMAT, RECORDS, write_data

from migician.bench.accuracy.data import read_answers, read_mig_bench
from migician.bench.accuracy.runner import Reply, Report, run, shard_of
from migician.bench.engines import Answered
from migician.runtime.errors import ImageError, MigicianError


class Fake:
    """Answers by what it is asked; may be killed after so many answers."""

    name, family, versions = "fake", "migician", {"fake": "1"}

    def __init__(self, lives: int = 1000) -> None:
        self.asked: list[tuple[tuple[Path, ...], str, int]] = []
        self._lives = lives

    def answer(self, images: Sequence[Path], text: str, max_new_tokens: int) -> Answered:
        if len(self.asked) == self._lives:
            raise KeyboardInterrupt
        self.asked.append((tuple(images), text, max_new_tokens))
        return Answered(f"é (1,2),({len(images)},{len(text)})")

    def close(self) -> None:
        pass


@pytest.fixture
def questions(tmp_path: Path) -> list:
    return read_mig_bench(write_data(tmp_path))


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_time(lines: Sequence[dict]) -> list[dict]:
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


ORDER = [0, 1, 2, 5, 3, 4, 6, 7, 8, 9, 10, 11, 12, 13, 14]  # 5 has the pictures of 0, 1 and 2


def test_questions_are_asked_by_picture_group_and_kept_as_they_come(tmp_path: Path, questions: list) -> None:
    out, fake, seen = tmp_path / "deep" / "answers.jsonl", Fake(), list[Report]()
    lines = run(questions, fake, out, label="a run", progress=seen.append)
    assert [line["index"] for line in lines] == ORDER
    assert lines_of(out) == lines
    assert all(set(line) == {"index", "response", "seconds", "run"} for line in lines)
    assert "é" in out.read_text("utf-8")
    assert [text for _, text, _ in fake.asked] == [RECORDS[i]["question"] + FORMAT for i in ORDER]
    assert {tokens for *_, tokens in fake.asked} == {128}
    assert [images for images, *_ in fake.asked] == [questions[i].images for i in ORDER]
    assert [(report.done, report.total) for report in seen] == [(i, 15) for i in range(1, 16)]
    assert seen[-1].left_s == 0 and seen[0].left_s == pytest.approx(14 * seen[0].elapsed_s)


def test_nothing_is_kept_without_a_file(questions: list) -> None:
    assert [line["index"] for line in run(questions, Fake(), None)] == ORDER


@pytest.mark.parametrize("lives", [0, 1, 7, 14])
@pytest.mark.parametrize("torn", ["", '{"index": 3, "resp', '{"index": 3, "response": "é'.encode()[:-1], "nonsense"])
def test_killed_and_resumed_is_the_same(tmp_path: Path, questions: list, lives: int, torn: str | bytes) -> None:
    whole = run(questions, Fake(), None, label="x")
    out = tmp_path / "answers.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run(questions, Fake(lives), out, label="x")
    assert len(lines_of(out)) == lives
    with out.open("ab") as file:
        file.write(torn.encode() if isinstance(torn, str) else torn)
    second = Fake()
    resumed = run(questions, second, out, label="x")
    assert len(second.asked) == len(ORDER) - lives  # nothing is asked twice
    assert without_time(resumed) == without_time(whole) == without_time(lines_of(out))
    third = Fake(0)
    assert run(questions, third, out, label="x") == resumed  # nothing left to ask


def test_a_last_line_that_lacks_only_its_newline_is_kept(tmp_path: Path, questions: list) -> None:
    out = tmp_path / "answers.jsonl"
    run(questions[:2], Fake(), out)
    out.write_text(out.read_text().rstrip("\n"))
    fake = Fake()
    lines = run(questions, fake, out)
    assert len(fake.asked) == 13 and without_time(lines_of(out)) == without_time(lines)


def test_answers_of_another_run_are_not_mixed_in(tmp_path: Path, questions: list) -> None:
    out = tmp_path / "answers.jsonl"
    run(questions[:2], Fake(), out, label="bf16")
    with pytest.raises(MigicianError, match="holds answers of bf16, this run is int4; choose another --out"):
        run(questions, Fake(), out, label="int4")
    out.write_text('{"index": 0, "response": "mine"}\n')  # made by something else: taken as it is
    assert run(questions[:1], Fake(0), out, label="int4")[0]["response"] == "mine"


def test_one_writer_at_a_time(tmp_path: Path, questions: list) -> None:
    out = tmp_path / "answers.jsonl"
    with out.open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(MigicianError, match="another run is writing it"):
            run(questions, Fake(), out)
    assert len(run(questions, Fake(), out)) == 15


@pytest.mark.parametrize("n", [1, 2, 3, 40])
def test_shards_make_up_the_whole(tmp_path: Path, questions: list, n: int) -> None:
    whole = run(questions, Fake(), None)
    parts = [run(questions, Fake(), tmp_path / f"{i}.jsonl", shard=(i, n)) for i in range(n)]
    assert sorted(line["index"] for part in parts for line in part) == sorted(ORDER)
    joined = {line["index"]: line["response"] for part in parts for line in part}
    assert joined == {line["index"]: line["response"] for line in whole}
    for i in range(n):
        assert [line["index"] for line in parts[i]] == [q.index for q in shard_of(questions, (i, n))]
        pictures = [{q.images for q in shard_of(questions, (j, n))} for j in range(n)]
    assert all(not (a & b) for i, a in enumerate(pictures) for b in pictures[:i])  # no group is split


@pytest.mark.parametrize("shard", [(1, 1), (-1, 2), (0, 0)])
def test_shards_that_are_none(questions: list, shard: tuple[int, int]) -> None:
    with pytest.raises(MigicianError, match="shards count from 0"):
        run(questions, Fake(), None, shard=shard)


def test_a_question_that_cannot_be_asked_is_noted_and_tried_again(tmp_path: Path, questions: list) -> None:
    class Blind(Fake):
        def answer(self, images: Sequence[Path], text: str, max_new_tokens: int) -> Answered:
            if len(images) == 6:
                raise ImageError("4: not a picture; replace it")
            return super().answer(images, text, max_new_tokens)

    out, seen = tmp_path / "answers.jsonl", list[Report]()
    lines = run(questions, Blind(), out, progress=seen.append)
    assert [line["index"] for line in lines if "error" in line] == [12, 13]
    assert {report.error for report in seen} == {"", "4: not a picture; replace it"}
    assert set(read_answers(out, questions)) == set(ORDER) - {12, 13}
    fake = Fake()
    lines = run(questions, fake, out)
    assert len(fake.asked) == 2 and not any("error" in line for line in lines)
    assert set(read_answers(out, questions)) == set(ORDER)


def test_other_failures_end_the_run_but_keep_its_answers(tmp_path: Path, questions: list) -> None:
    class Broken(Fake):
        def answer(self, images: Sequence[Path], text: str, max_new_tokens: int) -> Answered:
            if len(self.asked) == 3:
                raise MigicianError("the server is gone; start it again")
            return super().answer(images, text, max_new_tokens)

    out = tmp_path / "answers.jsonl"
    with pytest.raises(MigicianError, match="the server is gone"):
        run(questions, Broken(), out)
    assert [line["index"] for line in lines_of(out)] == ORDER[:3]


def test_an_ask_of_its_own_may_keep_more(questions: list) -> None:
    def ask(question, answerer) -> Reply:
        return Reply("(1,2),(3,4)", {"picture": question.target})

    lines = run(questions, Fake(0), None, ask=ask)
    assert [line["picture"] for line in lines] == [questions[i].target for i in ORDER]


def test_a_place_that_cannot_be_written(tmp_path: Path, questions: list) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MigicianError, match="choose an --out that can be written"):
        run(questions, Fake(), tmp_path / "file" / "answers.jsonl")
    with pytest.raises(MigicianError, match="choose an --out that can be written"):
        run(questions, Fake(), tmp_path)
