"""Weights as trainers leave them: heads of tied models, half precision. The right values are those of transformers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from checkpoints import LAYOUTS, make_checkpoint

from migician.runtime.errors import MigicianError, ModelFileError, UnsupportedError
from migician.runtime.files.describe import describe, describe_line, describe_text
from migician.runtime.files.mig import read_mig, write_mig
from migician.runtime.files.open import open_checkpoint
from migician.runtime.files.tensors import Tensor
from migician.runtime.model import load
from migician.runtime.prompt import Vocabulary, build_prompt

torch = pytest.importorskip("torch", reason="transformers is the reference; install the [test] extra")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

QUESTION, ANSWER = "the image on the right", "(1,2) and then <|box_start|>(3,4)<|box_end|>"


def rewrite(folder: Path, edit: Callable[[dict], None]) -> None:
    """Changes the tensors of a single-file folder in place."""
    weights = safetensors.load_file(folder / "model.safetensors")
    edit(weights)
    safetensors.save_file(
        {k: w.contiguous() for k, w in weights.items()}, folder / "model.safetensors", {"format": "pt"}
    )


def embedding_of(weights: dict) -> str:
    return next(name for name in weights if name.endswith("embed_tokens.weight"))


def reference(folder: Path) -> np.ndarray:
    """transformers' log-probabilities of the answer's tokens, in f32."""
    model = transformers.Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    with open_checkpoint(folder) as opened:
        vocabulary = Vocabulary(opened.tokenizer_json)
    prompt, answer = build_prompt(vocabulary, QUESTION, []), vocabulary.encode(ANSWER)
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(answer)[:, None])[:, 0].numpy()


def ours(source: Path) -> np.ndarray:
    with load(source, precision="fp32", threads=1) as model:
        return model.logprobs([], QUESTION, ANSWER)


def assert_as_transformers(folder: Path, mig: Path) -> None:
    """The folder, and the .mig file made of it, give transformers' log-probabilities."""
    wanted = reference(folder)
    np.testing.assert_allclose(ours(folder), wanted, rtol=2e-4, atol=2e-4)
    with open_checkpoint(folder) as opened:
        write_mig(mig, opened)
    np.testing.assert_array_equal(ours(mig), ours(folder))


# An output head beside the embedding of a tied model


def tie(folder: Path, root: bool | None, text: bool | None) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.pop("tie_word_embeddings", None)
    if root is not None:
        config["tie_word_embeddings"] = root
    if text is not None:
        config["text_config"]["tie_word_embeddings"] = text
    (folder / "config.json").write_text(json.dumps(config))


def own_head(weights: dict) -> None:
    embedding = weights[embedding_of(weights)]
    head = embedding.clone()
    head[-1, -1] += 1  # the last value of the last row: nothing less than a whole comparison finds it
    head[:250] *= 0.5
    weights["lm_head.weight"] = head


@pytest.mark.parametrize(
    ("layout", "root", "text"),
    [("published", True, None), ("nested", None, True), ("nested", False, True), ("v5", True, False)],
)
def test_a_stored_head_goes_before_the_tie(tmp_path: Path, layout: str, root: bool | None, text: bool | None) -> None:
    folder = make_checkpoint(tmp_path / "model", layout=layout)
    tied = ours(folder)
    tie(folder, root, text)
    rewrite(folder, own_head)
    with open_checkpoint(folder) as model:
        assert not model.config.text.tied and "lm_head.weight" in model.tensors
        assert len(model.notes) == 1 and "lm_head.weight" in model.notes[0] and model.notes[0].isprintable()
    assert np.abs(ours(folder) - tied).max() > 0.1
    assert_as_transformers(folder, tmp_path / "x.mig")
    with read_mig(tmp_path / "x.mig") as model:
        assert not model.config.text.tied and model.notes == ()
        config = json.loads(model.raw["config"])
        assert not any(table.get("tie_word_embeddings") for table in (config, config.get("text_config", {})))


def test_one_value_at_the_end_is_a_difference(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", vocab=70_000)  # over one piece of the comparison

    def edit(weights: dict) -> None:
        weights["lm_head.weight"] = weights[embedding_of(weights)].clone()
        weights["lm_head.weight"][-1, -1] += 1

    rewrite(folder, edit)
    with open_checkpoint(folder) as model:
        assert not model.config.text.tied


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_equal_head_stays_tied(tmp_path: Path, layout: str, dtype: str) -> None:
    folder = make_checkpoint(tmp_path / "model", layout=layout)
    before = ours(folder)

    def edit(weights: dict) -> None:
        weights["lm_head.weight"] = weights[embedding_of(weights)].to(getattr(torch, dtype), copy=True)

    rewrite(folder, edit)
    with open_checkpoint(folder) as model:
        assert model.config.text.tied and "lm_head.weight" not in model.tensors and model.notes == ()
    np.testing.assert_array_equal(ours(folder), before)


def test_a_head_without_embedding_is_both(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model")
    before = ours(folder)
    rewrite(folder, lambda weights: weights.update({"lm_head.weight": weights.pop(embedding_of(weights))}))
    np.testing.assert_array_equal(ours(folder), before)
    assert_as_transformers(folder, tmp_path / "x.mig")
    tie(folder, False, None)
    with pytest.raises(ModelFileError, match=r"embed_tokens.*missing"):
        open_checkpoint(folder)


def test_a_head_of_another_shape(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model")
    rewrite(folder, lambda weights: weights.update({"lm_head.weight": weights[embedding_of(weights)][:-8].clone()}))
    with pytest.raises(ModelFileError, match=r"lm_head\.weight has shape \[312, 128\]"):
        open_checkpoint(folder)


# Half precision


def as_dtype(dtype: str, only: str = "") -> Callable[[dict], None]:
    def edit(weights: dict) -> None:
        for name, tensor in weights.items():
            if only in name:
                weights[name] = tensor.to(getattr(torch, dtype))

    return edit


@pytest.mark.parametrize("source", ["bfloat16", "float32"])
@pytest.mark.parametrize("only", ["", "self_attn", "norm", "embed_tokens", "visual"])
def test_fp16_whole_and_mixed(tmp_path: Path, source: str, only: str) -> None:
    folder = make_checkpoint(tmp_path / "model", dtype=source, tied=False)
    rewrite(folder, as_dtype("float16", only))
    assert_as_transformers(folder, tmp_path / "x.mig")
    halves = [t for t in safetensors.load_file(folder / "model.safetensors").values() if t.dtype == torch.float16]
    with open_checkpoint(folder) as model, read_mig(tmp_path / "x.mig") as made:
        assert len(model.notes) == 1 and "F16" in model.notes[0] and made.notes == ()
        assert sum(tensor.dtype == "F16" for tensor in model.tensors.values()) == len(halves)
        assert describe(model)["dtypes"]["F16"] == len(halves)
        assert "f16" in describe_line(describe(model)) and "f16" in describe_text(describe(model))
        for name, tensor in made.tensors.items():  # exactly the same values, as bf16 wherever that is possible
            np.testing.assert_array_equal(tensor.to_f32(), model.tensors[name].to_f32())
            if model.tensors[name].dtype == "F16":
                assert tensor.dtype == ("BF16" if source == "bfloat16" else "F32")
            else:
                assert tensor.dtype == model.tensors[name].dtype


def test_fp64(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", dtype="float32")
    rewrite(folder, as_dtype("float64", "mlp"))
    assert_as_transformers(folder, tmp_path / "x.mig")


def test_every_half_is_exact() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    bits = bits[(bits & 0x7C00) != 0x7C00]
    half = Tensor("x", "F16", (len(bits),), bits.view(np.uint8))
    np.testing.assert_array_equal(half.to_f32(), torch.from_numpy(bits.view(np.float16)).float().numpy())
    assert half.served().dtype == "F32"
    np.testing.assert_array_equal(half.served().to_f32(), half.to_f32())
    few = bits[(bits & 7) == 0]  # the fraction's last three bits are those that bf16 lacks
    exact = Tensor("x", "F16", (len(few),), few.view(np.uint8)).served()
    assert exact.dtype == "BF16"
    np.testing.assert_array_equal(exact.to_f32(), few.view(np.float16).astype(np.float32))


def test_a_mig_file_holds_no_halves(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model")
    with open_checkpoint(folder) as model:
        write_mig(tmp_path / "x.mig", model)
    content = (tmp_path / "x.mig").read_bytes()
    at = content.index(b'"model.norm.weight":{"dtype":"BF16"')
    (tmp_path / "x.mig").write_bytes(
        content[:at] + content[at : at + 50].replace(b'"BF16"', b' "F16"') + content[at + 50 :]
    )
    with pytest.raises(UnsupportedError, match="F16"):
        read_mig(tmp_path / "x.mig")


@pytest.mark.parametrize("mode", ["bf16", "int8", "int4"])
def test_what_is_exported_of_halves_and_heads(tmp_path: Path, mode: str) -> None:
    """An export of an fp16 folder is that of the same values as f32, and keeps the head."""
    from migician.export.exporter import Options, export

    half = make_checkpoint(tmp_path / "half", dtype="float32")
    rewrite(half, own_head)
    rewrite(half, as_dtype("float16"))
    wide = shutil.copytree(half, tmp_path / "wide")
    rewrite(wide, as_dtype("float32"))
    lines: list[str] = []
    for folder in (half, wide):
        out = tmp_path / f"{folder.name}.mig"
        export(Options(str(folder), mode, out, calib="none", rotate=mode == "int8"), say=lines.append)
    assert [line.split(": ")[1].split()[0] for line in lines] == ["lm_head.weight", "F16", "lm_head.weight"]
    with read_mig(tmp_path / "half.mig") as one, read_mig(tmp_path / "wide.mig") as other:
        assert "lm_head.weight" in one.tensors and not one.config.text.tied
        for name, tensor in one.tensors.items():
            assert tensor.equals(other.tensors[name]), name
    with load(tmp_path / "half.mig", threads=1) as model:
        assert model.ground([], QUESTION, max_new_tokens=3).text is not None


def test_other_types_are_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model")
    for dtype in ("float8_e4m3fn", "int8"):
        rewrite(folder, as_dtype(dtype, "mlp.up_proj"))
        with pytest.raises(MigicianError, match="BF16, F16, F32, F64 are served"):
            open_checkpoint(folder)
