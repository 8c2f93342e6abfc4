"""A TrueType font made for a test: the letters asked for, each a solid block, and an outlined box for all others."""

import struct
from pathlib import Path

__all__ = ["make_font"]

_EM = 1000


def _glyph(*contours: list[tuple[int, int]]) -> bytes:
    """An outline of straight lines; coordinates in units of the em, upwards from the baseline."""
    points = [point for contour in contours for point in contour]
    xs, ys = [x for x, _ in points], [y for _, y in points]
    ends, total = b"", -1
    for contour in contours:
        total += len(contour)
        ends += struct.pack(">H", total)
    data = struct.pack(">hhhhh", len(contours), min(xs), min(ys), max(xs), max(ys)) + ends + struct.pack(">H", 0)
    data += b"\1" * len(points)  # on the curve, both steps in two bytes
    for values in (xs, ys):
        data += b"".join(struct.pack(">h", b - a) for a, b in zip([0, *values], values, strict=False))
    return data + b"\0" * (-len(data) % 4)


def _square(low: int, high: int) -> list[tuple[int, int]]:
    return [(low, low), (low, high), (high, high), (high, low)]


def make_font(path: Path, letters: str) -> Path:
    """Writes a font whose letters all fill 100..900 of the em; what it lacks is drawn as a hollow box."""
    codes = sorted({ord(letter) for letter in letters})
    lacking = _glyph(_square(50, 700), _square(150, 600)[::-1])
    glyphs = [lacking] + [_glyph(_square(100, 900))] * len(codes)
    offsets = [sum(map(len, glyphs[:i])) for i in range(len(glyphs) + 1)]
    count = len(glyphs)
    groups = b"".join(struct.pack(">III", code, code, i + 1) for i, code in enumerate(codes))
    table = struct.pack(">HHIII", 12, 0, 16 + len(groups), 0, len(codes)) + groups
    tables = {
        b"cmap": struct.pack(">HHHHI", 0, 1, 3, 10, 12) + table,
        b"glyf": b"".join(glyphs),
        b"head": struct.pack(
            ">IIIIHHQQhhhhHHhhh", 0x10000, 0x10000, 0, 0x5F0F3CF5, 3, _EM, 0, 0, 0, 0, _EM, _EM, 0, 8, 2, 1, 0
        ),
        b"hhea": struct.pack(">IhhhHhhhhhhhhhhhH", 0x10000, 950, -50, 0, _EM, 0, 0, 900, 1, *[0] * 7, count),
        b"hmtx": struct.pack(">Hh", _EM, 0) * count,
        b"loca": b"".join(struct.pack(">I", offset) for offset in offsets),
        b"maxp": struct.pack(">IH13H", 0x10000, count, 8, 2, *[0] * 11),
        b"name": struct.pack(">HHH", 0, 2, 30)
        + struct.pack(">6H", 3, 1, 0x409, 1, 10, 0)
        + struct.pack(">6H", 3, 1, 0x409, 2, 14, 10)
        + "Block".encode("utf-16-be")
        + "Regular".encode("utf-16-be"),
    }
    head, body = struct.pack(">IHHHH", 0x10000, len(tables), 128, 3, 16 * len(tables) - 128), b""
    start = 12 + 16 * len(tables)
    for name, content in sorted(tables.items()):
        padded = content + b"\0" * (-len(content) % 4)
        total = sum(struct.unpack(f">{len(padded) // 4}I", padded)) & 0xFFFFFFFF
        head += name + struct.pack(">III", total, start + len(body), len(content))
        body += padded
    path.write_bytes(head + body)
    return path
