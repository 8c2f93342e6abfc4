"""migician-export: makes a small, fast file of a checkpoint.

stdout carries the paths written only, stderr the story. Exit status: 0 done, 1 failed or rejected by the gate (one line
on stderr), 2 usage, 130 interrupted.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import click

from ..runtime.command import run_command, version_option
from .formats.table import DEFAULT, FORMATS, choose
from .places import check_places

__all__ = ["command", "main"]

_OUT = f"The .mig file, or the folder of {' or '.join(row.name for row in FORMATS if row.folder)}."


def _describe(context: click.Context, _: click.Parameter, value: str | None) -> None:
    if value is None:
        return
    from ..runtime.files.describe import describe, describe_text
    from ..runtime.files.open import open_checkpoint

    with open_checkpoint(value) as checkpoint:
        click.echo(describe_text(describe(checkpoint)))
    context.exit()


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model", default="nano")
@click.option("--int4", is_flag=True, help="int4 language model, the rest int8.")
@click.option("--int8", is_flag=True, help="Everything int8.")
@click.option("--bf16", is_flag=True, help="As it is, in one file.")
@click.option("-o", "--out", metavar="PATH", required=True, help=_OUT)
@click.option("--calib", metavar="DIR|nano|none", help="What to calibrate on. [nano for nano, else to be given]")
@click.option("--samples", type=click.IntRange(1), default=128, show_default=True, help="Samples to calibrate on.")
@click.option("--seed", type=click.IntRange(0, 999_999), default=0, show_default=True, help="Of every random choice.")
@click.option("--format", "formats", type=click.Choice([row.name for row in FORMATS]), multiple=True,
              help=f"Repeatable. [{DEFAULT}]")  # fmt: skip
@click.option("--resume", is_flag=True, help="Go on where an interrupted export was.")
@click.option("--report", type=click.Path(dir_okay=False, path_type=Path), help="Write what was measured as a page.")
@click.option("--max-iou-drop", type=click.FloatRange(0, 1), help="Fail when held-out mean IoU falls by more.")
@click.option("--held-out", type=click.IntRange(0), default=20, show_default=True, metavar="N",
              help="Held-out questions per task for the report and the gate; 0 asks none.")  # fmt: skip
@click.option("--max-side", type=click.IntRange(28), default=512, show_default=True, help="Calibration pictures, px.")
@click.option("--keep", multiple=True, metavar="NAME", help="A map that stays bf16, e.g. visual.merger.mlp.2.")
@click.option("--rotate/--no-rotate", default=True, help="Spread outliers by rotating first. [rotate]")
@click.option("--head-int4", is_flag=True, help="The output head in int4 too.")
@click.option("--threads", type=click.IntRange(0, 1024), default=0, help="Threads. [0: torch's own choice]")
@click.option("--describe", metavar="FILE", is_eager=True, expose_value=False, callback=_describe,
              help="Say what a model file is, and exit.")  # fmt: skip
@version_option
def command(calib: str | None, formats: tuple[str, ...], out: str, **rest: Any) -> None:
    """Quantizes MODEL (a checkpoint folder, a hub id, a bf16 .mig file or nano) into one file that opens at once.

    \b
    migician-export --int4 -o nano-int4.mig --report nano.html
    migician-calib MGrounding.json -o calib && migician-export path/to/Migician --int4 --calib calib -o migician.mig
    migician-export path/to/Migician --int8 --calib calib --max-iou-drop 0.01 -o migician.mig --resume
    migician-export path/to/Migician --int4 --calib calib -o migician-gptq --format gptq
    migician-export --describe migician.mig
    """
    modes = [name for name in ("int4", "int8", "bf16") if rest.pop(name)]
    if len(modes) != 1:
        asked = f", not --{' and --'.join(modes)} together" if modes else ""
        raise click.UsageError(f"give --int4, --int8 or --bf16{asked}.")
    mode = modes[0]
    if calib is None and mode != "bf16" and rest["model"] != "nano":
        raise click.UsageError(
            "give --calib: a folder of migician-calib, nano for drawn scenes, or none to round to nearest."
        )
    formats = tuple(dict.fromkeys(formats)) or (DEFAULT,)
    place = check_places(out, choose(formats, mode), rest["report"])
    _run(mode=mode, calib=calib or "nano", formats=formats, out=place, **rest)


def _run(**options: Any) -> None:
    try:
        import torch  # noqa: F401
    except ImportError:
        raise click.UsageError("exporting needs torch; install it: pip install 'migician[export]'") from None
    from .exporter import Options, export

    with _progress() as show:
        written = export(Options(**options), show, lambda line: click.echo(line, err=True))
    for path in written:
        click.echo(str(path))


@contextmanager
def _progress() -> Iterator[Callable[[float, float, str], None]]:
    """A bar with the time left on a terminal; elsewhere a line for every unit."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    if not console.is_terminal:
        began, first, last = time.monotonic(), dict[float, float](), ""

        def line(done: float, total: float, what: str) -> None:
            nonlocal last
            if what == last:
                return
            last = what
            start = first.setdefault(total, done)  # a resumed run begins in the middle
            spent = time.monotonic() - began
            left = f", about {spent * (total - done) / (done - start):.0f} s left" if done > start else ""
            click.echo(f"{100 * done / total:3.0f} % after {spent:.0f} s{left}: {what}", err=True)

        yield line
        return
    columns = (TextColumn("{task.description:40}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        bars: dict[float, Any] = {}

        def show(done: float, total: float, what: str) -> None:
            if total not in bars:
                bars[total] = progress.add_task(what, total=total)
            progress.update(bars[total], completed=done, description=what)

        yield show


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs the command and turns every failure into one line and an exit status."""
    run_command(
        command, "migician-export", arguments, interrupted="interrupted; --resume goes on from here"
    )


if __name__ == "__main__":
    main()
