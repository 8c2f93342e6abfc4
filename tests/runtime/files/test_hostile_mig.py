"""Damaged and forged .mig files: each is refused in one line that names it, and none harms the C core.

The second half runs the same files, and files whose weights are nonsense, through a core compiled with sanitizers.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sanitized
from checkpoints import make_checkpoint
from PIL import Image
from quantized import make_quantized

from migician.runtime.errors import MigicianError, ModelFileError, UnsupportedError
from migician.runtime.files.mig import read_mig

# groups of 16, 32, 64 and 128; padding in rows, in columns and between tensors; a layer of each kind
SIZES = {"hidden": 80, "heads": 5, "kv_heads": 1, "inter": 96, "layers": 1, "vocab": 301, "tied": False}
VISION = {"v_dim": 64, "v_heads": 2, "v_depth": 1, "min_pixels": 28 * 28}
KEPT = "visual.merger.mlp.2"
QUESTION = "Where is it?"

INT4 = "model.layers.0.mlp.down_proj.weight"
INT8 = "model.embed_tokens.weight"
TENSORS = {
    "int4": INT4,
    "int4-group": f"{INT4}_group",
    "int4-scale": f"{INT4}_scale",
    "int8": INT8,
    "int8-scale": f"{INT8}_scale",
    "patch": "visual.patch_embed.proj.weight",
    "bf16": f"{KEPT}.weight",
    "bias": "visual.blocks.0.attn.qkv.bias",
    "norm": "model.norm.weight",
}
TEXTS = ("config", "tokenizer", "preprocessor", "generation", "quantization", "calibration", "checksum")

Header = dict[str, Any]
Edit = Callable[[Header], object]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    make_checkpoint(folder / "m", **SIZES, **VISION)
    return make_quantized(folder / "m", folder / "sound.mig", keep=[KEPT], report='{"layers": []}')


def parts(path: Path) -> tuple[Header, bytes]:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def joined(header: Header | str, data: bytes) -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    text += b" " * (-(8 + len(text)) % 64)
    return len(text).to_bytes(8, "little") + text + data


# The corpus: (what is wrong, the bytes of such a file)


def truncated(sound: Path) -> Iterator[tuple[str, bytes]]:
    content = sound.read_bytes()
    start = len(content) - len(parts(sound)[1])
    rng = np.random.default_rng(0)
    edges = [0, 1, 7, 8, 9, 64, start - 64, start - 1, start, start + 1, len(content) - 64, len(content) - 1]
    places = [*edges, *rng.integers(8, start, 14).tolist(), *rng.integers(start, len(content), 24).tolist()]
    assert len(places) == 50
    for keep in places:
        yield f"truncated to {keep}", content[:keep]


def lengths(sound: Path) -> Iterator[tuple[str, bytes]]:
    """Every size class of the word that gives the header's length, and bytes too many."""
    content = sound.read_bytes()
    own = int.from_bytes(content[:8], "little")
    for length in (0, 1, own - 64, own - 1, own + 1, own + 64, len(content), 10**8, 1 << 31, 1 << 63, (1 << 64) - 1):
        yield f"header of {length}", length.to_bytes(8, "little") + content[8:]
    yield "bytes behind the end", content + bytes(64)
    yield "header is an array", joined("[]", b"")
    yield "header twice as deep as any parser", joined("[" * 200_000, b"")
    header, data = parts(sound)
    text = json.dumps(header)
    entry = json.dumps(header[INT4])
    yield "a name twice", joined(text[:-1] + f', "{INT4}": {entry}}}', data)
    yield "no UTF-8", content[:20] + b"\xff\xfe" + content[22:]


def edited(sound: Path, edits: Iterator[tuple[str, Edit]]) -> Iterator[tuple[str, bytes]]:
    text, data = json.dumps(parts(sound)[0]), parts(sound)[1]
    for name, edit in edits:
        header = json.loads(text)
        edit(header)
        yield name, joined(header, data)


def metadata_edits() -> Iterator[tuple[str, Edit]]:
    def put(key: str, value: object) -> Edit:
        return lambda header: header["__metadata__"].update({key: value})

    for key in ("format", "format_version", *TEXTS):
        yield f"no {key}", lambda header, key=key: header["__metadata__"].pop(key)
        words = ["\0\x1b[2J", "{", "null", "7", "x" * 100_000, 1, None, ["none"], {}]
        for number, word in enumerate(words if key == "calibration" else ["", *words]):
            yield f"{key} perturbed {number}", put(key, word)
    yield "no metadata", lambda header: header.pop("__metadata__")
    yield "metadata is an array", lambda header: header.update(__metadata__=[])
    yield "half a surrogate as tokenizer", put("tokenizer", "\ud800")
    yield "another checksum", put("checksum", "sha256:" + "0" * 64)


def config_edits() -> Iterator[tuple[str, Edit]]:
    """A geometry other than that of the tensors."""

    def put(key: str, value: object) -> Edit:
        def edit(header: Header) -> None:
            config = json.loads(header["__metadata__"]["config"])
            table = config if key in config else config["vision_config"]
            table[key] = value
            header["__metadata__"]["config"] = json.dumps(config)

        return edit

    for key, values in {
        "hidden_size": (0, -80, 40, 79, 81, 96, 128, 160, 1 << 31, 1 << 62, 1 << 64, 80.0, "80", None),
        "intermediate_size": (0, 95, 97, 80, 64, 128, 1 << 20, 1 << 40),
        "num_hidden_layers": (0, 2, 1024, 1 << 31),
        "num_attention_heads": (0, 1, 2, 4, 6, 10, 80),
        "num_key_value_heads": (0, 2, 5),
        "vocab_size": (0, 288, 305, 320, 1 << 22, 1 << 32),
        "tie_word_embeddings": (True, 1, "yes"),
        "depth": (0, 2, 1024),
        "embed_dim": (0, 32, 128, 1 << 16),
        "mlp_ratio": (0, 2, 3.99, 1e308),
        "patch_size": (0, 7, 16, 28),
    }.items():
        for value in values:
            yield f"config {key} {value}", put(key, value)


def policy_edits() -> Iterator[tuple[str, Edit]]:
    """Lies of the quantization policy: about a layer's kind, its group, the list of layers."""

    def put(layers: dict[str, object] | None = None, **changes: object) -> Edit:
        def edit(header: Header) -> None:
            policy = json.loads(header["__metadata__"]["quantization"])
            policy = {**policy, **changes}
            policy["layers"] = {**policy["layers"], **(layers or {})}
            header["__metadata__"]["quantization"] = json.dumps(policy)

        return edit

    kinds = {"model.layers.0.mlp.down_proj": "int4", "lm_head": "int8", "model.embed_tokens": "int8", KEPT: "bf16"}
    for layer, own in kinds.items():
        for kind in ("int4", "int8", "bf16", "int2", None, 8):
            if kind != own:
                yield f"policy says {layer} is {kind}", put({layer: kind})
    yield "policy none", lambda header: header["__metadata__"].update(quantization="none")
    yield "policy has a layer too many", put({"model.layers.1.mlp.down_proj": "int4"})
    yield "policy of mode int8", put(mode="int8")
    for group in (0, 8, 15, 16, 256, -16, 1 << 64, 16.0, None):
        yield f"policy in groups of {group}", put(group_size=group)
    yield "policy of another version", put(version=2)


def entry_edits() -> Iterator[tuple[str, Edit]]:
    """Every class of wrong dtype, shape and data_offsets, on a tensor of every kind."""

    def put(name: str, key: str, value: Callable[[Any], object]) -> Edit:
        return lambda header: header[name].update({key: value(header[name][key])})

    dtypes = ("I8", "U8", "BOOL", "F8_E4M3", "F16", "BF16", "I16", "F32", "I32", "F64", "Q4_0", "", None, 8, ["U8"])
    shapes: dict[str, Callable[[Any], object]] = {
        "flat": lambda s: [int(np.prod(s)), 1],
        "one more axis": lambda s: [*s, 1, 1],
        "many axes": lambda s: [*s, *[1] * 20],
        "empty": lambda s: [],
        "zero": lambda s: [0, *s[1:]],
        "negative": lambda s: [-s[0], *s[1:]],
        "one more": lambda s: [*s[:-1], s[-1] + 1],
        "one less": lambda s: [*s[:-1], s[-1] - 1],
        "product 2^64": lambda s: [1 << 32, 1 << 32],
        "product wraps": lambda s: [(1 << 63) - 1, 2, *s],
        "beyond 2^63": lambda s: [1 << 63],
        "beyond 2^200": lambda s: [1 << 200],
        "float": lambda s: [float(s[0]), *s[1:]],
        "string": lambda s: [str(s[0]), *s[1:]],
        "bool": lambda s: [True, *s[1:]],
        "no list": lambda s: s[0],
        "none": lambda s: None,
    }
    offsets: dict[str, Callable[[Any], object]] = {
        "begin later": lambda o: [o[0] + 1, o[1]],
        "end sooner": lambda o: [o[0], o[1] - 1],
        "end later": lambda o: [o[0], o[1] + 1],
        "moved": lambda o: [o[0] + 64, o[1] + 64],
        "moved by one": lambda o: [o[0] + 1, o[1] + 1],
        "swapped": lambda o: o[::-1],
        "negative": lambda o: [o[0] - o[1], 0],
        "beyond the file": lambda o: [o[0] + (1 << 40), o[1] + (1 << 40)],
        "beyond 2^63": lambda o: [o[0] + (1 << 63), o[1] + (1 << 63)],
        "beyond 2^64": lambda o: [o[0] + (1 << 64), o[1] + (1 << 64)],
        "three": lambda o: [*o, o[1]],
        "one": lambda o: o[:1],
        "strings": lambda o: [str(o[0]), str(o[1])],
        "floats": lambda o: [float(o[0]), float(o[1])],
        "none": lambda o: None,
    }
    for kind, name in TENSORS.items():
        for dtype in dtypes:
            yield f"{kind} dtype {dtype}", put(name, "dtype", lambda own, dtype=dtype: "F64" if own == dtype else dtype)
        for what, change in shapes.items():
            yield f"{kind} shape {what}", put(name, "shape", change)
        for what, change in offsets.items():
            yield f"{kind} offsets {what}", put(name, "data_offsets", change)
        for key in ("dtype", "shape", "data_offsets"):
            yield f"{kind} without {key}", lambda header, name=name, key=key: header[name].pop(key)
        yield f"{kind} no object", lambda header, name=name: header.update({name: [1, 2]})


def swap_edits() -> Iterator[tuple[str, Edit]]:
    """Tensors missing, renamed, exchanged, overlapping; companions of the wrong kind."""

    def rename(old: str, new: str) -> Edit:
        return lambda header: header.update({new: header.pop(old)})

    def exchange(a: str, b: str) -> Edit:
        return lambda header: header.update({a: header[b], b: header[a]})

    def share(a: str, b: str) -> Edit:
        return lambda header: header[a].update(data_offsets=header[b]["data_offsets"])

    for kind, name in TENSORS.items():
        yield f"{kind} missing", lambda header, name=name: header.pop(name)
        yield f"{kind} under another name", rename(name, f"{name}x")
        yield f"{kind} under a name that the terminal obeys", rename(name, "\x1b[2J\n")
    yield "weight and group exchanged", exchange(INT4, f"{INT4}_group")
    yield "int4 and int8 exchanged", exchange(INT4, INT8)
    yield "scales exchanged", exchange(f"{INT4}_scale", f"{INT8}_scale")
    gate, up = (f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up"))
    yield "one weight twice, overlapping", share(gate, up)
    yield "scale and norm overlap", share(f"{gate}_scale", f"{up}_scale")
    yield "a weight twice under two layouts", rename(up, gate.replace("model.", "model.language_model.", 1))


def corpus(sound: Path) -> Iterator[tuple[str, bytes]]:
    yield from truncated(sound)
    yield from lengths(sound)
    for edits in (metadata_edits, config_edits, policy_edits, entry_edits, swap_edits):
        yield from edited(sound, edits())


def poisoned(sound: Path) -> Iterator[tuple[str, bytes]]:
    """Files of a sound structure whose weights are nonsense; opening them is right, crashing is not."""
    header, data = parts(sound)
    rng = np.random.default_rng(1)
    fills: dict[str, Callable[[int], bytes]] = {
        "zero": bytes,
        "ones": lambda n: b"\xff" * n,
        "lowest": lambda n: b"\x80" * n,
        "noise": rng.bytes,
        "NaN": lambda n: np.full(-(-n // 4), 0x7FC07FC0, np.uint32).tobytes()[:n],
        "infinity": lambda n: np.full(-(-n // 4), 0x7F800000, np.uint32).tobytes()[:n],
        "huge": lambda n: np.full(-(-n // 4), 0x7F7F7F7F, np.uint32).tobytes()[:n],
        "tiny": lambda n: np.full(-(-n // 4), 0x00010001, np.uint32).tobytes()[:n],
    }
    for kind, name in TENSORS.items():
        begin, end = header[name]["data_offsets"]
        for what, fill in fills.items():
            yield f"{kind} all {what}", joined(header, data[:begin] + fill(end - begin) + data[end:])
    for vocab in (302, 304):  # within the padded rows, so that no shape tells
        config = json.loads(header["__metadata__"]["config"]) | {"vocab_size": vocab}
        metadata = header["__metadata__"] | {"config": json.dumps(config)}
        yield f"vocabulary of {vocab}", joined(header | {"__metadata__": metadata}, data)
    yield "all noise", joined(header, rng.bytes(len(data)))
    yield "all ones", joined(header, b"\xff" * len(data))


# Refused in one line


def fault_of(path: Path, name: str, action: Callable[[], object]) -> str | None:
    """What is wrong with the way a file is refused; None where all is well."""
    try:
        action()
    except (ModelFileError, UnsupportedError) as error:
        message = str(error)
        tidy = message.startswith(str(path)) and message.isprintable() and "; " in message and len(message) < 600
        return None if tidy else f"{name}: {message!r}"
    except Exception as error:
        return f"{name}: {type(error).__name__}: {error}"
    return f"{name}: opens"


@pytest.mark.parametrize("kind", ["truncated", "lengths", "metadata", "config", "policy", "entry", "swap"])
def test_refused_in_one_line(sound: Path, tmp_path: Path, kind: str) -> None:
    from migician.runtime.prompt import Vocabulary

    path = tmp_path / "bad.mig"

    def opens() -> None:
        with read_mig(path, verify=kind == "metadata") as model:
            try:
                Vocabulary(model.tokenizer_json)  # as model.load does, which puts the file's name before it
            except MigicianError as error:
                raise type(error)(f"{path}: {error}") from None

    makers = {"truncated": truncated, "lengths": lengths}
    edits = {"metadata": metadata_edits, "config": config_edits, "policy": policy_edits}
    edits |= {"entry": entry_edits, "swap": swap_edits}
    files = makers[kind](sound) if kind in makers else edited(sound, edits[kind]())
    faults = []
    for name, content in files:
        path.write_bytes(content)
        faults.append(fault_of(path, name, opens))
    assert len(faults) > 10
    assert not any(faults), "\n".join(filter(None, faults))


def test_the_sound_file_opens(sound: Path) -> None:
    with read_mig(sound, verify=True) as model:
        kinds = set(model.quantization.layers.values())
        assert kinds == {"int4", "int8", "bf16"}
        assert set(TENSORS.values()) <= set(model.tensors)
        shapes = {name: tensor.shape for name, tensor in model.tensors.items()}
        groups = {8 * shapes[name][1] // shapes[f"{name}_group"][1] for name in shapes if f"{name}_group" in shapes}
        assert groups == {16, 32, 64, 128}
    header, _ = parts(sound)
    assert any(name.startswith("_pad.") for name in header)


def test_wrong_checksum_and_flipped_bits(sound: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.mig"
    header, data = parts(sound)
    for name in TENSORS.values():
        begin, _ = header[name]["data_offsets"]
        path.write_bytes(joined(header, data[:begin] + bytes([data[begin] ^ 1]) + data[begin + 1 :]))
        assert fault_of(path, name, lambda: read_mig(path)) is None
        read_mig(path, verify=False).close()


def test_a_tokenizer_that_is_none_names_the_file(sound: Path, tmp_path: Path) -> None:
    from migician.runtime.model import load

    path = tmp_path / "bad.mig"
    for content in ("", "{}", "[]", "\ud800", '{"model": {"type": "BPE"}}'):
        header, data = parts(sound)
        header["__metadata__"]["tokenizer"] = content
        path.write_bytes(joined(header, data))
        assert fault_of(path, content, lambda: load(path, threads=1)) is None


# No harm to the core

ASK = """
import sys
from pathlib import Path
from migician.runtime.backends.base import Options
from migician.runtime.errors import MigicianError
from migician.runtime.files.mig import read_mig
from migician.runtime.model import Model

picture, question, *folders = sys.argv[1:]
assert "sanitized" in sys.modules["migician.runtime.model"].__file__
answered = refused = failed = 0
for path in sorted(path for folder in folders for path in Path(folder).iterdir()):
    print(path.name, file=sys.stderr)  # the last line before a report tells which file it was
    try:
        checkpoint = read_mig(path, verify=False)
    except MigicianError as error:
        assert str(error).isprintable()
        refused += 1
        continue
    for precision in ("auto", "fp32"):
        try:
            model = Model(checkpoint, options=Options(threads=2, fp32=precision == "fp32"))
            answer = model.ground([picture], question, max_new_tokens=3)
            answered += 1
        except MigicianError as error:
            assert str(error).isprintable(), str(error)
            failed += 1
        model = None
    checkpoint.close()
print(answered, refused, failed)
"""


@pytest.fixture(scope="module")
def sanitized_core(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    if reason := sanitized.why_not():
        pytest.skip(reason)
    return sanitized.build(root, tmp_path_factory.mktemp("sanitized"))


def ask_all(core: Path, tmp_path: Path, isa: str, **files: Iterator[tuple[str, bytes]]) -> tuple[int, int, int]:
    """Asks every file one question in a sanitized process; returns how many answered, were refused, failed."""
    picture = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(3).integers(0, 256, (28, 28, 3), np.uint8)).save(picture)
    for folder, cases in files.items():
        (tmp_path / folder).mkdir()
        for number, (name, content) in enumerate(cases):
            safe = "".join(c if c.isalnum() else "-" for c in name)[:80]
            (tmp_path / folder / f"{number:03d}-{safe}.mig").write_bytes(content)
    words = [sys.executable, "-c", ASK, picture, QUESTION, *(tmp_path / folder for folder in files)]
    env = {**sanitized.environment(core), "MIGICIAN_ISA": isa}
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, env=env, cwd=tmp_path, check=False)
    assert done.returncode == 0, "\n".join(done.stderr.splitlines()[-60:])
    answered, refused, failed = map(int, done.stdout.split())
    return answered, refused, failed


@pytest.mark.slow
@pytest.mark.xdist_group("sanitized")  # one build for all of them
def test_the_sanitizers_are_awake(sanitized_core: Path) -> None:
    """Without this a core built wrongly would pass all that follows: it must catch a picture longer than its buffer."""
    code = """
from migician.runtime._migi import ffi, lib
c, err = ffi.new("migi_config *"), ffi.new("migi_error *")
c.patch, c.merge, c.temporal, c.channels, c.std = 14, 2, 2, 3, [1, 1, 1]
rgb, out = ffi.new("uint8_t[]", 8), ffi.new("float[]", 8)
lib.migi_patchify(c, rgb, 28, 28, out, err)
"""
    env = sanitized.environment(sanitized_core)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert done.returncode != 0 and "AddressSanitizer" in done.stderr


@pytest.mark.slow
@pytest.mark.xdist_group("sanitized")  # one build for all of them
def test_damaged_files_do_no_harm(sanitized_core: Path, sound: Path, tmp_path: Path) -> None:
    good = iter([("sound", sound.read_bytes())])
    answered, refused, failed = ask_all(sanitized_core, tmp_path, "", sound=good, damaged=corpus(sound))
    # those that open lie about their checksum, which is not looked at here, or about their tokenizer
    assert answered >= 2 and refused > 600 and failed > 0, (answered, refused, failed)


@pytest.mark.slow
@pytest.mark.xdist_group("sanitized")  # one build for all of them
@pytest.mark.parametrize("isa", ["", "scalar"])
def test_nonsense_weights_do_no_harm(sanitized_core: Path, sound: Path, tmp_path: Path, isa: str) -> None:
    answered, refused, failed = ask_all(sanitized_core, tmp_path, isa, poisoned=poisoned(sound))
    assert refused == 0 and answered > 20 and failed > 20, (answered, refused, failed)
