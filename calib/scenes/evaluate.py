"""What a model scores on held-out drawn scenes, asked through the engine as any user would.

    python -m migician.calib.scenes.evaluate [--model nano] [--per-task 100]

The table goes to stderr as it grows; the last line on stdout is one JSON object.
"""

import json
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

import click

from . import EASY_TASKS, TASKS, HeldOut, held_out, iou

if TYPE_CHECKING:
    from ...runtime.model import Answer, Model

__all__ = ["evaluate", "evaluate_task", "score_answer"]

Progress = Callable[[str, Sequence[float]], None]  # a task and the scores of its questions so far


def score_answer(answer: "Answer", item: HeldOut) -> float:
    """IoU of an answer's first box with the truth, on the 0..1 grid; 0 without a box or in another picture."""
    if not answer.boxes or answer.boxes[0].image != item.question.meta["image"]:
        return 0.0
    x1, y1, x2, y2 = (v / 1000 for v in answer.boxes[0].grid)
    return iou((x1, y1, x2, y2), item.question.meta["box"])


def _summary(scores: Sequence[float]) -> dict[str, float]:
    return {"n": len(scores), "iou": fmean(scores), "acc50": fmean(score >= 0.5 for score in scores)}


def evaluate_task(model: "Model", items: Sequence[HeldOut], progress: Progress | None = None) -> dict[str, Any]:
    """Asks every question; returns {"n", "iou", "acc50", "scores"}: mean IoU, share from 0.5 up, each answer's IoU."""
    scores: list[float] = []
    for item in items:
        answer = model.ground(list(item.scene["images"]), item.question.text, max_new_tokens=48)
        scores.append(score_answer(answer, item))
        if progress:
            progress(item.scene["task"], scores)
    return {**_summary(scores), "scores": scores}


def evaluate(
    model: "Model", per_task: int, tasks: Sequence[str] = TASKS, progress: Progress | None = None
) -> dict[str, Any]:
    """Asks the first per_task held-out questions of each task.

    Returns {"mean": {"iou", "acc50"}, "tasks": {task: {"n", "iou", "acc50"}}, "scores": {task: [IoU, ...]}}; mean is
    that over the tasks. Scores stand in the questions' order, the same for every model, so that two models can be
    compared question by question.   progress: called after every answer.
    Raises ValueError on an unknown task.
    """
    results = {task: evaluate_task(model, held_out(task, per_task), progress) for task in tasks}
    scores = {task: result.pop("scores") for task, result in results.items()}
    mean = {key: fmean(result[key] for result in results.values()) for key in ("iou", "acc50")}
    return {"mean": mean, "tasks": results, "scores": scores}


def _tasks(_: click.Context, __: click.Parameter, value: str) -> list[str]:
    names = [name.strip() for name in value.split(",") if name.strip()]
    unknown = sorted(set(names) - {*TASKS, *EASY_TASKS})
    if unknown or not names:
        raise click.BadParameter(f"{', '.join(unknown) or 'no task'}: choose from {', '.join(TASKS)}.")
    return list(dict.fromkeys(names))


@click.command()
@click.option("--model", default="nano", show_default=True, help=".mig file, checkpoint folder, hub id or nano")
@click.option("--per-task", default=100, show_default=True, type=click.IntRange(1), help="held-out questions per task")
@click.option("--tasks", default=",".join(TASKS), callback=_tasks, help="comma-separated; default the ten")
@click.option("--threads", default=0, show_default=True, type=click.IntRange(0), help="0: all cores")
def main(model: str, per_task: int, tasks: list[str], threads: int) -> None:
    """Scores a model on held-out drawn scenes, per task and on average over the tasks."""
    from ...runtime.errors import MigicianError
    from ...runtime.model import load

    def show(task: str, scores: Sequence[float]) -> None:
        if len(scores) == per_task:
            result = _summary(scores)
            click.echo(f"{task:16} IoU {result['iou']:.3f}  acc@0.5 {result['acc50']:.2f}", err=True)

    try:
        with load(model, threads=threads) as loaded:
            results = evaluate(loaded, per_task, tasks, show)
    except MigicianError as error:
        raise click.ClickException(str(error)) from None
    mean = {key: round(value, 4) for key, value in results["mean"].items()}
    rounded = {t: {key: round(value, 4) for key, value in r.items()} for t, r in results["tasks"].items()}
    click.echo(json.dumps({"model": model, "per_task": per_task, "mean": mean, "tasks": rounded}))


if __name__ == "__main__":
    main()
