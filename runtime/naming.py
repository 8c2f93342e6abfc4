"""Words that name one of several pictures, in English and in Chinese.

| form             | English                                          | Chinese, either script                  |
|------------------|--------------------------------------------------|-----------------------------------------|
| counted          | third image, 3rd picture, 2th image, last frame, | 第三张图, 第3幅图片, 第一张, 第三帧,    |
|                  | second-to-last picture, the 2nd of these photos  | 首图, 最后一张, 倒数第二张图            |
| numbered         | Image-3, image_3, img3, photo #2, image (2),     | 图3, 图片２, 照片三, 图像（2）, 2号图   |
|                  | picture number two, images 1, 2 and 3, Image II  |                                         |
| lettered         | image B, photo (b)                               | 图A, B图, 图甲                          |
| counted, no noun | "in the second", "of the 1st one", "in #2"       |                                         |
| by its part      | source, reference, original image: the first;    | 源图, 原图, 参考图; 目标图              |
|                  | target image: the last; or as the text says      |                                         |
| by another       | the next, the previous, the other image, the     | 前一张, 后一张图, 另一张图, 前者, 后者, |
|                  | image after image 2, the former, the latter      | 上图 and 下图 together                  |

Left and right, above and below name none: they are places in a picture as often as pictures. Nor does a number beyond
the pictures, a counted object ("第二张桌子", "the second one from the left") or a file's name ("img_2.jpg").
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

__all__ = ["EN_NOUNS", "Mention", "fold", "mentions"]


@dataclass(frozen=True)
class Mention:
    """Words in text[start:end] that name picture `image`, counted from 0."""

    start: int
    end: int
    image: int


# Full-width forms and traditional characters, one for one, so that positions stay.
_TRADITIONAL = dict(
    zip(
        "圖張個後與從將裡裏內標識檢測尋選畫點給這麼為對應號幀數兩參據無沒現顯樣類處請幫輸斷確認觀關於邊間說問誰屬來還並卻過"
        "別幾條隻輛種貳壹叁",
        "图张个后与从将里里内标识检测寻选画点给这么为对应号帧数两参据无没现显样类处请帮输断确认观关于边间说问谁属来还并却过"
        "别几条只辆种二一三",
        strict=True,
    )
)
_FOLD = {
    **{0xFF01 + i: 0x21 + i for i in range(94)},
    **{ord(old): new for old, new in _TRADITIONAL.items()},
    **{ord("①") + i: str(i + 1) for i in range(9)},
    0x3000: " ",
    ord("【"): "[",
    ord("】"): "]",
}


def fold(text: str) -> str:
    """Brings full-width forms to ASCII and traditional characters to simplified ones; every position stays."""
    return text.translate(_FOLD)


# ---- English
# fmt: off
_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth", "eleventh",
             "twelfth", "thirteenth", "fourteenth", "fifteenth", "sixteenth", "seventeenth", "eighteenth", "nineteenth",
             "twentieth")
_CARDINALS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_ROMAN = ("I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX", "X")
# fmt: on
EN_NOUNS = "image|picture|photograph|photo|frame|view|img|pic|screenshot|snapshot"
_KINDS = "input|given|provided|supplied|uploaded|attached|reference|source|target|query|original|test|camera|sample"
_FROM_END = {
    "last": -1, "final": -1, "second to last": -2, "second last": -2, "next to last": -2, "last but one": -2,
    "penultimate": -2, "third to last": -3, "third last": -3,
}  # fmt: skip
_BACK = "|".join(name.replace(" ", r"[\s-]+(?:the[\s-]+)?") for name in sorted(_FROM_END, key=len, reverse=True))
_NTH = rf"(?:\d{{1,4}}\s?-?(?:st|nd|rd|th)\b|(?:{_BACK})|(?:{'|'.join(_ORDINALS)})|initial)"
_CARDINAL = rf"(?:{'|'.join(_CARDINALS)})\b"
_DIGITS = r"\d{1,4}(?![\d.]*\d)(?!\s?[x×*]\s?\d)(?!\w*\.(?:jpe?g|png|webp|bmp|gif|tiff?|heic)\b)"
_IN_OF = r"\b(?:in|on|of|from|to|into|within|inside|at|about|behind)\s+"
# What may follow a counted picture whose noun is left out; "in the first row" counts rows.
_NO_NOUN = (
    r"(?=\s*(?:$|[^\w\s'-]|[\u4e00-\u9fff])|\s+(?:the|an?|this|my|and|or|but|that|which|who|where|what|with|to|as"
    r"|is|are|was|were|has|have|does|do|did|can|may|please|by|in|on|of|at|than|using|for|if|when|while|also|too|now"
    r"|again|find|locate"
    r"|appears?|shows?|matches|from(?!\s+(?:the\s+)?(?:left|right|top|bottom|front|back)))\b)"
)

# ---- Chinese
_ZH_DIGITS = "一二三四五六七八九"
_ZH_NUM = r"(?:\d{1,4}|[一二三四五六七八九十]{1,3})"
_ZH_CLASS = "[张幅个副帧枚页份号]"
_ZH_KINDS = "(?:输入|给定|给出|提供|上传|参考|目标|查询|原始?|彩色|大|小|的)*"
# 图标, 图书 and their like are objects
_ZH_NOUN = (
    "(?:图片|图像|图象|图画|照片|相片|画面|截图|影像|视图|插图|配图"
    "|图(?![片像象画标书形案表钉章层纸谱腾文解例鉴块元]))"
)
_ZH_ANY_NOUN = rf"(?:{_ZH_NOUN}|(?i:image|picture|photo|img|pic)(?![a-zA-Z]))"
# What may follow 张 without a noun: 第二张桌子 counts tables
_ZH_BARE = (
    r"(?=\s|\s*(?:$|[^\w\s]|[里内中上的和与跟同及或到是有则也都而比相对哪没不找请把将]|什么|出现|显示|当中|之中|标出|框出))"
)
# 图一共, 图两张, 图三个 count or go on otherwise; 图2个 too
_ZH_NOT_COUNTED = r"(?!\s*[张幅个副枚页份只条位辆件种块次])"
_ZH_AFTER_NUM = _ZH_NOT_COUNTED + "(?![共样起些下直致般定旦边侧面对模步点刻味律流度时切])"


_Value = Callable[[str], int | str | None]


@dataclass(frozen=True)
class _Form:
    """A way to name pictures: what its group v says, by `value`, is meant as `kind` says.

    at: the picture, from 0, or from the end if negative.   letter: the same, but not in a text all in capitals.
    step: from the mention before.   pair: the first or second of two.   other: of two, not the one mentioned before.
    role: by its part, "source" or "target".   weak, updown: as at, where at least two different ones stand in the text.
    start: the group that the mention begins with, "" for the whole match.
    """

    kind: str
    pattern: re.Pattern[str]
    value: _Value
    start: str = ""


def _nth(word: str) -> int | None:
    word = re.sub(r"[\s-]+(?:the[\s-]+)?", " ", word.lower())
    if word[0].isdigit():
        return int(re.match(r"\d+", word)[0]) - 1  # type: ignore[index]
    if word in _FROM_END:
        return _FROM_END[word]
    return 0 if word == "initial" else _ORDINALS.index(word)


def _number(word: str) -> int | None:
    word = word.strip()
    if word.isdigit():
        return int(word) - 1
    if word.lower() in _CARDINALS:
        return _CARDINALS.index(word.lower())
    if word in _ROMAN:
        return _ROMAN.index(word)
    tens, ten, ones = word.rpartition("十")  # 十二, 二十, 二十三
    if len(tens) > 1 or len(ones) > 1:
        return None
    units = 10 * (_ZH_DIGITS.index(tens) + 1 if tens else 1) if ten else 0
    return units + (_ZH_DIGITS.index(ones) + 1 if ones else 0) - 1


def _letter(word: str) -> int:
    return "甲乙丙丁戊".index(word) if word in "甲乙丙丁戊" else ord(word.upper()) - ord("A")


def _step(word: str) -> int:
    return 1 if word.lower() in ("next", "following", "subsequent", "后", "下") else -1


def _side(word: str) -> int:
    return int(word.lower() in ("latter", "later", "后"))


def _en(kind: str, pattern: str, value: _Value, start: str = "", *, case: bool = False) -> _Form:
    return _Form(kind, re.compile(pattern, re.ASCII if case else re.ASCII | re.IGNORECASE), value, start)


def _zh(kind: str, pattern: str, value: _Value) -> _Form:
    return _Form(kind, re.compile(pattern), value)


def _english(nouns: str) -> list[_Form]:
    """The English forms; nouns: those that an ordinal may stand before."""
    kinds = rf"(?:(?:{_KINDS})[\s-]+){{0,2}}"
    noun, nouns_or_figure = rf"(?:{EN_NOUNS})", rf"(?:{EN_NOUNS}|fig(?:ure|\.)?)s?"
    joint = r"[ \t]*(?:[-_#:]|no\.?|nr\.?|num(?:ber)?\b)?[ \t]*"
    digits_or_word = rf"(?P<v>{_DIGITS}|{_CARDINAL})"
    roman = "|".join(_ROMAN[::-1])
    of_all = rf"\s+(?:of|among)\s+(?:(?:all|the|these|those|your|my)\s+)*(?:\w+\s+)?{noun}s\b"
    return [
        _en("at", rf"\b(?P<v>{_NTH})[\s-]+{kinds}(?:{nouns})\b", _nth),
        _en("at", rf"\b(?P<v>{_NTH}){of_all}", _nth),
        _en("at", rf"{_IN_OF}(?:the|my|your)\s+(?P<v>{_NTH})(?:\s+one)?{_NO_NOUN}", _nth, "v"),
        _en("at", rf"{_IN_OF}(?P<v>\d{{1,4}}(?:st|nd|rd|th)\b)(?:\s+one)?{_NO_NOUN}", _nth, "v"),
        _en("at", rf"\b{nouns_or_figure}{joint}#?(?P<v>{_DIGITS})", _number),
        _en("at", rf"\b{nouns_or_figure}[ \t]*[(\[<]\s*#?(?P<v>\d{{1,4}})\s*[)\]>]", _number),
        _en("at", rf"\b{noun}s?{joint}(?P<v>{_CARDINAL})", _number),
        _en("at", rf"(?:{_IN_OF}(?:the\s+)?|^\s*|[(:,]\s*)(?P<s>#\s?(?P<v>{_DIGITS}))", _number, "s"),
        _en("at", rf"{_IN_OF}(?:the\s+)?(?P<s>(?:no\.?|nr\.?|number)\s*{digits_or_word}){_NO_NOUN}", _number, "s"),
        _en("at", rf"\b{nouns_or_figure}[ \t]*[-_]?[ \t]*[\"'(\[](?P<v>[a-h])[\"')\]]", _letter),
        _en("letter", rf"\b(?i:{nouns_or_figure})[ \t]*[-_]?[ \t]*(?P<v>[A-H])(?!\w|'(?!s\b))", _letter, case=True),
        _en("weak", rf"\b(?i:{noun})[ \t]+(?P<v>[a-h])\b(?!')", _letter, case=True),
        _en("at", rf"\b(?i:{nouns_or_figure})[ \t]*[-_]?[ \t]*(?P<v>III?|IV|VI{{1,3}}|IX)\b", _number, case=True),
        _en("weak", rf"\b(?i:{nouns_or_figure})[ \t]*[-_]?[ \t]*(?P<v>{roman})\b", _number, case=True),
        _en("pair", rf"{_IN_OF}the\s+(?P<s>(?P<v>former|latter)\b(?:\s+(?:{noun}|one)\b)?)", _side, "s"),
        _en("pair", rf"\b(?P<v>former|latter|earlier|later)\s+{noun}\b", _side),
        _en("step", rf"\b(?P<v>next|following|subsequent|previous|preceding|prior)\s+(?:{noun}|one)\b", _step),
        _en("other", rf"\b(?P<v>(?:an)?other)\s+{kinds}{noun}\b", str),
        _en("other", rf"{_IN_OF}(?:the\s+)?(?P<s>(?P<v>(?:an)?other)(?:\s+one)?){_NO_NOUN}", str, "s"),
        _en("role", rf"\b(?P<v>source|reference|query|template|original|target)[\s-]+{noun}\b", str.lower),
    ]


def _chinese() -> list[_Form]:
    """The Chinese forms, for folded text."""
    noun, joint = rf"(?<![地意试企贪妄力版蓝构草]){_ZH_NOUN}\s*", r"[\s:#_\-—–]*"
    first, last = "(?P<v>首|头一)", r"(?P<v>最后|最末|末尾?|尾)(?:面|边)?\s*的?\s*[一那]?"
    return [
        *_zh_counted("at", rf"第\s*(?P<v>{_ZH_NUM})", _number),
        *_zh_counted("at", rf"倒数\s*第?\s*(?P<v>{_ZH_NUM})", lambda word: -1 - (_number(word) or 0)),
        *_zh_counted("at", first, lambda _: 0),
        *_zh_counted("at", last, lambda _: -1),
        _zh("at", rf"{noun}(?:编号|序号)?第?{joint}[.第]?(?P<v>{_DIGITS}(?!%){_ZH_NOT_COUNTED})号?", _number),
        _zh("at", rf"{noun}{joint}(?P<v>[一二三四五六七八九十]{{1,3}}){_ZH_AFTER_NUM}号?", _number),
        _zh("at", rf"{noun}[(\[]\s*(?P<v>{_ZH_NUM})\s*[)\]]", _number),
        _zh("at", rf"{noun}[-_]?\s*(?P<v>[A-Ha-h甲乙丙丁戊])(?![A-Za-z0-9])", _letter),
        _zh("at", rf"(?P<v>{_ZH_NUM})\s*号\s*{_ZH_KINDS}{_ZH_NOUN}", _number),
        _zh("at", rf"(?<![A-Za-z])(?P<v>[A-H甲乙丙丁戊])\s*{_ZH_NOUN}", _letter),
        *_zh_counted("step", r"(?P<v>[前后上下])(?:面|边)?\s*的?\s*[一那]", _step),
        _zh("step", rf"(?P<v>[前后]){_ZH_NOUN}", _step),
        _zh("pair", "(?P<v>[前后])者", _side),
        *_zh_counted("other", "(?P<v>另外|另|其他|其它|别的)[一那]?", str),
        _zh("role", rf"(?P<v>目标|待检测?|待查)\s*{_ZH_NOUN}", lambda _: "target"),
        _zh("role", rf"(?P<v>源|原始?|参考|查询|模板|示例|基准)\s*{_ZH_NOUN}", lambda _: "source"),
        _zh("updown", "(?<![以如])(?P<v>[上下])图(?![片像象])", lambda word: int(word == "下")),
        _zh("weak", rf"(?<![第这那张幅的\d一二三四五六七八九十])(?P<v>{_ZH_NUM})图(?=[里内中上的])", _number),
    ]


def _zh_counted(kind: str, before: str, value: _Value) -> list[_Form]:
    """A count, and the picture's noun or the classifier that stands for it."""
    return [
        _zh(kind, rf"{before}\s*{_ZH_CLASS}?\s*{_ZH_KINDS}{_ZH_ANY_NOUN}", value),
        _zh(kind, rf"{before}\s*(?:[张幅副]{_ZH_BARE}|帧|个(?=[里内中]))", value),
    ]


_IN_QUESTION = [*_english(EN_NOUNS), *_chinese()]
_IN_ANSWER = [*_english(EN_NOUNS + "|one"), *_chinese()]
_MORE = re.compile(
    r"\s*(?:、|,(?:\s*and)?|和|与|及|and|or|&|/|至|到|to|-|~)\s*#?(?P<v>\d{1,4}|[一二三四五六七八九十]{1,3})"
    r"(?!\d|\.\d|[a-zA-Z%])" + _NO_NOUN,
    re.IGNORECASE,
)
_LISTS = re.compile(rf"(?:{EN_NOUNS})s\W|{_ZH_NOUN}[\s\d一二三四五六七八九十]", re.IGNORECASE)
_BESIDE = re.compile(
    rf"\b(?:{EN_NOUNS}|one)\s+(?:(?:right|just|directly|immediately)\s+)?(?P<v>before|preceding|after|following)\s+"
    r"(?:the\s+)?$",
    re.IGNORECASE,
)
_ZH_BESIDE = re.compile(r"的\s*$")
_DEFINES = re.compile(
    r"\s*(?:is|are|as|=|:|,|\(|being|serves as|用?作为?|就?是|为)?\s*(?:the|a|an|our|your)?\s*", re.IGNORECASE
)


@dataclass(frozen=True)
class _Found:
    start: int
    end: int
    kind: str
    value: int | str
    weak: int = -1  # which form, of those that count only together


def _scan(text: str, forms: Sequence[_Form]) -> list[_Found]:
    """All words that may name a picture, in their order, none overlapping another; the longer of two goes first."""
    found = []
    letters = any("a" <= c <= "z" for c in text)  # where all is in capitals, A is an article
    for i, form in enumerate(forms):
        if form.kind == "letter" and not letters:
            continue
        for m in form.pattern.finditer(text):
            value = form.value(m["v"])
            if value is not None:
                weak = i if form.kind in ("weak", "updown") else -1
                kind = "at" if form.kind in ("letter", "weak") else form.kind
                found.append(_Found(m.start(form.start or 0), m.end(), kind, value, weak))
    counts = {weak: {f.value for f in found if f.weak == weak} for weak in {f.weak for f in found}}
    kept: list[_Found] = []
    for f in sorted(found, key=lambda f: (f.start, -f.end)):
        if (f.weak < 0 or len(counts[f.weak]) > 1) and (not kept or f.start >= kept[-1].end):
            kept.append(f)
            kept += _listed(text, f)
    return kept


def _listed(text: str, first: _Found) -> Iterator[_Found]:
    """The numbers that go on behind "images 1", 图1: "images 1, 2 and 3"."""
    at = first.end
    counted = first.kind == "at" and text[at - 1] in f"0123456789{_ZH_DIGITS}十"
    if not counted or not _LISTS.match(text, first.start):
        return
    while m := _MORE.match(text, at):
        value = _number(m["v"])
        if value is None:
            return
        at = m.end("v")
        yield _Found(m.start("v"), at, "at", value)


def mentions(text: str, pictures: int, *, answer: bool = False) -> list[Mention]:
    """Finds all words that name one of the pictures, in their order.

    text: folded.   answer: "the second one" names a picture wherever it stands, as in answers.
    """
    found = _scan(text, _IN_ANSWER if answer else _IN_QUESTION)
    roles = _roles(text, found, pictures)
    resolved: list[Mention] = []
    for i, f in enumerate(found):
        image = _image(f, found[i + 1 :], [m.image for m in resolved], pictures, roles)
        start = f.start
        if f.kind == "at" and image is not None and (m := _BESIDE.search(text, max(0, start - 60), start)):
            start, image = m.start(), image + (1 if m["v"].lower() in ("after", "following") else -1)
        if f.kind == "step" and resolved and _ZH_BESIDE.fullmatch(text, resolved[-1].end, start):
            start = resolved.pop().start  # 第二张图的后一张 is one mention
        if image is not None and 0 <= image < pictures:
            resolved.append(Mention(start, f.end, image))
    return resolved


def _roles(text: str, found: Sequence[_Found], pictures: int) -> dict[str, int]:
    """What source, target and the like are: what the text says ("image 2 is the reference image"), or the usual."""
    roles = {"target": pictures - 1}
    for one, other in pairwise(found):
        role, named = (one, other) if one.kind == "role" else (other, one)
        gap = _DEFINES.fullmatch(text, one.end, other.start)
        if role.kind == "role" and named.kind == "at" and gap and gap[0].strip(" ,:("):
            roles[str(role.value)] = _counted(int(named.value), pictures)
    return roles


def _counted(value: int, pictures: int) -> int:
    """A picture's index, from one that may count from the end."""
    return value if value >= 0 else pictures + value


def _image(
    f: _Found, behind: Sequence[_Found], before: Sequence[int], pictures: int, roles: dict[str, int]
) -> int | None:
    """The picture of one mention. before: those of the mentions ahead of it."""
    if f.kind == "role":
        return roles.get(str(f.value), 0)
    if isinstance(f.value, int):
        if f.kind == "updown":
            return f.value if pictures == 2 else None
        if f.kind == "at":
            return _counted(f.value, pictures)
        if f.kind == "step":
            stepped = before[-1] + f.value if before else -1
            return max(0, f.value) if pictures == 2 else stepped
        different = list(dict.fromkeys(reversed(before)))[:2]  # a pair: the two named last
        if len(different) == 2:
            return different[1 - f.value]
        return f.value if pictures == 2 else None
    if pictures != 2:
        return None  # which other one?
    known = [*before[-1:], *(_counted(int(g.value), 2) for g in behind if g.kind == "at")]
    return 1 - known[0] if known else None
