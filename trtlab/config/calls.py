"""Checks the arguments of public calls: a wrong name or type is a ConfigError that says what was meant."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Annotated, Any, Literal, NoReturn, TypeVar, cast, get_args, get_origin

from pydantic import TypeAdapter, ValidationError

from trtlab.config.base import STRICT, Settings, normalize, python_code
from trtlab.config.names import belongs_to, code, field_called, field_like, usage, value_meant
from trtlab.errors import ConfigError
from trtlab.validation import choices, combine, describe, did_you_mean, fields_of, options, problems, shorten

Item = TypeVar("Item", bound=Callable[..., Any])
MISSING = object()
SIMPLE = (bool, int, float, str, NoneType)  # types whose values are checked, besides Literal and settings


def public(item: Item) -> Item:
    """Check the arguments of each call of a function, or of a class's constructor and public methods.

    A name that is not in the signature, a missing argument and a value of another type are ConfigErrors. Values of
    bool, int, float, str and ``Literal`` are checked strictly, and may be scalars of numpy and torch; of any other
    value only the outer type is checked: paths, and items without bounds, are the function's to check.
    """
    if not isinstance(item, type):
        return cast(Item, _checked(item))
    for name, member in vars(item).copy().items():
        if name.startswith("_") and (name != "__init__" or dataclasses.is_dataclass(item)):
            continue
        if isinstance(member, (classmethod, staticmethod)):
            setattr(item, name, type(member)(_checked(member.__func__)))
        elif inspect.isfunction(member):
            setattr(item, name, _checked(member))
    return item


def _checked(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def checked(*values: Any, **named: Any) -> Any:
        bound = _call(function).bind(values, named)
        return function(*bound.args, **bound.kwargs)

    return checked


@functools.cache
def _call(function: Callable[..., Any]) -> Call:
    """What is known of a function; read at its first call, when all names in its annotations exist."""
    signature = inspect.signature(function)
    annotations = typing.get_type_hints(function, include_extras=True)
    hints = {name: annotations[name] for name in signature.parameters if name in annotations}
    adapters = {name: TypeAdapter(hint, config=STRICT) for name, hint in hints.items() if _is_plain(hint)}
    kinds = {name: _kinds(hint) for name, hint in hints.items() if name not in adapters and _kinds(hint)}
    return Call(function.__qualname__.removesuffix(".__init__"), signature, hints, adapters, kinds)


def _is_plain(hint: Any) -> bool:
    """Whether an adapter checks all of a value: plain types, and sequences of items with bounds."""
    if get_origin(hint) in (Sequence, tuple):
        return all(get_origin(item) is not None and _is_plain(item) for item in get_args(hint))
    plain = [get_args(option)[0] if get_origin(option) is Annotated else option for option in options(hint)]
    return all(kind in SIMPLE or get_origin(kind) is Literal for kind in plain)


def _kinds(hint: Any) -> tuple[Any, ...]:
    """The types of which a value must have one, as far as its outside shows; empty where the function must look."""
    kinds = options(hint)
    bases = [get_origin(kind) or kind for kind in kinds]
    anything = any(not isinstance(base, type) or base in (Any, Sequence, os.PathLike) for base in bases)
    return () if anything or (len(kinds) > 1 and any(map(_is_protocol, bases))) else kinds


def _is_protocol(kind: type) -> bool:
    return getattr(kind, "_is_protocol", False)


def _admits(kind: Any, value: object) -> bool:
    base = get_origin(kind) or kind
    if base is type:
        return isinstance(value, type) and issubclass(value, get_args(kind))
    if _is_protocol(base):
        members = [name for name in vars(base) if not name.startswith("_")]
        return all(inspect.getattr_static(value, name, MISSING) is not MISSING for name in members)
    return isinstance(value, base)


@dataclass(frozen=True)
class Call:
    """The signature of a public function and its types: those that an adapter checks, and those of other values."""

    name: str
    signature: inspect.Signature
    hints: Mapping[str, Any]
    adapters: Mapping[str, TypeAdapter[Any]]
    kinds: Mapping[str, tuple[Any, ...]]

    @functools.cached_property
    def settings(self) -> Mapping[str, type[Settings]]:
        """The arguments that are settings, with their class."""
        classes = {name: [kind for kind in kinds if kind is not NoneType] for name, kinds in self.kinds.items()}
        return {name: kinds[0] for name, kinds in classes.items() if all(issubclass(kind, Settings) for kind in kinds)}

    def bind(self, values: tuple[Any, ...], named: Mapping[str, Any]) -> inspect.BoundArguments:
        """The arguments of one call by name, scalars as Python's; ConfigError when they do not fit."""
        try:
            bound = self.signature.bind(*values, **named)
        except TypeError:
            self._refuse_arguments(values, named)
            raise
        for name, value in bound.arguments.items():
            bound.arguments[name] = self._value(name, value)
        return bound

    def _value(self, name: str, value: object) -> object:
        if name in self.adapters:
            return self._plain_value(name, value)
        if name in self.kinds and not any(_admits(kind, value) for kind in self.kinds[name]):
            meant = self._settings_meant(self.settings[name], value) if name in self.settings else None
            raise ConfigError(
                f"{self.name}: {name} is not valid",
                got=shorten(value),
                expected=describe(self.hints[name]),
                remedy=f"use {meant}" if meant else None,
            )
        return value

    def _plain_value(self, name: str, value: object) -> object:
        try:
            return self.adapters[name].validate_python(normalize(value))
        except ValidationError as error:
            meant = value_meant(self.hints[name], value)
            remedy = None if meant is None else f"did you mean {meant!r}?"
            found = problems(error, self.hints[name])
            listed = [dataclasses.replace(each, field=name + each.field, remedy=remedy) for each in found]
            raise combine(ConfigError, listed, self.name) from error

    def _settings_meant(self, kind: type[Settings], value: object) -> str | None:
        """What to give in place of a value that is no such settings."""
        return self._place_of(value) or settings_from(kind, value) or usage(kind)

    def _place_of(self, value: object) -> str | None:
        """The argument that takes this value, or another call that takes these settings."""
        for name, kind in self.settings.items():
            if isinstance(value, kind):
                return f"{name}={python_code(value)}"
        for name, hint in self.hints.items():
            if isinstance(value, str) and choices(hint) and (meant := value_meant(hint, value)) is not None:
                return f"{name}={meant!r}"
        return usage(type(value), python_code(value)) if isinstance(value, Settings) else None

    def _refuse_arguments(self, values: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        """Raise ConfigError for arguments that the signature does not bind."""
        parameters = list(self.signature.parameters.values())
        by_position = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        own = by_position[0] if by_position[:1] in (["self"], ["cls"]) else None
        if len(values) > len(by_position) and not any(p.kind is p.VAR_POSITIONAL for p in parameters):
            most = len(by_position) - (own is not None)
            raise ConfigError(
                f"{self.name} takes at most {most} arguments by position", remedy="give the others by name"
            )
        for twice in [name for name in by_position[: len(values)] if name in named]:
            raise ConfigError(f"{self.name}: {twice} is given twice, by position and by name")
        known = [p.name for p in parameters if p.name != own]
        unknown = {name: value for name, value in named.items() if name not in known}
        given = self.signature.bind_partial(*values, **{n: v for n, v in named.items() if n not in unknown}).arguments
        if unknown:
            self._refuse_names(unknown, known, given)
        for missing in [p.name for p in parameters if p.default is p.empty and p.name not in given]:
            example = usage(self.settings[missing]) if missing in self.settings else None
            raise ConfigError(f"{self.name} needs {missing}", remedy=f"use {example}" if example else None)

    def _refuse_names(
        self, unknown: Mapping[str, object], known: Sequence[str], given: Mapping[str, object]
    ) -> NoReturn:
        """Raise ConfigError for names that are not in the signature, with what was meant by each."""
        remedies, fields = list[str](), dict[str, dict[str, object]]()
        for name, value in unknown.items():
            meant = self._meant(name, value, known)
            if isinstance(meant, tuple):
                parameter, field = meant
                fields.setdefault(parameter, {})[field] = value
            elif meant is not None:
                remedies.append(meant)
        settings = [
            f"{parameter}={settings_with(self.settings[parameter], given.get(parameter), chosen)}"
            for parameter, chosen in fields.items()
        ]
        remedies = ([f"use {', '.join(settings)}"] if settings else []) + remedies
        raise ConfigError(
            f"{self.name} has no argument{'s' if len(unknown) > 1 else ''} {', '.join(unknown)}",
            expected=None if remedies else " | ".join(known) or "none",
            remedy="; ".join(remedies) or None,
        )

    def _meant(self, name: str, value: object, known: Sequence[str]) -> tuple[str, str] | str | None:
        """What a name stands for: a parameter and a field of its settings, or a remedy in words."""
        special = (kind.remedy_for_unknown(name) for kind in self.settings.values())
        return (
            self._setting(name, field_called)
            or next((remedy for remedy in special if remedy is not None), None)
            or belongs_to(name, value, Settings.__subclasses__())
            or did_you_mean(name, known)
            or self._setting(name, field_like)
        )

    def _setting(self, name: str, find: Callable[[type, str], str | None]) -> tuple[str, str] | None:
        for parameter, kind in self.settings.items():
            if (field := find(kind, name)) is not None:
                return parameter, field
        return None


def settings_from(kind: type[Settings], value: object) -> str | None:
    """The Python code of settings made from a dict of fields or from the first field's value; None if it has none."""
    try:
        made = kind(**value) if isinstance(value, dict) else kind(value)  # type: ignore[call-arg]
    except (ConfigError, TypeError):
        return None
    return python_code(made)


def settings_with(kind: Any, given: object, fields: Mapping[str, Any]) -> str:
    """The Python code of the given settings, or of new ones, with these fields."""
    meant = {name: value_meant(fields_of(kind)[name], value) for name, value in fields.items()}
    fields = {name: value if meant[name] is None else meant[name] for name, value in fields.items()}
    try:
        return python_code(dataclasses.replace(given, **fields) if isinstance(given, kind) else kind(**fields))
    except ConfigError:
        return code(kind, fields)
