"""Which picture a question asks to look in, as against those that only say what to look for.

Every mention of a picture (naming.py) gets a role from the words around it, in its own sentence:

| role      | English                                           | Chinese                                    |
|-----------|---------------------------------------------------|--------------------------------------------|
| COMMANDED | find it in X; in X, find; where in X; locate in X | 在X中找出; X里在哪; 从X中找; 在X中的位置   |
| PLACE     | the cup of Y in X; appears in X; it is in X       | 出现在X中; X中Y的杯子; 把Y的杯子在X里      |
| ASKED     | which object in X; what in X                      | X中的哪个; X里有什么                       |
| HELD      | the cup in X; on X's table                        | 找出X中的杯子                              |
| NOTICED   | look at X; for X; in X there is                   | 看X; 在X中有                               |
| PART      | the cup of X; from X; X shows                     | X的杯子                                    |
| REFERENCE | marked in X; the cup that X shows; given X        | X中用红框标记的; 如X所示; 参考X; 对于X中的 |
| EXCLUDED  | like the one in X; than X; not in X; missing in X | 和X中一样的; 比X; X里没有的                |

The last sentence that asks for something and holds at least a NOTICED mention decides, by its greatest role; then the
last that asks and holds a PART, then any. Of several with that role the last counts; but of NOTICED, HELD and ASKED
the first behind the last verb ("find the cup in X fitting the plate in Y"), unless pictures are matched ("compare the
cup in X with the cup in Y"). If every picture named is excluded, it is another one.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise

from .naming import Mention, mentions

__all__ = ["Role", "image_asked", "roles"]


class Role(IntEnum):
    """What a mention of a picture is for; the greater, the surer it is the picture to look in."""

    EXCLUDED = 0
    REFERENCE = 1
    PART = 2
    NOTICED = 3
    HELD = 4
    ASKED = 5
    PLACE = 6
    COMMANDED = 7


_REACH = 300  # characters on either side of a mention that its role may depend on
_M = "\ufffc"  # stands for a mention, article and all, in the words that the rules see

# ---- English: rules on the words before (lower case, ending behind the last word) and behind a mention
_VERB = (
    r"(?:locat\w*|find|ground|identify|recogni[sz]e|detect|spot|point|mark|track|box|give|provide|show|tell|search"
    r"|look(?!\s+at\b)|seek|pick|select|choose|draw|segment|label|highlight|circle|return|output|predict|outline"
    r"|pinpoint|report|match"
    r"|compare|map|trace|follow)"
)
_IN = r"(?:in|on|within|inside|at|into|onto|across|throughout)"
_ANY = rf"(?:{_IN}|of|from|to|by)"
_W = r"(?:\s+[\w'/-]+)"
_NP = r"(?:\s+(?!(?:and|or|then|but|please|find|locate|ground|identify|mark|point|show|where)\b)[\w'/-]+)"
_IT = (
    r"(?:it|them|him|her|one|each|all|any|both|its\s+\w+|(?:this|that|these|those)(?:\s+\w+)?"
    r"|the\s+(?:same|corresponding|matching|identical|equivalent|respective|similar|target|exact|very\s+same)\s+\w+"
    r"(?:\s+\w+)?)"
)
_ADVERB = r"(?:\s+(?:out|again|also|now|there|then|too|only|exactly|precisely|for\s+me|please|up|back|once\s+more))*"
_SEEN = r"(?:shown|seen|visible|depicted|displayed|pictured|present|presented|contained|featured|found)"
_MARKED = (
    rf"(?:marked|boxed|outlined|highlighted|circled|indicated|annotated|framed|bounded|labell?ed|drawn|specified|given"
    rf"|described|illustrated|mentioned|referred\s+to|pointed\s+out|worn|used|appearing|{_SEEN})"
)
_BE = r"(?:is|are|was|were|be|been|being|gets?|appears?)"
_POLITE = re.compile(
    r"\b(?:would|'d|should)\s+like(?:\s+you)?(?:\s+to)?\b|\b(?:i\s+)?(?:want|need)\s+you\s+to\b"
    r"|\bas\s+(?:well|soon)\s+as\b|\bas\s+(?:accurately|precisely|exactly)\s+as\s+possible\b"
)

_NOT_IN = re.compile(
    r"(?:\b(?:not|never|without|except|excluding|besides|missing|absent|gone|removed|lacking|disappear\w*|vanish\w*"
    rf"|other\s+than|rather\s+than|instead\s+of)|n't){_W}{{0,3}}$"
)
_LACKS = re.compile(r"\s*(?:lacks?|lacking|misses|has\s+no\b|do(?:es)?(?:n't|\s+not)\b)")
_COMPARED = re.compile(
    r"\b(?:as|like|than|unlike|resembl\w+|similar\s+to|same\s+as|identical\s+to|equal\s+to|equivalent\s+(?:to|of)"
    r"|compar\w+\s+(?:to|with|against)|match(?:es)?\s+(?:that|those)|(?:that|which|who|it|and|also)\s+match(?:es)?"
    r"|matches"
    r"|matching(?=\s+(?:the|that|those|what|this|an?)\b|$)|correspond\w*\s+(?:to|with)|related\s+to"
    r"|counterpart\s+(?:of|to)"
    rf"|relative\s+to|differen(?:ce|t)\s+from|versus|vs\.?){_NP}{{0,7}}$"
)
_OWNED = r"(?:\s+(?!(?:that|which|who|can|may|could|should|is|are|the|an?|belongs?|fits?|goes)\b)[\w-]+){1,3}"
_STACKED = re.compile(
    rf"{_M}(?:'s?{_OWNED})?[\s,)]*(?:(?:again|now|also|too|then|there|is|are|was|were|be|located|lies?)\s+){{0,3}}"
    rf"(?:{_IN}|to)$"
)
_OPENS = re.compile(
    r"(?:^|[,:;])(?:\W|\b(?:and|then|now|so|please|but|also|next|finally|hello|hi|ok|okay|well|(?:can|could)\s+you)\b)*"
    rf"{_IN}$"
)
_THEN_ASKS = re.compile(
    r"\s*,?\s*(?:please\s+|(?:can|could|would|will)\s+you\s+|kindly\s+|try\s+to\s+|you\s+should\s+"
    r"|help\s+me\s+(?:to\s+)?|also\s+)*"
    rf"(?:{_VERB}|where|which|what)\b"
)
_INSERTED = re.compile(rf",\s*{_IN}$")
_SOUGHT = re.compile(
    rf"\b{_VERB}(?:\s+{_IT})?{_ADVERB}\s*,?\s*(?:{_IN}|from|upon)$|\b(?:it|them){_ADVERB}\s*,?\s*{_IN}$"
)
_MOVED = re.compile(
    rf"\b(?:match|map|track|trace|follow|transfer|project|link|pair|carry){_W}{{0,6}}\s+(?:to|into|onto|through)$"
)
_WHERE = re.compile(
    rf"\bwhere(?:'s|\s+is|\s+are|\s+was)?,?\s*(?:exactly\s+)?{_IN}$"
    r"|\bwhere\s+(?:(?:is|are|was|were|does|do|did|can|could)\s+)?(?:it|this|that|he|she|they|the\s+same\s+\w+)"
    rf"(?:\s+\w+){{0,3}}\s+{_IN}$"
)
_SCANNED = re.compile(r"\b(?:search|scan|check|inspect|examine|look\s+(?:at|through|over|around))$")
_FOR = re.compile(r"\s*(?:for|to\s+(?:find|locate|see|spot))\b")
_IS_SEEN = re.compile(rf"\b{_BE}\s+(?:\w+ly\s+|also\s+|now\s+|again\s+)?{_SEEN}\s+{_ANY}$")
_WHICH_SHOWN = re.compile(rf"\b(?:which|what)(?:\s+\w+){{1,3}}\s+{_SEEN}\s+{_IN}$")
_OPEN_ASKS = re.compile(r"^\W*(?:can|could|is|are|was|were|do|does|did|will|would|has|have)\b|\bwhere\b")
_SHOWN = re.compile(
    rf"\b{_MARKED}(?:\s+(?:clearly|already|above|only|in|red|green|blue|yellow|orange|purple|white|black))*"
    rf"(?:\s+(?:with|by|using|as|inside|on|in|at)\b[^{_M},;]{{0,60}}?)?(?:\s+{_ANY})?$"
    rf"|\b(?:see|cf\.?)$"
)
_IS_IN = re.compile(
    r"\b(?:(?:is|are|was|were|be|been|being)(?:\s+(?:located|situated|it|they|this|that|now|again|also|then|placed))*"
    r"|(?:does|did|do|can|could|will)\s+(?:it|they|this|that)\s+\w+|(?:you|i|we)\s+(?:see|find|spot|recogni[sz]e)"
    r"|lies?|locates?|appear(?:s|ed)?|occurs?|shows?\s+up|sits?|stands?|end(?:s|ed)?\s+up|goes|go|went|moved?|moves"
    rf"|reappears?|position|place|location|counterpart|equivalent|coordinates?|appearance)(?:\s+(?:\w+ly|now|again"
    rf"|also|then|where))*\s+(?:{_IN}|to)$"
)
_ATTENDED = re.compile(
    r"\b(?:look(?:ing)?\s+at|focus(?:ing)?\s+on|see|consider|observe|examine|inspect|check|view|watch|study|turn\s+to"
    r"|go\s+to|scan|open|regarding|for|about)$"
)
_GIVEN = re.compile(r"\b(?:given|using|use|take|taking|based\s+on|according\s+to|refer(?:ring)?\s+to|with|by|per|via)$")
_AS_GUIDE = re.compile(
    r"\s*(?:as|for)\s+(?:an?\s+|the\s+|your\s+)?(?:reference|query|template|example|source|guide|hint|model)"
)
_TOPIC = re.compile(
    r"\s*(?:(?:and|so|now|then)\s+)*(?:for|given|regarding|about|considering|concerning|as\s+for|with\s+respect\s+to"
    r"|using"
    r"|based\s+on|according\s+to|with|see|take|assume|suppose|imagine|consider|focus\s+on|note|notice|remember"
    r"|look\s+at|observe|watch|refer(?:ring)?\s+to|just\s+when|when|while|because|since|although|how|there\s+(?:is"
    r"|are))\b"
)
_HELD_IN = re.compile(rf"\b(?:{_IN}|to)$")
_LABEL = re.compile(r"\s*[:\uff1a]|\s+-\s")
_ASKS = re.compile(rf"\b(?:{_VERB}|where|which|what|who|focus|see)\b|\?", re.IGNORECASE)
_MATCHED = re.compile(r"\b(?:where|match|compare|track|trace|follow|map|link|pair)\b|对比|比较|跟踪|追踪|匹配|对应")
_CLAUSE = re.compile(r"[,;:(]")
_WH = re.compile(r"(?:([\w']+|\ufffc)\s+|^|[^\w\s]\s*)(that|which|what|who|whose)\b\s*([\w-]*)")
# a which or that behind these asks or points; behind a noun it relates
_NO_HEAD = re.compile(
    r"find|locate|identify|recogni[sz]e|detect|spot|point|mark|show|tell|say|know|see|determine|decide|check|give|me"
    r"|us|them"
    r"|you|out|and|or|but|so|then|to|of|in|on|at|from|by|with|for|is|are|do|does|please|also|exactly|choose|pick|select"
    r"|search|ask|wonder|explain|describe|output|return"
)
_ASKED_NOUN = re.compile(
    r"(?:object|item|thing|one|part|area|region|animal|person|element|tool|piece|place|side|button|icon|car)s?|of"
    r"|people|man"
    r"|woman|stuff|furniture"
)

# ---- Chinese: rules on the words around a mention, white space removed
_LOC = "(?:里面|里边|中间|当中|之中|之内|上面|中|里|内|上)"
_ZH_FIND = (
    "(?:找|定位|标|框|圈|指|检测|识别|辨认|寻|搜|查|给出|输出|返回|确定|判断|画|选|挑|锁定|告诉|回答|描述|点|看|说|数"
    "|提供|预测|分割)"
)
_ZH_PLEASE = (
    "(?:请|帮我|帮忙|麻烦|再|也|都|来|为我|给我|你|您|能否|能不能|是否|可以|尽量|精确|准确|尝试|重新|分别|然后|接着"
    "|同样|直接|去|地|需要|一下|把|将|用)*"
)
_ZH_WHERE = (
    "(?:在?(?:哪|什么地方|什么位置|何处)"
    "|的?(?:(?:具体|准确|对应|相应)的?)?(?:位置|坐标|区域|地方|边界框|边框|方位|坐标框|检测框|框))"
)
_ZH_SAME = "(?:相同|一样|同样|相似|类似|相近|相像|对应|匹配|一致|同类|同一|不同|相比|像|的那)"
_ZH_MARK = (
    "(?:标记|标注|标出|标示|框出|框住|框选|框起|圈出|圈起|圈住|高亮|指定|给出|所示|显示|展示|出现|选中|画出|看到|描述"
    "|提到|所指|所标|红框|红色框|框(?:中|里|内)|圈(?:中|里|内))"
)
_ZH_GAP = rf"(?:(?!找|定位|检测|识别|请|把|将|和|与|跟|寻|搜)[^,。;:!?、{_M}]){{0,14}}?"
_ZH_MARKED = re.compile(rf"{_LOC}?的?{_ZH_GAP}{_ZH_MARK}(?:了|过|出来|起来|好|在内|的是)*的(?!{_ZH_WHERE})")
_ZH_SHOWN = re.compile(rf"{_LOC}?(?:所示|所标|所给|显示的|为(?:参考|依据|模板|例))|作为(?:参考|依据|模板)")
_ZH_WITH = re.compile("(?:和|与|跟|同|像|如|类似于?|等同于|不同于|对应于?|相比于?|比|较|相较于)$")
_ZH_AND_SAME = re.compile(rf"{_LOC}?[^,。;!?{_M}]{{0,16}}?{_ZH_SAME}")
_ZH_THAN = re.compile("(?:比|相比于?|相较于?|相对于?|较)(?:起|之)?$")
_ZH_LESS = re.compile(rf"{_LOC}?[^,。;!?]{{0,4}}?(?:少|缺|没|减)")
_ZH_LACKS = re.compile(
    rf"{_LOC}?(?:的)?(?:却|并|已经?|就|也|都|则|而|但|中|里)*(?:没有|没|不存在|不见|消失|缺少|缺失|缺了|未出现|不再|看不到|找不到|少了|少的)"
)
_ZH_NOT = re.compile("(?:不在|没在|未在|不是|并非|除了?|除去|不要在|别在)$")
_ZH_AT = re.compile("(?:在|从|到|往|向|去|于)$")
_ZH_REACHED = re.compile(
    "(?:出现|位于|显示|存在|落|处|映射|对应|匹配|跟踪|追踪|转移|移动|放|画|标|框|定位|找|画|标注)(?:在|到|于|至)$|位于$|处于$|属于$"
)
_ZH_DO = re.compile(rf"{_LOC}?[,]?{_ZH_PLEASE}(?:{_ZH_FIND}|{_ZH_WHERE})")
_ZH_DO_THERE = re.compile(rf"{_LOC}[,]?{_ZH_PLEASE}(?:{_ZH_FIND}|在哪|哪里|哪儿|何处|什么地方|什么位置)")
_ZH_END = re.compile(rf"{_LOC}?(?:的)?(?:[,。.;!?:呢吗吧]|$)")
_ZH_OF = re.compile(rf"{_LOC}?的")
_ZH_THERE = re.compile(rf"{_LOC}(?!的)")
_ZH_HAS = re.compile(rf"{_LOC}?(?:是|有|存在)")
_ZH_ASKED = re.compile(rf"{_LOC}?的?(?:有没有|有无|是否有|(?:有|是)?(?:哪|什么|何物|谁|多少|几))")
_ZH_THEN = re.compile(rf"{_LOC}?{_M}|{_LOC}(?:是否|会)?有[^,。;!?{_M}]{{0,3}}{_M}")
_ZH_GUIDE = re.compile("(?:根据|依据|依照|按照?|参考|参照|对照|基于|以|给定|已知|假设|结合|如|见|由|用|使用|利用|像)$")
_ZH_ABOUT = re.compile("(?:对于|关于|至于|针对|对)$")
_ZH_SEES = re.compile("(?:查看|观察|看|注意|关注|聚焦|观看|仔细看)(?:一下|看|到)?$")
_ZH_SOUGHT = re.compile(rf"{_ZH_FIND}(?:出来|出|到|一下|下|一找|中|准)?$")
_ZH_ASKS = re.compile(rf"{_ZH_FIND}|哪|什么|何处|位置|坐标|多了|少了|不同")
_CJK = re.compile(r"[\u3400-\u9fff\u3000-\u303f]")
_SENTENCE_END = re.compile(r"[.?!;](?=\s|$|[\u3400-\u9fff\ufffc])|[。\n]")
_ARTICLE = re.compile(r"\b(?:the|this|that|my|your|our)\s+(?:given\s+)?$", re.IGNORECASE)
_QUOTES = re.compile("[\"“”‘’「」『』《》*`]")


@dataclass(frozen=True)
class _Sentence:
    """words: with _M for every mention.   at[i]: where mention i stands in them.   images[i]: the picture it names."""

    words: str
    at: tuple[int, ...]
    images: tuple[int, ...]

    @property
    def asks(self) -> bool:
        return bool(_ASKS.search(self.words) or _ZH_ASKS.search(self.words))

    def roles(self) -> list[Role]:
        return [_role(self.words, at) for at in self.at]


def _sentences(text: str, found: Sequence[Mention]) -> list[_Sentence]:
    """Cuts a folded text into sentences; mentions shrink to one character, articles before them and quotes go."""
    marked, end = "", 0
    for m in found:
        marked += _ARTICLE.sub("", _QUOTES.sub("", text[end : m.start])) + _M
        end = m.end
    marked += _QUOTES.sub("", text[end:])
    sentences, used = [], 0
    bounds = [0, *(m.end() for m in _SENTENCE_END.finditer(marked)), len(marked)]
    for start, stop in pairwise(bounds):
        words = marked[start:stop].lower()
        at = tuple(i for i, c in enumerate(words) if c == _M)
        images = tuple(m.image for m in found[used : used + len(at)])
        sentences.append(_Sentence(words, at, images))
        used += len(at)
    return sentences


def roles(text: str, found: Sequence[Mention]) -> list[Role]:
    """The role of each mention in a folded text, in their order."""
    return [role for sentence in _sentences(text, found) for role in sentence.roles()]


def image_asked(text: str, pictures: int) -> int | None:
    """The picture that a folded question asks to look in, None where it names none."""
    found = mentions(text, pictures)
    if not found:
        return None
    sentences = [s for s in _sentences(text, found) if s.at]
    graded = [(s, s.roles()) for s in reversed(sentences)]
    for least, asking in ((Role.NOTICED, True), (Role.PART, True), (Role.PART, False)):
        for sentence, given in graded:
            if max(given) >= least and (sentence.asks or not asking):
                return sentence.images[_choose(sentence, given)]
    references = [m.image for m, role in zip(found, roles(text, found), strict=True) if role == Role.REFERENCE]
    if references:
        return references[-1]
    others = sorted(set(range(pictures)) - {m.image for m in found})
    return others[-1] if others else found[-1].image


def _choose(sentence: _Sentence, given: Sequence[Role]) -> int:
    """Of the mentions with the greatest role, the one that counts."""
    best = max(given)
    tied = [i for i, role in enumerate(given) if role == best]
    if len(tied) == 1 or best >= Role.PLACE or best <= Role.PART or _MATCHED.search(sentence.words):
        return tied[-1]
    verbs = [m.end() for m in re.finditer(rf"{_ASKS.pattern}|{_ZH_FIND}", sentence.words)]
    for verb in reversed(verbs):
        behind = [i for i in tied if sentence.at[i] >= verb]
        if behind:
            return behind[0]
    return tied[0]


def _role(words: str, at: int) -> Role:
    before, after = words[max(0, at - _REACH) : at], words[at + 1 : at + 1 + _REACH]
    if at > _REACH:
        before = "... " + before  # not the sentence's beginning
    tight = [re.sub(r"\s+", "", part) for part in (before, after)]
    if any(_CJK.match(c) for c in (tight[0][-1:], tight[1][:1])):
        return _zh_role(*tight)
    return _en_role(_POLITE.sub(" ", before).rstrip(), after)


def _en_role(before: str, after: str) -> Role:
    clause = _CLAUSE.split(before)[-1]
    for role, holds in (
        (Role.EXCLUDED, _NOT_IN.search(before) or _COMPARED.search(before) or _LACKS.match(after)),
        (Role.REFERENCE, _AS_GUIDE.match(after)),
        (Role.PLACE, _STACKED.search(before)),
        (Role.COMMANDED, _OPENS.search(before) and _THEN_ASKS.match(after)),
        (Role.COMMANDED, _INSERTED.search(before) and after.lstrip().startswith(",")),
        (Role.COMMANDED, _SOUGHT.search(before) or _MOVED.search(before) or _WHERE.search(before)),
        (Role.COMMANDED, _SCANNED.search(before) and _FOR.match(after)),
    ):
        if holds:
            return role
    head = _head(clause)
    if _IS_SEEN.search(before) and (_head(before, far=True) == "asks" or _OPEN_ASKS.search(before)):
        return Role.PLACE
    if _WHICH_SHOWN.search(before):
        return Role.ASKED
    if _SHOWN.search(before) or head == "relates":
        return Role.REFERENCE
    if _IS_IN.search(before):
        return Role.PLACE
    if head == "asks":
        return Role.ASKED
    if _ATTENDED.search(before) or (_OPENS.search(before) and not _LABEL.match(after)):
        return Role.NOTICED
    if _GIVEN.search(before) or _TOPIC.match(clause):
        return Role.REFERENCE
    if _HELD_IN.search(before):
        return Role.HELD
    if not clause.strip() and _LABEL.match(after):
        return Role.PLACE
    return Role.PART


def _head(words: str, *, far: bool = False) -> str:
    """What the last which, that and so on does for what follows it: "asks", "relates" or nothing.

    far: past other mentions too.
    """
    for m in reversed(list(_WH.finditer(words))):
        if not far and _M in words[m.end(2) :]:
            return ""
        noun_before = bool(m[1]) and not _NO_HEAD.fullmatch(m[1])
        if m[2] == "what" or not noun_before:
            return "" if m[2] == "that" else "asks"
        if m[2] == "which" and _ASKED_NOUN.fullmatch(m[3]):
            return "asks"
        return "relates"
    return ""


def _zh_role(before: str, after: str) -> Role:
    opens = not before or before[-1] in ",。;:!?、("
    at = bool(_ZH_AT.search(before))
    if before.endswith(_M) and _ZH_OF.match(after):
        return Role.PART
    if _ZH_THAN.search(before):
        return Role.COMMANDED if _ZH_LESS.match(after) else Role.EXCLUDED
    if _ZH_NOT.search(before) or _ZH_LACKS.match(after):
        return Role.EXCLUDED
    if _ZH_WITH.search(before) and _ZH_AND_SAME.match(after) and not re.search(rf"{_M}(?:和|与|跟)$", before):
        return Role.EXCLUDED
    if _ZH_MARKED.match(after) or _ZH_SHOWN.match(after):
        return Role.REFERENCE
    if _ZH_REACHED.search(before):
        return Role.REFERENCE if re.match(rf"{_LOC}?的(?!{_ZH_WHERE})", after) else Role.PLACE
    if at and (_ZH_DO.match(after) or _ZH_END.match(after)):
        return Role.COMMANDED
    if at and _ZH_HAS.match(after):
        return Role.NOTICED
    if at and _ZH_THERE.match(after):
        return Role.PLACE
    for role, holds in (
        (Role.COMMANDED, _ZH_DO_THERE.match(after)),
        (Role.COMMANDED, opens and re.match(rf"{_LOC}[,:]", after)),
        (Role.REFERENCE, _ZH_GUIDE.search(before) or _ZH_ABOUT.search(before)),
        (Role.ASKED, _ZH_ASKED.match(after)),
        (Role.PLACE, _ZH_THEN.match(after) or (opens and re.match("[:,]", after))),
        (Role.NOTICED, _ZH_SEES.search(before)),
        (Role.HELD, at or _ZH_SOUGHT.search(before)),
    ):
        if holds:
            return role
    return Role.PART
