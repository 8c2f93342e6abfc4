"""A set of pictures under construction: what every task needs to draw one and to ask about it.

Everything random comes from one numpy Generator, and in a fixed order: reordering two draws gives other scenes for the
same seed, and a model's reported numbers belong to the old ones.
Lengths are meant for a picture whose shorter side is 196 px and scale with it.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple, TypedDict, TypeVar

import numpy as np
from PIL import Image

from .sprites import CLASSES, COLOURS, Box, Thing, area, overlaps, thing
from .wordings import ORDINALS, WORDINGS, format_box, format_ref, with_article

__all__ = [
    "LARGE_PX",
    "MAX_PX",
    "MIN_PX",
    "SMALL_PX",
    "Draft",
    "Key",
    "Meta",
    "ObjectRecord",
    "Question",
    "Retry",
    "Sample",
]

Key = tuple[int, int]  # (class, colour)
Spec = tuple[int, int] | tuple[int, int, float]  # the same, and perhaps a side in px
T = TypeVar("T")

MIN_PX, MAX_PX = 36, 100  # longer side of a thing among others
SMALL_PX, LARGE_PX = 50, 72  # up to here "small", from here "large"; between them neither is said


class ObjectRecord(TypedDict):
    """One drawn object: numbers of its class and colour, box in px, whether enough of it is seen to ask for it."""

    cls: int
    col: int
    box: Box
    visible: bool


class Meta(TypedDict):
    """What a question is about: task, picture number, box in 0..1; aux marks extra questions of another task."""

    task: str
    image: int
    box: Box
    aux: bool


class Question(NamedTuple):
    """A question with its right answer: text for naming, else a box, with the picture named for group_grounding."""

    text: str
    answer: str
    meta: Meta


class Sample(TypedDict):
    """A set of pictures u8[H, W, 3] of one size, the objects of each, and up to eight questions."""

    task: str
    images: list[np.ndarray]
    objects: list[list[ObjectRecord]]
    qas: list[Question]


class Retry(Exception):
    """This draw did not work out (no room, nothing unique): draw again."""


class Draft:
    """The set under construction; the tasks add pictures and questions to it.

    size: (H, W).   level: difficulty, 0..2.   k: px per unit of a 196 px picture.
    """

    def __init__(self, rng: np.random.Generator, task: str, size: tuple[int, int], max_images: int, level: int) -> None:
        self.rng, self.task, self.max_images, self.level = rng, task, max_images, level
        self.height, self.width = size
        self.k = min(size) / 196.0
        self.images: list[np.ndarray] = []
        self.things: list[list[Thing]] = []
        self.questions: list[Question] = []

    # ---- chance
    def integer(self, low: int, high: int) -> int:
        """Integer in low..high, both included."""
        return int(self.rng.integers(low, high + 1))

    def chance(self, p: float) -> bool:
        """True with probability p."""
        return self.rng.random() < p

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """The items in random order."""
        return [items[i] for i in self.rng.permutation(len(items))]

    def pick(self, items: Sequence[T]) -> T:
        """One of the items."""
        return items[self.integer(0, len(items) - 1)]

    def count(self) -> int:
        """How many objects a picture gets at this difficulty."""
        low, high = ((1, 3), (2, 4), (3, 6))[self.level]
        return self.integer(low, high)

    # ---- pictures
    def background(self, *, plain: bool = False) -> np.ndarray:
        """Pale background u8[H, W, 3]: plain colour, soft gradient or light soft noise."""
        base, h, w = self.rng.integers(205, 250, 3), self.height, self.width
        kind = 0 if plain else self.integer(0, self.level)
        if kind == 0:
            return np.full((h, w, 3), base, np.uint8)
        if kind == 1:
            slope = self.rng.uniform(-22, 22, (2, 3)).astype(np.float32)
            y, x = (np.linspace(-1, 1, n, dtype=np.float32)[:, None] for n in (h, w))
            return np.clip((base + y * slope[0])[:, None] + (x * slope[1])[None], 170, 255).astype(np.uint8)
        n = self.integer(3, 15)
        noise = (base + self.rng.normal(0, 9, (n, n, 3))).clip(175, 255).astype(np.uint8)
        return np.array(Image.fromarray(noise).resize((w, h), Image.Resampling.BILINEAR))

    def combos(self, n: int, near: Sequence[Key] = (), used: Sequence[Key] = ()) -> list[Key]:
        """n new (class, colour) pairs outside used, often sharing one feature with one of near."""
        out: list[Key] = []
        for _ in range(200):
            if len(out) >= n:
                return out
            cls, colour = self.integer(0, len(CLASSES) - 1), self.integer(0, len(COLOURS) - 1)
            if near and self.chance((0.15, 0.4, 0.6)[self.level]):
                alike = self.pick(near)
                cls, colour = (alike[0], colour) if self.chance(0.5) else (cls, alike[1])
            if (cls, colour) not in used and (cls, colour) not in out:
                out.append((cls, colour))
        raise Retry

    def side(self, n: int = 1, low: float = MIN_PX, high: float = MAX_PX) -> float:
        """A log-uniform side in px, smaller among n objects."""
        high = min(high, MAX_PX if n <= 2 else 84 if n <= 4 else 64)
        return math.exp(self.rng.uniform(math.log(low), math.log(high))) * self.k

    def place(self, specs: Sequence[Spec], margin: int = 1) -> list[Thing]:
        """Things for specs at free places, in the order of specs; the largest choose first."""
        sides = [s[2] if len(s) > 2 else self.side(len(specs)) for s in specs]
        tint = 12 * (self.level == 2)
        placed: dict[int, Thing] = {}
        for i in sorted(range(len(specs)), key=lambda j: -sides[j]):
            shade = self.integer(-tint, tint)
            for attempt in range(40):
                if attempt % 10 == 9 and len(specs[i]) == 2:
                    sides[i] = max(MIN_PX * self.k, sides[i] * 0.85)
                r = sides[i] / 2 + margin
                cx, cy = self.rng.uniform(r, self.width - r), self.rng.uniform(r, self.height - r)
                new = thing(specs[i][0], specs[i][1], cx, cy, sides[i], tint=shade)
                if self.inside(new.box) and not any(overlaps(new.box, t.box) for t in placed.values()):
                    break
            else:
                raise Retry
            placed[i] = new
        return [placed[i] for i in range(len(specs))]

    def alone(self, key: Key) -> Thing:
        """One large thing about the middle."""
        x, y = self.rng.uniform(0.4, 0.6, 2)
        return thing(*key, self.width * x, self.height * y, self.rng.uniform(90, 150) * self.k)

    def inside(self, box: Box) -> bool:
        """True when a box lies in the picture."""
        return box[0] >= 0 and box[1] >= 0 and box[2] <= self.width and box[3] <= self.height

    def unit(self, box: Box) -> Box:
        """Px to 0..1."""
        return box[0] / self.width, box[1] / self.height, box[2] / self.width, box[3] / self.height

    def box_text(self, box: Box) -> str:
        """A px box as answers write it."""
        return format_box(self.unit(box))

    def add(self, picture: np.ndarray, things: Iterable[Thing]) -> None:
        """Appends a picture that shows these things."""
        things = list(things)
        if not all(self.inside(t.box) for t in things):
            raise Retry
        self.images.append(picture)
        self.things.append([replace(t) for t in things if not t.hidden])

    # ---- questions
    def ask(
        self,
        image: int,
        box: Box,
        *,
        wording: str = "",
        answer: str = "",
        aux: bool = False,
        phrase: str = "",
        source: str = "",
        question: str = "",
        nth: int = 0,
    ) -> None:
        """Asks for a box (px) in picture number image; the last four fill the wording's fields."""
        wording, unit = wording or self.task, self.unit(box)
        if not self.inside(box) or area(box) <= 0:
            raise AssertionError(f"{self.task}: the answer {box} is no box inside the picture")
        text = self.pick(WORDINGS[wording]).format(phrase=phrase, box=source, question=question, nth=nth)
        task = "naming" if wording == "naming_nth" else wording
        meta: Meta = {"task": task, "image": image, "box": unit, "aux": aux}
        self.questions.append(Question(text, answer or format_box(unit), meta))

    def ask_group(self, phrase: str, image: int, box: Box, *, aux: bool = False) -> None:
        """Asks where among all pictures a description fits."""
        answer = f"It is in the {ORDINALS[image]} image. {self.box_text(box)}"
        self.ask(image, box, wording="group_grounding", answer=answer, aux=aux, phrase=format_ref(phrase))

    def ask_name(self, image: int, t: Thing, *, aux: bool = True) -> None:
        """Asks what is at the box of a thing."""
        wording = "naming_nth" if len(self.images) > 1 else "naming"
        answer = with_article(f"a {COLOURS[t.colour]} {CLASSES[t.cls]}")
        self.ask(image, t.box, wording=wording, answer=answer, aux=aux, source=self.box_text(t.box), nth=image + 1)

    def ask_extra(self, grounding: int, naming: int) -> None:
        """Asks up to so many further questions about the pictures as they are."""
        every = [t for things in self.things for t in things]
        pairs = self.shuffled([(i, t) for i, things in enumerate(self.things) for t in things if t.visible])
        for i, t in pairs:
            phrase = self.describe(t, every) if grounding > 0 else None
            if phrase:
                grounding -= 1
                self.ask_group(phrase, i, t.box, aux=True)
        for i, t in pairs[::-1][:naming]:
            self.ask_name(i, t)

    def describe(self, t: Thing, every: Sequence[Thing]) -> str | None:
        """A phrase that fits t and nothing else in every (compared by identity); None if there is none."""
        cls, colour = CLASSES[t.cls], COLOURS[t.colour]
        others = [e for e in every if e is not t]

        def size(e: Thing) -> float:
            return max(e.box[2] - e.box[0], e.box[3] - e.box[1]) / self.k

        twins = [size(e) for e in others if e.key == t.key]
        options = []
        if size(t) <= SMALL_PX and min(twins, default=LARGE_PX) >= LARGE_PX:
            options.append(f"a small {colour} {cls}")
        if size(t) >= LARGE_PX and max(twins, default=SMALL_PX) <= SMALL_PX:
            options.append(f"a large {colour} {cls}")
        if not twins:
            options += [f"a {colour} {cls}"] * 3 + [f"the {colour} {cls}", f"{colour} {cls}"]
            if self.level and all(e.cls != t.cls for e in others):
                options.append(f"the {cls}")
            if self.level and all(e.colour != t.colour for e in others):
                options.append(f"the {colour} object")
        return with_article(self.pick(options)) if options else None

    def finish(self) -> Sample:
        """The finished set."""
        return {
            "task": self.task,
            "images": self.images,
            "objects": [[_record(t) for t in things] for things in self.things],
            "qas": self.questions[:8],
        }


def _record(t: Thing) -> ObjectRecord:
    x1, y1, x2, y2 = (float(v) for v in t.box)
    return {"cls": t.cls, "col": t.colour, "box": (x1, y1, x2, y2), "visible": t.visible}
