"""A picture file without its metadata: what is left when text, profiles or EXIF are unsound and the pixels are not.

`without_metadata` keeps what a decoder needs for the pixels, and how the picture stands: the EXIF orientation, written
anew in the smallest form. It decodes nothing; sizes that a file states are only used to cut it.
"""

import re
import struct
import zlib
from collections.abc import Iterator

from .kinds import tiff_entries

__all__ = ["orientation", "without_metadata"]

_XMP_TURN = re.compile(rb'tiff:Orientation(?:="|>)([1-8])')
_PROFILE_BYTES = 1 << 20  # of a compressed text, enough for any EXIF block
# What a TIFF's pixels depend on: layout, compression, tables, colours; not names, dates, profiles, other directories.
_TIFF_PIXELS = frozenset(
    {256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 284, 292, 293, 317, 320, 322, 323, 324, 325, 332, 334, 338}
    | {339, 340, 341, 347, *range(512, 522), 529, 530, 532}
)


def without_metadata(data: bytes) -> bytes | None:
    """Returns the file without its metadata, None for kinds of files that this does not know.

    data: PNG, JPEG, WebP, TIFF, or HEIF and AVIF, whose metadata is only put out of a reader's sight.
    """
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return _png(data)
    if data.startswith(b"\xff\xd8"):
        return _jpeg(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _webp(data)
    if data[:4] in (b"II*\0", b"MM\0*"):
        return _tiff(data)
    if data[4:8] == b"ftyp":
        # Item types in the table of contents; the items stay where they are, so no offset moves.
        return re.sub(rb"(infe[\2\3]\0\0.(?:..)?....)(?:Exif|mime)", rb"\1skip", data, flags=re.S)
    return None


def orientation(blocks: list[bytes]) -> int:
    """Returns the orientation that EXIF or, failing that, XMP blocks state, 1..8; 1 where they do not say.

    Finds it in blocks that Pillow gives up on, because of other tags.
    """
    for block in blocks:
        value, kind, _, count = tiff_entries(block.removeprefix(b"Exif\0\0")).get(0x0112, (1, 0, b"", 0))
        if kind in (3, 4) and count == 1 and 1 <= value <= 8:
            return value
    found = next(filter(None, map(_XMP_TURN.search, blocks)), None)
    return int(found[1]) if found else 1


def _exif(turn: int) -> bytes:
    """An EXIF block that states an orientation and nothing else."""
    return b"II*\0" + struct.pack("<IHHHIII", 8, 1, 0x0112, 3, 1, turn, 0)


def _png(data: bytes) -> bytes:
    """Chunks whose names begin with a capital and tRNS make the pixels; those of animations do not make the first."""
    parts, at = [data[:8]], 8
    blocks: list[bytes] = []
    while at + 8 <= len(data):
        size, kind = struct.unpack_from(">I4s", data, at)
        end = at + 12 + size
        if not kind.isalpha():
            parts.append(data[at:])  # no chunk: whoever decodes it says what is wrong
            break
        if kind[:1].isupper() or kind == b"tRNS":
            parts.append(data[at:end])
        else:
            blocks += _png_block(kind, data[at + 8 : end - 4])
        at = end
        if kind == b"IEND":
            break
    if (turn := orientation(blocks)) != 1:
        parts.insert(2, _chunk(b"eXIf", _exif(turn)))  # behind the header
    return b"".join(parts)


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _png_block(kind: bytes, content: bytes) -> Iterator[bytes]:
    """The EXIF or XMP block in a chunk, if there is one."""
    if kind == b"eXIf":
        yield content
    key, _, rest = content[:_PROFILE_BYTES].partition(b"\0")
    if kind == b"iTXt" and key == b"XML:com.adobe.xmp":
        text = rest[2:].split(b"\0", 2)[-1]
        yield _inflate(text) if rest[:1] == b"\1" else text
    elif kind in (b"zTXt", b"tEXt") and key.lower() == b"raw profile type exif":
        text = _inflate(rest[1:]) if kind == b"zTXt" else rest
        # a line with the kind, one with the length, then hexadecimal digits
        digits = re.sub(rb"[^0-9A-Fa-f]", b"", b"".join(text.split(b"\n")[3:]))
        yield bytes.fromhex(digits[: len(digits) // 2 * 2].decode())


def _inflate(content: bytes) -> bytes:
    try:
        return zlib.decompressobj().decompress(content, _PROFILE_BYTES)
    except zlib.error:
        return b""


def _jpeg(data: bytes) -> bytes:
    """All segments but those of applications and comments; JFIF and Adobe say how the colours are stored."""
    parts, blocks, at = [], [], 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker, size = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xFF:  # filling
            at += 1
            continue
        segment = data[at : at + 2 + size]
        if marker == 0xDA or size < 2:
            break
        if marker == 0xE1:
            blocks.append(segment[4:])
        # Shorter ones than these the decoder itself does not heed.
        keep = {0xE0: 16, 0xEE: 14, 0xFE: 1 << 16}.get(marker, 1 << 16 if 0xE0 <= marker <= 0xEF else 0)
        if size >= keep:
            parts.append(segment)
        at += 2 + size
    turn = orientation(blocks)
    exif = b"Exif\0\0" + _exif(turn)
    head = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif if turn != 1 else b""
    return b"\xff\xd8" + head + b"".join(parts) + data[at:]


def _webp(data: bytes) -> bytes:
    """The chunks of pixels, and a container that is as long as it says."""
    parts, blocks, at = [], [], 12
    while at + 8 <= len(data):
        kind, size = struct.unpack_from("<4sI", data, at)
        content = data[at + 8 : at + 8 + size]
        if kind in (b"EXIF", b"XMP "):
            blocks.append(content)
        elif kind in (b"VP8X", b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF"):
            parts.append((kind, content))
        at += 8 + size + size % 2
    turn = orientation(blocks)
    if parts and parts[0][0] == b"VP8X":
        flags = parts[0][1]
        kept = flags[0] & 0x12 if flags else 0  # transparent, animated
        parts[0] = b"VP8X", bytes([kept | (8 if turn != 1 else 0)]) + flags[1:]
        if turn != 1:
            parts.append((b"EXIF", _exif(turn)))
    body = b"".join(kind + struct.pack("<I", len(c)) + c + b"\0" * (len(c) % 2) for kind, c in parts)
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def _tiff(data: bytes) -> bytes:
    """The same file with a new directory at its end, of what makes the pixels of the first picture."""
    order = "<" if data[:2] == b"II" else ">"
    entries = tiff_entries(data)
    kept = [entries[tag][2] for tag in sorted(entries) if tag in _TIFF_PIXELS]
    padded = data + b"\0" * (len(data) % 2)
    directory = struct.pack(f"{order}H", len(kept)) + b"".join(kept) + b"\0\0\0\0"
    return padded[:4] + struct.pack(f"{order}I", len(padded)) + padded[8:] + directory
