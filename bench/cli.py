"""migician-bench: how fast, how accurate, and what a setting costs.

stdout carries results only, the last line of a measuring command is one JSON object; stderr carries the story. Exit
status: 0 done, 1 failed or a gate closed (one line on stderr), 2 usage, 130 interrupted.
"""

from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

import click

from ..runtime.command import run_command, version_option

__all__ = ["command", "main"]

_COMMANDS = {  # name: (module, its one-line help, so that --help imports none of them)
    "accuracy": (".accuracy.cli", "Score a model, or answers from anywhere, on a grounding benchmark."),
    "compare": (".accuracy.cli", "Compare two runs question by question."),
    "sweep": (".accuracy.cli", "Accuracy and latency over picture sizes and precisions."),
    "latency": (".latency.cli", "Time every phase, beside the machine's own ceilings."),
    "make-model": (".latency.cli", "Write a random checkpoint of a real geometry."),
    "report": (".latency.cli", "Turn latency runs into one HTML page and a Markdown table."),
}


class _Lazy(click.Group):
    """Imports a command's module when it is called, not before."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return None
        module = import_module(_COMMANDS[name][0], __package__)
        return getattr(module, name.replace("-", "_"))

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _COMMANDS.items()])


@click.command(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@version_option
def command() -> None:
    """Measures models: accuracy on grounding benchmarks, latency on this machine."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs the command and turns every failure into one line and an exit status."""
    run_command(command, "migician-bench", arguments)


if __name__ == "__main__":
    main()
