"""Random checkpoints of real geometries, to try speed, memory and tools where the weights are not at hand.

Geometries: Qwen2-VL 2B and 7B as their published config.json have them, and the embedded model's own. Values are normal
with the deviation that keeps activations near one. The weights of one shape and seed are always the same.
"""

import json
import math
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ...runtime.errors import MigicianError
from ...runtime.files.config import CLIP_MEAN, CLIP_STD, parse_config, tensor_shapes
from ...runtime.files.mig import read_mig
from ...runtime.files.open import NANO_FILE
from ...runtime.files.write import whole_folder
from ...runtime.prompt import Vocabulary, build_prompt

__all__ = ["SHAPES", "byte_tokenizer", "write_random_model"]

SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
_FIRST_SPECIAL = 151643  # of the published tokenizer
_VISION = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4, "in_chans": 3, "in_channels": 3,
           "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14, "temporal_patch_size": 2,
           "hidden_act": "quick_gelu", "model_type": "qwen2_vl"}  # fmt: skip
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "2b": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
           "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "7b": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
           "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False},
}  # fmt: skip
_PIECE = 1 << 22  # values drawn at a time
_SHARD_BYTES = 4_000_000_000
# Qwen2's rule for cutting text before its merges are applied
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def write_random_model(
    folder: Path,
    shape: str,
    *,
    seed: int = 0,
    tokenizer: Path | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> int:
    """Writes a checkpoint folder in the published layout; it appears complete or not at all. Returns its bytes.

    tokenizer: a folder (or a tokenizer.json) whose tokenizer is taken; by default one that knows bytes and Qwen's
    special tokens under their published ids. say: told how far it is. Memory stays under 100 MB.
    Raises MigicianError when the folder exists, the tokenizer does not fit, or there is no space.
    """
    if folder.exists() or folder.is_symlink():
        raise MigicianError(f"{folder}: is there already; choose another name or remove it")
    texts = _texts(shape, tokenizer)
    config = parse_config(
        json.loads(texts["config.json"]), json.loads(texts["generation_config.json"]), where="config.json"
    )
    shapes = tensor_shapes(config)
    with whole_folder(folder, parents=True, advice="choose another place") as partial:
        wanted = 2 * sum(math.prod(s) for s in shapes.values()) + (64 << 20)
        if shutil.disk_usage(partial).free < wanted:
            raise MigicianError(f"{folder.parent}: {wanted / 1e9:.1f} GB are wanted and not free; choose another place")
        for name, text in texts.items():
            (partial / name).write_text(text, encoding="utf-8")
        _write_weights(partial, shapes, seed, say)
        return sum(path.stat().st_size for path in partial.iterdir())


# --------------------------------------------------------------------------------------------------------------- texts


def _texts(shape: str, tokenizer: Path | None) -> dict[str, str]:
    """The folder's texts by file name."""
    if shape == "nano":
        with read_mig(NANO_FILE) as nano:
            raw, own = nano.raw, nano.tokenizer_json
        config = json.loads(raw["config"])
        generation, pictures = json.loads(raw["generation"]), json.loads(raw["preprocessor"])
        text = _tokenizer_text(tokenizer) if tokenizer else own
    else:
        config = _config(SHAPES[shape])
        generation = {"repetition_penalty": 1.05}
        pictures = _preprocessor()
        text = _tokenizer_text(tokenizer) if tokenizer else json.dumps(byte_tokenizer(_FIRST_SPECIAL))
    where = tokenizer or "the tokenizer"
    if shape != "nano" or tokenizer:
        _set_special(config, generation, text, where)
    added = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
             "bos_token": None, "unk_token": None, "model_max_length": 32768}  # fmt: skip
    files = {"config.json": config, "generation_config.json": generation, "preprocessor_config.json": pictures,
             "tokenizer_config.json": added}  # fmt: skip
    return {name: json.dumps(value, indent=2) + "\n" for name, value in files.items()} | {"tokenizer.json": text}


def _tokenizer_text(place: Path) -> str:
    path = place / "tokenizer.json" if place.is_dir() else place
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        raise MigicianError(f"{path}: cannot be read; give the folder of a Qwen2-VL tokenizer") from None


def _set_special(config: dict[str, Any], generation: dict[str, Any], text: str, where: object) -> None:
    """Puts the tokenizer's ids into the configurations, having tried it on a prompt."""
    vocabulary = Vocabulary(text)
    ids = {word: vocabulary.id(word) for word in SPECIAL if word in vocabulary.special}
    needed = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
    if missing := [word for word in needed if word not in ids]:
        raise MigicianError(f"{where}: has no {missing[0]}; give a Qwen2-VL tokenizer")
    largest = max([*ids.values(), *build_prompt(vocabulary, "the cup", [1]), len(vocabulary) - 1])
    if largest >= config["vocab_size"]:
        raise MigicianError(f"{where}: its ids go to {largest}, the model has {config['vocab_size']}; give Qwen2-VL's")
    end = ids["<|im_end|>"]
    pad = ids.get("<|endoftext|>", end)
    config |= {"image_token_id": ids["<|image_pad|>"], "video_token_id": ids.get("<|video_pad|>", end),
               "vision_start_token_id": ids["<|vision_start|>"], "vision_end_token_id": ids["<|vision_end|>"],
               "bos_token_id": pad, "eos_token_id": end}  # fmt: skip
    generation |= {"bos_token_id": pad, "pad_token_id": pad, "eos_token_id": list(dict.fromkeys((end, pad)))}


def _config(shape: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json as transformers 4.45 wrote them, but for the tokens."""
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        **shape,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "use_sliding_window": False,
        "torch_dtype": "bfloat16",
        "vision_config": {**_VISION, "hidden_size": shape["hidden_size"]},
    }


def _preprocessor() -> dict[str, Any]:
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2VLProcessor",
        "min_pixels": 56 * 56,
        "max_pixels": 28 * 28 * 16384,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
    }


def _byte_letters() -> list[str]:
    """The character that stands for each byte in byte-level BPE: itself if it prints, else one from 256 up."""
    letters, spare = [], 256
    for byte in range(256):
        prints = 33 <= byte <= 126 or (161 <= byte <= 255 and byte != 173)
        letters.append(chr(byte) if prints else chr(spare))
        spare += not prints
    return letters


def byte_tokenizer(first_special: int) -> dict[str, Any]:
    """A tokenizer.json without merges: every byte is a token, and SPECIAL follow from id `first_special` on.

    The ids between are words that no text becomes, so that every id decodes to something, as in a real vocabulary.
    """
    letters = _byte_letters()
    pieces = letters + [f"{letters[32]}w{number}" for number in range(len(letters), first_special)]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": _SPLIT}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": first_special + i, "content": word, **plain} for i, word in enumerate(SPECIAL)],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
        "post_processor": level,
        "decoder": level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {piece: i for i, piece in enumerate(pieces)},
            "merges": [],
        },
    }


# ------------------------------------------------------------------------------------------------------------- weights


def _shards(shapes: Mapping[str, tuple[int, ...]]) -> list[list[str]]:
    """The tensors cut into files of at most _SHARD_BYTES where one tensor fits that."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        more = 2 * math.prod(shape)
        if shards[-1] and size + more > _SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += more
    return shards


def _write_weights(folder: Path, shapes: Mapping[str, tuple[int, ...]], seed: int, say: Callable[[str], None]) -> None:
    shards = _shards(shapes)
    total, done, told = 2 * sum(math.prod(s) for s in shapes.values()), 0, -1
    places: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file_name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        places |= dict.fromkeys(names, file_name)
        with open(folder / file_name, "wb") as file:
            _write_header(file, {name: shapes[name] for name in names})
            for name in names:
                for piece in _values(name, shapes[name], seed):
                    file.write(piece.data)
                    done += piece.nbytes
                    if (percent := 100 * done // total) // 5 != told // 5:
                        told = percent
                        say(f"{percent:3} %: {done / 1e9:.2f} of {total / 1e9:.2f} GB, {file_name}")
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_header(file: BinaryIO, shapes: Mapping[str, tuple[int, ...]]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape in shapes.items():
        end = position + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 64 + 56)  # the data begins on a 64-byte boundary
    file.write(len(text).to_bytes(8, "little") + text)


def _values(name: str, shape: tuple[int, ...], seed: int) -> Iterator[np.ndarray]:
    """A tensor's values as bf16 in u16, piece by piece: norms near 1, biases near 0, matrices by their inputs."""
    count = math.prod(shape)
    if len(shape) > 1:
        mean, deviation = 0.0, math.prod(shape[1:]) ** -0.5
    else:
        mean, deviation = (1.0, 0.05) if name.endswith("weight") else (0.0, 0.05)
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    for start in range(0, count, _PIECE):
        values = rng.standard_normal(min(_PIECE, count - start), np.float32)
        values *= np.float32(deviation)
        values += np.float32(mean)
        bits = values.view(np.uint32)
        bits += 0x7FFF + (bits >> 16 & 1)  # to nearest, ties to even
        yield (bits >> 16).astype(np.uint16)
