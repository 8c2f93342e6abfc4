"""Finds the pictures of a published dataset in its zip files, without unpacking them.

Records name pictures by paths such as ./MGrounding-630k/Common_Object/x.jpg; Common_Object.zip holds them below
whatever folder its author had them in. So the archive is the one that a part of the path is the name of, and the member
the one whose path ends alike. An archive that a dataset of the hub still has to bring is fetched when its first picture
is looked for: one task's after the other, and none of a task that nobody asks for.
"""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ..runtime.errors import ImageError
from ..runtime.files.archive import open_archive
from ..runtime.files.hub import Dataset

__all__ = ["Pictures", "word_of"]


def word_of(name: str) -> str:
    """Brings the name of a task, folder or archive to one form: "Object-Tracking" becomes object_tracking."""
    return re.sub(r"[\W_]+", "_", name.casefold()).strip("_")


class Pictures:
    """The zip files of some folders, and those of a dataset of the hub.

    A picture that is found has a path that archive.py reads: "FOLDER/Common_Object.zip/home/me/Common_Object/x.jpg".
    """

    def __init__(self, folders: Iterable[str | os.PathLike[str]], dataset: Dataset | None = None) -> None:
        self._here: dict[str, Path] = {}
        for folder in folders:
            for path in sorted(Path(folder).glob("*.[zZ][iI][pP]")):
                if path.is_file():
                    self._here.setdefault(word_of(path.stem), path)
        self._dataset = dataset
        self._brought: set[Path] = set()
        self._ways: dict[Path, tuple[int, int]] = {}  # how the last picture of an archive was found

    def find(self, name: str) -> str | None:
        """The path of a picture that a record names; None for one that no archive has.

        Raises MigicianError where an archive cannot be fetched or read.
        """
        parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
        if not parts or ".." in parts:
            return None
        for archive, own in self._candidates(parts):
            try:
                found = self._inside(archive, parts, own)
            except (ImageError, OSError) as error:
                # one that another tool left in part
                if self._dataset is None or archive in self._brought or archive.parent != self._dataset.folder:
                    raise ImageError(f"{archive}: {error}") from None
                found = self._inside(self._bring(archive.name), parts, own)
            if found:
                return found
        return None

    def _bring(self, archive: str) -> Path:
        assert self._dataset is not None
        path = self._dataset.bring(archive)
        self._brought.add(path)
        return path

    def _candidates(self, parts: Sequence[str]) -> Iterator[tuple[Path, int]]:
        """Archives to look into, the likeliest first, each with how many of the path's parts it may stand for."""
        words = [word_of(part) for part in parts[:-1]]
        likely = {word: at + 1 for at, word in enumerate(words) if word}
        for word in [word for word in likely if word in self._here]:
            yield self._here[word], likely[word]
        if self._dataset and not likely.keys() & self._here.keys():
            absent = {word_of(file[:-4]): file for file in self._dataset.archives()}
            absent = {word: file for word, file in absent.items() if word not in self._here}
            # where no name says which, each may be it
            for word in [word for word in likely if word in absent] or sorted(absent):
                self._here[word] = self._bring(absent[word])
                yield self._here[word], likely.get(word, 1)
        yield from ((path, 1) for word, path in self._here.items() if word not in likely)

    def _inside(self, path: Path, parts: Sequence[str], own: int) -> str | None:
        """The member whose path ends as the record's, from any part of its beginning on."""
        archive = open_archive(path)
        # a part of the archive's folder, then the record's path without what the archive itself may stand for
        ways = [(kept, cut) for cut in range(min(own + 1, len(parts))) for kept in range(len(archive.prefix), -1, -1)]
        if (last := self._ways.get(path)) in ways:
            ways.insert(0, last)
        for kept, cut in ways:
            name = "/".join((*archive.prefix[:kept], *parts[cut:]))
            if archive.find(name):
                self._ways[path] = kept, cut
                return f"{path}/{name}"
        return None
