"""Builds a second migician package whose C core is compiled with AddressSanitizer and UndefinedBehaviorSanitizer.

It lies in a folder of its own beside links to the real Python files, so nothing of the product knows about it.
"""

import importlib.util
import os
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_FLAGS = (
    "-O1", "-g1", "-fPIC", "-fno-omit-frame-pointer",
    "-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=undefined,float-cast-overflow",
)  # fmt: skip


def why_not() -> str | None:
    """Says what is missing here for a sanitized build; None where nothing is."""
    if shutil.which("gcc") is None:
        return "no gcc"
    return None if os.path.isabs(libasan()) else "gcc has no libasan here"


def libasan() -> str:
    """The library that a process must load first; gcc answers with the bare name where it has none."""
    asked = subprocess.run(["gcc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    return asked.stdout.strip()


def build(root: Path, folder: Path) -> Path:
    """Builds the package of the repository `root` under `folder`; returns what PYTHONPATH must name."""
    package = folder / "migician" / "runtime"
    package.mkdir(parents=True)
    (folder / "migician" / "__init__.py").symlink_to(root / "__init__.py")
    for path in (root / "runtime").iterdir():
        if path.suffix == ".py" or (path / "__init__.py").exists():
            (package / path.name).symlink_to(path)
    wrapper, builder = folder / "_migi.c", _builder(root)
    builder.ffibuilder.emit_c_code(str(wrapper))
    flags = [*builder.flags(), *_FLAGS]
    include = [f"-I{root / 'runtime' / 'csrc'}", f"-I{sysconfig.get_paths()['include']}"]

    def compiled(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        _run(["gcc", *flags, *include, "-c", str(source), "-o", str(target)])
        return target

    sources = [wrapper, *sorted((root / "runtime" / "csrc").rglob("*.c"))]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, sources))
    _run(["gcc", *flags, "-shared", *map(str, objects), "-lm", "-o", str(package / "_migi.abi3.so")])
    return folder


def _builder(root: Path):
    spec = importlib.util.spec_from_file_location("build_migi", root / "runtime" / "build_migi.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"


def environment(package: Path) -> dict[str, str]:
    """The environment in which Python imports the sanitized package."""
    return {
        **os.environ,
        "PYTHONPATH": str(package),
        "LD_PRELOAD": libasan(),
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
