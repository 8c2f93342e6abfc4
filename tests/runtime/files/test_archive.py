"""Files inside zip files: whatever wrote the archive, the content is what went into it."""

import io
import os
import random
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
from PIL import Image
from zips import volumes, written

from migician.runtime.errors import ImageError
from migician.runtime.files import archive as module
from migician.runtime.files.archive import Archive, is_file, open_archive, open_file, read_bytes
from migician.runtime.image import open_picture

LONG = "home/me/data/MGrounding-630k/Common_Object"


def noise(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


FILES = {
    f"{LONG}/a.bin": noise(70_000),
    f"{LONG}/b/text.txt": b"the same again, " * 20_000,
    f"{LONG}/empty": b"",
    f"{LONG}/b/\u732b.jpg": noise(10, 1),
    f"{LONG}/one": b"1",
}


@pytest.fixture(
    params=["deflated", "stored", "behind something", "with a comment", "volumes", "tiny volumes", "zip -s"]
)
def archive(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "pictures.zip"
    if request.param == "zip -s":
        if not shutil.which("zip"):
            pytest.skip("zip is not installed")
        for name, content in FILES.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(content)
        subprocess.run(["zip", "-q", "-r", "-s", "64k", path, "home"], cwd=tmp_path, check=True)
        assert path.with_suffix(".z01").exists()
    elif "volumes" in request.param:
        volumes(path, FILES, 97 if "tiny" in request.param else 40_000)
    else:
        written(path, FILES, method=zipfile.ZIP_STORED if request.param == "stored" else zipfile.ZIP_DEFLATED)
        if request.param == "behind something":
            path.write_bytes(b"#!/bin/sh\n" * 1000 + path.read_bytes())
        elif request.param == "with a comment":
            with zipfile.ZipFile(path, "a") as file:
                file.comment = b"PK\5\6" + noise(5000)
    return path


def test_members_are_read(archive: Path) -> None:
    opened = open_archive(archive)
    assert opened.prefix == tuple(LONG.split("/"))
    for name, content in FILES.items():
        assert is_file(archive / name) and read_bytes(archive / name) == content
        with open_file(archive / name) as file:
            assert file.read(5) == content[:5]
            assert file.seek(0, os.SEEK_END) == len(content)
            file.seek(max(0, len(content) - 3))
            assert file.read() == content[-3:]
    assert not is_file(archive / LONG) and not is_file(archive / LONG / "none") and not is_file(archive / "a.bin")
    assert open_archive(archive) is opened


def test_many_members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LIST", 300_000)  # the list is read in a dozen pieces
    path = tmp_path / "many.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(66_000):
            archive.writestr(f"p/{i}", b"")
        with archive.open("p/wide", "w", force_zip64=True) as file:
            file.write(b"wide")
    assert read_bytes(path / "p" / "wide") == b"wide" and is_file(path / "p/65999") and not is_file(path / "p/66000")


def test_an_archive_without_members(tmp_path: Path) -> None:
    path = written(tmp_path / "p.zip", {})
    assert open_archive(path).prefix == () and not is_file(path / "a")


def test_a_picture_in_an_archive(tmp_path: Path, picture: Path) -> None:
    path = written(tmp_path / "P.ZIP", {"dir/noise.png": picture.read_bytes()})
    assert open_picture(path / "dir" / "noise.png").tobytes() == open_picture(picture).tobytes()
    assert open_picture(str(path / "dir" / "noise.png")).size == (90, 60)
    with open_file(path / "dir/noise.png") as file, Image.open(file) as image:
        assert image.size == (90, 60)


def test_only_what_is_asked_for_is_decompressed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "big.zip", {"big": noise(5 << 20)})
    archive, taken = open_archive(path), []
    real = archive._read
    monkeypatch.setattr(archive, "_read", lambda start, size: taken.append(size) or real(start, size))
    with open_file(path / "big") as file:
        assert file.read(100) == noise(5 << 20)[:100]
    assert sum(taken) < 400_000


def refused(path: Path) -> str:
    with pytest.raises(ImageError) as caught:
        read_bytes(path)
    message = str(caught.value)
    assert "; " in message and message.isprintable()
    with pytest.raises(ImageError) as caught:
        open_picture(path)
    assert message in str(caught.value)
    return message


def test_what_is_not_there(tmp_path: Path) -> None:
    path = written(tmp_path / "p.zip", FILES)
    assert "there is no x/y.png in p.zip" in refused(path / "x/y.png")
    (tmp_path / "file").write_text("")
    for wrong in (tmp_path / "file" / "x.png", tmp_path / "none.zip" / "x.png"):
        with pytest.raises(OSError):
            read_bytes(wrong)
        assert not is_file(wrong)
        with pytest.raises(ImageError, match="; "):
            open_picture(wrong)


@pytest.mark.parametrize("gone", ["z01", "z02"])
def test_a_missing_volume(tmp_path: Path, gone: str) -> None:
    path = volumes(tmp_path / "p.zip", FILES, 20_000)
    path.with_suffix(f".{gone}").unlink()
    assert "volumes" in refused(path / LONG / "a.bin")
    assert not is_file(path / LONG / "a.bin")


def test_kinds_that_are_not_read(tmp_path: Path) -> None:
    assert "method 12" in refused(written(tmp_path / "b.zip", {"a": b"a"}, zipfile.ZIP_BZIP2) / "a")
    path = written(tmp_path / "p.zip", {"a": b"a"})
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\1\2") + 8] |= 1
    path.write_bytes(data)
    assert "encrypted" in refused(path / "a")


def test_a_file_that_claims_to_be_huge(tmp_path: Path) -> None:
    path = written(tmp_path / "p.zip", {"a": b"a" * 5000})
    data = bytearray(path.read_bytes())
    at = data.index(b"PK\1\2") + 24
    for size, said in ((3 << 30, "no picture"), (4999, "no sound zip"), (5001, "no sound zip")):
        data[at : at + 4] = size.to_bytes(4, "little")
        path.write_bytes(data)
        assert said in refused(path / "a")


@pytest.mark.parametrize("seed", range(3))
def test_damaged_archives_are_one_line(tmp_path: Path, seed: int) -> None:
    """Whatever byte is wrong: the right content, or an ImageError; never another exception, never other content."""
    rng = random.Random(seed)
    small = {"d/a": noise(300), "d/b": b"words " * 50}
    path = tmp_path / "p.zip"
    volumes(path, small, 10_000) if seed == 2 else written(path, small)
    sound = path.read_bytes()
    for _ in range(400):
        data = bytearray(sound)
        for _ in range(rng.choice((1, 1, 3))):
            data[rng.randrange(len(data))] = rng.randrange(256)
        if rng.random() < 0.2:
            del data[rng.randrange(len(data)) :]
        for name, content in small.items():
            path.write_bytes(data)
            try:
                assert Archive(path).open(name).read() == content
            except ImageError as error:
                assert "; " in str(error)


def test_archives_are_closed_with_the_last_reference(tmp_path: Path) -> None:
    path = written(tmp_path / "p.zip", {"a": b"a"})
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        assert Archive(path).open("a").read() == b"a"
    assert len(os.listdir("/proc/self/fd")) <= before + 1
    assert isinstance(open_file(path / "a"), io.BufferedReader)
