"""The table of formats: what the command offers, where each goes, what is refused before any work."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from checkpoints import make_checkpoint
from click.testing import CliRunner
from quantized import make_quantized

pytest.importorskip("torch")

from migician.export import exporter, pipeline
from migician.export.cli import command
from migician.export.exporter import Options, export
from migician.export.formats import table
from migician.export.formats.table import DEFAULT, FORMATS, Format, WriteOptions, choose
from migician.runtime.errors import MigicianError, ModelFileError, UnsupportedError
from migician.runtime.files.open import open_checkpoint

SMALL = {"hidden": 64, "layers": 2, "heads": 4, "kv_heads": 2, "inter": 96, "v_dim": 32, "v_depth": 2, "v_heads": 2}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("small") / "model", **SMALL)


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is refused is refused before the first unit, and before a sample is drawn."""

    def worked(*_: object) -> None:
        pytest.fail("work was begun")

    monkeypatch.setattr(pipeline.Job, "run", worked)
    monkeypatch.setattr(exporter, "nano_calibration", worked)


def options(model: Any, out: Path, **changes: Any) -> Options:
    usual = {"model": str(model), "mode": "int4", "out": out, "calib": "none", "held_out": 0, "threads": 2}
    return Options(**usual | changes)


def test_every_row_has_its_module_and_every_module_its_row(root: Path) -> None:
    helpers = {"__init__", "table", "hf_folder"}
    modules = {path.stem for path in (root / "export" / "formats").glob("*.py")} - helpers
    assert modules == {row.name.replace("-", "_") for row in FORMATS}
    for row in FORMATS:
        module = row._module()
        assert callable(module.check) and callable(module.write)
        assert row.modes and set(row.modes) <= set(table.MODES)
    assert len({row.suffix for row in FORMATS}) == len({row.name for row in FORMATS}) == len(FORMATS)


def test_help_offers_what_there_is_and_nothing_else() -> None:
    text = CliRunner().invoke(command, ["--help"]).output
    assert f"--format [{'|'.join(row.name for row in FORMATS)}]" in text and f"[{DEFAULT}]" in text
    assert "onnx" not in text and "tensorrt" not in text
    done = CliRunner().invoke(command, ["--int4", "-o", "x", "--format", "onnx"])
    assert done.exit_code == 2 and "'mig', 'gptq'" in done.output


def test_names_are_chosen_in_the_tables_order_and_by_their_modes() -> None:
    assert [row.name for row in choose(["gptq", "mig"], "int8")] == ["mig", "gptq"]
    with pytest.raises(UnsupportedError, match="format onnx is not part of this version; choose mig or gptq"):
        choose(["mig", "onnx"], "int4")
    with pytest.raises(UnsupportedError, match="gptq does not hold bf16; give --int4 or --int8"):
        choose(["gptq"], "bf16")


def test_where_each_goes() -> None:
    rows = {row.name: row for row in FORMATS}
    for row in FORMATS:
        assert row.target(Path("a/m.mig"), several=False) == Path("a/m.mig")
    for out in ("a/m.mig", "a/m"):
        assert rows["mig"].target(Path(out), several=True) == Path(out)
        assert rows["gptq"].target(Path(out), several=True) == Path("a/m-gptq")


def test_several_formats_are_told_in_the_tables_order(small: Path, tmp_path: Path) -> None:
    page = tmp_path / "m.html"
    written = export(options(small, tmp_path / "m.mig", mode="int8", formats=("gptq", "mig"), report=page))
    assert written == [tmp_path / "m.mig", tmp_path / "m-gptq", page]
    assert sorted(tmp_path.iterdir()) == sorted(written)
    alone = tmp_path / "alone"
    assert export(options(small, alone, mode="int8", formats=("gptq",))) == [alone]
    for file in alone.iterdir():
        assert file.read_bytes() == (tmp_path / "m-gptq" / file.name).read_bytes()


@pytest.mark.parametrize("mode", ["int4", "bf16"])
def test_a_file_does_not_go_where_a_folder_is(small: Path, tmp_path: Path, no_work: None, mode: str) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(ModelFileError, match="a folder, mig is a file"):
        export(options(small, tmp_path / "out", mode=mode))
    assert list((tmp_path / "out").iterdir()) == [] and list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_what_a_format_cannot_hold_is_refused_before_any_work(small: Path, tmp_path: Path, no_work: None) -> None:
    with pytest.raises(UnsupportedError, match="does not hold bf16"):
        export(options(small, tmp_path / "a", mode="bf16", formats=("gptq",)))
    keep = ("model.layers.1.mlp.up_proj",)
    with pytest.raises(UnsupportedError, match=r"up_proj is bf16 \(1 of 14 layers\)"):
        export(options(small, tmp_path / "a", formats=("mig", "gptq"), keep=keep, calib="nano"))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").touch()
    with pytest.raises(ModelFileError, match="not empty"):
        export(options(small, tmp_path / "taken", formats=("gptq",), calib="nano"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taken"]


@pytest.fixture
def another(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """A format as anybody would add one: a module and a row."""
    told: list[Any] = []

    class Module(ModuleType):
        @staticmethod
        def check(config: Any, policy: Any, where: str) -> None:
            told.append(("check", policy and policy.mode, where))

        @staticmethod
        def write(source: Any, target: Path, options: WriteOptions) -> None:
            assert source.quantization is None or options.finished is not None
            target.write_text(json.dumps(sorted(source.tensors)))
            told.append(("write", target.name))

    row = Format("list-of-names", table.MODES, folder=False, suffix=".names.json", extra="export")
    monkeypatch.setattr(table, "FORMATS", (*FORMATS, row))
    monkeypatch.setitem(sys.modules, "migician.export.formats.list_of_names", Module("list_of_names"))
    yield told


def test_a_row_and_a_module_are_all_that_a_format_takes(small: Path, tmp_path: Path, another: list[Any]) -> None:
    formats = ("list-of-names", "mig")
    assert export(options(small, tmp_path / "m.mig", formats=formats)) == [
        tmp_path / "m.mig", tmp_path / "m.names.json",
    ]  # fmt: skip
    assert another == [("check", "int4", "model"), ("write", "m.names.json")]
    with open_checkpoint(tmp_path / "m.mig") as made:
        assert json.loads((tmp_path / "m.names.json").read_text()) == sorted(made.tensors)
    another.clear()
    export(options(small, tmp_path / "plain.mig", mode="bf16", formats=formats))
    assert another == [("check", None, "model"), ("write", "plain.names.json")]


def test_a_missing_package_is_named_with_its_extra() -> None:
    row = Format("not-there", table.MODES, folder=False, suffix="", extra="onnx")
    with pytest.raises(UnsupportedError, match=r"not-there cannot be written .*: pip install 'migician\[onnx\]'"):
        row.check(None, None, "m")  # type: ignore[arg-type]


def test_a_mig_file_is_written_anew_or_moved(small: Path, tmp_path: Path) -> None:
    made = make_quantized(small, tmp_path / "made.mig", "int8")
    row = FORMATS[0]
    with open_checkpoint(made) as source:
        row.write(source, tmp_path / "copy.mig", WriteOptions())
        assert (tmp_path / "copy.mig").read_bytes() == made.read_bytes()
        row.write(source, tmp_path / "moved.mig", WriteOptions(finished=made))
        assert not made.exists() and (tmp_path / "moved.mig").read_bytes() == (tmp_path / "copy.mig").read_bytes()
        with pytest.raises(MigicianError, match="cannot be written"):
            row.write(source, tmp_path / "no" / "such.mig", WriteOptions(finished=tmp_path / "moved.mig"))
    assert (tmp_path / "moved.mig").exists()
