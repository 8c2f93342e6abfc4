"""Fetches files of a repository on the Hugging Face hub into the cache: resumable, checked, whole or not at all.

The one file that imports huggingface_hub, and only when something is to be fetched. Its are the addresses, the token,
the locks and the layout of the cache. The transfer is our own: the library throws away what it has of a file when it
stops. Here it stays in `blobs/HASH.incomplete`, and the next run goes on from there.
"""

import errno
import hashlib
import os
import re
import secrets
import shutil
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TextIO, TypeVar
from urllib.parse import urlsplit

from ... import __version__
from ..errors import MigicianError, ModelFileError, UnsupportedError
from .hub_cache import HubName, shards_of
from .tensors import shown

__all__ = ["NoDownload", "Repository", "size_text"]

T = TypeVar("T")

_PAUSES_S = (1.0, 2.0, 4.0, 8.0)  # between tries that brought nothing
_CHUNK = 1 << 20
_FILE = re.compile(r"[\w-][\w.+ -]*", re.ASCII)  # of the top folder
_WORD = re.compile(r"[0-9A-Za-z][\w.-]*", re.ASCII)  # a commit or an etag, which become names of files here
_TEXTS = re.compile(r"(?!.*\.index\.json$|README).*\.(json|txt|jinja)|model\.safetensors\.index\.json", re.ASCII)
_OTHER_WEIGHTS = (".bin", ".gguf", ".onnx", ".pth", ".pt", ".h5", ".msgpack", ".safetensors")
_LIBRARY = {"library_name": "migician", "library_version": __version__}
_FULL = (errno.ENOSPC, errno.EDQUOT)
_OFFLINE = "offline mode forbids to download it: unset HF_HUB_OFFLINE, or bring its cache from elsewhere"
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS)


@dataclass(frozen=True)
class _Entry:
    """A file as the repository lists it.   hash: of its content, sha256 or git's sha1, or empty."""

    size: int
    hash: str


class NoDownload(Exception):
    """Nothing can be fetched here; says why and what to do, as a message that the command to run ends."""


class _Damaged(Exception):
    """A file came whole, and is another than the repository lists."""


class _Cut(Exception):
    """A file ended early."""


def _library() -> Any:
    """huggingface_hub. Raises NoDownload where it is missing or too old."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import huggingface_hub
            import huggingface_hub.constants
            import huggingface_hub.utils
    except ImportError:
        raise NoDownload("to download it: pip install 'migician[hub]' and run again, or") from None
    if int(huggingface_hub.__version__.partition(".")[0]) < 1:
        found = f"huggingface_hub {huggingface_hub.__version__} is too old to download it"
        raise NoDownload(f"{found}: pip install -U 'migician[hub]' and run again, or")
    return huggingface_hub


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").upper() in ("1", "ON", "YES", "TRUE")


class Repository:
    """A repository of the hub at one commit.

    files: {name: size in bytes} of its top folder.   commit: that of the revision asked for.
    folder: its snapshot in the cache, to which fetch() brings files.
    """

    def __init__(self, name: HubName) -> None:
        """Asks the hub what there is.

        Raises NoDownload where nothing can be asked, ModelFileError, one line each, for whatever goes wrong then.
        """
        self.name = name
        if _is_set("HF_HUB_OFFLINE") or _is_set("TRANSFORMERS_OFFLINE"):
            raise NoDownload(_OFFLINE)
        self._hub = _library()
        self._endpoint = (os.environ.get("HF_ENDPOINT") or self._hub.constants.ENDPOINT).rstrip("/")
        self._timeout_s = self._hub.constants.HF_HUB_DOWNLOAD_TIMEOUT
        with self._explained():
            token = self._hub.get_token() or ""
            if not (token.isascii() and token.isprintable()):  # the HTTP library would refuse it, and print it
                raise self._error("the token holds more than printable ASCII; set HF_TOKEN to the token alone")
            info = _patiently(self._ask, _PAUSES_S[:1])
            if not _WORD.fullmatch(info.sha or ""):
                raise ValueError(f"commit {info.sha!r}")
            self.commit = str(info.sha)
            listed = {s.rfilename: s for s in info.siblings or () if _FILE.fullmatch(s.rfilename)}
            self._entries = {
                file: _Entry(s.size or 0, (s.lfs.sha256 if s.lfs else s.blob_id) or "") for file, s in listed.items()
            }
        self.files = {file: entry.size for file, entry in self._entries.items()}
        self.folder = name.root / "snapshots" / self.commit

    def _ask(self) -> Any:
        return self._hub.HfApi(endpoint=self._endpoint, **_LIBRARY).repo_info(
            self.name.repo,
            repo_type=self.name.kind,
            revision=self.name.revision or "main",
            files_metadata=True,
            timeout=self._timeout_s,
        )

    # ---- what is fetched
    def fetch_model(self, judge: Callable[[Path], None]) -> None:
        """Brings what a checkpoint needs: texts first, then safetensors.

        judge: given the snapshot once config.json is there; what it raises, ends it before any weight is fetched.
        """
        weights = [file for file in self.files if file == "model.safetensors"]
        if "config.json" not in self.files or not (weights or "model.safetensors.index.json" in self.files):
            raise self._no_checkpoint()
        self.fetch(["config.json"], story=False)
        judge(self.folder)
        self.fetch([file for file in self.files if _TEXTS.fullmatch(file)], story=False)
        self.fetch(weights or sorted(shards_of(self.folder / "model.safetensors.index.json")))
        self.settle()

    def _no_checkpoint(self) -> MigicianError:
        if "adapter_config.json" in self.files:
            what, advice = "a LoRA adapter", "merge it into its base model (merge_and_unload) and save"
        else:
            found = [file for file in self.files if file.endswith(_OTHER_WEIGHTS)]
            held = f", but {', '.join(found[:3])}{' and more' if found[3:] else ''}" if found else ""
            lacks = "safetensors weights" if "config.json" in self.files else "config.json"
            what, advice = f"the repository has no {lacks}{held}", "give that of a Qwen2-VL checkpoint in safetensors"
        return UnsupportedError(f"{self.name}: {what}; {advice}")

    def fetch(self, files: Iterable[str], *, story: bool = True) -> None:
        """Brings files into the snapshot, one after the other; what is there already stays.

        story: where stderr is no terminal, say on it when this begins and ends.   Raises ModelFileError.
        """
        wanted = [file for file in files if not (self.folder / file).exists()]
        with self._explained():
            if unlisted := [file for file in wanted if file not in self._entries]:
                lacks = f"the repository lacks {shown(unlisted[0])}"
                raise self._error(f"{lacks}; ask its author, or give another revision")
            if wanted:
                self._check_space(wanted)
                title = f"{self.name} ({self.commit[:12]})"
                total = sum(self.files[file] for file in wanted)
                with _Progress(title, total, sum(map(self._here, wanted)), story, len(wanted)) as progress:
                    for file in wanted:
                        self._fetch(file, progress)

    def settle(self) -> None:
        """Notes which commit the revision is, once all of it is there."""
        revision = self.name.revision or "main"
        if revision != self.commit:
            with self._explained():
                path = self.name.root / "refs" / revision
                path.parent.mkdir(parents=True, exist_ok=True)
                temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
                temporary.write_text(self.commit, "ascii")
                os.replace(temporary, path)

    # ---- one file
    def _here(self, file: str) -> int:
        """How many bytes of a file are in the cache."""
        blob = self.name.root / "blobs" / (self._entries[file].hash or "-")
        for path in (blob, blob.with_name(f"{blob.name}.incomplete")):
            with suppress(OSError):
                return min(path.stat().st_size, self.files[file])
        return 0

    def _check_space(self, files: Sequence[str]) -> None:
        needed = sum(self.files[file] - self._here(file) for file in files)
        self.name.root.mkdir(parents=True, exist_ok=True)
        system = os.statvfs(self.name.root)
        free = system.f_bavail * system.f_frsize
        if needed > free:
            room = f"{size_text(needed)} to download, {size_text(free)} free in {self.name.root.parent}"
            raise self._error(f"{room}; free some space, or set HF_HOME to a folder on another disk")

    def _fetch(self, file: str, progress: "_Progress") -> None:
        """Brings a file, over broken connections too as long as each try brings something."""
        pauses, again = iter(_PAUSES_S), False
        while True:
            before = progress.done
            try:
                return self._try(file, progress)
            except _Damaged:  # what an earlier run had left of it may have been of no use
                if again:
                    raise
                again = True
            except Exception as error:
                if not _may_pass(error):
                    raise
                pauses = iter(_PAUSES_S) if progress.done > before else pauses
                pause = next(pauses, None)
                if pause is None:
                    raise
                progress.say(f"{file}: {_reason(error)}; trying again")
                time.sleep(pause)

    def _try(self, file: str, progress: "_Progress") -> None:
        hub, root = self._hub, self.name.root
        url = hub.hf_hub_url(
            self.name.repo, file, repo_type=self.name.kind, revision=self.commit, endpoint=self._endpoint
        )
        patience_s = hub.constants.HF_HUB_ETAG_TIMEOUT
        found = hub.get_hf_file_metadata(url, timeout=patience_s, endpoint=self._endpoint, **_LIBRARY)
        if not _WORD.fullmatch(found.etag or ""):
            raise ValueError(f"etag {found.etag!r}")
        entry = _Entry(self.files[file] if found.size is None else found.size, self._entries[file].hash)
        blob, pointer = root / "blobs" / found.etag, self.folder / file
        lock = root.parent / ".locks" / root.name / f"{found.etag}.lock"
        for path in (blob, pointer, lock):
            path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(hub.utils.WeakFileLock(lock), progress, f"{file}: another process downloads it; waiting"):
            if not blob.exists():
                self._transfer(url, found.location, blob, entry, progress)
            _link(blob, pointer)

    def _transfer(self, url: str, location: str, blob: Path, entry: _Entry, progress: "_Progress") -> None:
        """Completes blob.incomplete, which becomes the blob when it is what the repository lists."""
        partial = blob.with_name(f"{blob.name}.incomplete")
        with open(os.open(partial, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
            check = _Check(entry)
            start = file.seek(0, os.SEEK_END)
            if start > entry.size:
                file.truncate(0)
            check.read(file)
            if check.size < entry.size:
                self._stream(url, location, file, check, progress)
            if check.size < entry.size:
                raise _Cut(f"it ended after {check.size} of {entry.size} bytes")
            if not check.matches():
                partial.unlink()
                progress.add(-check.size)
                raise _Damaged
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, blob)

    def _stream(self, url: str, location: str, file: BinaryIO, check: "_Check", progress: "_Progress") -> None:
        utils = self._hub.utils
        headers = {**utils.build_hf_headers(**_LIBRARY), "Accept-Encoding": "identity"}
        target = urlsplit(location)
        ours = target.scheme == "https" and target.hostname in getattr(self._hub.constants, "HF_URL_HOSTS", ())
        if not ours and target[:2] != urlsplit(url)[:2]:  # a storage host with a signed address: no token goes there
            headers.pop("authorization", None)
        if check.size:
            headers["Range"] = f"bytes={check.size}-"
        get = utils.get_session().stream(
            "GET", location, headers=headers, timeout=self._timeout_s, follow_redirects=True
        )
        with get as response:
            answered = response.headers.get("Content-Range", "").startswith(f"bytes {check.size}-")
            if check.size and not (response.status_code == 206 and answered):
                if response.status_code != 416:
                    utils.hf_raise_for_status(response)
                progress.add(-check.size)
                file.truncate(0)
                check.read(file)
                if response.status_code != 200:
                    raise _Cut("the server does not go on from where it was")
            else:
                utils.hf_raise_for_status(response)
            file.seek(check.size)
            for chunk in response.iter_bytes():  # as they come: what a chunk of fixed size waits for is lost in a cut
                file.write(chunk)
                check.update(chunk)
                progress.add(len(chunk))

    # ---- what went wrong
    def _error(self, text: str) -> MigicianError:
        kind = ModelFileError if self.name.kind == "model" else MigicianError
        return kind(f"{self.name}: {text}")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Keeps the library quiet, and turns whatever is raised into one line."""
        log = self._hub.utils.logging
        level = log.get_verbosity()
        log.set_verbosity_error()
        try:
            yield
        except (MigicianError, NoDownload, MemoryError):
            raise
        except Exception as error:
            raise self._explain(error) from None
        finally:
            log.set_verbosity(level)

    def _explain(self, error: Exception) -> Exception:
        kinds = {kind.__name__ for kind in type(error).__mro__}
        if "OfflineModeIsEnabled" in kinds:
            return NoDownload(_OFFLINE)
        if isinstance(error, _Damaged):
            return self._error("a file arrived damaged, twice; try again later, or from another network")
        if (response := getattr(error, "response", None)) is not None:
            return self._error(self._refusal(kinds, response.status_code))
        again = "the same command goes on from where it was"
        if kinds & {"ConnectError", "ConnectTimeout", "ProxyError", "UnsupportedProtocol", "InvalidURL"}:
            reason = f"{self._endpoint} cannot be reached ({_reason(error)})"
            return self._error(f"{reason}; check the connection, a proxy and HF_ENDPOINT, then run again")
        if _may_pass(error):
            return self._error(f"the connection broke, again and again ({_reason(error)}); {again}")
        if isinstance(error, OSError) and error.errno in _FULL:
            full = f"no space left in {self.name.root.parent}"
            return self._error(f"{full}; free some, or set HF_HOME to a folder on another disk; {again}")
        if isinstance(error, OSError) and error.errno is not None:
            bad = f"the cache cannot be written ({error.strerror}: {error.filename or self.name.root})"
            return self._error(f"{bad}; correct its rights, or set HF_HOME to another folder")
        reason = f"{type(error).__name__}: {_reason(error)}"
        return self._error(f"{self._endpoint} does not answer as the hub does ({reason}); check HF_ENDPOINT")

    def _refusal(self, kinds: set[str], status: int) -> str:
        """What to do about a status of the hub."""
        kind = self.name.kind
        page = f"{self._endpoint}/{'datasets/' if kind == 'dataset' else ''}{self.name.repo}"
        if "GatedRepoError" in kinds and self._hub.get_token():
            what = f"a gated {kind}, to which this token's account is not admitted"
            return f"{what}; accept its terms on {page}, and let the token read gated repositories"
        if "GatedRepoError" in kinds:
            return f"a gated {kind}; accept its terms on {page}, then set HF_TOKEN to a token of that account"
        if "RevisionNotFoundError" in kinds:
            return f"the hub has no such revision; {page}/tree/main lists its branches and tags"
        if "EntryNotFoundError" in kinds:
            return "a file that the repository lists is not there; try again later, or give another revision"
        if "RepositoryNotFoundError" in kinds or status == 404:
            none = f"no such path, and no such {kind} at {self._endpoint}, or a private one"
            return f"{none}; check the name, or set HF_TOKEN if it is private"
        if status == 401:
            return "the hub does not take this token; set HF_TOKEN to a valid one, or log in anew: hf auth login"
        if status == 403:
            return f"the hub refuses access; accept the terms on {page}, and give HF_TOKEN the right to read it"
        if status == 429:
            return "the hub asks for patience (status 429); wait some minutes, or set HF_TOKEN, which allows more"
        return f"the hub fails (status {status}); try again later, the same command goes on from where it was"


class _Check:
    """Counts and hashes what is in a file, to hold it to what the repository lists."""

    def __init__(self, entry: _Entry) -> None:
        self._entry = entry
        self._begin()

    def _begin(self) -> None:
        self.size = 0
        self._digest: Any = None
        if re.fullmatch(r"[0-9a-f]{64}", self._entry.hash):
            self._digest = hashlib.sha256()
        elif re.fullmatch(r"[0-9a-f]{40}", self._entry.hash):
            self._digest = hashlib.sha1(b"blob %d\0" % self._entry.size, usedforsecurity=False)  # as git does

    def read(self, file: BinaryIO) -> None:
        """Begins anew with what the file holds."""
        self._begin()
        file.seek(0)
        while chunk := file.read(_CHUNK):
            self.update(chunk)

    def update(self, chunk: bytes) -> None:
        """Takes the next bytes."""
        self.size += len(chunk)
        if self._digest:
            self._digest.update(chunk)

    def matches(self) -> bool:
        """Whether this is the whole file; by its size alone where no hash is listed."""
        same = not self._digest or self._digest.hexdigest() == self._entry.hash
        return self.size == self._entry.size and same


@contextmanager
def _locked(lock: Any, progress: "_Progress", waits: str) -> Iterator[None]:
    """Holds a lock.   waits: said when it has not been free for two seconds."""
    timer = threading.Timer(2.0, progress.say, [waits])
    timer.daemon = True
    timer.start()
    try:
        with lock:
            timer.cancel()
            yield
    finally:
        timer.cancel()


def _link(blob: Path, pointer: Path) -> None:
    """Gives a blob its name in a snapshot: by a link, or itself where the file system has none."""
    if pointer.exists():
        return
    with suppress(FileNotFoundError):
        pointer.unlink()  # it led to nothing
    try:
        os.symlink(os.path.relpath(blob, pointer.parent), pointer)
    except FileExistsError:  # another process was faster
        pass
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        os.replace(blob, pointer)


def _patiently(call: Callable[[], T], pauses: Sequence[float]) -> T:
    """Calls again after what may pass, as often as there are pauses."""
    for pause in pauses:
        try:
            return call()
        except Exception as error:
            if not _may_pass(error) or "ConnectError" in {kind.__name__ for kind in type(error).__mro__}:
                raise
            time.sleep(pause)
    return call()


def _may_pass(error: Exception) -> bool:
    """Whether the same request may succeed a little later."""
    status = getattr(getattr(error, "response", None), "status_code", 0)
    if status:
        return status in (408, 429) or status >= 500
    # by name: the library has moved from one HTTP client to another
    return isinstance(error, _Cut) or "TransportError" in {kind.__name__ for kind in type(error).__mro__}


def _reason(error: Exception) -> str:
    return shown(" ".join(str(error).split()) or type(error).__name__)


# ---- the story on stderr
class _Progress:
    """How far a download is: on a terminal one line that moves, elsewhere a line now and then."""

    EVERY_S = 30.0

    def __init__(self, title: str, total: int, done: int, story: bool, files: int) -> None:
        self._title, self._total, self.done, self._story = title, total, done, story
        self._began = self._said = time.monotonic()
        self._start, self._wide = done, 0
        self._quiet = _is_set("HF_HUB_DISABLE_PROGRESS_BARS")
        self._moves = _is_terminal(sys.stderr)
        if story and not self._moves:
            have = f", {size_text(done)} of it here" if done else ""
            self.say(f"downloading {title}: {files} file{'s' * (files > 1)}, {size_text(total)}{have}")

    def add(self, count: int) -> None:
        """Counts bytes that arrived, or, below 0, that are of no use."""
        self.done += count
        self._start += min(count, 0)
        now = time.monotonic()
        if now - self._said >= (0.2 if self._moves else self.EVERY_S):
            self._said = now
            self._show(self._text(now), moving=self._moves)

    def say(self, text: str) -> None:
        """Puts a line of its own."""
        self._show(text, moving=False)

    def _text(self, now: float) -> str:
        rate = (self.done - self._start) / max(now - self._began, 1e-3)
        left = f", {_time((self._total - self.done) / rate)} left" if rate > 0 else ""
        return f"{self._title}: {size_text(self.done)} of {size_text(self._total)}, {size_text(int(rate))}/s{left}"

    def _show(self, text: str, *, moving: bool) -> None:
        if self._quiet or sys.stderr is None:
            return
        if moving:
            text = text[: shutil.get_terminal_size().columns - 1]
        gap = " " * max(0, self._wide - len(text))  # what the moving line had there before
        start, end = "\r" if moving or self._wide else "", "\n" if not moving else "" if text else "\r"
        self._wide = len(text) if moving else 0
        with suppress(OSError, ValueError):  # nobody reads it
            sys.stderr.write(f"{start}{text}{gap}{end}")
            sys.stderr.flush()

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is KeyboardInterrupt:
            self.say(
                f"{self._title}: {size_text(self.done)} of {size_text(self._total)} are here; the same command goes on"
            )
        elif kind is None and self._story:
            self.say(f"downloaded {self._title}: {size_text(self._total)} in {_time(time.monotonic() - self._began)}")
        elif kind is not None and self._wide:
            self.say(self._text(time.monotonic()))
        elif self._wide:
            self._show("", moving=True)


def _is_terminal(stream: TextIO | None) -> bool:
    """Whether a line may move there. A stand-in for stderr, such as a progress bar's above us, takes whole lines."""
    try:
        return stream is not None and stream.isatty() and stream is sys.__stderr__
    except ValueError:  # it is closed
        return False


def size_text(size: int) -> str:
    """A number of bytes for people."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"


def _time(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 60 else f"{minutes} min" if minutes < 90 else f"{minutes / 60:.1f} h"
