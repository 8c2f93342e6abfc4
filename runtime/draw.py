"""The contact sheet: all pictures of a question on one page, with the boxes and points of its answer.

Every picture gets a cell of the same size, small ones are enlarged, large ones reduced, so that a box is as easy to
see on a 196-pixel drawing as on a photograph. All lengths are in pixels of the sheet.
"""

import math
import re
from bisect import bisect_right
from collections.abc import Sequence

from PIL import Image, ImageColor, ImageDraw

from .boxes import Box, Point
from .fonts import Lettering, clean

__all__ = ["contact_sheet"]

_SHEET_WIDTH = 1440  # aimed at; few or many pictures make it narrower or wider
_CELL_SIDES = (160, 560)  # least and greatest
_GAP = 24
_PAPER, _INK, _FAINT, _EDGE = "#ffffff", "#1d2129", "#5b6472", "#c9ced6"
_COLOURS = (
    "#e6194b",
    "#0a7cff",
    "#12a150",
    "#f58231",
    "#911eb4",
    "#00a3a3",
    "#d6a300",
    "#f032e6",
    "#8a5a2b",
    "#4b5bd6",
)
_TAG = re.compile(r"<\|\w+\|>")
_WIDE = r"\u3000-\u30ff\u3400-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff"  # scripts without spaces
_PIECES = re.compile(rf"\s*(?:[{_WIDE}]|[^\s{_WIDE}]+)")
_LONGEST = 200, 2000  # letters of a label and of a title that are looked at
_TITLE_LINES = 8


def contact_sheet(
    pictures: Sequence[Image.Image], boxes: Sequence[Box], *, points: Sequence[Point] = (), title: str = ""
) -> Image.Image:
    """Draws all pictures in a grid, captioned "Image 1" and so on, with their boxes and points, labels and scores.

    pictures: upright, any mode, as given to the model: `Box.xyxy` counts their pixels.   boxes, points (drawn as
    crosses): those of a picture that is not there are left out.   title: the question; tags are dropped, long lines
    wrapped, at most 8 of them.
    Colours follow the labels if there are several, else the pictures. Each letter is drawn with a font that has it;
    `fonts.undrawable` names those that no font here has, which appear as empty squares.
    Returns an RGB image.
    """
    columns = _columns(len(pictures))
    side = min(_CELL_SIDES[1], max(_CELL_SIDES[0], (_SHEET_WIDTH - _GAP * (columns + 1)) // columns))
    marks: list[Box | Point] = [*boxes, *points]
    colours = _colours(marks)
    tiles = [_tile(picture, [m for m in marks if m.image == i], side, colours) for i, picture in enumerate(pictures)]
    rows = [tiles[i : i + columns] for i in range(0, len(tiles), columns)]

    title_font, caption_font = Lettering(24), Lettering(18)
    # Cells are as wide as the widest picture, so that a row of tall ones is not mostly paper.
    cell = max((tile.width for tile in tiles), default=side)
    width = max(columns * (cell + _GAP) + _GAP, 480)
    lines = _wrap(clean(_TAG.sub("", title)), title_font, width - 2 * _GAP)
    top = _GAP + len(lines) * 32 + (12 if lines else 0)
    height = top + sum(max(tile.height for tile in row) + 28 + _GAP for row in rows)
    sheet = Image.new("RGB", (width, max(height, top + _GAP // 2)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, line in enumerate(lines):
        title_font.write(draw, (_GAP, _GAP + 32 * i + title_font.ascent), line, _INK)

    left = (width - columns * (cell + _GAP) + _GAP) // 2
    y = top
    for r, row in enumerate(rows):
        for c, tile in enumerate(row):
            x = left + c * (cell + _GAP)
            caption_font.write(draw, (x, y + caption_font.ascent), f"Image {r * columns + c + 1}", _FAINT)
            sheet.paste(tile, (x, y + 28))
            draw.rectangle((x - 1, y + 27, x + tile.width, y + 28 + tile.height), outline=_EDGE)
        y += max(tile.height for tile in row) + 28 + _GAP
    return sheet


def _columns(count: int) -> int:
    """Up to three in a row; four as two by two; then as a page a little wider than high."""
    if count <= 3:
        return max(count, 1)
    return 2 if count == 4 else math.ceil(math.sqrt(count * 1.3))


def _colours(marks: Sequence[Box | Point]) -> dict[str | int, str]:
    labels = list(dict.fromkeys(mark.label for mark in marks))
    keys: list[str | int] = [*labels] if len(labels) > 1 else sorted({mark.image for mark in marks})
    return {key: _COLOURS[i % len(_COLOURS)] for i, key in enumerate(keys)}


def _tile(
    picture: Image.Image, marks: Sequence[Box | Point], side: int, colours: dict[str | int, str]
) -> Image.Image:
    """One picture at the size of its cell, its boxes and points drawn on it."""
    scale = side / max(picture.size)
    width, height = (max(1, round(v * scale)) for v in picture.size)
    tile = picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0)
    draw = ImageDraw.Draw(tile)
    font = Lettering(max(13, min(18, side // 24)))
    places = []
    for mark in marks:
        colour = colours.get(mark.label) or colours.get(mark.image) or _COLOURS[0]
        if isinstance(mark, Point):
            place = _cross(draw, mark, scale, colour)
        else:
            place = _place(mark, scale, width, height)
            _outline(draw, place, colour)
        places.append((mark, place, colour))
    taken: list[tuple[int, int, int, int]] = []  # labels last: no line may cross one
    for mark, place, colour in places:
        _write_label(draw, mark, place, colour, font, taken)
    return tile


def _cross(draw: ImageDraw.ImageDraw, point: Point, scale: float, colour: str) -> tuple[int, int, int, int]:
    """Two crossed lines with pale edges; returns the square around them."""
    width, height = draw.im.size
    x, y = min(round(point.xy[0] * scale), width - 1), min(round(point.xy[1] * scale), height - 1)
    for line, reach, thick in (("white", 12, 5), (colour, 11, 3)):
        draw.line((x - reach, y, x + reach, y), fill=line, width=thick)
        draw.line((x, y - reach, x, y + reach), fill=line, width=thick)
    return x - 12, y - 12, x + 12, y + 12


def _place(box: Box, scale: float, width: int, height: int) -> tuple[int, int, int, int]:
    """A box in pixels of the tile: whole, inside it, and large enough to be seen."""
    x1, y1, x2, y2 = (round(v * scale) for v in box.xyxy)
    x1, y1 = max(0, min(x1, width - 6)), max(0, min(y1, height - 6))
    return x1, y1, max(x1 + 5, min(x2, width - 1)), max(y1 + 5, min(y2, height - 1))


def _outline(draw: ImageDraw.ImageDraw, place: tuple[int, int, int, int], colour: str) -> None:
    """A coloured line between two thin pale ones: seen on dark, on bright and on its own colour."""
    x1, y1, x2, y2 = place
    draw.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline="white", width=1)
    draw.rectangle(place, outline=colour, width=3)
    if x2 - x1 > 8 and y2 - y1 > 8:
        draw.rectangle((x1 + 3, y1 + 3, x2 - 3, y2 - 3), outline="white", width=1)


def _write_label(
    draw: ImageDraw.ImageDraw,
    box: Box | Point,
    place: tuple[int, int, int, int],
    colour: str,
    font: Lettering,
    taken: list[tuple[int, int, int, int]],
) -> None:
    """Writes label and score on a patch of the box's colour: above the box, else below it, else inside."""
    score = f"{box.score:.2f}" if box.score > 0 else ""
    width, height = draw.im.size
    words = _shorten(clean(box.label[: _LONGEST[0]]), font, width - 14 - font.length(f"  {score}"))
    text = f"{words}  {score}".strip()
    if not text:
        return
    up, down = font.extent(f"{text}Ag")
    margin = font.size // 3
    w, h = math.ceil(font.length(text)) + 10, up + down + 2 * margin
    x1, y1, x2, y2 = place
    x = max(0, min(x1 - 1, width - w))
    spots = [(x, y1 - h), (x, y2 + 1), (x, y1 + 4), (x, y2 - h - 4), (max(0, min(x2 - w, width - w)), y1 + 4)]
    inside = [(a, b) for a, b in spots if 0 <= b <= height - h] or [(x, max(0, height - h))]
    free = [(a, b) for a, b in inside if all(a >= r or a + w <= p or b >= s or b + h <= q for p, q, r, s in taken)]
    a, b = (free or inside)[0]
    taken.append((a, b, a + w, b + h))
    red, green, blue = ImageColor.getrgb(colour)[:3]
    ink = "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 150 else "white"
    draw.rectangle((a, b, a + w - 1, b + h - 1), fill=colour)
    font.write(draw, (a + 5, b + margin + up), text, ink)


def _shorten(text: str, font: Lettering, room: float) -> str:
    if font.length(text) <= room:
        return text
    fits = bisect_right(range(1, len(text)), room, key=lambda n: font.length(text[:n] + "..."))
    return text[:fits].rstrip() + "..." if fits else ""


def _wrap(text: str, font: Lettering, room: float) -> list[str]:
    """Cuts text into lines no wider than room, at spaces; what is longer than a line, and Chinese, is cut anywhere."""
    lines = [""]
    for piece in _PIECES.findall(text[: _LONGEST[1]]):
        if font.length(f"{lines[-1]}{piece}".strip()) <= room:
            lines[-1] = f"{lines[-1]}{piece}".lstrip()
            continue
        lines.append("")
        for letter in piece.strip():
            if font.length(lines[-1] + letter) > room:
                lines.append("")
            lines[-1] += letter
    lines = [line.rstrip() for line in lines if line.strip()]
    if len(lines) > _TITLE_LINES:
        return [*lines[: _TITLE_LINES - 1], _shorten(" ".join(lines[_TITLE_LINES - 1 :])[: _LONGEST[0]], font, room)]
    return lines
