"""Asks a model a benchmark's questions: picture group by picture group, one JSON line per answer, resumable.

A model is an Engine of engines.py. How a question is put is an Ask: `direct` for MIG-Bench's own prompt; families.py
has the other models' forms, cot.py the two steps of the chain of thought.
"""

import fcntl
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from ...runtime.errors import ContextFullError, ImageError, MigicianError
from ..engines import Engine
from .data import Question, picture_order, read_lines
from .protocol import MAX_NEW_TOKENS, direct_prompt
from .runs import Run, same_run, words

__all__ = ["Ask", "Progress", "Reply", "Report", "direct", "run", "shard_of"]


@dataclass(frozen=True)
class Reply:
    """What is kept of one answer: the response that is scored, and more keys for its JSON line (steps of thought)."""

    response: str
    extra: Mapping[str, Any] = field(default_factory=dict)


Ask = Callable[[Question, Engine], "str | Reply"]


@dataclass(frozen=True)
class Report:
    """Progress after an answer: how many are there, of how many; seconds that this run took and will still take.

    error: why the question could not be asked, "" if it was.
    """

    done: int
    total: int
    elapsed_s: float
    left_s: float
    question: Question
    response: str
    error: str


Progress = Callable[[Report], None]


def direct(question: Question, engine: Engine) -> str:
    """Puts a question as MIG-Bench's evaluation of Migician and Qwen2-VL does."""
    return engine.answer(question.images, direct_prompt(question.question), MAX_NEW_TOKENS).text


def shard_of(questions: Sequence[Question], shard: tuple[int, int]) -> list[Question]:
    """Takes every n-th picture group from the i-th on, in asking order; shards 0 to n - 1 make up the whole.

    Raises MigicianError unless 0 <= i < n.
    """
    i, n = shard
    if not 0 <= i < n:
        raise MigicianError(f"shard {i}/{n}: shards count from 0; the last of {n} is {n - 1}/{n}")
    return [q for group in picture_order(questions)[i::n] for q in group]


def run(
    questions: Sequence[Question],
    engine: Engine,
    out: Path | None,
    *,
    shard: tuple[int, int] = (0, 1),
    ask: Ask = direct,
    label: Run | str = "",
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Asks the shard's questions that `out` does not answer yet; returns the lines of all of them, in asking order.

    out: JSON lines {"index", "response", "seconds", "run"}, each written when its answer is there, so that a killed run
    goes on where it stopped; None keeps nothing.   label: the run, as of runs.py; lines of another do not mix.
    A question whose pictures cannot be read or do not fit gets a line with "error": no answer, tried again next time.
    Raises MigicianError when `out` belongs to another run or is being written by one.
    """
    mine = shard_of(questions, shard)
    with _opened(out) as file:
        lines = _resume(file, out, label)
        left = [q for q in mine if q.index not in lines]
        done, start = len(mine) - len(left), time.perf_counter()
        for number, q in enumerate(left, 1):
            line = _ask(q, engine, ask, label)
            lines[q.index] = line
            if file is not None:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                file.flush()
            if progress:
                elapsed = time.perf_counter() - start
                ahead = elapsed / number * (len(left) - number)
                error = line.get("error", "")
                progress(Report(done + number, len(mine), elapsed, ahead, q, line["response"], error))
    return [lines[q.index] for q in mine]


def _ask(q: Question, engine: Engine, ask: Ask, label: Run | str) -> dict[str, Any]:
    start = time.perf_counter()
    try:
        reply = ask(q, engine)
    except (ImageError, ContextFullError) as error:
        reply = Reply("", {"error": str(error)})
    if isinstance(reply, str):
        reply = Reply(reply)
    seconds = round(time.perf_counter() - start, 3)
    line = {"index": q.index, "response": reply.response, "seconds": seconds}
    return {**line, **({"run": label} if label else {}), **reply.extra}


@contextmanager
def _opened(out: Path | None) -> Iterator[IO[str] | None]:
    """Opens a file of answers for one writer."""
    if out is None:
        yield None
        return
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        file = out.open("a+", encoding="utf-8", newline="\n")
    except OSError as error:
        raise MigicianError(f"{out}: {error.strerror or error}; choose an --out that can be written") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise MigicianError(f"{out}: another run is writing it; wait for it or choose another --out") from None
        except OSError:
            pass  # a file system without locks
        yield file


def _resume(file: IO[str] | None, out: Path | None, label: Run | str) -> dict[int, dict[str, Any]]:
    """Reads the answers that are there and cuts off a line that a killed run left half written."""
    if file is None or out is None:
        return {}
    records = read_lines(out, torn=True)
    for record in records:
        if label and not same_run(record.get("run", label), label):
            other, this = words(record["run"]), words(label)
            raise MigicianError(f"{out}: holds answers of {other}, this run is {this}; choose another --out")
    text = out.read_bytes()
    whole = text.rfind(b"\n") + 1
    if text[whole:].strip():
        last = text[whole:].decode("utf-8", "replace")
        if records and _is(last, records[-1]):
            file.write("\n")  # only the newline is missing
            file.flush()
        else:
            file.truncate(whole)
    return {record["index"]: record for record in records if "error" not in record}


def _is(text: str, record: Mapping[str, Any]) -> bool:
    try:
        return bool(json.loads(text) == record)
    except ValueError:
        return False
