"""migician-train: runs a training recipe."""

import signal
import sys
from pathlib import Path
from typing import Any

import click

from ..runtime.command import version_option
from ..runtime.errors import MigicianError

__all__ = ["main"]


@click.command()
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[key=value]...")
@version_option
def main(config: Path, overrides: tuple[str, ...]) -> None:
    """Trains as CONFIG (YAML) says, and goes on where an earlier run in the same folder ended.

    \b
    migician-train train/nano/nano.yaml                        the embedded model, from nothing
    migician-train train/nano/nano.yaml out=runs/more init=train/nano/nano_state.safetensors first=ten

    Ctrl-C ends the step under way, saves and leaves; the same command goes on from there.
    """
    from .nano.settings import read_settings

    try:
        settings = read_settings(config, overrides)
        from .nano.trainer import Trainer  # torch

        trainer = Trainer(settings)
    except (ValueError, OSError, TypeError) as error:
        raise click.UsageError(str(error)) from None
    try:
        ended = _watch(trainer)
    except MigicianError as error:  # the disk is full, say
        raise click.ClickException(str(error)) from None
    if not ended:
        click.echo(f"stopped and saved; the same command goes on from {trainer.folder}/last.pt", err=True)
        sys.exit(1)
    click.echo(str(trainer.folder / f"{settings.stages[-1].name}.safetensors"))


def _watch(trainer: Any) -> bool:
    """Runs a trainer under a progress display on stderr; True when it got to its end."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    def leave(number: int, frame: object) -> None:
        trainer.stop()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C does not wait

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    before = signal.signal(signal.SIGINT, leave)
    try:
        with Progress(*columns, TextColumn("{task.fields[figures]}"), console=Console(stderr=True)) as progress:
            bars = {
                stage.name: progress.add_task(stage.name, total=stage.steps, figures="", visible=False)
                for stage in trainer.settings.stages
            }

            def show(stage: Any, step: int, figures: dict[str, float]) -> None:
                text = "  ".join(f"{name} {figures[name]:.3f}" for name in ("loss", "text") if name in figures)
                progress.update(bars[stage.name], completed=step, visible=True, figures=text)

            trainer.report = show
            return trainer.run()
    finally:
        signal.signal(signal.SIGINT, before)


if __name__ == "__main__":
    main()
