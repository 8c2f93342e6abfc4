"""Puts the files of a folder's tokenizer together as one complete tokenizer.json.

Published folders say what they add to the vocabulary in up to four places:

| file                    | what it says                                                                         |
|-------------------------|--------------------------------------------------------------------------------------|
| tokenizer.json          | the vocabulary, and often only some of the added tokens                              |
| vocab.json, merges.txt  | the vocabulary where there is no tokenizer.json                                      |
| tokenizer_config.json   | `added_tokens_decoder` {id: token}, names of special tokens, the tokenizer's class   |
| added_tokens.json       | {token: id}, of older saves; read where there is no `added_tokens_decoder`           |
| special_tokens_map.json | names of special tokens, of older saves; read where there is no added_tokens_decoder |

The ids are those that transformers 5 gives for the folder. It takes tokens in the order of their ids and numbers them
anew behind the vocabulary, so that a gap, or a file that it does not read, moves every token behind. Where its numbers
contradict config.json and those written in the files do not, the files' own are taken, and a note says so.

Source: transformers 5 `PreTrainedTokenizerBase._from_pretrained`, `TokenizersBackend`, `Qwen2Tokenizer`;
`AddedVocabulary` of the tokenizers library.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import ModelFileError
from .config import ModelConfig
from .tensors import parse_json, shown
from .text import read_text

__all__ = ["TEMPLATE_TOKENS", "compose_tokenizer", "template_ids"]

TEMPLATE_TOKENS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")

_TOGETHER = "restore the tokenizer files that belong together"
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_QWEN2 = ("Qwen2Tokenizer", "Qwen2TokenizerFast", None)  # a folder that names no class gets that of its model
_QWEN2_NAMED = dict.fromkeys(("unk_token", "eos_token", "pad_token"), "<|endoftext|>")
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BPE = {
    "type": "BPE",
    "dropout": None,
    "unk_token": None,
    "continuing_subword_prefix": "",
    "end_of_word_suffix": "",
    "fuse_unk": False,
    "byte_fallback": False,
    "ignore_merges": False,
}
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")

Token = dict[str, Any]  # content and the five flags


def template_ids(config: ModelConfig) -> dict[str, int]:
    """The ids that config.json gives to tokens of the prompt's template."""
    return {
        "<|vision_start|>": config.vision_start_token,
        "<|vision_end|>": config.vision_end_token,
        "<|image_pad|>": config.image_token,
    }


def compose_tokenizer(folder: Path, config: ModelConfig) -> tuple[str, tuple[str, ...]]:
    """Returns the folder's whole tokenizer as the text of a tokenizer.json, and what is to be said about it.

    The text is the file's own where that is complete. Raises ModelFileError for a file that is missing or damaged, and
    for ids that contradict each other.
    """
    files = _Files(folder)
    if not files.sound:
        return files.text, ()
    vocab = files.vocabulary()
    stated = _stated(files, vocab)
    added = _as_transformers(files, vocab)
    moved = [content for content, number in stated.items() if added.ids.get(content) != number]
    if not moved:
        return files.composed(added), ()
    moved.sort(key=lambda content: content not in TEMPLATE_TOKENS)
    word, number, counted = shown(moved[0]), stated[moved[0]], added.ids.get(moved[0], "none")
    own = _as_stated(files, vocab)
    fault = f"{folder}: {word} is {number} in its tokenizer files, {counted} by the order of its tokens"
    if _fits(added, stated, config):
        note = f"{fault}, which goes first, as in transformers 5"
    elif own.ids.items() >= stated.items() and _fits(own, stated, config):
        added, note = own, f"{fault} (transformers 5); {number} is taken, which fits config.json"
    else:
        raise ModelFileError(f"{fault}; {_TOGETHER}")
    return files.composed(added), (note,)


class _Added:
    """The tokens added to a vocabulary, numbered as the tokenizers library does.   ids: by content.   tokens: by id."""

    def __init__(self, vocab: Mapping[str, int]) -> None:
        self._vocab = vocab
        self.ids: dict[str, int] = {}
        self.tokens: dict[int, Token] = {}

    def add(self, token: Token) -> None:
        """Adds a token; one that is there already keeps its id and takes the new flags."""
        content = token["content"]
        if not content or self.tokens.get(self.ids.get(content, -1)) == token:
            return
        number = self.ids.get(content, self._vocab.get(content))
        if number is None:
            number = max(len(self._vocab), max(self.ids.values(), default=-1) + 1)
        self.ids[content] = number
        self.tokens[number] = token


class _Files:
    """The tokenizer's files, read and checked as far as their form goes.

    table: tokenizer.json, or what stands for it.   text: its text.   config, special, listed: tokenizer_config.json,
    special_tokens_map.json, added_tokens.json, {} where there is none.
    sound: False for a tokenizer.json that is nothing of the kind: whoever builds a tokenizer of it says so.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.text, self.table = self._read_table()
        model = self.table.get("model")
        self.sound = isinstance(model, dict) and isinstance(model.get("vocab"), (dict, list))
        self.config = self._read("tokenizer_config.json", "tokenizer configuration")
        self.special = self._read("special_tokens_map.json", "table of special tokens")
        self.listed = self._read("added_tokens.json", "table of added tokens")
        # Qwen2Tokenizer takes vocabulary and merges of a tokenizer.json and makes the rest anew
        self.anew = self.sound and self.config.get("tokenizer_class") in _QWEN2 and model_type(self.table) == "BPE"
        if self.sound:
            self._read_names()

    def _read(self, name: str, what: str) -> dict[str, Any]:
        path = self.folder / name
        return parse_json(read_text(path), path, what) if path.exists() else {}

    def _read_table(self) -> tuple[str, dict[str, Any]]:
        path = self.folder / "tokenizer.json"
        if path.exists() or not (self.folder / "vocab.json").exists():
            text = read_text(path)
            return text, parse_json(text, path, "tokenizer")
        vocab = self._read("vocab.json", "vocabulary")
        merges = [line for line in read_text(self.folder / "merges.txt").split("\n") if line.strip("\r")]
        pairs = [line.rstrip("\r").split(" ") for line in merges if not line.startswith("#version")]
        for pair in pairs:
            if len(pair) != 2:
                raise ModelFileError(f"{self.folder / 'merges.txt'}: {shown(' '.join(pair))} is no pair; {_TOGETHER}")
        model = {**_BPE, "vocab": vocab, "merges": pairs}
        return "", {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "model": model}

    def vocabulary(self) -> dict[str, int]:
        """The pieces that are not added, with their ids."""
        vocab = self.table["model"]["vocab"]
        if isinstance(vocab, list):  # of another kind of model: pairs of a piece and its score
            pieces = [entry[0] if isinstance(entry, list) and entry else entry for entry in vocab]
            return {piece: number for number, piece in enumerate(pieces) if isinstance(piece, str)}
        for piece, number in vocab.items():
            if type(number) is not int or not 0 <= number < 1 << 32:
                raise ModelFileError(f"{self.folder}: the vocabulary's {shown(piece)} is {shown(number)}; {_TOGETHER}")
        return vocab

    def in_table(self) -> list[tuple[int, Token]]:
        """The added tokens of tokenizer.json."""
        entries = self.table.get("added_tokens") or []
        if not isinstance(entries, list):
            raise self._bad("tokenizer.json", "added_tokens", entries)
        return [(self._id("tokenizer.json", entry), self.token("tokenizer.json", entry)) for entry in entries]

    def in_config(self) -> list[tuple[int, Token]] | None:
        """The added tokens of tokenizer_config.json by their ids; None where it does not speak of them."""
        table = self.config.get("added_tokens_decoder")
        if "added_tokens_decoder" not in self.config:
            return None
        if not isinstance(table, dict):
            raise self._bad("tokenizer_config.json", "added_tokens_decoder", table)
        found = []
        for key, entry in table.items():
            if not key.isascii() or not key.isdecimal() or len(key) > 9:
                raise self._bad("tokenizer_config.json", "the id of an added token", key)
            found.append((int(key), self.token("tokenizer_config.json", entry)))
        return sorted(found, key=lambda pair: pair[0])

    def in_list(self) -> list[tuple[int, Token]]:
        """The tokens of added_tokens.json; those that are named as special elsewhere are so here."""
        names = {token["content"] for token in (*self._given_names.values(), *self._early)}
        found = []
        for content, number in self.listed.items():
            if type(number) is not int or not 0 <= number < 1 << 31:
                raise self._bad("added_tokens.json", content, number)
            found.append((number, make_token(content, special=content in names)))
        return found

    def _read_names(self) -> None:
        """Sorts out which tokens are special by name (named) or without one (extra).

        What special_tokens_map.json calls additional comes too late, in transformers, for the flags of in_list().
        """
        settings = _renamed(self.config)
        for key, value in ({} if "added_tokens_decoder" in self.config else self.special).items():
            lists = key == "extra_special_tokens" and isinstance(value, list)
            settings[key] = [*(settings.get(key) or []), *value] if lists else value
        extra = settings.get("extra_special_tokens")
        self._early = self._names(extra)
        if isinstance(extra, dict) or "extra_special_tokens" not in settings:
            settings = _renamed({**settings, "extra_special_tokens": None})
        self.extra = self._names(settings.get("extra_special_tokens"))
        usual = {key: settings[key] for key in _NAMED if key in settings}
        own = {key: value for key, value in settings.items() if key.endswith("_token") and key not in _NAMED}
        own |= extra if isinstance(extra, dict) else {}
        self._given_names = self._named(usual)
        defaults = _QWEN2_NAMED if self.anew else {}
        self.named = {**self._named({key: {**defaults, **usual}.get(key) for key in _NAMED}), **self._named(own)}

    def _named(self, table: Mapping[str, Any]) -> dict[str, Token]:
        return {key: self._name(key, value) for key, value in table.items() if isinstance(value, (str, dict))}

    def _names(self, entries: Any) -> list[Token]:
        return [self._name("a special token", entry) for entry in entries] if isinstance(entries, list) else []

    def _name(self, key: str, entry: Any) -> Token:
        if isinstance(entry, str):
            return make_token(entry, special=True)
        older = "added_tokens_decoder" not in self.config and isinstance(entry, dict)
        return self.token(key, {**entry, "special": True} if older else entry)

    def token(self, where: str, entry: Any) -> Token:
        """Reads a token with its flags; a special one is not looked for in normalized text."""
        if not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
            raise self._bad(where, "an added token", entry)
        special = entry.get("special", False)
        flags = {**dict.fromkeys(_FLAGS, False), "normalized": not special}
        flags |= {key: entry[key] for key in _FLAGS if key in entry}
        if not all(isinstance(flag, bool) for flag in flags.values()):
            raise self._bad(where, "an added token", entry)
        return {"content": entry["content"], **flags}

    def _id(self, where: str, entry: Any) -> int:
        number = entry.get("id") if isinstance(entry, dict) else None
        if type(number) is not int or not 0 <= number < 1 << 31:
            raise self._bad(where, "an added token", entry)
        return number

    def _bad(self, name: str, what: str, value: Any) -> ModelFileError:
        return ModelFileError(f"{self.folder / name}: {shown(what)} is {shown(value)}; {_TOGETHER}")

    def composed(self, added: _Added) -> str:
        """The text of a tokenizer.json with these added tokens; the file's own where nothing has to change."""
        entries = [{"id": number, **added.tokens[number]} for number in sorted(added.tokens)]
        table = {**self.table, "added_tokens": entries}
        if self.anew:
            table |= self._qwen2()
        same = self.text and self.table.get("added_tokens") == entries
        if same and (not self.anew or _works_as(self.table, table)):
            return self.text
        return json.dumps(table, ensure_ascii=False)

    def _qwen2(self) -> dict[str, Any]:
        """What Qwen2Tokenizer makes of a vocabulary: text in NFC, cut by its pattern, then byte-level BPE."""
        prefix = bool(self.config.get("add_prefix_space"))
        level = {"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": False, "use_regex": False}
        split = {"type": "Split", "pattern": {"Regex": _SPLIT}, "behavior": "Isolated", "invert": False}
        model = self.table["model"]
        merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model.get("merges") or []]
        return {
            "normalizer": {"type": "NFC"},
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
            "post_processor": {**level, "add_prefix_space": False},
            "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
            "model": {**_BPE, "vocab": self.vocabulary(), "merges": merges},
        }


def model_type(table: Mapping[str, Any]) -> str | None:
    """The kind of a tokenizer.json's model; files older than the word are BPE where they have merges."""
    model = table["model"]
    return model.get("type", "BPE" if "merges" in model else None)


def _renamed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with the older word for further special tokens brought to the newer one."""
    settings = dict(settings)
    if "additional_special_tokens" in settings and not settings.get("extra_special_tokens"):
        settings["extra_special_tokens"] = settings.pop("additional_special_tokens")
    return settings


def make_token(content: str, *, special: bool) -> Token:
    """A token with the library's own flags; ordinary ones are looked for in normalized text."""
    return {"content": content, **dict.fromkeys(_FLAGS, False), "normalized": not special, "special": special}


def _works_as(table: Mapping[str, Any], anew: Mapping[str, Any]) -> bool:
    """True where a tokenizer.json cuts text as Qwen2Tokenizer's own does; what only moves offsets does not count."""
    model = {**_BPE, **table["model"]}
    settings = {key: model[key] or _BPE[key] for key in _BPE}  # "" and null are the same here
    steps = table.get("pre_tokenizer")
    inner = steps.get("pretokenizers") if isinstance(steps, dict) else None
    if not isinstance(inner, list) or not all(isinstance(step, dict) for step in inner):
        return False
    wanted = anew["pre_tokenizer"]["pretokenizers"]
    decoder = table.get("decoder")
    return (
        settings == _BPE
        and isinstance(table["model"]["vocab"], dict)
        and table.get("normalizer") == anew["normalizer"]
        and isinstance(decoder, dict)
        and decoder.get("type") == "ByteLevel"
        and [{**step, "trim_offsets": False} if "trim_offsets" in step else step for step in inner] == wanted
    )


def _stated(files: _Files, vocab: Mapping[str, int]) -> dict[str, int]:
    """The ids that the files write down. Raises ModelFileError where two of them contradict each other."""
    found: dict[str, tuple[int, str]] = {}
    holder: dict[int, tuple[str, str]] = {}
    listed = [(number, {"content": content}) for content, number in files.listed.items()]
    sources = (("tokenizer.json", files.in_table()), ("tokenizer_config.json", files.in_config() or []))
    for name, tokens in (*sources, ("added_tokens.json", listed)):
        for number, token in tokens:
            content = token["content"]
            own, said = found.setdefault(content, (number, name))
            other, by = holder.setdefault(number, (content, name))
            if own != number:
                raise _conflict(files, f"{shown(content)} is {own} in {said} and {number} in {name}")
            if other != content:
                raise _conflict(files, f"id {number} is {shown(other)} in {by} and {shown(content)} in {name}")
            if vocab.get(content, number) != number:
                raise _conflict(files, f"{shown(content)} is {number} in {name} and {vocab[content]} in the vocabulary")
    return {content: number for content, (number, _) in found.items()}


def _conflict(files: _Files, fault: str) -> ModelFileError:
    return ModelFileError(f"{files.folder}: {fault}; {_TOGETHER}")


def _as_transformers(files: _Files, vocab: Mapping[str, int]) -> _Added:
    """The added tokens as transformers 5 numbers and marks them."""
    added = _Added(vocab)
    if not files.anew:
        _add_all(added, [token for _, token in files.in_table()])
    decoder = files.in_config()
    if decoder is None:
        together = dict(files.in_list()) | dict(files.in_table())
        decoder = sorted(together.items())
    known = {token["content"]: token for _, token in decoder}
    named = {key: known.get(token["content"], token) for key, token in files.named.items()}
    tokens = [token for _, token in decoder]
    present = {*added.ids, *known}
    for token in (*named.values(), *files.extra):
        if token["content"] not in present:
            present.add(token["content"])
            tokens.append(token)
    names = {token["content"] for token in named.values()}
    _add_all(added, [{**token, "special": token["special"] or token["content"] in names} for token in tokens])
    if files.anew:
        _add_all(added, [make_token(token["content"], special=True) for token in (*named.values(), *files.extra)])
    return added


def _as_stated(files: _Files, vocab: Mapping[str, int]) -> _Added:
    """The added tokens of all files together, in the order of the ids that they write down."""
    added = _Added(vocab)
    together = dict(files.in_list()) | dict(files.in_config() or []) | dict(files.in_table())
    _add_all(added, [token for _, token in sorted(together.items())])
    _add_all(added, [make_token(token["content"], special=True) for token in (*files.named.values(), *files.extra)])
    return added


def _add_all(added: _Added, tokens: Iterable[Token]) -> None:
    for token in tokens:
        added.add(token)


def _fits(added: _Added, stated: Mapping[str, int], config: ModelConfig) -> bool:
    """True where the template's tokens are there with the ids of config.json, or else those of the files."""
    wanted = {content: stated.get(content, added.ids.get(content, -1)) for content in TEMPLATE_TOKENS}
    wanted |= template_ids(config)
    return all(added.ids.get(content) == number for content, number in wanted.items())
