"""migician-run: asks a model about pictures and prints its answer.

stdout carries the answer only, stderr the story. Exit status: 0 done, 1 failed (one line on stderr), 2 usage,
130 interrupted.
"""

import json
import math
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from .backends import BACKENDS
from .command import read_stdin, run_command, version_option
from .errors import MigicianError

if TYPE_CHECKING:
    from PIL import Image

    from .answer import Answer
    from .model import Model
    from .sources import PictureSource

__all__ = ["command", "main"]

_PICTURE_NAME = re.compile(r"data:image/\S+|\S+\.(?:png|jpe?g|webp|gif|bmp|tiff?|hei[cf]|avif)", re.IGNORECASE)
_SHEET_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


@dataclass(frozen=True)
class Request:
    """The command line, checked as far as that goes without a model."""

    images: tuple[str, ...]
    prompt: str
    system: str | None
    model: str | None
    backend: str
    as_json: bool
    draw: Path | None
    max_new_tokens: int
    min_pixels: int | None
    max_pixels: int | None
    max_side: int | None
    threads: int
    repetition_penalty: float | None
    precision: str
    speculate: bool
    logprobs: bool
    stats: bool
    stream: bool


def _print_kernels(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        from .backends.native import kernel_report

        click.echo(kernel_report().rstrip("\n"))
        context.exit()


def _finite(_: click.Context, __: click.Parameter, value: float | None) -> float | None:
    if value is not None and not (math.isfinite(value) and value > 0):
        raise click.BadParameter(f"{value} is not a finite number above 0.")
    return value


def _sheet_path(_: click.Context, __: click.Parameter, value: str | None) -> Path | None:
    if value is None:
        return None
    if Path(value).suffix.lower() not in _SHEET_FORMATS:
        raise click.BadParameter(f"{value!r} does not end in {', '.join(_SHEET_FORMATS)}.")
    return Path(value)


_COUNT = click.IntRange(min=1, max=(1 << 31) - 1)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("words", nargs=-1, metavar="[IMAGE]... PROMPT")
@click.option("--model", metavar="M", help="A .mig file, a checkpoint folder, a hub id, nano. [MIGICIAN_MODEL, nano]")
@click.option("--backend", type=click.Choice(list(BACKENDS)), default="native", help="What computes. [native]")
@click.option("--system", metavar="TEXT", help="The system turn. [the model's]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--draw", metavar="OUT.png", callback=_sheet_path, help="Write a sheet of the pictures with boxes.")
@click.option("--max-new-tokens", type=_COUNT, default=512, show_default=True, metavar="N", help="Longest answer.")
@click.option("--min-pixels", type=_COUNT, metavar="N", help="Enlarge pictures to at least this area. [the model's]")
@click.option("--max-pixels", type=_COUNT, metavar="N", help="Shrink pictures to at most this area. [the model's]")
@click.option("--max-side", type=_COUNT, metavar="N", help="Shrink pictures first until no side is longer.")
@click.option("--threads", type=click.IntRange(0, 1024), default=0, metavar="N", help="Threads. [0: one per core]")
@click.option("--repetition-penalty", type=float, callback=_finite, metavar="X", help="1 turns it off. [the model's]")
@click.option("--precision", type=click.Choice(["auto", "fp32"]), default="auto", help="Arithmetic. [auto]")
@click.option("--speculate/--no-speculate", default=True, help="Guess tokens and verify them together, or one by one.")
@click.option("--logprobs", is_flag=True, help="Show each token's log-probability.")
@click.option("--stats", is_flag=True, help="Show what the model is, times, memory, tokens per pass over the weights.")
@click.option("--stream", is_flag=True, help="Show the answer as it comes.")
@click.option("--kernels", is_flag=True, is_eager=True, expose_value=False, callback=_print_kernels,
              help="Show which kernels serve this machine, and exit.")  # fmt: skip
@version_option
def command(words: tuple[str, ...], **options: Any) -> None:
    """Asks PROMPT about the pictures and prints the answer; boxes are in pixels of the pictures as given.

    PROMPT is the last argument; - in place of it, or of one picture, reads that from standard input. Pictures may be
    data: or file: URLs. Without pictures it is a question in words alone.

    \b
    migician-run a.jpg b.jpg "Where is the cup of the first image in the second one?" --draw boxes.png
    migician-run *.jpg "the common object in all these images" --json --model path/to/Migician
    """
    if not words:
        raise click.UsageError("give the pictures and, as the last argument, the question in quotes.")
    *images, prompt = words
    if _names_a_picture(prompt):
        raise click.UsageError(f"{prompt[:80]!r} is a picture: give the question in quotes behind it.")
    low, high = options["min_pixels"], options["max_pixels"]
    if low is not None and high is not None and low > high:
        raise click.UsageError(f"--min-pixels {low} is more than --max-pixels {high}.")
    if words.count("-") > 1:
        raise click.UsageError("- stands for standard input, which can be read once: for one picture or the question.")
    if prompt == "-":
        prompt = read_stdin()
    _run(Request(images=tuple(images), prompt=prompt, **options))


def _names_a_picture(word: str) -> bool:
    """Whether the word in the question's place is a picture: by how it ends, or because such a file is there."""
    if _PICTURE_NAME.fullmatch(word):
        return True
    try:
        if not os.path.isfile(word):
            return False
    except ValueError:  # a NUL inside
        return False
    from .image import open_picture

    try:
        open_picture(word)
    except MigicianError:
        return False
    return True


def _run(request: Request) -> None:
    """Loads, asks, prints, draws."""
    from .model import load
    from .sources import read_source, read_stdin

    if request.draw is not None and not request.draw.resolve().parent.is_dir():
        raise MigicianError(f"--draw {request.draw}: there is no folder {request.draw.resolve().parent}; create it")
    # Read once, here: a pipe gives its picture to the model and has none left for the sheet.
    pictures = [read_stdin() if image == "-" else read_source(image) for image in request.images]
    with load(
        request.model,
        threads=request.threads,
        precision=request.precision,
        backend=request.backend,
        min_pixels=request.min_pixels,
        max_pixels=request.max_pixels,
        speculate=request.speculate,
    ) as model:
        for note in model.notes:
            click.echo(note, err=True)
        if request.stats:
            from .files.describe import describe_line

            click.echo(describe_line(model.describe()), err=True)
        opened = _open_for_sheet(pictures) if request.draw is not None else []
        answer = _ask(model, request, opened or pictures)
        if request.as_json:
            click.echo(_to_json(_as_dict(answer, model, request.logprobs)))
        else:
            _print_text(answer, request)
    if request.draw is not None:
        _draw(request.draw, opened, request.prompt, answer)
        click.echo(f"wrote {request.draw}", err=True)


def _open_for_sheet(pictures: "Sequence[PictureSource]") -> "list[Image.Image]":
    """Decodes the pictures in full, once for the model and the sheet."""
    from .image import open_picture
    from .sources import picture_name

    opened = []
    for source in pictures:
        picture = open_picture(source)
        picture.filename = picture_name(source)  # type: ignore[attr-defined]  # what messages call it
        opened.append(picture)
    return opened


def _to_json(value: dict[str, Any]) -> str:
    """One line; in ASCII where stdout's encoding has not every character."""
    unicode = (sys.stdout.encoding or "").lower().replace("-", "").startswith("utf")
    return json.dumps(value, ensure_ascii=not unicode, allow_nan=False)


def _ask(model: "Model", request: Request, pictures: "Sequence[PictureSource]") -> "Answer":
    """Takes the answer step by step; with --stream the text goes out as it comes (to stderr beside --json)."""
    steps = model.stream(
        pictures,
        request.prompt,
        max_new_tokens=request.max_new_tokens,
        max_side=request.max_side,
        repetition_penalty=request.repetition_penalty,
        system=request.system,
    )
    shown = ""
    for step in steps:
        if request.stream:
            shown += step.text
            click.echo(step.text, nl=False, err=request.as_json)
    if request.stream:
        click.echo(steps.answer.text[len(shown) :], err=request.as_json)
    return steps.answer


def _number(value: float) -> float | None:
    """JSON has no infinity: a number without a finite value becomes null."""
    return value if math.isfinite(value) else None


def _as_dict(answer: "Answer", model: "Model", logprobs: bool) -> dict[str, Any]:
    """The object that --json prints."""
    result: dict[str, Any] = {
        "text": answer.text,
        "boxes": [
            {
                "image": box.image,
                "label": box.label,
                "xyxy": list(box.xyxy),
                "grid": list(box.grid),
                "score": _number(box.score),
            }
            for box in answer.boxes
        ],
        "points": [
            {
                "image": point.image,
                "label": point.label,
                "xy": list(point.xy),
                "grid": list(point.grid),
                "score": _number(point.score),
            }
            for point in answer.points
        ],
        "clipped": answer.clipped,
        "repeated": answer.repeated > 0,
        "model": model.name,
        "backend": model.backend,
        "prompt_tokens": answer.prompt_tokens,
        "finish": answer.finish,
    }
    if logprobs:
        result["tokens"] = [{"id": token.id, "logprob": _number(token.logprob)} for token in answer.tokens]
    result["stats"] = answer.stats
    return result


def _print_text(answer: "Answer", request: Request) -> None:
    """The answer on stdout, in a terminal with a table of its boxes; what else was asked for on stderr."""
    if not request.stream:
        click.echo(answer.text)
    if (answer.boxes or answer.points) and sys.stdout.isatty():
        click.echo()
        click.echo(_table(answer, request.images))
    if answer.repeated:
        click.echo(
            f"the answer repeats itself, {answer.repeated + 1} times the same, until {len(answer.tokens)} tokens were "
            f"used up; nothing was cut that matters; ask for less at once, or raise --repetition-penalty",
            err=True,
        )
    elif answer.finish == "length":
        click.echo(f"the answer was cut after {request.max_new_tokens} tokens; raise --max-new-tokens", err=True)
    if answer.unparsed:
        click.echo(f"{answer.unparsed} malformed boxes were left in the text", err=True)
    if answer.clipped:
        click.echo(f"{answer.clipped} boxes or points reached beyond the picture and were cut at its edge", err=True)
    if request.logprobs:
        for token in answer.tokens:
            click.echo(f"token {token.id}  {token.logprob:.4f}", err=True)
    if request.stats:
        click.echo("  ".join(f"{name} {value:g}" for name, value in answer.stats.items()), err=True)


def _table(answer: "Answer", images: Sequence[str]) -> str:
    """One line per box and point: picture, label, pixels, score."""
    from .boxes import Box, Point
    from .sources import file_name

    rows = [("picture", "file", "label", "x1 y1 x2 y2" if answer.boxes else "x y", "score")]
    found: list[Box | Point] = [*answer.boxes, *answer.points]
    for box in found:
        corners = " ".join(f"{value:.0f}" for value in (box.xy if isinstance(box, Point) else box.xyxy))
        label = " ".join(box.label.split())
        label = label if len(label) <= 32 else label[:31] + "…"
        rows.append((str(box.image), file_name(images[box.image]), label, corners, f"{box.score:.2f}"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _draw(path: Path, pictures: "Sequence[Image.Image]", title: str, answer: "Answer") -> None:
    """Writes the contact sheet, whole or not at all."""
    from .draw import contact_sheet
    from .files.write import whole_file
    from .fonts import advice, undrawable

    sheet = contact_sheet(pictures, answer.boxes, points=answer.points, title=title)
    labels = [box.label for box in answer.boxes] + [point.label for point in answer.points]
    if lost := undrawable(" ".join([title, *labels])):
        click.echo(f"--draw: {advice(lost)}", err=True)
    with whole_file(path) as file:
        sheet.save(file, format=_SHEET_FORMATS[path.suffix.lower()])


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs the command and turns every failure into one line and an exit status."""
    run_command(
        command,
        "migician-run",
        arguments,
        out_of_memory="out of memory; give fewer or smaller pictures (--max-side), or a smaller --max-new-tokens",
    )


if __name__ == "__main__":
    main()
