"""Imports go the way that ARCHITECTURE.md draws, never in a circle; the runtime sees no other folder and no torch."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

FOLDERS = ("runtime", "calib", "export", "bench", "train")
RUNTIME_MAY_INSTALL = {"numpy", "PIL", "tokenizers", "safetensors", "click", "cffi"}
OF_AN_EXTRA = {  # imported where they are needed, if they are installed
    "runtime/backends/torch.py": {"torch", "transformers"},
    "runtime/files/download.py": {"huggingface_hub"},
    "runtime/image.py": {"pillow_heif"},
}


def drawn(root: Path) -> dict[str, set[str]]:
    """The arrows of ARCHITECTURE.md: "a -> b c" lets a import b and c."""
    text = (root / "ARCHITECTURE.md").read_text("utf-8")
    block = text.partition("## Which way imports go")[2].partition("```\n")[2].partition("```")[0]
    lines = (line.partition("->") for line in block.splitlines() if "->" in line)
    return {name.strip(): set(targets.split()) for name, _, targets in lines}


def room_of(parts: Sequence[str]) -> str:
    """Where a file or a dotted name belongs: a folder, and in the runtime a folder of it or one of its own modules."""
    if not parts or parts[0] not in FOLDERS:
        return "migician"
    return "/".join(parts[:2]).removesuffix(".py") if parts[0] == "runtime" else parts[0]


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
    folders = [path for folder in FOLDERS for path in (root / folder).rglob("*.py")]
    return sorted([*folders, root / "__init__.py"])


def module_of(path: Path, root: Path) -> str:
    return ".".join(("migician", *path.relative_to(root).with_suffix("").parts)).removesuffix(".__init__")


def edges(root: Path) -> dict[str, set[str]]:
    """Which module of this package imports which, in functions and for types too."""
    modules = {module_of(path, root): path for path in sources(root)}
    found: dict[str, set[str]] = {}
    for name, path in modules.items():
        targets = {t if t in modules else t.rpartition(".")[0] for t in imports(path, root)}
        found[name] = {t for t in targets if t in modules and t != name}
    return found


def test_imports_go_the_way_that_is_drawn_and_every_arrow_is_used(root: Path) -> None:
    found: dict[str, set[str]] = {}
    for name, targets in edges(root).items():
        room = room_of(name.split(".")[1:])
        found.setdefault(room, set()).update({room_of(t.split(".")[1:]) for t in targets} - {room})
    for rooms in found.values():  # all that another folder, or the root, may ask of the runtime is: the runtime
        rooms.discard("migician")
    wanted = drawn(root)
    shown = {room: {t.partition("/")[0] if not room.startswith("runtime") else t for t in rooms} - {room}
             for room, rooms in found.items() if room not in ("runtime", "runtime/__init__")}  # fmt: skip
    assert shown == wanted, "\n".join(
        f"{room}: drawn {sorted(wanted.get(room, set()))}, found {sorted(shown.get(room, set()))}"
        for room in sorted(shown.keys() | wanted.keys())
        if shown.get(room) != wanted.get(room)
    )


def test_no_circle(root: Path) -> None:
    left = {name: targets - {"migician"} for name, targets in edges(root).items()}  # the root's names come lazily
    while free := [name for name, targets in left.items() if not targets & left.keys()]:
        for name in free:
            del left[name]
    assert not left, f"these import each other: {sorted(left)}"


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
        extra = OF_AN_EXTRA.get(path.relative_to(root).as_posix(), set())
        wrong += [f"{path.name}: {name}" for name in imports(path, root) if name.split(".")[0] not in allowed | extra]
    assert not wrong, "\n".join(wrong)


def test_each_backend_names_its_extra(root: Path) -> None:
    from migician.runtime.backends import BACKENDS

    extras = re.findall(r"^(\w+) = \[", (root / "pyproject.toml").read_text("utf-8").partition("optional-dep")[2], re.M)
    assert set(BACKENDS) == {path.stem for path in (root / "runtime" / "backends").glob("*.py")} - {"__init__", "base"}
    assert {extra for extra in BACKENDS.values() if extra} <= set(extras)


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("migician", ("numpy", "PIL", "click", "migician.runtime")),
        ("migician.runtime.run", ("numpy", "PIL", "tokenizers", "migician.runtime.model")),
        ("migician.runtime.model", ("torch", "transformers", "rich", "huggingface_hub")),
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
