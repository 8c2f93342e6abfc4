"""Renders chat templates: the part of the Jinja language that they are written in, and nothing of Python behind it.

A template comes with a model from anywhere. So its expressions are read, by Python's own parser, and then walked here,
over strings, numbers, lists and dicts only, within a budget of steps and characters; nothing is ever executed. What no
chat template needs (macros, imports, most filters) raises TemplateError.

    {{ expression }}   {% for %} {% if %} {% elif %} {% else %} {% set %} {% generation %}   {# comment #}

Jinja's expressions are Python's but for two operators: `~` joins texts and `|` filters, binding tightest. They are read
as `@` and `**`, which no template has; `is string` is read as a comparison. White space is cut as transformers sets
Jinja up: trim_blocks, lstrip_blocks, no newline at the end.
Source: the Jinja documentation, "Template Designer Documentation"; transformers `utils/chat_template_utils.py`.
"""

import ast
import json
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

__all__ = ["TemplateError", "compile_template"]

_MAX_SOURCE = 256 << 10
_MAX_EXPRESSION = 2000  # characters without its strings; Python's parser nests as deep as they let it
_MAX_STEPS = 200_000
_MAX_CHARACTERS = 4 << 20  # written or computed, in one rendering
_MAX_DEPTH = 60


class TemplateError(Exception):
    """A template is damaged, beyond this renderer, or refuses the conversation itself."""


class _Undefined:
    """What nobody set: false, equal to itself, printed as nothing."""

    def __bool__(self) -> bool:
        return False

    def __str__(self) -> str:
        return ""


_UNDEFINED = _Undefined()


class _Namespace(dict[str, Any]):
    """What namespace() makes: its attributes can be set from inside a loop."""


@dataclass
class _Run:
    """One rendering: the scopes, innermost last, what was written, and what is left of the budget."""

    scopes: list[dict[str, Any]]
    out: list[str] = field(default_factory=list)
    steps: int = _MAX_STEPS
    room: int = _MAX_CHARACTERS

    def step(self) -> None:
        self.steps -= 1
        if self.steps < 0:
            raise TemplateError("it runs too long")

    def spend(self, characters: int) -> None:
        self.room -= characters
        if self.room < 0:
            raise TemplateError("it writes too much")

    def write(self, text: str) -> None:
        self.spend(len(text))
        self.out.append(text)

    def get(self, name: str) -> Any:
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        if name in ("bos_token", "eos_token", "pad_token", "unk_token", "strftime_now"):
            raise TemplateError(f"it asks for {name}")
        return _GLOBALS.get(name, _UNDEFINED)


_Statement = Callable[[_Run], None]


# ---- from text to tags
_OPENING = re.compile(r"\{(?P<kind>[{%#])(?P<cut>[-+]?)")
_STRING = r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\""
_TO_CLOSING = re.compile(rf"(?:{_STRING}|\{{[^{{}}]*\}}|(?![-+]?[%}}]\}}|['\"]).)*", re.DOTALL)
_CLOSING = re.compile(r"(?P<cut>[-+]?)(?P<kind>[%}])\}")
_STRINGS = re.compile(_STRING, re.DOTALL)
_OPERATOR = re.compile(rf"{_STRING}|~|\|", re.DOTALL)
_OPERATORS = {"~": "@", "|": "**"}
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\", "'": "'", '"': '"'}
_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|(.))", re.DOTALL)


@dataclass(frozen=True)
class _Tag:
    """A piece of a template. kind: "text", "{" for an expression, "%" for a statement; text: what is inside."""

    kind: str
    text: str


def _tags(source: str) -> Iterator[_Tag]:
    """Cuts a template into text and tags, the white space around tags cut as they ask."""
    at, cut, line_starts = 0, "", True
    while opening := _OPENING.search(source, at):
        text = source[at : opening.start()]
        text = text.lstrip() if cut == "-" else text
        line = text.rfind("\n") + 1
        if opening["cut"] == "-":
            text = text.rstrip()
        elif opening["kind"] != "{" and not opening["cut"] and (line or line_starts) and not text[line:].strip(" \t"):
            text = text[:line]
        yield _Tag("text", text)
        if opening["kind"] == "#":
            end = source.find("#}", opening.end())
            cut, at = source[end - 1 : end], end + 2
            if end < 0:
                raise TemplateError("a comment does not end")
        else:
            inside = _TO_CLOSING.match(source, opening.end())
            closing = inside and _CLOSING.match(source, inside.end())
            if not inside or not closing or (closing["kind"] == "%") != (opening["kind"] == "%"):
                raise TemplateError("a tag does not end")
            yield _Tag(opening["kind"], inside[0].strip())
            cut, at = closing["cut"], closing.end()
        line_starts = opening["kind"] != "{" and cut not in ("-", "+") and source.startswith("\n", at)
        at += line_starts
    yield _Tag("text", source[at:].lstrip() if cut == "-" else source[at:])


def _expression(text: str) -> ast.expr:
    """Reads an expression, its operators as the top of this file says."""

    def character(m: re.Match[str]) -> str:
        return chr(int(m[1] or m[2], 16)) if m[1] or m[2] else _ESCAPES.get(m[3], m[0])

    def python(m: re.Match[str]) -> str:
        if m[0] in _OPERATORS:
            return _OPERATORS[m[0]]
        return repr(_ESCAPE.sub(character, m[0][1:-1]))

    if len(_STRINGS.sub("", text)) > _MAX_EXPRESSION:
        raise TemplateError("an expression is too long")
    for end in (")", " else undefined)"):  # Jinja lets an else be left out
        try:
            return ast.parse("(" + _OPERATOR.sub(python, text).replace("\n", " ") + end, mode="eval").body
        except (SyntaxError, ValueError, MemoryError, RecursionError):
            continue
    raise TemplateError(f"{text[:40]!r} is not understood")


# ---- expressions
def _value(run: _Run, node: ast.expr) -> Any:
    """Computes an expression."""
    run.step()
    rule = _RULES.get(type(node))
    if rule is None:
        raise TemplateError(f"{type(node).__name__} is beyond chat templates")
    value = rule(run, node)
    if isinstance(node, (ast.BinOp, ast.Call, ast.Subscript)) and isinstance(value, (str, list)):
        run.spend(len(value))
    return value


def _constant(run: _Run, node: ast.Constant) -> Any:
    if not isinstance(node.value, (str, int, float, bool, type(None))):
        raise TemplateError(f"{type(node.value).__name__} is beyond chat templates")
    return node.value


def _name(run: _Run, node: ast.Name) -> Any:
    return _CONSTANTS[node.id] if node.id in _CONSTANTS else run.get(node.id)


def _either(run: _Run, node: ast.BoolOp) -> Any:
    value = None
    for operand in node.values:
        value = _value(run, operand)
        if bool(value) == isinstance(node.op, ast.Or):
            break
    return value


def _unary(run: _Run, node: ast.UnaryOp) -> Any:
    if isinstance(node.op, ast.Not):
        return not _value(run, node.operand)
    return _binary(run, ast.BinOp(ast.Constant(0), ast.Sub(), node.operand))


def _binary(run: _Run, node: ast.BinOp) -> Any:
    left = _value(run, node.left)
    if isinstance(node.op, ast.Pow):
        return _filtered(run, left, node.right)
    right = _value(run, node.right)
    if isinstance(node.op, ast.MatMult):
        return str(left) + str(right)
    numbers = all(isinstance(v, (int, float)) and abs(v) < 1e15 for v in (left, right))
    joined = isinstance(node.op, ast.Add) and type(left) is type(right) and isinstance(left, (str, list))
    if type(node.op) not in _ARITHMETIC or not (numbers or joined):
        raise TemplateError(f"it computes with {type(left).__name__} and {type(right).__name__}")
    return _apply(_ARITHMETIC[type(node.op)], left, right)


def _filtered(run: _Run, value: Any, filters: ast.expr) -> Any:
    """Applies what stands behind a |. Since ** binds to the right, a | b | c comes as a ** (b ** c)."""
    if isinstance(filters, ast.BinOp) and isinstance(filters.op, ast.Pow):
        return _filtered(run, _filtered(run, value, filters.left), filters.right)
    arguments = filters.args if isinstance(filters, ast.Call) else []
    name = filters.func if isinstance(filters, ast.Call) else filters
    if not isinstance(name, ast.Name) or name.id not in _FILTERS:
        raise TemplateError("a filter is not known")
    return _apply(_FILTERS[name.id], value, *(_value(run, a) for a in arguments))


def _compared(run: _Run, node: ast.Compare) -> bool:
    left = _value(run, node.left)
    for op, operand in zip(node.ops, node.comparators, strict=True):
        if isinstance(op, (ast.Is, ast.IsNot)):
            if not isinstance(operand, ast.Name) or operand.id not in _TESTS:
                raise TemplateError("a test is not known")
            holds, right = _TESTS[operand.id](left) == isinstance(op, ast.Is), left
        else:
            right = _value(run, operand)
            holds = bool(_apply(_COMPARISONS[type(op)], left, right))
        if not holds:
            return False
        left = right
    return True


def _called(run: _Run, node: ast.Call) -> Any:
    function = _value(run, node.func)
    if not isinstance(function, _Function):
        raise TemplateError("it calls what is no function")
    named = {k.arg: _value(run, k.value) for k in node.keywords if k.arg}
    return _apply(function.apply, *(_value(run, a) for a in node.args), **named)


def _subscript(run: _Run, node: ast.Subscript) -> Any:
    value = _value(run, node.value)
    if isinstance(node.slice, ast.Slice):
        bounds = (node.slice.lower, node.slice.upper, node.slice.step)
        part = slice(*(None if bound is None else _value(run, bound) for bound in bounds))
        return _apply(operator.getitem, value, part) if isinstance(value, (str, list)) else _UNDEFINED
    key = _value(run, node.slice)
    if isinstance(value, (str, list, tuple)) and isinstance(key, int):
        return value[key] if -len(value) <= key < len(value) else _UNDEFINED
    return _member(value, key) if isinstance(key, str) else _UNDEFINED


def _member(value: Any, name: str) -> Any:
    if isinstance(value, _Undefined):
        raise TemplateError(f"it looks for {name!r} in what is undefined")
    if isinstance(value, dict) and name in value:
        return value[name]
    if name not in _METHODS.get(dict if isinstance(value, dict) else type(value), ()):
        return _UNDEFINED
    return _Function(partial(_replaced, value) if name == "replace" else getattr(value, name))


@dataclass(frozen=True)
class _Function:
    apply: Callable[..., Any]


def _apply(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    try:
        return function(*arguments, **named)
    except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
        raise TemplateError(str(error)[:80]) from None


def _replaced(text: str, old: str, new: str) -> str:
    if text.count(old) * len(new) > _MAX_CHARACTERS:
        raise TemplateError("it writes too much")
    return text.replace(old, new)


def _joined(items: Sequence[Any], between: str = "") -> str:
    if len(items) * len(between) > _MAX_CHARACTERS:
        raise TemplateError("it writes too much")
    return between.join(map(str, items))


def _refuse(message: object = "") -> None:
    raise TemplateError(f"it says: {' '.join(str(message).split())[:100]}")


def _range(*bounds: int) -> list[int]:
    if len(numbers := range(*bounds)) > _MAX_STEPS:
        raise TemplateError("it runs too long")
    return list(numbers)


_CONSTANTS = {"true": True, "false": False, "none": None}
_GLOBALS: Mapping[str, Any] = {
    "namespace": _Function(_Namespace),
    "range": _Function(_range),
    "raise_exception": _Function(_refuse),
}
_METHODS: Mapping[type, Sequence[str]] = {
    str: ("strip", "lstrip", "rstrip", "split", "startswith", "endswith", "upper", "lower", "replace", "title"),
    dict: ("get",),
}
_FILTERS: Mapping[str, Callable[..., Any]] = {
    "trim": lambda v: str(v).strip(),
    "string": str,
    "upper": lambda v: str(v).upper(),
    "lower": lambda v: str(v).lower(),
    "length": len,
    "count": len,
    "first": lambda v: v[0] if v else _UNDEFINED,
    "last": lambda v: v[-1] if v else _UNDEFINED,
    "list": list,
    "join": _joined,
    "replace": _replaced,
    "default": lambda v, other="", false_too=False: other if v is _UNDEFINED or (false_too and not v) else v,
    "tojson": lambda v: json.dumps(v, ensure_ascii=False),
}
_TESTS: Mapping[str, Callable[[Any], bool]] = {
    "defined": lambda v: v is not _UNDEFINED,
    "undefined": lambda v: v is _UNDEFINED,
    "none": lambda v: v is None,
    "string": lambda v: isinstance(v, str),
    "mapping": lambda v: isinstance(v, dict),
    "sequence": lambda v: isinstance(v, (str, list, tuple, dict)),
    "iterable": lambda v: isinstance(v, (str, list, tuple, dict)),
    "number": lambda v: isinstance(v, (int, float)),
    "boolean": lambda v: isinstance(v, bool),
    "true": lambda v: v is True,
    "false": lambda v: v is False,
}
_ARITHMETIC: Mapping[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_COMPARISONS: Mapping[type, Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}
_RULES: Mapping[type, Callable[[_Run, Any], Any]] = {
    ast.Constant: _constant,
    ast.Name: _name,
    ast.List: lambda run, node: [_value(run, item) for item in node.elts],
    ast.Tuple: lambda run, node: tuple(_value(run, item) for item in node.elts),
    ast.BoolOp: _either,
    ast.UnaryOp: _unary,
    ast.BinOp: _binary,
    ast.Compare: _compared,
    ast.IfExp: lambda run, node: _value(run, node.body if _value(run, node.test) else node.orelse),
    ast.Call: _called,
    ast.Subscript: _subscript,
    ast.Attribute: lambda run, node: _member(_value(run, node.value), node.attr),
}


# ---- statements
_FOR = re.compile(r"for\s+(\w+)\s+in\s+(.+?)(?:\s+if\s+(.+))?", re.DOTALL)
_SET = re.compile(r"set\s+(\w+)(?:\.(\w+))?\s*(?:=\s*(.+))?", re.DOTALL)


class _Blocks:
    """Compiles the tags of a template into one function that writes."""

    def __init__(self, tags: Iterator[_Tag]) -> None:
        self._tags = tags
        self._depth = 0

    def until(self, *ends: str) -> tuple[_Statement, str]:
        """All up to a statement that begins with one of these words, "" for the end: (what writes it, that one)."""
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise TemplateError("it is nested too deep")
        body: list[_Statement] = []
        for tag in self._tags:
            word = tag.text.split(None, 1)[0] if tag.kind == "%" and tag.text else ""
            if tag.kind == "text":
                body.append(_writes(ast.Constant(tag.text)))
            elif tag.kind == "{":
                body.append(_writes(_expression(tag.text)))
            elif word in ends:
                self._depth -= 1
                return _all(body), tag.text
            else:
                body.append(self._statement(word, tag.text))
        if "" not in ends:
            raise TemplateError(f"{ends[-1]} is missing")
        return _all(body), ""

    def _statement(self, word: str, text: str) -> _Statement:
        if word == "if":
            return self._if(text)
        if word == "for" and (m := _FOR.fullmatch(text)):
            test = _expression(m[3]) if m[3] else None
            return _loop(m[1], _expression(m[2]), test, self.until("endfor")[0])
        if word == "set" and (m := _SET.fullmatch(text)):
            if m[3] is None:
                return _captured(m[1], self.until("endset")[0])
            return _assigned(m[1], m[2], _expression(m[3]))
        if word == "generation":
            return self.until("endgeneration")[0]
        raise TemplateError(f"{text[:40]!r} is not understood")

    def _if(self, text: str) -> _Statement:
        branches = []
        while text.startswith(("if", "elif")):
            test = _expression(text.split(None, 1)[1] if " " in text else "")
            body, text = self.until("elif", "else", "endif")
            branches.append((test, body))
        if text == "else":
            branches.append((ast.Constant(True), self.until("endif")[0]))

        def choose(run: _Run) -> None:
            for test, body in branches:
                if _value(run, test):
                    body(run)
                    return

        return choose


def _writes(node: ast.expr) -> _Statement:
    return lambda run: run.write(str(_value(run, node)))


def _all(body: Sequence[_Statement]) -> _Statement:
    def run_all(run: _Run) -> None:
        for statement in body:
            statement(run)

    return run_all


def _assigned(name: str, attribute: str | None, node: ast.expr) -> _Statement:
    def assign(run: _Run) -> None:
        value = _value(run, node)
        target = run.get(name)
        if attribute is None:
            run.scopes[-1][name] = value
        elif isinstance(target, _Namespace):
            target[attribute] = value
        else:
            raise TemplateError(f"{name} is no namespace")

    return assign


def _captured(name: str, body: _Statement) -> _Statement:
    def capture(run: _Run) -> None:
        outer, run.out = run.out, []
        body(run)
        run.scopes[-1][name], run.out = "".join(run.out), outer

    return capture


def _loop(name: str, values: ast.expr, test: ast.expr | None, body: _Statement) -> _Statement:
    def loop(run: _Run) -> None:
        items = _value(run, values)
        if not isinstance(items, (str, list, tuple)):
            raise TemplateError(f"it loops over {type(items).__name__}")
        run.scopes.append({})
        if test is not None:
            items = [item for item in items if _holds(run, name, item, test)]
        last = len(items) - 1
        for i, item in enumerate(items):
            run.step()
            where = {"index": i + 1, "index0": i, "first": i == 0, "last": i == last, "length": last + 1}
            run.scopes[-1] = {name: item, "loop": where}
            body(run)
        run.scopes.pop()

    return loop


def _holds(run: _Run, name: str, item: Any, test: ast.expr) -> bool:
    run.scopes[-1] = {name: item}
    return bool(_value(run, test))


def compile_template(source: str) -> Callable[[Mapping[str, Any]], str]:
    """Compiles a template: a function from its variables, strings, numbers, lists and dicts, to text.

    Both raise TemplateError.
    """
    if len(source) > _MAX_SOURCE:
        raise TemplateError("it is too long")
    source = source.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n")
    body, _ = _Blocks(_tags(source)).until("")

    def render(variables: Mapping[str, Any]) -> str:
        run = _Run([dict(variables)])
        try:
            body(run)
        except RecursionError:
            raise TemplateError("it is nested too deep") from None
        return "".join(run.out)

    return render
