"""Words to token ids and back: the tokenizer, the prompt in the model's chat template, M-RoPE positions.

The template (chat_template.py) is Qwen2-VL's, or the model's own where its folder has another. All pictures stand at
the start of the first question, unless it says where: as many of `<image>`, `<|image_pad|>` or
`<|vision_start|><|image_pad|><|vision_end|>` in it as there are pictures are their places, in order.

Words of a user are data. The tags of references, boxes and quads are special tokens in them too, since questions are
asked with them; any other special token, `<|im_end|>` say, is spelled out as the characters it consists of. So a prompt
cannot close its own turn, open another speaker's, or stand in for a picture that was not given.

Nothing here assumes a kind of tokenizer or fixed ids: all come from the model's own `tokenizer.json`.
Letters: T tokens.   Source: transformers `apply_chat_template`, `Qwen2VLModel.get_rope_index`.
"""

import codecs
import mmap
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .chat_template import DEFAULT, PAD, ChatTemplate, Message, split_marks
from .errors import MigicianError, ModelFileError, OutOfMemory
from .files.tokenizer import TEMPLATE_TOKENS, template_ids

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from .files.checkpoint import Checkpoint
    from .files.config import ModelConfig

__all__ = [
    "PLACEHOLDER",
    "USER_TAGS",
    "Said",
    "TextStream",
    "Vocabulary",
    "build_prompt",
    "check_words",
    "rope_positions",
    "token_spans",
]

USER_TAGS = (
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
)
_TAGS = re.compile(r"(<\|\w+\|>)")
PLACEHOLDER = re.compile(r"<image>|<\|vision_start\|>(?:<\|image_pad\|>)+<\|vision_end\|>|<\|image_pad\|>")
_ROOM_BYTES, _ROOM_PER_CHARACTER = 16 << 20, 20  # of building a tokenizer; 14 a character were measured
_NO_ROOM = "no memory left for the tokenizer; free some, or raise the limit (ulimit -v)"


def _byte_of_char() -> dict[str, int]:
    """The alphabet of byte-level BPE: printable bytes stand for themselves, the others for characters from 256 up."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


@dataclass(frozen=True)
class Said:
    """What a template's words enclose: a person's words, which are data, or ids as they are."""

    what: str | Sequence[int]


class Vocabulary:
    """A model's tokenizer, with special tokens under this module's control.

    tokenizer_json: text of a `tokenizer.json`: byte-level BPE as Qwen2-VL's, or any other kind, such as words.
    Raises ModelFileError when the text is not a tokenizer.
    """

    def __init__(self, tokenizer_json: str) -> None:
        self._tokenizer = _load(tokenizer_json)
        added = self._tokenizer.get_added_tokens_decoder()
        self.special: dict[str, int] = {token.content: i for i, token in added.items() if token.special}
        self._special_ids = frozenset(self.special.values())
        self._user_tags = {tag: self.special[tag] for tag in USER_TAGS if tag in self.special}
        free = {*self._user_tags, getattr(self._tokenizer.model, "unk_token", None)}
        self._guarded = {content: i for content, i in self.special.items() if content not in free}
        # some folders list the template's own tokens as ordinary ones, and words may be them no more for that
        ordinary = {token.content: i for i, token in added.items()}
        self._guarded |= {tag: ordinary[tag] for tag in TEMPLATE_TOKENS if tag in ordinary}
        self._guarded_ids = frozenset(self._guarded.values())
        self._split_all = _splitter(self.special)
        self._split_user = _splitter(self._user_tags)
        self._byte_level = _is_byte_level(self._tokenizer)
        self._added_text = {i: token.content for i, token in added.items()}
        self._bytes = _byte_of_char()

    def __len__(self) -> int:
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def id(self, piece: str) -> int:
        """Finds the id of a piece. Raises ModelFileError when the vocabulary lacks it."""
        found = self._tokenizer.token_to_id(piece)
        if found is None:
            raise ModelFileError(f"the tokenizer has no {piece!r}; use the tokenizer.json that came with the model")
        return found

    def knows(self, piece: str) -> bool:
        """Whether the vocabulary has this piece."""
        return self._tokenizer.token_to_id(piece) is not None

    def piece(self, token: int) -> str:
        """Names a token as the vocabulary does; "" for ids beyond it (Qwen2-VL has more rows than pieces)."""
        return (self._tokenizer.id_to_token(token) or "") if token >= 0 else ""

    def is_special(self, token: int) -> bool:
        return token in self._special_ids

    def encode(self, text: str) -> list[int]:
        """Encodes template text: every special token in it is that token. Equal to transformers' ids."""
        ids: list[int] = []
        for part in self._split_all(text):
            special = self.special.get(part)
            ids += self._plain(part) if special is None else [special]
        return ids

    def encode_user(self, text: str) -> list[int]:
        """Encodes a user's words: reference, box and quad tags are special, all else is characters.

        Equal to `encode` for words without other special tokens. Raises MigicianError for text that is not Unicode.
        """
        ids: list[int] = []
        for part in self._split_user(text):
            tag = self._user_tags.get(part)
            ids += self._characters(part) if tag is None else [tag]
        return ids

    def encode_parts(self, parts: Iterable["str | Said"]) -> list[int]:
        """Encodes a template's own words, str, and what was said between them; see Said.

        Words are encoded together wherever no special token stands between them: a question that starts with a newline
        shares a token with the line before it. Raises ModelFileError for a tag of the template's that is no token.
        """
        ids: list[int] = []
        words = ""
        for part in parts:
            for piece in self._pieces(part):
                if isinstance(piece, str):
                    words += piece
                else:
                    ids += [*self._characters(words), *piece]
                    words = ""
        return ids + self._characters(words)

    def _pieces(self, part: "str | Said") -> Iterator[str | Sequence[int]]:
        """A part as plain words and the ids between them."""
        if isinstance(part, str):
            for piece in self._split_all(part):
                for word in _TAGS.split(piece):  # some tokenizers do not list the template's tags as special
                    yield [self.id(word)] if _TAGS.fullmatch(word) else word
        elif isinstance(part.what, str):
            for piece in self._split_user(part.what):
                yield [self._user_tags[piece]] if piece in self._user_tags else piece
        else:
            yield part.what

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Turns ids back into text. skip_special drops all special tokens, box and reference tags too.

        Bytes that are no UTF-8 become U+FFFD, ids beyond the vocabulary nothing.
        """
        return b"".join(self._raw(i, skip_special) for i in ids).decode("utf-8", "replace")

    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes that a token adds to the text; a piece of a character is possible."""
        return self._raw(token, False)

    def _raw(self, token: int, skip_special: bool) -> bytes:
        added = self._added_text.get(token)
        if added is not None:
            return b"" if skip_special and token in self._special_ids else added.encode()
        piece = self.piece(token)
        if self._byte_level and all(c in self._bytes for c in piece):
            return bytes(self._bytes[c] for c in piece)
        return piece.encode()

    def _plain(self, text: str) -> list[int]:
        try:
            text.encode()  # the library's own error for lone surrogates differs between its versions
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        except UnicodeEncodeError:
            raise MigicianError("the prompt is not valid Unicode text; check its encoding (UTF-8 expected)") from None
        except Exception as e:  # a word vocabulary without an unknown token, for one
            raise ModelFileError(f"the tokenizer cannot encode {text[:40]!r} ({e}); use the model's own") from None

    def _characters(self, text: str) -> list[int]:
        ids = self._plain(text)
        if self._guarded_ids.isdisjoint(ids):
            return ids
        # A word vocabulary looks whole tags up like words. Cut behind their first character, they are none.
        ids = []
        for part in _splitter(self._guarded)(text):
            cut = 1 if part in self._guarded else 0
            ids += self._plain(part[:cut]) + self._plain(part[cut:])
        return [i for i in ids if i not in self._guarded_ids]


def _load(tokenizer_json: str) -> "Tokenizer":
    try:
        import tokenizers

        _check_room(tokenizer_json)
        tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json)
    except (KeyboardInterrupt, SystemExit, OutOfMemory):
        raise
    except BaseException as e:  # a panic of the Rust library is no Exception
        reason = " ".join(str(e).split())[:120]
        if isinstance(e, MemoryError) or (isinstance(e, ImportError) and "failed to map" in reason):
            raise OutOfMemory(_NO_ROOM) from None
        raise ModelFileError(f"tokenizer.json: not a tokenizer ({reason}); download the file again") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # the library then leaves specials to us
    return tokenizer


def _check_room(tokenizer_json: str) -> None:
    """Raises OutOfMemory where the address space does not hold the tokenizer: the library would end the process."""
    try:
        mmap.mmap(-1, _ROOM_BYTES + _ROOM_PER_CHARACTER * len(tokenizer_json)).close()
    except OSError:
        raise OutOfMemory(_NO_ROOM) from None


def _is_byte_level(tokenizer: "Tokenizer") -> bool:
    from tokenizers import decoders

    return isinstance(tokenizer.decoder, decoders.ByteLevel)


def _splitter(tags: Iterable[str]):  # type: ignore[no-untyped-def]
    """A function that cuts text into the given tags and what lies between them, nothing empty."""
    longest_first = sorted(tags, key=len, reverse=True)
    if not longest_first:
        return lambda text: [text] if text else []
    pattern = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
    return lambda text: [part for part in pattern.split(text) if part]


class TextStream:
    """Detokenizes as tokens come: what is handed out never changes, and never ends inside a character.

    The pieces of `push` and the last of `finish` join to exactly what `Vocabulary.decode` gives for all tokens.
    """

    def __init__(self, vocabulary: Vocabulary, *, skip_special: bool = False) -> None:
        self._vocabulary, self._skip = vocabulary, skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    @property
    def pending(self) -> bool:
        """Whether bytes of an unfinished character are held back."""
        return bool(self._decoder.getstate()[0])

    def push(self, token: int) -> str:
        """Takes a token; returns the text that became complete with it, often all of its own."""
        return self._decoder.decode(self._vocabulary._raw(token, self._skip))

    def finish(self) -> str:
        """Ends the text; returns what was held back, U+FFFD if it is no whole character."""
        return self._decoder.decode(b"", final=True)


def token_spans(vocabulary: Vocabulary, ids: Iterable[int]) -> list[tuple[int, int]]:
    """Finds each token's (start, end) in characters of `Vocabulary.decode(ids)`; parts of a character all cover it."""
    stream, at, spans = TextStream(vocabulary), 0, []
    for token in ids:
        start = at
        at += len(stream.push(token))
        spans.append((start, at + stream.pending))
    return spans


def check_words(checkpoint: "Checkpoint") -> Vocabulary:
    """Returns a checkpoint's vocabulary, if it and the model mean the same by every token of the chat template.

    Raises ModelFileError where one is missing, is none by itself, has another id than config.json says, or no row in
    the embedding.
    """
    try:
        vocab = Vocabulary(checkpoint.tokenizer_json)
        _check_template(vocab, checkpoint.config)
        return vocab
    except MemoryError:
        raise OutOfMemory(f"{checkpoint.where}: {_NO_ROOM}") from None
    except (ModelFileError, OutOfMemory) as error:  # these know of words, not of files
        raise type(error)(f"{checkpoint.where}: {error}") from None


def _check_template(vocab: Vocabulary, config: "ModelConfig") -> None:
    wanted = template_ids(config)
    for tag in TEMPLATE_TOKENS:
        found = vocab.id(tag)
        if vocab.encode(tag) != [found]:
            raise ModelFileError(f"the tokenizer reads {tag} as words; use the files that came with the model")
        if found != wanted.get(tag, found):
            raise ModelFileError(
                f"{tag} is {found} in the tokenizer and {wanted[tag]} in config.json; restore the files of one model"
            )
    for tag in (*TEMPLATE_TOKENS, *USER_TAGS):
        found = vocab.special.get(tag, 0) if tag in USER_TAGS else vocab.id(tag)
        if found >= config.text.vocab:
            raise ModelFileError(
                f"{tag} is {found} in the tokenizer, the embedding has {config.text.vocab} rows; "
                f"restore the files of one model"
            )


def build_prompt(
    vocab: Vocabulary,
    prompt: str,
    visual_tokens: Sequence[int],
    *,
    history: Sequence[tuple[str, str | Sequence[int]]] = (),
    system: str | None = None,
    template: ChatTemplate = DEFAULT,
) -> list[int]:
    """Builds the ids of a whole prompt in the model's chat template, ready for the answer's first token.

    visual_tokens[i]: cells of picture i. The pictures belong to the first question: at its start, or in the places that
    it holds for them.   system: words of the system turn; None leaves it to the template, "" is an empty turn.
    history: earlier turns as (question, answer), the answer as text or as the ids that the model gave, which keep a
    cached prefix valid to the last token even where text would be cut into tokens differently.
    Raises MigicianError for an empty question or one with places for fewer or more pictures, ModelFileError when the
    vocabulary lacks the template's tokens, UnsupportedError for a conversation that the template does not serve.
    """
    messages = [] if system is None else [Message("system", (system,))]
    said = [Said(system.strip())] if system is not None else []
    for turn, (question, answer) in enumerate([*history, (prompt, None)]):
        content = _content(question, len(visual_tokens) if turn == 0 else 0)
        messages.append(Message("user", content))
        said += [Said(part.strip()) for part in content if part is not None]
        if answer is not None:
            messages.append(Message("assistant", (answer if isinstance(answer, str) else "ids",)))
            said.append(Said(answer.strip() if isinstance(answer, str) else answer))
    parts: list[str | Said] = []
    cells = iter(visual_tokens)
    for part in split_marks(template.write(messages)):
        if isinstance(part, int):
            parts.append(said[part])
            continue
        first, *behind_pads = part.split(PAD)
        parts.append(first)
        for words in behind_pads:
            parts += [Said([vocab.id(PAD)] * next(cells)), words]
    return vocab.encode_parts(parts)


def _content(question: str, pictures: int) -> list[str | None]:
    """A question's words, and None for each of its pictures, in their order."""
    words = PLACEHOLDER.split(question) if pictures else [question]
    if not "".join(words).strip():
        raise MigicianError("the prompt is empty; write what to find in the pictures")
    if len(words) == 1:
        return [*[None] * pictures, question]
    if len(words) - 1 != pictures:
        tags = ", ".join(sorted(set(PLACEHOLDER.findall(question))))
        raise MigicianError(
            f"the prompt has {len(words) - 1} places for pictures ({tags[:80]}) and {pictures} pictures were given; "
            f"write one place for each, or none"
        )
    content: list[str | None] = [words[0]]
    for text in words[1:]:
        content += [None, text]
    return [part for part in content if part != ""]


def rope_positions(
    ids: Sequence[int] | np.ndarray, grids: Sequence[tuple[int, int]], *, image_token: int
) -> np.ndarray:
    """Gives every token its M-RoPE positions: the numpy reference of what the C core does.

    grids[i]: (rows, columns) of cells of picture i, in the order of their runs of `image_token`.
    Returns i32[3, T], time, height, width. Text counts on by one in all three. A picture's cells share one time and
    count rows and columns from it; the text behind goes on at start + max(rows, columns), not at the next index.
    Raises MigicianError when the runs of `image_token` do not match the grids.
    Source: transformers `Qwen2VLModel.get_rope_index`.
    """
    tokens = np.asarray(ids)
    positions = np.empty((3, len(tokens)), np.int32)
    left, at, start = list(grids), 0, 0
    while at < len(tokens):
        if tokens[at] != image_token:
            positions[:, at] = start
            at, start = at + 1, start + 1
            continue
        if not left:
            raise MigicianError("more runs of picture tokens than pictures; give one grid for each")
        rows, columns = left.pop(0)
        stop = at + rows * columns
        if stop > len(tokens) or not (tokens[at:stop] == image_token).all():
            raise MigicianError(f"a picture of {rows}x{columns} cells has too few tokens; give each cell one")
        row, column = np.divmod(np.arange(rows * columns), columns)
        positions[:, at:stop] = start + np.stack([np.zeros_like(row), row, column])
        at, start = stop, start + max(rows, columns)
    if left:
        raise MigicianError(f"{len(left)} pictures have no tokens in the prompt; give each cell one")
    return positions
