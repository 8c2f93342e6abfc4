"""Where pictures come from: URLs, pipes, standard input, open files, one picture for a list; what is said of each."""

import base64
import io
import os
import shlex
import subprocess
import sys
import threading
import urllib.parse
import zipfile
from collections import deque
from pathlib import Path

import numpy as np
import pytest
from pictures import encoded, noise, pixels
from PIL import Image, ImageSequence
from test_run import assert_one_line, run, short

from migician import load
from migician.runtime import sources
from migician.runtime.cache import PictureCache
from migician.runtime.errors import ImageError
from migician.runtime.files.config import Preprocessor
from migician.runtime.image import content_key, open_picture
from migician.runtime.sources import as_list, file_name, picture_name, read_source

PRE = Preprocessor(min_pixels=56 * 56, max_pixels=28 * 28 * 300)
RGB = Image.fromarray(noise(40, 60))
PNG, JPEG = encoded(RGB), encoded(RGB, "JPEG")
QUESTION = "Where is the cup?"


def refused(source, *words):
    """The one line that a source is refused with."""
    with pytest.raises(ImageError) as caught:
        open_picture(source)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400, message
    for word in words:
        assert word in message, message
    return message


def test_data_urls_are_opened():
    text = base64.b64encode(PNG).decode()
    folded = "\r\n  ".join(text[i : i + 76] for i in range(0, len(text), 76))
    urls = [
        f"data:image/png;base64,{text}",
        f"data:;base64,{text}",
        f"DATA:image/PNG;charset=utf-8;BASE64,{text}",
        f"data:image/jpeg;base64,{text}",  # the content tells what it is
        f" data:image/png;base64,{folded}\n",
        f"data:image/png; base64 ,{text.rstrip('=')}",
        "data:image/png;base64," + text.translate(str.maketrans("+/", "-_")),
        "data:image/png;base64," + urllib.parse.quote(text, safe=""),
        "data:image/png," + urllib.parse.quote(PNG),
        "data:," + "".join(f"%{byte:02X}" for byte in PNG),
    ]
    for url in urls:
        assert read_source(url) == PNG, url[:60]
        assert np.array_equal(np.asarray(open_picture(url)), pixels(PNG)), url[:60]


def test_data_urls_are_refused_in_one_short_line():
    text = base64.b64encode(noise(100, 100).tobytes()).decode()
    refused("data:image/png;base64", "comma")
    refused("data:image/png;base64,", "no bytes")
    refused("data:,", "no bytes")
    refused("data:image/png;base64,!!!!", "damaged")
    refused(f"data:image/png;base64,{text[:-3]}", "cut off")
    refused("data:image/png,täxt", "ASCII")
    refused(f"data:image/png,{base64.b64encode(PNG).decode()}", "base64")
    message = refused(f"data:image/png;base64,{text}", "not an image file", "40,022 characters")
    assert len(message) < 200 and text[:60] not in message


def test_a_data_url_is_found_in_the_cache_by_its_bytes():
    cache = PictureCache(1 << 20)
    text = base64.b64encode(PNG).decode()
    first = cache.read(f"data:image/png;base64,{text}", PRE, None)
    for same in (f"data:;base64,{text}", "data:," + urllib.parse.quote(PNG), PNG, bytearray(PNG), io.BytesIO(PNG)):
        assert cache.read(same, PRE, None) is first
    assert cache.read(f"data:image/jpeg;base64,{base64.b64encode(JPEG).decode()}", PRE, None) is not first


def test_file_urls_are_opened(tmp_path):
    for name in ("plain.png", "two words.png", "图片 杯子.png", "50% #1?.png", "a+b&c.png"):
        path = tmp_path / name
        path.write_bytes(PNG)
        quoted = urllib.parse.quote(str(path))
        for url in (
            path.as_uri(),
            f"file://{quoted}",
            f"file://localhost{quoted}",
            f"FILE:{quoted}",
            f"file://127.0.0.1{quoted}",
        ):
            assert read_source(url) == PNG, url
    raw = tmp_path / "图片.png"
    raw.write_bytes(PNG)
    assert read_source(f"file://{raw}") == PNG
    undecodable = os.fsdecode(bytes(tmp_path) + b"/\xff.png")
    Path(undecodable).write_bytes(PNG)
    assert read_source(f"file://{urllib.parse.quote(os.fsencode(undecodable))}") == PNG
    refused((tmp_path / "none.png").as_uri(), "no such file")
    refused(tmp_path.as_uri(), "is a folder")
    refused("file://server/share/a.png", "'server'", "file:///PATH")
    refused("file:///a%00b.png", "cannot be read")


@pytest.mark.parametrize(
    ("url", "command"),
    [
        ("https://example.org/a/cup.jpg", "curl -fLo cup.jpg https://example.org/a/cup.jpg"),
        ("HTTP://example.org/", "curl -fLo picture.jpg HTTP://example.org/"),
        ("https://example.org/a.png?x=1&y='", "curl -fLo a.png "),
        ("https://[::1/a.png", "curl -fLo"),
        ("s3://bucket/a.png", "aws s3 cp s3://bucket/a.png a.png"),
        ("gs://bucket/a.png", "gcloud storage cp gs://bucket/a.png a.png"),
        ("rtsp://camera/1", "ffmpeg -i rtsp://camera/1 -frames:v 1 picture.jpg"),
        ("hdfs://host/a.png", "copy the picture to a file"),
    ],
)
def test_what_lies_on_a_network_is_refused_with_the_command(url, command):
    message = refused(url, "no network connections", command)
    if "curl" in command and len(url) < 60:
        words = shlex.split(message.partition("fetch it first: ")[2])
        assert words[0] == "curl" and words[3:] == [url]  # what a shell would hand over
    refused(f" {url}\n", "no network connections")


def test_a_long_url_is_cut():
    url = "https://example.org/picture.png?token=" + "SECRET" * 5000
    message = refused(url, "curl -fLo picture.png URL")
    assert message.count("SECRET") < 20
    assert len(picture_name(url)) <= 80 and len(file_name(url)) <= 80
    refused("blob:https://example.org/7", "browser")


def test_a_url_in_a_path_says_so(tmp_path, monkeypatch):
    refused(Path("https://example.org/a.png"), "loses a slash")
    odd = tmp_path / "data:,x.png"  # a Path is a path
    odd.write_bytes(PNG)
    assert read_source(odd) == PNG
    monkeypatch.chdir(tmp_path)
    Path("photo:1.png").write_bytes(PNG)  # no scheme that anybody knows
    assert read_source("photo:1.png") == read_source("./data:,x.png") == PNG


def test_what_is_no_path_says_so(tmp_path):
    refused(base64.b64encode(PNG).decode(), "base64.b64decode")
    refused(base64.b64encode(JPEG).decode() * 50, "base64.b64decode")
    refused("-", "standard input")
    refused("", "''", "no such file")
    refused("x" * 5000, "File name too long")
    (tmp_path / "loop").symlink_to("loop")
    refused(tmp_path / "loop", "cannot be read")
    (tmp_path / "a.png").write_bytes(PNG)
    refused(tmp_path / "a.png" / "b.png", "cannot be read")
    refused("/dev/zero", "is a device")
    refused("/dev/null", "is a device")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_forbidden_file(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(PNG)
    path.chmod(0)
    refused(path, "Permission denied")


def test_paths_of_every_kind(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(PNG)

    class Bytes:
        def __fspath__(self):
            return os.fsencode(path)

    class Wrong:
        def __fspath__(self):
            return 7

    class Mine(type(path)):
        pass

    for source in (path, str(path), Bytes(), Mine(path)):
        assert read_source(source) == PNG and picture_name(source) == sources._cut(str(path))
    refused(Wrong(), "Wrong", "__fspath__")


def test_names_are_one_short_line(tmp_path):
    path = tmp_path / "two\nlines\x1b[31m\t\u202e.png"
    path.write_bytes(b"junk")
    message = refused(path, "two\\nlines\\x1b[31m\\t\\u202e.png")
    assert message.isprintable()
    deep = str(tmp_path / "/".join(["folder"] * 60) / "cup.png")
    assert len(picture_name(deep)) == 80 and picture_name(deep).endswith("/cup.png")
    assert file_name(deep) == "cup.png" and file_name("data:image/png;base64,a/b") == "data:image/png;base64,a/b"
    assert picture_name("\udcff.png") == "\\udcff.png"


def test_a_pipe_is_read_to_its_end_or_given_up(tmp_path, monkeypatch):
    path = tmp_path / "pipe"
    os.mkfifo(path)

    def write():
        with open(path, "wb") as pipe:
            for i in range(0, len(PNG), 1000):
                pipe.write(PNG[i : i + 1000])
                pipe.flush()

    writer = threading.Timer(0.3, write)
    writer.start()
    assert read_source(path) == PNG
    writer.join()
    monkeypatch.setattr(sources, "PIPE_PATIENCE_MS", 200)
    refused(path, "is a pipe", "check who writes")


def test_a_file_too_large_for_a_picture_is_not_read(tmp_path):
    path = tmp_path / "model.safetensors"
    with open(path, "wb") as file:
        file.truncate(5 << 30)  # of no blocks
    refused(path, "2 GiB")


def test_open_files_are_read_from_their_beginning(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(PNG)
    buffer = io.BytesIO()
    RGB.save(buffer, "PNG")  # stands at its end
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("in/a.png", PNG)
    with zipfile.ZipFile(tmp_path / "a.zip") as archive, open(path, "rb") as file, archive.open("in/a.png") as member:
        for source in (buffer, buffer, file, file, member, zipfile.Path(archive, "in/a.png")):
            assert np.array_equal(np.asarray(open_picture(source)), pixels(PNG))
        assert picture_name(file) == sources._cut(str(path)) and picture_name(buffer) == "BytesIO"
    refused(file, "closed")
    with open(path, encoding="latin-1") as text:
        refused(text, "'rb'")
    refused(io.StringIO("x"), "'rb'")

    class Upload:
        async def read(self):
            return PNG

    refused(Upload(), "coroutine")


def test_one_picture_is_a_list_of_one(tmp_path):
    array = np.asarray(RGB)
    for one in (
        array,
        array[..., 0],
        RGB,
        "a.png",
        Path("a.png"),
        PNG,
        bytearray(PNG),
        memoryview(PNG),
        io.BytesIO(PNG),
    ):
        (got,) = as_list(one)
        assert got is one
    stack = noise(10, 12).reshape(1, 10, 12, 3).repeat(4, 0)
    assert [picture.shape for picture in as_list(stack)] == [(10, 12, 3)] * 4
    assert as_list(stack[:0]) == as_list([]) == as_list(()) == as_list(iter(())) == []
    names = ["a.png", "b.png"]
    many = (names, tuple(names), (n for n in names), deque(names), dict.fromkeys(names).keys(), np.array(names))
    for several in (*many, np.array(names, object), map(str, names)):
        assert list(as_list(several)) == names
    mixed = np.empty(2, object)
    mixed[0], mixed[1] = array, "b.png"
    assert as_list(mixed)[0] is array and as_list(np.array("a.png")) == ["a.png"]


def test_frames_of_an_animation_stay_apart():
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "lime", "blue")]
    image = Image.open(io.BytesIO(encoded(frames[0], "PNG", save_all=True, append_images=frames[1:])))
    got = [open_picture(frame).getpixel((4, 4)) for frame in as_list(ImageSequence.Iterator(image))]
    assert got == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]


class Tensor:
    """What a tensor of another library looks like."""

    def __array__(self):
        return np.zeros((3, 4, 4))


@pytest.mark.parametrize("wrong", [None, 5, 1.5, True, {"a": 1}, {"a.png"}, object(), len, Tensor()])
def test_what_is_no_list_of_pictures_is_refused(wrong):
    with pytest.raises(ImageError, match=r"^images is .*; |^images is a Tensor: .*asarray") as caught:
        as_list(wrong)
    assert "\n" not in str(caught.value)


def test_a_torch_tensor_is_told_what_to_do():
    torch = pytest.importorskip("torch")
    for tensor in (torch.zeros(3, 4, 4), torch.zeros(2, 3, 4, 4)):
        with pytest.raises(ImageError, match=r"images is a Tensor: .*permute\(1, 2, 0\)"):
            as_list(tensor)
    refused(torch.zeros(3, 4, 4), "Tensor", "permute(1, 2, 0)")
    refused(Tensor(), "asarray")
    refused([1, 2], "list: not a picture")
    refused(None, "NoneType: not a picture")


def test_a_model_takes_one_picture_as_a_list_of_one(tiny, picture):
    with load(tiny, threads=1) as model:
        want = model.ground([str(picture)], QUESTION, max_new_tokens=6)
        array = np.asarray(Image.open(picture))
        ways = [
            str(picture),
            picture,
            picture.read_bytes(),
            array,
            Image.open(picture),
            io.BytesIO(picture.read_bytes()),
            array[None],
        ]
        ways += [iter([array]), picture.as_uri(), np.array([str(picture)])]
        for way in ways:
            got = model.ground(way, QUESTION, max_new_tokens=6)
            assert (got.text, got.prompt_tokens) == (want.text, want.prompt_tokens)
        assert model.chat(array).ask(QUESTION, max_new_tokens=6).text == want.text
        assert np.array_equal(model.logprobs(array, QUESTION, "cup"), model.logprobs([array], QUESTION, "cup"))
        for wrong in (None, 5, {"a": array}):
            with pytest.raises(ImageError, match=r"^images is "):
                model.ground(wrong, QUESTION)
        with pytest.raises(ImageError, match=r"^images\[1\]: array: "):
            model.ground([array, array.astype(np.int64)], QUESTION)
        with pytest.raises(ImageError, match=r"^none\.png: no such file"):
            model.ground([array, "none.png"], QUESTION)


def test_pixels_in_memory_of_every_kind():
    rgb = np.asarray(RGB)
    frozen = np.frombuffer(rgb.tobytes(), np.uint8).reshape(rgb.shape)
    same = [frozen, memoryview(rgb), np.asfortranarray(rgb), rgb.astype(">u2") * 257, rgb.astype("<u2") * 257]
    same += [(rgb / 255).astype(">f4"), (rgb / 255).astype(np.longdouble), rgb[::-1][::-1]]
    for source in same:
        assert np.array_equal(np.asarray(open_picture(source)), rgb)
    wide = memoryview(np.zeros((2, 8, 3), np.uint8)), memoryview(np.zeros((8, 2, 3), np.uint8))
    assert content_key(read_source(wide[0])) != content_key(read_source(wide[1]))
    refused(np.full((4, 4, 3), np.nan), "NaN")
    refused(np.full((4, 4, 3), np.inf), "infinity")
    refused(np.zeros((4, 4, 3), complex), "complex")
    refused(rgb.astype(object), "object")
    refused(np.broadcast_to(np.uint8(0), (20000, 20000, 3)), "pixels")


# migician-run


def with_stdin(content: bytes, *words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "migician.runtime.run", *map(str, words)]
    done = subprocess.run(command, input=content, capture_output=True, timeout=120)
    return subprocess.CompletedProcess(command, done.returncode, done.stdout.decode(), done.stderr.decode())


def test_a_picture_may_come_from_stdin(tiny: Path, picture: Path, tmp_path: Path) -> None:
    words = (QUESTION, "--model", tiny, "--max-new-tokens", 6, "--threads", 1, "--draw", tmp_path / "sheet.png")
    want = short(tiny, picture, picture, QUESTION)
    done = with_stdin(picture.read_bytes(), picture, "-", *words)
    assert (done.returncode, done.stdout) == (0, want.stdout), done.stderr
    assert (tmp_path / "sheet.png").is_file()
    assert_one_line(with_stdin(b"", "-", *words), "standard input", "empty")
    assert_one_line(with_stdin(b"%PDF-1.4", "-", *words), "standard input", "pdftoppm")


def test_stdin_is_read_once(picture: Path) -> None:
    for words in (("-", "-"), ("-", "-", QUESTION), ("-", picture, "-")):
        done = run(*words)
        assert (done.returncode, done.stdout) == (2, "") and "standard input" in done.stderr


def test_urls_and_pipes_on_the_command_line(tiny: Path, picture: Path, tmp_path: Path) -> None:
    want = short(tiny, picture, picture, picture, QUESTION).stdout
    url = "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes(picture.read_bytes()))
    writer.start()
    done = short(tiny, picture.as_uri(), url, pipe, QUESTION, "--draw", tmp_path / "sheet.png")
    writer.join()
    assert (done.returncode, done.stdout) == (0, want), done.stderr
    assert_one_line(short(tiny, "https://example.org/a.png", QUESTION), "curl -fLo a.png https://example.org/a.png")
