"""The .mig file: a whole model in one safetensors file that opens by mmap alone.

    u64 H | JSON header, padded with spaces | tensors, in the order of computation, each on a 64-byte boundary

`__metadata__` (strings, as safetensors wants them):

| key            | value                                                                |
|----------------|----------------------------------------------------------------------|
| format         | "migician"                                                           |
| format_version | "1"                                                                  |
| config         | the checkpoint's config.json                                         |
| tokenizer      | its tokenizer.json                                                   |
| preprocessor   | its preprocessor_config.json                                         |
| generation     | its generation_config.json, "{}" if it has none                      |
| quantization   | "none", or the policy in JSON: quantization.py                       |
| calibration    | sha256 of the calibration manifest, empty if nothing was calibrated  |
| checksum       | "sha256:" + hex digest of the data section, everything behind the header |
| chat_template  | its chat template; absent where that is Qwen2-VL's own               |

Other keys are words about the model; `report`, JSON, is what the exporter measured (describe.py reads it).
safetensors allows no hole between tensors, so where one ends off the boundary a U8 tensor `_pad.N` fills the gap.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from ..errors import ModelFileError, UnsupportedError
from .checkpoint import Checkpoint, assemble
from .tensors import DTYPE_BYTES, Tensor, TensorFile, iter_chunks, shown
from .write import whole_file

__all__ = ["ALIGN_BYTES", "FORMAT_VERSION", "checksum", "read_mig", "write_mig"]

ALIGN_BYTES = 64
FORMAT_VERSION = "1"

_VERIFY_BYTES = 64 << 20  # up to here the checksum costs under 0.1 s and is always checked
_PAD = "_pad."
_TEXTS = ("config", "tokenizer", "preprocessor", "generation", "quantization", "calibration")
_TEMPLATE = "chat_template"
_NEEDED = frozenset(("format", "format_version", "checksum", *_TEXTS))
_OWN = _NEEDED | {_TEMPLATE}


def write_mig(path: str | os.PathLike[str], checkpoint: Checkpoint, *, extra: Mapping[str, str] | None = None) -> None:
    """Writes a checkpoint as one .mig file; the same checkpoint gives the same bytes.

    extra: further `__metadata__` strings (a model card's figures, say); the keys of the format itself are refused.
    The file appears under its name complete or not at all. Weights stream through in 8 MB pieces from wherever their
    tensors are mapped (checkpoint.derive puts together an exporter's own); F16 and F64 become BF16 where that holds
    every value of a tensor, else F32.
    Raises ModelFileError when the place cannot be written or a weight is not finite, ValueError for a bad `extra`.
    """
    metadata = _metadata(checkpoint, extra or {})
    dtypes = {name: tensor.served_dtype() for name, tensor in checkpoint.tensors.items()}
    plan, entries = _plan(checkpoint.tensors, dtypes)
    with whole_file(path) as file:
        # the digest is known only at the end, and is as long as this placeholder
        file.write(_header(metadata, entries, "0" * 64))
        digest = hashlib.sha256()
        for piece in _pieces(checkpoint, dtypes, plan):
            digest.update(piece)
            file.write(piece)
        file.seek(0)
        file.write(_header(metadata, entries, digest.hexdigest()))


def _metadata(checkpoint: Checkpoint, extra: Mapping[str, str]) -> dict[str, str]:
    if clash := sorted(_OWN & extra.keys()):
        raise ValueError(f"extra must not set {', '.join(clash)}")
    raw = {"quantization": "none", "calibration": "", **checkpoint.raw, "tokenizer": checkpoint.tokenizer_json}
    kept = {**checkpoint.metadata, **extra}
    own = {"format": "migician", "format_version": FORMAT_VERSION, **{key: raw[key] for key in _TEXTS}}
    own |= {_TEMPLATE: raw[_TEMPLATE]} if _TEMPLATE in raw else {}
    return {**own, **{key: kept[key] for key in sorted(kept)}}


def _plan(tensors: Mapping[str, Tensor], dtypes: Mapping[str, str]) -> tuple[list[tuple[str, int]], dict[str, dict]]:
    """Places the tensors: [(name, zero bytes to follow)] and the header's entries, padding included."""
    plan, entries, position = [], {}, 0
    for number, (name, tensor) in enumerate(tensors.items()):
        end = position + math.prod(tensor.shape) * DTYPE_BYTES[dtypes[name]]
        entries[name] = {"dtype": dtypes[name], "shape": list(tensor.shape), "data_offsets": [position, end]}
        gap = -end % ALIGN_BYTES
        if gap:
            entries[f"{_PAD}{number}"] = {"dtype": "U8", "shape": [gap], "data_offsets": [end, end + gap]}
        plan.append((name, gap))
        position = end + gap
    return plan, entries


def _header(metadata: Mapping[str, str], entries: Mapping[str, dict], digest: str) -> bytes:
    whole = {"__metadata__": {**metadata, "checksum": f"sha256:{digest}"}, **entries}
    text = json.dumps(whole, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-(8 + len(text)) % ALIGN_BYTES)
    return len(text).to_bytes(8, "little") + text


def _pieces(
    checkpoint: Checkpoint, dtypes: Mapping[str, str], plan: list[tuple[str, int]]
) -> Iterator[memoryview | bytes]:
    for name, gap in plan:
        checkpoint.tensors[name].check_finite(checkpoint.where)
        yield from checkpoint.tensors[name].served_pieces(dtypes[name])
        if gap:
            yield bytes(gap)


def checksum(file: TensorFile) -> str:
    """Computes "sha256:..." over the data section of an open file."""
    digest = hashlib.sha256()
    with file.data() as data:
        for piece in iter_chunks(data):
            digest.update(piece)
    return f"sha256:{digest.hexdigest()}"


def read_mig(path: str | os.PathLike[str], *, verify: bool | None = None) -> Checkpoint:
    """Opens a .mig file.

    verify: True compares the checksum, False does not, None does for files of at most 64 MB.
    Raises ModelFileError for a damaged file, UnsupportedError for a newer format version.
    """
    path = Path(path)
    file = TensorFile(path)
    try:
        metadata = _check_format(file)
        if verify is None:
            verify = path.stat().st_size <= _VERIFY_BYTES
        if verify and checksum(file) != metadata["checksum"]:
            raise ModelFileError(f"{path}: the checksum does not match, the file is damaged; copy or export it again")
        found = {name: tensor for name, tensor in file.tensors.items() if not name.startswith(_PAD)}
        raw = {key: metadata[key] for key in (*_TEXTS, _TEMPLATE) if key in metadata and key != "tokenizer"}
        rest = {key: value for key, value in metadata.items() if key not in _OWN}
        return assemble(path.stem, raw, metadata["tokenizer"], found, files=(file,), metadata=rest, where=path)
    except BaseException:
        file.close()
        raise


def _check_format(file: TensorFile) -> dict[str, str]:
    metadata, path = file.metadata, file.path
    if metadata.get("format") != "migician":
        raise ModelFileError(f"{path}: plain safetensors, not a .mig file; give the checkpoint folder that holds it")
    version = metadata.get("format_version")
    if version != FORMAT_VERSION:
        raise UnsupportedError(
            f"{path}: format version {shown(version)}, this release reads {FORMAT_VERSION}; upgrade or export it again"
        )
    if missing := sorted(_NEEDED - metadata.keys()):
        raise ModelFileError(f"{path}: the header lacks {', '.join(missing)}; export it again")
    if not re.fullmatch("([0-9a-f]{64})?", metadata["calibration"]):
        raise ModelFileError(
            f"{path}: calibration is {shown(metadata['calibration'])}, expected a sha256 or nothing; export it again"
        )
    for name, tensor in file.tensors.items():
        if not name.startswith(_PAD) and tensor.data.ctypes.data % ALIGN_BYTES:
            raise ModelFileError(
                f"{path}: tensor {shown(name)} is not on a {ALIGN_BYTES}-byte boundary; export it again"
            )
    return metadata
