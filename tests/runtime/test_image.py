"""Pictures: resize and patches equal to transformers' PIL processor, every mode of Pillow, hostile files."""

import io
import os
import random
import struct
import threading
import time
import warnings
import zlib
from dataclasses import replace

import numpy as np
import pytest
from pictures import chunk, encoded, noise, pixels
from PIL import Image, ImageFile, PngImagePlugin

from migician.runtime.errors import ImageError, MigicianError, ModelFileError, UnsupportedError
from migician.runtime.files.config import Preprocessor
from migician.runtime.image import content_key, load_picture, open_picture, patchify, read_source, smart_resize

PRE = Preprocessor(min_pixels=56 * 56, max_pixels=28 * 28 * 300)


def png_header(width, height, depth=8, colour=2):
    size = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")


def test_resize_and_patches_equal_transformers():
    module = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    rng = random.Random(5)
    sizes = [(1, 1), (1, 200), (200, 1), (27, 29), (42, 70), (480, 640), (1900, 11)]
    sizes += [(rng.randint(3, 500), rng.randint(3, 500)) for _ in range(200 - len(sizes))]
    for i, (height, width) in enumerate(sizes):
        low = rng.choice([1, 784, 3136, 6_000])
        pre = Preprocessor(min_pixels=low, max_pixels=rng.choice([6_000, 12_000, 40_000]))
        rgb = noise(height, width, seed=i)
        theirs = module.Qwen2VLImageProcessorPil(min_pixels=pre.min_pixels, max_pixels=pre.max_pixels)
        want = theirs(images=Image.fromarray(rgb), return_tensors="np")
        picture = load_picture(rgb, pre)
        grid = [1, picture.rgb.shape[0] // 14, picture.rgb.shape[1] // 14]
        assert want["image_grid_thw"].tolist() == [grid]
        patches = patchify(picture.rgb, pre)
        # Equal floats are equal pixels: the normalisation keeps all 256 values of a channel apart.
        assert patches.dtype == np.float32 and np.array_equal(patches, want["pixel_values"]), (height, width)


@pytest.mark.parametrize(
    ("size", "bounds", "want"),
    [
        ((480, 640), (3136, 12845056), (476, 644)),
        ((1, 1), (3136, 12845056), (56, 56)),
        ((42, 70), (1, 10**6), (56, 56)),  # 1.5 and 2.5 both round to 2
        ((196, 196), (38416, 38416), (196, 196)),
        ((3000, 4000), (3136, 1003520), (840, 1148)),
        ((1, 200), (3136, 12845056), (28, 812)),
        ((200, 1), (1, 784), (28, 28)),
    ],
)
def test_smart_resize_table(size, bounds, want):
    assert smart_resize(*size, min_pixels=bounds[0], max_pixels=bounds[1]) == want


def test_smart_resize_refuses():
    for size in ((1, 5000), (5000, 24), (0, 5), (5, 0)):
        with pytest.raises(ImageError):
            smart_resize(*size)


def test_max_side_bounds_in_one_resize():
    rgb = noise(600, 1000)
    picture = load_picture(rgb, PRE, max_side=300)
    assert (picture.width, picture.height) == (1000, 600)
    assert picture.rgb.shape == (*smart_resize(180, 300, max_pixels=PRE.max_pixels), 3)
    columns, rows = picture.rgb.shape[1], picture.rgb.shape[0]
    assert np.array_equal(
        picture.rgb, np.asarray(Image.fromarray(rgb).resize((columns, rows), Image.Resampling.BICUBIC))
    )
    assert np.array_equal(load_picture(rgb, PRE, max_side=5000).rgb, load_picture(rgb, PRE).rgb)
    thin = load_picture(noise(6, 1000), PRE, max_side=240)  # 240 x 1.44 must not become 240 : 1
    assert thin.height == 6 and thin.rgb.shape[0] % 28 == 0
    with pytest.raises(ValueError, match="max_side"):
        load_picture(rgb, PRE, max_side=0)


def test_picture_is_contiguous_and_keeps_its_size():
    picture = load_picture(noise(50, 90), PRE)
    assert picture.rgb.flags.c_contiguous and picture.rgb.dtype == np.uint8
    assert (picture.width, picture.height, picture.name) == (90, 50, "array")
    rows, columns = PRE.grid(*picture.rgb.shape[:2])
    assert (rows * 28, columns * 28) == picture.rgb.shape[:2]


def test_patchify_refuses_odd_sizes():
    with pytest.raises(ImageError):
        patchify(noise(28, 30), PRE)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF"])
def test_exif_orientation(orientation, form):
    upright = Image.fromarray(noise(3, 2).repeat(16, 0).repeat(16, 1))
    turn = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # what undoes the orientation's own transposition
    stored = upright.transpose(Image.Transpose(turn[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100, "subsampling": 0} if form == "JPEG" else {}
    got = open_picture(encoded(stored, form, exif=exif, **options))
    assert got.size == upright.size
    assert np.abs(np.asarray(got).astype(int) - np.asarray(upright)).max() <= (8 if form == "JPEG" else 0)


def test_damaged_exif_is_ignored():
    data = encoded(Image.new("RGB", (20, 10), "red"), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert open_picture(data).size == (20, 10)


def test_transparency_onto_white():
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    half = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    for source in (clear, encoded(clear), encoded(clear, "WEBP", lossless=True), clear.convert("RGBa")):
        assert open_picture(source).getpixel((1, 1)) == (255, 255, 255)
    assert open_picture(half).getpixel((0, 0)) == (127, 127, 127)
    assert open_picture(Image.new("LA", (4, 4), (9, 0))).getpixel((0, 0)) == (255, 255, 255)
    assert open_picture(Image.new("La", (4, 4), (0, 0))).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    assert open_picture(palette).getpixel((0, 0)) == (10, 200, 30)
    assert open_picture(encoded(palette, transparency=1)).getpixel((0, 0)) == (255, 255, 255)
    assert open_picture(encoded(palette, "GIF", transparency=1)).getpixel((0, 0)) == (255, 255, 255)
    rgb = Image.new("RGB", (4, 4), (10, 20, 30))
    assert open_picture(encoded(rgb, transparency=(10, 20, 30))).getpixel((0, 0)) == (255, 255, 255)
    gray = Image.new("L", (4, 4), 7)
    assert open_picture(encoded(gray, transparency=7)).getpixel((0, 0)) == (255, 255, 255)


def test_gray_and_colour_modes():
    assert open_picture(Image.new("L", (2, 2), 77)).getpixel((0, 0)) == (77, 77, 77)
    assert open_picture(Image.new("1", (2, 2), 1)).getpixel((0, 0)) == (255, 255, 255)
    for mode, colour in (("CMYK", (0, 255, 255, 0)), ("YCbCr", (76, 85, 255)), ("HSV", (0, 255, 255))):
        r, g, b = open_picture(Image.new(mode, (2, 2), colour)).getpixel((0, 0))
        assert r > 245 and g < 10 and b < 10, mode
    cmyk = open_picture(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")).getpixel((4, 4))
    assert cmyk[0] > 240 and cmyk[1] < 15
    lab = open_picture(encoded(Image.new("LAB", (2, 2), (137, 208, 195)), "TIFF")).getpixel((0, 0))
    assert lab[0] > 200 and lab[1] < 60


def test_sixteen_bits_are_scaled():
    ramp = np.array([[0, 128, 129, 257, 32768, 65535]], np.uint16)
    want = [0, 0, 1, 1, 128, 255]
    stored = Image.fromarray(ramp)
    for source in (stored, encoded(stored), encoded(stored, "TIFF"), ramp, Image.fromarray(ramp.astype(np.int32))):
        assert np.asarray(open_picture(source))[0, :, 0].tolist() == want
    clear = np.asarray(open_picture(encoded(stored, transparency=257)))[0, :, 0].tolist()
    assert clear in ([*want[:3], 255, *want[4:]], want)  # Pillow's older versions drop a 16-bit transparency


def test_wide_modes_are_scaled():
    def first_row(values, dtype):
        return np.asarray(open_picture(Image.fromarray(np.array([values], dtype))))[0, :, 0].tolist()

    assert first_row([0, 0.5, 1], np.float32) == [0, 128, 255]
    assert first_row([0, 100, 254.6], np.float32) == [0, 100, 255]
    assert first_row([0, 257, 65535], np.float32) == [0, 1, 255]
    assert first_row([-1, 0, 1], np.float32) == [0, 128, 255]
    assert first_row([-100, 101, 300], np.int32) == [0, 128, 255]
    assert first_row([0, 10**6], np.int32) == [0, 255]
    assert first_row([-5, -5], np.int32) == [0, 0]
    with pytest.raises(ImageError, match="finite"):
        first_row([0, np.nan], np.float32)


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_animation_shows_its_first_frame(form):
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue", "lime")]
    options = {"lossless": True} if form == "WEBP" else {}
    data = encoded(frames[0], form, save_all=True, append_images=frames[1:], **options)
    assert open_picture(data).getpixel((4, 4)) == (255, 0, 0)


def test_jpeg_is_decoded_at_full_size():
    source = Image.fromarray(noise(160, 240))
    data = encoded(source, "JPEG")
    whole = np.asarray(Image.open(io.BytesIO(data)).convert("RGB").resize((28, 28), Image.Resampling.BICUBIC))
    tiny = Preprocessor(min_pixels=784, max_pixels=2000)
    assert np.array_equal(load_picture(data, tiny).rgb, whole)


def test_arrays():
    rgb = noise(5, 7)
    assert np.array_equal(np.asarray(open_picture(rgb)), rgb)
    assert np.array_equal(np.asarray(open_picture(rgb[:, ::-1])), rgb[:, ::-1])
    assert np.array_equal(np.asarray(open_picture(rgb[..., :1]))[..., 2], rgb[..., 0])
    assert np.array_equal(np.asarray(open_picture(rgb[..., 0]))[..., 1], rgb[..., 0])
    for dtype in (np.float16, np.float32, np.float64):
        assert np.array_equal(np.asarray(open_picture((rgb / 255).astype(dtype))), rgb)
    assert open_picture(np.ones((2, 2), bool)).getpixel((0, 0)) == (255, 255, 255)
    clear = np.zeros((3, 3, 4), np.uint8)
    assert open_picture(clear).getpixel((0, 0)) == (255, 255, 255)
    assert open_picture(np.ascontiguousarray(rgb).astype(np.uint16) * 257).getpixel((0, 0)) == tuple(rgb[0, 0])


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (noise(3, 20, 30), "transpose"),
        (np.zeros((2, 20, 20, 3), np.uint8), "reshape"),
        (np.zeros((4, 4, 2), np.uint8), "expected"),
        (np.zeros((0, 4, 3), np.uint8), "nothing to see"),
        (np.zeros((4,), np.uint8), "expected"),
        (np.full((4, 4), 200.0), "0..1"),
        (np.full((4, 4), np.nan), "0..1"),
        (np.zeros((4, 4), np.int64), "uint8"),
        (np.array([["a"]]), "uint8"),
    ],
)
def test_arrays_refused(array, words):
    with pytest.raises(ImageError, match=words) as caught:
        open_picture(array)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("array: ")


def hostile():
    good = encoded(Image.fromarray(noise(200, 200)), "JPEG")
    png = encoded(Image.fromarray(noise(200, 200)))
    flipped = bytearray(png)
    flipped[len(png) // 2] ^= 0xFF
    return {
        "empty.png": b"",
        "text.png": b"this is no picture, whatever its name says\n" * 20,
        "truncated.jpg": good[: len(good) // 2],
        "truncated.png": png[: len(png) // 3],
        "flipped.png": bytes(flipped),
        "header.png": png[:20],
        "bomb.png": png_header(30000, 30000),
        "long.png": png_header(2**31 - 1, 1),
        "zero.png": png_header(0, 10),
        "short.png": png_header(500, 500),
        "program.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\nshowpage\n",
        "magic.gif": b"GIF89a",
        "magic.webp": b"RIFF\xff\xff\xff\xffWEBPVP8 ",
        "magic.tif": b"II*\0\x08\0\0\0\xff\xff" + b"\xff" * 40,
        "magic.bmp": b"BM" + b"\xff" * 60,
        "magic.ico": b"\0\0\1\0\xff\xff" + b"\xff" * 60,
    }


@pytest.mark.parametrize("name", sorted(hostile()))
def test_hostile_files(tmp_path, name):
    data = hostile()[name]
    path = tmp_path / name
    path.write_bytes(data)
    for source in (path, str(path), data):
        with pytest.raises(ImageError) as caught:
            load_picture(source, PRE)
        message = str(caught.value)
        assert "\n" not in message and len(message) < 400 and ";" in message
        assert name in message if source is not data else message.startswith("bytes: ")


def test_bomb_is_refused_before_decoding(monkeypatch):
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    for size in ((30000, 30000), (13400, 13400)):
        with pytest.raises(ImageError, match="pixels"):
            open_picture(png_header(*size))


def test_pillow_limits_become_image_errors(monkeypatch, recwarn):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    data = encoded(Image.new("RGB", (12, 12)))
    assert open_picture(data).size == (12, 12)
    assert not [w for w in recwarn if issubclass(w.category, Image.DecompressionBombWarning)]
    with pytest.raises(ImageError, match="too many pixels"):
        open_picture(encoded(Image.new("RGB", (60, 60))))


def test_wrong_sources(tmp_path):
    cases = {
        "no such file": tmp_path / "missing.png",
        "is a folder": tmp_path,
        "cannot be read": "a\0b.png",
        "give a path": 7,
    }
    for words, source in cases.items():
        with pytest.raises(ImageError, match=words):
            open_picture(source)
    with pytest.raises(ImageError, match=r"left\.png"):
        open_picture(b"", name="left.png")


def closed_images(path, data):
    """Ways to lose the file behind an image that Pillow has only opened."""
    path.write_bytes(data)
    with Image.open(path) as left:
        pass
    yield left
    closed = Image.open(path)
    closed.close()
    yield closed
    with open(path, "rb") as file:
        under = Image.open(file)
    yield under
    buffer = io.BytesIO(data)
    image = Image.open(buffer)
    buffer.close()
    yield image


@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF", "BMP", "GIF"])
def test_an_image_whose_file_was_closed_says_so(tmp_path, form):
    data = encoded(Image.fromarray(noise(40, 60)), form)
    for image in closed_images(tmp_path / "a", data):
        assert content_key(image) == b""
        with pytest.raises(ImageError, match=r"closed before its pixels were read; call load\(\)") as caught:
            open_picture(image)
        assert "\n" not in str(caught.value)
    with Image.open(tmp_path / "a") as image:
        image.load()
    assert np.array_equal(np.asarray(open_picture(image)), pixels(data))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "progressive JPEG", "TIFF", "GIF", "BMP"])
def test_a_file_that_is_cut_off_says_so(form):
    options = {"progressive": True} if " " in form else {}
    data = encoded(Image.fromarray(noise(200, 200)), form.split()[-1], **options)
    for source in (data[: len(data) // 2], Image.open(io.BytesIO(data[: len(data) // 2]))):
        with pytest.raises(ImageError, match="cut off before its end"):
            open_picture(source)


def test_several_pictures_in_a_file_show_their_first():
    first, second = Image.fromarray(noise(40, 60)), Image.fromarray(noise(30, 20))
    jpeg = encoded(first, "JPEG")
    assert np.array_equal(
        np.asarray(open_picture(encoded(first, "MPO", save_all=True, append_images=[second]))), pixels(jpeg)
    )
    pages = Image.open(io.BytesIO(encoded(first.copy(), "TIFF", save_all=True, append_images=[second.copy()])))
    assert np.array_equal(np.asarray(open_picture(pages)), np.asarray(first))
    pages.seek(1)
    assert np.array_equal(np.asarray(open_picture(pages)), np.asarray(second))


def test_deep_gray_of_every_byte_order():
    ramp = np.array([[0, 257, 32768, 65535]], np.uint16)
    for mode, order in (("I;16", "<"), ("I;16L", "<"), ("I;16B", ">")):
        image = Image.frombytes(mode, (4, 1), ramp.astype(f"{order}u2").tobytes())
        assert np.asarray(open_picture(image))[0, :, 0].tolist() == [0, 1, 128, 255], mode


def test_threads_leave_warnings_and_limits_as_they_were(monkeypatch):
    data = encoded(Image.new("RGB", (12, 12)), "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    limits = PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY, Image.MAX_IMAGE_PIXELS
    filters, inside = list(warnings.filters), threading.Barrier(8)
    load = ImageFile.ImageFile.load

    def together(image):
        if image.tile:
            inside.wait(20)
            time.sleep(random.random() / 50)  # so that they leave in another order than they came
        return load(image)

    monkeypatch.setattr(ImageFile.ImageFile, "load", together)
    threads = [threading.Thread(target=open_picture, args=(data,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert warnings.filters == filters
    assert limits == (PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY, Image.MAX_IMAGE_PIXELS)


def test_a_child_forked_while_a_thread_decodes_can_decode(monkeypatch):
    data, begun, go_on = encoded(Image.new("RGB", (12, 12))), threading.Event(), threading.Event()
    filters, load = list(warnings.filters), ImageFile.ImageFile.load

    def wait(image):
        begun.set()
        go_on.wait(20)
        return load(image)

    monkeypatch.setattr(ImageFile.ImageFile, "load", wait)
    thread = threading.Thread(target=open_picture, args=(data,))
    thread.start()
    begun.wait(20)
    child = os.fork()
    if not child:
        monkeypatch.undo()
        os._exit(not (warnings.filters == filters and open_picture(data).size == (12, 12)))
    go_on.set()
    thread.join()
    assert os.waitpid(child, 0)[1] == 0 and warnings.filters == filters


def test_odd_shapes():
    assert load_picture(Image.new("RGB", (1, 1)), PRE).rgb.shape == (56, 56, 3)
    with pytest.raises(ImageError, match="200 times"):
        load_picture(Image.new("RGB", (1, 5000)), PRE)


def test_preprocessor_layouts():
    flat = Preprocessor.from_dict({"min_pixels": 3136, "max_pixels": 12845056, "image_mean": [0.1, 0.2, 0.3]})
    nested = Preprocessor.from_dict({"image_processor": {"size": {"shortest_edge": 10, "longest_edge": 99}}})
    both = Preprocessor.from_dict({"min_pixels": 7, "size": {"shortest_edge": 10, "longest_edge": 99}})
    assert (flat.min_pixels, flat.max_pixels, flat.mean, flat.factor) == (3136, 12845056, (0.1, 0.2, 0.3), 28)
    assert (nested.min_pixels, nested.max_pixels) == (10, 99)
    assert (both.min_pixels, both.max_pixels) == (7, 99)
    default = Preprocessor.from_dict({})
    assert (default.min_pixels, default.max_pixels) == (3136, 1003520)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"min_pixels": -1}, ModelFileError),
        ({"min_pixels": "many"}, ModelFileError),
        ({"patch_size": 0}, ModelFileError),
        ({"patch_size": True}, ModelFileError),
        ({"min_pixels": 100, "max_pixels": 10}, ModelFileError),
        ({"image_std": [0, 1, 1]}, ModelFileError),
        ({"image_mean": [0.5]}, ModelFileError),
        ({"image_mean": [float("nan")] * 3}, ModelFileError),
        ({"image_mean": 5}, ModelFileError),
        ({"size": [1, 2]}, ModelFileError),
        ({"image_processor": 3}, ModelFileError),
        ({"resample": 2}, UnsupportedError),
        ({"do_normalize": False}, UnsupportedError),
        ({"rescale_factor": 1.0}, UnsupportedError),
    ],
)
def test_preprocessor_refuses(settings, error):
    with pytest.raises(error):
        Preprocessor.from_dict(settings)
    with pytest.raises(MigicianError):
        replace(PRE, min_pixels=PRE.max_pixels + 1)


def test_keys_name_content_and_settings(tmp_path):
    rgb = noise(4, 6)
    other = rgb.copy()
    other[3, 5, 2] ^= 1
    same = [rgb, rgb.copy(), np.asfortranarray(rgb), np.ascontiguousarray(rgb[:, ::-1])[:, ::-1]]
    assert len({content_key(array, 7) for array in same}) == 1
    file = encoded(Image.fromarray(rgb))
    (tmp_path / "a.png").write_bytes(file)
    assert read_source(tmp_path / "a.png") == file and read_source(str(tmp_path / "a.png")) == file
    assert content_key(file) == content_key(bytearray(file)) == content_key(memoryview(file + file)[: len(file)])
    wide = memoryview(np.repeat(np.frombuffer(file, np.uint8), 2).tobytes())[::2]
    assert content_key(wide) == content_key(file)
    gray = Image.fromarray(rgb[:, :, 0])
    different = [
        (rgb,),
        (rgb, 1),
        (rgb, 1, 2),
        (other,),
        (rgb.reshape(6, 4, 3),),
        (rgb.view(np.int8),),
        (rgb[:, :, :1],),
        (rgb[:, :, 0],),
    ]
    different += [
        (file,),
        (Image.fromarray(rgb),),
        (Image.fromarray(rgb.reshape(6, 4, 3)),),
        (gray,),
        (gray.convert("RGB"),),
    ]
    keys = [content_key(*arguments) for arguments in different]
    assert len({*keys}) == len(keys) and all(len(key) == 32 for key in keys)


def test_what_must_be_read_first_has_no_key():
    picture = Image.fromarray(noise(4, 6))
    seen_through, turned = picture.copy(), picture.copy()
    seen_through.info["transparency"] = (1, 2, 3)
    turned.getexif()[0x0112] = 6
    damaged = Image.open(io.BytesIO(encoded(Image.fromarray(noise(40, 60)))[:200]))
    strange = ["a.png", picture.convert("P"), picture.convert("RGBA"), seen_through, turned, damaged]
    strange += [np.array([object()]), np.array(["a"]), None, 3]
    assert all(content_key(source) == b"" for source in strange)
    with pytest.raises(ImageError, match=r"nowhere\.png: no such file"):
        read_source("nowhere.png")
