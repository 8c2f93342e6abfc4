"""What is measured: the pictures, the question, the number of new tokens, and what every engine reports of a run.

A run, as an engine hands it over, is a dict (a part that an engine cannot tell is None):

    preprocess_ms   pictures resized and turned into numbers, words into ids
    vision_ms       all pictures through the vision encoder
    prefill_ms      the whole prompt through the language model
    decode_ms       new_tokens choices and new_tokens - 1 further steps of the language model
    total_ms        the sum
    steps_ms        each of those steps
    cpu_ms          {phase: processor time of all threads}; beside a phase's own time it tells how busy the machine was
    prompt_tokens, new_tokens
"""

import time
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

__all__ = ["PHASES", "PROMPT", "WARM_UP", "Case", "Engine", "Laps", "pictures"]

PROMPT = "the common object in all these images"
PHASES = ("preprocess", "vision", "prefill", "decode")
_CORNER = 28  # px of the square that tells repeats apart: one merged cell


@dataclass(frozen=True)
class Case:
    """One question: so many noise pictures of one size, so many new tokens."""

    pictures: int
    width: int
    height: int
    new_tokens: int

    @property
    def name(self) -> str:
        """How people call it: 4 x 640x480, 32 tokens."""
        return f"{self.pictures} x {self.width}x{self.height}, {self.new_tokens} new tokens"

    def to_dict(self) -> dict[str, int]:
        """Its fields, for JSON."""
        return asdict(self)


WARM_UP = Case(1, 224, 224, 3)  # small: it is there to read every weight once and to start threads


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

    def to_run(self) -> dict[str, Any]:
        """The times of a run, as this module's head names them."""
        return {**self.wall, "total_ms": sum(self.wall.values()), "cpu_ms": self.cpu}


class Engine(Protocol):
    """One engine with its model loaded."""

    versions: dict[str, str]

    def run(self, case: Case, images: list[np.ndarray]) -> dict[str, Any]:
        """Answers once, exactly case.new_tokens long, with nothing kept from earlier runs."""


def pictures(case: Case, repeat: int) -> list[np.ndarray]:
    """Draws the case's noise pictures, u8[height, width, 3]; those of two repeats differ in one corner.

    The same case and repeat give the same pictures in every process, and no cache can take two repeats for one.
    """
    images = []
    for index in range(case.pictures):
        image = np.random.default_rng([1, index]).integers(0, 256, (case.height, case.width, 3), np.uint8)
        corner = image[:_CORNER, :_CORNER]
        corner[...] = np.random.default_rng([2, index, repeat]).integers(0, 256, corner.shape, np.uint8)
        images.append(image)
    return images
