"""Letters of every script on the contact sheet: each from a font that has it.

Pillow's own font comes first. What it lacks is looked for in MIGICIAN_FONT (a font file), in the fonts that fontconfig
names for the script and, where there is no fontconfig, in the usual folders. A font has a letter if it draws something
else than what it draws for a code point that no font has.
"""

import os
import subprocess
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from PIL import ImageDraw, ImageFont, features

from .errors import MigicianError

__all__ = ["Lettering", "advice", "clean", "undrawable"]

_PROBE_PX = 24
_MOST_FONTS = 300  # looked at where there is no fontconfig
_MOST_CANDIDATES = 24
_MOST_QUESTIONS = 40  # to fontconfig, tens of milliseconds each
_NOWHERE = ("\U0010ffff", "\uffff")  # not characters: a font draws them as it draws what it lacks
_FOLDERS = (
    "~/.fonts", "~/.local/share/fonts", "/usr/local/share/fonts", "/usr/share/fonts", "/usr/X11R6/lib/X11/fonts",
    "~/Library/Fonts", "/Library/Fonts", "/System/Library/Fonts", "C:/Windows/Fonts",
)  # fmt: skip
# Parts of file names, those with the most letters first.
_LIKELY = ("notosanscjk", "sourcehansans", "wqy", "droidsansfallback", "msyh", "pingfang", "hiragino", "arialuni",
           "unifont", "notosans", "dejavusans")  # fmt: skip
_LANGUAGES = {"HIRAGANA": "ja", "KATAKANA": "ja", "HANGUL": "ko", "BOPOMOFO": "zh-tw", "CJK": "zh-cn"}
_EAST_ASIAN = frozenset({*_LANGUAGES, "IDEOGRAPHIC", "FULLWIDTH", "HALFWIDTH"})
_JOINERS = "\u200c\u200d"


@dataclass(frozen=True)
class _Face:
    """A font in a file; an empty path is Pillow's own."""

    path: str = ""
    index: int = 0

    def at(self, size: int, *, shaped: bool = True) -> ImageFont.FreeTypeFont:
        """The font at a size in pixels. Raises OSError for a file that is no font or has no such size."""
        return _open_face(self, size, shaped)


@lru_cache(maxsize=256)
def _open_face(face: _Face, size: int, shaped: bool) -> ImageFont.FreeTypeFont:
    # Unshaped, a letter is one glyph of the font's table: what the font has, not what a neighbour makes of it.
    engine = None if shaped else ImageFont.Layout.BASIC
    if face.path:
        return ImageFont.truetype(face.path, size, index=face.index, layout_engine=engine)
    own = ImageFont.load_default(size)
    assert isinstance(own, ImageFont.FreeTypeFont)  # given a size, Pillow returns nothing else
    return own.font_variant(layout_engine=engine) if engine is not None else own


_OWN = _Face()
_used: dict[tuple[str, _Face], None] = {}  # found so far, by language: one font for a text rather than several


@lru_cache(maxsize=512)
def _nowhere(face: _Face) -> frozenset[tuple[tuple[int, int], bytes]]:
    """What the font draws for a letter that it lacks."""
    return frozenset(_ink(face, letter) for letter in _NOWHERE)


def _ink(face: _Face, letter: str) -> tuple[tuple[int, int], bytes]:
    mask = face.at(_PROBE_PX, shaped=False).getmask(letter)
    return mask.size, bytes(mask)


@lru_cache(maxsize=65536)
def _has(face: _Face, letter: str) -> bool:
    try:
        size, ink = _ink(face, letter)
        if letter.isspace():
            return True
        return any(ink) and (size, ink) not in _nowhere(face)
    except (OSError, ValueError):  # no font, or a bitmap one without this size: colour emoji
        return False


def clean(text: str) -> str:
    """Text as it can be written on one line: no control or direction characters, runs of blanks as one space."""
    kept = []
    for letter in unicodedata.normalize("NFC", text.encode("utf-8", "replace").decode()):
        kind = unicodedata.category(letter)
        if kind == "Cc" or letter in "\u2028\u2029":
            kept.append(" ")
        elif kind != "Cf" or letter in _JOINERS:
            kept.append(letter)
    return " ".join("".join(kept).split())


def _clusters(text: str) -> Iterator[str]:
    """Letters with the marks that belong to them; what only selects a form of the letter before it is left out."""
    cluster = ""
    for letter in text:
        if letter in _JOINERS:
            # Between letters they shape them (Persian, Hindi); elsewhere they glue emoji, which no font here has.
            if cluster and unicodedata.category(cluster[-1])[0] in "LM" and features.check("raqm"):
                cluster += letter
        elif "\ufe00" <= letter <= "\ufe0f" or "\U000e0100" <= letter <= "\U000e01ef":
            continue
        elif cluster and unicodedata.category(letter)[0] == "M":
            cluster += letter
        else:
            if cluster:
                yield cluster
            cluster = letter
    if cluster:
        yield cluster


def _lacks(face: _Face, cluster: str) -> str:
    return "".join(letter for letter in cluster if letter not in _JOINERS and not _has(face, letter))


def _script(letter: str) -> str:
    """The first word of a letter's Unicode name: CJK, HIRAGANA, ARABIC, CYRILLIC and so on."""
    return unicodedata.name(letter, "UNKNOWN").replace("-", " ").split()[0]


def _language(text: str) -> str:
    """The language whose forms of Chinese characters a text takes: that of its kana or hangul, else Chinese."""
    scripts = {_script(letter) for letter in text}
    return next((language for script, language in _LANGUAGES.items() if script in scripts), "zh-cn")


def _find(cluster: str, language: str) -> _Face | None:
    """A font with all letters of a cluster, Pillow's own if it can."""
    return _OWN if not _lacks(_OWN, cluster) else _find_other(cluster, language, _chosen())


@lru_cache(maxsize=65536)
def _find_other(cluster: str, language: str, chosen: _Face | None) -> _Face | None:
    for face in (*([chosen] if chosen else []), *(face for known, face in tuple(_used) if known == language)):
        if not _lacks(face, cluster):
            return face
    for face in _candidates(_lacks(_OWN, cluster)[0], language):
        if not _lacks(face, cluster):
            _used[language, face] = None
            return face
    return None


def _chosen() -> _Face | None:
    """The font that MIGICIAN_FONT names. Raises MigicianError when it cannot be opened."""
    path = os.environ.get("MIGICIAN_FONT")
    if not path:
        return None
    face = _Face(path)
    try:
        face.at(_PROBE_PX)
    except (OSError, ValueError) as error:
        raise MigicianError(f"MIGICIAN_FONT={path}: no font that can be opened ({error}); name a font file") from None
    return face


_first: dict[tuple[str, str], str] = {}  # the letter of a script that fonts were looked for with


def _candidates(letter: str, language: str) -> Iterator[_Face]:
    """Fonts that may have a letter: those for its script, looked for once, and for rare letters a few times more."""
    first = _first.setdefault((_script(letter), language), letter)
    faces = _ask_fontconfig(first, language)
    if faces is None:
        found = _search_folders(first)
        yield from () if found is None else (found,)
        return
    yield from faces
    if letter != first and _ask_fontconfig.cache_info().currsize < _MOST_QUESTIONS:
        yield from _ask_fontconfig(letter, language) or ()


@lru_cache(maxsize=256)
def _ask_fontconfig(letter: str, language: str) -> tuple[_Face, ...] | None:
    """The fonts that fontconfig prefers for a letter, None where there is no fontconfig."""
    pattern = f"sans-serif:lang={language}:charset={ord(letter):x}:color=false:scalable=true"
    command = ["fc-match", "--all", "--format", "%{file}\t%{index}\n", pattern]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    faces = []
    for line in os.fsdecode(done.stdout).splitlines()[:_MOST_CANDIDATES]:
        path, _, index = line.rpartition("\t")
        if path and index.isdigit():
            faces.append(_Face(path, int(index)))
    return tuple(faces)


@lru_cache(maxsize=64)
def _search_folders(letter: str) -> _Face | None:
    """A font in the usual folders that has a letter."""
    return next((face for face in _installed() if _has(face, letter)), None)


@lru_cache(maxsize=1)
def _installed() -> tuple[_Face, ...]:
    """The fonts in the usual folders, likely ones first."""
    found = []
    for folder in _FOLDERS:
        for top, _, names in os.walk(os.path.expanduser(folder)):
            found += [os.path.join(top, name) for name in names if name.lower().endswith((".ttf", ".otf", ".ttc"))]

    def rank(path: str) -> tuple[int, bool, str]:
        name = os.path.basename(path).lower().replace("-", "").replace("_", "")
        return next((i for i, part in enumerate(_LIKELY) if part in name), len(_LIKELY)), "regular" not in name, path

    return tuple(_Face(path) for path in sorted(found, key=rank)[:_MOST_FONTS])


def _runs(text: str) -> list[tuple[_Face, str]]:
    """Cuts text into pieces of one font each. Letters that no font has stay with Pillow's own, which draws a box."""
    runs: list[tuple[_Face, str]] = []
    language = _language(text)
    for cluster in _clusters(text):
        before, piece = runs[-1] if runs else (_OWN, "")
        # Blanks and stops stay where they are: what is written from right to left must not be cut at them.
        stays = unicodedata.category(cluster[0])[0] in "ZP" or bool(_lacks(_OWN, cluster))
        face = before if stays and not _lacks(before, cluster) else _find(cluster, language) or _OWN
        blanks = len(piece) - len(piece.rstrip())
        if face != before and blanks and before != _OWN:
            # At the end of what runs to the left, they would come out at its left.
            runs[-1:] = [(before, piece[:-blanks]), (_OWN, piece[-blanks:])]
        if runs and runs[-1][0] == face:
            runs[-1] = face, runs[-1][1] + cluster
        else:
            runs.append((face, cluster))
    return [(face, piece) for face, piece in runs if piece]


def undrawable(text: str) -> str:
    """The letters of a text that no font here has, each once, in their order."""
    text = clean(text)
    language = _language(text)
    lost = [c for c in _clusters(text) if _lacks(_OWN, c) and _find(c, language) is None]
    return "".join(dict.fromkeys(letter for cluster in lost for letter in _lacks(_OWN, cluster)))


def advice(letters: str) -> str:
    """What to say of letters that could not be drawn, and what to install for them; one line."""
    packages = sorted({_package(letter) for letter in letters})
    shown = letters[:12] + ("..." if len(letters) > 12 else "")
    return f"no font here has {shown}; apt install {' '.join(packages)}, or set MIGICIAN_FONT to a font file with them"


def _package(letter: str) -> str:
    if _script(letter) in _EAST_ASIAN:
        return "fonts-noto-cjk"
    return "fonts-symbola" if unicodedata.category(letter)[0] == "S" else "fonts-noto-core"


class Lettering:
    """A size of type: measures and draws lines of text in whatever fonts they need.

    size: in pixels.   ascent: from the top of a line to its baseline. Text is expected to be one line, see `clean`.
    """

    def __init__(self, size: int) -> None:
        self.size, self.ascent = size, _OWN.at(size).getmetrics()[0]

    def length(self, text: str) -> float:
        """The width of a line in pixels."""
        return sum(face.at(self.size).getlength(piece) for face, piece in _runs(text))

    def extent(self, text: str) -> tuple[int, int]:
        """How far the letters of a line reach above and below its baseline, in pixels."""
        boxes = [face.at(self.size).getbbox(piece, anchor="ls") for face, piece in _runs(text)]
        return max((round(-box[1]) for box in boxes), default=0), max((round(box[3]) for box in boxes), default=0)

    def write(self, draw: ImageDraw.ImageDraw, place: tuple[float, float], text: str, fill: str) -> None:
        """Draws a line; place: its left end, and the baseline of all its fonts."""
        x, baseline = place
        for face, piece in _runs(text):
            font = face.at(self.size)
            draw.text((x, baseline), piece, fill=fill, font=font, anchor="ls")
            x += font.getlength(piece)
