"""Random changes of a JSON document: of its values and keys, and of its text."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from random import Random
from typing import Any

LONG = "x" * 300
ODD_NUMBERS = (
    0, -1, 1, 2, 3, 7, 31, 255, 2**15, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, -(2**63), 2**63, 2**64, 10**19,
    10**30, 10**400, 0.0, -0.0, 0.5, 1.0, 1.5, -1.5, 1e-6, 1e-46, 1e-300, 5e-324, 1e30, 1e39, 1e300,
    float("inf"), float("-inf"), float("nan"),
)  # fmt: skip
ODD_TEXTS = (
    "", " ", "0", "1", "2", "true", "null", "none", "auto", "linear", "</s>", "a", "ä", "🙂", "\0", "\n", "\ud800",
    "../x", "/etc/passwd", "~", "{outside}/secret.json", "https://127.0.0.1/x", LONG, "x" * 20_000, "%s%n", "<b>x</b>",
    "float16", "bfloat16", "float32", "float64", "int8", "fp8", "W8A16", "INT8",
)  # fmt: skip
ODD_OTHERS: tuple[Any, ...] = (
    None,
    True,
    False,
    [],
    {},
    [None],
    [[]],
    [[1]],
    [{}],
    {"": 0},
    {"a": {"b": [1]}},
    [0, 0],
    [1, 2, 3],
)
NESTED = 200  # levels of a deep value
VERY_NESTED = 100_000


def odd_value(rng: Random) -> Any:
    """A value that a JSON file may hold and that few readers expect."""
    pick = rng.random()
    if pick < 0.4:
        return rng.choice(ODD_NUMBERS)
    if pick < 0.65:
        return rng.choice(ODD_TEXTS)
    if pick < 0.9:
        return copy.deepcopy(rng.choice(ODD_OTHERS))
    return rng.choice((_nested, _wide, _long_list))(rng)


def _nested(rng: Random) -> Any:
    value: Any = 1
    for _ in range(NESTED):
        value = [value] if rng.random() < 0.5 else {"a": value}
    return value


def _wide(rng: Random) -> Any:
    return {f"k{number}": number for number in range(rng.choice((50, 2000)))}


def _long_list(rng: Random) -> Any:
    return [rng.choice(ODD_NUMBERS[:10])] * rng.choice((50, 5000))


def near_value(value: Any, rng: Random) -> Any:
    """A value that a person might have written in place of this one."""
    if isinstance(value, bool):
        return rng.choice((not value, int(value), str(value).lower(), None))
    if isinstance(value, (int, float)) and not abs(value) > 1e300:
        near = [value + 1, value - 1, value * 2, -value, float(value), str(value), [value], {"value": value}, value / 2]
        return rng.choice([*near, value * 10, value * 1000, value // 2, value * 1e-6, None])
    if isinstance(value, str):
        near = [value.upper(), value.lower(), value + " ", value[:-1], value + value, [value], {value: value}, None]
        return rng.choice([*near, value.encode().hex(), value.replace("e", "é")])
    if isinstance(value, list):
        return rng.choice((value[:-1], value + value, value[::-1], [value], dict(enumerate(value)), None))
    if isinstance(value, dict):
        return rng.choice((list(value), list(value.values()), {"value": value}, {}, json.dumps(value)[:5000], None))
    return odd_value(rng)


Place = tuple[Any, Any]  # a dict or list, and the key or index in it


def _step(value: Any, rng: Random) -> Any:
    keys = list(value) if isinstance(value, dict) else range(len(value))
    return rng.choice(keys)


def random_place(document: Any, rng: Random) -> Place | None:
    """A random place, reached from the root, so that a table of a thousand rows is as likely as a single key."""
    place, value = None, document
    while isinstance(value, (dict, list)) and value:
        key = _step(value, rng)
        place, value = (value, key), value[key]
        if rng.random() < 0.3:
            break
    return place


class JsonEdits:
    """Edits of one JSON document; ``likely`` has values that a key may well have, ``extra`` keys that it may gain."""

    def __init__(self, likely: Mapping[str, Sequence[Any]] | None = None, extra: Mapping[str, Any] | None = None):
        self.likely = dict(likely or {})
        self.extra = dict(extra or {})
        self._edits: list[tuple[float, Callable[[Any, Random], str]]] = [
            (5, self._odd),
            (4, self._near),
            (2, self._remove),
            (1.5, self._unknown),
            (0.7, self._rename),
            (0.7, self._swap),
            (0.5, self._wrap),
        ]
        if self.likely:
            self._edits.append((12, self._likely))
        if self.extra:
            self._edits.append((3, self._extra))

    def change(self, document: Any, rng: Random) -> str:
        """Change the document in place; returns what was done."""
        weights = [weight for weight, _ in self._edits]
        (edit,) = rng.choices([edit for _, edit in self._edits], weights)
        return edit(document, rng)

    def change_text(self, text: bytes, rng: Random) -> tuple[bytes, str]:
        """The document's text with one change: mostly of a value or a key, sometimes of its bytes."""
        if rng.random() < 0.12:
            return broken_text(text, rng)
        try:
            document = json.loads(text)
            what = self.change(document, rng)
            return json.dumps(document).encode(), what
        except (ValueError, RecursionError):  # an earlier edit broke it
            return broken_text(text, rng)

    def _odd(self, document: Any, rng: Random) -> str:
        return _put(random_place(document, rng), odd_value(rng))

    def _near(self, document: Any, rng: Random) -> str:
        place = random_place(document, rng)
        return _put(place, near_value(place[0][place[1]], rng)) if place else "nothing"

    def _likely(self, document: Any, rng: Random) -> str:
        key = rng.choice(list(self.likely))
        holders = [holder for holder in objects(document) if key in holder] or list(objects(document))[:1]
        return _put((rng.choice(holders), key), copy.deepcopy(rng.choice(self.likely[key]))) if holders else "nothing"

    def _extra(self, document: Any, rng: Random) -> str:
        holders = list(objects(document))
        key = rng.choice(list(self.extra))
        return _put((rng.choice(holders[:4]), key), copy.deepcopy(self.extra[key])) if holders else "nothing"

    def _remove(self, document: Any, rng: Random) -> str:
        place = random_place(document, rng)
        if place is None:
            return "nothing"
        del place[0][place[1]]
        return f"removed {place[1]!r:.60}"

    def _unknown(self, document: Any, rng: Random) -> str:
        holders = list(objects(document))
        if not holders:
            return "nothing"
        key = rng.choice(("surprise", "_private", "", "\0", LONG, "\ud800", "__class__", "<b>", "Vocab_Size", "a.b[0]"))
        return _put((rng.choice(holders[:8]), key), odd_value(rng))

    def _rename(self, document: Any, rng: Random) -> str:
        place = random_place(document, rng)
        if place is None or not isinstance(place[0], dict):
            return "nothing"
        holder, key = place
        name = rng.choice((key.upper(), key[:-1], key + "s", "_" + key, key.replace("_", "")))
        holder[name] = holder.pop(key)
        return f"renamed {key!r:.60} to {name!r:.60}"

    def _swap(self, document: Any, rng: Random) -> str:
        first, second = random_place(document, rng), random_place(document, rng)
        if first is None or second is None:
            return "nothing"
        value = copy.deepcopy(second[0][second[1]])
        return _put(first, value)

    def _wrap(self, document: Any, rng: Random) -> str:
        place = random_place(document, rng)
        if place is None:
            return "nothing"
        value = place[0][place[1]]
        return _put(place, rng.choice(([value], {"value": value}, [value, value])))


def objects(value: Any) -> Iterator[dict[str, Any]]:
    """Every object of a document, the outermost first; of a long list or table only the first items are searched."""
    if isinstance(value, dict):
        yield value
    children = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    for child in children[:50]:
        yield from objects(child)


def _put(place: Place | None, value: Any) -> str:
    if place is None:
        return "nothing"
    place[0][place[1]] = value
    try:
        shown = f"{value!r:.80}"
    except ValueError:  # an int of thousands of digits has no repr
        shown = "a long int"
    return f"{place[1]!r:.60} = {shown}"


def broken_text(text: bytes, rng: Random) -> tuple[bytes, str]:
    """The bytes of a file with one change that knows nothing of their meaning."""
    name = rng.choice(list(BREAKS))
    return BREAKS[name](text, rng), name


def _place_in(text: bytes, rng: Random) -> int:
    return rng.randrange(len(text) + 1)


def _cut_out(text: bytes, rng: Random) -> bytes:
    start = _place_in(text, rng)
    return text[:start] + text[start + rng.randrange(1, 20) :]


def _flip(text: bytes, rng: Random) -> bytes:
    changed = bytearray(text)
    for _ in range(rng.choice((1, 1, 5))):
        if changed:
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _insert(text: bytes, rng: Random) -> bytes:
    start = _place_in(text, rng)
    return (
        text[:start] + rng.choice((b"\0", b"\xff", b",", b"}", b"{", b'"', b"9" * 5000, b"\\u", b"NaN")) + text[start:]
    )


def _deep(text: bytes, rng: Random) -> bytes:
    start = rng.choice((b"[", b'{"a":'))
    return start * VERY_NESTED + (b"" if rng.random() < 0.5 else (b"]" if start == b"[" else b"1}") * VERY_NESTED)


def _twice(text: bytes, rng: Random) -> bytes:
    """A key given twice: the first one again at the end, with another value."""
    key = text.split(b'"')[1] if text.count(b'"') > 1 else b"a"
    return text.rstrip().removesuffix(b"}") + b',"' + key + b'": 7}'


BREAKS: dict[str, Callable[[bytes, Random], bytes]] = {
    "truncated": lambda text, rng: text[: _place_in(text, rng)],
    "bytes cut out": _cut_out,
    "bits flipped": _flip,
    "bytes inserted": _insert,
    "empty": lambda text, rng: b"",
    "blank": lambda text, rng: b" \n",
    "another document": lambda text, rng: rng.choice(
        (b"null", b"[]", b"{}", b"0", b'"text"', b"true", b"[{}]", b"NaN")
    ),
    "a byte order mark": lambda text, rng: b"\xef\xbb\xbf" + text,
    "UTF-16": lambda text, rng: text.decode("utf-8", "replace").encode("utf-16"),
    "Latin-1": lambda text, rng: b'{"\xe9": 1, ' + text.lstrip()[1:],
    "text after the end": lambda text, rng: text + rng.choice((b"}", b"x", b"\0" * 100, text)),
    "very deep": _deep,
    "a key twice": _twice,
    "zeros": lambda text, rng: bytes(len(text)),
}
