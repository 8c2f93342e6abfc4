"""How every command of this package ends: each failure is one line on stderr and an exit status, never a traceback."""

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import click

from .errors import MigicianError

__all__ = ["run_command"]


def run_command(
    command: click.Command,
    name: str,
    arguments: Sequence[str] | None = None,
    *,
    interrupted: str = "interrupted",
    out_of_memory: str = "out of memory; free some and run again",
) -> NoReturn:
    """Runs a click command and exits: 0 done, 1 failed, 2 usage, 130 interrupted.

    arguments: None takes the process's own.   interrupted, out_of_memory: the lines for these two.
    """

    def fail(message: str, status: int = 1) -> NoReturn:
        click.echo(f"{name}: {' '.join(message.split())}", err=True)
        sys.exit(status)

    try:
        status = command.main(None if arguments is None else list(arguments), name, standalone_mode=False)
        sys.stdout.flush()
        sys.exit(status if isinstance(status, int) else 0)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        fail(interrupted, 130)
    except MigicianError as error:
        fail(str(error) or type(error).__name__)
    except BrokenPipeError:  # the reader of stdout left; nothing more can be said there, not even at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
    except MemoryError:
        fail(out_of_memory)
    except OSError as error:
        fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}; correct it and run again")
    except Exception as error:
        fail(f"internal error: {type(error).__name__}: {error}; please report it with the command that shows it")
