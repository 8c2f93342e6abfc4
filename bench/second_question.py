"""What a second question about the same pictures costs: python -m migician.bench.second_question --model nano.

Both questions go through Model.ground, to the first token of the answer; pictures are new ones in every repeat. Each
size has a line, one JSON object: medians of both questions in milliseconds, and the second's share of the first.
"""

import io
import json
import time

import click
import numpy as np
from PIL import Image

from ..runtime.model import load
from .latency.cli import sizes
from .latency.workload import PROMPT, Case, pictures

__all__ = ["measure"]

_QUESTIONS = (PROMPT, "Where is the cup of the first image in the second one?")


def _jpeg(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def measure(
    source: str, case: Case, *, repeat: int = 5, threads: int = 0, jpeg: bool = False
) -> dict[str, float | int | str]:
    """Asks two questions about fresh pictures, `repeat` times after one that is not counted.   jpeg: as bytes."""
    found: list[list[float]] = []
    with load(source, threads=threads) as model:
        for number in range(repeat + 1):
            drawn = pictures(case, number)
            images, taken = [_jpeg(pixels) for pixels in drawn] if jpeg else drawn, []
            for question in _QUESTIONS:
                start = time.perf_counter()
                model.ground(images, question, max_new_tokens=case.new_tokens)
                taken.append(1000 * (time.perf_counter() - start))
            found.append(taken)
    first, second = (float(value) for value in np.median(found[1:], axis=0))
    return {
        "model": source,
        **case.to_dict(),
        "first_ms": round(first, 2),
        "second_ms": round(second, 2),
        "share": round(second / first, 4),
    }


@click.command()
@click.option("--model", default="nano", show_default=True, metavar="M", help="A .mig file, a folder, nano.")
@click.option(
    "--pictures", "count", type=click.IntRange(1), default=2, show_default=True, metavar="N", help="Of each question."
)
@click.option(
    "--size",
    multiple=True,
    default=["640x480"],
    show_default=True,
    callback=sizes,
    metavar="WxH",
    help="Of each, in pixels.",
)
@click.option("--repeat", type=click.IntRange(1), default=5, show_default=True, metavar="N", help="Pairs of questions.")
@click.option("--threads", type=click.IntRange(0), default=0, metavar="N", help="[0: one per core]")
@click.option("--jpeg", is_flag=True, help="Give the bytes of JPEG files instead of arrays.")
def main(model: str, count: int, size: list[tuple[int, int]], repeat: int, threads: int, jpeg: bool) -> None:
    """Times a second question about pictures that the model has just seen."""
    for width, height in size:
        found = measure(model, Case(count, width, height, 1), repeat=repeat, threads=threads, jpeg=jpeg)
        click.echo(json.dumps(found))


if __name__ == "__main__":
    main()
