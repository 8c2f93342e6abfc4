"""What drafts bring on held-out questions: python -m migician.bench.speculation --model nano --per-task 50.

Every question is asked with and without drafts, in turns of who is first. The last line is one JSON object: questions,
answers that differ (always 0, or something is broken), tokens a pass, milliseconds of decoding each way.
"""

import json
from collections.abc import Iterator

import click

from ..calib.scenes import TASKS, held_out
from ..calib.scenes.dataset import HeldOut
from ..runtime.drafts import Turns
from ..runtime.model import Answer, load

__all__ = ["measure"]

_NEW_TOKENS = 48


class _Always(Turns):
    """Drafts every answer, whatever that costs."""

    def drafted(self) -> bool:
        return True


def _answers(source: str, items: list[HeldOut], *, threads: int, always: bool) -> Iterator[tuple[Answer, Answer]]:
    with load(source, threads=threads) as drafted, load(source, threads=threads, speculate=False) as plain:
        if always and drafted._speculator:
            drafted._speculator.turns = _Always()
        for number, item in enumerate(items):
            first, second = (drafted, plain) if number % 2 else (plain, drafted)
            asked = [m.ground(list(item.scene["images"]), item.question.text, max_new_tokens=_NEW_TOKENS)
                     for m in (first, second)]  # fmt: skip
            yield (asked[0], asked[1]) if number % 2 else (asked[1], asked[0])


def measure(source: str, per_task: int, *, threads: int = 1, always: bool = False) -> dict[str, float | str]:
    """Asks per_task questions of each task both ways.   always: draft every answer, paying or not."""
    items = [item for task in TASKS for item in held_out(task, per_task)]
    different = tokens = passes = 0
    milliseconds = {"drafted": 0.0, "plain": 0.0}
    for drafted, plain in _answers(source, items, threads=threads, always=always):
        different += drafted.tokens != plain.tokens or drafted.finish != plain.finish
        tokens += int(drafted.stats["new_tokens"])
        passes += int(drafted.stats["decode_passes"])
        milliseconds["drafted"] += drafted.stats["decode_ms"]
        milliseconds["plain"] += plain.stats["decode_ms"]
    return {
        "model": source,
        "questions": len(items),
        "different": different,
        "tokens_per_pass": round(tokens / max(1, passes), 3),
        "drafted_ms": round(milliseconds["drafted"], 1),
        "plain_ms": round(milliseconds["plain"], 1),
    }


@click.command()
@click.option("--model", default="nano", show_default=True, metavar="M", help="A .mig file, a folder, nano.")
@click.option("--per-task", type=click.IntRange(1), default=50, show_default=True, metavar="N", help="Questions.")
@click.option("--threads", type=click.IntRange(0), default=1, show_default=True, metavar="N", help="0: one per core.")
@click.option("--always", is_flag=True, help="Draft every answer, also where that does not pay.")
def main(model: str, per_task: int, threads: int, always: bool) -> None:
    """Compares answers with and without drafts."""
    click.echo(json.dumps(measure(model, per_task, threads=threads, always=always)))


if __name__ == "__main__":
    main()
