"""The header of a GGUF file as lists that can be edited, and the bytes of a file of such a header."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Any

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, LIST = 8, 9
ALIGNMENT = 32


@dataclass
class Header:
    """The header of a file as lists that can be edited, and what follows it."""

    keys: list[tuple[str, int, Any]]  # name, type, value; of a list (type of its items, count, items)
    tensors: list[tuple[str, list[int], int, int]]  # name, dimensions, type, offset
    data: bytes
    counts: list[int] = field(default_factory=list)  # of tensors and keys, where they are not those of the lists

    def joined(self) -> bytes:
        """The bytes of a file of this header and data."""
        tensors, keys = self.counts or (len(self.tensors), len(self.keys))
        parts = [b"GGUF", struct.pack("<IQQ", 3, tensors % 2**64, keys % 2**64)]
        parts += [_text(name) + struct.pack("<I", kind) + _packed(kind, value) for name, kind, value in self.keys]
        for name, dimensions, kind, offset in self.tensors:
            parts += [_text(name), struct.pack("<I", len(dimensions)), *(struct.pack("<Q", d) for d in dimensions)]
            parts += [struct.pack("<IQ", kind, offset)]
        header = b"".join(parts)
        return header + bytes(-len(header) % ALIGNMENT) + self.data


def _text(text: str) -> bytes:
    encoded = text.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(encoded)) + encoded


def _packed(kind: int, value: Any) -> bytes:
    if kind == TEXT:
        return _text(value)
    if kind != LIST:
        return struct.pack("<" + SCALARS[kind], value) if kind in SCALARS else bytes(8)
    item, count, items = value
    return struct.pack("<IQ", item, count) + b"".join(_packed(item, one) for one in items)


class _Reader:
    def __init__(self, content: bytes) -> None:
        self.content, self.place = content, 4

    def number(self, kind: str) -> Any:
        (value,) = struct.unpack_from("<" + kind, self.content, self.place)
        self.place += struct.calcsize("<" + kind)
        return value

    def text(self) -> str:
        length = self.number("Q")
        self.place += length
        return self.content[self.place - length : self.place].decode()

    def value(self, kind: int) -> Any:
        if kind == TEXT:
            return self.text()
        if kind != LIST:
            return self.number(SCALARS[kind])
        item, count = self.number("I"), self.number("Q")
        return item, count, [self.value(item) for _ in range(count)]


def split(content: bytes) -> Header | None:
    """The header and data of a file; None when an earlier edit broke it."""
    try:
        reader = _Reader(content)
        _, tensors, keys = (reader.number(kind) for kind in "IQQ")
        stored = []
        for _ in range(keys):
            name, kind = reader.text(), reader.number("I")
            stored.append((name, kind, reader.value(kind)))
        table = []
        for _ in range(tensors):
            name, dimensions = reader.text(), reader.number("I")
            shape = [reader.number("Q") for _ in range(dimensions)]
            table.append((name, shape, reader.number("I"), reader.number("Q")))
    except (struct.error, ValueError, KeyError, MemoryError, OverflowError):
        return None
    return Header(stored, table, content[-(-reader.place // ALIGNMENT) * ALIGNMENT :])
