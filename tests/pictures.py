"""Pictures and the parts of their files, for tests to put together and to damage."""

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

__all__ = ["chunk", "encoded", "noise", "pixels", "segment", "with_tags"]


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Random pixels: u8[height, width, channels]."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    """The bytes of a file that Pillow writes."""
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def pixels(data: bytes) -> np.ndarray:
    """What Pillow alone reads from a file: u8[H, W, 3]."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def chunk(kind: bytes, content: bytes, *, sound: bool = True) -> bytes:
    """A chunk of a PNG; one that is not sound has a wrong checksum."""
    return (
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content) ^ (not sound))
    )


def segment(marker: int, content: bytes) -> bytes:
    """A segment of a JPEG."""
    return b"\xff" + bytes([marker]) + struct.pack(">H", len(content) + 2) + content


def with_tags(tiff: bytes, *tags: tuple[int, int, int, int]) -> bytes:
    """A little-endian TIFF with more tags (tag, type, count, value), in a new directory at its end."""
    start = struct.unpack("<I", tiff[4:8])[0]
    count = struct.unpack("<H", tiff[start : start + 2])[0]
    entries = [tiff[start + 2 + 12 * i : start + 14 + 12 * i] for i in range(count)]
    entries = sorted(entries + [struct.pack("<HHII", *tag) for tag in tags], key=lambda e: struct.unpack("<H", e[:2]))
    end = tiff + b"\0" * (len(tiff) % 2)
    head = end[:4] + struct.pack("<I", len(end)) + end[8:]
    return head + struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
