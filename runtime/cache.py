"""Encoded pictures kept between questions: found by their pixels, bounded in bytes, the least recently used go first.

What is kept are a picture's embeddings, f32[cells, hidden]: 2.4 MB for 640x480 on the 2B model, 5.6 MB on the 7B. While
a picture stays here it is the same object for every question, so a session recognizes it and keeps the KV prefix too.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from .engine import Vision

__all__ = ["CACHE_BYTES", "PictureCache", "picture_key"]

CACHE_BYTES = 256 << 20


def picture_key(rgb: np.ndarray) -> bytes:
    """Names the pixels of a resized picture u8[H, W, 3]: equal shape and pixels, equal key."""
    from hashlib import blake2b

    digest = blake2b(repr(rgb.shape).encode(), digest_size=32)
    digest.update(rgb.data if rgb.flags.c_contiguous else rgb.tobytes())
    return digest.digest()


class PictureCache:
    """Encoded pictures by key, at most limit_bytes of embeddings; 0 keeps none.

    size_bytes: what is held now. A picture larger than the whole bound is not kept, and evicts nothing.
    """

    def __init__(self, limit_bytes: int = CACHE_BYTES) -> None:
        self.limit_bytes, self.size_bytes = limit_bytes, 0
        self._kept: OrderedDict[bytes, Vision] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: bytes) -> Vision | None:
        """Finds a picture and counts it as just used."""
        vision = self._kept.get(key)
        if vision is not None:
            self._kept.move_to_end(key)
        return vision

    def put(self, key: bytes, vision: Vision) -> None:
        """Keeps a picture, at the cost of those that were not used for longest."""
        if vision.bytes > self.limit_bytes:
            return
        before = self._kept.pop(key, None)
        self.size_bytes += vision.bytes - (before.bytes if before is not None else 0)
        self._kept[key] = vision
        while self.size_bytes > self.limit_bytes:
            _, oldest = self._kept.popitem(last=False)
            self.size_bytes -= oldest.bytes

    def clear(self) -> None:
        """Lets go of all pictures."""
        self._kept.clear()
        self.size_bytes = 0
