"""What `accuracy` tells on stderr: pictures and answers that are missing, and how far it is."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from .data import Question
    from .runner import Report

__all__ = ["Lines", "kept", "progress", "tell_missing", "tell_missing_pictures"]


def tell_missing_pictures(missing: Mapping[Path, Sequence[int]], questions: int) -> None:
    """Lists pictures that are not there."""
    if missing:
        click.echo(f"{len(missing)} pictures missing; {questions} questions not asked, they count as wrong:", err=True)
        for path in missing:
            click.echo(f"  {path}", err=True)


def tell_missing(answers: Mapping[int, str], asked: "Sequence[Question]") -> None:
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
def progress(total: int) -> "Iterator[Callable[[Report], None]]":
    """Shows how far a run is and what is left: a bar on a terminal, elsewhere a line every half minute."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    except ImportError:
        yield Lines()
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        yield Lines()
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
def kept(out: Path | None) -> Iterator[None]:
    """Says of an interrupted run how it goes on."""
    try:
        yield
    except KeyboardInterrupt:
        if out is not None:
            click.echo(f"the answers so far are in {out}; the same command goes on from there", err=True)
        raise


def _not_asked(report: "Report") -> str:
    return f"question {report.question.index} not asked, try again later: {report.error}"


class Lines:
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
