"""Answering models: this runtime, any image-text-to-text model of transformers, any OpenAI-compatible endpoint.

    open_answerer("nano")                                  # this runtime
    open_answerer("transformers:Qwen/Qwen2-VL-7B-Instruct")  # transformers, also where this runtime could
    open_answerer("llava-hf/llava-onevision-qwen2-7b-ov-hf")  # transformers, where the cache has another architecture
    open_answerer("http://127.0.0.1:8000#Qwen2.5-VL-7B")   # whatever serves /v1/chat/completions

All decode greedily with the repetition penalty of the checkpoint (a server's is its own affair). transformers and torch
are imported by the model that needs them; an endpoint needs the standard library alone.
"""

import base64
import http.client
import io
import json
import logging
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

from PIL import Image

from ... import __version__
from ...runtime.answer import Answer
from ...runtime.backends import check_backend
from ...runtime.errors import MigicianError, ModelFileError, UnsupportedError
from ...runtime.files.archive import read_bytes
from ...runtime.files.config import Preprocessor
from ...runtime.files.hub import peek
from ...runtime.image import load_picture, open_picture
from ...runtime.model import load
from ..engines import PHASES, Answered, Engine, Picture, Times, any_length_only
from .families import FAMILIES, PICTURE, Family, detect, find, resized
from .protocol import strip_tags

__all__ = ["Endpoint", "Ours", "Transformers", "open_answerer"]

KEY = "MIGICIAN_BENCH_API_KEY"


def open_answerer(
    model: str,
    *,
    family: str | None = None,
    max_side: int | None = None,
    threads: int = 0,
    precision: str = "auto",
    backend: str = "auto",
) -> Engine:
    """Opens a model by what its name says.

    model: what migician-run takes (a .mig file, a checkpoint folder, a hub id, "nano"); the same of another
    architecture goes to transformers, and so does transformers:NAME; http://HOST[:PORT][/v1][#MODEL] is a server.
    family: one of FAMILIES; None reads it from the model's name or configuration.
    max_side: of pictures, in pixels.   threads: 0 is the engine's choice.
    precision: "auto", or "fp32": no rounding of activations here, float32 weights and sums in transformers.
    backend: one of this runtime's, or "auto": the native one, or transformers by what the name says.
    Raises MigicianError, one line, for whatever is not there or does not fit.
    """
    if precision not in ("auto", "fp32"):
        raise UnsupportedError(f"precision {precision!r} is unknown; choose auto or fp32")
    if backend != "auto":
        check_backend(backend)
    chosen = None if family is None else find(family)
    if max_side is not None and max_side < 1:
        raise MigicianError(f"max_side is {max_side}: give a number of pixels from 1 up")
    if re.match(r"https?://", model, re.IGNORECASE):
        if threads or precision != "auto":
            raise UnsupportedError(f"{model}: a server's threads and precision are set where it runs; leave them out")
        if backend != "auto":
            raise UnsupportedError(f"{model}: a server, backend {backend} computes here; leave one of them out")
        return Endpoint(model, chosen, max_side=max_side)
    name = model.removeprefix("transformers:")
    if backend != "auto" and name != model:
        raise UnsupportedError(f"{model}: asks for transformers, and backend {backend} besides; leave one of them out")
    kind = _model_type(name)
    if backend != "auto" or (name == model and kind in (None, "qwen2_vl")):
        own = "native" if backend == "auto" else backend
        return Ours(model, chosen, max_side=max_side, threads=threads, precision=precision, backend=own)
    return Transformers(name, kind, chosen, max_side=max_side, threads=threads, precision=precision)


def _folder(model: str) -> Path | None:
    """A folder with a model's config.json, by path or by hub id."""
    path = Path(model).expanduser()
    return path if path.is_dir() else peek(model)


def _model_type(model: str) -> str | None:
    """The model_type of a folder's config.json; None for what has none."""
    folder = _folder(model)
    if folder is None:
        return None
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None  # opening it says what is wrong
    kind = config.get("model_type") if isinstance(config, dict) else None
    return kind if isinstance(kind, str) else None


def _family(model: str, kind: str | None, chosen: Family | None) -> Family:
    found = chosen or detect(model, kind)
    if found is None:
        what = f"model_type {kind}" if kind else "its name"
        raise UnsupportedError(f"{model}: {what} does not say how to ask it; give --family, one of {_names()}")
    return found


def _names() -> str:
    return ", ".join(sorted(FAMILIES))


def _smaller(a: int | None, b: int | None) -> int | None:
    sides = [side for side in (a, b) if side is not None]
    return min(sides) if sides else None


def shrunk(image: Image.Image, longest_side: int | None) -> Image.Image:
    """Brings the longer side of a picture down to longest_side pixels, bicubic; smaller pictures stay."""
    width, height = image.size
    if longest_side is None or max(width, height) <= longest_side:
        return image
    scale = longest_side / max(width, height)
    return image.resize((max(1, int(width * scale)), max(1, int(height * scale))), Image.Resampling.BICUBIC)


# ---- this runtime
class Ours:
    """A model in this runtime, which keeps encoded pictures for the next question about them."""

    def __init__(
        self,
        model: str,
        family: Family | None = None,
        *,
        max_side: int | None = None,
        threads: int = 0,
        precision: str = "auto",
        backend: str = "native",
    ) -> None:
        self._model = load(model, threads=threads, precision=precision, backend=backend)
        self.name, self.versions = self._model.name, {"migician": __version__, "backend": backend}
        # Only a Qwen2-VL that calls itself Migician was finetuned the way that the published y-scaling makes up for.
        found = family or detect(model) or detect(self.name) or FAMILIES["qwen2_vl"]
        if found.inline:
            self._model.close()
            raise UnsupportedError(
                f"{model}: family {found.name} puts pictures into the text; give --family migician or qwen2_vl"
            )
        self.family = found.name
        self._max_side = _smaller(max_side, found.longest_side)

    def answer(self, images: Sequence[Picture], text: str, max_new_tokens: int, *, exact: bool = False) -> Answered:
        """Answers one turn; special tokens are left out, as the published evaluation decodes."""
        any_length_only(self.name, exact)
        answer = self._model.ground(images, text, max_new_tokens=max_new_tokens, max_side=self._max_side)
        written = self._model._vocabulary.decode((token.id for token in answer.tokens), skip_special=True)
        return Answered(written, times_of(answer))

    def close(self) -> None:
        """Frees the model."""
        self._model.close()


def times_of(answer: Answer) -> Times:
    """What this runtime says of an answer's time."""
    stats = answer.stats
    return Times(
        prompt_tokens=answer.prompt_tokens,
        new_tokens=len(answer.tokens),
        total_ms=sum(stats[f"{phase}_ms"] for phase in PHASES),
        preprocess_ms=stats["preprocess_ms"],
        vision_ms=stats["vision_ms"],
        prefill_ms=stats["prefill_ms"],
        decode_ms=stats["decode_ms"],
        peak_rss_mb=stats["peak_rss_mb"],
    )


# ---- transformers
class Transformers:
    """A model in transformers, on the first CUDA device or the CPU.

    Pictures go through the PIL image processor wherever there is one, as in the published evaluation, and whether or
    not torchvision is installed. Weights keep the checkpoint's type unless precision is "fp32".
    """

    def __init__(
        self,
        model: str,
        kind: str | None = None,
        family: Family | None = None,
        *,
        max_side: int | None = None,
        threads: int = 0,
        precision: str = "auto",
    ) -> None:
        try:
            import torch
            from transformers import AutoConfig, AutoModelForImageTextToText
        except ImportError as error:
            raise UnsupportedError(
                f"{model}: needs torch and transformers ({error}); pip install 'migician[bench]'"
            ) from None
        self.name = Path(model).resolve().name if Path(model).is_dir() else model
        if threads:
            torch.set_num_threads(threads)
        with _Reported(ModelFileError, f"{model}: cannot be opened in transformers"):
            # Code that comes with a checkpoint is never run: serve such a model, and give the server's address.
            config = AutoConfig.from_pretrained(model, trust_remote_code=False)
            self._family = _family(model, kind or config.model_type, family)
            self._processor = _processor(model, config)
            dtype = torch.float32 if precision == "fp32" else "auto"
            loaded = AutoModelForImageTextToText.from_pretrained(
                model, config=config, dtype=dtype, trust_remote_code=False
            )
        self._model = loaded.eval().to("cuda" if torch.cuda.is_available() else "cpu")
        generation = self._model.generation_config  # greedy: settings of sampling would only be warned about
        generation.do_sample, generation.temperature, generation.top_p, generation.top_k = False, None, None, None
        self.family = self._family.name
        self.versions = {name: version(name) for name in ("transformers", "torch")}
        self._longest_side = _smaller(max_side, self._family.longest_side)
        self._resize = _qwen_resize(self._processor.image_processor)

    def answer(self, images: Sequence[Picture], text: str, max_new_tokens: int, *, exact: bool = False) -> Answered:
        """Answers one turn. Raises MigicianError for what transformers refuses."""
        import torch

        any_length_only(self.name, exact)

        pictures = [self._picture(image) for image in images]
        with _Reported(MigicianError, f"{self.name}: cannot answer in transformers"), torch.inference_mode():
            turn = [{"role": "user", "content": self._content(len(pictures), text)}]
            prompt = self._processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
            # One list per prompt, so that processors know the pictures for several of one question. The template
            # has written a start token already where the model wants one.
            start = self._processor.tokenizer.bos_token
            inputs = self._processor(
                text=[prompt],
                images=[pictures] if pictures else None,
                return_tensors="pt",
                add_special_tokens=not (start and prompt.startswith(start)),
            )
            inputs = inputs.to(self._model.device, self._model.dtype)  # the type is that of floating inputs
            ids = self._model.generate(**inputs, max_new_tokens=max_new_tokens, num_beams=self._family.beams)
        new = ids[0, inputs["input_ids"].shape[1] :]
        tokenizer = self._processor.tokenizer
        return Answered(tokenizer.decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _content(self, pictures: int, text: str) -> list[dict[str, str]]:
        """The turn's entries. Pictures inside the text are written as the model's own token: templates put image
        entries where they like, LLaVA-OneVision's all in front."""
        token = getattr(self._processor, "image_token", None)
        cut = parts(self._family, pictures, text)
        if token and cut[: pictures + 1] != [None] * pictures + [text]:
            return [{"type": "text", "text": "".join(token if part is None else part for part in cut)}]
        return [{"type": "image"} if part is None else {"type": "text", "text": part} for part in cut]

    def _picture(self, picture: Picture) -> Image.Image:
        """A picture as the processor gets it; for the Qwen2-VL kind resized as in this runtime, once and for all."""
        if self._resize is None:
            return shrunk(open_picture(picture), self._longest_side)
        return Image.fromarray(load_picture(picture, self._resize, max_side=self._longest_side).rgb)

    def seen(self, image: Picture) -> tuple[int, int]:
        """(width, height) at which the model sees a picture."""
        return self._picture(image).size

    def close(self) -> None:
        """Lets go of the weights."""
        del self._model, self._processor


def parts(family: Family, pictures: int, text: str) -> list[str | None]:
    """Cuts a turn into texts and pictures (None): pictures where <image> says, else all in front."""
    if not (family.inline and text.count(PICTURE) == pictures):
        return [*([None] * pictures), text]
    found: list[str | None] = []
    for i, piece in enumerate(text.split(PICTURE)):
        found += [None] * (i > 0) + [piece] * bool(piece)
    return found


def _qwen_resize(settings: Any) -> Preprocessor | None:
    """The resize of an image processor of Qwen2-VL's kind, in cells; None for another kind."""
    patch, merge = getattr(settings, "patch_size", None), getattr(settings, "merge_size", None)
    if not (isinstance(patch, int) and isinstance(merge, int)):
        return None
    size = getattr(settings, "size", None)
    found = size if isinstance(size, dict) else vars(size or settings)
    low = getattr(settings, "min_pixels", None) or found.get("shortest_edge") or 4 * 28 * 28
    high = getattr(settings, "max_pixels", None) or found.get("longest_edge") or 16384 * 28 * 28
    return Preprocessor(low, high, patch_size=patch, merge_size=merge)


class _Reported:
    """Turns whatever a library raises into a MigicianError of one line."""

    def __init__(self, kind: type[MigicianError], what: str) -> None:
        self._kind, self._what = kind, what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, (MigicianError, MemoryError)):
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            advice = "correct it, or serve the model elsewhere and give --model http://..."
            raise self._kind(f"{self._what} ({reason}); {advice}") from error


def _processor(model: str, config: Any) -> Any:
    """The model's processor with a PIL image processor and nothing for videos: those would need torchvision."""
    from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    kind = PROCESSOR_MAPPING.get(type(config), None)
    if kind is None or not set(kind.get_attributes()) <= {"image_processor", "tokenizer", "video_processor"}:
        return AutoProcessor.from_pretrained(model, trust_remote_code=False)

    def check(self: Any, name: str, part: Any) -> Any:
        return None if name == "video_processor" else kind.check_argument_for_proper_class(self, name, part)

    without_videos: Any = type(kind.__name__, (kind,), {"check_argument_for_proper_class": check})
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)  # which backend the image processor has is settled here
    try:
        made: dict[str, Any] = {
            "tokenizer": AutoTokenizer.from_pretrained(model, trust_remote_code=False),
            "image_processor": AutoImageProcessor.from_pretrained(model, backend="pil", trust_remote_code=False),
            "video_processor": None,
        }
    finally:
        logger.setLevel(level)
    settings, _ = kind.get_processor_dict(model)
    processor = without_videos.from_args_and_dict([made[name] for name in kind.get_attributes()], settings)
    tokenizer = made["tokenizer"]
    if getattr(processor, "video_token", None) not in tokenizer.get_vocab():
        processor.video_token_id = None  # it would be that of unknown words, which then count as videos
    return processor


# ---- endpoints
class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


class Endpoint:
    """A model behind POST /v1/chat/completions; pictures go as data: URLs.

    Some servers leave special tokens in their answers; they are taken out, as the other models do.

    url: http://HOST[:PORT][/v1][#MODEL]. Without #MODEL the server is asked, and must serve one model only.
    timeout_s: for one answer.
    pause: sleeps so many seconds between tries: 1, 2, 4, 8, or what Retry-After says, up to 60.
    """

    TRIES = 5
    versions: Mapping[str, str] = MappingProxyType({})  # the server's own affair

    def __init__(
        self,
        url: str,
        family: Family | None = None,
        *,
        max_side: int | None = None,
        timeout_s: float = 600,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        address, _, name = url.partition("#")
        self._base = _base(address)
        self._timeout_s, self._pause, self._heard = timeout_s, pause, False
        self._opener = urllib.request.build_opener(_NoRedirects)
        self._model = urllib.parse.unquote(name) or self._only_model()
        self.name = self._model
        found = family or detect(self._model)
        if found is None:
            raise UnsupportedError(
                f"{self._base}: the name {self._model!r} does not say how to ask it; give --family, one of {_names()}"
            )
        self._family, self.family = found, found.name
        self._longest_side = _smaller(max_side, found.longest_side)

    def answer(self, images: Sequence[Picture], text: str, max_new_tokens: int, *, exact: bool = False) -> Answered:
        """Answers one turn. Raises MigicianError when the server does not, after five tries where it may yet."""
        any_length_only(self.name, exact)
        urls = iter([_data_url(image, self._longest_side) for image in images])
        content: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": next(urls)}} if part is None else {"type": "text", "text": part}
            for part in parts(self._family, len(images), text)
        ]
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": max_new_tokens,
            "stream": False,
        }
        return Answered(self._text(self._call("/chat/completions", body)))

    def close(self) -> None:
        """Nothing is held."""

    def seen(self, image: Picture) -> tuple[int, int]:
        """(width, height) at which the model sees a picture, taking the server to resize as Qwen2.5-VL's processor."""
        width, height = shrunk(open_picture(image), self._longest_side).size
        return resized(width, height)

    def _only_model(self) -> str:
        listed = self._call("/models", None).get("data")
        names = [str(m["id"]) for m in listed if isinstance(m, dict) and "id" in m] if isinstance(listed, list) else []
        if len(names) != 1:
            found = f"serves {', '.join(names[:8])}" if names else "names no model"
            raise MigicianError(f"{self._base}: {found}; say which, as {self._base}#MODEL")
        return names[0]

    def _text(self, reply: dict[str, Any]) -> str:
        try:
            content = reply["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError):
            raise MigicianError(
                f"{self._base}: the answer has no choices[0].message.content ({_short(reply)}); "
                "is it an OpenAI-compatible server?"
            ) from None
        if isinstance(content, list):
            content = "".join(str(p.get("text", "")) for p in content if isinstance(p, dict))
        return strip_tags(content) if isinstance(content, str) else ""  # null: it had nothing to say

    def _call(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if key := os.environ.get(KEY):
            if not (key.isascii() and key.isprintable()):  # refused by HTTP with the key in the message
                raise MigicianError(f"{self._base}: {KEY} holds more than printable ASCII; set the key alone")
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._base + path, data, headers)
        for attempt in range(1, self.TRIES + 1):
            wait = 2.0 ** (attempt - 1)
            try:
                with self._opener.open(request, timeout=self._timeout_s) as response:
                    raw = response.read()
                break
            except urllib.error.HTTPError as error:
                with error:
                    detail = _detail(error)
                if error.code != 429 and error.code < 500:
                    raise MigicianError(f"{self._base}: {self._refusal(error, detail)}") from None
                problem = f"status {error.code}{detail}"
                wait = _retry_after(error.headers.get("Retry-After"), wait)
            except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
                reason = getattr(error, "reason", error)
                problem = "no answer in time" if isinstance(reason, TimeoutError) else str(reason) or "cut off"
                if isinstance(reason, ConnectionRefusedError) and not self._heard:
                    raise MigicianError(f"{self._base}: nothing listens there; start the server first") from None
            except ValueError as error:  # an address that HTTP cannot carry
                raise MigicianError(f"{self._base}: cannot be asked ({error}); check the address") from None
            if attempt == self.TRIES:
                raise MigicianError(f"{self._base}: {problem}, {attempt} times; see the server's log, then run again")
            self._pause(wait)
        self._heard = True
        try:
            reply = json.loads(raw)
        except (ValueError, RecursionError):
            reply = None
        if not isinstance(reply, dict):
            raise MigicianError(f"{self._base}{path}: answered no JSON object ({_short(raw)}); check the address")
        return reply

    def _refusal(self, error: urllib.error.HTTPError, detail: str) -> str:
        if error.code in (401, 403):
            return f"status {error.code}{detail}; set {KEY} to a key that it takes"
        if 300 <= error.code < 400:
            return f"sends elsewhere, to {error.headers.get('Location')}; give that address"
        if error.code == 404:
            return f"status 404{detail}; check the address and the model's name"
        return f"status {error.code}{detail}; correct it and run again"


def _base(address: str) -> str:
    """An address up to /v1: what /chat/completions is appended to."""
    cut = urllib.parse.urlsplit(address)
    try:
        host, _ = cut.hostname, cut.port
    except ValueError:
        host = None
    if not host or cut.query:
        raise MigicianError(f"{address}: not a server's address; give http://HOST:PORT, and #MODEL behind it")
    if cut.username or cut.password:
        raise MigicianError(f"{cut.scheme}://{host}: no name or password in the address; set {KEY}")
    path = cut.path.rstrip("/").removesuffix("/chat/completions")
    return f"{cut.scheme}://{cut.netloc}{path or '/v1'}"


def _short(value: Any) -> str:
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else json.dumps(value)
    return " ".join(text.split())[:160] or "nothing"


def _detail(error: urllib.error.HTTPError) -> str:
    """What an error's body says, as ": words"."""
    try:
        raw = error.read(100_000)
        found = json.loads(raw)
        found = found.get("error", found.get("detail", found.get("message"))) if isinstance(found, dict) else found
        found = found.get("message", found) if isinstance(found, dict) else found
    except ValueError:
        found = raw.decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        return ""
    words = found if isinstance(found, str) else json.dumps(found)
    words = " ".join(words.split())[:200]
    return f": {words}" if words else ""


def _retry_after(header: str | None, otherwise: float) -> float:
    try:
        return min(60.0, max(0.0, float(header or "")))
    except ValueError:  # none, or a date
        return otherwise


_AS_IT_IS = {"PNG": "image/png", "JPEG": "image/jpeg"}  # every server reads these


def _data_url(picture: Picture, longest_side: int | None) -> str:
    """A picture as a data: URL: the file's own bytes where nothing has to change, else PNG."""
    image, raw, kind = open_picture(picture), b"", None
    if isinstance(picture, Path):
        raw = read_bytes(picture)
        with Image.open(io.BytesIO(raw)) as file:
            plain = file.mode == "RGB" and "transparency" not in file.info and file.getexif().get(0x0112, 1) == 1
            kind = _AS_IT_IS.get(file.format or "") if plain else None
    small = shrunk(image, longest_side)
    if kind is None or small is not image:
        stream = io.BytesIO()
        small.save(stream, "PNG", compress_level=1)
        raw, kind = stream.getvalue(), "image/png"
    return f"data:{kind};base64,{base64.b64encode(raw).decode('ascii')}"
