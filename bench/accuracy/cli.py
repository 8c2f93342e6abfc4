"""migician-bench accuracy, compare and sweep: what an answer is worth, and what one run is worth beside another."""

import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...runtime.backends import BACKENDS
from ...runtime.errors import MigicianError
from .options import ACCURACY, COMPARE, SETTINGS, Pair, Request, check, check_source, with_options
from .story import Lines, kept, progress, tell_missing, tell_missing_pictures

if TYPE_CHECKING:
    from ..engines import Engine
    from .compare import Comparison
    from .data import Question
    from .runner import Ask, Reply

__all__ = ["accuracy", "compare"]


def __getattr__(name: str) -> Any:
    if name == "sweep":
        from .sweep import sweep

        return sweep
    raise AttributeError(name)


# ---- accuracy
@click.command(context_settings=SETTINGS)
@with_options(ACCURACY)
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
    check(request)
    if request.benchmark != "mig":
        return _other_benchmark(request)
    from .compare import check_gates
    from .data import read_answers

    with _questions(request) as (questions, chosen):
        check_gates(request.gates, {q.task for q in chosen})
        other = None if request.other is None else read_answers(request.other, questions)
        answers, run = _answers(request, questions, chosen)
        tell_missing(answers, run.asked)
        return _conclude(request, questions, run, answers, other)


@contextmanager
def _questions(source: "Request | Pair") -> "Iterator[tuple[list[Question], list[Question]]]":
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
    lines = Lines()
    start = time.perf_counter()
    with closing(_open(request)) as engine:
        line = evaluate(
            engine,
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


def _rule_of(path: Path, family: str | None) -> str:
    """The y-scaling that a file's answers are published with: by the family named, else by what its lines say."""
    from .data import read_lines
    from .families import FAMILIES
    from .runs import family_and_mode

    told = next((family_and_mode(line["run"]) for line in read_lines(path, torn=True) if "run" in line), None)
    known, mode = told if told and told[0] in FAMILIES else ("migician", "direct")
    return _y_scale(family or known, cot=mode.startswith("cot"))


def _merge(request: Request, questions: "Sequence[Question]") -> dict[int, str]:
    """Joins the parts of one run."""
    from .data import picture_order, read_lines, unique_answers
    from .runs import same_run, words

    files = [(path, read_lines(path, torn=True)) for path in request.files]
    runs = [(line["run"], path) for path, lines in files for line in lines if "run" in line]
    for run, path in runs[1:]:
        if not same_run(run, runs[0][0]):
            one, first = runs[0]
            raise MigicianError(f"{first} is of {words(one)}, {path} of {words(run)}; merge parts of one run only")
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
    from .runs import run_of

    mine = shard_of(chosen, request.shard)
    missing = missing_pictures(mine)
    without = {index for indices in missing.values() for index in indices}
    if len(without) == len(mine):
        first = next(iter(missing))
        raise MigicianError(f"{first}: no such picture, nor any other that is needed; point --images at their root")
    tell_missing_pictures(missing, len(without))
    with closing(_open(request)) as engine:
        way, mode = _way(request)
        label = run_of(
            request.source,
            engine.family,
            mode=mode,
            precision=request.precision,
            max_side=request.max_side,
            data=fingerprint(questions),
            backend=engine.versions.get("backend", "auto"),
        )
        able = [q for q in mine if q.index not in without]
        with progress(len(able)) as show, kept(request.out):
            lines = run(able, engine, request.out, ask=way, label=label, progress=show)
        y_scale = request.y_scale or _y_scale(engine.family, cot=request.cot)
        facts = _facts(request, engine, mode, lines)
        result = _Run(engine.name, y_scale, sorted(mine, key=lambda q: q.index), list(missing), facts)
    return {line["index"]: line["response"] for line in lines if "error" not in line}, result


def _open(request: Request) -> "Engine":
    from .models import open_answerer

    return open_answerer(
        request.source,
        family=request.family,
        max_side=request.max_side,
        threads=request.threads,
        precision=request.precision,
        backend=request.backend if request.backend in BACKENDS else "auto",
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


def _ask_bare(question: "Question", engine: "Engine") -> "Reply":
    """Puts a question as it stands: an Ask of the runner."""
    from .families import find, render, scored

    family = find(engine.family)
    images = question.images[:1] if family.first_only else question.images
    response = engine.answer(images, render(family, question.question, len(images)), family.new_tokens).text
    return scored(family, engine, images, question.target, response)


def _facts(request: Request, engine: "Engine", mode: str, lines: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What a report says of how the answers were made."""
    seconds = [line["seconds"] for line in lines if isinstance(line.get("seconds"), (int, float))]
    facts = {"asked": f"{mode}, as {engine.family}", "pictures": f"side at most {request.max_side or 'native'}"}
    if request.backend in BACKENDS:
        facts["backend"] = request.backend
    if request.precision != "auto":
        facts["precision"] = request.precision
    if seconds:
        facts["time"] = f"{sum(seconds) / len(seconds):.2f} s an answer"
    return {**facts, "date": date.today().isoformat()}


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
    source: "Request | Pair", asked: "Sequence[Question]", a: Mapping[int, str], b: Mapping[int, str], rule: str
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
    request: "Request | Pair",
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
@click.command(context_settings=SETTINGS)
@with_options(COMPARE)
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

    pair = Pair(**options)
    check_source(pair.data, pair.drawn, pair.images)
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
