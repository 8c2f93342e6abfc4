"""Models behind an OpenAI-compatible server, which is a real one on loopback."""

import base64
import io
import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from noise_pictures import save_noise
from PIL import Image
from rendered_questions import RENDERED, a_question

from migician.bench.accuracy import families, models
from migician.bench.accuracy.models import Endpoint, Ours, open_answerer
from migician.runtime.errors import MigicianError, UnsupportedError


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    return save_noise(tmp_path_factory.mktemp("pictures"), [(90, 60), (64, 80)])


class Server(ThreadingHTTPServer):
    """An OpenAI-compatible server by script: `replies` are (status, headers, body), taken in turn; the last stays."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies: list[tuple[int, dict[str, str], Any]] = [said("(1,2),(3,4)")]
        self.models: list[str] = ["Migician-7B"]
        self.requests: list[tuple[str, dict[str, str], Any]] = []
        self.silent = False
        self.over = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.requests.append((self.path, dict(self.headers), None))
        self.reply(200, {}, {"object": "list", "data": [{"id": name} for name in self.server.models]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, dict(self.headers), body))
        if self.server.silent:
            self.server.over.wait(60)
            return
        replies = self.server.replies
        self.reply(*(replies.pop(0) if len(replies) > 1 else replies[0]))

    def reply(self, status: int, headers: dict[str, str], body: Any) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None: ...


def said(content: Any) -> tuple[int, dict[str, str], Any]:
    message = {"role": "assistant", "content": content}
    return 200, {}, {"id": "1", "object": "chat.completion", "choices": [{"index": 0, "message": message}]}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.delenv(models.KEY, raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as made:
        thread = threading.Thread(target=made.serve_forever, args=(0.01,))
        thread.start()
        yield made
        made.over.set()
        made.shutdown()
        thread.join()


def picture_of(url: str) -> tuple[str, bytes]:
    kind, _, data = url.removeprefix("data:").partition(";base64,")
    return kind, base64.b64decode(data, validate=True)


def test_a_request_is_what_the_protocol_asks(
    server: Server, pictures: tuple[Path, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(models.KEY, "sesame")
    answerer = open_answerer(f"{server.url}#Migician-7B")
    assert (answerer.name, answerer.family) == ("Migician-7B", "migician")
    assert families.ask(a_question(pictures), answerer).response == "(1,2),(3,4)"
    ((path, headers, body),) = server.requests
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer sesame"
    assert headers["Content-Type"] == "application/json"
    assert {k: v for k, v in body.items() if k != "messages"} == {
        "model": "Migician-7B", "temperature": 0, "max_tokens": 128, "stream": False,
    }  # fmt: skip
    ((turn),) = body["messages"]
    assert turn["role"] == "user"
    *shown, text = turn["content"]
    assert text == {"type": "text", "text": RENDERED["migician"]}
    assert [entry["type"] for entry in shown] == ["image_url", "image_url"]
    for entry, picture in zip(shown, pictures, strict=True):
        assert picture_of(entry["image_url"]["url"]) == ("image/png", picture.read_bytes())


def test_pictures_stand_in_the_text_of_families_that_want_it(server: Server, pictures: tuple[Path, ...]) -> None:
    answerer = open_answerer(f"{server.url}#InternVL2-8B")
    families.ask(a_question(pictures), answerer)
    content = server.requests[-1][2]["messages"][0]["content"]
    assert [entry["type"] for entry in content] == ["text", "image_url", "text", "image_url", "text"]
    assert [entry.get("text") for entry in content[:4:2]] == ["Image-1: ", "\nImage-2: "]
    assert "Authorization" not in server.requests[-1][1]


@pytest.mark.parametrize("path", ["", "/", "/v1", "/v1/", "/v1/chat/completions"])
def test_addresses_are_completed(server: Server, path: str) -> None:
    open_answerer(f"{server.url}{path}#migician").answer([], "?", 4)
    assert server.requests[-1][0] == "/v1/chat/completions"


def test_the_only_model_of_a_server_is_taken(server: Server) -> None:
    answerer = open_answerer(server.url)
    assert (answerer.name, server.requests[0][0]) == ("Migician-7B", "/v1/models")
    answerer.answer([], "?", 4)
    assert server.requests[-1][2]["model"] == "Migician-7B"
    server.models = ["a", "b"]
    with pytest.raises(MigicianError, match=r"serves a, b; say which, as http://127.*/v1#MODEL"):
        open_answerer(server.url)
    server.models = []
    with pytest.raises(MigicianError, match="names no model"):
        open_answerer(server.url)


def test_a_served_model_of_no_family_needs_one(server: Server) -> None:
    with pytest.raises(UnsupportedError, match="give --family"):
        open_answerer(f"{server.url}#gpt-4o")
    assert open_answerer(f"{server.url}#gpt-4o", family="minicpm").family == "minicpm"


def test_pictures_are_shrunk_and_turned_upright_before_they_are_sent(server: Server, tmp_path: Path) -> None:
    turned = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20), "red").save(turned, exif=exif)
    plain = tmp_path / "plain.jpg"
    Image.new("RGB", (40, 20), "red").save(plain)
    clear = tmp_path / "clear.png"
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(clear)

    def sent(path: Path, side: int | None) -> tuple[str, Image.Image, bytes]:
        open_answerer(f"{server.url}#migician", max_side=side).answer([path], "?", 4)
        kind, raw = picture_of(server.requests[-1][2]["messages"][0]["content"][0]["image_url"]["url"])
        return kind, Image.open(io.BytesIO(raw)), raw

    assert sent(plain, None)[2] == plain.read_bytes()
    assert sent(plain, 40)[0] == "image/jpeg"
    kind, image, _ = sent(plain, 10)
    assert (kind, image.format, image.size) == ("image/png", "PNG", (10, 5))
    assert sent(turned, None)[1].size == (20, 40)
    assert sent(turned, 10)[1].size == (5, 10)
    assert sent(clear, None)[1].convert("RGB").getpixel((0, 0)) == (255, 255, 255)


def endpoint(server: Server, pauses: list[float] | None = None, **settings: Any) -> Endpoint:
    pause = [].append if pauses is None else pauses.append
    return Endpoint(f"{server.url}#migician", pause=pause, **settings)


def test_busy_servers_are_asked_again(server: Server) -> None:
    pauses: list[float] = []
    server.replies = [
        (429, {"Retry-After": "7"}, {"error": {"message": "slow down"}}),
        (503, {}, b"<html>busy</html>"),
        (429, {"Retry-After": "900"}, {}),
        (500, {"Retry-After": "Tue, 24 Nov 2026 12:00:00 GMT"}, {}),
        said("at last"),
    ]
    assert endpoint(server, pauses).answer([], "?", 4).text == "at last"
    assert pauses == [7.0, 2.0, 60.0, 8.0]


def test_a_server_that_stays_down_is_given_up(server: Server) -> None:
    pauses: list[float] = []
    server.replies = [(502, {}, {"error": {"message": "no worker"}})]
    with pytest.raises(MigicianError, match=r"status 502: no worker, 5 times; see the server's log"):
        endpoint(server, pauses).answer([], "?", 4)
    assert pauses == [1.0, 2.0, 4.0, 8.0]
    assert len(server.requests) == 5


def test_a_silent_server_is_given_up(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Endpoint, "TRIES", 2)
    server.silent = True
    with pytest.raises(MigicianError, match="no answer in time, 2 times"):
        endpoint(server, timeout_s=0.1).answer([], "?", 4)
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ((401, {}, {"error": {"message": "no key"}}), f"status 401: no key; set {models.KEY}"),
        ((403, {}, b""), f"status 403; set {models.KEY}"),
        ((404, {}, {"error": "no model x"}), "status 404: no model x; check the address and the model's name"),
        ((400, {}, {"detail": [{"msg": "two\nlines"}]}), r"status 400: \[\{\"msg\": \"two\\nlines\"\}\]; correct it"),
        ((302, {"Location": "http://elsewhere/"}, b""), "sends elsewhere, to http://elsewhere/; give that address"),
        ((200, {}, b"<html>hello</html>"), r"answered no JSON object \(<html>hello</html>\)"),
        ((200, {}, b"[1]"), "answered no JSON object"),
        ((200, {}, {"choices": []}), r"no choices\[0\].message.content"),
        ((200, {}, {"error": {"message": "x"}}), "is it an OpenAI-compatible server"),
    ],
)
def test_refusals_are_one_line_and_not_repeated(server: Server, reply: Any, message: str) -> None:
    server.replies = [reply]
    with pytest.raises(MigicianError, match=message) as caught:
        endpoint(server).answer([], "?", 4)
    assert "\n" not in str(caught.value)
    assert len(server.requests) == 1


@pytest.mark.parametrize("key", ["qqq\nzzz", "qqqü"])
def test_a_key_that_http_cannot_carry_is_not_shown(server: Server, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv(models.KEY, key)
    with pytest.raises(MigicianError, match=f"{models.KEY} holds more than") as caught:
        endpoint(server).answer([], "?", 4)
    assert not any(part in str(caught.value) for part in ("qqq", "zzz"))
    assert server.requests == []


def test_nothing_listens() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(MigicianError, match="nothing listens there; start the server first"):
        Endpoint(f"http://127.0.0.1:{port}#migician", pause=[].append).answer([], "?", 4)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("<|box_start|>(1,2),(3,4)<|box_end|>", "(1,2),(3,4)"),
        (None, ""),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "ab"),
    ],
)
def test_contents_of_an_answer(server: Server, content: Any, text: str) -> None:
    server.replies = [said(content)]
    assert endpoint(server).answer([], "?", 4).text == text


def test_answers_of_an_exact_length_are_for_the_engines_that_are_timed(tiny: Path, server: Any) -> None:
    for engine in (Ours(str(tiny)), endpoint(server)):
        with pytest.raises(UnsupportedError, match="migician-bench latency"):
            engine.answer([], "?", 4, exact=True)
        engine.close()


def test_pixels_go_to_a_server_as_png(server: Any) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    endpoint(server).answer([pixels], "?", 4)
    url = server.requests[-1][2]["messages"][0]["content"][0]["image_url"]["url"]
    sent = Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,"))))
    assert np.array_equal(np.asarray(sent), pixels)


def test_a_backend_of_this_runtime_goes_with_models_of_this_runtime(tiny: Path, server: Any) -> None:
    engine = open_answerer(str(tiny), backend="native")
    assert isinstance(engine, Ours)
    engine.close()
    with pytest.raises(UnsupportedError, match="choose native"):
        open_answerer(str(tiny), backend="abacus")
    with pytest.raises(UnsupportedError, match="leave one of them out"):
        open_answerer(server.url, backend="native")
    with pytest.raises(UnsupportedError, match="leave one of them out"):
        open_answerer(f"transformers:{tiny}", backend="native")
