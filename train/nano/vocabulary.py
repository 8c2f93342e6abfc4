"""nano's vocabulary: whole words and single digits, and the same thing as a `tokenizer.json`.

A word with the space before it is one piece ("image", " image"), every digit, white space and punctuation mark is one,
and so is every special token. What scenes never write becomes <|unk|>.
"""

import json
import re
from collections.abc import Iterable, Sequence

from ...runtime.chat_template import SYSTEM_TURN

__all__ = ["ASSISTANT", "SPECIAL", "SYSTEM", "UNKNOWN", "Vocabulary"]

SPECIAL = (
    "<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|im_start|>", "<|im_end|>", "<|box_start|>",
    "<|box_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|endoftext|>", "<|unk|>",
)  # fmt: skip
IMAGE, VISION_START, VISION_END, PAD, UNKNOWN = (SPECIAL.index(f"<|{name}|>") for name in (
    "image_pad", "vision_start", "vision_end", "endoftext", "unk"))  # fmt: skip
SYSTEM = SYSTEM_TURN + "<|im_start|>user\n"
ASSISTANT = "<|im_end|>\n<|im_start|>assistant\n"

_WORDS = r"[0-9]| ?[A-Za-z]+|\s|[^\w\s]"
_PIECES = re.compile(r"<\|[a-z_]+\|>|" + _WORDS)


class Vocabulary:
    """Pieces and their ids; ids are places in the list, the special tokens come first."""

    def __init__(self, pieces: Sequence[str]) -> None:
        if tuple(pieces[: len(SPECIAL)]) != SPECIAL or len(set(pieces)) != len(pieces):
            raise ValueError("a vocabulary starts with the special tokens and has no piece twice")
        self.pieces = list(pieces)
        self.ids = {piece: i for i, piece in enumerate(pieces)}
        self._cache: dict[str, list[int]] = {}

    @classmethod
    def from_texts(cls, texts: Iterable[str]) -> "Vocabulary":
        """Collects every piece of the texts in order of appearance; words with and without a space before them."""
        seen = dict.fromkeys([*SPECIAL, *"0123456789"])
        for text in [SYSTEM, ASSISTANT, "a an", *texts]:
            seen.update(dict.fromkeys(_PIECES.findall(text)))
            seen.update(dict.fromkeys(_PIECES.findall(" " + text)))
        for piece in list(seen):
            if piece.strip().isalpha():
                seen.update(dict.fromkeys([piece.strip(), " " + piece.strip()]))
        return cls(list(seen))

    def __len__(self) -> int:
        return len(self.pieces)

    def encode(self, text: str) -> list[int]:
        found = self._cache.get(text)
        if found is None:
            found = [self.ids.get(piece, UNKNOWN) for piece in _PIECES.findall(text)]
            if len(self._cache) < 20000:
                self._cache[text] = found
        return list(found)

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.pieces[i] for i in ids)

    def tokenizer_json(self) -> str:
        """Writes the vocabulary as a tokenizer.json of the `tokenizers` library: word level, specials added."""
        from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

        tokenizer = Tokenizer(models.WordLevel(self.ids, unk_token=SPECIAL[UNKNOWN]))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_WORDS), behavior="isolated")
        tokenizer.decoder = decoders.Fuse()
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
        assert all(tokenizer.token_to_id(piece) == i for i, piece in enumerate(self.pieces))
        return json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False)
