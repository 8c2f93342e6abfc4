"""What is built and installed: the wheel's contents, metadata, and no trace of the build's own files."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import migician

pytestmark = pytest.mark.slow

FOLDERS = ("runtime", "calib", "export", "bench", "train")


@pytest.fixture(scope="module")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel of a copy of the tree, with an empty C core: what goes in is the question, not how it compiles."""
    pytest.importorskip("setuptools", minversion="77")
    copy = tmp_path_factory.mktemp("tree") / "copy"
    copy.mkdir()
    for name in ("pyproject.toml", "setup.py", "__init__.py", "py.typed", "README.md", "LICENSE"):
        shutil.copyfile(root / name, copy / name)
    for folder in (*FOLDERS, "tests"):
        if (root / folder).is_dir():
            skip = shutil.ignore_patterns("__pycache__", "*.so", "*.c")
            shutil.copytree(root / folder, copy / folder, ignore=skip)
    builder = copy / "runtime" / "build_migi.py"
    builder.write_text(
        "from cffi import FFI\nffibuilder = FFI()\nffibuilder.cdef('int f(void);')\n"
        "ffibuilder.set_source('migician.runtime._migi', 'static int f(void) { return 0; }', py_limited_api=True)\n"
    )
    code = "from setuptools import build_meta; print(build_meta.build_wheel('out'))"
    (copy / "out").mkdir()
    done = subprocess.run([sys.executable, "-c", code], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return zipfile.ZipFile(copy / "out" / done.stdout.split()[-1])


def test_the_wheel_serves_every_python_from_3_10(wheel: zipfile.ZipFile) -> None:
    assert re.search(r"migician-[\d.]+-cp310-abi3-linux_\w+\.whl$", str(wheel.filename))
    assert any(name.endswith("runtime/_migi.abi3.so") for name in wheel.namelist())


def test_the_wheel_holds_the_package_and_nothing_of_the_build(wheel: zipfile.ZipFile, root: Path) -> None:
    names = [name for name in wheel.namelist() if ".dist-info/" not in name]
    assert {name.split("/")[0] for name in names} == {"migician"}
    inside = {name.removeprefix("migician/") for name in names}
    assert {"__init__.py", "py.typed", "runtime/run.py", "runtime/model.py"} <= inside
    assert not [name for name in inside if name in ("setup.py", "runtime/build_migi.py") or name.startswith("tests")]
    assert not [name for name in inside if name.endswith((".c", ".h", ".inc"))]
    modules = {
        str(path.relative_to(root))
        for folder in FOLDERS
        for path in (root / folder).rglob("*.py")
        if path.with_name("__init__.py").exists() and path.name != "build_migi.py"
    }
    assert modules <= inside, f"not in the wheel: {sorted(modules - inside)}"


def test_the_wheel_holds_the_embedded_model(wheel: zipfile.ZipFile, root: Path) -> None:
    if not (root / "runtime" / "nano.mig").exists():
        pytest.skip("this checkout has no runtime/nano.mig")
    inside = {name.removeprefix("migician/") for name in wheel.namelist()}
    assert {"runtime/nano.mig", "runtime/NANO.md", "runtime/examples/examples.json"} <= inside


def test_the_metadata_asks_for_nothing_big(wheel: zipfile.ZipFile) -> None:
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    text = wheel.read(name).decode()
    assert f"\nVersion: {migician.__version__}\n" in text
    needs = [line for line in re.findall(r"^Requires-Dist: (.*)$", text, re.M) if "extra ==" not in line]
    packages = {re.match(r"[\w-]+", need).group() for need in needs}  # type: ignore[union-attr]
    assert packages == {"numpy", "pillow", "tokenizers", "safetensors", "click", "cffi"}
