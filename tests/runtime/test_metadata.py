"""Pictures whose metadata alone is damaged, oversized or hostile: what Pillow gives for them without it, upright."""

import io
import random
import struct
import zlib

import numpy as np
import pytest
from pictures import chunk, encoded, noise, pixels, segment, with_tags
from PIL import Image, features

from migician.runtime.errors import ImageError
from migician.runtime.files.config import Preprocessor
from migician.runtime.image import content_key, load_picture, open_picture
from migician.runtime.metadata import without_metadata

PRE = Preprocessor(min_pixels=56 * 56, max_pixels=28 * 28 * 300)
RGB = Image.fromarray(noise(40, 60))
MEGABYTES = b"workflow " * 400_000  # past every limit that Pillow sets on text
BIG = zlib.compress(MEGABYTES)
XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="%d"/></x:xmpmeta>'
PNG, JPEG, WEBP, TIFF = encoded(RGB), encoded(RGB, "JPEG"), encoded(RGB, "WEBP"), encoded(RGB, "TIFF")


def exif(turn, order="<"):
    """An EXIF block: the orientation between two tags that lead out of the file."""
    head = b"II*\0" if order == "<" else b"MM\0*"
    entries = struct.pack(f"{order}HHII", 271, 2, 5000, 1 << 30) + struct.pack(f"{order}HHIHH", 274, 3, 1, turn, 0)
    entries += struct.pack(f"{order}HHII", 34665, 4, 1, 1 << 30)
    return head + struct.pack(f"{order}IH", 8, 3) + entries + b"\0\0\0\0"


def png_chunks():
    return {
        "zTXt of megabytes": chunk(b"zTXt", b"workflow\0\0" + BIG),
        "iTXt of megabytes": chunk(b"iTXt", b"workflow\0\1\0\0\0" + BIG),
        "tEXt of megabytes": chunk(b"tEXt", b"workflow\0" + b"a" * (70 << 20)),
        "many zTXt": b"".join(chunk(b"zTXt", b"a%d\0\0" % i + zlib.compress(bytes(1_000_000))) for i in range(80)),
        "ICC of megabytes": chunk(b"iCCP", b"icc\0\0" + BIG),
        "ICC of no method": chunk(b"iCCP", b"icc\0\7" + BIG),
        "ICC cut off": chunk(b"iCCP", b"icc"),
        "text with a wrong checksum": chunk(b"tEXt", b"a\0b", sound=False),
        "EXIF with a wrong checksum": chunk(b"eXIf", exif(1), sound=False),
        "EXIF of megabytes": chunk(b"eXIf", exif(1) + MEGABYTES),
        "short pHYs": chunk(b"pHYs", b"\0" * 3),
        "short gAMA": chunk(b"gAMA", b""),
        "short cHRM": chunk(b"cHRM", b"\0" * 5),
        "animation out of order": chunk(b"acTL", bytes(8)) + chunk(b"fcTL", struct.pack(">IIIIIHHBB", 9, *[0] * 8)),
        "frame outside": chunk(b"acTL", b"\0\0\0\2" + bytes(4))
        + chunk(b"fcTL", struct.pack(">IIIIIHHBB", 0, 99, 99, 9, 9, 1, 1, 0, 0)),
    }


@pytest.mark.parametrize("name", sorted(png_chunks()))
def test_png(name):
    extra = png_chunks()[name]
    before, behind = PNG[:33] + extra + PNG[33:], PNG[:-12] + extra + PNG[-12:]
    for data in (before, behind):
        assert np.array_equal(np.asarray(open_picture(data)), pixels(PNG))
        assert np.array_equal(load_picture(data, PRE).rgb, load_picture(PNG, PRE).rgb)


def test_a_png_cut_off_behind_its_pixels_is_whole():
    text = chunk(b"zTXt", b"workflow\0\0" + BIG)
    for data in (PNG[:-12] + text[: len(text) // 2], PNG[:-12] + text[:6], PNG[:-12], PNG[:-6]):
        assert np.array_equal(np.asarray(open_picture(data)), pixels(PNG))


def test_a_png_opened_by_pillow_is_read_without_its_late_text():
    data = PNG[:-12] + chunk(b"zTXt", b"workflow\0\0" + BIG) + PNG[-12:]
    image = Image.open(io.BytesIO(data))
    with pytest.raises(ValueError, match=r"(?i)too large"):
        Image.open(io.BytesIO(data)).load()
    assert np.array_equal(np.asarray(open_picture(image)), pixels(PNG))


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("how", ["eXIf", "eXIf big-endian", "eXIf behind", "zTXt", "tEXt", "iTXt", "packed iTXt"])
def test_a_png_stays_upright(turn, how):
    digits = exif(turn).hex().encode()
    raw = b"\nexif\n%8d\n" % (len(digits) // 2) + b"\n".join(digits[i : i + 72] for i in range(0, len(digits), 72))
    key, xmp = b"Raw profile type exif\0", b"XML:com.adobe.xmp\0"
    stated = {
        "eXIf": chunk(b"eXIf", exif(turn)),
        "eXIf big-endian": chunk(b"eXIf", exif(turn, ">"), sound=False),
        "eXIf behind": chunk(b"eXIf", exif(turn)),
        "zTXt": chunk(b"zTXt", key + b"\0" + zlib.compress(raw)),
        "tEXt": chunk(b"tEXt", key + raw),
        "iTXt": chunk(b"iTXt", xmp + b"\0\0\0\0" + XMP % turn),
        "packed iTXt": chunk(b"iTXt", xmp + b"\1\0\0\0" + zlib.compress(XMP % turn)),
    }[how]
    bad = chunk(b"iCCP", b"icc\0\0" + BIG)
    data = PNG[:-12] + bad + stated + PNG[-12:] if how == "eXIf behind" else PNG[:33] + bad + stated + PNG[33:]
    sound = PNG[:33] + chunk(b"eXIf", exif(turn)) + PNG[33:]
    assert np.array_equal(np.asarray(open_picture(data)), np.asarray(open_picture(sound)))
    assert open_picture(data).size == ((40, 60) if turn > 4 else (60, 40))


def test_a_png_keeps_its_transparency_and_palette():
    palette = Image.fromarray(noise(9, 9)).quantize(16)
    gray16 = Image.fromarray(noise(9, 9)[..., 0].astype(np.uint16) * 257)
    samples = [encoded(palette, transparency=3), encoded(palette, transparency=bytes(range(0, 240, 15)))]
    samples += [encoded(RGB, transparency=RGB.getpixel((0, 0))), encoded(RGB.convert("L"), transparency=9)]
    samples += [encoded(gray16), encoded(RGB.convert("1")), encoded(RGB.convert("RGBA")), encoded(RGB.convert("LA"))]
    for sound in samples:
        bad = sound[:33] + chunk(b"zTXt", b"workflow\0\0" + BIG) + sound[33:]
        assert np.array_equal(np.asarray(open_picture(bad)), np.asarray(open_picture(sound)))


def test_damage_in_the_pixels_of_a_png_is_still_refused():
    at = PNG.index(b"IDAT") + 200
    flipped = PNG[:at] + bytes([PNG[at] ^ 255]) + PNG[at + 1 :]
    for data in (flipped, PNG[:at], PNG[:33] + PNG[-12:]):
        for extra in (b"", chunk(b"tEXt", b"a\0b", sound=False)):
            with pytest.raises(ImageError):
                open_picture(data[:33] + extra + data[33:])
    wrong = encoded(RGB, transparency=(1, 2, 3))
    at = wrong.index(b"tRNS")
    with pytest.raises(ImageError):  # transparency is no metadata
        open_picture(wrong[:at] + b"tRNS" + b"\0\0" + wrong[at + 6 :])


def jpeg_segments():
    entries = struct.pack(">HHI4sHHIIHHII", 0xB000, 7, 4, b"0100", 0xB001, 4, 1, 2, 0xB002, 7, 32, 0xFFFF)
    mpf = b"MPF\0MM\0*\0\0\0\x08\0\3" + entries + bytes(4)
    return {
        "ICC without a number": segment(0xE2, b"ICC_PROFILE\0"),
        "ICC of megabytes": b"".join(
            segment(0xE2, b"ICC_PROFILE\0" + bytes([i, 60]) + bytes(65000)) for i in range(60)
        ),
        "frames that are not there": segment(0xE2, mpf),
        "frames without a table": segment(0xE2, b"MPF\0II*\0\xff\xff\xff\xff"),
        "Photoshop cut off": segment(0xED, b"Photoshop 3.0\x008BIM\x04\x04\xff\xff\xff\xff\xff"),
        "short JFIF": segment(0xE0, b"JFIF\0\1"),
        "short Adobe": segment(0xEE, b"Adobe"),
        "EXIF of noise": segment(0xE1, b"Exif\0\0II*\0\xff\xff\xff\xff"),
        "EXIF that leads outside": segment(0xE1, b"Exif\0\0" + exif(1)),
        "XMP of noise": segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + bytes(range(256))),
        "comments of megabytes": segment(0xFE, bytes(65000)) * 60,
    }


@pytest.mark.parametrize("name", sorted(jpeg_segments()))
def test_jpeg(name):
    extra = jpeg_segments()[name]
    assert np.array_equal(np.asarray(open_picture(JPEG[:2] + extra + JPEG[2:])), pixels(JPEG))


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("how", ["EXIF", "big-endian EXIF", "XMP"])
def test_a_jpeg_stays_upright(turn, how):
    block = (
        b"http://ns.adobe.com/xap/1.0/\0" + XMP % turn
        if how == "XMP"
        else b"Exif\0\0" + exif(turn, "><"[how == "EXIF"])
    )
    bad = segment(0xE2, b"ICC_PROFILE\0") + segment(0xE1, block)
    sound = segment(0xE1, b"Exif\0\0" + exif(turn))
    for base in (JPEG, encoded(RGB.convert("L"), "JPEG"), encoded(RGB.convert("CMYK"), "JPEG")):
        want = open_picture(base[:2] + sound + base[2:])
        assert want.size == ((40, 60) if turn > 4 else (60, 40))
        assert np.array_equal(np.asarray(open_picture(base[:2] + bad + base[2:])), np.asarray(want))


def test_a_jpeg_keeps_its_colours():
    bad = segment(0xE2, b"ICC_PROFILE\0")
    for sound in (
        encoded(RGB, "JPEG", keep_rgb=True, quality=95),
        encoded(RGB.convert("CMYK"), "JPEG", quality=95),
        encoded(RGB, "JPEG", progressive=True),
    ):
        assert np.array_equal(np.asarray(open_picture(sound[:2] + bad + sound[2:])), pixels(sound))


def webp(flags, *chunks, pixels=WEBP[12:], size=0):
    def part(kind, content):
        return kind + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2)

    body = b"WEBP" + part(b"VP8X", bytes([flags, 0, 0, 0, 59, 0, 0, 39, 0, 0])) + pixels
    body += b"".join(part(*item) if isinstance(item, tuple) else item for item in chunks)
    return b"RIFF" + struct.pack("<I", len(body) + size) + body


@pytest.mark.parametrize(
    "data",
    [
        webp(8, (b"EXIF", b"junk")),
        webp(8, b"EXIF" + struct.pack("<I", 400) + b"junk"),
        webp(8, b"EXIF" + struct.pack("<I", 3) + b"jun"),
        webp(4, b"XMP " + struct.pack("<I", 0xFFFFFFF0) + b"junk"),
        webp(0x20),
        webp(0, size=1000),
        webp(0, size=-60),
        WEBP[:4] + struct.pack("<I", len(WEBP) + 100) + WEBP[8:],
        WEBP[:4] + struct.pack("<I", 100) + WEBP[8:],
    ],
)
def test_webp(data):
    assert np.array_equal(np.asarray(open_picture(data)), pixels(WEBP))


@pytest.mark.parametrize("turn", range(1, 9))
def test_a_webp_stays_upright_and_transparent(turn):
    clear = Image.fromarray(noise(40, 60, 4))
    parts = encoded(clear, "WEBP", lossless=False, exact=True)[30:]
    sound = webp(0x18, (b"EXIF", exif(turn)), pixels=parts)
    bad = webp(0x18, (b"EXIF", exif(turn)), pixels=parts, size=500)
    with pytest.raises(OSError):
        Image.open(io.BytesIO(bad)).load()
    assert np.array_equal(np.asarray(open_picture(bad)), np.asarray(open_picture(sound)))
    assert open_picture(bad).size == ((40, 60) if turn > 4 else (60, 40))


@pytest.mark.parametrize("packed", [None, "tiff_deflate", "tiff_lzw", "jpeg", "packbits"])
@pytest.mark.parametrize(
    "tag",
    [
        (270, 2, 10, 0xFFFFFFF0),
        (305, 2, 500, 1 << 30),
        (305, 99, 5, 5),
        (305, 2, 0xFFFFFFFF, 8),
        (700, 1, 9999, 1 << 30),
        (34675, 7, 5000, 1 << 30),
        (34665, 4, 1, 1 << 30),
        (34853, 4, 1, 10),
        (33723, 4, 100, 1 << 30),
        (50000, 12, 10, 1 << 31),
    ],
    ids=lambda tag: f"{tag[0]}-{tag[1]}",
)
def test_tiff(packed, tag):
    sound = encoded(RGB, "TIFF", compression=packed) if packed else TIFF
    assert np.array_equal(np.asarray(open_picture(with_tags(sound, tag))), pixels(sound))


@pytest.mark.parametrize("turn", range(1, 9))
def test_a_tiff_stays_upright(turn):
    sound, bad = with_tags(TIFF, (274, 3, 1, turn)), with_tags(TIFF, (274, 3, 1, turn), (270, 2, 10, 0xFFFFFFF0))
    assert np.array_equal(np.asarray(open_picture(bad)), np.asarray(open_picture(sound)))
    assert open_picture(bad).size == ((40, 60) if turn > 4 else (60, 40))


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
@pytest.mark.parametrize("turn", [1, 6])
def test_avif(turn):
    stated = Image.Exif()
    stated[0x0112], stated[271] = turn, "a camera"
    sound = encoded(RGB, "AVIF", exif=stated)
    at = sound.index(b"a camera") - 60
    start = max(sound.find(b"MM\0*", at), sound.find(b"II*\0", at))
    bad = sound[:start] + b"\xff" * 12 + sound[start + 12 :]
    bare = without_metadata(bad)
    assert b"Exif" in bad and b"infe" in bare and len(bare) == len(bad) and bare != bad
    for data in (bad, bare):
        assert np.array_equal(np.asarray(open_picture(data)), np.asarray(open_picture(sound)))


def test_noise_in_metadata_never_costs_the_picture():
    """Blocks of every format, each filled with what a fault may leave there."""
    rng = random.Random(3)
    for i in range(120):
        block = bytearray(exif(6) + b"ICC_PROFILE\0\1\1 Photoshop 3.0\x008BIM MPF\0")
        for _ in range(rng.randrange(1, 30)):
            block[rng.randrange(len(block))] = rng.randrange(256)
        block = bytes(block[rng.randrange(4) :])
        marker, kind = 0xE0 + i % 16, [b"tEXt", b"zTXt", b"iTXt", b"eXIf", b"iCCP", b"sPLT", b"tIME", b"hIST"][i % 8]
        for sound, data in (
            (JPEG, JPEG[:2] + segment(marker, block) + JPEG[2:]),
            (PNG, PNG[:33] + chunk(kind, block, sound=bool(i % 3)) + PNG[33:]),
            (WEBP, webp(8, (b"EXIF", block))),
        ):
            got = np.asarray(open_picture(data))
            # Noise may well state an orientation.
            assert any(np.array_equal(np.rot90(got, k), pixels(sound)) for k in range(4)) or any(
                np.array_equal(np.rot90(got[:, ::-1], k), pixels(sound)) for k in range(4)
            ), (i, kind, marker)


def test_an_image_with_damaged_exif_has_no_key_when_it_is_turned():
    """The cache must not hand out another picture's pixels for it."""
    image = RGB.copy()
    assert content_key(image)
    image.info["exif"] = b"Exif\0\0" + exif(6)
    assert content_key(image) == b"" and open_picture(image).size == (40, 60)


def test_what_has_no_metadata_to_leave_out():
    assert without_metadata(encoded(RGB, "BMP")) is None and without_metadata(b"") is None
    for data in (PNG[:8], PNG[:20], JPEG[:2], JPEG[:5], WEBP[:12], TIFF[:8], TIFF[:4], b"\0\0\0\x08ftyp"):
        without_metadata(data)
