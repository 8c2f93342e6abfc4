"""Files that are no pictures, or none that can be read here: each is named, with what to do."""

import base64
import gzip
import io
import struct
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest
from pictures import encoded, noise, with_tags
from PIL import Image, features

from migician.runtime.errors import ImageError
from migician.runtime.image import open_picture

RGB = Image.fromarray(noise(40, 60))


def archive(opener, mode, add):
    buffer = io.BytesIO()
    with opener(buffer, mode) as file:
        add(file)
    return buffer.getvalue()


def box(brand, *compatible):
    content = brand + bytes(4) + b"".join(compatible)
    return struct.pack(">I", len(content) + 8) + b"ftyp" + content + bytes(200)


def raw(make, *tags):
    """A camera's TIFF: a sound thumbnail first, the picture itself elsewhere."""
    make = (271, 2, 4, int.from_bytes(make, "little"))
    return with_tags(encoded(RGB.resize((16, 12)), "TIFF"), (254, 4, 1, 1), make, *tags)


def numpy_file():
    buffer = io.BytesIO()
    np.save(buffer, np.zeros((4, 4, 3), np.uint8))
    return buffer.getvalue()


def files():
    """What is said of it, and its bytes."""
    tar = tarfile.TarInfo("a.png")
    page = "<!DOCTYPE html>\n<html><head><title>Sign in</title></head><body><svg></svg></body></html>"
    svg = '<?xml version="1.0"?>\n<!-- drawn -->\n<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'
    return {
        "HEIC": ("pillow-heif", box(b"heic", b"mif1", b"heic")),
        "HEIC as HEIF": ("pillow-heif", box(b"mif1", b"mif1", b"heic")),
        "AVIF": ("AVIF", box(b"avif", b"mif1", b"avif")),
        "SVG": ("rsvg-convert", svg.encode()),
        "SVG with BOM": ("rsvg-convert", b"\xef\xbb\xbf" + svg.encode()),
        "SVG in UTF-16": ("rsvg-convert", svg.encode("utf-16")),
        "PDF": ("pdftoppm", b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n"),
        "PDF behind junk": ("pdftoppm", b"\r\n\r\n%PDF-1.4\n"),
        "MP4": ("ffmpeg", box(b"isom", b"iso2", b"avc1", b"mp41")),
        "MOV": ("ffmpeg", box(b"qt  ")),
        "old MOV": ("ffmpeg", bytes(4) + b"moov" + bytes(100)),
        "WebM": ("ffmpeg", b"\x1aE\xdf\xa3" + bytes(50)),
        "AVI": ("ffmpeg", b"RIFF\0\0\0\0AVI LIST" + bytes(50)),
        "MPEG": ("ffmpeg", b"\0\0\1\xba" + bytes(50)),
        "CR2": ("RAW", b"II*\0\x10\0\0\0CR\2\0" + raw(b"Cano")[12:]),
        "CR3": ("RAW", box(b"crx ", b"crx ", b"isom")),
        "NEF": ("RAW", raw(b"NIKO", (330, 4, 1, 99999))),
        "DNG": ("RAW", raw(b"Appl", (50706, 1, 4, 1025))),
        "RAF": ("RAW", b"FUJIFILMCCD-RAW 0201" + bytes(90)),
        "JPEG XL": ("djxl", b"\xff\x0a" + bytes(20)),
        "JPEG XL boxed": ("djxl", b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(20)),
        "DICOM": ("dcmj2pnm", bytes(128) + b"DICM" + bytes(20)),
        "EXR": ("OpenEXR", b"v/1\1" + bytes(20)),
        "git-lfs": ("git lfs pull", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        "HTML": ("HTML page", page.encode()),
        "HTML as XHTML": ("HTML page", b'<?xml version="1.0"?>\n' + page[16:].encode()),
        "XML": ("XML", b'<?xml version="1.0"?>\n<Error><Code>AccessDenied</Code></Error>'),
        "JSON": ("JSON", b'{"error": {"message": "not found"}}'),
        "base64": ("base64 -d", base64.encodebytes(encoded(RGB))),
        "base64 JPEG": ("base64 -d", base64.b64encode(encoded(RGB, "JPEG"))),
        "data URL": ("base64 -d", b"data:image/png;base64," + base64.b64encode(encoded(RGB))),
        "zip": ("zip archive", archive(zipfile.ZipFile, "w", lambda file: file.writestr("a.png", b""))),
        "tar": (
            "tar archive",
            archive(lambda buffer, mode: tarfile.open(fileobj=buffer, mode=mode), "w", lambda file: file.addfile(tar)),
        ),
        "gzip": ("gzip archive", gzip.compress(encoded(RGB))),
        "numpy": ("numpy.load", numpy_file()),
        "zeros": ("zero bytes", bytes(5000)),
        "cut PNG": ("cut off", encoded(RGB)[:20]),
        "cut WebP": ("damaged WebP", encoded(RGB, "WEBP")[:14]),
        "cut GIF": ("damaged GIF", b"GIF89a"),
    }


@pytest.mark.parametrize("name", sorted(files()))
def test_each_kind_is_named(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # as where it is not installed
    path = tmp_path / "picture.jpg"
    word, data = files()[name]
    path.write_bytes(data)
    for source in (path, data):
        with pytest.raises(ImageError, match=word) as caught:
            open_picture(source)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_pillow_would_open_the_thumbnail_of_a_raw_file():
    for name in ("NEF", "DNG"):
        assert Image.open(io.BytesIO(files()[name][1])).size == (16, 12)


def test_pictures_of_every_common_kind_are_no_strangers():
    """Marks of other files must not shut out what Pillow reads."""
    for form in ("BMP", "DDS", "GIF", "ICO", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "SGI", "TGA", "TIFF", "WEBP"):
        assert open_picture(encoded(RGB, form)).size in ((60, 40), (32, 21)), form
    if features.check("avif"):
        assert open_picture(encoded(RGB, "AVIF")).size == (60, 40)
    pages = encoded(RGB, "TIFF", save_all=True, append_images=[RGB.resize((9, 9))], tiffinfo={254: 2, 330: 8})
    assert open_picture(pages).size == (60, 40)


@pytest.fixture
def heif():
    return pytest.importorskip("pillow_heif", reason="HEIC is tested where pillow-heif is installed")


@pytest.mark.parametrize("turn", range(1, 9))
def test_heic_is_upright(heif, tmp_path, turn):
    upright = Image.fromarray(noise(3, 2).repeat(32, 0).repeat(32, 1))
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    stored = upright.transpose(Image.Transpose(undo[turn])) if turn > 1 else upright
    exif = Image.Exif()
    exif[0x0112], exif[271] = turn, "a camera"
    file = heif.from_pillow(stored)
    buffer = io.BytesIO()
    file.save(buffer, quality=100, exif=exif.tobytes())
    path = tmp_path / "named.jpg"
    path.write_bytes(buffer.getvalue())
    got = open_picture(path)
    assert got.size == upright.size and got.mode == "RGB"
    assert np.abs(np.asarray(got).astype(int) - np.asarray(upright)).mean() < 2


def test_heic_of_every_mode_and_damaged(heif):
    for mode, value in (("L", 150), ("RGB", (250, 10, 20)), ("RGBA", (250, 10, 20, 255))):
        buffer = io.BytesIO()
        heif.from_pillow(Image.new(mode, (64, 48), value)).save(buffer, quality=95)
        got = open_picture(buffer.getvalue())
        want = value if isinstance(value, tuple) else (value,) * 3
        assert got.size == (64, 48) and np.abs(np.subtract(got.getpixel((9, 9)), want[:3])).max() < 6, mode
    whole = buffer.getvalue()
    for end in (30, 100, len(whole) // 2, len(whole) - 9):
        with pytest.raises(ImageError):
            open_picture(whole[:end])
    at = whole.find(b"ispe") + 8  # the size that the file states
    large = whole[:at] + struct.pack(">II", 60000, 60000) + whole[at + 8 :]
    with pytest.raises(ImageError):
        open_picture(large)


def test_heic_does_not_change_pillow(heif):
    code = "from migician.runtime.image import open_picture; import io, sys, pillow_heif; from PIL import Image\n"
    code += (
        "b = io.BytesIO(); pillow_heif.from_pillow(Image.new('RGB', (64, 64))).save(b); open_picture(b.getvalue())\n"
    )
    code += "Image.init(); sys.exit('HEIF' in Image.OPEN)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
