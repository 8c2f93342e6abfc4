"""Batches of scenes without end, drawn ahead of time by child processes."""

import contextlib
import json
import os
import pickle
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from .layout import Sample
from .tasks import sample

__all__ = ["HELD_OUT_SEED", "check_seed", "iter_batches"]

HELD_OUT_SEED = 1_000_000  # the first word of every held-out generator's seed

Size = tuple[int, int]
Ramp = tuple[float, float, int]

# A child imports from where its parent does, whatever the parent did to its path
_CHILD = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from {module} import _serve; _serve(sys.argv[2])"


def check_seed(seed: int) -> int:
    """Returns a training seed; raises ValueError where it could meet the held-out scenes."""
    if not 0 <= seed < HELD_OUT_SEED:
        raise ValueError(f"seed {seed} is not in 0..{HELD_OUT_SEED - 1}; the seeds from there on are held out")
    return seed


def _batch(
    seed: int,
    index: int,
    batch: int,
    weights: Mapping[str, float],
    size: Size | Sequence[Size],
    max_images: int,
    difficulty: float | Ramp,
) -> list[Sample]:
    """Batch number index of a seed's stream."""
    rng, names = np.random.default_rng([seed, index]), sorted(weights)
    sizes: Any = size
    if isinstance(sizes[0], (list, tuple)):
        sizes = sizes[int(rng.integers(len(sizes)))]
    if isinstance(difficulty, (list, tuple)):
        first, last, batches = difficulty
        difficulty = first + (last - first) * min(1.0, index / batches)
    p = np.array([weights[name] for name in names], float)
    chosen = rng.choice(len(names), batch, p=p / p.sum())
    return [sample(rng, names[i], tuple(sizes), max_images, difficulty) for i in chosen]


def _serve(spec: str) -> None:
    """The child: writes every step-th batch to standard output until the pipe closes."""
    seed, index, step, *rest = json.loads(spec)
    try:
        while True:
            pickle.dump(_batch(seed, index, *rest), sys.stdout.buffer, protocol=5)
            sys.stdout.buffer.flush()
            index += step
    except (BrokenPipeError, KeyboardInterrupt):
        os._exit(0)  # without flushing into the closed pipe once more


def _pump(child: subprocess.Popen, batches: queue.Queue) -> None:
    """The reader thread: from a child's pipe into its queue; None at the end."""
    try:
        while True:
            batches.put(pickle.load(child.stdout))  # type: ignore[arg-type]
    except (EOFError, pickle.UnpicklingError, ValueError, OSError):
        batches.put(None)


def iter_batches(
    seed: int,
    batch: int,
    weights: Mapping[str, float],
    size: Size | Sequence[Size] = (196, 196),
    max_images: int = 4,
    *,
    workers: int = 1,
    difficulty: float | Ramp = 2,
    start: int = 0,
    ahead: int = 3,
) -> Iterator[list[Sample]]:
    """Yields lists of batch samples without end; what they hold does not depend on workers.

    seed: 0..999999; from a million on seeds are held out.   weights: how often each task comes.
    size: (H, W), or a list of sizes of which each batch draws one.
    difficulty: 0..2, or (from, to, batches) for a ramp over batch numbers.
    workers: child processes, 0 to draw in this one.   start: first batch number, to go on after a pause.
    ahead: batches that each child may be ahead.   Closing the generator ends the children.
    Raises ValueError on a held-out seed or no weights, RuntimeError when a child stopped.
    """
    check_seed(seed)
    if not weights or min(weights.values()) < 0 or sum(weights.values()) <= 0:
        raise ValueError(f"weights {dict(weights)} choose no task; give at least one above 0 and none below")
    return _batches(seed, [batch, dict(weights), size, max_images, difficulty], workers, start, ahead)


def _batches(seed: int, rest: list, workers: int, start: int, ahead: int) -> Iterator[list[Sample]]:
    while not workers:
        yield _batch(seed, start, *rest)
        start += 1
    code = _CHILD.format(module=__name__)
    pairs: list[tuple[subprocess.Popen, queue.Queue]] = []
    try:
        for i in range(workers):
            command = [sys.executable, "-c", code, json.dumps(sys.path), json.dumps([seed, start + i, workers, *rest])]
            child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
            pairs.append((child, queue.Queue(ahead)))
            threading.Thread(target=_pump, args=pairs[-1], daemon=True).start()
        while True:
            for child, batches in pairs:
                got = batches.get()
                if got is None:
                    raise RuntimeError(f"a scene worker stopped (status {child.wait()}); see its message above")
                yield got
    finally:
        for child, batches in pairs:
            child.kill()
            child.wait()
            with contextlib.suppress(queue.Empty):  # lets the reader thread end
                while True:
                    batches.get_nowait()
