"""The chat template: how a conversation about pictures becomes the one text that the model reads.

Qwen2-VL's own, for two pictures (no newlines around them):

    <|im_start|>system
    You are a helpful assistant.<|im_end|>
    <|im_start|>user
    <|vision_start|><|image_pad|><|vision_end|><|vision_start|><|image_pad|><|vision_end|>QUESTION<|im_end|>
    <|im_start|>assistant

A finetune may come with another one: with its own default system turn, with none, or written for words in which
pictures stand as `<|vision_start|><|image_pad|><|vision_end|>`. It is rendered (render.py), so that the ids are those
of transformers' apply_chat_template. Where that is not possible, Qwen2-VL's own serves, with the system turn that can
be found in the text, and `note` says so.

What people write never passes through a template: it sees marks in their place, with the white space that was around
the words, so that it can trim them.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ModelFileError, UnsupportedError
from .render import TemplateError, compile_template

__all__ = [
    "CHAT_TEMPLATE",
    "DEFAULT",
    "PAD",
    "SYSTEM_TURN",
    "ChatTemplate",
    "Message",
    "folder_template",
    "read_template",
    "split_marks",
]

SYSTEM = "You are a helpful assistant."
SYSTEM_TURN = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n"

# For transformers; pictures stand where the message has them, each as one <|image_pad|> that its processor repeats.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    f"{SYSTEM_TURN}"
    "{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] in ('image', 'image_url') %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
PAD = "<|image_pad|>"
_MARK = re.compile("\ufdd0(\\d+)\ufdd1")  # noncharacters, which no text has
_SYSTEM = re.compile(r"<\|im_start\|>system(?:\n|\\n)(.*?)<\|im_end\|>", re.DOTALL)
_TAG = re.compile(r"<\|\w+\|>")


@dataclass(frozen=True)
class Message:
    """One turn. role: system, user or assistant.   content: texts, and None for each picture, in their order."""

    role: str
    content: Sequence[str | None]


@dataclass(frozen=True)
class ChatTemplate:
    """Writes conversations.

    source: the template's text, None for Qwen2-VL's own.   system: the default system turn of Qwen2-VL's own, None for
    no turn at all.   note: what a user should know of how the template was read, "" for nothing.
    """

    source: str | None = None
    system: str | None = SYSTEM
    note: str = ""
    _render: Callable[[Mapping[str, Any]], str] | None = None
    _lists: bool = True  # a question is a list of parts; else one text with _PICTURE in it

    def write(self, messages: Sequence[Message]) -> str:
        """Writes the conversation up to where the model's answer begins.

        The texts of the messages, counted over all of them in order, appear as marks; see split_marks().
        Raises UnsupportedError when the template has no place for them, its reason in the message.
        """
        marked, marks = [], 0
        for message in messages:
            content = []
            for part in message.content:
                content.append(None if part is None else _marked(part, marks))
                marks += part is not None
            marked.append(Message(message.role, content))
        if self._render is None:
            return _qwen2_vl(marked, self.system)
        reason = ""
        for lists in (False, True)[: 1 + self._lists]:  # most templates want the other turns as texts, some as lists
            turns = []
            for message in marked:
                as_list = lists or (message.role == "user" and self._lists)
                turns.append({"role": message.role, "content": _content(message, as_list)})
            try:
                text = self._render({"messages": turns, "add_generation_prompt": True, "tools": None})
            except TemplateError as error:
                reason = reason or str(error)
                continue
            if _order(text) == _wanted(messages):
                return text
        reason = reason or f"no place for {', '.join(dict.fromkeys(message.role for message in messages))}"
        raise UnsupportedError(f"the model's chat template does not serve this conversation: {reason}; ask otherwise")


DEFAULT = ChatTemplate()


def _qwen2_vl(messages: Sequence[Message], system: str | None) -> str:
    text = ""
    if system is not None and messages[0].role != "system":
        text = f"<|im_start|>system\n{system}<|im_end|>\n"
    for message in messages:
        words = "".join(_PICTURE if part is None else part for part in message.content)
        text += f"<|im_start|>{message.role}\n{words}<|im_end|>\n"
    return text + "<|im_start|>assistant\n"


def _content(message: Message, lists: bool) -> Any:
    if not lists:
        return "".join(_PICTURE if part is None else part for part in message.content)
    return [{"type": "image", "image": ""} if p is None else {"type": "text", "text": p} for p in message.content]


def _marked(text: str, number: int) -> str:
    words = text.strip()
    if not words:
        return f"{text}\ufdd0{number}\ufdd1"
    before, after = text[: text.index(words[0])], text[len(text.rstrip()) :]
    return f"{before}\ufdd0{number}\ufdd1{after}"


def split_marks(text: str) -> list[str | int]:
    """Cuts what `write` wrote into the template's own words and the numbers of the texts that stand between them.

    White space around a text is among the template's words; its number stands for the rest.
    """
    return [int(part) if i % 2 else part for i, part in enumerate(_MARK.split(text))]


def _order(text: str) -> list[str]:
    """The marks and pictures in a text, in their order."""
    return [m[1] or "picture" for m in re.finditer(f"{_MARK.pattern}|{re.escape(PAD)}", text)]


def _wanted(messages: Sequence[Message]) -> list[str]:
    parts = [part for message in messages for part in message.content]
    numbers = iter(range(len(parts)))
    return ["picture" if part is None else str(next(numbers)) for part in parts]


_PROBE = (Message("user", (None, "a", None, "b")),)
_PROBES = (
    _PROBE,
    (Message("user", ("a",)),),
    (Message("system", ("s",)), Message("user", (None, "a"))),
    (Message("user", (None, "a")), Message("assistant", ("b",)), Message("user", ("c",))),
    (Message("system", ("s",)), Message("user", ("a",)), Message("assistant", ("b",)), Message("user", ("c",))),
)


def read_template(source: str | None, *, knows: Callable[[str], bool] = lambda tag: True) -> ChatTemplate:
    """Reads a model's chat template; what renders the same as Qwen2-VL's own is that one.

    knows: whether the model's tokenizer has a tag as one token. Never raises: `note` says what could not be read.
    """
    if source is None:
        return DEFAULT
    reason = ""
    try:
        render = compile_template(source)
    except TemplateError as error:
        return _found_in(source, str(error))
    for lists in (True, False):
        template = ChatTemplate(source, None, "", render, lists)
        try:
            text = template.write(_PROBE)
        except UnsupportedError as error:
            reason = reason or str(error).partition(": ")[2].removesuffix("; ask otherwise")
            continue
        unknown = [tag for tag in _TAG.findall(text) if not knows(tag)]
        if unknown:
            return _found_in(source, f"the tokenizer has no {unknown[0]}")
        return DEFAULT if all(_same(template, probe) for probe in _PROBES) else template
    return _found_in(source, reason)


def _same(template: ChatTemplate, probe: Sequence[Message]) -> bool:
    try:
        return template.write(probe) == DEFAULT.write(probe)
    except UnsupportedError:
        return False


def _found_in(source: str, reason: str) -> ChatTemplate:
    """Qwen2-VL's own with the system turn that stands in a template's text, if it is the only one."""
    found = {m for m in _SYSTEM.findall(source) if "{" not in m}
    system = found.pop().replace("\\n", "\n") if len(found) == 1 else SYSTEM
    with_turn = " with its system turn" if system != SYSTEM else ""
    note = f"the chat template is not understood ({reason}); Qwen2-VL's own serves{with_turn}; --system sets another"
    return ChatTemplate(source, system, note)


def folder_template(folder: Path, read: Callable[[Path], str], parse: Callable[..., dict[str, Any]]) -> dict[str, str]:
    """Finds a checkpoint folder's chat template: {"chat_template": text}, or {} for none or one that is Qwen2-VL's own.

    The places are those of transformers' processors, then its tokenizers: processor_config.json, chat_template.json,
    chat_template.jinja, tokenizer_config.json.   read, parse: of files and of JSON, with the errors that fit a folder.
    Raises ModelFileError for a file that is damaged.
    """
    found: Any = None
    for name in ("processor_config.json", "chat_template.json", "chat_template.jinja", "tokenizer_config.json"):
        path = folder / name
        if not path.exists():
            continue
        text = read(path)
        found = text if path.suffix == ".jinja" else parse(text, path, "chat template").get("chat_template")
        if isinstance(found, list):  # of several, transformers takes the one so named
            named = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
            found = named.get("default")
        if found is not None:
            break
    if found is None:
        return {}
    if not isinstance(found, str):
        raise ModelFileError(f"{path}: chat_template is not a text; restore the file that belongs to the model")
    return {} if read_template(found) == DEFAULT else {"chat_template": found}
