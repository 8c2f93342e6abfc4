"""migician-calib: chooses calibration samples from a grounding set and writes them as a folder.

stdout carries the folder's path only, stderr the story. Exit status: 0 done, 1 failed (one line on stderr), 2 usage,
130 interrupted.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from ..runtime.command import run_command, version_option
from ..runtime.errors import MigicianError

if TYPE_CHECKING:
    from .records import Tally

__all__ = ["command", "main"]

Moves = Callable[[int], None] | None  # moves a progress bar to what is done

_MAX_SEED = (1 << 63) - 1


@dataclass(frozen=True)
class Request:
    """The command line, checked as far as that goes without the source."""

    source: str
    out: Path
    samples: int
    seed: int
    tasks: tuple[str, ...]
    images: Path | None
    licence: str | None


def _split(_: click.Context, __: click.Parameter, value: str | None) -> tuple[str, ...]:
    if value is None:
        return ()
    from .records import task_name

    names = tuple(dict.fromkeys(task_name(name) for name in value.split(",") if name.strip()))
    if not names:
        raise click.BadParameter(f"{value!r} names no task.")
    return names


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("source")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), metavar="DIR", help="The folder to write.")
@click.option("--samples", type=click.IntRange(1, 1_000_000), default=256, show_default=True, metavar="N",
              help="How many records to choose.")  # fmt: skip
@click.option("--seed", type=click.IntRange(0, _MAX_SEED), default=0, show_default=True, metavar="N",
              help="Which ones: the same seed and source choose the same.")  # fmt: skip
@click.option("--tasks", callback=_split, metavar="A,B", help="Only records of these types. [all]")
@click.option("--images", type=click.Path(path_type=Path), metavar="ROOT", help="Where the pictures' paths begin.")
@click.option("--licence", metavar="TEXT", help="What the manifest says of the data's licence.")
@version_option
def command(**options: Any) -> None:
    """Chooses records of SOURCE evenly over tasks, numbers of pictures and resolutions, and writes them to DIR.

    SOURCE is a JSON file in MGrounding-630k's layout (an array, or one record a line), a folder of such files, a
    dataset of the hub (ORG/NAME, ORG/NAME@REVISION), or nano: scenes drawn by this package. Pictures may lie in zip
    files beside the JSON; those of the hub come as they are needed. Broken records are left out and counted.

    \b
    migician-calib MGrounding-630k.json -o calib --images /data --licence "see the data's page"
    migician-calib MGrounding-630k/ -o calib --samples 512 --tasks object_tracking,group_grounding
    migician-calib Michael4933/MGrounding-630k -o calib --tasks common_object
    migician-calib nano -o calib-nano --samples 64
    """
    request = Request(**options)
    if request.source == "nano":
        _write_nano(request)
    else:
        _write_source(request)
    click.echo(str(request.out))


def _write_nano(request: Request) -> None:
    from .scenes import TASKS
    from .scenes.stream import HELD_OUT_SEED
    from .store import NANO_LICENCE, check_target, nano_samples, write_calibration

    if unknown := sorted(set(request.tasks) - set(TASKS)):
        raise click.UsageError(f"--tasks {','.join(unknown)}: nano has {', '.join(TASKS)}.")
    if request.seed >= HELD_OUT_SEED:
        raise click.UsageError(f"--seed {request.seed}: nano's seeds from {HELD_OUT_SEED} on are held out.")
    if request.images is not None or request.licence is not None:
        raise click.UsageError("--images and --licence do not go with nano.")
    check_target(request.out)
    drawn = nano_samples(request.samples, request.seed, tasks=request.tasks or TASKS)
    with _bars() as bar:
        moves = bar("writing", request.samples)
        write_calibration(request.out, drawn, source="nano", licence=NANO_LICENCE, seed=request.seed, progress=moves)
    _summary(request.out)


def _write_source(request: Request) -> None:
    from .records import Source
    from .sample import draw
    from .store import check_target, write_calibration

    check_target(request.out)
    source = Source(request.source, images=request.images)
    with _bars() as bar:
        reading, checking = bar(f"reading {source.name}", source.bytes), bar("checking pictures", request.samples)
        drawn = draw(source, request.samples, request.seed, tasks=request.tasks, reading=reading, checking=checking)
        tally, found = drawn.tally, drawn.samples
        if not found:
            raise MigicianError(_why_empty(request, tally))
        write_calibration(
            request.out,
            found,
            source=source.name,
            licence=request.licence or "not stated",
            seed=request.seed,
            skipped=tally.skipped,
            progress=bar("writing", len(found)),
        )
    _summary(request.out)
    _skipped(tally)
    if absent := [task for task in request.tasks if not tally.tasks[task]]:
        click.echo(f"no usable record of {', '.join(absent)}; the source has {_tasks(tally)}", err=True)
    if len(found) < request.samples:
        click.echo(f"{len(found)} samples, not {request.samples}: the source has no more that can be used", err=True)


def _tasks(tally: "Tally") -> str:
    names = [f"{task} ({n})" for task, n in tally.tasks.most_common(12)]
    return ", ".join(names) + (", ..." if len(tally.tasks) > 12 else "")


def _why_empty(request: Request, tally: "Tally") -> str:
    """One line on why no record can be used."""
    if tally.tasks and request.tasks:
        return f"{request.source}: no usable record of {', '.join(request.tasks)}; choose from {_tasks(tally)}"
    if not tally.skipped:
        return f"{request.source}: no records in it; give a JSON array of records, or one record a line"
    reason, n = tally.skipped.most_common(1)[0]
    first = tally.examples[reason]
    advice = {
        "missing_picture": "point --images at the folder where the pictures' paths begin",
        "outside_root": "point --images at the folder that holds the pictures",
        "broken_json": "give a JSON array of records, or one record a line",
    }.get(reason, "correct the records")
    return (
        f"{request.source}: none of {tally.records} records can be used; {n} of them {reason} "
        f"(first: {first.file} record {first.number}, {first.detail}); {advice}"
    )


# ---- the story on stderr
def _summary(folder: Path) -> None:
    """Tables of what was chosen."""
    from .store import open_calibration

    counts = open_calibration(folder).counts
    for title, name in (("task", "tasks"), ("pictures", "pictures"), ("resolution", "resolutions")):
        _table([(title, "samples"), *((key, str(n)) for key, n in counts[name].items())])


def _skipped(tally: "Tally") -> None:
    """A table of what was left out, with the first example of each reason."""
    from .records import REASONS

    left_out = sum(tally.skipped.values())
    click.echo(f"{tally.records} records read, {left_out} left out", err=True)
    if left_out:
        rows = [("left out", "records", "because of", "first")]
        for reason in (reason for reason in REASONS if tally.skipped[reason]):
            file, number, detail = tally.examples[reason]
            where = " ".join(f"{file} record {number}: {detail}".split())
            rows.append((reason, str(tally.skipped[reason]), REASONS[reason], where))
        _table(rows)


def _table(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        cells[1] = row[1].rjust(widths[1])
        click.echo("  ".join(cells).rstrip(), err=True)
    click.echo(err=True)


@contextmanager
def _bars() -> Iterator[Callable[[str, int], Moves]]:
    """Progress bars with the time left, on stderr where it is a terminal and rich is installed.

    Yields a function that adds one, given its title and total, and returns what moves it.
    """
    try:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
    except ImportError:
        yield lambda title, total: None
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda title, total: None
        return
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console) as bars:

        def add(title: str, total: int) -> Moves:
            bar = bars.add_task(title, total=total)
            return lambda done: bars.update(bar, completed=done)

        yield add


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs the command and turns every failure into one line and an exit status."""
    run_command(command, "migician-calib", arguments, out_of_memory="out of memory; ask for fewer --samples")


if __name__ == "__main__":
    main()
