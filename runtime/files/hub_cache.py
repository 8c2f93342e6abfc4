"""Which repositories of the Hugging Face hub are in the local cache, in which revisions, and what they lack.

A name is ORG/NAME, or ORG/NAME@REVISION: a branch, a tag, a commit or its beginning. The cache is huggingface_hub's, at
its place and in its layout:

    models--ORG--NAME/refs/main              the commit that main was when it was last fetched
                      snapshots/COMMIT/FILE  links to ../../blobs/HASH
"""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import ModelFileError
from .tensors import shown

__all__ = [
    "HubName",
    "Snapshot",
    "absent_files",
    "find_in_cache",
    "find_snapshot",
    "hub_cache",
    "is_records",
    "parse_name",
    "records_of",
    "revision_of",
    "shards_of",
    "state_of",
]

_NAME = re.compile(r"([A-Za-z0-9](?:[\w.-]{0,94}\w)?/[A-Za-z0-9](?:[\w.-]{0,94}\w)?)(?:@(.+))?", re.ASCII)
_REVISION = re.compile(r"\w[\w.+-]*(?:/\w[\w.+-]*)*", re.ASCII)
_COMMIT = re.compile(r"[0-9A-Za-z][\w.-]*", re.ASCII)
_FILES = re.compile(
    r".*\.(mig|safetensors|gguf|ggml|bin|pt|pth|ckpt|h5|onnx|engine|jsonl?|ya?ml|zip|tar|t?gz|git|png|jpe?g)", re.I
)
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx", "*.h5")
_INDEX = "model.safetensors.index.json"
_SHOWN = 8  # revisions or files that a message lists
_SHORT = 12  # digits of a commit in a name


@dataclass(frozen=True)
class HubName:
    """A repository of the hub as it was asked for.

    repo: ORG/NAME.   revision: empty where none was named.   kind: "model" or "dataset".
    """

    repo: str
    revision: str = ""
    kind: str = "model"

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision}" if self.revision else self.repo

    @property
    def root(self) -> Path:
        """Its folder in the cache, there or not."""
        return hub_cache() / f"{self.kind}s--{self.repo.replace('/', '--')}"

    @property
    def command(self) -> str:
        """The command that fetches it."""
        kind = "" if self.kind == "model" else f"--repo-type {self.kind} "
        return f"hf download {kind}{self.repo}" + (f" --revision {self.revision}" if self.revision else "")


@dataclass(frozen=True)
class Snapshot:
    """A revision in the cache.   label: what it is called: the name asked for, with the revision where it chose one."""

    folder: Path
    label: str

    @property
    def commit(self) -> str:
        """The whole commit."""
        return self.folder.name


def parse_name(word: str, kind: str = "model") -> HubName | None:
    """Reads ORG/NAME or ORG/NAME@REVISION; None for what is no name of the hub, such as a path or a file's name."""
    found = _NAME.fullmatch(word)
    if not found or ".." in word or "--" in found[1] or _FILES.fullmatch(found[1]):
        return None
    revision = found[2] or ""
    return HubName(found[1], revision, kind) if not revision or _REVISION.fullmatch(revision) else None


def hub_cache() -> Path:
    """The hub's cache folder by the rules of huggingface_hub."""
    env = os.environ
    if place := env.get("HF_HUB_CACHE") or env.get("HUGGINGFACE_HUB_CACHE"):
        return Path(os.path.expandvars(place)).expanduser()
    home = env.get("HF_HOME") or os.path.join(env.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(os.path.expandvars(home)).expanduser() / "hub"


def revision_of(path: str | os.PathLike[str]) -> str | None:
    """The commit of a folder or file in the hub's cache; None for any other path."""
    found = re.search(r"/(?:models|datasets)--[^/]+/snapshots/([^/]+)(?:/|$)", os.fspath(path))
    return found[1] if found else None


# ---- what the cache has
def find_in_cache(word: str) -> Path | None:
    """Returns the folder of a hub model in the cache, by name; None where it is not there whole."""
    name = parse_name(word)
    try:
        found = name and find_snapshot(name)
    except ModelFileError:
        return None
    return found.folder if found and not absent_files(found.folder) else None


def find_snapshot(name: HubName) -> Snapshot | None:
    """Finds a revision in the cache, whole or not; None where there is none of it.

    Without a revision it is main's, or the only one that is there, which the label then names.
    Raises ModelFileError where several could be meant.
    """
    snapshots = _snapshots(name.root)
    commit = _ref(name.root, name.revision or "main")
    if commit is not None:
        folder = name.root / "snapshots" / commit
        return Snapshot(folder, str(name)) if folder in snapshots else None
    if name.revision:
        begun = name.revision.lower() if re.fullmatch(r"[0-9a-f]{4,}", name.revision, re.I) else "?"
        meant = [folder for folder in snapshots if folder.name.startswith(begun)]
        if len(meant) > 1:
            raise ModelFileError(f"{name}: several commits in the cache begin so; name one: {_listed(name, meant)}")
        return Snapshot(meant[0], str(name)) if meant else None
    whole = [folder for folder in snapshots if not absent_files(folder, name.kind)]
    if len(whole or snapshots) > 1:
        raise ModelFileError(
            f"{name}: the cache has several revisions and none of them is main; name one: {_listed(name, snapshots)}"
        )
    only = next(iter(whole or snapshots), None)
    return Snapshot(only, f"{name.repo}@{only.name[:_SHORT]}") if only else None


def _snapshots(root: Path) -> list[Path]:
    try:
        return sorted(path for path in (root / "snapshots").iterdir() if _COMMIT.fullmatch(path.name) and path.is_dir())
    except OSError:
        return []


def _ref(root: Path, revision: str) -> str | None:
    """The commit that a branch or tag stood for when it was fetched; "-", which is none, where that is damaged."""
    try:
        commit = (root / "refs" / revision).read_text("ascii").strip()
    except OSError:
        return None
    except ValueError:
        return "-"
    return commit if _COMMIT.fullmatch(commit) else "-"


def _listed(name: HubName, folders: Sequence[Path]) -> str:
    """Revisions as they may be asked for: by branch or tag where one is known, else by the commit's beginning."""
    known: dict[str | None, str] = {}
    refs = name.root / "refs"
    for path in sorted(refs.rglob("*")) if refs.is_dir() else ():
        revision = path.relative_to(refs).as_posix()
        if path.is_file() and _REVISION.fullmatch(revision):
            known.setdefault(_ref(name.root, revision), revision)
    length = next(n for n in range(_SHORT, 100) if len({f.name[:n] for f in folders}) == len(folders))
    words = [f"{name.repo}@{known.get(folder.name, folder.name[:length])}" for folder in folders]
    return ", ".join(words[:_SHOWN]) + (f" and {len(words) - _SHOWN} more" if len(words) > _SHOWN else "")


def records_of(folder: Path) -> list[Path]:
    """The files of a dataset that hold its records: all JSON at the top but what other tools keep there."""
    found = [*folder.glob("*.json"), *folder.glob("*.jsonl")]
    return sorted(path for path in found if is_records(path.name) and path.is_file())


def is_records(file: str) -> bool:
    """Whether a file at the top of a dataset holds records, by its name."""
    return bool(re.fullmatch(r"(?!\.|dataset_infos?\.json$).*\.jsonl?", file))


def absent_files(folder: Path, kind: str = "model") -> list[str]:
    """Names what a snapshot lacks to be a model: links to nothing, shards that its index lists, a whole part.

    kind: "dataset" asks for records alone: its archives may come later.
    Weights of other kinds than safetensors count as weights: what is wrong with them is said when they are opened.
    """
    if kind == "dataset":
        return [] if records_of(folder) else ["its records"]
    names, broken = set(), []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if os.path.exists(entry.path):
            names.add(entry.name)
        elif re.search(r"\.(json|txt|jinja|safetensors)$", entry.name):
            broken.append(entry.name)
    wanted = [("config.json",), ("preprocessor_config.json", "processor_config.json"), ("tokenizer.json", "vocab.json")]
    lacking = [parts[0] for parts in wanted if not names.intersection(parts)]
    if "model.safetensors" not in names:
        if _INDEX in names:
            lacking += sorted(shards_of(folder / _INDEX) - names)
        elif next(folder.glob("model-*-of-*.safetensors"), None):
            lacking.append(_INDEX)
        elif not any(next(folder.glob(pattern), None) for pattern in _WEIGHTS):
            lacking.append("model.safetensors")
    return list(dict.fromkeys([*broken, *lacking]))


def shards_of(index: Path) -> set[str]:
    """The files that an index of weights names; empty for a damaged one, of which opening it tells."""
    try:
        shards = set(json.loads(index.read_bytes())["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return set()
    return {name for name in shards if isinstance(name, str) and re.fullmatch(r"[\w.-]+\.safetensors", name, re.ASCII)}


def state_of(name: HubName, found: Snapshot | None, lacking: Sequence[str] = ()) -> str:
    """What the cache has of a name, without what to do about it: the beginning of a message."""
    if found is None:
        there = _snapshots(name.root)
        others = f", which has {_listed(name, there)}" if there else ""
        what = "folder" if name.kind == "model" else "file or folder"
        return f"{name}: no such {what}, and not in the Hugging Face cache ({hub_cache()}){others}"
    files = ", ".join(shown(file) for file in lacking[:3]) + (f" and {len(lacking) - 3} more" if lacking[3:] else "")
    cut = " (a download was cut off)" if next(name.root.glob("blobs/*.incomplete"), None) else ""
    return f"{name}: its copy in the cache ({found.folder}) lacks {files}{cut}"
