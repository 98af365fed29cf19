"""Turns pydantic's validation errors into trtlab's, one line for each problem. Knows no setting and no file format."""

from __future__ import annotations

import difflib
import reprlib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from trtlab.errors import TrtlabError

T = TypeVar("T")
E = TypeVar("E", bound=TrtlabError)
NAMES: dict[Any, str] = {float: "number", Any: "value"}
BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}  # as annotated_types names them
EXTRA_ARGUMENT = "unexpected_positional_argument"
UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")
LISTED = 8  # problems that an error lists
LONGEST_VALUE = 80  # characters of a refused value that an error repeats


@dataclass(frozen=True)
class Problem:
    """One refused field: ``str(problem)`` is a line such as "size is 'x', expected an int of at least 1"."""

    field: str
    """Its place: ``size``, ``rotary_scaling.factor``, ``stop[1]``; empty when it is about the whole."""
    what: str
    """What is wrong with the field, as the end of a sentence: ``is missing``."""
    got: str | None = None
    """The refused value, as Python writes it."""
    expected: str | None = None
    """The values that are allowed."""
    remedy: str | None = None
    """What to do next."""

    def __str__(self) -> str:
        what = f"is {self.got}" if self.what == "is not valid" else self.what
        parts = [f"{self.field} {what}".strip()]
        if self.expected is not None:
            parts.append(f"expected {self.expected}")
        if self.remedy is not None:
            parts.append(self.remedy)
        return ", ".join(parts)


def problems(error: ValidationError, hint: Any) -> list[Problem]:
    """Every problem of one validation; a field that may have several types is listed once.

    Args:
        error: What pydantic raised.
        hint: The type that was validated: a class with fields, or an annotation such as ``dict[str, int]``.
    """
    entries: dict[str, tuple[Any, ErrorDetails]] = {}
    for entry in error.errors(include_url=False):
        field, expected = _place(entry["loc"], hint) if entry["type"] != EXTRA_ARGUMENT else ("", None)
        if field not in entries or len(entry["loc"]) < len(entries[field][1]["loc"]):
            entries[field] = expected, entry  # the shortest place shows the whole value, not an item of it
    return [_problem(field, expected, entry, hint) for field, (expected, entry) in entries.items()]


def combine(kind: type[E], listed: Sequence[Problem], owner: str, separator: str = ": ") -> E:
    """The problems of one object as one error: the parts of a single problem, a line for each of several.

    Args:
        kind: The class of the error, such as ``ConfigError``.
        listed: The problems, at least one.
        owner: The object that has the fields: a path, or the name of a settings class.
        separator: The text between the owner and a field, ``"."`` for a settings class.
    """
    if len(listed) > 1:
        return kind("\n".join(f"{owner}{separator if problem.field else ' '}{problem}" for problem in listed))
    (problem,) = listed
    place = f"{owner}{separator}{problem.field}" if problem.field else owner
    return kind(f"{place} {problem.what}", got=problem.got, expected=problem.expected, remedy=problem.remedy)


def describe(hint: Any, whole: bool = False) -> str:
    """A type as an error names it: ``an int of at least 1 or None``, ``linear | yarn``, ``a list or tuple of str``.

    With ``whole`` it includes the limits that are usually left out: finite numbers, ints of at most 64 bits.
    """
    return " or ".join(_describe_one(option, whole) for option in options(hint))


def options(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the one type itself."""
    base = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    if get_origin(base) in (types.UnionType, Union):
        return tuple(option for member in get_args(base) for option in options(member))
    return (hint,)


def did_you_mean(name: str, known: Iterable[str]) -> str | None:
    """A remedy that names the most similar of the known names, None when no name is similar."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {near[0]}?" if near else None


def choices(hint: Any) -> tuple[Any, ...]:
    """The values that a type lists, empty for a type that lists none."""
    return tuple(value for option in options(hint) if get_origin(option) is Literal for value in get_args(option))


def shorten(value: object) -> str:
    """The ``repr`` of a value on one line of at most 80 characters; it never raises."""
    try:
        text = " ".join(_SHORT.repr(value).split())
    except Exception:  # noqa: BLE001 - a repr may raise anything; that of an int of 5000 digits does
        text = f"<{type(value).__name__}>"
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 3]}..."


def listed(problems: Sequence[str], most: int = LISTED) -> str:
    """The first few of many problems, and how many more there are."""
    rest = [f"and {len(problems) - most} more"] if len(problems) > most else []
    return "; ".join([*problems[:most], *rest])


def with_article(name: str) -> str:
    """``an int``, ``a str``."""
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = LONGEST_VALUE


def _problem(field: str, expected: Any, entry: ErrorDetails, hint: Any) -> Problem:
    code, value = entry["type"], entry["input"]
    if code in UNKNOWN:
        parent = _place(entry["loc"][:-1], hint)[1]
        known = [name for option in options(parent) for name in fields_of(get_origin(option) or option)]
        name = str(entry["loc"][-1])
        remedy = did_you_mean(name, known)
        return Problem(field, "is unknown", expected=None if remedy else " | ".join(known) or None, remedy=remedy)
    if code == "missing":
        return Problem(field, "is missing", expected=None if expected is None else describe(expected))
    if code == EXTRA_ARGUMENT:
        return Problem("", f"takes at most {entry['loc'][-1]} arguments by position", remedy="give the others by name")
    if code == "multiple_argument_values":
        return Problem(field, "is given twice, by position and by name")
    if code == "json_invalid":
        return Problem(field, f"is not JSON: {entry['msg'].removeprefix('Invalid JSON: ')}")
    if expected is None or code == "value_error":
        message = entry["msg"].removeprefix("Value error, ")
        return Problem(field, "is not valid", shorten(value), message[:1].lower() + message[1:])
    beyond = type(value) is int and (code == "float_type" or abs(value) >= 2**63)  # what the usual limits leave out
    whole = beyond or code in ("finite_number", "less_than")
    return Problem(field, "is not valid", shorten(value), describe(expected, whole))


def _place(loc: Sequence[int | str], hint: Any) -> tuple[str, Any]:
    """The name and the type of a place inside a value; nothing inside a value of several types has its own name."""
    name = ""
    for part in loc:
        kinds = [option for option in options(hint) if option is not type(None)]
        if len(kinds) > 1:
            return name, hint
        names = list(fields_of(kinds[0])) if kinds and isinstance(part, int) else []
        part = names[part] if isinstance(part, int) and part < len(names) else part  # an argument by position
        hint = _inner(kinds[0], part) if kinds else None
        name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else part
    return name, hint


def _inner(hint: Any, part: int | str) -> Any:
    """The type of one field, of one item or of a key's value; None where it is unknown."""
    hint = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    base, arguments = get_origin(hint) or hint, get_args(hint)
    if base in (list, tuple, Sequence) and arguments and isinstance(part, int):
        same = base is not tuple or arguments[-1] is ...  # for all items
        return arguments[0] if same else arguments[part] if part < len(arguments) else None
    if base in (dict, Mapping) and arguments:
        return arguments[1]
    return fields_of(base).get(str(part))


@cache
def fields_of(kind: Any) -> dict[str, Any]:
    """The fields of a class with their types, under the names that a file or a caller uses."""
    if not isinstance(kind, type) or not getattr(kind, "__annotations__", None):
        return {}
    hints = typing.get_type_hints(kind, include_extras=True)
    known = getattr(kind, "__pydantic_fields__", None)
    if known is None:
        return hints
    return {str(info.validation_alias or info.alias or name): hints[name] for name, info in known.items()}


def _describe_one(hint: Any, whole: bool, article: bool = True) -> str:
    bounds = ""
    if get_origin(hint) is Annotated:
        hint, *metadata = get_args(hint)
        bounds = _bounds(metadata, whole)
    base, arguments = get_origin(hint) or hint, get_args(hint)
    if base is Literal:
        return " | ".join(str(value) for value in arguments)
    if base is type(None):
        return "None"
    if base in (list, tuple, Sequence):
        name = "list" if base is list else "list or tuple"
        name += f" of {_items(arguments[0])}" if arguments else ""
    elif base in (dict, Mapping):
        name = f"dict of {_items(arguments[0])} to {_items(arguments[1])}" if arguments else "dict"
    else:
        name = NAMES.get(base) or str(getattr(base, "__name__", base))
    name = f"finite {name}" if whole and base is float else name
    return (with_article(name) if article else name) + bounds


def _items(hint: Any) -> str:
    """The items of a list or a dict, without articles: ``str``, ``int of at least 1``."""
    return " or ".join(_describe_one(option, False, article=False) for option in options(hint))


def _bounds(metadata: Sequence[Any], whole: bool) -> str:
    """The limits of a number: `` of at least 0 and at most 1``, `` above 0``."""
    limits = [limit for item in metadata for limit in (item.metadata if isinstance(item, FieldInfo) else (item,))]
    parts = [
        f"{words} {value:g}"
        for limit in limits
        for attribute, words in BOUNDS.items()
        if (value := getattr(limit, attribute, None)) is not None and abs(value) < 2**63
    ]
    if whole and any(abs(getattr(limit, "lt", None) or 0) >= 2**63 for limit in limits):
        parts.append("at most 64 bits")
    text = " and ".join(parts)
    return f" of {text}" if text.startswith("at ") else f" {text}" if text else ""
