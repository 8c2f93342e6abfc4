"""Builds the package: the repository root is `migician`, cffi compiles the C core. The rest is in pyproject.toml."""

import re
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
TOPS = ("runtime", "calib", "export", "bench", "train")
BUILD_ONLY = {("migician", "setup"), ("migician.runtime", "build_migi")}


class BuildPackage(build_py):
    """Leaves out the modules that only a build needs."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        modules = super().find_package_modules(package, package_dir)
        return [module for module in modules if (module[0], module[1]) not in BUILD_ONLY]


def version() -> str:
    """Reads __version__ without importing the package."""
    found = re.search(r'^__version__ = "([^"]+)"', (ROOT / "__init__.py").read_text("utf-8"), re.M)
    if found is None:
        raise SystemExit("setup.py: __init__.py has no __version__ line; restore it")
    return found.group(1)


def folders() -> list[str]:
    """Every folder with an __init__.py below the top ones is a package."""
    files = sorted(file for top in TOPS for file in (ROOT / top).rglob("__init__.py"))
    return [".".join(("migician", *file.parent.relative_to(ROOT).parts)) for file in files]


setup(
    version=version(),
    package_dir={"migician": "."},
    packages=["migician", *folders()],
    package_data={
        "migician": ["py.typed"],
        "migician.runtime": ["nano.mig", "*.md", "examples/*"],
        "migician.train.nano": ["*.yaml"],
    },
    cffi_modules=["runtime/build_migi.py:ffibuilder"],
    cmdclass={"build_py": BuildPackage},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
