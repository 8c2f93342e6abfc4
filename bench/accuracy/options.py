"""The command lines of `accuracy` and `compare`: their options, and which of them go together."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...runtime.backends import BACKENDS

if TYPE_CHECKING:
    from .compare import Gate

__all__ = ["ACCURACY", "COMPARE", "SETTINGS", "Pair", "Request", "check", "check_source", "with_options"]

_COUNT = click.IntRange(1)
_FILE = click.Path(path_type=Path, dir_okay=False)
SETTINGS = {"help_option_names": ["-h", "--help"]}


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
    click.option("--data", type=click.Path(path_type=Path), metavar="FILE",
                 help="The questions, as published; or a dataset of the hub, ORG/NAME."),
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
ACCURACY: tuple[_Decorator, ...] = (
    click.argument("files", nargs=-1, type=_FILE, metavar="[FILE...]"),
    click.option("--benchmark", type=click.Choice(["mig", "mibench", "mmiu"]), default="mig", show_default=True,
                 help="Whose questions they are."),
    *_QUESTIONS,
    click.option("--model", metavar="M",
                 help="A .mig file, a checkpoint folder, a hub id, nano, http://HOST:PORT#NAME. "
                 "[MIGICIAN_MODEL, nano]"),
    click.option("--backend", type=click.Choice(["auto", *BACKENDS, "transformers"]), default="auto", show_default=True,
                 help="What computes; auto: this runtime wherever it serves the model."),
    click.option("--family", metavar="NAME",
                 help="How the model is asked: migician, qwen2_vl, ... [by the model's name]"),
    click.option("--answers", type=_FILE, metavar="FILE",
                 help='Score these answers, no model: lines of {"index": 0, "response": "..."}.'),
    click.option("--out", type=_FILE, metavar="FILE",
                 help="Keep the answers as JSON lines; what is there is not asked again."),
    click.option("--shard", callback=_shard, metavar="I/N", help="Ask only the I-th of N parts, I from 0."),
    click.option("--merge", is_flag=True,
                 help="Score the answers of all FILEs given, parts of one run; --out joins them."),
    click.option("--bare/--with-format", default=None,
                 help="Ask without or with the published request for a format. "
                 "[--drawn: without, which is what nano learnt; --data: with]"),
    click.option("--cot", is_flag=True, help="Ask in two steps: what it is, then where it is."),
    click.option("--upstream-compat", is_flag=True, help="Keep the bugs of the published scripts."),
    click.option("--max-side", type=_COUNT, metavar="N", help="Shrink pictures first until no side is longer."),
    click.option("--threads", type=click.IntRange(0, 1024), default=0, metavar="N", help="Threads. [0: one per core]"),
    click.option("--precision", type=click.Choice(["auto", "fp32"]), default="auto", help="Arithmetic. [auto]"),
    click.option("--compare", "other", type=_FILE, metavar="OTHER",
                 help="Answers of another run to compare with, as A."),
    *_REPORTS,
)  # fmt: skip
COMPARE: tuple[_Decorator, ...] = (
    click.argument("a", type=_FILE), click.argument("b", type=_FILE), *_QUESTIONS, *_REPORTS
)  # fmt: skip


def with_options(options: Sequence[_Decorator]) -> _Decorator:
    """Puts several options on a command, in their order."""

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
        foreign = model.startswith(("transformers:", "http://", "https://"))
        return f"transformers:{model}" if self.backend == "transformers" and not foreign else model


@dataclass(frozen=True)
class Pair:
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


def check(request: Request) -> None:
    """Refuses options that do not go together."""
    check_source(request.data, request.drawn, request.images)
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


def check_source(data: Path | None, drawn: int | None, images: Path | None) -> None:
    if (data is None) == (drawn is None):
        raise click.UsageError("give --data FILE, the benchmark's questions, or --drawn N.")
    if drawn is not None and images is not None:
        raise click.UsageError("--images goes with --data; drawn questions bring their pictures.")
