"""The same scene seen from elsewhere: nearer or farther, shifted, mirrored, darker."""

from collections.abc import Sequence

import numpy as np

from .layout import Draft, Retry
from .sprites import Thing, render, thing

__all__ = ["View"]


class View:
    """A random view change that keeps all things inside the picture and of a recognizable size."""

    def __init__(
        self, draft: Draft, things: Sequence[Thing], scale: tuple[float, float], shift: float, flip_chance: float
    ) -> None:
        """Draws the change.  scale: range of factors about the centre.  shift: at most this part of the picture.

        Raises Retry when no change within these limits keeps the things inside.
        """
        self.height, self.width, self.flip = draft.height, draft.width, draft.chance(flip_chance)
        xs = [t.box[j] for t in things for j in (0, 2)]
        ys = [t.box[j] for t in things for j in (1, 3)]
        low = max(scale[0], 30 * draft.k / min(t.side for t in things))
        high = min(
            scale[1],
            108 * draft.k / max(t.side for t in things),
            (self.width - 6) / (max(xs) - min(xs)),
            (self.height - 6) / (max(ys) - min(ys)),
        )
        if high <= low:
            raise Retry
        self.scale = s = draft.rng.uniform(low, high)
        self.offsets: list[float] = []
        for u, n in (([self.width - v for v in xs] if self.flip else xs, self.width), (ys, self.height)):
            middle = (n - n * s) / 2
            first = max(2 - min(u) * s, middle - shift * n)
            last = min(n - 2 - max(u) * s, middle + shift * n)
            if first > last:
                raise Retry
            self.offsets.append(draft.rng.uniform(first, last))
        self.brightness = draft.rng.uniform(0.88, 1.05) if draft.level else 1.0

    def move(self, t: Thing) -> Thing:
        """The thing as seen in this view."""
        s, (dx, dy) = self.scale, self.offsets
        cx = (self.width - t.cx if self.flip else t.cx) * s + dx
        flip = t.flip != self.flip
        return thing(t.cls, t.colour, cx, t.cy * s + dy, t.side * s, flip=flip, tint=t.tint, hidden=t.hidden)

    def picture(self, background: np.ndarray, things: Sequence[Thing]) -> np.ndarray:
        """Moved things over the moved background, whose edge pixels fill what comes into view."""
        dx, dy = self.offsets
        rows = np.clip((np.arange(self.height) - dy) / self.scale, 0, self.height - 1).astype(int)
        columns = np.clip((np.arange(self.width) - dx) / self.scale, 0, self.width - 1).astype(int)
        moved = (background[:, ::-1] if self.flip else background)[rows][:, columns]
        return render(moved, things, self.brightness)
