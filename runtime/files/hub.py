"""Models and datasets of the Hugging Face hub by name: from the local cache where they are whole, else downloaded."""

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from ..errors import MigicianError, ModelFileError
from .download import NoDownload, Repository, size_text
from .hub_cache import (
    HubName,
    Snapshot,
    absent_files,
    find_in_cache,
    find_snapshot,
    is_records,
    parse_name,
    records_of,
    state_of,
)

__all__ = ["Dataset", "obtain_dataset", "obtain_model", "peek"]


def obtain_model(name: HubName, judge: Callable[[Path], None]) -> Snapshot:
    """The snapshot of a model: the cache's, without a look at the network, or one that is downloaded to it.

    judge: given the folder once its config.json is there; what it raises, ends a download before its weights.
    Raises ModelFileError, one line, where it cannot be had.
    """
    found = find_snapshot(name)
    lacking = absent_files(found.folder) if found else []
    if found and not lacking:
        return found
    state = state_of(name, found, lacking)
    if found is None and _is_path(name):
        first = name.repo.partition("/")[0]
        raise ModelFileError(f"{state}, nor in {first}/; check the path, or write {name}@main for the hub's")
    try:
        repository = Repository(name)
        repository.fetch_model(judge)
    except NoDownload as error:
        raise ModelFileError(f"{state}; {error}: {name.command}") from None
    return Snapshot(repository.folder, str(name))


def peek(word: str) -> Path | None:
    """A folder with a hub model's config.json at least: the cache's, else one that this small file is fetched to.

    None where there is no such model or it cannot be asked; obtain_model() says why.
    """
    name = parse_name(word)
    if name is None or _is_path(name):
        return find_in_cache(word)
    try:
        found = find_snapshot(name)
        if found and (found.folder / "config.json").exists():
            return found.folder
        repository = Repository(name)
        repository.fetch(["config.json"], story=False)
    except (ModelFileError, NoDownload):
        return None
    return repository.folder


class Dataset:
    """A dataset of the hub at one commit: its records are here, its archives of pictures come as they are asked for.

    folder: its snapshot in the cache.   label: ORG/NAME@COMMIT.
    """

    def __init__(self, name: HubName, folder: Path) -> None:
        self.folder, self.label = folder, f"{name.repo}@{folder.name[:12]}"
        self._name = HubName(name.repo, folder.name, name.kind)  # what is fetched later is of the same commit
        self._repository: Repository | None = None

    @property
    def records(self) -> list[Path]:
        """Its JSON files."""
        return records_of(self.folder)

    def archives(self) -> list[str]:
        """The names of its zip files on the hub, which is asked once. Raises MigicianError."""
        if self._repository is None:
            self._repository = self._ask()
            sizes = self._repository.files
            names = [file for file in sizes if _VOLUME.fullmatch(file)]
            if names and sys.stderr is not None:
                size = size_text(sum(sizes[file] for file in names))
                print(
                    f"{self.label}: {len(names)} archives, {size}; each comes with its first picture", file=sys.stderr
                )
        return sorted(file for file in self._repository.files if file.lower().endswith(".zip"))

    def bring(self, archive: str) -> Path:
        """The path of an archive, after it was fetched with all its volumes. Raises MigicianError."""
        self.archives()
        assert self._repository is not None
        stem = archive[: -len(".zip")]
        parts = [f for f in self._repository.files if f.startswith(f"{stem}.") and _VOLUME.fullmatch(f[len(stem) :])]
        self._repository.fetch([*sorted(set(parts) - {archive}), archive])  # last the one that names the others
        return self.folder / archive

    def _ask(self) -> Repository:
        try:
            return Repository(self._name)
        except NoDownload as error:
            raise MigicianError(
                f"{self.label}: some archive is not in the cache; {error}: {self._name.command}"
            ) from None


_VOLUME = re.compile(r".*\.z(ip|\d\d+)", re.IGNORECASE)


def obtain_dataset(word: str | os.PathLike[str]) -> Dataset | None:
    """The dataset of a hub id whose records are in the cache, or are fetched to it; None for a path.

    Raises MigicianError, one line, where it cannot be had.
    """
    name = None if os.path.lexists(word) else parse_name(os.fspath(word), "dataset")
    if name is None:
        return None
    found = find_snapshot(name)
    if found and not absent_files(found.folder, name.kind):
        return Dataset(name, found.folder)
    if _is_path(name):
        return None
    try:
        repository = Repository(name)
        records = [file for file in repository.files if is_records(file)]
        if not records:
            held = ", ".join(list(repository.files)[:4]) or "nothing"
            raise MigicianError(f"{name}: no .json or .jsonl at its top, but {held}; give a dataset of such records")
        repository.fetch(records)
        repository.settle()
    except NoDownload as error:
        raise MigicianError(f"{state_of(name, found, ['its records'])}; {error}: {name.command}") from None
    return Dataset(name, repository.folder)


def _is_path(name: HubName) -> bool:
    """Whether a name is more likely a slip in a path: such as models/x where there is a folder models."""
    return not name.revision and os.path.isdir(name.repo.partition("/")[0])
