"""Answer text to boxes and points: coordinates, label, score, and which of the pictures each belongs to.

The model writes `<|object_ref_start|>the cup<|object_ref_end|><|box_start|>(x1,y1),(x2,y2)<|box_end|>`, whole numbers
on a grid of 0..1000 over the picture's width and height; tags may be missing. Besides boxes it may write

- a quad, `<|quad_start|>(x,y),(x,y),(x,y),(x,y)<|quad_end|>`, or four points in a row that go round instead of making
  two boxes: read as the box around them;
- a point, as models that click do. One pair of numbers is a point only where nothing else can be meant: in tags
  (`<|box_start|>(x,y)<|box_end|>`, `<point>x y</point>`), as an action's argument (`start_box='(x,y)'`, `click(x,y)`),
  right behind a reference tag, or on a line that holds nothing but points. In running text, "(2,3) of them", it is
  none.

Coordinates up to 5 % beyond the grid (-50..1050) are slips of a model that means the edge: they are moved onto it, and
the box or point is counted as clipped. What lies further out, or wholly outside, is malformed: pixels, for one.

The model says in words which picture it means, or takes it as settled by the question. The picture is what the first of
these names:

1. the answer: the naming words between the box before and this one ("Image-2: <box>", "It's in the third image.
   <box>"), the nearest of those that say where something is, else the nearest; else words right behind the box ("<box>
   in the second image"); else what settled the boxes before it;
2. the question: the picture that it asks to look in (looking.py);
3. the last picture. It is where questions about a change or a counterpart want the answer ("Compare these two images
   ..."), and the only one where there is only one.

What names a picture is in naming.py. Words inside reference tags describe objects ("the second picture on the wall"):
in a question they count only if nothing else names a picture, in an answer not at all.
"""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from .looking import Role, image_asked, roles
from .naming import EN_NOUNS, Mention, fold, mentions
from .prompt import PLACEHOLDER

__all__ = ["Box", "Point", "Reading", "parse_boxes", "read_answer"]

GRID = 1000  # the model's coordinates run 0..GRID on both axes
SLACK = 50  # and are moved back onto it from so far outside


@dataclass(frozen=True)
class Box:
    """One box of an answer.

    image: index of the picture, from 0.   label: what the box shows, "" if neither answer nor question says.
    xyxy: left, top, right, bottom in pixels of the picture as given.   grid: the same as the model wrote it, 0..1000.
    score: 0..1, exp(mean log-probability of the tokens that hold the box's digits); 0.0 when those are not known.
    """

    image: int
    label: str
    xyxy: tuple[float, float, float, float]
    grid: tuple[int, int, int, int]
    score: float


@dataclass(frozen=True)
class Point:
    """One point of an answer; xy: pixels of the picture as given, grid: 0..1000, the rest as of a Box."""

    image: int
    label: str
    xy: tuple[float, float]
    grid: tuple[int, int]
    score: float


@dataclass(frozen=True)
class Reading:
    """What an answer says in coordinates.

    unparsed: boxes and points that stay in the text because they are malformed.   clipped: boxes and points that
    reached a little beyond the grid.
    """

    boxes: tuple[Box, ...]
    points: tuple[Point, ...]
    unparsed: int
    clipped: int


_PAIR = r"\(\s*-?\d{1,6}\s*,\s*-?\d{1,6}\s*\)"
# MIG-Bench's prompt shows <|box_start|> where the closing tag belongs, so the model may close with it.
_RUN = re.compile(
    rf"(?:<\|(?P<tag>box|quad|point)_start\|>\s*)?(?P<run>{_PAIR}(?:\s*,\s*{_PAIR})*)"
    r"(?P<close>\s*<\|(?:box|quad|point)_end\|>|\s*<\|box_start\|>(?!\s*\())?",
    re.ASCII,
)
_NUMBERS = re.compile(r"\(\s*(-?\d{1,6})\s*,\s*(-?\d{1,6})\s*\)", re.ASCII)
_POINT_TAG = re.compile(r"<point>\s*[(\[]*\s*(-?\d{1,6})(?:\s*,\s*|\s+)(-?\d{1,6})\s*[)\]]*\s*</point>", re.ASCII)
_BROKEN_TAGGED = re.compile(
    r"<\|(?:box|quad|point)_start\|>(?:(?!<\|(?:box|quad|point)_(?:start|end)\|>).)*(?:<\|(?:box|quad|point)_end\|>)?"
    r"|<point>(?:(?!</?point>).)*(?:</point>)?",
    re.DOTALL,
)
_BROKEN_BARE = re.compile(r"\(\s*-?\d[\d.,\s-]{0,40}\)\s*,\s*\(")
_ARGUMENT = re.compile(
    r"(?:\b(?:start|end)_(?:box|point)|\bbox|\bpoint|\bcoordinates?|\bposition|\bxy)\s*=\s*[\"']?$"
    r"|[\"'](?:(?:start|end)_(?:box|point)|box|point|coordinates?|position|xy)[\"']\s*:\s*[\"']?$"
    r"|\b(?:(?:left|right|middle|double|triple)_?)?(?:click|single|double)$"
    r"|\b(?:tap|touch|press|long_press|hover|move_?to|drag_?to)$",
    re.IGNORECASE,
)
_LINE_OF_POINTS = re.compile(rf"\W*(?:\d{{1,3}}[.):]\s)?[\s\"'`\[]*{_PAIR}(?:[\s;]+{_PAIR})*[\s\"'`\].;]*", re.ASCII)

_REFERENCE = re.compile(r"<\|object_ref_start\|>(.*?)<\|object_ref_end\|>", re.DOTALL)
_REFERENCE_END = re.compile(r"<\|object_ref_end\|>\s*$")
_TAG = re.compile(r"<\|\w+\|>")
# "Image-1: <image>" says where a picture stands, not where to look
_LABELLED_PICTURE = re.compile(
    rf"(?:(?:^|(?<=[\n.>]))[^\n.:>]{{0,24}}:\s*|\b(?:{EN_NOUNS})\s*[-_#]?\s*\d+\s*)?(?:{PLACEHOLDER.pattern})",
    re.IGNORECASE,
)
_BEHIND = re.compile(
    r"[\s,(]*(?:is\s+|是)?(?:(?:in|on|of|from|at|within|inside)\s+|位于|出现在|存在于|来自|属于|在)?\s*(?:the\s+)?",
    re.IGNORECASE,
)
_INTRODUCES = re.compile(r"[里内中上]?\s*:")  # "Image-2:" speaks of the box that follows


@dataclass(frozen=True)
class _Locus:
    """Where an answer's text has coordinates. kind: "box", "quad", "point", or "" where they are malformed."""

    start: int
    end: int
    kind: str
    numbers: tuple[int, ...]
    digits: tuple[tuple[int, int], ...]

    @property
    def sound(self) -> bool:
        """Whether it is a box or point that lies on the grid, or reaches no further beyond than SLACK."""
        xs, ys = self.numbers[::2], self.numbers[1::2]
        if not self.kind or not all(-SLACK <= v <= GRID + SLACK for v in self.numbers):
            return False
        if self.kind == "point":
            return True
        ordered = self.kind == "quad" or (xs[0] <= xs[1] and ys[0] <= ys[1])
        return ordered and all(min(v) <= GRID and max(v) >= 0 for v in (xs, ys))

    @property
    def clipped(self) -> bool:
        return any(not 0 <= v <= GRID for v in self.numbers)

    def grid(self) -> tuple[int, ...]:
        """The point, or the box around all points, on the grid."""
        xs, ys = ([min(GRID, max(0, v)) for v in self.numbers[axis::2]] for axis in (0, 1))
        return (xs[0], ys[0]) if self.kind == "point" else (min(xs), min(ys), max(xs), max(ys))


def parse_boxes(
    text: str,
    *,
    prompt: str,
    sizes: Sequence[tuple[int, int]],
    token_spans: Iterable[tuple[int, int, float]] | None = None,
) -> tuple[tuple[Box, ...], int]:
    """Reads the boxes of an answer alone: (boxes, unparsed) of `read_answer`."""
    reading = read_answer(text, prompt=prompt, sizes=sizes, token_spans=token_spans)
    return reading.boxes, reading.unparsed


def read_answer(
    text: str,
    *,
    prompt: str,
    sizes: Sequence[tuple[int, int]],
    token_spans: Iterable[tuple[int, int, float]] | None = None,
    loop: int | None = None,
) -> Reading:
    """Reads all boxes and points of an answer, in their order.

    prompt: the question.   sizes[i]: (width, height) in pixels of picture i as given.
    token_spans: (start, end, log-probability) of the answer's tokens, in characters of text, for the scores.
    loop: where in text a loop begins in which the answer ran until it was cut (loops.py). A box or point in it that
    was there before, equal in picture, label and coordinates, is left out; malformed pieces that are equal count once,
    and the one that the cut tore is none.
    A box is not invented from a damaged one: corners out of order, numbers far beyond the grid, a number missing, an
    end that never came, or no picture to lie in leave it in the text and count in `unparsed`.
    Label: the nearest `<|object_ref_start|>` words before it, else the question's if it has exactly one, else "".
    """
    folded = fold(text)
    loci = list(_loci(folded))
    sound = [locus for locus in loci if sizes and locus.sound]
    images = _resolve(folded, loci, sound, prompt, len(sizes))
    spans, loop = list(token_spans or ()), len(text) if loop is None else loop
    found: list[tuple[Box | Point, bool]] = []
    said = set()
    for locus, image in zip(sound, images, strict=True):
        label, grid = _label(text[: locus.start], prompt), locus.grid()
        if locus.start < loop or (image, label, grid) not in said:
            found.append((_placed(image, label, grid, sizes[image], _score(locus, spans)), locus.clipped))
            said.add((image, label, grid))
    malformed = [(locus.start, text[locus.start : locus.end]) for locus in loci if not (sizes and locus.sound)]
    malformed += _broken(folded, loci, cut=loop < len(text))
    placed = [item for item, _ in found]
    return Reading(
        boxes=tuple(item for item in placed if isinstance(item, Box)),
        points=tuple(item for item in placed if isinstance(item, Point)),
        unparsed=len({piece if start >= loop else start for start, piece in malformed}),
        clipped=sum(clipped for _, clipped in found),
    )


def _placed(image: int, label: str, grid: tuple[int, ...], size: tuple[int, int], score: float) -> Box | Point:
    width, height = size
    pixels = tuple(v * side / GRID for v, side in zip(grid, (width, height) * 2, strict=False))
    if len(grid) == 2:
        return Point(image, label, pixels, grid, score)  # type: ignore[arg-type]
    return Box(image, label, pixels, grid, score)  # type: ignore[arg-type]


def _loci(text: str) -> Iterator[_Locus]:
    """Finds all coordinates in a folded text that are meant as boxes, quads or points, sound or not, in their order."""
    found = [_Locus(m.start(), m.end(), "point", *_read([m])) for m in _POINT_TAG.finditer(text)]
    for m in _RUN.finditer(text):
        if not any(locus.start <= m.start() < locus.end for locus in found):
            found += _loci_of(text, m)
    yield from sorted(found, key=lambda locus: locus.start)


def _loci_of(text: str, m: re.Match[str]) -> Iterator[_Locus]:
    """Cuts one run of number pairs into what it is made of."""
    pairs = list(_NUMBERS.finditer(text, m.start("run"), m.end("run")))
    kind, size = _made_of(text, m, pairs)
    groups = [pairs[i : i + size] for i in range(0, len(pairs), size)] if size else []
    for i, group in enumerate(groups):
        start = m.start() if i == 0 else group[0].start()
        end = m.end() if i == len(groups) - 1 else group[-1].end()
        yield _Locus(start, end, kind if len(group) == size else "", *_read(group))


def _made_of(text: str, m: re.Match[str], pairs: Sequence[re.Match[str]]) -> tuple[str, int]:
    """What a run of pairs consists of, "" for nothing sound, and how many pairs make one; 0: no coordinates at all."""
    if m["tag"] == "point" and m["close"]:
        return "point", 1
    if len(pairs) == 1:
        return ("point", 1) if _is_point(text, m) else ("", 0)
    if len(pairs) == 4 and (m["tag"] == "quad" or _goes_round(_read(pairs)[0])):
        return "quad", 4
    if m["tag"] == "point" or (m["tag"] == "quad" and len(pairs) != 2):
        return "", len(pairs)
    return "box", 2


def _goes_round(v: Sequence[int]) -> bool:
    """Whether four points are a quad's corners in turn: its opposite sides run in opposite directions."""
    return (v[2] - v[0]) * (v[6] - v[4]) + (v[3] - v[1]) * (v[7] - v[5]) < 0


def _read(pairs: Sequence[re.Match[str]]) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
    """Their numbers, and where the digits stand."""
    numbers = tuple(int(p[group]) for p in pairs for group in (1, 2))
    return numbers, tuple(p.span(group) for p in pairs for group in (1, 2))


def _is_point(text: str, m: re.Match[str]) -> bool:
    """Whether a single pair of numbers is meant as a point."""
    if m["tag"]:
        return m["tag"] == "box" and bool(m["close"])
    start, end = m.start("run"), m.end("run")
    if _ARGUMENT.search(text, max(0, start - 40), start) or _REFERENCE_END.search(text, max(0, start - 40), start):
        return True
    line = text[text.rfind("\n", 0, start) + 1 : (text.find("\n", end) + 1 or len(text) + 1) - 1]
    return bool(_LINE_OF_POINTS.fullmatch(_TAG.sub(" ", line)))


def _broken(text: str, loci: Sequence[_Locus], *, cut: bool) -> list[tuple[int, str]]:
    """Finds what began as a box, by its tag or by a point with another behind it, and is none: (start, piece).

    cut: without the piece that the end of the text tore.
    """
    left = _without(text, loci, "\n")
    tagged = [m for m in _BROKEN_TAGGED.finditer(left) if not m[0].startswith("<point>") or re.search(r"\d", m[0])]
    for m in tagged:
        left = left[: m.start()] + "\n" * len(m[0]) + left[m.end() :]
    found = [*tagged, *_BROKEN_BARE.finditer(left)]
    return [(m.start(), m[0].strip()) for m in found if not cut or re.search(r"[^\d\s,()-]", text[m.end() :])]


def _label(before: str, prompt: str) -> str:
    in_answer = _REFERENCE.findall(before)
    in_question = _REFERENCE.findall(prompt)
    found = in_answer[-1:] or (in_question if len(in_question) == 1 else [""])
    return " ".join(_TAG.sub(" ", found[0]).split())


def _score(locus: _Locus, spans: Sequence[tuple[int, int, float]]) -> float:
    values = [p for start, end, p in spans if any(start < stop and end > begin for begin, stop in locus.digits)]
    if not values:
        return 0.0
    mean = math.fsum(values) / len(values) if all(map(math.isfinite, values)) else -math.inf
    return min(1.0, math.exp(mean))


def _without(text: str, loci: Iterable[_Locus], filler: str) -> str:
    """The text with every locus overwritten; positions stay."""
    parts, at = [], 0
    for locus in loci:
        parts += [text[at : locus.start], filler * (locus.end - locus.start)]
        at = locus.end
    return "".join([*parts, text[at:]])


def _blank(text: str, pattern: re.Pattern[str]) -> str:
    return pattern.sub(lambda m: " " * len(m[0]), text)


def _resolve(text: str, loci: Sequence[_Locus], sound: Sequence[_Locus], prompt: str, pictures: int) -> list[int]:
    """Finds the picture of each sound box and point, by the rules at the top of this file."""
    if pictures < 2:
        return [0] * len(sound)
    words = _blank(_without(text, loci, " "), _REFERENCE)
    named = mentions(words, pictures, answer=True)
    graded = dict(zip(named, roles(words, named), strict=True))
    settled = _image_of_question(prompt, pictures)
    images, before = [], 0
    taken: set[Mention] = set()  # words behind a box are its own, not the next one's
    for locus in sound:
        ahead = [m for m in named if before <= m.start and m.end <= locus.start and m not in taken]
        behind = [m for m in named if m.start >= locus.end and _BEHIND.fullmatch(words, locus.end, m.start)]
        behind = [m for m in behind if not _INTRODUCES.match(words, m.end)]
        if ahead:
            settled = _nearest(ahead, graded)
            images.append(settled)
        elif behind:
            images.append(behind[0].image)
            taken.add(behind[0])
        else:
            images.append(settled)
        before = locus.end
    return images


def _nearest(ahead: Sequence[Mention], graded: dict[Mention, Role]) -> int:
    """Of the mentions ahead of a box the nearest that says where something is, else the nearest."""
    for least in (Role.NOTICED, Role.REFERENCE, Role.EXCLUDED):
        sure = [m.image for m in ahead if graded[m] >= least]
        if sure:
            return sure[-1]
    return ahead[-1].image


def _image_of_question(prompt: str, pictures: int) -> int:
    prompt = fold(prompt.replace("Format:", " Format:"))  # MIG-Bench glues its request for a format to the last word
    prompt = _blank(_blank(prompt, _LABELLED_PICTURE), _RUN)
    for words in (_blank(prompt, _REFERENCE), _TAG.sub(" ", prompt)):
        image = image_asked(words, pictures)
        if image is not None:
            return image
    return pictures - 1
