"""What the house promises of itself: sizes of files, and that ARCHITECTURE.md has a line for each."""

import re
import subprocess
from pathlib import Path

import pytest

MOST_LINES = 700


def tracked(root: Path) -> list[Path]:
    if not (root / ".git").exists():
        pytest.skip("not a git checkout: which files belong to it is not known")
    listed = subprocess.run(["git", "-C", root, "ls-files"], capture_output=True, text=True, check=True).stdout
    return [Path(line) for line in listed.splitlines() if (root / line).exists()]


def test_no_source_file_is_longer_than_a_reader_can_hold(root: Path) -> None:
    sources = [path for path in tracked(root) if path.suffix in (".py", ".c", ".h", ".inc")]
    assert len(sources) > 150
    lengths = {str(path): len((root / path).read_text("utf-8").splitlines()) for path in sources}
    assert not {path: lines for path, lines in lengths.items() if lines > MOST_LINES}


def test_every_file_of_the_packages_has_its_line(root: Path) -> None:
    """Lines look like "- `files/mig.py`: what it is for", under a heading that names the folder."""
    text = (root / "ARCHITECTURE.md").read_text("utf-8")
    listed = set()
    for part in re.split(r"^### ", text, flags=re.M)[1:]:
        folder = re.match(r"`([\w/]+)/`", part)
        assert folder, part[:60]
        listed |= {f"{folder[1]}/{name}" for name in re.findall(r"^- `([\w/.]+)`: \S", part, re.M)}
    there = {
        str(path)
        for path in tracked(root)
        if path.parts[0] in ("runtime", "calib", "export", "bench", "train")
        and path.suffix in (".py", ".c", ".h", ".inc")
        and path.name != "__init__.py"
    }
    assert listed == there, f"not listed: {sorted(there - listed)}; not there: {sorted(listed - there)}"


def test_links_between_the_documents_lead_somewhere(root: Path) -> None:
    documents = [path for path in tracked(root) if path.suffix == ".md" and "results" not in path.parts]
    for path in documents:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", (root / path).read_text("utf-8")):
            if "://" not in target:
                assert (root / path.parent / target).exists(), f"{path}: {target}"
