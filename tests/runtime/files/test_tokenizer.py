"""A folder's tokenizer out of its several files: its ids and its special tokens are those of transformers."""

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import SPECIAL_TOKENS, make_checkpoint

from migician.runtime.errors import ModelFileError
from migician.runtime.files.open import open_checkpoint
from migician.runtime.model import load
from migician.runtime.prompt import Vocabulary, build_prompt

TEXTS = (
    "Hello world 123\n\n  x",
    "<|im_start|>user\nfind the image<|im_end|>\n",
    "图中的猫和日本語の図と😀👩‍👩‍👧",
    "a<|vision_start|><|image_pad|>b <tool> é e\u0301 <|box_start|>(1,2)<|box_end|>",
    "  \n\t'S they're 3.14 <|quad_end|>",
)
FIRST = SPECIAL_TOKENS[:3]
REST = SPECIAL_TOKENS[3:]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model")


def read(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), "utf-8")


def scatter(
    folder: Path,
    *,
    table: Iterable[str] | None = SPECIAL_TOKENS,
    decoder: Iterable[str] | None = None,
    listed: Iterable[str] | None = None,
    special: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    pairs: bool = True,
) -> None:
    """Spreads the added tokens of a complete folder over the files.

    table: those in tokenizer.json; None leaves vocab.json and merges.txt alone.   decoder: in tokenizer_config.json.
    listed: in added_tokens.json.   special: special_tokens_map.json.   settings: what tokenizer_config.json says more.
    """
    whole = read(folder / "tokenizer.json")
    tokens = {token["content"]: token for token in whole["added_tokens"]}
    merges = [" ".join(pair) for pair in whole["model"]["merges"]]
    (folder / "tokenizer.json").unlink()
    if table is None:
        write(folder / "vocab.json", whole["model"]["vocab"])
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", "utf-8")
    else:
        whole["added_tokens"] = [tokens[word] for word in SPECIAL_TOKENS if word in set(table)]
        if not pairs:
            whole["model"]["merges"] = merges
        write(folder / "tokenizer.json", whole)
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    if decoder is not None:
        kept = {str(token["id"]): dict(token) for word, token in tokens.items() if word in set(decoder)}
        config["added_tokens_decoder"] = {id_: token for id_, token in kept.items() if token.pop("id")}  # type: ignore
    write(folder / "tokenizer_config.json", {**config, **(settings or {})})
    if listed is not None:
        write(folder / "added_tokens.json", {word: tokens[word]["id"] for word in listed})
    if special is not None:
        write(folder / "special_tokens_map.json", special)


def assert_as_transformers(folder: Path) -> Vocabulary:
    """Compares ids of every added token, which are special, and the ids of texts."""
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    with open_checkpoint(folder) as model:
        vocabulary = Vocabulary(model.tokenizer_json)
    wanted = {token.content: (number, token.special) for number, token in reference.added_tokens_decoder.items()}
    found = {word: (vocabulary.id(word), word in vocabulary.special) for word in wanted}
    assert found == wanted and vocabulary.special.keys() <= wanted.keys()
    assert len(vocabulary) == len(reference)
    for text in TEXTS:
        assert vocabulary.encode(text) == reference.encode(text, add_special_tokens=False), text
    return vocabulary


LAYOUTS: dict[str, dict[str, Any]] = {
    "as Qwen2-VL is published": {"table": FIRST, "decoder": SPECIAL_TOKENS, "pairs": False},
    "nothing in tokenizer.json": {"table": (), "decoder": SPECIAL_TOKENS},
    "added_tokens.json": {"table": FIRST, "listed": REST},
    "added_tokens.json, special by name": {
        "table": FIRST,
        "listed": REST,
        "special": {"eos_token": {"content": "<|im_end|>"}, "additional_special_tokens": ["<|image_pad|>"]},
    },
    "named in tokenizer_config.json alone": {
        "table": FIRST,
        "settings": {"additional_special_tokens": list(SPECIAL_TOKENS[1:])},
    },
    "vocab.json, decoder": {"table": None, "decoder": SPECIAL_TOKENS},
    "vocab.json, added_tokens.json": {"table": None, "listed": SPECIAL_TOKENS},
    "vocab.json, names": {
        "table": None,
        "settings": {"eos_token": "<|endoftext|>", "additional_special_tokens": list(SPECIAL_TOKENS[1:])},
    },
    "the general class": {
        "table": FIRST,
        "decoder": SPECIAL_TOKENS,
        "settings": {"tokenizer_class": "PreTrainedTokenizerFast"},
    },
    "all in one": {},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_scattered_tokens(folder: Path, name: str) -> None:
    scatter(folder, **LAYOUTS[name])
    assert_as_transformers(folder)
    load(folder, threads=1).close()


def test_random_subsets(folder: Path) -> None:
    """Where the files do not contradict each other or config.json, ids are transformers'; else one line says so."""
    rng = random.Random(0)
    whole = read(folder / "tokenizer.json")
    refused = agreed = noted = 0
    for _ in range(60):
        for path in folder.glob("*token*"):
            path.unlink()
        write(folder / "tokenizer.json", whole)
        parts = {
            part: [word for word in SPECIAL_TOKENS if rng.random() < rng.choice([0.3, 0.9, 1])]
            for part in ("table", "decoder", "listed")
            if rng.random() < 0.7
        }
        scatter(folder, **parts, settings={"additional_special_tokens": rng.sample(SPECIAL_TOKENS, 5)})  # type: ignore
        try:
            with open_checkpoint(folder) as model:
                notes = model.notes
        except ModelFileError as error:
            assert "by the order" in str(error) and "\n" not in str(error)
            refused += 1
            continue
        if "(transformers 5)" in "".join(notes):
            ids = {token["content"]: token["id"] for token in whole["added_tokens"]}
            vocabulary = Vocabulary(model.tokenizer_json)
            assert vocabulary.special.items() <= ids.items()
            noted += 1
        else:
            assert_as_transformers(folder)
            agreed += 1
    assert agreed > 10 and refused > 5 and noted > 2


def test_the_files_own_ids_go_before_an_order_that_does_not_fit(folder: Path) -> None:
    ids = {token["content"]: token["id"] for token in read(folder / "tokenizer.json")["added_tokens"]}
    scatter(folder, table=FIRST, decoder=REST)
    with open_checkpoint(folder) as model:
        vocabulary = Vocabulary(model.tokenizer_json)
        assert {word: vocabulary.id(word) for word in SPECIAL_TOKENS} == ids
        assert len(model.notes) == 1 and "config.json" in model.notes[0]


def test_a_complete_file_is_taken_as_it_is(folder: Path) -> None:
    with open_checkpoint(folder) as model:
        assert model.tokenizer_json == (folder / "tokenizer.json").read_text("utf-8")
        assert model.notes == ()


def test_the_pattern_is_that_of_the_class(folder: Path) -> None:
    """Qwen2Tokenizer takes nothing but the vocabulary of a tokenizer.json; the general class takes all."""
    table = read(folder / "tokenizer.json")
    table["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    table["normalizer"] = None
    write(folder / "tokenizer.json", table)
    assert_as_transformers(folder)
    write(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    assert_as_transformers(folder)


def test_further_tokens_of_a_finetune(folder: Path) -> None:
    table = read(folder / "tokenizer.json")
    last = table["added_tokens"][-1]
    more = [{**last, "id": last["id"] + 1 + i, "content": word} for i, word in enumerate(("<tool>", "<|point|>"))]
    more[0] |= {"special": False, "normalized": True}
    tokens = {str(token["id"]): token for token in [*table["added_tokens"], *more]}
    write(folder / "tokenizer_config.json", {"added_tokens_decoder": {k: without_id(v) for k, v in tokens.items()}})
    vocabulary = assert_as_transformers(folder)
    assert vocabulary.id("<|point|>") == last["id"] + 2 and not vocabulary.is_special(last["id"] + 1)


def without_id(token: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in token.items() if key != "id"}


def test_ids_that_contradict_each_other(folder: Path) -> None:
    scatter(folder, table=FIRST, listed=REST)
    listed = read(folder / "added_tokens.json")
    swapped = {**listed, "<|box_start|>": listed["<|box_end|>"], "<|box_end|>": listed["<|box_start|>"]}
    for wrong, words in (
        ({**listed, "<|im_end|>": 7000}, ("<|im_end|>", "7000", "tokenizer.json", "added_tokens.json")),
        ({**listed, "<|pad|>": listed["<|box_end|>"]}, ("<|pad|>", "<|box_end|>")),
        ({**listed, "Ġthe": 7000}, ("7000", "vocabulary")),
    ):
        write(folder / "added_tokens.json", wrong)
        with pytest.raises(ModelFileError) as caught:
            open_checkpoint(folder)
        assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)
    write(folder / "added_tokens.json", swapped)  # no contradiction: the boxes were named so
    assert_as_transformers(folder)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("added_tokens.json", {"<|im_end|>": "5"}),
        ("added_tokens.json", {"<|im_end|>": -1}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "a"}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"1": "a"}}),
        ("tokenizer_config.json", {"added_tokens_decoder": None}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"9" * 5000: {"content": "a"}}}),
        ("tokenizer_config.json", {"eos_token": {"id": 4}}),
        ("special_tokens_map.json", {"eos_token": {"content": 4}}),
        ("tokenizer.json", {"model": {"type": "BPE", "vocab": {"a": "b"}, "merges": []}}),
        ("tokenizer.json", {"model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": [{"content": "a"}]}),
        ("tokenizer.json", {"model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": 5}),
    ],
)
def test_damaged_files(folder: Path, name: str, content: Any) -> None:
    if "tokenizer_config" not in name:
        (folder / "tokenizer_config.json").unlink()
    write(folder / name, content)
    with pytest.raises(ModelFileError) as caught:
        load(folder, threads=1)
    assert str(folder) in str(caught.value) and str(caught.value).isprintable()


def test_merges_that_are_none(folder: Path) -> None:
    scatter(folder, table=None, decoder=SPECIAL_TOKENS)
    (folder / "merges.txt").write_text("#version: 0.2\na b c\n")
    with pytest.raises(ModelFileError, match=r"merges\.txt.*a b c"):
        open_checkpoint(folder)
    (folder / "merges.txt").unlink()
    with pytest.raises(ModelFileError, match=r"merges\.txt"):
        open_checkpoint(folder)


def test_windows_line_ends_in_merges(folder: Path) -> None:
    scatter(folder, table=None, decoder=SPECIAL_TOKENS)
    before = assert_as_transformers(folder).encode("the image and in")
    text = (folder / "merges.txt").read_text("utf-8")
    (folder / "merges.txt").write_text(text.replace("\n", "\r\n") + "\r\n", "utf-8", newline="")
    with open_checkpoint(folder) as model:
        assert Vocabulary(model.tokenizer_json).encode("the image and in") == before


# What the prompt needs


@pytest.mark.parametrize("word", ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"])
def test_a_template_token_that_is_missing_is_named(folder: Path, word: str) -> None:
    table = read(folder / "tokenizer.json")
    for token in table["added_tokens"]:
        if token["content"] == word:
            token["content"] = "<|other|>"
    write(folder / "tokenizer.json", table)
    write(folder / "tokenizer_config.json", {})
    with pytest.raises(ModelFileError) as caught:
        load(folder, threads=1)
    assert word in str(caught.value) and str(folder) in str(caught.value)


@pytest.mark.parametrize("key", ["image_token_id", "vision_start_token_id", "vision_end_token_id"])
def test_a_template_token_under_another_id_than_the_model_knows(folder: Path, key: str) -> None:
    config = read(folder / "config.json")
    write(folder / "config.json", {**config, key: config[key] + 1})
    with pytest.raises(ModelFileError, match=f"{config[key]}.*{config[key] + 1}"):
        load(folder, threads=1)


def test_tokens_beyond_the_embedding(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", vocab=320)
    table, config = read(folder / "tokenizer.json"), read(folder / "config.json")
    # the template's tokens keep their place, the tags of boxes come behind the embedding's last row
    for token in table["added_tokens"]:
        if token["content"] == "<|box_start|>":
            token["content"] = "<|other|>"
    last = table["added_tokens"][-1]
    fill = [{**last, "id": last["id"] + 1 + i, "content": f"<|fill {i}|>"} for i in range(319 - last["id"])]
    table["added_tokens"] += [*fill, {**last, "id": 320, "content": "<|box_start|>"}]
    write(folder / "tokenizer.json", table)
    write(folder / "tokenizer_config.json", {})
    assert config["vocab_size"] == 320
    with pytest.raises(ModelFileError, match=r"box_start.*320.*320 rows"):
        load(folder, threads=1)


def test_a_token_that_is_only_a_piece_of_the_vocabulary(folder: Path) -> None:
    table = read(folder / "tokenizer.json")
    table["model"]["vocab"] |= {token["content"]: token["id"] for token in table["added_tokens"]}
    table["added_tokens"] = []
    write(folder / "tokenizer.json", table)
    write(folder / "tokenizer_config.json", {})
    with pytest.raises(ModelFileError, match=r"<\|im_start\|> as words"):
        load(folder, threads=1)


def test_words_of_a_user_are_no_template_where_its_tokens_are_ordinary(folder: Path) -> None:
    scatter(folder, table=FIRST, listed=REST, special={})
    with open_checkpoint(folder) as model:
        vocabulary = Vocabulary(model.tokenizer_json)
    pad, start = vocabulary.id("<|image_pad|>"), vocabulary.id("<|vision_start|>")
    assert not vocabulary.is_special(pad)
    ids = build_prompt(vocabulary, "<|vision_start|><|image_pad|> what<|im_end|>", [2])
    assert ids.count(pad) == 2 and ids.count(start) == 1 and ids.count(vocabulary.id("<|im_end|>")) == 2


def test_a_mig_file_has_the_whole_tokenizer(folder: Path, tmp_path: Path) -> None:
    from migician.runtime.files.mig import read_mig, write_mig

    vocabulary = Vocabulary((folder / "tokenizer.json").read_text("utf-8"))
    scatter(folder, table=None, listed=SPECIAL_TOKENS)
    with open_checkpoint(folder) as model:
        write_mig(tmp_path / "x.mig", model)
    with read_mig(tmp_path / "x.mig") as back:
        found = Vocabulary(back.tokenizer_json)
    assert {word: found.id(word) for word in SPECIAL_TOKENS} == vocabulary.special
    load(tmp_path / "x.mig", threads=1).close()
