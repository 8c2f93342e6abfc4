"""migician-bench accuracy, compare and sweep: what an answer is worth, and what one run is worth beside another."""

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...runtime.errors import MigicianError

if TYPE_CHECKING:
    from .compare import Comparison, Gate
    from .data import Question
    from .runner import Answerer, Ask, Reply, Report

__all__ = ["accuracy", "compare"]

_COUNT = click.IntRange(1)
_FILE = click.Path(path_type=Path, dir_okay=False)
_SETTINGS = {"help_option_names": ["-h", "--help"]}


def __getattr__(name: str) -> Any:
    if name == "sweep":
        from .sweep import sweep

        return sweep
    raise AttributeError(name)


# ---- options
def _shard(_: click.Context, __: click.Parameter, value: str | None) -> tuple[int, int]:
    if value is None:
        return 0, 1
    i, slash, n = value.partition("/")
    if not (slash and i.isdecimal() and n.isdecimal() and int(i) < int(n)):
        raise click.BadParameter(f"{value!r}: write I/N, I from 0 to N - 1; 0/4, 1/4, 2/4 and 3/4 make up the whole.")
    return int(i), int(n)


def _tasks(_: click.Context, __: click.Parameter, value: str | None) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in (value or "").split(",") if name.strip()))
    if value is not None and not names:
        raise click.BadParameter(f"{value!r} names no task.")
    return names


def _gates(_: click.Context, __: click.Parameter, values: Sequence[str]) -> "tuple[Gate, ...]":
    from .compare import parse_gate

    try:
        return tuple(parse_gate(value) for value in values)
    except ValueError as error:
        raise click.BadParameter(f"{error}.") from None


_Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

_QUESTIONS: tuple[_Decorator, ...] = (
    click.option("--data", type=click.Path(path_type=Path), metavar="FILE", help="The questions, as published."),
    click.option("--images", type=click.Path(path_type=Path), metavar="ROOT",
                 help="Where the pictures' paths begin. [the data file's folder]"),
    click.option("--drawn", type=_COUNT, metavar="N", help="Instead of --data: N drawn questions of each task."),
    click.option("--tasks", callback=_tasks, metavar="A,B", help="Only questions of these tasks. [all]"),
    click.option("--limit", type=_COUNT, metavar="N", help="Only the first N questions of each task."),
)  # fmt: skip
_REPORTS: tuple[_Decorator, ...] = (
    click.option("--y-scale", type=click.Choice(["published", "none"]), default=None,
                 help="Whose figures come first; both are computed. [as the model's family is published]"),
    click.option("--gate", "gates", multiple=True, callback=_gates, metavar="RULE",
                 help='Exit with 1 unless it holds: "AVE>=60", "AVE drop<=1.0". May be repeated.'),
    click.option("--html", type=_FILE, metavar="OUT.html", help="Write a page with the worst answers drawn."),
    click.option("--markdown", type=_FILE, metavar="OUT.md", help="Write the tables as Markdown."),
)  # fmt: skip


def _with(options: Sequence[_Decorator]) -> _Decorator:
    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


@dataclass(frozen=True)
class Request:
    """The command line of `accuracy`."""

    files: tuple[Path, ...]
    benchmark: str
    data: Path | None
    images: Path | None
    drawn: int | None
    tasks: tuple[str, ...]
    limit: int | None
    model: str | None
    backend: str
    family: str | None
    answers: Path | None
    out: Path | None
    shard: tuple[int, int]
    merge: bool
    bare: bool | None
    cot: bool
    upstream_compat: bool
    max_side: int | None
    threads: int
    precision: str
    y_scale: str | None
    other: Path | None
    gates: "tuple[Gate, ...]"
    html: Path | None
    markdown: Path | None

    @property
    def asks(self) -> bool:
        """Whether a model is asked, rather than answers scored that are there."""
        return self.answers is None and not self.merge

    @property
    def source(self) -> str:
        """The model's name as models.open_answerer() takes it."""
        model = self.model or os.environ.get("MIGICIAN_MODEL") or "nano"
        ours = self.backend == "auto" or model.startswith(("transformers:", "http://", "https://"))
        return model if ours else f"transformers:{model}"


# ---- accuracy
@click.command(context_settings=_SETTINGS)
@click.argument("files", nargs=-1, type=_FILE, metavar="[FILE...]")
@click.option("--benchmark", type=click.Choice(["mig", "mibench", "mmiu"]), default="mig", show_default=True,
              help="Whose questions they are.")  # fmt: skip
@_with(_QUESTIONS)
@click.option("--model", metavar="M", help="A .mig file, a checkpoint folder, a hub id, nano, http://HOST:PORT#NAME. "
              "[MIGICIAN_MODEL, nano]")  # fmt: skip
@click.option("--backend", type=click.Choice(["auto", "transformers"]), default="auto", show_default=True,
              help="What computes; auto: this runtime wherever it serves the model.")  # fmt: skip
@click.option("--family", metavar="NAME", help="How the model is asked: migician, qwen2_vl, ... [by the model's name]")
@click.option("--answers", type=_FILE, metavar="FILE",
              help='Score these answers, no model: lines of {"index": 0, "response": "..."}.')  # fmt: skip
@click.option(
    "--out", type=_FILE, metavar="FILE", help="Keep the answers as JSON lines; what is there is not asked again."
)
@click.option("--shard", callback=_shard, metavar="I/N", help="Ask only the I-th of N parts, I from 0.")
@click.option("--merge", is_flag=True, help="Score the answers of all FILEs given, parts of one run; --out joins them.")
@click.option("--bare/--with-format", default=None, help="Ask without or with the published request for a format. "
              "[--drawn: without, which is what nano learnt; --data: with]")  # fmt: skip
@click.option("--cot", is_flag=True, help="Ask in two steps: what it is, then where it is.")
@click.option("--upstream-compat", is_flag=True, help="Keep the bugs of the published scripts.")
@click.option("--max-side", type=_COUNT, metavar="N", help="Shrink pictures first until no side is longer.")
@click.option("--threads", type=click.IntRange(0, 1024), default=0, metavar="N", help="Threads. [0: one per core]")
@click.option("--precision", type=click.Choice(["auto", "fp32"]), default="auto", help="Arithmetic. [auto]")
@click.option("--compare", "other", type=_FILE, metavar="OTHER", help="Answers of another run to compare with, as A.")
@_with(_REPORTS)
def accuracy(**options: Any) -> int:
    """Scores a model, or answers from anywhere, on a grounding benchmark.

    \b
    migician-bench accuracy --drawn 20 --model nano
    migician-bench accuracy --data MIG_data.json --model migician.mig --out answers.jsonl
    migician-bench accuracy --data MIG_data.json --answers theirs.jsonl --compare answers.jsonl --gate "AVE drop<=1.0"
    migician-bench accuracy --data MIG_data.json --merge part0.jsonl part1.jsonl --out answers.jsonl

    Tables and flips go to stdout; its last line is one JSON object: accuracies in percent under the published y-scaling
    ("tasks") and without it ("tasks_none").
    """
    request = Request(**options)
    _check(request)
    if request.benchmark != "mig":
        return _other_benchmark(request)
    from .compare import check_gates
    from .data import read_answers

    with _questions(request) as (questions, chosen):
        check_gates(request.gates, {q.task for q in chosen})
        other = None if request.other is None else read_answers(request.other, questions)
        answers, run = _answers(request, questions, chosen)
        _tell_missing(answers, run.asked)
        return _conclude(request, questions, run, answers, other)


def _check(request: Request) -> None:
    """Refuses options that do not go together."""
    _check_source(request.data, request.drawn, request.images)
    if request.merge != bool(request.files):
        hint = (
            "name the files to join" if request.merge else f"{request.files[0]}: what is it? add --merge to join files"
        )
        raise click.UsageError(f"{hint}.")
    if request.merge and request.answers is not None:
        raise click.UsageError("--answers and --merge both bring answers; give one.")
    if not request.asks:
        asking = {
            "--model": request.model, "--bare": request.bare, "--cot": request.cot, "--shard": request.shard != (0, 1),
            "--max-side": request.max_side, "--threads": request.threads,
        }  # fmt: skip
        if extra := [name for name, value in asking.items() if value]:
            raise click.UsageError(f"{', '.join(extra)}: no model is asked with --answers or --merge.")
    if request.answers is not None and request.out is not None:
        raise click.UsageError("--out keeps answers of a model or of --merge; --answers has its own file.")
    if request.cot and request.bare:
        raise click.UsageError("--bare goes with questions asked at once; --cot has its own texts.")
    if request.upstream_compat and not request.cot and request.benchmark == "mig":
        raise click.UsageError("--upstream-compat goes with --cot or another --benchmark.")
    if any(gate.drop for gate in request.gates) and request.other is None:
        raise click.UsageError("a gate on a drop needs --compare OTHER to drop from.")


def _check_source(data: Path | None, drawn: int | None, images: Path | None) -> None:
    if (data is None) == (drawn is None):
        raise click.UsageError("give --data FILE, the benchmark's questions, or --drawn N.")
    if drawn is not None and images is not None:
        raise click.UsageError("--images goes with --data; drawn questions bring their pictures.")


@contextmanager
def _questions(source: "Request | _Pair") -> "Iterator[tuple[list[Question], list[Question]]]":
    """Reads or draws the questions: all of them, and those chosen. Drawn pictures last as long as the context."""
    from .data import read_mig_bench, select

    with tempfile.TemporaryDirectory(prefix="migician-drawn-") as folder:
        if source.data is not None:
            questions = read_mig_bench(source.data, source.images)
        else:
            from ...calib.scenes.mig_bench import write_mig_bench

            click.echo("drawing the questions", err=True)
            questions = read_mig_bench(write_mig_bench(Path(folder) / "drawn", source.drawn or 1))
        yield questions, select(questions, tasks=source.tasks, limit=source.limit)


# ---- the sibling benchmarks
def _other_benchmark(request: Request) -> int:
    """Asks MIBench's or MMIU's questions, multiple choice."""
    if request.data is None:
        raise click.UsageError(f"--benchmark {request.benchmark} needs --data; it has no drawn questions.")
    own: dict[str, Any] = {
        "--answers": request.answers,
        "--merge": request.merge,
        "--out": request.out,
        "--tasks": request.tasks,
        "--limit": request.limit,
        "--cot": request.cot,
        "--bare": request.bare is not None,
        "--y-scale": request.y_scale,
        "--compare": request.other,
        "--gate": request.gates,
        "--html": request.html,
        "--markdown": request.markdown,
        "--shard": request.shard != (0, 1),
    }
    if extra := [name for name, value in own.items() if value]:
        raise click.UsageError(f"{', '.join(extra)}: only for --benchmark mig, whose answers are boxes.")
    if request.benchmark == "mibench":
        from .mibench import evaluate
    else:
        from .mmiu import evaluate
    root = request.images or (request.data if request.data.is_dir() else request.data.parent)
    lines = _Lines()
    start = time.perf_counter()
    with closing(_open(request)) as answerer:
        line = evaluate(
            answerer,
            request.data,
            root,
            upstream_compat=request.upstream_compat,
            progress=lambda done, total: lines.show(done, total, time.perf_counter() - start),
        )
    for task, figures in line["tasks"].items():
        click.echo(f"{task:36} {figures['questions']:6} {figures['accuracy']:7.2f}")
    click.echo(f"{'mean of the tasks':36} {line['questions']:6} {line['average']:7.2f}")
    return _end(line, ())


@dataclass(frozen=True)
class _Run:
    """What was asked of whom. asked: the questions scored.   missing: pictures that are not there."""

    name: str
    y_scale: str
    asked: "Sequence[Question]"
    missing: Sequence[Path] = ()
    facts: Mapping[str, str] | None = None


def _answers(
    request: Request, questions: "Sequence[Question]", chosen: "Sequence[Question]"
) -> tuple[dict[int, str], _Run]:
    """Asks the model, or reads the answers that are there."""
    from .data import read_answers

    if request.asks:
        return _ask(request, questions, chosen)
    if request.merge:
        answers = _merge(request, questions)
        y_scale = request.y_scale or _rule_of(request.files[0], request.family)
        return answers, _Run(request.out.stem if request.out else "merged", y_scale, chosen)
    assert request.answers is not None
    answers = read_answers(request.answers, questions)
    y_scale = request.y_scale or _rule_of(request.answers, request.family)
    return answers, _Run(request.answers.stem, y_scale, chosen)


def _y_scale(family: str, *, cot: bool) -> str:
    from .families import find

    return "published" if find(family).y_scaled and not cot else "none"


def _label(model: str, family: str, request: Request, mode: str, data: str) -> str:
    """What tells one run's answers from another's; _rule_of() reads it."""
    name = Path(model).name if os.path.exists(model) else model
    return f"{name} {family} {mode} {request.precision} side={request.max_side or 'native'} data={data}"


def _rule_of(path: Path, family: str | None) -> str:
    """The y-scaling that a file's answers are published with: by the family named, else by that in its lines' label."""
    from .data import read_lines
    from .families import FAMILIES

    words = next((str(line["run"]).rsplit(" ", 5) for line in read_lines(path, torn=True) if "run" in line), [])
    known, mode = words[1:3] if len(words) == 6 and words[1] in FAMILIES else ("migician", "direct")
    return _y_scale(family or known, cot=mode.startswith("cot"))


def _merge(request: Request, questions: "Sequence[Question]") -> dict[int, str]:
    """Joins the parts of one run."""
    from .data import picture_order, read_lines, unique_answers

    files = [(path, read_lines(path, torn=True)) for path in request.files]
    labels = {line["run"]: path for path, lines in files for line in lines if "run" in line}
    if len(labels) > 1:
        (one, first), (two, second), *_ = labels.items()
        raise MigicianError(f"{first} is of {one}, {second} of {two}; merge parts of one run only")
    answers = unique_answers(files, questions)
    if request.out is not None:
        lines = {line["index"]: line for _, part in files for line in part if "error" not in line}
        order = [q.index for group in picture_order(questions) for q in group if q.index in lines]
        text = "".join(json.dumps(lines[index], ensure_ascii=False) + "\n" for index in order)
        _write(request.out, text)
        click.echo(f"{len(order)} answers in {request.out}", err=True)
    return answers


def _write(path: Path, text: str) -> None:
    from ...runtime.report.page import write_page

    write_page(path, text)


def _ask(
    request: Request, questions: "Sequence[Question]", chosen: "Sequence[Question]"
) -> tuple[dict[int, str], _Run]:
    from .data import fingerprint, missing_pictures
    from .runner import run, shard_of

    mine = shard_of(chosen, request.shard)
    missing = missing_pictures(mine)
    without = {index for indices in missing.values() for index in indices}
    if len(without) == len(mine):
        first = next(iter(missing))
        raise MigicianError(f"{first}: no such picture, nor any other that is needed; point --images at their root")
    _tell_missing_pictures(missing, len(without))
    with closing(_open(request)) as answerer:
        way, mode = _way(request)
        label = _label(request.source, answerer.family, request, mode, fingerprint(questions))
        able = [q for q in mine if q.index not in without]
        with _progress(len(able)) as progress, _kept(request.out):
            lines = run(able, answerer, request.out, ask=way, label=label, progress=progress)
        y_scale = request.y_scale or _y_scale(answerer.family, cot=request.cot)
        facts = _facts(request, answerer, mode, lines)
        result = _Run(answerer.name, y_scale, sorted(mine, key=lambda q: q.index), list(missing), facts)
    return {line["index"]: line["response"] for line in lines if "error" not in line}, result


def _open(request: Request) -> "Answerer":
    from .models import open_answerer

    return open_answerer(
        request.source,
        family=request.family,
        max_side=request.max_side,
        threads=request.threads,
        precision=request.precision,
    )


def _way(request: Request) -> "tuple[Ask, str]":
    """How questions are put, and what that is called."""
    if request.cot:
        from .cot import ask as ask_twice

        mode = "cot-upstream" if request.upstream_compat else "cot"
        return partial(ask_twice, upstream_compat=request.upstream_compat), mode
    if request.bare or (request.bare is None and request.drawn is not None):
        return _ask_bare, "bare"
    from .families import ask

    return ask, "direct"


def _ask_bare(question: "Question", answerer: "Answerer") -> "Reply":
    """Puts a question as it stands: an Ask of the runner."""
    from .families import find, render, scored

    family = find(answerer.family)
    images = question.images[:1] if family.first_only else question.images
    response = answerer.answer(images, render(family, question.question, len(images)), family.new_tokens)
    return scored(family, answerer, images, question.target, response)


def _facts(request: Request, answerer: "Answerer", mode: str, lines: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What a report says of how the answers were made."""
    seconds = [line["seconds"] for line in lines if isinstance(line.get("seconds"), (int, float))]
    facts = {"asked": f"{mode}, as {answerer.family}", "pictures": f"side at most {request.max_side or 'native'}"}
    if request.precision != "auto":
        facts["precision"] = request.precision
    if seconds:
        facts["time"] = f"{sum(seconds) / len(seconds):.2f} s an answer"
    return {**facts, "date": date.today().isoformat()}


# ---- the story on stderr
def _tell_missing_pictures(missing: Mapping[Path, Sequence[int]], questions: int) -> None:
    """Lists pictures that are not there."""
    if missing:
        click.echo(f"{len(missing)} pictures missing; {questions} questions not asked, they count as wrong:", err=True)
        for path in missing:
            click.echo(f"  {path}", err=True)


def _tell_missing(answers: Mapping[int, str], asked: "Sequence[Question]") -> None:
    """Names the questions without an answer, as ranges."""
    indices = sorted(q.index for q in asked if q.index not in answers)
    if not indices:
        return
    ranges: list[list[int]] = []
    for index in indices:
        if ranges and index == ranges[-1][1] + 1:
            ranges[-1][1] = index
        else:
            ranges.append([index, index])
    words = [f"{low}" if low == high else f"{low}-{high}" for low, high in ranges]
    click.echo(
        f"{len(indices)} of {len(asked)} questions without an answer, counted as wrong: {', '.join(words)}", err=True
    )


def _time(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 60 else f"{minutes} min" if minutes < 90 else f"{minutes / 60:.1f} h"


@contextmanager
def _progress(total: int) -> "Iterator[Callable[[Report], None]]":
    """Shows how far a run is and what is left: a bar on a terminal, elsewhere a line every half minute."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    except ImportError:
        yield _Lines()
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines()
        return
    columns = TextColumn("{task.fields[task]}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[left]}")
    with Progress(*columns, console=console) as bars:
        bar = bars.add_task("", total=total, task="", left="")

        def show(report: "Report") -> None:
            left = f"{_time(report.left_s)} left" if report.left_s else ""
            bars.update(bar, completed=report.done, task=report.question.task, left=left)
            if report.error:
                bars.console.print(_not_asked(report), markup=False, highlight=False)

        yield show


@contextmanager
def _kept(out: Path | None) -> Iterator[None]:
    """Says of an interrupted run how it goes on."""
    try:
        yield
    except KeyboardInterrupt:
        if out is not None:
            click.echo(f"the answers so far are in {out}; the same command goes on from there", err=True)
        raise


def _not_asked(report: "Report") -> str:
    return f"question {report.question.index} not asked, try again later: {report.error}"


class _Lines:
    """Progress where stderr is no terminal."""

    EVERY_S = 30.0

    def __init__(self) -> None:
        self._last = 0.0

    def __call__(self, report: "Report") -> None:
        if report.error:
            click.echo(_not_asked(report), err=True)
        self.show(report.done, report.total, report.elapsed_s, report.left_s)

    def show(self, done: int, total: int, elapsed_s: float, left_s: float | None = None) -> None:
        """Says where a run is, if it is time to.   left_s: None takes all answers for alike."""
        if elapsed_s - self._last < self.EVERY_S and done < total:
            return
        self._last = elapsed_s
        left_s = elapsed_s / done * (total - done) if left_s is None else left_s
        left = f", {_time(left_s)} left" if done < total else ""
        click.echo(f"{done}/{total} answers, {_time(elapsed_s)}{left}", err=True)


# ---- results
def _conclude(
    request: Request,
    questions: "Sequence[Question]",
    run: _Run,
    answers: Mapping[int, str],
    other: Mapping[int, str] | None,
) -> int:
    """Prints tables, flips and the JSON line, writes reports; returns the exit status."""
    from .compare import failed_gates
    from .report import is_published
    from .scoring import score
    from .tables import result_table, summary

    results = {rule: score(run.asked, answers, y_scale=rule) for rule in ("published", "none")}
    _say(result_table(results, run.y_scale, published_data=is_published(questions)))
    comparison = None if other is None else _compare(request, run.asked, other, answers, run.y_scale)
    failed = failed_gates(request.gates, results[run.y_scale], comparison)
    line: dict[str, Any] = summary(results)
    line.update(model=run.name, y_scale=run.y_scale, missing_pictures=len(run.missing), failed_gates=failed)
    if comparison is not None:
        line["compare"] = comparison.json()
    _reports(request, run, questions, answers, request.other, other)
    return _end(line, failed)


def _say(lines: Sequence[str]) -> None:
    click.echo("\n".join(lines) + "\n")


def _end(line: Mapping[str, Any], failed: Sequence[str]) -> int:
    click.echo(json.dumps(line, allow_nan=False))
    for text in failed:
        click.echo(f"migician-bench: {text}", err=True)
    return 1 if failed else 0


def _compare(
    source: "Request | _Pair", asked: "Sequence[Question]", a: Mapping[int, str], b: Mapping[int, str], rule: str
) -> "Comparison":
    """Pairs two runs and prints what changed."""
    from .compare import compare as paired
    from .scoring import score
    from .tables import comparison_table, flip_lines

    comparison = paired(asked, score(asked, a, y_scale=rule), score(asked, b, y_scale=rule))
    # drawn pictures are gone with this command: their names say which ones they were
    below = None if source.data is not None else asked[0].images[0].parent
    _say([*comparison_table(comparison), *flip_lines(comparison, below=below)])
    return comparison


def _reports(
    request: "Request | _Pair",
    run: _Run,
    questions: "Sequence[Question]",
    answers: Mapping[int, str],
    other_path: Path | None,
    other: Mapping[int, str] | None,
) -> None:
    """Writes the page and the Markdown tables that are asked for."""
    if request.html is None and request.markdown is None:
        return
    from .report import Run, is_published, make_report

    published = is_published(questions)
    title = "MIG-Bench" if published else "drawn questions" if request.data is None else request.data.stem
    baseline = None if other is None or other_path is None else Run(other_path.stem, other, run.y_scale)
    ours = Run(run.name, answers, run.y_scale)
    report = make_report(title, run.asked, [ours], baseline=baseline, published_data=published, facts=run.facts)
    if request.html is not None:
        from .gallery import write_html

        write_html(request.html, report)
    if request.markdown is not None:
        from .markdown import write_markdown

        write_markdown(request.markdown, report)


# ---- compare
@dataclass(frozen=True)
class _Pair:
    """The command line of `compare`."""

    a: Path
    b: Path
    data: Path | None
    images: Path | None
    drawn: int | None
    tasks: tuple[str, ...]
    limit: int | None
    y_scale: str | None
    gates: "tuple[Gate, ...]"
    html: Path | None
    markdown: Path | None


@click.command(context_settings=_SETTINGS)
@click.argument("a", type=_FILE)
@click.argument("b", type=_FILE)
@_with(_QUESTIONS)
@_with(_REPORTS)
def compare(**options: Any) -> int:
    """Compares B with A, the baseline, question by question; both are files of answers that `accuracy --out` wrote.

    \b
    migician-bench compare bf16.jsonl int4.jsonl --data MIG_data.json --gate "AVE drop<=1.0"

    Questions that neither file answers are left out; one that only one of them answers is wrong in the other. The last
    line on stdout is one JSON object: changes in percent points with 95 % intervals, and the indices of the flips.
    """
    from .compare import check_gates, failed_gates
    from .data import read_answers
    from .scoring import score

    pair = _Pair(**options)
    _check_source(pair.data, pair.drawn, pair.images)
    with _questions(pair) as (questions, chosen):
        check_gates(pair.gates, {q.task for q in chosen})
        a, b = (read_answers(path, questions) for path in (pair.a, pair.b))
        asked = [q for q in chosen if q.index in a or q.index in b]
        if not asked:
            raise MigicianError(f"{pair.a}, {pair.b}: no answers to these questions; give the data that was asked")
        rule = pair.y_scale or _rule_of(pair.b, None)
        comparison = _compare(pair, asked, a, b, rule)
        failed = failed_gates(pair.gates, score(asked, b, y_scale=rule), comparison)
        line = {"a": str(pair.a), "b": str(pair.b), "y_scale": rule, **comparison.json(), "failed_gates": failed}
        line["unasked"] = len(chosen) - len(asked)
        _reports(pair, _Run(pair.b.stem, rule, asked), questions, b, pair.a, a)
        return _end(line, failed)
