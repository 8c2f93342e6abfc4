"""Imports between folders go one way; the runtime sees none of the others and never torch."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ALLOWED = {
    "runtime": set(),
    "calib": {"runtime"},
    "export": {"runtime", "calib"},
    "bench": {"runtime", "calib"},
    "train": {"runtime", "calib"},
    "": {"runtime"},
}
RUNTIME_MAY_INSTALL = {"numpy", "PIL", "tokenizers", "safetensors", "click", "cffi"}


def folder_of(path: Path, root: Path) -> str:
    parts = path.relative_to(root).parts
    return parts[0] if len(parts) > 1 else ""


def imports(path: Path, root: Path) -> Iterator[str]:
    """Absolute dotted names of what a file imports, inside functions too."""
    package = ["migician", *path.relative_to(root).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            names = [*base, *([node.module] if node.module else [])]
            yield from (".".join([*names, alias.name]) for alias in node.names)


def sources(root: Path) -> list[Path]:
    folders = [path for folder in ALLOWED if folder for path in (root / folder).rglob("*.py")]
    return sorted([*folders, root / "__init__.py"])


def test_no_import_goes_against_the_arrows(root: Path) -> None:
    wrong = []
    for path in sources(root):
        home = folder_of(path, root)
        for name in imports(path, root):
            parts = name.split(".")
            target = parts[1] if parts[0] == "migician" and len(parts) > 1 else None
            if target in ALLOWED and target != home and target not in ALLOWED[home]:
                wrong.append(f"{path.relative_to(root)} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_imports_between_folders_are_relative(root: Path) -> None:
    wrong = []
    for path in sources(root):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            wrong += [f"{path.relative_to(root)}: {n}" for n in names if n.split(".")[0] == "migician"]
    assert not wrong, "\n".join(wrong)


def test_the_runtime_needs_only_its_dependencies(root: Path) -> None:
    allowed = RUNTIME_MAY_INSTALL | {"migician"} | set(sys.stdlib_module_names)
    wrong = []
    for path in sorted((root / "runtime").rglob("*.py")):
        wrong += [f"{path.name}: {name}" for name in imports(path, root) if name.split(".")[0] not in allowed]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("migician", ("numpy", "PIL", "click", "migician.runtime")),
        ("migician.runtime.run", ("numpy", "PIL", "tokenizers", "migician.runtime.model")),
        ("migician.runtime.model", ("torch", "transformers", "rich")),
    ],
)
def test_importing_costs_no_more_than_it_must(module: str, heavy: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_checker_resolves_names(tmp_path: Path) -> None:
    file = tmp_path / "runtime" / "x.py"
    file.parent.mkdir()
    file.write_text("from ..export.pack import a\nfrom .. import train\nfrom . import boxes\nimport torch.nn\n")
    expected = {"migician.export.pack.a", "migician.train", "migician.runtime.boxes", "torch.nn"}
    assert set(imports(file, tmp_path)) == expected
