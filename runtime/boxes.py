"""Answer text to boxes: coordinates, label, score, and which of the pictures each box belongs to.

The model writes `<|object_ref_start|>the cup<|object_ref_end|><|box_start|>(x1,y1),(x2,y2)<|box_end|>`, whole numbers
on a grid of 0..1000 over the picture's width and height; tags may be missing. It says in words which picture it means,
or takes it as settled by the question. A box's picture is the first of these that names one of the given pictures:

1. the answer: the nearest naming words between the box before and this one ("Image-2: <box>", "It's in the third
   image. <box>"), else words right behind the box ("<box> in the second image"), else the nearest before it at all;
2. the question: the picture that a locating verb points to ("For the object in the first image ..., locate it in the
   4th image" is the 4th), in the last sentence that has one; else the last picture it names;
3. the last picture. It is where questions about a change or a counterpart want the answer ("Compare these two images
   ..."), and the only one where there is only one.

Words that name a picture: "third image", "3rd picture", "2th image", "Image-3", "image 3", "Image3", "photo #2", "image
two", "last frame"; "source image" is the first; in an answer also "the second one". A number beyond the pictures names
none. Words inside reference tags describe objects ("the second picture on the wall"): in a question they count only if
nothing else names a picture, in an answer not at all.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

__all__ = ["Box", "parse_boxes"]

GRID = 1000  # the model's coordinates run 0..GRID on both axes


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


_POINT = r"\(\s*(\d{1,6})\s*,\s*(\d{1,6})\s*\)"
# MIG-Bench's prompt shows <|box_start|> where the closing tag belongs, so the model may close with it.
_BOX = re.compile(
    rf"(?:<\|box_start\|>\s*)?{_POINT}\s*,\s*{_POINT}(?:\s*<\|box_end\|>|\s*<\|box_start\|>(?!\s*\())?", re.ASCII
)
_BROKEN_TAGGED = re.compile(r"<\|box_start\|>(?:(?!<\|box_(?:start|end)\|>).)*(?:<\|box_end\|>)?", re.DOTALL)
_BROKEN_BARE = re.compile(r"\(\s*-?\d[\d.,\s-]{0,40}\)\s*,\s*\(")
_REFERENCE = re.compile(r"<\|object_ref_start\|>(.*?)<\|object_ref_end\|>", re.DOTALL)
_TAG = re.compile(r"<\|\w+\|>")

# fmt: off
_ORDINALS = ["first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth", "eleventh",
             "twelfth"]
_CARDINALS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
# fmt: on
_NUMBER_WORDS = {word: i for words in (_ORDINALS, _CARDINALS) for i, word in enumerate(words)}
_NOUN = "image|picture|photograph|photo|frame|view|img|pic"


def _naming(nouns: str) -> re.Pattern[str]:
    """Words that name a picture; nouns: those that an ordinal may stand before."""
    nth = rf"(?:(?P<nth>\d{{1,4}})\s?(?:st|nd|rd|th)|(?P<word>{'|'.join(_ORDINALS)})|(?P<last>last|final))"
    number = rf"(?:(?P<n>\d{{1,4}})(?![\d.]*\d)|(?P<cardinal>{'|'.join(_CARDINALS)})\b)"
    named = rf"(?:{_NOUN})s?\s*(?:[-_#:]|no\.|number)?\s*#?{number}"
    return re.compile(
        rf"\b(?:{nth}[\s-]+(?:{nouns})\b|(?P<source>source)[\s-]+(?:{_NOUN})\b|{named})", re.IGNORECASE | re.ASCII
    )


_IN_QUESTION = _naming(_NOUN)
_IN_ANSWER = _naming(_NOUN + "|one")
_BEHIND = re.compile(r"[\s,(]*(?:(?:in|on|of|from|at|within|inside)\s+)?(?:the\s+)?", re.IGNORECASE)
_INTRODUCES = re.compile(r"\s*:")  # "Image-2:" speaks of the box that follows

_SENTENCE_END = re.compile(r"[.?!;](?=\s|$)|\n")
_LOCATE = re.compile(
    r"\b(?:locat\w*|find|ground|identify|recogni[sz]e|detect|spot|point|mark|track|where|which|what|box|give|provide"
    r"|show|tell)\b",
    re.IGNORECASE,
)
_RELATION = re.compile(
    r"\b(?:that|which|who|whose|as|than|like|to|with|for|from|of|marked|boxed|outlined|highlighted|shown|seen|match\w*"
    r"|similar|same|on)\b",
    re.IGNORECASE,
)
_MARKED = re.compile(r"\b(?:marked|boxed|outlined|highlighted|shown|seen|given|same|as|like|of|from)\b", re.IGNORECASE)


@dataclass(frozen=True)
class _Mention:
    start: int
    end: int
    image: int


def parse_boxes(
    text: str,
    *,
    prompt: str,
    sizes: Sequence[tuple[int, int]],
    token_spans: Iterable[tuple[int, int, float]] | None = None,
) -> tuple[tuple[Box, ...], int]:
    """Reads all boxes of an answer, in their order.

    prompt: the question.   sizes[i]: (width, height) in pixels of picture i as given.
    token_spans: (start, end, log-probability) of the answer's tokens, in characters of text, for the scores.
    Returns (boxes, unparsed). A box is not invented from a damaged one: corners out of order, numbers over 1000, a
    number missing, an end that never came, or no picture to lie in leave it in the text and count in `unparsed`.
    Label: the nearest `<|object_ref_start|>` words before the box, else the question's if it has exactly one, else "".
    """
    spans = list(token_spans or ())
    matches = list(_BOX.finditer(text))
    sound = [m for m in matches if sizes and _is_sound(m)]
    images = _resolve(text, sound, prompt, len(sizes))
    boxes = []
    for match, image in zip(sound, images, strict=True):
        grid = _grid(match)
        width, height = sizes[image]
        x1, y1, x2, y2 = (v * side / GRID for v, side in zip(grid, (width, height, width, height), strict=True))
        label = _label(text[: match.start()], prompt)
        boxes.append(Box(image, label, (x1, y1, x2, y2), grid, _score(match, spans)))
    unparsed = len(matches) - len(sound) + _count_broken(text, matches)
    return tuple(boxes), unparsed


def _grid(match: re.Match[str]) -> tuple[int, int, int, int]:
    x1, y1, x2, y2 = (int(v) for v in match.groups())
    return x1, y1, x2, y2


def _is_sound(match: re.Match[str]) -> bool:
    x1, y1, x2, y2 = _grid(match)
    return x1 <= x2 <= GRID and y1 <= y2 <= GRID


def _count_broken(text: str, matches: Sequence[re.Match[str]]) -> int:
    """Counts what began as a box, by its tag or by a point with another behind it, and is none."""
    rest, at = [], 0
    for match in matches:
        rest.append(text[at : match.start()])
        at = match.end()
    left = "\n".join([*rest, text[at:]])
    tagged = _BROKEN_TAGGED.findall(left)
    return len(tagged) + len(_BROKEN_BARE.findall(_BROKEN_TAGGED.sub("\n", left)))


def _label(before: str, prompt: str) -> str:
    in_answer = _REFERENCE.findall(before)
    in_question = _REFERENCE.findall(prompt)
    found = in_answer[-1:] or (in_question if len(in_question) == 1 else [""])
    return " ".join(_TAG.sub(" ", found[0]).split())


def _score(match: re.Match[str], spans: Sequence[tuple[int, int, float]]) -> float:
    digits = [match.span(group) for group in range(1, 5)]
    values = [p for start, end, p in spans if any(start < stop and end > begin for begin, stop in digits)]
    if not values:
        return 0.0
    mean = math.fsum(values) / len(values) if all(map(math.isfinite, values)) else -math.inf
    return min(1.0, math.exp(mean))


def _mentions(text: str, pattern: re.Pattern[str], pictures: int) -> list[_Mention]:
    """Finds all words in text that name one of the pictures, in their order."""
    found = []
    for m in pattern.finditer(text):
        word = (m["word"] or m["cardinal"] or "").lower()
        if m["source"]:
            image = 0
        elif m["last"]:
            image = pictures - 1
        else:
            image = _NUMBER_WORDS[word] if word else int(m["nth"] or m["n"]) - 1
        if 0 <= image < pictures:
            found.append(_Mention(m.start(), m.end(), image))
    return found


def _blank(text: str, pattern: re.Pattern[str]) -> str:
    return pattern.sub(lambda m: " " * len(m[0]), text)


def _resolve(text: str, boxes: Sequence[re.Match[str]], prompt: str, pictures: int) -> list[int]:
    """Finds the picture of each box, by the rules at the top of this file."""
    if pictures < 2:
        return [0] * len(boxes)
    words = _blank(_blank(text, _BOX), _REFERENCE)
    left = _mentions(words, _IN_ANSWER, pictures)
    default = _image_of_question(prompt, pictures)
    images, before = [], 0
    taken: set[_Mention] = set()  # words behind a box are its own, not the next one's
    for box in boxes:
        ahead = [m for m in left if m.end <= box.start() and m not in taken]
        behind = [m for m in left if m.start >= box.end() and _BEHIND.fullmatch(words, box.end(), m.start)]
        behind = [m for m in behind if not _INTRODUCES.match(words, m.end)]
        if ahead and ahead[-1].start >= before:
            images.append(ahead[-1].image)
        elif behind:
            images.append(behind[0].image)
            taken.add(behind[0])
        else:
            images.append(ahead[-1].image if ahead else default)
        before = box.end()
    return images


def _image_of_question(prompt: str, pictures: int) -> int:
    prompt = prompt.replace("Format:", " Format:")  # MIG-Bench glues its request for a format to the last word
    for words in (_blank(_blank(prompt, _BOX), _REFERENCE), _TAG.sub(" ", prompt)):
        mentions = _mentions(words, _IN_QUESTION, pictures)
        if mentions:
            asked = _asked_in(words, mentions)
            return (asked or mentions[-1]).image
    return pictures - 1


def _asked_in(words: str, mentions: Sequence[_Mention]) -> _Mention | None:
    """Finds the mention that a locating verb points to, in the last sentence that has such a pair."""
    starts = [0, *(m.end() for m in _SENTENCE_END.finditer(words)), len(words)]
    for start, end in reversed(list(pairwise(starts))):
        inside = [m for m in mentions if start <= m.start < end]
        for verb in reversed(list(_LOCATE.finditer(words, start, end))):
            target = _pointed_at(words, verb.end(), [m for m in inside if m.start >= verb.end()])
            if target is not None:
                return target
    return None


def _pointed_at(words: str, verb_end: int, mentions: Sequence[_Mention]) -> _Mention | None:
    """Of the pictures named behind a verb, takes the one to look in.

    "locate in Image-2 the object that feeds the animal of Image-1": the first, a relation follows it.
    "locate the object marked in the first image in the second image": the last, the others only say which object.
    """
    target, at = None, verb_end
    for mention in mentions:
        gap = words[at : mention.start]
        if target is not None and _RELATION.search(gap):
            break
        if not _MARKED.search(gap) or mention is mentions[-1]:
            target = mention
        at = mention.end
    return target
