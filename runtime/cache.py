"""Encoded pictures kept between questions: found by their content, bounded in bytes, the least recently used go first.

What is kept are a picture's pixels, u8[H, W, 3], and its embeddings, f32[cells, hidden]: 1.2 and 2.4 MB for 640x480 on
the 2B model, 1.2 and 5.6 MB on the 7B. A picture that is found is neither decoded nor resized again. While it stays
here it is the same object for every question, so a session recognizes it and keeps the KV prefix too.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .engine import Vision
    from .image import Picture

__all__ = ["CACHE_BYTES", "Kept", "PictureCache"]

CACHE_BYTES = 256 << 20


@dataclass(frozen=True)
class Kept:
    """A picture as it was read, and encoded."""

    picture: Picture
    vision: Vision

    @property
    def bytes(self) -> int:
        """Counts what it holds in memory."""
        return self.picture.rgb.nbytes + self.vision.bytes


class PictureCache:
    """Pictures by key, at most limit_bytes of pixels and embeddings; 0 keeps none.

    size_bytes: what is held now. A picture larger than the whole bound is not kept, and evicts nothing.
    """

    def __init__(self, limit_bytes: int = CACHE_BYTES) -> None:
        self.limit_bytes, self.size_bytes = limit_bytes, 0
        self._kept: OrderedDict[bytes, Kept] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: bytes) -> Kept | None:
        """Finds a picture and counts it as just used."""
        kept = self._kept.get(key)
        if kept is not None:
            self._kept.move_to_end(key)
        return kept

    def put(self, key: bytes, kept: Kept) -> None:
        """Keeps a picture, at the cost of those that were not used for longest."""
        if kept.bytes > self.limit_bytes:
            return
        before = self._kept.pop(key, None)
        self.size_bytes += kept.bytes - (before.bytes if before is not None else 0)
        self._kept[key] = kept
        while self.size_bytes > self.limit_bytes:
            _, oldest = self._kept.popitem(last=False)
            self.size_bytes -= oldest.bytes

    def clear(self) -> None:
        """Lets go of all pictures."""
        self._kept.clear()
        self.size_bytes = 0
