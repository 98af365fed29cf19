"""Reads a JSON file into a typed model; any file that does not fit is an error that names the file and the key."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import typing
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    ValidationError,
    create_model,
    model_validator,
)
from pydantic_core import CoreSchema, core_schema

from trtlab.errors import CheckpointError, TrtlabError
from trtlab.storage.paths import reading, require_file
from trtlab.validation import LISTED, listed, problems, shorten

LARGEST = 2**63 - 1  # of a 64-bit integer

T = TypeVar("T")


def _plain_name(name: str) -> str:
    """The name itself when it is that of a file in the same folder and valid on every file system."""
    if Path(name).name != name or name in ("", "..") or "\0" in name or len(name.encode(errors="replace")) > 255:
        raise ValueError("the name of a file in the same folder")
    return name


Count = Annotated[int, Field(ge=1)]
PlainName = Annotated[str, AfterValidator(_plain_name)]
Listed = Annotated[tuple[T, ...], Field(strict=False)]  # JSON has no tuples; the items stay strict


class StoredObject(BaseModel):
    """Base of the models of a JSON object: types are strict (a bool is not an int) and unknown keys are refused."""

    model_config = ConfigDict(
        strict=True, frozen=True, extra="forbid", allow_inf_nan=False, defer_build=True, protected_namespaces=()
    )
    neutral: ClassVar[Collection[str]] = ()
    """Unknown keys that are accepted with any value."""
    passes_empty: ClassVar[bool] = False
    """Whether an unknown key is accepted when its value switches nothing on: null, false, 0, or empty."""

    @model_validator(mode="before")
    @classmethod
    def _drop_accepted_keys(cls, raw: object) -> object:
        if not isinstance(raw, dict):
            raise ValueError(f"an object with the keys {', '.join(list(cls.model_fields)[:LISTED])}")
        return {key: value for key, value in raw.items() if key in cls.model_fields or not cls._is_accepted(key, value)}

    @classmethod
    def _is_accepted(cls, key: str, value: object) -> bool:
        return key in cls.neutral or (cls.passes_empty and not value)

    def stored_values(self) -> dict[str, Any]:
        """The values in the file, without the defaults of fields that it leaves out."""
        return {name: getattr(self, name) for name in type(self).model_fields if name in self.model_fields_set}


class OpenObject(StoredObject):
    """Base of the models of a JSON object whose unknown keys are ignored."""

    model_config = ConfigDict(extra="ignore")


class ByFields:
    """Reads a dataclass from the JSON object that ``dataclasses.asdict`` gives: ``Annotated[Row, ByFields()]``.

    Args:
        allow_inf_nan: Whether numbers may be infinite.
        **stricter: Fields that the file must have though the dataclass has a default, with their types.
    """

    def __init__(self, *, allow_inf_nan: bool = False, **stricter: Any) -> None:
        self._allow_inf_nan = allow_inf_nan
        self._stricter = stricter

    def __get_pydantic_core_schema__(self, kind: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        hints = typing.get_type_hints(kind, include_extras=True)
        fields: dict[str, Any] = {
            field.name: (_from_json(hints[field.name]), ... if _is_required(field) else None)
            for field in dataclasses.fields(kind)
        }
        fields |= {name: (hint, ...) for name, hint in self._stricter.items()}
        base = _WithInfinity if self._allow_inf_nan else StoredObject
        model: type[StoredObject] = create_model(kind.__name__, __base__=base, **fields)
        return core_schema.no_info_after_validator_function(
            lambda stored: kind(**stored.stored_values()), handler.generate_schema(model)
        )


class _WithInfinity(StoredObject):
    model_config = ConfigDict(allow_inf_nan=True)


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _from_json(hint: Any) -> Any:
    """The type as JSON stores it, with a list for a tuple."""
    return Annotated[hint, Field(strict=False)] if typing.get_origin(hint) is tuple else hint


S = TypeVar("S", bound=StoredObject)


def read_model(path: Path, kind: type[S], *, remedy: str, error: type[TrtlabError] = CheckpointError) -> S:
    """Read a JSON file into a model.

    Args:
        path: The file.
        kind: The model that it must fit.
        remedy: What to do about a file that does not fit.
        error: The class of error to raise.

    Raises:
        TrtlabError: Of the class ``error``, with the file's name and up to eight problems, each with its key: the file
            is missing, is not JSON, or holds keys or values that the model does not allow.
    """
    return parse_model(read_object(path, remedy=remedy, error=error), kind, str(path), remedy=remedy, error=error)


def parse_model(
    raw: dict[str, Any], kind: type[S], where: str, *, remedy: str, error: type[TrtlabError] = CheckpointError
) -> S:
    """``read_model`` for an object in memory; ``where`` names it in errors and is the context of its validators."""
    try:
        return kind.model_validate(raw, context=where)
    except ValidationError as refusal:
        raise error(f"{where} cannot be read: {listed(_lines(refusal, kind))}", remedy=remedy) from refusal


@contextlib.contextmanager
def naming(path: Path | str, *, remedy: str) -> Iterator[None]:
    """Name a file in the errors that its values cause within the block; those without a remedy get this one."""
    try:
        yield
    except TrtlabError as error:
        raise type(error)(
            f"{path}: {error.what}", got=error.got, expected=error.expected, remedy=error.remedy or remedy
        ) from error


def read_object(path: Path, *, remedy: str, error: type[TrtlabError] = CheckpointError) -> dict[str, Any]:
    """Read a JSON object from a file without checking its keys; an error when there is no file or no JSON object."""
    require_file(path, remedy=remedy, error=error)
    with reading(path, remedy=remedy, error=error):
        content = path.read_bytes()
    try:
        value = json.loads(content.decode(), parse_int=_integer)
    except (ValueError, RecursionError) as cause:
        raise error(f"{path} is not JSON: {cause}", remedy=remedy) from cause
    if not isinstance(value, dict):
        raise error(f"{path} does not hold a JSON object", got=type(value).__name__, remedy=remedy)
    return value


class _LargeInteger:
    """An integer of more than 64 bits, which JSON allows: it fits no field, and is accepted where a key is ignored."""

    def __init__(self, digits: str) -> None:
        self._digits = digits

    def __repr__(self) -> str:
        return f"{self._digits[:20]}{'...' * (len(self._digits) > 20)} (more than 64 bits)"


def _integer(digits: str) -> int | _LargeInteger:
    small = len(digits) < 20 and abs(int(digits)) <= LARGEST  # int() refuses thousands of digits
    return int(digits) if small else _LargeInteger(digits)


def _lines(refusal: ValidationError, kind: type[StoredObject]) -> list[str]:
    """A line for each problem; that of an unknown key shows its value, so that a reader can see if it matters."""
    unknown = {
        "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in entry["loc"])[1:]: entry["input"]
        for entry in refusal.errors(include_url=False)
        if entry["type"] == "extra_forbidden"
    }
    return [
        f"{problem.field}={shorten(unknown[problem.field])} is unknown{f', {problem.remedy}' if problem.remedy else ''}"
        if problem.field in unknown
        else str(problem)
        for problem in problems(refusal, kind)
    ]
