"""What a file is that is no picture, or none that can be read here, by its first bytes; and what to do about it.

`foreign` knows files by marks that no readable picture has, among them camera files that Pillow would open at the
thumbnail inside. `guess` is for what Pillow has already refused, where weaker marks are enough.
"""

import re
import struct

__all__ = ["BASE64_PICTURE", "foreign", "guess", "is_heic", "tiff_entries"]

_READABLE = "PNG, JPEG, WebP, TIFF, BMP or GIF"
BASE64_PICTURE = re.compile(r"\s*(iVBORw0KGgo|/9j/|R0lGOD|UklGR|SUkqA|TU0AK)")  # PNG, JPEG, GIF, WebP, TIFF

_VIDEO = "take pictures from it: ffmpeg -i FILE -vf fps=1 frame%03d.png"
_RAW = "a camera's RAW file; develop it first: darktable-cli FILE picture.jpg"
_ARCHIVE = "unpack it and name the picture in it"
_PDF = "a PDF document; turn its pages into pictures first: pdftoppm -png -r 150 FILE page"
_HEIC_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"})
_HEIF_BRANDS = frozenset({b"mif1", b"mif2", b"msf1"})
_AVIF_BRANDS = frozenset({b"avif", b"avis"})
_EBML, _ZIP, _GZIP = b"\x1aE\xdf\xa3", b"PK\3\4", b"\x1f\x8b\x08"

_STARTS = {
    _PDF: (b"%PDF-",),
    f"a video; {_VIDEO}": (
        _EBML, b"FLV\1", b"0&\xb2u\x8ef\xcf\x11", b"\0\0\1\xba", b"\0\0\1\xb3",
        b"\0\0\0\x08wide", b"\0\0\0\x08free",
    ),
    _RAW: (b"FUJIFILMCCD-RAW", b"IIRO", b"IIRS", b"MMOR", b"IIU\0", b"FOVb", b"\0MRM", b"II\x1a\0\0\0HEAPCCDR"),
    "a JPEG XL picture; convert it first: djxl FILE picture.png": (b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n"),
    "an OpenEXR picture, whose light has no fixed range; convert it to PNG first": (b"v/1\1",),
    "a Radiance picture, whose light has no fixed range; convert it to PNG first": (b"#?RADIANCE", b"#?RGBE"),
    "a GIMP project; export it from GIMP as PNG": (b"gimp xcf ",),
    "a git-lfs pointer, not the picture itself; fetch it: git lfs pull": (b"version https://git-lfs.github.com/",),
    f"a zip archive (or a document made of one); {_ARCHIVE}": (_ZIP, b"PK\5\6"),
    f"a gzip archive; {_ARCHIVE}": (_GZIP,),
    f"a 7z archive; {_ARCHIVE}": (b"7z\xbc\xaf\x27\x1c",),
    f"a RAR archive; {_ARCHIVE}": (b"Rar!\x1a\7",),
    f"an xz archive; {_ARCHIVE}": (b"\xfd7zXZ\0",),
    f"a bzip2 archive; {_ARCHIVE}": (b"BZh91AY&SY",),
    f"a zstd archive; {_ARCHIVE}": (b"(\xb5/\xfd",),
    "a numpy file; load it and pass the array: numpy.load(FILE)": (b"\x93NUMPY",),
    "an HDF5 file; read the picture from it and pass the array": (b"\x89HDF\r\n\x1a\n",),
}  # fmt: skip
_MARKS = {m: kind for kind, marks in _STARTS.items() for m in marks}
_PICTURES = {
    b"\x89PNG": "PNG", b"\xff\xd8\xff": "JPEG", b"GIF8": "GIF", b"BM": "BMP", b"II*\0": "TIFF", b"MM\0*": "TIFF",
    b"II+\0": "TIFF", b"MM\0+": "TIFF", b"8BPS": "Photoshop file", b"\0\0\0\x0cjP  ": "JPEG 2000",
}  # fmt: skip


def foreign(data: bytes) -> str | None:
    """Says what a file is that must not be opened as a picture, and what to do; None for all others."""
    for mark, kind in _MARKS.items():
        if data.startswith(mark):
            return kind
    if data[128:132] == b"DICM":
        return "a DICOM file; convert it first: dcmj2pnm +on FILE picture.png"
    if data[:4] == b"RIFF" and data[8:12] == b"AVI ":
        return f"a video; {_VIDEO}"
    if data[257:262] == b"ustar":
        return f"a tar archive; {_ARCHIVE}"
    if data[4:8] in (b"moov", b"mdat"):
        return f"a video; {_VIDEO}"
    brands = _brands(data)
    if b"crx " in brands:
        return _RAW
    if brands and not brands & (_HEIC_BRANDS | _HEIF_BRANDS | _AVIF_BRANDS):
        return f"an MP4 or MOV video; {_VIDEO}"
    return _RAW if _is_raw(data) else None


def is_heic(data: bytes) -> bool:
    """Whether a file is HEIC or another HEIF, AVIF left out."""
    brands = _brands(data)
    return bool(brands & _HEIC_BRANDS) or (bool(brands & _HEIF_BRANDS) and not brands & _AVIF_BRANDS)


def guess(data: bytes) -> str:
    """Says what a file seems to be that could not be opened, and what to do."""
    if _brands(data) & _AVIF_BRANDS:
        return "an AVIF picture, damaged or too new for this Pillow; pip install -U pillow, or: avifdec FILE out.png"
    if data[8:12] == b"WEBP" and data[:4] == b"RIFF":
        return "a damaged WebP; save or download it again, or use another file"
    if 32803 in tiff_entries(data).get(262, ()):
        return _RAW
    for mark, kind in _PICTURES.items():
        if data.startswith(mark):
            return f"a damaged {kind}; save or download it again, or use another file"
    if not data[:4096].strip(b"\0"):
        return "holds nothing but zero bytes, as after a broken copy; copy or download it again"
    return _guess_text(data) or f"not an image file that can be read; convert it to {_READABLE}"


def _guess_text(data: bytes) -> str | None:
    """What a text file is that was given for a picture."""
    if b"%PDF-" in data[:1024]:
        return _PDF
    head = data[:2048]
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        text = head.decode("utf-16", "replace")
    else:
        text = head.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "ignore")
        if "\0" in text or len(text) < len(head) // 4:
            return None
    start = text.lstrip().lower()
    if start.startswith(("<!doctype html", "<html", "<head", "<body")) or ("<html" in start and start[0] == "<"):
        return "an HTML page, not the picture: a login, a notice or an error; download it again from its own address"
    if "<svg" in start and start[0] == "<":
        return "an SVG drawing; turn it into pixels first: rsvg-convert FILE -o picture.png"
    if start.startswith("<?xml"):
        return "an XML document, not the picture, often a server's error; download it again"
    if start.startswith(("{", "[")):
        return "JSON text, not the picture, often a server's error; download it again"
    if BASE64_PICTURE.match(text) or start.startswith("data:"):
        return "base64 text of a picture; decode it first: base64 -d FILE, without what stands before its comma"
    return None


def _brands(data: bytes) -> frozenset[bytes]:
    """The brands of an ISO media file (MP4, MOV, HEIF, AVIF), the major and the compatible ones."""
    if data[4:8] != b"ftyp":
        return frozenset()
    size = min(int.from_bytes(data[:4], "big"), 256)
    return frozenset({data[8:12], *(data[i : i + 4] for i in range(16, size - 3, 4))})


def _is_raw(data: bytes) -> bool:
    """Whether a TIFF is a camera's: its first picture a small copy of the RAW one, which lies elsewhere."""
    if data[:4] not in (b"II*\0", b"MM\0*"):
        return False
    tags = tiff_entries(data)
    reduced = bool(tags.get(254, (0,))[0] & 1)
    return data[8:10] == b"CR" or (reduced and (330 in tags or 50706 in tags))


def tiff_entries(data: bytes) -> dict[int, tuple[int, int, bytes, int]]:
    """The entries of a TIFF's first directory: tag -> (first value, type, the entry's 12 bytes, count).

    Works on an EXIF block as well. Damaged directories give what can be read. The value counts for types up to 32 bits
    wide with one value; of others it is an offset.
    """
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(data[:4])
    entries: dict[int, tuple[int, int, bytes, int]] = {}
    if order is None or len(data) < 8:
        return entries
    start = struct.unpack_from(f"{order}I", data, 4)[0]
    if start + 2 > len(data):
        return entries
    for i in range(struct.unpack_from(f"{order}H", data, start)[0]):
        entry = data[start + 2 + 12 * i : start + 14 + 12 * i]
        if len(entry) < 12:
            break
        tag, kind, count = struct.unpack_from(f"{order}HHI", entry)
        value = struct.unpack_from(f"{order}{'H' if kind == 3 else 'I'}", entry, 8)[0]
        entries.setdefault(tag, (value, kind, entry, count))
    return entries
