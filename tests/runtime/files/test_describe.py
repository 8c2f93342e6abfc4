"""What is said of a model file is what lies in it, and a report that lies breaks nothing."""

import json

import pytest
from checkpoints import make_checkpoint
from quantized import make_quantized

from migician.runtime.errors import MigicianError
from migician.runtime.files.config import tensor_shapes
from migician.runtime.files.describe import PARTS, describe, describe_line, describe_text
from migician.runtime.files.open import open_checkpoint

KEPT = ["visual.blocks.0.attn.qkv", "visual.blocks.0.attn.proj", "visual.blocks.1.mlp.fc1", "visual.merger.mlp.2"]


def layer(name, output, weight=0.05, kind="int4"):
    return {"name": name, "kind": kind, "shape": [4, 4], "output_error": output, "weight_error": weight}


def mean(iou, acc50):
    return {"mean": {"iou": iou, "acc50": acc50}, "tasks": {}}


REPORT = {
    "layers": [layer(f"model.layers.{i}.mlp.up_proj", (i * 7 % 10) / 100) for i in range(10)],
    "accuracy": {"per_task": 40, "before": mean(0.75, 0.875), "after": mean(0.74, 0.862)},
    "calibration": {"source": "drawn scenes", "samples": 128, "sha256": "ab" * 32},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("model") / "small", tied=False)


def described(path):
    with open_checkpoint(path) as model:
        return describe(model)


def one_of(folder, tmp_path, mode="int4", **options):
    return described(make_quantized(folder, tmp_path / "m.mig", mode, **options))


def test_folder(folder):
    found = described(folder)
    assert (found["name"], found["format"], found["bits_per_weight"]) == ("small", "folder", 16.0)
    assert found["bytes"] == (folder / "model.safetensors").stat().st_size == sum(found["parts"].values())
    assert found["quantization"] is found["calibration"] is found["report"] is None
    assert describe_line(found).startswith("model small: bf16, 16.0 bits per weight, 1.")
    assert "none, weights are bf16" in describe_text(found)


def test_sizes_are_those_of_the_file(folder, tmp_path):
    path = make_quantized(folder, tmp_path / "m.mig")
    found = described(path)
    with open_checkpoint(path) as model:
        assert found["weights"] == sum(t.to_f32().size for t in open_checkpoint(folder).tensors.values())
        assert set(found["parts"]) == set(PARTS)
        assert found["bytes"] == path.stat().st_size == sum(found["parts"].values())
        stored = {name: tensor.nbytes for name, tensor in model.tensors.items()}
        for part, prefix in {"vision": "visual", "embedding": "model.embed", "head": "lm_head"}.items():
            assert found["parts"][part] == sum(size for name, size in stored.items() if name.startswith(prefix))
        assert found["parts"]["other"] == found["bytes"] - sum(stored.values())
        assert found["bits_per_weight"] == pytest.approx(8 * sum(stored.values()) / found["weights"], abs=1e-3)
        assert len(tensor_shapes(model.config)) < len(stored)


def test_the_policy_is_summed_up(folder, tmp_path):
    found = one_of(folder, tmp_path, keep=KEPT, rotated=True, calibration="ab" * 32)
    policy = found["quantization"]
    assert policy["layers"] == {"int4": 2 * 4 + 2 + 2 * 7 - 4, "int8": 3, "bf16": 4}
    assert policy["kept"] == KEPT and policy["rotated"] and policy["groups"] == [64, 128]
    assert found["calibration"] == "ab" * 32
    line = describe_line(found)
    assert line.startswith("model m: int4 groups of 64 to 128 + int8 + bf16, rotated, ") and "\n" not in line
    text = describe_text(found)
    assert "fc1 and 1 more" in text and "sha256 abababababababab..." in text
    assert 10 <= text.count("\n") <= 25


def test_one_group_size_is_named_alone(folder, tmp_path):
    assert "int4 groups of 32 + int8, " in describe_line(one_of(folder, tmp_path, group=32))
    eight = one_of(folder, tmp_path, "int8")
    assert describe_line(eight).startswith("model m: int8, 8.")
    assert eight["quantization"]["groups"] == []


def test_the_report_is_told_by_its_headline(folder, tmp_path):
    found = one_of(folder, tmp_path, report=json.dumps(REPORT), calibration="ab" * 32)
    assert [entry["error"] for entry in found["report"]["worst"]] == [0.09, 0.08, 0.07, 0.06, 0.05]
    assert found["report"]["accuracy"]["after"] == {"iou": 0.74, "acc50": 0.862}
    text = describe_text(found)
    for words in ("0.750 before, 0.740 after", "40 per task", "128 samples of drawn scenes", "relative output error"):
        assert words in text
    assert "0.0900  int4  model.layers.7.mlp.up_proj" in text


def test_without_calibration_the_weights_speak(folder, tmp_path):
    layers = [layer("a", None, 0.1), layer("b", None, 0.2)]
    found = one_of(folder, tmp_path, report=json.dumps({**REPORT, "layers": layers, "accuracy": None}))
    assert [entry["name"] for entry in found["report"]["worst"]] == ["b", "a"]
    assert "relative weight error" in describe_text(found)
    mixed = [layer("a", 0.01, 0.1), layer("b", None, 0.2)]
    found = one_of(folder, tmp_path, report=json.dumps({"layers": mixed}))
    assert [entry["name"] for entry in found["report"]["worst"]] == ["a"]


STRANGE = [
    "", "{", "[]", "null", "7", '"report"', "[" * 100_000, '{"layers": 1e400}', f'{{"layers": {"9" * 5000}}}',
    '{"layers": [null, 3, "x", [], {}, {"name": "a"}, {"name": 3, "output_error": 1}]}',
    '{"layers": [{"name": "a", "output_error": NaN}, {"name": "a", "output_error": true}]}',
    '{"layers": [{"name": "a", "output_error": Infinity, "weight_error": -Infinity}]}',
    f'{{"layers": [{{"name": "a", "output_error": {"9" * 4000}}}]}}',
    '{"accuracy": {"before": 1, "after": {"mean": []}}, "calibration": "x"}',
    '{"accuracy": {"before": {"mean": {"iou": 1, "acc50": "x"}}}, "calibration": {"samples": -1}}',
]  # fmt: skip


@pytest.mark.parametrize("report", STRANGE, ids=range(len(STRANGE)))
def test_a_strange_report_is_left_out(folder, tmp_path, report):
    found = one_of(folder, tmp_path, report=report)
    assert found["report"] is None
    assert "report         none" in describe_text(found)


def test_no_word_of_a_file_reaches_the_terminal_raw(folder, tmp_path):
    evil = "\x1b[2J\r\n" + "x" * 500
    report = {"layers": [layer(evil, 0.1, kind=evil)], "calibration": {"samples": 3, "source": evil}}
    text = describe_text(one_of(folder, tmp_path, report=json.dumps(report), calibration="cd" * 32))
    assert all(line.isprintable() and len(line) < 300 for line in text.splitlines())
    assert "3 samples" in text


def test_everything_said_is_json(folder, tmp_path):
    found = one_of(folder, tmp_path, report=json.dumps(REPORT), keep=KEPT)
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_a_loaded_model_describes_itself(folder):
    from migician.runtime.model import load

    with load(folder, threads=1) as model:
        assert model.describe() == described(folder)
    with pytest.raises(MigicianError, match="closed"):
        model.describe()
