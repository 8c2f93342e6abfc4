"""The core's C files: includes follow the arrows that internal.h draws, without a circle; packaging takes every one."""

import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

EVERYONES = {"internal", "migi", "migi_measure"}


@pytest.fixture(scope="module")
def csrc(root: Path) -> Path:
    return root / "runtime" / "csrc"


def uses(csrc: Path) -> dict[str, set[str]]:
    """For each part, a header with its file or the folder of kernels, the parts that it includes."""
    found: dict[str, set[str]] = {}
    for path in sorted([*csrc.glob("*.[ch]"), *csrc.glob("kernels/*")]):
        part = "kernels" if path.parent.name == "kernels" else path.stem
        names = re.findall(r'^#include "(?:\.\./)?([\w/]+)\.(?:h|inc)"', path.read_text("utf-8"), re.M)
        own = {"kernels" if "/" in name or path.parent.name == "kernels" else name for name in names}
        found.setdefault(part, set()).update(own - {part})
    return {part: names - EVERYONES for part, names in found.items() if part not in EVERYONES}


def drawn(csrc: Path) -> dict[str, set[str]]:
    """The arrows of internal.h's comment."""
    comment = (csrc / "internal.h").read_text("utf-8").split("*/")[0]
    lines = re.findall(r"^ \*   (\w+)(?: +-> ((?:\w+ ?)+))?(?:  .*|$)", comment, re.M)
    return {part: set(names.split()) for part, names in lines}


def test_no_file_of_the_core_points_back(csrc: Path) -> None:
    assert uses(csrc) == drawn(csrc)
    assert list(TopologicalSorter(uses(csrc)).static_order())  # raises CycleError on a circle


def test_internal_h_uses_nothing_of_the_core(csrc: Path) -> None:
    for name in ("internal.h", "internal.c"):
        names = re.findall(r'^#include "([^"]+)"', (csrc / name).read_text("utf-8"), re.M)
        assert set(names) <= {"migi.h", "internal.h"}


def test_file_names_are_told_apart(csrc: Path) -> None:
    names = [path.name for path in csrc.rglob("*") if path.is_file()]
    assert len(names) == len(set(names))


def test_the_source_distribution_takes_every_file_of_the_core(root: Path, csrc: Path) -> None:
    (line,) = re.findall(r"^recursive-include runtime/csrc (.*)$", (root / "MANIFEST.in").read_text("utf-8"), re.M)
    kinds = {path.suffix for path in csrc.rglob("*") if path.is_file()}
    assert kinds <= {pattern.removeprefix("*") for pattern in line.split()}
