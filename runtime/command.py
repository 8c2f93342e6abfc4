"""How every command of this package begins and ends: sound standard streams, one line on stderr for each failure."""

import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import click

from .. import __version__
from .errors import MigicianError

__all__ = ["read_stdin", "run_command", "version_option"]

version_option = click.version_option(__version__, message="%(prog)s %(version)s")


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

    if not _mend_streams():
        fail("standard output is closed; redirect it to a file, or to /dev/null")
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
        if isinstance(error, ImportError) and "failed to map" in str(error):
            fail(out_of_memory)  # a library that finds no address space
        fail(f"internal error: {type(error).__name__}: {error}; please report it with the command that shows it")


def _mend_streams() -> bool:
    """Puts /dev/null where a standard stream is closed, and lets stdout write any character; False if it was closed.

    A file opened later would take a closed stream's number, and with it whatever a library prints. What stdout's
    encoding lacks is written as an escape: an answer with a Chinese word must not end in an error.
    """
    had_stdout = sys.stdout is not None
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")
    return had_stdout


def read_stdin() -> str:
    """Reads a text from standard input: UTF-8, with or without a byte order mark. Any other is a MigicianError."""
    if sys.stdin is None:
        raise MigicianError("standard input is closed; pipe the text in, or give it as an argument")
    data = sys.stdin.buffer.read()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        kind = "UTF-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in data else "ANOTHER-ENCODING"
        raise MigicianError(f"standard input is not UTF-8 text; convert it first: iconv -f {kind} -t UTF-8")
    return text.strip()
