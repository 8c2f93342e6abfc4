"""The twelve shapes in eight colours, and how they get onto a picture.

A shape is drawn once, large, as a silhouette cropped to its ink; every size of it is a box-filtered copy. So the box
of a thing is tight by construction: it is the rectangle the copy is pasted into.
Pictures are u8[H, W, 3]; boxes are (x1, y1, x2, y2), in px unless said otherwise.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

__all__ = ["CLASSES", "COLOURS", "RGB", "Box", "Thing", "area", "intersection", "iou", "overlaps", "render", "thing"]

Box = tuple[float, float, float, float]
Points = list[tuple[float, float]]

CLASSES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "arrow", "moon", "house", "tree", "flower")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "black")
RGB = np.array(
    [
        [215, 20, 25],
        [245, 130, 10],
        [228, 200, 0],
        [25, 150, 45],
        [25, 70, 225],
        [125, 25, 165],
        [250, 95, 185],
        [30, 30, 30],
    ]
)

_SILHOUETTE_PX = 512
_CACHED_MASKS = 6000


# ---- boxes
def intersection(a: Box, b: Box) -> float:
    """Area that two boxes share."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def area(a: Box) -> float:
    """Area of a box."""
    return (a[2] - a[0]) * (a[3] - a[1])


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes."""
    return intersection(a, b) / max(1e-9, area(a) + area(b) - intersection(a, b))


def overlaps(a: Box, b: Box) -> bool:
    """True when two boxes share more than 5 % of the smaller one."""
    return intersection(a, b) > 0.05 * min(area(a), area(b))


# ---- shapes, in a unit square
def _points(percent: str) -> Points:
    """Reads '34,4 66,4' as [(0.34, 0.04), (0.66, 0.04)]."""
    return [(int(x) / 100, int(y) / 100) for x, y in (pair.split(",") for pair in percent.split())]


def _star() -> Points:
    radii = [0.49, 0.22] * 5
    return [(0.5 + r * math.sin(i * math.pi / 5), 0.5 - r * math.cos(i * math.pi / 5)) for i, r in enumerate(radii)]


def _heart() -> Points:
    def y(t: float) -> float:
        return 0.47 - 0.029 * (13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t))

    return [(0.5 + 0.46 * math.sin(t) ** 3, y(t)) for t in np.linspace(0, 2 * math.pi, 200)]


_POLYGONS: dict[str, Points] = {
    "square": _points("5,5 95,5 95,95 5,95"),
    "triangle": _points("50,5 97,93 3,93"),
    "star": _star(),
    "heart": _heart(),
    "cross": _points("34,4 66,4 66,34 96,34 96,66 66,66 66,96 34,96 34,66 4,66 4,34 34,34"),
    "arrow": _points("3,36 50,36 50,12 97,50 50,88 50,64 3,64"),
    "house": _points("50,4 97,46 86,46 86,95 60,95 60,62 40,62 40,95 14,95 14,46 3,46"),
    "tree": _points("50,3 80,38 64,38 90,74 58,74 58,97 42,97 42,74 10,74 36,38 20,38"),
}
# (centre x, centre y, radius, fill): 255 is ink, 0 cuts a hole
_DISCS: dict[str, list[tuple[float, float, float, int]]] = {
    "circle": [(0.5, 0.5, 0.47, 255)],
    "ring": [(0.5, 0.5, 0.47, 255), (0.5, 0.5, 0.25, 0)],
    "moon": [(0.5, 0.5, 0.47, 255), (0.74, 0.42, 0.4, 0)],
    "flower": [
        *((0.5 + 0.3 * math.sin(i * math.pi / 3), 0.5 - 0.3 * math.cos(i * math.pi / 3), 0.175, 255) for i in range(6)),
        (0.5, 0.5, 0.22, 255),
        (0.5, 0.5, 0.12, 0),
    ],
}
_silhouettes: dict[int, Image.Image] = {}
_masks: dict[tuple[int, int, int, bool], np.ndarray] = {}


def _silhouette(cls: int) -> Image.Image:
    """The class as an 8-bit mask about 480 px wide, cropped to its ink."""
    if cls not in _silhouettes:
        n = _SILHOUETTE_PX
        mask = Image.new("L", (n, n))
        draw, name = ImageDraw.Draw(mask), CLASSES[cls]
        if name in _POLYGONS:
            draw.polygon([(x * n, y * n) for x, y in _POLYGONS[name]], fill=255)
        for x, y, r, fill in _DISCS.get(name, []):
            draw.ellipse([(x - r) * n, (y - r) * n, (x + r) * n, (y + r) * n], fill=fill)
        _silhouettes[cls] = mask.crop(mask.getbbox())
    return _silhouettes[cls]


def _mask(cls: int, width: int, height: int, flip: bool) -> np.ndarray:
    """Antialiased opacity u16[height, width, 1] of a class, 0..255; kept for the next time."""
    key = (cls, width, height, flip)
    if key not in _masks:
        if len(_masks) > _CACHED_MASKS:
            _masks.clear()
        mask = np.asarray(_silhouette(cls).resize((width, height), Image.Resampling.BOX), np.uint16)
        _masks[key] = np.ascontiguousarray(mask[:, ::-1] if flip else mask)[:, :, None]
    return _masks[key]


# ---- things
@dataclass
class Thing:
    """One object of a picture: what it is, where it is and how it is drawn.

    cls and colour index CLASSES and COLOURS; side is the longer side of the tight box; tint is added to each colour
    channel. A hidden thing keeps its place but is not drawn; visible is False where too little of it is in the picture
    to ask for it.
    """

    cls: int
    colour: int
    cx: float
    cy: float
    side: int
    box: Box
    flip: bool = False
    tint: int = 0
    hidden: bool = False
    visible: bool = True

    @property
    def key(self) -> tuple[int, int]:
        """What the thing is, wherever it is: (cls, colour)."""
        return self.cls, self.colour


def thing(
    cls: int, colour: int, cx: float, cy: float, side: float, *, flip: bool = False, tint: int = 0, hidden: bool = False
) -> Thing:
    """Makes a thing whose tight integer box is centred near (cx, cy)."""
    (w0, h0), side = _silhouette(cls).size, round(side)
    w, h = round(w0 * side / max(w0, h0)), round(h0 * side / max(w0, h0))
    x, y = round(cx - w / 2), round(cy - h / 2)
    return Thing(cls, colour, cx, cy, side, (x, y, x + w, y + h), flip, tint, hidden)


def render(background: np.ndarray, things: Iterable[Thing], brightness: float = 1.0) -> np.ndarray:
    """Draws things over a copy of the background, in order; brightness scales the finished picture."""
    picture = background.copy()
    for t in things:
        if t.hidden:
            continue
        x1, y1, x2, y2 = (int(v) for v in t.box)
        opacity, under = _mask(t.cls, x2 - x1, y2 - y1, t.flip), picture[y1:y2, x1:x2]
        colour = np.clip(RGB[t.colour] + t.tint, 0, 255).astype(np.uint16)
        under[:] = (under * (255 - opacity) + colour * opacity + 127) // 255
    if brightness == 1.0:
        return picture
    return np.clip(np.arange(256) * brightness, 0, 255).astype(np.uint8)[picture]
