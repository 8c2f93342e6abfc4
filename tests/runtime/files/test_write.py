"""Files and folders that are whole or not there: failures of every kind, two writers, rights, links, devices."""

import errno
import os
import resource
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from migician.runtime.errors import MigicianError, ModelFileError
from migician.runtime.files.write import check_new_folder, remove_leftovers, whole_file, whole_folder


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_a_file_has_its_name_only_once_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with whole_file(path) as file:
        file.write(b"-new")
        file.flush()
        assert path.read_bytes() == b"old"
        file.seek(0)
        file.write(b"+")
    assert path.read_bytes() == b"+new" and names(tmp_path) == ["a.bin"]


def test_a_folder_has_its_name_only_once_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    with whole_folder(path, parents=True) as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "file").write_text("x")
        (folder / "link").symlink_to("nowhere")
        assert not path.exists() and folder.parent == path.parent
    assert names(tmp_path) == ["a", "a/b", "a/b/deep", "a/b/deep/file", "a/b/link"]
    (tmp_path / "empty").mkdir()
    with whole_folder(tmp_path / "empty") as folder:
        (folder / "file").touch()
    assert names(tmp_path / "empty") == ["file"]


FAILURES = [KeyboardInterrupt(), MemoryError(), ValueError("mine"), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))]


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
def test_after_a_failure_nothing_is_left_and_what_was_there_stays(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    (tmp_path / "empty").mkdir()
    wanted = ModelFileError if isinstance(error, OSError) else type(error)
    with pytest.raises(wanted), whole_file(path) as file:
        file.write(b"new")
        raise error
    for folder in ("made/for/it", "empty"):
        with pytest.raises(wanted), whole_folder(tmp_path / folder, parents=True) as partial:
            (partial / "file").write_bytes(b"new")
            raise error
    assert names(tmp_path) == ["a.bin", "empty"] and path.read_bytes() == b"old"


def test_one_line_names_the_path_the_reason_and_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "no" / "x", tmp_path / "file" / "x", tmp_path, Path("/"), tmp_path / ("n" * 300)):
        with pytest.raises(ModelFileError) as caught, whole_file(path, advice="try again"):
            pass
        text = str(caught.value)
        assert text.startswith(f"{path}: cannot be written (") and text.endswith(("; try again", "another place"))
    with pytest.raises(ModelFileError, match="cannot be written"), whole_folder(tmp_path / "no" / "x"):
        pass
    with pytest.raises(ModelFileError, match="cannot be written"), whole_folder(tmp_path / "file" / "x", parents=True):
        pass
    assert names(tmp_path) == ["file"]


def test_what_stands_in_the_way_of_a_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "full")
    before = names(tmp_path)
    for name, word in (("full", "not empty"), ("file", "in the way"), ("link", "in the way")):
        with pytest.raises(ModelFileError, match=word):
            check_new_folder(tmp_path / name)
        with pytest.raises(ModelFileError, match=word), whole_folder(tmp_path / name):
            pytest.fail("the block must not begin")
    assert names(tmp_path) == before


def test_an_error_about_another_file_passes_as_it_is(tmp_path: Path) -> None:
    for error in (
        FileNotFoundError(errno.ENOENT, "gone", str(tmp_path / "other")),
        BrokenPipeError(errno.EPIPE, "no reader"),
        OSError("truncated picture"),
    ):
        with pytest.raises(type(error)) as caught, whole_file(tmp_path / "a"):
            raise error
        assert caught.value is error
        with pytest.raises(type(error)) as caught, whole_folder(tmp_path / "b"):
            raise error
        assert caught.value is error
    assert names(tmp_path) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_devices_are_written_to_and_not_replaced(tmp_path: Path) -> None:
    with whole_file("/dev/null") as file:
        file.write(b"x")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    with pytest.raises(ModelFileError, match="/dev/full: cannot be written"), whole_file("/dev/full") as file:
        file.write(b"x")
    read, write = os.pipe()
    with whole_file(f"/dev/fd/{write}") as file:
        file.write(b"through a pipe")
    assert os.read(read, 100) == b"through a pipe"
    os.close(read)
    os.close(write)


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk/file")
    for text in (b"first", b"second"):
        with whole_file(tmp_path / "link") as file:
            file.write(text)
        assert (tmp_path / "disk" / "file").read_bytes() == text
    assert (tmp_path / "link").is_symlink() and names(tmp_path) == ["disk", "disk/file", "link"]


def test_rights_are_those_that_the_umask_leaves(tmp_path: Path, umask: None) -> None:
    with whole_file(tmp_path / "file"):
        pass
    with whole_folder(tmp_path / "folder"):
        pass
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o750


def test_long_names_have_room_for_the_temporary_one(tmp_path: Path) -> None:
    for name in ("n" * 255, "名" * 85):
        with whole_file(tmp_path / name) as file:
            file.write(b"x")
        assert (tmp_path / name).read_bytes() == b"x"


def test_two_writers_of_one_name_do_not_meet(tmp_path: Path) -> None:
    path, contents = tmp_path / "file", [bytes([i]) * 100_000 for i in range(8)]
    ready = threading.Barrier(len(contents))

    def work(content: bytes) -> None:
        with whole_file(path) as file:
            file.write(content[:50_000])
            ready.wait()
            file.write(content[50_000:])

    threads = [threading.Thread(target=work, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() in contents and names(tmp_path) == ["file"]


def test_the_second_writer_of_a_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="cannot be written"), whole_folder(tmp_path / "f") as late:
        (late / "file").write_text("late")
        with whole_folder(tmp_path / "f") as first:
            (first / "file").write_text("first")
    assert (tmp_path / "f" / "file").read_text() == "first" and names(tmp_path) == ["f", "f/file"]


def test_what_is_synced_before_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def note(descriptor: int) -> None:
        found = os.readlink(f"/proc/self/fd/{descriptor}")
        synced.append(f"{os.path.basename(found)[:5]}{' named' if (tmp_path / 'final').exists() else ''}")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    with whole_folder(tmp_path / "final") as folder:
        (folder / "one").touch()
        (folder / "two").touch()
    assert sorted(synced[:-1]) == [".fina", "one", "two"] and synced[-1] == f"{tmp_path.name[:5]} named"


KILLED = """
import os, signal, sys
from migician.runtime.files.write import whole_file
with whole_file(sys.argv[1]) as file:
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_kill_leaves_is_hidden_and_can_be_swept(tmp_path: Path) -> None:
    run = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "file"], check=False)
    assert run.returncode == -signal.SIGKILL
    (left,) = names(tmp_path)
    assert left.startswith(".file.") and left.endswith(".tmp")
    for other in (".mine.tmp", "mine.0123456789abcdef.tmp", ".mine.0123456789abcdef.tmpl"):
        (tmp_path / other).touch()
    remove_leftovers(tmp_path)
    assert left not in names(tmp_path) and len(names(tmp_path)) == 3


def test_a_full_disk_in_the_middle_of_a_file(tmp_path: Path) -> None:
    code = f"""
from migician.runtime.files.write import whole_file
with whole_file({str(tmp_path / "file")!r}) as file:
    file.write(bytes(100_000))
"""
    run = subprocess.run(
        [sys.executable, "-c", code],
        preexec_fn=lambda: (
            resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, 5_000)),
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN),
        ),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    last = run.stderr.splitlines()[-1]
    assert last.endswith("free some space or choose another place") and "cannot be written (File too large)" in last
    assert names(tmp_path) == []


def test_an_error_of_the_tree_passes(tmp_path: Path) -> None:
    with pytest.raises(MigicianError, match="mine; do this"), whole_folder(tmp_path / "x"):
        raise MigicianError("mine; do this")
    assert names(tmp_path) == []
