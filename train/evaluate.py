"""What a model scores on held-out drawn scenes, asked through the engine as any user would.

    python -m migician.train.evaluate [--model nano] [--per-task 100]

The table goes to stderr as it grows; the last line on stdout is one JSON object.
"""

import json
from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING

import click

from ..calib.scenes import TASKS, HeldOut, held_out, iou

if TYPE_CHECKING:
    from ..runtime.model import Answer, Model

__all__ = ["evaluate_task", "score_answer"]


def score_answer(answer: "Answer", item: HeldOut) -> float:
    """IoU of an answer's first box with the truth, on the 0..1 grid; 0 without a box or in another picture."""
    if not answer.boxes or answer.boxes[0].image != item.question.meta["image"]:
        return 0.0
    x1, y1, x2, y2 = (v / 1000 for v in answer.boxes[0].grid)
    return iou((x1, y1, x2, y2), item.question.meta["box"])


def evaluate_task(model: "Model", items: Sequence[HeldOut]) -> dict[str, float]:
    """Asks every question; returns n, mean IoU and the share of IoU >= 0.5 ("acc50")."""
    scores = []
    for item in items:
        answer = model.ground(list(item.scene["images"]), item.question.text, max_new_tokens=48)
        scores.append(score_answer(answer, item))
    return {"n": len(scores), "iou": fmean(scores), "acc50": fmean(score >= 0.5 for score in scores)}


@click.command()
@click.option("--model", default="nano", show_default=True, help=".mig file, checkpoint folder, hub id or nano")
@click.option("--per-task", default=100, show_default=True, type=click.IntRange(1), help="held-out questions per task")
@click.option("--tasks", default=",".join(TASKS), help="comma-separated; default the ten")
@click.option("--threads", default=0, show_default=True, type=click.IntRange(0), help="0: all cores")
def main(model: str, per_task: int, tasks: str, threads: int) -> None:
    """Scores a model on held-out drawn scenes, per task and on average over the tasks."""
    from ..runtime.model import load

    results = {}
    with load(model, threads=threads) as loaded:
        for task in tasks.split(","):
            results[task] = evaluate_task(loaded, held_out(task, per_task))
            click.echo(f"{task:16} IoU {results[task]['iou']:.3f}  acc@0.5 {results[task]['acc50']:.2f}", err=True)
    mean = {key: round(fmean(result[key] for result in results.values()), 4) for key in ("iou", "acc50")}
    rounded = {task: {key: round(value, 4) for key, value in result.items()} for task, result in results.items()}
    click.echo(json.dumps({"model": model, "per_task": per_task, "mean": mean, "tasks": rounded}))


if __name__ == "__main__":
    main()
