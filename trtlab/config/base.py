"""What all settings share: fields whose types are checked, and a table of them in a notebook."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Sequence
from functools import cache
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from trtlab.card import Card, Table, card, html
from trtlab.errors import ConfigError

T = TypeVar("T")
WORDS = {int: "a whole number", float: "a number", bool: "True or False", str: "a text", types.NoneType: "None"}


class Settings:
    """Base of frozen dataclasses that a user fills in: ``repr`` can be typed again, a notebook shows a table."""

    def _repr_html_(self) -> str:
        return html(card(self))


@card.register
def settings_card(settings: Settings) -> Card:
    """Every field with its value, and the default where the value is another."""
    fields = dataclasses.fields(settings)  # type: ignore[arg-type]
    rows = []
    for field in fields:
        value, default = getattr(settings, field.name), default_of(field)
        rows.append((field.name, repr(value), "" if value == default else _said(default)))
    typed = (("as one types it", written(settings)),)
    return Card(type(settings).__name__, typed, (Table(("setting", "value", "default"), tuple(rows)),))


def written(settings: Any) -> str:
    """Settings as one would type them: what is at its default is left out."""
    given = [
        f"{field.name}={getattr(settings, field.name)!r}"
        for field in dataclasses.fields(settings)
        if getattr(settings, field.name) != default_of(field)
    ]
    return f"{type(settings).__name__}({', '.join(given)})"


def default_of(field: dataclasses.Field[Any]) -> Any:
    """A field's default, ``dataclasses.MISSING`` when it must be given."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _said(default: Any) -> str:
    return "must be given" if default is dataclasses.MISSING else repr(default)


def check_types(settings: Any) -> None:
    """ConfigError naming the first field whose value is not of the type that it is declared with.

    Bool is no number here, and a text is no sequence of texts: both would pass silently and mean something else.
    """
    kind: Any = type(settings)
    for name, hint in _hints(kind).items():
        value = getattr(settings, name)
        if not _is_a(value, hint):
            raise ConfigError(
                f"{type(settings).__name__}.{name} has the wrong type", got=repr(value), expected=_words(hint)
            )


def require(kind: type[T], value: object, example: str) -> T:
    """The value itself; ConfigError with an example to type when it is not of that kind."""
    if not isinstance(value, kind):
        raise ConfigError(f"this is no {kind.__name__}", got=repr(value), expected=example)
    return value


@cache
def _hints(kind: Any) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _options(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (types.UnionType, Union) else (hint,)


def _is_a(value: object, hint: Any) -> bool:
    for option in _options(hint):
        if get_origin(option) in (tuple, Sequence):
            listed = isinstance(value, (list, tuple))
            if listed and all(_is_a(item, get_args(option)[0]) for item in value):  # type: ignore[attr-defined]
                return True
        elif option is float:
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                return True
        elif isinstance(value, option) and (option is bool or not isinstance(value, bool)):
            return True
    return False


def _words(hint: Any) -> str:
    parts = []
    for option in _options(hint):
        if get_origin(option) in (tuple, Sequence):
            parts.append(f"a list or tuple, each item {_words(get_args(option)[0])}")
        else:
            parts.append(WORDS.get(option, f"a {option.__name__}"))
    return " or ".join(parts)
