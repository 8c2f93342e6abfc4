"""migician-bench make-model: real geometries, the same weights for the same seed, complete or not at all."""

import json
import math
import shutil
from pathlib import Path

import pytest
from checkpoints import make_tokenizer
from click.testing import CliRunner

import migician
from migician.bench.cli import command
from migician.bench.latency import random_model
from migician.bench.latency.random_model import SPECIAL, byte_tokenizer, write_random_model
from migician.runtime.errors import MigicianError
from migician.runtime.files.config import parse_config, tensor_shapes
from migician.runtime.files.open import open_checkpoint
from migician.runtime.prompt import Vocabulary, build_prompt


@pytest.fixture(scope="module")
def nano_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "nano"
    done = CliRunner().invoke(command, ["make-model", "--shape", "nano", "-o", str(folder)], catch_exceptions=False)
    assert done.exit_code == 0 and str(folder) in done.stdout and "100 %" in done.stderr
    return folder


@pytest.mark.parametrize(("shape", "parameters"), [("2b", 2_208_985_600), ("7b", 8_291_375_616)])
def test_the_geometries_have_the_published_parameters(shape: str, parameters: int) -> None:
    texts = random_model._texts(shape, None)
    config = parse_config(json.loads(texts["config.json"]), json.loads(texts["generation_config.json"]), where="x")
    assert sum(math.prod(s) for s in tensor_shapes(config).values()) == parameters
    assert config.image_token == 151655 and config.eos_tokens == (151645, 151643)


def test_the_embedded_models_twin_answers(nano_folder: Path, picture: Path) -> None:
    with open_checkpoint(nano_folder) as made, open_checkpoint("nano") as nano:
        assert made.config == nano.config and made.preprocessor == nano.preprocessor
        assert made.unused == ()
    with migician.load(nano_folder, threads=1) as model:
        answer = model.ground([picture], "the cup", max_new_tokens=3)
    assert math.isfinite(answer.tokens[0].logprob) if answer.tokens else answer.finish == "stop"


def test_a_seed_decides_the_weights(nano_folder: Path, tmp_path: Path) -> None:
    first = (nano_folder / "model.safetensors").read_bytes()
    write_random_model(tmp_path / "again", "nano")
    write_random_model(tmp_path / "other", "nano", seed=1)
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == first
    other = (tmp_path / "other" / "model.safetensors").read_bytes()
    assert other != first and len(other) == len(first)


def test_large_models_are_cut_into_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nano_folder: Path) -> None:
    monkeypatch.setattr(random_model, "_SHARD_BYTES", 3_000_000)
    write_random_model(tmp_path / "m", "nano")
    shards = sorted((tmp_path / "m").glob("*.safetensors"))
    assert len(shards) > 3 and max(s.stat().st_size for s in shards) < 3_100_000
    with open_checkpoint(tmp_path / "m") as cut, open_checkpoint(nano_folder) as whole:
        assert all((cut.tensors[name].data == tensor.data).all() for name, tensor in whole.tensors.items())


def test_the_byte_tokenizer_knows_every_text_and_the_published_ids() -> None:
    vocabulary = Vocabulary(json.dumps(byte_tokenizer(1000)))
    text = "Where is the 猫 in picture 2?\n<|box_start|>"
    assert vocabulary.decode(vocabulary.encode_user(text)) == text
    assert [vocabulary.id(word) for word in SPECIAL] == list(range(1000, 1000 + len(SPECIAL)))
    assert len(vocabulary.encode("a cup")) == 5  # bytes: the words between are nobody's
    assert vocabulary.decode([999]) == " w999"
    assert build_prompt(vocabulary, "a cup", [2]).count(vocabulary.id("<|image_pad|>")) == 2


def test_another_tokenizer_brings_its_own_ids(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "tokenizer.json").write_text(json.dumps(make_tokenizer(320)))
    write_random_model(tmp_path / "m", "nano", tokenizer=tmp_path / "t")
    with open_checkpoint(tmp_path / "m") as made:
        assert made.config.image_token == Vocabulary(made.tokenizer_json).id("<|image_pad|>") != 0
    (tmp_path / "t" / "tokenizer.json").write_text(json.dumps(byte_tokenizer(400)))
    with pytest.raises(MigicianError, match="its ids go to 413, the model has 320"):
        write_random_model(tmp_path / "big", "nano", tokenizer=tmp_path / "t")
    with pytest.raises(MigicianError, match="cannot be read"):
        write_random_model(tmp_path / "big", "nano", tokenizer=tmp_path / "nowhere")


def test_nothing_is_left_of_a_model_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(random_model, "_write_weights", full)
    with pytest.raises(MigicianError, match="No space left"):
        write_random_model(tmp_path / "m", "nano")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(MigicianError, match="are wanted and not free"):
        write_random_model(tmp_path / "m", "nano")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    done = CliRunner().invoke(command, ["make-model", "--shape", "nano", "-o", str(tmp_path / "m")])
    assert isinstance(done.exception, MigicianError) and "is there already" in str(done.exception)
    assert list((tmp_path / "m").iterdir()) == []
