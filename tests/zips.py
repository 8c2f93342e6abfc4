"""Zip files for the tests: of one piece, and in volumes with zip64 records, which Python's zipfile does not write."""

import struct
import zipfile
import zlib
from pathlib import Path


def written(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    """Writes an archive as Python's zipfile does."""
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def volumes(path: Path, files: dict[str, bytes], size: int) -> Path:
    """Writes an archive in volumes of `size` bytes with zip64 records, by the format's description."""
    data, entries = bytearray(b"PK\7\x08"), b""
    for name, content in files.items():
        raw, deflate = name.encode(), zlib.compressobj(9, zlib.DEFLATED, -15)
        packed = deflate.compress(content) + deflate.flush()
        common = struct.pack(
            "<HHHHHLLLHH", 45, 0x800, 8, 0, 0, zlib.crc32(content), len(packed), len(content), len(raw), 0
        )
        disk, offset = divmod(len(data), size)
        data += b"PK\3\4" + common + raw + packed
        extra = struct.pack("<HHQL", 1, 12, offset, disk)
        head = common[:-2] + struct.pack("<HHHHLL", len(extra), 0, 0xFFFF, 0, 0, 0xFFFFFFFF)
        entries += b"PK\1\2" + struct.pack("<H", 45) + head + raw + extra
    first, offset = divmod(len(data), size)
    data += entries
    disk, wide = divmod(len(data), size)
    last = (len(data) + 56 + 20 + 22 - 1) // size
    end = b"PK\6\6" + struct.pack("<QHHLLQQQQ", 44, 45, 45, last, first, len(files), len(files), len(entries), offset)
    end += b"PK\6\7" + struct.pack("<LQL", disk, wide, last + 1)
    data += end + b"PK\5\6" + struct.pack("<HHHHLLH", *[0xFFFF] * 4, *[0xFFFFFFFF] * 2, 0)
    for i in range(last + 1):
        part = path if i == last else path.with_suffix(f".z{i + 1:02d}")
        part.write_bytes(data[i * size : (i + 1) * size])
    return path
