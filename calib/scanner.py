"""Reads a JSON array, or JSON values one after another, from a file of any size: one value in memory at a time.

The end of a value is found by its brackets and strings, and only then is it parsed. A value that cannot be read is
reported and skipped: reading goes on at the next place that looks like the start of a record.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

__all__ = ["MAX_VALUE_BYTES", "Broken", "Value", "scan"]

MAX_VALUE_BYTES = 1 << 20  # a record has a few KB; what is longer is a bracket that nothing closes
_CHUNK_BYTES = 1 << 16
_CLOSER = {ord("{"): ord("}"), ord("["): ord("]")}
_BRACKET = re.compile(rb'["{}\[\]]')
_IN_STRING = re.compile(rb'[\\"\x00-\x1f]')  # JSON strings hold no control characters: a line end means a lost quote
_GAP = re.compile(rb"[\s,]*")
_SCALAR = re.compile(rb"[^\s,\[\]{}\"]+")
_RECORD_KEYS = {"id", "images", "image", "conversations", "messages", "type"}
_TURN_KEYS = {"from", "value", "role", "content"}


@dataclass(frozen=True)
class Value:
    """A parsed value.   number: from 1, broken ones counted.   start, size: its place in the file, in bytes."""

    number: int
    start: int
    size: int
    value: Any


@dataclass(frozen=True)
class Broken:
    """A place where no value could be read."""

    number: int
    start: int
    reason: str


class _Window:
    """The part of a file that is in memory; positions count from its start."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.base = file, 0
        self.data = bytearray()
        if file.read(3) == b"\xef\xbb\xbf":  # a byte order mark
            self.base = 3
        else:
            file.seek(0)

    def more(self) -> bool:
        """Reads on; False at the end of the file."""
        chunk = self.file.read(_CHUNK_BYTES)
        self.data += chunk
        return bool(chunk)

    def drop(self, pos: int) -> int:
        """Forgets what lies before pos when that is much; returns where pos is now."""
        if pos < _CHUNK_BYTES:
            return pos
        del self.data[:pos]
        self.base += pos
        return 0

    def gap(self, pos: int) -> int:
        """The next position that holds neither white space nor a comma; the length of data at the end of the file."""
        while True:
            match = _GAP.match(self.data, pos)
            pos = match.end() if match else pos
            if pos < len(self.data):
                return pos
            pos = self.drop(pos)
            if not self.more():
                return pos


def _end(window: _Window, start: int) -> int | str:
    """The position behind the value at start, or why it has no end."""
    first = window.data[start]
    if first not in b'{["':
        return _scalar_end(window, start)
    closers, pos, quoted = bytearray(), start, False
    while True:
        match = (_IN_STRING if quoted else _BRACKET).search(window.data, pos)
        if match is None:
            pos = max(pos, len(window.data))  # an escape may reach beyond what is read
            if len(window.data) - start > MAX_VALUE_BYTES:
                return f"nothing closes it within {MAX_VALUE_BYTES >> 20} MB"
            if not window.more():
                return "the file ends inside it"
            continue
        byte, pos = window.data[match.start()], match.end()
        if quoted:
            if byte == ord("\\"):
                pos += 1
            elif byte != ord('"'):
                return "a string without its closing quote"
            else:
                quoted = False
        elif byte == ord('"'):
            quoted = True
        elif byte in _CLOSER:
            closers.append(_CLOSER[byte])
        elif not closers or closers.pop() != byte:
            return f"an unexpected {chr(byte)}"
        if not quoted and not closers:
            return pos


def _scalar_end(window: _Window, start: int) -> int | str:
    while True:
        match = _SCALAR.match(window.data, start)
        if match is None:
            return f"an unexpected {chr(window.data[start])}"
        if match.end() < len(window.data) or not window.more():
            return match.end()
        if len(window.data) - start > MAX_VALUE_BYTES:
            return "not JSON"


def _find(window: _Window, pattern: re.Pattern[bytes], pos: int) -> int:
    """The position of the next record start from pos on; the length of data when there is none."""
    while True:
        match = pattern.search(window.data, pos)
        if match:
            return match.start()
        pos = max(pos, len(window.data) - 256)  # a start may be cut in two
        pos = window.drop(pos)
        if not window.more():
            return len(window.data)


def _starts(keys: set[str], lines: bool) -> re.Pattern[bytes]:
    """What the start of a record looks like: its first key, and between values line by line a line of its own."""
    names, turns = (b"|".join(re.escape(json.dumps(key).encode()) for key in sorted(k)) for k in (keys, _TURN_KEYS))
    keyed = rb"\{\s{0,64}(?:" + names + rb")\s{0,64}:"
    return re.compile(keyed + (rb"|(?<=\n)\{\s{0,64}(?!" + turns + rb')"' if lines else b""))


def scan(file: BinaryIO) -> Iterator[Value | Broken]:
    """Yields the elements of an array, or of values one after another (JSON lines), each parsed or as Broken.

    Memory: one value (MAX_VALUE_BYTES where no end is found) and a chunk of 64 KB, whatever the file's size.
    """
    window, keys, number = _Window(file), set(_RECORD_KEYS), 0
    pos = window.gap(0)
    if pos >= len(window.data):
        return
    array = inside = window.data[pos] == ord("[")
    pos += array
    while (pos := window.gap(window.drop(pos))) < len(window.data):
        if array and window.data[pos] == (ord("]") if inside else ord("[")):  # more arrays may follow the first
            pos, inside = pos + 1, not inside
            continue
        number += 1
        start, end = window.base + pos, _end(window, pos)
        try:
            if isinstance(end, str):
                raise ValueError(end)
            value = json.loads(window.data[pos:end].decode())
        except (ValueError, RecursionError) as error:  # a UnicodeDecodeError is a ValueError
            yield Broken(number, start, " ".join(str(error).split())[:80])
            pos = _resume(window, pos, end, _starts(keys, lines=not array))
            if pos >= len(window.data):
                return
            continue
        size, pos = end - pos, window.gap(end)
        if pos < len(window.data) and window.data[pos] == ord(":"):  # a key: its record has lost its brace
            yield Broken(number, start, "an unexpected :")
            pos = _find(window, _starts(keys, lines=not array), pos)
            continue
        yield Value(number, start, size, value)
        first = next(iter(value), None) if isinstance(value, dict) else None
        if first and first not in _TURN_KEYS and len(keys) < 64:
            keys.add(first)
    if inside:
        yield Broken(number + 1, window.base + pos, "the file ends before its array does")


def _resume(window: _Window, pos: int, end: int | str, record: re.Pattern[bytes]) -> int:
    """Where to read on behind a broken value at pos.

    That is the next start of a record, since brackets that close well may have swallowed the next record with a broken
    one; behind a value that has an end and no such start inside, its end.
    """
    if isinstance(end, int) and window.data[pos] in b'{["':
        inside = record.search(window.data, pos + 1, end)
        return inside.start() if inside else end
    return _find(window, record, pos + 1)
