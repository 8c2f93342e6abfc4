"""What is measured: the pictures, the question, the number of new tokens."""

from dataclasses import asdict, dataclass

import numpy as np

__all__ = ["PROMPT", "WARM_UP", "Case", "pictures"]

PROMPT = "the common object in all these images"
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
