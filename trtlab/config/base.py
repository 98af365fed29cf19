"""The base of settings classes: fields that are checked when an instance is made, each with its own docstring."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, TypeVar, dataclass_transform

import numpy as np
import pydantic.dataclasses
import torch
from pydantic import ConfigDict, Field, ValidationError

from trtlab.card import card, html
from trtlab.config.docs import DocWithFields, first_sentence
from trtlab.config.names import belongs_to, field_called, field_like, value_meant
from trtlab.errors import ConfigError
from trtlab.validation import Problem, combine, fields_of, problems

T = TypeVar("T")
PositiveInt = Annotated[int, Field(ge=1, lt=2**63)]
NotNegativeInt = Annotated[int, Field(ge=0, lt=2**63)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**64)]  # what torch.Generator takes
PositiveFloat = Annotated[float, Field(gt=0)]
NotNegativeFloat = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
PositiveShare = Annotated[float, Field(gt=0, le=1)]

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
NUMPY_SCALARS = {np.bool_: bool, np.integer: int, np.floating: float, np.str_: str}
PLAIN = frozenset({int, float, bool, str, type(None)})
DEEPEST_LIST = 4  # lists within lists that are made tuples; no setting nests deeper


class Settings:
    """Base of the settings classes: ``repr`` is Python code that makes an equal object, a notebook shows a table."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    def _repr_html_(self) -> str:
        return html(card(self))

    @classmethod
    def remedy_for_unknown(cls, name: str) -> str | None:
        """The remedy for a keyword that is not a field, None where there is none of its own."""
        return None


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def settings(kind: type[T]) -> type[T]:
    """Make a class of fields a frozen dataclass whose values are checked by their declared types.

    Scalars of numpy and torch become Python's, lists become tuples; a bool does not pass as an int, nor a str as a
    number. Any other value is a ConfigError that names the class and the field. A ``__repr__`` that the class inherits
    is kept.
    """
    keeps_repr = kind.__repr__ is not object.__repr__
    checked: Any = pydantic.dataclasses.dataclass(frozen=True, repr=not keeps_repr, config=STRICT)(kind)
    validate = checked.__init__

    @functools.wraps(validate)
    def __init__(self: T, /, *values: Any, **named: Any) -> None:
        try:
            validate(self, *map(normalize, values), **{name: normalize(value) for name, value in named.items()})
        except ValidationError as error:
            given = {**dict(zip(fields_of(checked), values, strict=False)), **named}
            raise _config_error(error, checked, given) from error

    checked.__init__ = __init__
    checked.__doc__ = DocWithFields(kind.__doc__ or "")
    return checked  # type: ignore[no-any-return]


def normalize(value: Any, depth: int = DEEPEST_LIST) -> Any:
    """The value with scalars of numpy and torch as Python's and lists as tuples; any other is returned unchanged."""
    if type(value) in PLAIN:
        return value
    if isinstance(value, (list, tuple)) and depth:
        return tuple(normalize(item, depth - 1) for item in value)
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value[()]
    if isinstance(value, torch.Tensor) and value.ndim == 0 and value.layout == torch.strided and not value.is_meta:
        return value.item()
    if isinstance(value, np.generic):
        for scalar, plain in NUMPY_SCALARS.items():
            if isinstance(value, scalar):
                return plain(value)
    return value


def python_code(chosen: Settings) -> str:
    """The Python expression that makes these settings, without the fields at their defaults or derived from others."""
    arguments = [
        f"{field.name}={getattr(chosen, field.name)!r}"
        for field in dataclasses.fields(chosen)
        if getattr(chosen, field.name) != default_of(field) and not _is_derived(chosen, field)
    ]
    return f"{type(chosen).__name__}({', '.join(arguments)})"


def _is_derived(chosen: Settings, field: dataclasses.Field[Any]) -> bool:
    """Whether the other fields give a field its value, such as ``world_size``."""
    try:
        return default_of(field) is None and dataclasses.replace(chosen, **{field.name: None}) == chosen
    except ConfigError:
        return False


def default_of(field: dataclasses.Field[Any]) -> Any:
    """A field's default, ``dataclasses.MISSING`` where the field is required."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _config_error(error: ValidationError, kind: Any, named: Mapping[str, object]) -> ConfigError:
    """The problems as one ConfigError; a single problem without a remedy gets the meaning of its field."""
    listed = [_with_remedy(problem, kind, named.get(problem.field)) for problem in problems(error, kind)]
    if len(listed) == 1 and listed[0].remedy is None:
        name = listed[0].field.split("[")[0].split(".")[0]
        meaning = first_sentence(kind, name)
        remedy = f"{name}: {meaning[0].lower()}{meaning[1:]}" if meaning else None
        listed = [dataclasses.replace(listed[0], remedy=remedy)]
    return combine(ConfigError, listed, kind.__name__, ".")


def _with_remedy(problem: Problem, kind: Any, value: object) -> Problem:
    """Say what was meant: the field of an unknown name, the choice of a refused value."""
    name = problem.field
    if problem.what == "is unknown":
        remedy = kind.remedy_for_unknown(name) or _remedy_for_name(name, kind, value)
        return problem if remedy is None else dataclasses.replace(problem, expected=None, remedy=remedy)
    meant = value_meant(fields_of(kind).get(name), value) if problem.what == "is not valid" else None
    return problem if meant is None else dataclasses.replace(problem, expected=None, remedy=f"did you mean {meant!r}?")


def _remedy_for_name(name: str, kind: Any, value: object) -> str | None:
    """The field of the class that has this name elsewhere, the class that has such a field, or a similar field."""
    elsewhere = None if field_called(kind, name) else belongs_to(name, value, Settings.__subclasses__())
    field = field_called(kind, name) or field_like(kind, name)
    return elsewhere or (f"did you mean {field}?" if field else None)
