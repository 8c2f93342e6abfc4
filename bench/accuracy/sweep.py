"""migician-bench sweep: what a smaller picture or a smaller model costs in accuracy and brings in time and memory.

Every pair of a model file and a picture size is measured in a process of its own, one after the other, on the same
questions: so peak memory is that pair's, and the times are not mixed. Each question's pictures are encoded anew.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import MappingProxyType
from typing import Any

import click

from ...runtime.errors import MigicianError
from ..engines import PHASES, Answered, Picture, any_length_only
from .data import Question, fingerprint, missing_pictures, read_lines, read_mig_bench, select
from .protocol import direct_prompt
from .runner import Reply
from .scoring import score

__all__ = ["Setting", "measure", "row", "sweep"]

# The child imports from where its parent does, whatever the parent did to its path
_CHILD = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from {module} import _serve; _serve(sys.argv[2])"

Row = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """One row of the table.   model: as migician-run takes it.   max_side: in pixels, None: pictures as they are."""

    model: str
    max_side: int | None

    @property
    def name(self) -> str:
        """The model's short name: a file's without its folder and ending."""
        return Path(self.model).name.removesuffix(".mig") if os.path.exists(self.model) else self.model

    @property
    def side(self) -> str:
        return str(self.max_side or "native")


@dataclass(frozen=True)
class Source:
    """Where the questions are, which are asked, and how.

    bare: without the published request for a format.   threads: 0 is one per core.
    min_pixels: the least area of a resized picture, None for the model's own.
    """

    data: Path
    images: Path | None
    tasks: tuple[str, ...]
    limit: int | None
    bare: bool = False
    threads: int = 0
    min_pixels: int | None = None

    def questions(self) -> list[Question]:
        """Reads them, without those whose pictures are not there."""
        chosen = select(read_mig_bench(self.data, self.images), tasks=self.tasks, limit=self.limit)
        without = {index for indices in missing_pictures(chosen).values() for index in indices}
        able = [q for q in chosen if q.index not in without]
        if not able:
            raise MigicianError(f"{self.data}: none of the questions' pictures is there; point --images at their root")
        return able


# ---- one setting, in a process of its own
class _Timed:
    """This runtime in one setting, keeping what the last answer took: an Engine of engines.py."""

    versions: Mapping[str, str] = MappingProxyType({})

    def __init__(self, setting: Setting, source: Source) -> None:
        from ...runtime.model import load
        from .families import detect

        # without a cache every question pays for its pictures
        self._model = load(setting.model, threads=source.threads, min_pixels=source.min_pixels, cache_bytes=0)
        self._max_side, self._bare = setting.max_side, source.bare
        self.name = setting.name
        found = detect(setting.model) or detect(self._model.name)
        self.family = found.name if found else "qwen2_vl"
        self.stats: dict[str, float] = {}

    def answer(self, images: Sequence[Picture], text: str, max_new_tokens: int, *, exact: bool = False) -> Answered:
        from .models import times_of

        any_length_only(self.name, exact)
        answer = self._model.ground(list(images), text, max_new_tokens=max_new_tokens, max_side=self._max_side)
        self.stats = {**answer.stats, "prompt_tokens": answer.prompt_tokens}
        return Answered(answer.text, times_of(answer))

    def ask(self, question: Question, _: Any) -> Reply:
        """An Ask of the runner whose lines have "stats"."""
        from .protocol import MAX_NEW_TOKENS

        text = question.question if self._bare else direct_prompt(question.question)
        response = self.answer(question.images, text, MAX_NEW_TOKENS).text
        return Reply(response, {"stats": self.stats})

    def close(self) -> None:
        self._model.close()


def _serve(spec: str) -> None:
    """The child: asks one setting's questions and says how far it is, one JSON object a line."""
    from .runner import run

    given = json.loads(spec)
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever else is printed is no result

    def say(**event: Any) -> None:
        out.write(json.dumps(event) + "\n")
        out.flush()

    places = {key: Path(given["source"][key]) if given["source"][key] else None for key in ("data", "images")}
    source = Source(**{**given["source"], **places, "tasks": tuple(given["source"]["tasks"])})
    setting = Setting(**given["setting"])
    try:
        questions, timed = source.questions(), _Timed(setting, source)
        say(family=timed.family)
        label = {**given["label"], "data": fingerprint(questions)}
        run(
            questions, timed, Path(given["out"]), ask=timed.ask, label=label,
            progress=lambda report: say(done=report.done, total=report.total),
        )  # fmt: skip
        timed.close()
    except MigicianError as error:
        say(failed=str(error))
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def measure(
    setting: Setting, source: Source, answers: Path, progress: Callable[[int, int], None] | None = None
) -> tuple[list[dict[str, Any]], str]:
    """Asks one setting's questions in a child process; returns (lines with "response" and "stats", family).

    answers: the file of JSON lines; what it has already is not asked again.   progress: answers there, of how many.
    Raises MigicianError for what the child refused, or when it died.
    """
    label = {"model": setting.name, "max_side": setting.max_side}
    label |= {key: getattr(source, key) for key in ("bare", "threads", "min_pixels")}
    plain = {**vars(source), "data": str(source.data), "images": str(source.images) if source.images else None}
    spec = {"setting": vars(setting), "source": plain, "out": str(answers), "label": label}
    command = [sys.executable, "-c", _CHILD.format(module=__name__), json.dumps(sys.path), json.dumps(spec)]
    family, failed = "", ""
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None
            for line in child.stdout:
                event = json.loads(line)
                family, failed = event.get("family", family), event.get("failed", failed)
                if progress and "done" in event:
                    progress(event["done"], event["total"])
        except BaseException:
            child.kill()
            raise
    if child.returncode:
        died = (
            f"{setting.name} at {setting.side}: its process ended with status {child.returncode}; see its message above"
        )
        raise MigicianError(failed or died)
    return read_lines(answers, torn=True), family


def row(setting: Setting, questions: Sequence[Question], lines: Sequence[Mapping[str, Any]], family: str) -> Row:
    """Turns a setting's answers into figures.

    AVE and its interval in percent by the family's rule of y-scaling; times are medians in ms of one question, the
    peak is the largest.   questions: those asked.
    """
    from .families import find

    y_scale = "published" if find(family).y_scaled else "none"
    wanted = {q.index for q in questions}
    kept = [line for line in lines if line["index"] in wanted and "error" not in line]
    result = score(questions, {line["index"]: line["response"] for line in kept}, y_scale=y_scale)
    stats = [line["stats"] for line in kept if "stats" in line]
    if not stats:
        raise MigicianError(
            f"{setting.name} at {setting.side}: no question was answered; see the errors in its answers"
        )
    times = {f"{phase}_ms": round(median(s[f"{phase}_ms"] for s in stats), 3) for phase in PHASES}
    total = median(sum(s[f"{phase}_ms"] for phase in PHASES) for s in stats)
    low, high = result.intervals()["AVE"]
    return {
        "model": setting.name,
        "max_side": setting.max_side,
        "y_scale": y_scale,
        "questions": len(questions),
        "unanswered": len(result.missing),
        "ave": round(result.ave(), 4),
        "interval": (round(low, 4), round(high, 4)),
        "iou": round(sum(f.mean_iou for f in result.tasks.values()) / len(result.tasks), 4),
        "no_box": sum(f.unparsed for f in result.tasks.values()),
        **times,
        "total_ms": round(total, 3),
        "new_tokens": median(s["new_tokens"] for s in stats),
        "prompt_tokens": median(s["prompt_tokens"] for s in stats),
        "peak_rss_mb": max(s["peak_rss_mb"] for s in stats),
        "weights_mb": stats[-1]["weights_mb"],
    }


# ---- the command
def _sides(_: click.Context, __: click.Parameter, value: str) -> list[int | None]:
    found: list[int | None] = []
    for word in (w.strip().lower() for w in value.split(",")):
        if not (word == "native" or (word.isdecimal() and int(word) > 0)):
            raise click.BadParameter(f"{word!r}: write pixels or native, as in 336,512,800,native.")
        found.append(None if word == "native" else int(word))
    return list(dict.fromkeys(found))


def _names(_: click.Context, __: click.Parameter, value: str | None) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in (value or "").split(",") if name.strip()))


_FILE = click.Path(path_type=Path, dir_okay=False)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("models", nargs=-1, required=True, metavar="MODEL...")
@click.option("--max-side", "sides", callback=_sides, default="336,512,800,native", show_default=True, metavar="A,B",
              help="Sizes to try: the longer side of a picture in pixels, native as it is.")  # fmt: skip
@click.option("--data", type=_FILE, metavar="FILE", help="The benchmark's questions, as published. [drawn ones]")
@click.option("--images", type=click.Path(path_type=Path), metavar="ROOT",
              help="Where the pictures' paths begin. [the data file's folder]")  # fmt: skip
@click.option("--drawn", type=click.IntRange(1), metavar="N", help="Without --data: N drawn questions per task. [20]")
@click.option("--tasks", callback=_names, metavar="A,B", help="Only questions of these tasks. [all]")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Only the first N questions of each task.")
@click.option("--bare/--with-format", default=None, help="Ask without or with the published request for a format. "
              "[drawn questions: without, which is what nano learnt; --data: with]")  # fmt: skip
@click.option("--min-pixels", type=click.IntRange(1), metavar="N",
              help="Let pictures become this small: a model enlarges smaller ones. [the model's own]")  # fmt: skip
@click.option("--threads", type=click.IntRange(0, 1024), default=0, metavar="N", help="Threads. [0: one per core]")
@click.option("--answers", type=click.Path(path_type=Path, file_okay=False), metavar="DIR",
              help="Keep the answers there; what is there is not asked again.")  # fmt: skip
@click.option("--html", type=_FILE, metavar="OUT.html", help="Write a page with the trade-off drawn.")
@click.option("--markdown", type=_FILE, metavar="OUT.md", help="Write the table as Markdown.")
def sweep(
    models: tuple[str, ...], sides: list[int | None], html: Path | None, markdown: Path | None, **options: Any
) -> None:
    """Accuracy and latency of models over picture sizes: one table, one plot.

    \b
    migician-bench sweep bf16.mig int8.mig int4.mig --data MIG_data.json --limit 20 --html sweep.html
    migician-bench sweep nano --max-side 112,140,168,native --min-pixels 784 --drawn 50

    Each pair runs in a process of its own. The table goes to stdout; its last line is one JSON object.
    """
    if options["data"] is not None and options["drawn"] is not None:
        raise click.UsageError("--data and --drawn both bring questions; give one.")
    if options["data"] is None and options["images"] is not None:
        raise click.UsageError("--images goes with --data; drawn questions bring their pictures.")
    if options["bare"] is None:
        options["bare"] = options["data"] is None
    settings = [Setting(model, side) for model in dict.fromkeys(models) for side in sides]
    if len({(s.name, s.max_side) for s in settings}) < len(settings):
        raise click.UsageError("two models have the same file name; rename one, so that the table can tell them apart.")
    with _source(options) as source, _folder(options["answers"]) as folder:
        questions = source.questions()
        rows = list(_rows(settings, questions, source, folder))
    result = describe(rows, questions, options)
    _conclude(result, html, markdown)


def _conclude(result: Mapping[str, Any], html: Path | None, markdown: Path | None) -> None:
    from ...runtime.report.page import write_page
    from .sweep_page import render_html, render_markdown

    if html is not None:
        write_page(html, render_html(result))
    if markdown is not None:
        write_page(markdown, render_markdown(result))
    click.echo(render_markdown(result))
    click.echo(json.dumps(result))


def describe(rows: Sequence[Row], questions: Sequence[Question], options: Mapping[str, Any]) -> dict[str, Any]:
    """What was measured, on what, where: the JSON line."""
    from ...runtime.machine import machine

    data = options["data"]
    return {
        "benchmark": data.name if data else "drawn benchmark",
        "questions": len(questions),
        "tasks": len({q.task for q in questions}),
        "fingerprint": fingerprint(questions),
        "bare": options["bare"],
        "threads": options["threads"],
        "min_pixels": options["min_pixels"],
        "machine": machine(),
        "rows": [{**r, "best": _unbeaten(r, rows)} for r in rows],
    }


def _unbeaten(one: Row, rows: Sequence[Row]) -> bool:
    """Whether no other setting is at least as fast and as accurate, and better in one of the two."""
    return not any(
        other["total_ms"] <= one["total_ms"]
        and other["ave"] >= one["ave"]
        and (other["total_ms"] < one["total_ms"] or other["ave"] > one["ave"])
        for other in rows
    )


@contextmanager
def _source(options: Mapping[str, Any]) -> Iterator[Source]:
    """The questions; drawn ones last as long as the context."""
    rest = tuple(options[key] for key in ("tasks", "limit", "bare", "threads", "min_pixels"))
    if options["data"] is not None:
        yield Source(options["data"], options["images"], *rest)
        return
    from ...calib.scenes.mig_bench import write_mig_bench

    with tempfile.TemporaryDirectory(prefix="migician-drawn-") as folder:
        click.echo("drawing the questions", err=True)
        yield Source(write_mig_bench(Path(folder) / "drawn", options["drawn"] or 20), None, *rest)


@contextmanager
def _folder(given: Path | None) -> Iterator[Path]:
    """The folder of the answers, kept if it was asked for."""
    if given is None:
        with tempfile.TemporaryDirectory(prefix="migician-sweep-") as folder:
            yield Path(folder)
        return
    try:
        given.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MigicianError(f"{given}: {error.strerror or error}; choose another --answers folder") from None
    yield given


def _rows(settings: Sequence[Setting], questions: Sequence[Question], source: Source, folder: Path) -> Iterator[Row]:
    """Measures one setting after the other, saying so on stderr."""
    for i, setting in enumerate(settings, 1):
        title = f"[{i}/{len(settings)}] {setting.name} at {setting.side}"
        safe = setting.name.replace("/", "--")
        with _shown(title) as progress:
            lines, family = measure(setting, source, folder / f"{safe}-{setting.side}.jsonl", progress)
        found = row(setting, questions, lines, family)
        figures = f"AVE {found['ave']:.1f} %, {found['total_ms']:,.0f} ms a question, {found['peak_rss_mb']:,.0f} MB"
        click.echo(f"{title}: {figures}", err=True)
        yield found


@contextmanager
def _shown(title: str) -> Iterator[Callable[[int, int], None] | None]:
    """A line that counts on a terminal; nothing elsewhere, where every setting has its line when it is done."""
    if not sys.stderr.isatty():
        yield None
        return
    start = time.perf_counter()

    def show(done: int, total: int) -> None:
        left = (time.perf_counter() - start) / done * (total - done)
        click.echo(f"\r\033[K{title}: {done}/{total}, {left:,.0f} s left", err=True, nl=False)

    try:
        yield show
    finally:
        click.echo("\r\033[K", err=True, nl=False)
