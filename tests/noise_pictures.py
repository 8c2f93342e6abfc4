"""Noise pictures on disk, for tests that only need some."""

from pathlib import Path

import numpy as np
from PIL import Image


def save_noise(folder: Path, sizes: list[tuple[int, int]]) -> tuple[Path, ...]:
    """Noise pictures of (width, height)."""
    rng = np.random.default_rng(len(sizes))
    paths = []
    for i, (width, height) in enumerate(sizes):
        paths.append(folder / f"{i}.png")
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(paths[-1])
    return tuple(paths)
