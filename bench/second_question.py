"""What a second question about the same pictures costs: python -m migician.bench.second_question --model nano.

Both questions go through Model.ground, to the first token of the answer; pictures are new ones in every repeat. The
last line is one JSON object: medians of both questions in milliseconds, and the second's share of the first.
"""

import io
import json
import time

import click
import numpy as np
from PIL import Image

from ..runtime.model import load

__all__ = ["measure"]

_QUESTIONS = ("the common object in all these images", "Where is the cup of the first image in the second one?")


def _pictures(count: int, width: int, height: int, repeat: int, jpeg: bool) -> list[np.ndarray | bytes]:
    """Noise, u8[height, width, 3] or a JPEG file of it; the same for a repeat in every process."""
    rng = np.random.default_rng([3, repeat])
    found: list[np.ndarray | bytes] = []
    for _ in range(count):
        pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
        if jpeg:
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "JPEG")
            found.append(file.getvalue())
        else:
            found.append(pixels)
    return found


def measure(
    source: str,
    pictures: int,
    *,
    size: tuple[int, int] = (640, 480),
    repeat: int = 5,
    threads: int = 0,
    jpeg: bool = False,
) -> dict[str, float | str]:
    """Asks two questions about fresh pictures, `repeat` times after one that is not counted.   size: width, height."""
    found: list[list[float]] = []
    with load(source, threads=threads) as model:
        for number in range(repeat + 1):
            images, taken = _pictures(pictures, *size, number, jpeg), []
            for question in _QUESTIONS:
                start = time.perf_counter()
                model.ground(images, question, max_new_tokens=1)
                taken.append(1000 * (time.perf_counter() - start))
            found.append(taken)
    first, second = (float(value) for value in np.median(found[1:], axis=0))
    return {
        "model": source,
        "pictures": pictures,
        "size": f"{size[0]}x{size[1]}",
        "first_ms": round(first, 2),
        "second_ms": round(second, 2),
        "share": round(second / first, 4),
    }


@click.command()
@click.option("--model", default="nano", show_default=True, metavar="M", help="A .mig file, a folder, nano.")
@click.option("--pictures", type=click.IntRange(1), default=2, show_default=True, metavar="N", help="In a question.")
@click.option("--size", default="640x480", show_default=True, metavar="WxH", help="Of each, in pixels.")
@click.option("--repeat", type=click.IntRange(1), default=5, show_default=True, metavar="N", help="Pairs of questions.")
@click.option("--threads", type=click.IntRange(0), default=0, metavar="N", help="[0: one per core]")
@click.option("--jpeg", is_flag=True, help="Give the bytes of JPEG files instead of arrays.")
def main(model: str, pictures: int, size: str, repeat: int, threads: int, jpeg: bool) -> None:
    """Times a second question about pictures that the model has just seen."""
    try:
        width, height = (int(side) for side in size.split("x"))
    except ValueError:
        raise click.BadParameter(f"{size!r} is no size; write --size 640x480") from None
    found = measure(model, pictures, size=(width, height), repeat=repeat, threads=threads, jpeg=jpeg)
    click.echo(json.dumps(found))


if __name__ == "__main__":
    main()
