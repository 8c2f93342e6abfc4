"""The one protocol by which whatever answers is driven: by the accuracy runner, and by the workers that take times.

    accuracy/models.py                this runtime as its users have it, transformers' models, OpenAI-compatible servers
    accuracy/sweep.py                 this runtime in one setting, with its own times
    latency/backend.py                this runtime's backends, timed, of any and of an exact length
    latency/transformers_peer.py ...  transformers' Qwen2-VL, OpenVINO GenAI, llama.cpp, timed, of an exact length

An exact answer is what can be timed side by side: so many tokens, whatever they are. An end of text ends nothing, there
is no repetition penalty, and nothing of an earlier answer is used again.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np

from ..runtime.errors import UnsupportedError

__all__ = ["PHASES", "Answered", "Engine", "Laps", "Picture", "Times", "any_length_only", "exact_length_only"]

PHASES = ("preprocess", "vision", "prefill", "decode")

Picture: TypeAlias = Path | np.ndarray  # a file, or pixels u8[H, W, 3]


@dataclass(frozen=True)
class Times:
    """What an answer took; None where an engine cannot tell.

    preprocess_ms   pictures resized and turned into numbers, words into ids
    vision_ms       all pictures through the vision encoder
    prefill_ms      the whole prompt through the language model
    decode_ms       new_tokens choices and new_tokens - 1 further steps of the language model
    total_ms        the sum
    steps_ms        each of those steps
    cpu_ms          {phase: processor time of all threads}; beside a phase's own time it tells how busy the machine was
    peak_rss_mb     of an engine that answers in a process of its own; None is this process
    """

    prompt_tokens: int
    new_tokens: int
    total_ms: float
    preprocess_ms: float | None = None
    vision_ms: float | None = None
    prefill_ms: float | None = None
    decode_ms: float | None = None
    steps_ms: Sequence[float] | None = None
    cpu_ms: Mapping[str, float] | None = None
    peak_rss_mb: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Its fields, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Answered:
    """One answer.   times: None where the engine does not tell them."""

    text: str
    times: Times | None = None


class Engine(Protocol):
    """One engine with its model loaded.

    name: as reports show it.   family: "migician", "qwen2_vl", ...: how the model is asked, one of families.FAMILIES.
    versions: what computes, by name.
    """

    @property
    def name(self) -> str: ...

    @property
    def family(self) -> str: ...

    @property
    def versions(self) -> Mapping[str, str]: ...

    def answer(self, images: Sequence[Picture], text: str, max_new_tokens: int, *, exact: bool = False) -> Answered:
        """Answers one turn, greedily.

        text: the whole user turn behind the pictures.   exact: exactly max_new_tokens tokens, see this module's head.
        Raises UnsupportedError where the engine has no such answer, other MigicianErrors where it does not come.
        """
        ...

    def close(self) -> None:
        """Lets go of the model; nothing else may be called after it."""
        ...


def any_length_only(name: str, exact: bool) -> None:
    """Raises UnsupportedError for an answer of an exact length."""
    if exact:
        raise UnsupportedError(f"{name}: answers end where the model ends them; time it with migician-bench latency")


def exact_length_only(name: str, exact: bool) -> None:
    """Raises UnsupportedError for an answer that ends by itself."""
    if not exact:
        raise UnsupportedError(f"{name}: is driven to be timed, with answers of an exact length; ask it elsewhere")


class Laps:
    """Takes the time of one phase after another, on the clock and of the processors."""

    def __init__(self) -> None:
        self.wall: dict[str, float] = {}
        self.cpu: dict[str, float] = {}
        self.skip()

    def skip(self) -> None:
        """What was done since the last lap counts for none."""
        self._last = time.perf_counter(), time.process_time()

    def lap(self, phase: str) -> None:
        """What was done since the last lap was this phase."""
        now = time.perf_counter(), time.process_time()
        self.wall[f"{phase}_ms"] = 1000 * (now[0] - self._last[0])
        self.cpu[phase] = 1000 * (now[1] - self._last[1])
        self._last = now

    def times(self, prompt_tokens: int, steps_ms: Sequence[float]) -> Times:
        """The times of an answer with a step behind each token but the last."""
        total = sum(self.wall.values())
        return Times(
            prompt_tokens, len(steps_ms) + 1, total, steps_ms=list(steps_ms), cpu_ms=dict(self.cpu), **self.wall
        )
