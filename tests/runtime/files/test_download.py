"""Models that are not in the cache come from a hub: a small one on loopback, on good days and bad ones."""

import errno
import hashlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from checkpoints import make_checkpoint
from small_hub import TOKEN, SmallHub

import migician
from migician.runtime.errors import MigicianError, ModelFileError, UnsupportedError
from migician.runtime.files import download
from migician.runtime.files.hub import peek
from migician.runtime.files.open import open_checkpoint

pytestmark = pytest.mark.slow

huggingface_hub = pytest.importorskip("huggingface_hub")

NAME = "Org/Tiny-VL"
SHARD = "model-00002-of-00003.safetensors"
EXTRA = {
    "README.md": b"# words",
    "README.txt": b"words",
    "pytorch_model.bin": b"p" * 2000,
    "pytorch_model.bin.index.json": b"{}",
    "model.gguf": b"g" * 2000,
    "consolidated.safetensors": b"c" * 2000,
    "training_args.bin": b"t",
    "onnx/model.onnx": b"o" * 2000,
    "original/config.json": b"{}",
    ".gitattributes": b"*",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("download") / "model", shards=3)


@pytest.fixture(scope="module")
def files(model: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in model.iterdir()}


@pytest.fixture(autouse=True)
def without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "_PAUSES_S", (0.01,) * 4)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Where the cache keeps the model."""
    return tmp_path / "home" / "hub" / "models--Org--Tiny-VL"


def tensors(source: str | Path) -> dict[str, bytes]:
    with open_checkpoint(source) as checkpoint:
        return {name: tensor.data.tobytes() for name, tensor in checkpoint.tensors.items()}


def refused(word: str = NAME, kind: type[MigicianError] = ModelFileError) -> str:
    with pytest.raises(MigicianError) as caught:
        open_checkpoint(word)
    message = str(caught.value)
    assert type(caught.value) is kind, message
    assert message.isprintable() and "; " in message and len(message) < 500, message
    return message


def whole(root: Path, files: dict[str, bytes]) -> list[str]:
    """The names under which a snapshot has files; fails where one of them is not what the hub has."""
    found = []
    for path in sorted(root.glob("snapshots/*/*")):
        assert path.read_bytes() == files[path.name], path
        found.append(path.name)
    assert sorted(path.name for path in root.glob("blobs/*") if path.suffix != ".incomplete") == sorted(
        path.resolve().name for path in root.glob("snapshots/*/*")
    )
    return found


def run(hub: SmallHub, tmp_path: Path, *words: str, **variables: str) -> "subprocess.Popen[bytes]":
    """migician-run in a process of its own."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment |= hub.environment(tmp_path / "home", **variables)
    command = [sys.executable, "-m", "migician.runtime.run", "--model", NAME, "--max-new-tokens", "4", *words]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path)


# ---- good days
@pytest.mark.slow
def test_a_sharded_model_downloads_and_answers(
    hub: SmallHub, tmp_path: Path, root: Path, model: Path, files: dict[str, bytes]
) -> None:
    commit = hub.add(NAME, {**files, **EXTRA})
    with run(hub, tmp_path, "--json", "--stats", "What is this?") as process:
        out, err = process.communicate()
    assert process.returncode == 0, err
    answer = json.loads(out)
    with migician.load(model) as local:
        assert answer["text"] == local.ground([], "What is this?", max_new_tokens=4).text
    assert answer["model"] == NAME
    lines = err.decode().splitlines()
    assert lines[0].startswith(f"downloading {NAME} ({commit[:12]}): 3 files, ") and "\r" not in err.decode()
    assert lines[1].startswith(f"downloaded {NAME} ({commit[:12]}): ")
    assert lines[2].startswith(f"model {NAME} (revision {commit})")
    assert whole(root, files) == sorted(files)
    assert (root / "refs" / "main").read_text() == commit
    hub.requests.clear()
    with run(hub, tmp_path, "What is this?") as process:
        out, err = process.communicate()
    assert out.decode() == answer["text"] + "\n" and b"download" not in err and not hub.requests


def test_what_was_downloaded_is_the_librarys_cache(hub: SmallHub, model: Path, files: dict[str, bytes]) -> None:
    commit = hub.add(NAME, files)
    assert tensors(NAME) == tensors(model)
    hub.requests.clear()
    folder = huggingface_hub.snapshot_download(NAME, local_files_only=True)
    for name, content in files.items():
        assert Path(huggingface_hub.hf_hub_download(NAME, name, local_files_only=True)).read_bytes() == content
    found = huggingface_hub.scan_cache_dir()
    assert not found.warnings
    (repo,) = found.repos
    (revision,) = repo.revisions
    assert (repo.repo_id, revision.commit_hash, revision.refs) == (NAME, commit, frozenset({"main"}))
    assert str(revision.snapshot_path) == folder
    assert revision.size_on_disk == sum(map(len, files.values()))
    assert not hub.requests


def test_what_the_library_downloaded_is_taken(hub: SmallHub, model: Path, files: dict[str, bytes]) -> None:
    commit = hub.add(NAME, files, "v1")
    assert huggingface_hub.snapshot_download(NAME, revision="v1").endswith(commit)
    hub.requests.clear()
    assert tensors(NAME) == tensors(f"{NAME}@v1") == tensors(model)
    assert not hub.requests


def test_one_file_of_weights(hub: SmallHub, tmp_path: Path, root: Path) -> None:
    single = make_checkpoint(tmp_path / "single")
    hub.add(NAME, single)
    assert tensors(NAME) == tensors(single)
    assert (root / "refs" / "main").exists()


@pytest.mark.parametrize("revision", ["v1.0", "feature/x", "refs/pr/3", "main", "commit", "short"])
def test_revisions(hub: SmallHub, root: Path, tmp_path: Path, files: dict[str, bytes], revision: str) -> None:
    other = make_checkpoint(tmp_path / "other", shards=2, seed=1)
    wanted = hub.add(NAME, files, "v1.0", "feature/x", "refs/pr/3")
    newest = hub.add(NAME, other)
    word = {"commit": wanted, "short": wanted[:7]}.get(revision, revision)
    with open_checkpoint(f"{NAME}@{word}") as checkpoint:
        assert checkpoint.name == f"{NAME}@{word}"
    (snapshot,) = root.glob("snapshots/*")
    assert snapshot.name == (newest if revision == "main" else wanted)
    assert (root / "refs" / word).exists() is (revision != "commit")
    hub.requests.clear()
    open_checkpoint(f"{NAME}@{word}").close()
    assert not hub.requests
    open_checkpoint(f"{NAME}@main").close()
    assert bool(hub.requests) is (revision != "main")


def test_a_copy_that_another_tool_began_is_completed(
    hub: SmallHub, root: Path, model: Path, files: dict[str, bytes]
) -> None:
    hub.add(NAME, files)
    for name in ("config.json", "model-00001-of-00003.safetensors"):
        huggingface_hub.hf_hub_download(NAME, name)
    hub.requests.clear()
    assert tensors(NAME) == tensors(model)
    assert not hub.fetched("config.json") + hub.fetched("model-00001-of-00003.safetensors") and hub.fetched(SHARD)
    next(root.glob(f"snapshots/*/{SHARD}")).resolve().unlink()  # the link now leads nowhere
    assert tensors(NAME) == tensors(model)
    assert len(hub.fetched(SHARD)) == 2


def test_no_links(
    hub: SmallHub, root: Path, model: Path, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    hub.add(NAME, files)
    monkeypatch.setattr(os, "symlink", none)  # as on FAT
    assert tensors(NAME) == tensors(model)
    assert not list(root.glob("blobs/*"))
    hub.requests.clear()
    assert tensors(NAME) == tensors(model) and not hub.requests


def test_the_token_goes_to_the_hub_alone(
    hub: SmallHub, model: Path, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(NAME, files, need="gated")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert tensors(NAME) == tensors(model)
    tokens = {side: {r.token for r in hub.requests if r.side == side} for side in ("hub", "storage")}
    assert tokens == {"hub": {f"Bearer {TOKEN}"}, "storage": {""}}


# ---- broken connections
@pytest.mark.parametrize("abrupt", [False, True])
def test_a_cut_connection_is_resumed(hub: SmallHub, root: Path, files: dict[str, bytes], abrupt: bool) -> None:
    hub.add(NAME, files)
    hub.cut[SHARD], hub.abrupt = [50_000, 0, 20_000], abrupt
    open_checkpoint(NAME).close()
    assert [r.range for r in hub.fetched(SHARD)] == ["", "bytes=50000-", "bytes=50000-", "bytes=70000-"]
    assert whole(root, files) == sorted(files)
    assert not list(root.glob("blobs/*.incomplete"))


def test_a_connection_that_stays_broken_is_resumed_by_the_next_run(
    hub: SmallHub, root: Path, files: dict[str, bytes]
) -> None:
    hub.add(NAME, files)
    hub.cut[SHARD] = [60_000] + [0] * 20
    message = refused()
    assert "the same command goes on" in message
    assert [r.range for r in hub.fetched(SHARD)] == ["", *["bytes=60000-"] * 4]
    (partial,) = root.glob("blobs/*.incomplete")
    assert partial.read_bytes() == files[SHARD][:60_000]
    assert SHARD not in whole(root, files) and not (root / "refs" / "main").exists()
    hub.cut.clear()
    hub.requests.clear()
    open_checkpoint(NAME).close()
    assert [r.range for r in hub.fetched(SHARD)] == ["bytes=60000-"]
    assert whole(root, files) == sorted(files)
    assert not hub.fetched("model-00001-of-00003.safetensors")


def test_a_server_that_does_not_resume(hub: SmallHub, root: Path, files: dict[str, bytes]) -> None:
    hub.add(NAME, files)
    hub.cut[SHARD], hub.deaf = [50_000], True
    open_checkpoint(NAME).close()
    assert whole(root, files) == sorted(files)


@pytest.mark.parametrize("left", [b"?" * 1000, b"?" * 10_000_000, b"whole"])
def test_what_an_earlier_run_left_is_checked(hub: SmallHub, root: Path, files: dict[str, bytes], left: bytes) -> None:
    hub.add(NAME, files)
    hub.cut[SHARD] = [10] + [0] * 20
    refused()
    (partial,) = root.glob("blobs/*.incomplete")
    partial.write_bytes(files[SHARD][:-1] + b"?" if left == b"whole" else left)
    hub.cut.clear()
    open_checkpoint(NAME).close()
    assert whole(root, files) == sorted(files)


def test_what_was_all_there_but_not_named_is_not_fetched_again(
    hub: SmallHub, root: Path, files: dict[str, bytes]
) -> None:
    hub.add(NAME, files)
    hub.cut[SHARD] = [10] + [0] * 20
    refused()
    (partial,) = root.glob("blobs/*.incomplete")
    partial.write_bytes(files[SHARD])
    hub.requests.clear()
    open_checkpoint(NAME).close()
    assert whole(root, files) == sorted(files) and not hub.fetched(SHARD)


@pytest.mark.parametrize("file", [SHARD, "generation_config.json"])  # one with a sha256, one with git's hash
def test_a_file_that_arrives_damaged_never_gets_its_name(
    hub: SmallHub, root: Path, files: dict[str, bytes], file: str
) -> None:
    hub.add(NAME, files)
    hub.spoilt[file] = 2
    assert "damaged" in refused()
    assert file not in whole(root, files) and not (root / "refs").exists()
    hub.spoilt[file] = 1
    open_checkpoint(NAME).close()
    assert whole(root, files) == sorted(files)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_hub_that_fails_now_and_then(hub: SmallHub, root: Path, files: dict[str, bytes], status: int) -> None:
    hub.add(NAME, files)
    hub.failing[:] = [status]
    open_checkpoint(NAME).close()
    assert whole(root, files) == sorted(files)


@pytest.mark.parametrize("status", [429, 500, 503, 403, 418])
def test_a_hub_that_fails(hub: SmallHub, root: Path, files: dict[str, bytes], status: int) -> None:
    hub.add(NAME, files)
    hub.failing[:] = [status] * 20
    message = refused()
    assert str(status) in message or status == 403
    assert not root.exists()


# ---- what the hub refuses
@pytest.mark.parametrize(
    ("need", "token", "said"),
    [
        ("gated", "", ["gated", "accept", "/Org/Tiny-VL,", "HF_TOKEN"]),
        ("denied", TOKEN, ["gated", "not admitted", "accept", "/Org/Tiny-VL,"]),
        ("private", "", ["no such model", "private", "HF_TOKEN"]),
        ("", "hf_wrong", ["token", "HF_TOKEN"]),
        ("", "hf_\u00e9", ["ASCII", "HF_TOKEN"]),
    ],
)
def test_repositories_that_need_a_token(
    hub: SmallHub,
    root: Path,
    files: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    need: str,
    token: str,
    said: list[str],
) -> None:
    hub.add(NAME, files, need=need)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    message = refused()
    assert all(word in message for word in said), message
    assert not token or token not in message
    assert not root.exists()


def test_an_unknown_repository(hub: SmallHub, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for token in ("", TOKEN):
        monkeypatch.setenv("HF_TOKEN", token)
        message = refused()
        assert "no such model" in message and hub.endpoint in message and "check the name" in message
    assert not root.exists()


def test_an_unknown_revision(hub: SmallHub, root: Path, files: dict[str, bytes]) -> None:
    hub.add(NAME, files)
    for word in (f"{NAME}@v9", f"{NAME}@{'0' * 40}"):
        message = refused(word)
        assert word in message and "no such revision" in message and f"{NAME}/tree/main" in message
    assert not root.exists()


def test_another_architecture_is_refused_before_its_weights(hub: SmallHub, root: Path, files: dict[str, bytes]) -> None:
    hub.add(NAME, {**files, "config.json": b'{"model_type": "llama"}'})
    message = refused(kind=UnsupportedError)
    assert "llama" in message and f"{NAME}/config.json" in message
    assert not [r for r in hub.requests if "safetensors" in r.path]
    assert not (root / "refs").exists()


@pytest.mark.parametrize(
    ("held", "said"),
    [
        ({"config.json": b"{}", "pytorch_model.bin": b"x"}, "pytorch_model.bin"),
        ({"config.json": b"{}", "model-q4.gguf": b"x"}, "model-q4.gguf"),
        ({"adapter_config.json": b"{}", "adapter_model.safetensors": b"x"}, "LoRA"),
        ({"README.md": b"x"}, "config.json"),
        ({}, "config.json"),
    ],
)
def test_repositories_without_a_checkpoint(hub: SmallHub, root: Path, held: dict[str, bytes], said: str) -> None:
    hub.add(NAME, held)
    assert said in refused(kind=UnsupportedError)
    assert len(hub.requests) == 1 and not root.exists()


@pytest.mark.parametrize("etag", ["../../../x", "..", ".hidden", "a/b", "a b"])
def test_a_hash_that_is_no_file_name(hub: SmallHub, root: Path, files: dict[str, bytes], etag: str) -> None:
    hub.add(NAME, files)
    hub.etag = etag
    assert "does not answer as the hub does" in refused()
    assert not list(root.parent.rglob("*.*"))


@pytest.mark.parametrize("commit", ["../../../x", "..", ".hidden", "a/b", "a b"])
def test_a_commit_that_is_no_folder_name(hub: SmallHub, tmp_path: Path, files: dict[str, bytes], commit: str) -> None:
    hub.add(NAME, files)
    repo = hub.repos[f"models/{NAME}"]
    repo.revisions[commit], repo.names["main"] = files, commit
    assert "does not answer as the hub does" in refused()
    assert not list(tmp_path.rglob("*.json"))


def test_an_index_that_names_files_elsewhere(hub: SmallHub, tmp_path: Path, files: dict[str, bytes]) -> None:
    index = json.loads(files["model.safetensors.index.json"])
    index["weight_map"]["lm_head.weight"] = "../../../../x.safetensors"
    hub.add(NAME, {**files, "model.safetensors.index.json": json.dumps(index).encode()})
    assert "no name of a shard" in refused()
    assert not list(tmp_path.rglob("x.safetensors"))


def test_an_index_that_names_what_is_not_there(hub: SmallHub, root: Path, files: dict[str, bytes]) -> None:
    hub.add(NAME, {name: content for name, content in files.items() if name != SHARD})
    assert f"the repository lacks {SHARD}" in refused()
    assert not list(root.glob("snapshots/*/model-*"))


# ---- no way there
@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_mode(hub: SmallHub, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    hub.add(NAME, files)
    monkeypatch.setenv(variable, "1")
    message = refused(f"{NAME}@v1")
    assert "offline" in message and f"hf download {NAME} --revision v1" in message and not hub.requests


def test_offline_mode_as_the_library_read_it(
    hub: SmallHub, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(NAME, files)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "offline" in refused() and not hub.requests


BLOCKED = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "huggingface_hub":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
from migician.runtime.run import main
main(["--model", "Org/Tiny-VL", "What is this?"])
"""


def test_without_the_extra(hub: SmallHub, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", BLOCKED], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and not done.stdout and not hub.requests
    assert done.stderr.count("\n") == 1 and "internal error" not in done.stderr
    assert "pip install 'migician[hub]'" in done.stderr and "hf download Org/Tiny-VL" in done.stderr


def test_a_library_that_is_too_old(hub: SmallHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "__version__", "0.36.0")
    assert "0.36.0 is too old" in refused() and not hub.requests


def test_nobody_listens(hub: SmallHub, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    message = refused()
    assert f"{endpoint} cannot be reached" in message and "HF_ENDPOINT" in message and not root.exists()


def test_no_name_service(hub: SmallHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")
    monkeypatch.setattr(socket, "getaddrinfo", none)
    message = refused()
    assert "http://hub.invalid cannot be reached" in message and "Name or service not known" in message


@pytest.mark.parametrize("endpoint", ["no-scheme", "http://", "http://127.0.0.1:999999"])
def test_an_endpoint_that_is_no_address(hub: SmallHub, monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    assert "HF_ENDPOINT" in refused()


def test_something_else_listens(hub: SmallHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", f"{hub.storage}/models/a/b/c")
    hub.add("a/b", {"d": b""})
    hub.failing[:] = [200] * 4
    assert "HF_ENDPOINT" in refused()


def test_paths_never_go_to_the_hub(hub: SmallHub, tmp_path: Path, files: dict[str, bytes]) -> None:
    (tmp_path / "models").mkdir()
    hub.add("models/foo", files)
    for word in ("models/foo.mig", "models/foo.safetensors", "models/foo", "./Org/Tiny-VL", "Org/Tiny/VL", "~/Org/x"):
        refused(word)
        assert peek(word) is None
    assert "models/foo@main" in refused("models/foo") and not hub.requests
    open_checkpoint("models/foo@main").close()
    hub.requests.clear()
    open_checkpoint("models/foo").close()  # now it is in the cache
    assert not hub.requests


# ---- no room
def test_a_disk_without_room_is_seen_before(
    hub: SmallHub, root: Path, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(NAME, files)
    real = os.statvfs

    def small(path: Any) -> Any:
        room = list(real(path))
        room[4] = 300_000 // room[1]
        return os.statvfs_result(room)

    monkeypatch.setattr(os, "statvfs", small)
    message = refused()
    assert "free" in message and "HF_HOME" in message and not [r for r in hub.requests if "-of-" in r.path]
    assert not list(root.glob("snapshots/*/model-*"))


def half_written(root: Path, files: dict[str, bytes]) -> None:
    """What a download that ran out of space may leave: whole files, and the beginning of one."""
    names = whole(root, files)
    assert "config.json" in names and len(names) < len(files)
    (partial,) = root.glob("blobs/*.incomplete")
    assert any(len(content) > partial.stat().st_size and content.startswith(partial.read_bytes())
               for name, content in files.items() if name not in names)  # fmt: skip
    assert partial.stat().st_size > 0 and not (root / "refs").exists()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up(
    hub: SmallHub, root: Path, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    class Full(io.BufferedRandom):
        def write(self, data: Any) -> int:
            if self.tell() >= 30_000:
                raise OSError(code, os.strerror(code))
            return super().write(data)

    hub.add(NAME, files)
    with monkeypatch.context() as patched:
        patched.setattr(download, "open", lambda number, mode: Full(io.FileIO(number, mode)), raising=False)
        message = refused()
    assert "no space left" in message and "HF_HOME" in message and "goes on" in message
    half_written(root, files)
    open_checkpoint(NAME).close()
    assert whole(root, files) == sorted(files)


def test_a_small_disk_that_fills_up(
    hub: SmallHub, tmp_path: Path, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "disk"
    place.mkdir()
    room = sum(len(content) for name, content in files.items() if name != SHARD) + len(files[SHARD]) // 2
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={room}", "none", place], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root may mount a small disk")
    try:
        monkeypatch.setenv("HF_HUB_CACHE", str(place))
        monkeypatch.setattr(download.Repository, "_check_space", lambda *_: None)  # the disk fills up meanwhile
        hub.add(NAME, files)
        message = refused()
        assert "no space left" in message and str(place) in message
        root = place / "models--Org--Tiny-VL"
        half_written(root, files)
        subprocess.run(["mount", "-o", "remount,size=16M", place], check=True)
        open_checkpoint(NAME).close()
        assert whole(root, files) == sorted(files)
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def test_a_cache_that_may_not_be_written(hub: SmallHub, tmp_path: Path, files: dict[str, bytes]) -> None:
    hub.add(NAME, files)
    (tmp_path / "home").write_text("a file in the folder's place")
    message = refused()
    assert "cannot be written" in message and "HF_HOME" in message


# ---- several processes, and the end of one
@pytest.mark.slow
def test_two_processes_fetch_a_file_once(hub: SmallHub, tmp_path: Path, root: Path, files: dict[str, bytes]) -> None:
    hub.add(NAME, files)
    hub.slow = {SHARD: 0.05}  # two and a half seconds
    with run(hub, tmp_path, "hi") as one, run(hub, tmp_path, "hi") as other:
        ends = [process.communicate() for process in (one, other)]
    assert (one.returncode, other.returncode) == (0, 0), ends
    assert ends[0][0] == ends[1][0]
    assert whole(root, files) == sorted(files)
    assert all(len(hub.fetched(name)) == 1 for name in files)
    assert any(b"another process downloads it; waiting" in err for _, err in ends)


@pytest.mark.slow
def test_an_interrupted_download_goes_on(hub: SmallHub, tmp_path: Path, root: Path, files: dict[str, bytes]) -> None:
    hub.add(NAME, files)
    hub.slow = {SHARD: 0.2}
    with run(hub, tmp_path, "hi") as process:
        partial = root / "blobs" / f"{hashlib.sha256(files[SHARD]).hexdigest()}.incomplete"
        limit = time.monotonic() + 30
        while not partial.exists() or partial.stat().st_size < 10_000:
            assert time.monotonic() < limit and process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    assert process.returncode == 130 and not out
    assert b"the same command goes on" in err and b"Traceback" not in err
    assert list(root.glob("blobs/*.incomplete")) == [partial]
    size = partial.stat().st_size
    assert partial.read_bytes() == files[SHARD][:size]
    assert SHARD not in whole(root, files) and not (root / "refs").exists()
    hub.slow.clear()
    with run(hub, tmp_path, "hi") as process:
        _, err = process.communicate()
    assert process.returncode == 0 and b"of it here" in err
    assert [r.range for r in hub.fetched(SHARD)] == ["", f"bytes={size}-"]
    assert whole(root, files) == sorted(files)


def test_on_a_terminal_one_line_moves(hub: SmallHub, tmp_path: Path, files: dict[str, bytes]) -> None:
    hub.add(NAME, files)
    hub.slow = {SHARD: 0.03}
    leader, follower = os.openpty()
    environment = {**os.environ, **hub.environment(tmp_path / "home")}
    command = [sys.executable, "-m", "migician.runtime.run", "--model", NAME, "--max-new-tokens", "2", "hi"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=follower, cwd=tmp_path) as process:
        os.close(follower)
        shown = b""
        try:
            while piece := os.read(leader, 4096):
                shown += piece
        except OSError:  # the other end is closed
            pass
        out = process.communicate()[0]
    os.close(leader)
    assert process.returncode == 0 and b"download" not in out
    moving, last = shown.decode().replace("\r\n", "\n").split("\n")[:2]
    assert moving.count("\r") > 3 and f"\r{NAME} (" in moving and " MB, " in moving and "/s, " in moving
    assert f"\rdownloaded {NAME}" in moving and "downloaded" not in last


# ---- what a model is, before it is fetched
def test_peek_fetches_the_configuration_alone(hub: SmallHub, root: Path, files: dict[str, bytes]) -> None:
    assert peek(NAME) is None
    commit = hub.add(NAME, files)
    folder = peek(NAME)
    assert folder is not None and folder.name == commit
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    hub.requests.clear()
    assert peek(NAME) == folder and not hub.requests
    open_checkpoint(NAME).close()
    assert (root / "refs" / "main").read_text() == commit and not hub.fetched("config.json")


def test_models_of_other_architectures_go_to_transformers(hub: SmallHub, files: dict[str, bytes]) -> None:
    from migician.bench.accuracy.models import _model_type

    hub.add(NAME, {**files, "config.json": b'{"model_type": "llava_onevision"}'})
    assert _model_type(NAME) == "llava_onevision"
    assert not [r for r in hub.requests if "safetensors" in r.path]
