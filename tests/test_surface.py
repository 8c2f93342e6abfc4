"""The public surface: names, errors, signatures, command lines, exported symbols."""

import inspect
import re
import shutil
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from click.testing import CliRunner

import migician
from migician.runtime import errors
from migician.runtime.run import command


def test_all_is_sorted_and_every_name_is_there() -> None:
    assert migician.__all__ == sorted(migician.__all__)
    for name in migician.__all__:
        assert getattr(migician, name) is not None
    assert set(migician.__all__) <= set(dir(migician))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'grund'"):
        migician.grund  # noqa: B018


def test_there_is_one_exception_tree() -> None:
    for name in errors.__all__:
        kind = getattr(errors, name)
        assert issubclass(kind, errors.MigicianError)
        assert getattr(migician, name) is kind


@pytest.mark.parametrize(
    ("function", "positional", "keywords"),
    [
        ("load", ["source"], {"threads", "precision", "backend", "min_pixels", "max_pixels"}),
        ("Model.ground", ["self", "images", "prompt"], {"max_new_tokens", "max_side", "repetition_penalty"}),
        ("Model.stream", ["self", "images", "prompt"], {"max_new_tokens", "max_side", "repetition_penalty"}),
        ("Model.chat", ["self", "images"], {"max_side"}),
        ("Model.logprobs", ["self", "images", "prompt", "answer_text"], set()),
        ("Chat.ask", ["self", "prompt"], {"max_new_tokens", "repetition_penalty"}),
    ],
)
def test_signatures_keep_what_they_promise(function: str, positional: list[str], keywords: set[str]) -> None:
    target = migician
    for part in function.split("."):
        target = getattr(target, part)
    parameters = inspect.signature(target).parameters.values()  # type: ignore[arg-type]
    assert [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY] == positional
    assert {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} >= keywords


def test_migician_run_has_every_option_of_its_contract() -> None:
    text = CliRunner().invoke(command, ["--help"]).output
    wanted = """--model --backend --json --draw --max-new-tokens --min-pixels --max-pixels --max-side --threads
        --repetition-penalty --precision --logprobs --stats --stream --kernels"""
    assert set(wanted.split()) <= set(re.findall(r"--[a-z-]+", text))


def test_migician_export_has_every_option_of_its_contract() -> None:
    from migician.export.cli import command as export

    text = CliRunner().invoke(export, ["--help"]).output
    wanted = """--int4 --int8 --bf16 --out --calib --samples --seed --format --resume --report --max-iou-drop
        --describe"""
    assert set(wanted.split()) <= set(re.findall(r"--[a-z0-9-]+", text))


@pytest.mark.parametrize("name", [f"migician-{word}" for word in ("bench", "calib", "export", "run", "train")])
def test_every_command_explains_itself(name: str) -> None:
    found = [entry for entry in entry_points(group="console_scripts") if entry.name == name]
    if not found:
        pytest.skip("migician is not installed here: python -m pip install -e .")
    module, function = found[0].value.split(":")
    code = f"import sys; sys.argv = [{name!r}, '--help']; from {module} import {function}; {function}()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(("Usage:", "usage:"))


HEADERS = ("migi.h", "migi_measure.h")


def declared_calls(root: Path, name: str) -> set[str]:
    """The functions that a public header of the core declares."""
    header = (root / "runtime" / "csrc" / name).read_text("utf-8")
    header = re.sub(r"/\*.*?\*/", "", header, flags=re.S)
    return set(re.findall(r"MIGI_API [^;(]*?\b(migi_\w+)\(", header))


def test_the_core_exports_what_its_headers_declare(root: Path) -> None:
    from migician.runtime import _migi

    answering, measuring = (declared_calls(root, name) for name in HEADERS)
    assert answering and measuring and not answering & measuring
    declared = answering | measuring
    assert {name for name in dir(_migi.lib) if name.startswith("migi_")} == declared | {"migi_poll_signals"}
    if shutil.which("nm") is None:
        pytest.skip("no nm to list the symbols with: install binutils")
    words = ["nm", "-D", "--defined-only", "--format=posix", _migi.__file__]
    symbols = {line.split()[0] for line in subprocess.check_output(words, text=True).splitlines()}
    assert {name for name in symbols if "migi" in name} == declared | {"PyInit__migi"}


def test_the_core_has_the_version_of_the_package(root: Path) -> None:
    from migician.runtime._migi import ffi, lib

    header = (root / "runtime" / "csrc" / "migi.h").read_text("utf-8")
    assert f'#define MIGI_VERSION "{migician.__version__}"' in header
    assert ffi.string(lib.migi_version()).decode() == migician.__version__
