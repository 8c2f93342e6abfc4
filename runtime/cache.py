"""Pictures, read and encoded once: found again by their content, bounded in bytes, the least recently used go first.

What is kept are a picture's pixels, u8[H, W, 3], and its embeddings, f32[cells, hidden]: 1.2 and 2.4 MB for 640x480 on
the 2B model, 1.2 and 5.6 MB on the 7B. A picture that is found is neither decoded nor resized again. While it stays
here it is the same object for every question, so an engine recognizes it and keeps the KV prefix too.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .image import Picture, PictureSource, content_key, load_picture, picture_name, read_source

if TYPE_CHECKING:
    import numpy as np

    from .backends.base import Encoded
    from .files.config import Preprocessor

__all__ = ["CACHE_BYTES", "Kept", "PictureCache"]

CACHE_BYTES = 256 << 20


@dataclass(eq=False)
class Kept:
    """A picture as it was read, and, once an engine has seen it, encoded."""

    picture: Picture
    vision: Encoded | None = None

    @property
    def bytes(self) -> int:
        """Counts what it holds in memory."""
        return self.picture.rgb.nbytes + (self.vision.bytes if self.vision is not None else 0)


class PictureCache:
    """Pictures by their content, at most limit_bytes of pixels and embeddings; 0 keeps none.

    size_bytes: what is held now. A picture larger than the whole bound is not kept, and evicts nothing.
    """

    def __init__(self, limit_bytes: int = CACHE_BYTES) -> None:
        self.limit_bytes, self.size_bytes = limit_bytes, 0
        self._kept: OrderedDict[bytes, tuple[Kept, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def read(self, source: PictureSource, pre: Preprocessor, max_side: int | None) -> Kept:
        """Reads a picture, or finds it among those that are kept."""
        name = picture_name(source)
        if not self.limit_bytes:
            return Kept(load_picture(source, pre, max_side=max_side, name=name))
        source = read_source(source)
        key = content_key(source, max_side, pre.min_pixels, pre.max_pixels)
        kept = self._find(key)
        if kept is None:
            picture = load_picture(source, pre, max_side=max_side, name=name)
            key = key or content_key(picture.rgb)
            kept = self._find(key) or Kept(replace(picture, key=key))
            self._keep(kept)
        return kept

    def encode(self, pictures: Iterable[Kept], encode: Callable[[np.ndarray], Encoded]) -> int:
        """Encodes those that are not yet; returns how many were."""
        reused = 0
        for kept in pictures:
            if kept.vision is not None:
                reused += 1
                continue
            kept.vision = encode(kept.picture.rgb)
            self._keep(kept)
        return reused

    def _find(self, key: bytes) -> Kept | None:
        found = self._kept.get(key)
        if found is None:
            return None
        self._kept.move_to_end(key)  # just used
        return found[0]

    def _keep(self, kept: Kept) -> None:
        """Keeps a picture, at the cost of those that were not used for longest."""
        size, key = kept.bytes, kept.picture.key
        _, before = self._kept.pop(key, (None, 0))
        self.size_bytes -= before
        if size > self.limit_bytes:
            return
        self.size_bytes += size
        self._kept[key] = kept, size
        while self.size_bytes > self.limit_bytes:
            _, (_, oldest) = self._kept.popitem(last=False)
            self.size_bytes -= oldest

    def clear(self) -> None:
        """Lets go of all pictures."""
        self._kept.clear()
        self.size_bytes = 0
